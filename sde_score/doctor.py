"""Is this machine, and is this configuration, what a run expects? `python -m sde_score.doctor`.

Prints versions, devices, memory, precision and disk; with `--data FILE.npy` also checks an SDE
against the data, with advice.
"""

import argparse
import contextlib
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sde_score import _checks
from sde_score._typing import SDE
from sde_score.sde import VE, VP, SubVP

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "diffrax", "chex", "orbax-checkpoint", "numpy")
_SDES = {"vp": VP, "subvp": SubVP, "ve": VE}
_PAIRED = 2_000  # examples among whose pairs the largest distance is looked for


def describe_machine(folder: Path = Path()) -> dict[str, str]:
    """Versions, devices, precision and room, as a table of words."""
    table = {"python": f"{platform.python_version()} on {platform.platform()}"}
    for name in _PACKAGES:
        try:
            table[name] = version(name)
        except PackageNotFoundError:
            table[name] = "absent"
    for device in jax.devices():
        stats = device.memory_stats() or {}
        room = f", {stats['bytes_limit'] / 2**30:.1f} GiB" if "bytes_limit" in stats else ""
        table[str(device)] = f"{device.device_kind}{room}"
    with contextlib.suppress(ValueError, OSError, AttributeError):  # where the system tells
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        table["memory"] = f"{pages / 2**30:.1f} GiB, {os.cpu_count()} cores"
    config: Any = jax.config  # whose flags type checkers do not see
    table["float64"] = "on" if config.jax_enable_x64 else "off: jax.enable_x64(True)"
    precision = config.jax_default_matmul_precision
    table["matrix products"] = precision or "the device's default, rounded on GPUs and TPUs"
    table["compilation cache"] = config.jax_compilation_cache_dir or (
        "none: set JAX_COMPILATION_CACHE_DIR to a folder"
    )
    table["free disk"] = f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB in {folder.resolve()}"
    return table


def check_setup(sde: SDE, data: Any, *, sigma_data: float | None = None) -> list[str]:
    """Advice on an SDE for `data`, [n, *event] as the model sees them; none where all is well.

    The noise at t1 should drown the data: KL(p_t1 ‖ prior) ≤ ½ (alpha/sigma)² E‖x‖², and under VE
    sigma_max be about the largest distance of two examples (Song & Ermon 2020, arXiv 2006.09011,
    technique 1). Under VP and sub-VP data should have about unit variance and be centred, as
    images in [-1, 1] are.
    """
    _checks.check_sde(sde)
    _checks.check_data("data", data)
    x = np.asarray(data, np.float64).reshape(len(data), -1)
    alpha, sigma = (float(f(jnp.asarray(sde.t1))) for f in (sde.alpha, sde.sigma))
    spread, first = float(x.std()), float(sde.sigma(jnp.asarray(sde.t0)))
    advice = []
    mismatch = 0.5 * (alpha / sigma) ** 2 * float((x**2).sum(axis=1).mean())
    if mismatch > 0.1 * x.shape[1]:
        advice.append(
            f"The prior is off by up to {mismatch:.3g} nats for an example: more noise at t1 "
            "(beta_max, sigma_max), or data with mean 0."
        )
    farthest = _largest_distance(x[:: max(1, len(x) // _PAIRED)])
    if alpha == 1.0 and not 0.3 * farthest <= sigma <= 10 * farthest:
        advice.append(
            f"sigma({sde.t1:g}) = {sigma:.3g} should be near the largest distance of two "
            f"examples, {farthest:.3g}: set sigma_max."
        )
    if alpha < 1.0 and not 0.3 < spread < 2.0:
        advice.append(
            f"The data have standard deviation {spread:.3g}; this SDE expects about 1: scale them "
            "(sde_score.data.standardize; images to [-1, 1])."
        )
    centre = float(x.mean())
    if alpha < 1.0 and (abs(centre) > max(spread, 0.3) or x.min() >= 0.0):
        advice.append(
            f"The data, from {x.min():.3g} to {x.max():.3g}, have mean {centre:.3g}; this SDE "
            "expects them around 0: centre them (images to [-1, 1])."
        )
    if spread == 0.0:
        return [*advice, "The data are constant: there is nothing to learn."]
    if first > 0.1 * spread:
        advice.append(
            f"The least noise, {first:.3g} at t0, hides detail of data with standard deviation "
            f"{spread:.3g}: lower t0 or sigma_min."
        )
    if sigma_data is not None and not 0.7 < sigma_data / spread < 1.4:
        advice.append(
            f"sigma_data = {sigma_data:.3g} should be the data's standard deviation, {spread:.3g}."
        )
    return advice


def _largest_distance(x: np.ndarray) -> float:
    squares = (x**2).sum(axis=1)
    return float(np.sqrt(np.max(squares[:, None] + squares - 2.0 * x @ x.T)))


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m sde_score.doctor", description=__doc__)
    parser.add_argument("--data", type=Path, help="a .npy file [n, ...], as the model sees it")
    parser.add_argument("--sde", choices=_SDES, default="vp")
    parser.add_argument("--sigma-data", type=float)
    parser.add_argument("--sigma-max", type=float, help="of the VE SDE")
    given = parser.parse_args(arguments)
    table = describe_machine()
    for name, words in table.items():
        print(f"{name:{max(map(len, table))}}  {words}")
    if given.data is None:
        return
    try:
        data = np.load(given.data, allow_pickle=False)
        options = {} if given.sigma_max is None else {"sigma_max": given.sigma_max}
        advice = check_setup(_SDES[given.sde](**options), data, sigma_data=given.sigma_data)
    except (OSError, ValueError, TypeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(*(advice or ["The SDE suits the data."]), sep="\n")


if __name__ == "__main__":
    main()
