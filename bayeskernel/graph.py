r"""Which nodes does a network consist of, and which weights join them?

A *node* is a set of N units: a step of an RNN, a layer of a DNN, a layer at a step of a stacked RNN. Every edge carries a
label, and equal label means the same weight matrix:

    h[n] = sum_m carry[n, m] h[m] + drive[n] sum_{edges n <- s} W_label phi(h[s])
                                  + drive[n] sum_{edges n <- x_t} U_label x[t]  (and biases)
    f[t] = sum_{edges y_t <- n} V_label phi(h[n])

An RNN and a DNN are two labellings of one chain. Carries are sums of pre-activations, not weights: a leak, or the stream of
a residual network. With A = (1 - carry)^-1 diag(drive) a node reads h = A (W phi + U x), so for label l the matrix
G_l[n, s] = sum over its edges of A[n, target] says how strongly W_l phi(h[s]) enters node n (docs/theory, section 8).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bayeskernel.errors import InputError, positive

Floats = NDArray[np.float64]
BIAS = "1"
_OUTSIDE = re.compile(r"([xy])([1-9][0-9]*)")
_KINDS = {"recurrent": "(N, N)", "input": "(N, D)", "bias": "(N, 1)", "readout": "(O, N)"}


class Edge(NamedTuple):
    """An edge by positions: of its ends among nodes or steps (from zero), and of its label among those of its kind."""

    target: int
    source: int
    label: int


@dataclass(frozen=True)
class Graph:
    """A labelled graph of nodes.

    Parameters
    ----------
    nodes
        Names. Kernels have their nodes in this order, except that a node is moved behind those it reads.
    edges
        Pairs (source, target). Beside nodes, sources may be inputs "x1", "x2", ... (the task's steps, counted from 1) and
        "1" (a bias), targets outputs "y1", "y2", ...
    labels
        One for every edge; edges with equal labels use the same weights.
    scales
        Standard deviation of a label's weights relative to the network's for its kind; default 1.
    carries
        {(source, target): factor}: pre-activations that are added to those of another node.
    drives
        {node: factor} that multiplies all that edges bring to a node; default 1.
    places
        {node: (layer, step)}, for drawings and for the coordinates of kernels; default layer 1 and the node's position.

    Raises
    ------
    InputError
        For unknown names, a cycle, a label whose weights would differ in shape, an edge given twice, or an output
        that no input reaches.
    """

    nodes: Sequence[str]
    edges: Sequence[tuple[str, str]]
    labels: Sequence[str]
    scales: Mapping[str, float] | Sequence[tuple[str, float]] = ()
    carries: Mapping[tuple[str, str], float] | Sequence[tuple[tuple[str, str], float]] = ()
    drives: Mapping[str, float] | Sequence[tuple[str, float]] = ()
    places: Mapping[str, tuple[int, int]] | Sequence[tuple[str, tuple[int, int]]] = ()

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        nodes = _names("nodes", self.nodes)
        edges = _pairs("edges", self.edges)
        labels = _names("labels", self.labels, distinct=False)
        if len(labels) != len(edges):
            raise InputError("labels", f"{len(edges)} labels, one per edge", len(labels))
        _check_ends(nodes, edges)
        if len(set(edges)) < len(edges):
            twice = next(edge for edge in edges if edges.count(edge) > 1)
            raise InputError("edges", "every edge once", f"{twice} {edges.count(twice)} times")
        _check_shapes(edges, labels)
        carries = _factors("carries", self.carries, nodes, pairs=True)
        set_(self, "scales", _factors("scales", self.scales, labels))
        set_(self, "carries", carries)
        set_(self, "drives", _factors("drives", self.drives, nodes))
        set_(self, "places", _places(self.places, nodes))
        joined = [pair for pair in edges if set(pair) <= set(nodes)]
        set_(self, "nodes", _ordered(nodes, [*joined, *(pair for pair, _ in carries)]))
        set_(self, "edges", edges)
        set_(self, "labels", labels)
        self._check_reached()

    @property
    def size(self) -> int:
        """Number of nodes."""
        return len(self.nodes)

    @cached_property
    def steps(self) -> int:
        """T, the last step of the task that an input or an output names."""
        ends = (name for edge in self.edges for name in edge)
        return max(int(m[2]) for m in map(_OUTSIDE.fullmatch, ends) if m)

    @cached_property
    def noun(self) -> str:
        """What a node is called: "step" where nodes are the task's steps in order, else "node"."""
        steps = [[1, t + 1] for t in range(self.steps)]
        return "step" if self.places and self.places_of_nodes.tolist() == steps else "node"

    @cached_property
    def label_names(self) -> dict[str, tuple[str, ...]]:
        """Labels of every kind, "recurrent", "input", "bias" and "readout", in order of first use by `edges_of`."""
        names: dict[str, dict[str, None]] = {kind: {} for kind in _KINDS}
        for _, _, kind, label in self._sorted:
            names[kind][label] = None
        return {kind: tuple(found) for kind, found in names.items()}

    def edges_of(self, kind: str) -> tuple[Edge, ...]:
        """Edges of a kind by positions, sorted by target and source."""
        return self._edges[kind]

    def scales_of(self, kind: str) -> Floats:
        """Relative standard deviations of the labels of a kind."""
        scales = dict(self.scales)
        return np.array([scales.get(name, 1.0) for name in self.label_names[kind]], np.float64)

    @cached_property
    def carry(self) -> Floats:
        """How strongly pre-activations of a node (column) are added to those of another (row), (nodes, nodes)."""
        carries: dict[tuple[str, str], float] = dict(self.carries)
        matrix = np.zeros((self.size, self.size))
        for (source, target), factor in carries.items():
            matrix[self._position(target), self._position(source)] = factor
        return matrix

    @cached_property
    def drive(self) -> Floats:
        """Factor on what edges bring to a node, (nodes,)."""
        drives = dict(self.drives)
        return np.array([drives.get(name, 1.0) for name in self.nodes], np.float64)

    @cached_property
    def mixing(self) -> Floats:
        """A = (1 - carry)^-1 diag(drive), (nodes, nodes)."""
        solved = np.linalg.solve(np.eye(self.size) - self.carry, np.diag(self.drive))
        return np.asarray(solved, np.float64)

    def maps(self, kind: str) -> Floats:
        """G_l of every label of a kind: (labels, nodes, sources), for readouts (labels, steps, nodes)."""
        sources = {"recurrent": self.size, "input": self.steps, "bias": 1, "readout": self.size}
        rows = self.steps if kind == "readout" else self.size
        plain = np.zeros((len(self.label_names[kind]), rows, sources[kind]))
        for edge in self.edges_of(kind):
            plain[edge.label, edge.target, edge.source] += 1.0
        plain *= self.scales_of(kind)[:, None, None]
        return plain if kind == "readout" else np.einsum("nm,lms->lns", self.mixing, plain)

    @cached_property
    def places_of_nodes(self) -> NDArray[np.int64]:
        """Layer and step of every node, counted from 1; (nodes, 2)."""
        places = dict(self.places)
        return np.array([places.get(name, (1, k + 1)) for k, name in enumerate(self.nodes)])

    def untied(self) -> Graph:
        """The same nodes and edges, every edge with weights of its own."""
        scales = dict(self.scales)
        own = [f"{source} to {target}" for source, target in self.edges]
        kept = {
            name: scales[label]
            for name, label in zip(own, self.labels, strict=True)
            if label in scales
        }
        return replace(self, labels=own, scales=kept)

    def describe(self) -> dict[str, Any]:
        """The graph as plain JSON values; ``Graph(**described)`` makes it again."""
        return {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}

    @cached_property
    def _edges(self) -> dict[str, tuple[Edge, ...]]:
        """Edges by kind."""
        return {
            kind: tuple(
                Edge(target, source, names.index(label))
                for target, source, own, label in self._sorted
                if own == kind
            )
            for kind, names in self.label_names.items()
        }

    @cached_property
    def _sorted(self) -> list[tuple[int, int, str, str]]:
        """Target, source, kind and label of every edge, sorted."""
        return sorted(
            (self._position(edge[1]), self._position(edge[0]), _kind(edge), label)
            for edge, label in zip(self.edges, self.labels, strict=True)
        )

    def _position(self, name: str) -> int:
        outside = _OUTSIDE.fullmatch(name)
        if outside:
            return int(outside[2]) - 1
        return 0 if name == BIAS else self.nodes.index(name)

    def _check_reached(self) -> None:
        """Refuse outputs whose nodes no input and no bias reaches, and graphs without any."""
        reached = {target for source, target in self.edges if source[0] == "x" or source == BIAS}
        for node in self.nodes:
            before = [s for s, t in self.edges if t == node]
            before += [s for s, t in dict(self.carries) if t == node]
            if reached & set(before):
                reached.add(node)
        outputs = [(s, t) for s, t in self.edges if _OUTSIDE.fullmatch(t)]
        if not outputs or not any(_OUTSIDE.fullmatch(s) for s, _ in self.edges):
            raise InputError("edges", "at least one from an input and one to an output", "none")
        for source, target in outputs:
            if source not in reached:
                raise InputError(
                    "edges", f"{target} read from nodes that an input reaches", f"from {source}"
                )


def _kind(edge: tuple[str, str]) -> str:
    source, target = edge
    if _OUTSIDE.fullmatch(target):
        return "readout"
    if source == BIAS:
        return "bias"
    return "input" if _OUTSIDE.fullmatch(source) else "recurrent"


def _names(argument: str, values: object, *, distinct: bool = True) -> tuple[str, ...]:
    expected = "a sequence of names" + (", each once" if distinct else "")
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(argument, expected, repr(values))
    names = tuple(values)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise InputError(argument, expected, repr(names))
    if distinct and len(set(names)) < len(names):
        raise InputError(argument, expected, repr(names))
    outside = [name for name in names if name == BIAS or _OUTSIDE.fullmatch(name)]
    if distinct and outside:
        raise InputError(argument, "names other than those of inputs and outputs", outside[0])
    return names


def _pairs(argument: str, values: object) -> tuple[tuple[str, str], ...]:
    expected = "pairs (source, target) of names"
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(argument, expected, repr(values))
    pairs = tuple(tuple(pair) if isinstance(pair, (tuple, list)) else (pair,) for pair in values)
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise InputError(argument, expected, repr(pair))
    return pairs


def _check_ends(nodes: tuple[str, ...], edges: tuple[tuple[str, str], ...]) -> None:
    for source, target in edges:
        ends = source[:1] if _OUTSIDE.fullmatch(source) else source
        goes = target[:1] if _OUTSIDE.fullmatch(target) else target
        if not (ends in ("x", BIAS) or source in nodes):
            raise InputError("edges", "sources among the nodes, x1, x2, ... and 1", source)
        if not (goes == "y" or target in nodes) or (goes == "y" and source not in nodes):
            raise InputError(
                "edges", "targets among the nodes, or y1, y2, ... from a node", (source, target)
            )


def _check_shapes(edges: tuple[tuple[str, str], ...], labels: tuple[str, ...]) -> None:
    kinds: dict[str, str] = {}
    for edge, label in zip(edges, labels, strict=True):
        kind, first = _kind(edge), kinds.setdefault(label, _kind(edge))
        if kind != first:
            shapes = f"{_KINDS[first]} and {_KINDS[kind]}"
            raise InputError("labels", "weights of one shape for a label", f"{label!r}: {shapes}")


def _factors(
    argument: str, values: object, known: tuple[str, ...], *, pairs: bool = False
) -> tuple[tuple[Any, float], ...]:
    """Numbers by name or, for carries, by pair of nodes; as sorted pairs."""
    out = list[tuple[Any, float]]()
    for name, value in _items(argument, values):
        names = _pairs(argument, [name])[0] if pairs else [name]
        if not all(one in known for one in names):
            expected = "pairs of nodes" if pairs else f"names among {sorted(set(known))}"
            raise InputError(argument, expected, repr(name))
        out.append((name, positive(f"{argument}[{name!r}]", value)))
    return tuple(sorted(out))


def _items(argument: str, values: object) -> list[tuple[Any, Any]]:
    """Pairs of a mapping, or of what a graph keeps of one."""
    if isinstance(values, Mapping):
        return list(values.items())
    if isinstance(values, (tuple, list)) and all(
        isinstance(item, (tuple, list)) and len(item) == 2 for item in values
    ):
        return [(tuple(key) if isinstance(key, list) else key, value) for key, value in values]
    raise InputError(argument, "a mapping", repr(values))


def _places(values: object, nodes: tuple[str, ...]) -> tuple[tuple[str, tuple[int, int]], ...]:
    out = []
    for name, place in _items("places", values):
        if name not in nodes:
            raise InputError("places", "names of nodes", repr(name))
        if len(place) != 2 or not all(isinstance(k, int) and k > 0 for k in place):
            raise InputError("places", "a (layer, step) for every node, from 1", repr(place))
        out.append((name, (place[0], place[1])))
    return tuple(sorted(out))


def _ordered(nodes: tuple[str, ...], reads: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Nodes after all they read, else in the order given; refuses cycles."""
    sources = {node: [s for s, t in reads if t == node] for node in nodes}
    try:
        TopologicalSorter(sources).prepare()
    except CycleError as error:
        cycle = " <- ".join(reversed(error.args[1]))
        raise InputError("edges, carries", "no cycle", cycle) from None
    order: dict[str, None] = {}
    while len(order) < len(nodes):
        ready = (n for n in nodes if n not in order and all(s in order for s in sources[n]))
        order[next(ready)] = None
    return tuple(order)


def _plain(value: object) -> object:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
