r"""At which signal do tied and untied networks part?

Where no cross-step entry of the inputs' or the targets' kernels breaks it, the untied solution, in which steps
are independent, is stationary for the tied network too. Its Hessian in the tied-only blocks c = C[t,s], t != s,
with l = Ct[t,s] eliminated (docs/theory, section 5, derived here), couples blocks of equal lag only:

    F_2 = 1/2 <e, C_t^-1 e C_s^-1> - 1/2 <k, V_t k V_s> + 1/2 <k, V_t k L_s + L_t k V_s - L_t k L_s>
    e = c[t,s] - Y_t k Y_s^T,   k = sw^2 c[t-1,s-1],   L = K_t^-1,   V = L <h h^T> L,   Y = <phi h^T> L

The untied solution loses stability where the lowest eigenvalue crosses zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag, eigh, pinvh
from scipy.optimize import bisect, brentq, minimize_scalar

from bayeskernel.errors import BayesKernelError
from bayeskernel.kernels import coherence, kernel_map, supervision
from bayeskernel.meanfield.problem import coupled_steps
from bayeskernel.meanfield.solve import MeanField, solve, solve_branches
from bayeskernel.network import Network, check_problem
from bayeskernel.tasks import Task

Floats = NDArray[np.float64]

# Signals tried, relative to the targets as given, until the untied solution is unstable.
_FIRST, _RATIO, _LAST = 0.05, 1.25, 60.0
# Where the coherent branch is looked for below the spinodal, and how little coherence counts as none.
_BELOW = 0.98
_INCOHERENT, _SIGMAS = 0.02, 5.0
# Relative accuracy of the coexistence, and how close to the spinodal it is looked for.
_COEXISTENCE, _UNDER = 1e-4, 1e-6
_NULL = 1e-9


class NoTransitionError(BayesKernelError):
    """No transition was found; the message says how far was looked."""


@dataclass(frozen=True, eq=False)
class CriticalSignal:
    """Where tied and untied networks part, as factors on the targets.

    Attributes
    ----------
    spinodal
        Signal at which the untied solution loses stability for the shared network; NaN for a crossover.
    coexistence
        Signal at which both branches have the same free energy: the spinodal itself where the
        transition is continuous, below it where it is discontinuous; NaN for a crossover, and where
        more than three nonlinear sites are correlated: the free energies of particles are too noisy.
    order
        "continuous"; "discontinuous"; "unresolved" where noise of particles hides which of the two; or
        "crossover" where weight sharing acts at any signal because no symmetry protects independent steps.
    crossover
        For a crossover the signal of least curvature of the free energy; otherwise NaN.
    direction
        Unstable direction of C at the spinodal, unit norm, shape (T, P, T, P); None for a crossover.
    """

    spinodal: float
    coexistence: float
    order: str
    crossover: float
    direction: Floats | None


def critical_signal(
    network: Network, task: Task, *, rng_key: jax.Array | None = None
) -> CriticalSignal:
    """Find the factor on the targets at which tied and untied networks part.

    Parameters
    ----------
    network, task
        The shared network; its untied counterpart is derived from it.
    rng_key
        As in `solve`.

    Raises
    ------
    NoTransitionError
        If the untied solution stays stable up to sixty times the targets, or nothing is shared.
    """
    check_problem(network, task)
    if not _protected(network, task):
        return _crossover(network, task, rng_key)
    untied = replace(network, sharing="untied")
    seen: dict[float, tuple[float, Floats]] = {}

    def lowest(signal: float) -> float:
        theory = _raised(untied, task.scaled(signal), rng_key)
        seen[signal] = tied_only_curvature(network, theory)
        return seen[signal][0]

    low = high = _FIRST
    while lowest(high) > 0:
        low, high = high, high * _RATIO
        if high > _LAST:
            raise NoTransitionError(
                f"the untied solution is stable against sharing up to {low:.3g} times the targets"
            )
    sampled = bool(np.any(_raised(untied, task.scaled(low), rng_key).monte_carlo_error))
    spinodal = float(brentq(lowest, low, high, xtol=(1e-3 if sampled else 1e-9) * low, rtol=1e-10))
    _, direction = seen[min(seen, key=lambda s: abs(s - spinodal))]
    below = solve(network, task.scaled(_BELOW * spinodal), rng_key)
    gap = _gap(below, _BELOW * spinodal)
    if gap == np.inf:
        coexistence, order = spinodal, "continuous"
    elif not np.any(below.monte_carlo_error):
        coexistence = _coexistence(network, task, spinodal, rng_key, gap)
        order = "discontinuous"
    else:
        coexistence = float("nan")
        order = "discontinuous" if _beyond_noise(below) else "unresolved"
    return CriticalSignal(spinodal, coexistence, order, float("nan"), direction)


def tied_only_curvature(network: Network, untied: MeanField) -> tuple[float, Floats]:
    """Lowest curvature of F of a shared network along cross-step blocks at an untied solution.

    Returns
    -------
    The eigenvalue, in units in which it is one at zero recurrence, and the direction in C, (T, P, T, P).
    """
    steps, patterns, _, _ = untied.task.shape
    map_ = kernel_map(network, untied.task)
    with jax.enable_x64(True):
        phi_h, h_h = untied._theory.moments()

    def block(matrix: Floats, t: int) -> Floats:
        now = slice(t * patterns, (t + 1) * patterns)
        return matrix[now, now]

    d = steps * patterns
    C = [block(untied.kernel.reshape(d, d), t) for t in range(steps)]
    L = [
        pinvh(block(untied.preactivation_kernel.reshape(d, d), t), rtol=_NULL) for t in range(steps)
    ]
    V = [L[t] @ block(h_h, t) @ L[t] for t in range(steps)]
    Y = [block(phi_h, t) @ L[t] for t in range(steps)]
    inverse = [pinvh(c, rtol=_NULL) for c in C]
    gain = np.asarray(map_.recurrent)[:, 0, :, 0]
    best, direction = np.inf, np.zeros((steps, patterns, steps, patterns))
    for lag in range(1, steps):
        count, size = steps - lag, patterns**2
        hessian = np.zeros((count * size, count * size))
        for t in range(count):
            s, now = t + lag, slice(t * size, (t + 1) * size)
            stiff = np.kron(inverse[t], inverse[s])
            hessian[now, now] += stiff
            if t == 0:
                continue
            # c[t-1,s-1] enters through k = gain c and e = c[t,s] - Y k Y^T.
            before, g = slice((t - 1) * size, t * size), gain[t, s]
            carry = g * np.kron(Y[t], Y[s])
            hessian[now, before] -= stiff @ carry
            hessian[before, now] -= carry.T @ stiff
            own = np.kron(V[t], L[s]) + np.kron(L[t], V[s])
            own -= np.kron(V[t], V[s]) + np.kron(L[t], L[s])
            hessian[before, before] += carry.T @ stiff @ carry + g**2 * own
        # Off the range of C nothing moves.
        unit = block_diag(*(np.kron(_root(C[t]), _root(C[t + lag])) for t in range(count)))
        values, vectors = eigh(unit.T @ hessian @ unit, subset_by_index=(0, 0))
        if values[0] < best:
            best, direction = float(values[0]), np.zeros_like(direction)
            blocks = (unit @ vectors[:, 0]).reshape(count, patterns, patterns)
            for t in range(count):
                direction[t, :, t + lag] = blocks[t]
                direction[t + lag, :, t] = blocks[t].T
    return best, direction / np.linalg.norm(direction)


def _root(covariance: Floats) -> Floats:
    values, vectors = np.linalg.eigh(covariance)
    keep = values > _NULL * values[-1]
    return np.asarray(vectors[:, keep] * np.sqrt(values[keep]))


def _protected(network: Network, task: Task) -> bool:
    """Whether independent steps are stationary for the shared network."""
    if not network.phi.odd:
        return False
    coupled = coupled_steps(kernel_map(network, task), supervision(task))
    return not np.any(coupled & ~np.eye(len(coupled), dtype=bool))


def _raised(network: Network, task: Task, rng_key: jax.Array | None) -> MeanField:
    return solve_branches(network, task, rng_key, 1e-10, 200, None, every_branch=False)


def _gap(theory: MeanField, signal: float) -> float:
    """F of the coherent branch minus F of the incoherent one; infinite where one is missing."""
    lowest = {True: np.inf, False: np.inf}
    for branch in theory.branches:
        if branch.stable:
            kind = _largest_coherence(branch.kernel) >= _INCOHERENT
            lowest[kind] = min(lowest[kind], branch.free_energy)
    if not min(lowest.values()) < np.inf:
        raise NoTransitionError(f"no stable solution was found at {signal:.4g} times the targets")
    return lowest[True] - lowest[False]


def _beyond_noise(theory: MeanField) -> bool:
    """Whether some correlation of steps is beyond doubt; close to a transition errors are large."""
    steps = len(theory.kernel)
    apart = ~np.eye(steps, dtype=bool)[:, None, :, None]
    doubt = _SIGMAS * theory.monte_carlo_error
    return bool(np.any(apart & (doubt > 0) & (np.abs(theory.kernel) > doubt)))


def _coexistence(
    network: Network, task: Task, spinodal: float, rng_key: jax.Array | None, found: float
) -> float:
    """Where the coherent branch has the free energy of the other; ``found`` is their gap at `_BELOW`."""

    def gap(signal: float) -> float:
        return _gap(solve(network, task.scaled(signal), rng_key), signal)

    low, high = _BELOW * spinodal, spinodal
    while found < 0:
        low, high = _BELOW * low, low
        found = gap(low)
    # Bisection looks at signs alone, so an end of the coherent branch counts as its loss.
    return float(bisect(gap, low, high * (1 - _UNDER), rtol=_COEXISTENCE))


def _largest_coherence(kernel: Floats) -> float:
    rho = np.nan_to_num(coherence(kernel))
    return float(np.max(np.abs(rho - np.diag(np.diag(rho))), initial=0.0))


def _crossover(network: Network, task: Task, rng_key: jax.Array | None) -> CriticalSignal:
    def curvature(log_signal: float) -> float:
        theory = _raised(network, task.scaled(float(np.exp(log_signal))), rng_key)
        return theory.branches[0].curvature

    grid = np.log(np.geomspace(0.125, 8.0, 13))
    values = [curvature(x) for x in grid]
    least = int(np.argmin(values))
    bounds = (grid[max(least - 1, 0)], grid[min(least + 1, len(grid) - 1)])
    found = minimize_scalar(curvature, bounds=bounds, method="bounded", options={"xatol": 0.01})
    nan = float("nan")
    return CriticalSignal(nan, nan, "crossover", float(np.exp(found.x)), None)
