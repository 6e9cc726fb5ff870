r"""The mean-field posterior of a linear network: all branches of F and what follows from the best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bayeskernel.gauge import SignSymmetry, canonical, distance
from bayeskernel.kernels import preactivation_kernel, unshift
from bayeskernel.meanfield.fluctuations import Fluctuations, gaussian_fluctuations
from bayeskernel.meanfield.free_energy import (
    LinearProblem,
    dual_targets,
    linear_problem,
    mean_output,
    root_of_kernel,
    to_kernel,
    whiten,
)
from bayeskernel.meanfield.gaussian import (
    LARGE,
    Progress,
    Stationary,
    Status,
    all_branches,
    approach,
    is_stable,
)
from bayeskernel.meanfield.predict import Prediction, predict_linear
from bayeskernel.meanfield.solution import Branch, Found
from bayeskernel.network import Network
from bayeskernel.tasks import Task

Floats = NDArray[np.float64]

# A second start comes down from targets twice as strong: it finds the coherent branch where it
# coexists with the incoherent one.
_STRONG_SIGNAL = 2.0
# Of a large problem the stronger one is solved only as far as a start needs.
_ROUGHLY = 1e-3
# Two kernels closer than this, relative to their norm, are one solution.
_SAME = 1e-4


class LinearTheory(NamedTuple):
    """A minimum of F, see `solution.Theory`."""

    problem: LinearProblem
    kernel: Floats

    def fluctuations(self) -> Fluctuations:
        """Gaussian fluctuations around the minimum."""
        return gaussian_fluctuations(np.asarray(whiten(self.kernel, self.problem)), self.problem)

    def predict(self, cross_input: Floats, new_input: Floats) -> Prediction:
        """Extend the kernel to new patterns."""
        return predict_linear(self.kernel, self.problem, cross_input, new_input)

    def extended(
        self, network: Network, task: Task, cross_input: Floats, new_input: Floats
    ) -> LinearTheory:
        """The extended kernel solves the larger task."""
        found = self.predict(cross_input, new_input)
        return LinearTheory(linear_problem(network, task), found.joined(self.kernel))

    def moments(self) -> tuple[Floats, Floats]:
        """<phi h^T> = <h h^T> = C."""
        steps, patterns = self.kernel.shape[:2]
        flat = self.kernel.reshape(steps * patterns, -1)
        return flat, flat


def solve(
    network: Network,
    task: Task,
    symmetry: SignSymmetry,
    tolerance: float,
    max_steps: int,
    progress: Progress | None,
    *,
    every_branch: bool = True,
) -> Found:
    """Find all branches, or those reached from the prior; 64-bit JAX must be enabled."""
    problem = linear_problem(network, task)
    prior = np.eye(problem.size)
    starts = [prior]
    if every_branch and problem.data_weight and np.any(problem.data.targets):
        above = _scaled(problem, _STRONG_SIGNAL)
        large = problem.size > LARGE
        starts.append(
            approach(prior, above, progress, accuracy=_ROUGHLY)
            if large
            else _descend([prior], above, symmetry, tolerance, max_steps, progress)[0].Q
        )
    return _found(
        _descend(starts, problem, symmetry, tolerance, max_steps, progress), problem, symmetry
    )


def along(
    network: Network,
    task: Task,
    symmetry: SignSymmetry,
    signals: Iterable[float],
    tolerance: float,
    max_steps: int,
    progress: Progress | None,
) -> Iterator[Found]:
    """Branches at one signal after the other, each descended to from the one before."""
    problem = linear_problem(network, task)
    Q = np.eye(problem.size)
    for signal in signals:
        here = _scaled(problem, signal)
        points = _descend([Q], here, symmetry, tolerance, max_steps, progress)
        if points[0].status is Status.CONVERGED:
            Q = points[0].Q
        yield _found(points, here, symmetry)


def _scaled(problem: LinearProblem, signal: float) -> LinearProblem:
    return problem._replace(
        data=problem.data._replace(targets=signal * np.asarray(problem.data.targets))
    )


def _descend(
    starts: list[Floats],
    problem: LinearProblem,
    symmetry: SignSymmetry,
    tolerance: float,
    max_steps: int,
    progress: Progress | None,
) -> list[Stationary]:
    def same(first: Floats, second: Floats) -> bool:
        one, two = _kernel_of(first, problem), _kernel_of(second, problem)
        return distance(one, two, symmetry) < _SAME * float(np.linalg.norm(two))

    return all_branches(
        starts, problem, same, tolerance=tolerance, max_steps=max_steps, progress=progress
    )


def _found(points: list[Stationary], problem: LinearProblem, symmetry: SignSymmetry) -> Found:
    branches = tuple(_branch(p, canonical(_kernel_of(p.Q, problem), symmetry)) for p in points)
    kernel = branches[0].kernel
    return Found(
        branches,
        np.asarray(preactivation_kernel(jnp.asarray(kernel), problem.map_)),
        _conjugate(kernel, problem),
        np.asarray(mean_output(jnp.asarray(kernel), problem)),
        LinearTheory(problem, kernel),
    )


def _kernel_of(Q: Floats, problem: LinearProblem) -> Floats:
    return np.asarray(to_kernel(jnp.asarray(Q), problem))


def _branch(point: Stationary, kernel: Floats) -> Branch:
    return Branch(
        kernel,
        point.free_energy,
        point.residual,
        point.curvature,
        is_stable(point),
        point.status,
        np.zeros_like(kernel),
        0.0,
    )


def _conjugate(kernel: Floats, problem: LinearProblem) -> Floats:
    """Ct = sv^2 M_V o sum_o a_o a_o^T + sw^2 M_W o unshift(B), B = K^+ C K^+ - K^+."""
    size = kernel.shape[0] * kernel.shape[1]
    dual = np.zeros((size, problem.data.targets.shape[1]))
    dual[problem.data.sites] = dual_targets(jnp.asarray(kernel), problem)
    signal = (dual @ dual.T).reshape(kernel.shape)
    Y = np.asarray(root_of_kernel(jnp.asarray(kernel), problem).inverse)
    backward = Y.T @ (Y @ kernel.reshape(size, size) @ Y.T - np.eye(len(Y))) @ Y
    # M_W at (t, s) belongs to the step that reads C[t-1, s-1].
    back = unshift(problem.map_.recurrent * backward.reshape(kernel.shape))
    return np.asarray(problem.data_weight * problem.map_.readout * signal + back)
