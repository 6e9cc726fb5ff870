r"""The posterior over weights, as a NumPyro model.

Every weight is a standard normal variable z; its scale enters the forward pass (non-centred). Sites:

    recurrent   (recurrent labels, N, N)     W = recurrent_std / sqrt(N) z
    input       (input labels, N, D)         U = input_std / sqrt(D) z
    readout     (readout labels, O, N)       v = readout_std z
    targets     observed at supervised entries

and the deterministics kernel (T, P, T, P) and output (T, P, O). Steps with equal label use the same
entry of a site, which is all there is to tying (docs/theory, sections 1 and 2W).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from bayeskernel.activations import Activation
from bayeskernel.kernels import representational_kernel
from bayeskernel.network import Network, StepLabels
from bayeskernel.tasks import Task


class Structure(NamedTuple):
    """What fixes shapes and code: hashable, one compilation each."""

    width: int
    phi: Activation
    labels: StepLabels
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
        recurrent_std, input_std, readout_std.
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
        network.width, network.phi, network.labels(steps), network.scaling == "mean_field"
    )


def arrays(network: Network, task: Task) -> Data:
    """Collect the arrays of a network on a task, in the caller's default float type."""
    scales = np.array([network.recurrent_std, network.input_std, network.readout_std])
    values = (task.inputs, np.nan_to_num(task.targets), task.supervised, scales, network.noise)
    return Data(*(jnp.asarray(a) for a in values))


def site_shapes(net: Structure, features: int, outputs: int) -> dict[str, tuple[int, int, int]]:
    """Shape of each site of standard normal variables."""
    recurrent, inputs, readout = net.labels.counts
    return {
        "recurrent": (recurrent, net.width, net.width),
        "input": (inputs, net.width, features),
        "readout": (readout, outputs, net.width),
    }


def draw_prior(rng_key: jax.Array, net: Structure, data: Data) -> dict[str, jax.Array]:
    """Standard normal variables of all sites that exist (one step needs no recurrent weights)."""
    shapes = site_shapes(net, data.inputs.shape[2], data.targets.shape[2])
    keys = jax.random.split(rng_key, len(shapes))
    return {
        name: jax.random.normal(key, shape, data.inputs.dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        if 0 not in shape
    }


def preactivations(z: dict[str, jax.Array], net: Structure, data: Data) -> jax.Array:
    """Run the network: h of shape (T, P, N)."""
    # Scales multiply activities, not weights: T P N products instead of N^2.
    recurrent_scale = data.scales[0] / np.sqrt(net.width)
    input_scale = data.scales[1] / np.sqrt(data.inputs.shape[2])
    steps: list[jax.Array] = []
    for t, x in enumerate(data.inputs):
        h = (input_scale * x) @ z["input"][net.labels.input[t]].T
        if t:
            activity = net.phi(steps[-1])
            h += (recurrent_scale * activity) @ z["recurrent"][net.labels.recurrent[t]].T
        steps.append(h)
    return jnp.stack(steps)


def outputs(z: dict[str, jax.Array], h: jax.Array, net: Structure, data: Data) -> jax.Array:
    """F of shape (T, P, O)."""
    readout = z["readout"][np.array(net.labels.readout)]
    scale = data.scales[2] / (net.width if net.mean_field else np.sqrt(net.width))
    return jnp.einsum("tai,toi->tao", scale * net.phi(h), readout)


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
        name: numpyro.sample(name, dist.Normal(0, 1).expand(shape).to_event(3))
        for name, shape in shapes.items()
        if 0 not in shape
    }
    h = preactivations(z, net, data)
    output = outputs(z, h, net, data)
    numpyro.deterministic("kernel", representational_kernel(net.phi(h)))
    numpyro.deterministic("output", output)
    numpyro.sample("targets", observation(output, net, data), obs=data.targets)


def scale_sites(z: dict[str, jax.Array], net: Structure, data: Data) -> dict[str, jax.Array]:
    """W, U and v as they act in the network, from standard normal variables."""
    scale = {
        "recurrent": data.scales[0] / np.sqrt(net.width),
        "input": data.scales[1] / np.sqrt(data.inputs.shape[2]),
        "readout": data.scales[2],
    }
    return {name: scale[name] * value for name, value in z.items()}
