"""Weights in: Hugging Face directories onto the mesh; CTranslate2 and GGUF files to Hugging Face directories."""
