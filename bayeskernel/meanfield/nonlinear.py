r"""The mean-field posterior of a nonlinear network: branches of the saddle point, what follows from the best.

The signal is raised from zero, where the prior is the solution. Under a sign symmetry the branch on which no
symmetry is broken is followed too, and where it is stable another one is looked for from a stronger signal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bayeskernel.gauge import SignSymmetry, canonical_signs, distance, sign_symmetry
from bayeskernel.kernels import preactivation_kernel
from bayeskernel.meanfield.fluctuations import FluctuationError, Fluctuations, saddle_fluctuations
from bayeskernel.meanfield.free_energy import mean_output
from bayeskernel.meanfield.gaussian import Progress, Status
from bayeskernel.meanfield.homotopy import FLAT, Solution, follow, from_draws, polish, start
from bayeskernel.meanfield.predict import Prediction, predict_sampled
from bayeskernel.meanfield.problem import Problem, matrix, only_read, saddle_problem
from bayeskernel.meanfield.saddle import Point, expand, flip, kernel_of, laws
from bayeskernel.meanfield.single_unit import Grid
from bayeskernel.meanfield.solution import Branch, Found
from bayeskernel.network import Network
from bayeskernel.tasks import Task

Floats = NDArray[np.float64]

# Signals on the way up, as fractions of the task's, and over a stronger one back down.
_FINEST = 8
_UP = np.arange(1, _FINEST + 1) / _FINEST
_DOWN = np.array([1.25, 1.5, 1.75, 2.0, 1.75, 1.5, 1.25, 1.0])
# Two kernels closer than this, or than their Monte-Carlo errors allow, are one solution.
_SAME = 1e-4
_SIGMAS = 5.0
# Convergence of a solution extended by new patterns.
_TOLERANCE, _MAX_STEPS = 1e-6, 200


class NonlinearTheory(NamedTuple):
    """A solution of the saddle point, see `solution.Theory`.

    Attributes
    ----------
    network, task
        What was solved.
    problem
        With the targets as they are.
    driven
        What was solved: in standard scaling data do not move the kernel.
    solution
        The best branch.
    """

    network: Network
    task: Task
    problem: Problem
    driven: Problem
    solution: Solution

    def fluctuations(self) -> Fluctuations:
        """Expand around the solution; where activities have a mean, around that of all steps together."""
        if len(self.driven.groups) == 1 or self.problem.phi.odd:
            lazy = self.network.scaling == "standard"
            return saddle_fluctuations(self.solution, self.driven, self.problem, lazy=lazy)
        shape = np.shape(self.problem.data.map_.input)
        nothing = np.zeros((shape[0], 0, *shape[2:])), np.zeros((shape[0], 0, shape[0], 0))
        return self.extended(self.network, self.task, *nothing).fluctuations()

    def predict(self, cross_input: Floats, new_input: Floats) -> Prediction:
        """Draw pre-activations of new patterns given those of the training patterns."""
        return predict_sampled(self.solution.point, self.problem, cross_input, new_input)[0]

    def extended(
        self, network: Network, task: Task, cross_input: Floats, new_input: Floats
    ) -> NonlinearTheory:
        """Start from draws for all patterns and converge on them."""
        point, shape = self.solution.point, np.shape(self.problem.data.map_.input)
        found, h = predict_sampled(point, self.problem, cross_input, new_input)
        problem, driven, core = _problems(
            network,
            task,
            sign_symmetry(network, task),
            one_group=not network.phi.odd,
        )
        Ct = matrix(point.conjugate, self.driven).reshape(shape)
        nothing = found._replace(kernel=0 * found.kernel, cross_kernel=0 * found.cross_kernel)
        begin = from_draws(nothing.joined(Ct), h, core, symmetric=point.symmetric)
        solution = polish(
            begin,
            core,
            driven,
            np.random.default_rng(0),
            reached=Status.CONVERGED,
            tolerance=_TOLERANCE,
            max_steps=_MAX_STEPS,
        )
        if solution.status is not Status.CONVERGED:
            raise FluctuationError(f"all patterns together: {solution.status}")
        return NonlinearTheory(network, task, problem, driven, solution)

    def moments(self) -> tuple[Floats, Floats]:
        """<phi h^T> and <h h^T>; different groups are independent and, phi being odd, uncorrelated."""
        phi_h, h_h = np.zeros((2, self.problem.size, self.problem.size))
        at_laws = laws(self.solution.point, self.driven)
        for at, group in zip(at_laws, self.driven.groups, strict=True):
            block = np.ix_(group.sites, group.sites)
            phi_h[block] = (at.phi * at.weights[:, None]).T @ at.h
            h_h[block] = (at.h * at.weights[:, None]).T @ at.h
        if self.solution.point.symmetric:
            even = matrix(1.0 * (self.driven.parity == 0), self.driven)
            phi_h, h_h = even * phi_h, even * h_h
        return phi_h, h_h


def solve(
    network: Network,
    task: Task,
    symmetry: SignSymmetry,
    rng: np.random.Generator,
    tolerance: float,
    max_steps: int,
    progress: Progress | None,
    *,
    every_branch: bool = True,
) -> Found:
    """Find branches, or the one that raising the signal leads to; 64-bit JAX must be enabled."""
    problem, driven, core = _problems(network, task, symmetry)

    def finish(reached: tuple[Point, Status], *, downhill: bool = True) -> Solution:
        point, status = reached
        return polish(
            point,
            core,
            driven,
            rng,
            reached=status,
            tolerance=tolerance,
            max_steps=max_steps,
            downhill=downhill,
            progress=progress,
        )

    begin = start(core, rng)
    found = list[Solution]()
    if np.any(driven.data.data.targets):
        raised = follow(begin, core, _UP, rng, progress)
        found.append(finish(raised))
        exact = all(isinstance(cloud, Grid) for cloud in begin.clouds)
        # Between independent groups nothing can break.
        breakable = bool(np.any(core.parity))
        if every_branch and breakable and exact:
            flat = follow(begin, core, _UP, rng, progress, leave_saddles=False)
            found.append(finish(flat, downhill=False))
        converged = found[0].status is Status.CONVERGED
        unbroken = breakable and found[0].point.symmetric
        if every_branch and converged and (exact or unbroken):
            found.append(finish(follow(raised[0], core, _DOWN, rng, progress)))
    else:
        found.append(finish((begin, Status.CONVERGED)))
    return _found(found, network, task, symmetry, problem, driven)


def along(
    network: Network,
    task: Task,
    symmetry: SignSymmetry,
    signals: Iterable[float],
    rng: np.random.Generator,
    tolerance: float,
    max_steps: int,
    progress: Progress | None,
) -> Iterator[Found]:
    """The solution at one signal after the other, each carried on from the one before."""
    problem, driven, core = _problems(network, task, symmetry)
    point, before = start(core, rng), 0.0
    for signal in signals:
        stages = math.ceil(_FINEST * abs(signal - before) / max(signal, before, 1e-300)) or 1
        now, status = follow(
            point, core, np.linspace(before, signal, stages + 1)[1:], rng, progress
        )
        solution = polish(
            now,
            core.scaled(signal),
            driven.scaled(signal),
            rng,
            reached=status,
            tolerance=tolerance,
            max_steps=max_steps,
            progress=progress,
        )
        if solution.status is Status.CONVERGED:
            point, before = now, signal
        yield _found(
            [solution],
            network,
            task.scaled(signal),
            symmetry,
            problem.scaled(signal),
            driven.scaled(signal),
        )


def _found(
    solutions: list[Solution],
    network: Network,
    task: Task,
    symmetry: SignSymmetry,
    problem: Problem,
    driven: Problem,
) -> Found:
    distinct = _distinct(solutions, driven, symmetry)
    ordered = [_canonical(solution, driven, symmetry) for solution in distinct]
    best = ordered[0]
    kernel = kernel_of(best.point, driven)
    return Found(
        tuple(_branch(solution, driven) for solution in ordered),
        np.asarray(preactivation_kernel(jnp.asarray(kernel), problem.data.map_)),
        matrix(best.point.conjugate, driven).reshape(kernel.shape),
        np.asarray(mean_output(jnp.asarray(kernel), problem.data)),
        NonlinearTheory(network, task, problem, driven, best),
    )


def _problems(
    network: Network, task: Task, symmetry: SignSymmetry, *, one_group: bool = False
) -> tuple[Problem, Problem, Problem]:
    """The problem; what data drive of it, nothing in standard scaling; what of that is solved for."""
    problem = saddle_problem(network, task, symmetry, one_group=one_group)
    driven = problem if network.scaling == "mean_field" else problem.scaled(0.0)
    return problem, driven, only_read(driven)


def standard_error(solution: Solution, problem: Problem) -> Floats:
    """Monte-Carlo error of every entry of C, shape (d, d)."""
    return matrix(np.sqrt(np.maximum(np.diag(solution.error), 0)), problem)


def _distinct(found: list[Solution], problem: Problem, symmetry: SignSymmetry) -> list[Solution]:
    """Drop repetitions; converged before not, stable before saddles, lowest F first."""
    kept = list[Solution]()
    for solution in found:
        one = kernel_of(solution.point, problem)
        error = standard_error(solution, problem)
        for other in kept:
            two = kernel_of(other.point, problem)
            allowed = _SAME * np.linalg.norm(two) + _SIGMAS * np.linalg.norm(error)
            if distance(one, two, symmetry) < allowed:
                break
        else:
            kept.append(solution)
    return sorted(
        kept,
        key=lambda s: (
            s.status is not Status.CONVERGED,
            s.curvature < -FLAT,
            np.nan_to_num(s.free_energy),
        ),
    )


def _canonical(solution: Solution, problem: Problem, symmetry: SignSymmetry) -> Solution:
    if not np.isfinite(solution.free_energy):
        return solution  # a failed run is returned as it ended
    signs = canonical_signs(kernel_of(solution.point, problem), symmetry)
    if np.all(signs == 1):
        return solution
    point = flip(solution.point, problem, signs)
    return solution._replace(point=point, expansion=expand(point, problem, noise=True))


def _branch(solution: Solution, problem: Problem) -> Branch:
    kernel = kernel_of(solution.point, problem)
    return Branch(
        kernel,
        solution.free_energy,
        solution.residual,
        solution.curvature,
        solution.curvature >= -FLAT,
        solution.status,
        standard_error(solution, problem).reshape(kernel.shape),
        solution.free_energy_error,
    )
