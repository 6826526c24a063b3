"""What the figures show: the artists' own data, against the functions and arrays drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from sde_score import plots
from sde_score._checks import ArgumentError

EXTENT = (-3.0, 1.0, -1.0, 2.0)


def log_prob(x):
    """N((1, −½), diag(1, ¼)): neither symmetric nor the same along both axes."""
    z = (x - jnp.array([1.0, -0.5])) / jnp.array([1.0, 0.5])
    return -0.5 * jnp.sum(z**2) - jnp.log(2 * jnp.pi * 0.5)


def test_density_is_the_exponential_at_the_pixel_centres():
    ax = plots.density_2d(log_prob, extent=EXTENT, resolution=40)
    (image,) = ax.get_images()
    values = np.asarray(image.get_array())
    for row, column in [(0, 0), (3, 35), (39, 10)]:
        x = np.float32([-3.0 + 4.0 * (column + 0.5) / 40, -1.0 + 3.0 * (row + 0.5) / 40])
        np.testing.assert_allclose(values[row, column], np.exp(log_prob(x)), rtol=1e-5)
    assert image.origin == "lower"
    assert tuple(image.get_extent()) == EXTENT
    assert ax.get_xlim() == EXTENT[:2] and ax.get_ylim() == EXTENT[2:]
    assert ax.get_aspect() == 1.0


def test_a_density_integrates_to_one():
    ax = plots.density_2d(log_prob, extent=(-6.0, 8.0, -5.0, 4.0), resolution=100)
    values = np.asarray(ax.get_images()[0].get_array())
    # The rectangle rule is exact to rounding for a Gaussian; 7 and 9 standard deviations are cut.
    np.testing.assert_allclose(values.mean() * 14.0 * 9.0, 1.0, rtol=1e-5)


def test_score_arrows_point_along_the_score():
    ax = plots.score_field(jax.grad(log_prob), extent=EXTENT, resolution=8)
    (quiver,) = ax.collections
    places, arrows = quiver.get_offsets(), np.stack([quiver.U, quiver.V], axis=-1)
    score = jax.vmap(jax.grad(log_prob))(jnp.asarray(places, float))
    norm = np.linalg.norm(score, axis=-1, keepdims=True)
    cell = 3.0 / 8  # the shorter side
    expected = cell * score / (norm + np.median(norm))
    np.testing.assert_allclose(arrows, expected, rtol=1e-5, atol=1e-6)
    assert (quiver.angles, quiver.scale_units, quiver.scale) == ("xy", "xy", 1.0)
    np.testing.assert_allclose(places[0], [-3.0 + 0.25, -1.0 + 1.5 / 8])


def test_a_score_of_zero_has_arrows_of_zero():
    (quiver,) = plots.score_field(jnp.zeros_like).collections
    np.testing.assert_array_equal(quiver.U, 0.0)


def test_scatter_draws_on_the_given_axes():
    ax = Figure().add_subplot()
    samples = np.random.default_rng(0).normal(size=(50, 2))
    assert plots.scatter_2d(samples, label="model", extent=EXTENT, ax=ax) is ax
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), samples)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["model"]
    assert ax.get_xlim() == EXTENT[:2]


def test_trajectories_join_each_path_only():
    paths = np.random.default_rng(0).normal(size=(3, 5, 2))
    ax = plots.trajectories_2d(paths)
    lines, ends = ax.collections
    assert isinstance(lines, LineCollection)
    segments = np.asarray(lines.get_segments()).reshape(3, 4, 2, 2)
    np.testing.assert_array_equal(segments[:, :, 0], paths[:, :-1])
    np.testing.assert_array_equal(segments[:, :, 1], paths[:, 1:])
    np.testing.assert_allclose(lines.get_array().reshape(3, 4)[2], [0, 1 / 3, 2 / 3, 1])
    np.testing.assert_array_equal(ends.get_offsets(), paths[:, -1])
    (low, high), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    assert low <= paths[..., 0].min() and paths[..., 0].max() <= high
    assert bottom <= paths[..., 1].min() and paths[..., 1].max() <= top


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_image_grid_tiles_row_by_row(channels):
    images = np.random.default_rng(0).uniform(-1.0, 1.0, (5, 2, 4, *channels))
    (drawn,) = plots.image_grid(images, columns=3, value_range=(-1.0, 1.0)).get_images()
    canvas = np.asarray(drawn.get_array())
    assert canvas.shape[:2] == (2 * 3 - 1, 3 * 5 - 1)
    shown = (images + 1) / 2
    expected = shown if channels == (3,) else shown.reshape(5, 2, 4)
    np.testing.assert_allclose(canvas[0:2, 10:14], expected[2])
    np.testing.assert_allclose(canvas[3:5, 5:9], expected[4])
    np.testing.assert_array_equal(canvas[2], 1.0)  # the white line between the rows
    np.testing.assert_array_equal(canvas[3:5, 10:14], 1.0)  # and the place left over


def test_image_values_outside_the_range_are_clipped():
    image = np.array([[[-1.0, 0.25, 2.0]]])
    (drawn,) = plots.image_grid(image).get_images()
    np.testing.assert_array_equal(drawn.get_array(), [[0.0, 0.25, 1.0]])
    assert drawn.get_clim() == (0.0, 1.0)


def test_loss_curve_is_a_centred_running_mean():
    """The running mean of a straight line is that line: no lag."""
    losses = np.linspace(5.0, 3.0, 101)
    raw, mean = plots.loss_curve(losses, smooth=11).get_lines()
    np.testing.assert_array_equal(raw.get_ydata(), losses)
    assert raw.get_alpha() < 0.5
    steps = mean.get_xdata()
    assert (steps[0], steps[-1], len(steps)) == (5, 95, 91)
    np.testing.assert_allclose(mean.get_ydata(), 5.0 - 0.02 * steps)


def test_loss_axis_is_logarithmic_only_for_positive_losses_over_a_decade():
    decay = np.exp(-np.linspace(0.0, 5.0, 200))
    assert plots.loss_curve(decay).get_yscale() == "log"
    assert plots.loss_curve(decay + 1.0).get_yscale() == "linear"
    assert plots.loss_curve(decay - 0.5).get_yscale() == "linear"
    assert plots.loss_curve([jnp.nan, 1.0, 2.0]).get_yscale() == "linear"
    assert len(plots.loss_curve([1.0, 2.0], smooth=100).get_lines()[1].get_xdata()) == 1


def test_save_replaces_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "new" / "grid.png"
    for value in (0.0, 1.0):
        plots.save(plots.image_grid(np.full((1, 4, 4), value)).figure, path)
    np.testing.assert_array_equal(pyplot.imread(path)[..., :3], 1.0)
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.png"]


def test_a_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "figure.unknown"
    path.write_text("old")
    with pytest.raises(ValueError, match="unknown"):
        plots.save(Figure(), path)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_no_figure_stays_open(tmp_path):
    plots.density_2d(log_prob, resolution=4)
    figure, ax = pyplot.subplots()
    plots.save(plots.loss_curve([1.0, 2.0], ax=ax).figure, tmp_path / "loss.pdf")
    assert pyplot.get_fignums() == []


def test_colours():
    ax = plots.scatter_2d(np.zeros((4, 2)), color=plots.BLUE)
    np.testing.assert_allclose(ax.collections[0].get_facecolor()[0, :3], to_rgba("#0072B2")[:3])


def test_bad_inputs():
    with pytest.raises(ArgumentError, match=r"`samples` must have shape \[n, 2\]; got \(4, 3\)"):
        plots.scatter_2d(np.zeros((4, 3)))
    with pytest.raises(ArgumentError, match=r"`paths` must have shape \[n, num_times, 2\]"):
        plots.trajectories_2d(np.zeros((4, 2)))
    with pytest.raises(ArgumentError, match="`samples` must be finite"):
        plots.scatter_2d(np.full((4, 2), np.nan))
    with pytest.raises(ArgumentError, match=r"`images` must be .*; got \(4, 4\)"):
        plots.image_grid(np.zeros((4, 4)))
    with pytest.raises(ArgumentError, match=r"`value_range.* above 0; got 0"):
        plots.image_grid(np.zeros((1, 4, 4)), value_range=(1.0, 1.0))
    with pytest.raises(ArgumentError, match=r"`losses` must be \[num_steps\]; got \(2, 1\)"):
        plots.loss_curve(np.zeros((2, 1)))
    with pytest.raises(ArgumentError, match=r"must have shape \(\); got \(2,\).*one point"):
        plots.density_2d(lambda x: x)
    with pytest.raises(ArgumentError, match="x_max - x_min"):
        plots.density_2d(log_prob, extent=(1.0, -1.0, 0.0, 1.0))
