"""What `fit` tells while it runs: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import TypeAlias

Report: TypeAlias = Callable[[int, int, int, float], None]
"""`report(start, stop, num_steps, loss)`: steps start … stop − 1 of num_steps are done, with that
mean loss.
"""

_LINES = 10  # plain lines in a whole run


def report_progress(start: int, stop: int, num_steps: int, loss: float) -> None:
    """Write progress to standard error."""
    done = stop / num_steps
    if sys.stderr.isatty():
        bar = "█" * int(30 * done) + "·" * (30 - int(30 * done))
        sys.stderr.write(
            f"\r{bar} {stop}/{num_steps}  loss {loss:.4f}" + "\n" * (stop == num_steps)
        )
    elif stop * _LINES // num_steps > start * _LINES // num_steps:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} step {stop}/{num_steps}  loss {loss:.4f}\n")
    sys.stderr.flush()
