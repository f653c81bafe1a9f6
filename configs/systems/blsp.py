"""BLSP (arXiv 2309.00916): three stride-2 convolutions and a bottleneck between Whisper's encoder and a frozen LLM.

It learns what the LLM itself would say: `aura-jax data continue` writes these responses for a manifest. With manifests
as they are, it learns to transcribe.
"""

from configs import quickstart
from configs.systems import bridge


def get_config(base: str = quickstart.__file__):
    """`base`: as of `bridge`."""
    c = bridge.get_config(base)
    c.embedder.update(kind="conv", token_rate=6.25, hidden=512)
    c.train.stages.adapter.objectives.update(lm=1.0, response_kd=0.0)
    return c
