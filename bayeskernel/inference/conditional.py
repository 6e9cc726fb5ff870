r"""What follows from stored draws: weights given pre-activations, outputs for new patterns.

Given the activities, every unit's pre-activations at any sites are jointly Gaussian with covariance

    K[(t,a),(s,b)] = M_W sw^2 phi[t-1,a].phi[s-1,b] / N + M_U su^2 x[t,a].x[s,b] / D,

so both questions are Gaussian conditioning, exact at finite width (docs/theory, section 2H). Everything
here runs in float64, one draw at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_solve

from bayeskernel.conditioning import NULL_SHARE, whitened
from bayeskernel.errors import InputError, real_array
from bayeskernel.inference import coordinates, readout, record
from bayeskernel.keys import check_key
from bayeskernel.network import Network
from bayeskernel.problem import problem
from bayeskernel.tasks import Task

Floats = NDArray[np.float64]


class _Sites(NamedTuple):
    """Sites with everything their covariance depends on, one row a site.

    Attributes
    ----------
    before
        Activities of the step before, zero at the first step; (sites, N).
    inputs
        (sites, D).
    recurrent, input
        Label of the weights used; (sites,).
    h
        Pre-activations, (sites, N).
    """

    before: Floats
    inputs: Floats
    recurrent: NDArray[np.int64]
    input: NDArray[np.int64]
    h: Floats

    def joined(self, other: _Sites) -> _Sites:
        return _Sites(*(np.concatenate(pair) for pair in zip(self, other, strict=True)))


def weights(rng_key: jax.Array, draws: xr.DataTree, network: Network, task: Task) -> xr.Dataset:
    """Draw the weights of a network given its stored pre-activations, exactly.

    One draw of weights per stored draw, by Matheron's rule: prior weights (W0, U0), corrected by what
    they miss of h. Then W phi(h[t-1]) + U x[t] = h[t] to rounding. Take a few draws of a long run with
    ``draws.isel(draw=...)`` applied to its posterior: a draw at N = 2048 holds 32 MB for each W.

    Parameters
    ----------
    rng_key
        JAX key, one of its splits for every stored draw.
    draws
        From `sample` with ``keep=("preactivations",)``.
    network, task
        Those the draws were made with.

    Returns
    -------
    Dataset, dims (chain, draw, ...): recurrent_weights (recurrent_label, unit, source_unit),
    input_weights (input_label, unit, feature), readout_weights (readout_label, output_unit, unit), in
    float64, as they act in the network (readout still to be divided by N, or sqrt(N) in standard scaling).
    """
    record.check_same_run(draws, network, task)
    stored = _stored(draws, "preactivation")
    keys = jax.random.split(check_key(rng_key), len(stored))
    parts = [_weights_given(key, h, network, task) for key, h in zip(keys, stored, strict=True)]
    lead = (draws["posterior"].sizes["chain"], draws["posterior"].sizes["draw"])
    out = {
        name: np.stack([part[name] for part in parts]).reshape(*lead, *parts[0][name].shape)
        for name in parts[0]
    }
    out["readout_weights"] = np.asarray(draws["posterior"]["readout_weights"], np.float64)
    return record.dataset(out)


def predict(
    rng_key: jax.Array, draws: xr.DataTree, network: Network, task: Task, inputs: ArrayLike
) -> xr.Dataset:
    """Posterior draws of the network's outputs for new patterns, exact in every space.

    Parameters
    ----------
    rng_key
        JAX key, one of its splits for every stored draw; draws what the stored variables leave open.
    draws
        From `sample` with ``keep=("weights",)`` or ``keep=("preactivations",)``, or with
        ``space="kernels"``, whose draws need nothing kept.
    network, task
        Those the draws were made with.
    inputs
        Shape (T, P*, D).

    Returns
    -------
    Dataset with ``output`` (chain, draw, step, pattern, output_unit), without observation noise.
    """
    record.check_same_run(draws, network, task)
    new, posterior = _new_inputs(inputs, task), draws["posterior"]
    draw: Callable[..., Floats]
    names: tuple[str, ...]
    if "input_weights" in posterior:
        names = ("recurrent_weights", "input_weights", "readout_weights")
        draw = partial(_outputs_of_weights, network=network, new=new)
    elif "preactivation" in posterior:
        names = ("preactivation", "readout_weights")
        draw = partial(_outputs_given_units, network=network, task=task, new=new)
    elif record.settings(draws).get("space") == "kernels":
        names = ("kernel",)
        draw = _drawer_given_kernel(network, task, new)
    else:
        raise InputError(
            "draws", 'draws made with keep=("preactivations",) or ("weights",)', "neither"
        )
    stored = [_stored(draws, name) for name in names if name in posterior]
    keys = jax.random.split(check_key(rng_key), len(stored[0]))
    stacked = np.stack([draw(*each) for each in zip(keys, *stored, strict=True)])
    output = stacked.reshape(*posterior["kernel"].shape[:2], *stacked.shape[1:])
    return record.dataset({"output": output})


def _weights_given(key: jax.Array, h: Floats, network: Network, task: Task) -> dict[str, Floats]:
    steps, _, features, _ = task.shape
    width, labels = network.width, network.labels(steps)
    recurrent_std = network.recurrent_std / np.sqrt(width)
    input_std = network.input_std / np.sqrt(features)
    key_recurrent, key_input = jax.random.split(key)
    W = recurrent_std * _normal(key_recurrent, (labels.counts[0], width, width))
    U = input_std * _normal(key_input, (labels.counts[1], width, features))
    sites = _training_sites(h, network, task)
    prior = np.empty_like(sites.h)
    for site, (w, u) in enumerate(zip(sites.recurrent, sites.input, strict=True)):
        prior[site] = U[u] @ sites.inputs[site] + (W[w] @ sites.before[site] if w >= 0 else 0)
    met, _ = whitened(_covariance(sites, sites, network), task.shape[1], NULL_SHARE["exact"])
    dual = np.zeros_like(sites.h)
    dual[met.pivots] = cho_solve((met.factor, True), (sites.h - prior)[met.pivots])
    for label in range(labels.counts[0]):
        own = sites.recurrent == label
        W[label] += recurrent_std**2 * dual[own].T @ sites.before[own]
    for label in range(labels.counts[1]):
        own = sites.input == label
        U[label] += input_std**2 * dual[own].T @ sites.inputs[own]
    return {"recurrent_weights": W, "input_weights": U} if len(W) else {"input_weights": U}


def _outputs_given_units(
    key: jax.Array, h: Floats, v: Floats, network: Network, task: Task, new: Floats
) -> Floats:
    noise = _normal(key, (new.shape[0] * new.shape[1], network.width))
    return _readout(v, _new_activities(h, noise, network, task, new), network)


def _drawer_given_kernel(
    network: Network, task: Task, new: Floats
) -> Callable[[jax.Array, Floats], Floats]:
    """(key, C) -> outputs of linear networks, for which any activities with Phi Phi^T / N = C will do."""
    steps, patterns = task.shape[:2]
    with jax.enable_x64(True):
        form = coordinates.coordinates(problem(network, task), ())
        arrays = coordinates.arrays(problem(network, task))

    def draw(key: jax.Array, C: Floats) -> Floats:
        key_noise, key_readout = jax.random.split(key)
        matrix = C.reshape(steps * patterns, -1)
        _, root = whitened(matrix, patterns, NULL_SHARE["exact"])
        extra = new.shape[0] * new.shape[1]
        columns = min(root.shape[1] + extra, network.width)
        noise = _noise_of_units(key_noise, extra, root.shape[1], columns, network.width)
        h = np.pad(np.sqrt(network.width) * root, ((0, 0), (0, columns - root.shape[1])))
        h = h.reshape(steps, patterns, columns)
        with jax.enable_x64(True):
            v = np.asarray(_draw_readout(key_readout, jnp.asarray(h), form, arrays))
        return _readout(v, _new_activities(h, noise, network, task, new), network)

    return draw


def _noise_of_units(key: jax.Array, rows: int, rank: int, columns: int, width: int) -> Floats:
    """Normal variables of new sites in as few columns as give all Gram matrices with ``rank`` others."""
    key_normal, key_chi = jax.random.split(key)
    noise = _normal(key_normal, (rows, columns))
    if columns < width:
        # Beyond the span of the others only the Gram matrix of the noise counts: its Bartlett factor.
        freedom = width - rank - np.arange(rows)
        with jax.enable_x64(True):
            chi = np.sqrt(2 * np.asarray(jax.random.gamma(key_chi, freedom / 2)))
        noise[:, rank:] = np.tril(noise[:, rank:], -1) + np.diag(chi)
    return noise


def _new_activities(h: Floats, noise: Floats, network: Network, task: Task, new: Floats) -> Floats:
    """Draw activities (T, P*, N) of new patterns given h (T, P, N), step by step.

    ``noise`` holds T P* rows of standard normal variables, one for every new site.
    """
    (steps, count, _), labels = new.shape, network.labels(len(new))
    known = _training_sites(h, network, task)
    met, _ = whitened(_covariance(known, known, network), task.shape[1], NULL_SHARE["exact"])
    white = met.whiten(known.h[met.pivots])
    activities = np.zeros((steps, count, h.shape[2]))
    for t in range(steps):
        before = activities[t - 1] if t else np.zeros_like(activities[0])
        now = _Sites(
            before,
            new[t],
            np.full(count, labels.recurrent[t]),
            np.full(count, labels.input[t]),
            np.zeros_like(before),
        )
        known = known.joined(now)
        gain, root = met.append(_covariance(now, known, network))
        fresh = noise[t * count : t * count + root.shape[1]]
        activities[t] = network.phi.values(gain @ white + root @ fresh)
        white = np.concatenate([white, fresh])
    return activities


def _training_sites(h: Floats, network: Network, task: Task) -> _Sites:
    steps, patterns, features, _ = task.shape
    labels = network.labels(steps)
    activities = network.phi.values(h)
    before = np.concatenate([np.zeros_like(activities[:1]), activities[:-1]])
    return _Sites(
        before.reshape(-1, h.shape[2]),
        task.inputs.reshape(-1, features),
        np.repeat(labels.recurrent, patterns),
        np.repeat(labels.input, patterns),
        h.reshape(-1, h.shape[2]),
    )


def _covariance(first: _Sites, second: _Sites, network: Network) -> Floats:
    features = first.inputs.shape[1]
    recurrent = np.equal.outer(first.recurrent, second.recurrent)
    inputs = np.equal.outer(first.input, second.input)
    return np.asarray(
        network.recurrent_std**2 / network.width * recurrent * (first.before @ second.before.T)
        + network.input_std**2 / features * inputs * (first.inputs @ second.inputs.T)
    )


def _readout(v: Floats, activities: Floats, network: Network) -> Floats:
    norm = network.width if network.scaling == "mean_field" else np.sqrt(network.width)
    labels = np.array(network.labels(len(activities)).readout)
    return np.asarray(np.einsum("tai,toi->tao", activities, v[labels]) / norm)


_draw_readout = jax.jit(readout.draw, static_argnums=2)


def _outputs_of_weights(_key: jax.Array, *weights: Floats, network: Network, new: Floats) -> Floats:
    """Outputs of a network whose weights are all known; one step needs no recurrent ones."""
    *recurrent, U, v = weights
    labels, activities = network.labels(len(new)), list[Floats]()
    for t, x in enumerate(new):
        h = x @ U[labels.input[t]].T
        if t:
            h = h + activities[-1] @ recurrent[0][labels.recurrent[t]].T
        activities.append(network.phi.values(h))
    return _readout(v, np.stack(activities), network)


def _new_inputs(inputs: ArrayLike, task: Task) -> Floats:
    array = real_array("inputs", inputs, (3,), "(T, P*, D)")
    new = Task(array, np.zeros(array.shape[:2])).inputs
    steps, _, features, _ = task.shape
    if (new.shape[0], new.shape[2]) != (steps, features):
        raise InputError("inputs", f"shape ({steps}, P*, {features})", f"shape {array.shape}")
    return new


def _stored(draws: xr.DataTree, name: str) -> NDArray[np.floating]:
    if name not in draws["posterior"]:
        raise InputError(
            "draws", 'draws made with keep=("preactivations",)', f"draws without {name}"
        )
    values = np.asarray(draws["posterior"][name], np.float64)
    return values.reshape(-1, *values.shape[2:])


def _normal(key: jax.Array, shape: tuple[int, ...]) -> Floats:
    with jax.enable_x64(True):
        return np.array(jax.random.normal(key, shape, jnp.float64))
