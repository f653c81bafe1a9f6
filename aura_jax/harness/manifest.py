"""What lmms-eval reads of every plug-in when it starts: where the model is, without importing it.

The entry point `aura_jax` of the group `lmms_eval.models` (pyproject.toml) is `manifest`.
"""

from typing import Any


def manifest() -> Any:
    """Returns the `ModelManifest` of lmms-eval 0.7 for `--model aura_jax`."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(model_id="aura_jax", simple_class_path="aura_jax.harness.lmms_eval.AuraJax")
