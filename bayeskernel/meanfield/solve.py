"""What kernel does a wide network learn? The mean-field posterior, from problem to solution."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayeskernel.errors import InputError, positive, positive_integer
from bayeskernel.gauge import align, canonical, flip_kernel, sign_symmetry
from bayeskernel.kernels import kernel_map, preactivation_kernel, unshift
from bayeskernel.meanfield.fluctuations import Fluctuations, gaussian_fluctuations
from bayeskernel.meanfield.free_energy import (
    LinearProblem,
    dual_targets,
    linear_problem,
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
from bayeskernel.meanfield.predict import Prediction, predict_linear, training_output
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
        Lowest eigenvalue of the Hessian of F in whitened coordinates; negative at a saddle.
    stable
        Whether the branch is a minimum of F.
    result
        How the solver ended.
    """

    kernel: Floats
    free_energy: float
    residual: float
    curvature: float
    stable: bool
    result: Status


@dataclass(frozen=True, eq=False)
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
        zero for linear networks.
    result
        `Status`: "converged", or a sentence that says what went wrong.
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
    result: Status
    branches: tuple[Branch, ...]
    _problem: LinearProblem = field(repr=False)

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
            At a saddle, or for a kernel of rank above 64.
        """
        return self._fluctuations.std / np.sqrt(self._width(width))

    def kernel_shift(self, width: int | None = None) -> Floats:
        """Posterior mean at a width minus the mean-field kernel, to leading order (~ 1/N)."""
        return self._fluctuations.shift / self._width(width)

    def predict(self, inputs: ArrayLike) -> Prediction:
        """Predict outputs and kernels for new patterns.

        Parameters
        ----------
        inputs
            Shape (T, P*, D), as many steps and features as the task has.
        """
        # The constructor of Task checks inputs; targets only have to exist.
        array = np.asarray(inputs)
        new = Task(inputs, np.zeros(array.shape[:2]))  # type: ignore[arg-type]
        steps, patterns, features, _ = self.task.shape
        if (new.shape[0], new.shape[2]) != (steps, features):
            raise InputError("inputs", f"shape ({steps}, P*, {features})", f"shape {array.shape}")
        both = Task(
            np.concatenate([self.task.inputs, new.inputs], axis=1),
            np.zeros((steps, patterns + new.shape[1])),
        )
        with jax.enable_x64(True):
            drive = np.asarray(kernel_map(self.network, both).input)
            return predict_linear(
                self.kernel,
                self._problem,
                drive[:, patterns:, :, :patterns],
                drive[:, patterns:, :, patterns:],
            )

    @cached_property
    def _fluctuations(self) -> Fluctuations:
        with jax.enable_x64(True):
            Q = np.asarray(whiten(self.kernel, self._problem))
            return gaussian_fluctuations(Q, self._problem)

    def _width(self, width: int | None) -> int:
        return self.network.width if width is None else positive_integer("width", width)


def solve(
    network: Network,
    task: Task,
    rng_key: jax.Array | None = None,
    *,
    tolerance: float = 1e-7,
    max_steps: int = 200,
    progress: Progress | None = None,
) -> MeanField:
    """Solve the mean-field equations for the kernels of a network on a task.

    Parameters
    ----------
    network, task
        What to solve. The width only sets the scale of fluctuations.
    rng_key
        Unused for linear networks, whose solution is deterministic.
    tolerance
        On the residual.
    max_steps
        Newton steps per branch.
    progress
        Called as ``progress(stage, step, residual)``.

    Returns
    -------
    The branch of lowest free energy, with all others found. Failure to converge is reported in
    ``result``, never raised.

    Raises
    ------
    InputError
        For an activation that is not linear, or inputs that are all zero.
    """
    positive("tolerance", tolerance)
    positive_integer("max_steps", max_steps)
    symmetry = sign_symmetry(network, task)
    with jax.enable_x64(True):
        problem = linear_problem(network, task)

        def descend(starts: list[Floats], where: LinearProblem) -> list[Stationary]:
            return all_branches(
                starts, where, same, tolerance=tolerance, max_steps=max_steps, progress=progress
            )

        def kernel_of(Q: Floats) -> Floats:
            return np.asarray(to_kernel(jnp.asarray(Q), problem))

        def same(first: Floats, second: Floats) -> bool:
            one, two = kernel_of(first), kernel_of(second)
            one = flip_kernel(one, align(one, two, symmetry)[0])
            return bool(np.linalg.norm(one - two) < _SAME * np.linalg.norm(two))

        prior = np.eye(problem.size)
        starts = [prior]
        if problem.data_weight and np.any(problem.data.targets):
            strong = problem.data._replace(targets=_STRONG_SIGNAL * problem.data.targets)
            above = problem._replace(data=strong)
            large = problem.size > LARGE
            starts.append(
                approach(prior, above, progress, accuracy=_ROUGHLY)
                if large
                else descend([prior], above)[0].Q
            )
        found = descend(starts, problem)
        branches = tuple(_branch(point, canonical(kernel_of(point.Q), symmetry)) for point in found)
        return _mean_field(network, task, branches, problem)


def _branch(point: Stationary, kernel: Floats) -> Branch:
    return Branch(
        kernel, point.free_energy, point.residual, point.curvature, is_stable(point), point.status
    )


def _mean_field(
    network: Network, task: Task, branches: tuple[Branch, ...], problem: LinearProblem
) -> MeanField:
    best = branches[0]
    return MeanField(
        network=network,
        task=task,
        kernel=best.kernel,
        preactivation_kernel=np.asarray(
            preactivation_kernel(jnp.asarray(best.kernel), problem.map_)
        ),
        conjugate=_conjugate(best.kernel, problem),
        output=training_output(best.kernel, problem),
        free_energy=best.free_energy,
        residual=best.residual,
        monte_carlo_error=np.zeros_like(best.kernel),
        result=best.result,
        branches=branches,
        _problem=problem,
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
