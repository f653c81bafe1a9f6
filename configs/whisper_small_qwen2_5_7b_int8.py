"""Whisper small into Qwen2.5-7B on one chip of 16 GB, the LLM held in int8; name your clips in data.train.

An export as hf or merged holds the LLM in bfloat16, for which the chip has no room: JAX_PLATFORMS=cpu aura-jax export.
"""

from aura_jax.config import default, stage


def get_config():
    c = default()
    c.model.llm = "hf://Qwen/Qwen2.5-7B-Instruct"
    c.model.teacher = "hf://openai/whisper-small"
    # 7.6 GiB of weights, where bfloat16 takes 14.2: linears and head in int8, the embeddings (1 GiB) in bfloat16.
    c.model.update(dtype="bfloat16", param_dtype="int8", remat="full")
    c.lora.update(n_blocks=24, rank=64, alpha=64.0)
    c.mesh.update(data=-1, fsdp=1)
    # 8,192 tokens a step, a row of 2,048 at a time.
    # Needs 14.7 GiB of a v5e chip's 16 (aura-jax compile --topology v5e:1x1).
    c.data.update(layout="packed", batch_size=4, row_tokens=2048, row_clips=4)
    c.train.accumulate = 4
    c.trainable = (
        ("params/embedder/(?!text_rms)", 2.0),
        ("lora/.*/a$", 1.0),
        ("lora/.*/b$", 4.0),
        ("heads/", 2.0),
    )
    c.train.loss_chunk = 256
    c.train.schedule = ("distil", "joint")
    c.train.stages.distil = stage(5000, 5e-4, {"distill": 1.0}, warmup_steps=200, clip_norm=5.0)
    c.train.stages.joint = stage(20000, 5e-4, {"lm": 1.0, "distill": 1.0}, warmup_steps=200)
    return c
