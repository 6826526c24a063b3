"""Timing: functions compared in turn within one process, compile time apart, medians and ratios as
JSON lines.
"""

import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

import jax
import numpy as np


class Measurement(NamedTuple):
    """What one function cost."""

    compile_s: float
    seconds: np.ndarray  # one for each repetition

    @property
    def median_s(self):
        return float(np.median(self.seconds))


def measure(
    functions: dict[str, Callable[[], object]], repetitions: int = 9
) -> dict[str, Measurement]:
    """Time each function `repetitions` times, in turns, so that a slow spell of the machine meets
    all alike.

    The first call of each, which compiles, is timed apart.
    """
    compile_s = {name: _seconds(function) for name, function in functions.items()}
    seconds = [
        {name: _seconds(function) for name, function in functions.items()}
        for _ in range(repetitions)
    ]
    return {
        name: Measurement(compile_s[name], np.array([row[name] for row in seconds]))
        for name in functions
    }


def ratio(numerator: Measurement, denominator: Measurement, factor: float = 1.0) -> float:
    """The median over repetitions of numerator / (factor · denominator), each pair timed side by
    side.
    """
    return float(np.median(numerator.seconds / (factor * denominator.seconds)))


def context(name: str, dtype: str = "float32") -> dict[str, object]:
    """What every line begins with."""
    return {
        "name": name,
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()})",
        "versions": {package: version(package) for package in ("jax", "diffrax", "flax")},
        "date": time.strftime("%Y-%m-%d"),
        "dtype": dtype,
    }


def report(name: str, measurement: Measurement, **fields: object) -> None:
    """Print one JSON line."""
    line = context(name) | {
        "compile_s": round(measurement.compile_s, 3),
        "median_s": round(measurement.median_s, 5),
    }
    print(json.dumps(line | fields), flush=True)


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start
