r"""Which eigenvalues and singular values leave the bulk of the recurrent weights?

Given pre-activations, W is pinned on the activities it reads, W phi_in = g with g = h - U x, and free
elsewhere. With C_in = <phi_in phi_in^T>, G = <phi_in g^T>, H = <g g^T> (the sites W reads and the sites
it writes), in the limit N -> infinity (docs/theory, section 7, derived here)

    eigenvalues of C_in^-1 G outside the circle |l| = sw are outliers of W, others drown in it;
    singular values: theta^2 an eigenvalue of C_in^-1 H gives a spike at theta^2 / sqrt(theta^2 - sw^2)
    if theta^2 > 2 sw^2; the bulk ends at 2 sw.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import pinvh

from bayeskernel.kernels import kernel_map, preactivation_kernel
from bayeskernel.network import Network
from bayeskernel.tasks import Task

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


def outliers(
    network: Network, task: Task, kernel: Floats, moments: tuple[Floats, Floats]
) -> tuple[Outliers, ...]:
    """Predict the outliers of every recurrent weight matrix.

    Parameters
    ----------
    network, task
        What was solved.
    kernel
        C, shape (T, P, T, P).
    moments
        <phi h^T> and <h h^T>, shapes (d, d).
    """
    cross_moment, second_moment = moments
    steps, patterns = kernel.shape[:2]
    map_ = kernel_map(network, task)
    K = np.asarray(preactivation_kernel(jnp.asarray(kernel), map_)).reshape(len(cross_moment), -1)
    driven = np.asarray(map_.input).reshape(K.shape)
    C = kernel.reshape(K.shape)
    # Given h, what W contributes to it has mean (K - K_U) K^+ h; second moments follow.
    recurrent = K - driven
    share = recurrent @ pinvh(K, rtol=_NULL)
    written = share @ second_moment @ share.T + recurrent - share @ recurrent
    labels = network.labels(steps).recurrent
    found = []
    for label in dict.fromkeys(labels[1:]):
        acts = [t for t in range(1, steps) if labels[t] == label]
        writes = np.array([t * patterns + a for t in acts for a in range(patterns)])
        reads = writes - patterns
        inverse = pinvh(C[np.ix_(reads, reads)], rtol=_NULL)
        G = (cross_moment @ share.T)[np.ix_(reads, writes)]
        eigenvalues = np.linalg.eigvals(inverse @ G).astype(np.complex128)
        eigenvalues = eigenvalues[np.abs(eigenvalues) > network.recurrent_std]
        found.append(
            Outliers(
                tuple(t + 1 for t in acts),
                network.recurrent_std,
                eigenvalues[np.argsort(-np.abs(eigenvalues))],
                _spikes(inverse @ written[np.ix_(writes, writes)], network.recurrent_std),
            )
        )
    return tuple(found)


def _spikes(squares: Floats, radius: float) -> Floats:
    theta2 = np.sort(np.linalg.eigvals(squares).real)[::-1]
    theta2 = theta2[theta2 > 2 * radius**2]
    return np.asarray(theta2 / np.sqrt(theta2 - radius**2))
