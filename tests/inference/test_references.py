"""Every space against draws kept on file, made by NumPyro's NUTS in weights."""

import jax
import numpy as np
import pytest
from scipy.stats import norm

import bayeskernel as bk
from bayeskernel.inference.convergence import mean_and_error
from tests.data import references

FALSE_ALARM = 1e-4


def features(values, quartiles):
    """Entries, their squares, and on which side of the reference's quartiles they lie."""
    below = [(values < q).astype(float) for q in quartiles]
    return np.concatenate([values, values**2, *below], axis=-1)


def spaces(name):
    linear = references.CASES[name][0].activation == "linear"
    return ["weights", "preactivations"] + ["kernels"] * linear


# What every test run checks; the others are slow together.
QUICK = [("linear, tied", "kernels"), ("erf, tied, digits", "preactivations")]


@pytest.mark.parametrize(
    ("name", "space"),
    [
        pytest.param(
            name, space, marks=getattr(pytest.mark, "long" if (name, space) in QUICK else "slow")
        )
        for name in references.CASES
        for space in spaces(name)
    ],
)
def test_samples_have_the_law_of_the_reference(name, space):
    network, task, _ = references.CASES[name]
    reference = references.load(name)
    assert reference.shape[:2] == (references.CHAINS, references.DRAWS)
    draws = bk.sample(
        jax.random.key(1), network, task, space=space,
        num_warmup=300 if space == "kernels" else 500, num_samples=6000, num_chains=2, progress=False,
    )  # fmt: skip
    values = references.entries(draws, network, task)
    quartiles = np.quantile(reference, [0.25, 0.5, 0.75], axis=(0, 1))
    mean, error, ess = mean_and_error(features(values, quartiles))
    expected, expected_error, _ = mean_and_error(features(reference, quartiles))
    assert ess.min() > 400
    z = (mean - expected) / np.hypot(error, expected_error)
    assert np.abs(z).max() < norm.isf(FALSE_ALARM / 2 / z.size)
