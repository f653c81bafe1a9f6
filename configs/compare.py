"""What `aura-jax compare` gives every system unless told otherwise: the quickstart's data, models and number of steps.

Beside what the quickstart scores: a learning curve on voices held out of training, noise, and what the LLM makes of the
right answer.
"""

from configs import quickstart


def get_config():
    c = quickstart.get_config()
    c.train.update(eval_every=100, eval_rows=64, profile_start=0, profile_steps=0)
    c.eval.noise.update(kinds=("white", "babble"), sets=("new sentences",))
    c.eval.likelihood = ("new voices and sentences",)
    return c
