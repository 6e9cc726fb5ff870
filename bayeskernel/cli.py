"""The command line: from a task to sampled and analytic kernels, side by side."""

from __future__ import annotations

import sys
import time
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

# ArviZ 0.23 announces its next line on import; the command line is no place for that.
warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)

import jax  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from bayeskernel import tasks  # noqa: E402
from bayeskernel.compare import Comparison, compare  # noqa: E402
from bayeskernel.errors import BayesKernelError, InputError  # noqa: E402
from bayeskernel.inference.record import settings  # noqa: E402
from bayeskernel.inference.run import sample  # noqa: E402
from bayeskernel.meanfield.solve import MeanField, solve  # noqa: E402
from bayeskernel.network import Network  # noqa: E402
from bayeskernel.report import report  # noqa: E402
from bayeskernel.tasks import Task  # noqa: E402

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Representational kernels of Bayesian RNNs and DNNs: posterior samples and mean-field theory.",
)
_out = Console(soft_wrap=True)
_err = Console(stderr=True, soft_wrap=True)


class TaskName(StrEnum):
    """Tasks the command line knows."""

    digits = "digits"
    sunspots = "sunspots"
    sine = "sine"
    teacher = "teacher"


class SpaceName(StrEnum):
    """Coordinates the command line can sample in."""

    auto = "auto"
    weights = "weights"
    preactivations = "preactivations"
    kernels = "kernels"


@app.callback()
def _root() -> None:
    """Keep `compare` a subcommand although it is the only one."""


@app.command("compare")
def compare_command(
    task: Annotated[
        TaskName, typer.Option(help="What to learn; digits and sunspots are real data.")
    ] = TaskName.digits,
    patterns: Annotated[
        int, typer.Option(help="Number of patterns P; for digits an even number.")
    ] = 4,
    steps: Annotated[int, typer.Option(help="Number of steps T; for digits 1, 2, 4 or 8.")] = 4,
    width: Annotated[int, typer.Option(help="Units per step N.")] = 256,
    space: Annotated[
        SpaceName, typer.Option(help="Coordinates to sample in; all are exact.")
    ] = SpaceName.auto,
    activation: Annotated[
        str, typer.Option(help="Activation: linear, erf, tanh or relu.")
    ] = "linear",
    sharing: Annotated[
        list[str] | None,
        typer.Option(
            help="'tied' (RNN), 'untied' (DNN) or labels such as 0,0,1,1; repeat for several. Default: both."
        ),
    ] = None,
    signal: Annotated[float, typer.Option(help="Factor on the targets.")] = 2.0,
    noise: Annotated[float, typer.Option(help="kappa: observation noise times width.")] = 0.3,
    draws: Annotated[int, typer.Option(help="Posterior draws per chain.")] = 1000,
    warmup: Annotated[int, typer.Option(help="Adaptation draws per chain.")] = 200,
    chains: Annotated[int, typer.Option(help="Number of chains.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the sampler (and of the teacher task).")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for report.html and the draws.")] = Path(
        "bayeskernel-results"
    ),
) -> None:
    """Sample and solve an RNN and a DNN on one task, and compare their kernels.

    Writes report.html and the draws (netCDF, one file a network) to the output folder.
    """
    began = time.time()
    problem = _task(task, patterns, steps, seed).scaled(signal)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Comparison] = {}
    for k, pattern in enumerate(sharing or ["tied", "untied"]):
        network = Network(width, activation, _sharing(pattern), noise=noise)
        name = {"tied": "RNN (tied)", "untied": "DNN (untied)"}.get(pattern, pattern)
        _err.print(f"[bold]{name}[/]: {problem.name}, N = {width}, T = {steps}, P = {patterns}")
        theory = _solve(network, problem)
        run = sample(
            jax.random.fold_in(jax.random.key(seed), k),
            network,
            problem,
            space=space.value,
            num_warmup=warmup,
            num_samples=draws,
            num_chains=chains,
        )
        file = out / f"draws_{pattern.replace(',', '')}.nc"
        run.to_netcdf(file, engine="h5netcdf")
        results[name] = compare(run, theory)
        made = settings(run)
        _err.print(
            f"  sampled {chains * draws} draws in space {made['space']} ({made['space_reason']}), "
            f"{made['seconds']:.0f} s, kept in {file}"
        )
    page = report(results, out / "report.html")
    _show(results)
    _out.print(f"Report: {page}  ({time.time() - began:.0f} s)")


def main() -> None:
    """Run the command line; refusals and failures are one clear line and exit code 2."""
    try:
        app(standalone_mode=True)
    except (BayesKernelError, OSError) as error:
        _err.print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(2)


def _task(name: TaskName, patterns: int, steps: int, seed: int) -> Task:
    if name is TaskName.digits:
        if patterns % 2:
            raise InputError(
                "--patterns", "an even number for digits, half for each class", patterns
            )
        return tasks.digits(patterns_per_class=patterns // 2, steps=steps)
    if name is TaskName.sunspots:
        return tasks.sunspots(patterns, steps)
    if name is TaskName.sine:
        return tasks.sine(patterns, steps)
    return tasks.linear_teacher(jax.random.key(seed), patterns, steps)


def _sharing(pattern: str) -> str | list[int]:
    if pattern in ("tied", "untied"):
        return pattern
    try:
        return [int(label) for label in pattern.split(",")]
    except ValueError:
        raise InputError("--sharing", "tied, untied or labels such as 0,0,1,1", pattern) from None


def _solve(network: Network, task: Task) -> MeanField:
    with _err.status("  solving") as status:
        theory = solve(
            network,
            task,
            progress=lambda stage, step, residual: status.update(
                f"  solving: {stage} step {step}, residual {residual:.1e}"
            ),
        )
    _err.print(
        f"  theory {theory.result}, residual {theory.residual:.0e}, {len(theory.branches)} branch(es)"
    )
    return theory


def _show(results: dict[str, Comparison]) -> None:
    table = Table(title="Correlation of each step's representation with the last step's")
    table.add_column("network")
    steps = len(next(iter(results.values())).coherence[0])
    for t in range(1, steps):
        table.add_column(f"step {t}", justify="right")
    for name, cmp in results.items():
        for source, values in zip(("sampled", "theory"), cmp.coherence, strict=True):
            table.add_row(f"{name} {source}", *(f"{v:+.3f}" for v in values[:-1, -1]))
    if steps > 1:
        _out.print(table)
    for name, cmp in results.items():
        _out.print(f"[bold]{name}[/]. {cmp.verdict}", highlight=False)
        _out.print(f"  Chains: {cmp.diagnosis.verdict}", highlight=False)
