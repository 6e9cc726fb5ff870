"""Sphinx configuration: ``sphinx-build -W docs docs/_build/html``.

Executed notebooks are copied here from ``notebooks`` and shown as they are: ``python notebooks/make.py`` runs them.
"""

import shutil
from importlib.metadata import version as installed
from pathlib import Path

HERE = Path(__file__).parent
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
(HERE / "notebooks").mkdir()
for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
    shutil.copy(notebook, HERE / "notebooks")

project = "bayeskernel"
author = "The bayeskernel developers"
copyright = "2026, " + author
version = release = installed("bayeskernel")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "pydata_sphinx_theme"
html_title = "bayeskernel"
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True, "show_toc_level": 2, "icon_links": []}

nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # the docstrings give shapes, which say more
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_rtype = False
# As prose: napoleon would take every line for a value of its own.
napoleon_custom_sections = ["Returns"]
add_module_names = False
