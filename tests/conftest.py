"""Shared settings and fixtures: strict numerics, fixed keys, one mild mixture that several modules
test against.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/sde_score/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import numpy as np
import pytest

import sde_score  # noqa: F401  (before any computation, as sde_score._xla asks for)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "diffrax_keys: diffrax reuses keys in a way that the reuse checker refuses"
    )


@pytest.fixture(autouse=True)
def _key_reuse(request):
    """The key-reuse checker is off only where diffrax does not allow it."""
    with jax.debug_key_reuse(request.node.get_closest_marker("diffrax_keys") is None):
        yield


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


def slow(value):
    """A parameter whose tests are slow."""
    return pytest.param(value, marks=pytest.mark.slow)


def mixture(dtype=np.float32):
    """A mild mixture of three correlated components in two dimensions: weights, means, covariances
    as numpy arrays.
    """
    weights = np.array([0.5, 0.3, 0.2], dtype)
    means = np.array([[-1.0, 0.4], [0.9, -0.5], [0.6, 1.2]], dtype)
    covariances = np.array(
        [[[0.20, 0.08], [0.08, 0.15]], [[0.12, -0.05], [-0.05, 0.25]], [[0.10, 0.0], [0.0, 0.08]]],
        dtype,
    )
    return weights, means, covariances
