"""What importing the package costs, and says: nothing that is not needed at once, and not a word."""

import subprocess
import sys

import pytest

LATER = {
    "arviz",
    "matplotlib",
    "numpyro",
    "optax",
    "pandas",
    "sklearn",
    "statsmodels",
    "typer",
    "xarray",
}


def fresh(code):
    """Run some code in an interpreter of its own, where every warning is shown."""
    command = [sys.executable, "-W", "always::FutureWarning", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_import_loads_only_what_theory_needs():
    done = fresh("import bayeskernel, sys; print(*sys.modules)")
    assert not LATER & set(done.stdout.split())
    assert done.stderr == ""


EACH_FIRST = """
import os, bayeskernel as bk
for use in ("compare", "diagnose", "sample", "report", "plots"):
    child = os.fork()
    if not child:
        getattr(bk, use)
        print(use, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_first_use_says_nothing():
    """Each in a process of its own, forked before anything heavy is imported."""
    done = fresh(EACH_FIRST)
    assert done.stdout.split() == ["compare", "diagnose", "sample", "report", "plots"]
    assert "ArviZ" not in done.stderr


def test_every_public_name_is_there():
    code = "import bayeskernel as bk; [getattr(bk, name) for name in bk.__all__]; print(callable(bk.compare), callable(bk.report))"
    assert fresh(code).stdout.split() == ["True", "True"]


def test_unknown_names_are_refused():
    import bayeskernel

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bayeskernel.nothing
