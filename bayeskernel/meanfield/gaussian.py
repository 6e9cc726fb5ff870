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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal, lu_factor, lu_solve
from scipy.optimize import minimize as scipy_minimise

from bayeskernel.meanfield.free_energy import (
    LinearProblem,
    data_energy,
    to_kernel,
    whitened_free_energy,
)

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
    factor = jnp.linalg.cholesky(jnp.asarray(start))
    largest = np.sqrt(start.shape[0])
    radius, status, steps = min(1.0, largest), Status.MAX_STEPS, 0
    for steps in range(max_steps + 1):
        step = _newton_step(factor, radius, tolerance, problem)
        if progress is not None:
            progress("Newton", steps, float(step.residual))
        if not 0 <= step.residual < np.inf:
            status = Status.BREAKDOWN
            break
        if step.residual < tolerance:
            status = Status.CONVERGED
            break
        gain = float(step.actual / step.predicted) if step.predicted > 0 else -1.0
        # Close to the minimum both decreases drown in the rounding errors of F.
        if 0 < step.predicted < 1e-12 * (1 + abs(step.value)) and np.isfinite(step.actual):
            gain = 1.0
        if gain > 0.05:
            factor = step.factor
        if not gain >= 0.25:
            radius = 0.25 * min(radius, float(step.length))
        elif gain > 0.75 and step.length > 0.9 * radius:
            radius = min(2 * radius, largest)
        if radius < _SMALLEST_RADIUS:
            status = Status.STALLED
            break
    curvature, direction = float("nan"), np.zeros_like(start)
    if status is not Status.BREAKDOWN:
        curvature, direction = lowest_curvature(factor, problem)
    return Stationary(
        np.asarray(factor @ factor.T),
        float(step.value),
        float(step.residual),
        curvature,
        direction,
        steps,
        status,
    )


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
    while queue:
        start = approach(queue.pop(0), problem, progress)
        if start.shape[0] > LARGE and any(same(start, other.Q) for other in found):
            continue
        point = minimise(
            start, problem, tolerance=tolerance, max_steps=max_steps, progress=progress
        )
        if any(same(point.Q, other.Q) for other in found):
            continue
        found.append(point)
        if point.curvature < -_FLAT:
            factor = jnp.linalg.cholesky(jnp.asarray(point.Q))
            for sign in (0.5, -0.5):
                queue.append(np.asarray(retract(factor, sign * point.direction)))
    # A converged branch always goes before one that is not, whatever its free energy.
    return sorted(
        found, key=lambda p: (p.status is not Status.CONVERGED, np.nan_to_num(p.free_energy))
    )


def is_stable(point: Stationary) -> bool:
    """Whether the point is a minimum (not a saddle) of F."""
    return point.curvature >= -_FLAT


def retract(factor: jax.Array | Floats, xi: jax.Array | Floats) -> jax.Array:
    """L (1 + xi + xi^2 / 2) L^T."""
    middle = jnp.eye(factor.shape[0], dtype=factor.dtype) + xi + xi @ xi / 2
    return jnp.asarray(factor @ middle @ factor.T)


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


class _Step(NamedTuple):
    factor: jax.Array
    value: jax.Array
    residual: jax.Array
    length: jax.Array
    predicted: jax.Array
    actual: jax.Array


def _symmetric(matrix: jax.Array) -> jax.Array:
    return (matrix + matrix.T) / 2


def _local(factor: jax.Array, problem: LinearProblem) -> Callable[[jax.Array], jax.Array]:
    """F(xi) around Q = L L^T, exact to second order; its constant is the prior's part at L."""
    gram = factor.T @ factor

    def value(xi: jax.Array) -> jax.Array:
        xi = _symmetric(xi)
        prior_part = (jnp.trace(gram) + jnp.sum(gram * (xi + xi @ xi / 2)) - jnp.trace(xi)) / 2
        prior_part -= jnp.sum(jnp.log(jnp.diag(factor))) + factor.shape[0] / 2
        kernel = to_kernel(retract(factor, xi), problem)
        return prior_part + problem.data_weight * data_energy(kernel, problem)

    return value


@jax.jit
def _newton_step(
    factor: jax.Array, radius: float, tolerance: float, problem: LinearProblem
) -> _Step:
    local = _local(factor, problem)
    origin = jnp.zeros_like(factor)
    value, gradient = jax.value_and_grad(local)(origin)
    _, hessian = jax.linearize(jax.grad(local), origin)
    residual = 2 * jnp.max(jnp.abs(gradient))
    xi, predicted = _truncated_newton(gradient, hessian, radius, residual < tolerance)
    Q = retract(factor, xi)
    trial = whitened_free_energy(Q, problem)
    return _Step(
        jnp.linalg.cholesky(Q),
        value,
        residual,
        jnp.linalg.norm(xi),
        predicted,
        value - trial,
    )


def _truncated_newton(
    gradient: jax.Array,
    hessian: Callable[[jax.Array], jax.Array],
    radius: float,
    converged: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Steihaug's conjugate gradients: minimise g.p + p.H.p/2 within |p| <= radius."""
    target = jnp.minimum(0.1, jnp.sqrt(jnp.linalg.norm(gradient))) * jnp.linalg.norm(gradient)
    most = min(gradient.shape[0] ** 2 + 10, 300)

    class State(NamedTuple):
        p: jax.Array
        Hp: jax.Array
        r: jax.Array
        d: jax.Array
        iteration: jax.Array
        done: jax.Array

    def body(s: State) -> State:
        Hd = hessian(s.d)
        curvature, rr = jnp.sum(s.d * Hd), jnp.sum(s.r**2)
        alpha = rr / curvature
        outside = (curvature <= 0) | (jnp.linalg.norm(s.p + alpha * s.d) >= radius)
        alpha = jnp.where(outside, _to_boundary(s.p, s.d, radius), alpha)
        r = s.r + alpha * Hd
        d = -r + jnp.sum(r**2) / rr * s.d
        done = outside | (jnp.linalg.norm(r) <= target)
        return State(s.p + alpha * s.d, s.Hp + alpha * Hd, r, d, s.iteration + 1, done)

    zero = jnp.zeros_like(gradient)
    start = State(zero, zero, gradient, -gradient, jnp.array(0), converged)
    end = jax.lax.while_loop(lambda s: ~s.done & (s.iteration < most), body, start)
    return end.p, -jnp.sum(end.p * gradient) - jnp.sum(end.p * end.Hp) / 2


def _to_boundary(p: jax.Array, d: jax.Array, radius: float) -> jax.Array:
    dd, pd, gap = jnp.sum(d**2), jnp.sum(p * d), radius**2 - jnp.sum(p**2)
    return (-pd + jnp.sqrt(jnp.maximum(pd**2 + dd * gap, 0))) / dd


@jax.jit
def hessian_vector(factor: jax.Array, v: jax.Array, problem: LinearProblem) -> jax.Array:
    """Hessian of F in xi at Q = L L^T applied to a symmetric matrix v."""
    local = _local(factor, problem)
    return jax.jvp(jax.grad(local), (jnp.zeros_like(factor),), (v,))[1]


@jax.jit
def dense_hessian(factor: jax.Array, basis: Floats, problem: LinearProblem) -> jax.Array:
    """Hessian of F in xi on an orthonormal basis (m, size, size) of the symmetric matrices."""
    _, hessian = jax.linearize(jax.grad(_local(factor, problem)), jnp.zeros_like(factor))
    columns = jax.lax.map(hessian, jnp.asarray(basis), batch_size=64)
    dense = jnp.einsum("mij,nij->mn", jnp.asarray(basis), columns)
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


def lowest_curvature(factor: jax.Array, problem: LinearProblem) -> tuple[float, Floats]:
    """Lowest eigenvalue of the Hessian in xi and its eigenvector (size, size) of unit norm."""
    size = factor.shape[0]
    count = size * (size + 1) // 2
    if count <= _DENSE_COORDINATES:
        basis = symmetric_basis(size)
        values, vectors = np.linalg.eigh(dense_hessian(factor, basis, problem))
        return float(values[0]), np.einsum("m,mij->ij", vectors[:, 0], basis)
    return _lanczos(factor, problem)


def _lanczos(factor: jax.Array, problem: LinearProblem) -> tuple[float, Floats]:
    """Lowest Ritz pair after at most `_KRYLOV` Hessian products, with full reorthogonalisation."""
    size = factor.shape[0]
    v = np.random.default_rng(0).normal(size=(size, size))
    basis, diagonal, beside = list[Floats](), list[float](), list[float]()
    v = v + v.T
    for _ in range(_KRYLOV):
        basis.append(v / np.linalg.norm(v))
        w = np.array(hessian_vector(factor, jnp.asarray(basis[-1]), problem))
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
