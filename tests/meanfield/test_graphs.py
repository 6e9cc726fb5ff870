"""Theory of leaky, stacked, residual and other graphs: equations by hand, exact equalities, samples."""

import jax
import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel import architectures
from bayeskernel.gauge import canonical
from bayeskernel.problem import problem
from tests.test_graph import NETWORKS, network, run_by_hand, task


def plain_maps(net):
    """Prior scales times what reads what, by label, from the graph's edges: leaks by a power series."""
    graph = net.graph_of(3)
    m = graph.size
    index = {node: k for k, node in enumerate(graph.nodes)}
    carry, scales = np.zeros((m, m)), dict(graph.scales)
    for (source, target), factor in graph.carries:
        carry[index[target], index[source]] = factor
    mixing = sum(np.linalg.matrix_power(carry, k) for k in range(m))
    mixing = mixing @ np.diag([dict(graph.drives).get(node, 1.0) for node in graph.nodes])
    recurrent, readout = {}, {}
    for (source, target), label in zip(graph.edges, graph.labels, strict=True):
        if source in index and target in index:
            G = recurrent.setdefault(label, np.zeros((m, m)))
            G[index[target], index[source]] = net.recurrent_std * scales.get(label, 1.0)
        elif target[0] == "y":
            R = readout.setdefault(label, np.zeros((3, m)))
            R[int(target[1:]) - 1, index[source]] = net.readout_std * scales.get(label, 1.0)
    P = np.eye(2)
    return [np.kron(mixing @ G, P) for G in recurrent.values()], [
        np.kron(R, P) for R in readout.values()
    ]


@pytest.mark.parametrize("name", NETWORKS)
def test_linear_solution_satisfies_the_equations_of_its_graph(name):
    """C^-1 = K^-1 - Ct, and Ct = sum R^T a a^T R + sum G^T B G with plain inverses."""
    net, given = network(name, "linear", width=64), task(name).scaled(2.0)
    theory, defined = bk.solve(net, given), problem(net, given)
    assert theory.converged
    C, K, Ct = (
        defined.matrix(k) for k in (theory.kernel, theory.preactivation_kernel, theory.conjugate)
    )
    weights, readouts = plain_maps(net)
    expected = defined.input_kernel + sum(G @ C @ G.T for G in weights)
    assert pytest.approx(expected, rel=1e-10) == K
    assert np.linalg.inv(np.linalg.inv(K) - Ct) == pytest.approx(C, rel=1e-5, abs=1e-6)
    Q = sum(R @ C @ R.T for R in readouts)
    dual = np.zeros((6, 2))
    for o in range(2):
        own = np.flatnonzero(given.supervised[..., o].ravel())
        S = Q[np.ix_(own, own)] + net.noise * np.eye(len(own))
        dual[own, o] = np.linalg.solve(S, given.targets[..., o].ravel()[own])
    inverse = np.linalg.inv(K)
    B = inverse @ C @ inverse - inverse
    conjugate = sum(R.T @ dual @ dual.T @ R for R in readouts) + sum(G.T @ B @ G for G in weights)
    assert pytest.approx(conjugate, rel=1e-4, abs=1e-5) == Ct
    assert theory.output.reshape(6, 2) == pytest.approx(Q @ dual, rel=1e-6, abs=1e-8)


def test_a_stack_of_one_step_is_a_deep_network():
    """Layers of a stack at T = 1 are the steps of an untied chain: the same kernel, node by node."""
    chain = bk.tasks.endpoint([[1.0, 0.4], [-0.3, 0.8]], [1.5, -1.0], 3)
    single = bk.Task(chain.inputs[:1], chain.targets[-1:])
    for activation in ("linear", "erf"):
        deep = bk.solve(bk.Network(8, activation, "untied"), chain)
        stack = bk.solve(bk.Network(8, activation, layers=3), single)
        assert deep.converged
        assert stack.converged
        assert stack.kernel == pytest.approx(deep.kernel, rel=1e-7, abs=1e-9)
        assert stack.output[0] == pytest.approx(deep.output[-1], rel=1e-7)


def test_carried_units_are_units_of_a_weight_less():
    """A residual step without weights of its own copies its units: all kernels of the two nodes agree."""
    graph = bk.Graph(
        nodes=["a", "b"],
        edges=[("x1", "a"), ("b", "y2")],
        labels=["U", "V"],
        carries={("a", "b"): 1.0},
    )
    given = bk.tasks.endpoint([[1.0], [0.5]], [1.0, -0.5], 2)
    C = bk.solve(bk.Network(8, "linear", graph=graph), given).kernel
    assert C[0, :, 0] == pytest.approx(C[1, :, 1], rel=1e-6)
    assert C[0, :, 1] == pytest.approx(C[1, :, 1], rel=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
def test_prior_kernel_is_the_mean_over_wide_networks(name):
    """Twenty networks of 1000 units run node by node; the mean strays by their spread and order 1/N."""
    net, given = network(name, width=1000), task(name)
    kernels, rng = [], np.random.default_rng(0)
    for _ in range(20):
        h = run_by_hand(net, given.inputs, None, rng)[0]
        phi = np.tanh(h).reshape(-1, net.width)
        kernels.append(phi @ phi.T / net.width)
    expected = bk.prior_kernel(net, given).reshape(kernels[0].shape)
    error = np.std(kernels, axis=0) / np.sqrt(20) + 2 / net.width
    assert np.abs((np.mean(kernels, axis=0) - expected) / error).max() < 5


SAMPLED = {"stacked": "linear", "leaky": "linear", "bidirectional": "linear", "own": "linear"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLED)
def test_kernels_of_a_million_units_are_the_theory(name):
    """The space of kernels at N = 10^6, where fluctuations are a thousandth."""
    net, given = network(name, "linear", width=10**6), task(name).scaled(2.0)
    draws = bk.sample(
        jax.random.key(0), net, given, space="kernels", num_warmup=200, num_samples=300, num_chains=2, progress=False
    )  # fmt: skip
    comparison = bk.compare(draws, bk.solve(net, given))
    assert comparison.smallest_ess > 50
    assert comparison.agrees, comparison.verdict
    assert comparison.frobenius_error < 0.003


def test_layers_part_at_one_critical_signal():
    """Of a stack every pair of nodes may become coherent; the direction says which does first."""
    endpoint = bk.tasks.endpoint([[1.0]], [1.0], 3)
    one = bk.critical_signal(bk.Network(8, "linear", noise=0.3), endpoint)
    assert one.spinodal == pytest.approx(2.9345, abs=1e-4)
    two = bk.critical_signal(bk.Network(8, "linear", layers=2, noise=0.3), endpoint)
    assert two.direction.shape == (6, 1, 6, 1)
    blocks = two.direction[:, 0, :, 0].reshape(2, 3, 2, 3)
    # Layers have weights of their own, so coherence is between steps of a layer.
    assert np.abs(blocks[0, :, 1]).max() < 1e-8
    above = bk.solve(
        bk.Network(8, "linear", layers=2, noise=0.3), endpoint.scaled(1.1 * two.spinodal)
    )
    below = bk.solve(
        bk.Network(8, "linear", layers=2, noise=0.3), endpoint.scaled(0.97 * two.coexistence)
    )
    for theory, coherent in ((above, True), (below, False)):
        C = theory.kernel[:, 0, :, 0]
        assert (np.abs(C - np.diag(np.diag(C))).max() > 0.01) == coherent


def test_leak_leaves_no_sharp_transition():
    """Leaky units carry their sign over, so independent steps are no solution at any signal."""
    found = bk.critical_signal(
        bk.Network(8, "linear", leak=0.5), bk.tasks.endpoint([[1.0]], [1.0], 3)
    )
    assert found.order == "crossover"


def test_graph_spelled_out_parts_where_the_chain_does():
    chain = bk.Graph(
        ["a", "b", "c"],
        [("x1", "a"), ("a", "b"), ("b", "c"), ("c", "y3")],
        ["U", "W", "W", "V"],
        scales={"V": 2.0},
    )
    endpoint = bk.tasks.endpoint([[1.0]], [1.0], 3)
    found = bk.critical_signal(
        bk.Network(8, "linear", graph=chain, readout_std=0.5, noise=0.3), endpoint
    )
    assert found.spinodal == pytest.approx(2.934493, abs=1e-5)
    assert found.order == "continuous"


def test_one_source_read_through_the_same_weights_is_a_crossover():
    """Two nodes with the same weights and source have the same units; there is nothing to become coherent."""
    twins = bk.Graph(
        ["a", "b", "c"],
        [("x1", "a"), ("a", "b"), ("a", "c"), ("b", "y2"), ("c", "y3")],
        ["U", "W", "W", "V", "Z"],
    )
    given = bk.Task([[[1.0]], [[0.0]], [[0.0]]], [[np.nan], [1.0], [1.0]])
    assert bk.critical_signal(bk.Network(8, "linear", graph=twins), given).order == "crossover"


def test_outliers_name_their_weights():
    theory = bk.solve(network("stacked", "linear", width=64), task("stacked").scaled(4.0))
    assert [o.label for o in theory.outliers()] == ["W1.0", "F2.0", "W2.0"]
    assert [o.steps for o in theory.outliers()] == [(2, 3), (1, 2, 3), (2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"leak": 0.6}, {"layers": 2}], ids=str)
def test_spectra_of_exact_weights(options):
    given = bk.tasks.endpoint([[1.0]], [4.0], 3)
    net = bk.Network(1024, "erf", noise=0.1, **options)
    draws = bk.sample(
        jax.random.key(5), net, given, space="preactivations", keep=("preactivations",),
        num_warmup=400, num_samples=3, num_chains=2, progress=False,
    )  # fmt: skip
    W = bk.weights(jax.random.key(6), draws, net, given)["recurrent_weights"].to_numpy()
    values = np.linalg.svd(W.reshape(-1, *W.shape[2:]), compute_uv=False)
    predicted = bk.solve(net, given).outliers()
    assert max(len(o.singular_values) for o in predicted) > 0
    for label, outlier in enumerate(predicted):
        found, count = values[:, label], len(outlier.singular_values)
        for k in range(count):
            error = found[:, k].std() / np.sqrt(len(found)) + 2 / np.sqrt(1024 * len(found))
            assert abs(found[:, k].mean() - outlier.singular_values[k]) < 4 * error
        assert found[:, count].max() < 2.06


def test_signs_of_a_stack_are_fixed():
    net, given = bk.Network(8, "linear", layers=2), bk.tasks.endpoint([[1.0]], [6.0], 3)
    theory = bk.solve(net, given)
    symmetry = problem(net, given).symmetry
    assert len(symmetry.generators) == 2
    assert canonical(theory.kernel, symmetry) == pytest.approx(theory.kernel)
    assert architectures.stacked(3, layers=2).size == 6
