"""Does a sampler leave the joint law of weights and data unchanged, and does it rank the truth uniformly?

The truth is drawn here by loops of our own: weights from the prior, pre-activations, outputs, targets. What is
compared is a function of kernels, outputs and targets, evaluated by one piece of code on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import erf
from scipy.stats import norm

import bayeskernel as bk
from bayeskernel.inference import chains, coordinates, weights
from bayeskernel.inference.spaces import SPACES as TABLE
from bayeskernel.inference.spaces import Space
from bayeskernel.problem import problem

FALSE_ALARM = 1e-4
POWER = 0.9
SPACES = ("weights", "preactivations", "kernels")
# Datasets in one compiled call.
_BATCH = 2000

PHI = {
    "linear": lambda x: x,
    "erf": lambda x: erf(np.sqrt(np.pi) / 2 * x),
    "relu": lambda x: np.maximum(x, 0),
}
Values = dict[str, np.ndarray]


class Case(NamedTuple):
    """A network on a task whose targets are to be drawn; labels as lists, one per step."""

    network: bk.Network
    task: bk.Task
    labels: tuple[list[int], list[int], list[int]]


def case(
    activation: str = "erf",
    sharing: str = "half-tied",
    scaling: str = "mean_field",
    width: int = 16,
) -> Case:
    rng = np.random.default_rng(2)
    targets = np.full((4, 2, 2), np.nan)
    targets[1, 0, 0] = targets[2, 1] = targets[3] = 0.0
    labels = {
        "tied": ([0, 0, 0, 0],) * 3,
        # No recurrent weights act at step 1; its label does not count.
        "untied": ([0, 0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]),
        "half-tied": ([0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 1, 1]),
    }[sharing]
    network = bk.Network(
        width, activation, bk.Sharing(*labels), input_std=0.8, recurrent_std=1.1,
        readout_std=2.0, noise=0.3, scaling=scaling,
    )  # fmt: skip
    return Case(network, bk.Task(rng.normal(size=(4, 2, 3)), targets), labels)


def truth(given: Case, seed: int, count: int) -> tuple[Values, np.ndarray]:
    """Draws of weights, pre-activations, kernels, outputs, and targets (count, T, P, O)."""
    network, task, (recurrent, inputs, readout) = given
    N, rng = network.width, np.random.default_rng(seed)
    T, _, D, O = task.shape  # noqa: E741
    W = rng.normal(size=(count, max(recurrent[1:]) + 1, N, N)) * network.recurrent_std / np.sqrt(N)
    U = rng.normal(size=(count, max(inputs) + 1, N, D)) * network.input_std / np.sqrt(D)
    v = rng.normal(size=(count, max(readout) + 1, O, N)) * network.readout_std
    phi = PHI[network.activation]
    h, f = [], []
    for t in range(T):
        now = np.einsum("rik,ak->rai", U[:, inputs[t]], task.inputs[t])
        if t:
            now = now + np.einsum("rij,raj->rai", W[:, recurrent[t]], phi(h[-1]))
        h.append(now)
        norm_ = N if network.scaling == "mean_field" else np.sqrt(N)
        f.append(np.einsum("roi,rai->rao", v[:, readout[t]], phi(now)) / norm_)
    h, f = np.stack(h, 1), np.stack(f, 1)
    kernel = np.einsum("rtai,rsbi->rtasb", phi(h), phi(h)) / N
    variance = network.noise / (N if network.scaling == "mean_field" else 1)
    y = f + np.sqrt(variance) * rng.normal(size=f.shape)
    values = {
        "kernel": kernel, "output": f, "preactivation": h,
        "recurrent_weights": W, "input_weights": U, "readout_weights": v,
    }  # fmt: skip
    return values, y


def invariants(given: Case, values: Values, y: np.ndarray) -> Values:
    """What is tested: kernel entries, outputs, squares of both, likelihoods, sums of squares."""
    network, task, (_, _, readout) = given
    count, (T, P, _, O) = len(y), task.shape  # noqa: E741
    upper = np.triu_indices(T * P)
    C = np.asarray(values["kernel"], float).reshape(count, T * P, T * P)
    f = np.asarray(values["output"], float)
    out = {f"C{i}{j}": C[:, i, j] for i, j in zip(*upper, strict=True)}
    out |= {f"C{i}{j}^2": C[:, i, j] ** 2 for i, j in zip(*upper, strict=True)}
    supervised = task.supervised
    scale = network.noise / (network.width if network.scaling == "mean_field" else 1)
    misfit = np.where(supervised, y - f, 0.0)
    out["|y - f|^2"] = (misfit**2).sum((1, 2, 3)) / scale
    out["f.y"] = np.where(supervised, f * y, 0.0).sum((1, 2, 3))
    same = np.equal.outer(readout, readout)[:, None, :, None]
    for o in range(O):
        sites = np.flatnonzero(supervised[..., o].ravel())
        S = (network.readout_std**2 * same * C.reshape(count, T, P, T, P)).reshape(C.shape)
        S = S[:, sites[:, None], sites] + network.noise * np.eye(len(sites))
        S = S * scale / network.noise
        at = y[..., o].reshape(count, -1)[:, sites]
        explained = np.einsum("ri,ri->r", at, np.linalg.solve(S, at[..., None])[..., 0])
        out[f"ln p(y{o}|C)"] = -explained / 2 - np.linalg.slogdet(S)[1] / 2
    for (t, a), k in np.ndenumerate(np.arange(T * P).reshape(T, P)):
        out[f"f{k}^2"] = (f[:, t, a] ** 2).sum(-1)
        if "preactivation" in values:
            h = np.asarray(values["preactivation"], float)[:, t, a]
            out[f"|h{k}|^2"], out[f"sum h{k}^4"] = (h**2).sum(-1), (h**4).sum(-1)
    used = given.network.graph_of(given.task.shape[0]).label_names
    for kind, labels in used.items():
        name = f"{kind}_weights"
        if name in values:
            w = np.asarray(values[name], float)
            for label in range(len(labels)):
                out[f"|{name} {label}|^2"] = (w[:, label] ** 2).reshape(count, -1).sum(1)
    if "recurrent_weights" in values:
        out["tr W^2"] = np.einsum("rlij,rlji->r", *(2 * [values["recurrent_weights"]]))
    return out


# Steps of a chain that starts from the truth and does not adapt.
STEP_SIZE = {"weights": 0.12, "preactivations": 0.25, "kernels": 0.25}
KEPT = {
    "weights": ("weights", "preactivations"),
    "preactivations": ("preactivations",),
    "kernels": (),
}


class Setting(NamedTuple):
    """A space on a case: data of a dataset, and the position of a true draw."""

    space: Space
    data: Callable[[jax.Array], Any]
    position: Callable[[Values], dict[str, np.ndarray]]


def setting(name: str, given: Case) -> Setting:
    network, task, (_, _, _) = given
    net = weights.structure(network, task.shape[0])
    if name == "weights":
        arrays = weights.arrays(network, task)

        def weight_data(y: jax.Array) -> Any:
            return arrays._replace(targets=jnp.where(arrays.supervised, y, 0.0))

        def weight_position(values: Values) -> dict[str, np.ndarray]:
            scale = {
                "recurrent": network.recurrent_std / np.sqrt(network.width),
                "input": network.input_std / np.sqrt(task.shape[2]),
                "readout": network.readout_std,
            }
            z = {k: values[f"{k}_weights"] / s for k, s in scale.items()}
            shapes = weights.site_shapes(net, task.shape[2], task.shape[3])
            assert {k: v.shape[1:] for k, v in z.items()} == shapes
            return z

        return Setting(TABLE["weights"](net), weight_data, weight_position)
    defined = problem(network, task)
    form = coordinates.coordinates(defined, coordinates.find_pivots(defined))
    arrays = coordinates.arrays(defined)

    def data(y: jax.Array) -> Any:
        by_site = y.reshape(-1, y.shape[-1])
        targets = tuple(by_site[np.ix_(r.sites, r.outputs)] for r in defined.readings)
        return arrays._replace(targets=targets)

    space = TABLE[name](form)

    def position(values: Values) -> dict[str, np.ndarray]:
        """z = chol(K)^-1 h; B = chol(K)^-1 chol(N h h^T)."""
        root = np.linalg.cholesky(_K(given, values["kernel"]))
        h = values["preactivation"].reshape(len(root), root.shape[1], -1)
        z = np.linalg.solve(root, h)
        if name == "preactivations":
            return {"z": z}
        B = np.linalg.cholesky(z @ z.transpose(0, 2, 1))
        freedom = network.width - np.arange(root.shape[1])
        diagonal = np.sqrt(2 * freedom) * np.log(
            np.diagonal(B, axis1=1, axis2=2) / np.sqrt(freedom)
        )
        # The entries of "below" that nothing reads are part of the chain all the same.
        idle = np.triu(np.random.default_rng(0).normal(size=B.shape))
        return {"below": np.tril(B, -1) + idle, "diagonal": diagonal}

    return Setting(space, data, position)


def _K(given: Case, kernel: np.ndarray) -> np.ndarray:
    """K(C), shape (count, T P, T P), entry by entry."""
    network, task, (recurrent, inputs, _) = given
    count, (T, P, D, _) = len(kernel), task.shape
    K = np.zeros((count, T, P, T, P))
    for t in range(T):
        for s in range(T):
            if inputs[t] == inputs[s]:
                K[:, t, :, s] += network.input_std**2 * task.inputs[t] @ task.inputs[s].T / D
            if t and s and recurrent[t] == recurrent[s]:
                K[:, t, :, s] += network.recurrent_std**2 * kernel[:, t - 1, :, s - 1]
    return K.reshape(count, T * P, T * P)


def transitions(
    name: str, given: Case, algorithm: str, moves: int
) -> Callable[[Values, np.ndarray, int], Values]:
    """Move true draws by a few transitions of the sampler that `bayeskernel.sample` runs."""
    at = setting(name, given)
    # Weights of linear networks, whose activities nothing bounds, need shorter ones.
    unbounded = name == "weights" and given.network.activation == "linear"
    step_size = STEP_SIZE[name] / (3 if unbounded else 1)
    make = chains.nuts if algorithm == "nuts" else chains.exact_hmc

    def one(key: jax.Array, z: Any, y: jax.Array) -> dict[str, jax.Array]:
        data = at.data(y)
        key, key_observe = jax.random.split(key)
        first, step, idle = make(at.space._replace(draw_prior=lambda *_: z), 0)
        state = first(key, data)
        if algorithm == "nuts":
            fixed = state.adapt_state._replace(step_size=jnp.asarray(step_size, float))
            state = state._replace(adapt_state=fixed)
        else:
            state = state._replace(step_size=jnp.asarray(step_size, float))
        state = jax.lax.fori_loop(0, idle + moves, lambda _, s: step(s, data), state)
        seen = at.space.observe(key_observe, state.z, data, KEPT[name])
        return seen | {"accept": state.accept_prob}

    # One after the other, as the package runs chains: conditioning in float64 is not for `jax.vmap`.
    run = jax.jit(lambda *given: jax.lax.map(lambda each: one(*each), given))

    def move(values: Values, y: np.ndarray, seed: int) -> Values:
        keys = jax.random.split(jax.random.key(seed), len(y))
        z = {k: jnp.asarray(v, float) for k, v in at.position(values).items()}
        parts = [
            jax.device_get(
                run(
                    keys[i : i + _BATCH],
                    {k: v[i : i + _BATCH] for k, v in z.items()},
                    jnp.asarray(y[i : i + _BATCH], float),
                )
            )
            for i in range(0, len(y), _BATCH)
        ]
        return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}

    return move


class Outcome(NamedTuple):
    """Largest |z|, the limit for it, which quantity, and the shifts found with probability `POWER`."""

    worst: float
    limit: float
    name: str
    count: int
    detectable: dict[str, float]


def joint_invariance(
    name: str, given: Case, algorithm: str, *, moves: int = 4,
    count: int = 8000, seed: int = 0,
) -> Outcome:  # fmt: skip
    """Paired change of every invariant by transitions from the truth; zero on average if they are right."""
    with jax.enable_x64(name == "kernels"):
        move = transitions(name, given, algorithm, moves)
        values, y = truth(given, seed, count)
        moved = move(values, y, seed)
    acceptance = moved.pop("accept")
    assert acceptance.mean() > 0.5, f"acceptance {acceptance.mean():.2f}"
    before = invariants(given, values, y)
    after = invariants(given, moved, y)
    z, detectable = {}, {}
    limit = float(norm.isf(FALSE_ALARM / 2 / len(after)))
    for key, end in after.items():
        change = end - before[key]
        error = change.std() / np.sqrt(count)
        z[key] = abs(change.mean()) / error
        detectable[key] = (limit + norm.isf(1 - POWER)) * error / before[key].std()
    worst = max(z, key=lambda key: z[key])
    return Outcome(z[worst], limit, worst, len(z), detectable)


def ranks(
    name: str, given: Case, algorithm: str, *, count: int = 400, warmup: int = 150,
    draws: int = 31, thin: int = 5, seed: int = 0,
) -> Values:  # fmt: skip
    """Rank of the truth among draws of a chain that starts from the prior and adapts, per invariant."""
    values, y = truth(given, seed, count)
    values = {k: values[k] for k in ("kernel", "output")}
    with jax.enable_x64(name == "kernels"):
        at = setting(name, given)
        sampler = chains.build(at.space, algorithm, warmup, ())

        def one(given: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
            key, y = given
            data, most = at.data(y), chains.CHUNK
            state = sampler.start(key, data)
            for _ in range(warmup // most):
                state, _ = sampler.advance(state, data, most)

            def draw(state: Any, _: None) -> Any:
                state, buffer = sampler.advance(state, data, thin)
                return state, {k: buffer[k][thin - 1] for k in ("kernel", "output")}

            return jax.lax.scan(draw, state, length=draws)[1]

        # One dataset after the other: side by side all would wait for the longest trajectory.
        keys = jax.random.split(jax.random.key(seed), count)
        seen = jax.device_get(jax.jit(partial(jax.lax.map, one))((keys, jnp.asarray(y, float))))
    true = sign_invariant(invariants(given, values, y))
    below, equal = ({k: np.zeros(count, int) for k in true} for _ in range(2))
    for i in range(draws):
        now = sign_invariant(invariants(given, {k: v[:, i] for k, v in seen.items()}, y))
        for k in true:
            below[k] += now[k] < true[k]
            equal[k] += now[k] == true[k]
    # Entries of few relu units can be exactly zero: ties are broken at random.
    rng = np.random.default_rng(seed)
    return {k: below[k] + rng.integers(0, equal[k] + 1) for k in below}


def sign_invariant(values: Values) -> Values:
    """Without squares, which rank as the entries do, and with entries up to sign."""
    return {
        k: np.abs(v) if k.startswith("C") else v
        for k, v in values.items()
        if not (k.startswith("C") and k.endswith("^2"))
    }


def normal_scores(rank: np.ndarray, draws: int) -> tuple[float, float]:
    """z of mean and of variance of the normal scores of ranks that should be uniform on 0..draws."""
    grid = norm.ppf((np.arange(draws + 1) + 0.5) / (draws + 1))
    score, second = norm.ppf((rank + 0.5) / (draws + 1)), np.mean(grid**2)
    fourth = np.mean(grid**4)
    return (
        float(score.mean() / np.sqrt(second / len(rank))),
        float((np.mean(score**2) - second) / np.sqrt((fourth - second**2) / len(rank))),
    )


def simulation_based(name: str, given: Case, algorithm: str, **size: int) -> Outcome:
    """Mean and variance tests of the normal scores of every invariant's ranks."""
    draws = size.get("draws", 31)
    found = ranks(name, given, algorithm, **size)
    limit = float(norm.isf(FALSE_ALARM / 2 / (2 * len(found))))
    z = {
        f"{what} of {key}": abs(value)
        for key, rank in found.items()
        for what, value in zip(("mean", "variance"), normal_scores(rank, draws), strict=True)
    }
    worst = max(z, key=lambda key: z[key])
    shift = (limit + norm.isf(1 - POWER)) / np.sqrt(len(next(iter(found.values()))))
    return Outcome(z[worst], limit, worst, len(z), {"a rank's normal score": shift})
