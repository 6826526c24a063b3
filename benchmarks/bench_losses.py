"""What each objective costs and how noisy its gradient is.

Time of each loss and of its gradient, relative to one evaluation of the score (of an energy, that
is a gradient already) and to denoising score matching, for score networks and for energy networks
(which differentiate twice), against the dimension d and the number of projections M. The exact
trace, d Jacobian products, is left out at d = 784. Then the variance of the gradient, for each
noise level and at equal cost.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

import sde_score as ss
from benchmarks._measure import measure, ratio, report

DIMENSIONS, PROJECTIONS, BATCH = (2, 16, 64, 784), (1, 4, 16), 512
SDE = ss.VP()
LARGEST_EXACT = 64  # the exact trace takes d Jacobian products
LARGEST_NOISY = 16  # and a hundred gradients of it


def score_network(dim):
    """A 128-wide network of three layers and its parameters."""
    net = ss.nets.MLP(width=128, depth=3)
    params = net.init(jax.random.key(0), jnp.zeros(dim), 1.0)
    return _perturbed(params), lambda params: ss.score_from_noise(SDE, Partial(net.apply, params))


def energy_network(dim):
    """An energy of three layers of 128, whose score is −∇E, and its parameters."""
    net = ss.nets.EnergyMLP(widths=(128, 128, 128))
    params = net.init(jax.random.key(0), jnp.zeros(dim), 1.0)
    return params, lambda params: ss.score_from_energy(Partial(net.apply, params))


def _perturbed(params):
    """The last layer starts at 0: move it, or half of the work could be skipped."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.02 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, moved)


def objectives(dim, counts):
    """The losses over an SDE, by name."""
    named = {"dsm": ss.dsm_loss, "esm": partial(ss.esm_loss, true_score=lambda x, t: -x)}
    if dim <= LARGEST_EXACT:
        named["ism"] = ss.ism_loss
    named["ssm_plain_1"] = partial(ss.ssm_loss, variance_reduced=False)
    for count in counts:
        named[f"ssm_{count}"] = partial(ss.ssm_loss, num_projections=count)
        named[f"fdsm_{count}"] = partial(ss.fdsm_loss, num_projections=count)
    return named


def single_sigma(key, score_fn, x0):
    """Denoising score matching at one sigma, of a score without time."""
    one = lambda key, x: ss.single_sigma_score_matching(
        key, lambda x: score_fn(x, 0.5), x, sigma=0.1
    )
    return jnp.mean(jax.vmap(one)(jax.random.split(key, len(x0)), x0))


def losses(kind, score, x0):
    """Each loss as a function of the parameters."""
    key, net = jax.random.key(3), ss.nets.MLP(width=128, depth=3)
    named = {
        name: lambda p, loss=loss: loss(key, score(p), SDE, x0)
        for name, loss in objectives(x0.shape[1], PROJECTIONS).items()
    }
    named["single_sigma"] = lambda p: single_sigma(key, score(p), x0)
    if kind == "score":
        net_fn = lambda p: Partial(net.apply, p)
        named["edm"] = lambda p: ss.edm_loss(key, net_fn(p), SDE, x0, sigma_data=1.0)
    return named


def costs(kind, make_network, dim, repetitions):
    """JSON lines: time of each loss and its gradient over a forward pass and over DSM's."""
    params, score = make_network(dim)
    x0 = jax.random.normal(jax.random.key(2), (BATCH, dim))
    t = jnp.linspace(0.1, 0.9, BATCH)
    functions = {"forward": jax.jit(lambda p: jax.vmap(score(p))(x0, t))}
    for name, loss in losses(kind, score, x0).items():
        functions |= {name: jax.jit(loss), f"{name}_gradient": jax.jit(jax.grad(loss))}
    bound = {name: partial(function, params) for name, function in functions.items()}
    times = measure(bound, repetitions=repetitions)
    for name, measurement in times.items():
        denoising = times["dsm_gradient" if name.endswith("gradient") else "dsm"]
        report(
            f"loss_{kind}_{name}",
            measurement,
            shape=(dim,),
            batch=BATCH,
            ratio_to="forward",
            ratio=round(ratio(measurement, times["forward"]), 3),
            ratio_to_dsm=round(ratio(measurement, denoising), 3),
        )
    return times


def gradient_noise(dim, times, num_keys=100):
    """JSON lines: the variance of the gradient at one t, tr Cov, for 64 examples; over its squared
    mean; and times the gradient's cost in units of DSM's, which is what a given accuracy costs.
    """
    params, score = score_network(dim)
    keys = jax.random.split(jax.random.key(4), num_keys)
    for name, loss in objectives(dim, (1, 4)).items():

        def gradient(key, t, loss=loss):
            data_key, loss_key = jax.random.split(key)
            x0 = jax.random.normal(data_key, (64, dim))
            law = ss.grid_times(t[None])
            return jax.grad(lambda p: loss(loss_key, score(p), SDE, x0, times=law))(params)

        flat = lambda key, t, gradient=gradient: ravel_pytree(gradient(key, t))[0]
        draw = jax.jit(lambda t, flat=flat: jax.lax.map(partial(flat, t=t), keys, batch_size=10))
        for t in (0.01, 0.1, 0.5, 0.9):
            drawn = np.asarray(draw(jnp.float32(t)), np.float64)
            mean, variance = drawn.mean(0), drawn.var(0, ddof=1).sum()
            squared = mean @ mean - variance / num_keys  # unbiased
            cost = ratio(times[f"{name}_gradient"], times["dsm_gradient"])
            report(
                f"gradient_noise_{name}",
                times[f"{name}_gradient"],  # of a batch of BATCH, for the cost
                shape=(dim,),
                examples=64,
                t=t,
                variance=float(f"{variance:.4g}"),
                variance_over_squared_mean=float(f"{variance / squared:.4g}"),
                cost_to_dsm=round(cost, 3),
                variance_at_equal_cost=float(f"{variance * cost:.4g}"),
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=DIMENSIONS)
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    for dim in options.dims:
        times = costs("score", score_network, dim, options.repetitions)
        costs("energy", energy_network, dim, options.repetitions)
        if dim <= LARGEST_NOISY:
            gradient_noise(dim, times)


if __name__ == "__main__":
    main()
