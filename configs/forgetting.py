"""The quickstart on a short schedule, its text unprotected: what benchmarks/forgetting.py changes one thing of."""

from configs import quickstart


def get_config():
    c = quickstart.get_config()
    c.lora.text_energy = 1.0
    c.train.stages.distil.steps = 150
    c.train.stages.joint.steps = 100
    c.train.stages.joint.objectives.text_anchor = 0.0
    c.eval.sets = {"new voices": "sample_data/commands/test_new_voices.jsonl"}
    return c
