"""Benchmarks that come with the package: the train step beside its peer in torch."""
