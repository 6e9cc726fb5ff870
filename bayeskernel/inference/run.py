"""Draw from the posterior and the prior of a network on a task."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import xarray as xr

from bayeskernel._precision import double, jit
from bayeskernel.errors import InputError, positive_integer
from bayeskernel.inference import chains, coordinates, kernel_space, record, weights
from bayeskernel.inference.checkpoint import Checkpoint, Draws, identity
from bayeskernel.inference.progress import chain_bars
from bayeskernel.inference.spaces import SPACES, weight_space
from bayeskernel.keys import check_key
from bayeskernel.memory import check_memory
from bayeskernel.network import Network, check_problem
from bayeskernel.problem import problem
from bayeskernel.tasks import Task

# Prior draws per compiled call; a call holds one draw's weights at a time.
_PRIOR_BATCH = 256
# Draws are held twice while those of all chains are joined.
_COPIES = 2


def sample(
    rng_key: jax.Array,
    network: Network,
    task: Task,
    *,
    space: Literal["auto", "weights", "preactivations", "kernels"] = "auto",
    sampler: Literal["auto", "nuts", "hmc"] = "auto",
    num_warmup: int = 500,
    num_samples: int = 1000,
    num_chains: int = 4,
    keep: Sequence[str] = (),
    checkpoint: str | os.PathLike[str] | None = None,
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
        Coordinates of the posterior, which is exact at any width in each of them: "weights"; "preactivations", with
        weights integrated out, in N T P dimensions instead of N^2; "kernels" for linear networks with N >= T P, at
        a cost that does not depend on N, always in float64. "auto" takes the one with fewest dimensions that can
        keep what ``keep`` names, and weights where N is below the number of independent sites, as kernels of so few
        units are nearly singular; the choice and its reason are recorded.
    sampler
        "hmc" (quarter-period trajectories, exact under the prior), "nuts" (NumPyro), or "auto":
        NUTS for kernels, HMC for the others.
    num_warmup, num_samples, num_chains
        Draws per chain for adaptation (not returned), draws per chain that are returned, and number of chains,
        which run in parallel threads.
    keep
        What to store besides kernels and outputs: "weights" (space "weights"), "preactivations"
        (with the readout weights). Without it memory per draw does not grow with the width.
    checkpoint
        Folder in which the run is saved as it goes, warm-up included. After any interruption the same call
        continues from there, and its draws are bit-identical to those of an uninterrupted run on the same machine
        and versions; a folder of another run is refused. Draws stay on disk: memory does not grow with their
        number, and the result reads what is needed from ``draws.nc`` in the folder.
    progress
        Show a bar per chain when standard error is a terminal.

    Returns
    -------
    DataTree in ArviZ's schema: posterior (kernel, preactivation_kernel, output, and what ``keep`` names),
    sample_stats, observed_data, constant_data, and attributes that describe the run. With ArviZ 0.23
    use ``arviz.from_datatree`` on it.

    Notes
    -----
    Draws are in JAX's default float type (float32 unless 64-bit JAX is enabled). Signs that the
    network's symmetry leaves free differ between chains; `compare` aligns them.
    """
    run, _ = _sample(
        rng_key,
        network,
        task,
        False,
        space=space,
        sampler=sampler,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        keep=keep,
        checkpoint=checkpoint,
        progress=progress,
    )
    return run


def sample_with_units(
    rng_key: jax.Array, network: Network, task: Task, **options: Any
) -> tuple[xr.DataTree, xr.DataTree]:
    """What `sample` returns, and the last draw of its first chain with pre-activations, kept in any space.

    A run of one draw, for `bayeskernel.weights`, at no memory for the others.
    """
    run, last = _sample(rng_key, network, task, True, **options)
    assert last is not None
    return run, last


def _sample(
    rng_key: jax.Array,
    network: Network,
    task: Task,
    units: bool,
    *,
    space: Literal["auto", "weights", "preactivations", "kernels"] = "auto",
    sampler: Literal["auto", "nuts", "hmc"] = "auto",
    num_warmup: int = 500,
    num_samples: int = 1000,
    num_chains: int = 4,
    keep: Sequence[str] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> tuple[xr.DataTree, xr.DataTree | None]:
    started = time.time()
    rng_key = check_key(rng_key)
    check_problem(network, task)
    keep = _checked(space, sampler, keep)
    positive_integer("num_warmup", num_warmup, minimum=0)
    for name, count in (("num_samples", num_samples), ("num_chains", num_chains)):
        positive_integer(name, count)
    at_once = num_samples if checkpoint is None else 0
    _check_memory(network, task, space, keep, at_once, num_chains)
    chosen = _choose(space, network, task, keep)
    if sampler == "auto":
        sampler = "nuts" if chosen.name == "kernels" else "hmc"
    engine = _sampler(chosen.name, chosen.static, sampler, num_warmup, keep)
    kept = None
    options = {
        "space": chosen.name,
        "sampler": sampler,
        "num_warmup": num_warmup,
        "num_samples": num_samples,
        "num_chains": num_chains,
    }
    if checkpoint is not None:
        layout = options | {"keep": list(keep), "double": double()}
        kept = Checkpoint(checkpoint, identity(network, task, record.seed_data(rng_key), layout))
        if (finished := kept.finished()) is not None:
            return finished, None
    keys = jax.random.split(rng_key, num_chains)
    title = f"{chosen.name}, {sampler} ({chosen.reason})"
    with (
        chain_bars(title, num_chains, num_warmup + num_samples, progress) as report,
        jax.enable_x64(chosen.name == "kernels" or double()),
    ):
        draws, state = chains.run(engine, chosen.data, keys, num_warmup, num_samples, report, kept)
        last = engine.units(state, chosen.data) if units else {}
    settings = {
        **options,
        "space_reason": chosen.reason,
        "rng_key": record.seed_data(rng_key),
        "backend": jax.default_backend(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
    }

    def arrange(draws: Draws) -> xr.DataTree:
        dtype = {"dtype": str(draws["kernel"].dtype)}
        return record.to_datatree(draws, "posterior", network, task, settings | dtype)

    whole = arrange(draws) if kept is None else kept.finish(num_chains, num_samples, arrange)
    return whole, (
        arrange({k: np.asarray(v)[None, None] for k, v in last.items()}) if last else None
    )


def sample_prior(
    rng_key: jax.Array, network: Network, task: Task, *, num_samples: int = 1000
) -> xr.DataTree:
    """Draw kernels and outputs from the prior; the draws are independent.

    Returns
    -------
    DataTree with groups prior (kernel, preactivation_kernel, output; one chain), observed_data and
    constant_data.
    """
    rng_key = check_key(rng_key)
    check_problem(network, task)
    positive_integer("num_samples", num_samples)
    net, arrays = weights.structure(network, task.shape[0]), weights.arrays(network, task)
    keys = jax.random.split(rng_key, num_samples)
    parts = [
        _prior_batch(keys[i : i + _PRIOR_BATCH], arrays, net)
        for i in range(0, num_samples, _PRIOR_BATCH)
    ]
    draws = {k: np.concatenate([np.asarray(part[k]) for part in parts])[None] for k in parts[0]}
    settings = {"num_samples": num_samples, "rng_key": record.seed_data(rng_key)}
    return record.to_datatree(draws, "prior", network, task, settings)


def _check_memory(
    network: Network, task: Task, space: str, keep: tuple[str, ...], draws: int, num_chains: int
) -> None:
    """Refuse draws that would not fit, as ``draws`` of each chain or as many as a call into compiled code makes."""
    net = weights.structure(network, task.shape[0])
    sites = net.graph.size * task.shape[1]
    numbers = 2 * sites**2 + task.targets.size  # both kernels, outputs
    if "preactivations" in keep:
        numbers += sites * net.width
    if "weights" in keep:
        shapes = weights.site_shapes(net, task.shape[2], task.shape[3]).values()
        numbers += sum(int(np.prod(shape)) for shape in shapes)
    if draws > chains.CHUNK:
        argument, instead = "num_samples", "fewer draws, or a checkpoint, which keeps them on disk"
    else:
        argument, instead, draws = "inputs", "fewer patterns, steps or chains", chains.CHUNK
    made_of = f"{num_chains} * {draws:,} draws of {numbers:,} numbers"
    size = _COPIES * num_chains * draws * numbers * (8 if _double(space, network, keep) else 4)
    check_memory(argument, made_of, size, instead)


def _double(space: str, network: Network, keep: tuple[str, ...]) -> bool:
    """Whether chains are in float64, as always in kernel space, where "auto" ends for linear networks if nothing is kept."""
    return double() or space == "kernels" or (space == "auto" and network.phi.linear and not keep)


class _Choice(NamedTuple):
    name: str
    reason: str
    static: weights.Structure | coordinates.Coordinates
    data: Any


def _choose(space: str, network: Network, task: Task, keep: tuple[str, ...]) -> _Choice:
    """Pick the space, and say why."""
    name, reason = space, "as asked"
    if space == "auto" and "weights" in keep:
        name, reason = "weights", "weights are to be kept"
    if name != "weights":
        defined = problem(network, task)
        # Which sites are pivots depends on the precision of the chains.
        with jax.enable_x64(_double(space, network, keep)):
            form = coordinates.coordinates(defined, coordinates.find_pivots(defined))
        if name == "auto":
            name, reason = _smallest(network, task, form, keep)
    if name == "weights":
        net = weights.structure(network, task.shape[0])
        return _Choice(name, reason, net, weights.arrays(network, task))
    if name == "kernels":
        kernel_space.check(form)
        form = form._replace(width=0)
    with jax.enable_x64(name == "kernels" or double()):
        return _Choice(name, reason, form, coordinates.arrays(defined))


def _smallest(
    network: Network, task: Task, form: coordinates.Coordinates, keep: tuple[str, ...]
) -> tuple[str, str]:
    if form.width < form.rank:
        reason = f"fewer units than independent sites ({form.width} < {form.rank})"
        return "weights", f"{reason}: kernels are nearly singular"
    net = weights.structure(network, task.shape[0])
    shapes = weights.site_shapes(net, task.shape[2], task.shape[3]).values()
    count = {
        "weights": sum(int(np.prod(shape)) for shape in shapes),
        "preactivations": form.rank * form.width,
    }
    if form.phi.name == "linear" and not keep:
        count["kernels"] = form.rank * (form.rank + 1) // 2
    best = min(count, key=lambda name: count[name])
    sizes = ", ".join(f"{name} {n}" for name, n in count.items())
    return best, f"fewest dimensions ({sizes})"


@lru_cache(maxsize=32)
def _sampler(
    name: str,
    static: weights.Structure | coordinates.Coordinates,
    algorithm: str,
    num_warmup: int,
    keep: tuple[str, ...],
) -> chains.Sampler:
    """Keep compiled samplers: a sweep over data, scales or signal compiles once."""
    space = SPACES[name](static)
    if not set(keep) <= set(space.can_keep):
        raise InputError("keep", f"a subset of {space.can_keep} in space {name!r}", keep)
    return chains.build(space, algorithm, num_warmup, keep)


@partial(jit, static_argnums=2)
def _prior_batch(
    keys: jax.Array, data: weights.Data, net: weights.Structure
) -> dict[str, jax.Array]:
    space = weight_space(net)

    def one(key: jax.Array) -> dict[str, jax.Array]:
        return space.observe(key, space.draw_prior(key, data), data, ())

    return jax.lax.map(one, keys)


def _checked(space: str, sampler: str, keep: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(space, str) or space not in ("auto", *SPACES):
        raise InputError("space", "'auto', 'weights', 'preactivations' or 'kernels'", repr(space))
    if not isinstance(sampler, str) or sampler not in ("auto", "nuts", "hmc"):
        raise InputError("sampler", "'auto', 'nuts' or 'hmc'", repr(sampler))
    allowed = ("weights", "preactivations")
    if not isinstance(keep, (tuple, list)) or any(name not in allowed for name in keep):
        raise InputError("keep", f"a sequence drawn from {allowed}", repr(keep))
    return tuple(sorted(set(keep)))
