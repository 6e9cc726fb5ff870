import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel.errors import InputError
from bayeskernel.meanfield import fluctuations, newton
from bayeskernel.meanfield.laws import Gaussian
from bayeskernel.meanfield.newton import Newton, Status
from bayeskernel.meanfield.sites import groups
from bayeskernel.meanfield.starts import prior_point
from bayeskernel.meanfield.whitened import near_minimum
from bayeskernel.problem import problem
from bayeskernel.sharing import labels_of
from tests.inference import references

from . import closed_forms

SHARINGS = {
    "tied": "tied",
    "untied": "untied",
    "blocks": [0, 0, 1, 1],
    "mixed": bk.Sharing([0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1]),
}


def matrix(kernel):
    return kernel.reshape(kernel.shape[0] * kernel.shape[1], -1)


def test_table_1(table1_task):
    """Reference values of docs/theory: kernels and fluctuations above the transition."""
    theory = bk.solve(bk.Network(64, "linear", "tied", noise=0.5), table1_task)
    C = matrix(theory.kernel)
    assert np.diag(C) == pytest.approx([2.277, 5.813, 14.844], abs=6e-4)
    assert np.abs(C[[0, 0, 1], [1, 2, 2]]) == pytest.approx([1.268, 1.260, 5.775], abs=6e-4)
    assert np.diag(matrix(theory.kernel_std(1))) == pytest.approx([1.96, 5.68, 16.14], abs=6e-3)
    assert theory.converged
    assert theory.branches[0].stable
    saddle = theory.branches[1]
    assert not saddle.stable
    assert matrix(saddle.kernel)[0, 1] == pytest.approx(0, abs=1e-6)


@pytest.mark.long
@pytest.mark.parametrize(("steps", "critical"), [(3, 2.9345), (4, 1.6853), (5, 1.2696)])
def test_table_3(steps, critical):
    """Coherence sets in at the critical signal; the untied gain there is (T-1)/(T-2)."""
    network = bk.Network(64, "linear", "tied", noise=0.3)
    y = closed_forms.first_lag_critical_signal(steps, 0.3)
    assert y == pytest.approx(critical, abs=6e-5)
    below, above = (
        bk.solve(network, bk.tasks.endpoint([[1.0]], [factor * y], steps))
        for factor in (0.98, 1.02)
    )
    assert np.abs(bk.coherence(below.kernel) - np.eye(steps)).max() < 1e-4
    assert bk.coherence(above.kernel)[0, 1] > 0.05
    gain = closed_forms.endpoint_gain(steps, y, 0.3)
    assert gain[0] == pytest.approx((steps - 1) / (steps - 2))


@pytest.mark.long
def test_first_order_transition_keeps_both_branches():
    """T = 8: coherence exists below the point where the incoherent solution loses stability."""
    y = 0.98 * closed_forms.first_lag_critical_signal(8, 0.3)
    theory = bk.solve(bk.Network(64, "linear", noise=0.3), bk.tasks.endpoint([[1.0]], [y], 8))
    best, other = theory.branches
    assert best.stable
    assert other.stable
    assert best.free_energy < other.free_energy
    assert bk.coherence(best.kernel)[0, 1] > 0.05
    assert abs(bk.coherence(other.kernel)[0, 1]) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_untied_endpoint_gain_is_equal_at_every_step(steps):
    scales = {"recurrent_std": 1.2, "input_std": 0.8, "readout_std": 1.5}
    network = bk.Network(64, "linear", "untied", noise=0.4, **scales)
    theory = bk.solve(network, bk.tasks.endpoint([[1.3]], [2.0], steps))
    ratio = np.diag(matrix(theory.kernel)) / np.diag(matrix(theory.preactivation_kernel))
    expected = closed_forms.endpoint_gain(steps, 2.0, 0.4, **scales, x2=1.3**2)
    assert ratio == pytest.approx(np.full(steps, expected[0]), rel=1e-6)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_free_energy_is_its_formula(sharing, general_task):
    network = bk.Network(64, "linear", SHARINGS[sharing], noise=0.4, recurrent_std=1.1)
    # Three features and four steps of inputs: K has full rank for two patterns.
    theory = bk.solve(network, general_task)
    C = matrix(theory.kernel)
    K, S = references.kernel_maps(network, general_task, labels_of(network.sharing, 4))
    covariances, targets = zip(*(S(C, o) for o in range(2)), strict=True)
    expected = closed_forms.free_energy(C, K(C), covariances, targets)
    assert theory.free_energy == pytest.approx(expected, rel=1e-10)
    assert bk.free_energy(network, general_task, theory.kernel) == pytest.approx(
        expected, rel=1e-10
    )


@pytest.mark.parametrize("sharing", SHARINGS)
def test_solution_satisfies_the_saddle_point_equations(sharing, general_task):
    """C^-1 = K^-1 - Ct, with Ct from its own formula and plain inverses."""
    network = bk.Network(64, "linear", SHARINGS[sharing], noise=0.4)
    theory = bk.solve(network, general_task)
    C, K, Ct = (matrix(k) for k in (theory.kernel, theory.preactivation_kernel, theory.conjugate))
    assert np.linalg.inv(np.linalg.inv(K) - Ct) == pytest.approx(C, rel=1e-6, abs=1e-7)
    # The conjugate kernel of step t carries M_W between steps t+1 and s+1, the steps that read C.
    _, S = references.kernel_maps(network, general_task, labels_of(network.sharing, 4))
    dual = np.zeros((8, 2))
    for o in range(2):
        covariance, targets = S(C, o)
        dual[general_task.supervised[..., o].ravel(), o] = np.linalg.solve(covariance, targets)
    labels = labels_of(network.sharing, 4)
    M_W, M_V = (np.equal.outer(own, own) for own in (labels.recurrent, labels.readout))
    B = (np.linalg.inv(K) @ C @ np.linalg.inv(K) - np.linalg.inv(K)).reshape(4, 2, 4, 2)
    expected = (dual @ dual.T).reshape(4, 2, 4, 2) * M_V[:, None, :, None]
    expected[:3, :, :3] += (M_W[:, None, :, None] * B)[1:, :, 1:]
    assert theory.conjugate == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_equal_and_distinct_labels_are_tied_and_untied(general_task):
    def kernel(sharing):
        return bk.solve(bk.Network(64, "linear", sharing), general_task).kernel

    assert np.array_equal(kernel("tied"), kernel([4, 4, 4, 4]))
    assert np.array_equal(kernel("untied"), kernel([3, 1, 0, 2]))


@pytest.mark.long
def test_one_step_knows_no_sharing():
    task = bk.Task(np.random.default_rng(0).normal(size=(1, 3, 5)), np.ones((1, 3)))
    tied, untied = (bk.solve(bk.Network(64, "linear", s), task) for s in ("tied", "untied"))
    assert np.array_equal(tied.kernel, untied.kernel)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_zero_signal_is_the_prior(sharing, general_task):
    network = bk.Network(64, "linear", SHARINGS[sharing])
    theory = bk.solve(network, general_task.scaled(0))
    assert theory.kernel == pytest.approx(bk.prior_kernel(network, general_task), rel=1e-10)
    assert theory.free_energy == pytest.approx(0, abs=1e-12)


def test_standard_scaling_keeps_the_prior_and_predicts_like_a_gaussian_process(general_task):
    network = bk.Network(64, "linear", "tied", noise=0.3, scaling="standard")
    theory = bk.solve(network, general_task)
    prior = bk.prior_kernel(network, general_task)
    assert theory.kernel == pytest.approx(prior, rel=1e-10)
    G = matrix(prior)
    for o in range(2):
        sites = np.flatnonzero(general_task.supervised[..., o])
        y = general_task.targets[..., o].ravel()[sites]
        mean = G[:, sites] @ np.linalg.solve(G[np.ix_(sites, sites)] + 0.3 * np.eye(len(sites)), y)
        assert theory.output[..., o].ravel() == pytest.approx(mean, rel=1e-8)


@pytest.mark.long
@pytest.mark.parametrize("sharing", SHARINGS)
def test_permuting_patterns_permutes_kernels(sharing):
    rng = np.random.default_rng(5)
    inputs, targets = rng.normal(size=(4, 3, 5)), rng.normal(size=(4, 3))
    order = np.array([2, 0, 1])
    network = bk.Network(64, "linear", SHARINGS[sharing])
    C = bk.solve(network, bk.Task(inputs, targets)).kernel
    moved = bk.solve(network, bk.Task(inputs[:, order], targets[:, order])).kernel
    assert moved == pytest.approx(C[:, order][:, :, :, order], rel=1e-5, abs=1e-6)


@pytest.mark.long
def test_duplicate_patterns_share_their_kernel_and_their_evidence():
    """Two copies with targets y and noise kappa act like one pattern with noise kappa / 2."""
    x, network = np.array([[1.0, 0.5], [0.2, -1.0]]), bk.Network(64, "linear", noise=0.4)
    twice = bk.tasks.endpoint(x[[0, 1, 0, 1]], [1.5, -1.0, 1.5, -1.0], 2)
    once = bk.tasks.endpoint(x, [1.5, -1.0], 2)
    copies = bk.solve(network, twice).kernel
    single = bk.solve(bk.Network(64, "linear", noise=0.2), once).kernel
    assert copies[:, :2][..., :2] == pytest.approx(single, rel=1e-5, abs=1e-6)
    assert copies[:, :2][..., 2:] == pytest.approx(copies[:, :2][..., :2], rel=1e-7, abs=1e-9)


@pytest.mark.long
def test_more_patterns_than_features():
    task = bk.tasks.digits(patterns_per_class=10, steps=4)  # 20 patterns, 16 features a step
    theory = bk.solve(bk.Network(512, "linear"), task)
    assert theory.converged
    assert np.linalg.matrix_rank(matrix(theory.kernel)[:20, :20], tol=1e-6) <= 16


def test_unfinished_descent_says_so(table1_task):
    theory = bk.solve(bk.Network(64, "linear", noise=0.5), table1_task, max_steps=2)
    assert not theory.converged
    assert theory.result is Status.MAX_STEPS
    assert theory.residual > 1e-7


def test_rounding_floor_is_reported(table1_task):
    posed = problem(bk.Network(64, "linear", noise=0.5), table1_task)
    rng = np.random.default_rng(0)
    descent = Newton(tolerance=1e-30, max_steps=50).descend(posed, prior_point(posed, rng), rng)
    assert descent.status is not Status.CONVERGED


def test_curvatures_that_are_too_small_do_not_make_steps_circle(table1_task, monkeypatch):
    """As those of a few particles may be: whole steps would then lead 1.2 times as far to the other side."""
    product = newton.Saddle.product
    monkeypatch.setattr(newton.Saddle, "product", lambda self, x: product(self, x) / 2.2)
    theory = bk.solve(bk.Network(64, "linear", noise=0.5), table1_task)
    assert theory.converged


class TestPredict:
    def test_training_patterns_are_reproduced(self, general_task):
        theory = bk.solve(bk.Network(64, "linear", SHARINGS["mixed"]), general_task)
        again = theory.predict(general_task.inputs)
        assert again.mean == pytest.approx(theory.output, rel=1e-7, abs=1e-9)
        assert again.kernel == pytest.approx(theory.kernel, rel=1e-7, abs=1e-9)

    @pytest.mark.parametrize(
        "sharing",
        [
            pytest.param("tied", marks=pytest.mark.slow),
            pytest.param("untied", marks=pytest.mark.slow),
            pytest.param("mixed", marks=pytest.mark.long),
        ],
    )
    def test_new_patterns_are_unsupervised_sites(self, sharing, general_task):
        """Solving with the new patterns added, unsupervised, must give the same kernels."""
        rng = np.random.default_rng(3)
        new = rng.normal(size=(4, 2, 3))
        network = bk.Network(64, "linear", SHARINGS[sharing])
        prediction = bk.solve(network, general_task).predict(new)
        unknown = np.full((4, 2, 2), np.nan)
        joint = bk.solve(
            network,
            bk.Task(
                np.concatenate([general_task.inputs, new], 1),
                np.concatenate([general_task.targets, unknown], 1),
            ),
        )
        assert prediction.kernel == pytest.approx(joint.kernel[:, 2:, :, 2:], rel=1e-4, abs=1e-5)
        assert prediction.cross_kernel == pytest.approx(
            joint.kernel[:, 2:, :, :2], rel=1e-4, abs=1e-5
        )
        assert prediction.mean == pytest.approx(joint.output[:, 2:], rel=1e-4, abs=1e-5)

    @pytest.mark.parametrize("shape", [(4, 3), (3, 2, 3), (4, 2, 2)])
    def test_wrong_shapes(self, shape, general_task):
        theory = bk.solve(bk.Network(64, "linear"), general_task)
        with pytest.raises(InputError, match="inputs: expected shape"):
            theory.predict(np.ones(shape))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda task: bk.solve(bk.Network(8, "tanh"), task, rng_key=3), "rng_key: expected"),
        (lambda task: bk.solve(bk.Network(8, "linear"), task, tolerance=0), "tolerance: expected"),
        (
            lambda task: bk.solve(bk.Network(8, "linear"), bk.Task(0 * task.inputs, task.targets)),
            "inputs: expected at least one input",
        ),
        (
            lambda task: bk.free_energy(bk.Network(8, "linear"), task, np.ones((3, 3))),
            "kernel: expected shape",
        ),
        (
            lambda task: bk.free_energy(bk.Network(8, "linear"), task, -np.ones((3, 1, 3, 1))),
            "kernel: expected positive definiteness",
        ),
        (
            lambda task: bk.solve(bk.Network(8, "linear", [0, 1]), task),
            "sharing: expected 3 labels",
        ),
    ],
)
def test_bad_input_is_named(call, message, table1_task):
    with pytest.raises(InputError) as caught:
        call(table1_task)
    assert message in str(caught.value)


@pytest.mark.long
def test_sequence_task_is_interpolated_by_sharing_alone():
    """Unsupervised steps: the RNN fills them in, the DNN predicts zero."""
    task = bk.tasks.sine(2, 6, supervised=[1, 2, 4, 6])
    truth = bk.tasks.sine(2, 6, supervised="all").targets
    tied, untied = (
        bk.solve(bk.Network(64, "linear", s, noise=0.01), task).output for s in ("tied", "untied")
    )
    held_out = [2, 4]
    error = np.sqrt(np.mean((tied - truth)[held_out] ** 2))
    assert error < 0.4 * np.sqrt(np.mean(truth[held_out] ** 2))
    assert np.abs(untied[held_out]).max() < 1e-6


def test_large_problems_take_another_way_to_the_lowest_curvature(monkeypatch, general_task):
    """Krylov vectors against the whole Hessian; the solver itself has one way."""
    network = bk.Network(512, "linear", [0, 0, 1, 1], noise=0.2)
    dense = bk.solve(network, general_task)
    monkeypatch.setattr(newton, "DENSE", 0)
    krylov = bk.solve(network, general_task)
    assert krylov.kernel == pytest.approx(dense.kernel, rel=1e-6, abs=1e-8)
    assert krylov.branches[0].curvature == pytest.approx(dense.branches[0].curvature, rel=0.05)


@pytest.mark.parametrize("dense", [newton.DENSE, 0])
@pytest.mark.parametrize("sharing", ["tied", "untied"])
def test_spread_of_single_outputs(monkeypatch, general_task, dense, sharing):
    """By one direction each, with all eigenvectors and with conjugate gradients, against the sum over all directions."""
    theory = bk.solve(bk.Network(64, "linear", sharing, noise=0.2), general_task)
    monkeypatch.setattr(fluctuations, "DENSE", dense)
    steps, patterns, outputs = theory.output.shape
    chosen = np.array([1, patterns, steps * patterns - 1])
    std = theory._fluctuations.outputs_at(chosen) / 8
    assert std == pytest.approx(theory.output_std().reshape(-1, outputs)[chosen], rel=1e-4)


def test_random_directions_give_the_spread_of_large_kernels(monkeypatch, general_task):
    theory = bk.solve(bk.Network(64, "linear", noise=0.2), general_task)
    exact = theory.kernel_std(), theory.output_std()
    monkeypatch.setattr(fluctuations, "MOST_COORDINATES", 0)
    large = bk.solve(bk.Network(64, "linear", noise=0.2), general_task)
    for probed, sums in zip((large.kernel_std(), large.output_std()), exact, strict=True):
        assert np.linalg.norm(probed - sums) < 0.15 * np.linalg.norm(sums)
    with pytest.raises(fluctuations.FluctuationError, match="coordinates"):
        large.kernel_shift()


@pytest.mark.parametrize(
    "network",
    [
        bk.Network(64, "linear", noise=0.1),
        bk.Network(64, "linear", noise=0.1, leak=0.6, layers=2),
    ],
    ids=["tied", "leaky layers"],
)
def test_descent_in_whitened_coordinates_ends_at_the_solution(network):
    rng = np.random.default_rng(3)
    targets = np.full((2, 3, 2), np.nan)
    targets[1] = 2 * rng.normal(size=(3, 2))
    targets[0, 1] = 1.0
    task = bk.Task(rng.normal(size=(2, 3, 8)), targets)
    theory, posed = bk.solve(network, task), problem(network, task)
    C, Ct = near_minimum(posed)
    np.testing.assert_allclose(posed.tensor(C), theory.kernel, atol=1e-6)
    np.testing.assert_allclose(posed.tensor(Ct), theory.conjugate, atol=1e-6)


def test_descent_in_whitened_coordinates_bears_a_nearly_singular_kernel():
    """As a difference of two inverses Ct was off by 3e-6 in C, and beyond the domain of F with more patterns."""
    rng = np.random.default_rng(0)
    targets = np.full((4, 20, 1), np.nan)
    targets[3] = rng.normal(size=(20, 1))
    posed = problem(
        bk.Network(64, "linear", noise=0.5), bk.Task(rng.normal(size=(4, 20, 20)), targets)
    )
    C, Ct = near_minimum(posed)
    K = posed.preactivation_kernel(C)
    assert np.linalg.cond(K) > 1e10
    law = Gaussian(groups(posed)[0]).law(K, Ct, symmetric=False)
    np.testing.assert_allclose(law.C, C, atol=1e-11)


def test_whitened_coordinates_want_an_innovation_of_every_site():
    """Three patterns of two features have none to spare."""
    task = bk.tasks.endpoint(np.random.default_rng(3).normal(size=(3, 2)), [1.0, 0.0, -1.0], 2)
    assert near_minimum(problem(bk.Network(64, "linear", noise=0.1), task)) is None
