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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag, eigh, pinvh
from scipy.optimize import brentq, minimize_scalar

from bayeskernel.errors import BayesKernelError
from bayeskernel.kernels import coherence, kernel_map, supervision
from bayeskernel.meanfield.free_energy import Data, data_energy
from bayeskernel.meanfield.problem import coupled_steps
from bayeskernel.meanfield.solution import Branch
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
_COEXISTENCE, _UNDER, _MAX_STEPS = 1e-4, 1e-6, 20
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
        transition is continuous, below it where it is discontinuous; NaN for a crossover and where the
        order is unresolved.
    order
        "continuous"; "discontinuous"; "unresolved" where noise of particles hides which of the two; or
        "crossover" where weight sharing acts at any signal because no symmetry protects independent steps.
    crossover
        For a crossover the signal of least curvature of the free energy; otherwise NaN.
    direction
        Unstable direction of C at the spinodal, unit norm, shape (T, P, T, P); None for a crossover.
    coexistence_error
        Standard error of the coexistence from sampling inside the solver, zero where nothing was sampled.
    """

    spinodal: float
    coexistence: float
    order: str
    crossover: float
    direction: Floats | None
    coexistence_error: float = 0.0


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
    nan = float("nan")
    below = solve(network, task.scaled(_BELOW * spinodal), rng_key)
    stable = [branch for branch in below.branches if branch.stable]
    if not stable:
        raise NoTransitionError(
            f"no stable solution was found at {_BELOW * spinodal:.4g} times the targets"
        )
    if (gap := _gap(below, _BELOW * spinodal, rng_key)) is not None:
        coexistence, error = _coexistence(network, task, spinodal, rng_key, gap)
        return CriticalSignal(spinodal, coexistence, "discontinuous", nan, direction, error)
    if any(_largest_coherence(branch.kernel) >= _INCOHERENT for branch in stable):
        return CriticalSignal(spinodal, nan, "unresolved", nan, direction)
    return CriticalSignal(spinodal, spinodal, "continuous", nan, direction)


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


def _coherent(theory: MeanField) -> Branch | None:
    """The stable branch of lowest F among those whose steps are correlated beyond doubt."""
    apart = ~np.eye(len(theory.kernel), dtype=bool)[:, None, :, None]
    for branch in theory.branches:
        sure = np.abs(branch.kernel) > _SIGMAS * branch.monte_carlo_error
        if (
            branch.stable
            and np.any(apart & sure)
            and _largest_coherence(branch.kernel) >= _INCOHERENT
        ):
            return branch
    return None


class _Gap(NamedTuple):
    """F of the coherent branch minus F of the incoherent one, its error, and its slope in the signal."""

    value: float
    error: float
    slope: float


def _gap(theory: MeanField, signal: float, rng_key: jax.Array | None) -> _Gap | None:
    """None where no coherent branch was found."""
    network, task, coherent = theory.network, theory.task, _coherent(theory)
    if coherent is None:
        return None
    # Where steps are independent sharing does not act.
    untied = _raised(replace(network, sharing="untied"), task, rng_key).branches[0]
    with jax.enable_x64(True):
        data = Data(kernel_map(network, task), supervision(task))
        energies = [float(data_energy(jnp.asarray(b.kernel), data)) for b in (coherent, untied)]
    return _Gap(
        coherent.free_energy - untied.free_energy,
        float(np.hypot(coherent.free_energy_error, untied.free_energy_error)),
        # Both are stationary, so only the explicit s^2 of the data's energy counts.
        2 * (energies[0] - energies[1]) / signal,
    )


def _coexistence(
    network: Network, task: Task, spinodal: float, rng_key: jax.Array | None, begin: _Gap
) -> tuple[float, float]:
    """Where the coherent branch has the free energy of the other, by Newton's method, and its error.

    ``begin`` is their gap at `_BELOW` times the spinodal.
    """
    signal, gap = _BELOW * spinodal, begin
    for _ in range(_MAX_STEPS):
        step, error = -gap.value / gap.slope, -gap.error / gap.slope
        if abs(step) <= max(_COEXISTENCE * signal, error):
            return float(signal + step), float(error)
        trial = min(signal + step, (1 - _UNDER) * spinodal)
        found = _gap(solve(network, task.scaled(trial), rng_key), trial, rng_key)
        while found is None and abs(trial - signal) > _UNDER * signal:
            # The coherent branch ends below the coexistence; a step beyond its end is too long.
            trial = (signal + trial) / 2
            found = _gap(solve(network, task.scaled(trial), rng_key), trial, rng_key)
        if found is None:
            break
        signal, gap = trial, found
    return float("nan"), float("nan")


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
