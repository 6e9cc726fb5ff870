"""Every call ends in a result or in one of the package's own errors, whatever its arguments.

Examples are derived from the test's code alone, so that runs repeat; ``-m slow`` tries many more.
"""

import contextlib
import itertools

import hypothesis.extra.numpy as hnp
import jax
import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bayeskernel as bk
from bayeskernel.inference import weights

from .conftest import fake_draws

FEW, MANY = 100, 5000


def examples(count):
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def survives(call, *args, **named):
    """The result, or None after a refusal."""
    with contextlib.suppress(bk.BayesKernelError):
        return call(*args, **named)


def either(*good):
    """Mostly what is meant, sometimes anything."""
    return st.one_of(*(st.just(value) for value in good), JUNK)


ARRAYS = hnp.arrays(
    st.one_of(hnp.scalar_dtypes(), hnp.unicode_string_dtypes(max_len=2), st.just(np.dtype(object))),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3),
)
NUMBERS = st.one_of(
    st.integers(-3, 5), st.floats(), st.booleans(), st.complex_numbers(), st.fractions(),
    hnp.from_dtype(np.dtype(np.float32)), hnp.from_dtype(np.dtype(np.int8)),
)  # fmt: skip
JUNK = st.one_of(
    st.none(), NUMBERS, st.text(max_size=3), st.binary(max_size=2), ARRAYS,
    st.lists(st.one_of(NUMBERS, st.text(max_size=2), st.lists(NUMBERS, max_size=2)), max_size=4),
    st.dictionaries(st.text(max_size=2), NUMBERS, max_size=2), st.just(object()), st.just(len),
)  # fmt: skip
FLOATS = hnp.arrays(np.float64, hnp.array_shapes(min_dims=1, max_dims=3, max_side=3))
PATTERNS = st.one_of(FLOATS, ARRAYS, JUNK)
WHOLE = st.one_of(st.integers(-1, 5), JUNK)
SCALE = st.one_of(st.floats(1e-3, 1e3), JUNK)
SHARING = st.one_of(
    st.sampled_from(["tied", "untied"]), st.lists(st.integers(-2, 9), max_size=4), JUNK
)
ACTIVATION = st.one_of(st.sampled_from(["linear", "erf", "tanh", "relu"]), JUNK)
KEY = st.one_of(st.just(jax.random.key(0)), st.just(jax.random.split(jax.random.key(0))), JUNK)


CONSTRUCTORS = {
    "Task": (bk.Task, {"inputs": PATTERNS, "targets": PATTERNS}),
    "endpoint": (bk.tasks.endpoint, {"patterns": PATTERNS, "labels": PATTERNS, "steps": WHOLE}),
    "digits": (
        bk.tasks.digits,
        {
            "classes": st.one_of(st.tuples(WHOLE, WHOLE), JUNK), "patterns_per_class": WHOLE,
            "steps": WHOLE, "start": WHOLE,
        },
    ),
    "sunspots": (
        bk.tasks.sunspots,
        {
            "patterns": WHOLE, "steps": WHOLE, "lags": WHOLE, "stride": WHOLE,
            "first_year": st.one_of(st.integers(1600, 2100), JUNK),
            "supervised": st.one_of(st.just("all"), st.lists(WHOLE, max_size=3), JUNK),
        },
    ),
    "sine": (
        bk.tasks.sine,
        {
            "patterns": WHOLE, "steps": WHOLE, "period": SCALE, "amplitude": SCALE,
            "supervised": st.one_of(st.just("all"), st.lists(WHOLE, max_size=3), JUNK),
        },
    ),
    "linear_teacher": (
        bk.tasks.linear_teacher,
        {"rng_key": KEY, "patterns": WHOLE, "steps": WHOLE, "input_dim": WHOLE, "angle": SCALE},
    ),
    "decision": (
        bk.tasks.decision,
        {
            "coherences": st.one_of(st.lists(st.floats(0, 1), max_size=3), JUNK), "steps": WHOLE,
            "fixation": WHOLE, "noise": SCALE, "trials": WHOLE, "rng_key": KEY,
        },
    ),
    "flip_flop": (
        bk.tasks.flip_flop,
        {"bits": WHOLE, "steps": WHOLE, "spacing": WHOLE, "trials": WHOLE, "rng_key": KEY},
    ),
    "from_neurogym": (
        bk.tasks.from_neurogym,
        {"dataset": st.one_of(JUNK, st.tuples(PATTERNS, PATTERNS).map(lambda pair: lambda: pair))},
    ),
    "from_arrays": (bk.tasks.from_arrays, {"source": JUNK}),
    "Sharing": (bk.Sharing, {"recurrent": SHARING, "input": SHARING, "readout": SHARING}),
    "Network": (
        bk.Network,
        {
            "width": WHOLE, "activation": ACTIVATION,
            "sharing": st.one_of(SHARING, st.builds(bk.Sharing, st.sampled_from(["tied", [0, 1]]))),
            "input_std": SCALE, "recurrent_std": SCALE, "readout_std": SCALE, "noise": SCALE,
            "scaling": st.one_of(st.sampled_from(["mean_field", "standard"]), JUNK),
        },
    ),
    "coherence": (bk.coherence, {"kernel": PATTERNS}),
}  # fmt: skip


def try_constructor(name, count):
    call, arguments = CONSTRUCTORS[name]

    @examples(count)
    @given(st.fixed_dictionaries(arguments))
    def run(arguments):
        made = survives(call, **arguments)
        if isinstance(made, bk.Task):
            assert np.isfinite(made.inputs).all()
            assert made.supervised.any()
            assert made.targets.shape == made.supervised.shape
        if isinstance(made, bk.Network):
            graph = survives(made.graph_of, 3)
            assert graph is None or graph.size == 3

    run()


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructors_make_or_refuse(name):
    try_constructor(name, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructors_make_or_refuse_at_length(name):
    try_constructor(name, MANY)


# One shape, so that most examples find compiled code; values from anywhere.
SIZES = st.one_of(st.floats(-3, 3), st.sampled_from([0.0, 1e-50, 1e-8, 1e8, 1e50, -1e50]))
INPUTS = hnp.arrays(np.float64, (2, 2, 2), elements=SIZES)
TARGETS = hnp.arrays(np.float64, (2,), elements=SIZES)


@st.composite
def problems(draw, activations=("linear",)):
    inputs, last = draw(INPUTS), draw(TARGETS)
    targets = np.full((2, 2), np.nan)
    targets[-1] = last
    network = bk.Network(
        8, draw(st.sampled_from(activations)), draw(st.sampled_from(["tied", "untied"])),
        noise=draw(st.sampled_from([1e-50, 1e-8, 0.1, 10.0, 1e50])),
        scaling=draw(st.sampled_from(["mean_field", "standard"])),
    )  # fmt: skip
    return network, bk.Task(inputs, targets)


def try_solve(count, activations):
    @examples(count)
    @given(problems(activations))
    def run(problem):
        network, task = problem
        theory = survives(bk.solve, network, task)
        if theory is None or not theory.converged:
            return
        size = task.shape[0] * task.shape[1]
        kernel = theory.kernel.reshape(size, size)
        assert np.isfinite(kernel).all()
        # With particles the slopes of kinked phi jump, and are solved to a share of their noise.
        assert theory.residual <= (1e-6 if network.phi.smooth else 2e-4)
        assert np.linalg.eigvalsh(kernel).min() >= -1e-9 * max(np.trace(kernel), 1e-300)

    run()


@pytest.mark.long
def test_solve_answers_or_refuses():
    try_solve(60, ("linear",))


@pytest.mark.slow
def test_solve_answers_or_refuses_at_length():
    try_solve(2000, ("linear",))
    try_solve(60, ("erf", "relu"))


TASK = bk.tasks.endpoint([[1.0, 0.5], [-0.3, 1.0]], [1.0, -1.0], 2)
NETWORK = bk.Network(8, "linear")
COUNT = st.one_of(st.sampled_from([0, 1, 4, 5]), JUNK)


def try_sample(count):
    @examples(count)
    @given(
        rng_key=KEY,
        network=either(NETWORK, bk.Network(8, "erf"), bk.Network(3, "linear"), bk.Network(8, "erf", [0])),
        task=either(TASK),
        space=either("auto", "weights", "preactivations", "kernels"),
        sampler=either("auto", "nuts", "hmc"),
        num_warmup=COUNT,
        num_samples=COUNT,
        num_chains=COUNT,
        keep=either((), ("weights",), ["preactivations"], ("weights", "preactivations")),
        checkpoint=st.one_of(st.none(), st.just("/dev/null/here"), NUMBERS),
    )  # fmt: skip
    def run(**arguments):
        draws = survives(bk.sample, progress=False, **arguments)
        if draws is not None:
            counts = int(arguments["num_chains"]), int(arguments["num_samples"])
            assert draws["posterior"]["kernel"].shape == (*counts, 2, 2, 2, 2)

    run()


@pytest.mark.long
def test_sample_answers_or_refuses():
    try_sample(60)


@pytest.mark.slow
def test_sample_answers_or_refuses_at_length():
    try_sample(2000)


AXES = {
    "signal": either([1.0], [0, 2.0], [-1.0], [1e60], [True]),
    "noise": either([0.1], [0.1, 1e-50], [0.0]),
    "width": either([4], [8, 2], [2.5]),
    "steps": either([2], [3]),
    "sharing": either(["tied"], [[0, 1], "untied"], [[0]], [None]),
    "activation": either(["linear"], ["step"], [3]),
    "seed": either([0], [0, 2**40], [0.5]),
    "depth": either([1]),
}


@pytest.mark.long
def test_sweep_answers_or_refuses(tmp_path):
    count = itertools.count()

    @examples(60)
    @given(
        network=either(NETWORK),
        task=either(TASK, lambda steps: TASK, lambda steps: 3),
        grid=st.one_of(JUNK, st.fixed_dictionaries({}, optional=AXES)),
        sample=either(None, None, None, {"num_samples": 5, "num_warmup": 5, "num_chains": 1}, {"draws": 3}),
        solve=either(True, False),
        out=st.one_of(st.none(), st.just("/dev/null/here"), NUMBERS, st.just("new"), st.just("new")),
        client=st.one_of(st.none(), st.none(), st.just("here"), st.just(0)),
    )  # fmt: skip
    def run(out, **arguments):
        folder = tmp_path / str(next(count)) if out == "new" else out
        data = survives(bk.sweep, out=folder, **arguments)
        if data is not None:
            assert "kernel" in data
            assert not (data["status"] == "not computed").any()
        survives(bk.open_sweep, folder)

    run()


@pytest.mark.long
def test_what_takes_draws_answers_or_refuses(tmp_path, monkeypatch):
    """Draws with parts missing or changed, theories of other problems, anything at all."""
    monkeypatch.chdir(tmp_path)  # reports with odd names
    theory = bk.solve(NETWORK, TASK)
    net = weights.structure(NETWORK, TASK.shape[0])
    kept = {
        f"{name}_weights": shape
        for name, shape in weights.site_shapes(net, *TASK.shape[2:]).items()
    }
    draws = fake_draws(theory, count=4, preactivation=(*TASK.shape[:2], NETWORK.width), **kept)
    theories = [
        theory,
        bk.solve(NETWORK, TASK.scaled(2)),
        bk.solve(bk.Network(8, "linear", noise=0.2), TASK),
    ]
    groups = list(draws.children)
    parts = [(group, name) for group in groups for name in draws[group].data_vars]

    @st.composite
    def damaged(draw):
        tree = draws.copy(deep=True)
        for group, name in draw(st.lists(st.sampled_from(parts), max_size=2, unique=True)):
            tree[group] = xr.DataTree(tree[group].to_dataset().drop_vars(name))
        for group in draw(st.lists(st.sampled_from(groups), max_size=1)):
            del tree[group]
        for name in draw(st.lists(st.sampled_from(list(draws.attrs)), max_size=1)):
            del tree.attrs[name]
        return tree

    some = st.one_of(st.just(draws), damaged(), JUNK)

    @examples(40)
    @given(
        some, either(*theories), either(NETWORK), either(TASK), KEY,
        st.one_of(INPUTS, PATTERNS),
    )  # fmt: skip
    def run(draws, theory, network, task, key, inputs):
        survives(bk.diagnose, draws)
        survives(bk.weights, key, draws, network, task)
        survives(bk.predict, key, draws, network, task, inputs)
        compared = survives(bk.compare, draws, theory)
        survives(bk.report, compared if compared is not None else draws, inputs)
        survives(bk.free_energy, network, task, inputs)
        survives(bk.prior_kernel, network, task)
        if isinstance(theory, bk.MeanField):
            survives(theory.predict, inputs)

    run()
