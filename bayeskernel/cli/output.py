"""What the command line prints: tables and sentences for people, JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bayeskernel.compare import Comparison
from bayeskernel.errors import instance
from bayeskernel.kernels import coherence
from bayeskernel.meanfield.solve import MeanField

console = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


def say(line: str) -> None:
    """Tell the user something that is no result."""
    err.print(escape(line), highlight=False)


def show(
    results: Mapping[str, tuple[Any, ...]],
    noun: str,
    sources: tuple[str, ...] = ("sampled", "theory"),
) -> None:
    """Print the correlation of steps (nodes) of every network, one row a source."""
    table = Table(title=f"Correlation of each {noun}'s representation with the last {noun}'s")
    table.add_column("network")
    steps = len(next(iter(results.values()))[0])
    for t in range(1, steps):
        table.add_column(f"{noun} {t}", justify="right")
    for name, matrices in results.items():
        for source, values in zip(sources, matrices, strict=True):
            table.add_row(f"{name} {source}", *(f"{v:+.3f}" for v in values[:-1, -1]))
    if steps > 1:
        console.print(table)


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object, and nothing else, for machines."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def summary(cmp: Comparison) -> dict[str, Any]:
    """A comparison for machines."""
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
        "theory": theory_summary(instance("theory", cmp.theory, MeanField)),
    }


def theory_summary(theory: MeanField) -> dict[str, Any]:
    """A solution for machines."""
    return {
        "converged": theory.converged,
        "result": str(theory.result),
        "residual": theory.residual,
        "free_energy": theory.free_energy,
        "branches": [{"free_energy": b.free_energy, "stable": b.stable} for b in theory.branches],
        "coherence": coherence(theory.kernel).tolist(),
    }
