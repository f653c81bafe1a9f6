"""BLSP-KD (arXiv 2405.19041): a CFormer, so that speech and text have equally many tokens; LoRA at these alone; KD.

Its KD on the answer needs responses that are the LLM's own (a base such as configs/questions.py); for transcripts, the
language-model loss takes its place.
"""

from configs import quickstart
from configs.systems import bridge


def get_config(base: str = quickstart.__file__):
    """`base`: as of `bridge`."""
    c = bridge.get_config(base)
    c.model.mask = "causal"
    c.embedder.kind = "cformer"
    c.lora.update(n_blocks=-1, rank=16, alpha=16.0, scope="audio")
    c.trainable = (("params/embedder/(?!text_rms)", 1.0), ("lora/", 1.0))
    c.train.stages.adapter.objectives.update(input_kd=1.0, quantity=1.0)
    return c
