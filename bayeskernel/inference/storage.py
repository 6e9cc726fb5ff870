"""How do draws outlast a process? Files that are whole or not there, and that show any change.

A file is written beside its place, flushed to disk and renamed. It ends with a seal: a line with the SHA-256 of
what comes before. Readers of netCDF and NumPy archives do not mind bytes after the end, so sealed files open
in xarray and ArviZ as they are; `load` checks the seal first.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5netcdf
import numpy as np
import xarray as xr

from bayeskernel.errors import BayesKernelError, InputError, instance

_SEAL = b"\nbayeskernel sha256 "
_LENGTH = len(_SEAL) + hashlib.sha256().digest_size * 2
_BLOCK = 1 << 20
_UNFINISHED = ".part"


class StorageError(BayesKernelError):
    """A file cannot be written or read; the message says what is left."""


def save(draws: xr.DataTree, path: str | os.PathLike[str]) -> Path:
    """Write draws to a netCDF file.

    The file is put in place by renaming: it is never there in part, and an older file of the same name is kept
    until then.

    Parameters
    ----------
    draws
        From `sample` or `sample_prior`.
    path
        File to write; its name conventionally ends in ``.nc``.

    Returns
    -------
    The path. The file opens with `load`, which checks that it is unchanged, and with xarray or ArviZ.
    """
    path = Path(path)
    instance("draws", draws, xr.DataTree)
    sizes = {k: n for node in draws.subtree for k, n in node.sizes.items()}
    chains = range(sizes.get("chain", 0))
    write_parts(
        path,
        draws,
        len(chains),
        sizes.get("draw", 0),
        ((chain, 0, draws.isel(chain=[chain], missing_dims="ignore")) for chain in chains),
    )
    return path


def load(path: str | os.PathLike[str]) -> xr.DataTree:
    """Open draws written by `save` or kept by a checkpoint.

    The checksum is verified first, so that a truncated or altered file is never read. Values stay on disk until
    they are used.
    """
    path = Path(path)
    check_seal(path)
    return xr.open_datatree(path, engine="h5netcdf")


@contextmanager
def in_place(path: Path, seal: bool = True) -> Iterator[Path]:
    """Give the name of a file to write, then seal it, flush it and rename it to ``path``."""
    beside = path.with_name(path.name + _UNFINISHED)
    try:
        yield beside
        with open(beside, "r+b") as file:
            if seal:
                mark = _SEAL + _digest(file, os.fstat(file.fileno()).st_size).encode()
                file.seek(0, os.SEEK_END)
                file.write(mark)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        # The rename itself lasts once the folder is on disk.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


def check_seal(path: Path) -> None:
    """Refuse a file that is not as it was written."""
    try:
        with open(path, "rb") as file:
            _check_seal(path, file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Put a NumPy archive in place, whole and sealed."""
    with in_place(path) as beside, open(beside, "wb") as file:
        np.savez(file, **dict(arrays))  # type: ignore[arg-type]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote, read once."""
    try:
        content = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    _check_seal(path, content, content.getbuffer().nbytes)
    content.seek(0)
    with np.load(content, allow_pickle=False) as arrays:
        return dict(arrays)


def read_record(path: Path, argument: str, kind: str) -> dict[str, Any] | None:
    """What a folder says it holds, in a file at ``path``; None where it is new.

    With other files in it, it is refused as ``argument``, which was to be new or that of ``kind``.
    """
    folder = path.parent
    try:
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_bytes())
            return found
        # A kill may have left the beginning of the record.
        if folder.exists() and any(file.suffix != _UNFINISHED for file in folder.iterdir()):
            raise InputError(
                argument, f"a new folder or that of {kind}", f"{folder}, with other files"
            )
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StorageError(f"{argument} {folder}: {error}") from error
    return None


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Say what a folder holds, which is made if it is not there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with in_place(path, seal=False) as beside:
            beside.write_text(json.dumps(record, indent=1))
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


def _check_seal(path: Path, file: Any, size: int) -> None:
    expected = _SEAL + _digest(file, max(size - _LENGTH, 0)).encode()
    if file.read() != expected:
        raise StorageError(
            f"{path} is damaged or was not written by bayeskernel: its seal does not match"
        )


def _digest(file: Any, size: int) -> str:
    """SHA-256 of the first ``size`` bytes; leaves the file after them."""
    file.seek(0)
    digest = hashlib.sha256()
    while size > 0 and (block := file.read(min(size, _BLOCK))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


def write_parts(
    path: Path,
    like: xr.DataTree,
    chains: int,
    draws: int,
    parts: Iterable[tuple[int, int, xr.DataTree]],
) -> None:
    """Write draws as netCDF: parts (chain, first draw, part with one chain) of a whole of so many chains and draws.

    Groups, names, types and attributes are those of ``like``, any part.
    """
    whole = {"chain": chains, "draw": draws}
    with in_place(path) as beside, _Patient(beside, "w+") as raw:
        with h5netcdf.File(raw, "w") as file:
            file.attrs.update(like.attrs)
            for name, node in like.children.items():
                _write_frame(file.create_group(name), node.to_dataset(), whole)
            for chain, first, part in parts:
                for name, node in part.children.items():
                    for key, variable in node.to_dataset().variables.items():
                        if variable.dims[:2] == ("chain", "draw"):
                            rows = slice(first, first + variable.sizes["draw"])
                            file[name].variables[str(key)][chain, rows] = variable.to_numpy()[0]
                if raw.error is not None:
                    break
        if raw.error is not None:
            raise raw.error


def _write_frame(group: Any, data: xr.Dataset, whole: dict[str, int]) -> None:
    """Dimensions, variables without values where parts will bring them, coordinates."""
    group.dimensions = {str(k): whole.get(str(k), n) for k, n in data.sizes.items()}
    for key, variable in data.variables.items():
        # xarray's convention for booleans, of which netCDF has none.
        dtype = np.int8 if variable.dtype == bool else variable.dtype
        created = group.create_variable(str(key), variable.dims, dtype)
        if variable.dtype == bool:
            created.attrs["dtype"] = "bool"
        if key in whole:
            created[:] = np.arange(whole[str(key)])
        elif "draw" not in variable.dims:
            created[...] = variable.to_numpy()


class _Patient(io.FileIO):
    """A file whose failures wait to be asked for: HDF5 crashes the process when a write fails."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and self.error is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = error
            return size or 0
