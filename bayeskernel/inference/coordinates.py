"""What are the coordinates of a posterior whose weights are integrated out, and which arrays define it?"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

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
        Units of z, activation and scaling of the network; width 0 where z is no unit's (space of kernels).
    patterns
        P.
    steps, outputs
        T, O.
    pivots
        For every node the patterns whose innovations are linearly independent.
    sources
        For every node the nodes whose activities reach it.
    reads
        Pairs (step, node): what outputs read.
    readings
        Sites and outputs of every group of targets, as in ``Problem.readings``.
    """

    width: int
    phi: Activation
    mean_field: bool
    patterns: int
    steps: int
    outputs: int
    pivots: tuple[Sites, ...]
    sources: tuple[Sites, ...]
    reads: tuple[tuple[int, int], ...]
    readings: tuple[tuple[Sites, Sites], ...]

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return len(self.sources)

    @property
    def chain(self) -> bool:
        """Whether every node reads the one before: K at a node then needs a single row of C."""
        return self.sources == ((), *((n,) for n in range(self.nodes - 1)))

    @property
    def plain(self) -> bool:
        """Whether every output reads one node, in the order of nodes: Q then is C times numbers."""
        nodes = [node for _, node in self.reads]
        steps = [step for step, _ in self.reads]
        return steps == list(range(self.steps)) and nodes == sorted(set(nodes))

    @property
    def rank(self) -> int:
        """Rows of z."""
        return sum(len(p) for p in self.pivots)


class Data(NamedTuple):
    """What can change without compiling again, sharing included.

    Attributes
    ----------
    recurrent
        sum_l G_l x G_l. Of a chain sw^2 M_W, shape (m, m); else (m, m, m, m), K's pair of nodes from C's.
    input_kernel
        K_in, shape (d, d); in float64.
    readout
        sv^2 where two reads use the same weights, else 0; shape (reads, reads).
    labels
        One where the read (column) uses the readout weights of the label (row), shape (reads, reads).
    noise
        kappa.
    width
        N.
    targets
        Shape (n, o) for every reading.
    """

    recurrent: Any
    input_kernel: Any
    readout: Any
    labels: Any
    noise: Any
    width: Any
    targets: tuple[Any, ...]


def coordinates(problem: Problem, pivots: tuple[Sites, ...]) -> Coordinates:
    """Collect the static part of a problem."""
    readings = tuple((tuple(r.sites.tolist()), tuple(r.outputs.tolist())) for r in problem.readings)
    reaches = _diagonal(problem.gain, problem.nodes, problem.nodes)
    return Coordinates(
        problem.width,
        problem.phi,
        problem.mean_field,
        problem.patterns,
        problem.steps,
        problem.num_outputs,
        pivots,
        tuple(tuple(np.flatnonzero(row).tolist()) for row in reaches),
        _reads(problem),
        readings,
    )


def arrays(problem: Problem) -> Data:
    """Collect the arrays of a problem, in the caller's default float type but for K_in, which is in float64."""
    m, dtype = problem.nodes, jnp.result_type(float)
    recurrent = problem.gain.toarray().reshape(m, m, m, m)
    if coordinates(problem, ()).chain:
        recurrent = np.pad(np.einsum("nmnm->nm", recurrent[1:, 1:, :-1, :-1]), ((1, 0), (1, 0)))
    steps, nodes = np.array(_reads(problem)).T
    pairs = problem.readout.toarray().reshape(problem.steps, problem.steps, m, m)
    readout = pairs[np.ix_(steps, steps) + tuple(np.ix_(nodes, nodes))]
    labels = np.unique((readout > 0).argmax(axis=1), return_inverse=True)[1]
    numbers = Data(
        recurrent=recurrent,
        input_kernel=problem.input_kernel,
        readout=readout,
        labels=np.arange(len(labels))[:, None] == labels,
        noise=np.asarray(problem.noise),
        width=np.asarray(problem.width),
        targets=tuple(r.targets for r in problem.readings),
    )
    data = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, dtype)), numbers)
    with jax.enable_x64(True):
        return data._replace(input_kernel=jnp.asarray(problem.input_kernel, float))


def _reads(problem: Problem) -> tuple[tuple[int, int], ...]:
    """Pairs (step, node) that outputs read."""
    read = _diagonal(problem.readout, problem.steps, problem.nodes)
    return tuple((int(step), int(node)) for step, node in np.argwhere(read))


def _diagonal(pairs: csr_array, rows: int, columns: int) -> NDArray[np.bool_]:
    """Which columns a row reads, from sums of Kronecker products over pairs; (rows, columns)."""
    own = pairs[np.arange(rows) * (rows + 1)][:, np.arange(columns) * (columns + 1)]
    return np.asarray(own.toarray() > 0)


def find_pivots(problem: Problem) -> tuple[Sites, ...]:
    """Pivots of every node, along one prior draw of the network in float64.

    Which directions are exactly null depends on inputs, sharing, activation and width but, except on a set of
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
