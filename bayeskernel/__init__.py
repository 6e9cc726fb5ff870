"""Representational kernels of Bayesian RNNs and DNNs: posterior samples and mean-field theory.

Networks, tasks and theory are there at once; what needs NumPyro, ArviZ, xarray or matplotlib is imported when it
is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from bayeskernel import architectures, tasks
from bayeskernel.errors import BayesKernelError, InputError
from bayeskernel.graph import Graph
from bayeskernel.kernels import coherence
from bayeskernel.meanfield.critical import CriticalSignal, critical_signal
from bayeskernel.meanfield.free_energy import free_energy
from bayeskernel.meanfield.predict import nngp
from bayeskernel.meanfield.prior import prior_kernel
from bayeskernel.meanfield.solve import MeanField, solve
from bayeskernel.network import Network
from bayeskernel.sharing import Sharing
from bayeskernel.tasks import Task

if TYPE_CHECKING:
    from bayeskernel import plots
    from bayeskernel.compare import Comparison, compare
    from bayeskernel.held_out import HeldOut, held_out
    from bayeskernel.inference.conditional import predict, weights
    from bayeskernel.inference.diagnose import Diagnosis, diagnose
    from bayeskernel.inference.measure import measure
    from bayeskernel.inference.run import sample, sample_prior
    from bayeskernel.inference.storage import StorageError, load, save
    from bayeskernel.inference.train import train
    from bayeskernel.report import report
    from bayeskernel.similarity import rdm, similarity, to_rsatoolbox
    from bayeskernel.sweeps.dataset import open_sweep
    from bayeskernel.sweeps.run import SweepError, sweep

__all__ = [
    "BayesKernelError",
    "Comparison",
    "CriticalSignal",
    "Diagnosis",
    "Graph",
    "HeldOut",
    "InputError",
    "MeanField",
    "Network",
    "Sharing",
    "StorageError",
    "SweepError",
    "Task",
    "architectures",
    "coherence",
    "compare",
    "critical_signal",
    "diagnose",
    "free_energy",
    "held_out",
    "load",
    "measure",
    "nngp",
    "open_sweep",
    "plots",
    "predict",
    "prior_kernel",
    "rdm",
    "report",
    "sample",
    "sample_prior",
    "save",
    "similarity",
    "solve",
    "sweep",
    "tasks",
    "to_rsatoolbox",
    "train",
    "weights",
]

_LATER = {
    "compare": ("Comparison", "compare"),
    "held_out": ("HeldOut", "held_out"),
    "inference.conditional": ("predict", "weights"),
    "inference.diagnose": ("Diagnosis", "diagnose"),
    "inference.measure": ("measure",),
    "inference.run": ("sample", "sample_prior"),
    "inference.storage": ("StorageError", "load", "save"),
    "inference.train": ("train",),
    "report": ("report",),
    "similarity": ("rdm", "similarity", "to_rsatoolbox"),
    "sweeps.dataset": ("open_sweep",),
    "sweeps.run": ("SweepError", "sweep"),
}
_MODULE_OF = {name: module for module, names in _LATER.items() for name in names}


def __getattr__(name: str) -> object:
    """Import what is first used."""
    if name == "plots":
        return import_module("bayeskernel.plots")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'bayeskernel' has no attribute {name!r}")
    value = getattr(import_module(f"bayeskernel.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """A package whose functions compare and report are not replaced by the modules they come from."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
