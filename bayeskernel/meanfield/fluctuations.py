r"""How far does the kernel of a network of finite width stray from the mean-field kernel?

For linear networks the kernel has an exact density at any width N >= r (docs/theory, section 2C)::

    -log p(Q) = N F(Q) + A(Q),     A = (r + 1)/2 ln det Q + 1/2 sum_o ln det S_o

(in standard scaling the data energy sits in A instead of F). Expanding around the minimum of F with
Q = L (1 + u) L^T and H the Hessian in u gives, to leading order in 1/N (derived here),

    cov C = J H^-1 J^T / N
    <C> - C* = [J du + 1/2 C'' : H^-1] / N,     du = -H^-1 grad (A + 1/2 ln det H)

with J = dC/du. Contractions with H^-1 = sum_m w_m w_m^T are sums over second derivatives along w_m. The mean
outputs, functions of C, follow likewise; given C outputs are Gaussian, which adds their conditional variance.

For other phi the joint density of (C, Ct), Ct along the imaginary axis, is exp(-N F(C, Ct) - A(C)) with a flat
measure, so the same holds with H the Hessian in both, A = 1/2 sum_o ln det S_o and J = 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from numpy.typing import NDArray
from scipy.linalg import block_diag

from bayeskernel.errors import BayesKernelError
from bayeskernel.meanfield.free_energy import (
    Data,
    LinearProblem,
    data_energy,
    dual_targets,
    mean_output,
    output_log_determinant,
    output_variance,
    to_kernel,
    whitened_free_energy,
)
from bayeskernel.meanfield.gaussian import Status, cholesky, dense_hessian, symmetric_basis
from bayeskernel.meanfield.homotopy import Solution
from bayeskernel.meanfield.problem import Problem, matrix
from bayeskernel.meanfield.saddle import assemble, correction_slope, gradient, thinned
from bayeskernel.meanfield.single_unit import Pairs

Floats = NDArray[np.float64]

# The Hessian is dense in r (r + 1) / 2 coordinates: r = 64 needs about a minute and 200 MB.
MOST_COORDINATES = 64 * 65 // 2


class FluctuationError(BayesKernelError):
    """Fluctuations around this solution are not available; the message says why."""


_Sums = tuple[jax.Array, jax.Array, jax.Array]


class Fluctuations(NamedTuple):
    """Leading finite-width behaviour of the kernel, shape (T, P, T, P) each.

    Attributes
    ----------
    std
        sqrt(N) times the posterior standard deviation of each entry.
    shift
        N times the difference between posterior mean and mean-field kernel.
    output_std
        Of each output (T, P, O), likewise; in standard scaling it is of order one and not multiplied.
    output_shift
        Of each output.
    """

    std: Floats
    shift: Floats
    output_std: Floats
    output_shift: Floats


def gaussian_fluctuations(Q: Floats, problem: LinearProblem) -> Fluctuations:
    """Expand around a minimum Q (r, r) of the linear free energy; 64-bit JAX must be enabled."""
    size = Q.shape[0]
    if size * (size + 1) // 2 > MOST_COORDINATES:
        raise FluctuationError(
            f"fluctuations need a kernel of rank <= 64, this one has rank {size}"
        )
    factor, basis = cholesky(Q), symmetric_basis(size)
    hessian = dense_hessian(factor, basis, problem)
    if np.linalg.eigvalsh(hessian)[0] <= 0:
        raise FluctuationError("fluctuations exist around a minimum; this solution is a saddle")
    variance, shift = _expand(*(jnp.asarray(a) for a in (factor, hessian, basis)), problem)
    kernel = to_kernel(jnp.asarray(Q), problem)
    given = np.asarray(output_variance(kernel, problem))
    of_kernel, of_output = np.split(np.stack([variance, shift]), [kernel.size], axis=1)
    return Fluctuations(
        np.sqrt(of_kernel[0]).reshape(kernel.shape),
        of_kernel[1].reshape(kernel.shape),
        np.sqrt(given + problem.data_weight * of_output[0].reshape(given.shape)),
        of_output[1].reshape(given.shape),
    )


@jax.jit
def _expand(
    factor: jax.Array, hessian: jax.Array, basis: jax.Array, problem: LinearProblem
) -> tuple[jax.Array, jax.Array]:
    origin = jnp.zeros_like(factor)
    root = jnp.linalg.cholesky(hessian)
    # Rows of w: symmetric matrices with sum_m w_m w_m^T = H^-1.
    w = jnp.einsum("mn,mij->nij", solve_triangular(root, jnp.eye(len(root)), lower=True).T, basis)

    def whitened(u: jax.Array) -> jax.Array:
        return factor @ (jnp.eye(len(factor)) + (u + u.T) / 2) @ factor.T

    def observed(u: jax.Array) -> jax.Array:
        C = to_kernel(whitened(u), problem)
        return jnp.concatenate([C.ravel(), mean_output(C, problem).ravel()])

    def energy(u: jax.Array) -> jax.Array:
        return whitened_free_energy(whitened(u), problem)

    def correction(u: jax.Array) -> jax.Array:
        log_det = 2 * jnp.sum(jnp.log(jnp.diag(jnp.linalg.cholesky(whitened(u)))))
        C = to_kernel(whitened(u), problem)
        lazy = (1 - problem.data_weight) * data_energy(C, problem)
        return (len(factor) + 1) / 2 * log_det + output_log_determinant(C, problem) + lazy

    def along(direction: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Derivatives of C and outputs, gradient of the second derivative of F, along w_m."""

        def slope(u: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jax.jvp(observed, (u,), (direction,))[1], jax.jvp(energy, (u,), (direction,))[1]

        def curvature(u: jax.Array) -> jax.Array:
            return jax.jvp(lambda v: slope(v)[1], (u,), (direction,))[1]

        first, second = jax.jvp(lambda v: slope(v)[0], (origin,), (direction,))
        return first, second, jax.grad(curvature)(origin)

    def add(total: _Sums, direction: jax.Array) -> tuple[_Sums, None]:
        first, second, third = along(direction)
        return (total[0] + first**2, total[1] + second, total[2] + third), None

    zero = jnp.zeros_like(observed(origin))
    (variance, bend, log_det_slope), _ = jax.lax.scan(add, (zero, zero, origin), w)
    force = jax.grad(correction)(origin) + log_det_slope / 2
    du = -jnp.einsum("nij,n->ij", w, jnp.einsum("nij,ij->n", w, force))
    drift = jax.jvp(observed, (origin,), (du,))[1]
    return variance, drift + bend / 2


def saddle_fluctuations(
    solution: Solution, driven: Problem, problem: Problem, *, lazy: bool
) -> Fluctuations:
    """Expand around a saddle point in (C, Ct) of a nonlinear network; 64-bit JAX must be enabled.

    Activities of independent groups must have mean zero: phi is odd, or there is one group. ``lazy`` where data
    act at order 1/N only (standard scaling): ``driven`` is then the problem without targets.
    """
    at = solution.expansion
    if solution.status is not Status.CONVERGED:
        raise FluctuationError(f"fluctuations exist around a solution; {solution.status}")
    if solution.curvature <= 0:
        raise FluctuationError("fluctuations exist around a minimum; this solution is a saddle")
    if at.unit.shape[1] > _MOST_ENTRIES:
        raise FluctuationError(
            f"fluctuations need at most {_MOST_ENTRIES} kernel entries, this one has {at.unit.shape[1]}"
        )
    m = solution.point.m
    # Columns w with w w^T = N cov m.
    w = at.unit @ np.linalg.inv(np.linalg.cholesky(at.reduced)).T
    C, variance = matrix(m, driven), matrix(np.sum(w**2, axis=1), driven)
    # Between independent groups C is a mean of N products of independent factors.
    variance = np.where(driven.apart, np.outer(np.diag(C), np.diag(C)), variance)
    drift = _saddle_shift(solution, driven, problem, lazy=lazy)
    kernel = jnp.asarray(C.reshape(np.shape(driven.data.map_.input)))
    given = np.asarray(output_variance(kernel, problem.data))
    moved = _outputs_along(
        jnp.asarray(m), jnp.asarray(w.T), jnp.asarray(drift), problem.data, problem.pairs
    )
    output_shift = np.asarray(moved[1])
    if not lazy:
        given = given + np.asarray(moved[0]) + _apart_outputs(kernel, driven)
    return Fluctuations(
        np.sqrt(variance).reshape(kernel.shape),
        matrix(drift, driven).reshape(kernel.shape),
        np.sqrt(given),
        output_shift,
    )


@jax.jit
def _outputs_along(
    m: jax.Array, w: jax.Array, drift: jax.Array, data: Data, pairs: Pairs
) -> tuple[jax.Array, jax.Array]:
    """Variance and shift of the mean outputs when m has covariance sum_k w_k w_k^T and moves by drift."""

    def output(m: jax.Array) -> jax.Array:
        return mean_output(assemble(m, data, pairs), data)

    def add(total: tuple[jax.Array, jax.Array], along: jax.Array) -> tuple[Any, None]:
        def slope(m: jax.Array) -> jax.Array:
            return jax.jvp(output, (m,), (along,))[1]

        first, second = jax.jvp(slope, (m,), (along,))
        return (total[0] + first**2, total[1] + second), None

    zero = jnp.zeros_like(output(m))
    (variance, bend), _ = jax.lax.scan(add, (zero, zero), w)
    return variance, jax.jvp(output, (m,), (drift,))[1] + bend / 2


def _apart_outputs(kernel: jax.Array, problem: Problem) -> Floats:
    """Variance of outputs that read, through a shared readout, targets of an independent group."""
    data, size = problem.data, problem.size
    C = np.asarray(kernel).reshape(size, size)
    weight = np.where(
        problem.apart, np.broadcast_to(data.map_.readout, kernel.shape).reshape(size, size), 0
    )
    dual = np.zeros((size, data.data.targets.shape[1]))
    dual[data.data.sites] = dual_targets(kernel, data)
    reads = weight[:, :, None] * dual
    variance = np.diag(C)[:, None] * np.einsum("iso,st,ito->io", reads, C, reads, optimize=True)
    return variance.reshape(*kernel.shape[:2], -1)


# Third derivatives take two evaluations per entry of C and of Ct: a minute or two for so many.
_MOST_ENTRIES = 600
# Displacement for second differences of the gradient, in standard deviations of one unit.
_DISPLACEMENT = 0.01


def _saddle_shift(solution: Solution, driven: Problem, problem: Problem, *, lazy: bool) -> Floats:
    """N (<m> - m*): -H^-1 [grad A + d^3F : H^-1 / 2], third derivatives by second differences."""
    at, point = solution.expansion, thinned(solution.point)
    k, hessian = at.unit.shape[1], at.hessian
    values, vectors = np.linalg.eigh(hessian)
    whitened = block_diag(at.unit, at.inverse.T)

    def slope(direction: Floats) -> Floats:
        change = at.unit @ direction[:k], at.inverse.T @ direction[k:]
        return gradient(point, driven, *change) @ whitened

    centre = slope(np.zeros(2 * k))
    force = np.zeros(2 * k)
    for value, vector in zip(values, vectors.T, strict=True):
        step = _DISPLACEMENT * vector
        force += (slope(step) + slope(-step) - 2 * centre) / (_DISPLACEMENT**2 * value) / 2
    force[:k] += at.unit.T @ correction_slope(solution.point.m, problem, lazy=lazy)
    shift = at.unit @ -np.linalg.solve(hessian, force)[:k]
    return np.where(driven.parity, 0, shift) if point.symmetric else np.asarray(shift)
