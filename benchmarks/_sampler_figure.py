"""The figure of `bench_samplers`: error against evaluations, a panel for each mixture."""

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

GREEN = "#009E73"
FAMILIES = {  # a colour (Okabe & Ito 2008); the members, in the order of the markers
    "stochastic, order 1": (
        "#D55E00",
        *("euler_maruyama", "reverse_diffusion", "ancestral", "ancestral_beta", "ddim_eta_half"),
    ),
    "Langevin": ("#999999", "predictor_corrector", "annealed_langevin"),
    "stochastic, higher order": (
        "#E69F00",
        *("shark", "sra1", "edm_stochastic", "sde_dpm_solver_pp"),
    ),
    "deterministic, one step": ("#56B4E9", "ddim", "heun", "dopri5"),
    "deterministic, multistep": (
        "#0072B2",
        *("dpm_solver_pp_2m", "dpm_solver_pp_3m", "unipc", "adams", "adams_fitted"),
    ),
}


def figure(lines):
    """Under VP, each sampler on the grid that serves it best, and the floor, mean to worst."""
    lines = [line for line in lines if line.get("sde") == "vp"]
    mixtures = list(dict.fromkeys(line["mixture"] for line in lines))
    canvas = Figure(figsize=(4.2 * len(mixtures) + 2.4, 4.4), layout="constrained")
    panels = canvas.subplots(1, len(mixtures), squeeze=False)[0]
    handles = {"exact draws": Patch(color=GREEN, alpha=0.3)}
    for ax, name in zip(panels, mixtures, strict=True):
        handles |= _panel(ax, [line for line in lines if line["mixture"] == name])
        dim = name.removeprefix("mixture_").removesuffix("d")
        ax.set(title=f"$d = {dim}$", xlabel="score evaluations")
    panels[0].set_ylabel("sliced Wasserstein-2 distance")
    _legend(canvas, handles)
    return canvas


def _panel(ax, lines):
    floor = next(line for line in lines if line["name"] == "sampler_floor")
    ax.axhspan(floor["sw2_mean"], floor["sw2_worst"], color=GREEN, alpha=0.3, linewidth=0)
    best = {row["sampler"]: row["grid"] for row in lines if row["name"] == "sampler_to_floor"}
    handles = {}
    for color, *members in FAMILIES.values():
        for sampler, marker in zip(members, "osD^v", strict=False):
            rows = [
                (row["evaluations"], row["sw2"])
                for row in lines
                if row["name"] == "sampler_error" and row["sampler"] == sampler
                if row["grid"] == best[sampler] and row["sw2"] is not None
            ]
            if rows:
                style = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.2}
                (handles[sampler],) = ax.loglog(*zip(*rows, strict=True), **style)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    ax.spines[["top", "right"]].set_visible(False)
    return handles


def _legend(canvas, handles):
    """The samplers by family, beside the panels."""
    entries = {"exact draws": handles["exact draws"]}
    for family, (_, *members) in FAMILIES.items():
        entries[family] = Line2D([], [], linestyle="none")
        entries |= {f"  {name}": handles[name] for name in members if name in handles}
    style = {"loc": "outside right center", "frameon": False, "fontsize": 8}
    for text in canvas.legend(entries.values(), entries, **style).get_texts():
        text.set_weight("bold" if text.get_text() in FAMILIES else "normal")
