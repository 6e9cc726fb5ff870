"""Outliers of trained weights against spectra of exact weight draws."""

import jax
import numpy as np
import pytest

import bayeskernel as bk

WIDTH = 512


def spectra(network, task, *, singular):
    draws = bk.sample(
        jax.random.key(5),
        network,
        task,
        space="preactivations",
        keep=("preactivations",),
        num_warmup=300,
        num_samples=3,
        num_chains=2,
        progress=False,
    )
    W = np.asarray(bk.weights(jax.random.key(6), draws, network, task)["recurrent_weights"])
    W = W.reshape(-1, *W.shape[-3:])
    if singular:
        return np.sort(np.linalg.svd(W, compute_uv=False))[..., ::-1]
    values = np.linalg.eigvals(W)
    order = np.argsort(-np.abs(values), axis=-1)
    return np.take_along_axis(values, order, -1)


@pytest.mark.parametrize(
    ("activation", "y", "noise"),
    [
        pytest.param("erf", 2.5, 0.1, marks=pytest.mark.long),
        pytest.param("relu", 2.5, 0.1, marks=pytest.mark.slow),
        pytest.param("linear", 8.0, 0.5, marks=pytest.mark.slow),
    ],
)
def test_eigenvalue_outliers_of_tied_networks(activation, y, noise):
    task = bk.tasks.endpoint([[1.0]], [y], 3)
    network = bk.Network(WIDTH, activation, noise=noise)
    (predicted,) = bk.solve(network, task).outliers()
    values = spectra(network, task, singular=False)[:, 0]
    count = len(predicted.eigenvalues)
    assert count >= 1
    # An outlier moves by order 1/sqrt N between draws.
    error = values[:, 0].std() / np.sqrt(len(values)) + 2 / np.sqrt(WIDTH * len(values))
    outlier = np.abs(values[:, 0].real)
    assert abs(outlier.mean() - abs(predicted.eigenvalues[0])) < 4 * error
    # Nothing else beyond the circle; single eigenvalues leave it by a few 1/sqrt N in single draws.
    assert np.median(np.abs(values[:, count])) < 1 + 2 / np.sqrt(WIDTH)


@pytest.mark.long
def test_singular_value_spikes_of_untied_networks():
    task = bk.tasks.endpoint([[1.0]], [2.5], 3)
    network = bk.Network(WIDTH, "erf", "untied", noise=0.1)
    predicted = bk.solve(network, task).outliers()
    values = spectra(network, task, singular=True)
    assert [p.steps for p in predicted] == [(2,), (3,)]
    assert all(len(p.eigenvalues) == 0 for p in predicted)
    for label, outlier in enumerate(predicted, start=values.shape[1] - 2):
        count = len(outlier.singular_values)
        found = values[:, label]
        for k in range(count):
            error = found[:, k].std() / np.sqrt(len(found)) + 2 / np.sqrt(WIDTH * len(found))
            assert abs(found[:, k].mean() - outlier.singular_values[k]) < 4 * error
        assert found[:, count].max() < 2.05


@pytest.fixture(scope="module")
def trained():
    """Linear networks that Langevin dynamics brought above the transition, with their weights."""
    network, task = bk.Network(64, "linear", noise=0.5), bk.tasks.endpoint([[1.0]], [6.0], 3)
    tree = bk.train(
        jax.random.key(0),
        network,
        task,
        num_steps=8000,
        num_networks=32,
        keep=("weights",),
        progress=False,
    )
    assert bk.diagnose(tree).ok, bk.diagnose(tree).verdict
    (predicted,) = bk.solve(network, task).outliers()
    return tree["posterior"]["recurrent_weights"].to_numpy()[:, 0, 0], predicted.eigenvalues[0].real


def outlier_z(W, predicted):
    """Of the mean of the largest eigenvalue, which is off by order 1 / N."""
    largest = np.abs(np.linalg.eigvals(W)).max(1)
    return (largest.mean() - predicted) / np.hypot(
        largest.std(ddof=1) / np.sqrt(len(W)), 1 / W.shape[1]
    )


@pytest.mark.slow
def test_outliers_of_trained_networks_are_those_predicted(trained):
    assert abs(outlier_z(*trained)) < 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "planted",
    [
        lambda W: 1.15 * W,
        lambda W: np.random.default_rng(0).permuted(W, axis=2),
        lambda W: W - W.transpose(0, 2, 1),
    ],
    ids=["scale", "sources exchanged", "antisymmetric"],
)
def test_errors_in_trained_weights_are_noticed(trained, planted):
    W, predicted = trained
    assert abs(outlier_z(planted(W), predicted)) > 4


def test_nothing_stands_out_without_data():
    network = bk.Network(64, "erf", noise=0.1)
    (found,) = bk.solve(network, bk.tasks.endpoint([[1.0]], [1e-3], 3)).outliers()
    assert found.steps == (2, 3)
    assert not len(found.eigenvalues)
    assert not len(found.singular_values)
