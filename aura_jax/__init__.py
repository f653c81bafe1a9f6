"""aura_jax: teach a text LLM to hear, by distilling a speech encoder into its LoRA."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aura_jax.api import Chat, Model, Reply, load

__version__ = "0.1.0"
__all__ = ["Chat", "Model", "Reply", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Imports the API when it is first asked for: the command line and its help need no jax."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from aura_jax import api

    return getattr(api, name)
