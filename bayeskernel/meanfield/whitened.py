r"""Where does the descent of a large linear network begin? Near a minimum of F, by coordinates that keep the prior simple.

With K(C) = L L^T and C = (L A) (L A)^T, both triangular in the order of the nodes, the free energy of a linear network is

    F = energy(C) + (||A||^2 - d) / 2 - ln det A        (docs/theory, section 4, with Ct = K^-1 - C^-1).

Its second part, written in C a valley that bends as K follows C, is the same bowl around the prior A = 1 everywhere. What it
leaves to the energy is smooth enough for a quasi-Newton method. C follows from A node by node, as K reads earlier nodes only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np
from scipy.linalg import solve_triangular
from scipy.optimize import minimize

from bayeskernel._precision import jit
from bayeskernel.conditioning import NULL_SHARE, whitened
from bayeskernel.likelihood import energy, force
from bayeskernel.meanfield.prior import prior_recursion
from bayeskernel.problem import Floats, Problem, block_reads

# Block (n, k) of K reads block (i, j) of C, and how strongly.
_Reads: TypeAlias = tuple[tuple[int, int, int, int, float], ...]

# Largest entry of the gradient at the end, most iterations, and of how many the curvature is made.
_FLAT, _ITERATIONS, _MEMORY = 2e-8, 1000, 20


def near_minimum(
    problem: Problem, report: Callable[[int, float], None] | None = None
) -> tuple[Floats, Floats] | None:
    """C and Ct of a linear network close to the minimum of F that the prior leads to.

    Returns
    -------
    Shape (d, d) each; None where K has null directions before data, or rounding errors end the descent.
    """
    d = problem.size
    K = problem.preactivation_kernel(prior_recursion(problem))
    if len(whitened(K, problem.patterns, NULL_SHARE["moments"])[0].pivots) < d:
        return None
    rows, columns = np.tril_indices(d)
    own, values = rows == columns, list[float]()

    def unpacked(x: Floats) -> Floats:
        A = np.zeros((d, d))
        A[rows, columns] = np.where(own, np.exp(x), x)  # positive on the diagonal
        return A

    def value(x: Floats) -> tuple[float, Floats]:
        A = unpacked(x)
        primal, pull, _ = jax.vjp(kernel, A, has_aux=True)
        C = np.asarray(primal)
        slope = A - np.asarray(pull(force(C, problem) / 2)[0])
        slope = slope[rows, columns]
        slope[own] = slope[own] * A.diagonal() - 1
        bowl = (np.sum(A**2) - d) / 2 - np.sum(x[own])
        values.append(float(np.max(np.abs(slope))))
        return energy(C, problem) + float(bowl), slope

    def told(_: Floats) -> None:
        if report is not None:
            report(len(values), values[-1])

    options = {"maxiter": _ITERATIONS, "maxcor": _MEMORY, "gtol": _FLAT, "ftol": 0.0}
    with jax.enable_x64(True):
        reads = tuple(block_reads(problem.gain))
        kernel = partial(_kernel, problem.nodes, reads, jnp.asarray(problem.input_kernel))
        x = minimize(
            value, np.zeros(len(rows)), jac=True, method="L-BFGS-B", options=options, callback=told
        ).x
        A = unpacked(x)
        C, L = (np.asarray(a) for a in kernel(jnp.asarray(A)))
    if not np.all(np.isfinite(L)):
        return None
    # Ct = K^-1 - C^-1, without the difference of two inverses where K is nearly singular.
    root = solve_triangular(A, np.eye(d), lower=True)
    half = solve_triangular(L, np.eye(d) - root.T @ root, lower=True, trans="T")
    Ct = solve_triangular(L, half.T, lower=True, trans="T")
    return C, (Ct + Ct.T) / 2


@partial(jit, static_argnums=(0, 1))
def _kernel(
    nodes: int, reads: _Reads, K_in: jax.Array, A: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """C and L of A, (d, d) each, rows of one node after the other."""
    P = len(A) // nodes
    blocks = dict[tuple[int, int], jax.Array]()
    L = LA = jnp.zeros((0, 0))
    for n in range(nodes):
        K = [K_in[n * P : (n + 1) * P, k * P : (k + 1) * P] for k in range(n + 1)]
        for row, k, i, j, strength in reads:
            if row == n and k <= n:
                K[k] = K[k] + strength * blocks[i, j]
        before = jax.scipy.linalg.solve_triangular(
            L, jnp.concatenate([jnp.zeros((P, 0)), *K[:n]], axis=1).T, lower=True
        ).T
        last = jnp.linalg.cholesky(K[n] - before @ before.T)
        L = _bordered(L, before, last)
        new = L[n * P :] @ A[: len(L), : len(L)]
        LA = _bordered(LA, new[:, : n * P], new[:, n * P :])
        C = new @ LA.T
        for k in range(n + 1):
            blocks[n, k] = C[:, k * P : (k + 1) * P]
            blocks[k, n] = blocks[n, k].T
    return LA @ LA.T, L


def _bordered(matrix: jax.Array, row: jax.Array, corner: jax.Array) -> jax.Array:
    above = jnp.concatenate([matrix, jnp.zeros((len(matrix), len(corner)))], axis=1)
    return jnp.concatenate([above, jnp.concatenate([row, corner], axis=1)])
