"""How well does theory predict images that no network of a command was trained on?"""

from __future__ import annotations

from collections.abc import Mapping

from bayeskernel import tasks
from bayeskernel.held_out import HeldOut, held_out
from bayeskernel.meanfield.predict import nngp
from bayeskernel.meanfield.prior import closed_form
from bayeskernel.meanfield.solve import MeanField
from bayeskernel.tasks import Task

# Most images of each digit that are held out, and those there are: of the digit 0, of 1 there are more.
_MOST, _THERE_ARE = 100, 178

Scores = Mapping[str, HeldOut]


def images(trained: Task) -> Task | None:
    """The images after those of a task of two digits, before its targets were scaled; none where all are used."""
    steps, patterns, _, _ = trained.shape
    count = min(_MOST, _THERE_ARE - patterns // 2)
    return tasks.digits((0, 1), count, steps, start=patterns // 2) if count > 0 else None


def scores(theory: MeanField, test: Task) -> Scores:
    """Of theory, and of the Gaussian process without feature learning where it takes no quadrature."""
    found = {"theory": held_out(theory.predict(test.inputs), test)}
    if closed_form(theory.network.phi):
        found["nngp"] = held_out(nngp(theory.network, theory.task, test.inputs), test)
    return found


def said(found: Scores) -> str:
    """Scores in a sentence."""
    words = {"theory": "theory", "nngp": "without feature learning"}
    return "; ".join(f"{words[source]}: {score}" for source, score in found.items())
