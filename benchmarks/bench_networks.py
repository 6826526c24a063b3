"""What a U-Net costs: forward pass, product with the Jacobian, training step with Adam, against
the batch and the dtype; images and FLOP (as XLA counts them) a second, and the memory that the
compiled program asks for.

The networks are those of CIFAR-10, DDPM++ and NCSN++, on an accelerator; small ones on a CPU. On
an accelerator also the share of its bfloat16 rate, the most memory that the process has held until
then, and training steps in bfloat16 over those in float32. Then resampling by slices over
depthwise convolutions, on an accelerator training steps in a loop over those of a Python loop and,
where PyTorch and diffusers can be imported, a training step over that of PyTorch's eager
UNet2DModel of the same configuration.
"""

import argparse
import importlib.util
import json
import os
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sde_score as ss
from benchmarks import _measure
from benchmarks._measure import measure, ratio
from sde_score.nets import presets, resample
from sde_score.pretrained import diffusers
from sde_score.training.loop import make_dispatch

ON_CPU = jax.default_backend() == "cpu"
SMALL = {"width": 32, "multipliers": (1, 2), "num_blocks": 1}
NETWORKS = {"ddpmpp": presets.ddpmpp, "ncsnpp": presets.ncsnpp}
BATCHES = (4, 16) if ON_CPU else (64, 256)
DTYPES = (jnp.float32,) if ON_CPU else (jnp.float32, jnp.bfloat16)
SIZE, CHUNK = 32, 10
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16, dense
report = partial(_measure.report, cores=len(os.sched_getaffinity(0)))
UNET2D = {  # of diffusers; "block_out_channels" and "layers_per_block" are the size
    **{"sample_size": SIZE, "in_channels": 3, "out_channels": 3, "norm_num_groups": 32},
    **{"block_out_channels": (32, 64) if ON_CPU else (128, 256, 256, 256)},
    "layers_per_block": 1 if ON_CPU else 2,
    "down_block_types": ("DownBlock2D",) * (2 if ON_CPU else 4),
    "up_block_types": ("UpBlock2D",) * (2 if ON_CPU else 4),
}


def initialize(net, key=0):
    """Parameters without zeros: else half of the work could be skipped."""
    params = jax.jit(net.init)(jax.random.key(key), jnp.zeros((SIZE, SIZE, 3)), 1.0)
    return jax.tree.map(lambda x: x + 0.01 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)


def noise_loss(net):
    """The error of the predicted noise, at the times that PyTorch's network takes."""

    def loss(params, key, x):
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, x.shape)
        t = jax.random.uniform(time_key, (len(x),), minval=1.0, maxval=999.0)
        out = jax.vmap(net.apply, (None, 0, 0))(params, x + noise, t)
        return jnp.mean((out - noise) ** 2)

    return loss


def compiled(fn, *args, donated=()):
    """The compiled function, what it took, its FLOP and its bytes of memory."""
    start = time.perf_counter()
    program = jax.jit(fn, donate_argnums=donated).lower(*args).compile()
    seconds, memory = time.perf_counter() - start, program.memory_analysis()
    names = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    total = sum(getattr(memory, name) for name in names) - memory.alias_size_in_bytes
    return program, seconds, program.cost_analysis()["flops"], total


def stepping(step, state, *args):
    """A thunk that trains on: the state is donated."""
    box = [state]

    def call():
        box[0], metrics = step(box[0], *args)
        return metrics

    return call


def costs(name, net, batch, dtype, repetitions):
    """Lines of the three functions; returns the training step's measurement."""
    params = initialize(net)
    x = jax.random.normal(jax.random.key(1), (batch, SIZE, SIZE, 3))
    t = jnp.linspace(1.0, 999.0, batch)
    apply = lambda params, x: jax.vmap(net.apply, (None, 0, 0))(params, x, t)
    push = lambda params, x: jax.jvp(partial(apply, params), (x,), (x,))
    state = ss.init_train_state(params, optax.adam(1e-4))
    step = ss.make_train_step(noise_loss(net), optax.adam(1e-4))
    programs = {
        "forward": compiled(apply, params, x),
        "jvp": compiled(push, params, x),
        "train_step": compiled(step, state, jax.random.key(2), x, donated=0),
    }
    thunks = {kind: partial(programs[kind][0], params, x) for kind in ("forward", "jvp")}
    thunks["train_step"] = stepping(programs["train_step"][0], state, jax.random.key(2), x)
    times = measure(thunks, repetitions)
    for kind, (_, compile_s, flops, memory) in programs.items():
        report(
            f"network_{name}_{kind}",
            times[kind]._replace(compile_s=compile_s),
            dtype=jnp.dtype(dtype).name,
            shape=x.shape[1:],
            batch=batch,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
            images_per_s=round(batch / times[kind].median_s, 2),
            gflop_per_s=round(flops / times[kind].median_s / 1e9, 2),
            memory_mib=round(memory / 2**20, 1),
            ratio_to="forward",
            ratio=round(ratio(times[kind], times["forward"]), 3),
            **device_fields(flops / times[kind].median_s),
        )
    return times["train_step"]


def device_fields(flop_per_s):
    """The share of the device's rate and its memory, where they are known."""
    device, fields = jax.devices()[0], {}
    peak = next((rate for kind, rate in PEAKS.items() if kind in device.device_kind), None)
    if peak is not None:
        fields["share_of_bfloat16_peak"] = round(flop_per_s / peak, 4)
    if (used := (device.memory_stats() or {}).get("peak_bytes_in_use")) is not None:
        fields["peak_memory_mib"] = round(used / 2**20, 1)
    return fields


def scanned(net, batch, repetitions):
    """CHUNK steps in a loop on the device over as many of a Python loop."""
    params, x = initialize(net), jnp.ones((batch, SIZE, SIZE, 3))
    step = ss.make_train_step(noise_loss(net), optax.adam(1e-4))
    data = ss.data.batches(jax.random.key(0), x, batch)

    def dispatching(size):
        run, key = make_dispatch(step, size), jax.random.key(1)
        one = stepping(run, ss.init_train_state(params, optax.adam(1e-4)), key, data, size)
        return lambda: [one() for _ in range(CHUNK // size)]

    times = measure({"loop": dispatching(1), "scan": dispatching(CHUNK)}, repetitions)
    fields = {"shape": x.shape[1:], "batch": batch, "steps": CHUNK, "ratio_to": "python loop"}
    found = round(ratio(times["scan"], times["loop"]), 3)
    report("network_scanned_steps", times["scan"], **fields, ratio=found)


def depthwise(x, kernel):
    """`blur` at every second pixel as one convolution for each channel."""
    taps = jnp.asarray(kernel) / sum(kernel)
    weights = jnp.tile(jnp.outer(taps, taps)[..., None, None], (1, 1, 1, x.shape[-1]))
    return jax.lax.conv_general_dilated(
        *(x, weights, (2, 2), ((1, 1), (1, 1))),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def resampling(batch, repetitions):
    """FIR downsampling by slices over the depthwise convolution, with their gradients."""
    x = jax.random.normal(jax.random.key(0), (batch, SIZE, SIZE, 128))
    slices = jax.vmap(partial(resample.downsample, kernel=presets.FIR_KERNEL))
    functions = {"slices": slices, "depthwise": partial(depthwise, kernel=presets.FIR_KERNEL)}
    got, want = (function(x) for function in functions.values())
    np.testing.assert_allclose(got, want, atol=1e-2)  # of TF32
    for kind in ("forward", "gradient"):
        bound = {
            name: partial(jax.jit(fn if kind == "forward" else _gradient_of(fn)), x)
            for name, fn in functions.items()
        }
        times = measure(bound, repetitions)
        fields = {"shape": x.shape[1:], "batch": batch, "ratio_to": "depthwise convolution"}
        found = round(ratio(times["slices"], times["depthwise"]), 4)
        report(f"network_fir_downsample_{kind}", times["slices"], **fields, ratio=found)


def _gradient_of(fn):
    return jax.grad(lambda x: jnp.sum(fn(x) ** 2))


def against_torch(batch, repetitions):
    """A training step over that of PyTorch's, eager: contiguous tensors, channels last."""
    import torch
    from diffusers import UNet2DModel

    device = "cpu" if ON_CPU else "cuda"
    x = torch.randn(batch, 3, SIZE, SIZE, device=device)

    def torch_step(memory_format):
        model = UNet2DModel(**UNET2D).to(device).to(memory_format=memory_format)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        data = x.contiguous(memory_format=memory_format)

        def call():
            noise = torch.randn_like(data)
            t = torch.randint(1, 999, (batch,), device=device)
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(data + noise, t).sample, noise)
            loss.backward()
            optimizer.step()
            return loss.item()

        return call, model

    thunks = {}
    for name in ("contiguous_format", "channels_last"):
        thunks[name], model = torch_step(getattr(torch, name))
    net = diffusers._network(json.loads(model.to_json_string()), None)
    params = initialize(net)
    num = sum(parameter.numel() for parameter in model.parameters())
    assert num == sum(leaf.size for leaf in jax.tree.leaves(params))
    run = make_dispatch(ss.make_train_step(noise_loss(net), optax.adam(1e-4)), 1)
    data = ss.data.batches(jax.random.key(0), jnp.asarray(x.permute(0, 2, 3, 1).cpu()), batch)
    state = ss.init_train_state(params, optax.adam(1e-4))
    thunks["ours"] = stepping(run, state, jax.random.key(1), data, 1)
    times = measure(thunks, repetitions)
    for name in ("contiguous_format", "channels_last"):
        report(
            "network_train_step_over_torch",
            times["ours"],
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            shape=(SIZE, SIZE, 3),
            batch=batch,
            parameters=num,
            torch_median_s=round(times[name].median_s, 5),
            ratio_to=f"PyTorch eager, {name}",
            ratio=round(ratio(times["ours"], times[name]), 3),
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    repetitions, size = options.repetitions, SMALL if ON_CPU else {}
    for name in options.networks:
        for batch in options.batches:
            steps = [
                costs(name, NETWORKS[name](dtype=dtype, **size), batch, dtype, repetitions)
                for dtype in DTYPES
            ]
            if len(steps) > 1:
                fields = {"dtype": "bfloat16", "batch": batch, "ratio_to": "float32"}
                found = round(ratio(steps[1], steps[0]), 3)
                report(f"network_{name}_train_step_dtypes", steps[1], **fields, ratio=found)
    largest = max(options.batches)
    resampling(largest, repetitions)
    if not ON_CPU:  # where convolution gradients in a loop are many times slower
        scanned(presets.ddpmpp(**size), largest, repetitions)
    if all(importlib.util.find_spec(name) for name in ("torch", "diffusers")):
        against_torch(largest, repetitions)


if __name__ == "__main__":
    main()
