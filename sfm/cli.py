"""The command line: ``sfm``. A stage is imported when its command runs, so that help is instant."""

import shlex
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfm import accuracies, terminal
from sfm.backbones.memory import LARGE_INPUT, share_one_heap
from sfm.backbones.waiting import choose_wait_policy
from sfm.command import App, AsJson, Quiet, Threads, add_command
from sfm.distill.config import DistillConfig
from sfm.errors import InputError
from sfm.eval.config import EvaluateRunsConfig
from sfm.eval.export.config import ExportConfig
from sfm.eval.report.config import ReportConfig
from sfm.pipeline.config import ExtractConfig
from sfm.pixel_lines import pixel_document, pixel_lines
from sfm.store_commands import store_app
from sfm.terminal import print_line

if TYPE_CHECKING:
    from sfm.pipeline.extract import Extraction

SKIPPED_SHOWN = 20

app = App(
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
    terminal.prepare_output()
    app()


@app.callback(invoke_without_command=True)
def front(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Distil a vision dataset into a few synthetic images per class, from class statistics alone."""
    if show_version:
        print_line(f"sfm-distill {version('sfm-distill')}")
        raise typer.Exit


def run_extract(config: ExtractConfig, as_json: bool, quiet: bool) -> None:
    """Extract, then say what was published and what to do with it."""
    if config.dry_run:
        run_plan(config, as_json, quiet)
        return
    choose_wait_policy(config.threads)
    if config.image_size is None or config.image_size > LARGE_INPUT:
        share_one_heap()
    from sfm.pipeline.staging import Unfinished

    try:
        with (
            terminal.explain_interrupt("; the same command goes on from the work that is complete"),
            terminal.showing(quiet) as progress,
        ):
            from sfm.pipeline.extract import extract
            from sfm.pipeline.file_counts import describe_files

            done = extract(config, progress)
    except Unfinished as stop:
        raise terminal.fail(str(stop), terminal.UNFINISHED) from None
    if as_json:
        entries = [
            {"outcome": p.outcome, **p.summary.model_dump(mode="json"), **pixel_document(card)}
            for p, card in zip(done.published, done.cards, strict=True)
        ]
        figures = {
            "images_read": done.features.read,
            "images_resumed": done.features.resumed,
            "seconds": done.features.seconds,
            "statistics_seconds": done.statistics_seconds,
            "images_per_second": done.features.images_per_second,
            "skipped": done.skipped,
            "flow_cosines": done.flow_cosines,
            "files": done.files.model_dump() if done.files else None,
            "notes": done.notes,
        }
        terminal.print_json({"store": config.store, "entries": entries, **figures})
        return
    terminal.entry_table(
        f"Store {config.store}", [p.summary for p in done.published], [p.outcome for p in done.published]
    )
    if done.features.read:
        rate = f"{done.features.images_per_second:.0f} images/s"
        print_line(f"{done.features.read} images read in {done.features.seconds:.0f} s ({rate})")
    else:
        print_line(
            "nothing was read: the source's listing is that of the stored entries (--rehash reads anyway)"
        )
    if done.statistics_seconds:
        print_line(f"then classifiers, sub-class centres and publishing in {done.statistics_seconds:.0f} s")
    if done.files:
        print_line(describe_files(done.files))
    for line in (*done.notes, *precision_lines(config, done)):
        print_line(line)
    for line in pixel_lines([(p.summary, card) for p, card in zip(done.published, done.cards, strict=True)]):
        print_line(line)
    if done.skipped:
        print_line(f"{len(done.skipped)} images could not be decoded and are not in the entries:")
        for line in done.skipped[:SKIPPED_SHOWN]:
            print_line(f"  {line}")
        if len(done.skipped) > SKIPPED_SHOWN:
            print_line(f"  … `sfm store show {shlex.quote(config.store)} … --json` lists all of them")
    first = done.published[0].summary
    terminal.print_next(
        "distill",
        *("--store", config.store, "--backbone", first.backbone, "--dataset", first.dataset),
        *("--image-size", first.image_size, "--out", f"{first.dataset}-distilled"),
    )


def precision_lines(config: ExtractConfig, done: "Extraction") -> Iterator[str]:
    """Yield what another precision than float32 has done to the flows, a line per backbone."""
    from sfm.pipeline.precision import FAITHFUL

    for summary in {p.summary.backbone_hash: p.summary for p in done.published}.values():
        if summary.backbone_hash in done.flow_cosines:
            cosine = done.flow_cosines[summary.backbone_hash]
            told = "what it does to the flows is not known: the images looked at are of one class"
            if cosine is not None:
                verdict = "as good as the same" if cosine >= FAITHFUL else "float32 is safer for it"
                told = f"cosine of the flows with those in float32 {cosine:.5f} ({verdict})"
            yield f"{config.precision} on {summary.backbone}: {told}"


def run_plan(config: ExtractConfig, as_json: bool, quiet: bool) -> None:
    """Say what an extraction would do."""
    from sfm.pipeline.staging import Unfinished

    try:
        with (
            terminal.explain_interrupt("; a dry run saves nothing"),
            terminal.showing(quiet) as progress,
        ):
            from sfm.pipeline.plan import plan

            planned = plan(config, progress)
    except Unfinished as stop:
        raise terminal.fail(str(stop), terminal.UNFINISHED) from None
    if as_json:
        terminal.print_json({"store": config.store, "plan": asdict(planned)})
        return
    terminal.plan_table(planned)
    from sfm.pipeline.file_counts import describe_files
    from sfm.stats_store.cards import FileCounts

    print_line(f"{'' if planned.counted else 'about '}{describe_files(FileCounts(**planned.files))}")
    for note in planned.notes:
        print_line(note)
    print_line("Nothing was written; without --dry-run, the same command extracts")


def run_distill(config: DistillConfig, as_json: bool, quiet: bool) -> None:
    """Distil, then say where the images are."""
    choose_wait_policy(config.threads)
    from sfm.distill.run import Interrupted, describe_checkpoint, distill

    try:
        with (
            terminal.explain_interrupt(lambda: describe_checkpoint(config.out)),
            terminal.showing(quiet) as progress,
        ):
            done = distill(config, progress)
    except Interrupted as stop:
        raise terminal.fail(str(stop), terminal.INTERRUPTED) from None
    if as_json:
        terminal.print_json({"out": str(done.out), **done.record})
        return
    record = done.record
    print_line(
        f"{done.out}: {record['ipc']} image(s) per class of {record['dataset']}, "
        f"loss {record['loss']:.4f}, {record['wall_seconds']:.0f} s, "
        f"peak memory {record['peak_memory_bytes'] / 2**20:.0f} MiB"
    )
    print_line(f"Look at {done.out / 'preview.png'}")
    terminal.print_next("evaluate", done.out, "--store", config.store)


def run_evaluate(config: EvaluateRunsConfig, as_json: bool, quiet: bool) -> None:
    """Evaluate, then print the table of accuracies; of several runs, the matrix too.

    What was found is printed even if it cannot be written.
    """
    choose_wait_policy(config.threads)
    from sfm.eval.partial_results import describe_partial_results
    from sfm.eval.result import NotWrittenError

    results = [each.result_path for each in config.split_by_run()]
    unwritten: InputError | None = None
    try:
        with terminal.showing(quiet) as progress:
            from sfm.eval.backbone_matrix import make_matrix
            from sfm.eval.evaluation import evaluate_runs

            done = evaluate_runs(config, progress)
    except NotWrittenError as error:
        done, unwritten = error.evaluations, error
    except KeyboardInterrupt:
        raise terminal.fail(describe_partial_results(results), terminal.INTERRUPTED) from None
    records = [evaluation.model_dump(mode="json") for evaluation in done]
    cells = [cell.model_dump(mode="json") for cell in make_matrix(done)]
    accuracies.print_warnings(records)
    if as_json:
        document = records[0] if len(records) == 1 else {"evaluations": records}
        terminal.print_json(document | {"matrix": cells})
    else:
        for record in records:
            accuracies.print_accuracies(record)
        if len(records) > 1:
            accuracies.print_matrix(cells)
    if unwritten:
        raise unwritten
    if as_json:
        return
    for result in results:
        print_line(f"Written to {result}")
    elsewhere = ["--evaluation", config.out] if config.out else []
    terminal.print_next("report", *config.run, "--store", config.store, *elsewhere, "--out", "report.html")


def run_report(config: ReportConfig, as_json: bool, quiet: bool) -> None:
    """Write the report, then say where it is."""
    from sfm.eval.report.page import report

    with terminal.explain_interrupt("; no report was written"):
        out = report(config)
    if as_json:
        terminal.print_json({"out": str(out), "bytes": out.stat().st_size})
    else:
        print_line(
            f"{out}: {len(config.runs)} run(s), {out.stat().st_size / 1e6:.1f} MB; open it in a browser"
        )


def run_export(config: ExportConfig, as_json: bool, quiet: bool) -> None:
    """Export, then say what was written."""
    from sfm.eval.export.run_export import export

    with terminal.explain_interrupt("; nothing was exported"):
        done = export(config)
    if as_json:
        terminal.print_json(
            {"out": str(done.out), "files": done.files, "bytes": done.size, "licence": done.licence}
        )
        return
    size = f"{done.files} files, {done.size / 1e6:.2f} MB"
    print_line(f"{done.out}: {config.format}, {size}; licence: {done.licence}")
    if done.licence == "unknown":
        print_line(
            "note: nobody named the licence of the real data: ask before you publish, then give --licence"
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
        "sfm distill --config ./distilled/run.json --store ./store --seed 1 --out ./distilled-1",
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
    summary="Show runs and their figures on one self-contained HTML page.",
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
    summary="Write distilled images, or the classifier they come with, in a format that others read.",
    examples=[
        "sfm export ./distilled --format parquet --out ./for-the-hub",
        "sfm export ./distilled --format classifier --store ./store --backbone lite1 --out ./classifier",
    ],
)


@app.command(
    "quickstart", epilog="Examples:\n\n  $ sfm quickstart\n\n  $ sfm quickstart --out /tmp/first-look"
)
def quickstart_command(
    out: Annotated[Path, typer.Option(help="Folder to write to; must be new or empty.")] = Path(
        "sfm-quickstart"
    ),
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run the whole pipeline on embedded real data: extract, distil, evaluate. Takes a few minutes."""
    with terminal.reporting():
        choose_wait_policy(threads)
        from sfm.distill.run import Interrupted
        from sfm.quickstart import quickstart

        command = shlex.join(["sfm", "quickstart", "--out", str(out)])

        try:
            with (
                terminal.explain_interrupt(f": run `{command}` again to go on"),
                terminal.showing(quiet) as progress,
            ):
                record: dict[str, Any] = quickstart(out, progress, threads)
        except Interrupted as stop:
            raise terminal.fail(
                f"{stop.args[0].partition(':')[0]}: run `{command}` again to go on",
                terminal.INTERRUPTED,
            ) from None
    if as_json:
        terminal.print_json(record)
        return
    accuracies.print_warnings([record["evaluation"]])
    accuracies.print_accuracies(record["evaluation"])
    print_line(f"Ten distilled images: {record['preview']}")
    print_line(f"Statistics store:     {record['store']}   (sfm store ls {record['store']})")


if __name__ == "__main__":
    main()
