"""How well a system hears, and what hearing cost the LLM: scores, text losses, and runs over whole sets."""
