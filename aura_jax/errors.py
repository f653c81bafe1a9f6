"""What a user did wrong, said in one line."""

import difflib
from collections.abc import Iterable

USER_MISTAKE, INTERRUPTED = 2, 130  # exit codes


class UserError(Exception):
    """A mistake of the user's: its text is one line that names the culprit and the mend (exit code 2)."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns the end of an error line about an unknown `name`: the closest valid one, or all of them."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"
