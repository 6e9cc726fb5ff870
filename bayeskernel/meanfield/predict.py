r"""What does the theory predict at unsupervised steps and for new patterns?

At leading order f* = Q(C)[*, supervised] a with a_o = S_o^-1 y_o. New patterns enter as extra sites that data do
not act on: the tilt of their law is zero there. For a linear network that gives, step by step,

    C[*, .] = K[*, .] (1 + B K),      C[*, *] = K[*, *] + K[*, .] B K[., *];

for other phi their pre-activations are drawn given those of the training patterns, Gaussian under the joint K.

How far outputs stray at order 1/N follows from the fluctuations of the extended kernel: a new pattern is a pattern without
targets.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayeskernel.conditioning import NULL_SHARE, Conditioner
from bayeskernel.likelihood import dual_targets, mean_output
from bayeskernel.meanfield.crowd import averages_of_draws
from bayeskernel.meanfield.laws import SAMPLED, Averages, Gaussian, Law, root
from bayeskernel.meanfield.prior import closed_form, prior_recursion
from bayeskernel.meanfield.saddle import Point, Saddle, within_groups
from bayeskernel.meanfield.sites import groups
from bayeskernel.network import Network
from bayeskernel.problem import Floats, Ints, Problem, problem
from bayeskernel.tasks import Task
from bayeskernel.tasks.task import new_patterns

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


def nngp(network: Network, task: Task, inputs: ArrayLike) -> Prediction:
    """Predict outputs and kernels for new patterns without feature learning.

    Regression with the Gaussian process of infinitely wide networks (NNGP; Lee et al. 2018), the kernel of `prior_kernel`
    and the noise of the network: ``f* = Q[*, supervised] (Q + kappa 1)^-1 y`` with Q = Q(C) of that kernel.

    This is the theory of standard scaling, whatever the targets, and of mean-field scaling in the limit of small
    targets. Outputs are in units of the targets, so a comparison with `MeanField.predict` shows what learned
    features are worth at equal noise. A thousand sites take a tenth of a second for linear, erf and relu networks,
    and a minute for others, by quadrature.

    Parameters
    ----------
    network, task
        The network and its training patterns; the width does not matter.
    inputs
        Shape (T, P*, D).

    Returns
    -------
    As `MeanField.predict`, without Monte-Carlo error.
    """
    joint = joint_problem(network, task, new_patterns(inputs, task))
    return predict_prior(joint, problem(network, task))


def joint_problem(network: Network, task: Task, new: Floats) -> Problem:
    """The task with new patterns without targets, which come last."""
    unknown = np.full((*new.shape[:2], task.shape[3]), np.nan)
    inputs = np.concatenate([task.inputs, new], axis=1)
    return problem(network, Task(inputs, np.concatenate([task.targets, unknown], axis=1)))


def trained_sites(trained: Problem, joint: Problem) -> NDArray[np.bool_]:
    """Which sites of a joint problem are those of ``trained``, whose patterns come first. Shape (d',)."""
    return np.arange(joint.size) % joint.patterns < trained.patterns


def extended(saddle: Saddle, joint: Problem) -> tuple[Floats, Floats]:
    """C (d', d') and draws of h (M, d'), none for linear networks, of a problem with more patterns, those of training first."""
    old = np.flatnonzero(trained_sites(saddle.problem, joint))
    if saddle.problem.phi.linear:
        return _linear(saddle, joint, old), np.zeros((0, joint.size))
    return _drawn(saddle, joint, old, _DRAWS, np.random.default_rng(_SEED))


def extended_saddle(saddle: Saddle, joint: Problem) -> Saddle:
    """F around a solution extended to more patterns, which data do not act on, by Wick's laws."""
    old, known = np.flatnonzero(trained_sites(saddle.problem, joint)), saddle.point
    C, h = extended(saddle, joint)
    Ct = np.zeros_like(C)
    Ct[np.ix_(old, old)] = known.Ct
    parts = groups(joint, joined=not joint.phi.odd)
    point = Point(C, Ct, tuple(Gaussian(sites) for sites in parts), known.symmetric)
    if joint.phi.linear:
        return Saddle(joint, point)
    Y, B = (saddle.joined([getattr(law, name) for law in saddle.laws]) for name in ("Y", "B"))
    within, laws = within_groups(known), list[Law]()
    for sites in parts:
        own, block = h[:, sites.members], Ct[sites.block]
        drawn = averages_of_draws(sites, own, block, symmetric=known.symmetric)
        seen = np.flatnonzero(np.isin(sites.members, old))
        index = np.ix_(*2 * (np.searchsorted(old, sites.members[seen]),))
        pairs = zip((known.C, Y, B), drawn, strict=False)
        changes = (m[index] - d[np.ix_(seen, seen)] for m, d in pairs)
        dC, dY, dB = (np.where(within[index], change, 0.0) for change in changes)
        corrected = _corrected(drawn, seen, dC, dY, dB)
        laws.append(corrected.law(sites.fed))
        C[sites.block] = corrected.C
    return Saddle(joint, point, tuple(laws))


def _corrected(drawn: Averages, seen: Ints, dC: Floats, dY: Floats, dB: Floats) -> Averages:
    """Averages over draws, with changes among some sites; what activities of the others have in common with these follows."""
    C, Y, B, mean = drawn
    among = np.ix_(seen, seen)
    whitener = root(C[among], SAMPLED)[1]
    follow = C[:, seen] @ whitener.T @ whitener
    follow[seen] = np.eye(len(seen))
    C = C + follow @ dC @ follow.T
    Y[:, seen] += follow @ dY
    B[among] += dB
    return Averages(C, Y, B, mean)


def predict(saddle: Saddle, joint: Problem) -> Prediction:
    """Outputs and kernels of the new patterns of a joint problem.

    Without feature learning, in standard scaling, the kernel is that of the prior: exact where it has a closed form.
    """
    if not joint.mean_field and closed_form(joint.phi):
        return predict_prior(joint, saddle.problem)
    dual = dual_targets(saddle.point.C, saddle.problem)
    if saddle.problem.phi.linear:
        return _prediction([extended(saddle, joint)[0]], dual, joint, saddle.problem)
    old, rng = np.flatnonzero(trained_sites(saddle.problem, joint)), np.random.default_rng(_SEED)
    drawn = (_drawn(saddle, joint, old, _DRAWS // _BATCHES, rng)[0] for _ in range(_BATCHES))
    return _prediction(drawn, dual, joint, saddle.problem)


def predict_prior(joint: Problem, trained: Problem) -> Prediction:
    """Gaussian-process regression with the prior kernel; training patterns, those of ``trained``, come first."""
    C = prior_recursion(joint)
    old = trained_sites(trained, joint)
    return _prediction([C], dual_targets(C[np.ix_(old, old)], trained), joint, trained)


def _prediction(
    kernels: Iterable[Floats], dual: Floats, joint: Problem, trained: Problem
) -> Prediction:
    """Averages over kernels C of all sites (d', d'), one or one a batch of draws; they may come one by one."""
    P = trained.patterns
    everywhere = np.zeros((joint.steps, joint.patterns, trained.num_outputs))
    everywhere[:, :P] = dual.reshape(joint.steps, P, -1)
    outputs, total = [], np.zeros((joint.size, joint.size))
    for C in kernels:
        output = mean_output(C, everywhere.reshape(-1, trained.num_outputs), joint)
        outputs.append(output.reshape(everywhere.shape)[:, P:])
        total += C
    error = np.zeros_like(outputs[0])
    if len(outputs) > 1:
        error = np.std(outputs, 0, ddof=1) / np.sqrt(len(outputs))
    average = joint.tensor(total / len(outputs))[:, P:]
    return Prediction(
        np.mean(outputs, 0), average[:, :, :, P:].copy(), average[:, :, :, :P].copy(), error
    )


def _linear(saddle: Saddle, joint: Problem, old: Ints) -> Floats:
    """C of all sites of a linear network, step by step."""
    C, B = np.zeros((joint.size, joint.size)), saddle.joined([law.B for law in saddle.laws])
    C[np.ix_(old, old)] = saddle.point.C
    for n in range(joint.nodes):
        known = (joint.node_of <= n) | np.isin(np.arange(joint.size), old)
        K = joint.preactivation_kernel(C)
        # B acts on training sites alone.
        C[np.ix_(known, known)] = (K + K[:, old] @ B @ K[old])[np.ix_(known, known)]
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
