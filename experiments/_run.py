"""What every experiment shares: a command line, a JSON of its configuration and results, a folder
all or nothing.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro

Metrics = dict[str, float]


def cli(main: Callable[[Any], Metrics], default: Any, quick: Any) -> None:
    """Parse the command line into the configuration, run `main` and print its metrics.

    `--quick` starts from the configuration `quick` instead of `default`: a look at the whole
    within a few minutes, most of them compilation.
    """
    args = [arg for arg in sys.argv[1:] if arg != "--quick"]
    start = quick if len(args) < len(sys.argv) - 1 else default
    script = sys.modules["__main__"]
    description = f"{script.__doc__}\n--quick takes smaller defaults: a few minutes at most."
    prog = f"python -m {script.__spec__.name}" if script.__spec__ else None
    config = tyro.cli(type(default), prog=prog, args=args, default=start, description=description)
    try:
        metrics = main(config)
    except (ValueError, OSError, ArithmeticError, RuntimeError, MemoryError) as error:
        sys.exit(_one_line(error))
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:{width}}  {value:.6g}")
    print(f"Written to {config.out}")


def _one_line(error: Exception) -> str:
    """The sentence of the library inside a long report of the runtime, or the error as it is."""
    found = re.search(r"The solve did not reach.*?finite\.", str(error), re.DOTALL)
    return f"{type(error).__name__}: {found.group() if found else error}"


def estimate(name: str, values: Any) -> Metrics:
    """The mean of `values` and its standard error."""
    values = np.asarray(values, np.float64)
    stderr = values.std(ddof=1) / math.sqrt(values.size)
    return {name: float(values.mean()), f"{name}_stderr": float(stderr)}


def check_numbers(config: Any, *, may_be_zero: tuple[str, ...]) -> None:
    """Every number of a configuration is positive, but for those that may be 0."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool):
            continue
        if isinstance(value, int | float) and not (
            value > 0 or value == 0 and field.name in may_be_zero
        ):
            rule = "at least 0" if field.name in may_be_zero else "above 0"
            option = field.name.replace("_", "-")
            raise ValueError(
                f"`{field.name}` must be {rule}; got {value}. Give another --{option}."
            )


def check_limits(config: Any, **limits: tuple[float, float]) -> None:
    """Each of these numbers of a configuration lies between its limits, which it may meet."""
    for name, (low, high) in limits.items():
        if not low <= getattr(config, name) <= high:
            raise ValueError(f"`{name}` must lie in {low} … {high}; got {getattr(config, name)}.")


@contextlib.contextmanager
def results_folder(out: Path, config: Any) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends well and leaves nothing when
    it does not.
    """
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    partial = None
    try:
        partial = _make_partial(out)
        write_json(partial / "config.json", as_dict(config))
        yield partial
        for path in partial.iterdir():
            os.replace(path, out / path.name)
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for folder in new:  # the innermost first; those that hold results stay
            with contextlib.suppress(OSError):
                folder.rmdir()


def _make_partial(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".partial-", dir=out))
    except OSError as error:
        raise ValueError(
            f"`out` must be a folder that can be written; got {out} ({error.strerror}). Choose "
            "another with --out."
        ) from error


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as JSON's types; an SDE in it keeps the name of its class."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            values[name] = {"type": type(value).__name__} | dataclasses.asdict(value)
        elif isinstance(value, Path):
            values[name] = str(value)
    return values


def write_json(path: Path, value: Any) -> None:
    """Write JSON; a number that is not finite becomes null, as JSON has no such number."""
    path.write_text(json.dumps(_plain(value), indent=2) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
