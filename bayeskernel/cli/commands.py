"""The command line: from a task to sampled and analytic kernels, side by side."""

from __future__ import annotations

import sys
import time
import webbrowser
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import jax
import matplotlib as mpl
import typer
import xarray as xr
from rich.markup import escape

from bayeskernel.cli import held_out
from bayeskernel.cli.options import (
    ActivationOption,
    AsJson,
    Chains,
    Data,
    DrawsOption,
    Layers,
    Leak,
    NoCache,
    Noise,
    OpenPage,
    Patterns,
    Seed,
    SharingOption,
    Signal,
    Space,
    Steps,
    TaskOption,
    Warmup,
    Width,
    named,
    networks_of,
    task_of,
)
from bayeskernel.cli.output import console, err, print_json, show, summary, theory_summary
from bayeskernel.compare import Comparison, compare
from bayeskernel.errors import BayesKernelError, InputError
from bayeskernel.inference.conditional import weights
from bayeskernel.inference.diagnose import diagnose
from bayeskernel.inference.record import problem, settings
from bayeskernel.inference.run import sample, sample_with_units
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
_FOLDER = Path("bayeskernel-results")


@app.command("compare")
def compare_command(
    data: Data = None,
    task: TaskOption = None,
    patterns: Patterns = None,
    steps: Steps = None,
    width: Width = 1024,
    space: Space = "auto",
    activation: ActivationOption = "erf",
    sharing: SharingOption = None,
    signal: Signal = 2.0,
    noise: Noise = 0.3,
    leak: Leak = 1.0,
    layers: Layers = 1,
    draws: DrawsOption = 1000,
    warmup: Warmup = 300,
    chains: Chains = 4,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for report.html and the draws.")] = _FOLDER,
    open_page: OpenPage = False,
    no_cache: NoCache = False,
    as_json: AsJson = False,
) -> None:
    """Sample and solve an RNN and a DNN on one task, and compare their kernels.

    Of digits, up to 200 other images say how well theory predicts what no network has seen.
    Writes report.html and the draws (netCDF, one file a network) to the output folder.
    """
    began = time.time()
    given = task_of(data, task, patterns, steps, seed).scaled(signal)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Comparison] = {}
    spectra: dict[str, xr.Dataset] = {}
    scores: dict[str, held_out.Scores] = {}
    unseen = held_out.images(given) if data is None and task in (None, "digits") else None
    for k, (pattern, network) in enumerate(
        networks_of(width, activation, sharing, noise, leak, layers).items()
    ):
        name, (T, P, _, _) = named(pattern), given.shape
        err.print(f"[bold]{name}[/]: {escape(given.name)}, N = {width}, T = {T}, P = {P}")
        theory = _solve(network, given)
        if unseen is not None:
            scores[name] = held_out.scores(theory, unseen.scaled(signal))
        key = jax.random.fold_in(jax.random.key(seed), k)
        run, last = sample_with_units(
            key,
            network,
            given,
            space=space,
            num_warmup=warmup,
            num_samples=draws,
            num_chains=chains,
        )
        _keep(run, out / _file(pattern))
        results[name] = compare(run, theory)
        if network.graph_of(T).label_names["recurrent"]:
            spectra[name] = weights(jax.random.fold_in(key, 1), last, network, given)
    notes = {name: f"Held-out images, {held_out.said(own)}." for name, own in scores.items()}
    page = report(results, out / "report.html", weights=spectra, notes=notes)
    if as_json:
        found = {name: summary(cmp) for name, cmp in results.items()}
        for name, own in scores.items():
            found[name]["held_out"] = {source: s._asdict() for source, s in own.items()}
        print_json(found | {"report": str(page)})
    else:
        noun = next(iter(results.values())).noun
        show({name: cmp.coherence for name, cmp in results.items()}, noun)
        for name, cmp in results.items():
            console.print(f"[bold]{name}[/]. {cmp.verdict}", highlight=False)
            console.print(f"  Chains: {cmp.diagnosis.verdict}", highlight=False)
            if name in notes:
                console.print(f"  {notes[name]}", highlight=False)
        console.print(f"Report: {page}  ({time.time() - began:.0f} s)")
    if open_page:
        _open(page)


@app.command("solve")
def solve_command(
    data: Data = None,
    task: TaskOption = None,
    patterns: Patterns = None,
    steps: Steps = None,
    activation: ActivationOption = "erf",
    sharing: SharingOption = None,
    signal: Signal = 2.0,
    noise: Noise = 0.3,
    leak: Leak = 1.0,
    layers: Layers = 1,
    seed: Seed = 0,
    no_cache: NoCache = False,
    as_json: AsJson = False,
) -> None:
    """Solve the mean-field theory alone: coherence between steps, free energy, branches, outliers."""
    given = task_of(data, task, patterns, steps, seed).scaled(signal)
    found = {
        named(pattern): _solve(network, given)
        for pattern, network in networks_of(1, activation, sharing, noise, leak, layers).items()
    }
    if as_json:
        print_json({name: theory_summary(theory) for name, theory in found.items()})
        return
    noun = next(iter(found.values())).network.graph_of(given.shape[0]).noun
    show({name: (coherence(theory.kernel),) for name, theory in found.items()}, noun, ("theory",))
    for name, theory in found.items():
        branches = ", ".join(
            f"{b.free_energy:.5f}{'' if b.stable else ' (saddle)'}" for b in theory.branches
        )
        console.print(f"[bold]{name}[/]. {theory.result}. Free energy per unit: {branches}")


@app.command("sample")
def sample_command(
    data: Data = None,
    task: TaskOption = None,
    patterns: Patterns = None,
    steps: Steps = None,
    width: Width = 1024,
    space: Space = "auto",
    activation: ActivationOption = "erf",
    sharing: SharingOption = None,
    signal: Signal = 2.0,
    noise: Noise = 0.3,
    leak: Leak = 1.0,
    layers: Layers = 1,
    draws: DrawsOption = 1000,
    warmup: Warmup = 300,
    chains: Chains = 4,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for the draws.")] = _FOLDER,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder in which a killed run is kept, and goes on.")
    ] = None,
    no_cache: NoCache = False,
    as_json: AsJson = False,
) -> None:
    """Sample posteriors alone; draws go to netCDF files, one a network."""
    given = task_of(data, task, patterns, steps, seed).scaled(signal)
    out.mkdir(parents=True, exist_ok=True)
    said: dict[str, Any] = {}
    for k, (pattern, network) in enumerate(
        networks_of(width, activation, sharing, noise, leak, layers).items()
    ):
        file = _file(pattern)
        key = jax.random.fold_in(jax.random.key(seed), k)
        kept = None if checkpoint is None else checkpoint / Path(file).stem
        run = sample(
            key,
            network,
            given,
            space=space,
            num_warmup=warmup,
            num_samples=draws,
            num_chains=chains,
            checkpoint=kept,
        )
        _keep(run, out / file)
        verdict = diagnose(run).verdict
        said[named(pattern)] = {"draws": str(out / file), "chains": verdict}
        if not as_json:
            console.print(f"[bold]{named(pattern)}[/]. {verdict}", highlight=False)
    if as_json:
        print_json(said)


@app.command("report")
def report_command(
    files: Annotated[list[Path], typer.Argument(help="Draws written by compare or sample.")],
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("report.html"),
    open_page: OpenPage = False,
    no_cache: NoCache = False,
) -> None:
    """Solve the theory for saved draws, compare, and write the report."""
    results: dict[str, Comparison] = {}
    for file in files:
        run = load(file)
        network, given = problem(run)
        results[file.stem.removeprefix("draws_")] = compare(run, _solve(network, given))
    page = report(results, out)
    console.print(f"Report: {page}")
    if open_page:
        _open(page)


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
    no_cache: NoCache = False,
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
        print_json({"points": points, "ok": counts, "folder": str(out)})
        return
    for source, count in counts.items():
        console.print(f"{source}: {count} of {points} points fine", highlight=False)
    console.print(
        f"Results: {out}; open them with bayeskernel.open_sweep({str(out)!r})", highlight=False
    )


def main() -> None:
    """Run the command line; refusals and failures are one clear line and exit code 2."""
    mpl.use("agg")  # figures go to files
    try:
        app(standalone_mode=True)
    except (BayesKernelError, OSError) as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)


def _file(pattern: str) -> str:
    return f"draws_{pattern.replace(',', '')}.nc"


def _solve(network: Network, task: Task) -> MeanField:
    with solver_bar() as progress:
        theory = solve(network, task, progress=progress)
    err.print(
        f"  theory {theory.result}, residual {theory.residual:.0e}, {len(theory.branches)} branch(es)"
    )
    return theory


def _keep(run: xr.DataTree, file: Path) -> None:
    save(run, file)
    made, sizes = settings(run), run["posterior"].sizes
    err.print(
        f"  sampled {sizes['chain'] * sizes['draw']} draws in space {made['space']} ({made['space_reason']}), "
        f"{made['seconds']:.0f} s, kept in {file}"
    )


def _open(page: Path) -> None:
    """Show a page where there is a browser; the path has been printed for where there is none."""
    with suppress(webbrowser.Error, OSError):
        webbrowser.open(page.resolve().as_uri())
