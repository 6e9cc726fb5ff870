"""Samplers of leaky, stacked, residual and other graphs: densities, gradients, exact weights, predictions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel.inference import coordinates as co
from bayeskernel.inference import preactivations as pre
from bayeskernel.inference import weights
from bayeskernel.likelihood import covariance
from bayeskernel.problem import problem
from tests.conftest import normals
from tests.test_graph import NETWORKS, network, task

QUICK = {"num_warmup": 20, "num_samples": 8, "num_chains": 2, "progress": False}


def by_hand(net, inputs, drawn):
    """h (nodes, P, N) and f (T, P, O) of a network with given weights, label by label and edge by edge."""
    graph, h, f = net.graph_of(len(inputs)), {}, np.zeros((len(inputs), inputs.shape[1], 2))
    kinds = graph.label_names
    own = {
        label: drawn[f"{kind}_weights"][k]
        for kind, labels in kinds.items()
        for k, label in enumerate(labels)
    }
    for node in graph.nodes:
        total = np.zeros((inputs.shape[1], net.width))
        for (source, target), label in zip(graph.edges, graph.labels, strict=True):
            if target == node and source == "1":
                total += own[label]
            elif target == node and source[0] == "x":
                total += inputs[int(source[1:]) - 1] @ own[label].T
            elif target == node:
                total += np.tanh(h[source]) @ own[label].T
        total = dict(graph.drives).get(node, 1.0) * total
        h[node] = total + sum(c * h[s] for (s, t), c in graph.carries if t == node)
    for (source, target), label in zip(graph.edges, graph.labels, strict=True):
        if target[0] == "y":
            f[int(target[1:]) - 1] += np.tanh(h[source]) @ own[label].T / net.width
    return np.stack([h[node] for node in graph.nodes]), f


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_space_runs_the_network(name, double):
    net, given = network(name), task(name)
    form, data = weights.structure(net, 3), weights.arrays(net, given)
    z = normals(form, given)
    drawn = {f"{k}_weights": np.asarray(w) for k, w in weights.scale_sites(z, form, data).items()}
    h = weights.preactivations(z, form, data)
    expected, outputs = by_hand(net, given.inputs, drawn)
    assert np.asarray(h) == pytest.approx(expected, abs=1e-12)
    assert np.asarray(weights.outputs(z, h, form, data)) == pytest.approx(outputs, abs=1e-12)


def evidence(z, net, given, defined):
    """Ln p(y | C(z)), node by node with explicit inverses, for pivots everywhere."""
    P, h = defined.patterns, np.zeros((0, net.width))
    activities = np.zeros((defined.size, net.width))
    for n in range(defined.nodes):
        K = defined.preactivation_kernel(activities @ activities.T / net.width)
        past, now = np.arange(n * P), np.arange(n * P, (n + 1) * P)
        gain = K[np.ix_(now, past)] @ np.linalg.inv(K[np.ix_(past, past)])
        root = np.linalg.cholesky(K[np.ix_(now, now)] - gain @ K[np.ix_(past, now)])
        h = np.concatenate([h, gain @ h + root @ z[now]])
        activities[now] = np.tanh(h[now])
    Q, total = defined.read(activities @ activities.T / net.width), 0.0
    for reading in defined.readings:
        S = covariance(Q, reading, defined) / net.width
        y = reading.targets
        total -= (
            np.trace(y.T @ np.linalg.solve(S, y)) / 2 + y.shape[1] * np.linalg.slogdet(S)[1] / 2
        )
    return total


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
def test_density_and_gradient_of_preactivations(name, double):
    net, given = network(name, width=12), task(name)
    defined = problem(net, given)
    form, data = co.coordinates(defined, co.find_pivots(defined)), co.arrays(defined)
    assert form.rank == defined.size
    rng = np.random.default_rng(0)
    one, two, direction = rng.normal(size=(3, form.rank, 12))
    run = jax.jit(lambda z: pre.log_likelihood_and_gradient(z, form, data))
    values = [float(run(jnp.asarray(z))[0]) for z in (one, two)]
    expected = [evidence(z, net, given, defined) for z in (one, two)]
    assert values[0] - values[1] == pytest.approx(expected[0] - expected[1], rel=1e-9)
    step = 1e-5
    ends = [evidence(one + s * step * direction, net, given, defined) for s in (2, 1, -1, -2)]
    slope = (-ends[0] + 8 * ends[1] - 8 * ends[2] + ends[3]) / (12 * step)
    assert float(jnp.sum(run(jnp.asarray(one))[1] * direction)) == pytest.approx(slope, rel=1e-7)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.long if n == "stacked" else pytest.mark.slow)
        for n in NETWORKS
    ],
)
def test_exact_weights_and_predictions(name, double):
    """Weights give back h and f to rounding; training patterns as new ones give f again; files survive."""
    net, given = network(name, width=16), task(name)
    draws = bk.sample(
        jax.random.key(1), net, given, space="preactivations", keep=("preactivations",), **QUICK
    )
    drawn = bk.weights(jax.random.key(2), draws, net, given)
    posterior = draws["posterior"]
    nodes = net.graph_of(3).size
    h = posterior["preactivation"].to_numpy().reshape(2, 8, nodes, 2, 16)[1, 2]
    own = {name: drawn[name].to_numpy()[1, 2] for name in drawn}
    again, outputs = by_hand(net, given.inputs, own)
    assert again == pytest.approx(h, abs=1e-9)
    assert outputs == pytest.approx(posterior["output"].to_numpy()[1, 2], abs=1e-9)
    predicted = bk.predict(jax.random.key(3), draws, net, given, given.inputs)
    assert predicted["output"].to_numpy() == pytest.approx(posterior["output"].to_numpy(), abs=1e-6)
    K = problem(net, given).preactivation_kernel(
        posterior["kernel"].to_numpy()[0, 0].reshape(2 * nodes, -1)
    )
    stored = posterior["preactivation_kernel"].to_numpy()[0, 0].reshape(2 * nodes, -1)
    assert stored == pytest.approx(K, abs=1e-12)


DIMS = {
    "leaky": ("step", "pattern", "other_step", "other_pattern"),
    "stacked": ("layer", "step", "pattern", "other_layer", "other_step", "other_pattern"),
    "own": ("node", "pattern", "other_node", "other_pattern"),
}


@pytest.mark.parametrize("name", DIMS)
def test_draws_name_layers_steps_and_nodes(name):
    net = network(name)
    activities = np.ones((2, net.graph_of(3).size, 2, net.width))
    measured = bk.measure(net, task(name), activities)["posterior"]
    assert measured["kernel"].dims == ("chain", "draw", *DIMS[name])


@pytest.mark.long
def test_a_stack_is_saved_compared_and_reported(tmp_path):
    net, given = network("stacked", "linear"), task("stacked")
    draws = bk.sample(jax.random.key(1), net, given, space="weights", keep=("weights",), **QUICK)
    bk.save(draws, tmp_path / "draws.nc")
    again = bk.load(tmp_path / "draws.nc")
    assert again["posterior"]["kernel"].dims == ("chain", "draw", *DIMS["stacked"])
    predicted = bk.predict(jax.random.key(3), again, net, given, given.inputs)
    expected = draws["posterior"]["output"].to_numpy()
    assert predicted["output"].to_numpy() == pytest.approx(expected, abs=1e-5)
    comparison = bk.compare(again, bk.solve(net, given))
    assert comparison.kernel.shape == (6, 2, 6, 2)
    assert comparison.table.index.names == ["node", "pattern", "other_node", "other_pattern"]
    assert "W1.0" in bk.report(comparison, tmp_path / "report.html").read_text()
