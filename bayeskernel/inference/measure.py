"""What kernels does anybody's trained network have? Its activities, in the form that draws have."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from bayeskernel.errors import InputError, real_array
from bayeskernel.inference import record
from bayeskernel.network import Network, check_problem
from bayeskernel.tasks import Task

Floats = NDArray[np.float64]


def measure(
    network: Network, task: Task, activities: ArrayLike, outputs: ArrayLike | None = None
) -> xr.DataTree:
    """Kernels of networks that were trained elsewhere.

    Parameters
    ----------
    network, task
        The architecture and the data that the networks have in common.
    activities
        phi(h) of the task's patterns, shape (T, P, N) for one network or (networks, T, P, N). For graphs other than
        chains, nodes take the place of T in the graph's order. The nodes of a stack come layer by layer, so arrays
        (networks, layers, T, P, N) are reshaped to (networks, layers * T, P, N). NumPy arrays and what converts to them:
        JAX arrays (flax, equinox), PyTorch tensors on the CPU that need no gradient.
    outputs
        Shape (T, P, O) or (networks, T, P, O). NaN marks an output that was not recorded; None, that none was.

    Returns
    -------
    DataTree as `bayeskernel.sample` returns it, where every network is a chain of one draw; there are no statistics
    of chains.
    `bayeskernel.compare` takes errors from the spread over networks.

    Raises
    ------
    InputError
        For shapes that do not fit the network and the task, and activities that are not finite.
    """
    check_problem(network, task)
    steps, patterns, _, readouts = task.shape
    nodes = network.graph_of(steps).size
    phi = _ensemble("activities", activities, (nodes, patterns, network.width))
    broken = np.flatnonzero(~np.isfinite(phi).all(axis=(1, 2, 3)))
    if broken.size:
        raise InputError("activities", "finite numbers", f"others in networks {broken.tolist()}")
    read = np.full((len(phi), steps, patterns, readouts), np.nan)
    if outputs is not None:
        read = _ensemble("outputs", outputs, (steps, patterns, readouts))
    if len(read) != len(phi):
        raise InputError("outputs", f"those of {len(phi)} networks", f"of {len(read)}")
    flat = phi.reshape(len(phi), nodes * patterns, -1)
    kernel = (flat @ flat.transpose(0, 2, 1) / network.width).reshape(-1, *2 * (nodes, patterns))
    values = {"kernel": kernel, "output": read}
    return of_networks(values, network, task, {"space": "measured"})


def of_networks(
    values: dict[str, NDArray[Any]], network: Network, task: Task, made: dict[str, Any]
) -> xr.DataTree:
    """Kernels (networks, m, P, m, P), outputs (networks, T, P, O) and so on as a DataTree of chains of one draw."""
    draws = {name: each[:, None] for name, each in values.items()}
    return record.to_datatree(draws, "posterior", network, task, made)


def _ensemble(argument: str, values: ArrayLike, shape: tuple[int, ...]) -> Floats:
    """Values with an axis for networks."""
    expected = f"{shape} or (networks, {', '.join(map(str, shape))})"
    array = real_array(argument, values, (3, 4), expected)
    array = array if array.ndim == 4 else array[None]
    if array.shape[1:] != shape or not len(array):
        raise InputError(argument, f"shape {expected}", f"shape {np.shape(values)}")
    return array
