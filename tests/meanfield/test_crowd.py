"""Many correlated sites: moving particles against the closed form of linear networks and against weighted particles."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel.meanfield import branches, crowd, stochastic
from bayeskernel.meanfield.averaging import MeanTarget
from bayeskernel.meanfield.branches import displaced
from bayeskernel.meanfield.fluctuations import FluctuationError
from bayeskernel.meanfield.laws import Averages
from bayeskernel.meanfield.newton import Status, lowest_curvature
from bayeskernel.meanfield.saddle import Saddle
from bayeskernel.meanfield.solve import posed

# Two digits of each class, read in four steps.
TASK = bk.tasks.digits(patterns_per_class=2, steps=4).scaled(2.0)
NEW = bk.tasks.digits(patterns_per_class=1, steps=4, start=50).inputs


def relative(one, two):
    return np.linalg.norm(one - two) / np.linalg.norm(two)


def assert_agree(one, two, accuracy):
    """Both converged, and their kernels are one within errors that are a small share of them."""
    assert one.converged
    assert two.converged
    error = np.linalg.norm(np.hypot(one.monte_carlo_error, two.monte_carlo_error))
    assert error < accuracy * np.linalg.norm(two.kernel)
    assert np.linalg.norm(one.kernel - two.kernel) < 5 * error


@pytest.fixture(autouse=True)
def every_group_is_a_crowd(monkeypatch):
    monkeypatch.setattr(crowd, "_MOST_STATISTICS", 5)


@pytest.mark.parametrize("sharing", ["tied", pytest.param("untied", marks=pytest.mark.slow)])
def test_linear_units_against_their_closed_form(sharing):
    exact = bk.solve(bk.Network(512, "linear", sharing, noise=0.3), TASK)
    network = bk.Network(512, lambda h: 1.0 * h, sharing, noise=0.3)
    theory = bk.solve(network, TASK)
    assert theory.converged
    error = np.linalg.norm(theory.monte_carlo_error) / np.linalg.norm(theory.kernel)
    assert error < 0.008
    assert relative(theory.kernel, exact.kernel) < 5 * error
    assert relative(theory.conjugate, exact.conjugate) < 0.1
    assert theory.output == pytest.approx(exact.output, abs=0.05)
    assert theory.branches[0].curvature == pytest.approx(exact.branches[0].curvature, rel=0.1)
    assert relative(theory.kernel_std(), exact.kernel_std()) < 0.2
    assert relative(theory.predict_std(NEW), exact.predict_std(NEW)) < 0.02
    assert np.isnan(theory.free_energy)
    with pytest.raises(FluctuationError):
        theory.kernel_shift()


def test_answers_that_steer_steps_are_rounded_and_no_more():
    """Leaving out sites whose K is given changes no answer, and float32 changes it in its last digits."""
    search = posed(bk.Network(64, "erf", noise=0.3), TASK, None, 1e-7, 200, None)
    state = stochastic._State(search._prior())
    state = search._scaled(0.5)._stepped(state, stochastic._unsaturated)
    laws = (
        tuple(own.law(slice(None)) for own in state.smooth),
        stochastic._laws(state.smooth, state.point),
        stochastic._unsaturated(state.smooth, state.point),
    )
    whole, fed, rounded = (Saddle(search.problem, state.point, law, state.averages) for law in laws)
    assert state.point.nodes[0].sites.fed != slice(0, whole.K.shape[0])
    x = np.random.default_rng(0).standard_normal(whole.size)
    for answer in ("product", "followed", "mixed"):
        exact = getattr(whole, answer)(x)
        assert relative(getattr(fed, answer)(x), exact) < 1e-11
        assert 1e-9 < relative(getattr(rounded, answer)(x), exact) < 1e-4
    assert np.array_equal(fed.mismatch, rounded.mismatch)


def test_particles_tell_the_curvature():
    """As Wick's law does of linear units, for which it is exact, in the softest and in a stiffer direction."""
    network = bk.Network(512, lambda h: 1.0 * h, noise=0.3)
    search = posed(network, TASK, None, 1e-7, 200, None)
    saddle = search.solutions(every_branch=True)[0].saddle
    softest = lowest_curvature(saddle)[1]
    other = np.random.default_rng(0).standard_normal(saddle.size)
    other -= (other @ softest) * softest
    for x in (softest, other / np.linalg.norm(other)):
        exact = x @ saddle.product(x)
        assert search._curvature(saddle, x) == pytest.approx(exact, rel=0.05, abs=0.03)


def test_a_saddle_that_only_wicks_law_sees_is_none(monkeypatch):
    """Particles are asked along its direction; what they say of others is Wick's law's again."""
    saddle, curvatures = SimpleNamespace(size=3), np.array([-0.3, -0.2, 0.4])
    saddle.product = lambda x: curvatures * x
    saddle.dense = lambda: (np.eye(3), np.diag(curvatures))
    told = iter([1.0, 0.7])
    monkeypatch.setattr(stochastic.CrowdSearch, "_curvature", lambda *_: next(told))
    search = posed(bk.Network(512, "erf"), TASK, None, 1e-7, 200, None)
    assert search._lowest(saddle)[0] == pytest.approx(0.4)
    told = iter([1.0, -0.25])
    curvature, x, _ = search._lowest(saddle)
    assert curvature == -0.25
    assert abs(x[1]) == pytest.approx(1)


@pytest.mark.slow
def test_erf_units_against_weighted_particles(monkeypatch):
    network = bk.Network(512, "erf", noise=0.3)
    moving, other = bk.solve(network, TASK), bk.solve(network, TASK, jax.random.key(1))
    assert np.array_equal(moving.kernel, bk.solve(network, TASK).kernel)
    monkeypatch.setattr(crowd, "_MOST_STATISTICS", 300)
    weighted = bk.solve(network, TASK)
    for theory in (other, weighted):
        error = np.hypot(moving.monte_carlo_error, theory.monte_carlo_error)
        assert np.linalg.norm(moving.kernel - theory.kernel) < 5 * np.linalg.norm(error)


def test_fourth_moments_tell_how_far_modes_saturate():
    """Nothing of Gaussian activities; a mode of two values, whose square is the same everywhere, down to its smallest part."""
    rng = np.random.default_rng(0)
    z, n = rng.standard_normal((2048, 4)), 4
    sites = SimpleNamespace(members=np.arange(n), phi=bk.Network(8, "linear").phi)
    gaussian = z @ rng.standard_normal((n, n))
    signs = np.sign(z[:, :1]) * [1.0, 1.0, 1.0, 1.0]
    for activity, top, rest in ((gaussian, 1.0, 1.0), (signs + 0.02 * z, crowd._LEAST, 1.0)):
        C = activity.T @ activity / len(activity)
        law = Averages(C, np.eye(n), np.eye(n), np.zeros(n)).law(slice(0, n))
        shares = crowd.Crowd(sites, activity, None).saturation(law, np.eye(n))
        assert shares[-1, -1] == pytest.approx(top, abs=0.15)
        assert np.mean(shares[:-1, :-1]) == pytest.approx(rest, abs=0.15)


def test_answers_of_saturating_modes_are_those_of_their_variances():
    """<(phi phi^T) (phi phi^T)> between products of whitened activities, on the diagonal; R and its inverses follow."""
    rng = np.random.default_rng(1)
    C = np.cov(rng.standard_normal((4, 50)))
    wick = Averages(C, np.eye(4), np.eye(4), np.zeros(4)).law(slice(0, 4))
    shares = rng.uniform(0.2, 1.0, (4, 4))
    law = wick.saturating((shares + shares.T) / 2)
    for k, x in enumerate(np.eye(law.size)):
        answer = law.spread(law.gathered(wick.tilt(x)))
        i, j = (index[k] for index in np.triu_indices(4))
        np.testing.assert_allclose(
            answer, (shares + shares.T)[i, j] / 2 * wick.spread(x), atol=1e-12
        )
        np.testing.assert_allclose(law.whitened(law.spread(x)), x, atol=1e-12)
        np.testing.assert_allclose(law.gathered(law.tilt(x)), x, atol=1e-12)


@pytest.mark.parametrize("saturating", [True, False])
def test_a_coherent_mode_that_saturates_settles(monkeypatch, saturating):
    """Eight digits of a class at a strong signal: by Wick's law alone the mean of a few points is out of balance."""
    if not saturating:
        monkeypatch.setattr(crowd.Crowd, "saturation", lambda _, law, K: np.ones_like(K))
    monkeypatch.setattr(stochastic, "_AVERAGED", 16)
    monkeypatch.setattr(stochastic, "_LENGTHS", (1,))
    network, task = (
        bk.Network(64, "erf", noise=0.3),
        bk.tasks.digits(patterns_per_class=8, steps=4).scaled(2.0),
    )
    search = posed(network, task, None, 1e-7, 200, None)
    saddle = search._averaged(search._approached(search._prior())).saddle
    assert (saddle.residual < stochastic._BALANCED) == saturating


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_steps_that_go_astray_are_left(strength, monkeypatch):
    """The mean is then of other steps: from where they are, or from where long ones began."""
    stepped = stochastic.CrowdSearch._stepped

    def astray(self, state, steering, sweeps=1):
        if steering is stochastic._unsaturated:
            return stepped(self, state, steering, sweeps)
        if strength < 1:
            state = stepped(self, state, steering, sweeps)
        point = state.point._replace(C=1.02 * state.point.C)
        return state._replace(point=point, strength=strength)

    monkeypatch.setattr(stochastic.CrowdSearch, "_stepped", astray)
    search = posed(bk.Network(64, "erf", noise=1.0), TASK, None, 1e-7, 200, None)
    saddle = search._averaged(search._approached(search._prior())).saddle
    assert saddle.residual < stochastic._BALANCED


def test_careful_steps_follow_where_bold_ones_lead_nowhere(monkeypatch):
    """They then reckon with curvatures that no solution has, as in `match_to_sample` at three times the signal."""
    stepped = stochastic.CrowdSearch._stepped

    def lost(self, state, steering, sweeps=1):
        bold = state.longest == stochastic._BOLD
        state = stepped(self, state, steering, sweeps)
        return state._replace(shift=100.0) if bold else state

    monkeypatch.setattr(stochastic.CrowdSearch, "_stepped", lost)
    search = posed(bk.Network(64, "erf", noise=1.0), TASK, None, 1e-7, 200, None)
    state = search._approached(search._prior())
    assert state.longest < stochastic._BOLD
    assert state.shift < 1


@pytest.mark.parametrize(("drift", "windows"), [(0.0, 1), (0.02, 2)])
def test_a_mean_of_points_that_drift_does_not_count(drift, windows, monkeypatch):
    """Where halves of a window are 2 % apart its mean may be in balance; another window follows."""
    stepped, count = stochastic.CrowdSearch._stepped, stochastic._AVERAGED // stochastic._BETWEEN
    real = []

    def drifting(self, state, steering, sweeps=1):
        if real:
            state = state._replace(point=real[-1])
        state = stepped(self, state, steering, sweeps)
        if sweeps == 1:
            return state
        real.append(state.point)
        share = drift * (len(real) > count // 2) - drift / 2 if len(real) <= count else 0.0
        return state._replace(point=state.point._replace(C=(1 + share) * state.point.C))

    search = posed(bk.Network(64, "erf", noise=1.0), TASK, None, 1e-7, 200, None)
    state = search._approached(search._prior())
    monkeypatch.setattr(stochastic.CrowdSearch, "_stepped", drifting)
    saddle = search._averaged(state).saddle
    assert saddle.residual < stochastic._BALANCED
    assert len(real) == windows * count


def test_the_error_of_a_mean_target_finds_slow_modes():
    """Independent batches give sd / sqrt n; what persists for eight of them gives what an eighth as many do."""
    rng = np.random.default_rng(0)
    draws, count = rng.standard_normal((64, 20, 20)), 64
    independent, slow = MeanTarget(20), MeanTarget(20)
    for batch in range(count):
        independent.add(draws[batch], draws[batch] / 2, ())
        slow.add(draws[batch // 8], draws[batch], ())
    np.testing.assert_allclose(independent.C, draws.mean(0), atol=1e-12)
    np.testing.assert_allclose(independent.Ct, draws.mean(0) / 2, atol=1e-12)
    norm = np.sqrt(20**2 / count)
    assert norm < np.linalg.norm(independent.error) < 1.3 * norm
    assert 0.9 < np.linalg.norm(slow.error) / (np.sqrt(8) * norm) < 1.3


def test_a_last_step_leaves_what_noise_shifts(monkeypatch):
    """From a mean point that is off by several errors, and with an error that their scatter confirms."""
    network = bk.Network(512, lambda h: 1.0 * h, noise=0.3)
    exact = bk.solve(bk.Network(512, "linear", noise=0.3), TASK)
    search = posed(network, TASK, jax.random.key(1), 1e-7, 200, None)
    saddle = search.solutions(every_branch=True)[0].saddle
    size = saddle.problem.size
    target = exact.kernel.reshape(size, size)
    off = displaced(saddle, 0.3 * lowest_curvature(saddle)[1])
    saddle = Saddle(search.problem, off, saddle.laws)
    monkeypatch.setattr(stochastic, "_BATCHES", (16, 96))  # 64 sweeps at least
    window = stochastic._Window(saddle, 0.0, np.zeros_like(target), None, None)
    answer = search._measured(window, 0.0, ())
    step = answer.saddle.point.C - off.C
    error = np.linalg.norm(np.sqrt(answer.error**2 - step**2))
    assert np.linalg.norm(off.C - target) > 8 * error
    assert np.linalg.norm(answer.saddle.point.C - target) < 3 * error
    assert answer.step > stochastic._LAST
    assert not answer.solved


def test_a_last_step_leaves_the_error_of_a_mean_of_stiff_steps():
    """Scatter of their points tells how far two such means lie apart; that, and the step, are errors."""
    windows = []
    for key in range(2):
        search = posed(bk.Network(64, "erf", noise=1.0), TASK, jax.random.key(key), 1e-7, 200, None)
        state = search._approached(search._prior())
        way = stochastic._Way(stochastic._unsaturated, stochastic._STIFF, np.inf)
        windows.append(search._window(state, way, 1))
    one, two = windows
    expected = np.linalg.norm(np.hypot(one.error, two.error))
    assert 0.4 < np.linalg.norm(one.saddle.point.C - two.saddle.point.C) / expected < 2.5
    assert one.state.shift == state.shift < stochastic._STIFF
    answer = search._measured(two, stochastic._STIFF, ())
    step = answer.saddle.point.C - two.saddle.point.C
    assert np.all(answer.error**2 > two.error**2 + step**2)
    soft = search._window(state, way._replace(shift=0.0), 1)
    assert np.all(soft.error > 0)


@pytest.mark.slow
def test_stiff_steps_where_bold_ones_run_away(monkeypatch):
    """Curvatures that Wick's law takes for soft are not; to 1 %, as docs/calibration says."""
    monkeypatch.setattr(crowd, "_MOST_STATISTICS", 300)
    network = bk.Network(1024, "erf", noise=1.0)
    task = bk.tasks.context_decision(stimulus=2, steps=5, response=1).scaled(2.0)
    one, two = (bk.solve(network, task, jax.random.key(k)) for k in range(2))
    assert_agree(one, two, 0.01)
    posterior = bk.sample(
        jax.random.key(3), network, task, num_warmup=500, num_samples=1000, num_chains=2, progress=False
    )  # fmt: skip
    cmp = bk.compare(posterior, one)
    print(f"{cmp.verdict} Distance {cmp.frobenius_error:.4f}")
    assert cmp.frobenius_error < 0.01


def test_an_iteration_that_leaves_the_domain_says_so(monkeypatch):
    monkeypatch.setattr(stochastic, "_DESCENTS", 1)
    monkeypatch.setattr(stochastic, "_LENGTHS", (1,))
    task = bk.tasks.endpoint(2 * np.eye(4), [400.0, 400.0, -400.0, -400.0], 4)
    theory = bk.solve(bk.Network(64, "relu", noise=0.01), task)
    assert not theory.converged
    assert theory.result in set(Status)
    assert np.isnan(theory.monte_carlo_error).all() or theory.result is Status.MAX_STEPS


def test_trials_with_sites_that_nearly_coincide(monkeypatch):
    """All inputs are the same while an animal fixates, and none come while it answers."""
    task = bk.tasks.decision((0.5,), steps=4, stimulus=1)
    network = bk.Network(512, "erf", noise=1.0)
    moving = bk.solve(network, task)
    monkeypatch.setattr(crowd, "_MOST_STATISTICS", 300)
    weighted = bk.solve(network, task)
    assert_agree(moving, weighted, 0.01)


def test_moving_particles_take_over_where_weighted_ones_fail(monkeypatch):
    monkeypatch.setattr(crowd, "_MOST_STATISTICS", 300)
    network, task = bk.Network(64, "erf", noise=1.0), bk.tasks.endpoint(np.eye(2), [1.0, -1.0], 3)
    weighted = bk.solve(network, task)
    monkeypatch.setattr(branches, "_STRAYED", -1.0)
    moving = bk.solve(network, task)
    assert np.isnan(moving.free_energy)
    assert_agree(moving, weighted, 0.01)


@pytest.mark.slow
def test_units_that_saturate_answer_less_than_wicks_law_says(monkeypatch):
    """Which sees a saddle (curvature -0.09) at this minimum (0.07)."""
    task = bk.tasks.match_to_sample(stimuli=2, steps=6)
    network = bk.Network(512, "erf", noise=0.1)
    moving = bk.solve(network, task)
    monkeypatch.setattr(crowd, "_MOST_STATISTICS", 300)
    weighted = bk.solve(network, task)
    assert_agree(moving, weighted, 0.015)


@pytest.mark.slow
def test_evidence_that_a_kernel_learns_to_tell_apart_is_followed():
    """Directions of the kernel grow a thousandfold while the signal is raised."""
    network = bk.Network(512, "erf", noise=0.1)
    one, two = (
        bk.solve(network, bk.tasks.decision((0.256, 0.512), steps=6), jax.random.key(k))
        for k in range(2)
    )
    assert_agree(one, two, 0.015)


def test_a_step_makes_all_curvatures_positive_where_it_finds_no_end():
    curvatures, slope = np.array([-0.3, 0.5, 2.0]), np.array([0.1, 0.2, -0.3])
    saddle = SimpleNamespace(
        product=lambda x: curvatures * x,
        reduced_slope=slope,
        size=3,
        dense=lambda: (np.eye(3), np.diag(curvatures)),
    )
    x, shift = stochastic._newton_step(saddle, 3.0, 0.1)
    assert shift == pytest.approx(stochastic._CURVED + 0.3)
    np.testing.assert_allclose(x, -slope / (curvatures + shift), atol=0.01)
    saddle.product, curvatures = (lambda x: np.array([0.3, 0.5, 2.0]) * x), np.array([0.3, 0.5, 2])
    x, shift = stochastic._newton_step(saddle, 3.0, 0.1)
    assert shift == 0.1
    np.testing.assert_allclose(x, -slope / (curvatures + shift), atol=0.01)


@pytest.mark.parametrize("bound", ["_BALANCED", "_ACCEPTED", "_LAST"])
def test_kernels_out_of_balance_or_not_accurate_are_not_converged(monkeypatch, bound):
    monkeypatch.setattr(stochastic, bound, 1e-9)
    monkeypatch.setattr(stochastic, "_DESCENTS", 1)
    monkeypatch.setattr(stochastic, "_LENGTHS", (1,))
    theory = bk.solve(bk.Network(64, "erf", noise=1.0), TASK)
    assert theory.result is Status.MAX_STEPS
    assert np.isfinite(theory.kernel).all()
