r"""What do networks learn that are trained step by step? Ensembles in the coordinates of the posterior.

Weights are z ~ N(0, 1) times their prior scales (`weights`), starts are prior draws, and what is minimised is

    loss(z) = sum over targets (f - y)^2 / (2 s^2) + weight_decay |z|^2 / 2,      s^2 = noise / N, noise in standard scaling,

up to a constant minus the log posterior at weight decay 1. Langevin training adds noise, z <- z - r grad + sqrt(2 r) xi: for
small steps r its stationary law is the posterior; in directions of curvature c variances are too large by 1 / (1 - r c / 2).
Networks differ in their start, their noise and their batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr

from bayeskernel.errors import InputError, integers, positive, positive_integer
from bayeskernel.inference import record, weights
from bayeskernel.inference.descent import (
    Position,
    Run,
    State,
    advance,
    observed,
    starts,
    steepest_curvature,
)
from bayeskernel.inference.measure import of_networks
from bayeskernel.inference.progress import training_bar
from bayeskernel.keys import check_key
from bayeskernel.network import Network, check_problem
from bayeskernel.tasks import Task

Optimizer: TypeAlias = "Literal['langevin', 'gd', 'sgd', 'adam'] | optax.GradientTransformation"

_DOWN = optax.scale(-1.0)
# Directions; the learning rate multiplies them, so that it can change without compiling again.
_RULES = {
    "langevin": _DOWN,
    "gd": _DOWN,
    "sgd": _DOWN,
    "adam": optax.chain(optax.scale_by_adam(), _DOWN),
}
# Default learning rates times the largest curvature that a descent meets; descent is stable up to 2. At 0.1 Langevin's
# variances are 5 % too large in the stiffest direction, and less elsewhere.
_SHARE = {"langevin": 0.1, "gd": 0.5, "sgd": 0.5}
_ADAM = 0.01
# Time that a call into compiled code should take, and most steps of one.
_SECONDS, _MOST = 0.5, 100_000


def train(
    rng_key: jax.Array,
    network: Network,
    task: Task,
    *,
    optimizer: Optimizer = "langevin",
    learning_rate: float | None = None,
    weight_decay: float = 1.0,
    batch_size: int | None = None,
    num_steps: int = 5000,
    num_networks: int = 8,
    at: Sequence[int] = (0,),
    progress: bool = True,
) -> xr.DataTree:
    """Train an ensemble of networks from prior draws.

    Parameters
    ----------
    rng_key
        JAX key; the same key gives the same networks.
    network, task
        What to train, and on what.
    optimizer
        "langevin" (full batch, unadjusted: its stationary law is the posterior up to the step size), "gd", "sgd" (batches of
        patterns), "adam", or an optax transformation.
    learning_rate
        Step in the module's coordinates. By default, "adam": 0.01. Others: a share of the inverse of the largest
        curvature that a descent of 200 steps from the networks' starts meets, 0.1 ("langevin") or 0.5 ("gd"; "sgd": times the
        share of patterns in a batch); the value is recorded. An optax transformation has its own.
    weight_decay
        In units of the prior's: 1 is the posterior's, 0 none. Part of the loss, for "adam" too.
    batch_size
        Patterns per step, drawn without replacement, their misfit scaled up to that of all. Needed for "sgd", not for
        "langevin" and "gd".
    num_steps, num_networks
        Steps of training, and networks, trained side by side.
    at
        Steps to keep in the group training, beside the last one; 0 is the start.
    progress
        Show a bar when standard error is a terminal.

    Returns
    -------
    DataTree as `bayeskernel.measure` returns, of the networks at the last step. A group training holds kernel, output, loss and
    squared_error (mean over targets) with dimensions (network, training_step, ...), signs not aligned, and ``diverged``
    of every network. Networks with numbers that are not finite have diverged: they are in training alone.

    Raises
    ------
    InputError
        For options that do not fit each other, and where every network diverges.

    Notes
    -----
    At the default rate descent lowers the loss at every step, but for relu: its minima lie on kinks, about which steps go to
    and fro.

    Training is not kept on disk as it goes: after an interruption it starts again.
    """
    started = time.time()
    rng_key = check_key(rng_key)
    check_problem(network, task)
    name = optimizer if isinstance(optimizer, str) else "optax"
    _check_options(optimizer, learning_rate, batch_size, task.shape[1])
    for argument, count in (("num_steps", num_steps), ("num_networks", num_networks)):
        positive_integer(argument, count)
    decay = 0.0 if weight_decay == 0 else positive("weight_decay", weight_decay)
    kept = _checked_steps(at, num_steps)
    net, data = weights.structure(network, task.shape[0]), weights.arrays(network, task)
    rule = _RULES[optimizer] if isinstance(optimizer, str) else optimizer
    run = Run(net, rule, name == "langevin", batch_size)
    key_start, key_steps, key_probe = jax.random.split(rng_key, 3)
    z = starts(jax.random.split(key_start, num_networks), data, net)
    if learning_rate is None and name in _SHARE:
        curvature = steepest_curvature(
            jax.random.split(key_probe, num_networks), z, data, decay, net
        )
        share = 1.0 if batch_size is None else batch_size / task.shape[1]
        learning_rate = _SHARE[name] * share / float(jnp.max(curvature))
        if not np.isfinite(learning_rate):
            raise InputError("learning_rate", "a number, as curvatures are not finite", None)
    if learning_rate is None and name == "adam":
        learning_rate = _ADAM
    rate = 1.0 if learning_rate is None else learning_rate
    with training_bar(f"training, {name}", num_steps, progress) as report:
        rows = _trained(
            run, z, jax.random.split(key_steps, num_networks), data, rate, decay, kept, report
        )
    made = {
        "space": "trained",
        "optimizer": name,
        "learning_rate": learning_rate,
        "weight_decay": decay,
        "batch_size": batch_size,
        "num_steps": int(num_steps),
        "num_networks": int(num_networks),
        "rng_key": record.seed_data(rng_key),
        "backend": jax.default_backend(),
        "dtype": str(rows["kernel"].dtype),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
    }
    return arranged(rows, kept, network, task, made)


def arranged(
    rows: dict[str, np.ndarray], at: list[int], network: Network, task: Task, made: dict[str, Any]
) -> xr.DataTree:
    """Networks at their last step as draws, without those that diverged, and all of them along training.

    ``rows`` are kernel, output, loss and squared_error of shape (networks, len(at), ...).
    """
    finite = np.all([np.isfinite(v).all(axis=tuple(range(1, v.ndim))) for v in rows.values()], 0)
    if not finite.any():
        raise InputError(
            "learning_rate", "one at which a network stays finite", made["learning_rate"]
        )
    kernel, output = (rows[name][finite, -1] for name in ("kernel", "output"))
    made = made | {"left_out": np.flatnonzero(~finite).tolist()}
    tree = of_networks(kernel, output, network, task, made)
    shaped = {name: rows[name] for name in ("kernel", "output")}
    axes = record.node_axes(network.graph_of(task.shape[0]))
    path = record.dataset(shaped, axes).rename(chain="network", draw="training_step")
    for name in ("loss", "squared_error"):
        path[name] = (("network", "training_step"), rows[name])
    path["diverged"] = ("network", ~finite)
    tree["training"] = xr.DataTree(path.assign_coords(training_step=at))
    return tree


def _trained(
    run: Run,
    z: Position,
    keys: jax.Array,
    data: weights.Data,
    rate: float,
    decay: float,
    at: list[int],
    report: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """What is kept at some steps, (networks, len(at), ...); the last of them is the end."""
    state, done, chunk = State(z, jax.vmap(run.rule.init)(z)), 0, 1
    rows = list[dict[str, np.ndarray]]()
    for stop in at:
        while done < stop:
            n, began = min(chunk, stop - done), time.perf_counter()
            state = jax.block_until_ready(
                advance(state, keys, data, rate, decay, done, done + n, run)
            )
            chunk = int(np.clip(n * _SECONDS / (time.perf_counter() - began), 1, _MOST))
            done += n
            report(done)
        rows.append(jax.tree.map(np.asarray, observed(state.z, data, decay, run.net)))
    return {name: np.stack([row[name] for row in rows], 1) for name in rows[0]}


def _check_options(
    optimizer: object, learning_rate: object, batch_size: object, patterns: int
) -> None:
    known = isinstance(optimizer, str) and optimizer in _RULES
    own = isinstance(optimizer, optax.GradientTransformation)
    if not (known or own):
        expected = f"one of {sorted(_RULES)} or an optax transformation"
        raise InputError("optimizer", expected, repr(optimizer))
    if own and learning_rate is not None:
        expected = "none beside an optax transformation, which has its own"
        raise InputError("learning_rate", expected, learning_rate)
    if learning_rate is not None:
        positive("learning_rate", learning_rate)
    if optimizer in ("langevin", "gd") and batch_size is not None:
        raise InputError("batch_size", f"none, as {optimizer!r} takes all patterns", batch_size)
    if optimizer == "sgd" or batch_size is not None:
        expected = f"a whole number of the {patterns} patterns"
        if batch_size is None or positive_integer("batch_size", batch_size) > patterns:
            raise InputError("batch_size", expected, batch_size)


def _checked_steps(at: Sequence[int], num_steps: int) -> list[int]:
    """Steps to keep in order, the last one of training among them."""
    expected = f"steps from 0 to {num_steps}"
    steps = integers("at", at, expected)
    if any(not 0 <= step <= num_steps for step in steps):
        raise InputError("at", expected, list(at))
    return sorted({*steps, int(num_steps)})
