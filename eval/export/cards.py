"""Cards: what a Hub, and a person, needs to know of what was exported."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import DatasetCardData, EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from sfm.eval.export.formats import TABLE, TAR, distinct_names, folder_names
from sfm.eval.report.figures import figures_of, label_of
from sfm.eval.report.read import ReportedRun
from sfm.eval.report.view import distill_command
from sfm.eval.report.words import many, percent
from sfm.eval.result import Row
from sfm.stats_store.cards import DatasetCard

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

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def dataset_card(run: ReportedRun, form: str) -> str:
    """Return the card of exported images: YAML that the Hub and ``datasets`` read, and a text for people.

    Parameters
    ----------
    run : ReportedRun
    form : {"imagefolder", "webdataset", "parquet"}
    """
    record = run.run.record
    data = DatasetCardData(
        pretty_name=f"{record.dataset}, distilled on {record.backbone.spec}",
        task_categories=["image-classification"],
        size_categories=next((name for most, name in SIZES if len(run.run.files) < most), "1M<n<10M"),
        tags=["dataset-distillation", "synthetic"],
        **licence(run),
        **loading(run, form),
    )
    return rendered(
        "dataset.md",
        yaml=data.to_yaml(),
        run=run,
        record=record,
        form=form,
        images=many(len(run.run.files), "image"),
        edited=run.details.images is not None and run.details.images != run.digest,
        rows=accuracy_rows(run),
        command=distill_command(run),
    )


def model_card(run: ReportedRun, source: DatasetCard, about: Mapping[str, Any], row: Row | None) -> str:
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
        **licence(run),
    )
    return rendered(
        "model.md",
        yaml=data.to_yaml(),
        run=run,
        record=record,
        source=source,
        about=about,
        accuracy=None if row is None else percent(row.top1_mean, row.top1_std),
    )


def licence(run: ReportedRun) -> dict[str, Any]:
    """Return the licence of the data that images and classifier are made of, as the Hub names it."""
    given = (run.behind.part.entry.dataset.licence if run.behind else run.details.licence) or "unknown"
    if given.lower() in LICENCES:
        return {"license": given.lower()}
    return {"license": "other", "license_name": given}


def loading(run: ReportedRun, form: str) -> dict[str, Any]:
    """Return what ``datasets.load_dataset`` needs to read a format."""
    files = {"imagefolder": "*/*.png", "webdataset": TAR, "parquet": TABLE}[form]
    found: dict[str, Any] = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": files}]}]
    }
    if form != "webdataset":
        names = distinct_names(run) if form == "parquet" else folder_names(run)
        label = {"class_label": {"names": {str(index): name for index, name in enumerate(names)}}}
        found["dataset_info"] = {
            "features": [{"name": "image", "dtype": "image"}, {"name": "label", "dtype": label}],
            "splits": [{"name": "train", "num_examples": len(run.run.files)}],
        }
    return found


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


def cell(text: str) -> str:
    """Return a text fit for a cell of a table in Markdown."""
    return " ".join(text.replace("|", "\\|").split())


def rendered(name: str, **words: Any) -> str:
    """Fill in a card's text."""
    environment = Environment(
        loader=PackageLoader("sfm.eval.export", "template"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
    )
    environment.filters["cell"] = cell
    return environment.get_template(name).render(words)
