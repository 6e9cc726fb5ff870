"""The command line: from a task to sampled and analytic kernels, side by side."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import jax
import matplotlib as mpl
import typer
import xarray as xr
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bayeskernel import tasks
from bayeskernel.compare import Comparison, compare
from bayeskernel.errors import BayesKernelError, InputError
from bayeskernel.inference.conditional import weights
from bayeskernel.inference.diagnose import diagnose
from bayeskernel.inference.record import problem, settings
from bayeskernel.inference.run import sample
from bayeskernel.inference.storage import load, save
from bayeskernel.kernels import coherence
from bayeskernel.meanfield.progress import solver_bar
from bayeskernel.meanfield.solve import MeanField, solve
from bayeskernel.network import Network
from bayeskernel.report import report
from bayeskernel.sweeps.description import read_description
from bayeskernel.sweeps.run import sweep
from bayeskernel.tasks import Task

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


TaskOption = Annotated[
    TaskName, typer.Option("--task", help="What to learn; digits and sunspots are real data.")
]
Patterns = Annotated[int, typer.Option(help="Number of patterns P; for digits an even number.")]
Steps = Annotated[int, typer.Option(help="Number of steps T; for digits 1, 2, 4 or 8.")]
Width = Annotated[int, typer.Option(help="Units per step N.")]
Space = Annotated[SpaceName, typer.Option(help="Coordinates to sample in; all are exact.")]
ActivationOption = Annotated[str, typer.Option(help="Activation: linear, erf, tanh or relu.")]
SharingOption = Annotated[
    list[str] | None,
    typer.Option(
        help="'tied' (RNN), 'untied' (DNN) or labels such as 0,0,1,1; repeat for several. Default: both."
    ),
]
Signal = Annotated[float, typer.Option(help="Factor on the targets.")]
Noise = Annotated[float, typer.Option(help="kappa: observation noise times width.")]
DrawsOption = Annotated[int, typer.Option(help="Posterior draws per chain.")]
Warmup = Annotated[int, typer.Option(help="Adaptation draws per chain.")]
Chains = Annotated[int, typer.Option(help="Number of chains.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampler (and of the teacher task).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
_FOLDER = Path("bayeskernel-results")


@app.command("compare")
def compare_command(
    task: TaskOption = TaskName.digits,
    patterns: Patterns = 4,
    steps: Steps = 4,
    width: Width = 1024,
    space: Space = SpaceName.auto,
    activation: ActivationOption = "erf",
    sharing: SharingOption = None,
    signal: Signal = 2.0,
    noise: Noise = 0.3,
    draws: DrawsOption = 1000,
    warmup: Warmup = 300,
    chains: Chains = 4,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for report.html and the draws.")] = _FOLDER,
    as_json: AsJson = False,
) -> None:
    """Sample and solve an RNN and a DNN on one task, and compare their kernels.

    Writes report.html and the draws (netCDF, one file a network) to the output folder.
    """
    began = time.time()
    given = _task(task, patterns, steps, seed).scaled(signal)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Comparison] = {}
    spectra: dict[str, xr.Dataset] = {}
    for k, (pattern, network) in enumerate(_networks(width, activation, sharing, noise).items()):
        name = _name(pattern)
        _err.print(f"[bold]{name}[/]: {given.name}, N = {width}, T = {steps}, P = {patterns}")
        theory = _solve(network, given)
        key = jax.random.fold_in(jax.random.key(seed), k)
        run = _sample(key, network, given, space, warmup, draws, chains, out / _file(pattern))
        results[name] = compare(run, theory)
        if steps > 1:
            spectra[name] = _one_draw_of_weights(key, network, given, warmup)
    page = report(results, out / "report.html", weights=spectra)
    if as_json:
        _print_json({name: _summary(cmp) for name, cmp in results.items()} | {"report": str(page)})
        return
    _show({name: cmp.coherence for name, cmp in results.items()})
    for name, cmp in results.items():
        _out.print(f"[bold]{name}[/]. {cmp.verdict}", highlight=False)
        _out.print(f"  Chains: {cmp.diagnosis.verdict}", highlight=False)
    _out.print(f"Report: {page}  ({time.time() - began:.0f} s)")


@app.command("solve")
def solve_command(
    task: TaskOption = TaskName.digits,
    patterns: Patterns = 4,
    steps: Steps = 4,
    activation: ActivationOption = "erf",
    sharing: SharingOption = None,
    signal: Signal = 2.0,
    noise: Noise = 0.3,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Solve the mean-field theory alone: coherence between steps, free energy, branches, outliers."""
    given = _task(task, patterns, steps, seed).scaled(signal)
    found = {
        _name(pattern): _solve(network, given)
        for pattern, network in _networks(1, activation, sharing, noise).items()
    }
    if as_json:
        _print_json({name: _theory_summary(theory) for name, theory in found.items()})
        return
    _show({name: (coherence(theory.kernel),) for name, theory in found.items()}, ("theory",))
    for name, theory in found.items():
        branches = ", ".join(
            f"{b.free_energy:.5f}{'' if b.stable else ' (saddle)'}" for b in theory.branches
        )
        _out.print(f"[bold]{name}[/]. {theory.result}. Free energy per unit: {branches}")


@app.command("sample")
def sample_command(
    task: TaskOption = TaskName.digits,
    patterns: Patterns = 4,
    steps: Steps = 4,
    width: Width = 1024,
    space: Space = SpaceName.auto,
    activation: ActivationOption = "erf",
    sharing: SharingOption = None,
    signal: Signal = 2.0,
    noise: Noise = 0.3,
    draws: DrawsOption = 1000,
    warmup: Warmup = 300,
    chains: Chains = 4,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for the draws.")] = _FOLDER,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder in which a killed run is kept, and goes on.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sample posteriors alone; draws go to netCDF files, one a network."""
    given = _task(task, patterns, steps, seed).scaled(signal)
    out.mkdir(parents=True, exist_ok=True)
    said: dict[str, Any] = {}
    for k, (pattern, network) in enumerate(_networks(width, activation, sharing, noise).items()):
        file = _file(pattern)
        key = jax.random.fold_in(jax.random.key(seed), k)
        kept = None if checkpoint is None else checkpoint / Path(file).stem
        run = _sample(key, network, given, space, warmup, draws, chains, out / file, kept)
        verdict = diagnose(run).verdict
        said[_name(pattern)] = {"draws": str(out / file), "chains": verdict}
        if not as_json:
            _out.print(f"[bold]{_name(pattern)}[/]. {verdict}", highlight=False)
    if as_json:
        _print_json(said)


@app.command("report")
def report_command(
    files: Annotated[list[Path], typer.Argument(help="Draws written by compare or sample.")],
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("report.html"),
) -> None:
    """Solve the theory for saved draws, compare, and write the report."""
    results: dict[str, Comparison] = {}
    for file in files:
        run = load(file)
        network, given = problem(run)
        results[file.stem.removeprefix("draws_")] = compare(run, _solve(network, given))
    _out.print(f"Report: {report(results, out)}")


@app.command("sweep")
def sweep_command(
    file: Annotated[Path, typer.Argument(help="TOML file that describes the sweep.")],
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("bayeskernel-sweep"),
    processes: Annotated[
        int | None, typer.Option(help="Compute in that many processes on this machine.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler whose workers compute.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Solve and sample on a grid; the same command goes on after an interruption.

    The file has tables [task] (name, and the arguments of that function of bayeskernel.tasks), [network] and
    [grid], and optionally [sample] (without it there are no samples) and solve = false.
    """
    described = read_description(file)
    if processes is not None and scheduler is not None:
        raise InputError("--processes, --scheduler", "one of them", "both")
    client: Any = processes
    if scheduler is not None:
        try:
            from distributed import Client
        except ModuleNotFoundError as error:
            raise InputError(
                "--scheduler", "the extra sweep (pip install 'bayeskernel[sweep]')", error
            ) from None
        client = Client(scheduler)
    found = sweep(**described, out=out, client=client)
    counts = {
        str(source): int(found["ok"].sel(source=source).sum()) for source in found["source"].values
    }
    points = int(found["ok"].isel(source=0).size)
    if as_json:
        _print_json({"points": points, "ok": counts, "folder": str(out)})
        return
    for source, count in counts.items():
        _out.print(f"{source}: {count} of {points} points fine", highlight=False)
    _out.print(
        f"Results: {out}; open them with bayeskernel.open_sweep({str(out)!r})", highlight=False
    )


def main() -> None:
    """Run the command line; refusals and failures are one clear line and exit code 2."""
    mpl.use("agg")  # figures go to files
    try:
        app(standalone_mode=True)
    except (BayesKernelError, OSError) as error:
        _err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
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


def _networks(
    width: int, activation: str, sharing: list[str] | None, noise: float
) -> dict[str, Network]:
    """The networks a command is about, by their sharing pattern."""
    return {
        pattern: Network(width, activation, _sharing(pattern), noise=noise)
        for pattern in sharing or ["tied", "untied"]
    }


def _sharing(pattern: str) -> str | list[int]:
    if pattern in ("tied", "untied"):
        return pattern
    try:
        return [int(label) for label in pattern.split(",")]
    except ValueError:
        raise InputError("--sharing", "tied, untied or labels such as 0,0,1,1", pattern) from None


def _name(pattern: str) -> str:
    return {"tied": "RNN (tied)", "untied": "DNN (untied)"}.get(pattern, pattern)


def _file(pattern: str) -> str:
    return f"draws_{pattern.replace(',', '')}.nc"


def _solve(network: Network, task: Task) -> MeanField:
    with solver_bar() as progress:
        theory = solve(network, task, progress=progress)
    _err.print(
        f"  theory {theory.result}, residual {theory.residual:.0e}, {len(theory.branches)} branch(es)"
    )
    return theory


def _sample(
    key: jax.Array,
    network: Network,
    task: Task,
    space: SpaceName,
    warmup: int,
    draws: int,
    chains: int,
    file: Path,
    checkpoint: Path | None = None,
) -> xr.DataTree:
    run = sample(
        key,
        network,
        task,
        space=space.value,
        num_warmup=warmup,
        num_samples=draws,
        num_chains=chains,
        checkpoint=checkpoint,
    )
    save(run, file)
    made = settings(run)
    _err.print(
        f"  sampled {chains * draws} draws in space {made['space']} ({made['space_reason']}), "
        f"{made['seconds']:.0f} s, kept in {file}"
    )
    return run


def _one_draw_of_weights(key: jax.Array, network: Network, task: Task, warmup: int) -> xr.Dataset:
    """Weights of one posterior draw; keeping those of all would take gigabytes."""
    with _err.status("  drawing weights"):
        kept = sample(
            jax.random.fold_in(key, 1),
            network,
            task,
            space="preactivations",
            num_warmup=warmup,
            num_samples=1,
            num_chains=1,
            keep=("preactivations",),
            progress=False,
        )
        return weights(jax.random.fold_in(key, 2), kept, network, task)


def _show(
    results: Mapping[str, tuple[Any, ...]], sources: tuple[str, ...] = ("sampled", "theory")
) -> None:
    table = Table(title="Correlation of each step's representation with the last step's")
    table.add_column("network")
    steps = len(next(iter(results.values()))[0])
    for t in range(1, steps):
        table.add_column(f"step {t}", justify="right")
    for name, matrices in results.items():
        for source, values in zip(sources, matrices, strict=True):
            table.add_row(f"{name} {source}", *(f"{v:+.3f}" for v in values[:-1, -1]))
    if steps > 1:
        _out.print(table)


def _print_json(value: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def _summary(cmp: Comparison) -> dict[str, Any]:
    sampled, theory = (matrix.tolist() for matrix in cmp.coherence)
    return {
        "agrees": bool(cmp.agrees),
        "verdict": cmp.verdict,
        "chains": cmp.diagnosis.verdict,
        "largest_z": cmp.largest_z,
        "z_limit": cmp.threshold,
        "frobenius_error": cmp.frobenius_error,
        "smallest_ess": cmp.smallest_ess,
        "coherence_sampled": sampled,
        "coherence_theory": theory,
        "theory": _theory_summary(cmp.theory),
    }


def _theory_summary(theory: MeanField) -> dict[str, Any]:
    return {
        "converged": theory.converged,
        "result": str(theory.result),
        "residual": theory.residual,
        "free_energy": theory.free_energy,
        "branches": [{"free_energy": b.free_energy, "stable": b.stable} for b in theory.branches],
        "coherence": coherence(theory.kernel).tolist(),
    }
