"""A sweep's results as one dataset, also while it is still running."""

from __future__ import annotations

import itertools
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from bayeskernel.errors import InputError
from bayeskernel.inference.storage import StorageError, read_arrays
from bayeskernel.kernels import coherence
from bayeskernel.sweeps.grid import AXES, sample_file, theory_file
from bayeskernel.sweeps.points import Result

# Says what a sweep's folder holds.
RECORD = "sweep.json"
# Nodes are called steps where all networks are chains.
_SITES = ("node", "pattern", "other_node", "other_pattern")
_OUTPUT = ("step", "pattern", "output_unit")
# Variables of both sources, and of theory alone, with their own dimensions.
_BOTH: dict[str, tuple[str, ...]] = {
    "kernel": _SITES,
    "kernel_error": _SITES,
    "kernel_std": _SITES,
    "output": _OUTPUT,
    "ok": (),
    "status": (),
}
_THEORY: dict[str, tuple[str, ...]] = {
    "kernel_shift": _SITES,
    "free_energy": (),
    "free_energy_error": (),
    "residual": (),
    "branch_kernel": ("direction", *_SITES),
    "branch_free_energy": ("direction",),
    "branch_free_energy_error": ("direction",),
    "branch_ok": ("direction",),
}
_SAMPLED: dict[str, tuple[str, ...]] = {"output_error": _OUTPUT, "ess": ()}


def open_sweep(folder: str | os.PathLike[str]) -> xr.Dataset:
    """Open the results of a sweep, finished or not.

    Returns
    -------
    Dataset over the axes of the grid. With a dimension ``source`` ("theory", "sampled"): kernel,
    kernel_error (Monte-Carlo error), kernel_std (posterior standard deviation at the point's width),
    coherence, output, ok, status. For theory only: kernel_shift (~ 1/N, at the point's width), free_energy and its
    Monte-Carlo error free_energy_error, residual, and branch_kernel, branch_coherence, branch_free_energy,
    branch_free_energy_error, branch_ok with a dimension ``direction``: the solution met with the signal
    rising ("up") and falling ("down"). For samples only: output_error, ess (smallest of all entries). z compares
    theory and samples, as `bayeskernel.compare` does; it is
    NaN where theory has no fluctuations. Points that are not there yet are NaN, with status "not computed", and so
    are steps and patterns that smaller tasks do not have. Where a network is not a chain, kernels have a dimension ``node``
    instead of ``step``: layer by layer.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise InputError("folder", "the path of a folder", repr(folder))
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        raise InputError("folder", "the folder of a sweep", str(folder)) from None
    axes: dict[str, list[Any]] = record["axes"]
    swept = [name for name in AXES if name in record["swept"]]
    node, steps = "step" if record["nodes"] is None else "node", max(axes["steps"])
    sizes = {name: len(axes[name]) for name in swept}
    nodes = record["nodes"] or steps
    sizes |= {"step": steps, node: nodes, f"other_{node}": nodes, "direction": 2}
    sizes |= {"pattern": record["patterns"], "other_pattern": record["patterns"]}
    sizes |= {"output_unit": record["outputs"]}
    theory = [name for name in swept if name not in ("width", "seed")]
    sources = ["theory"] * record["solve"] + ["sampled"] * (record["sample"] is not None)
    parts = list[xr.Dataset]()
    for source in sources:
        over = theory if source == "theory" else swept
        here = _empty(over, node, sizes, _BOTH | (_THEORY if source == "theory" else _SAMPLED))
        file = theory_file if source == "theory" else sample_file
        for index in itertools.product(*(range(sizes[name]) for name in over)):
            point = {name: values[0] for name, values in axes.items()}
            point |= {name: axes[name][i] for name, i in zip(over, index, strict=True)}
            with suppress(StorageError):
                _fill(here, index, read_arrays(file(folder, point)))
        parts.append(xr.Dataset(here))
    # Theory is the same for all widths and seeds.
    both = []
    for part in parts:
        missing = {name: sizes[name] for name in swept if name not in part["ok"].dims}
        both.append(part[list(_BOTH)].expand_dims(missing))
    data = xr.concat(both, xr.Variable("source", sources))
    data = data.transpose("source", *swept, ...)
    for part in parts:
        data = data.assign({k: v for k, v in part.items() if k not in _BOTH})
    return _derived(data.assign_coords(_coordinates(axes, swept, node, sizes)))


def _empty(
    over: list[str], node: str, sizes: dict[str, int], variables: dict[str, tuple[str, ...]]
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    made = {}
    for name, own in variables.items():
        dims = (*over, *(dim.replace("node", node) for dim in own))
        shape = tuple(sizes[dim] for dim in dims)
        if name == "status":
            made[name] = dims, np.full(shape, "not computed", object)
        elif name.endswith("ok"):
            made[name] = dims, np.zeros(shape, bool)
        else:
            made[name] = dims, np.full(shape, np.nan)
    return made


def _fill(
    into: dict[str, tuple[tuple[str, ...], np.ndarray]], index: tuple[Any, ...], result: Result
) -> None:
    for name, value in result.items():
        if name not in into:
            continue
        array = into[name][1]
        if value.ndim == 0:
            array[index] = value.item()
        else:
            # Fewer steps or patterns than the largest task has.
            own = tuple(slice(0, n) for n in value.shape)
            array[index + own] = value


def _coordinates(
    axes: dict[str, list[Any]], swept: list[str], node: str, sizes: dict[str, int]
) -> dict[str, Any]:
    coords = {
        name: (name, values) if name in swept else values[0]
        for name, values in axes.items()
        if values != [None]
    }
    coords |= {name: np.arange(1, sizes[name] + 1) for name in ("step", node, f"other_{node}")}
    coords |= {name: np.arange(sizes[name]) for name in ("pattern", "other_pattern", "output_unit")}
    return coords | {"direction": ["up", "down"]}


def _derived(data: xr.Dataset) -> xr.Dataset:
    """Coherence, fluctuations at the points' widths, and z."""
    data = data.assign(coherence=_coherence(data["kernel"]))
    if "kernel_shift" not in data:
        return data.drop_vars("direction")
    per_unit = data["kernel_std"] / np.sqrt(data["width"])
    shift = data["kernel_shift"] / data["width"]
    data = data.assign(
        branch_coherence=_coherence(data["branch_kernel"]),
        kernel_std=xr.where(data["source"] == "theory", per_unit, data["kernel_std"]),
        kernel_shift=shift,
    )
    if "ess" in data:
        variance = (data["kernel_error"] ** 2).sum("source", skipna=False) + shift**2
        difference = data["kernel"].sel(source="sampled", drop=True) - data["kernel"].sel(
            source="theory", drop=True
        )
        data = data.assign(z=difference / np.sqrt(variance))
    return data


def _coherence(kernel: xr.DataArray) -> xr.DataArray:
    kernel = kernel.fillna(0.0)  # patterns that smaller tasks do not have add nothing to sums
    sites = kernel.dims[-4:]
    return xr.apply_ufunc(coherence, kernel, input_core_dims=[sites], output_core_dims=[sites[::2]])
