"""A transition of Hamiltonian Monte Carlo against the same trajectory written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayeskernel.inference import hmc

STIFFNESS = np.geomspace(1, 200, 40)


def likelihood(z, data):
    return -jnp.sum(data * z["z"] ** 2) / 2, {"z": -data * z["z"]}


def energy(z, p):
    return (z @ z + p @ p + STIFFNESS @ z**2) / 2


def by_hand(key, z, step):
    """Where a trajectory from z leads, and the chance to accept it; randomness is spent as `transition` does."""
    _, key_pair, key_p = jax.random.split(key, 3)
    p = np.asarray(jax.random.normal(key_p, z.shape))
    for_length, for_acceptance = np.asarray(jax.random.uniform(key_pair, (2,)))
    length = np.pi * (0.5 + for_length)
    count = int(np.ceil(length / step))
    step, before, start = length / count, energy(z, p), z
    turn = np.array([[np.cos(step), np.sin(step)], [-np.sin(step), np.cos(step)]])
    for _ in range(count):
        p = p - step / 2 * STIFFNESS * z
        z, p = turn @ np.stack([z, p])
        p = p - step / 2 * STIFFNESS * z
    chance = min(1.0, float(np.exp(before - energy(z, p))))
    accepted = for_acceptance < chance
    return z if accepted else start, energy(z, p) if accepted else before, chance


def test_transition_is_that_written_out():
    """Chances to accept are far from one here, so that an error in any part of the energy shows."""
    with jax.enable_x64(True):
        z = {"z": jnp.asarray(np.random.default_rng(0).normal(size=40))}
        data, chances = jnp.asarray(STIFFNESS), list[float]()
        state = hmc.start(jax.random.key(1), z, 0)
        state = hmc.transition(state, data, likelihood, 0)  # takes the gradient alone
        np.testing.assert_array_equal(state.z["z"], z["z"])
        for _ in range(12):
            expected = by_hand(state.rng_key, np.asarray(state.z["z"]), float(state.step_size))
            state = hmc.transition(state, data, likelihood, 0)
            found = state.z["z"], state.energy, state.accept_prob
            for one, two in zip(found, expected, strict=True):
                np.testing.assert_allclose(one, two, rtol=1e-9)
            chances.append(float(state.accept_prob))
    assert min(chances) < 0.5 < max(chances)


@pytest.mark.parametrize("name", ["_half_square", "_rotate", "_normal_like"])
def test_errors_in_a_transition_are_seen(name, monkeypatch):
    right = getattr(hmc, name)
    monkeypatch.setattr(hmc, name, lambda *given: jax.tree.map(lambda x: 1.01 * x, right(*given)))
    with pytest.raises(AssertionError):
        test_transition_is_that_written_out()


def test_rounding_errors_far_out_do_not_end_the_motion():
    """Energies that jump by whole numbers have steps of any length refused, until the bulk is reached."""

    def coarse(z, data):
        value, gradient = likelihood(z, data)
        far = value < -200
        return jnp.where(far, 6 * jnp.round(value / 6) + 3 * jnp.sin(1e9 * value), value), gradient

    z = {"z": 30 * jnp.asarray(np.random.default_rng(0).normal(size=40), jnp.float32)}
    data, state = jnp.asarray(STIFFNESS, jnp.float32), hmc.start(jax.random.key(1), z, 400)
    step = jax.jit(lambda state: hmc.transition(state, data, coarse, 400))
    for _ in range(401):
        state = step(state)
    assert float(state.log_likelihood) > -100
    assert float(state.step_size) > 0.01
