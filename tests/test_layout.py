"""Imports point one way; sampling and theory are blind to each other."""

import ast
import re
from pathlib import Path

import pytest

import bayeskernel

ROOT = Path(bayeskernel.__file__).parent
LAYERS = [
    {"errors", "_precision"},
    {"activations", "tasks", "sharing", "graph", "keys", "memory"},
    {"architectures"},
    {"network"},
    {"kernels", "gauge", "conditioning"},
    {"problem"},
    {"likelihood", "exchange"},
    {"inference", "meanfield"},
    {"plots"},
    {"references"},
    {"compare", "held_out", "similarity"},
    {"report", "sweeps"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = [p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"]


def _imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bayeskernel"):
            parts = (node.module or "").split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for other in _imported(path) - {own}:
        assert RANK[other] <= RANK[own], f"{own} imports {other}"
        assert {own, other} != {"inference", "meanfield"}


# What they compile works on single numbers.
WITHOUT_PRODUCTS = {"_precision.py", "activations.py", "cli/compiled.py"}


def test_code_that_multiplies_matrices_is_compiled_at_full_precision():
    """By `_precision.jit`; see test_precision for what that does."""
    compiling = {
        str(path.relative_to(ROOT)) for path in FILES if re.search(r"jax\.(jit|pmap)\b", path.read_text())
    }  # fmt: skip
    assert compiling == WITHOUT_PRODUCTS


def test_importing_leaves_jax_settings_alone():
    import jax

    assert not jax.config.jax_enable_x64
