"""Do the tests have teeth? Plant an error, run the deterministic checks, and see which one notices.

``python -m pytest -m slow tests/test_mutants.py -rP`` prints the table kept in docs/calibration.
"""

import contextlib
from dataclasses import replace
from functools import partial

import jax
import pytest

import bayeskernel as bk
from bayeskernel import network as architecture
from bayeskernel import problem as definitions
from bayeskernel.inference import (
    conditional,
    hmc,
    kernel_space,
    readout,
    run,
    weights,
)
from bayeskernel.meanfield import critical, free_energy, grid, particles, prior, solve
from bayeskernel.sharing import labels_of

from . import test_kernels
from .conftest import make_general_task as general_task
from .inference import (
    calibration,
    test_conditional,
    test_hmc,
    test_kernel_space,
    test_preactivations,
    test_weights,
)
from .meanfield import test_linear, test_nonlinear


def joint_law(space):
    activation, algorithm = ("linear", "nuts") if space == "kernels" else ("erf", "hmc")
    case = calibration.case(activation, width=8)
    outcome = calibration.joint_invariance(space, case, algorithm, count=20_000, seed=5)
    assert outcome.worst < outcome.limit, outcome.name


CHECKS = {
    "K by entry": lambda: test_kernels.test_preactivation_kernel_entry_by_entry(general_task()),
    "weights: density": lambda: test_weights.test_model_is_its_definition(
        "erf", "mean_field", general_task(), None
    ),
    "pre-activations: density": lambda: test_preactivations.test_density_is_its_definition(
        "erf", "mean_field", general_task(), None
    ),
    "kernels: density": lambda: test_kernel_space.test_density_is_its_closed_form(
        test_kernel_space.MIXED, "mean_field", 11, None
    ),
    "readout conditional": lambda: test_preactivations.test_readout_is_drawn_from_its_conditional(
        None
    ),
    "Matheron weights": lambda: test_conditional.test_weights_reproduce_preactivations_and_outputs(
        test_conditional.SHARINGS[2], "preactivations", general_task(), None
    ),
    "HMC transition": test_hmc.test_transition_is_that_written_out,
    "theory: saddle point": lambda: test_linear.test_solution_satisfies_the_saddle_point_equations(
        "mixed", general_task()
    ),
    "theory: table 1": lambda: test_linear.test_table_1(bk.tasks.endpoint([[1.0]], [4.5], 3)),
    "theory: table 2": lambda: test_nonlinear.test_reference_table_2(
        bk.solve(test_nonlinear.ERF, test_nonlinear.ENDPOINT)
    ),
    "theory: one step": test_nonlinear.test_one_step_against_an_independent_integral,
    "theory: untied gain": lambda: test_linear.test_untied_endpoint_gain_is_equal_at_every_step(5),
    **{f"joint law: {space}": partial(joint_law, space) for space in calibration.SPACES},
}
# In float64; theory chooses it itself, calibration runs as users do.
DOUBLE = [name for name in CHECKS if not name.startswith(("theory", "joint"))]

_arrays, _problem = weights.arrays, definitions.problem
_fed_back, _tilt = definitions.Problem.fed_back, grid.tilt
_likelihood = readout.log_likelihood_and_slope
_stacked = architecture._stacked
_half_square, _normal_like, _rotate = hmc._half_square, hmc._normal_like, hmc._rotate
_freedom = kernel_space._degrees_of_freedom


def scaled_problem(field, factor):
    def mutated(network, task):
        defined = _problem(network, task)
        return replace(defined, **{field: factor * getattr(defined, field)})

    return mutated


def scaled_data(change):
    return lambda network, task: change(_arrays(network, task))


def scaled_scale(scales, kind):
    return scales | {kind: 1.05 * scales[kind]}


def scaled_tree(factor, tree):
    return jax.tree.map(lambda x: factor * x, tree)


def problem_without_last_site(network, task):
    defined = _problem(network, task)
    last = max(reading.sites[-1] for reading in defined.readings)
    kept = [(reading, reading.sites < last) for reading in defined.readings]
    readings = tuple(r._replace(sites=r.sites[keep], targets=r.targets[keep]) for r, keep in kept)
    return replace(defined, readings=readings)


def without_last_pattern(data):
    return data._replace(supervised=data.supervised.at[:, -1].set(False))


def exchanged_labels(steps, sharing, **more):
    """Recurrent weights shared as inputs are, inputs as readouts are, readouts as recurrent weights are."""
    own = labels_of(sharing, steps)
    recurrent = [0, *own.recurrent[1:]]
    mixed = bk.Sharing(list(own.input), list(own.readout), recurrent, list(own.feedforward))
    return _stacked(steps, mixed, **more)


def without_log_determinant(lower, coordinates, data):
    """What is left of the likelihood without its normalisation, and the slope of that."""
    more = _likelihood(
        lower, coordinates, data._replace(targets=tuple(2 * t for t in data.targets))
    )
    less = _likelihood(lower, coordinates, data)
    return tuple((one - two) / 3 for one, two in zip(more, less, strict=True))


def every_problem(function):
    tests = (calibration, test_kernels, test_kernel_space, test_preactivations)
    theory = (solve, critical, free_energy, prior)
    return [(module, "problem", function) for module in (run, conditional, *theory, *tests)]


MUTANTS = {
    "noise + 5 %": [
        *every_problem(scaled_problem("noise", 1.05)),
        (weights, "arrays", scaled_data(lambda d: d._replace(noise=1.05 * d.noise))),
    ],
    "recurrent std + 5 %": [
        *every_problem(scaled_problem("gain", 1.05**2)),
        (
            weights,
            "arrays",
            scaled_data(lambda d: d._replace(scales=scaled_scale(d.scales, "recurrent"))),
        ),
    ],
    "readout std + 5 %": [
        *every_problem(scaled_problem("readout", 1.05**2)),
        (
            weights,
            "arrays",
            scaled_data(lambda d: d._replace(scales=scaled_scale(d.scales, "readout"))),
        ),
    ],
    "masks exchanged": [
        (architecture, "_stacked", exchanged_labels),
    ],
    "one pattern dropped": [
        *every_problem(problem_without_last_site),
        (weights, "arrays", scaled_data(without_last_pattern)),
    ],
    "log determinant missing": [(readout, "log_likelihood_and_slope", without_log_determinant)],
    "shift not undone": [(definitions.Problem, "fed_back", definitions.Problem.fed)],
    "energy + 5 %": [(hmc, "_half_square", lambda z: 1.05 * _half_square(z))],
    "momentum + 5 %": [
        (hmc, "_normal_like", lambda *given: scaled_tree(1.05, _normal_like(*given)))
    ],
    "rotation + 1 % in length": [
        (hmc, "_rotate", lambda *given: scaled_tree(1.01, _rotate(*given)))
    ],
    "a degree of freedom missing": [
        (kernel_space, "_degrees_of_freedom", lambda *given: _freedom(*given) - 1)
    ],
    "K's slope - 5 %": [
        (definitions.Problem, "fed_back", lambda problem, B: 0.95 * _fed_back(problem, B))
    ],
    "tilt + 5 %": [
        (module, "tilt", lambda phi, Ct: 1.05 * _tilt(phi, Ct)) for module in (grid, particles)
    ],
}

# Errors that a space or the theory cannot contain.
JOINT = {"joint law: weights", "joint law: preactivations", "joint law: kernels"}
EXPECTED = {
    "noise + 5 %": {"weights: density", "pre-activations: density", "kernels: density", "readout conditional",
                    "theory: table 1", "theory: untied gain", "theory: table 2", *JOINT},
    "recurrent std + 5 %": {"weights: density", "pre-activations: density", "kernels: density",
                            "theory: table 1", "theory: untied gain", "theory: table 2", *JOINT},
    "readout std + 5 %": {"weights: density", "pre-activations: density", "kernels: density",
                          "theory: table 1", "theory: untied gain", "theory: table 2", *JOINT},
    "masks exchanged": {"K by entry", "weights: density", "pre-activations: density", "kernels: density", *JOINT},
    "one pattern dropped": {"weights: density", "pre-activations: density", "kernels: density",
                            "readout conditional", *JOINT},
    "log determinant missing": {"pre-activations: density", "kernels: density",
                                "joint law: preactivations", "joint law: kernels"},
    "shift not undone": {"theory: saddle point"},
    # Motion under the prior is exact, so the error tempers the likelihood alone, by 5 %: too little for
    # pre-activations at this number of replicates.
    "energy + 5 %": {"HMC transition", "joint law: weights"},
    "momentum + 5 %": {"HMC transition", "joint law: weights", "joint law: preactivations"},
    "rotation + 1 % in length": {"HMC transition", "joint law: weights", "joint law: preactivations"},
    "a degree of freedom missing": {"joint law: kernels"},
    "K's slope - 5 %": {"theory: table 2"},
    "tilt + 5 %": {"theory: table 2", "theory: one step"},
}  # fmt: skip


def killed(check, double):
    with jax.enable_x64(double), contextlib.suppress(Exception):
        check()
        return False
    return True


@pytest.mark.slow
def test_unchanged_code_passes_every_check():
    for name, check in CHECKS.items():
        assert not killed(check, name in DOUBLE), name


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_error_is_caught(mutant, monkeypatch):
    for owner, name, replacement in MUTANTS[mutant]:
        monkeypatch.setattr(owner, name, replacement)
    found = {name for name, check in CHECKS.items() if killed(check, name in DOUBLE)}
    print(
        f"\n| {mutant} | " + " | ".join("caught" if name in found else "" for name in CHECKS) + " |"
    )
    assert found >= EXPECTED[mutant]
