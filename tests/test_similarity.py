"""Measures of similarity against textbook formulas on explicit activities, and against rsatoolbox."""

import jax
import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes
from scipy.spatial.distance import cdist, pdist, squareform
from scipy.stats import spearmanr, special_ortho_group

import bayeskernel as bk
from bayeskernel.errors import InputError

from .conftest import as_run, fake_draws

P, N = 7, 40
MEASURES = ("cka", "rsa", "procrustes", "bures")
TASK = bk.tasks.endpoint(np.random.default_rng(1).normal(size=(4, 3)), [1.0, -1.0, 0.5, 0.2], 3)
NETWORK = bk.Network(64, "linear", noise=0.5)


def activities(seed, units=N):
    """Of P patterns with a mean that does not vanish and directions of different strength."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(P, units)) * np.linspace(0.1, 2, units) + rng.normal(size=units)


def kernel(phi):
    return phi @ phi.T / phi.shape[1]


def textbook(x, y, measure):
    """From activities, not kernels."""
    x, y = x - x.mean(0), y - y.mean(0)
    if measure == "cka":  # Kornblith et al. (2019), equation for features
        return np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    if measure == "rsa":
        return spearmanr(pdist(x), pdist(y)).statistic
    if measure == "procrustes":
        rotation = orthogonal_procrustes(y, x)[0]
        return np.linalg.norm(x - y @ rotation) / np.sqrt(x.shape[1])
    rotation = orthogonal_procrustes(y, x)[0]
    return np.sum(x * (y @ rotation)) / np.linalg.norm(x) / np.linalg.norm(y)


@pytest.mark.parametrize("measure", MEASURES)
def test_kernels_give_what_activities_give(measure):
    x, y = activities(0), activities(1)
    found = bk.similarity(kernel(x), kernel(y), measure)
    assert isinstance(found, float)
    assert found == pytest.approx(textbook(x, y, measure), abs=1e-10)


@pytest.mark.parametrize("measure", MEASURES)
def test_rotations_of_units_and_shifts_of_all_patterns_change_nothing(measure):
    x, y = activities(0), activities(1)
    turned = x @ special_ortho_group.rvs(N, random_state=3) + np.linspace(-1, 1, N)
    same = 0.0 if measure == "procrustes" else 1.0
    assert bk.similarity(kernel(x), kernel(turned), measure) == pytest.approx(same, abs=1e-6)
    assert bk.similarity(kernel(turned), kernel(y), measure) == pytest.approx(
        bk.similarity(kernel(y), kernel(x), measure), abs=1e-6
    )


@pytest.mark.parametrize("measure", MEASURES)
def test_scale(measure):
    A, B = kernel(activities(0)), kernel(activities(1))
    before, after = bk.similarity(A, B, measure), bk.similarity(4 * A, B, measure)
    if measure != "procrustes":
        assert after == pytest.approx(before, rel=1e-10)
        assert before < 0.9
    size = np.sqrt(np.trace(A) - A.mean() * P)
    assert bk.similarity(4 * A, A, "procrustes") == pytest.approx(size, rel=1e-8)


def test_bures_of_commuting_kernels_is_the_overlap_of_roots_of_spectra():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(np.c_[np.ones(P), rng.normal(size=(P, P - 1))])[0][:, 1:]
    p, q = rng.uniform(size=(2, P - 1))
    A, B = ((basis * s) @ basis.T for s in (p, q))
    expected = np.sum(np.sqrt(p * q)) / np.sqrt(p.sum() * q.sum())
    assert bk.similarity(A, B, "bures") == pytest.approx(expected, abs=1e-12)
    cka = np.sum(p * q) / np.linalg.norm(p) / np.linalg.norm(q)
    assert bk.similarity(A, B, "cka") == pytest.approx(cka, abs=1e-12)


@pytest.mark.parametrize("measure", MEASURES)
def test_every_step_is_compared_with_every_one(measure):
    x, y = np.stack([activities(s) for s in (0, 1)]), np.stack([activities(s) for s in (2, 3, 4)])
    sites = [np.einsum("tai,sbi->tasb", z, z) / N for z in (x, y)]
    found = bk.similarity(*sites, measure)
    assert found.shape == (2, 3)
    assert found[1, 2] == pytest.approx(textbook(x[1], y[2], measure), abs=1e-10)
    np.testing.assert_allclose(bk.similarity(kernel(x[1]), sites[1], measure), found[1])
    np.testing.assert_allclose(bk.similarity(sites[0], kernel(y[2]), measure), found[:, 2])


def test_representations_that_tell_no_patterns_apart_have_no_similarity():
    A = kernel(activities(0))
    # Rounding errors of single precision tell nothing apart either.
    one = np.ones((P, P)) + 1e-8 * A
    for measure in ("cka", "rsa", "bures"):
        assert np.isnan(bk.similarity(one, A, measure))
    assert bk.similarity(one, one, "procrustes") == 0
    assert not np.isnan(bk.similarity(np.ones((P, P)) + 1e-4 * A, A))


@pytest.fixture(scope="module")
def draws():
    phi = np.random.default_rng(0).normal(size=(2, 60, 3, 4, NETWORK.width))
    kernel = np.einsum("cdtai,cdsbi->cdtasb", phi, phi) / NETWORK.width
    made = {"kernel": kernel, "output": np.zeros((2, 60, 3, 4, 1))}
    return as_run(made, NETWORK, TASK)


@pytest.mark.parametrize("measure", MEASURES)
def test_draws_give_means_and_intervals(draws, measure):
    theory = bk.solve(NETWORK, TASK)
    found = bk.similarity(draws, theory, measure)
    assert found["mean"].dims == ("step", "other_step")
    kernels = draws["posterior"]["kernel"].to_numpy().reshape(120, 3, 4, 3, 4).astype(float)
    each = np.stack([bk.similarity(k, theory.kernel, measure) for k in kernels])
    np.testing.assert_allclose(found["mean"], each.mean(0), rtol=1e-8)
    np.testing.assert_allclose(found["lower"], np.quantile(each, 0.025, 0), rtol=1e-8)
    np.testing.assert_allclose(found["upper"], np.quantile(each, 0.975, 0), rtol=1e-8)
    # Transposed: arguments keep their axes.
    other = bk.similarity(theory, draws, measure)
    np.testing.assert_allclose(other["mean"], found["mean"].T, rtol=1e-6)
    last = bk.similarity(theory.kernel[2, :, 2], draws, measure)
    assert last["mean"].dims == ("other_step",)
    np.testing.assert_allclose(last["mean"], other["mean"].isel(step=2), rtol=1e-8)


def test_draws_with_themselves_compare_steps_within_a_draw(draws):
    within = bk.similarity(draws, draws, "cka")
    np.testing.assert_allclose(np.diag(within["mean"]), 1, atol=1e-9)
    fewer = draws.isel(draw=slice(0, 7))
    apart = bk.similarity(draws, fewer, "cka")
    assert np.all(np.diag(apart["mean"]) < 0.999)


@pytest.mark.parametrize("sampled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_theory_at_large_width_is_like_its_draws(sampled):
    wide = bk.Network(20_000, "linear", noise=0.5)
    theory = bk.solve(wide, TASK)
    options = {"num_chains": 2, "num_samples": 50, "progress": False}
    drawn = (
        bk.sample(jax.random.key(1), wide, TASK, **options)
        if sampled
        else fake_draws(theory, count=50)
    )
    for measure in ("cka", "bures"):
        found = bk.similarity(drawn, theory, measure)["mean"].to_numpy()
        assert np.all(np.diag(found) > 0.995)


@pytest.mark.parametrize(
    ("distance", "scale"), [("euclidean", N**-0.5), ("sqeuclidean", 1 / N), ("cosine", 1)]
)
def test_distances_are_scipy_s(distance, scale):
    x = activities(0)
    np.testing.assert_allclose(
        bk.rdm(kernel(x), distance), scale * cdist(x, x, distance), atol=1e-7
    )


def test_shapes_of_distances(draws):
    theory = bk.solve(NETWORK, TASK)
    assert bk.rdm(theory).shape == (3, 4, 4)
    assert bk.rdm(draws).shape == (120, 3, 4, 4)
    np.testing.assert_allclose(bk.rdm(theory)[1], bk.rdm(theory.kernel[1, :, 1]))


@pytest.mark.filterwarnings("ignore")
def test_rsatoolbox_finds_the_same():
    rsa = pytest.importorskip("rsatoolbox")
    x, y = activities(0), activities(1)
    ours = [bk.to_rsatoolbox(kernel(z)) for z in (x, y)]
    theirs = rsa.rdm.calc_rdm(rsa.data.Dataset(x), method="euclidean")
    np.testing.assert_allclose(ours[0].dissimilarities, theirs.dissimilarities, rtol=1e-8)
    np.testing.assert_allclose(squareform(ours[0].dissimilarities[0]), bk.rdm(kernel(x)) ** 2)
    # The whitened cosine of squared distances is CKA (Diedrichsen et al., 2021).
    for method, measure in (("spearman", "rsa"), ("cosine_cov", "cka"), ("bures", "bures")):
        expected = rsa.rdm.compare(*ours, method=method)[0, 0]
        assert bk.similarity(kernel(x), kernel(y), measure) == pytest.approx(expected, abs=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_descriptors_of_rsatoolbox(draws):
    pytest.importorskip("rsatoolbox")
    found = bk.to_rsatoolbox(draws, "cosine")
    assert found.n_rdm == 360
    assert found.subset("step", 2).n_rdm == 120
    np.testing.assert_allclose(
        squareform(found.subset("draw", 5).dissimilarities[2], checks=False),
        bk.rdm(draws, "cosine")[5, 2],
        atol=1e-12,
    )


@pytest.mark.parametrize(
    ("a", "b", "measure", "said"),
    [
        (np.eye(3), np.eye(3), "angle", "measure: expected one of"),
        (np.eye(3), np.eye(4), "cka", "b: expected the 3 patterns of a, got 4"),
        (np.eye(1), np.eye(1), "cka", "a: expected at least 2 patterns"),
        (np.eye(2), np.eye(2), "rsa", "a: expected at least 3 patterns"),
        (np.ones((3, 4)), np.eye(3), "cka", r"a: expected shape \(P, P\)"),
        (-np.eye(3), np.eye(3), "cka", "a: expected a kernel without negative eigenvalues"),
        (np.triu(np.ones((3, 3))), np.eye(3), "cka", "a: expected a symmetric kernel"),
        (np.eye(3), np.full((3, 3), np.nan), "cka", "b: expected finite kernels"),
    ],
)
def test_what_is_no_kernel_is_refused(a, b, measure, said):
    with pytest.raises(InputError, match=said):
        bk.similarity(a, b, measure)


def test_unknown_distances_are_refused():
    with pytest.raises(InputError, match="distance: expected one of"):
        bk.rdm(np.eye(3), "correlation")
