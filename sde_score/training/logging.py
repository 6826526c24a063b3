"""What training tells: on a terminal while it runs, and in a file of JSON lines for good."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from sde_score import _checks

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


class JsonLines:
    """Rows of metrics in a file, one JSON object a line; its three methods make any logger."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._file = self.path.open("a")

    def resume(self, step: int) -> dict[str, Any]:
        """Drop the rows after `step`, and a last line that a kill tore; returns the last row left.
        Another line that is no row raises an `ArgumentError`.
        """
        rows = []
        self._file.close()
        lines = self.path.read_bytes().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                after = row["step"] > step
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines):
                    break
                raise _checks.ArgumentError(
                    f"{self.path} must be lines of JSON with a step; its line {number} is not. "
                    "Mend it, or choose another folder."
                ) from error
            if after:
                break
            rows.append(row)
        partial = self.path.with_name(f".{self.path.name}.partial")
        with partial.open("w") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)
        self._file = self.path.open("a")
        return rows[-1] if rows else {}

    def write(self, row: dict[str, Any]) -> None:
        """One row, with its "step", on the disk before this returns."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more rows."""
        self._file.close()
