r"""At which signal do tied and untied networks part?

Where no cross-step entry of the inputs' or the targets' kernels breaks it, the untied solution, in which steps
are independent, is stationary for the tied network too. Between independent steps Wick's law is exact (see `laws`), so the
Hessian of the tied network's F in the cross-step entries of C (docs/theory, section 5, derived here) is that of `Saddle` with
the untied solution's C, Y = <phi u^T> and B. The untied solution loses stability where its lowest eigenvalue crosses zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.sparse.linalg import LinearOperator, eigsh

from bayeskernel.errors import BayesKernelError
from bayeskernel.kernels import coherence
from bayeskernel.likelihood import energy
from bayeskernel.meanfield.laws import Gaussian, Wick
from bayeskernel.meanfield.newton import DENSE
from bayeskernel.meanfield.saddle import Point, Saddle
from bayeskernel.meanfield.sites import groups
from bayeskernel.meanfield.solve import Branch, MeanField, solve, solve_raised
from bayeskernel.network import Network
from bayeskernel.problem import Floats, problem
from bayeskernel.tasks import Task

# Signals tried, relative to the targets as given, until the untied solution is unstable.
_FIRST, _RATIO, _LAST = 0.05, 1.25, 60.0
# Where the coherent branch is looked for below the spinodal, and how little coherence counts as none.
_BELOW = 0.98
_INCOHERENT, _SIGMAS = 0.02, 5.0
# Relative accuracy of the coexistence, and how close to the spinodal it is looked for.
_COEXISTENCE, _UNDER, _MAX_STEPS = 1e-4, 1e-6, 20
_EIGENVALUE = 1e-8
# Eigenvalue given to directions within steps, which are not looked at.
_ASIDE = 10.0


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
        Unstable direction of C at the spinodal, unit norm, shape of the kernel; None for a crossover.
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
    if not _protected(network, task):
        return _crossover(network, task, rng_key)
    untied = network.untied()
    seen: dict[float, tuple[float, Floats]] = {}

    def lowest(signal: float) -> float:
        theory = solve_raised(untied, task.scaled(signal), rng_key)
        seen[signal] = tied_only_curvature(network, theory)
        return seen[signal][0]

    low = high = _FIRST
    while lowest(high) > 0:
        low, high = high, high * _RATIO
        if high > _LAST:
            raise NoTransitionError(
                f"the untied solution is stable against sharing up to {low:.3g} times the targets"
            )
    sampled = bool(np.any(solve_raised(untied, task.scaled(low), rng_key).monte_carlo_error))
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
    # So close to the spinodal noise can take the coherent branch away.
    if np.any(below.monte_carlo_error) or any(
        _largest_coherence(branch.kernel) >= _INCOHERENT for branch in stable
    ):
        return CriticalSignal(spinodal, nan, "unresolved", nan, direction)
    return CriticalSignal(spinodal, spinodal, "continuous", nan, direction)


def tied_only_curvature(network: Network, untied: MeanField) -> tuple[float, Floats]:
    """Lowest curvature of F of a shared network along cross-step blocks at an untied solution.

    Returns
    -------
    The eigenvalue, in units in which it is one at zero recurrence, and the direction in C, (T, P, T, P).
    """
    tied, own = problem(network, untied.task), untied._solution.saddle
    C, Y, B = (own.joined([getattr(law, of) for law in own.laws]) for of in "CYB")
    together = (Gaussian(groups(tied, joined=True)[0]),)
    saddle = Saddle(tied, Point(C, own.point.Ct, together, False), laws=(Wick(0.0, C, Y, B),))
    apart = np.asarray(tied.over_sites(~np.eye(tied.nodes, dtype=bool)))

    def product(x: Floats) -> Floats:
        # Within steps another law holds; those entries do not mix with the others.
        crossing = saddle.whitened(np.where(apart, saddle.spread(x), 0.0))
        return saddle.product(crossing) + _ASIDE * (x - crossing)

    value, x = _lowest(product, saddle.size)
    direction = np.where(apart, saddle.spread(x), 0.0)
    return value, tied.tensor(direction / np.linalg.norm(direction))


def _lowest(product: Callable[[Floats], Floats], size: int) -> tuple[float, Floats]:
    if size > DENSE:
        start = np.random.default_rng(0).standard_normal(size)
        operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
        lowest, direction = eigsh(operator, 1, which="SA", v0=start, tol=_EIGENVALUE)
        return float(lowest[0]), direction[:, 0]
    matrix = np.array([product(x) for x in np.eye(size)])
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return float(values[0]), vectors[:, 0]


def _protected(network: Network, task: Task) -> bool:
    """Whether independent nodes are stationary for the shared network."""
    posed = problem(network, task)
    nodes = np.eye(posed.nodes, dtype=bool)
    # A leak, or weights that several nodes read one node through, couple nodes whatever C is between others.
    fed = (posed.gain @ nodes.ravel()).reshape(nodes.shape) > 0
    return network.phi.odd and not np.any((posed.coupled | fed) & ~nodes)


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
    untied = solve_raised(network.untied(), task, rng_key).branches[0]
    posed = problem(network, task)
    energies = [energy(posed.matrix(b.kernel), posed) for b in (coherent, untied)]
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
        theory = solve_raised(network, task.scaled(float(np.exp(log_signal))), rng_key)
        return theory.branches[0].curvature

    grid = np.log(np.geomspace(0.125, 8.0, 13))
    values = [curvature(x) for x in grid]
    least = int(np.argmin(values))
    bounds = (grid[max(least - 1, 0)], grid[min(least + 1, len(grid) - 1)])
    found = minimize_scalar(curvature, bounds=bounds, method="bounded", options={"xatol": 0.01})
    nan = float("nan")
    return CriticalSignal(nan, nan, "crossover", float(np.exp(found.x)), None)
