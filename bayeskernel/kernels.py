r"""Which kernels describe a representation, and how does one step's kernel make the next one's?

A *site* is a (step, pattern) pair; d = T P. Kernels have shape (..., T, P, T, P). Definitions
(docs/theory, section 1), shared by sampling and theory and the only thing they share::

    C = (1/N) Phi Phi^T                                     representational kernel
    K(C) = M_W o sw^2 shift(C) + M_U o su^2 X X^T / D       pre-activation kernel
    S(C) = sv^2 (M_V o C) on supervised sites + kappa I     output covariance (times N in mean field)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bayeskernel.errors import InputError, real_array
from bayeskernel.network import Network
from bayeskernel.tasks import Task


class KernelMap(NamedTuple):
    """The arrays that define K and S for a network on a task.

    Attributes
    ----------
    recurrent
        sw^2 M_W, shape (T, 1, T, 1).
    input
        M_U o su^2 X X^T / D, shape (T, P, T, P).
    readout
        sv^2 M_V, shape (T, 1, T, 1).
    noise
        kappa, scalar.
    """

    recurrent: jax.Array | NDArray[np.float64]
    input: jax.Array | NDArray[np.float64]
    readout: jax.Array | NDArray[np.float64]
    noise: jax.Array | NDArray[np.float64]


def kernel_map(network: Network, task: Task) -> KernelMap:
    """Build the `KernelMap` of a network on a task, in float64."""
    steps, _, features, _ = task.shape
    recurrent, inputs, readout = (
        mask[:, None, :, None].astype(np.float64) for mask in network.labels(steps).masks()
    )
    overlaps = np.einsum("tak,sbk->tasb", task.inputs, task.inputs) / features
    return KernelMap(
        recurrent=network.recurrent_std**2 * recurrent,
        input=network.input_std**2 * inputs * overlaps,
        readout=network.readout_std**2 * readout,
        noise=np.asarray(network.noise),
    )


def representational_kernel(activities: jax.Array) -> jax.Array:
    """C from activities phi(h) of shape (..., T, P, N)."""
    shape = activities.shape
    flat = activities.reshape(*shape[:-3], shape[-3] * shape[-2], shape[-1])
    kernel = flat @ jnp.swapaxes(flat, -1, -2) / shape[-1]
    return kernel.reshape(*shape[:-1], *shape[-3:-1])


def shift(kernel: jax.Array) -> jax.Array:
    """shift(C)[(t,a),(s,b)] = C[(t-1,a),(s-1,b)], zero if t = 1 or s = 1."""
    lead = [(0, 0)] * (kernel.ndim - 4)
    return jnp.pad(kernel[..., :-1, :, :-1, :], [*lead, (1, 0), (0, 0), (1, 0), (0, 0)])


def unshift(kernel: jax.Array) -> jax.Array:
    """Adjoint of `shift`: unshift(B)[(t,a),(s,b)] = B[(t+1,a),(s+1,b)], zero if t = T or s = T."""
    lead = [(0, 0)] * (kernel.ndim - 4)
    return jnp.pad(kernel[..., 1:, :, 1:, :], [*lead, (0, 1), (0, 0), (0, 1), (0, 0)])


def preactivation_kernel(kernel: jax.Array, map_: KernelMap) -> jax.Array:
    """K(C), same shape as ``kernel``."""
    return jnp.asarray(map_.recurrent * shift(kernel) + map_.input)


class Supervision(NamedTuple):
    """Targets on the sites that have any; entries of an output that lacks one are masked.

    Attributes
    ----------
    sites
        Flat indices t P + a of the n sites with at least one supervised output.
    mask
        1 where output o is supervised at the site, shape (n, O).
    targets
        Zero where not supervised, shape (n, O).
    """

    sites: NDArray[np.int64]
    mask: NDArray[np.float64]
    targets: NDArray[np.float64]


def supervision(task: Task) -> Supervision:
    """Collect the supervised entries of a task."""
    supervised = task.supervised.reshape(-1, task.shape[3])
    sites = np.flatnonzero(supervised.any(axis=1))
    targets = np.nan_to_num(task.targets.reshape(supervised.shape))
    return Supervision(sites, supervised[sites].astype(np.float64), targets[sites])


def output_covariances(kernel: jax.Array, map_: KernelMap, data: Supervision) -> jax.Array:
    """S_o(C) for every output o, shape (O, n, n).

    Sites where output o is not supervised carry the noise alone and a target of zero; they add
    constants to log determinants and nothing to y^T S^-1 y.
    """
    size = kernel.shape[-1] * kernel.shape[-2]
    prior = (map_.readout * kernel).reshape(size, size)[jnp.ix_(data.sites, data.sites)]
    identity = jnp.eye(prior.shape[0], dtype=prior.dtype)
    return jax.vmap(lambda m: prior * jnp.outer(m, m) + map_.noise * identity)(
        jnp.asarray(data.mask).T
    )


def coherence(kernel: NDArray[np.float64] | jax.Array) -> NDArray[np.float64]:
    """Correlation between the representations at two steps, averaged over patterns.

    rho[t,s] = sum_a C[(t,a),(s,a)] / sqrt(sum_a C[(t,a),(t,a)] sum_a C[(s,a),(s,a)])

    Parameters
    ----------
    kernel
        Shape (..., T, P, T, P).

    Returns
    -------
    Shape (..., T, T); NaN where a step's units are silent for every pattern.
    """
    array = real_array("kernel", kernel, range(4, 33), "(..., T, P, T, P)")
    if array.shape[-4:-2] != array.shape[-2:]:
        raise InputError("kernel", "shape (..., T, P, T, P)", f"shape {array.shape}")
    overlap = np.einsum("...tasa->...ts", array)
    size = np.sqrt(np.einsum("...tt->...t", overlap))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(overlap / (size[..., :, None] * size[..., None, :]))
