"""The command line of the store: ``sfm store``."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from sfm.backbones.execution.wait_policy import choose_wait_policy
from sfm.command_builder import JsonOption, QuietOption, StrictTyper, ThreadsOption
from sfm.error_reporting import exit_on_error, explain_interrupt, report_error
from sfm.events import ProgressCallback, delay_progress
from sfm.progress_display import show_progress
from sfm.tables import print_entry_table
from sfm.terminal import print_json, print_line

store_app = StrictTyper(
    help="Look into a store of statistics, check it, share it, and keep it tidy.", no_args_is_help=True
)

Url = Annotated[str, typer.Argument(metavar="URL", help="The store: a path, s3://, gs:// or az:// URL.")]
Dataset = Annotated[str, typer.Argument(metavar="DATASET", help="NAME, NAME@DIGEST or NAME@tuning.")]
OnlyDataset = Annotated[
    str | None,
    typer.Option("--dataset", help="Only NAME (full and tuning entries), NAME@DIGEST or NAME@tuning."),
]
BackboneSpec = Annotated[
    str | None, typer.Option("--backbone", help="Only this backbone: its spec, as `ls` shows it.")
]
ImageSize = Annotated[int | None, typer.Option("--image-size", help="Only this input size in pixels.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Change nothing; say what would be done.")]


SHOWN_AFTER = 1.0
"""Seconds that a stage may take before its progress is shown."""


@contextmanager
def at_work(quiet: bool, interrupted: str) -> Iterator[ProgressCallback]:
    """Show the progress of whatever takes longer than a moment, and end with what is true on an interrupt."""
    with explain_interrupt(f": {interrupted}"), show_progress(quiet) as progress:
        yield delay_progress(SHOWN_AFTER, progress)


def examples(*lines: str) -> str:
    """Return the end of a command's help."""
    return "\n\n".join(["Examples:", *(f"  $ sfm store {line}" for line in lines)])


@store_app.command("ls", no_args_is_help=True, epilog=examples("ls ./store", "ls s3://team/stats --json"))
def store_ls(url: Url, as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List the entries of a store."""
    with exit_on_error():
        from sfm.stats_store.store import open_store

        with at_work(quiet, "nothing was changed") as progress:
            entries, unreadable = open_store(url).survey(progress)
        if as_json:
            shown = [s.model_dump(mode="json") for s in entries]
            print_json({"entries": shown, "unreadable": unreadable})
        else:
            print_entry_table(f"Store {url}: {len(entries)} entries", entries)
            for reason in unreadable:
                print_line(f"note: left out: {reason}")


@store_app.command(
    "show",
    no_args_is_help=True,
    epilog=examples(
        "show ./store fashion-mnist-6k --backbone lite0", "show s3://team/stats birds --history --json"
    ),
)
def store_show(
    url: Url,
    dataset: Dataset,
    backbone: BackboneSpec = None,
    image_size: ImageSize = None,
    history: Annotated[
        bool, typer.Option("--history", help="List all generations of NAME, replaced and removed ones too.")
    ] = False,
    per_class: Annotated[
        bool,
        typer.Option(
            "--per-class",
            help="Also compute the classifier's held-out accuracy of every class, worst first; reads the "
            "held-out features.",
        ),
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show one entry: backbone, dataset, classes, how it was extracted, its arrays and their sizes."""
    with exit_on_error():
        from sfm import store_tables
        from sfm.stats_store.by_class import held_out_by_class
        from sfm.stats_store.history import history_of, known_summaries
        from sfm.stats_store.select import only
        from sfm.stats_store.store import open_store

        if history:
            with at_work(quiet, "nothing was changed") as progress:
                found = history_of(open_store(url), dataset, backbone, image_size, progress)
            if as_json:
                print_json({"history": [store_tables.generation_document(g) for g in found]})
            else:
                store_tables.print_history(f"History of {dataset} in {url}", found)
            return
        with at_work(quiet, "nothing was changed") as progress:
            store = open_store(url)
            known = known_summaries(store, dataset, progress)
            summary = only(known, dataset=dataset, backbone=backbone, image_size=image_size)
            entry = store.open(summary)
            document = store_tables.entry_document(entry)
            if per_class:
                store_tables.add_accuracies(document, held_out_by_class(entry))
        if as_json:
            print_json(document)
        else:
            store_tables.print_entry(document)


@store_app.command(
    "verify",
    no_args_is_help=True,
    epilog=examples("verify ./store", "verify s3://team/stats --dataset birds --json"),
)
def store_verify(
    url: Url,
    dataset: OnlyDataset = None,
    backbone: BackboneSpec = None,
    image_size: ImageSize = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare every byte of a store, or of some entries, with what was published; exit 1 on damage."""
    with exit_on_error():
        from sfm import store_tables
        from sfm.stats_store.history import known_summaries
        from sfm.stats_store.select import every
        from sfm.stats_store.store import open_store
        from sfm.stats_store.verify import verify

        asked = any(word is not None for word in (dataset, backbone, image_size))
        chosen = None
        with at_work(quiet, "nothing was changed; the next check begins anew") as progress:
            store = open_store(url)
            if asked:
                known = known_summaries(store, dataset or "", progress)
                chosen = every(known, dataset=dataset, backbone=backbone, image_size=image_size)
            verdicts = verify(store, chosen, progress)
        if as_json:
            print_json({"entries": [store_tables.verdict_document(v) for v in verdicts]})
        else:
            store_tables.print_verdicts(f"Store {url}", verdicts)
        damaged = sum(not v.sound and v.readable for v in verdicts)
        if damaged:
            raise report_error(f"{damaged} of {len(verdicts)} entries are damaged in {store.url}", 1)


@store_app.command(
    "copy",
    no_args_is_help=True,
    epilog=examples(
        "copy ./store s3://team/stats", "copy s3://team/stats ./mine --dataset birds --backbone lite0"
    ),
)
def store_copy(
    url: Url,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The store to copy to; made if need be.")],
    dataset: OnlyDataset = None,
    backbone: BackboneSpec = None,
    image_size: ImageSize = None,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Go over what TARGET has under the same key or had removed; publish again what is damaged.",
        ),
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Copy entries to another store, byte for byte. The same command goes on where it was interrupted."""
    with exit_on_error():
        from sfm import store_tables
        from sfm.stats_store.copying import copy
        from sfm.stats_store.history import known_summaries
        from sfm.stats_store.select import every
        from sfm.stats_store.store import create_store, open_store

        with at_work(
            quiet, "entries that are not whole are not visible; the same command goes on"
        ) as progress:
            source = open_store(url)
            left_out: list[str] = []
            if dataset or backbone or image_size:
                known = known_summaries(source, dataset or "", progress)
                chosen = every(known, dataset=dataset, backbone=backbone, image_size=image_size)
            else:
                chosen, left_out = source.survey(progress)
            done = copy(source, create_store(target), chosen, replace=replace, progress=progress)
        if as_json:
            shown = [store_tables.copied_document(c) for c in done]
            print_json({"entries": shown, "unreadable": left_out})
        else:
            outcomes = [c.outcome for c in done]
            print_entry_table(f"From {url} to {target}", [c.summary for c in done], outcomes)
            for reason in left_out:
                print_line(f"note: left out: {reason}")
        damaged = [c for c in done if c.outcome == "damaged"]
        if damaged:
            raise report_error(f"{len(damaged)} of {len(done)} entries not copied: {damaged[0].detail}", 1)
        missing = [c for c in done if not c.arrived]
        if missing:
            others = f"{target} holds others under their keys, or had them removed; --replace goes over them"
            reason = next((c.detail for c in missing if c.detail), others)
            raise report_error(f"{len(missing)} of {len(done)} entries not copied: {reason}", 2)
        if left_out:
            raise report_error(f"{len(left_out)} entries of {url} were left out: {left_out[0]}", 1)


@store_app.command(
    "merge",
    no_args_is_help=True,
    epilog=examples(
        "merge ./union ./mine#birds s3://team/stats#birds --name all-birds",
        "merge ./store spring autumn --backbone lite0",
    ),
)
def store_merge(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="The store to publish the union to; made if need be.")
    ],
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="PART",
            help="STORE#NAME, STORE#NAME@DIGEST or STORE#NAME@tuning; without STORE# the part is in URL.",
            show_default=False,
        ),
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the union; default: those of the parts, joined by +.")
    ] = None,
    backbone: BackboneSpec = None,
    image_size: ImageSize = None,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda", help="Where the classifier is trained.")
    ] = "auto",
    replace: Annotated[
        bool, typer.Option("--replace", help="Publish the next generation if this union is there already.")
    ] = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Publish the statistics of the union of disjoint datasets, from those of its parts. No image is seen.

    Overlap between parts cannot be seen, unless the same extraction is in two of them: that is refused.
    """
    with exit_on_error():
        choose_wait_policy(threads)
        from sfm.merge import merge

        with at_work(quiet, "the union may not be published; the same command begins again") as progress:
            done = merge(
                url,
                parts,
                name=name,
                backbone=backbone,
                image_size=image_size,
                device=device,
                replace=replace,
                threads=threads,
                progress=progress,
            )
        summary, outcome = done.published.summary, done.published.outcome
        if as_json:
            entry = {"outcome": outcome, **summary.model_dump(mode="json")}
            print_json({"store": url, "entry": entry, "notes": done.notes})
        else:
            print_entry_table(f"Store {url}", [summary], [outcome])
            for note in done.notes:
                print_line(f"note: {note}")


@store_app.command(
    "rm",
    no_args_is_help=True,
    epilog=examples("rm ./store birds --backbone lite0", "rm s3://team/stats birds --all --dry-run"),
)
def store_rm(
    url: Url,
    dataset: Dataset,
    backbone: BackboneSpec = None,
    image_size: ImageSize = None,
    every_entry: Annotated[
        bool, typer.Option("--all", help="Remove all entries that fit, of any backbone, size and role.")
    ] = False,
    dry_run: DryRun = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Remove an entry: readers no longer see it. Its bytes stay until `sfm store gc` deletes them."""
    with exit_on_error():
        from sfm.stats_store.concurrency import concurrently
        from sfm.stats_store.history import containing, remove
        from sfm.stats_store.select import every, only
        from sfm.stats_store.store import open_store

        told = "nothing was changed" if dry_run else "some may be removed; the same command removes the rest"
        with at_work(quiet, told) as progress:
            store = open_store(url)
            visible = store.summaries(progress)
            removed = every(visible, dataset=dataset, backbone=backbone, image_size=image_size)
            if not every_entry:
                removed = [only(visible, dataset=dataset, backbone=backbone, image_size=image_size)]
            merged = containing(store, visible, removed, progress)
            if not dry_run:
                concurrently(lambda summary: remove(store, summary), removed, progress, "remove", "entries")
        if as_json:
            print_json(
                {
                    "dry_run": dry_run,
                    "removed": [s.model_dump(mode="json") for s in removed],
                    "contained_in": [s.model_dump(mode="json") for s in merged],
                }
            )
            return
        print_entry_table("Would be removed" if dry_run else "Removed", removed)
        if merged:
            print_entry_table("Still visible, and merged from the same data", merged)
        if not dry_run:
            print_line(
                "The bytes are still there. To delete those of all removed entries: "
                f"{shlex.join(['sfm', 'store', 'gc', url, '--now'])}"
            )


@store_app.command(
    "gc",
    no_args_is_help=True,
    epilog=examples("gc ./store --dry-run", "gc ./store --older-than 30d", "gc s3://team/stats --now"),
)
def store_gc(
    url: Url,
    older_than: Annotated[
        str,
        typer.Option(
            help="Leave what became garbage more recently, e.g. 12h, 7d, 4w. Choose more than the longest "
            "pause of a writer, or what it is writing goes."
        ),
    ] = "7d",
    now: Annotated[
        bool,
        typer.Option("--now", help="Delete replaced and removed entries at once, whatever their age."),
    ] = False,
    dry_run: DryRun = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Delete what no reader can see: replaced and removed entries, runs never committed, old staging."""
    with exit_on_error():
        from sfm import store_tables
        from sfm.stats_store.collect import collect, parse_age
        from sfm.stats_store.store import open_store

        oldest = parse_age(older_than)
        told = "nothing was changed" if dry_run else "what is deleted is deleted; the same command goes on"
        with at_work(quiet, told) as progress:
            done = collect(open_store(url), older_than=oldest, now=now, dry_run=dry_run, progress=progress)
        if as_json:
            print_json(
                {
                    "dry_run": dry_run,
                    "deleted": [store_tables.garbage_document(g) for g in done.deleted],
                    "kept": [store_tables.garbage_document(g) for g in done.kept],
                    "notes": done.notes,
                }
            )
        else:
            store_tables.print_collection(done, "Would be deleted" if dry_run else "Deleted")
            for note in done.notes:
                print_line(f"note: left alone, with all that may belong to it: {note}")
