"""F, its gradient and its Hessian products, for every law of one unit, against differences and closed forms."""

import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel.meanfield import branches, newton
from bayeskernel.meanfield.grid import Grid, matched
from bayeskernel.meanfield.laws import Gaussian, Wick
from bayeskernel.meanfield.particles import Particles, from_prior
from bayeskernel.meanfield.prior import prior_recursion
from bayeskernel.meanfield.saddle import Point, Saddle
from bayeskernel.meanfield.sites import groups
from bayeskernel.meanfield.starts import prior_point
from bayeskernel.problem import problem

SEQUENCE = bk.Task(
    np.random.default_rng(4).normal(size=(3, 1, 2)), [[np.nan], [0.7], [-0.9]]
)  # fmt: skip
LAWS = {
    "gaussian": ("linear", lambda sites, K: Gaussian(sites)),
    "grid, erf": ("erf", lambda sites, K: matched(sites, K)),
    "grid, relu": ("relu", lambda sites, K: matched(sites, K)),
    "particles, erf": ("erf", lambda sites, K: from_prior(sites, 512, np.random.default_rng(2))),
    "particles, tanh": ("tanh", lambda sites, K: from_prior(sites, 512, np.random.default_rng(2))),
}


def point_of(law, sharing):
    """Off the solution, and off every symmetry."""
    activation, nodes = LAWS[law]
    posed = problem(bk.Network(16, activation, sharing, noise=0.3), SEQUENCE)
    C = prior_recursion(posed)
    K = posed.preactivation_kernel(C)
    rng = np.random.default_rng(1)
    made = tuple(nodes(sites, K[sites.block]) for sites in groups(posed))
    Ct = np.zeros_like(C)
    for sites in groups(posed):
        tilt = rng.normal(size=(len(sites.members),) * 2) / 20
        Ct[sites.block] = np.where(
            sites.entries.matrix(np.ones(len(sites.entries.first))), tilt + tilt.T, 0
        )
    return posed, Point(1.05 * C + 0.01 * np.eye(len(C)), Ct, made, symmetric=False)


@pytest.mark.parametrize("sharing", ["tied", [0, 0, 1], "untied"])
@pytest.mark.parametrize("law", LAWS)
def test_derivatives_by_finite_differences(law, sharing):
    posed, point = point_of(law, sharing)
    at = Saddle(posed, point)
    rng, e = np.random.default_rng(3), 1e-5
    x, tilt = rng.normal(size=(2, at.size)) / 3

    def moved(a, b):
        C, Ct = point.C + a * at.spread(x), point.Ct + b * at.tilt(tilt)
        new = Saddle(posed, point._replace(C=C, Ct=Ct))
        return 2 * new.value, at.gathered(Ct - new.conjugate), at.whitened(C - new.average)

    (up, up_x, up_l), (down, down_x, down_l) = moved(e, 0), moved(-e, 0)
    assert at.slope @ x == pytest.approx((up - down) / (2 * e), rel=1e-6, abs=1e-7)
    # Second derivatives of a kinked phi on particles are spread over the kink; here phi is smooth.
    assert at.product(x) - at.mixed(at.followed(x)) == pytest.approx(
        (up_x - down_x) / (2 * e), rel=1e-5, abs=1e-6
    )
    assert at.followed(x) == pytest.approx((up_l - down_l) / (2 * e), rel=1e-5, abs=1e-6)
    (up, up_x, up_l), (down, down_x, down_l) = moved(0, e), moved(0, -e)
    assert at.mismatch @ tilt == pytest.approx((up - down) / (2 * e), rel=1e-6, abs=1e-7)
    assert at.mixed(tilt) == pytest.approx((up_x - down_x) / (2 * e), rel=1e-5, abs=1e-6)
    assert -tilt == pytest.approx((up_l - down_l) / (2 * e), rel=1e-5, abs=1e-6)


def test_the_gaussian_law_is_its_closed_form():
    posed, point = point_of("gaussian", "tied")
    (law,) = Saddle(posed, point).laws
    K = posed.preactivation_kernel(point.C)
    C = np.linalg.inv(np.linalg.inv(K) - point.Ct)
    assert pytest.approx(C, rel=1e-9) == law.C
    assert np.linalg.inv(K) @ (C - K) @ np.linalg.inv(K) == pytest.approx(law.B, rel=1e-8, abs=1e-9)
    log_det = np.linalg.slogdet(np.eye(3) - K @ point.Ct)[1]
    assert law.log_normaliser == pytest.approx(-log_det / 2, rel=1e-10)


def test_wicks_law_is_what_a_grid_finds_for_linear_units():
    """phi = x as a user's function: a grid's sums answer to K and Ct as the closed form does."""
    linear, identity = (
        problem(bk.Network(16, phi, noise=0.3), SEQUENCE) for phi in ("linear", lambda h: 1.0 * h)
    )
    (sites,), (general,) = groups(linear), groups(identity)
    K, Ct = np.diag([1.0, 1.5, 0.8]) + 0.3, np.diag([0.05, -0.1, 0.08]) + 0.03
    # Inputs alone make K at the first step; Wick's law leaves it out of its answers unless told otherwise.
    assert sites.fed == slice(1, 3)
    exact = Gaussian(sites._replace(fed=slice(None))).law(K, Ct, symmetric=False)
    law = matched(general.completed(), exact.C).law(K, Ct, symmetric=False)
    # Linear statistics reach far: the grid holds 6.5 standard deviations.
    assert pytest.approx(exact.C, rel=1e-5) == law.C
    assert pytest.approx(exact.B, rel=1e-4, abs=1e-5) == law.B
    assert pytest.approx(law.Y, rel=1e-4, abs=1e-5) == exact.Y
    dK, G = np.diag([0.3, 0.1, -0.2]) + 0.1, np.diag([1.0, -2.0, 0.5]) + 0.2
    # Basis-free: the answer of C to dK and to dCt, and of B to both.
    for answer in (lambda q: q.spread(q.carried(dK)), lambda q: q.spread(q.gathered(G)),
                   lambda q: q.carried_back(q.gathered(G)), lambda q: q.stiffened(dK)):  # fmt: skip
        assert answer(law) == pytest.approx(answer(exact), rel=1e-4, abs=1e-4)
    later, dK[0], dK[:, 0] = Gaussian(sites).law(K, Ct, symmetric=False), 0.0, 0.0
    for answer in (lambda q: q.spread(q.carried(dK)), lambda q: q.carried_back(q.gathered(G))[1:, 1:],
                   lambda q: q.stiffened(dK)[1:, 1:]):  # fmt: skip
        assert answer(later) == pytest.approx(answer(exact), rel=1e-12)


def test_classes_of_nodes_are_chosen_by_activation_and_size():
    from bayeskernel.meanfield.starts import prior_point

    def kinds(activation, task, sharing="tied"):
        posed = problem(bk.Network(16, activation, sharing), task)
        return {type(nodes) for nodes in prior_point(posed, np.random.default_rng(0)).nodes}

    long = bk.tasks.endpoint([[1.0]], [1.0], 4)
    assert kinds("linear", long) == {Gaussian}
    assert kinds("erf", long) == {Particles}
    assert kinds("erf", long, "untied") == {Grid}


def test_variances_in_the_denormal_range_are_none_and_negative_ones_are_refused():
    K = np.diag([1.0, 1e-321])
    K[0, 1] = K[1, 0] = 1e-160  # a correlation far above one, from digits that are not there
    law = Wick(0.0, K, np.eye(2), np.zeros((2, 2)))
    assert law.size == 1
    with pytest.raises(np.linalg.LinAlgError):
        Wick(0.0, np.diag([1.0, -0.1]), np.eye(2), np.zeros((2, 2)))


def test_inputs_in_the_denormal_range_are_solved_for():
    e = 3.6e-161
    inputs = np.array([[[0.0, e], [e, 1.0]], [[e, e], [e, e]]])
    task = bk.Task(inputs, np.array([[[np.nan]] * 2, [[0.0]] * 2]))
    assert bk.solve(bk.Network(8, "linear", noise=1e-50), task).converged


def test_directions_that_grow_from_nothing_end_the_solution(monkeypatch):
    """Between eight grades of evidence four differences are above rounding before training."""
    posed = problem(bk.Network(64, "erf", "untied", noise=1.0), bk.tasks.decision())
    point = prior_point(posed, np.random.default_rng(0))
    assert branches.strayed(Saddle(posed, point)) < 2e-6
    grown, step = point.C.copy(), slice(32, 40)
    grown[step, step] += 0.04 * np.outer(*2 * [[1, -1, 1, -1, 1, -1, 1, -1]])
    share = branches.strayed(Saddle(posed, point._replace(C=grown)))
    assert 0.05 < share < 5
    task = bk.tasks.endpoint([[1.0]], [1.0], 3)
    assert bk.solve(bk.Network(64, "erf", noise=0.1), task).converged
    monkeypatch.setattr(branches, "_STRAYED", -1.0)
    assert bk.solve(bk.Network(64, "erf", noise=0.1), task).result is newton.Status.UNCOVERED
