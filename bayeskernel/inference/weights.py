r"""The posterior over weights, as a NumPyro model.

Every weight is a standard normal variable z; its scale enters the forward pass (non-centred). Sites:

    recurrent   (recurrent labels, N, N)     W = recurrent_std / sqrt(N) z
    input       (input labels, N, D)         U = input_std / sqrt(D) z
    bias        (bias labels, N)             b = bias_std z
    readout     (readout labels, O, N)       v = readout_std z
    targets     observed at supervised entries

and the deterministics kernel (nodes, P, nodes, P), of a chain (T, P, T, P), and output (T, P, O). Edges with equal label use
the same entry of a site, which is all there is to tying (docs/theory, sections 1, 2W and 8).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from bayeskernel.activations import Activation
from bayeskernel.graph import Graph
from bayeskernel.kernels import representational_kernel
from bayeskernel.network import Network
from bayeskernel.tasks import Task


class Structure(NamedTuple):
    """What fixes shapes and code: hashable, one compilation each."""

    width: int
    phi: Activation
    graph: Graph
    mean_field: bool


class Data(NamedTuple):
    """What can change without compiling again.

    Attributes
    ----------
    inputs
        Shape (T, P, D).
    targets
        Shape (T, P, O), zero where unsupervised.
    supervised
        Shape (T, P, O), boolean.
    scales
        Prior scale of every label's weights by kind, see `Graph.label_names`.
    noise
        kappa.
    """

    inputs: Any
    targets: Any
    supervised: Any
    scales: Any
    noise: Any


def structure(network: Network, steps: int) -> Structure:
    """Collect the static part of a network on a task of ``steps`` steps."""
    return Structure(
        network.width, network.phi, network.graph_of(steps), network.scaling == "mean_field"
    )


def arrays(network: Network, task: Task) -> Data:
    """Collect the arrays of a network on a task, in the caller's default float type."""
    graph = network.graph_of(task.shape[0])
    scales = {
        kind: network.standard_deviation(kind) * graph.scales_of(kind) for kind in graph.label_names
    }
    values = (task.inputs, np.nan_to_num(task.targets), task.supervised, scales, network.noise)
    return Data(*(jax.tree.map(jnp.asarray, a) for a in values))


def site_shapes(net: Structure, features: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """Shape of each site of standard normal variables that exists (one step needs no recurrent weights)."""
    own = {
        "recurrent": (net.width, net.width),
        "input": (net.width, features),
        "readout": (outputs, net.width),
        "bias": (net.width,),
    }
    counts = {kind: len(names) for kind, names in net.graph.label_names.items()}
    return {kind: (counts[kind], *shape) for kind, shape in own.items() if counts[kind]}


def draw_prior(rng_key: jax.Array, net: Structure, data: Data) -> dict[str, jax.Array]:
    """Standard normal variables of all sites."""
    shapes = site_shapes(net, data.inputs.shape[2], data.targets.shape[2])
    keys = jax.random.split(rng_key, len(shapes))
    return {
        name: jax.random.normal(key, shape, data.inputs.dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def preactivations(z: dict[str, jax.Array], net: Structure, data: Data) -> jax.Array:
    """Run the network: h of shape (nodes, P, N)."""
    # Scales multiply activities, not weights: P N products instead of N^2.
    graph, norm = (
        net.graph,
        {"recurrent": np.sqrt(net.width), "input": np.sqrt(data.inputs.shape[2])},
    )
    scales = {kind: data.scales[kind] / norm.get(kind, 1.0) for kind in z}
    nodes: list[jax.Array] = []
    activities: list[jax.Array] = []
    for n in range(graph.size):
        total = jnp.zeros((data.inputs.shape[1], net.width), data.inputs.dtype)
        for kind, sources in (("input", data.inputs), ("recurrent", activities)):
            for edge in graph.edges_of(kind):
                if edge.target == n:
                    read = scales[kind][edge.label] * sources[edge.source]
                    # Weights first: XLA would copy a transposed matrix.
                    total += (z[kind][edge.label] @ read.T).T
        for edge in graph.edges_of("bias"):
            if edge.target == n:
                total += scales["bias"][edge.label] * z["bias"][edge.label]
        carried = (c * nodes[m] for m, c in enumerate(graph.carry[n, :n].tolist()) if c)
        nodes.append(sum(carried, graph.drive[n].item() * total))
        activities.append(net.phi(nodes[-1]))
    return jnp.stack(nodes)


def outputs(z: dict[str, jax.Array], h: jax.Array, net: Structure, data: Data) -> jax.Array:
    """F of shape (T, P, O)."""
    edges = np.array(net.graph.edges_of("readout"))
    norm = net.width if net.mean_field else np.sqrt(net.width)
    scale = data.scales["readout"][edges[:, 2], None, None] / norm
    read = jnp.einsum("eai,eoi->eao", scale * net.phi(h)[edges[:, 1]], z["readout"][edges[:, 2]])
    goes = np.arange(net.graph.steps)[:, None] == edges[:, 0]
    return jnp.tensordot(jnp.asarray(goes, read.dtype), read, 1)


def observation(output: jax.Array, net: Structure, data: Data) -> dist.Distribution:
    """Law of the supervised targets: outputs with noise of variance kappa / N, kappa in standard scaling."""
    variance = data.noise / net.width if net.mean_field else data.noise
    return dist.Normal(output, jnp.sqrt(variance)).mask(data.supervised).to_event(3)


def log_likelihood(net: Structure, z: dict[str, jax.Array], data: Data) -> jax.Array:
    """Ln p(y | z)."""
    output = outputs(z, preactivations(z, net, data), net, data)
    return jnp.asarray(observation(output, net, data).log_prob(data.targets))


def model(net: Structure, data: Data) -> None:
    """Define the NumPyro model of weights, kernels, outputs and targets."""
    shapes = site_shapes(net, data.inputs.shape[2], data.targets.shape[2])
    z = {
        name: numpyro.sample(name, dist.Normal(0, 1).expand(shape).to_event(len(shape)))
        for name, shape in shapes.items()
    }
    h = preactivations(z, net, data)
    output = outputs(z, h, net, data)
    numpyro.deterministic("kernel", representational_kernel(net.phi(h)))
    numpyro.deterministic("output", output)
    numpyro.sample("targets", observation(output, net, data), obs=data.targets)


def scale_sites(z: dict[str, jax.Array], net: Structure, data: Data) -> dict[str, jax.Array]:
    """W, U and v as they act in the network, from standard normal variables."""
    norm = {"recurrent": np.sqrt(net.width), "input": np.sqrt(data.inputs.shape[2])}
    return {
        kind: (data.scales[kind] / norm.get(kind, 1.0)).reshape(-1, *(value.ndim - 1) * (1,))
        * value
        for kind, value in z.items()
    }
