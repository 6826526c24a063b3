"""Training steps a second of the library's MLP, 128 wide at batches of 256, by `fit`'s dispatches
over PyTorch's: eager and compiled, both with fused Adam (extra `compare`).

The same network and loss, denoising score matching under VP on two moons, with batches of the same
data, an average of the parameters and the loss read once in a while, in both. Before that the two
networks are given the same parameters, and have to agree.
"""

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax.tree_util import Partial

import sde_score as ss
from benchmarks._measure import measure, ratio, report
from sde_score.nets.embedding import geometric_frequencies
from sde_score.training.loop import make_dispatch

WIDTH, DEPTH, BATCH, STEPS, DECAY = 128, 3, 256, 100, 0.999
SDE = ss.VP()
NET = ss.nets.MLP(WIDTH, DEPTH)


class TorchMLP(torch.nn.Module):
    """`nets.MLP`, a batch at a time."""

    def __init__(self):
        super().__init__()
        linear = torch.nn.Linear
        self.register_buffer("frequencies", torch.tensor(geometric_frequencies(16, 0.05, 10.0)))
        self.embed, self.input = linear(32, WIDTH), linear(2, WIDTH)
        names = [f"{part}_{i}" for i in range(DEPTH) for part in ("in", "time", "out")]
        self.blocks = torch.nn.ModuleDict({name: linear(WIDTH, WIDTH) for name in names})
        self.output = linear(WIDTH, 2)

    def forward(self, x, t):
        angles = 2.0 * math.pi * t[:, None] * self.frequencies
        features = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
        embedding = torch.nn.functional.silu(self.embed(features))
        h = self.input(x)
        for i in range(DEPTH):
            hidden = self.blocks[f"in_{i}"](h) + self.blocks[f"time_{i}"](embedding)
            h = h + self.blocks[f"out_{i}"](torch.nn.functional.silu(hidden))
        return self.output(h)

    def load(self, params):
        layers = {"embed": self.embed, "input": self.input, "output": self.output}
        for name, layer in (layers | dict(self.blocks.items())).items():
            weights = params["params"][name]
            layer.weight.data = torch.tensor(np.asarray(weights["kernel"]).T.copy())
            layer.bias.data = torch.tensor(np.asarray(weights["bias"]))


def torch_loss(model, x0):
    """sigma s + z with s = −model/sigma: `dsm_loss` of `score_from_noise`."""
    t = SDE.t0 + (SDE.t1 - SDE.t0) * torch.rand(len(x0), 1)
    integral = SDE.beta_min * t + 0.5 * (SDE.beta_max - SDE.beta_min) * t**2
    noise = torch.randn_like(x0)
    x = torch.exp(-0.5 * integral) * x0 + torch.sqrt(-torch.expm1(-integral)) * noise
    return 0.5 * ((model(x, t[:, 0]) - noise) ** 2).sum(dim=1).mean()


def torch_steps(data, *, compiled):
    """A thunk of STEPS steps."""
    torch.manual_seed(0)
    model = TorchMLP()
    average = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    loss_fn = torch.compile(torch_loss) if compiled else torch_loss
    parameters = list(model.parameters())

    def call():
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = loss_fn(model, data[torch.randint(len(data), (BATCH,))])
            loss.backward()
            optimizer.step()
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1.0 - DECAY)
        return loss.item()

    return call


def our_steps(data, size):
    params = NET.init(jax.random.key(0), data[0], 1.0)
    optimizer = optax.adam(1e-3)

    def loss(params, key, batch):
        score_fn = ss.score_from_noise(SDE, Partial(NET.apply, params))
        return ss.dsm_loss(key, score_fn, SDE, batch)

    run = make_dispatch(ss.make_train_step(loss, optimizer, ema_decay=DECAY), size)
    batches = ss.data.batches(jax.random.key(1), data, BATCH)
    box, key = [ss.init_train_state(params, optimizer)], jax.random.key(2)

    def call():
        for _ in range(STEPS // size):
            box[0], metrics = run(box[0], key, batches, size)
        return np.asarray(metrics["loss"])

    return call


def check_same_network():
    params = NET.init(jax.random.key(3), jnp.zeros(2), 1.0)
    params = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)
    model = TorchMLP()
    model.load(params)
    x, t = np.random.default_rng(0).normal(size=(5, 2)), np.linspace(0.1, 0.9, 5)
    ours = jax.vmap(NET.apply, (None, 0, 0))(params, jnp.asarray(x), jnp.asarray(t))
    theirs = model(torch.tensor(x, dtype=torch.float32), torch.tensor(t, dtype=torch.float32))
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-4, atol=1e-4)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    check_same_network()
    data = ss.data.two_moons(jax.random.key(4), 10_000)
    tensor = torch.tensor(np.asarray(data))
    times = measure(
        {
            "fit": our_steps(data, STEPS),
            "fit_step_by_step": our_steps(data, 1),
            "torch_eager": torch_steps(tensor, compiled=False),
            "torch_compiled": torch_steps(tensor, compiled=True),
        },
        options.repetitions,
    )
    shared = {"width": WIDTH, "batch": BATCH, "torch": torch.__version__}
    shared["threads"] = torch.get_num_threads()
    for name, time in times.items():
        found = {"steps_per_s": round(STEPS / time.median_s, 1), "ratio_to": "fit"}
        report(f"train_{name}", time, **shared, **found, ratio=round(ratio(time, times["fit"]), 3))


if __name__ == "__main__":
    main()
