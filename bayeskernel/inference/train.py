r"""What do networks learn that are trained step by step? Ensembles in the coordinates of the posterior.

Weights are z ~ N(0, 1) times their prior scales (`weights`), starts are prior draws, and what is minimised is

    loss(z) = sum over targets (f - y)^2 / (2 s^2) + weight_decay |z|^2 / 2,      s^2 = noise / N, noise in standard scaling,

up to a constant minus the log posterior at weight decay 1. Langevin training adds noise (`descent`): for small steps r its
stationary law is the posterior. Networks differ in their start, their noise and their batches.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr

from bayeskernel.errors import InputError, integers, positive, positive_integer
from bayeskernel.inference import record, weights
from bayeskernel.inference.checkpoint import Checkpoint, Draws, identity
from bayeskernel.inference.descent import Position, Run, starts, steepest_curvature
from bayeskernel.inference.ensemble import Course, train_ensemble
from bayeskernel.inference.measure import of_networks
from bayeskernel.inference.progress import training_bar
from bayeskernel.inference.storage import save
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
# Default learning rates times the largest curvature that a descent meets; all are stable up to 2.
_SHARE = {"langevin": 0.8, "gd": 0.5, "sgd": 0.5}
_ADAM = 0.01
# Starts whose descents are probed; curvatures of wide networks hardly differ.
_PROBED = 4
# Steps of the trace, from which it is judged whether training has come to its end.
_SEEN = 100


def train(
    rng_key: jax.Array,
    network: Network,
    task: Task,
    *,
    optimizer: Optimizer = "langevin",
    learning_rate: float | None = None,
    weight_decay: float = 1.0,
    batch_size: int | None = None,
    num_steps: int = 10_000,
    num_networks: int = 8,
    at: Sequence[int] = (0,),
    keep: Sequence[str] = (),
    checkpoint: str | os.PathLike[str] | None = None,
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
        Step size in the coordinates of the module. Default: 0.01 for "adam"; for the others 0.8 ("langevin") or 0.5
        times the inverse of the largest curvature that descents of 200 steps from up to four of the starts meet
        ("sgd": times the share of patterns in a batch). The value is recorded. An optax transformation has its own.
    weight_decay
        In units of the prior: 1 is that of the posterior, 0 is none. It is part of the loss, also for "adam".
    batch_size
        Patterns per step, drawn without replacement; their squared error is scaled up to that of all patterns.
        Required for "sgd", not for "langevin" and "gd".
    num_steps, num_networks
        Number of training steps, and of networks, which are trained together.
    at
        Steps whose kernels are kept in the group training, in addition to the last one; 0 is the start.
    keep
        ("weights",) stores the weights at the end, with the names and scales of `bayeskernel.weights`.
    checkpoint
        Folder in which training is saved as it goes. After any interruption the same call continues from there, and
        its networks are bit-identical to those of an uninterrupted call on the same machine and versions; a folder
        of another call is refused. The files are as large as the weights, three times as large for "adam".
    progress
        Show a bar with the mean loss when standard error is a terminal.

    Returns
    -------
    DataTree as `bayeskernel.measure` returns, of the networks at the last step. A group training holds kernel, output, loss and
    squared_error (mean over targets) with dimensions (network, training_step, ...), signs not aligned, and ``diverged``
    of every network. A group trace holds loss, squared_error and the norms of the kernel's blocks at some hundred steps, from
    which `bayeskernel.diagnose` judges whether training has come to its end. Networks with numbers that are not finite have
    diverged: they are in these two groups alone.

    Raises
    ------
    InputError
        For options that do not fit each other, and if every network diverges.

    Notes
    -----
    At the default rate descent lowers the loss at every step, except for relu: its minima lie on kinks, around
    which steps oscillate.

    The distribution that Langevin dynamics samples has an error of order (r c)^2, with learning rate r and
    curvature c, and only where the loss is not quadratic: steep directions move all units together and are
    quadratic up to d / N for d sites. The setting ``step_size_error``, (r c)^2 d / N with the largest c met by the
    descents, estimates the relative error of variances in the steepest direction; measured errors
    (docs/calibration) are smaller.
    """
    started = time.time()
    rng_key = check_key(rng_key)
    check_problem(network, task)
    name = optimizer if isinstance(optimizer, str) else "optax"
    _check_options(optimizer, learning_rate, batch_size, task.shape[1])
    num_steps = positive_integer("num_steps", num_steps)
    num_networks = positive_integer("num_networks", num_networks)
    decay = 0.0 if weight_decay == 0 else positive("weight_decay", weight_decay)
    kept = _checked_steps(at, num_steps)
    if not isinstance(keep, (tuple, list)) or any(name != "weights" for name in keep):
        raise InputError("keep", "() or ('weights',)", repr(keep))
    net, data = weights.structure(network, task.shape[0]), weights.arrays(network, task)
    rule = _RULES[optimizer] if isinstance(optimizer, str) else optimizer
    run = Run(net, rule, name == "langevin", batch_size)
    key_start, key_steps, key_probe = jax.random.split(rng_key, 3)
    z = starts(jax.random.split(key_start, num_networks), data, net)
    options = {
        "weight_decay": decay,
        "batch_size": batch_size,
        "num_steps": num_steps,
        "num_networks": num_networks,
        "keep": sorted({*keep}),
    }
    disk = None
    if checkpoint is not None:
        asked = {
            "optimizer": name if isinstance(optimizer, str) else _described(optimizer, z),
            "learning_rate": learning_rate,
            **options,
            "at": kept[:-1],
            "double": data.inputs.dtype == jnp.float64,
        }
        disk = Checkpoint(checkpoint, identity(network, task, record.seed_data(rng_key), asked))
        if (finished := disk.finished()) is not None:
            return finished
    curvature = None
    if name == "langevin" or (learning_rate is None and name in _SHARE):
        curvature = _curvature(jax.random.split(key_probe, num_networks), z, data, decay, net)
    if learning_rate is None and name == "adam":
        learning_rate = _ADAM
    if learning_rate is None and curvature is not None:
        share = 1.0 if batch_size is None else batch_size / task.shape[1]
        learning_rate = _SHARE[name] * share / curvature
    rate = 1.0 if learning_rate is None else learning_rate
    seen = _seen(num_steps, kept)
    course = Course(run, data, rate, decay, seen, frozenset(kept), bool(keep))
    with training_bar(f"training, {name}", num_networks, num_steps, progress) as report:
        rows = train_ensemble(course, z, jax.random.split(key_steps, num_networks), report, disk)
    made = {
        **options,
        "space": "trained",
        "optimizer": name,
        "learning_rate": learning_rate,
        "at": kept,
        "rng_key": record.seed_data(rng_key),
        "backend": jax.default_backend(),
        "dtype": str(rows["kernel"].dtype),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
    }
    if name == "langevin" and curvature is not None:
        sites = int(np.prod(rows["kernel"].shape[2:4]))
        error = (rate * curvature) ** 2 * sites / network.width
        made |= {"curvature": curvature, "step_size_error": error}
    tree = arranged(rows, list(course.seen), network, task, made)
    return tree if disk is None else disk.conclude(partial(save, tree))


def arranged(
    rows: Draws, seen: list[int], network: Network, task: Task, made: dict[str, Any]
) -> xr.DataTree:
    """Networks at their last step as draws, without those that diverged, and all of them along training.

    ``rows`` are kernel and output (networks, len(at), ...), loss, squared_error and norm (networks, len(seen), ...), and
    weights (networks, ...), at the steps that ``made`` and ``seen`` name.
    """
    finite = np.all([np.isfinite(v).all(axis=tuple(range(1, v.ndim))) for v in rows.values()], 0)
    if not finite.any():
        raise InputError(
            "learning_rate", "one at which a network stays finite", made["learning_rate"]
        )
    made = made | {"left_out": np.flatnonzero(~finite).tolist()}
    ends = {name: rows[name][finite, -1] for name in ("kernel", "output")}
    ends |= {name: values[finite] for name, values in rows.items() if name.endswith("_weights")}
    tree = of_networks(ends, network, task, made)
    axes, at = record.node_axes(network.graph_of(task.shape[0])), made["at"]
    path = _along({name: rows[name] for name in ("kernel", "output")}, at, axes)
    trace = _along({"norm": rows["norm"]}, seen, axes)
    for name in ("loss", "squared_error"):
        trace[name] = (("network", "training_step"), rows[name])
        path[name] = trace[name].sel(training_step=at)
    path["diverged"] = ("network", ~finite)
    tree["training"], tree["trace"] = xr.DataTree(path), xr.DataTree(trace)
    return tree


def _curvature(
    keys: jax.Array, z: Position, data: weights.Data, decay: float, net: weights.Structure
) -> float:
    """Largest that descents from the first networks' starts meet."""
    first = jax.tree.map(lambda x: x[:_PROBED], z)
    found = float(jnp.max(steepest_curvature(keys[:_PROBED], first, data, decay, net)))
    if not np.isfinite(found):
        raise InputError("learning_rate", "a number, as curvatures are not finite", None)
    return found


def _along(values: Draws, steps: list[int], axes: dict[str, list[Any]]) -> xr.Dataset:
    data = record.dataset(values, axes).rename(chain="network", draw="training_step")
    return data.assign_coords(training_step=steps)


def _described(rule: optax.GradientTransformation, z: Position) -> str:
    """What an optax transformation computes, for telling one from another."""
    one = jax.tree.map(lambda x: x[0], z)
    made = jax.make_jaxpr(lambda z: rule.update(z, rule.init(z), z))(one)
    code = re.sub(r"0x[0-9a-f]+", "", str(made.jaxpr)).encode()
    constants = [np.asarray(c).tobytes() for c in made.consts]
    return "optax " + hashlib.sha256(b"".join([code, *constants])).hexdigest()[:16]


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


def _seen(num_steps: int, kept: list[int]) -> tuple[int, ...]:
    """Steps of the trace: evenly spaced, before the first of them powers of two, and those that are kept."""
    even = {int(step) for step in np.linspace(0, num_steps, _SEEN + 1).round()}
    early = {2**k for k in range(num_steps.bit_length()) if 2**k * _SEEN < num_steps}
    return tuple(sorted(even | early | {*kept}))


def _checked_steps(at: Sequence[int], num_steps: int) -> list[int]:
    """Steps to keep in order, the last one of training among them."""
    expected = f"steps from 0 to {num_steps}"
    steps = integers("at", at, expected)
    if any(not 0 <= step <= num_steps for step in steps):
        raise InputError("at", expected, list(at))
    return sorted({*steps, num_steps})
