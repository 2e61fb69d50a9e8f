"""Long jobs: samples go to a folder as they are made, and a killed job goes on where it was.

A folder holds `settings.json` and files `000000.npz, 000001.npz, ...` of equally many samples (the
last one may have fewer). File k has the samples from index `k * per_file` on, each a function of
the key and its index, all made by one program of one width: so what is in it does not depend on
which run made it. A file appears whole or not at all.
"""

import hashlib
import json
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, PRNGKeyArray, PyTree

from jaxdiff import _check
from jaxdiff import _mesh as meshes
from jaxdiff._array import Cond
from jaxdiff._host import host_device
from jaxdiff._many import admit, sample
from jaxdiff._sampler import Sampler, Samples
from jaxdiff.solvers.reversible import Inverted

_WHERE = "sample_to"


def _digest(tree: PyTree) -> str:
    """Return a fingerprint of all that a tree holds, the same in every process."""
    arrays = lambda leaf: eqx.is_array(leaf) or isinstance(leaf, np.ndarray | np.generic)  # noqa: E731
    numbers, rest = eqx.partition(tree, arrays)
    total = hashlib.sha256(eqx.tree_pformat(rest).encode())  # names functions without addresses
    for leaf in jax.tree.leaves(numbers):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        value = np.asarray(meshes.gather(leaf))
        total.update(f"{value.dtype}{value.shape}".encode())
        total.update(np.ascontiguousarray(value).tobytes())
    return total.hexdigest()


def _replace(file: Path, write: Any) -> None:
    """Write a file under another name, and give it its own when it is safely on the disk."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    with open(part, "wb") as stream:
        write(stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, file)


def _write(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays as `numpy.savez` does, but with the same bytes every time."""

    def write(stream: Any) -> None:
        with zipfile.ZipFile(stream, "w") as archive:
            for name, value in arrays.items():
                info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
                with archive.open(info, "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, value, allow_pickle=False)

    _replace(file, write)


def _load(file: Path, rows: int) -> dict[str, np.ndarray] | str:
    """Return the arrays of a file after checking them, or what is wrong with it."""
    try:
        with open(file, "rb") as stream, np.load(stream) as archive:  # checks every byte it reads
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        return f"{type(error).__name__}: {error}"
    short = [name for name, value in arrays.items() if value.shape[:1] != (rows,)]
    if short or "x" not in arrays:
        return f"{rows} samples expected, not found in {short or 'any array x'}"
    return arrays


def _arrays(samples: Samples, rows: int) -> dict[str, np.ndarray]:
    """Return the arrays of a result on the host; 16-bit floats as 32 bits, which NumPy knows."""
    named = {"x": samples.x, "result": jax.tree.leaves(samples.result)[0], "nfe": samples.nfe}
    host = meshes.gather(named | {f"aux_{name}": value for name, value in samples.aux.items()})
    wide = lambda a: a.astype(np.float32) if a.dtype.kind == "V" or a.dtype == "bfloat16" else a  # noqa: E731
    return {name: wide(value[:rows]) for name, value in host.items()}


def _agree(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a new folder, or raise if those of an old one are others."""
    file = folder / "settings.json"
    # Listed before the settings are looked for: another process may be writing them just now.
    others = [entry for entry in folder.iterdir() if not entry.name.endswith(".part")]
    if file.exists():
        try:
            known = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            expected = "a folder of this function"
            raise _check.bad(_WHERE, "path", expected, f"a damaged {file}: {error}") from None
        if known != settings:
            other = [name for name in settings if known.get(name) != settings[name]]
            got = "; ".join(f"{name} {settings[name]!r}, was {known.get(name)!r}" for name in other)
            expected = f"empty, or a folder made with the same settings, but {folder} was not"
            raise _check.bad(_WHERE, "path", expected, got)
    elif others:
        raise _check.bad(_WHERE, "path", "empty, or a folder of this function", str(folder))
    else:
        text = json.dumps(settings, indent=1) + "\n"
        _replace(file, lambda stream: stream.write(text.encode()))


def sample_to(
    folder: str | os.PathLike[str],
    key: PRNGKeyArray | None,
    sampler: Sampler,
    *,
    num: int,
    per_file: int = 1024,
    cond: Cond = None,
    init: Float[Any, "num *dims"] | Inverted | None = None,
    start: int = 0,
    chunk: int | None = None,
    on: Mesh | NamedSharding | None = None,
    progress: bool = True,
) -> Path:
    """Write the samples of `sample` to a folder, file by file; go on if some are there.

    Call it again with the same arguments after a kill at any moment: files that are there and whole
    are kept, a damaged one is named in a warning and made again. The files are bitwise those of one
    uninterrupted run on the same machine. `jd.read` brings them back.

    With many processes, each calls this with its own devices, and makes every so-many-th file;
    nothing is exchanged. The folder must be one that all of them see.

    Args:
        folder: made if it is not there.
        key: as for `sample`, as are all arguments that are not named here.
        sampler: a prepared solve.
        num: how many samples, in all.
        per_file: samples per file; on a mesh, a multiple of its devices.
        cond: conditions, every leaf with leading axis `num`.
        init: what to start from, (num, *dims), or a vectorised inversion.
        start: index of the first sample.
        chunk: samples per vectorised program and device; all of a file by default.
        on: a mesh of local devices; one device by default.
        progress: show a bar over the files of this process (needs tqdm).

    Returns:
        The folder.

    Raises:
        ValueError: as `sample`; if the folder was made with other settings, or is not one of this
            function; if the mesh has devices of other processes.
    """
    _check.whole(_WHERE, "per_file", per_file, 1)
    _check.whole(_WHERE, "start", start, 0)
    key, each = admit(_WHERE, key, sampler, num, cond, init)
    size, placed = 1, sampler
    if on is not None:
        mesh, axis = meshes.devices_of(_WHERE, on)
        size = mesh.shape[axis]
        if per_file % size:
            raise _check.bad(_WHERE, "per_file", f"a multiple of the {size} devices", per_file)
        if any(device.process_index != jax.process_index() for device in mesh.devices.flat):
            expected = "of this process's own devices: each process makes files of its own"
            raise _check.bad(_WHERE, "on", expected, "one that spans processes")
        placed = meshes.place(mesh, sampler, PartitionSpec())
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    settings = dict(
        num=num, start=start, per_file=per_file, chunk=chunk, devices=size,
        shape=list(sampler.solve.start.shape), solve=eqx.tree_pformat(sampler.solve),
        digest=_digest((sampler, key, each)),
    )  # fmt: skip
    _agree(path, settings)
    files: Any = range(jax.process_index(), -(-num // per_file), jax.process_count())
    if progress:
        from tqdm.auto import tqdm

        files = tqdm(files, desc=_WHERE, unit="file")
    for k in files:
        file, first = path / f"{k:06d}.npz", k * per_file
        rows = min(per_file, num - first)
        if file.exists():
            found = _load(file, rows)
            if not isinstance(found, str):
                continue
            warnings.warn(f"{_WHERE}: {file} is damaged and is made again ({found})", stacklevel=2)
        picked = np.minimum(np.arange(first, first + per_file), num - 1)  # one width for all files
        cond, init = jax.tree.map(lambda a, picked=picked: a[picked], each)
        own: Any = dict(num=per_file, start=start + first, chunk=chunk, on=on)
        _write(file, _arrays(sample(key, placed, cond=cond, init=init, **own), rows))
    return path


def read(path: str | os.PathLike[str]) -> Samples:
    """Read what `sample_to` wrote.

    Args:
        path: the folder.

    Returns:
        `Samples` in the memory of the host, `x: (num, *dims)`.

    Raises:
        ValueError: if files are missing or damaged, naming them.
    """
    folder = Path(path)
    try:
        settings = json.loads((folder / "settings.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise _check.bad("read", "path", "a folder of sample_to", f"{folder}: {error}") from None
    num, per_file = settings["num"], settings["per_file"]
    parts, wrong = [], []
    for k in range(-(-num // per_file)):
        file = folder / f"{k:06d}.npz"
        found = _load(file, min(per_file, num - k * per_file))
        wrong += [f"{file.name} ({found})"] if isinstance(found, str) else []
        parts += [] if isinstance(found, str) else [found]
    if wrong:
        expected = f"complete; call sample_to again to make what is missing of {folder}"
        raise _check.bad("read", "path", expected, ", ".join(wrong))
    with jax.default_device(host_device()):
        whole = {
            name: jnp.asarray(np.concatenate([part[name] for part in parts])) for name in parts[0]
        }
    result = jax.tree.map(lambda _: whole["result"], dfx.RESULTS.successful)
    aux = {name.removeprefix("aux_"): a for name, a in whole.items() if name.startswith("aux_")}
    return Samples(whole["x"], result, whole["nfe"], aux)
