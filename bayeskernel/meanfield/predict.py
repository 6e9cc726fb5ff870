r"""What does the theory predict at unsupervised steps and for new patterns?

At leading order f* = Q(C)[*, supervised] a with a_o = S_o^-1 y_o. New patterns enter as extra sites that data do
not act on: the tilt of their law is zero there. For a linear network that gives, step by step,

    C[*, .] = K[*, .] (1 + B K),      C[*, *] = K[*, *] + K[*, .] B K[., *];

for other phi their pre-activations are drawn given those of the training patterns, Gaussian under the joint K.

How far outputs stray at order 1/N follows from the fluctuations of the extended kernel: a new pattern is a pattern without
targets.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bayeskernel.conditioning import NULL_SHARE, Conditioner
from bayeskernel.likelihood import dual_targets, mean_output
from bayeskernel.meanfield.saddle import Saddle
from bayeskernel.problem import Problem

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Draws, and batches of them whose scatter gives the error.
_DRAWS, _BATCHES = 16384, 16
_SEED = 0


class Prediction(NamedTuple):
    """The theory's answer for patterns it was not trained on.

    Attributes
    ----------
    mean
        Network output at leading order in N, shape (T, P*, O).
    kernel
        Kernel among the new patterns, shape (T, P*, T, P*); of other graphs, nodes take the place of steps.
    cross_kernel
        Kernel between new and training patterns, shape (T, P*, T, P).
    monte_carlo_error
        Of ``mean``, same shape, beside that of the training solution; zero for linear networks.
    """

    mean: Floats
    kernel: Floats
    cross_kernel: Floats
    monte_carlo_error: Floats


class Extension(NamedTuple):
    """A solution extended to more patterns.

    Attributes
    ----------
    C
        Of all patterns together, sites in the order of the joint problem, from every batch of draws; (batches, d', d').
    h
        Draws of pre-activations of all sites, (M, d'); none for linear networks.
    """

    C: Floats
    h: Floats


def trained_sites(saddle: Saddle, joint: Problem) -> NDArray[np.bool_]:
    """Which sites of a joint problem are those of the solution: its patterns come first. Shape (d',)."""
    return np.arange(joint.size) % joint.patterns < saddle.problem.patterns


def extended(saddle: Saddle, joint: Problem, *, batches: int = 1) -> Extension:
    """Extend a solution to a problem with more patterns, the first of which are those of training."""
    old = np.flatnonzero(trained_sites(saddle, joint))
    if saddle.problem.phi.linear:
        return Extension(_linear(saddle, joint, old)[None], np.zeros((0, joint.size)))
    rng = np.random.default_rng(_SEED)
    parts = [_drawn(saddle, joint, old, _DRAWS // batches, rng) for _ in range(batches)]
    return Extension(np.array([C for C, _ in parts]), np.concatenate([h for _, h in parts]))


def predict(saddle: Saddle, joint: Problem) -> Prediction:
    """Outputs and kernels of the new patterns of a joint problem."""
    problem, C = saddle.problem, extended(saddle, joint, batches=_BATCHES).C
    is_old = trained_sites(saddle, joint)
    old, new = np.flatnonzero(is_old), np.flatnonzero(~is_old)
    dual, T, m = dual_targets(saddle.point.C, problem), joint.steps, joint.nodes
    trained = np.arange(T * joint.patterns) % joint.patterns < problem.patterns
    everywhere = np.zeros((len(trained), problem.num_outputs))
    everywhere[trained] = dual
    means = [mean_output(one, everywhere, joint)[~trained] for one in C]
    outputs = np.array(means).reshape(len(C), T, joint.patterns - problem.patterns, -1)
    error = np.zeros_like(outputs[0])
    if len(C) > 1:
        error = outputs.std(0, ddof=1) / np.sqrt(len(C))
    average = C.mean(0)
    return Prediction(
        outputs.mean(0),
        average[np.ix_(new, new)].reshape(2 * (m, len(new) // m)),
        average[np.ix_(new, old)].reshape(m, len(new) // m, m, problem.patterns),
        error,
    )


def _linear(saddle: Saddle, joint: Problem, old: Ints) -> Floats:
    """C of all sites of a linear network, step by step."""
    C, B = np.zeros((2, joint.size, joint.size))
    for law, nodes in zip(saddle.laws, saddle.point.nodes, strict=True):
        sites = old[nodes.sites.members]
        B[np.ix_(sites, sites)] = law.B
    C[np.ix_(old, old)] = saddle.point.C
    for n in range(joint.nodes):
        known = (joint.node_of <= n) | np.isin(np.arange(joint.size), old)
        K = joint.preactivation_kernel(C)
        C[np.ix_(known, known)] = (K + K @ B @ K)[np.ix_(known, known)]
        C[np.ix_(old, old)] = saddle.point.C
    return C


def _drawn(
    saddle: Saddle, joint: Problem, old: Ints, count: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """C and pre-activations of all sites from one batch of draws.

    C is that of the draws throughout, as in a network of so many units: beside exact entries between training sites
    noise in the others would misstate how much a new site that nearly follows from these has of its own.
    """
    C, h, activity = np.zeros((joint.size, joint.size)), *np.zeros((2, count, joint.size))
    even = np.asarray(joint.over_sites(joint.even)) | (not saddle.point.symmetric)
    h[:, old] = _training_draws(saddle, count, rng)
    activity[:, old] = joint.phi.values(h[:, old])
    C[np.ix_(old, old)] = activity[:, old].T @ activity[:, old] / count * even[np.ix_(old, old)]
    # h* is drawn given all training sites: data do not act on it.
    sites, met = Conditioner(NULL_SHARE["exact"]), np.zeros(0, np.int64)
    K = joint.preactivation_kernel(C)
    for n in range(joint.nodes):
        now = old[joint.node_of[old] == n]
        met = np.concatenate([met, now])
        sites.append(K[np.ix_(now, met)])
    white = sites.whiten(h[:, met[sites.pivots]].T)
    for n in range(joint.nodes):
        now = np.setdiff1d(np.flatnonzero(joint.node_of == n), old)
        met = np.concatenate([met, now])
        gain, root = sites.append(joint.preactivation_kernel(C)[np.ix_(now, met)])
        half = rng.standard_normal((root.shape[1], count // 2))
        fresh = np.concatenate([half, -half], axis=1)
        h[:, now] = (gain @ white + root @ fresh).T
        white = np.concatenate([white, fresh])
        activity[:, now] = joint.phi.values(h[:, now])
        among = activity[:, now].T @ activity[:, met] / count * even[np.ix_(now, met)]
        C[np.ix_(now, met)], C[np.ix_(met, now)] = among, among.T
    return C, h


def _training_draws(saddle: Saddle, count: int, rng: np.random.Generator) -> Floats:
    """Equally weighted draws of h at all training sites from q, (count, d)."""
    h = np.zeros((count, saddle.problem.size))
    for law, nodes in zip(saddle.laws, saddle.point.nodes, strict=True):
        own = nodes.drawn(law, saddle.K[nodes.sites.block], count // 2, rng)
        # Groups are independent; halves repeat so that noise can be antithetic.
        h[:, nodes.sites.members] = np.tile(rng.permutation(own), (2, 1))
    return h
