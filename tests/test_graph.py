"""Graphs of nodes: their maps against networks run unit by unit, and what is refused."""

import json

import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel import architectures
from bayeskernel.errors import InputError
from bayeskernel.graph import Graph
from bayeskernel.likelihood import covariance
from bayeskernel.problem import problem

OWN = Graph(
    nodes=["late", "first", "second"],  # sorted: a node comes after what it reads
    edges=[("first", "second"), ("first", "late"), ("second", "late"), ("x1", "first"), ("x3", "second"),
           ("1", "second"), ("late", "y3"), ("second", "y3"), ("second", "y1")],
    labels=["A", "B", "A", "U", "U", "b", "V", "W", "V"],
    scales={"B": 0.5, "V": 2.0, "U": 0.7},
    carries={("first", "late"): 0.3},
    drives={"late": 0.8},
)  # fmt: skip
NETWORKS = {
    "leaky": {"leak": 0.3, "sharing": bk.Sharing([0, 0, 1], "tied", "untied")},
    "stacked": {"layers": 2, "leak": 0.6, "bias_std": 0.4, "sharing": "tied"},
    "skip": {"skip": 2, "sharing": "untied"},
    "residual": {"graph": architectures.residual(3, "tied")},
    "bidirectional": {"graph": architectures.bidirectional(3)},
    "own": {"graph": OWN, "bias_std": 0.4},
}


def network(name, activation="tanh", width=7, **more):
    scales = {"input_std": 0.9, "recurrent_std": 1.3, "readout_std": 1.2, "noise": 0.3}
    return bk.Network(width, activation, **(scales | NETWORKS[name] | more))


def task(name, patterns=2):
    rng = np.random.default_rng(7)
    inputs, targets = rng.normal(size=(3, patterns, 2)), rng.normal(size=(3, patterns, 2))
    targets[1] = np.nan
    targets[0, 0, 1] = np.nan
    if name in ("residual", "own"):
        inputs[1] = 0
    if name == "residual":
        inputs[1:], targets[:2] = 0, np.nan
    return bk.Task(inputs, targets)


def run_by_hand(net, inputs, activities, rng):
    """h and f of weights drawn from the prior, edge by edge; acting on given activities, or on the network's own."""
    graph, N, D = net.graph_of(len(inputs)), net.width, inputs.shape[2]
    scales = dict(graph.scales)
    drawn = {}
    for (source, target), label in zip(graph.edges, graph.labels, strict=True):
        scale = scales.get(label, 1.0)
        if label in drawn:
            continue
        if target[0] == "y":
            drawn[label] = scale * net.readout_std * rng.standard_normal((2, N))
        elif source == "1":
            drawn[label] = scale * net.bias_std * rng.standard_normal(N)
        elif source[0] == "x":
            drawn[label] = scale * net.input_std / np.sqrt(D) * rng.standard_normal((N, D))
        else:
            drawn[label] = scale * net.recurrent_std / np.sqrt(N) * rng.standard_normal((N, N))
    h, f = {}, np.zeros((len(inputs), inputs.shape[1], 2))

    def read(source):
        return np.tanh(h[source]) if activities is None else activities[source]

    for node in graph.nodes:
        total = np.zeros((inputs.shape[1], N))
        for (source, target), label in zip(graph.edges, graph.labels, strict=True):
            if target != node:
                continue
            if source == "1":
                total += drawn[label]
            elif source[0] == "x":
                total += inputs[int(source[1:]) - 1] @ drawn[label].T
            else:
                total += read(source) @ drawn[label].T
        total *= dict(graph.drives).get(node, 1.0)
        for (source, target), factor in graph.carries:
            if target == node:
                total += factor * h[source]
        h[node] = total
    for (source, target), label in zip(graph.edges, graph.labels, strict=True):
        if target[0] == "y":
            f[int(target[1:]) - 1] += read(source) @ drawn[label].T / N
    return np.stack([h[node] for node in graph.nodes]), f


@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_are_those_of_networks_run_by_hand(name):
    """Given activities, K and Q are the exact covariances over weights: means over draws of all weights."""
    given, net = task(name), network(name)
    defined, rng = problem(net, given), np.random.default_rng(0)
    nodes = net.graph_of(3).nodes
    activities = {node: rng.standard_normal((2, net.width)) for node in nodes}
    flat = np.concatenate([activities[node] for node in nodes])
    C, count = flat @ flat.T / net.width, 4000
    excess = np.zeros((count, defined.size, defined.size))
    outputs = np.zeros((count, 6, 6))
    for r in range(count):
        h, f = run_by_hand(net, given.inputs, activities, rng)
        h, f = h.reshape(defined.size, -1), f.reshape(6, 2)
        excess[r] = h @ h.T / net.width - defined.preactivation_kernel(C)
        outputs[r] = f @ f.T / 2 * net.width - defined.read(C)
    for differences in (excess, outputs):
        error = differences.std(0) / np.sqrt(count)
        varying = error > 1e-12
        assert np.abs(differences.mean(0)[varying] / error[varying]).max() < 5.0
        assert np.abs(differences.mean(0)[~varying]).max(initial=0) < 1e-12
    assert np.trace(defined.input_kernel) > 0.1


@pytest.mark.parametrize("name", NETWORKS)
def test_adjoints(name):
    defined = problem(network(name), task(name))
    rng = np.random.default_rng(1)
    A, B = rng.normal(size=(2, defined.size, defined.size))
    Q = rng.normal(size=(6, 6))
    assert np.sum(defined.fed(A) * B) == pytest.approx(np.sum(A * defined.fed_back(B)))
    assert np.sum(defined.read(A) * Q) == pytest.approx(np.sum(A * defined.read_back(Q)))
    supervised = np.repeat(task(name).supervised.any(axis=(1, 2)), 2)
    both = np.outer(supervised, supervised)
    assert defined.read_supervised(A) == pytest.approx(np.where(both, defined.read(A), 0))
    assert defined.read_supervised_back(Q) == pytest.approx(defined.read_back(np.where(both, Q, 0)))


def test_readouts_of_several_nodes_entry_by_entry():
    defined = problem(network("own"), task("own"))
    root = np.random.default_rng(2).normal(size=(6, 9))
    C = root @ root.T
    # Nodes first, second, late; y1 reads second by V, y3 late by V and second by W.
    V, W, blocks = (2 * 1.2) ** 2, 1.2**2, C.reshape(3, 2, 3, 2)
    Q = np.zeros((3, 2, 3, 2))
    Q[0, :, 0] = V * blocks[1, :, 1]
    Q[0, :, 2] = V * blocks[1, :, 2]
    Q[2, :, 0] = V * blocks[2, :, 1]
    Q[2, :, 2] = V * blocks[2, :, 2] + W * blocks[1, :, 1]
    assert defined.read(C) == pytest.approx(Q.reshape(6, 6))
    for reading in defined.readings:
        own = np.ix_(reading.sites, reading.sites)
        S = covariance(defined.read(C), reading, defined)
        assert pytest.approx(Q.reshape(6, 6)[own] + 0.3 * np.eye(len(reading.sites))) == S


def test_leak_mixes_what_a_chain_reads():
    """h[t] = (1 - leak) h[t-1] + leak u[t], by its sum over the past."""
    graph = bk.Network(4, leak=0.25).graph_of(4)
    expected = [[0.25 * 0.75 ** (t - s) if s <= t else 0 for s in range(4)] for t in range(4)]
    assert graph.mixing == pytest.approx(np.array(expected))
    assert graph.maps("recurrent")[0][:, :3] == pytest.approx(graph.mixing[:, 1:])


def test_no_leak_one_layer_no_skip_is_the_chain():
    plain, spelled = bk.Network(8), bk.Network(8, leak=1.0, layers=1, skip=None, bias_std=0.0)
    assert plain == spelled
    assert plain.graph_of(3) == architectures.stacked(3)


def test_nodes_are_sorted_and_graphs_survive_json():
    assert OWN.nodes == ("first", "second", "late")
    assert Graph(**json.loads(json.dumps(OWN.describe()))) == OWN
    assert hash(OWN) == hash(Graph(**OWN.describe()))
    stack = architectures.stacked(3, layers=2)
    assert stack.places_of_nodes.tolist() == [[k, t] for k in (1, 2) for t in (1, 2, 3)]


BAD = {
    "cycle": ({"edges": [("a", "b"), ("b", "a"), ("x1", "a"), ("b", "y1")], "labels": list("WWUV")}, "no cycle"),
    "carried cycle": ({"carries": {("b", "a"): 0.5}}, "no cycle, got"),
    "unreachable": ({"edges": [("a", "b"), ("x1", "b"), ("a", "y1")], "labels": list("WUV")}, "y1 read from nodes"),
    "shapes": ({"labels": ["W", "W", "V"]}, r"'W': \(N, D\) and \(N, N\)|'W': \(N, N\) and \(N, D\)"),
    "label count": ({"labels": ["U", "W"]}, "expected 3 labels, one per edge, got 2"),
    "unknown source": ({"edges": [("x1", "a"), ("c", "b"), ("b", "y1")]}, "sources among the nodes"),
    "unknown target": ({"edges": [("x1", "a"), ("a", "c"), ("b", "y1")]}, "targets among the nodes"),
    "input read out": ({"edges": [("x1", "a"), ("a", "b"), ("x1", "y1")]}, "targets among the nodes"),
    "no output": ({"edges": [("x1", "a"), ("a", "b")], "labels": ["U", "W"]}, "one to an output"),
    "twice": ({"edges": [("x1", "a"), ("x1", "a"), ("b", "y1")]}, "every edge once"),
    "nodes twice": ({"nodes": ["a", "a"]}, "each once"),
    "reserved name": ({"nodes": ["a", "b", "x2"]}, "other than those of inputs and outputs"),
    "a string": ({"nodes": "ab"}, "a sequence of names"),
    "scale of no label": ({"scales": {"Z": 1.0}}, "names among"),
    "negative scale": ({"scales": {"W": -1.0}}, "finite number > 0"),
    "drive of no node": ({"drives": {"c": 1.0}}, "names among"),
    "carry of no node": ({"carries": {("a", "c"): 1.0}}, "pairs of nodes"),
    "edges": ({"edges": [("x1", "a", "b")]}, "pairs"),
    "places": ({"places": {"a": (0, 1)}}, "from 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_graphs_are_refused(name):
    good = {
        "nodes": ["a", "b"],
        "edges": [("x1", "a"), ("a", "b"), ("b", "y1")],
        "labels": ["U", "W", "V"],
    }
    Graph(**good)
    changed, message = BAD[name]
    with pytest.raises(InputError, match=message):
        Graph(**(good | changed))


BAD_NETWORKS = {
    "no leak": ({"leak": 0.0}, "leak: expected a finite number > 0"),
    "leak above one": ({"leak": 1.5}, "leak: expected a number > 0 and <= 1, got 1.5"),
    "layers": ({"layers": 0}, "layers: expected an integer >= 1"),
    "skip": ({"skip": 1}, "skip: expected an integer >= 2"),
    "graph beside leak": (
        {"graph": architectures.residual(3), "leak": 0.5},
        "no sharing, leak, layers or skip",
    ),
    "biases of no graph": ({"graph": architectures.residual(3), "bias_std": 0.5}, "bias_std"),
    "no biases for a graph": ({"graph": OWN}, "bias_std: expected a positive number"),
    "not a graph": ({"graph": "chain"}, "graph: expected a Graph"),
}


@pytest.mark.parametrize("name", BAD_NETWORKS)
def test_bad_networks_are_refused(name):
    changed, message = BAD_NETWORKS[name]
    with pytest.raises(InputError, match=message):
        bk.Network(8, **changed)


def test_tasks_that_a_graph_cannot_read_are_refused():
    residual = bk.Network(8, graph=architectures.residual(3))
    with pytest.raises(
        InputError,
        match=r"inputs at steps that a node of the graph reads, got inputs at steps \[2, 3\]",
    ):
        problem(residual, bk.Task(np.ones((3, 1, 1)), [[np.nan], [np.nan], [1.0]]))
    with pytest.raises(InputError, match=r"targets at steps \[1\]"):
        problem(residual, bk.Task([[[1.0]], [[0.0]], [[0.0]]], [[1.0], [np.nan], [1.0]]))
    with pytest.raises(InputError, match="expected 3 steps, as the network's graph has, got 2"):
        problem(residual, bk.tasks.endpoint([[1.0]], [1.0], 2))


def test_description_makes_the_network_again():
    for name in NETWORKS:
        described = json.loads(json.dumps(network(name).describe()))
        if isinstance(described["sharing"], dict):
            described["sharing"] = bk.Sharing(**described["sharing"])
        if described["graph"] is not None:
            described["graph"] = Graph(**described["graph"])
        assert bk.Network(**described) == network(name)


def test_a_stack_edge_by_edge():
    """Labels of every edge written out: two layers, a skip, four sharing patterns."""
    sharing = bk.Sharing([0, 0, 1], "untied", "tied", [0, 1, 1])
    graph = architectures.stacked(3, sharing, layers=2, skip=2, leak=0.5, biases=True)
    expected = {
        ("x1", "h1.1"): "U0", ("x2", "h1.2"): "U1", ("x3", "h1.3"): "U2",
        ("h1.1", "h1.2"): "W1.0", ("h1.2", "h1.3"): "W1.1", ("h1.1", "h1.3"): "S1.1",
        ("h2.1", "h2.2"): "W2.0", ("h2.2", "h2.3"): "W2.1", ("h2.1", "h2.3"): "S2.1",
        ("h1.1", "h2.1"): "F2.0", ("h1.2", "h2.2"): "F2.1", ("h1.3", "h2.3"): "F2.1",
        ("h2.1", "y1"): "V0", ("h2.2", "y2"): "V0", ("h2.3", "y3"): "V0",
        **{("1", f"h{k}.{t}"): f"b{k}.{t - 1}" for k in (1, 2) for t in (1, 2, 3)},
    }  # fmt: skip
    assert dict(zip(graph.edges, graph.labels, strict=True)) == expected
    assert dict(graph.drives) == dict.fromkeys(graph.nodes, 0.5)
    within = {(f"h{k}.{t}", f"h{k}.{t + 1}"): 0.5 for k in (1, 2) for t in (1, 2)}
    assert dict(graph.carries) == within


def test_residual_and_bidirectional_edge_by_edge():
    residual = architectures.residual(3)
    assert dict(zip(residual.edges, residual.labels, strict=True)) == {
        ("x1", "h1"): "U0", ("h1", "h2"): "W0", ("h2", "h3"): "W1", ("h3", "y3"): "V0",
    }  # fmt: skip
    assert dict(residual.carries) == {("h1", "h2"): 1.0, ("h2", "h3"): 1.0}
    both = architectures.bidirectional(2)
    assert dict(zip(both.edges, both.labels, strict=True)) == {
        ("x1", "f1"): "Uf0", ("f1", "f2"): "Wf0", ("x2", "f2"): "Uf0", ("f1", "y1"): "Vf0", ("f2", "y2"): "Vf0",
        ("x2", "b2"): "Ub0", ("b2", "b1"): "Wb0", ("x1", "b1"): "Ub0", ("b1", "y1"): "Vb0", ("b2", "y2"): "Vb0",
    }  # fmt: skip
