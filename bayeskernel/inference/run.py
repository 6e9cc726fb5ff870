"""Draw from the posterior and the prior of a network on a task."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import jax
import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

from bayeskernel.errors import InputError, positive_integer
from bayeskernel.inference import chains, record, weights
from bayeskernel.inference.progress import chain_bars
from bayeskernel.inference.space import weight_space
from bayeskernel.network import Network
from bayeskernel.tasks import Task

# Prior draws per compiled call; a call holds one draw's weights at a time.
_PRIOR_BATCH = 256


def sample(
    rng_key: jax.Array,
    network: Network,
    task: Task,
    *,
    space: Literal["weights"] = "weights",
    sampler: Literal["nuts", "hmc"] = "nuts",
    num_warmup: int = 500,
    num_samples: int = 1000,
    num_chains: int = 4,
    keep: Sequence[str] = (),
    progress: bool = True,
) -> xr.DataTree:
    """Sample the posterior of a network given a task.

    Parameters
    ----------
    rng_key
        JAX key; the same key gives the same draws.
    network, task
        What to sample.
    space
        Coordinates: "weights" (NumPyro model over all weights, exact at any width).
    sampler
        "nuts", or "hmc" with trajectories of a quarter period of the prior.
    num_warmup, num_samples, num_chains
        Draws per chain to adapt on (not returned) and to return; chains run in parallel threads.
    keep
        What to store besides kernels and outputs: "weights", "preactivations". Without it memory
        per draw does not grow with the width.
    progress
        Show a bar per chain when standard error is a terminal.

    Returns
    -------
    DataTree in ArviZ's schema: posterior (kernel, preactivation_kernel, output, what was kept),
    sample_stats, observed_data, constant_data, and attributes that describe the run. With ArviZ 0.23
    use ``arviz.from_datatree`` on it.

    Notes
    -----
    Draws are in JAX's default float type (float32 unless 64-bit JAX is enabled). Signs that the
    network's symmetry leaves free differ between chains; `compare` aligns them.
    """
    started = time.time()
    rng_key = record.check_key(rng_key)
    keep = _checked(space, sampler, keep)
    positive_integer("num_warmup", num_warmup, minimum=0)
    for name, count in (("num_samples", num_samples), ("num_chains", num_chains)):
        positive_integer(name, count)
    engine = _sampler(weights.structure(network, task.shape[0]), sampler, num_warmup, keep)
    keys = jax.random.split(rng_key, num_chains)
    with chain_bars(num_chains, num_warmup + num_samples, progress) as report:
        given = weights.data(network, task)
        draws = chains.run(engine, given, keys, num_warmup, num_samples, report)
    settings = {
        "space": space,
        "sampler": sampler,
        "num_warmup": num_warmup,
        "num_samples": num_samples,
        "num_chains": num_chains,
        "rng_key": record.seed_data(rng_key),
        "dtype": str(draws["kernel"].dtype),
        "backend": jax.default_backend(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
    }
    return record.to_datatree(draws, "posterior", network, task, settings)


def sample_prior(
    rng_key: jax.Array, network: Network, task: Task, *, num_samples: int = 1000
) -> xr.DataTree:
    """Draw kernels and outputs from the prior; independent draws, no chain needed.

    Returns
    -------
    DataTree with groups prior (kernel, preactivation_kernel, output; one chain), observed_data and
    constant_data.
    """
    rng_key = record.check_key(rng_key)
    positive_integer("num_samples", num_samples)
    net, given = weights.structure(network, task.shape[0]), weights.data(network, task)
    keys = jax.random.split(rng_key, num_samples)
    parts = [
        _prior_batch(keys[i : i + _PRIOR_BATCH], given, net)
        for i in range(0, num_samples, _PRIOR_BATCH)
    ]
    draws = {k: np.concatenate([np.asarray(part[k]) for part in parts])[None] for k in parts[0]}
    settings = {"num_samples": num_samples, "rng_key": record.seed_data(rng_key)}
    return record.to_datatree(draws, "prior", network, task, settings)


def predict(
    rng_key: jax.Array, draws: xr.DataTree, network: Network, task: Task, inputs: ArrayLike
) -> xr.Dataset:
    """Posterior draws of the network's outputs for new patterns.

    Parameters
    ----------
    rng_key
        Reserved for spaces in which new patterns are random given a draw; weights determine them.
    draws
        From `sample` with ``keep=("weights",)``.
    network, task
        Those the draws were made with.
    inputs
        Shape (T, P*, D).

    Returns
    -------
    Dataset with ``output`` (chain, draw, step, pattern, output_unit), without observation noise.
    """
    record.check_key(rng_key)
    record.check_same_run(draws, network, task)
    array = np.asarray(inputs)
    new = Task(array, np.zeros(array.shape[:2]))
    steps, _, features, outputs = task.shape
    if (new.shape[0], new.shape[2]) != (steps, features):
        raise InputError("inputs", f"shape ({steps}, P*, {features})", f"shape {array.shape}")
    posterior = draws["posterior"]
    if "readout_weights" not in posterior:
        raise InputError("draws", 'draws made with keep=("weights",)', "draws without weights")
    net = weights.structure(network, steps)
    given = weights.data(network, Task(new.inputs, np.zeros((*new.shape[:2], outputs))))
    stored = {
        name: posterior[f"{name}_weights"].to_numpy()
        for name in ("recurrent", "input", "readout")
        if f"{name}_weights" in posterior
    }
    lead = stored["readout"].shape[:2]
    flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in stored.items()}
    output = np.asarray(_outputs(flat, given, net))
    return record.dataset({"output": output.reshape(*lead, *output.shape[1:])})


@lru_cache(maxsize=32)
def _sampler(
    net: weights.Structure, algorithm: str, num_warmup: int, keep: tuple[str, ...]
) -> chains.Sampler:
    """Keep compiled samplers: a sweep over data, scales or signal compiles once."""
    return chains.build(weight_space(net), algorithm, num_warmup, keep)


@jax.jit(static_argnums=2)
def _prior_batch(
    keys: jax.Array, given: weights.Data, net: weights.Structure
) -> dict[str, jax.Array]:
    space = weight_space(net)
    return jax.lax.map(lambda key: space.observe(space.draw_prior(key, given), given), keys)


@jax.jit(static_argnums=2)
def _outputs(
    stored: dict[str, jax.Array], given: weights.Data, net: weights.Structure
) -> jax.Array:
    def one(w: dict[str, jax.Array]) -> jax.Array:
        unit = weights.scale_sites({name: jax.numpy.ones(()) for name in w}, net, given)
        return weights.forward({name: w[name] / unit[name] for name in w}, net, given)[1]

    return jax.lax.map(one, stored)


def _checked(space: str, sampler: str, keep: Sequence[str]) -> tuple[str, ...]:
    if space != "weights":
        raise InputError("space", "'weights'", repr(space))
    if sampler not in ("nuts", "hmc"):
        raise InputError("sampler", "'nuts' or 'hmc'", repr(sampler))
    allowed = ("weights", "preactivations")
    if isinstance(keep, str) or not set(keep) <= set(allowed):
        raise InputError("keep", f"a sequence drawn from {allowed}", repr(keep))
    return tuple(sorted(set(keep)))
