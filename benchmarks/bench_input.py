"""What batches of real data add to a training step: `batches` of images in memory, and for the
U-Net `stream` of images on disk, against one batch that is there already.

The data are the 32 × 32 patches of scikit-learn's photographs, as PNG files through
`sde_score.data.prepare`; the steps flip, dequantise and learn by denoising score matching. A
timing takes several rows of steps. That of a stream begins with nothing read and ends when the row
that it reads ahead has come: one more row of reading than of steps. The last line is how fast a
stream reads when nothing else runs: a small MLP is faster, and its data belong into memory.
"""

import tempfile
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
from jax.tree_util import Partial
from PIL import Image

import sde_score as ss
from benchmarks._measure import measure, ratio, report
from sde_score.data.prepare import prepare
from sde_score.training.loop import make_dispatch

SDE = ss.VP()
# network, batch, steps of a dispatch, steps of a row, rows: U-Nets are not scanned on a CPU
CASES = {
    "mlp": (ss.nets.MLP(width=128, depth=3), 256, 5, 5, 2),
    "unet": (ss.nets.UNet(width=32, multipliers=(1, 2), num_blocks=1), 8, 1, 3, 2),
}


def loss_fn(net, params, key, batch):
    flip_key, noise_key, loss_key = jax.random.split(key, 3)
    keys = jax.random.split(flip_key, len(batch.images))
    images = jax.vmap(ss.data.random_flip)(keys, batch.images)
    x = ss.uniform_dequantize(noise_key, images, num_levels=256, data_range=(-1.0, 1.0))
    score = ss.score_from_noise(SDE, Partial(net.apply, params))
    return ss.dsm_loss(loss_key, score, SDE, x)


def make_case(source, data, net, batch_size, size, row, num_rows):
    """Functions that each train for `num_rows` rows, and the number of their steps."""
    params = net.init(jax.random.key(0), np.zeros(data.images.shape[1:], np.float32), 1.0)
    optimizer = optax.adam(1e-4)
    run = make_dispatch(ss.make_train_step(partial(loss_fn, net), optimizer), size)
    holder, key = {"state": ss.init_train_state(params, optimizer)}, jax.random.key(1)

    def train(feed):
        start = int(holder["state"].step)
        for first in range(start, start + num_rows * row, row):
            batches = feed(first, first + row)
            for _ in range(row // size):
                holder["state"], metrics = run(holder["state"], key, batches, size)
            np.asarray(metrics["loss"])  # as `train` does at the end of a row

    def streamed():
        stream = ss.data.stream(source, 0, batch_size)
        train(stream)
        for read in stream._ahead.values():
            read.result()

    in_memory = ss.data.batches(jax.random.key(2), data, batch_size)
    # Bound to the step: what does not change from step to step would be computed once for all.
    one = Partial(lambda batch, step: jax.lax.optimization_barrier((batch, step))[0], in_memory(0))
    functions = {"cached": partial(train, lambda *_: one)}
    functions |= {"in_memory": partial(train, lambda *_: in_memory)}
    return functions | ({"streamed": streamed} if size == 1 else {}), num_rows * row


def main():
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw")
        raw.mkdir()
        for i, image in enumerate(np.asarray(ss.data.patches(stride=24).train.images)):
            Image.fromarray(image).save(raw / f"{i:05d}.png")
        prepare("folder", raw, folder, name="patches")
        source = ss.data.open_source("patches", data_dir=folder, split="train")
        data = ss.data.load("patches", data_dir=folder, split="train")
        for case, (net, batch_size, *counts) in CASES.items():
            functions, steps = make_case(source, data, net, batch_size, *counts)
            times = measure(functions, repetitions=7)
            for name, time in times.items():
                report(
                    f"input_{case}_{name}",
                    time,
                    batch=batch_size,
                    examples=len(data.images),
                    step_ms=round(1e3 * time.median_s / steps, 3),
                    ratio_to="cached",
                    ratio=round(ratio(time, times["cached"]), 3),
                )
        read = lambda: ss.data.stream(source, 0, 64)(0, 8)(7)  # and 8 batches more, ahead
        time = measure({"read": read}, repetitions=3)["read"]
        report("input_stream", time, images_per_second=round(64 * 8 / time.median_s))


if __name__ == "__main__":
    main()
