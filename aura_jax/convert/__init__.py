"""Weights in and out: Hugging Face, CTranslate2 and GGUF in; PEFT in and out; torch export."""
