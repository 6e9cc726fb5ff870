"""Representational kernels of Bayesian RNNs and DNNs: posterior samples and mean-field theory."""

from bayeskernel import plots, tasks
from bayeskernel.compare import Comparison, compare
from bayeskernel.errors import BayesKernelError, InputError
from bayeskernel.inference.conditional import predict, weights
from bayeskernel.inference.diagnose import Diagnosis, diagnose
from bayeskernel.inference.run import sample, sample_prior
from bayeskernel.inference.storage import StorageError, load, save
from bayeskernel.kernels import coherence
from bayeskernel.meanfield.critical import CriticalSignal, critical_signal
from bayeskernel.meanfield.free_energy import free_energy
from bayeskernel.meanfield.prior import prior_kernel
from bayeskernel.meanfield.solve import MeanField, solve
from bayeskernel.network import Network, Sharing
from bayeskernel.report import report
from bayeskernel.sweeps.dataset import open_sweep
from bayeskernel.sweeps.run import SweepError, sweep
from bayeskernel.tasks import Task

__all__ = [
    "BayesKernelError",
    "Comparison",
    "CriticalSignal",
    "Diagnosis",
    "InputError",
    "MeanField",
    "Network",
    "Sharing",
    "StorageError",
    "SweepError",
    "Task",
    "coherence",
    "compare",
    "critical_signal",
    "diagnose",
    "free_energy",
    "load",
    "open_sweep",
    "plots",
    "predict",
    "prior_kernel",
    "report",
    "sample",
    "sample_prior",
    "save",
    "solve",
    "sweep",
    "tasks",
    "weights",
]
