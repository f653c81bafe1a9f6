"""Whisper large-v3 into Qwen2.5-7B on a slice of 64 TPU chips or more; name your clips in data.train.

The AuRA setup as far as it is known: this teacher, the LLM's first blocks, layer-wise distillation. The LLM, 24 of its
28 blocks and every linear are as in VoRA (arXiv 2503.20680), whose rank of 1,024 is --config.lora.rank=1024.
"""

from aura_jax.config import default, stage


def get_config():
    c = default()
    c.model.llm = "hf://Qwen/Qwen2.5-7B-Instruct"
    c.model.teacher = "hf://openai/whisper-large-v3"
    c.model.update(dtype="bfloat16", param_dtype="bfloat16", remat="full")
    c.lora.update(n_blocks=24, rank=256, alpha=256.0)
    # Weights and state are split over 16 chips, which is one ring of a v5e pod, and repeated over the rest.
    c.mesh.update(data=-1, fsdp=16)
    # 4 rows of 2,048 tokens for each of 256 chips, 2.1 million tokens a step: on 64 chips, data.batch_size=256.
    # Needs 10.1 GiB of a v5e chip's 16 (aura-jax compile --topology v5e:16x16).
    c.data.update(layout="packed", batch_size=1024, row_tokens=2048, row_clips=4)
    c.train.loss_chunk = 32768

    c.trainable = (  # as the quickstart, which measured it
        ("params/embedder/(?!text_rms)", 2.0),
        ("lora/.*/a$", 1.0),
        ("lora/.*/b$", 4.0),
        ("heads/", 2.0),
    )
    c.train.schedule = ("distil", "joint")
    c.train.stages.distil = stage(2000, 2e-4, {"distill": 1.0}, warmup_steps=200, clip_norm=5.0)
    c.train.stages.joint = stage(8000, 2e-4, {"lm": 1.0, "distill": 1.0}, warmup_steps=200)
    c.train.update(checkpoint_every=250, keep_every=2000)
    return c
