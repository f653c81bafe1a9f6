"""A run to PyTorch, and back: PEFT adapters, Hugging Face directories, merged LLMs."""
