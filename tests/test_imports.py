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


EACH_FIRST = """
import os, sys, bayeskernel as bk
print(*sys.modules, flush=True)
for use in ("compare", "diagnose", "sample", "report", "plots"):
    child = os.fork()
    if not child:
        getattr(bk, use)
        print(use, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
[getattr(bk, name) for name in bk.__all__]
print(callable(bk.compare), callable(bk.report))
"""


def test_import_is_light_and_first_use_says_nothing():
    """Each first in a process of its own, forked before anything heavy is imported."""
    done = fresh(EACH_FIRST)
    modules, *uses, every = done.stdout.splitlines()
    assert not LATER & set(modules.split())
    assert uses == ["compare", "diagnose", "sample", "report", "plots"]
    assert every == "True True"
    assert done.stderr == ""


def test_unknown_names_are_refused():
    import bayeskernel

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bayeskernel.nothing
