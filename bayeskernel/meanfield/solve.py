"""What kernel does a wide network learn? The mean-field posterior, from problem to solution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from bayeskernel.errors import LARGEST, InputError, positive, positive_integer
from bayeskernel.keys import check_key
from bayeskernel.likelihood import dual_targets, mean_output
from bayeskernel.meanfield import predict, spectrum
from bayeskernel.meanfield.branches import Search, Solution
from bayeskernel.meanfield.crowd import many_correlated_sites
from bayeskernel.meanfield.fluctuations import FluctuationError, Fluctuations, Leading
from bayeskernel.meanfield.newton import Newton, Progress, Status
from bayeskernel.meanfield.predict import Prediction
from bayeskernel.meanfield.saddle import Saddle
from bayeskernel.meanfield.spectrum import Outliers
from bayeskernel.meanfield.starts import extended_point
from bayeskernel.meanfield.stochastic import CrowdSearch
from bayeskernel.memory import check_memory
from bayeskernel.network import Network, check_problem
from bayeskernel.problem import Floats, Problem, problem
from bayeskernel.tasks import Task
from bayeskernel.tasks.task import new_patterns

# Residual at which a solution counts as converged, unless the caller says otherwise, and Newton steps.
TOLERANCE, MAX_STEPS = 1e-7, 200
# Convergence of a solution extended by new patterns.
_EXTENDED = Newton(tolerance=1e-6, max_steps=MAX_STEPS)
# Matrices of all pairs of sites alive at once, measured with quasi-Newton steps; what particles add is small beside them.
_MATRICES = 120
_SEED = 0


class Branch(NamedTuple):
    """One solution of the saddle-point equations.

    Attributes
    ----------
    kernel
        C, shape (T, P, T, P).
    free_energy
        F, nats per unit of width.
    residual
        As in `MeanField`.
    curvature
        Lowest eigenvalue of the Hessian of F in C, in units of the spread of phi phi over units: 1/2 for a
        prior untouched by data, negative at a saddle.
    stable
        Whether the branch is a minimum of F.
    result
        How the solver ended.
    monte_carlo_error, free_energy_error
        As in `MeanField`.
    """

    kernel: Floats
    free_energy: float
    residual: float
    curvature: float
    stable: bool
    result: Status
    monte_carlo_error: Floats
    free_energy_error: float


@dataclass(frozen=True, eq=False, repr=False)
class MeanField:
    """The mean-field posterior of a network on a task, N -> infinity with d = T P fixed.

    All arrays are float64. Signs that the network's symmetry leaves free are fixed such that steps
    are as positively correlated as can be (see ``bayeskernel.gauge``).

    Attributes
    ----------
    network, task
        What was solved.
    kernel
        C, representational kernel, shape (T, P, T, P).
    preactivation_kernel
        K(C), shape (T, P, T, P).
    conjugate
        Conjugate kernel Ct, shape (T, P, T, P).
    output
        Mean network output at every step, shape (T, P, O).
    free_energy
        F, nats per unit: -1/N times the log evidence at leading order, without the constant
        of the observation noise.
    residual
        Largest violation of the saddle-point equations, in whitened units.
    monte_carlo_error
        Standard error of each kernel entry from sampling inside the solver, shape (T, P, T, P);
        zero where nothing was sampled: linear networks, and others with few sites per group.
    free_energy_error
        Standard error of the free energy from the same sampling.
    result
        `Status`: "converged", or what went wrong.
    branches
        All solutions found, lowest F first; the first is the one reported.
    """

    network: Network
    task: Task
    kernel: Floats
    preactivation_kernel: Floats
    conjugate: Floats
    output: Floats
    free_energy: float
    residual: float
    monte_carlo_error: Floats
    free_energy_error: float
    result: Status
    branches: tuple[Branch, ...]
    _solution: Solution

    def __repr__(self) -> str:
        found = f"{len(self.branches)} branch{'es' * (len(self.branches) > 1)}"
        numbers = f"free energy {self.free_energy:.6g}, residual {self.residual:.1e}, {found}"
        return f"MeanField({self.network}, {self.task})\n{self.result}; {numbers}"

    @property
    def converged(self) -> bool:
        """Whether the residual reached the tolerance."""
        return self.result is Status.CONVERGED

    def kernel_std(self, width: int | None = None) -> Floats:
        """Posterior standard deviation of each kernel entry at a width, to leading order (~ 1/sqrt N).

        Parameters
        ----------
        width
            N; default the network's.

        Raises
        ------
        FluctuationError
            At a saddle.
        """
        return self._tensor(self._spread.kernel) / np.sqrt(self._width(width))

    def kernel_shift(self, width: int | None = None) -> Floats:
        """Posterior mean at a width minus the mean-field kernel, to leading order (~ 1/N).

        Raises
        ------
        FluctuationError
            At a saddle, for kernels of rank above 64, beyond 256 sites, and with moving particles.
        """
        return self._tensor(self._shift.kernel) / self._width(width)

    def output_std(self, width: int | None = None) -> Floats:
        """Posterior standard deviation of each output (T, P, O) at a width, to leading order.

        Of order 1/sqrt N in mean-field scaling, of order one in standard scaling. Outputs are those of
        the network; observation noise comes on top. Raises as `kernel_std` does.
        """
        return self._spread.output.reshape(self.output.shape) / self._output_scale(width)

    def output_shift(self, width: int | None = None) -> Floats:
        """Posterior mean output at a width minus its limit (T, P, O), to leading order (~ 1/N)."""
        return self._shift.output.reshape(self.output.shape) / self._width(width)

    def predict(self, inputs: ArrayLike) -> Prediction:
        """Predict outputs and kernels for new patterns.

        Parameters
        ----------
        inputs
            Shape (T, P*, D), with the steps and features of the task.

        Returns
        -------
        A tuple with fields ``mean`` (T, P*, O), ``kernel`` (T, P*, T, P*), ``cross_kernel`` (T, P*, T, P), between new
        and training patterns, and ``monte_carlo_error`` of the mean.
        """
        new = new_patterns(inputs, self.task)
        joint = predict.joint_problem(self.network, self.task, new)
        return predict.predict(self._solution.saddle, joint)

    def predict_std(self, inputs: ArrayLike, width: int | None = None) -> Floats:
        """Posterior standard deviation of the outputs for new patterns, to leading order.

        As `output_std`, around the solution of the task with one new pattern added, without targets: on draws for up
        to 24 correlated sites of nonlinear networks, which takes some seconds a pattern, and beyond by Wick's law, in
        a second to a few: units that saturate spread up to ten percent more on average, and outputs that are nearly
        certain up to a third less (docs/calibration).

        Parameters
        ----------
        inputs
            Shape (T, P*, D).
        width
            N; default the network's.

        Returns
        -------
        Shape (T, P*, O).
        """
        new, parts = new_patterns(inputs, self.task), []
        steps, patterns = self.task.shape[:2]
        last = np.arange(steps) * (patterns + 1) + patterns
        for a in range(new.shape[1]):
            joint = predict.joint_problem(self.network, self.task, new[:, a : a + 1])
            parts.append(Fluctuations(self._extended(joint)).outputs_at(last))
        return np.stack(parts, axis=1) / self._output_scale(width)

    def _extended(self, joint: Problem) -> Solution:
        """The solution of a problem with more patterns, on draws for all of them, or converged from these on a grid."""
        saddle = self._solution.saddle
        if joint.phi.linear or many_correlated_sites(joint):
            return self._solution._replace(saddle=predict.extended_saddle(saddle, joint))
        C, Ct, h, _ = predict.extended(saddle, joint)
        start = extended_point(joint, C, Ct, h, symmetric=saddle.point.symmetric)
        if start.random:
            start = start._replace(nodes=tuple(nodes.completed() for nodes in start.nodes))
            return self._solution._replace(saddle=Saddle(joint, start))
        search = Search(joint, _EXTENDED, np.random.default_rng(_SEED))
        # Numbers out of range end in a status.
        with np.errstate(all="ignore"):
            solution = search.solution(start)
        if solution.status is not Status.CONVERGED:
            raise FluctuationError(f"all patterns together: {solution.status}")
        return solution

    def outliers(self) -> tuple[Outliers, ...]:
        """Eigenvalues and singular values that leave the bulk of the recurrent weights.

        Returns
        -------
        One entry per recurrent weight matrix, in the order of its first use.
        """
        return spectrum.outliers(self.network, self._solution.saddle)

    @cached_property
    def _fluctuations(self) -> Fluctuations:
        """Around the solution; where activities have a mean, around that of all steps together."""
        solution = self._solution
        if len(solution.saddle.laws) > 1 and not self.network.phi.odd:
            solution = self._extended(solution.saddle.problem)
        return Fluctuations(solution)

    @cached_property
    def _spread(self) -> Leading:
        return self._fluctuations.spread()

    @cached_property
    def _shift(self) -> Leading:
        return self._fluctuations.shift()

    def _tensor(self, matrix: Floats) -> Floats:
        return matrix.reshape(self.kernel.shape)

    def _output_scale(self, width: int | None) -> float:
        """What the spread of outputs falls with."""
        return float(np.sqrt(self._width(width))) if self.network.scaling == "mean_field" else 1.0

    def _width(self, width: int | None) -> int:
        return self.network.width if width is None else positive_integer("width", width)


def solve(
    network: Network,
    task: Task,
    rng_key: jax.Array | None = None,
    *,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
    progress: Progress | None = None,
) -> MeanField:
    """Solve the mean-field equations for the kernels of a network on a task.

    Parameters
    ----------
    network, task
        What to solve. The width only sets the scale of fluctuations.
    rng_key
        JAX key for particles, where they are used (nonlinear networks with more than three correlated sites). None
        is a fixed seed, so that the answer repeats.
    tolerance
        On the residual.
    max_steps
        Newton steps per branch.
    progress
        Called as ``progress(stage, step, residual)``.

    Returns
    -------
    The branch of lowest free energy, with all other branches found. Failure to converge is reported in ``result``,
    never raised.

    Raises
    ------
    InputError
        If all inputs are zero.
    """
    search = posed(network, task, rng_key, tolerance, max_steps, progress)
    # Numbers out of range end in a status.
    with np.errstate(all="ignore"):
        return mean_field(network, task, _solutions(search))


def _solutions(search: Search | CrowdSearch) -> list[Solution]:
    """All branches found; where weighted particles fail, what moving ones converge to, which follow K as it is learned."""
    solutions = search.solutions(every_branch=True)
    first = solutions[0]
    lost = first.saddle.point.random and first.status in (Status.BREAKDOWN, Status.UNCOVERED)
    if not (lost and isinstance(search, Search)):
        return solutions
    moving = CrowdSearch(search.problem, search.rng, search.progress)
    reached = moving.solutions(every_branch=True)
    return reached if reached[0].status is Status.CONVERGED else solutions


def solve_raised(network: Network, task: Task, rng_key: jax.Array | None) -> MeanField:
    """The solution that the prior leads to, with a residual below 1e-10."""
    search = posed(network, task, rng_key, 1e-10, MAX_STEPS, None)
    with np.errstate(all="ignore"):
        return mean_field(network, task, search.solutions(every_branch=False))


def posed(
    network: Network,
    task: Task,
    rng_key: jax.Array | None,
    tolerance: float,
    max_steps: int,
    progress: Progress | None,
) -> Search | CrowdSearch:
    """Refuse what cannot be solved; otherwise the problem and its solver."""
    check_problem(network, task)
    positive("tolerance", tolerance)
    positive_integer("max_steps", max_steps)
    if not np.any(np.abs(task.inputs) > 1 / LARGEST):
        raise InputError("inputs", "at least one input that is not zero", "all zero")
    sites = network.graph_of(task.shape[0]).size * task.shape[1]
    made_of = f"kernels of {sites:,} * {sites:,} numbers"
    check_memory("inputs", made_of, 8 * _MATRICES * sites**2, "fewer patterns or steps")
    words = [_SEED]
    if rng_key is not None:
        words = np.asarray(jax.random.key_data(check_key(rng_key))).ravel().tolist()
    rng = np.random.default_rng(np.random.SeedSequence(words))
    defined = problem(network, task)
    if many_correlated_sites(defined):
        return CrowdSearch(defined, rng, progress)
    return Search(defined, Newton(tolerance, max_steps), rng, progress)


def mean_field(network: Network, task: Task, solutions: Sequence[Solution]) -> MeanField:
    """What users see of some solutions, the best first."""
    branches = tuple(_branch(solution) for solution in solutions)
    saddle, best = solutions[0].saddle, branches[0]
    own, C = saddle.problem, saddle.point.C
    with np.errstate(all="ignore"):
        output = mean_output(C, dual_targets(C, own), own)
    return MeanField(
        network=network,
        task=task,
        kernel=best.kernel,
        preactivation_kernel=own.tensor(saddle.K),
        conjugate=own.tensor(saddle.point.Ct),
        output=output.reshape(task.targets.shape),
        free_energy=best.free_energy,
        residual=best.residual,
        monte_carlo_error=best.monte_carlo_error,
        free_energy_error=best.free_energy_error,
        result=best.result,
        branches=branches,
        _solution=solutions[0],
    )


def _branch(solution: Solution) -> Branch:
    tensor = solution.saddle.problem.tensor
    return Branch(
        tensor(solution.kernel),
        solution.free_energy,
        solution.residual,
        solution.curvature,
        solution.stable,
        solution.status,
        tensor(solution.error),
        solution.free_energy_error,
    )
