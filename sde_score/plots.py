"""Figures of densities, scores, samples, images, paths and losses; needs matplotlib.

Each function draws on `ax`, or on that of a new figure, and returns it; the figure is `ax.figure`.
New figures stay out of pyplot: nothing is shown, nothing left open. The colours suit colour-blind
readers (Okabe & Ito 2008). `extent` is (x_min, x_max, y_min, y_max), in data units.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import Scalar
from sde_score.diagnostics import Diagnosis

try:
    from matplotlib import pyplot
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(
        "sde_score.plots needs matplotlib: pip install 'sde_score[experiments]'"
    ) from error

Extent = tuple[float, float, float, float]

BLUE, ORANGE, DARK = "#0072B2", "#D55E00", "#333333"
_SQUARE = (-4.0, 4.0, -4.0, 4.0)
_BATCH = 4096  # grid points evaluated together


def density_2d(
    log_prob: Callable[[Array], Scalar],
    *,
    extent: Extent = _SQUARE,
    resolution: int = 200,
    ax: Axes | None = None,
) -> Axes:
    """Heat map of p(x) = exp(log p(x)), for the log-density [2] -> [] of one point, in nats.

    One pixel per evaluation, at its centre; `resolution` pixels along either axis.
    """
    ax = _axes(ax)
    values = np.exp(_on_grid(log_prob, extent, resolution, ()))
    ax.imshow(values, origin="lower", extent=extent, cmap="Blues", vmin=0.0)
    return _plane(ax, extent)


def score_field(
    score_fn: Callable[[Array], Array],
    *,
    extent: Extent = _SQUARE,
    resolution: int = 20,
    ax: Axes | None = None,
) -> Axes:
    """Arrows along the score [2] -> [2] of one point; close over t for a diffusion's.

    Directions are true; lengths are ‖s‖/(‖s‖ + median ‖s‖) of a cell, as scores have no bound.
    """
    ax = _axes(ax)
    score = _on_grid(score_fn, extent, resolution, (2,))
    norm = np.linalg.norm(score, axis=-1, keepdims=True)
    middle = float(np.median(norm)) or 1.0
    cell = min(extent[1] - extent[0], extent[3] - extent[2]) / resolution
    arrows = cell * score / (norm + middle)
    places = np.moveaxis(_grid(extent, resolution), -1, 0)
    true = {"angles": "xy", "scale_units": "xy", "scale": 1.0}  # in data units, not in pixels
    ax.quiver(*places, *np.moveaxis(arrows, -1, 0), **true, pivot="mid", color=DARK, width=0.003)
    return _plane(ax, extent)


def scatter_2d(
    samples: Float[Array, "n 2"],
    *,
    extent: Extent | None = None,
    label: str | None = None,
    color: str = ORANGE,
    ax: Axes | None = None,
) -> Axes:
    """Dots at `samples`, smaller and fainter the more there are; `extent` None shows all."""
    ax = _axes(ax)
    points = _points("samples", samples, "n", 2)
    size = float(np.clip(6000.0 / len(points), 1.5, 20.0))
    alpha = float(np.clip(800.0 / len(points), 0.25, 0.8))
    style = {"s": size, "alpha": alpha, "color": color, "linewidths": 0, "rasterized": True}
    ax.scatter(*points.T, **style, label=label)
    if label is not None:
        legend = ax.legend(frameon=False, loc="upper right")
        for handle in filter(None, legend.legend_handles):  # as faint as the dots otherwise
            handle.set(sizes=[20.0], alpha=1.0)
    return _plane(ax, extent)


def trajectories_2d(
    paths: Float[Array, "n num_times 2"],
    *,
    extent: Extent | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Paths that darken from their first time to their last, where a dot ends them."""
    ax = _axes(ax)
    points = _points("paths", paths, "n", "num_times", 2)
    segments = np.stack([points[:, :-1], points[:, 1:]], axis=2).reshape(-1, 2, 2)
    lines = LineCollection(list(segments), cmap="Blues", linewidths=0.8)
    lines.set_array(np.tile(np.linspace(0.0, 1.0, points.shape[1] - 1), len(points)))
    lines.set_clim(-0.4, 1.1)  # the first steps visible on white
    ax.add_collection(lines)
    ax.scatter(*points[:, -1].T, s=10, color=ORANGE, linewidths=0, zorder=3)
    ax.autoscale_view()
    return _plane(ax, extent)


def image_grid(
    images: Float[Array, "n height width *channels"],
    *,
    columns: int | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
    ax: Axes | None = None,
) -> Axes:
    """Images [n, H, W] or [n, H, W, 1 or 3], row by row, one white pixel between them.

    `value_range` becomes black to white, values outside are clipped; `columns` None is about √n.
    """
    pixels = np.asarray(images)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3) or 0 in pixels.shape:
        raise _checks.ArgumentError(
            f"`images` must be [n, H, W], [n, H, W, 1] or [n, H, W, 3] and not empty; "
            f"got {np.shape(images)}. Add a leading axis to a single image."
        )
    num, height, width, channels = pixels.shape
    columns = int(np.ceil(np.sqrt(num))) if columns is None else columns
    _checks.check_count("columns", columns)
    low, high = value_range
    _checks.check_positive("value_range[1] - value_range[0]", high - low)
    canvas = np.ones((-(-num // columns) * (height + 1) - 1, columns * (width + 1) - 1, channels))
    for index, image in enumerate(np.clip((pixels - low) / (high - low), 0.0, 1.0)):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        canvas[top : top + height, left : left + width] = image
    ax = _axes(ax)
    ax.imshow(canvas.squeeze(-1) if channels == 1 else canvas, cmap="gray", vmin=0.0, vmax=1.0)
    ax.set_axis_off()
    return ax


def loss_curve(
    losses: Float[Array, " num_steps"],
    *,
    smooth: int | None = None,
    label: str | None = None,
    color: str = BLUE,
    ax: Axes | None = None,
) -> Axes:
    """The loss of every step, faint, under its running mean over `smooth` steps (default 1/50).

    The vertical axis is logarithmic where the losses are positive and their mean spans a decade.
    """
    values = np.asarray(losses)
    if values.ndim != 1 or values.size == 0:
        fix = "Pass the loss of each step, as `fit` returns them."
        raise _checks.ArgumentError(f"`losses` must be [num_steps]; got {values.shape}. {fix}")
    window = max(1, values.size // 50) if smooth is None else smooth
    _checks.check_count("smooth", window)
    window = min(window, values.size)
    ax = _axes(ax)
    mean = np.convolve(values, np.full(window, 1.0 / window), mode="valid")
    ax.plot(np.arange(values.size), values, color=color, alpha=0.25, linewidth=0.6)
    middles = np.arange(mean.size) + (window - 1) / 2
    ax.plot(middles, mean, color=color, linewidth=1.5, label=label)
    if np.all(values > 0) and np.max(mean) > 10 * np.min(mean):
        ax.set_yscale("log")
    ax.set(xlabel="step", ylabel="loss")
    ax.spines[["top", "right"]].set_visible(False)
    if label is not None:
        ax.legend(frameon=False)
    return ax


def diagnosis(diagnosis: Diagnosis, *, axes: np.ndarray | None = None) -> np.ndarray:
    """Three panels over log-SNR: the largest |z| under its threshold, the gain ± 2 standard
    errors, and the squares; suspect levels are shaded. Returns the three Axes.

    Squares within 2 standard errors of 0 are left out.
    """
    figure = Figure(figsize=(4.0, 7.0), layout="constrained")
    panels = figure.subplots(3, sharex=True) if axes is None else axes
    fix = "Pass three, as of subplots(3) or a column of subplots(3, n)."
    _checks.check_shape("axes", np.shape(panels), (3,), fix)
    x, (top, middle, bottom) = np.asarray(diagnosis.log_snr), panels
    top.plot(x, np.max(np.abs(diagnosis.z_scores), axis=1), "o-", color=BLUE, markersize=3)
    top.axhline(float(diagnosis.threshold), color=DARK, linestyle="--", linewidth=0.8)
    top.set(yscale="log", ylabel="largest |z|")
    gain, stderr = (np.asarray(part) for part in diagnosis.gain)
    middle.errorbar(x, gain, 2.0 * stderr, fmt="o-", color=BLUE, markersize=3)
    middle.axhline(1.0, color=DARK, linestyle="--", linewidth=0.8)
    middle.set(ylabel="gain")
    lines = {"bound": ("lower bound", ORANGE, "o"), "fokker_planck": ("Fokker–Planck", BLUE, ":")}
    if diagnosis.fisher is not None:
        lines |= {"fisher": ("Fisher divergence", DARK, "-")}
    for name, (label, color, style) in lines.items():
        values, stderr = (np.asarray(part) for part in getattr(diagnosis, name))
        shown = np.where(values > 2.0 * stderr, values, np.nan)
        bottom.plot(x, shown, style, color=color, label=label, markersize=3)
    bottom.set(yscale="log", ylabel="squared error", xlabel="log-SNR (noise on the left)")
    bottom.legend(frameon=False, fontsize=8)
    edges = np.concatenate([x[:1], 0.5 * (x[1:] + x[:-1]), x[-1:]])
    for i in np.flatnonzero(diagnosis.suspect):
        for ax in panels:
            ax.axvspan(edges[i], edges[i + 1], color=ORANGE, alpha=0.15, linewidth=0)
    return panels


def save(figure: Figure, path: str | os.PathLike, *, dpi: int = 200) -> Path:
    """Write a figure in the format of the path's suffix, whole or not at all, and close it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".figure-") as folder:
        draft = Path(folder) / path.name
        figure.savefig(draft, dpi=dpi, bbox_inches="tight")
        os.replace(draft, path)
    pyplot.close(figure)
    return path


def _axes(ax: Axes | None) -> Axes:
    return Figure(figsize=(4.0, 4.0), layout="constrained").add_subplot() if ax is None else ax


def _plane(ax: Axes, extent: Extent | None) -> Axes:
    """Equal units on both axes, which end at `extent`."""
    ax.set_aspect("equal")
    ax.set(xlabel="$x_1$", ylabel="$x_2$")
    if extent is not None:
        ax.set(xlim=extent[:2], ylim=extent[2:])
    return ax


def _grid(extent: Extent, resolution: int) -> np.ndarray:
    """Cell centres [resolution, resolution, 2]: row by row upwards, x then y in the last axis."""
    _checks.check_count("resolution", resolution)
    x_min, x_max, y_min, y_max = extent
    _checks.check_positive("x_max - x_min of extent", x_max - x_min)
    _checks.check_positive("y_max - y_min of extent", y_max - y_min)
    middles = (np.arange(resolution) + 0.5) / resolution
    xs, ys = x_min + (x_max - x_min) * middles, y_min + (y_max - y_min) * middles
    return np.stack(np.meshgrid(xs, ys), axis=-1)


def _on_grid(
    fn: Callable[[Array], Array], extent: Extent, resolution: int, shape: tuple[int, ...]
) -> np.ndarray:
    """`fn` of every cell centre, as [resolution, resolution, *shape]."""
    points = jnp.asarray(_grid(extent, resolution).reshape(-1, 2), float)
    values = jax.lax.map(fn, points, batch_size=_BATCH)
    fix = "The function takes one point of shape (2,), not a batch."
    _checks.check_shape("the function's value", values.shape[1:], shape, fix)
    return np.asarray(values).reshape(resolution, resolution, *shape)


def _points(name: str, array: Array, *want: str | int) -> np.ndarray:
    """`array` on the host: finite, with the axes of `want`, of which the last holds 2 numbers."""
    _checks.check_data(name, array)
    shape = np.shape(array)
    if len(shape) != len(want) or shape[-1] != 2:
        rule = ", ".join(map(str, want))
        raise _checks.ArgumentError(
            f"`{name}` must have shape [{rule}]; got {shape}. Choose two coordinates to plot."
        )
    return np.asarray(array)
