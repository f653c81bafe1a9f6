"""Open speech: sentences of books and manuals that are spoken by many voices, and the recordings, beside the commands.

`python benchmarks/open_domain.py` makes this speech, some hours of it, and trains on more and more of it. By hand:

    aura-jax data synthesize --text sample_data/text/train.jsonl --sentences 3,15 \\
        --hours 2 --output runs/open_domain/speech
"""

from configs import quickstart


def get_config():
    c = quickstart.get_config()
    c.data.train = (
        ("runs/open_domain/speech.jsonl", 1.0),
        ("sample_data/commands/train.jsonl", 0.3),
        ("sample_data/recordings/train.jsonl", 1.0),
    )
    c.data.max_seconds = 6.0
    c.data.buckets = (1.76, 2.72, 3.84, 5.0, 6.72)
    c.data.augment.update(noise_probability=0.3, noise_snr_db=(10.0, 30.0))
    c.train.stages.distil.steps, c.train.stages.joint.steps = 800, 700
    c.train.update(eval_every=250, eval_rows=64)
    return c
