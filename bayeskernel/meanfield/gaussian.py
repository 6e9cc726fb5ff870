r"""Which kernels are stationary for a linear network?

The law of one unit is Gaussian, so the saddle point is a stationary point of F(C) alone. F is
minimised over the whitened kernel Q (see ``free_energy``) by a trust-region Newton method on positive
definite matrices: around Q = L L^T,

    Q(xi) = L (1 + xi + xi^2 / 2) L^T      positive definite for every symmetric xi.

The prior's part of F is then tr(L^T L (1 + xi + xi^2 / 2)) / 2 - ln det L - tr(xi) / 2 + O(xi^3): well
conditioned, so conjugate gradients need few steps, and only the directions that data move cost more. Where a
solution turns out to be a saddle, descent goes on along its unstable direction, both ways; the saddle
is kept as a branch.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal, lu_factor, lu_solve
from scipy.optimize import minimize as scipy_minimise

from bayeskernel.meanfield.free_energy import LinearProblem, data_energy, to_kernel

Floats = NDArray[np.float64]


class Status(StrEnum):
    """How a solver ended."""

    CONVERGED = "converged"
    MAX_STEPS = "the residual did not reach the tolerance within the allowed steps"
    BREAKDOWN = "the kernel lost positive definiteness to rounding errors"
    DIVERGED = "the iteration ran away"
    STALLED = "rounding errors stopped the descent before the residual reached the tolerance"


class Stationary(NamedTuple):
    """A stationary point of F.

    Attributes
    ----------
    Q
        Whitened kernel (size, size).
    free_energy
        F, nats per unit.
    residual
        Largest entry of |2 dF/dxi|, the saddle-point equation C^-1 = K^-1 - Ct made free of units:
        |L^T L - 1| at zero signal.
    curvature
        Lowest eigenvalue of the Hessian in xi (1/2 for a prior untouched by data).
    direction
        Its eigenvector, shape (size, size).
    steps
        Newton steps taken.
    status
        How the solver ended.
    """

    Q: Floats
    free_energy: float
    residual: float
    curvature: float
    direction: Floats
    steps: int
    status: Status


# Below this share of the trust region a step means rounding errors, not progress.
_SMALLEST_RADIUS = 1e-12
# From this size on first derivatives, at a fifth of a Hessian product's cost, bring the kernel close.
LARGE = 100
# Hessians with up to this many coordinates are diagonalised; larger ones go to Lanczos.
_DENSE_COORDINATES = 500
_KRYLOV = 30
_RITZ_ACCURACY = 0.02
# Descents before the search for branches ends: where rounding errors rule saddles lead to saddles without end.
_MOST_DESCENTS = 32
# Curvature above -this is stable within the solver's accuracy.
_FLAT = 1e-6
Progress = Callable[[str, int, float], None]


def minimise(
    start: Floats,
    problem: LinearProblem,
    *,
    tolerance: float,
    max_steps: int,
    progress: Progress | None = None,
) -> Stationary:
    """Follow F downhill from ``start`` (whitened, (size, size)) to a stationary point."""
    factor, zero = cholesky(start), np.zeros_like(start)
    largest = np.sqrt(start.shape[0])
    radius, status, steps = min(1.0, largest), Status.MAX_STEPS, 0
    value, gradient, _ = second_order(factor, zero, problem)
    for steps in range(max_steps + 1):
        residual = 2 * float(np.max(np.abs(gradient)))
        if progress is not None:
            progress("Newton", steps, residual)
        if not residual < np.inf:
            status = Status.BREAKDOWN
        elif residual < tolerance:
            status = Status.CONVERGED
        if status is not Status.MAX_STEPS or steps == max_steps:
            break
        step, predicted = _truncated_newton(factor, gradient, radius, problem)
        trial, length = cholesky(retract(factor, step)), float(np.linalg.norm(step))
        new_value, new_gradient, _ = second_order(trial, zero, problem)
        gain = (value - new_value) / predicted if predicted > 0 else -1.0
        # Close to the minimum both decreases drown in the rounding errors of F.
        if 0 < predicted < 1e-12 * (1 + abs(value)) and np.isfinite(new_value):
            gain = 1.0
        if gain > 0.05:
            factor, value, gradient = trial, new_value, new_gradient
        if not gain >= 0.25:
            radius = 0.25 * min(radius, length)
        elif gain > 0.75 and length > 0.9 * radius:
            radius = min(2 * radius, largest)
        if radius < _SMALLEST_RADIUS:
            status = Status.STALLED
            break
    curvature, direction = float("nan"), zero
    if status is not Status.BREAKDOWN:
        curvature, direction = lowest_curvature(factor, problem)
    return Stationary(factor @ factor.T, value, residual, curvature, direction, steps, status)


def cholesky(matrix: Floats) -> Floats:
    """Lower factor, NaN where there is none."""
    try:
        return np.asarray(np.linalg.cholesky(matrix), np.float64)
    except np.linalg.LinAlgError:
        return np.full_like(matrix, np.nan)


def all_branches(
    starts: list[Floats],
    problem: LinearProblem,
    same: Callable[[Floats, Floats], bool],
    *,
    tolerance: float,
    max_steps: int,
    progress: Progress | None = None,
) -> list[Stationary]:
    """Stationary points reached from the starts and from every saddle found, lowest F first.

    Parameters
    ----------
    starts
        Whitened kernels (size, size).
    problem
        The arrays of F.
    same
        Tells whether two whitened kernels are one solution up to a sign symmetry.
    tolerance, max_steps, progress
        As in `minimise`.
    """
    queue, found = list(starts), list[Stationary]()
    for _ in range(_MOST_DESCENTS):
        if not queue:
            break
        start = approach(queue.pop(0), problem, progress)
        if start.shape[0] > LARGE and any(same(start, other.Q) for other in found):
            continue
        point = minimise(
            start, problem, tolerance=tolerance, max_steps=max_steps, progress=progress
        )
        if any(same(point.Q, other.Q) for other in found):
            continue
        found.append(point)
        # Where a descent got stuck its curvature leads nowhere, and would without end.
        if point.status is Status.CONVERGED and point.curvature < -_FLAT:
            factor = cholesky(point.Q)
            queue += [retract(factor, sign * point.direction) for sign in (0.5, -0.5)]
    # A converged branch always goes before one that is not, whatever its free energy.
    return sorted(
        found, key=lambda p: (p.status is not Status.CONVERGED, np.nan_to_num(p.free_energy))
    )


def is_stable(point: Stationary) -> bool:
    """Whether the point is a minimum (not a saddle) of F."""
    return point.curvature >= -_FLAT


def retract(factor: Floats, xi: Floats) -> Floats:
    """L (1 + xi + xi^2 / 2) L^T."""
    return np.asarray(factor @ _exponential(xi) @ factor.T)


def _exponential(xi: Any) -> Any:
    """1 + xi + xi^2 / 2, of arrays of NumPy or JAX."""
    return np.eye(len(xi)) + xi + xi @ xi / 2


def approach(
    start: Floats,
    problem: LinearProblem,
    progress: Progress | None = None,
    *,
    accuracy: float = 1e-6,
) -> Floats:
    """Minimise F(M M^T) over square M by L-BFGS, to where Newton's method converges quadratically.

    ``accuracy`` bounds the largest entry of the gradient.
    Small problems (size <= `LARGE`) are returned as they are: Newton's method alone is faster.
    """
    size, steps = start.shape[0], 0
    if size <= LARGE:
        return start

    def objective(flat: Floats) -> tuple[float, Floats]:
        nonlocal steps
        M = flat.reshape(size, size)
        data_part, data_gradient = _data_gradient(M, problem)
        factors = lu_factor(M)
        log_det = np.sum(np.log(np.abs(np.diag(factors[0]))))
        steps += 1
        # A line search backs off from points outside the domain.
        if not np.isfinite(data_part - log_det):
            return 1e300, 0 * flat
        value = float(data_part) + (np.sum(M**2) - size) / 2 - log_det
        gradient = np.asarray(data_gradient) + M - lu_solve(factors, np.eye(size)).T
        if progress is not None:
            progress("L-BFGS", steps, float(np.max(np.abs(gradient))))
        return value, gradient.ravel()

    options = {"maxiter": 500, "maxcor": 8, "gtol": accuracy, "ftol": 0.0}
    factor = np.linalg.cholesky(start).ravel()
    end = scipy_minimise(objective, factor, jac=True, method="L-BFGS-B", options=options)
    M = end.x.reshape(size, size)
    return np.asarray(M @ M.T)


@jax.jit
def _data_gradient(M: jax.Array, problem: LinearProblem) -> tuple[jax.Array, jax.Array]:
    def value(M: jax.Array) -> jax.Array:
        return problem.data_weight * data_energy(to_kernel(M @ M.T, problem), problem)

    return jax.value_and_grad(value)(M)


def _symmetric(matrix: jax.Array) -> jax.Array:
    return (matrix + matrix.T) / 2


def _local(factor: jax.Array, problem: LinearProblem) -> Callable[[jax.Array], jax.Array]:
    """F(xi) around Q = L L^T, exact to second order; its constant is the prior's part at L."""
    gram = factor.T @ factor

    def value(xi: jax.Array) -> jax.Array:
        xi = _symmetric(xi)
        prior_part = (jnp.trace(gram) + jnp.sum(gram * (xi + xi @ xi / 2)) - jnp.trace(xi)) / 2
        prior_part -= jnp.sum(jnp.log(jnp.diag(factor))) + factor.shape[0] / 2
        kernel = to_kernel(factor @ _exponential(xi) @ factor.T, problem)
        return prior_part + problem.data_weight * data_energy(kernel, problem)

    return value


@jax.jit
def _second_order(
    factor: jax.Array, v: jax.Array, problem: LinearProblem
) -> tuple[jax.Array, jax.Array, jax.Array]:
    at = jax.value_and_grad(_local(factor, problem))
    (value, gradient), (_, product) = jax.jvp(at, (jnp.zeros_like(factor),), (v,))
    return value, gradient, product


def second_order(factor: Floats, v: Floats, problem: LinearProblem) -> tuple[float, Floats, Floats]:
    """F at Q = L L^T, its gradient in xi, and its Hessian applied to a symmetric matrix v.

    All that is compiled: the rest of the solver calls it.
    """
    value, gradient, product = _second_order(jnp.asarray(factor), jnp.asarray(v), problem)
    return float(value), np.asarray(gradient), np.asarray(product)


def _truncated_newton(
    factor: Floats, gradient: Floats, radius: float, problem: LinearProblem
) -> tuple[Floats, float]:
    """Steihaug's conjugate gradients: minimise g.p + p.H.p/2 within |p| <= radius.

    Returns the step and the decrease it should bring.
    """
    norm = float(np.linalg.norm(gradient))
    target, most = min(0.1, np.sqrt(norm)) * norm, min(gradient.size + 10, 300)
    p = Hp = np.zeros_like(gradient)
    r, d = gradient, -gradient
    for _ in range(most):
        Hd = second_order(factor, d, problem)[2]
        curvature, rr = np.sum(d * Hd), np.sum(r**2)
        outside = curvature <= 0 or np.linalg.norm(p + rr / curvature * d) >= radius
        alpha = _to_boundary(p, d, radius) if outside else rr / curvature
        p, Hp, r = p + alpha * d, Hp + alpha * Hd, r + alpha * Hd
        if outside or np.linalg.norm(r) <= target:
            break
        d = -r + np.sum(r**2) / rr * d
    return p, float(-np.sum(p * gradient) - np.sum(p * Hp) / 2)


def _to_boundary(p: Floats, d: Floats, radius: float) -> float:
    dd, pd, gap = np.sum(d**2), np.sum(p * d), radius**2 - np.sum(p**2)
    return float((-pd + np.sqrt(max(pd**2 + dd * gap, 0.0))) / dd)


def dense_hessian(factor: Floats, basis: Floats, problem: LinearProblem) -> Floats:
    """Hessian of F in xi on an orthonormal basis (m, size, size) of the symmetric matrices."""
    columns = np.stack([second_order(factor, b, problem)[2] for b in basis])
    dense = basis.reshape(len(basis), -1) @ columns.reshape(len(basis), -1).T
    return (dense + dense.T) / 2


def symmetric_basis(size: int) -> Floats:
    """Orthonormal basis of the symmetric (size, size) matrices, one matrix a row."""
    rows, columns = np.triu_indices(size)
    basis = np.zeros((len(rows), size, size))
    value = np.where(rows == columns, 1.0, np.sqrt(0.5))
    index = np.arange(len(rows))
    basis[index, rows, columns] = value
    basis[index, columns, rows] = value
    return basis


def lowest_curvature(factor: Floats, problem: LinearProblem) -> tuple[float, Floats]:
    """Lowest eigenvalue of the Hessian in xi and its eigenvector (size, size) of unit norm."""
    size = factor.shape[0]
    count = size * (size + 1) // 2
    if count <= _DENSE_COORDINATES:
        basis = symmetric_basis(size)
        values, vectors = np.linalg.eigh(dense_hessian(factor, basis, problem))
        return float(values[0]), np.einsum("m,mij->ij", vectors[:, 0], basis)
    return _lanczos(factor, problem)


def _lanczos(factor: Floats, problem: LinearProblem) -> tuple[float, Floats]:
    """Lowest Ritz pair after at most `_KRYLOV` Hessian products, with full reorthogonalisation."""
    size = factor.shape[0]
    v = np.random.default_rng(0).normal(size=(size, size))
    basis, diagonal, beside = list[Floats](), list[float](), list[float]()
    v = v + v.T
    for _ in range(_KRYLOV):
        basis.append(v / np.linalg.norm(v))
        w = second_order(factor, basis[-1], problem)[2]
        w = (w + w.T) / 2
        diagonal.append(float(np.sum(w * basis[-1])))
        for b in basis:
            w = w - np.sum(w * b) * b
        values, vectors = eigh_tridiagonal(np.array(diagonal), np.array(beside))
        beside.append(float(np.linalg.norm(w)))
        # The residual of the Ritz pair bounds its distance to an eigenvalue.
        if beside[-1] * abs(vectors[-1, 0]) < _RITZ_ACCURACY * abs(values[0]):
            break
        v = w
    return float(values[0]), np.tensordot(vectors[:, 0], np.stack(basis), axes=1)
