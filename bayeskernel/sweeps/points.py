"""What is computed at the points of a sweep, and what is kept of it.

A *job* is what one worker does at a time: theory along a line, or samples at a point. It writes its results
itself, a sealed file for each point, and reports only whether that went well. An error that would come again,
such as a task the theory refuses, is kept as the point's result; others are left for the next call.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from bayeskernel.errors import BayesKernelError
from bayeskernel.exchange import matched, pattern_symmetry
from bayeskernel.gauge import canonical, sign_symmetry
from bayeskernel.inference.convergence import kernel_moments, mean_and_error
from bayeskernel.inference.diagnose import diagnose, gauge_fixed
from bayeskernel.inference.record import kernel_and_output
from bayeskernel.inference.run import sample
from bayeskernel.inference.storage import StorageError, check_seal, read_arrays, write_arrays
from bayeskernel.meanfield.fluctuations import FluctuationError
from bayeskernel.meanfield.path import solve_path
from bayeskernel.meanfield.solve import MeanField
from bayeskernel.network import Network
from bayeskernel.problem import Floats
from bayeskernel.tasks import Task

Result = dict[str, np.ndarray]


class TheoryJob(NamedTuple):
    """Theory along a line.

    Attributes
    ----------
    network, task
        Of the line.
    signals
        All of them: a path cut short would lead to other particles.
    files
        Where results go, one a signal.
    """

    network: Network
    task: Task
    signals: tuple[float, ...]
    files: tuple[Path, ...]

    def run(self) -> None:
        """Go up and down the line; results are complete, and written, on the way down."""
        up: dict[int, MeanField] = {}
        for direction, k, theory in solve_path(self.network, self.task, self.signals):
            if direction == "up":
                up[k] = theory
            elif not valid(self.files[k]):
                write(self.files[k], _theory_result(up[k], theory))


class SampleJob(NamedTuple):
    """Samples at one point.

    Attributes
    ----------
    key, network, task, options
        For `sample`.
    files
        Where the result goes, one file.
    theory
        Where the kernel is kept whose signs draws are brought to; None if theory is not solved.
    """

    key: NDArray[np.uint32]
    network: Network
    task: Task
    options: Mapping[str, Any]
    files: tuple[Path, ...]
    theory: Path | None

    def run(self) -> None:
        """Sample, and keep means, errors and the verdict on the chains."""
        key = jax.random.wrap_key_data(jax.numpy.asarray(self.key))
        draws = sample(key, self.network, self.task, **self.options, progress=False)
        kernel, output = self._aligned(draws)
        mean, std, error, ess = kernel_moments(kernel)
        f, f_error, _ = mean_and_error(output)
        verdict = diagnose(draws)
        write(
            self.files[0],
            {
                "kernel": mean,
                "kernel_error": error,
                "kernel_std": std,
                "output": f,
                "output_error": f_error,
                "ess": np.array(ess.min()),
                "ok": np.array(verdict.ok),
                "status": np.array(verdict.verdict),
            },
        )

    def _aligned(self, draws: xr.DataTree) -> tuple[Floats, Floats]:
        """Kernels and outputs with theory's signs and patterns; without theory, steps as positively correlated as can be."""
        symmetry = sign_symmetry(self.network, self.task)
        kernel, output = kernel_and_output(draws)
        known = {} if self.theory is None else read_arrays(self.theory)
        reference = known.get("kernel")
        if reference is None:
            kernel, output, *_ = gauge_fixed(draws)
            reference = canonical(kernel.mean((0, 1), np.float64), symmetry)
        exchanges = pattern_symmetry(self.network, self.task)
        return matched(kernel, output, reference, symmetry, exchanges)[:2]


Job = TheoryJob | SampleJob


def execute(job: Job) -> None:
    """Do a job; an error that would come again is its result."""
    try:
        job.run()
    except StorageError:
        raise
    except (BayesKernelError, ArithmeticError, ValueError) as error:
        for file in job.files:
            if not valid(file):
                write(file, {"status": np.array(f"{type(error).__name__}: {error}")})


def write(file: Path, result: Result) -> None:
    """Keep a result; "status" alone where there was none."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error.strerror}") from error
    write_arrays(file, result)


def valid(file: Path) -> bool:
    """Whether a result is there, unchanged."""
    try:
        check_seal(file)
    except StorageError:
        return False
    return True


def _theory_result(up: MeanField, down: MeanField) -> Result:
    """Both branches, and what follows from the better one."""
    best = min(up, down, key=lambda m: (not m.converged, np.nan_to_num(m.free_energy)))
    try:
        std, shift = best.kernel_std(1), best.kernel_shift(1)
    except FluctuationError:
        std = shift = np.full_like(best.kernel, np.nan)
    ways = (up, down)
    return {
        "kernel": best.kernel,
        "kernel_error": best.monte_carlo_error,
        "kernel_std": std,
        "kernel_shift": shift,
        "output": best.output,
        "free_energy": np.array(best.free_energy),
        "free_energy_error": np.array(best.free_energy_error),
        "residual": np.array(best.residual),
        "ok": np.array(best.converged),
        "status": np.array(str(best.result)),
        "branch_kernel": np.stack([m.kernel for m in ways]),
        "branch_free_energy": np.array([m.free_energy for m in ways]),
        "branch_free_energy_error": np.array([m.free_energy_error for m in ways]),
        "branch_ok": np.array([m.converged for m in ways]),
    }
