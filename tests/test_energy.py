"""Energies and their scores against closed forms; the curl of linear fields; line integrals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mixture
from jax.tree_util import Partial
from test_nets import make

import sde_score as ss
from sde_score.nets import EnergyMLP

RNG = np.random.default_rng(0)
MATRICES = {"vector": RNG.normal(size=(3, 3)), "image": RNG.normal(size=(48, 48))}
SHAPES = {"vector": (3,), "image": (4, 4, 3)}
shapes = pytest.mark.parametrize("name", SHAPES)
ROTATION = np.array([[0.0, -1.0], [1.0, 0.0]])
curl = jax.jit(ss.curl, static_argnums=0)


def field(matrix):
    """x ↦ M x on any event shape."""
    return lambda x: (jnp.asarray(matrix, x.dtype) @ x.reshape(-1)).reshape(x.shape)


def point(shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape))


def test_a_quadratic_energy_has_the_score_of_a_gaussian(x64):
    """E = ½ c (x − m − t)ᵀ C⁻¹ (x − m − t), alone, with a time and with a context."""
    mean, covariance = (array[0] for array in mixture(np.float64)[1:])
    gaussian = ss.GaussianMixture(np.ones(1), mean[None], covariance[None])

    def energy(x, t=0.0, context=1.0):
        shifted = x - mean - t
        return 0.5 * context * shifted @ jnp.linalg.solve(covariance, shifted)

    score, x = ss.score_from_energy(energy), jnp.array([0.3, -0.8])
    np.testing.assert_allclose(score(x), gaussian.score(x), rtol=1e-12)
    np.testing.assert_allclose(score(x + 0.4, 0.4), gaussian.score(x), rtol=1e-12)
    np.testing.assert_allclose(score(x + 0.4, 0.4, 3.0), 3.0 * gaussian.score(x), rtol=1e-12)
    # −E is the log-density up to a constant
    constants = [gaussian.log_prob(at) + energy(at) for at in (x, x + 1.0, 3.0 * x)]
    np.testing.assert_allclose(constants, constants[0], rtol=1e-12)


@shapes
@pytest.mark.parametrize("time", [(), (0.5,)], ids=["E(x)", "E(x, t)"])
def test_energy_network(name, time):
    """The layers that its definition says, an output that depends on x and t, a score of the shape
    of x.
    """
    widths, shape = (6, 5), SHAPES[name]
    net, d = EnergyMLP(widths, activation=jnp.tanh), int(np.prod(shape))
    x = point(shape)
    params = jax.jit(net.init)(jax.random.key(0), x, *time)
    dense = lambda n, m: n * m + m  # noqa: E731
    want = dense(d, 6) + dense(6, 5) + 5
    want += dense(32, 6) + dense(6, 6) + dense(6, 5) if time else 0
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == want
    energy = Partial(net.apply, params)
    assert energy(x, *time).shape == () and energy(x, *time) != energy(x + 1.0, *time)
    assert not time or energy(x, 0.4) != energy(x, 0.5)
    score = ss.score_from_energy(energy)(x, *time)
    assert score.shape == shape and np.all(score != 0)


def test_energy_network_in_half_precision():
    x, params, moved = make(EnergyMLP((16,), dtype=jnp.bfloat16), (2,))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    half, exact = (EnergyMLP((16,), dtype=d).apply(moved, x, 0.5) for d in (jnp.bfloat16, None))
    assert half.dtype == jnp.float32 and half != exact
    np.testing.assert_allclose(half, exact, atol=0.05)  # 8 bits, values of order 1


def test_gradient_fields_have_no_curl(x64):
    """The oracle's score, symmetric matrices and the score of any energy network."""
    score = ss.exact_score(ss.GaussianMixture(*mixture(np.float64)), ss.VP())
    net = EnergyMLP((8, 8))
    image = point((4, 4, 1))
    params = jax.jit(net.init)(jax.random.key(1), image)
    learned = ss.score_from_energy(Partial(net.apply, params))
    matrix = MATRICES["vector"]
    for fn, x in (
        (lambda x: score(x, 0.1), point((2,))),
        (field(matrix + matrix.T), point((3,))),
        (learned, image),
        (jnp.ones_like, image),  # no Jacobian at all
    ):
        assert curl(fn, x) < 1e-30  # rounding, squared
        assert curl(fn, x, ss.gaussian_probes(jax.random.key(2), 1, x.shape)) < 1e-30


def test_rotations_are_all_curl(x64):
    x = point((2,))
    np.testing.assert_allclose(curl(field(3.0 * ROTATION), x), 1.0, rtol=1e-14)
    probes = ss.gaussian_probes(jax.random.key(3), 1, (2,))
    np.testing.assert_allclose(curl(field(ROTATION), x, probes), 1.0, rtol=1e-14)


@shapes
def test_curl_of_a_linear_field(name, x64):
    """‖A‖²/‖M‖² with A = ½(M − Mᵀ): exactly, and by probes within 5 standard errors."""
    matrix, x = MATRICES[name], point(SHAPES[name])
    share = np.sum((0.5 * (matrix - matrix.T)) ** 2) / np.sum(matrix**2)
    np.testing.assert_allclose(curl(field(matrix), x), share, rtol=1e-12)
    for probes in (ss.gaussian_probes, ss.rademacher_probes):
        v = probes(jax.random.key(4), 4_000, x.shape)
        flat = np.asarray(v).reshape(len(v), -1)
        jv, vj = flat @ matrix.T, flat @ matrix
        above, below = np.sum((jv - vj) ** 2, 1), 2.0 * np.sum(jv**2 + vj**2, 1)
        got = curl(field(matrix), x, v)
        np.testing.assert_allclose(got, above.mean() / below.mean(), rtol=1e-12)
        # the delta method: a ratio of means errs by the mean of (above − share·below)/E[below]
        errors = (above - share * below) / (4.0 * np.sum(matrix**2))
        assert abs(got - share) < 5 * np.std(errors) / 4_000**0.5


def test_curl_of_a_field_depends_on_the_point(x64):
    """s = (−x₂ x₁, 0): J = [[−x₂, −x₁], [0, 0]], hence the share ½ x₁²/(x₁² + x₂²)."""
    fn = lambda x: jnp.stack([-x[1] * x[0], 0.0])  # noqa: E731
    for x in (jnp.array([0.3, -0.8]), jnp.array([2.0, 0.1])):
        want = 0.5 * x[0] ** 2 / (x[0] ** 2 + x[1] ** 2)
        np.testing.assert_allclose(curl(fn, x), want, rtol=1e-12)


def test_log_density_ratio_of_the_oracle(x64):
    gmm = ss.GaussianMixture(*mixture(np.float64))
    x, y = gmm.sample(jax.random.key(5)), jnp.array([1.2, 0.9])
    want = gmm.log_prob(y) - gmm.log_prob(x)
    got = ss.log_density_ratio(gmm.score, x, y, num_points=64)
    np.testing.assert_allclose(got, want, rtol=1e-10)
    back = ss.log_density_ratio(gmm.score, y, x, num_points=64)
    np.testing.assert_allclose(back, -want, rtol=1e-10)


def test_log_density_ratio_takes_gauss_points(x64):
    """n points are exact to degree 2n − 1: a cubic score at 2 points, and not at 1."""
    score = lambda x: -(x**3)  # noqa: E731
    x, y = point((2, 2, 1)), point((2, 2, 1))[::-1] + 1.0
    want = 0.25 * np.sum(x**4 - y**4)
    np.testing.assert_allclose(ss.log_density_ratio(score, x, y, num_points=2), want, rtol=1e-12)
    assert abs(ss.log_density_ratio(score, x, y, num_points=1) - want) > 0.1
    single = ss.log_density_ratio(score, x.astype(jnp.float32), y.astype(jnp.float32))
    assert single.dtype == jnp.float32


def test_log_density_ratio_depends_on_the_path_of_a_rotation(x64):
    """Along a straight line it is x₁y₂ − x₂y₁: round a triangle, twice the area and not 0."""
    x, y, z = jnp.zeros(2), jnp.array([2.0, 0.0]), jnp.array([0.5, 3.0])
    ratio = lambda a, b: ss.log_density_ratio(field(ROTATION), a, b, num_points=1)  # noqa: E731
    np.testing.assert_allclose(ratio(y, z), 2.0 * 3.0, rtol=1e-12)
    np.testing.assert_allclose(ratio(x, y) + ratio(y, z) + ratio(z, x), 6.0, rtol=1e-12)


def test_an_energy_with_time_trains_by_denoising():
    """Its score comes nearer to the oracle's than zero does, at every noise level together."""
    gmm, sde = ss.GaussianMixture(*mixture()), ss.VP(t0=1e-2)
    x0 = jax.vmap(gmm.sample)(jax.random.split(jax.random.key(6), 2_000))
    net = EnergyMLP((32, 32))
    model = lambda params: ss.score_from_energy(Partial(net.apply, params))  # noqa: E731
    state, _ = ss.fit(
        jax.random.key(7),
        lambda params, key, batch: ss.dsm_loss(key, model(params), sde, batch),
        jax.jit(net.init)(jax.random.key(8), x0[0], 0.5),
        optax.adam(1e-2),
        ss.data.batches(jax.random.key(9), x0, 128),
        num_steps=300,
        ema_decay=0.9,
        report=None,
    )
    truth = ss.exact_score(gmm, sde)

    @jax.jit
    @jax.vmap
    def errors(key, x0):  # sigma² ‖s − ∇log p_t‖² of the model and of zero, at x_t
        time_key, noise_key = jax.random.split(key)
        t = jax.random.uniform(time_key, minval=sde.t0, maxval=sde.t1)
        x_t, _ = ss.perturb(noise_key, sde, x0, t)
        target, learned = truth(x_t, t), model(state.params)(x_t, t)
        return sde.sigma(t) ** 2 * jnp.array([jnp.sum((learned - target) ** 2), target @ target])

    learned, zero = np.asarray(errors(jax.random.split(jax.random.key(10), 2_000), x0)).T
    gain = 0.25 * zero - learned
    assert gain.mean() > 5 * gain.std() / 2_000**0.5  # below a quarter of the error of zero


X = jnp.array([0.3, -0.4])
BAD = {
    "energy of a vector": (
        lambda: ss.score_from_energy(lambda x: x)(X),
        r"`energy_fn` must return a scalar; got shape \(2,\) from x of shape \(2,\)",
    ),
    "energy of one entry": (
        lambda: ss.score_from_energy(lambda x, t: jnp.sum(x)[None])(X, 0.5),
        r"`energy_fn` must return a scalar; got shape \(1,\)",
    ),
    "integers": (
        lambda: ss.score_from_energy(jnp.sum)(jnp.arange(2)),
        "`x` must be floating point; got int",
    ),
    "no layers": (lambda: EnergyMLP(()), r"`len\(widths\)` must be .* at least 1; got 0"),
    "no width": (lambda: EnergyMLP((8, 0)), r"`widths\[1\]` must be .* at least 1; got 0"),
    "several times": (
        lambda: EnergyMLP((4,)).init(jax.random.key(0), X, jnp.ones(2)),
        r"`t` must have shape \(\); got \(2,\). One example has one time",
    ),
    "integers into the network": (
        lambda: EnergyMLP((4,)).init(jax.random.key(0), jnp.arange(2)),
        "`x` must be floating point; got int",
    ),
    "curl of a scalar field": (
        lambda: ss.curl(jnp.sum, X),
        r"`score_fn` must return the shape of `x`; got \(\) for x of shape \(2,\)",
    ),
    "curl at integers": (lambda: ss.curl(lambda x: x, jnp.arange(2)), "`x` must be floating"),
    "probes of another shape": (
        lambda: ss.curl(lambda x: x, X, jnp.ones((4, 3))),
        r"`probes` must have shape \(2,\); got \(3,\).*\(4, 3\) for x of shape \(2,\)",
    ),
    "ends of two shapes": (
        lambda: ss.log_density_ratio(lambda x: -x, X, jnp.ones(3)),
        r"`y` must have shape \(2,\); got \(3,\). It is that of `x`",
    ),
    "no points": (
        lambda: ss.log_density_ratio(lambda x: -x, X, X, num_points=0),
        "`num_points` must be a Python integer of at least 1; got 0",
    ),
    "ratio of a batched score": (
        lambda: ss.log_density_ratio(lambda x: x[None], X, X),
        r"`score_fn` must return the shape of `x`; got \(1, 2\)",
    ),
    "ratio of integers": (
        lambda: ss.log_density_ratio(lambda x: -x, X, jnp.arange(2)),
        "`y` must be floating point; got int",
    ),
}


@pytest.mark.parametrize(("attempt", "match"), BAD.values(), ids=BAD)
def test_bad_input(attempt, match):
    with pytest.raises(ValueError, match=match):
        attempt()
