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
from numpy.typing import ArrayLike

from bayeskernel.conditioning import NULL_SHARE, Conditioner
from bayeskernel.likelihood import dual_targets, mean_output
from bayeskernel.meanfield.crowd import averages_of_draws
from bayeskernel.meanfield.laws import SAMPLED, Averages, Gaussian, Law, root
from bayeskernel.meanfield.particles import STATISTICS
from bayeskernel.meanfield.prior import closed_form, prior_recursion
from bayeskernel.meanfield.saddle import Point, Saddle, within_groups
from bayeskernel.meanfield.sites import groups
from bayeskernel.network import Network
from bayeskernel.problem import Floats, Ints, Problem, problem
from bayeskernel.tasks import Task
from bayeskernel.tasks.task import new_patterns

# Fewest and most draws, of few sites as many as their statistics may be, and numbers that those of all sites may be.
_DRAWS, _NUMBERS = (2**14, 2**18), 2**24
# Fewest and most batches of them, whose scatter gives the error, and pairs of draws in one for each site that they answer for.
_BATCHES, _PAIRS = (4, 16), 4
_SEED = 0


class Extension(NamedTuple):
    """Kernels of training and new sites.

    Attributes
    ----------
    C, Ct
        Shape (d', d'); data do not act on new sites.
    h
        Draws of q, (M, d'); none for linear networks.
    follow
        Activities as a regression on those of training sites, (d', d); none for linear networks.
    """

    C: Floats
    Ct: Floats
    h: Floats
    follow: Floats


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


def _trained_sites(trained: Problem, joint: Problem) -> Ints:
    """The sites of a joint problem that are those of ``trained``, whose patterns come first. Shape (d,)."""
    return np.flatnonzero(np.arange(joint.size) % joint.patterns < trained.patterns)


def extended(saddle: Saddle, joint: Problem) -> Extension:
    """A solution of a problem with more patterns, those of training first."""
    if saddle.problem.phi.linear:
        none = np.zeros((0, joint.size))
        return Extension(_linear(saddle, joint), _extended_tilt(saddle, joint), none, none)
    rng = np.random.default_rng(_SEED)
    return _drawn(saddle, joint, _training_draws(saddle, joint, rng), rng)


def extended_saddle(saddle: Saddle, joint: Problem) -> Saddle:
    """F around a solution extended to more patterns, by Wick's laws."""
    old, known = _trained_sites(saddle.problem, joint), saddle.point
    C, Ct, h, follow = extended(saddle, joint)
    parts = groups(joint, joined=not joint.phi.odd)
    point = Point(C, Ct, tuple(Gaussian(sites) for sites in parts), known.symmetric)
    if joint.phi.linear:
        return Saddle(joint, point)
    Y, B = (saddle.joined([getattr(law, name) for law in saddle.laws]) for name in ("Y", "B"))
    within, laws = within_groups(known), list[Law]()
    for sites in parts:
        own, block = h[:, sites.members], Ct[sites.block]
        _, drawn_Y, drawn_B, mean = averages_of_draws(sites, own, block, symmetric=known.symmetric)
        seen = np.flatnonzero(np.isin(sites.members, old))
        trained = np.searchsorted(old, sites.members[seen])
        index, among = np.ix_(trained, trained), np.ix_(seen, seen)
        drawn_Y[:, seen] += follow[np.ix_(sites.members, trained)] @ np.where(
            within[index], Y[index] - drawn_Y[among], 0.0
        )
        drawn_B[among] = np.where(within[index], B[index], drawn_B[among])
        laws.append(Averages(C[sites.block], drawn_Y, drawn_B, mean).law(sites.fed))
    return Saddle(joint, point, tuple(laws))


def predict(saddle: Saddle, joint: Problem) -> Prediction:
    """Outputs and kernels of the new patterns of a joint problem.

    Without feature learning, in standard scaling, the kernel is that of the prior: exact where it has a closed form.
    """
    if not joint.mean_field and closed_form(joint.phi):
        return predict_prior(joint, saddle.problem)
    dual = dual_targets(saddle.point.C, saddle.problem)
    if saddle.problem.phi.linear:
        return _prediction(extended(saddle, joint).C, dual, joint, saddle.problem)
    rng = np.random.default_rng(_SEED)
    draws = _training_draws(saddle, joint, rng)
    batches = int(np.clip(len(draws) // (_PAIRS * saddle.problem.size), *_BATCHES))
    whole, *parts = (
        _prediction(_drawn(saddle, joint, some, rng).C, dual, joint, saddle.problem)
        for some in (draws, *np.array_split(draws, batches))
    )
    scatter = np.std([part.mean for part in parts], axis=0, ddof=1)
    return whole._replace(monte_carlo_error=scatter / np.sqrt(batches))


def predict_prior(joint: Problem, trained: Problem) -> Prediction:
    """Gaussian-process regression with the prior kernel; training patterns, those of ``trained``, come first."""
    C = prior_recursion(joint)
    old = _trained_sites(trained, joint)
    return _prediction(C, dual_targets(C[np.ix_(old, old)], trained), joint, trained)


def _prediction(C: Floats, dual: Floats, joint: Problem, trained: Problem) -> Prediction:
    """Outputs and kernels of new patterns from those of all sites, (d', d')."""
    P = trained.patterns
    everywhere = np.zeros((joint.steps, joint.patterns, trained.num_outputs))
    everywhere[:, :P] = dual.reshape(joint.steps, P, -1)
    output = mean_output(C, everywhere.reshape(-1, trained.num_outputs), joint)
    mean, kernel = output.reshape(everywhere.shape)[:, P:].copy(), joint.tensor(C)[:, P:]
    return Prediction(
        mean, kernel[:, :, :, P:].copy(), kernel[:, :, :, :P].copy(), np.zeros_like(mean)
    )


def _linear(saddle: Saddle, joint: Problem) -> Floats:
    """C of all sites of a linear network, step by step."""
    old = _trained_sites(saddle.problem, joint)
    C, B = np.zeros((joint.size, joint.size)), saddle.joined([law.B for law in saddle.laws])
    C[np.ix_(old, old)] = saddle.point.C
    for n in range(joint.nodes):
        known = (joint.node_of <= n) | np.isin(np.arange(joint.size), old)
        K = joint.preactivation_kernel(C)
        # B acts on training sites alone.
        C[np.ix_(known, known)] = (K + K[:, old] @ B @ K[old])[np.ix_(known, known)]
        C[np.ix_(old, old)] = saddle.point.C
    return C


def _drawn(saddle: Saddle, joint: Problem, draws: Floats, rng: np.random.Generator) -> Extension:
    """The extension by draws of h at training sites, (M / 2, d).

    What activities of new sites have in common with those of trained ones, whose C is known, is taken from draws as a
    regression: their noise in C is not that of the answer. C stays positive.
    """
    old = _trained_sites(saddle.problem, joint)
    C, follow = np.zeros((joint.size, joint.size)), np.zeros((joint.size, len(old)))
    # Halves repeat so that noise can be antithetic.
    count = 2 * len(draws)
    h, activity = np.zeros((2, count, joint.size))
    even = np.asarray(joint.over_sites(joint.even)) | (not saddle.point.symmetric)
    h[:, old] = np.tile(draws, (2, 1))
    activity[:, old] = joint.phi.values(h[:, old])
    trained = np.ix_(old, old)
    sampled = activity[:, old].T @ activity[:, old] / count * even[trained]
    whitener = root(sampled, SAMPLED)[1]
    C[trained], follow[old] = saddle.point.C, np.eye(len(old))
    change = saddle.point.C - sampled
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
        gain, new = sites.append(joint.preactivation_kernel(C)[np.ix_(now, met)])
        half = rng.standard_normal((new.shape[1], count // 2))
        fresh = np.concatenate([half, -half], axis=1)
        h[:, now] = (gain @ white + new @ fresh).T
        white = np.concatenate([white, fresh])
        activity[:, now] = joint.phi.values(h[:, now])
        among = activity[:, now].T @ activity[:, met] / count * even[np.ix_(now, met)]
        follow[now] = among[:, : len(old)] @ whitener.T @ whitener
        among += follow[now] @ change @ follow[met].T
        C[np.ix_(now, met)], C[np.ix_(met, now)] = among, among.T
    return Extension(C, _extended_tilt(saddle, joint), h, follow)


def _extended_tilt(saddle: Saddle, joint: Problem) -> Floats:
    old = _trained_sites(saddle.problem, joint)
    Ct = np.zeros((joint.size, joint.size))
    Ct[np.ix_(old, old)] = saddle.point.Ct
    return Ct


def _training_draws(saddle: Saddle, joint: Problem, rng: np.random.Generator) -> Floats:
    """Equally weighted draws of h at all training sites from q, (M / 2, d); groups are independent."""
    told = np.clip(STATISTICS // (joint.size * (joint.size + 1)), *_DRAWS)
    count = int(min(told, _NUMBERS // joint.size)) // 2
    h = np.zeros((count, saddle.problem.size))
    for law, nodes in zip(saddle.laws, saddle.point.nodes, strict=True):
        own = nodes.drawn(law, saddle.K[nodes.sites.block], count, rng)
        h[:, nodes.sites.members] = rng.permutation(own)
    return h
