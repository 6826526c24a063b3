"""Image data sets on disk: what cannot be read says what to do; streams are a function of (seed,
step), read ahead, and train a killed run to the same end; flips and crops have their laws.
"""

import subprocess
import sys
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sde_score as ss
from sde_score.data.builtin import Examples
from sde_score.data.prepare import prepare
from sde_score.training.run import train
from tests import originals


class Numbers:
    """A source whose entry i holds i, and which notes what was read."""

    def __init__(self, num):
        self.num, self.read, self.ahead = num, [], threading.Event()

    def __len__(self):
        return self.num

    def __getitem__(self, i):
        self.read.append(i)
        if len(self.read) == 12:
            self.ahead.set()
        return Examples(np.full((2, 2, 1), i, np.uint8), np.int32(i))


def steps(feed, start, stop):
    batch = feed(start, stop)
    return [np.asarray(batch(step).labels) for step in range(start, stop)]


def test_a_stream_is_a_function_of_seed_and_step():
    feed = ss.data.stream(Numbers(10), 3, 4)
    labels = steps(feed, 0, 10)  # 40 = 4 epochs of 10, which batches of 4 straddle
    epochs = np.concatenate(labels).reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    again = ss.data.stream(Numbers(10), 3, 4, num_threads=1)
    np.testing.assert_array_equal(steps(again, 7, 10), labels[7:])
    np.testing.assert_array_equal(steps(again, 2, 5), labels[2:5])
    assert not np.array_equal(steps(ss.data.stream(Numbers(10), 4, 4), 0, 10), labels)


def test_the_next_steps_are_read_ahead_and_only_once():
    source = Numbers(10)
    feed = ss.data.stream(source, 0, 2)
    first = feed(0, 3)
    assert source.ahead.wait(timeout=30)  # 2 · 3 examples of these steps, and as many of the next
    assert isinstance(first(0).images, jax.Array) and first(0).images.dtype == jnp.uint8
    # the third row is read in the threads that have read the second: 18 in all
    feed(3, 6)
    feed(6, 9)
    assert 18 <= len(source.read) <= 24


def test_a_shorter_last_row_compiles_nothing_new():
    feed = ss.data.stream(Numbers(10), 0, 2)
    traced = jax.jit(chex.assert_max_traces(lambda batch, step: batch(step).labels, n=1))
    for start, stop in ((0, 4), (4, 8), (8, 9)):
        batch = feed(start, stop)
        for step in range(start, stop):
            np.testing.assert_array_equal(traced(batch, step), batch(step).labels)
    chex.clear_trace_counter()


def loss(params, key, batch):
    """Flipped, cropped and dequantised in the step."""
    flip_key, crop_key, noise_key = jax.random.split(key, 3)
    num = len(batch.images)
    x = jax.vmap(ss.data.random_flip)(jax.random.split(flip_key, num), batch.images)
    crop = lambda key, image: ss.data.random_crop(key, image, 16)  # noqa: E731
    x = jax.vmap(crop)(jax.random.split(crop_key, num), x)
    x = ss.uniform_dequantize(noise_key, x, num_levels=256, data_range=(-1.0, 1.0))
    return jnp.mean((x - params["w"][None]) ** 2)


def test_a_killed_run_on_a_stream_ends_where_an_unbroken_one_does(tmp_path):
    originals.mnist(tmp_path, num=(12, 1))
    prepare("mnist", tmp_path, tmp_path, verify=False)
    source = ss.data.open_source("mnist", data_dir=tmp_path, split="train")

    def run(folder, num_steps):
        feed = ss.data.stream(source, 1, 4)
        return train(
            *(jax.random.key(0), loss, {"w": jnp.zeros((16, 16, 1))}, optax.adam(0.1), None),
            **{"num_steps": num_steps, "folder": tmp_path / folder, "feed": feed},
            **{"log_every": 2, "save_every": 4, "report": None},
        )

    run("broken", 4)
    chex.assert_trees_all_equal(run("broken", 7), run("whole", 7))


SCRIPT = """
import sys, jax, jax.numpy as jnp, optax
import sde_score as ss
light = [m for m in ("tensorflow_datasets", "grain", "PIL") if m in sys.modules]
from sde_score.data.prepare import prepare
folder, falls = sys.argv[1], []
loss = lambda params, key, batch: jnp.mean((batch.images / 255.0 - params) ** 2)
for kind, name in (("mnist", "mnist"), ("cifar10", "cifar10"), ("celeba", "celeb_a")):
    prepare(kind, folder, folder, verify=False)
    data = ss.data.load(name, data_dir=folder, split="train", size=16)
    batches, params = ss.data.batches(jax.random.key(0), data, 2), jnp.zeros(data.images.shape[-1])
    _, losses = ss.fit(jax.random.key(1), loss, params, optax.adam(0.1), batches, num_steps=2,
                       report=None)
    falls.append(bool(losses[1] < losses[0]))
ss.data.stream(ss.data.open_source("mnist", data_dir=folder, split="test"), 0, 2)(0, 2)(1)
print(light, [m for m in ("tensorflow", "torch") if m in sys.modules], falls)
"""


def test_every_kind_trains_without_tensorflow_and_pytorch(tmp_path):
    originals.mnist(tmp_path)
    originals.cifar10(tmp_path)
    originals.celeba(tmp_path, partition="001")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)  # noqa: S603
    assert out.stdout.splitlines()[-1] == "[] [] [True, True, True]"


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mnist")
    originals.mnist(folder)
    prepare("mnist", folder, folder, verify=False)
    return folder


def test_a_wrong_split_names_those_that_there_are(mnist):
    for split in ("valid", "train[:", ""):
        with pytest.raises(ValueError, match=f"'mnist' and '{split.replace('[', '.')}'.*split"):
            ss.data.load("mnist", data_dir=mnist, split=split)
    with pytest.raises(ValueError, match=r"\['train', 'test'\]"):
        ss.data.load("mnist", data_dir=mnist, split="valid")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("cifar10", "cifar10"), ("celeb_a", "celeba"), ("celeb_a:2.1.0", "celeba"), ("faces", "f")],
)
def test_a_missing_data_set_says_what_makes_it(mnist, name, kind):
    with pytest.raises(ValueError, match=f"run: python -m sde_score.data.prepare {kind}"):
        ss.data.open_source(name, data_dir=mnist, split="train")


def test_another_format_is_refused(mnist, tmp_path):
    """TensorFlow's own, which cannot be read without it."""
    info = (mnist / "mnist/3.0.1/dataset_info.json").read_text()
    folder = tmp_path / "mnist/3.0.1"
    folder.mkdir(parents=True)
    features = (mnist / "mnist/3.0.1/features.json").read_text()
    (folder / "features.json").write_text(features)
    (folder / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="(?i)tfrecord.*sde_score.data.prepare mnist"):
        ss.data.load("mnist", data_dir=tmp_path, split="train")


def test_sources_and_streams_check_their_arguments(mnist, monkeypatch):
    with pytest.raises(ValueError, match="`crop` must be a Python integer of at least 1"):
        ss.data.open_source("mnist", data_dir=mnist, split="train", crop=0)
    with pytest.raises(ValueError, match="`batch_size` must be at most .*, 10; got 11"):
        ss.data.stream(Numbers(10), 0, 11)
    with pytest.raises(ValueError, match="`seed` must be"):
        ss.data.stream(Numbers(10), -1, 2)
    with pytest.raises(ValueError, match="`stop` must be .* at least 4"):
        ss.data.stream(Numbers(10), 0, 2)(3, 3)
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"need grain; .*pip install 'sde_score\[data\]'"):
        ss.data.stream(Numbers(10), 0, 2)


def test_half_of_the_flips_flip():
    image = jnp.arange(12, dtype=jnp.uint8).reshape(2, 3, 2)
    keys = jax.random.split(jax.random.key(0), 1000)
    out = jax.jit(jax.vmap(ss.data.random_flip, (0, None)))(keys, image)
    flipped = (out == image[None, :, ::-1]).all((1, 2, 3))
    assert out.dtype == jnp.uint8 and bool((flipped | (out == image[None]).all((1, 2, 3))).all())
    assert abs(float(flipped.mean()) - 0.5) < 5 * 0.5 / 1000**0.5  # 5 standard errors


def test_crops_are_uniform_over_their_places():
    image = jnp.arange(12, dtype=jnp.uint8).reshape(3, 4, 1)
    keys = jax.random.split(jax.random.key(1), 6000)
    out = jax.jit(jax.vmap(lambda key: ss.data.random_crop(key, image, 2)))(keys)[..., 0]
    np.testing.assert_array_equal(out - out[:, :1, :1], jnp.array([[[0, 1], [4, 5]]] * 6000))
    places, counts = np.unique(out[:, 0, 0], return_counts=True)
    np.testing.assert_array_equal(places, [0, 1, 2, 4, 5, 6])
    # each binomial(6000, 1/6): mean 1000, standard deviation 29
    assert np.abs(counts - 1000).max() < 5 * 29
    with pytest.raises(ValueError, match="`size` must be at most the image's sides; got 4 for 3"):
        ss.data.random_crop(jax.random.key(0), image, 4)
    with pytest.raises(ValueError, match=r"`image` must be of shape \[height, width, channels\]"):
        ss.data.random_flip(jax.random.key(0), image[None])
    with pytest.raises(ValueError, match="`key` must be a typed key"):
        ss.data.random_flip(0, image)
