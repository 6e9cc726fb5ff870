r"""What defines the posterior of a network on a task? Built once, used by sampling and by theory.

A *site* is a (node, pattern) pair, site (n, a) has index n P + a, and d = m P for m nodes; of a chain, nodes are steps. Kernels
are (d, d) here. With G_l, U_l and R_l, how strongly nodes and outputs read through the weights of a label (`graph`; patterns do
not mix), prior scales included (docs/theory, sections 1 and 8)

    K(C) = sum_l G_l C G_l^T + K_in        pre-activation kernel; K_in = sum_l U_l (X X^T / D) U_l^T
    Q(C) = sum_l R_l C R_l^T               covariance of outputs (t, a) under the prior, times N in mean-field scaling
    S(C) = Q(C) + kappa 1                  on supervised outputs

and the adjoints B -> sum_l G_l^T B G_l, A -> sum_l R_l^T A R_l.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, kron

from bayeskernel.activations import Activation
from bayeskernel.gauge import SignSymmetry, sign_symmetry
from bayeskernel.graph import Graph
from bayeskernel.network import Network, check_problem
from bayeskernel.tasks import Task

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Readings(NamedTuple):
    """Outputs that are supervised at the same (step, pattern) pairs.

    Attributes
    ----------
    sites
        Pairs t P + a, shape (n,).
    outputs
        Which of the network's outputs, shape (o,).
    targets
        Shape (n, o).
    """

    sites: Ints
    outputs: Ints
    targets: Floats


@dataclass(frozen=True, eq=False)
class Problem:
    """A network on a task, as arrays.

    Attributes
    ----------
    phi, width
        Activation and N.
    mean_field
        Scaling: in mean-field scaling data move the kernel, in standard scaling only at order 1/N.
    nodes, steps, patterns, num_outputs
        m, T, P, O.
    gain
        sum_l G_l x G_l over pairs of nodes: K's blocks from C's blocks, shape (m^2, m^2).
    input_kernel
        K_in, shape (d, d).
    readout
        sum_l R_l x R_l: Q's blocks from C's blocks, shape (T^2, m^2).
    noise
        kappa.
    readings
        Supervised targets.
    symmetry
        Sign flips that change nothing observable.
    """

    phi: Activation
    width: int
    mean_field: bool
    nodes: int
    steps: int
    patterns: int
    num_outputs: int
    gain: csr_array
    input_kernel: Floats
    readout: csr_array
    noise: float
    readings: tuple[Readings, ...]
    symmetry: SignSymmetry

    @property
    def size(self) -> int:
        """Number of sites, d = m P."""
        return self.nodes * self.patterns

    @cached_property
    def node_of(self) -> Ints:
        """Node of every site, shape (d,)."""
        return np.repeat(np.arange(self.nodes), self.patterns)

    def preactivation_kernel(self, C: Floats) -> Floats:
        """K(C)."""
        return self.fed(C) + self.input_kernel

    def fed(self, C: Floats) -> Floats:
        """sum_l G_l C G_l^T, the linear part of K."""
        return self._joined(self.gain @ self._blocks(C, self.nodes))

    def fed_back(self, B: Floats) -> Floats:
        """sum_l G_l^T B G_l, the adjoint of `fed`."""
        return self._joined(self.gain.T @ self._blocks(B, self.nodes))

    def read(self, C: Floats) -> Floats:
        """Q(C), shape (T P, T P)."""
        return self._joined(self.readout @ self._blocks(C, self.nodes))

    def read_back(self, A: Floats) -> Floats:
        """sum_l R_l^T A R_l, the adjoint of `read`."""
        return self._joined(self.readout.T @ self._blocks(A, self.steps))

    def read_supervised(self, C: Floats) -> Floats:
        """Q(C) at pairs of supervised steps, zero elsewhere; costs no more than these blocks."""
        P = self.patterns
        out = np.zeros(2 * (self.steps * P,))
        for t, s, n, m, strength in self._supervised_reads:
            own = out[t * P : (t + 1) * P, s * P : (s + 1) * P]
            own += strength * C[n * P : (n + 1) * P, m * P : (m + 1) * P]
        return out

    def read_supervised_back(self, A: Floats) -> Floats:
        """The adjoint of `read_supervised`."""
        P = self.patterns
        out = np.zeros(2 * (self.size,))
        for t, s, n, m, strength in self._supervised_reads:
            own = out[n * P : (n + 1) * P, m * P : (m + 1) * P]
            own += strength * A[t * P : (t + 1) * P, s * P : (s + 1) * P]
        return out

    @cached_property
    def _supervised_reads(self) -> list[tuple[int, int, int, int, float]]:
        """Steps t, s, the nodes that they read, and how strongly, where both steps have targets."""
        given = {int(t) for r in self.readings for t in np.unique(r.sites // self.patterns)}
        return [read for read in block_reads(self.readout) if {read[0], read[1]} <= given]

    @cached_property
    def supervised(self) -> NDArray[np.bool_]:
        """Pairs of nodes whose blocks of C the targets act on, shape (m, m)."""
        acts = np.zeros((self.steps, self.steps))
        for reading in self.readings:
            steps = np.unique(reading.sites // self.patterns)
            acts[np.ix_(steps, steps)] = 1.0
        return np.asarray(self.readout.T @ acts.ravel() > 0).reshape(self.nodes, self.nodes)

    @cached_property
    def coupled(self) -> NDArray[np.bool_]:
        """Pairs of nodes that correlated inputs, or a readout shared between targets, couple; (m, m)."""
        driven = self._blocks(self.input_kernel, self.nodes).any(axis=1)
        return np.asarray(driven.reshape(self.nodes, self.nodes) | self.supervised)

    @cached_property
    def even(self) -> NDArray[np.bool_]:
        """Pairs of nodes whose block of C keeps its sign under every sign flip, shape (m, m)."""
        return self.parity == 0

    @cached_property
    def parity(self) -> Ints:
        """Tells apart how sign flips act on the blocks of C; zero where none changes the sign. (m, m)."""
        signs = self.symmetry.generators
        changed = (signs[:, :, None] != signs[:, None, :]).reshape(len(signs), self.nodes**2)
        # One number for every set of generators that change the sign of a pair.
        numbers = {np.zeros(len(signs), bool).tobytes(): 0}
        parity = [numbers.setdefault(pair.tobytes(), len(numbers)) for pair in changed.T]
        return np.array(parity, np.int64).reshape(self.nodes, self.nodes)

    def over_sites(self, blocks: NDArray[Any]) -> NDArray[Any]:
        """An (m, m) array repeated for every pair of patterns, shape (d, d)."""
        return blocks[np.ix_(self.node_of, self.node_of)]

    def tensor(self, matrix: Floats) -> Floats:
        """(d, d) -> (m, P, m, P), the shape that users see."""
        return matrix.reshape(self.nodes, self.patterns, self.nodes, self.patterns)

    def matrix(self, tensor: Floats) -> Floats:
        """(m, P, m, P) -> (d, d)."""
        return np.asarray(tensor, np.float64).reshape(self.size, self.size)

    def scaled(self, signal: float) -> Problem:
        """The same problem with all targets multiplied."""
        readings = tuple(r._replace(targets=signal * r.targets) for r in self.readings)
        return replace(self, readings=readings)

    def _blocks(self, matrix: Floats, parts: int) -> Floats:
        """Blocks of a matrix as rows, (parts^2, P^2)."""
        P = self.patterns
        return matrix.reshape(parts, P, parts, P).transpose(0, 2, 1, 3).reshape(parts**2, -1)

    def _joined(self, blocks: Floats) -> Floats:
        P, parts = self.patterns, math.isqrt(len(blocks))
        return blocks.reshape(parts, parts, P, P).transpose(0, 2, 1, 3).reshape(2 * (parts * P,))


def problem(network: Network, task: Task) -> Problem:
    """Collect the arrays of a network on a task, in float64."""
    check_problem(network, task)
    steps, patterns, _, outputs = task.shape
    graph = network.graph_of(steps)
    return Problem(
        phi=network.phi,
        width=network.width,
        mean_field=network.scaling == "mean_field",
        nodes=graph.size,
        steps=steps,
        patterns=patterns,
        num_outputs=outputs,
        gain=_pairs(weight_maps(network, graph, "recurrent")),
        input_kernel=input_kernel(network, graph, task.inputs),
        readout=_pairs(weight_maps(network, graph, "readout")),
        noise=network.noise,
        readings=_readings(task),
        symmetry=sign_symmetry(network, task),
    )


def weight_maps(network: Network, graph: Graph, kind: str) -> Floats:
    """G_l, U_l, R_l or those of biases: what reads what through a label, times its prior scale; see `Graph.maps`."""
    return network.standard_deviation(kind) * graph.maps(kind)


def input_kernel(network: Network, graph: Graph, inputs: Floats) -> Floats:
    """K_in of inputs (T, P, D) and biases, shape (d, d)."""
    patterns = inputs.shape[1]
    read = read_inputs(network, graph, inputs)
    K = np.einsum("lnad,lmbd->namb", read, read, optimize=True)
    for bias in weight_maps(network, graph, "bias"):
        K += (bias @ bias.T)[:, None, :, None]
    return K.reshape(2 * (graph.size * patterns,))


def read_inputs(network: Network, graph: Graph, inputs: Floats) -> Floats:
    """U_l x / sqrt(D) for every label of inputs (T, P, D), shape (labels, nodes, P, D)."""
    maps = weight_maps(network, graph, "input") / np.sqrt(inputs.shape[2])
    return np.einsum("lnt,tad->lnad", maps, inputs, optimize=True)


def block_reads(pairs: csr_array) -> list[tuple[int, int, int, int, float]]:
    """Blocks (t, s) that `Problem.gain` or `Problem.readout` makes, from which blocks (n, m), and how strongly."""
    rows, columns = (math.isqrt(size) for size in pairs.shape)
    entries = pairs.tocoo()
    return [
        (*divmod(int(row), rows), *divmod(int(column), columns), float(strength))
        for row, column, strength in zip(entries.row, entries.col, entries.data, strict=True)
    ]


def _pairs(maps: Floats) -> csr_array:
    """sum_l G_l x G_l."""
    _, rows, columns = maps.shape
    total = csr_array((rows**2, columns**2))
    for G in maps:
        total = total + kron(csr_array(G), csr_array(G), format="csr")
    return csr_array(total)


def _readings(task: Task) -> tuple[Readings, ...]:
    """Group outputs by the sites at which they are supervised."""
    supervised = task.supervised.reshape(-1, task.shape[3])
    targets = task.targets.reshape(supervised.shape)
    groups: dict[bytes, list[int]] = {}
    for output, column in enumerate(supervised.T):
        if column.any():
            groups.setdefault(column.tobytes(), []).append(output)
    found = []
    for outputs in groups.values():
        sites = np.flatnonzero(supervised[:, outputs[0]])
        found.append(Readings(sites, np.array(outputs), targets[sites][:, outputs]))
    return tuple(found)
