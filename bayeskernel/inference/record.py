"""What a run leaves behind: a DataTree in ArviZ's schema that explains itself."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from bayeskernel.activations import recorded
from bayeskernel.errors import InputError, instance
from bayeskernel.gauge import SignSymmetry, sign_symmetry
from bayeskernel.graph import Graph
from bayeskernel.network import Network, check_problem
from bayeskernel.problem import block_reads
from bayeskernel.problem import problem as posed
from bayeskernel.sharing import Sharing
from bayeskernel.tasks import Task

# "node" and "other_node" stand for what `node_axes` says.
_SITES = ("node", "pattern", "other_node", "other_pattern")
_DIMS: dict[str, tuple[str, ...]] = {
    "kernel": _SITES,
    "preactivation_kernel": _SITES,
    "norm": ("node", "other_node"),
    "output": ("step", "pattern", "output_unit"),
    "preactivation": ("node", "pattern", "unit"),
    "recurrent_weights": ("recurrent_label", "unit", "source_unit"),
    "input_weights": ("input_label", "unit", "feature"),
    "bias_weights": ("bias_label", "unit"),
    "readout_weights": ("readout_label", "output_unit", "unit"),
}
_STATS = ("lp", "energy", "n_steps", "acceptance_rate", "diverging", "step_size")
_CONTENT = {
    "posterior": ("kernel", "output"),
    "sample_stats": ("lp", "energy", "diverging", "n_steps"),
    "observed_data": ("targets",),
    "constant_data": ("inputs", "supervised"),
}
_RECORDS = ("network", "task", "settings", "symmetry")
# Spaces of networks that were trained one by one: nothing was sampled, so there are no statistics of chains.
_TRAINED = ("measured", "trained")
_PACKAGES = ("bayeskernel", "jax", "numpyro", "arviz", "numpy", "xarray")


def to_datatree(
    draws: dict[str, np.ndarray],
    group: str,
    network: Network,
    task: Task,
    settings: dict[str, Any],
) -> xr.DataTree:
    """Arrange draws of shape (chain, draw, ...) as a DataTree.

    Groups: ``group`` ("posterior" or "prior"), sample_stats if the draws have any, observed_data
    (targets), constant_data (inputs, supervised). Nodes of a chain are dimension step, of a stack layer and step, of
    other graphs node (in the order of the graph's). Nodes, layers and steps are counted from 1, patterns, outputs and
    units from 0.
    """
    draws = dict(draws)
    stats = {name: draws.pop(name) for name in _STATS if name in draws}
    if "readout_weights" in draws:
        # Samplers that serve every sharing pattern store a row for everything that outputs read.
        used = len(network.graph_of(task.shape[0]).label_names["readout"])
        draws["readout_weights"] = draws["readout_weights"][:, :, :used]
    draws["preactivation_kernel"] = _preactivation_kernel(draws["kernel"], network, task)
    groups = {group: dataset(draws, node_axes(network.graph_of(task.shape[0])))}
    if stats:
        stats["tree_depth"] = np.ceil(np.log2(stats["n_steps"] + 1)).astype(np.int64)
        groups["sample_stats"] = xr.Dataset({k: (("chain", "draw"), v) for k, v in stats.items()})
    names = ("step", "pattern", "output_unit")
    groups["observed_data"] = xr.Dataset({"targets": (names, task.targets)})
    groups["constant_data"] = xr.Dataset(
        {
            "inputs": (("step", "pattern", "feature"), task.inputs),
            "supervised": (names, task.supervised),
        }
    )
    tree = xr.DataTree.from_dict({name: _counted(data, {}) for name, data in groups.items()})
    tree.attrs = {
        "network": json.dumps(network.describe(), sort_keys=True),
        "task": task.name,
        "settings": json.dumps(settings, sort_keys=True),
        "symmetry": json.dumps(
            {name: signs.tolist() for name, signs in vars(sign_symmetry(network, task)).items()}
        ),
        **{f"{name}_version": version(name) for name in _PACKAGES},
    }
    return tree


def dataset(draws: dict[str, np.ndarray], axes: dict[str, list[Any]] | None = None) -> xr.Dataset:
    """Named dimensions and coordinates for arrays of shape (chain, draw, ...); nodes on the axes given."""
    of_nodes = {other + name: v for other in ("", "other_") for name, v in (axes or {}).items()}
    variables = {}
    for name, values in draws.items():
        sizes: dict[str, int] = {}
        for dim, size in zip(("chain", "draw", *_DIMS[name]), values.shape, strict=True):
            if dim in ("node", "other_node"):
                own = dim.removesuffix("node")
                sizes |= {own + axis: len(v) for axis, v in (axes or {}).items()}
            else:
                sizes[dim] = size
        variables[name] = (tuple(sizes), values.reshape(tuple(sizes.values())))
    return _counted(xr.Dataset(variables), of_nodes)


def settings(draws: xr.DataTree) -> dict[str, Any]:
    """How a run was made."""
    return dict(json.loads(str(draws.attrs["settings"])))


def problem(draws: xr.DataTree) -> tuple[Network, Task]:
    """The network and the task of a run, from its records."""
    described = json.loads(str(draws.attrs["network"]))
    if isinstance(described["sharing"], dict):
        described["sharing"] = Sharing(**described["sharing"])
    if described.get("graph") is not None:
        described["graph"] = Graph(**described["graph"])
    odd = bool(symmetry(draws).generators.size)
    described["activation"] = recorded(described["activation"], odd=odd)
    inputs = draws["constant_data"]["inputs"].to_numpy()
    targets = draws["observed_data"]["targets"].to_numpy()
    return Network(**described), Task(inputs, targets, str(draws.attrs["task"]))


def symmetry(draws: xr.DataTree) -> SignSymmetry:
    """The sign symmetry of a run."""
    steps, nodes = draws["constant_data"].sizes["step"], stored(draws, "kernel").shape[2]
    flips = json.loads(str(draws.attrs["symmetry"]))
    return SignSymmetry(
        np.array(flips["generators"], np.int64).reshape(-1, nodes),
        np.array(flips["output_signs"], np.int64).reshape(-1, steps),
    )


def kernel_and_output(draws: xr.DataTree) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Kernels (chain, draw, m,P,m,P) as stored and outputs (chain, draw, T,P,O) in double precision."""
    kernel, output = (stored(draws, name) for name in ("kernel", "output"))
    return kernel, output.astype(np.float64)


def stored(draws: xr.DataTree, name: str) -> NDArray[Any]:
    """A variable of the posterior with its nodes on one axis, (chain, draw, ...)."""
    array = draws["posterior"][name]
    shape = []
    for dim in ("chain", "draw", *_DIMS[name]):
        axes = [dim] if dim in array.dims else [dim[:-4] + axis for axis in ("layer", "step")]
        shape.append(int(np.prod([array.sizes[axis] for axis in axes if axis in array.dims])))
    return array.to_numpy().reshape(shape)


def trained_networks(draws: xr.DataTree) -> int:
    """How many networks, trained one by one, the kernels are of; zero for draws of chains."""
    trained = settings(draws).get("space") in _TRAINED
    return int(draws["posterior"].sizes["chain"]) if trained else 0


def seed_data(rng_key: jax.Array) -> list[int]:
    """Words of a JAX key, from which ``jax.random.wrap_key_data`` makes it again."""
    return np.asarray(jax.random.key_data(rng_key)).ravel().tolist()


def check_draws(draws: object) -> None:
    """Refuse what is not a whole run with its records."""
    tree = instance("draws", draws, xr.DataTree)
    missing = [name for name in _RECORDS if name not in tree.attrs]
    sampled = "settings" not in tree.attrs or settings(tree).get("space") not in _TRAINED
    for group, names in _CONTENT.items():
        if group == "sample_stats" and not sampled:
            continue
        here = tree.children[group].data_vars if group in tree.children else ()
        missing += [f"{group}/{name}" for name in names if name not in here]
    if missing:
        raise InputError(
            "draws",
            "a DataTree from bayeskernel.sample, train or measure",
            f"one without {missing}",
        )


def check_same_run(draws: xr.DataTree, network: Network, task: Task) -> None:
    """Refuse draws that belong to another network or task."""
    check_problem(network, task)
    check_draws(draws)
    described = json.loads(str(draws.attrs["network"]))
    expected = json.loads(json.dumps(network.describe()))
    differing = {k: v for k, v in described.items() if expected.get(k) != v}
    if differing:
        wanted = {name: expected.get(name) for name in differing}
        raise InputError(
            "draws", f"a run of this network, with {wanted}", f"a run with {differing}"
        )
    for name, group, values in (
        ("inputs", "constant_data", task.inputs),
        ("targets", "observed_data", task.targets),
    ):
        if not np.array_equal(draws[group][name].to_numpy(), values, equal_nan=True):
            raise InputError("draws", f"a run on this task's {name}", f"a run on other {name}")


def node_axes(graph: Graph) -> dict[str, list[Any]]:
    """Dimensions of nodes with their coordinates: step of a chain, layer and step of a stack, else node."""
    places = graph.places_of_nodes.tolist()
    layers, steps = list(range(1, places[-1][0] + 1)), list(range(1, graph.steps + 1))
    if graph.places and places == [[layer, step] for layer in layers for step in steps]:
        return {"layer": layers, "step": steps} if len(layers) > 1 else {"step": steps}
    return {"node": list(range(1, graph.size + 1))}


def _counted(data: xr.Dataset, known: dict[str, list[Any]]) -> xr.Dataset:
    """Coordinates for dimensions without them: those known, else counted, steps from 1."""
    return data.assign_coords(
        {
            dim: known.get(str(dim), np.arange(size) + (dim in ("step", "other_step")))
            for dim, size in data.sizes.items()
            if dim not in data.coords
        }
    )


def _preactivation_kernel(kernel: np.ndarray, network: Network, task: Task) -> np.ndarray:
    """K(C) of every draw, in the draws' own precision."""
    defined = posed(network, task)
    drive = defined.tensor(defined.input_kernel).astype(kernel.dtype)
    K = np.broadcast_to(drive, kernel.shape).copy()
    for t, s, before, other, strength in block_reads(defined.gain):
        K[..., t, :, s, :] += kernel.dtype.type(strength) * kernel[..., before, :, other, :]
    return K
