"""Cards (README.md with YAML) of exported images and classifiers, as the Hugging Face Hub reads them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import DatasetCardData, EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sfm.eval.distilled_run import RunRecord
from sfm.eval.export.export_formats import (
    TABLE_FILE,
    TAR_FILE,
    disambiguate_class_names,
    list_exported_class_folders,
)
from sfm.eval.report.reported_runs import ReportedRun
from sfm.eval.report.reproduction_commands import make_distill_command
from sfm.eval.report.row_selection import list_result_rows, make_row_label
from sfm.eval.report.text_format import format_count_with_noun
from sfm.eval.result import AccuracyRow, ResultRow, is_row_on_distillation_backbone
from sfm.soft_label_files import LABEL_TENSOR
from sfm.stats_store.cards import DatasetCard
from sfm.text import (
    escape_non_utf8,
    format_percent,
    format_words_as_list,
    make_distinct_backbone_names,
    sanitize_line,
)

HUB_LICENCES = frozenset(
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
"""Identifiers of common data licences on the Hub; any other licence is `other` with a name."""

MAX_CELL_CHARACTERS = 400
INT64_BYTES = 8

SIZE_CATEGORIES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def render_dataset_card(
    run: ReportedRun, export_format: str, exported_folder: Path, requested_licence: str | None
) -> str:
    """Return the card of exported images: YAML that the Hub and ``datasets`` read, and a text for people.

    Parameters
    ----------
    run : ReportedRun
    export_format : {"imagefolder", "webdataset", "parquet"}
    exported_folder : Path
        Folder with the exported images.
    requested_licence : str or None
        Licence from the command line; default: that of the real data.
    """
    record = run.distilled.record
    data = DatasetCardData(
        pretty_name=f"{record.dataset}, distilled on {record.format_backbone_names()}",
        task_categories=["image-classification"],
        size_categories=next(
            (name for limit, name in SIZE_CATEGORIES if len(run.distilled.image_files) < limit), "1M<n<10M"
        ),
        tags=["dataset-distillation", "synthetic"],
        **make_licence_fields(choose_licence(run, requested_licence)),
        **make_load_dataset_fields(run, export_format, exported_folder),
    )
    return render_card_template(
        "dataset.md",
        {
            "yaml": Markup(data.to_yaml()),
            "run": run,
            "record": record,
            "backbones": format_backbones_as_code(record),
            "export_format": export_format,
            "images": format_count_with_noun(len(run.distilled.image_files), "image"),
            "edited": run.details.images is not None and run.details.images != run.pixel_digest,
            "licence": choose_licence(run, None),
            "rows": list_accuracy_table_rows(run),
            "notes": list_evaluation_notes_if_current(run),
            "command": Markup(sanitize_line(make_distill_command(run))),
        },
    )


def render_model_card(
    run: ReportedRun,
    real_dataset_card: DatasetCard,
    classifier_config: Mapping[str, Any],
    row: AccuracyRow | None,
    requested_licence: str | None,
) -> str:
    """Return the card of an exported classifier.

    Parameters
    ----------
    run : ReportedRun
    real_dataset_card : DatasetCard
        Of the real data.
    classifier_config : mapping
        Content of its ``config.json``.
    row : AccuracyRow, optional
        Its accuracy.
    requested_licence : str or None
        Licence from the command line; default: that of the real data.
    """
    record = run.distilled.record
    eval_results = []
    if row:
        eval_results.append(
            EvalResult(
                task_type="image-classification",
                dataset_type=record.dataset,
                dataset_name=record.dataset,
                metric_type="accuracy",
                metric_value=row.top1_mean,
            )
        )
    data = ModelCardData(
        model_name=f"{record.dataset} through {classifier_config['backbone']['spec']}",
        tags=["image-classification", "linear-probe", "dataset-distillation"],
        pipeline_tag="image-classification",
        eval_results=eval_results or None,
        **make_licence_fields(choose_licence(run, requested_licence)),
    )
    return render_card_template(
        "model.md",
        {
            "yaml": Markup(data.to_yaml()),
            "run": run,
            "record": record,
            "backbones": format_backbones_as_code(record),
            "source": real_dataset_card,
            "config": classifier_config,
            "licence": choose_licence(run, None),
            "accuracy": None if row is None else format_percent(row.top1_mean, row.top1_std),
        },
    )


def choose_licence(run: ReportedRun, requested_licence: str | None) -> str:
    """Return the licence from the command line, or else that of the real data."""
    stored = (
        run.source_data.first_statistics.entry.dataset.licence if run.source_data else run.details.licence
    )
    return requested_licence or stored or "unknown"


def make_licence_fields(licence: str) -> dict[str, Any]:
    """Return the card fields that name a licence on the Hub."""
    if licence.lower() in HUB_LICENCES:
        return {"license": licence.lower()}
    return {"license": "other", "license_name": licence}


def make_load_dataset_fields(run: ReportedRun, export_format: str, exported_folder: Path) -> dict[str, Any]:
    """Return the card fields by which ``datasets.load_dataset`` reads a format and verifies it."""
    files = {"imagefolder": "*/*.png", "webdataset": TAR_FILE, "parquet": TABLE_FILE}[export_format]
    fields: dict[str, Any] = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": files}]}]
    }
    dataset_bytes = run.image_file_bytes + INT64_BYTES * len(run.distilled.image_files)
    if run.soft_labels and export_format != "imagefolder":
        dataset_bytes += run.soft_labels.probabilities.nbytes
    info: dict[str, Any] = {
        "splits": [
            {"name": "train", "num_bytes": dataset_bytes, "num_examples": len(run.distilled.image_files)}
        ],
        "download_size": sum(path.stat().st_size for path in exported_folder.glob(files)),
        "dataset_size": dataset_bytes,
    }
    if export_format != "webdataset":
        names = (
            disambiguate_class_names(run) if export_format == "parquet" else list_exported_class_folders(run)
        )
        label = {"class_label": {"names": {str(index): name for index, name in enumerate(names)}}}
        features = [{"name": "image", "dtype": "image"}, {"name": "label", "dtype": label}]
        if run.soft_labels and export_format == "parquet":
            features.append({"name": LABEL_TENSOR, "sequence": "float32"})
        info = {"features": features} | info
    return fields | {"dataset_info": info}


class AccuracyTableRow(NamedTuple):
    """One row of a card's table of accuracies, as text."""

    backbone: str
    label: str
    top1_percent: str


def list_accuracy_table_rows(run: ReportedRun) -> list[AccuracyTableRow]:
    """Return a row for every accuracy of these images, unseen backbones last."""
    evaluation = run.evaluation
    if evaluation is None or evaluation.provenance.images != run.pixel_digest:
        return []
    provenance = evaluation.provenance

    def is_unseen(row: ResultRow) -> bool:
        return not is_row_on_distillation_backbone(row, provenance)

    rows = sorted(list_result_rows(evaluation), key=is_unseen)
    names = make_distinct_backbone_names((row.backbone, row.image_size) for row in rows)
    return [
        AccuracyTableRow(
            f"{name} (unseen)" if is_unseen(row) else name,
            make_row_label(row, evaluation),
            format_percent(row.top1_mean, row.top1_std)
            if isinstance(row, AccuracyRow)
            else format_percent(row.top1),
        )
        for row, name in zip(rows, names, strict=True)
    ]


def format_backbones_as_code(record: RunRecord) -> Markup:
    """Return the names of the backbones distilled on, as Markdown code in a sentence."""
    return Markup(format_words_as_list([format_inline_code(name) for name in record.backbone_names]))


def list_evaluation_notes_if_current(run: ReportedRun) -> list[str]:
    """Return the notes of the evaluation of these images; none if they were edited since."""
    evaluation = run.evaluation
    return evaluation.notes if evaluation and evaluation.provenance.images == run.pixel_digest else []


def escape_markdown(text: str, max_length: int = MAX_CELL_CHARACTERS) -> str:
    """Escape a text for a line or a table cell in Markdown: it makes no link and no HTML."""
    return re.sub(r"[\\|\[\]<`*_~&$]", r"\\\g<0>", sanitize_line(" ".join(text.split()), max_length))


def format_inline_code(text: str) -> str:
    """Return a text as Markdown inline code for a line or a table cell; backticks and bars are escaped."""
    line = sanitize_line(" ".join(text.split()), MAX_CELL_CHARACTERS)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    padding = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{padding}{line}{padding}{fence}".replace("|", "\\|")


def sanitize_unless_markup(value: Any) -> Any:
    """Return a text as one line, unless it is :class:`Markup`; any other value as it is."""
    return sanitize_line(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def render_card_template(template_name: str, template_values: Mapping[str, Any]) -> str:
    """Return the text of a card template, filled in."""
    environment = Environment(
        loader=PackageLoader("sfm.eval.export", "template"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
        finalize=sanitize_unless_markup,
    )
    environment.filters |= {"cell": escape_markdown, "code": format_inline_code}
    return escape_non_utf8(environment.get_template(template_name).render(template_values))
