"""A sweep written down: what `bayeskernel sweep` reads."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bayeskernel import tasks
from bayeskernel.errors import InputError, integers, mapping
from bayeskernel.network import Network
from bayeskernel.sharing import Sharing
from bayeskernel.sweeps.grid import SIZES, TaskOrMaker
from bayeskernel.tasks import Task
from bayeskernel.tasks.trials import TRIALS


def _digits(patterns: int | None = None, **given: Any) -> Task:
    """`bayeskernel.tasks.digits`, also of so many patterns in all."""
    if patterns is not None:
        classes = len(given.get("classes", (0, 1)))
        if patterns % classes:
            raise InputError("patterns", f"a multiple of the {classes} classes", patterns)
        given["patterns_per_class"] = patterns // classes
    return _called("[task]", tasks.digits, given)


_MAKERS: dict[str, Callable[..., Task]] = {
    "endpoint": tasks.endpoint,
    "digits": _digits,
    "sunspots": tasks.sunspots,
    "sine": tasks.sine,
    "linear_teacher": tasks.linear_teacher,
    **TRIALS,
}
_SPACINGS: dict[str, Callable[..., Any]] = {"linear": np.linspace, "log": np.geomspace}
_TABLES = ("task", "network", "grid", "sample", "solve")


def read_description(file: Path) -> dict[str, Any]:
    """Arguments of `bayeskernel.sweep` from a TOML file.

    ``[task]`` holds ``name`` and the arguments of that function of `bayeskernel.tasks` (``seed`` instead of a
    key, 0 for ``linear_teacher`` if not given); ``[network]`` those of `Network`; ``[grid]`` lists, or tables with
    ``start``, ``stop`` and ``count`` for evenly spaced values (``spacing = "log"`` for equal ratios); ``[sample]``
    options of `sample`; ``solve`` is true or false.
    """
    try:
        given = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError("FILE", "a TOML file", f"{file}: {error}") from None
    unknown = [name for name in given if name not in _TABLES]
    if unknown:
        raise InputError("FILE", f"nothing but {_TABLES}", unknown)
    for name in ("task", "grid"):
        if name not in given:
            raise InputError("FILE", f"a table [{name}]", "none")
    network = mapping("[network]", given.get("network", {}))
    if isinstance(network.get("sharing"), dict):
        network["sharing"] = _called("[network] sharing", Sharing, network["sharing"])
    grid = {k: _spaced(k, v) for k, v in mapping("[grid]", given["grid"]).items()}
    return {
        "network": _called("[network]", Network, {"width": 1024} | network),
        "task": _task(mapping("[task]", given["task"]), [name for name in SIZES if name in grid]),
        "grid": grid,
        "sample": given.get("sample"),
        "solve": given.get("solve", True),
    }


def _task(given: dict[str, Any], sizes: list[str]) -> TaskOrMaker:
    name = given.pop("name", None)
    if name not in _MAKERS:
        raise InputError("[task] name", f"one of {sorted(_MAKERS)}", repr(name))
    make = _MAKERS[name]
    takes_key = "rng_key" in inspect.signature(make).parameters
    if name == "linear_teacher" or (takes_key and "seed" in given):
        (seed,) = integers("[task] seed", [given.pop("seed", 0)], "a whole number")
        make = partial(make, rng_key=jax.random.key(seed))
    if not sizes:
        return _called("[task]", make, given)
    taken = [size for size in sizes if size in given]
    if taken:
        raise InputError(f"[task] {taken[0]}", f"none, as [grid] has {taken[0]}", given[taken[0]])
    return lambda *numbers: _called("[task]", make, given | dict(zip(sizes, numbers, strict=True)))


def _called(where: str, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise InputError(
            where, f"arguments of {getattr(function, '__name__', 'the task')}", str(error)
        ) from None
    return function(**arguments)


def _spaced(name: str, values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    given = {"spacing": "linear"} | values
    try:
        start, stop, count = (float(given.pop(k)) for k in ("start", "stop", "count"))
        spaced = _SPACINGS[given.pop("spacing")](start, stop, int(count))
        if given or not count.is_integer() or not np.all(np.isfinite(spaced)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        expected = "a list, or start, stop, count and optionally spacing = 'linear' or 'log'"
        raise InputError(f"[grid] {name}", expected, values) from None
    return spaced.tolist()
