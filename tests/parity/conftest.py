"""What the tests of the step are made of."""

from tests.train.conftest import make_config, make_run

__all__ = ["make_config", "make_run"]
