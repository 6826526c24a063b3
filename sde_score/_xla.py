"""A guard against a miscompilation: jaxlib 0.10.2 to 0.12.0 return wrong sums on the CPU,
silently.

In a jitted reduction over some thousand elements two different `log`, `log1p` or `expm1` share one
result: jit(lambda x: sum(log(0.9 x) − log(0.5 x))) is 0. The fusion at fault (compare jax issues
39103 and 39257) is switched off by one XLA flag, which XLA reads once, when JAX first computes.
"""

import os
import warnings

from jaxlib.version import __version__ as jaxlib_version

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def guard_cpu_reductions() -> None:
    """Add the flag to XLA_FLAGS, unless the user has set it; warn if JAX has computed already."""
    version = tuple(int(part) for part in jaxlib_version.split(".")[:3] if part.isdigit())
    flags = os.environ.get("XLA_FLAGS", "")
    if not (0, 10, 2) <= version <= (0, 12, 0) or _FLAG in flags:
        return  # seen in these versions; to another the flag may be unknown, which is fatal
    os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}=".strip()
    if _has_computed():
        warnings.warn(
            f"jaxlib {jaxlib_version} sums wrongly on the CPU, and JAX has computed before "
            "sde_score was imported, too early to mend it. Import sde_score before the first "
            f"computation, or set XLA_FLAGS={_FLAG}= in the environment.",
            stacklevel=3,
        )


def _has_computed() -> bool:
    from jax._src import xla_bridge  # no public function tells

    return xla_bridge.backends_are_initialized() and "cpu" in xla_bridge.backends()
