"""Sign flips, checked on networks: flipped weights must give the same likelihood."""

import itertools

import jax
import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel import gauge
from bayeskernel.gauge import align, canonical, flip_kernel, sign_symmetry
from bayeskernel.inference import weights
from bayeskernel.kernels import representational_kernel

from .conftest import normals

TASKS = {
    "endpoint": bk.tasks.endpoint([[1.0, 0.5], [0.3, -1.0]], [1.0, -1.0], 4),
    "every step": bk.Task(np.random.default_rng(0).normal(size=(4, 2, 2)), np.ones((4, 2))),
    "two targets": bk.tasks.sine(2, 4, supervised=[2, 4]),
    "odd gap": bk.tasks.sine(2, 4, supervised=[1, 4]),
}
SHARINGS = ["tied", "untied", [0, 0, 1, 1], bk.Sharing("tied", "tied", "untied")]


@pytest.mark.long
@pytest.mark.parametrize("sharing", SHARINGS, ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_group_is_exactly_the_flips_weights_can_undo(task, sharing, double):
    """Try all 2^(T-1) sign vectors on a network: a flip is allowed iff sign-changed weights give it."""
    check_group(bk.Network(5, activation="tanh", sharing=sharing), TASKS[task])


GRAPHS = {
    "leaky": ("endpoint", {"leak": 0.4}),
    "two layers": ("odd gap", {"layers": 2}),
    "layers of other sharing": (
        "endpoint", {"layers": 2, "sharing": bk.Sharing("untied", "tied", "tied", "untied")}
    ),
    "skip": ("endpoint", {"skip": 2, "sharing": bk.Sharing("untied")}),
    "tied skip": ("endpoint", {"skip": 2}),
    "biases": ("two targets", {"bias_std": 0.5}),
    "residual": ("endpoint", {"graph": bk.architectures.residual(4)}),
    "bidirectional": ("every step", {"graph": bk.architectures.bidirectional(4)}),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", GRAPHS)
def test_group_of_other_graphs_is_exactly_the_flips_weights_can_undo(name, double):
    task, options = GRAPHS[name]
    check_group(bk.Network(5, activation="tanh", **options), TASKS[task])


def check_group(network, task):
    net, data = weights.structure(network, 4), weights.arrays(network, task)
    z = normals(net, task)
    reachable = _reachable(z, net, data, task.supervised.any(axis=(1, 2)))
    allowed = {tuple(s) for s in sign_symmetry(network, task).elements()[0]}
    assert allowed == {s for s in reachable if s[0] == 1}


def test_many_free_signs_are_searched_for(monkeypatch):
    """Where signs are free in blocks, flips of one or two of them lead to the best there is."""
    network, task = bk.Network(16, "linear", [0, 0, 1, 1]), TASKS["endpoint"]
    symmetry = sign_symmetry(network, task)
    root = np.random.default_rng(3).normal(size=(4, 2, 40))
    reference = np.asarray(representational_kernel(root))
    planted = np.random.default_rng(4).integers(0, len(symmetry.elements()[0]), size=(3, 20))
    kernels = flip_kernel(
        np.broadcast_to(reference, (3, 20, 4, 2, 4, 2)), symmetry.elements()[0][planted]
    )
    every = align(kernels, reference, symmetry)
    monkeypatch.setattr(gauge, "_MOST_COMPARED", 0)
    searched = align(kernels, reference, symmetry)
    assert np.array_equal(every[0], searched[0])
    assert np.array_equal(every[1], searched[1])


def test_untied_networks_of_many_steps_have_many_free_signs():
    task = bk.tasks.endpoint([[1.0]], [1.0], 40)
    symmetry = sign_symmetry(bk.Network(16, "linear", "untied"), task)
    assert len(symmetry.generators) == 39
    kernel = np.random.default_rng(0).normal(size=(40, 1, 40, 1))
    kernel = kernel + kernel.transpose(2, 3, 0, 1)
    assert np.trace(canonical(kernel, symmetry).reshape(40, 40).T @ np.ones((40, 40))) > np.sum(
        kernel
    )


def _reachable(z, net, data, supervised):
    """Sign vectors s with h[t] -> s_t h[t] and unchanged supervised f, over all signs of matrices."""

    @jax.jit
    def run(z):
        h = weights.preactivations(z, net, data)
        return h, weights.outputs(z, h, net, data)

    h, f = map(np.asarray, run(z))
    found = set()
    counts = [len(net.graph.label_names[name]) for name in z]
    for signs in itertools.product([1, -1], repeat=sum(counts)):
        parts = np.split(np.array(signs), np.cumsum(counts)[:-1])
        flipped = {
            n: z[n] * s.reshape(-1, *(z[n].ndim - 1) * (1,)) for n, s in zip(z, parts, strict=True)
        }
        new, out = map(np.asarray, run(flipped))
        ratio = new[:, 0, 0] / h[:, 0, 0]
        flips_whole_steps = np.allclose(new, np.sign(ratio)[:, None, None] * h)
        if flips_whole_steps and np.allclose(out[supervised], f[supervised]):
            found.add(tuple(np.sign(ratio).astype(int)))
    return found


def test_non_odd_activation_has_no_flips():
    network = bk.Network(8, activation="relu")
    assert len(sign_symmetry(network, TASKS["endpoint"]).generators) == 0


def test_planted_flips_are_found():
    network, task = bk.Network(16, activation="linear"), TASKS["endpoint"]
    symmetry = sign_symmetry(network, task)
    root = np.random.default_rng(3).normal(size=(4, 2, 40))
    reference = np.asarray(representational_kernel(root))
    planted = np.random.default_rng(4).integers(0, len(symmetry.elements()[0]), size=(3, 20))
    kernels = flip_kernel(
        np.broadcast_to(reference, (3, 20, 4, 2, 4, 2)), symmetry.elements()[0][planted]
    )
    signs, _ = align(kernels, reference, symmetry)
    assert np.array_equal(flip_kernel(kernels, signs)[1, 7], reference)
    assert np.array_equal(signs, symmetry.elements()[0][planted])


def test_nothing_is_flipped_where_theory_has_no_sign():
    network, task = bk.Network(16, activation="linear"), TASKS["endpoint"]
    reference = np.zeros((4, 2, 4, 2))
    for t in range(4):
        reference[t, :, t, :] = np.eye(2)
    kernels = np.random.default_rng(0).normal(size=(5, 4, 2, 4, 2))
    assert (align(kernels, reference, sign_symmetry(network, task))[0] == 1).all()


def test_canonical_kernel_has_positively_correlated_steps():
    network, task = bk.Network(16, activation="linear"), TASKS["endpoint"]
    positive = np.einsum("ts,ab->tasb", 0.5 + np.eye(4), np.eye(2))
    flipped = flip_kernel(positive, np.array([1, -1, 1, -1]))
    assert np.array_equal(canonical(flipped, sign_symmetry(network, task)), positive)
