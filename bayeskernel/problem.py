r"""What defines the posterior of a network on a task? Built once, used by sampling and by theory.

A *site* is a (step, pattern) pair, site (t, a) has index t P + a, and d = T P. Kernels are (d, d) here.
Recurrent weights of label l read step s at step t with G_l[t, s] = recurrent_std (patterns do not mix), and
(docs/theory, section 1)

    K(C) = sum_l G_l C G_l^T + K_in        pre-activation kernel; K_in = M_U o su^2 X X^T / D
    B -> sum_l G_l^T B G_l                 the adjoint of its linear part
    S(C) = sv^2 M_V o C + kappa 1          output covariance on supervised sites (times N in mean-field scaling)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, kron

from bayeskernel.activations import Activation
from bayeskernel.gauge import SignSymmetry, sign_symmetry
from bayeskernel.network import Network, check_problem
from bayeskernel.tasks import Task

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Readings(NamedTuple):
    """Outputs that are supervised at the same sites.

    Attributes
    ----------
    sites
        Shape (n,).
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
    steps, patterns, num_outputs
        T, P, O.
    gain
        sum_l G_l x G_l over pairs of steps: K's block (t, s) from C's blocks, shape (T^2, T^2).
    input_kernel
        K_in, shape (d, d).
    readout
        sv^2 M_V, shape (T, T).
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
    steps: int
    patterns: int
    num_outputs: int
    gain: csr_array
    input_kernel: Floats
    readout: Floats
    noise: float
    readings: tuple[Readings, ...]
    symmetry: SignSymmetry

    @property
    def size(self) -> int:
        """Number of sites, d = T P."""
        return self.steps * self.patterns

    @cached_property
    def step_of(self) -> Ints:
        """Step of every site, counted from zero; shape (d,)."""
        return np.repeat(np.arange(self.steps), self.patterns)

    def preactivation_kernel(self, C: Floats) -> Floats:
        """K(C)."""
        return self.fed(C) + self.input_kernel

    def fed(self, C: Floats) -> Floats:
        """sum_l G_l C G_l^T, the linear part of K."""
        return self._joined(self.gain @ self._blocks(C))

    def fed_back(self, B: Floats) -> Floats:
        """sum_l G_l^T B G_l, the adjoint of `fed`."""
        return self._joined(self.gain.T @ self._blocks(B))

    @cached_property
    def supervised(self) -> NDArray[np.bool_]:
        """Pairs of steps whose blocks of C the targets act on, shape (T, T)."""
        acts = np.zeros((self.steps, self.steps), bool)
        for reading in self.readings:
            steps = np.unique(self.step_of[reading.sites])
            acts[np.ix_(steps, steps)] = True
        return acts & (self.readout > 0)

    @cached_property
    def coupled(self) -> NDArray[np.bool_]:
        """Pairs of steps that correlated inputs, or a readout shared between targets, couple; (T, T)."""
        driven = self._blocks(self.input_kernel).any(axis=1).reshape(self.steps, self.steps)
        return np.asarray(driven | self.supervised)

    @cached_property
    def even(self) -> NDArray[np.bool_]:
        """Pairs of steps whose block of C keeps its sign under every sign flip, shape (T, T)."""
        return self.parity == 0

    @cached_property
    def parity(self) -> Ints:
        """Tells apart how sign flips act on the blocks of C; zero where none changes the sign. (T, T)."""
        parity = np.zeros((self.steps, self.steps), np.int64)
        for bit, signs in enumerate(self.symmetry.generators):
            parity |= np.not_equal.outer(signs, signs).astype(np.int64) << bit
        return parity

    def over_sites(self, blocks: NDArray[Any]) -> NDArray[Any]:
        """A (T, T) array repeated for every pair of patterns, shape (d, d)."""
        return blocks[np.ix_(self.step_of, self.step_of)]

    def tensor(self, matrix: Floats) -> Floats:
        """(d, d) -> (T, P, T, P), the shape that users see."""
        return matrix.reshape(self.steps, self.patterns, self.steps, self.patterns)

    def matrix(self, tensor: Floats) -> Floats:
        """(T, P, T, P) -> (d, d)."""
        return np.asarray(tensor, np.float64).reshape(self.size, self.size)

    def scaled(self, signal: float) -> Problem:
        """The same problem with all targets multiplied."""
        readings = tuple(r._replace(targets=signal * r.targets) for r in self.readings)
        return replace(self, readings=readings)

    def _blocks(self, matrix: Floats) -> Floats:
        """(d, d) -> (T^2, P^2), one row a pair of steps."""
        return self.tensor(matrix).transpose(0, 2, 1, 3).reshape(self.steps**2, -1)

    def _joined(self, blocks: Floats) -> Floats:
        T, P = self.steps, self.patterns
        return blocks.reshape(T, T, P, P).transpose(0, 2, 1, 3).reshape(self.size, self.size)


def problem(network: Network, task: Task) -> Problem:
    """Collect the arrays of a network on a task, in float64."""
    check_problem(network, task)
    steps, patterns, features, outputs = task.shape
    _, shared_input, shared_readout = network.labels(steps).masks()
    inputs = task.inputs.reshape(steps * patterns, features)
    drive = network.input_std**2 * (inputs @ inputs.T) / features
    return Problem(
        phi=network.phi,
        width=network.width,
        mean_field=network.scaling == "mean_field",
        steps=steps,
        patterns=patterns,
        num_outputs=outputs,
        gain=recurrent_gain(network, steps),
        input_kernel=drive * np.kron(shared_input, np.ones((patterns, patterns))),
        readout=network.readout_std**2 * shared_readout,
        noise=network.noise,
        readings=_readings(task),
        symmetry=sign_symmetry(network, task),
    )


def recurrent_gain(network: Network, steps: int) -> csr_array:
    """sum_l G_l x G_l of a chain: step t reads step t - 1 with the weights of its label."""
    labels = np.array(network.labels(steps).recurrent)
    total = csr_array((steps**2, steps**2))
    for label in range(max(labels) + 1):
        writes = np.flatnonzero(labels == label)
        strength = np.full(len(writes), network.recurrent_std)
        G = csr_array((strength, (writes, writes - 1)), shape=(steps, steps))
        total = total + kron(G, G, format="csr")
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
