"""What are the coordinates of a posterior whose weights are integrated out, and which arrays define it?"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bayeskernel.activations import Activation
from bayeskernel.conditioning import NULL_SHARE, Conditioner
from bayeskernel.problem import Problem

Sites = tuple[int, ...]
# Null directions do not depend on units beyond a multiple of the number of sites.
_UNITS = 4096


class Coordinates(NamedTuple):
    """The static part of the model: what code is compiled for.

    Attributes
    ----------
    width, phi, mean_field
        Width, activation and scaling of the network.
    patterns
        P.
    pivots
        For every step the patterns whose innovations are linearly independent.
    outputs
        O.
    readings
        Sites and outputs of every group of targets, as in ``Problem.readings``.
    """

    width: int
    phi: Activation
    mean_field: bool
    patterns: int
    outputs: int
    pivots: tuple[Sites, ...]
    readings: tuple[tuple[Sites, Sites], ...]

    @property
    def steps(self) -> int:
        """T."""
        return len(self.pivots)

    @property
    def rank(self) -> int:
        """Rows of z."""
        return sum(len(p) for p in self.pivots)


class Data(NamedTuple):
    """What can change without compiling again, sharing included.

    Attributes
    ----------
    recurrent
        sw^2 M_W, shape (T, T).
    input_kernel
        K_in, shape (d, d).
    readout
        sv^2 M_V, shape (T, T).
    labels
        One where the step (column) uses the readout weights of the label (row), shape (T, T).
    noise
        kappa.
    targets
        Shape (n, o) for every reading.
    """

    recurrent: Any
    input_kernel: Any
    readout: Any
    labels: Any
    noise: Any
    targets: tuple[Any, ...]


def coordinates(problem: Problem, pivots: tuple[Sites, ...]) -> Coordinates:
    """Collect the static part of a problem."""
    readings = tuple((tuple(r.sites.tolist()), tuple(r.outputs.tolist())) for r in problem.readings)
    return Coordinates(
        problem.width,
        problem.phi,
        problem.mean_field,
        problem.patterns,
        problem.num_outputs,
        pivots,
        readings,
    )


def arrays(problem: Problem) -> Data:
    """Collect the arrays of a problem, in the caller's default float type."""
    T, dtype = problem.steps, jnp.result_type(float)
    recurrent = np.zeros(T * T)
    recurrent[T + 1 :] = problem.gain.diagonal(
        -T - 1
    )  # K at steps (t, s) reads C at (t - 1, s - 1)
    assert np.count_nonzero(recurrent) == problem.gain.nnz, "a chain of steps"
    first_use = (problem.readout > 0).argmax(axis=1)
    labels = np.unique(first_use, return_inverse=True)[1]
    numbers = Data(
        recurrent=recurrent.reshape(T, T),
        input_kernel=problem.input_kernel,
        readout=problem.readout,
        labels=np.arange(T)[:, None] == labels,
        noise=np.asarray(problem.noise),
        targets=tuple(r.targets for r in problem.readings),
    )
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a, dtype)), numbers)


def find_pivots(problem: Problem) -> tuple[Sites, ...]:
    """Pivots of every step, along one prior draw of the network in float64.

    Which directions are null depends on inputs, sharing, activation and width but, except on a set of
    measure zero, not on the draw: its seed is fixed, and no draw of the posterior depends on it.
    """
    P, columns = problem.patterns, min(problem.width, max(_UNITS, 2 * problem.size))
    normal = np.random.default_rng(0).standard_normal
    met = Conditioner(NULL_SHARE[jnp.result_type(float).name])
    activities = np.zeros((problem.size, columns))
    z, pivots = np.zeros((0, columns)), list[Sites]()
    for start in range(0, problem.size, P):
        C, before = activities @ activities.T / columns, len(z)
        rows = problem.preactivation_kernel(C)[start : start + P, : start + P]
        gain, root = met.append(rows)
        z = np.concatenate([z, normal((root.shape[1], columns))])
        activities[start : start + P] = problem.phi.values(np.hstack([gain, root]) @ z)
        pivots.append(tuple((met.pivots[before:] - start).tolist()))
    return tuple(pivots)
