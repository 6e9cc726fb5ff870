r"""What is the kernel before training, as N -> infinity?

The recursion C = <phi phi^T> under h ~ N(0, K(C)), solved step by step. It is the zero-signal
solution of the mean-field theory and, with standard scaling, the solution at any signal (NNGP).
Closed forms: linear, erf (Williams 1997, "Computing with infinite networks"), relu (Cho and Saul
2009, arc-cosine kernel of degree one); any other phi by two-dimensional Gauss-Hermite quadrature.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bayeskernel.activations import Activation
from bayeskernel.kernels import KernelMap, kernel_map, preactivation_kernel
from bayeskernel.network import Network, check_problem
from bayeskernel.tasks import Task

Floats = NDArray[np.float64]

# Nodes per dimension; relative error below 1e-10 for tanh at the variances met in practice.
_QUADRATURE_NODES = 96


def prior_kernel(network: Network, task: Task) -> Floats:
    """C of the infinitely wide network under its prior, shape (T, P, T, P), float64."""
    check_problem(network, task)
    with jax.enable_x64(True):
        return prior_recursion(network.phi, kernel_map(network, task))


def prior_recursion(phi: Activation, map_: KernelMap) -> Floats:
    """Iterate C <- <phi phi^T>_{N(0, K(C))}; exact after T rounds, as K only looks back."""
    kernel = np.zeros(np.shape(map_.input))
    for _ in range(kernel.shape[0]):
        kernel = gaussian_average(phi, np.asarray(_preactivation_kernel(kernel, map_)))
    return kernel


_preactivation_kernel = jax.jit(preactivation_kernel)


def gaussian_average(phi: Activation, covariance: Floats) -> Floats:
    """<phi(h) phi(h)^T> for h ~ N(0, K), entry by entry; K of shape (T, P, T, P)."""
    shape = covariance.shape
    K = covariance.reshape(shape[0] * shape[1], -1)
    variance = np.diag(K)
    if phi.name == "linear":
        average = K
    elif phi.name == "erf":
        norm = np.sqrt(1 + np.pi / 2 * variance)
        average = 2 / np.pi * np.arcsin(np.pi / 2 * K / np.outer(norm, norm))
    elif phi.name == "relu":
        scale = np.sqrt(np.outer(variance, variance))
        angle = np.arccos(_correlation(K))
        average = scale / (2 * np.pi) * (np.sin(angle) + (np.pi - angle) * np.cos(angle))
    else:
        average = _quadrature(phi, variance, _correlation(K))
    return np.asarray(average.reshape(shape))


def _correlation(K: Floats) -> Floats:
    std = np.sqrt(np.diag(K))
    scale = np.outer(std, std)
    return np.clip(np.divide(K, scale, out=np.zeros_like(K), where=scale > 0), -1.0, 1.0)


def _quadrature(phi: Activation, variance: Floats, correlation: Floats) -> Floats:
    nodes, weights = np.polynomial.hermite_e.hermegauss(_QUADRATURE_NODES)
    weights = weights / weights.sum()
    std = np.sqrt(variance)
    first = np.asarray(
        phi(jnp.asarray(std[:, None] * nodes))
    )  # (d, n): phi at the nodes of each site
    average = np.empty_like(correlation)
    for i in range(len(std)):
        # h_j = std_j (rho h_i/std_i + sqrt(1 - rho^2) z): nodes (j, node of i, node of z)
        rho = correlation[i][:, None, None]
        second = rho * nodes[:, None] + np.sqrt(1 - rho**2) * nodes
        inner = np.asarray(phi(jnp.asarray(std[:, None, None] * second))) @ weights
        average[i] = inner @ (weights * first[i])
    return (average + average.T) / 2
