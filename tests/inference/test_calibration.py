"""Is the posterior of every space the one of the joint law it claims, whatever the data?

``python -m pytest -m slow tests/inference/test_calibration.py -rP`` prints the tables kept in docs/calibration.
"""

import itertools

import numpy as np
import pytest

from . import calibration as cal

# Several hundred quantities a case; one correct case in 10,000 would be called wrong, and must be so twice.
SPACES = [
    ("weights", "hmc"),
    ("weights", "nuts"),
    ("preactivations", "hmc"),
    ("preactivations", "nuts"),
    ("kernels", "nuts"),
]
JOINT = [
    *itertools.product(["erf", "relu"], ["tied", "untied", "half-tied"], ["mean_field"], SPACES[:4]),
    *itertools.product(["linear"], ["tied", "untied", "half-tied"], ["mean_field"], SPACES),
    *itertools.product(["erf", "linear"], ["half-tied"], ["standard"], [SPACES[0], SPACES[2]]),
    ("linear", "half-tied", "standard", SPACES[4]),
]  # fmt: skip


def confirmed(test, count, **given):
    """A failure counts if it repeats on a fresh seed with four times the replicates."""
    outcome = test(count=count, **given)
    if outcome.worst > outcome.limit:
        outcome = test(count=4 * count, seed=1, **given)
    return outcome


def report(outcome):
    shift = outcome.detectable
    largest = max(shift, key=lambda key: shift[key])
    print(
        f"largest z {outcome.worst:.2f} ({outcome.name}), limit {outcome.limit:.2f} of {outcome.count} tests; "
        f"found with probability 0.9: shifts of {np.median(list(shift.values())):.3f} (median) to "
        f"{shift[largest]:.3f} ({largest}) standard deviations"
    )
    assert outcome.worst < outcome.limit


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "sharing", "scaling", "how"), JOINT)
def test_joint_law_is_left_unchanged(activation, sharing, scaling, how):
    space, algorithm = how
    case = cal.case(activation, sharing, scaling)
    report(confirmed(cal.joint_invariance, 4000, name=space, given=case, algorithm=algorithm))


@pytest.mark.long
@pytest.mark.parametrize(
    "how", [SPACES[2], *(pytest.param(SPACES[k], marks=pytest.mark.slow) for k in (0, 4))]
)
def test_joint_law_is_left_unchanged_quickly(how):
    """The part that every test run checks."""
    space, algorithm = how
    case = cal.case("linear" if space == "kernels" else "erf", "half-tied")
    report(confirmed(cal.joint_invariance, 2000, name=space, given=case, algorithm=algorithm))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "how"),
    [("erf", SPACES[0]), ("erf", SPACES[2]), ("relu", SPACES[2]), ("linear", SPACES[4])],
)
@pytest.mark.parametrize("sharing", ["tied", "untied", "half-tied"])
def test_simulation_based_calibration(activation, sharing, how):
    """Chains as users run them: from the prior, with warm-up."""
    space, algorithm = how
    given = {"name": space, "given": cal.case(activation, sharing), "algorithm": algorithm}
    report(confirmed(cal.simulation_based, 300, **given))


def test_normal_scores_of_uniform_ranks():
    """Both z are standard normal if ranks are uniform; a shift and a spread are seen."""
    rng = np.random.default_rng(0)
    z = np.array([cal.normal_scores(rng.integers(0, 64, 500), 63) for _ in range(2000)])
    assert np.abs(z.mean(0)).max() < 5 / np.sqrt(2000)
    assert z.std(0) == pytest.approx(1, abs=0.08)
    shifted, narrow = np.minimum(rng.integers(0, 64, 500) + 12, 63), 16 + rng.integers(0, 32, 500)
    assert cal.normal_scores(shifted, 63)[0] > 5
    assert cal.normal_scores(narrow, 63)[1] < -5
