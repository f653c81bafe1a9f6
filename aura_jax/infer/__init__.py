"""From speech or text to text: the adapted LLM, and the cascade that it is measured against."""
