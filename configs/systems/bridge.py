"""A serial bridge, after Ultravox: Whisper's encoder, stacked frames, a SwiGLU, a frozen LLM.

It learns to transcribe, from the transcripts. KD on the answer would teach what the LLM does with the text of the same
words, and no small LLM repeats them on demand.
"""

from aura_jax.config import read, stage, total_steps
from configs import quickstart


def get_config(base: str = quickstart.__file__):
    """`base`: a config with a teacher, whose models, data and number of steps this system takes over."""
    c = read(base)
    c.model.encoder, c.model.teacher = c.model.teacher, ""
    c.model.mask = "bidirectional"  # its encoder has heard the whole clip anyway
    c.lora.update(n_blocks=0, text_energy=1.0)
    c.embedder.kind = "stack"
    c.data.text_pool = ""  # nothing changes the LLM's text
    c.kd.temperature = 2.0  # as Ultravox, where a stage turns KD on
    c.trainable = (("params/embedder/(?!text_rms)", 1.0),)
    steps = total_steps(c)
    c.train.schedule = ("adapter",)
    c.train.stages = {"adapter": stage(steps, 1e-3, {"lm": 1.0})}
    return c
