"""Sphinx configuration: `make docs` builds the site; a broken link or reference is an error."""

import re
from importlib.metadata import version as get_version
from typing import Any

from pydantic import BaseModel

project = "sfm"
author = "The sfm developers"
version = release = get_version("sfm-distill")

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["conf.py"]
smartquotes = False
html_theme = "furo"
html_title = f"sfm {release}"

myst_heading_anchors = 4
nitpicky = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
numpydoc_show_class_members = False


def escape_markup(text: str) -> str:
    """Return text that reStructuredText shows as it is."""
    return re.sub(r"([\\*`|_@])", r"\\\1", text)


def describe_config(app: Any, what: str, name: str, documented: Any, options: Any, lines: list[str]) -> None:
    """Append a config's fields, with their defaults and help texts, to its docstring."""
    if isinstance(documented, type) and issubclass(documented, BaseModel):
        for field, info in documented.model_fields.items():
            default = (
                "required"
                if info.is_required()
                else f"default {info.get_default(call_default_factory=True)!r}"
            )
            lines += ["", f"``{field}``, {default}", f"    {escape_markup(info.description or '')}"]


def hide_config_signature(
    app: Any, what: str, name: str, documented: Any, *_: Any
) -> tuple[str, None] | None:
    """Leave out the signature of a config: its fields are listed below it."""
    return ("", None) if isinstance(documented, type) and issubclass(documented, BaseModel) else None


def setup(app: Any) -> None:
    """Connect the functions above."""
    app.connect("autodoc-process-docstring", describe_config, priority=900)
    app.connect("autodoc-process-signature", hide_config_signature)
