"""Run the notebooks and write them with their figures: ``python notebooks/make.py [--force] [name ...]``.

``NN_name.md`` is what people edit and review, ``NN_name.ipynb`` beside it what they read. Only files whose code has
changed are run again; changed prose is copied. ``--force`` runs all, which changes of the package call for.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

HERE = Path(__file__).parent
# All that a reader's Jupyter needs; run times and names of machines stay out.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
FIGURES = ["--InlineBackend.figure_formats=png", "--InlineBackend.print_figure_kwargs={'dpi': 100}"]
COLOURS = 256


def main() -> None:
    """Bring what is named, or all, up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="such as 01_quickstart; default all")
    parser.add_argument("--force", action="store_true", help="run what has not changed too")
    options = parser.parse_args()
    sources = [HERE / f"{name}.md" for name in options.names] or sorted(HERE.glob("[0-9]*.md"))
    for source in sources:
        target = source.with_suffix(".ipynb")
        made = read(source)
        if not options.force and target.exists() and reuse(nbformat.read(target, 4), made):
            print(f"{target.name}: code unchanged")
        else:
            print(f"{target.name}: running", flush=True)
            execute(made)
        nbformat.write(made, target)


def read(source: Path) -> NotebookNode:
    """The notebook of a source, not executed, with names of cells that repeat."""
    notebook = jupytext.read(source, fmt="md:myst")
    notebook.metadata = METADATA
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for k, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{k}", {}
    return notebook


def reuse(old: NotebookNode, new: NotebookNode) -> bool:
    """Whether the code of both is the same; if so the new one gets the outputs of the old."""
    before, after = code(old), code(new)
    if [cell.source for cell in before] != [cell.source for cell in after]:
        return False
    for done, cell in zip(before, after, strict=True):
        cell.execution_count, cell.outputs = done.execution_count, done.outputs
    return True


def execute(notebook: NotebookNode) -> None:
    """Run all cells in an empty folder and tidy what they put out; any error is raised."""
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=None,
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=FIGURES,
            resources={"metadata": {"path": folder}},
        ).execute()
    notebook.metadata = METADATA
    for cell in code(notebook):
        cell.metadata = {}
        cell.outputs = [output for output in cell.outputs if not on_stderr(output)]
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = compressed(output.data["image/png"])


def code(notebook: NotebookNode) -> list[NotebookNode]:
    """Its cells that run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def on_stderr(output: NotebookNode) -> bool:
    """Whether an output is a warning or a progress bar; these are shown to who makes the notebook."""
    if output.get("name") != "stderr":
        return False
    print(output.text, file=sys.stderr)
    return True


def compressed(png: str) -> str:
    """The picture with few colours, at a third of its size."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    file = io.BytesIO()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    main()
