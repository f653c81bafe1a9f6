"""After DiVA (arXiv 2410.02678): audio tokens like the transcript's, and a state that answers like that of the text."""

from configs import quickstart
from configs.systems import bridge


def get_config(base: str = quickstart.__file__):
    """`base`: as of `bridge`."""
    c = bridge.get_config(base)
    c.model.mask = "causal"
    c.train.stages.adapter.objectives.update(lm=0.0, response_kd=0.0, embedding_l2=1.0, hidden_l2=1.0)
    return c
