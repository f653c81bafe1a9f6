"""Whisper large-v3 into Llama-3.1-8B on a slice of 64 TPU chips or more; name your clips in data.train.

The Hub hands out Llama's weights to those who accepted its licence: set HF_TOKEN.
"""

from configs import whisper_large_v3_qwen2_5_7b


def get_config():
    c = whisper_large_v3_qwen2_5_7b.get_config()
    c.model.llm = "hf://meta-llama/Llama-3.1-8B-Instruct"
    c.lora.n_blocks = 28  # of 32
    # Mesh, batch and tokens as there. Needs 9.2 GiB of a v5e chip's 16 (aura-jax compile --topology v5e:16x16).
    return c
