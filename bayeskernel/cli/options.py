"""What can be asked for on the command line, and the tasks and networks that are meant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import jax
import typer

from bayeskernel import tasks
from bayeskernel.cli.compiled import keep_compiled_code
from bayeskernel.cli.output import say
from bayeskernel.errors import InputError
from bayeskernel.network import Network
from bayeskernel.tasks import Task
from bayeskernel.tasks.trials import TRIALS

TaskName: TypeAlias = Literal[
    "digits",
    "sunspots",
    "sine",
    "teacher",
    "decision",
    "match_to_sample",
    "context_decision",
    "integration",
    "flip_flop",
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Your own arrays instead of a task: .npz with inputs and targets, or .csv with the columns "
        "step, pattern, x1, ..., y1, ... (empty where nothing is asked)."
    ),
]
TaskOption = Annotated[
    TaskName | None,
    typer.Option(
        "--task",
        help="What to learn; digits and sunspots are real data, from decision on these are trials of animal experiments, "
        "whose conditions are the patterns.",
        show_default="digits",
    ),
]
Patterns = Annotated[
    int | None,
    typer.Option(
        help="Number of patterns P; for digits an even number, not for trials.", show_default="4"
    ),
]
Steps = Annotated[
    int | None, typer.Option(help="Number of steps T; for digits 1, 2, 4 or 8.", show_default="4")
]
Width = Annotated[int, typer.Option(help="Units per step N.")]
Space = Annotated[
    Literal["auto", "weights", "preactivations", "kernels"],
    typer.Option(help="Coordinates to sample in; all are exact."),
]
ActivationOption = Annotated[str, typer.Option(help="Activation: linear, erf, tanh or relu.")]
SharingOption = Annotated[
    list[str] | None,
    typer.Option(
        help="'tied' (RNN), 'untied' (DNN) or labels such as 0,0,1,1; repeat for several. Default: both."
    ),
]
Leak = Annotated[float, typer.Option(help="Leak of the units, up to 1 (none).")]
Layers = Annotated[int, typer.Option(help="Layers of a stacked network.")]
Signal = Annotated[float, typer.Option(help="Factor on the targets.")]
Noise = Annotated[float, typer.Option(help="kappa: observation noise times width.")]
DrawsOption = Annotated[int, typer.Option(help="Posterior draws per chain.")]
Warmup = Annotated[int, typer.Option(help="Adaptation draws per chain.")]
Chains = Annotated[int, typer.Option(help="Number of chains.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampler (and of the teacher task).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
OpenPage = Annotated[bool, typer.Option("--open", help="Show the report in a browser.")]
NoCache = Annotated[
    bool,
    typer.Option(
        "--no-cache",
        help="Do not keep compiled code for later runs.",
        callback=lambda off: None if off else keep_compiled_code(say),
    ),
]


def task_of(
    data: Path | None, name: TaskName | None, patterns: int | None, steps: int | None, seed: int
) -> Task:
    """The task a command is about."""
    if data is not None:
        given = {"--task": name, "--patterns": patterns, "--steps": steps}
        if too_much := [option for option, value in given.items() if value is not None]:
            raise InputError("--data", "no " + ", ".join(given) + " beside it", ", ".join(too_much))
        return tasks.from_arrays(data)
    name = name or "digits"
    if name in TRIALS:
        if patterns is not None:
            raise InputError("--patterns", f"none for {name}, which has its own", patterns)
        # All conditions, without noise.
        return TRIALS[name]() if steps is None else TRIALS[name](steps=steps)
    patterns, steps = 4 if patterns is None else patterns, 4 if steps is None else steps
    if name == "digits":
        if patterns % 2:
            raise InputError(
                "--patterns", "an even number for digits, half for each class", patterns
            )
        return tasks.digits(patterns_per_class=patterns // 2, steps=steps)
    if name == "teacher":
        return tasks.linear_teacher(jax.random.key(seed), patterns, steps)
    return tasks.sunspots(patterns, steps) if name == "sunspots" else tasks.sine(patterns, steps)


def networks_of(
    width: int,
    activation: str,
    sharing: list[str] | None,
    noise: float,
    leak: float,
    layers: int,
) -> dict[str, Network]:
    """The networks a command is about, by their sharing pattern."""
    return {
        pattern: Network(
            width, activation, _sharing(pattern), noise=noise, leak=leak, layers=layers
        )
        for pattern in sharing or ["tied", "untied"]
    }


def _sharing(pattern: str) -> str | list[int]:
    if pattern in ("tied", "untied"):
        return pattern
    try:
        return [int(label) for label in pattern.split(",")]
    except ValueError:
        raise InputError("--sharing", "tied, untied or labels such as 0,0,1,1", pattern) from None


def named(pattern: str) -> str:
    """A sharing pattern in words."""
    return {"tied": "RNN (tied)", "untied": "DNN (untied)"}.get(pattern, pattern)
