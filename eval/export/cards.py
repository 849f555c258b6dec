"""Cards: what a Hub, and a person, needs to know of what was exported."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData, EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sfm.eval.export.formats import TABLE, TAR, distinct_names, folder_names
from sfm.eval.report.commands import distill_command
from sfm.eval.report.figures import figures_of, label_of
from sfm.eval.report.read import ReportedRun
from sfm.eval.report.words import many, percent
from sfm.eval.result import Row
from sfm.stats_store.cards import DatasetCard
from sfm.text import escape_non_utf8, sanitize_line

LICENCES = frozenset(
    {
        "afl-3.0",
        "apache-2.0",
        "bsd-2-clause",
        "bsd-3-clause",
        "cc0-1.0",
        "cc-by-2.0",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "gpl-3.0",
        "mit",
        "odbl",
        "pddl",
        "unknown",
    }
)
"""What the Hub calls the licences that data usually has; any other is `other`, with its own name."""

LONGEST_NAME = 400
LABEL_BYTES = 8

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def dataset_card(run: ReportedRun, form: str, folder: Path, given: str | None) -> str:
    """Return the card of exported images: YAML that the Hub and ``datasets`` read, and a text for people.

    Parameters
    ----------
    run : ReportedRun
    form : {"imagefolder", "webdataset", "parquet"}
    folder : Path
        Where the images were written to.
    given : str or None
        The licence that was asked for; default: that of the real data.
    """
    record = run.run.record
    data = DatasetCardData(
        pretty_name=f"{record.dataset}, distilled on {record.backbone.spec}",
        task_categories=["image-classification"],
        size_categories=next((name for most, name in SIZES if len(run.run.files) < most), "1M<n<10M"),
        tags=["dataset-distillation", "synthetic"],
        **licence(licence_name(run, given)),
        **loading(run, form, folder),
    )
    return rendered(
        "dataset.md",
        yaml=Markup(data.to_yaml()),
        run=run,
        record=record,
        form=form,
        images=many(len(run.run.files), "image"),
        edited=run.details.images is not None and run.details.images != run.digest,
        licence=licence_name(run, None),
        rows=accuracy_rows(run),
        notes=figure_notes(run),
        command=Markup(sanitize_line(distill_command(run))),
    )


def model_card(
    run: ReportedRun, source: DatasetCard, about: Mapping[str, Any], row: Row | None, given: str | None
) -> str:
    """Return the card of an exported classifier.

    Parameters
    ----------
    run : ReportedRun
    source : DatasetCard
        Of the real data.
    about : mapping
        What its ``config.json`` holds.
    row : Row, optional
        What it scores.
    given : str or None
        The licence that was asked for; default: that of the real data.
    """
    record = run.run.record
    found = []
    if row:
        found.append(
            EvalResult(
                task_type="image-classification",
                dataset_type=record.dataset,
                dataset_name=record.dataset,
                metric_type="accuracy",
                metric_value=row.top1_mean,
            )
        )
    data = ModelCardData(
        model_name=f"{record.dataset} through {about['backbone']['spec']}",
        tags=["image-classification", "linear-probe", "dataset-distillation"],
        pipeline_tag="image-classification",
        eval_results=found or None,
        **licence(licence_name(run, given)),
    )
    return rendered(
        "model.md",
        yaml=Markup(data.to_yaml()),
        run=run,
        record=record,
        source=source,
        about=about,
        licence=licence_name(run, None),
        accuracy=None if row is None else percent(row.top1_mean, row.top1_std),
    )


def licence_name(run: ReportedRun, given: str | None) -> str:
    """Return the licence that was asked for, or that of the data which images and classifier are made of."""
    stored = run.behind.part.entry.dataset.licence if run.behind else run.details.licence
    return given or stored or "unknown"


def licence(given: str) -> dict[str, Any]:
    """Return a licence as the Hub names it."""
    if given.lower() in LICENCES:
        return {"license": given.lower()}
    return {"license": "other", "license_name": given}


def loading(run: ReportedRun, form: str, folder: Path) -> dict[str, Any]:
    """Return what ``datasets.load_dataset`` needs to read a format, and checks what it read against."""
    files = {"imagefolder": "*/*.png", "webdataset": TAR, "parquet": TABLE}[form]
    found: dict[str, Any] = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": files}]}]
    }
    held = run.image_bytes + LABEL_BYTES * len(run.run.files)
    info: dict[str, Any] = {
        "splits": [{"name": "train", "num_bytes": held, "num_examples": len(run.run.files)}],
        "download_size": sum(path.stat().st_size for path in folder.glob(files)),
        "dataset_size": held,
    }
    if form != "webdataset":
        names = distinct_names(run) if form == "parquet" else folder_names(run)
        label = {"class_label": {"names": {str(index): name for index, name in enumerate(names)}}}
        info = {"features": [{"name": "image", "dtype": "image"}, {"name": "label", "dtype": label}]} | info
    return found | {"dataset_info": info}


def accuracy_rows(run: ReportedRun) -> list[tuple[str, str, str]]:
    """Return backbone, what was trained on, and top-1 in percent of the figures that are of these images."""
    evaluation = run.evaluation
    if evaluation is None or evaluation.provenance.images != run.digest:
        return []
    return [
        (
            row.backbone,
            label_of(row, evaluation),
            percent(row.top1_mean, row.top1_std) if isinstance(row, Row) else percent(row.top1),
        )
        for row in figures_of(evaluation)
    ]


def figure_notes(run: ReportedRun) -> list[str]:
    """Return what is to be known when reading the figures that are of these images."""
    evaluation = run.evaluation
    return evaluation.notes if evaluation and evaluation.provenance.images == run.digest else []


def cell(text: str, most: int = LONGEST_NAME) -> str:
    """Return a text fit for a line or a cell of a table in Markdown, shown as it is: no link, no HTML."""
    return re.sub(r"[\\|\[\]<`*_~&$]", r"\\\g<0>", sanitize_line(" ".join(text.split()), most))


def code(text: str) -> str:
    """Return a text as code in a line or a cell of a table in Markdown, whatever it holds."""
    shown = sanitize_line(" ".join(text.split()), LONGEST_NAME)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    room = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{room}{shown}{room}{fence}".replace("|", "\\|")


def finalize(value: Any) -> Any:
    """Return what a card shows of a value: of text one line, unless it is marked as a block."""
    return sanitize_line(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def rendered(name: str, **words: Any) -> str:
    """Fill in a card's text."""
    environment = Environment(
        loader=PackageLoader("sfm.eval.export", "template"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
        finalize=finalize,
    )
    environment.filters |= {"cell": cell, "code": code}
    return escape_non_utf8(environment.get_template(name).render(words))
