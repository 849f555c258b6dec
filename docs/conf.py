"""Sphinx configuration: `make docs` builds the site; a broken link or reference is an error."""

from importlib.metadata import version as get_version

project = "sfm"
author = "The sfm developers"
version = release = get_version("sfm-distill")

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["conf.py"]
html_theme = "furo"
html_title = f"sfm {release}"

myst_heading_anchors = 4
nitpicky = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
numpydoc_show_class_members = False
