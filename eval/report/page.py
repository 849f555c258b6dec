"""A report as one HTML file that asks nothing of any network."""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sfm.errors import InputError
from sfm.eval.output_files import write_output
from sfm.eval.report.config import ReportConfig
from sfm.eval.report.read import read_all
from sfm.eval.report.view import Report, report_of
from sfm.locking import lock_file
from sfm.text import escape_non_utf8

MARK = b"<!doctype html>\n<!-- sfm report -->"
"""How every report begins; a file that does not is not replaced."""


def report(config: ReportConfig) -> Path:
    """Write what is known of runs into one self-contained HTML file.

    Loads no model and computes no figure: it shows what `sfm distill` and `sfm evaluate` left.

    Parameters
    ----------
    config : ReportConfig

    Returns
    -------
    Path
        The file.

    Raises
    ------
    InputError
        If a directory is not a finished run, a store cannot be opened or knows none of the runs, or the file
        cannot be written, or is there and is not a report.
    """
    require_replaceable(config.out)
    with lock_file(config.out):
        page = render(report_of(read_all(config.runs, config.store, config.evaluation)))
        write_output(config.out, escape_non_utf8(page).encode())
    return config.out


def require_replaceable(path: Path) -> None:
    """Refuse to write over what is not a report.

    Raises
    ------
    InputError
        If it is there and is something else, or its folder is missing.
    """
    if path.is_dir():
        raise InputError(f"--out {path} is a folder: give a file, e.g. {path / 'report.html'}")
    if not path.parent.is_dir():
        raise InputError(f"--out {path}: there is no folder {path.parent}")
    if path.exists():
        with path.open("rb") as file:
            if file.read(len(MARK)) != MARK:
                raise InputError(f"--out {path} is there and is not a report of sfm: give another name")


def render(shown: Report) -> str:
    """Return the page of a report."""
    environment = Environment(
        loader=PackageLoader("sfm.eval.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = text_of(environment, "zoom.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        report=shown, style=text_of(environment, "style.css"), script=script, script_digest=digest
    )


def text_of(environment: Environment, name: str) -> Markup:
    """Return a file of the template folder as it is."""
    assert environment.loader
    return Markup(environment.loader.get_source(environment, name)[0])
