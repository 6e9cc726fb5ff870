r"""What does a kernel cost? The free energy per unit of a linear network.

    F(C) = 1/2 sum_o y_o^T S_o(C)^-1 y_o + 1/2 [tr K(C)^-1 C - ln det C + ln det K(C) - d]

(docs/theory, section 3). K[t,.] depends on C at earlier steps only, so K has a *causal root*: a block
lower triangular A with K = A A^T whose rows are found step by step. In the whitened kernel Q,

    C = A(C) Q A(C)^T,      F = 1/2 sum_o y_o^T S_o^-1 y_o + 1/2 [tr Q - ln det Q - size],

the whole prior sits in Q; Q = 1 is the prior. If K is singular (duplicate patterns, more patterns than
input features), its null directions do not depend on Q and are left out.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from numpy.typing import NDArray

from bayeskernel.errors import InputError, real_array
from bayeskernel.kernels import (
    KernelMap,
    Supervision,
    kernel_map,
    output_covariances,
    preactivation_kernel,
    supervision,
)
from bayeskernel.meanfield.prior import prior_recursion
from bayeskernel.network import Network, check_problem
from bayeskernel.tasks import Task

Floats = NDArray[np.float64]

# Innovations of a step below this share of its variance are dropped, and kernels change by less than that
# share. Kept ones must stand clear of rounding errors, which grow to about 1e-16 / share^(3/2).
RANK_TOLERANCE = 1e-6


_Root = tuple[jax.Array, jax.Array]
_Rows = tuple[jax.Array, jax.Array, jax.Array]


# With as many patterns, matrix products outweigh compiling every step on its own.
_LARGE_BLOCK = 24


class LinearProblem(NamedTuple):
    """Everything F depends on, as arrays.

    Attributes
    ----------
    map_, data
        Definitions of K and S, and the supervised targets.
    innovations
        B, shape (T, P, R): the directions in which each step can move given earlier steps, scaled
        to the prior's conditional standard deviations; R is the largest number of them at any step.
    dual
        Left inverses of the innovations, shape (T, R, P).
    padding
        1 where a step has fewer than R directions, shape (T, R). Its columns of B are zero; the
        entries of Q that belong to it stay at the identity and move nothing.
    data_weight
        1 in mean-field scaling; 0 in standard scaling, where data move C only at order 1/N.
    """

    map_: KernelMap
    data: Supervision
    innovations: jax.Array | Floats
    dual: jax.Array | Floats
    padding: jax.Array | Floats
    data_weight: float

    @property
    def size(self) -> int:
        """Rows of Q, T R: the rank of K with its padding."""
        return int(np.shape(self.padding)[0] * np.shape(self.padding)[1])


class Data(NamedTuple):
    """What the data energy depends on: definitions of K and S, and the supervised targets."""

    map_: KernelMap
    data: Supervision


class CausalRoot(NamedTuple):
    """A kernel and the causal root of its K.

    Attributes
    ----------
    kernel
        C, shape (d, d), sites ordered step by step.
    root
        A, shape (d, size): K(C) = A A^T, C = A Q A^T.
    inverse
        Y, left inverse of the root on its range, shape (size, d): K^+ = Y^T Y.
    """

    kernel: jax.Array
    root: jax.Array
    inverse: jax.Array


def linear_problem(network: Network, task: Task) -> LinearProblem:
    """Collect the arrays of F for a linear network; call it with 64-bit JAX enabled."""
    if network.phi.name != "linear":
        raise InputError("activation", "'linear' for the Gaussian theory", network.phi.name)
    map_ = kernel_map(network, task)
    if not np.any(task.inputs):
        raise InputError("inputs", "at least one input that is not zero", "all zero")
    weight = 1.0 if network.scaling == "mean_field" else 0.0
    innovations = _innovations(prior_recursion(network.phi, map_))
    return LinearProblem(map_, supervision(task), *innovations, weight)


def free_energy(network: Network, task: Task, kernel: Floats) -> float:
    """F(C) of a linear network at a kernel of shape (T, P, T, P); units: nats per unit of width.

    Raises
    ------
    InputError
        If the kernel has another shape or is not positive definite on the range of the prior's.
    """
    check_problem(network, task)
    steps, patterns, _, _ = task.shape
    shape = (steps, patterns, steps, patterns)
    kernel = real_array("kernel", kernel, (4,), str(shape))
    if kernel.shape != shape:
        raise InputError("kernel", f"shape {shape}", f"shape {kernel.shape}")
    with jax.enable_x64(True):
        problem = linear_problem(network, task)
        value = float(whitened_free_energy(whiten(jnp.asarray(kernel), problem), problem))
    if not np.isfinite(value):
        raise InputError("kernel", "positive definiteness on the prior's range", "none")
    return value


def causal_root(Q: jax.Array, problem: LinearProblem) -> CausalRoot:
    """Find C = A Q A^T and the root A of K(C), step by step; Q of shape (size, size).

    C[t,<=t] = A[t,<=t] Q A[<=t,<=t]^T makes K[t+1,.] known, which gives the next rows of A.
    """
    if np.shape(problem.map_.input)[1] >= _LARGE_BLOCK:
        return _unrolled_root(Q, problem)

    def step(carry: _Rows, t: jax.Array) -> tuple[_Rows, jax.Array]:
        before, A, Y = carry
        A, Y = _append(A, Y, _preactivation_rows(before, t, problem.map_), t, problem)
        patterns = problem.innovations.shape[1]
        rows = jax.lax.dynamic_slice_in_dim(A, t * patterns, patterns)
        now = rows @ Q @ A.T
        return (now, A, Y), now

    steps, patterns = np.shape(problem.map_.input)[:2]
    A, Y = _empty(problem)
    start = (jnp.zeros((patterns, steps * patterns)), A, Y)
    (_, A, Y), blocks = jax.lax.scan(step, start, jnp.arange(steps))
    # Rows hold the entries with s <= t; those with s > t are their mirror.
    lower = blocks.reshape(steps, patterns, steps, patterns)
    past = jnp.tri(steps, k=-1)[:, None, :, None]
    own = jnp.eye(steps)[:, None, :, None]
    C = own * lower + past * lower + (past * lower).transpose(2, 3, 0, 1)
    return CausalRoot(C.reshape(steps * patterns, -1), A, Y)


@jax.jit
def root_of_kernel(kernel: jax.Array, problem: LinearProblem) -> CausalRoot:
    """Causal root of K(C) for a given kernel C of shape (T, P, T, P)."""
    steps, patterns = kernel.shape[:2]
    K = preactivation_kernel(kernel, problem.map_).reshape(steps, patterns, -1)

    def step(root: _Root, t: jax.Array) -> tuple[_Root, None]:
        return _append(*root, K[t], t, problem), None

    (A, Y), _ = jax.lax.scan(step, _empty(problem), jnp.arange(steps))
    return CausalRoot(kernel.reshape(steps * patterns, -1), A, Y)


@jax.jit
def to_kernel(Q: jax.Array, problem: LinearProblem) -> jax.Array:
    """C(Q), shape (T, P, T, P)."""
    return causal_root(Q, problem).kernel.reshape(np.shape(problem.map_.input))


@jax.jit
def whiten(kernel: jax.Array | Floats, problem: LinearProblem) -> jax.Array:
    """Q of a kernel (T, P, T, P) on the range of the prior's; the inverse of `to_kernel`."""
    root = root_of_kernel(jnp.asarray(kernel), problem)
    return root.inverse @ root.kernel @ root.inverse.T + jnp.diag(problem.padding.ravel())


def whitened_free_energy(Q: jax.Array, problem: LinearProblem) -> jax.Array:
    """F at Q of shape (size, size); NaN where Q is not positive definite."""
    factor = jnp.linalg.cholesky(Q)
    prior_part = jnp.trace(Q) / 2 - jnp.sum(jnp.log(jnp.diag(factor))) - Q.shape[0] / 2
    return prior_part + problem.data_weight * data_energy(to_kernel(Q, problem), problem)


def data_energy(kernel: jax.Array, problem: LinearProblem | Data) -> jax.Array:
    """1/2 sum_o y_o^T S_o(C)^-1 y_o."""
    return jnp.sum(_whitened_targets(kernel, problem)[0] ** 2) / 2


def output_log_determinant(kernel: jax.Array, problem: LinearProblem | Data) -> jax.Array:
    """1/2 sum_o ln det S_o(C), up to a constant of the noise."""
    factors = _whitened_targets(kernel, problem)[1]
    return jnp.sum(jnp.log(jnp.diagonal(factors, axis1=-2, axis2=-1)))


@jax.jit
def dual_targets(kernel: jax.Array, problem: LinearProblem | Data) -> jax.Array:
    """a_o = S_o(C)^-1 y_o on the supervised sites, shape (n, O)."""
    scaled, factors = _whitened_targets(kernel, problem)
    solve = jax.vmap(lambda L, b: solve_triangular(L, b, lower=True, trans="T"))
    return solve(factors, scaled).T * problem.data.mask


def read_out(
    cross: jax.Array | Floats, dual: jax.Array | Floats, problem: LinearProblem | Data
) -> jax.Array:
    """sv^2 (M_V o C)[*, supervised] a for C of shape (T, P*, T, P); shape (T, P*, O)."""
    weighted = jnp.asarray(problem.map_.readout) * cross
    steps, new, _, patterns = weighted.shape
    return weighted.reshape(steps, new, steps * patterns)[..., problem.data.sites] @ dual


def mean_output(kernel: jax.Array, problem: LinearProblem | Data) -> jax.Array:
    """Outputs given C at all steps, shape (T, P, O)."""
    return read_out(kernel, dual_targets(kernel, problem), problem)


@jax.jit
def output_variance(kernel: jax.Array, problem: LinearProblem | Data) -> jax.Array:
    """Variance of the outputs given C and targets, in units of that of the noise; shape (T, P, O)."""
    steps, patterns = kernel.shape[:2]
    prior = (problem.map_.readout * kernel).reshape(steps * patterns, -1)
    _, factors = _whitened_targets(kernel, problem)

    def known(factor: jax.Array, mask: jax.Array) -> jax.Array:
        rows = mask[:, None] * prior[problem.data.sites]
        return jnp.sum(solve_triangular(factor, rows, lower=True) ** 2, axis=0)

    explained = jax.vmap(known)(factors, jnp.asarray(problem.data.mask).T)
    return (jnp.diag(prior) - explained).T.reshape(steps, patterns, -1)


def _whitened_targets(
    kernel: jax.Array, problem: LinearProblem | Data
) -> tuple[jax.Array, jax.Array]:
    factors = jnp.linalg.cholesky(output_covariances(kernel, problem.map_, problem.data))
    targets = jnp.asarray(problem.data.targets).T
    return jax.vmap(lambda L, y: solve_triangular(L, y, lower=True))(factors, targets), factors


def _unrolled_root(Q: jax.Array, problem: LinearProblem) -> CausalRoot:
    """`causal_root` on blocks that grow with the steps: no work on zeros, but code for every step."""
    steps, patterns = np.shape(problem.map_.input)[:2]
    recurrent = jnp.asarray(problem.map_.recurrent)[:, 0, :, 0]
    A, Y, C = jnp.zeros((0, 0)), jnp.zeros((0, 0)), jnp.zeros((0, 0))
    for t in range(steps):
        B, dual = jnp.asarray(problem.innovations)[t], jnp.asarray(problem.dual)[t]
        rows = jnp.asarray(problem.map_.input)[t, :, : t + 1].reshape(patterns, -1)
        if t:
            scale = jnp.repeat(recurrent[t, 1 : t + 1], patterns)
            rows = rows.at[:, patterns:].add(scale * C[-patterns:])
        past = rows[:, : t * patterns] @ Y.T
        own = rows[:, t * patterns :] - past @ past.T
        padding = jnp.diag(jnp.asarray(problem.padding)[t])
        factor = jnp.linalg.cholesky(dual @ own @ dual.T + padding)
        new = solve_triangular(factor, dual, lower=True)
        A = jnp.block([[A, jnp.zeros((A.shape[0], B.shape[1]))], [past, B @ factor]])
        Y = jnp.block([[Y, jnp.zeros((Y.shape[0], patterns))], [-(new @ past) @ Y, new]])
        size = A.shape[1]
        now = A[-patterns:] @ Q[:size, :size] @ A.T
        C = jnp.block([[C, now[:, : t * patterns].T], [now]])
    return CausalRoot(C, A, Y)


def _empty(problem: LinearProblem) -> tuple[jax.Array, jax.Array]:
    sites = problem.innovations.shape[0] * problem.innovations.shape[1]
    return jnp.zeros((sites, problem.size)), jnp.zeros((problem.size, sites))


def _preactivation_rows(before: jax.Array, t: jax.Array, map_: KernelMap) -> jax.Array:
    """K[t, .] of shape (P, d) from the rows C[t-1, .] (zeros at the first step)."""
    patterns = before.shape[0]
    shifted = jnp.pad(before[:, :-patterns], ((0, 0), (patterns, 0)))
    scale = jnp.repeat(jnp.asarray(map_.recurrent)[t, 0, :, 0], patterns)
    return jnp.asarray(map_.input)[t].reshape(patterns, -1) + scale * shifted


def _append(
    A: jax.Array, Y: jax.Array, rows: jax.Array, t: jax.Array, problem: LinearProblem
) -> tuple[jax.Array, jax.Array]:
    """Fill step t of a causal root A and its left inverse Y, given K[t, .] of shape (P, d).

    A[t,<t] = K[t,<t] Y^T is what earlier steps explain of step t; its innovation is
    A[t,t] = B chol(B^+ (K[t,t] - A[t,<t] A[t,<t]^T) B^+T). Steps not yet filled are zero in Y, so
    columns of K at later steps drop out.
    """
    B, dual = jnp.asarray(problem.innovations)[t], jnp.asarray(problem.dual)[t]
    patterns, directions = B.shape
    past = rows @ Y.T
    own = jax.lax.dynamic_slice_in_dim(rows, t * patterns, patterns, axis=1)
    conditional = dual @ (own - past @ past.T) @ dual.T + jnp.diag(jnp.asarray(problem.padding)[t])
    factor = jnp.linalg.cholesky(conditional)
    new = solve_triangular(factor, dual, lower=True)
    update = jax.lax.dynamic_update_slice
    A = update(A, update(past, B @ factor, (0, t * directions)), (t * patterns, 0))
    Y = update(Y, update(-new @ past @ Y, new, (0, t * patterns)), (t * directions, 0))
    return A, Y


def _innovations(prior: Floats) -> tuple[Floats, Floats, Floats]:
    """Directions and prior scales of each step given the earlier ones, from C0 = K(C0)."""
    steps, patterns = prior.shape[:2]
    covariance = prior.reshape(steps * patterns, -1)
    bases, duals = [], []
    Y = np.zeros((0, 0))
    for t in range(steps):
        now = slice(t * patterns, (t + 1) * patterns)
        past = covariance[now, : now.start] @ Y.T
        std = np.sqrt(np.diag(covariance[now, now]))
        inverse_std = np.divide(1.0, std, out=np.zeros_like(std), where=std > 0)
        conditional = covariance[now, now] - past @ past.T
        values, vectors = np.linalg.eigh(inverse_std[:, None] * conditional * inverse_std)
        keep = values > RANK_TOLERANCE
        scale = np.sqrt(values[keep])
        bases.append(std[:, None] * vectors[:, keep] * scale)
        duals.append((inverse_std[:, None] * vectors[:, keep] / scale).T)
        Y = np.block([[Y, np.zeros((Y.shape[0], patterns))], [-duals[t] @ past @ Y, duals[t]]])
    return _pad(bases, duals)


def _pad(bases: list[Floats], duals: list[Floats]) -> tuple[Floats, Floats, Floats]:
    most = max(b.shape[1] for b in bases)
    missing = [most - b.shape[1] for b in bases]
    return (
        np.stack([np.pad(b, ((0, 0), (0, m))) for b, m in zip(bases, missing, strict=True)]),
        np.stack([np.pad(b, ((0, m), (0, 0))) for b, m in zip(duals, missing, strict=True)]),
        np.stack([np.arange(most) >= most - m for m in missing]).astype(np.float64),
    )
