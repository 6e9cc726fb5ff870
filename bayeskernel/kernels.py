"""Which kernels describe a representation? C, and what is read off it.

A *site* is a (step, pattern) pair; kernels have shape (..., T, P, T, P). What K and S are made of is in
`bayeskernel.problem`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bayeskernel.errors import InputError, real_array


def representational_kernel(activities: jax.Array) -> jax.Array:
    """C from activities phi(h) of shape (..., T, P, N)."""
    shape = activities.shape
    flat = activities.reshape(*shape[:-3], shape[-3] * shape[-2], shape[-1])
    kernel = flat @ jnp.swapaxes(flat, -1, -2) / shape[-1]
    return kernel.reshape(*shape[:-1], *shape[-3:-1])


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
