r"""Checkpoints that survive a kill at any moment: orbax arrays, a manifest, one rename.

A checkpoint is a directory `step_00000500/` with the arrays (`state/`, written by orbax) and
`manifest.json`: format, step, version of the package, shape and dtype of every leaf, size and
SHA-256 of every file. All of it is written and synchronised under a temporary name beside its
destination and enters by one `os.replace`, so that a name `step_...` is always a complete
checkpoint. Leftovers of killed saves are ignored, and removed by the next save.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxdiff import _check

__all__ = ["CheckpointError", "latest", "prepare", "restore", "save"]

_FORMAT = 1
_ARRAYS, _MANIFEST = "state", "manifest.json"
_NAME = re.compile(r"step_(\d{8,})(\.old)?")  # .old: being replaced by a save of the same step

_T = TypeVar("_T")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; says which, why, and what to do."""


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _leaves(tree: Any) -> dict[str, Any]:
    """Name the leaves of a tree by their paths."""
    named = jax.tree.leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        for path, leaf in named
    }


def _spec(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _files(directory: Path) -> dict[str, list[Any]]:
    """Return size and SHA-256 of every file below `directory` but the manifest."""
    out = {}
    for file in sorted(directory.rglob("*")):
        if file.is_file() and file != directory / _MANIFEST:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            out[file.relative_to(directory).as_posix()] = [file.stat().st_size, digest]
    return out


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows has no handle of a directory
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _steps(root: Path) -> dict[int, Path]:
    """Return the complete checkpoints in increasing order of step."""
    found = [(m, p) for p in root.glob("step_*") if (m := _NAME.fullmatch(p.name))]
    found.sort(key=lambda pair: (int(pair[0][1]), pair[0][2] is None))  # the replacement wins
    return {int(m[1]): p for m, p in found}


def latest(path: str | os.PathLike[str]) -> int | None:
    """Return the newest step that has a checkpoint in `path`, or None. Reads names only."""
    return max(_steps(Path(path)), default=None)


def prepare(path: str | os.PathLike[str]) -> None:
    """Make the directory of a run, so that a long training does not end on a path it cannot write.

    Raises:
        CheckpointError: if the directory cannot be made or written.
    """
    probe = Path(path).absolute() / f".writable-{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"prepare: {path} cannot be written ({error})") from error


def save(path: str | os.PathLike[str], state: Any, *, keep: int = 2) -> Path:
    """Write a checkpoint of `state` into `path` and remove old ones.

    A process killed at any moment leaves every earlier checkpoint as it was. An existing
    checkpoint of the same step is replaced. One process and one writer at a time.

    Args:
        path: directory of the run; made if missing.
        state: a `TrainState`, or any pytree of arrays with an integer `step`.
        keep: number of checkpoints, up to this step, that remain.

    Returns:
        The directory of the new checkpoint, `path/step_<step>`.

    Raises:
        ValueError: if `keep` is less than 1.
        CheckpointError: if it cannot be written, or if JAX runs in several processes.
    """
    _check.whole("save", "keep", keep, 1)
    root, step = Path(path).absolute(), int(state.step)
    final = root / f"step_{step:08d}"
    old, temporary = final.with_name(final.name + ".old"), root / f".tmp_{final.name}"
    if jax.process_count() > 1:
        raise CheckpointError(f"save: {final} must be written by one process, not several")
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".tmp_*"):
            shutil.rmtree(leftover)
        leaves = _leaves(state)
        arrays = [jax.random.key_data(a) if _is_key(a) else a for a in leaves.values()]
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(temporary / _ARRAYS, arrays)
            checkpointer.wait_until_finished()
        manifest = {
            "format": _FORMAT,
            "step": step,
            "jaxdiff": importlib.metadata.version("jaxdiff"),
            "leaves": {name: _spec(leaf) for name, leaf in leaves.items()},
            "files": _files(temporary),
        }
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        for file in (*temporary.rglob("*"), temporary):
            _sync(file)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        os.replace(temporary, final)
        _sync(root)
        kept = [done for done in _steps(root) if done <= step][-keep:]
        for stale in root.glob("step_*"):
            match = _NAME.fullmatch(stale.name)
            if match and (int(match[1]) < kept[0] or stale == old):
                shutil.rmtree(stale)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"save: {final} could not be written ({error}); earlier checkpoints are intact"
        ) from error
    return final


def _verified(directory: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, or say what is wrong with its files."""
    fix = "; delete that directory to fall back on the previous checkpoint"
    try:
        manifest = json.loads((directory / _MANIFEST).read_text())
        version, step, files = manifest["format"], manifest["step"], manifest["files"]
        leaves = dict(manifest["leaves"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else "is unreadable"
        raise CheckpointError(f"restore: {directory}: {_MANIFEST} {what}{fix}") from error
    if version != _FORMAT:
        raise CheckpointError(
            f"restore: {directory} has format {version!r}, this jaxdiff reads {_FORMAT}; "
            "use the version that wrote it, or another path"
        )
    found = _files(directory)
    for name in sorted({*files, *found}):
        if files.get(name) != found.get(name):
            what = "missing" if name not in found else "not in the manifest"
            if name in files and name in found:
                sizes = f"{found[name][0]} bytes, {files[name][0]} expected"
                what = f"corrupt ({sizes})" if found[name][0] != files[name][0] else "corrupt"
            raise CheckpointError(f"restore: {directory}: the file {name} is {what}{fix}")
    if directory.name.split(".")[0] != f"step_{step:08d}":
        raise CheckpointError(f"restore: {directory} holds step {step}, not that of its name{fix}")
    return leaves


def _placed(value: Any, like: Any) -> Any:
    """Turn restored numbers into an array with the kind and the place of `like`."""
    value = jnp.asarray(value)
    if _is_key(like):
        impl = jax.random.key_impl(jnp.empty((), like.dtype))  # `like` may be abstract
        value = jax.random.wrap_key_data(value, impl=impl)
    sharding = getattr(like, "sharding", None)
    # An array on the default device stays free to move, as a fresh one is.
    return value if sharding in (None, value.sharding) else jax.device_put(value, sharding)


def restore(path: str | os.PathLike[str], like: _T) -> _T:
    """Read the newest checkpoint in `path`, bitwise, after verifying all of it.

    Args:
        path: directory of the run, or one checkpoint `.../step_00000500` in it.
        like: the state to restore into, whose structure, dtypes and shardings the result takes;
            its values are not used.

    Returns:
        The state, in the form of `like`.

    Raises:
        CheckpointError: if there is no checkpoint, if it is incomplete or corrupt, or if it does
            not fit `like`.
    """
    directory = Path(path).absolute()
    if not _NAME.fullmatch(directory.name):
        steps = _steps(directory)
        if not steps:
            raise CheckpointError(f"restore: no checkpoint in {directory}; save one there first")
        directory = steps[max(steps)]
    saved, wanted = _verified(directory), _leaves(like)
    for name in dict.fromkeys([*wanted, *saved]):
        spec = _spec(wanted[name]) if name in wanted else "no such leaf"
        if saved.get(name, "no such leaf") != spec:
            raise CheckpointError(
                f"restore: {directory} does not fit: {name} is {saved.get(name, 'no such leaf')} "
                f"there and {spec} here; use the settings it was trained with, or another path"
            )
    shapes = [jax.eval_shape(jax.random.key_data, a) if _is_key(a) else a for a in wanted.values()]
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            target = [np.empty(a.shape, a.dtype) for a in shapes]
            values = checkpointer.restore(directory / _ARRAYS, target)
    except Exception as error:
        raise CheckpointError(
            f"restore: {directory} is complete, but orbax {ocp.__version__} cannot read it "
            f"({type(error).__name__}); use the version of orbax that wrote it"
        ) from error
    placed = [_placed(v, a) for v, a in zip(values, wanted.values(), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), placed)
