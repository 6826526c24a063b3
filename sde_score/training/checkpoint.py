"""Checkpoints of a training state, verified before they are restored.

Orbax writes them in the background and renames them when they are whole, but notices neither a
flipped bit nor another dtype. So each has a manifest beside it: the SHA-256 of every file, of the
manifest itself too, the names, shapes and dtypes of the arrays, and the configuration, versions
and device of the run. What has no manifest, or another one, is no checkpoint.

    folder/00001000/        orbax's files
    folder/00001000.json    the manifest, written last
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.tree_util import keystr, tree_flatten_with_path

from sde_score import _checks
from sde_score.training.state import TrainState

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Checkpoints:
    """The checkpoints in `folder`: the last `keep` and the one with the least `best`, a name among
    the metrics given to `save`, are kept. `config` is JSON that a run to resume must share.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        config: Any = None,
        keep: int = 3,
        best: str | None = None,
    ) -> None:
        from orbax.checkpoint import StandardCheckpointer  # slow to import

        _checks.check_count("keep", keep)
        self.folder, self.config = Path(folder).absolute(), json.loads(json.dumps(config))
        self.keep, self.best = keep, best
        self._orbax, self._thread = StandardCheckpointer(), ThreadPoolExecutor(1)
        self._pending: Future | None = None
        _act(self.folder, lambda: self.folder.mkdir(parents=True, exist_ok=True))

    def save(self, state: TrainState, metrics: dict[str, float] | None = None) -> None:
        """Begin to write `state`; returns when its arrays may change. An earlier save that failed
        is raised here or by `wait`.
        """
        self.wait()
        step = int(state.step)
        path = self.folder / f"{step:08d}"
        record = {"step": step, "metrics": metrics or {}, "config": self.config}
        record |= {"versions": {name: version(name) for name in _PACKAGES}, "tree": _tree(state)}
        record["device"] = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
        _act(path, lambda: self._orbax.save(path, _plain(state), force=True))
        self._pending = self._thread.submit(self._finish, path, record)

    def wait(self) -> None:
        """Return when the last save is whole, its manifest written and old ones are gone."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest checkpoint that is whole, with the structure and on the devices of `like`;
        None in an empty folder. Damaged ones are named in a warning and set aside.
        """
        self.wait()
        step, refusal = -1, None
        if jax.process_index() == 0:  # decides for all
            try:
                step = self._newest(like)
            except Exception as error:
                step, refusal = -2, error
        if jax.process_count() > 1:
            step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        if step == -2:
            elsewhere = _checks.ArgumentError(
                "The first process could not restore: see there why."
            )
            raise refusal or elsewhere
        if step == -1:
            return None
        restored = self._orbax.restore(self.folder / f"{step:08d}", _abstract(_plain(like)))
        return jax.tree.map(_like, restored, like)

    def _newest(self, like: TrainState) -> int:
        """The step of the newest whole checkpoint, or −1; those that are not are set aside."""
        self._clean()
        damaged = {}
        for manifest in reversed(self._manifests()):
            record, fault = _verified(manifest)
            if record is None:
                damaged[manifest] = fault
                continue
            for path, words in damaged.items():
                warnings.warn(f"{words}: this checkpoint is not restored.", stacklevel=4)
                self._set_aside(path)
            _check_same(manifest, record, {"config": self.config, "tree": _tree(like)})
            return record["step"]
        if damaged:
            raise _checks.ArgumentError(
                f"`folder` must hold a whole checkpoint; got {self.folder}, where none is: "
                f"{'; '.join(damaged.values())}. Start again in another folder."
            )
        return -1

    def close(self) -> None:
        """Wait, and give orbax's threads back."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def _finish(self, path: Path, record: dict) -> None:
        _act(path, self._orbax.wait_until_finished)
        if jax.process_index() == 0:
            _act(path, lambda: _write_manifest(path, record))
            self._prune()

    def _prune(self) -> None:
        records = {path: _verified(path, files=False)[0] for path in self._manifests()}
        good = {path: record for path, record in records.items() if record is not None}
        kept = set(sorted(good)[-self.keep :])
        scores = {path: record["metrics"].get(self.best) for path, record in good.items()}
        scored = {
            path: value
            for path, value in scores.items()
            if value is not None and math.isfinite(value)
        }
        kept |= {min(scored, key=scored.__getitem__)} if scored else set()
        for path in good.keys() - kept:
            path.unlink()  # first: without it the rest is no checkpoint
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)

    def _manifests(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("*.json") if re.fullmatch(r"\d{8,}", p.stem))

    def _clean(self) -> None:
        """Remove what a kill left: folders without a manifest, orbax's unfinished ones."""
        whole = {path.stem for path in self._manifests()}
        for path in self.folder.iterdir():
            name = re.fullmatch(r"(\d{8,})(\.orbax-checkpoint-tmp.*)?", path.name)
            if name is None or not path.is_dir() or path.name in whole:
                continue
            if name[2] is None:
                words = "has no manifest: cut short by a kill, or its manifest was deleted"
                warnings.warn(f"{path} {words}. It is not restored.", stacklevel=5)
            shutil.rmtree(path, ignore_errors=True)

    def _set_aside(self, manifest: Path) -> None:
        for path in (manifest, manifest.with_suffix("")):
            with contextlib.suppress(OSError):
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)


def _act(path: Path, action: Any) -> None:
    try:
        action()
    except (OSError, ValueError) as error:  # tensorstore raises its own ValueError
        raise OSError(
            f"The checkpoint {path} could not be written: {error}. Those before it are whole. "
            "Make room, or choose another folder."
        ) from error


def _tree(state: Any) -> dict[str, str]:
    leaves, _ = tree_flatten_with_path(state)
    return {keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _plain(state: Any) -> Any:
    """With keys, which an optimiser may hold, as the numbers that they are."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _checks.is_key(x) else x, state)


def _like(new: Any, old: Any) -> Any:
    """A restored array as in the state to restore."""
    if _checks.is_key(old):
        return jax.random.wrap_key_data(jnp.asarray(new), impl=jax.random.key_impl(old))
    # Orbax binds every array to its device: those that were free to go along must stay free.
    return new if old.committed else jnp.asarray(np.asarray(new))


def _abstract(like: Any) -> Any:
    describe = lambda leaf: jax.ShapeDtypeStruct(  # noqa: E731
        leaf.shape, leaf.dtype, sharding=leaf.sharding
    )
    return jax.tree.map(describe, like)


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below `folder`."""
    digests = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digests[str(path.relative_to(folder))] = hashlib.file_digest(
                file, "sha256"
            ).hexdigest()
    return digests


def _seal(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _write_manifest(path: Path, record: dict) -> None:
    """All or nothing, and on the disk before it counts."""
    record = record | {"files": _digests(path)}
    if not record["files"]:
        raise OSError(f"{path} has vanished")
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        json.dump(record | {"sha256": _seal(record)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path.with_suffix(".json"))


def _verified(manifest: Path, *, files: bool = True) -> tuple[dict | None, str]:
    """The record, or None and the file that is not as it was written."""
    try:
        record = json.loads(manifest.read_bytes())
        seal = record.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None, f"{manifest} is damaged"
    if _seal(record) != seal or f"{record['step']:08d}" != manifest.stem:
        return None, f"{manifest} is damaged"
    try:
        found = _digests(manifest.with_suffix("")) if files else record["files"]
    except OSError as error:
        return None, f"{manifest.with_suffix('')} cannot be read ({error})"
    for name in sorted(found.keys() | record["files"].keys()):
        if found.get(name) != record["files"].get(name):
            fault = "is missing" if name not in found else "is damaged"
            return None, f"{manifest.with_suffix('') / name} {fault}"
    return record, ""


def _check_same(manifest: Path, record: dict, wanted: dict) -> None:
    """Nothing differs between the checkpoint and the run that would resume it."""
    differences = []
    for part, want in wanted.items():
        here, there = _flat(want), _flat(record[part])
        differences += [
            f"{part}{name}: {there.get(name, 'absent')} in the checkpoint, "
            f"{here.get(name, 'absent')} now"
            for name in sorted(here.keys() | there.keys())
            if here.get(name, "absent") != there.get(name, "absent")
        ]
    if differences:
        shown = "\n  ".join(differences[:5])
        raise _checks.ArgumentError(
            f"`like` and `config` must be those of {manifest}; {len(differences)} differ:\n  "
            f"{shown}\nResume with what the run began with, or start in another folder."
        )


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {name: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{name}.{key}").items()}
