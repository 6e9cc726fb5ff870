"""How is a run kept safe? Draws and the state of every chain on disk, each file whole or not there.

A checkpoint is a folder: ``run.json`` says what is sampled and by which versions; ``chain-000`` and so on hold
parts of draws and the state after the last of them, so that a kill at any moment loses at most the draws since
the last part. ``draws.nc`` takes the place of the parts once the run is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from bayeskernel.errors import InputError
from bayeskernel.inference.storage import (
    StorageError,
    load,
    read_arrays,
    read_record,
    write_arrays,
    write_parts,
    write_record,
)
from bayeskernel.keys import is_typed
from bayeskernel.network import Network
from bayeskernel.tasks import Task

Draws = dict[str, np.ndarray]
T = TypeVar("T")

_INTACT = "what was written before is intact, and the same call goes on from there"
_VERSIONS = ("bayeskernel", "jax", "jaxlib", "numpyro", "numpy")


class Checkpoint:
    """A folder with the progress of one run, made if it is not there; that of a run of another `identity` is refused."""

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        if not isinstance(folder, (str, os.PathLike)):
            raise InputError("checkpoint", "the path of a folder", repr(folder))
        self.folder = Path(folder)
        plain = json.loads(json.dumps(identity))
        record = self.folder / "run.json"
        found = read_record(record, "checkpoint", "a run")
        if found is None:
            write_record(record, plain)
            return
        for name in sorted(plain | found):
            if found.get(name) != plain.get(name):
                raise InputError(
                    "checkpoint",
                    f"a run with {name} = {plain.get(name)!r}",
                    f"{self.folder}, a run with {found.get(name)!r}",
                )

    def load(self, chain: int, like: T) -> tuple[T, int, int]:
        """State of a chain in the form of ``like``, transitions made, files of draws; before it began, ``like`` and zeros."""
        path = self._chain(chain) / "state"
        if not path.exists():
            return like, 0, 0
        arrays, (leaves, form) = read_arrays(path), jax.tree.flatten(like)
        state = [jnp.asarray(arrays[f"leaf{i}"]) for i in range(len(leaves))]
        for i, old in enumerate(leaves):
            if is_typed(old):
                state[i] = jax.random.wrap_key_data(state[i], impl=jax.random.key_impl(old))
        return jax.tree.unflatten(form, state), int(arrays["done"]), int(arrays["parts"])

    def save(self, chain: int, state: Any, done: int, parts: int, rows: Draws) -> int:
        """Write draws, if there are any, then the state that follows them; returns the number of parts."""
        folder = self._chain(chain)
        leaves = {
            f"leaf{i}": np.asarray(jax.random.key_data(x) if is_typed(x) else x)
            for i, x in enumerate(jax.tree.leaves(state))
        }
        try:
            folder.mkdir(exist_ok=True)
            if rows:
                write_arrays(folder / f"draws-{parts:06d}", rows)
                parts += 1
            counts = {"done": np.array(done), "parts": np.array(parts)}
            write_arrays(folder / "state", leaves | counts)
        except (OSError, StorageError) as error:
            raise StorageError(f"{error}; {_INTACT}") from error
        return parts

    def finished(self) -> xr.DataTree | None:
        """The draws of a complete run, on disk."""
        return load(self._whole) if self._whole.exists() else None

    def finish(
        self, chains: int, draws: int, arrange: Callable[[Draws], xr.DataTree]
    ) -> xr.DataTree:
        """Join the parts in one file, one part in memory at a time, and open it."""
        like = arrange(next(self._parts(0))[1])
        parts = (
            (chain, row, arrange(part))
            for chain in range(chains)
            for row, part in self._parts(chain)
        )
        return self.conclude(lambda path: write_parts(path, like, chains, draws, parts))

    def conclude(self, write: Callable[[Path], object]) -> xr.DataTree:
        """Put what ``write`` writes in the place of the parts, and open it."""
        try:
            write(self._whole)
        except StorageError as error:
            raise StorageError(f"{error}; {_INTACT}") from error
        for chain in self.folder.glob("chain-*"):
            shutil.rmtree(chain)
        return load(self._whole)

    def rows(self, chain: int) -> Draws:
        """All that was written of a chain, rows after each other."""
        return joined([{k: v[0] for k, v in part.items()} for _, part in self._parts(chain)])

    def _parts(self, chain: int) -> Iterator[tuple[int, Draws]]:
        """First row and draws, shape (1, draw, ...), of each part of a chain."""
        row = 0
        for i in range(self.load(chain, None)[2]):
            rows = read_arrays(self._chain(chain) / f"draws-{i:06d}")
            yield row, {name: values[None] for name, values in rows.items()}
            row += len(rows["kernel"])

    @property
    def _whole(self) -> Path:
        return self.folder / "draws.nc"

    def _chain(self, chain: int) -> Path:
        return self.folder / f"chain-{chain:03d}"


def identity(
    network: Network, task: Task, rng_key: list[int], layout: Mapping[str, Any]
) -> dict[str, Any]:
    """What a run is: resuming asks for the same."""
    return {
        "network": network.describe(),
        "task": digest(task),
        "rng_key": rng_key,
        **layout,
        **{f"{name} version": version(name) for name in _VERSIONS},
        "machine": f"{platform.machine()}, {jax.default_backend()}",
    }


def digest(task: Task) -> str:
    """Tell tasks apart."""
    arrays = (np.ascontiguousarray(a) for a in (task.inputs, task.targets))
    return hashlib.sha256(
        b"".join(repr(a.shape).encode() + a.tobytes() for a in arrays)
    ).hexdigest()


def joined(parts: list[Draws]) -> Draws:
    """One array per name; nothing where there are no parts."""
    return {
        name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())
    }
