"""Training that is killed, interrupted or fails goes on to the same networks, to the bit."""

import jax
import numpy as np
import optax
import pytest
import xarray as xr

import bayeskernel as bk
from bayeskernel.errors import InputError
from bayeskernel.inference import ensemble
from bayeskernel.inference.checkpoint import Checkpoint

from .kills import assert_kills_change_nothing

pytestmark = pytest.mark.usefixtures("double")
TASK = bk.tasks.endpoint([[1.0, 0.0], [0.5, 1.0], [-0.3, 0.4]], [0.8, -0.5, 0.3], 2)
NETWORK = bk.Network(12, "tanh", noise=0.5)


def run(folder, *, key=0, task=TASK, **changed):
    settings = {
        "optimizer": "langevin", "learning_rate": 0.01, "num_steps": 60, "num_networks": 4,
        "at": (0, 23), "keep": ("weights",), "checkpoint": folder, "progress": False,
    } | changed  # fmt: skip
    return bk.train(jax.random.key(key), NETWORK, task, **settings)


def assert_identical(one, two):
    for group in ("posterior", "training", "trace"):
        for name, values in one[group].data_vars.items():
            assert np.array_equal(values, two[group][name]), name


@pytest.fixture(autouse=True)
def two_blocks_written_often(monkeypatch):
    monkeypatch.setattr(ensemble, "_BLOCK", 2 * 12**2)
    monkeypatch.setattr(ensemble, "_MOST", 3)
    monkeypatch.setattr(ensemble, "_WRITE_SECONDS", 0.0)
    monkeypatch.setattr(ensemble, "_WRITE_SHARE", 0.0)


@pytest.fixture(scope="module")
def undisturbed():
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ensemble, "_BLOCK", 2 * 12**2)
        return run(None)


def test_a_checkpoint_changes_nothing(undisturbed, tmp_path, monkeypatch):
    kept = run(tmp_path / "run")
    assert_identical(kept, undisturbed)
    for group, node in undisturbed.children.items():
        xr.testing.assert_identical(kept[group].to_dataset(), node.to_dataset())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["draws.nc", "run.json"]
    monkeypatch.setattr("bayeskernel.inference.train.train_ensemble", None)  # nothing is trained
    assert_identical(run(tmp_path / "run"), undisturbed)


def failing_after(writes, monkeypatch):
    """The disk takes so many writes and no more."""
    save, left = Checkpoint.save, [writes]

    def failing(*given):
        left[0] -= 1
        if left[0] < 0:
            raise bk.StorageError("no more")
        return save(*given)

    monkeypatch.setattr(Checkpoint, "save", failing)
    return save


@pytest.mark.parametrize("optimizer", ["langevin", "adam"])
def test_any_number_of_writes_may_be_the_last(optimizer, undisturbed, tmp_path, monkeypatch):
    expected = undisturbed if optimizer == "langevin" else run(None, optimizer=optimizer)
    for writes in (1, 2, 7):
        save = failing_after(writes, monkeypatch)
        with pytest.raises(bk.StorageError, match="no more"):
            run(tmp_path / "run", optimizer=optimizer)
        monkeypatch.setattr(Checkpoint, "save", save)
    assert len(list((tmp_path / "run").glob("chain-*/draws-*"))) > 2
    assert_identical(run(tmp_path / "run", optimizer=optimizer), expected)


def test_a_flipped_bit_is_found(undisturbed, tmp_path, monkeypatch):
    save = failing_after(5, monkeypatch)
    with pytest.raises(bk.StorageError, match="no more"):
        run(tmp_path / "run")
    monkeypatch.setattr(Checkpoint, "save", save)
    for path in (tmp_path / "run").glob("chain-*/state"):
        whole = path.read_bytes()
        path.write_bytes(whole[:500] + bytes([whole[500] ^ 4]) + whole[501:])
        with pytest.raises(bk.StorageError, match="state is damaged"):
            run(tmp_path / "run")
        path.write_bytes(whole)
    assert_identical(run(tmp_path / "run"), undisturbed)


class Begun(Exception):  # noqa: N818
    """Training would begin."""


def begun(*_):
    raise Begun


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"key": 1}, "rng_key"),
        ({"task": TASK.scaled(2)}, "task"),
        ({"num_steps": 61}, "num_steps"),
        ({"at": (0,)}, "at"),
        ({"keep": ()}, "keep"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"weight_decay": 0.5}, "weight_decay"),
    ],
)
def test_a_folder_of_another_call_is_refused(changed, named, tmp_path, monkeypatch):
    monkeypatch.setattr("bayeskernel.inference.train.train_ensemble", begun)
    with pytest.raises(Begun):
        run(tmp_path)  # leaves its record
    with pytest.raises(InputError, match=f"checkpoint: expected a run with {named} = "):
        run(tmp_path, **changed)


def test_optax_transformations_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("bayeskernel.inference.train.train_ensemble", begun)
    options = {"learning_rate": None}
    with pytest.raises(Begun):
        run(tmp_path, optimizer=optax.adam(0.02), **options)
    with pytest.raises(Begun):
        run(tmp_path, optimizer=optax.adam(0.02), **options)  # the same again
    for other in (
        optax.adam(0.03),
        optax.adam(optax.linear_schedule(0.02, 0, 60)),
        optax.sgd(0.02),
    ):
        with pytest.raises(InputError, match="checkpoint: expected a run with optimizer"):
            run(tmp_path, optimizer=other, **options)


SCRIPT = """
import sys, jax, numpy as np, bayeskernel as bk
trained = bk.train(
    jax.random.key(0), bk.Network(64, "erf", noise=0.1), bk.tasks.endpoint([[1.0]], [2.0], 3),
    learning_rate=0.01, num_steps=40_000, num_networks=40, checkpoint=sys.argv[1] or None, progress=False,
)
np.save(sys.argv[2], trained["trace"]["norm"].to_numpy())
"""


@pytest.mark.slow
@pytest.mark.usefixtures("own_compiled_code")
def test_kills_at_random_moments(tmp_path):
    def written(folder):
        return sum(path.stat().st_mtime_ns for path in folder.glob("chain-*/state"))

    assert_kills_change_nothing(SCRIPT, tmp_path, written, kills=3, timeout=600)
