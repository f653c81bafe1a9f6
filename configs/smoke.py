"""Everything the quickstart does, on random tiny models: under two minutes, learns nothing, for CI."""

from aura_jax.config import stage
from configs import quickstart


def get_config():
    c = quickstart.get_config()
    c.model.llm = "random-llama-tiny"
    c.model.teacher = "random-whisper-tiny"
    c.lora.update(n_blocks=2, rank=8, alpha=8.0)
    c.data.buckets = (3.84,)  # one shape: compiling takes most of the time
    c.data.speeds = (0.9, 1.0)  # the teacher hears every clip at each of them
    c.data.update(batch_size=4, text_rows=2, text_length=32)
    c.train.stages.distil = stage(6, 1e-3, {"distill": 1.0, "text_anchor": 1.0})
    c.train.stages.joint = stage(6, 1e-3, {"lm": 1.0, "distill": 1.0, "text_anchor": 1.0})
    c.train.update(log_every=1, checkpoint_every=4, eval_every=6, eval_rows=4, profile_start=8)
    c.eval.update(max_new_tokens=8, batch_size=16)
    return c
