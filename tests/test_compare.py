"""Comparison, plots, report and command line on one quick run."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import xarray as xr

import bayeskernel as bk
from bayeskernel.errors import InputError
from bayeskernel.inference.measure import of_networks
from bayeskernel.inference.record import to_datatree
from bayeskernel.meanfield import fluctuations

from .conftest import fake_draws

NETWORK = bk.Network(256, "linear", noise=0.5)
TASK = bk.tasks.endpoint([[1.0]], [4.5], 3)


@pytest.fixture(scope="module")
def theory():
    return bk.solve(NETWORK, TASK)


def test_table_holds_what_was_computed(theory):
    cmp = bk.compare(fake_draws(theory), theory)
    assert list(cmp.table.columns) == [
        "sampled",
        "mcse",
        "ess",
        "theory",
        "theory_std",
        "finite_width",
        "z",
    ]
    row = cmp.table.loc[(2, 0, 3, 0)]
    assert row["theory"] == theory.kernel[1, 0, 2, 0]
    assert row["finite_width"] == pytest.approx(abs(theory.kernel_shift()[1, 0, 2, 0]))
    error = np.hypot(row["mcse"], row["finite_width"])
    assert row["z"] == pytest.approx((row["sampled"] - row["theory"]) / error)
    assert row["mcse"] == pytest.approx(row["theory_std"] / np.sqrt(2 * 2000), rel=0.1)
    assert cmp.agrees
    assert "agree" in cmp.verdict
    assert cmp.cosine_alignment == pytest.approx(1, abs=1e-3)


def test_a_difference_is_found(theory):
    cmp = bk.compare(fake_draws(theory, offset=0.5), theory)
    assert not cmp.agrees
    assert "DISAGREE" in cmp.verdict


def test_the_verdict_names_the_blocks_that_differ(theory):
    draws = fake_draws(theory)
    kernel = draws["posterior"]["kernel"]
    scaled = np.ones((3, 1, 3, 1))
    scaled[1, :, 2] = scaled[2, :, 1] = 1.2
    draws["posterior"]["kernel"] = kernel * scaled
    cmp = bk.compare(draws, theory)
    own, other = cmp.blocks.loc[(2, 3), ["sampled", "theory"]]
    said = f"Samples and theory DISAGREE in the block of steps (2, 3) (norm {own:.3g}, theory {other:.3g}): "
    assert cmp.verdict.startswith(said)
    every = bk.compare(fake_draws(theory, offset=0.5), theory)
    assert "DISAGREE in the blocks of steps (3, 3) (norm" in every.verdict
    assert "and 3 more: largest |z|" in every.verdict


def test_draws_are_compared_with_draws(theory):
    one, two = fake_draws(theory), fake_draws(theory, flips=True, count=300, seed=1)
    cmp = bk.compare(one, two)
    assert cmp.agrees
    assert cmp.theory.network == theory.network
    assert cmp.verdict.startswith("Samples and samples agree: largest |z|")
    row = cmp.table.loc[(2, 0, 3, 0)]
    assert list(cmp.table.columns) == ["sampled", "mcse", "ess", "other", "other_mcse", "z"]
    # Each is its own mean over draws, signs apart, with its own error; no finite-width shift comes between them.
    kernel = np.abs(two["posterior"]["kernel"].to_numpy()[:, :, 1, 0, 2, 0])
    assert row["other"] == pytest.approx(kernel.mean())
    assert row["other_mcse"] == pytest.approx(kernel.std() / np.sqrt(1200), rel=0.1)
    difference = row["sampled"] - row["other"]
    assert row["z"] == pytest.approx(difference / np.hypot(row["mcse"], row["other_mcse"]))
    assert cmp.coherence[1].shape == (3, 3)
    shifted = fake_draws(theory, offset=0.5, seed=1)
    assert "Samples and samples DISAGREE" in bk.compare(one, shifted).verdict
    assert "DISAGREE" in bk.compare(shifted, one).verdict
    few = fake_draws(theory, count=5)
    assert "Inconclusive: 19 effective draws" in bk.compare(one, few).verdict
    cmp.plot()
    plt.close("all")
    with pytest.raises(InputError, match="comparisons: expected a MeanField"):
        bk.report(cmp, "report.html")


def networks(theory, count, offset=0.0, **made):
    """Networks about the theory with the spread that it has of draws, by whatever training."""
    draws = fake_draws(theory, offset, count)["posterior"]
    values = {name: draws[name].to_numpy()[0] for name in ("kernel", "output")}
    return of_networks(values, NETWORK, TASK, {"space": "trained", "optimizer": "adam"} | made)


def test_activations_of_the_user_are_known_by_their_name():
    """Records hold no callable: draws are judged and shown all the same, but not evaluated."""
    network = bk.Network(32, lambda h: h / (1 + h**2), noise=0.3)
    task = bk.tasks.endpoint([[1.0], [-1.0]], [1.0, -1.0], 2)
    draws = [
        bk.sample(jax.random.key(k), network, task, num_warmup=100, num_samples=100, num_chains=2)
        for k in range(2)
    ]
    assert "kernel[1,0,2,1]" in bk.diagnose(draws[0]).table.index
    assert bk.compare(draws[0], bk.solve(network, task)).diagnosis.flipped >= 0
    cmp = bk.compare(*draws)
    assert cmp.theory.network.describe() == network.describe()
    assert cmp.theory.network.phi.odd
    with pytest.raises(InputError, match="activation: expected the network of the run"):
        cmp.theory.network.phi.values(np.ones(1))


def test_trained_networks_stand_beside_samples_and_theory(theory):
    """One table of all three; errors are the spread over networks; minima deviate."""
    draws, own = fake_draws(theory, seed=3), networks(theory, 20)
    table = pd.concat(
        {"sampled": bk.compare(draws, theory).table, "trained": bk.compare(own, theory).table},
        axis=1,
    )
    kernel = own["posterior"]["kernel"][:, 0, 1, 0, 2, 0]
    assert table.loc[(2, 0, 3, 0), ("trained", "mcse")] == pytest.approx(
        float(kernel.std(ddof=1)) / np.sqrt(20)
    )
    np.testing.assert_array_equal(table["sampled", "theory"], table["trained", "theory"])
    for one, two in ((own, draws), (draws, own)):
        cmp = bk.compare(one, two)
        assert cmp.agrees
        assert cmp.threshold == bk.compare(own, theory).threshold > 5
    apart = networks(theory, 20, offset=2.0)
    for pair, said in (
        ((apart, theory), "theory"),
        ((apart, draws), "samples"),
        ((draws, apart), "samples"),
    ):
        verdict = bk.compare(*pair).verdict
        assert verdict.startswith(f"20 networks trained by adam deviate from {said} in the block")
    langevin = networks(theory, 20, offset=2.0, optimizer="langevin", weight_decay=1.0)
    assert (
        "networks trained by langevin and theory DISAGREE" in bk.compare(langevin, theory).verdict
    )
    with pytest.raises(InputError, match="theory: expected at least 3 networks"):
        bk.compare(draws, networks(theory, 2))
    with pytest.raises(InputError, match="theory: expected a MeanField from"):
        bk.compare(draws, 3)


def test_chains_of_opposite_sign_are_aligned(theory):
    cmp = bk.compare(fake_draws(theory, flips=True), theory)
    assert cmp.flipped == 0.25
    assert cmp.agrees


def test_large_kernels_take_their_finite_width_scale_from_the_draws(theory, monkeypatch):
    draws = fake_draws(theory)
    monkeypatch.setattr(fluctuations, "MOST_COORDINATES", 0)
    cmp = bk.compare(draws, bk.solve(NETWORK, TASK))
    row = cmp.table.loc[(2, 0, 3, 0)]
    size = np.sqrt(theory.kernel[1, 0, 1, 0] * theory.kernel[2, 0, 2, 0])
    assert row["finite_width"] == pytest.approx(
        theory.kernel_std()[1, 0, 2, 0] ** 2 / 2 / size, rel=0.1
    )
    # Standard deviations come from random directions.
    assert row["theory_std"] == pytest.approx(theory.kernel_std()[1, 0, 2, 0], rel=0.3)
    assert cmp.agrees
    assert cmp.from_draws
    assert "several times as large where many entries move together" in cmp.verdict
    assert "from the draws" not in bk.compare(draws, theory).verdict


def test_few_draws_give_no_verdict(theory):
    assert "Inconclusive" in bk.compare(fake_draws(theory, count=5), theory).verdict


def test_unconverged_theory_gives_no_verdict(theory):
    loose = bk.solve(NETWORK, TASK, max_steps=4)
    assert (
        "Inconclusive: the theory did not converge" in bk.compare(fake_draws(theory), loose).verdict
    )


def test_a_saddle_gives_no_verdict(theory):
    saddle = replace(theory, branches=(theory.branches[0]._replace(stable=False),))
    verdict = bk.compare(fake_draws(theory), saddle).verdict
    assert verdict.startswith("Inconclusive: the theory's solution is a saddle")


def test_other_networks_and_tasks_are_refused(theory):
    draws = fake_draws(theory)
    with pytest.raises(InputError, match="draws: expected a run of this network"):
        bk.compare(draws, bk.solve(bk.Network(255, "linear", noise=0.5), TASK))
    with pytest.raises(InputError, match="draws: expected a run on this task's targets"):
        bk.compare(draws, bk.solve(NETWORK, TASK.scaled(2)))
    with pytest.raises(InputError, match="draws: expected a DataTree from"):
        bk.compare(xr.DataTree(), theory)
    made = {name: draws["posterior"][name].to_numpy()[:1] for name in ("kernel", "output")}
    prior = to_datatree(made, "prior", NETWORK, TASK, {"num_samples": 500})
    with pytest.raises(
        InputError, match=r"draws: expected a DataTree from .* without \['posterior/kernel"
    ):
        bk.compare(prior, theory)


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]

    def handle_data(self, data):
        self.text.append(data)


def test_report_is_one_self_contained_page(theory, tmp_path):
    cmp = bk.compare(fake_draws(theory), theory)
    path = bk.report({"RNN": cmp, "<b>": cmp}, tmp_path / "report.html")
    page = _Page()
    page.feed(path.read_text())
    assert all(link.startswith(("#", "data:")) for link in page.links)
    # Networks, three maps each, coherence, predictions, and two rank plots a network.
    assert page.tags.count("svg") == 2 + 6 + 1 + 2 + 4
    text = " ".join(page.text)
    assert cmp.verdict in text
    assert "<b>" in text
    titles = (
        "Samples and theory",
        "Task and networks",
        "Kernels",
        "Predictions",
        "Weight spectrum",
        "worst R-hat",
    )
    assert sorted(titles, key=text.index) == list(titles)
    # Lines and letters are visible on a dark page.
    assert "#000000" not in path.read_text()


def test_names_are_text_to_the_report(tmp_path):
    """A task and a network may be called anything: neither markup, nor a template, nor a formula."""
    hostile = "\"></title><script>{{ 7 * 7 }}</script>$\\x$'"
    task = bk.Task(TASK.inputs, TASK.targets, hostile)
    theory = bk.solve(NETWORK, task)
    cmp = bk.compare(fake_draws(theory), theory)
    page = _Page()
    page.feed(bk.report({hostile: cmp}, tmp_path / "report.html").read_text())
    assert page.tags.count("script") == 1  # the page's own
    assert page.text.count(hostile) >= 3  # the task's and the network's


def test_real_outliers_are_shown_as_real_numbers():
    number = importlib.import_module("bayeskernel.report")._number
    assert number(1.0912 + 0j) == "1.09"
    assert number(-2 + 1e-12j) == "-2"
    assert number(0.5 - 0.25j) == "0.5 − 0.25i"
    assert number(0.25j) == "0 + 0.25i"


def test_report_holds_code_that_repeats_the_run(tmp_path):
    inputs, targets = [[[1.0, 0.1]], [[0.3, 0.0]], [[0.0, 1 / 3]]], [[np.nan], [np.nan], [0.7]]
    task = bk.Task(inputs, targets, "three")
    network = bk.Network(16, "linear", bk.Sharing([0, 0, 1], "tied", "untied"), noise=0.3)
    settings = {"num_warmup": 300, "num_samples": 30, "num_chains": 2, "progress": False}
    draws = bk.sample(jax.random.key(8), network, task, **settings)
    cmp = bk.compare(draws, bk.solve(network, task))
    page = _Page()
    page.feed(bk.report(cmp, tmp_path / "report.html").read_text())
    code = next(text for text in page.text if "import bayeskernel" in text)
    names = {}
    exec(code.replace('"report.html"', repr(str(tmp_path / "again.html"))), names)
    assert np.array_equal(names["draws"]["posterior"]["kernel"], draws["posterior"]["kernel"])


@pytest.mark.parametrize(
    "network",
    [
        bk.Network(16, "linear", graph=bk.architectures.residual(3)),
        bk.Network(
            16,
            "linear",
            bias_std=0.5,
            graph=bk.architectures.stacked(3, [0, 1, 1], layers=2, leak=0.5, skip=2, biases=True),
        ),
        bk.Network(16, "linear", [0, 0, 1], layers=2, leak=0.3, skip=2, bias_std=1 / 3),
        bk.Network(16, "linear", bk.Sharing([0, 0, 1], "untied"), scaling="standard", noise=0.7),
    ],
)
def test_code_of_a_report_makes_the_network_again(network):
    """The lines before those that sample and solve."""
    theory = bk.solve(network, TASK)
    cmp = bk.compare(fake_draws(theory), theory)
    code = importlib.import_module("bayeskernel.report")._code(cmp)
    names = {}
    exec(code[: code.index("key =")], names)
    assert names["network"] == network
    assert np.array_equal(names["task"].targets, TASK.targets, equal_nan=True)


WEIGHTS = {
    "recurrent_weights": (1, 16, 16),
    "input_weights": (1, 16, 1),
    "readout_weights": (1, 1, 16),
}
PREACTIVATIONS = {"preactivation": (3, 1, 16), "readout_weights": (1, 1, 16)}


@pytest.mark.parametrize("kept", [WEIGHTS, PREACTIVATIONS, {}])
def test_report_shows_the_spectrum_of_weights_that_were_kept(kept, tmp_path):
    theory = bk.solve(bk.Network(16, "linear", noise=0.5), TASK)
    cmp = bk.compare(fake_draws(theory, **kept), theory)
    text = bk.report(cmp, tmp_path / "report.html").read_text()
    assert ("in the complex plane" in text) == bool(kept)


def test_report_refuses_a_missing_folder(theory, tmp_path):
    cmp = bk.compare(fake_draws(theory), theory)
    with pytest.raises(InputError, match="path: expected a file in an existing folder"):
        bk.report(cmp, tmp_path / "missing" / "report.html")
    with pytest.raises(InputError, match="comparisons: expected"):
        bk.report({}, tmp_path / "report.html")


@pytest.mark.long
def test_command_line_compares_and_reports(tmp_path, command):
    problem = "--task digits --patterns 2 --steps 2 --activation linear"
    options = f"{problem} --width 24 --space preactivations --draws 100 --warmup 100 --chains 2"
    done = command("compare", *options.split(), "--out", "results")
    assert done.returncode == 0, done.stderr
    assert "RNN (tied) sampled" in done.stdout
    assert "DNN (untied) theory" in done.stdout
    note = "Held-out images, theory: accuracy"
    assert done.stdout.count(note) == 2
    assert (tmp_path / "results" / "report.html").read_text().count(note) == 2
    draws = bk.load(tmp_path / "results" / "draws_tied.nc")
    assert draws["posterior"].sizes["draw"] == 100
    draws.close()
    files = [f"results/draws_{sharing}.nc" for sharing in ("tied", "untied")]
    done = command("report", *files, "--out", "again.html")
    assert done.returncode == 0, done.stderr
    assert "Kernels" in (tmp_path / "again.html").read_text()
    # For machines: one JSON object, and nothing else, on standard output.
    quick = f"{problem} --width 24 --space preactivations --draws 9 --warmup 100 --chains 1"
    for name, more in (("compare", quick), ("sample", quick), ("solve", problem)):
        done = command(name, *more.split(), "--sharing", "tied", "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found.keys() >= {"RNN (tied)"}
        if name == "compare":
            scores = found["RNN (tied)"]["held_out"]
    task, test = (bk.tasks.digits((0, 1), n, 2, start=s).scaled(2.0) for n, s in ((1, 0), (100, 1)))
    network = bk.Network(1, "linear", noise=0.3)
    predicted = {
        "theory": bk.solve(network, task).predict(test.inputs),
        "nngp": bk.nngp(network, task, test.inputs),
    }
    for source, prediction in predicted.items():
        expected = bk.held_out(prediction, test)
        assert scores[source] == pytest.approx(expected._asdict(), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--patterns", "3"), "--patterns: expected an even number"),
        (("--sharing", "a,b"), "--sharing: expected tied, untied or labels"),
        (("--sharing", "0,1"), "sharing: expected 4 labels"),
        (("--activation", "sigmoid"), "activation: expected one of"),
        (("--task", "mnist"), "'mnist' is not one of"),
        (("--task", "flip_flop", "--patterns", "3"), "--patterns: expected none for flip_flop"),
    ],
)
def test_command_line_refuses_in_one_line(arguments, message, command):
    done = command("compare", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_module_is_the_command_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bayeskernel", "compare", "--width", "0"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "width: expected an integer >= 1, got 0" in done.stderr


def test_blocks_sum_up_the_table(theory):
    cmp = bk.compare(fake_draws(theory), theory)
    for (t, s), row in cmp.blocks.iterrows():
        entries = cmp.table.xs((t, s), level=("step", "other_step"))
        assert row["largest_z"] == pytest.approx(entries["z"].abs().max())
        assert row["smallest_ess"] == entries["ess"].min()
        assert row["difference"] == pytest.approx(
            np.linalg.norm(entries["sampled"] - entries["theory"])
        )
    assert len(cmp.blocks) == 6
    assert cmp.largest_z == cmp.table["z"].abs().max()
    assert cmp.entries == len(cmp.table)


def test_long_tables_stay_out_of_the_report(theory, tmp_path, monkeypatch):
    cmp = bk.compare(fake_draws(theory), theory)
    module = importlib.import_module("bayeskernel.report")
    monkeypatch.setattr(module, "_MOST_ROWS", 5)
    monkeypatch.setattr(module, "_FIRST_ROWS", 3)
    text = bk.report(cmp, tmp_path / "report.html").read_text()
    assert "comparison.table" in text
    assert "Every kernel entry" not in text
    assert "5 of 16 quantities" in text


def test_results_are_printed_in_a_few_lines(table1_task):
    network = bk.Network(32, "linear", noise=0.5)
    theory = bk.solve(network, table1_task)
    activities = np.random.default_rng(0).normal(size=(4, 3, 1, 32))
    comparison = bk.compare(bk.measure(network, table1_task, activities), theory)
    assert repr(table1_task) == "Task('endpoint', T = 3, P = 1, D = 1, O = 1, 1 supervised targets)"
    assert theory.result in repr(theory)
    assert comparison.verdict in repr(comparison)
    for shown in (theory, comparison):
        assert len(repr(shown).splitlines()) == 2
