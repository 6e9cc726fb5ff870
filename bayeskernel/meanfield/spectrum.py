r"""Which eigenvalues and singular values leave the bulk of the recurrent weights?

Given pre-activations, W is pinned on the activities it reads, W phi_in = g, and free elsewhere. With C_in = <phi_in phi_in^T>,
G = <phi_in g^T>, H = <g g^T>, in the limit N -> infinity (docs/theory, section 7, derived here)

    eigenvalues of C_in^-1 G outside the circle |l| = sw are outliers of W, others drown in it;
    singular values: theta^2 an eigenvalue of C_in^-1 H gives a spike at theta^2 / sqrt(theta^2 - sw^2)
    if theta^2 > 2 sw^2; the bulk ends at 2 sw.

Of a chain g = h - U x. In general the weights of label l enter h by G_l phi, so given h, g is Gaussian with mean X^T u,
u = K^+ h and X = <h g^T> = sw G_l C; <phi u^T> = Y and <u u^T> = B + K^+ are known from the law of one unit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import pinvh

from bayeskernel.meanfield.saddle import Saddle
from bayeskernel.network import Network
from bayeskernel.problem import Floats, weight_maps

# Null directions of a kernel, relative to its largest eigenvalue.
_NULL = 1e-9


class Outliers(NamedTuple):
    """What stands out of one recurrent weight matrix.

    Attributes
    ----------
    steps
        Steps (from 1) of the nodes at which the matrix acts.
    radius
        sw, with the label's scale; radius of the bulk of eigenvalues; the bulk of singular values ends at twice that.
    eigenvalues
        Outliers outside the radius, largest first; complex ones come in pairs.
    singular_values
        Spikes above twice the radius, largest first.
    label
        Of the weights.
    """

    steps: tuple[int, ...]
    radius: float
    eigenvalues: NDArray[np.complex128]
    singular_values: Floats
    label: str


def outliers(network: Network, saddle: Saddle) -> tuple[Outliers, ...]:
    """Predict the outliers of every recurrent weight matrix, in the order of its first use."""
    problem, C = saddle.problem, saddle.point.C
    graph, patterns = network.graph_of(problem.steps), problem.patterns
    Y, B = (saddle.joined([getattr(law, of) for law in saddle.laws]) for of in "YB")
    edges, maps = graph.edges_of("recurrent"), weight_maps(network, graph, "recurrent")
    stds = network.recurrent_std * graph.scales_of("recurrent")
    predicted = []
    for label, (G_l, std) in enumerate(zip(maps, stds, strict=True)):
        own = [edge for edge in edges if edge.label == label]
        sources = sorted({edge.source for edge in own})
        reads = (np.array(sources)[:, None] * patterns + np.arange(patterns)).ravel()
        C_in = C[np.ix_(reads, reads)]
        # <h g^T>, g = W phi_in, and <g g^T> = X^T <u u^T> X + sw^2 C_in - X^T K^+ X.
        X = std * np.kron(G_l, np.eye(patterns)) @ C[:, reads]
        written = X.T @ B @ X + std**2 * C_in
        inverse = pinvh(C_in, rtol=_NULL)
        eigenvalues = np.linalg.eigvals(inverse @ (Y @ X)[reads]).astype(np.complex128)
        eigenvalues = eigenvalues[np.abs(eigenvalues) > std]
        predicted.append(
            Outliers(
                tuple(sorted({int(graph.places_of_nodes[edge.target, 1]) for edge in own})),
                float(std),
                eigenvalues[np.argsort(-np.abs(eigenvalues))],
                _spikes(inverse @ written, std),
                graph.label_names["recurrent"][label],
            )
        )
    return tuple(predicted)


def _spikes(squares: Floats, radius: float) -> Floats:
    theta2 = np.sort(np.linalg.eigvals(squares).real)[::-1]
    theta2 = theta2[theta2 > 2 * radius**2]
    return np.asarray(theta2 / np.sqrt(theta2 - radius**2))
