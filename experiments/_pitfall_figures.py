"""The figures of `pitfalls`: estimates as dots with error bars, the truth as lines."""

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from experiments._run import Metrics
from sde_score import plots

Sigmas = tuple[float, ...]


def line(
    metrics: Metrics, sigmas: Sigmas, direction: Array, field: Callable, losses: np.ndarray
) -> Figure:
    """`losses` [len(sigmas) + 1, num_steps]: those without noise are the last."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4.9), layout="constrained")
    plots.score_field(field, extent=(-2.5, 2.5, -2.5, 2.5), ax=left)
    left.plot(*np.outer(direction, [-2.9, 2.9]), color=plots.ORANGE)
    left.set_title("data on a line; exact score with σ = 0.3")
    grid = np.geomspace(0.5 * min(sigmas), 2 * max(sigmas))
    middle.loglog(grid, np.sqrt(1 / (1 + grid**2) + 1 / grid**2), color=plots.DARK, label="exact")
    middle.loglog(grid, 1 / grid, ":", color=plots.DARK, label="1/σ")
    _dots(middle, metrics, "line_norm", sigmas, "trained")
    middle.set(title="size of the score", xlabel="σ", ylabel="root mean square of the score")
    window = -(-losses.shape[1] // 100)
    for i, sigma in enumerate((*sigmas, 0.0)):
        mean = np.convolve(losses[i], np.full(window, 1 / window), mode="valid")
        color = plt.get_cmap("Blues")(1 - 0.7 * i / len(sigmas)) if sigma else plots.ORANGE
        gaps = np.where(mean < 0, -mean, np.nan)  # without noise it is positive now and then
        right.loglog(window + np.arange(len(mean)), gaps, color=color, label=f"σ = {sigma:g}")
        if sigma:
            bound = -metrics[f"line_loss_exact_{sigma:g}"]
            right.axhline(bound, color=color, linestyle="--", linewidth=0.8)
    right.set(title="sliced score matching", xlabel="step", ylabel="−loss (dashed: exact bound)")
    return _finish(figure, middle, right)


def low_density(
    metrics: Metrics,
    bins: tuple[float, ...],
    extent: plots.Extent,
    data: Array,
    score: Callable,
    errors: np.ndarray,
    heights: np.ndarray,
) -> Figure:
    """`errors` and `heights`, log p, on a grid over `extent`."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
    plots.scatter_2d(data, extent=extent, ax=left)
    plots.score_field(score, extent=extent, ax=left).set_title("data and exact score")
    image = middle.imshow(errors, origin="lower", extent=extent, norm=LogNorm())
    figure.colorbar(image, ax=middle)
    rare = metrics["log_density_rare"]
    middle.contour(heights, [rare], extent=extent, colors="white")
    middle.set(title="norm of the error; white: 99 % of the data", xlabel="$x_1$", ylabel="$x_2$")
    middles, halves = np.add(bins[1:], bins[:-1]) / 2, np.subtract(bins[1:], bins[:-1]) / 2
    right.axvspan(rare, 0, color=plots.ORANGE, alpha=0.3, linewidth=0, label="99 % of the data")
    norms = [metrics[f"score_norm_at_{middle:g}"] for middle in middles]
    right.semilogy(middles, norms, "--", color=plots.DARK, label="exact score")
    _dots(right, metrics, "ssm_error_at", middles, "error", xerr=halves)
    right.set(title="error by density", xlabel="log p(x), in nats", ylabel="mean norm")
    return _finish(figure, right)


def weights(
    metrics: Metrics, draws: dict[str, Array], truth: float, extent: plots.Extent
) -> Figure:
    size = (3.0 * len(draws) + 4, 4.6)
    ratios = [*(1 for _ in draws), 1.3]
    figure, axes = plt.subplots(
        1, len(draws) + 1, figsize=size, layout="constrained", width_ratios=ratios
    )
    for ax, (name, x) in zip(axes, draws.items(), strict=False):
        plots.scatter_2d(x[:2_000], extent=extent, ax=ax).set_title(_words(name))
    ax, names = axes[-1], [name for name in draws if f"weight_{name}" in metrics]
    values, stderrs = ([metrics[f"weight_{n}{end}"] for n in names] for end in ("", "_stderr"))
    style = {"width": 0.5, "color": plots.BLUE, "capsize": 4}
    ax.bar(
        [_words(n).replace(" ", "\n") for n in names],
        values,
        yerr=stderrs,
        label="draws ± 1 s.e.",
        **style,
    )
    ax.axhline(truth, color=plots.ORANGE, label="truth")
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        ax.text(i, value + 0.03, f"z = {metrics[f'weight_{name}_z']:.1f}", ha="center")
    ax.set(title="weight of the heavy mode", ylabel="share of draws", ylim=(0, 1.2))
    return _finish(figure, ax)


def sigma(metrics: Metrics, sigmas: Sigmas) -> Figure:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4.9), layout="constrained")
    grid = np.geomspace(min(sigmas), max(sigmas))
    left.loglog(grid, 2 / grid**2, ":", color=plots.DARK, label="d/σ²")
    exact = 2 / grid**2 / (1 + grid**2)  # d/σ² − E‖exact score‖², as each mode's is d/(1 + σ²)
    left.loglog(grid, exact, color=plots.DARK, label="exact, given the noised x")
    _dots(left, metrics, "dsm_target_variance", sigmas, "measured")
    left.set(title="variance of the denoising target", xlabel="σ", ylabel="variance")
    first = metrics[f"dsm_gradient_variance_{min(sigmas):g}"] * min(sigmas) ** 2
    middle.loglog(grid, first / grid**2, ":", color=plots.DARK, label="∝ d/σ²")
    _dots(middle, metrics, "dsm_gradient_variance", sigmas, "denoising")
    _band(middle, metrics, "ssm_gradient_variance")
    middle.set(title="variance of an example's gradient", xlabel="σ", ylabel="variance")
    bias = [metrics[f"dsm_bias_{sigma:g}"] for sigma in sigmas]
    size = metrics["score_norm"]
    right.axhline(size, color=plots.DARK, linestyle=":", label="size of the score")
    right.loglog(sigmas, bias, "--", color=plots.DARK, label="exact score with noise")
    _dots(right, metrics, "dsm_error", sigmas, "denoising")
    _band(right, metrics, "ssm_error")
    right.set_ylim(bottom=0.1 * metrics["ssm_error"])
    right.set(title="error of the trained score", xlabel="σ", ylabel="root mean square error")
    return _finish(figure, left, middle, right)


def _dots(ax: Axes, metrics: Metrics, name: str, at: Any, label: str, **style: Any) -> None:
    """A metric at each place, with its standard errors."""
    names = [f"{name}_{place:g}" for place in at]
    values, stderrs = ([metrics[f"{n}{end}"] for n in names] for end in ("", "_stderr"))
    style |= {"fmt": "o", "markersize": 4, "capsize": 2, "zorder": 3, "color": plots.BLUE}
    ax.errorbar(at, values, stderrs, label=f"{label} ± 1 s.e.", **style)


def _band(ax: Axes, metrics: Metrics, name: str) -> None:
    """A metric of sliced score matching, which knows no sigma, with its standard error."""
    value, stderr = metrics[name], metrics[f"{name}_stderr"]
    ax.axhline(value, color=plots.ORANGE, label="sliced ± 1 s.e.")
    ax.axhspan(value - stderr, value + stderr, color=plots.ORANGE, alpha=0.3, linewidth=0)


def _words(name: str) -> str:
    return name.replace("_", " ").replace("sde", "SDE").replace("langevin", "Langevin")


def _finish(figure: Figure, *axes: Axes) -> Figure:
    for ax in axes:
        ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    return figure
