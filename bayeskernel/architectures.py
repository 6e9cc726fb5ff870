"""Which graphs do the usual architectures have? Chains, stacks, residual and bidirectional networks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from bayeskernel.errors import InputError, positive, positive_integer
from bayeskernel.graph import BIAS, Graph
from bayeskernel.sharing import Pattern, Sharing, StepLabels, labels_of

Triples = list[tuple[str, str, str]]


def stacked(
    steps: int,
    sharing: Pattern | Sharing = "tied",
    *,
    layers: int = 1,
    leak: float = 1.0,
    skip: int | None = None,
    biases: bool = False,
) -> Graph:
    """Layers of recurrent units; one layer is a chain: an RNN or a DNN, depending on its sharing.

    Layer k at step t reads itself at the step before and layer k - 1 at the same step; the first layer reads the
    inputs, and outputs read the last one:

        h[k,t] = (1 - leak) h[k,t-1] + leak (W_k phi(h[k,t-1]) + F_k phi(h[k-1,t]) + U x[t])

    Parameters
    ----------
    steps
        T.
    sharing
        Over steps, as in `bayeskernel.Network`.
    layers
        Number of layers.
    leak
        From 0 (excluded) to 1; 1 is no leak.
    skip
        Layers also read themselves this many steps before, through separate weights S_k.
    biases
        Whether every node has a bias, shared over steps as the input weights are.
    """
    steps, layers = positive_integer("steps", steps), positive_integer("layers", layers)
    share = checked_leak(leak)
    if skip is not None:
        skip = positive_integer("skip", skip, minimum=2)
    labels = labels_of(sharing, steps)
    nodes = [_node(k, t, layers) for k in range(layers) for t in range(steps)]
    triples: Triples = []
    for k in range(layers):
        for t in range(steps):
            triples += _into(k, t, layers, labels, skip)
            if biases:
                triples.append((BIAS, _node(k, t, layers), _label("b", k, labels.input[t], layers)))
    triples += [
        (_node(layers - 1, t, layers), f"y{t + 1}", f"V{labels.readout[t]}") for t in range(steps)
    ]
    leaky = share < 1
    return _graph(
        nodes,
        triples,
        carries={
            (_node(k, t - 1, layers), _node(k, t, layers)): 1 - share
            for k in range(layers)
            for t in range(1, steps)
            if leaky
        },
        drives={name: share for name in nodes if leaky},
        places={_node(k, t, layers): (k + 1, t + 1) for k in range(layers) for t in range(steps)},
    )


def residual(depth: int, sharing: Pattern | Sharing = "untied") -> Graph:
    """A residual network: h[l] = h[l-1] + W_l phi(h[l-1]), input into the first layer, readout from the last.

    Parameters
    ----------
    depth
        Number of layers, which is the number of steps of the task, such as `bayeskernel.tasks.endpoint`.
    sharing
        Over layers, as in `bayeskernel.Network`; a tied network applies one block repeatedly.
    """
    depth = positive_integer("depth", depth)
    labels = labels_of(sharing, depth)
    nodes = [f"h{t + 1}" for t in range(depth)]
    triples = [("x1", "h1", "U0")]
    triples += [(nodes[t - 1], nodes[t], f"W{labels.recurrent[t]}") for t in range(1, depth)]
    triples.append((nodes[-1], f"y{depth}", "V0"))
    carries = dict.fromkeys(itertools.pairwise(nodes), 1.0)
    places = {name: (1, t + 1) for t, name in enumerate(nodes)}
    return _graph(nodes, triples, carries=carries, places=places)


def bidirectional(steps: int, sharing: Pattern | Sharing = "tied") -> Graph:
    """Two chains, one reading the inputs forwards and one backwards; outputs read both at their step.

    Parameters
    ----------
    steps
        T.
    sharing
        Over steps within each chain, as in `bayeskernel.Network`; the two chains share nothing.
    """
    steps = positive_integer("steps", steps)
    labels = labels_of(sharing, steps)
    triples: Triples = []
    places: dict[str, tuple[int, int]] = {}
    for layer, (name, order) in enumerate((("f", range(steps)), ("b", range(steps)[::-1]))):
        for k, t in enumerate(order):
            own = f"{name}{t + 1}"
            if k:
                before = f"{name}{order[k - 1] + 1}"
                triples.append((before, own, f"W{name}{labels.recurrent[k]}"))
            triples.append((f"x{t + 1}", own, f"U{name}{labels.input[k]}"))
            triples.append((own, f"y{t + 1}", f"V{name}{labels.readout[t]}"))
            places[own] = (layer + 1, t + 1)
    return _graph([*places], triples, places=places)


def checked_leak(leak: object) -> float:
    """Refuse leaks outside (0, 1]."""
    share = positive("leak", leak)
    if share > 1:
        raise InputError("leak", "a number > 0 and <= 1", repr(leak))
    return share


def _into(k: int, t: int, layers: int, labels: StepLabels, skip: int | None) -> Triples:
    """Edges into layer k at step t, all from zero."""
    own, triples = _node(k, t, layers), list[tuple[str, str, str]]()
    if t:
        label = _label("W", k, labels.recurrent[t], layers)
        triples.append((_node(k, t - 1, layers), own, label))
    if skip is not None and t >= skip:
        label = _label("S", k, labels.recurrent[t], layers)
        triples.append((_node(k, t - skip, layers), own, label))
    if k:
        label = _label("F", k, labels.feedforward[t], layers)
        triples.append((_node(k - 1, t, layers), own, label))
    else:
        triples.append((f"x{t + 1}", own, f"U{labels.input[t]}"))
    return triples


def _node(k: int, t: int, layers: int) -> str:
    return f"h{t + 1}" if layers == 1 else f"h{k + 1}.{t + 1}"


def _label(kind: str, k: int, label: int, layers: int) -> str:
    return f"{kind}{label}" if layers == 1 else f"{kind}{k + 1}.{label}"


def _graph(nodes: Sequence[str], triples: Triples, **more: object) -> Graph:
    edges = [(source, target) for source, target, _ in triples]
    return Graph(nodes, edges, [label for _, _, label in triples], **more)  # type: ignore[arg-type]
