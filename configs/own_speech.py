"""Your own clips and transcripts, with the quickstart's models and recipe: name them in data.train.

Hold some out by a key of the manifest's rows, e.g. data.validation_key="speaker", data.validation_values=("anna",).
"""

from configs import quickstart


def get_config():
    c = quickstart.get_config()
    c.data.train = ()
    c.data.validation_values = ()
    c.data.max_seconds = 15.0
    c.data.buckets = ()
    c.eval.sets = {}
    return c
