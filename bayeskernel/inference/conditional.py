r"""What follows from stored draws: weights given pre-activations, outputs for new patterns.

Given the activities, every unit's pre-activations at any sites are jointly Gaussian. With z standard normal weights of a label,

    h[n,a] = sum_l z_l r_l[n,a],        r_l = G_l phi / sqrt(N) for weights between nodes, U_l x / sqrt(D), biases alike,

their covariance is sum_l r_l r_l^T, so both questions are Gaussian conditioning, exact at finite width
(docs/theory, section 2H). Everything here runs in float64, one draw at a time.
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

from bayeskernel._precision import jit
from bayeskernel.conditioning import NULL_SHARE, Conditioner, whitened
from bayeskernel.errors import InputError
from bayeskernel.inference import coordinates, readout, record
from bayeskernel.keys import check_key
from bayeskernel.network import Network
from bayeskernel.problem import problem, read_inputs, weight_maps
from bayeskernel.tasks import Task
from bayeskernel.tasks.task import new_patterns

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_KINDS = ("recurrent", "input", "bias", "readout")


class _Sites(NamedTuple):
    """Sites with everything their covariance depends on.

    Attributes
    ----------
    recurrent, input, bias
        r_l of the module's equation, (labels, sites, N), (labels, sites, D) and (labels, sites, 1).
    h
        Pre-activations, (sites, N).
    """

    recurrent: Floats
    input: Floats
    bias: Floats
    h: Floats

    def joined(self, other: _Sites) -> _Sites:
        """These and others."""
        return _Sites(*(np.concatenate(pair, axis=-2) for pair in zip(self, other, strict=True)))

    def covariance(self, other: _Sites) -> Floats:
        """Covariance of the pre-activations of a unit, (sites, other sites)."""
        return sum(
            (
                np.tensordot(one, two, ((0, 2), (0, 2)))
                for one, two in zip(self[:3], other[:3], strict=True)
            ),
            np.zeros((len(self.h), len(other.h))),
        )


def weights(rng_key: jax.Array, draws: xr.DataTree, network: Network, task: Task) -> xr.Dataset:
    """Draw the weights of a network given its stored pre-activations, exactly.

    One draw of weights per stored draw, by Matheron's rule: prior weights (W0, U0) plus a correction for the part
    of h that they do not give. Then W phi(h[t-1]) + U x[t] = h[t] up to rounding, and up to what sites have of their
    own that so nearly follow from others that the sampler left it out (less than 10^-5 of their variance under the prior
    in float32, 10^-8 in float64). Take a few draws of a long run with ``draws.isel(draw=...)``: a draw at N = 2048
    holds 32 MB for each W.

    Parameters
    ----------
    rng_key
        JAX key, which is split over the stored draws.
    draws
        From `sample` with ``keep=("preactivations",)``.
    network, task
        Those the draws were made with.

    Returns
    -------
    Dataset, dims (chain, draw, ...): recurrent_weights (recurrent_label, unit, source_unit),
    input_weights (input_label, unit, feature), bias_weights (bias_label, unit), readout_weights (readout_label,
    output_unit, unit), those that exist, in float64, as they act in the network (readout still to be divided by N, or
    sqrt(N) in standard scaling); labels in the order of ``network.graph_of(T).label_names``.
    """
    record.check_same_run(draws, network, task)
    stored, pivots = _stored(draws, "preactivation"), _pivots(draws, "preactivation", network, task)
    keys = jax.random.split(check_key(rng_key), len(stored))
    parts = [
        _weights_given(key, h, network, task, pivots) for key, h in zip(keys, stored, strict=True)
    ]
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
        JAX key for what the stored variables leave open; it is split over the stored draws.
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
    new, posterior = new_patterns(inputs, task), draws["posterior"]
    draw: Callable[..., Floats]
    names: tuple[str, ...]
    if "input_weights" in posterior:
        names = tuple(f"{kind}_weights" for kind in _KINDS if f"{kind}_weights" in posterior)
        draw = partial(_outputs_of_weights, kinds=names, network=network, new=new)
    elif "preactivation" in posterior:
        names = ("preactivation", "readout_weights")
        pivots = _pivots(draws, "preactivation", network, task)
        draw = partial(_outputs_given_units, network=network, task=task, new=new, pivots=pivots)
    elif record.settings(draws).get("space") == "kernels":
        names = ("kernel",)
        draw = _drawer_given_kernel(network, task, new, _pivots(draws, "kernel", network, task))
    else:
        raise InputError(
            "draws", 'draws made with keep=("preactivations",) or ("weights",)', "neither"
        )
    stored = [_stored(draws, name) for name in names]
    keys = jax.random.split(check_key(rng_key), len(stored[0]))
    stacked = np.stack([draw(*each) for each in zip(keys, *stored, strict=True)])
    output = stacked.reshape(*posterior["kernel"].shape[:2], *stacked.shape[1:])
    return record.dataset({"output": output})


def _pivots(draws: xr.DataTree, name: str, network: Network, task: Task) -> Ints:
    """Sites whose innovations stored values hold: those of the sampler in their precision."""
    with jax.enable_x64(draws["posterior"][name].dtype == np.float64):
        by_node = coordinates.find_pivots(problem(network, task))
    return np.concatenate([n * task.shape[1] + np.array(p, int) for n, p in enumerate(by_node)])


def _weights_given(
    key: jax.Array, h: Floats, network: Network, task: Task, pivots: Ints
) -> dict[str, Floats]:
    graph, width = network.graph_of(task.shape[0]), network.width
    sites = _sites(network.phi.values(h), h, network, task.inputs)
    lengths = {"recurrent": width, "input": task.shape[2], "bias": 1}
    keys = (*jax.random.split(key), jax.random.fold_in(key, 2))
    z = {
        kind: _normal(own, (len(graph.label_names[kind]), width, length))
        for own, (kind, length) in zip(keys, lengths.items(), strict=True)
    }
    prior = sum(
        np.einsum("lsk,lik->si", getattr(sites, kind), z[kind], optimize=True) for kind in lengths
    )
    met = _taken_in(sites, pivots)
    dual = np.zeros_like(sites.h)
    dual[met.pivots] = cho_solve((met.factor, True), (sites.h - prior)[met.pivots])
    drawn = {}
    for kind, length in lengths.items():
        if len(z[kind]):
            scale = network.standard_deviation(kind) * graph.scales_of(kind) / np.sqrt(length)
            fitted = z[kind] + np.einsum("si,lsk->lik", dual, getattr(sites, kind), optimize=True)
            drawn[f"{kind}_weights"] = scale[:, None, None] * fitted
    if "bias_weights" in drawn:
        drawn["bias_weights"] = drawn["bias_weights"][..., 0]
    return drawn


def _outputs_given_units(
    key: jax.Array,
    h: Floats,
    v: Floats,
    network: Network,
    task: Task,
    new: Floats,
    pivots: Ints,
) -> Floats:
    noise = _normal(key, (len(h) * new.shape[1], network.width))
    return _readout(v, _new_activities(h, noise, network, task, new, pivots), network, len(new))


def _drawer_given_kernel(
    network: Network, task: Task, new: Floats, pivots: Ints
) -> Callable[[jax.Array, Floats], Floats]:
    """(key, C) -> outputs of linear networks, for which any activities with Phi Phi^T / N = C will do."""
    defined, patterns = problem(network, task), task.shape[1]
    with jax.enable_x64(True):
        form, arrays = coordinates.coordinates(defined, ()), coordinates.arrays(defined)

    def draw(key: jax.Array, C: Floats) -> Floats:
        key_noise, key_readout = jax.random.split(key)
        _, root = whitened(defined.matrix(C), patterns, NULL_SHARE["exact"])
        extra = defined.nodes * new.shape[1]
        columns = min(root.shape[1] + extra, network.width)
        noise = _noise_of_units(key_noise, extra, root.shape[1], columns, network.width)
        h = np.pad(np.sqrt(network.width) * root, ((0, 0), (0, columns - root.shape[1])))
        h = h.reshape(defined.nodes, patterns, columns)
        with jax.enable_x64(True):
            v = np.asarray(_draw_readout(key_readout, jnp.asarray(h), form, arrays))
        return _readout(v, _new_activities(h, noise, network, task, new, pivots), network, len(new))

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


def _taken_in(sites: _Sites, pivots: Ints) -> Conditioner:
    """Sites of which only pivots tell something: what the others have of their own is rounding in stored draws."""
    met = Conditioner(NULL_SHARE["exact"])
    met.append(sites.covariance(sites)[np.ix_(pivots, pivots)])
    met.pivots, met.count = pivots[met.pivots], len(sites.h)
    return met


def _new_activities(
    h: Floats, noise: Floats, network: Network, task: Task, new: Floats, pivots: Ints
) -> Floats:
    """Draw activities (nodes, P*, N) of new patterns given h (nodes, P, N), node by node.

    ``noise`` holds as many rows of standard normal variables as there are new sites.
    """
    known, count = _sites(network.phi.values(h), h, network, task.inputs), new.shape[1]
    met = _taken_in(known, pivots)
    white = met.whiten(known.h[met.pivots])
    activities = np.zeros((len(h), count, h.shape[2]))
    for n in range(len(h)):
        now = _sites(activities, np.zeros_like(activities), network, new, slice(n, n + 1))
        known = known.joined(now)
        gain, root = met.append(now.covariance(known))
        fresh = noise[n * count : n * count + root.shape[1]]
        activities[n] = network.phi.values(gain @ white + root @ fresh)
        white = np.concatenate([white, fresh])
    return activities


def _sites(
    activities: Floats, h: Floats, network: Network, inputs: Floats, nodes: slice = slice(None)
) -> _Sites:
    """Sites of some nodes, from activities and pre-activations (all nodes, P, N) and inputs (T, P, D)."""
    graph = network.graph_of(len(inputs))
    maps = weight_maps(network, graph, "recurrent")[:, nodes] / np.sqrt(network.width)
    read = np.einsum("lnm,mai->lnai", maps, activities, optimize=True)
    biases = np.repeat(weight_maps(network, graph, "bias")[:, nodes], inputs.shape[1], axis=1)
    driven = read_inputs(network, graph, inputs)[:, nodes]
    return _Sites(_flat(read), _flat(driven), biases, h[nodes].reshape(-1, h.shape[2]))


def _flat(parts: Floats) -> Floats:
    """(labels, nodes, P, n) -> (labels, nodes P, n)."""
    return parts.reshape(len(parts), parts.shape[1] * parts.shape[2], parts.shape[3])


def _readout(v: Floats, activities: Floats, network: Network, steps: int) -> Floats:
    norm = network.width if network.scaling == "mean_field" else np.sqrt(network.width)
    output = np.zeros((steps, activities.shape[1], v.shape[1]))
    for step, node, label in network.graph_of(steps).edges_of("readout"):
        output[step] += activities[node] @ v[label].T / norm
    return output


_draw_readout = jit(readout.draw, static_argnums=2)


def _outputs_of_weights(
    _key: jax.Array, *weights: Floats, kinds: tuple[str, ...], network: Network, new: Floats
) -> Floats:
    """Outputs of a network whose weights are all known."""
    graph, drawn = network.graph_of(len(new)), dict(zip(kinds, weights, strict=True))
    h = np.zeros((graph.size, new.shape[1], network.width))
    activities = np.zeros_like(h)
    for n in range(graph.size):
        for kind, sources in (("input", new), ("recurrent", activities)):
            for target, source, label in graph.edges_of(kind):
                if target == n:
                    h[n] += sources[source] @ drawn[f"{kind}_weights"][label].T
        for target, _, label in graph.edges_of("bias"):
            if target == n:
                h[n] += drawn["bias_weights"][label]
        h[n] = graph.drive[n] * h[n] + np.tensordot(graph.carry[n], h, 1)
        activities[n] = network.phi.values(h[n])
    return _readout(drawn["readout_weights"], activities, network, len(new))


def _stored(draws: xr.DataTree, name: str) -> NDArray[np.floating]:
    if name not in draws["posterior"]:
        raise InputError(
            "draws", 'draws made with keep=("preactivations",)', f"draws without {name}"
        )
    values = record.stored(draws, name).astype(np.float64)
    return values.reshape(-1, *values.shape[2:])


def _normal(key: jax.Array, shape: tuple[int, ...]) -> Floats:
    with jax.enable_x64(True):
        return np.array(jax.random.normal(key, shape, jnp.float64))
