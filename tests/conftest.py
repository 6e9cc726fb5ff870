from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# Workers and interpreters with the same jaxlib share compiled code; must be set before JAX starts. Tests therefore use few
# shapes: kernels of linear networks are sampled after 300 transitions of warm-up, mostly of one pattern at three steps.
_CACHE = Path(__file__).parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Two workers on two cores: threads of BLAS, which small matrices do not need, would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import bayeskernel as bk
from bayeskernel.gauge import flip_kernel
from bayeskernel.inference import weights
from bayeskernel.inference.record import to_datatree

# Linux grants a process 65,530 memory maps; every compiled function holds some, and XLA crashes
# when they run out.
_MOST_MAPS = 20_000


@pytest.fixture(autouse=True)
def bounded_compiled_code() -> Iterator[None]:
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()


@pytest.fixture
def own_compiled_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For processes that are killed or run out of disk: what they leave half written, no other test may read."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))


class Done(NamedTuple):
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Run the command line in a folder of its own."""
    from bayeskernel import cli

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["bayeskernel", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return Done(int(end.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def table1_task() -> bk.Task:
    """One pattern, D = 1, input at step 1, target 4.5 at step 3."""
    return bk.tasks.endpoint([[1.0]], [4.5], steps=3)


def make_general_task() -> bk.Task:
    """Inputs at every step, two outputs, a supervision mask that differs between outputs."""
    rng = np.random.default_rng(7)
    targets = np.full((4, 2, 2), np.nan)
    targets[3] = rng.normal(size=(2, 2))
    targets[1, 0, 0] = 0.7
    targets[2, 1, 1] = -0.4
    return bk.Task(rng.normal(size=(4, 2, 3)), targets)


@pytest.fixture
def general_task() -> bk.Task:
    return make_general_task()


def fake_draws(
    theory: bk.MeanField,
    offset: float = 0.0,
    count: int = 500,
    flips: bool = False,
    seed: int = 0,
    **kept: tuple[int, ...],
) -> xr.DataTree:
    """Independent draws around the theory with its own spread, without running a chain.

    ``kept`` are names and shapes of what else is stored, standard normal.
    """
    rng = np.random.default_rng(seed)
    std, size = theory.kernel_std(), theory.kernel.shape
    noise = rng.normal(size=(4, count, *size)) * std
    kernel = theory.kernel + offset * std + (noise + noise.transpose(0, 1, 4, 5, 2, 3)) / 2
    if flips:
        kernel[1] = flip_kernel(kernel[1], np.array([1, -1, 1]))
    output = np.broadcast_to(theory.output, (4, count, *theory.output.shape)).copy()
    stats = {"diverging": np.zeros((4, count), bool), "n_steps": np.ones((4, count), int)}
    stats |= {"lp": rng.normal(size=(4, count)), "energy": rng.normal(size=(4, count))}
    more = {name: rng.normal(size=(4, count, *shape)) for name, shape in kept.items()}
    draws = {"kernel": kernel, "output": output, **stats, **more}
    return to_datatree(draws, "posterior", theory.network, theory.task, {"sampler": "nuts"})


def as_run(made: dict[str, np.ndarray], network: bk.Network, task: bk.Task) -> xr.DataTree:
    """Draws made by hand, (chain, draw, ...), as those of a run whose statistics do not matter."""
    still = np.zeros(made["kernel"].shape[:2])
    statistics = dict.fromkeys(("lp", "energy", "n_steps", "diverging"), still)
    return to_datatree(made | statistics, "posterior", network, task, {"sampler": "hmc"})


def normals(net: weights.Structure, task: bk.Task, seed: int = 0) -> dict[str, jax.Array]:
    """Standard normal variables of all sites, drawn by NumPy, which compiles for no shape."""
    shapes, rng = weights.site_shapes(net, *task.shape[2:]), np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


@pytest.fixture
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield
