"""A function of one example over many: the same values whatever the chunk, compiled once."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mixture

import sde_score as ss
from sde_score import (
    VP,
    GaussianMixture,
    exact_score,
    heun,
    karras_grid,
    map_in_chunks,
    print_progress,
    sample,
)


def test_samples_do_not_depend_on_the_chunk():
    """The noise bit for bit, the samples within 1e-5, whether or not the chunk divides the
    number.
    """
    sde = VP(t0=1e-3)
    score = exact_score(GaussianMixture(*mixture()), sde)

    def draw(key, score):
        ts = karras_grid(sde, 5)
        return {
            "noise": jax.random.normal(key, (2,)),
            "x": sample(key, score, sde, (2,), step=heun, ts=ts),
        }

    keys = lambda: jax.random.split(jax.random.key(0), 23)  # noqa: E731
    with jax.debug_key_reuse(False):  # the noise is drawn twice, to be looked at
        whole, *others = (
            map_in_chunks(draw, keys(), score, chunk_size=size) for size in (50, 23, 8, 1)
        )
    assert whole["x"].shape == (23, 2) and np.isfinite(whole["x"]).all()
    for other in others:
        np.testing.assert_array_equal(other["noise"], whole["noise"])
        np.testing.assert_allclose(other["x"], whole["x"], atol=1e-5)


def test_it_compiles_once_and_reports():
    seen = []
    fn = chex.assert_max_traces(lambda x, scale: scale * x["a"] + x["b"], n=1)
    xs = {"a": jnp.arange(10.0), "b": np.ones(10, np.float32)}
    progress = lambda done, total, seconds: seen.append((done, total))  # noqa: E731
    got = map_in_chunks(fn, xs, 3.0, chunk_size=4, progress=progress)
    np.testing.assert_array_equal(got, 3.0 * np.arange(10) + 1.0)
    assert seen == [(4, 10), (8, 10), (10, 10)]
    chex.clear_trace_counter()


def test_progress_prints_a_line(capsys):
    print_progress(30, 100, 1.25)
    assert capsys.readouterr().err.endswith(" 30/100  1.2 s\n")


BAD = {
    "chunk": (lambda: map_in_chunks(abs, jnp.ones(3), chunk_size=0), "`chunk_size`.*got 0"),
    "lengths": (
        lambda: map_in_chunks(abs, (jnp.ones(3), jnp.ones(2)), chunk_size=2),
        r"`xs` must have one leading axis.*\[\(3,\), \(2,\)\]",
    ),
    "scalar": (lambda: map_in_chunks(abs, 1.0, chunk_size=2), r"got \[\(\)\]"),
    "empty": (lambda: map_in_chunks(abs, jnp.ones((0, 2)), chunk_size=2), r"got \[\(0, 2\)\]"),
}


@pytest.mark.parametrize(("attempt", "match"), BAD.values(), ids=BAD)
def test_bad_input(attempt, match):
    with pytest.raises(ValueError, match=match):
        attempt()


def test_results_on_disk_are_made_once(tmp_path):
    """In parts, after a chunk was lost, and as they are in memory; what is missing is named."""
    keys, calls = jax.random.split(jax.random.key(0), 11), []
    draw = lambda key, scale: scale * jax.random.normal(key, (2,))  # noqa: E731
    options = {"folder": tmp_path, "chunk_size": 4}
    ss.map_to_disk(draw, keys, 2.0, **options, mesh=ss.make_mesh(local=True))
    expected = ss.map_in_chunks(draw, keys, 2.0, chunk_size=11)
    np.testing.assert_array_equal(ss.load_chunks(tmp_path, 11), expected)
    (tmp_path / "000000004.npy").unlink()
    with pytest.raises(ValueError, match="those from 4 on are missing"):
        ss.load_chunks(tmp_path, 11)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    report = lambda done, total, seconds: calls.append((done, total))  # noqa: E731
    ss.map_to_disk(draw, keys, 2.0, **options, progress=report)
    others = jax.random.split(jax.random.key(1), 11)
    for arguments in ((keys, 3.0), (others[:5], 2.0), (others, 2.0)):
        with pytest.raises(ValueError, match="`folder` must hold results of the same `xs`"):
            ss.map_to_disk(draw, *arguments, **options)
    with pytest.raises(ValueError, match="`fn` must return one array"):
        pair = lambda key, scale: (scale, scale)  # noqa: E731
        ss.map_to_disk(pair, keys, 2.0, folder=tmp_path / "pairs", chunk_size=4)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert before.items() <= after.items() and len(after) == 5  # with index.json and pairs
    assert calls == [(4, 11), (8, 11), (11, 11)]
    np.testing.assert_array_equal(ss.load_chunks(tmp_path, 11), expected)
