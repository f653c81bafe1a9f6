"""aura_jax: teach a text LLM to hear, by distilling a speech encoder into its LoRA."""

__version__ = "0.1.0"
