"""A serial bridge, after Ultravox: Whisper's encoder, stacked frames, a SwiGLU, a frozen LLM.

What teaches it is what teaches the base's answers: transcripts, or, as Ultravox has it, KD on what the LLM itself says
(a base such as configs/questions.py). KD cannot teach to transcribe: no small LLM repeats what it read on demand.
"""

from aura_jax.config import answer_objectives, read, stage, total_steps
from configs import quickstart


def get_config(base: str = quickstart.__file__):
    """`base`: a config with a teacher, whose models, data and number of steps this system takes over."""
    c = read(base)
    c.model.encoder, c.model.teacher = c.model.teacher, ""
    # Its encoder has heard the whole clip anyway, as Whisper hears it.
    c.model.update(mask="bidirectional", chunk=0, normalisation="whisper")
    c.lora.update(n_blocks=0, text_energy=1.0)
    c.embedder.kind = "stack"
    c.data.text_pool = ""  # nothing changes the LLM's text
    c.kd.temperature = 2.0  # as Ultravox
    c.trainable = (("params/embedder/(?!text_rms)", 1.0),)
    only = stage(total_steps(c), 1e-3, answer_objectives(c))
    c.train.schedule, c.train.stages = ("adapter",), {"adapter": only}
    return c
