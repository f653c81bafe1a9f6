"""Whisper small into Qwen2.5-0.5B, for one GPU or one v5e chip; name your clips in data.train."""

from aura_jax.config import default, stage


def get_config():
    c = default()
    c.model.llm = "hf://Qwen/Qwen2.5-0.5B-Instruct"
    c.model.teacher = "hf://openai/whisper-small"
    c.model.update(dtype="bfloat16", param_dtype="bfloat16", remat="full")
    c.lora.update(n_blocks=12, rank=128, alpha=128.0)
    c.mesh.update(data=-1, fsdp=1)
    # 8,192 tokens a step. Needs 3.8 GiB of a v5e chip's 16 (aura-jax compile --topology v5e:1x1).
    c.data.update(layout="packed", batch_size=4, row_tokens=2048, row_clips=4)
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
