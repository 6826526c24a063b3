"""The figures of `implicit_vae`."""

from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure

import sde_score as ss
from sde_score import plots

COLORS = {"gaussian": plots.BLUE, "implicit": plots.ORANGE, "gaussian_longer": plots.DARK}


def _label(name: str) -> str:
    return name.replace("_", ", ")


def losses(curves: dict[str, np.ndarray], metrics: dict[str, float]) -> Figure:
    """E −log p(x, z) of each step [seeds, steps]: running mean over seeds, and their range; and
    the held-out likelihoods.
    """
    figure, (ax, right) = plt.subplots(
        1, 2, figsize=(9.5, 4.2), width_ratios=(2, 1), layout="constrained"
    )
    for name, rows in curves.items():
        window = max(1, rows.shape[1] // 100)
        kernel = np.full(window, 1 / window)
        smooth = np.stack([np.convolve(row, kernel, mode="valid") for row in rows])
        steps = window + np.arange(smooth.shape[1])
        ax.plot(steps, smooth.mean(0), color=COLORS[name], label=_label(name))
        ax.fill_between(steps, smooth.min(0), smooth.max(0), color=COLORS[name], alpha=0.25)
        low, mean, high = (metrics[f"{name}_log_prob{end}"] for end in ("_low", "", "_high"))
        error = [[mean - low], [high - mean]]
        right.errorbar(_label(name), mean, error, color=COLORS[name], marker="o", capsize=3)
    ax.set(xlabel="step", ylabel="E −log p(x, z), nats", xscale="log")
    ax.set_title(f"{len(rows)} seeds: mean and range")
    right.set(ylabel="held-out log p(x), nats", title="95 % over seeds and digits")
    right.tick_params(axis="x", rotation=20)
    right.margins(x=0.3)
    for each in (ax, right):
        each.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return figure


def images(x: Array, shown: dict[str, tuple[Array, Array]]) -> Figure:
    """Held-out digits above their reconstructions, and samples of the prior, decoded."""
    num = 1 + len(shown)
    figure, axes = plt.subplots(1, num, figsize=(4.4 * num, 4.0), layout="constrained")
    kinds = [x[:20], *(reconstructed for reconstructed, _ in shown.values())]
    rows = [part for ten in (slice(10), slice(10, 20)) for part in (kind[ten] for kind in kinds)]
    plots.image_grid(jnp.concatenate(rows), columns=10, ax=axes[0])
    axes[0].set_title("in turn: digits; " + "; ".join(map(_label, shown)))
    for ax, (name, (_, samples)) in zip(axes[1:], shown.items(), strict=True):
        plots.image_grid(samples, columns=10, ax=ax).set_title(f"samples, {_label(name)}")
    return figure


def aggregate(codes: dict[str, Array], labels: Array) -> Figure:
    """The codes of the held-out digits along their first principal axes, and all coordinates."""
    num = 1 + len(codes)
    figure, axes = plt.subplots(1, num, figsize=(4.4 * num, 4.2), layout="constrained")
    grid = np.linspace(-4, 4, 200)
    for ax, (name, z) in zip(axes, codes.items(), strict=False):
        z = np.asarray(z)
        vectors = np.linalg.svd(z - z.mean(0), full_matrices=False)[2][:2]
        ax.scatter(*(z @ vectors.T).T, c=np.asarray(labels), cmap="tab10", s=10)
        ax.set(title=f"q(z), {_label(name)}", aspect="equal", xlim=(-4.5, 4.5), ylim=(-4.5, 4.5))
        ax.set(xlabel="first principal axis", ylabel="second")
        bins = {"bins": np.linspace(-4, 4, 41), "density": True, "histtype": "step"}
        axes[-1].hist(z.reshape(-1), **bins, color=COLORS[name], label=_label(name))
    normal = np.exp(-0.5 * grid**2) / np.sqrt(2 * np.pi)
    axes[-1].plot(grid, normal, color=plots.DARK, linestyle="--", label="prior")
    axes[-1].set(title="all coordinates of z", xlabel="z", ylabel="density")
    axes[-1].legend(frameon=False)
    return figure


def plane(posteriors: list[ss.GaussianMixture], draws: dict[str, Any]) -> Figure:
    """True posteriors at three of the observations, and the first seed's draws from both."""
    figure, axes = plt.subplots(3, 3, figsize=(9.5, 7.5), layout="constrained")
    extent = (-3.2, 3.2, -2.4, 2.4)
    for column, i in enumerate((0, 2, 4)):
        log_prob = jax.jit(posteriors[i].log_prob)
        plots.density_2d(log_prob, extent=extent, ax=axes[0, column]).set_title("true posterior")
        for ax, (name, z) in zip(axes[1:, column], draws.items(), strict=True):
            plots.scatter_2d(z[0, i], extent=extent, color=COLORS[name], ax=ax).set_title(name)
    for ax in axes.flat:
        ax.set(xlabel="$z_1$", ylabel="$z_2$")
    return figure
