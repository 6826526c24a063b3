"""What every experiment shares: a command line, a JSON of its configuration and results, a folder
all or nothing.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tyro

Metrics = dict[str, float]


def cli(main: Callable[[Any], Metrics], default: Any, quick: Any) -> None:
    """Parse the command line into the configuration, run `main` and print its metrics.

    `--quick` starts from the configuration `quick` instead of `default`: a look at the whole
    within a minute.
    """
    args = [arg for arg in sys.argv[1:] if arg != "--quick"]
    start = quick if len(args) < len(sys.argv) - 1 else default
    description = (
        f"{sys.modules['__main__'].__doc__}\n--quick takes smaller defaults: a minute at most."
    )
    config = tyro.cli(type(default), args=args, default=start, description=description)
    try:
        metrics = main(config)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:{width}}  {value:.6g}")
    print(f"Written to {config.out}")


def check_numbers(config: Any, *, may_be_zero: tuple[str, ...]) -> None:
    """Every number of a configuration is positive, but for those that may be 0."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, int | float) and not (
            value > 0 or value == 0 and field.name in may_be_zero
        ):
            rule = "at least 0" if field.name in may_be_zero else "above 0"
            raise ValueError(f"`{field.name}` must be {rule}; got {value}. Change it.")


@contextlib.contextmanager
def results_folder(out: Path, config: Any) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends well and leaves nothing when
    it does not.
    """
    partial = _make_partial(out)
    try:
        write_json(partial / "config.json", dataclasses.asdict(config))
        yield partial
        for path in partial.iterdir():
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            out.rmdir()  # only if it is empty: a run that failed leaves no folder behind


def _make_partial(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".partial-", dir=out))
    except OSError as error:
        raise ValueError(
            f"`out` must be a folder that can be written; got {out} ({error.strerror}). Choose "
            "another with --out."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON; a number that is not finite becomes null, as JSON has no such number."""
    path.write_text(json.dumps(_plain(value), indent=2, default=str) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
