"""`fit` against a hand-written loop, the moving average, non-finite losses, parameter files."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sde_score as ss
from sde_score.training.logging import report_progress

TARGET = jnp.array([1.0, -2.0])


def quadratic(params, key, batch):
    noise = 0.1 * jax.random.normal(key, (2,))
    return jnp.sum((params["w"] - TARGET - noise + 0.0 * batch[0]) ** 2) + params["b"] ** 2


def start():
    return {"w": jnp.zeros(2), "b": jnp.array(1.0)}


@pytest.fixture(scope="module")
def batches():
    return ss.data.batches(jax.random.key(7), jnp.ones((16, 2)), 4)


def hand_written(key, batches, optimizer, num_steps, decay):
    """The textbook loop, one Python step at a time; the average starts at the parameters."""
    params, ema, losses = start(), start(), []
    opt_state = optimizer.init(params)
    for step in range(num_steps):
        loss, grads = jax.value_and_grad(quadratic)(
            params, jax.random.fold_in(key, step), batches(step)
        )
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        rate = 1 - min(decay, (1 + step) / (10 + step))
        ema = jax.tree.map(lambda e, p, rate=rate: e + rate * (p - e), ema, params)
        losses.append(loss)
    return params, ema, losses


@pytest.mark.parametrize("steps_per_dispatch", [1, 4, 100])
def test_fit_is_the_textbook_loop_however_it_is_dispatched(batches, steps_per_dispatch):
    key, optimizer = jax.random.key(0), optax.adam(0.05)
    state, losses = ss.fit(
        key,
        quadratic,
        start(),
        optimizer,
        batches,
        num_steps=7,
        ema_decay=0.5,
        steps_per_dispatch=steps_per_dispatch,
        report=None,
    )
    params, ema, want = hand_written(key, batches, optimizer, 7, 0.5)
    # float32: fused and separate arithmetic differ in the last digit or two
    chex.assert_trees_all_close(state.params, params, rtol=1e-5)
    chex.assert_trees_all_close(state.ema_params, ema, rtol=1e-5)
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    assert int(state.step) == 7 and losses.shape == (7,)


def test_fit_finds_the_minimum_and_leaves_the_callers_arrays_alone(batches):
    params = start()
    state, losses = ss.fit(
        jax.random.key(1), quadratic, params, optax.sgd(0.02), batches, num_steps=1000, report=None
    )
    # E of the minimiser is TARGET; SGD's stationary spread is about 0.1·sqrt(0.02) = 0.014 a step
    # and less in the average over 1/(1 - 0.99) steps.
    np.testing.assert_allclose(state.ema_params["w"], TARGET, atol=0.03)
    assert losses[-100:].mean() < 0.1 * losses[0]
    chex.assert_trees_all_equal(params, start())  # not donated


def test_same_key_same_run_and_another_key_another(batches):
    run = lambda seed: ss.fit(
        jax.random.key(seed),
        quadratic,
        start(),
        optax.adam(0.1),
        batches,
        num_steps=5,
        report=None,
    )[1]
    np.testing.assert_array_equal(run(3), run(3))
    assert not np.array_equal(run(3), run(4))


def test_a_step_compiles_once_for_any_number_of_chunks(batches):
    traced = chex.assert_max_traces(quadratic, n=1)
    ss.fit(
        jax.random.key(0),
        traced,
        start(),
        optax.adam(0.1),
        batches,
        num_steps=25,
        steps_per_dispatch=10,
        report=None,
    )
    chex.clear_trace_counter()


def test_average_of_narrow_parameters_is_float32():
    params = {"w": jnp.full(2, 100.0, jnp.bfloat16)}
    optimizer = optax.sgd(1e-3)
    step = jax.jit(
        ss.make_train_step(lambda p, key, batch: jnp.sum(p["w"]), optimizer, ema_decay=0.999)
    )
    state = ss.init_train_state(params, optimizer)._replace(step=jnp.array(10**6))
    state = state._replace(params={"w": jnp.zeros(2, jnp.bfloat16)})
    state, metrics = step(state, jax.random.key(0), None)
    assert state.ema_params["w"].dtype == jnp.float32 and state.params["w"].dtype == jnp.bfloat16
    # 100 + 0.001·(−0.001 − 100): bfloat16 would have stayed at 100, its spacing being 0.5 there.
    np.testing.assert_allclose(state.ema_params["w"], 99.9, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(2), rtol=2**-8)  # bfloat16


def test_a_loss_that_is_not_finite_stops_and_names_its_step(batches):
    def exploding(params, key, batch):
        return jnp.where(params["n"] > 6.5, jnp.nan, params["n"])

    with pytest.raises(FloatingPointError, match="nan at step 7"):
        ss.fit(
            jax.random.key(0),
            exploding,
            {"n": jnp.array(0.0)},
            optax.sgd(-1.0),
            batches,
            num_steps=20,
            steps_per_dispatch=5,
            report=None,
        )


def test_bad_arguments_of_fit(batches):
    run = lambda **changes: ss.fit(
        **{
            "key": jax.random.key(0),
            "loss_fn": quadratic,
            "params": start(),
            "optimizer": optax.sgd(0.1),
            "batches": batches,
            "num_steps": 2,
            "report": None,
        }
        | changes
    )
    with pytest.raises(
        ValueError, match="`num_steps` must be a Python integer of at least 1; got 0"
    ):
        run(num_steps=0)
    with pytest.raises(ValueError, match="`steps_per_dispatch`"):
        run(steps_per_dispatch=1.5)
    with pytest.raises(ValueError, match="`key` must be a typed key"):
        run(key=np.zeros(2, np.uint32))
    with pytest.raises(ValueError, match="`ema_decay` must be below 1"):
        run(ema_decay=1.0)
    with pytest.raises(ValueError, match="`params` must have at least one array"):
        run(params={})
    with pytest.raises(ValueError, match="`loss_fn` must return a scalar; got shape"):
        run(loss_fn=lambda params, key, batch: params["w"])


def test_progress_is_ten_lines_off_a_terminal_and_a_bar_on_one(capsys, monkeypatch):
    for start in range(0, 1000, 7):
        report_progress(start, min(start + 7, 1000), 1000, 0.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[-1].endswith("step 1000/1000  loss 0.5000")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    report_progress(0, 500, 1000, 0.5)
    assert "█" * 15 + "·" * 15 in capsys.readouterr().err


@pytest.fixture
def params():
    return {
        "params": {
            "dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3, jnp.bfloat16)},
            "scale": jnp.array(2, jnp.int32),
        }
    }


def test_parameter_files_round_trip_exactly(tmp_path, params):
    path = tmp_path / "score.safetensors"
    ss.save_params(path, params, {"width": 3, "sde": "VP"})
    nested, metadata = ss.load_params(path)
    chex.assert_trees_all_equal(nested, params)
    chex.assert_trees_all_equal_dtypes(nested, params)
    assert metadata == {"width": 3, "sde": "VP"}
    like = jax.eval_shape(lambda: (params["params"], jnp.zeros(1)))
    pair = (params["params"], jnp.zeros(1))
    ss.save_params(path, pair)
    restored, metadata = ss.load_params(path, like)
    chex.assert_trees_all_equal(restored, pair)
    assert metadata is None


def test_parameter_files_refuse_another_architecture(tmp_path, params):
    path = tmp_path / "score.safetensors"
    ss.save_params(path, params)
    other = {
        "params": {
            "dense": {"kernel": jnp.zeros((2, 4)), "bias": jnp.zeros(3)},
            "extra": jnp.zeros(1),
        }
    }
    with pytest.raises(ValueError, match="4 differ") as error:
        ss.load_params(path, other)
    for line in (
        "params/dense/bias: bfloat16[3] instead of float32[3]",
        "params/dense/kernel: float32[2, 3] instead of float32[2, 4]",
        "params/extra: missing",
        "params/scale: unexpected",
    ):
        assert line in str(error.value)


def test_a_failed_save_leaves_the_old_file(tmp_path, params):
    path = tmp_path / "score.safetensors"
    ss.save_params(path, params)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        ss.save_params(path, params, metadata=object())  # not JSON
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="distinct names"):
        ss.save_params(path, jnp.zeros(2))


def test_an_optimizer_may_keep_the_parameters_in_its_state(batches):
    """Prodigy's state holds them: donated twice, were they not copied."""
    state, losses = ss.fit(
        jax.random.key(0),
        quadratic,
        start(),
        optax.contrib.prodigy(),
        batches,
        num_steps=3,
        report=None,
    )
    assert int(state.step) == 3 and np.isfinite(losses).all()


def test_files_and_batches_that_cannot_be_used(tmp_path, params):
    (tmp_path / "file").write_text("no tensors")
    with pytest.raises(ValueError, match="`path` must be a file that can be written; got"):
        ss.save_params(tmp_path / "file" / "score.safetensors", params)
    for name in ("file", "missing"):
        with pytest.raises(ValueError, match="`path` must be a safetensors file; got"):
            ss.load_params(tmp_path / name)
    ss.save_params(tmp_path / "new" / "score.safetensors", params)  # makes the folder
    with pytest.raises(ValueError, match="names without a '/'"):
        ss.save_params(tmp_path / "bad.safetensors", {"a/b": jnp.ones(1), "a": jnp.ones(1)})
    with pytest.raises(ValueError, match="`batches` must be a function from step to batch"):
        fit = {"num_steps": 1, "report": None}
        ss.fit(jax.random.key(0), quadratic, start(), optax.sgd(0.1), jnp.ones((4, 2)), **fit)
