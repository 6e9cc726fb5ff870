"""The README's Python example runs as written, and its picture exists."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.long
def test_example_runs_as_written(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) == 10
    exec(code, {})
    printed = capsys.readouterr().out
    assert printed.count("Samples and theory agree") == 2


def test_links_point_at_files():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        if not target.startswith("http"):
            assert (README.parent / target).exists(), target
