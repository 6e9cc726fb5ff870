"""Every figure is drawn into given axes or new ones, on draws, theory and comparisons."""

import jax
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import bayeskernel as bk
from bayeskernel.errors import InputError
from bayeskernel.gauge import aligned, sign_symmetry
from bayeskernel.inference.record import kernel_and_output

from .conftest import fake_draws

NETWORK = bk.Network(64, "linear", noise=0.1)
TASK = bk.tasks.endpoint([[1.0], [-0.5]], [2.0, -1.0], 3)


@pytest.fixture(scope="module")
def cmp():
    theory = bk.solve(NETWORK, TASK)
    draws = fake_draws(theory, count=60, preactivation=(3, 2, 64), readout_weights=(1, 1, 64))
    return bk.compare(draws, theory)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def ax():
    return Figure().add_subplot()


def points(axes):
    """Heights of the error bars' markers, in the order they were drawn."""
    return [container.lines[0].get_ydata() for container in axes.containers]


def test_kernel_of_anything_that_has_one(cmp, ax):
    for given in (cmp.theory.kernel, cmp.theory, cmp, cmp.draws):
        axes = bk.plots.plot_kernel(given)
        assert isinstance(axes, Axes)
        assert axes.images[0].get_array().shape == (6, 6)
    assert bk.plots.plot_kernel(cmp, ax, title="C") is ax
    assert np.array_equal(ax.images[0].get_array(), cmp.kernel.reshape(6, 6))
    with pytest.raises(InputError, match="kernel: expected shape"):
        bk.plots.plot_kernel(np.ones((3, 3)))


def test_new_figures_are_shown_in_notebooks_and_the_reports_are_not(cmp, tmp_path):
    """Notebooks show what pyplot holds at the end of a cell."""
    axes = bk.plots.plot_coherence(cmp)
    grid = cmp.plot()
    assert plt.get_fignums() == [axes.get_figure().number, grid[0, 0].get_figure().number]
    bk.report(cmp, tmp_path / "report.html")
    assert len(plt.get_fignums()) == 2


def test_comparison_has_three_maps_a_network(cmp):
    grid = bk.plots.plot_comparison({"RNN": cmp, "again": cmp})
    assert grid.shape == (2, 3)
    assert grid[0, 0].get_title() == "RNN: sampled, N = 64"
    assert np.array_equal(grid[1, 2].images[0].get_array(), cmp.z.reshape(6, 6))
    axes = Figure().subplots(1, 3)
    assert cmp.plot().shape == (1, 3)
    assert bk.plots.plot_comparison(cmp, [list(axes)])[0, 1] is axes[1]
    with pytest.raises(InputError, match="axes: expected shape"):
        bk.plots.plot_comparison({"RNN": cmp, "again": cmp}, [list(axes)])


def test_coherence_shows_samples_and_theory(cmp, ax):
    assert bk.plots.plot_coherence(cmp, ax) is ax
    sampled, theory = cmp.coherence
    assert np.array_equal(ax.lines[0].get_ydata(), theory[:, -1])
    assert np.array_equal(points(ax)[0], sampled[:, -1])


def test_predictions_mark_what_was_supervised(cmp, ax):
    assert bk.plots.plot_predictions(cmp, ax, truth=np.ones((3, 2))) is ax
    filled, hollow = points(ax)[:2]  # of the first pattern
    assert np.array_equal(filled, cmp.output[2:, 0, 0])
    assert np.array_equal(hollow, cmp.output[:2, 0, 0])
    # Bars are two standard deviations of the aligned draws to either side.
    symmetry = sign_symmetry(NETWORK, TASK)
    outputs = aligned(*kernel_and_output(cmp.draws), cmp.theory.kernel, symmetry)[1]
    bar = ax.containers[0].lines[2][0].get_segments()[0]
    assert np.ptp(bar[:, 1]) == pytest.approx(4 * outputs[:, :, 2, 0, 0].std(), rel=1e-6)
    crosses = [line for line in ax.lines if line.get_marker() == "x"]
    assert [float(line.get_ydata()[0]) for line in crosses] == [2.0, -1.0]
    for given in (cmp.theory, cmp.draws):
        assert isinstance(bk.plots.plot_predictions(given), Axes)


def test_spectrum_shows_bulk_and_outlier(cmp, ax):
    weights = bk.weights(jax.random.key(1), cmp.draws.isel(chain=[0, 1], draw=[-1]), NETWORK, TASK)
    strong = bk.solve(NETWORK, TASK.scaled(4))
    assert bk.plots.plot_spectrum(weights, strong, ax) is ax
    assert len(ax.lines[0].get_xdata()) == 2 * 64
    predicted = strong.outliers()[0].eigenvalues
    assert len(predicted) > 0
    assert np.array_equal(ax.lines[1].get_xdata(), predicted.real)
    assert ax.patches[0].get_radius() == 1.0
    assert len(bk.plots.plot_spectrum(np.eye(4)).lines) == 1
    with pytest.raises(InputError, match="weights: expected shape"):
        bk.plots.plot_spectrum(np.ones((3, 4)))


def test_width_scaling_ends_at_theory(cmp, ax):
    assert bk.plots.plot_width_scaling([cmp], ax, entries=[(2, 1, 3, 1)]) is ax
    assert points(ax)[0] == [cmp.kernel[1, 1, 2, 1]]
    line = next(line for line in ax.lines if len(line.get_xdata()) == 50)
    theory = cmp.theory.kernel[1, 1, 2, 1]
    shifted = theory + cmp.theory.kernel_shift()[1, 1, 2, 1]
    assert line.get_ydata()[[0, -1]] == pytest.approx([theory, shifted])
    assert len(bk.plots.plot_width_scaling([cmp]).containers) == 6


def test_phase_diagram_and_free_energy(cmp, ax):
    weak = bk.solve(NETWORK, TASK.scaled(0.2))
    critical = bk.CriticalSignal(1.5, 1.2, "discontinuous", float("nan"), np.zeros((3, 2, 3, 2)))
    bk.plots.plot_phase_diagram({0.2: weak, 1.0: cmp}, ax, critical=critical)
    orders = [bk.plots.neighbouring(bk.coherence(t.kernel)) for t in (weak, cmp.theory)]
    assert np.array_equal(ax.lines[0].get_ydata(), orders)
    assert points(ax)[0] == [bk.plots.neighbouring(cmp.coherence[0])]
    assert {"critical signal", "coexistence"} <= {t.get_text() for t in ax.get_legend().get_texts()}
    named = bk.plots.plot_phase_diagram({"RNN": {0.2: weak, 1.0: cmp.theory}})
    assert named.get_legend().get_texts()[0].get_text() == "RNN theory"
    axes = bk.plots.plot_free_energy({0.2: weak, 1.0: cmp.theory})
    heights = [float(line.get_ydata()[0]) for line in axes.lines[:-1]]
    expected = [
        b.free_energy - t.branches[0].free_energy for t in (weak, cmp.theory) for b in t.branches
    ]
    assert heights == pytest.approx(expected)


def test_network_colours_say_what_is_shared(ax):
    task = bk.tasks.sine(2, 3, supervised=[1, 3])
    network = bk.Network(8, "linear", bk.Sharing([0, 0, 1], "tied", "untied"))
    assert bk.plots.plot_network(network, task, ax) is ax
    colours = [
        text.arrow_patch.get_edgecolor() for text in ax.texts if getattr(text, "arrow_patch", None)
    ]
    recurrent = [0, 1]
    assert len(colours) == 1 + 2 + 2  # one input, two recurrent, two readouts
    rgba = mpl.colors.to_rgba
    assert [rgba(f"C{label}") in colours for label in recurrent] == [True, True]


def test_rank_plot_is_level_for_equal_chains(ax):
    values = np.random.default_rng(0).normal(size=(3, 4000))
    assert bk.plots.plot_ranks(values, ax) is ax
    heights = [patch.get_data().values for patch in ax.patches if hasattr(patch, "get_data")]
    assert len(heights) == 3
    assert np.abs(np.array(heights) - 1).max() < 0.4
    values[0] += 3
    far = bk.plots.plot_ranks(values)
    first = next(patch for patch in far.patches if hasattr(patch, "get_data"))
    assert first.get_data().values[-1] > 2
