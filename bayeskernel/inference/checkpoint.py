"""How is a run kept safe? Draws and the state of every chain on disk, each file whole or not there.

A checkpoint is a folder: ``run.json`` says what is sampled and by which versions; ``chain-000`` and so on hold
parts of draws and the state after the last of them. A file is written beside its place, flushed to disk and
renamed, and begins with a checksum, so that a kill at any moment loses at most the draws since the last part.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bayeskernel.errors import BayesKernelError, InputError
from bayeskernel.keys import is_typed
from bayeskernel.network import Network
from bayeskernel.tasks import Task

Draws = dict[str, np.ndarray]

_MAGIC = b"bayeskernel checkpoint 1\n"
_VERSIONS = ("bayeskernel", "jax", "jaxlib", "numpyro", "numpy")


class CheckpointError(BayesKernelError):
    """A checkpoint cannot be written or read; the message says what is left."""


class Saved(NamedTuple):
    """Where a chain was left.

    Attributes
    ----------
    leaves
        Arrays of its state.
    done
        Transitions made, warm-up included.
    parts
        Number of files with draws.
    """

    leaves: list[np.ndarray]
    done: int
    parts: int


class Checkpoint:
    """A folder with the progress of one run.

    Parameters
    ----------
    folder
        Made if it is not there.
    identity
        What is sampled, from `identity`; a folder of another run is refused.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        plain = json.loads(json.dumps(identity))
        record = self.folder / "run.json"
        if not record.exists() and self.folder.is_dir() and any(self.folder.iterdir()):
            raise InputError(
                "checkpoint", "a new folder or that of a run", f"{self.folder}, with other files"
            )
        try:
            if not record.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                _write(record, json.dumps(plain, indent=1, sort_keys=True).encode())
            found = json.loads(record.read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"checkpoint {self.folder}: {error}") from error
        for name in sorted(plain | found):
            if found.get(name) != plain.get(name):
                raise InputError(
                    "checkpoint",
                    f"a run with {name} = {plain.get(name)!r}",
                    f"{self.folder}, a run with {found.get(name)!r}",
                )

    def load(self, chain: int) -> Saved | None:
        """The state of a chain, None where it has not begun."""
        path = self._chain(chain) / "state"
        if not path.exists():
            return None
        arrays = _read(path)
        count = len(arrays) - 2
        leaves = [arrays[f"leaf{i}"] for i in range(count)]
        return Saved(leaves, int(arrays["done"]), int(arrays["parts"]))

    def draws(self, chain: int, parts: int) -> list[Draws]:
        """The parts of a chain's draws."""
        return [_read(self._chain(chain) / f"draws-{i:06d}") for i in range(parts)]

    def save(self, chain: int, state: Any, done: int, parts: int, rows: Draws) -> int:
        """Write draws, if there are any, then the state that follows them; returns the number of parts."""
        folder = self._chain(chain)
        try:
            folder.mkdir(exist_ok=True)
            if rows:
                _write(folder / f"draws-{parts:06d}", _packed(rows))
                parts += 1
            leaves = {f"leaf{i}": _plain(x) for i, x in enumerate(jax.tree.leaves(state))}
            counts = {"done": np.array(done), "parts": np.array(parts)}
            _write(folder / "state", _packed(leaves | counts))
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {self.folder}: {error.strerror or error}; "
                f"what was written before is intact, and the same call goes on from there"
            ) from error
        return parts

    def _chain(self, chain: int) -> Path:
        return self.folder / f"chain-{chain:03d}"


def identity(
    network: Network, task: Task, rng_key: list[int], layout: Mapping[str, Any]
) -> dict[str, Any]:
    """What a run is: resuming asks for the same."""
    digest = hashlib.sha256()
    for array in (task.inputs, task.targets):
        digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return {
        "network": network.describe(),
        "task": digest.hexdigest(),
        "rng_key": rng_key,
        **layout,
        **{f"{name} version": version(name) for name in _VERSIONS},
        "machine": f"{platform.machine()}, {jax.default_backend()}",
    }


def restored(saved: Saved, like: Any) -> Any:
    """A state from its arrays, in the form of another state of the same chain."""
    leaves, form = jax.tree.flatten(like)
    return jax.tree.unflatten(
        form,
        [
            jax.random.wrap_key_data(jax.numpy.asarray(x), impl=jax.random.key_impl(old))
            if _is_key(old)
            else jax.numpy.asarray(x)
            for x, old in zip(saved.leaves, leaves, strict=True)
        ],
    )


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and is_typed(leaf)


def _plain(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]
    payload = buffer.getvalue()
    return _header(payload) + payload


def _header(payload: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n"


def _write(path: Path, payload: bytes) -> None:
    """Put a file in place whole: written beside it, flushed, renamed."""
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    # The rename itself lasts once the folder is on disk.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(path: Path) -> Draws:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    payload = content[len(_header(b"")) :]
    if content != _header(payload) + payload:
        raise CheckpointError(
            f"{path} is damaged: its checksum does not match. Other files of the checkpoint are not touched"
        )
    with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
        return dict(arrays)
