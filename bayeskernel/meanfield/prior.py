r"""What is the kernel before training, as N -> infinity?

The recursion C = <phi phi^T> under h ~ N(0, K(C)), solved step by step. It is the zero-signal
solution of the mean-field theory and, with standard scaling, the solution at any signal (NNGP).
Closed forms: linear, erf (Williams 1997, "Computing with infinite networks"), relu (Cho and Saul
2009, arc-cosine kernel of degree one); any other phi by two-dimensional Gauss-Hermite quadrature.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bayeskernel.activations import Activation
from bayeskernel.network import Network
from bayeskernel.problem import Floats, Problem, problem
from bayeskernel.tasks import Task

# Nodes per dimension; relative error below 1e-10 for tanh at the variances met in practice.
_QUADRATURE_NODES = 96


def prior_kernel(network: Network, task: Task) -> Floats:
    """C of the infinitely wide network under its prior, shape (T, P, T, P), for other graphs (nodes, P, nodes, P); float64."""
    posed = problem(network, task)
    return posed.tensor(prior_recursion(posed))


def prior_recursion(problem: Problem) -> Floats:
    """Iterate C <- <phi phi^T>_{N(0, K(C))}; exact after T rounds, as K only looks back. Shape (d, d)."""
    C = np.zeros((problem.size, problem.size))
    for n in range(problem.nodes):
        now, known = problem.node_of == n, problem.node_of <= n
        K = problem.preactivation_kernel(C)
        C[np.ix_(now, known)] = gaussian_average(problem.phi, K, now, known)
        own = np.ix_(now, now)
        C[own] = (C[own] + C[own].T) / 2
        C[np.ix_(known, now)] = C[np.ix_(now, known)].T
    return C


def closed_form(phi: Activation) -> bool:
    """Whether the kernel before training is known without quadrature."""
    return phi.linear or (phi.named and phi.name in ("erf", "relu"))


def gaussian_average(
    phi: Activation, K: Floats, rows: NDArray[np.bool_], columns: NDArray[np.bool_]
) -> Floats:
    """Some rows and columns of <phi(h) phi(h)^T> for h ~ N(0, K), entry by entry."""
    variances = np.diag(K)[rows], np.diag(K)[columns]
    std, other = (np.sqrt(variance) for variance in variances)
    covariance = K[np.ix_(rows, columns)]
    if phi.linear:
        return covariance
    if phi.named and phi.name == "erf":
        norms = (np.sqrt(1 + np.pi / 2 * variance) for variance in variances)
        return np.asarray(2 / np.pi * np.arcsin(np.pi / 2 * covariance / np.outer(*norms)))
    scale = np.outer(std, other)
    share = np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 0)
    correlation = np.clip(share, -1.0, 1.0)
    if phi.named and phi.name == "relu":
        angle = np.arccos(correlation)
        return np.asarray(scale / (2 * np.pi) * (np.sin(angle) + (np.pi - angle) * np.cos(angle)))
    return _quadrature(phi, std, other, correlation)


def _quadrature(phi: Activation, std: Floats, other: Floats, correlation: Floats) -> Floats:
    nodes, weights = np.polynomial.hermite_e.hermegauss(_QUADRATURE_NODES)
    weights = weights / weights.sum()
    first = phi.values(std[:, None] * nodes)  # phi at the nodes of each row
    average = np.empty_like(correlation)
    for i, rho in enumerate(correlation[:, :, None, None]):
        # h_j = std_j (rho h_i / std_i + sqrt(1 - rho^2) z): nodes (j, node of i, node of z)
        second = rho * nodes[:, None] + np.sqrt(1 - rho**2) * nodes
        inner = phi.values(other[:, None, None] * second) @ weights
        average[i] = inner @ (weights * first[i])
    return average
