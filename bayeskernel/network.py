"""What architecture is studied: width, activation, scales, the graph of its nodes, and which weights are shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal, TypeAlias

import jax
import numpy as np

from bayeskernel.activations import Activation, resolve
from bayeskernel.architectures import checked_leak, stacked
from bayeskernel.errors import InputError, instance, positive, positive_integer
from bayeskernel.graph import Graph
from bayeskernel.sharing import Pattern, Sharing, checked_pattern
from bayeskernel.tasks import Task

Scaling: TypeAlias = Literal["mean_field", "standard"]
_SCALES = ("input_std", "recurrent_std", "readout_std", "noise")
_stacked = lru_cache(maxsize=64)(stacked)


@dataclass(frozen=True)
class Network:
    r"""A recurrent or deep network with Gaussian priors on its weights.

    The network and its prior (N = width, D = input dimension, t = 1..T)::

        h[t,a] = (1 - leak) h[t-1,a] + leak (W_t phi(h[t-1,a]) + U_t x[t,a] + b_t),    h[0,a] = phi(h[0,a]) = 0
        W_ij ~ N(0, recurrent_std^2 / N),  U_ik ~ N(0, input_std^2 / D),  b_i ~ N(0, bias_std^2),
        v_i ~ N(0, readout_std^2)

    and for the two scalings::

        "mean_field":  f = (1/N) v . phi(h),       y = f + N(0, noise / N)     features are learned
        "standard":    f = (1/sqrt N) v . phi(h),  y = f + N(0, noise)         lazy: NNGP as N grows

    Parameters
    ----------
    width
        N, number of units per step.
    activation
        "linear", "erf" (phi(x) = erf(sqrt(pi)/2 x)), "tanh", "relu", or a callable.
    sharing
        "tied" (RNN), "untied" (DNN), a list of T labels used for all weights, or a `Sharing`.
    input_std, recurrent_std, readout_std
        Prior scales, in the units above; independent of width. Weights between layers have ``recurrent_std``.
    noise
        kappa, the temperature: variance of the observation noise in the units above.
    scaling
        "mean_field" or "standard".
    leak, layers, skip
        Leak of the units, number of layers of a stacked RNN, and how many steps back a layer also reads itself; see
        `bayeskernel.architectures.stacked`.
    bias_std
        Prior scale of biases, which are shared over steps as the input weights are; 0 means no biases.
    graph
        Any other architecture; sharing, leak, layers and skip are then set by the graph.

    Raises
    ------
    InputError
        For a scale that is not a finite positive number, an unknown activation, sharing or scaling, a leak outside
        (0, 1], or a graph given together with what it replaces.
    """

    width: int
    activation: str | Callable[[jax.Array], jax.Array] = "erf"
    sharing: Pattern | Sharing = "tied"
    input_std: float = 1.0
    recurrent_std: float = 1.0
    readout_std: float = 1.0
    noise: float = 0.1
    scaling: Scaling = "mean_field"
    leak: float = 1.0
    layers: int = 1
    skip: int | None = None
    bias_std: float = 0.0
    graph: Graph | None = None
    phi: Activation = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "width", positive_integer("width", self.width))
        set_(self, "phi", resolve(self.activation))
        for name in _SCALES:
            set_(self, name, positive(name, getattr(self, name)))
        if self.scaling not in ("mean_field", "standard"):
            raise InputError("scaling", "'mean_field' or 'standard'", repr(self.scaling))
        if not isinstance(self.sharing, Sharing):
            set_(self, "sharing", checked_pattern("sharing", self.sharing))
        set_(self, "leak", checked_leak(self.leak))
        set_(self, "layers", positive_integer("layers", self.layers))
        if self.skip is not None:
            set_(self, "skip", positive_integer("skip", self.skip, minimum=2))
        biased = not (isinstance(self.bias_std, (int, float)) and self.bias_std == 0)
        set_(self, "bias_std", positive("bias_std", self.bias_std) if biased else 0.0)
        if self.graph is not None:
            self._check_graph()

    def graph_of(self, steps: int) -> Graph:
        """The graph of the network on tasks with ``steps`` steps."""
        if self.graph is None:
            return _stacked(
                steps,
                self.sharing,
                layers=self.layers,
                leak=self.leak,
                skip=self.skip,
                biases=self.bias_std > 0,
            )
        if self.graph.steps != steps:
            raise InputError("task", f"{self.graph.steps} steps, as the network's graph has", steps)
        return self.graph

    def untied(self) -> Network:
        """The same network with weights of its own for every edge of its graph."""
        if self.graph is None:
            return replace(self, sharing="untied")
        return replace(self, graph=self.graph.untied())

    def standard_deviation(self, kind: str) -> float:
        """Prior scale of a kind of weights: "recurrent", "input", "bias" or "readout"."""
        return float(getattr(self, f"{kind}_std"))

    def describe(self) -> dict[str, object]:
        """Settings as plain JSON values, enough to recognise the network again."""
        sharing = self.sharing
        plain = vars(sharing) if isinstance(sharing, Sharing) else sharing
        names = ("width", *_SCALES, "scaling", "leak", "layers", "skip", "bias_std")
        return {
            **{name: getattr(self, name) for name in names},
            "activation": self.phi.name,
            "sharing": plain,
            "graph": None if self.graph is None else self.graph.describe(),
        }

    def _check_graph(self) -> None:
        """Refuse a graph beside what it replaces, and biases of one without the other."""
        graph = instance("graph", self.graph, Graph)
        beside = (self.sharing, self.leak, self.layers, self.skip)
        if beside != ("tied", 1.0, 1, None):
            raise InputError("graph", "no sharing, leak, layers or skip beside it", beside)
        if bool(graph.label_names["bias"]) != (self.bias_std > 0):
            expected = "a positive number where the graph has biases, else 0"
            raise InputError("bias_std", expected, self.bias_std)


def check_problem(network: object, task: object) -> None:
    """Refuse anything but a `Network` and a `Task` whose steps fit."""
    given = instance("task", task, Task)
    graph = instance("network", network, Network).graph_of(given.shape[0])
    for name, used, kind, column in (
        ("inputs", np.any(given.inputs != 0, axis=(1, 2)), "input", 1),
        ("targets", np.any(given.supervised, axis=(1, 2)), "readout", 0),
    ):
        there = {edge[column] for edge in graph.edges_of(kind)}
        missing = [int(t) + 1 for t in np.flatnonzero(used) if t not in there]
        if missing:
            verb = "reads" if kind == "input" else "is read out at"
            expected = f"{name} at steps that a node of the graph {verb}"
            raise InputError("task", expected, f"{name} at steps {missing}")
