"""Write a report as one HTML file that loads nothing from a network."""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sfm.errors import InputError
from sfm.eval.output_files import write_output
from sfm.eval.report.config import ReportConfig
from sfm.eval.report.report_content import ReportContent, make_report_content
from sfm.eval.report.reported_runs import read_reported_runs
from sfm.locking import lock_output_path
from sfm.text import escape_non_utf8

REPORT_MARK = b"<!doctype html>\n<!-- sfm report -->"
"""First bytes of every report; a file that begins otherwise is not replaced."""


def report(config: ReportConfig) -> Path:
    """Write a report on runs as one self-contained HTML file.

    Loads no model and measures nothing: it shows the files of `sfm distill` and `sfm evaluate`.

    Parameters
    ----------
    config : ReportConfig

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    InputError
        If a directory is not a finished run, a store cannot be opened or holds none of the runs' entries, or
        the file cannot be written, or exists and is not a report.
    """
    require_usable_report_path(config.out)
    with lock_output_path(config.out):
        runs = read_reported_runs(config.runs, config.store, config.evaluation)
        page = render_page(make_report_content(runs))
        write_output(config.out, escape_non_utf8(page).encode())
    return config.out


def require_usable_report_path(path: Path) -> None:
    """Refuse to replace a file that is not a report.

    Raises
    ------
    InputError
        If it exists and is not a report, or its folder is missing.
    """
    if path.is_dir():
        raise InputError(f"--out {path} is a folder: give a file, e.g. {path / 'report.html'}")
    if not path.parent.is_dir():
        raise InputError(f"--out {path}: there is no folder {path.parent}")
    if path.exists():
        with path.open("rb") as file:
            if file.read(len(REPORT_MARK)) != REPORT_MARK:
                raise InputError(f"--out {path} exists and is not a report of sfm: give another name")


def render_page(content: ReportContent) -> str:
    """Return the page of a report."""
    environment = Environment(
        loader=PackageLoader("sfm.eval.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = read_template_unescaped(environment, "zoom.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        report=content,
        style=read_template_unescaped(environment, "style.css"),
        script=script,
        script_digest=digest,
    )


def read_template_unescaped(template_environment: Environment, file_name: str) -> Markup:
    """Return a file of the template folder, unescaped."""
    assert template_environment.loader
    return Markup(template_environment.loader.get_source(template_environment, file_name)[0])
