"""The quickstart, for speech that is heard while it is spoken: nothing in the model waits for the end of a clip."""

from configs import quickstart


def get_config():
    c = quickstart.get_config()
    c.model.normalisation = "streaming"
    return c
