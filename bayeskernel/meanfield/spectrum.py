r"""Which eigenvalues and singular values leave the bulk of the recurrent weights?

Given pre-activations, W is pinned on the activities it reads, W phi_in = g with g = h - U x, and free
elsewhere. With C_in = <phi_in phi_in^T>, G = <phi_in g^T>, H = <g g^T> (the sites W reads and the sites
it writes), in the limit N -> infinity (docs/theory, section 7, derived here)

    eigenvalues of C_in^-1 G outside the circle |l| = sw are outliers of W, others drown in it;
    singular values: theta^2 an eigenvalue of C_in^-1 H gives a spike at theta^2 / sqrt(theta^2 - sw^2)
    if theta^2 > 2 sw^2; the bulk ends at 2 sw.

Given h, g has mean K_W u with u = K^+ h and K_W the recurrent part of K; <phi u^T> = Y and <u u^T> = B + K^+ are known
from the law of one unit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import pinvh

from bayeskernel.meanfield.saddle import Saddle
from bayeskernel.network import Network

Floats = NDArray[np.float64]

# Null directions of a kernel, relative to its largest eigenvalue.
_NULL = 1e-9


class Outliers(NamedTuple):
    """What stands out of one recurrent weight matrix.

    Attributes
    ----------
    steps
        Steps (from 1) at which the matrix acts.
    radius
        sw, radius of the bulk of eigenvalues; the bulk of singular values ends at twice that.
    eigenvalues
        Outliers outside the radius, largest first; complex ones come in pairs.
    singular_values
        Spikes above twice the radius, largest first.
    """

    steps: tuple[int, ...]
    radius: float
    eigenvalues: NDArray[np.complex128]
    singular_values: Floats


def outliers(network: Network, saddle: Saddle) -> tuple[Outliers, ...]:
    """Predict the outliers of every recurrent weight matrix, in the order of its first use."""
    problem, C = saddle.problem, saddle.point.C
    recurrent = problem.fed(C)
    Y, B = np.zeros((2, *C.shape))
    for law, nodes in zip(saddle.laws, saddle.point.nodes, strict=True):
        Y[nodes.sites.block], B[nodes.sites.block] = law.Y, law.B
    # <g g^T> = K_W <u u^T> K_W + K_W - K_W K^+ K_W.
    written = recurrent @ B @ recurrent + recurrent
    labels, patterns = np.array(network.labels(problem.steps).recurrent), problem.patterns
    predicted = []
    for label in dict.fromkeys(labels[1:].tolist()):
        acts = np.flatnonzero(labels == label)
        writes = (acts[:, None] * patterns + np.arange(patterns)).ravel()
        reads = writes - patterns
        inverse = pinvh(C[np.ix_(reads, reads)], rtol=_NULL)
        G = (Y @ recurrent)[np.ix_(reads, writes)]
        eigenvalues = np.linalg.eigvals(inverse @ G).astype(np.complex128)
        eigenvalues = eigenvalues[np.abs(eigenvalues) > network.recurrent_std]
        predicted.append(
            Outliers(
                tuple(int(t) + 1 for t in acts),
                network.recurrent_std,
                eigenvalues[np.argsort(-np.abs(eigenvalues))],
                _spikes(inverse @ written[np.ix_(writes, writes)], network.recurrent_std),
            )
        )
    return tuple(predicted)


def _spikes(squares: Floats, radius: float) -> Floats:
    theta2 = np.sort(np.linalg.eigvals(squares).real)[::-1]
    theta2 = theta2[theta2 > 2 * radius**2]
    return np.asarray(theta2 / np.sqrt(theta2 - radius**2))
