"""The configuration: every key with its default, read from a Python file and overridden on the command line."""

from aura_jax.config.keys import OBJECTIVES, Config, answer_objectives, default, stage, stages, total_steps
from aura_jax.config.reading import from_json, from_values, load, override, read, to_json
from aura_jax.config.rules import validate, validate_eval

__all__ = (
    "OBJECTIVES",
    "Config",
    "answer_objectives",
    "default",
    "from_json",
    "from_values",
    "load",
    "override",
    "read",
    "stage",
    "stages",
    "to_json",
    "total_steps",
    "validate",
    "validate_eval",
)
