"""The project holds to its own rules: layers, light imports, a README whose example runs."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.tree_util import Partial

import sde_score as ss

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sde_score"

# Each module imports only from rows above its own, or from one listed earlier in its row.
ROWS = [
    ["_xla", "_typing", "_checks"],
    ["chunks", "quantization", "sde", "divergence", "metrics", "data", "nets", "operators"],
    ["parameterization", "_solvers", "diffeq", "losses", "baselines", "gaussian_mixture"],
    ["sampling", "guidance", "inverse"],
    ["flow", "likelihood", "evaluation", "diagnostics", "training", "entropy", "pretrained"],
    ["__init__"],
    ["plots", "doctor"],
]
POSITION = {name: i for i, name in enumerate(name for row in ROWS for name in row)}
ROW = {name: i for i, row in enumerate(ROWS) for name in row}


def _part(module):
    """`sde_score.sampling.steps` belongs to `sampling`, the package itself to `__init__`."""
    return module.split(".")[1] if "." in module else "__init__"


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sde_score":
            yield from (
                f"sde_score.{alias.name}" if node.module == "sde_score" else node.module
                for alias in node.names
            )
        elif isinstance(node, ast.Import):
            yield from (
                alias.name for alias in node.names if alias.name.split(".")[0] == "sde_score"
            )


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_layers(path):
    parts = path.relative_to(PACKAGE).parts
    part = parts[0].removesuffix(".py")
    assert part in ROW, f"give {part} a row"
    for module in _imports(path):
        other = _part(module)
        if other != part:
            assert POSITION[other] < POSITION[part], (
                f"{part} imports {module}, which lies to its right or below"
            )


def test_code_right_of_the_score_function_knows_no_network():
    for part in ("diffeq.py", "likelihood.py", "sampling"):
        paths = [PACKAGE / part] if part.endswith(".py") else (PACKAGE / part).rglob("*.py")
        for path in paths:
            text = path.read_text()
            assert not re.search(r"import (flax|optax|equinox\.nn)|from (flax|optax)", text), path


def test_importing_the_library_is_light():
    heavy = [
        "matplotlib",
        "sklearn",
        "tensorflow",
        "torch",
        "tensorflow_datasets",
        "orbax",
        "scipy.stats",
    ]
    code = f"import sys, sde_score; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    # flax itself imports orbax
    assert set(ast.literal_eval(out.stdout)) <= {"orbax"}


def _python(code):
    command = [sys.executable, "-W", "always", "-c", code]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)  # noqa: S603


SUM = "jax.jit(lambda x: jnp.sum(jnp.log(0.9 * x) - jnp.log(0.5 * x)))(jnp.ones(20_000))"


@pytest.mark.parametrize("first", ["sde_score", "jax"])
def test_the_compiler_sums_rightly(first):
    """jaxlib 0.10.2 to 0.12.0 give 0 on a CPU without the flag that importing sde_score sets."""
    code = f"import {first}, jax, jax.numpy as jnp, sde_score; print(float({SUM}))"
    assert float(_python(code).stdout) == pytest.approx(20_000 * np.log(0.9 / 0.5), rel=1e-5)


def test_importing_too_late_to_guard_the_sums_warns():
    late = _python("import jax; jax.numpy.ones(2) + 1; import sde_score")
    assert "Import sde_score before the first computation" in late.stderr
    early = _python("import jax; import sde_score")
    assert "Import sde_score" not in early.stderr


def test_every_public_object_is_documented():
    for name in vars(ss):
        value = getattr(ss, name)
        if (
            name.startswith("_")
            or not callable(value)
            or not getattr(value, "__module__", "").startswith("sde_score")
        ):
            continue
        assert (value.__doc__ or "").strip(), f"{name} has no docstring"
        assert not value.__doc__.startswith(f"{name}("), f"{name} has only a generated docstring"


def test_documents_name_no_machine():
    for path in [
        *ROOT.glob("*.md"),
        *PACKAGE.rglob("*.py"),
        *(ROOT / "experiments").rglob("*.py"),
    ]:
        assert not re.search(r"(?<![\w.])/(root|home|work|tmp)/", path.read_text()), path


def test_the_readme_is_complete():
    """Its links lead somewhere, and no figure was left to be filled in."""
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert len(links) >= 2 and all((ROOT / link).exists() for link in links), links
    assert not re.search(r"\b(TODO|FIXME|[A-Z]{2,}_[A-Z]{2,})\b", text.replace("XLA_FLAGS", ""))


def _readme_block(word):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return next(block for block in blocks if word in block)


def test_the_example_of_the_readme_runs():
    """As it stands in the README but for fewer steps and samples."""
    code = (
        _readme_block("ss.fit(")
        .replace("num_steps=5_000", "num_steps=500")
        .replace("2_000", "200")
    )
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)  # noqa: S102
    assert scope["samples"].shape == (200, 2)
    truth = -jax.vmap(ss.data.two_moons.log_prob)(ss.data.two_moons(jax.random.key(1), 500)).mean()
    # A tenth of the training leaves the model some tenths of a nat above the entropy of the data,
    # and far below that of a Gaussian of the same variance (2.84).
    assert truth - 0.2 < scope["test_nll"] < truth + 0.8


def test_the_evaluation_of_the_readme_runs(capsys):
    """With the score of N(0, I), whose bits are known up to the dequantisation within a bin."""
    images = np.arange(0, 256, 8, np.uint8).reshape(8, 2, 2, 1)
    eval_key, doctor_key, data_key = jax.random.split(jax.random.key(0), 3)
    scope = {"ss": ss, "Partial": Partial, "sde": ss.VP(), "s": Partial(lambda x, t: -x)}
    scope |= {"images": images, "eval_key": eval_key, "doctor_key": doctor_key}
    scope["x"] = jax.random.normal(data_key, (256, 2, 2, 1))
    exec(compile(_readme_block("dataset_log_likelihood("), "README.md", "exec"), scope)  # noqa: S102
    middles = (images + 0.5) / 128 - 1
    bits = 0.5 * np.mean(middles**2 + np.log(2 * np.pi)) / np.log(2.0) + 7
    assert abs(scope["bits"] - bits) < 1 / 256 / np.log(2.0)  # |x| dx with dx of half a bin
    assert "No level is suspect" in capsys.readouterr().out
