"""Other people's evaluation harnesses: a trained run as a model of theirs."""
