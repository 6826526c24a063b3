"""The pictures of `experiments/controllable.py`."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments._run import Metrics
from sde_score import plots


def classes_figure(classes: dict[str, Array], metrics: Metrics) -> Figure:
    """A column for each class."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, len(classes))
    for ax, (name, images) in zip(axes, classes.items(), strict=True):
        plots.image_grid(images[:80], columns=10, value_range=(-1.0, 1.0), ax=ax)
        title = f"{name}: {metrics[f'{name}_accuracy']:.1%} recognised"
        _name_columns(ax, title, {str(digit): digit for digit in range(10)}, 8)
    return figure


def problems_figure(found: dict[str, tuple[Array, Array]], x0: Array, metrics: Metrics) -> Figure:
    """A row for each image: what is seen of it, four draws, the mean of all, the truth."""
    figure = Figure(figsize=(4.5 * len(found), 5.2), layout="constrained")
    rows = np.linspace(0, len(x0) - 1, 8).astype(int)
    for ax, (name, (seen, draws)) in zip(
        figure.subplots(1, len(found)), found.items(), strict=True
    ):
        columns = [seen[:, None], draws[:, :4], draws.mean(axis=1, keepdims=True), x0[:, None]]
        images = jnp.concatenate(columns, axis=1)[rows].reshape(-1, *x0.shape[1:])
        plots.image_grid(images, columns=7, value_range=(-1.0, 1.0), ax=ax)
        sample, mean = (metrics[f"{name}_{part}"] for part in ("psnr", "mean_psnr"))
        names = {"seen": 0, "samples": 2.5, "mean": 5, "truth": 6}
        title = f"{name}: samples {sample:.1f} dB, mean {mean:.1f} dB"
        _name_columns(ax, title, names, x0.shape[1])
    return figure


def _name_columns(ax: Axes, title: str, names: dict[str, float], size: int) -> None:
    ax.set_axis_on()
    ax.xaxis.tick_top()
    ax.set_xticks([(size + 1) * place + (size - 1) / 2 for place in names.values()], list(names))
    ax.tick_params(length=0)
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.set_title(title.replace("_", "-"))
