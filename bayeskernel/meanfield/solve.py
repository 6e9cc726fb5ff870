"""What kernel does a wide network learn? The mean-field posterior, from problem to solution."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayeskernel.errors import LARGEST, InputError, positive, positive_integer, real_array
from bayeskernel.gauge import SignSymmetry, sign_symmetry
from bayeskernel.kernels import kernel_map
from bayeskernel.keys import check_key
from bayeskernel.meanfield import linear, nonlinear
from bayeskernel.meanfield.fluctuations import Fluctuations
from bayeskernel.meanfield.gaussian import Progress, Status
from bayeskernel.meanfield.predict import Prediction
from bayeskernel.meanfield.solution import Branch, Found, Theory
from bayeskernel.meanfield.spectrum import Outliers, outliers
from bayeskernel.network import Network, check_problem
from bayeskernel.tasks import Task

Floats = NDArray[np.float64]

# Residual at which a solution counts as converged, unless the caller says otherwise.
TOLERANCE = 1e-7


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
        zero where nothing was sampled: linear networks, and others with few sites per group.
    free_energy_error
        Standard error of the free energy from the same sampling.
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
    free_energy_error: float
    result: Status
    branches: tuple[Branch, ...]
    _theory: Theory = field(repr=False)

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

    def output_std(self, width: int | None = None) -> Floats:
        """Posterior standard deviation of each output (T, P, O) at a width, to leading order.

        Of order 1/sqrt N in mean-field scaling, of order one in standard scaling. Outputs are those of
        the network; observation noise comes on top. Raises as `kernel_std` does.
        """
        return self._fluctuations.output_std / self._output_scale(width)

    def output_shift(self, width: int | None = None) -> Floats:
        """Posterior mean output at a width minus its limit (T, P, O), to leading order (~ 1/N)."""
        return self._fluctuations.output_shift / self._width(width)

    def predict(self, inputs: ArrayLike) -> Prediction:
        """Predict outputs and kernels for new patterns.

        Parameters
        ----------
        inputs
            Shape (T, P*, D), as many steps and features as the task has.
        """
        _, *drive = self._with_patterns(self._new_patterns(inputs))
        with jax.enable_x64(True):
            return self._theory.predict(*drive)

    def predict_std(self, inputs: ArrayLike, width: int | None = None) -> Floats:
        """Posterior standard deviation of the outputs for new patterns, to leading order.

        As `output_std`; every new pattern is solved for as one more pattern of the task, without
        targets, which for nonlinear networks takes about as long as a solution.

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
        new, patterns, parts = self._new_patterns(inputs), self.task.shape[1], []
        for a in range(new.shape[1]):
            task, *drive = self._with_patterns(new[:, a : a + 1])
            with jax.enable_x64(True):
                theory = self._theory.extended(self.network, task, *drive)
                parts.append(theory.fluctuations().output_std[:, patterns:])
        return np.concatenate(parts, axis=1) / self._output_scale(width)

    def _new_patterns(self, inputs: ArrayLike) -> Floats:
        # The constructor of Task checks inputs; targets only have to exist.
        array = real_array("inputs", inputs, (3,), "(T, P*, D)")
        new = Task(array, np.zeros(array.shape[:2]))
        steps, _, features, _ = self.task.shape
        if (new.shape[0], new.shape[2]) != (steps, features):
            raise InputError("inputs", f"shape ({steps}, P*, {features})", f"shape {array.shape}")
        return new.inputs

    def _with_patterns(self, new: Floats) -> tuple[Task, Floats, Floats]:
        """The task with new patterns without targets, and the input's part of K of new patterns."""
        patterns, outputs = self.task.shape[1], self.task.shape[3]
        unknown = np.full((*new.shape[:2], outputs), np.nan)
        both = Task(
            np.concatenate([self.task.inputs, new], axis=1),
            np.concatenate([self.task.targets, unknown], axis=1),
        )
        with jax.enable_x64(True):
            drive = np.asarray(kernel_map(self.network, both).input)[:, patterns:]
        return both, drive[..., :patterns], drive[..., patterns:]

    def outliers(self) -> tuple[Outliers, ...]:
        """Eigenvalues and singular values that leave the bulk of the recurrent weights.

        Returns
        -------
        One entry per recurrent weight matrix, in the order of its first use.
        """
        with jax.enable_x64(True):
            return outliers(self.network, self.task, self.kernel, self._theory.moments())

    @cached_property
    def _fluctuations(self) -> Fluctuations:
        with jax.enable_x64(True):
            return self._theory.fluctuations()

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
    max_steps: int = 200,
    progress: Progress | None = None,
) -> MeanField:
    """Solve the mean-field equations for the kernels of a network on a task.

    Parameters
    ----------
    network, task
        What to solve. The width only sets the scale of fluctuations.
    rng_key
        Where particles are used (nonlinear networks with more than three correlated sites): their
        randomness. None is a fixed key, so that the answer repeats.
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
        If all inputs are zero.
    """
    return solve_branches(network, task, rng_key, tolerance, max_steps, progress, every_branch=True)


# Numbers out of range end in a status.
@np.errstate(over="ignore", invalid="ignore")
def solve_branches(
    network: Network,
    task: Task,
    rng_key: jax.Array | None,
    tolerance: float,
    max_steps: int,
    progress: Progress | None,
    *,
    every_branch: bool,
) -> MeanField:
    """`solve`, or only the branch that raising the signal from zero leads to."""
    symmetry, seed = checked(network, task, rng_key, tolerance, max_steps)
    with jax.enable_x64(True):
        if network.phi.name == "linear":
            found = linear.solve(
                network, task, symmetry, tolerance, max_steps, progress, every_branch=every_branch
            )
        else:
            found = nonlinear.solve(
                network,
                task,
                symmetry,
                np.random.default_rng(seed),
                tolerance,
                max_steps,
                progress,
                every_branch=every_branch,
            )
    return mean_field(network, task, found)


def checked(
    network: Network, task: Task, rng_key: jax.Array | None, tolerance: float, max_steps: int
) -> tuple[SignSymmetry, int]:
    """Refuse what cannot be solved; the sign symmetry, and a seed for particles."""
    check_problem(network, task)
    positive("tolerance", tolerance)
    positive_integer("max_steps", max_steps)
    symmetry = sign_symmetry(network, task)
    if not np.any(np.abs(task.inputs) > 1 / LARGEST):
        raise InputError("inputs", "at least one input that is not zero", "all zero")
    seed = 0 if rng_key is None else int(np.sum(jax.random.key_data(check_key(rng_key))))
    return symmetry, seed


def mean_field(network: Network, task: Task, found: Found) -> MeanField:
    """What users see of the branches found."""
    best = found.branches[0]
    return MeanField(
        network=network,
        task=task,
        kernel=best.kernel,
        preactivation_kernel=found.preactivation_kernel,
        conjugate=found.conjugate,
        output=found.output,
        free_energy=best.free_energy,
        residual=best.residual,
        monte_carlo_error=best.monte_carlo_error,
        free_energy_error=best.free_energy_error,
        result=best.result,
        branches=found.branches,
        _theory=found.theory,
    )
