"""The command line: ``sfm``. A stage is imported when its command runs, so that help is instant."""

import shlex
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from sfm import accuracies
from sfm.backbones.execution.allocator import LARGE_INPUT, configure_malloc_single_heap
from sfm.backbones.execution.process_settings import configure_process
from sfm.command_builder import (
    JsonOption,
    QuietOption,
    ThreadsOption,
    TyperRefusingRepeatedOptions,
    add_command,
)
from sfm.distill.config import DistillConfig
from sfm.error_reporting import (
    EXIT_INTERRUPTED,
    EXIT_UNFINISHED,
    exit_on_error,
    exit_with_message_on_interrupt,
    print_error_and_make_exit,
)
from sfm.errors import InputError
from sfm.eval.config import EvaluateRunsConfig
from sfm.eval.export.config import ExportConfig
from sfm.eval.report.config import ReportConfig
from sfm.extraction_output import make_extraction_document, print_extraction_result
from sfm.pipeline.extract_config import ExtractConfig
from sfm.progress_display import show_progress
from sfm.store_commands import store_app
from sfm.tables import print_distillation_plan, print_extraction_plan
from sfm.terminal import escape_unencodable_output_and_log_lines, print_json, print_line, print_next_command

app = TyperRefusingRepeatedOptions(
    name="sfm",
    help="Distil a vision dataset into a few synthetic images per class, from class statistics alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(store_app, name="store")


def main() -> None:
    """Run the command line."""
    escape_unencodable_output_and_log_lines()
    app()


@app.callback(invoke_without_command=True)
def print_version_and_exit_if_requested(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Distil a vision dataset into a few synthetic images per class, from class statistics alone."""
    if show_version:
        print_line(f"sfm-distill {version('sfm-distill')}")
        raise typer.Exit


def run_extract(config: ExtractConfig, as_json: bool, quiet: bool) -> None:
    """Extract, then print the published entries and the command to run next."""
    if config.dry_run:
        run_extract_dry_run(config, as_json, quiet)
        return
    configure_process(config.threads)
    if config.image_size is None or config.image_size > LARGE_INPUT:
        configure_malloc_single_heap()
    from sfm.pipeline.staging import IncompleteExtractionError

    try:
        with (
            exit_with_message_on_interrupt(
                "; run the same command again to resume from the complete partitions"
            ),
            show_progress(quiet) as progress,
        ):
            from sfm.pipeline.extract import extract

            extraction = extract(config, progress)
    except IncompleteExtractionError as stop:
        raise print_error_and_make_exit(str(stop), EXIT_UNFINISHED) from None
    if as_json:
        print_json(make_extraction_document(config, extraction))
    else:
        print_extraction_result(config, extraction)


def run_extract_dry_run(config: ExtractConfig, as_json: bool, quiet: bool) -> None:
    """Print the estimated cost of an extraction; write nothing."""
    from sfm.pipeline.staging import IncompleteExtractionError

    try:
        with exit_with_message_on_interrupt("; a dry run saves nothing"), show_progress(quiet) as progress:
            from sfm.pipeline.dry_run import estimate_extraction

            estimate = estimate_extraction(config, progress)
    except IncompleteExtractionError as stop:
        raise print_error_and_make_exit(str(stop), EXIT_UNFINISHED) from None
    if as_json:
        print_json({"store": config.store, "plan": asdict(estimate)})
        return
    print_extraction_plan(estimate)
    from sfm.pipeline.file_counts import describe_file_counts
    from sfm.stats_store.cards import FileCounts

    about = "" if estimate.counted else "about "
    print_line(f"{about}{describe_file_counts(FileCounts(**estimate.files))}")
    for note in estimate.notes:
        print_line(note)
    print_line("Nothing was written. Run the same command without --dry-run to extract")


def run_distill(config: DistillConfig, as_json: bool, quiet: bool) -> None:
    """Distil, then print where the images are and the command to run next."""
    configure_process(config.threads)
    if config.dry_run:
        run_distill_dry_run(config, as_json, quiet)
        return
    from sfm.distill.run import DistillInterrupt, describe_resume_hint, distill

    try:
        with (
            exit_with_message_on_interrupt(lambda: describe_resume_hint(config.out)),
            show_progress(quiet) as progress,
        ):
            result = distill(config, progress)
    except DistillInterrupt as stop:
        raise print_error_and_make_exit(str(stop), EXIT_INTERRUPTED) from None
    record = result.record
    if as_json:
        print_json({"out": str(result.out), **record})
        return
    print_line(
        f"{result.out}: {record['ipc']} image(s) per class of {record['dataset']}, "
        f"loss {record['loss']:.4f}, {record['wall_seconds']:.0f} s, "
        f"peak memory {record['peak_memory_bytes'] / 2**20:.0f} MiB"
    )
    if config.soft_labels and "soft_labels" in record:
        from sfm.soft_label_files import LABEL_FILE

        labels = record["soft_labels"]
        print_line(
            f"Soft labels: {result.out / LABEL_FILE}, {labels['bytes'] / 1e3:.1f} kB beside "
            f"{labels['image_bytes'] / 1e3:.1f} kB of images; `sfm evaluate --mode soft` trains on them"
        )
    print_line(f"Look at {result.out / 'preview.png'}")
    print_next_command("evaluate", result.out, "--store", config.store)


def run_distill_dry_run(config: DistillConfig, as_json: bool, quiet: bool) -> None:
    """Print what a distillation would do; write nothing."""
    with exit_with_message_on_interrupt("; a dry run saves nothing"), show_progress(quiet) as progress:
        from sfm.distill.run_estimate import estimate_distillation

        estimate = estimate_distillation(config, progress)
    if as_json:
        print_json({"store": config.store, "plan": asdict(estimate)})
        return
    print_distillation_plan(estimate)
    print_line("Nothing was written. Run the same command without --dry-run to distil")


def run_evaluate(config: EvaluateRunsConfig, as_json: bool, quiet: bool) -> None:
    """Evaluate, then print the table of accuracies; of several runs, the matrix too.

    Accuracies are printed even if they cannot be written.
    """
    configure_process(config.threads)
    from sfm.eval.partial_results import format_interruption_message
    from sfm.eval.result import NotWrittenError

    run_configs = config.split_by_run()
    result_files = [each.result_path for each in run_configs]
    are_run_directories = [each.is_run_directory for each in run_configs]
    unwritten: InputError | None = None
    try:
        with show_progress(quiet) as progress:
            from sfm.eval.backbone_matrix import make_matrix
            from sfm.image_evaluation import evaluate_runs

            evaluations = evaluate_runs(config, progress)
    except NotWrittenError as error:
        evaluations, unwritten = error.evaluations, error
    except KeyboardInterrupt:
        raise print_error_and_make_exit(format_interruption_message(result_files), EXIT_INTERRUPTED) from None
    records = [evaluation.model_dump(mode="json") for evaluation in evaluations]
    cells = [cell.model_dump(mode="json") for cell in make_matrix(evaluations)]
    accuracies.print_evaluation_warnings(records)
    if as_json:
        document = records[0] if len(records) == 1 else {"evaluations": records}
        print_json(document | {"matrix": cells})
    else:
        for record in records:
            accuracies.print_evaluation_rows_and_notes(record)
        if len(records) > 1:
            accuracies.print_cross_backbone_matrix(cells)
    if unwritten:
        raise unwritten
    if as_json:
        return
    for file in result_files:
        print_line(f"Written to {file}")
    directories = [
        run if is_run_directory else file.parent
        for run, is_run_directory, file in zip(config.run, are_run_directories, result_files, strict=True)
    ]
    evaluation_option = ["--evaluation", config.out] if config.out and any(are_run_directories) else []
    print_next_command(
        "report", *directories, "--store", config.store, *evaluation_option, "--out", "report.html"
    )


def run_report(config: ReportConfig, as_json: bool, quiet: bool) -> None:
    """Write the report, then print where it is."""
    from sfm.eval.report.page import report

    with exit_with_message_on_interrupt("; no report was written"):
        out = report(config)
    if as_json:
        print_json({"out": str(out), "bytes": out.stat().st_size})
    else:
        print_line(
            f"{out}: {len(config.runs)} run(s), {out.stat().st_size / 1e6:.1f} MB; open it in a browser"
        )


def run_export(config: ExportConfig, as_json: bool, quiet: bool) -> None:
    """Export, then print the files written and their licence."""
    from sfm.eval.export.run_export import export

    with exit_with_message_on_interrupt("; nothing was exported"):
        exported = export(config)
    if as_json:
        print_json(
            {
                "out": str(exported.out),
                "files": exported.file_count,
                "bytes": exported.total_bytes,
                "licence": exported.licence,
            }
        )
        return
    size = f"{exported.file_count} files, {exported.total_bytes / 1e6:.2f} MB"
    print_line(f"{exported.out}: {config.format}, {size}; licence: {exported.licence}")
    if exported.licence == "unknown":
        print_line(
            "note: the licence of the real data is not known: ask before you publish, then give --licence"
        )


add_command(
    app,
    "extract",
    ExtractConfig,
    run_extract,
    summary="Stream a dataset once through backbones and publish its statistics to a store.",
    examples=[
        "sfm extract builtin:fashion-mnist-6k --store ./store --backbone lite0 --image-size 96",
        "sfm extract folder:/data/birds --store s3://team/stats --backbone dinov2-vitb14 --exemplars 8",
    ],
)
add_command(
    app,
    "distill",
    DistillConfig,
    run_distill,
    summary="Distil a few synthetic images per class from the statistics in a store.",
    examples=[
        "sfm distill --store ./store --backbone lite0 --dataset fashion-mnist-6k --out ./distilled",
        "sfm distill --store ./store --backbone lite0 --backbone lite1 --dataset birds --out ./on-both",
        "sfm distill --config ./distilled/run.json --store ./store --seed 1 --out ./distilled-1",
        "sfm distill --config ./distilled/run.json --store ./store --out ./distilled --resume --soft-labels",
    ],
)
add_command(
    app,
    "evaluate",
    EvaluateRunsConfig,
    run_evaluate,
    summary="Train on distilled images and measure accuracy on the held-out features of the store.",
    examples=[
        "sfm evaluate ./distilled --store ./store",
        "sfm evaluate ./lgm/data.pth --store ./store --dataset birds --distilled-on lite0 --backbone all",
        "sfm evaluate ./distilled --store ./store --backbone lite0 --backbone lite1 --mode inherit",
        "sfm evaluate ./on-lite0 ./on-lite1 --store ./store --backbone all --json",
        "sfm evaluate ./distilled --config ./distilled/evaluation.json --store ./store",
    ],
)
add_command(
    app,
    "report",
    ReportConfig,
    run_report,
    summary="Show runs and their accuracies on one self-contained HTML page.",
    examples=[
        "sfm report ./distilled --out report.html --store ./store",
        "sfm report ./distilled-1 ./distilled-5 --out compared.html",
    ],
)
add_command(
    app,
    "export",
    ExportConfig,
    run_export,
    summary="Write distilled images, or a classifier, in a format that other tools read.",
    examples=[
        "sfm export ./distilled --format parquet --out ./for-the-hub",
        "sfm export ./distilled --format classifier --store ./store --backbone lite1 --out ./classifier",
    ],
)


@app.command(
    "quickstart", epilog="Examples:\n\n  $ sfm quickstart\n\n  $ sfm quickstart --out /tmp/first-look"
)
def run_quickstart_command(
    out: Annotated[Path, typer.Option(help="Folder to write to; must be new or empty.")] = Path(
        "sfm-quickstart"
    ),
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run the whole pipeline on embedded real data: extract, distil, evaluate. Takes a few minutes."""
    with exit_on_error():
        configure_process(threads)
        from sfm.distill.run import DistillInterrupt
        from sfm.quickstart import run_quickstart

        command = shlex.join(["sfm", "quickstart", "--out", str(out)])

        try:
            with (
                exit_with_message_on_interrupt(f": run `{command}` again to resume"),
                show_progress(quiet) as progress,
            ):
                record: dict[str, Any] = run_quickstart(out, progress, threads)
        except DistillInterrupt as stop:
            raise print_error_and_make_exit(
                f"{stop.args[0].partition(':')[0]}: run `{command}` again to resume", EXIT_INTERRUPTED
            ) from None
    if as_json:
        print_json(record)
        return
    accuracies.print_evaluation_warnings([record["evaluation"]])
    accuracies.print_evaluation_rows_and_notes(record["evaluation"])
    print_line(f"Ten distilled images: {record['preview']}")
    print_line(f"Statistics store:     {record['store']}   (sfm store ls {record['store']})")


if __name__ == "__main__":
    main()
