"""What solvers of linear and of nonlinear networks have in common."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bayeskernel.meanfield.fluctuations import Fluctuations
from bayeskernel.meanfield.gaussian import Status
from bayeskernel.meanfield.predict import Prediction
from bayeskernel.network import Network
from bayeskernel.tasks import Task

Floats = NDArray[np.float64]


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
        Lowest eigenvalue of the Hessian of F in C, in whitened coordinates (linear) or in units of
        the spread of phi phi over units (nonlinear); negative at a saddle.
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


class Theory(Protocol):
    """What can be computed around the best branch; 64-bit JAX must be enabled."""

    def fluctuations(self) -> Fluctuations:
        """Standard deviations and shifts of the kernel times powers of N."""

    def predict(self, cross_input: Floats, new_input: Floats) -> Prediction:
        """Extend to new patterns, given their input kernels."""

    def extended(
        self, network: Network, task: Task, cross_input: Floats, new_input: Floats
    ) -> Theory:
        """Solve the task with new patterns, without targets, after those of training."""

    def moments(self) -> tuple[Floats, Floats]:
        """<phi h^T>, rows phi, and <h h^T>, shapes (d, d)."""


class Found(NamedTuple):
    """Branches, lowest F first, and what belongs to the first; see `MeanField`."""

    branches: tuple[Branch, ...]
    preactivation_kernel: Floats
    conjugate: Floats
    output: Floats
    theory: Theory
