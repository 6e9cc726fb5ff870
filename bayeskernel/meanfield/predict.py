r"""What does the theory predict at unsupervised steps and for new patterns?

At leading order f*[t,a] = sv^2 (M_V o C)[*, supervised] a with a_o = S_o^-1 y_o. New patterns enter as
extra sites that data do not act on, so given h at the training sites their pre-activations are Gaussian
under the joint K; for a linear network the extended kernel follows step by step from

    C[*, .] = R C,     C[*, *] = K[*, *] + R (C - K) R^T,     R = K[*, .] K^+.

How far outputs stray at order 1/N follows from the fluctuations of the extended kernel: a new pattern is a
pattern without targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import pinvh

from bayeskernel.kernels import preactivation_kernel
from bayeskernel.meanfield.free_energy import LinearProblem, dual_targets, read_out, root_of_kernel
from bayeskernel.meanfield.problem import Problem, matrix
from bayeskernel.meanfield.saddle import Point, laws
from bayeskernel.meanfield.single_unit import Law, activity, resample

Floats = NDArray[np.float64]


class Prediction(NamedTuple):
    """The theory's answer for patterns it was not trained on.

    Attributes
    ----------
    mean
        Network output at leading order in N, shape (T, P*, O).
    kernel
        Kernel among the new patterns, shape (T, P*, T, P*).
    cross_kernel
        Kernel between new and training patterns, shape (T, P*, T, P).
    monte_carlo_error
        Of ``mean``, same shape, beside that of the training solution; zero for linear networks.
    """

    mean: Floats
    kernel: Floats
    cross_kernel: Floats
    monte_carlo_error: Floats

    def joined(self, kernel: Floats) -> Floats:
        """The kernel of training and new patterns together, given that among training patterns."""
        back = self.cross_kernel.transpose(2, 3, 0, 1)
        rows = (
            np.concatenate([kernel, back], 3),
            np.concatenate([self.cross_kernel, self.kernel], 3),
        )
        return np.concatenate(rows, 1)


def predict_linear(
    kernel: Floats, problem: LinearProblem, cross_input: Floats, new_input: Floats
) -> Prediction:
    """Extend a linear network's kernel to new patterns.

    Parameters
    ----------
    kernel
        C at the training sites, shape (T, P, T, P).
    problem
        The training problem.
    cross_input, new_input
        M_U o su^2 X* X^T / D of new with training patterns (T, P*, T, P), and among new patterns
        (T, P*, T, P*).
    """
    steps, patterns = kernel.shape[:2]
    size = steps * patterns
    root = root_of_kernel(jnp.asarray(kernel), problem)
    inverse = np.asarray(root.inverse)  # Y: K^+ = Y^T Y
    C = kernel.reshape(size, size)
    K = np.asarray(preactivation_kernel(jnp.asarray(kernel), problem.map_)).reshape(size, size)
    excess = inverse @ (C - K) @ inverse.T
    recurrent = np.asarray(problem.map_.recurrent)[:, 0, :, 0]
    cross, new = np.zeros_like(cross_input), np.zeros_like(new_input)
    loadings = np.zeros((steps, new_input.shape[1], inverse.shape[0]))  # K[*, .] Y^T
    for t in range(steps):
        cross_row = _row(t, cross_input, cross, recurrent)
        new_rows = _row(t, new_input, new, recurrent)[:, : t + 1]
        loadings[t] = cross_row.reshape(-1, size) @ inverse.T
        cross[t] = (loadings[t] @ inverse @ C).reshape(cross[t].shape)
        for s in range(t + 1):
            block = new_rows[:, s] + loadings[t] @ excess @ loadings[s].T
            new[t, :, s], new[s, :, t] = block, block.T
    dual = dual_targets(jnp.asarray(kernel), problem)
    mean = np.asarray(read_out(cross, dual, problem))
    return Prediction(mean, new, cross, np.zeros_like(mean))


def _row(t: int, drive: Floats, kernel: Floats, recurrent: Floats) -> Floats:
    """K[t, .] of new patterns (P*, T, P') from C[t - 1, .]."""
    row = drive[t].copy()
    if t:
        row[:, 1:] += recurrent[t, 1:, None] * kernel[t - 1][:, :-1]
    return row


# Draws in a batch; batches, whose scatter gives the error.
_DRAWS, _BATCHES = 1024, 16
# Eigenvalues of a covariance below this share of the largest are null.
_NULL = 1e-10


def predict_sampled(
    point: Point, problem: Problem, cross_input: Floats, new_input: Floats
) -> tuple[Prediction, Floats]:
    """Extend a nonlinear network's kernel to new patterns by drawing h* given h, step by step.

    Data do not act on new patterns, so h* given h is Gaussian under the joint K; its noise comes in
    antithetic pairs with fixed seed.

    Parameters
    ----------
    point, problem
        The training solution.
    cross_input, new_input
        As for `predict_linear`.

    Returns
    -------
    The prediction, and draws of the pre-activations of all patterns, shape (M, T, P + P*).
    """
    rng = np.random.default_rng(0)
    kernel = matrix(point.m, problem).reshape(np.shape(problem.data.map_.input))
    at = laws(point, problem)
    parts = [
        _extension(kernel, *_training_draws(at, problem, rng), problem, cross_input, new_input, rng)
        for _ in range(_BATCHES)
    ]
    dual = dual_targets(jnp.asarray(kernel), problem.data)
    means = np.stack([read_out(cross, dual, problem.data) for cross, _, _ in parts])
    cross, new = (np.mean([part[k] for part in parts], axis=0) for k in (0, 1))
    error = means.std(0, ddof=1) / np.sqrt(_BATCHES)
    draws = np.concatenate([part[2] for part in parts])
    return Prediction(means.mean(0), new, cross, error), draws


def _extension(
    kernel: Floats,
    h: Floats,
    phi: Floats,
    problem: Problem,
    cross_input: Floats,
    new_input: Floats,
    rng: np.random.Generator,
) -> tuple[Floats, Floats, Floats]:
    """Cross kernel, kernel of the new patterns, and pre-activations of all, from one batch (h, phi)."""
    steps, patterns = np.shape(problem.data.map_.input)[:2]
    extra, size = new_input.shape[1], steps * patterns
    recurrent = np.asarray(problem.data.map_.recurrent)[:, 0, :, 0]
    K = np.asarray(preactivation_kernel(jnp.asarray(kernel), problem.data.map_)).reshape(size, size)
    cross, new = np.zeros_like(cross_input), np.zeros_like(new_input)
    # Joint covariance and values of everything known so far: training sites, then new ones.
    known, values, activities = K, h, list[Floats]()
    for t in range(steps):
        cross_row = _row(t, cross_input, cross, recurrent)
        new_rows = _row(t, new_input, new, recurrent)[:, : t + 1]
        own = new_rows[:, t]
        row = np.concatenate(
            [cross_row.reshape(extra, size), new_rows[:, :t].reshape(extra, t * extra)], 1
        )
        gain = row @ pinvh(known, rtol=_NULL)
        innovation = own - gain @ row.T
        levels, vectors = np.linalg.eigh((innovation + innovation.T) / 2)
        root = vectors * np.sqrt(np.maximum(levels, 0))
        half = rng.standard_normal((len(values) // 2, extra))
        now = values @ gain.T + np.concatenate([half, -half]) @ root.T
        known = np.block([[known, row.T], [row, own]])
        values = np.concatenate([values, now], axis=1)
        activities.append(activity(problem.phi, now))
        cross[t] = (activities[t].T @ phi / len(phi)).reshape(cross[t].shape)
        for s in range(t + 1):
            block = activities[t].T @ activities[s] / len(phi)
            new[t, :, s], new[s, :, t] = block, block.T
    joined = [a.reshape(len(h), steps, -1) for a in (h, values[:, size:])]
    return cross, new, np.concatenate(joined, axis=2)


def _training_draws(
    found: Sequence[Law], problem: Problem, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Equally weighted draws of (h, phi) at all training sites from q."""
    h, phi = np.zeros((2, _DRAWS, problem.size))
    for at, group in zip(found, problem.groups, strict=True):
        # Groups are independent; halves repeat so that noise can be antithetic.
        chosen = np.tile(rng.permutation(resample(at.weights, _DRAWS // 2, rng)), 2)
        h[:, group.sites], phi[:, group.sites] = at.h[chosen], at.phi[chosen]
    return h, phi
