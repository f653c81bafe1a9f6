"""Whisper large-v3 turbo into Qwen3-8B on a slice of 64 TPU chips or more; name your clips in data.train.

The turbo model has large-v3's encoder, trained further, and a decoder of 4 blocks, which only a cascade needs.
"""

from configs import whisper_large_v3_qwen2_5_7b


def get_config():
    c = whisper_large_v3_qwen2_5_7b.get_config()
    c.model.llm = "hf://Qwen/Qwen3-8B"
    c.model.teacher = "hf://openai/whisper-large-v3-turbo"
    c.lora.n_blocks = 32  # of 36: a block for each of the teacher's
    c.data.template_kwargs = {"enable_thinking": False}
    # Mesh, batch and tokens as there. Needs 11.5 GiB of a v5e chip's 16 (aura-jax compile --topology v5e:16x16).
    return c
