"""The command line of the store: ``sfm store``."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from sfm.backbones.execution.wait_policy import set_passive_openmp_wait_if_crowded
from sfm.command_builder import JsonOption, QuietOption, ThreadsOption, TyperRefusingRepeatedOptions
from sfm.error_reporting import exit_on_error, exit_with_message_on_interrupt, print_error_and_make_exit
from sfm.events import ProgressCallback, hide_progress_of_short_stages
from sfm.progress_display import show_progress
from sfm.tables import print_entry_table
from sfm.terminal import print_json, print_line

store_app = TyperRefusingRepeatedOptions(
    help="List, verify, copy, merge and clean up stores of statistics.", no_args_is_help=True
)

StoreUrl = Annotated[str, typer.Argument(metavar="URL", help="The store: a path, s3://, gs:// or az:// URL.")]
DatasetName = Annotated[str, typer.Argument(metavar="DATASET", help="NAME, NAME@DIGEST or NAME@tuning.")]
DatasetFilter = Annotated[
    str | None,
    typer.Option("--dataset", help="Only NAME (full and tuning entries), NAME@DIGEST or NAME@tuning."),
]
BackboneFilter = Annotated[
    str | None, typer.Option("--backbone", help="Only this backbone: its spec, as `ls` shows it.")
]
ImageSizeFilter = Annotated[int | None, typer.Option("--image-size", help="Only this input size in pixels.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Change nothing; print the planned changes.")]


PROGRESS_DELAY_SECONDS = 1.0
"""Seconds after which the progress of a stage is shown."""


@contextmanager
def show_slow_progress_and_exit_on_interrupt(
    quiet: bool, interrupt_message: str
) -> Iterator[ProgressCallback]:
    """Show the progress of slow stages; on an interrupt, end with the message `interrupt_message`."""
    with exit_with_message_on_interrupt(f": {interrupt_message}"), show_progress(quiet) as progress:
        yield hide_progress_of_short_stages(PROGRESS_DELAY_SECONDS, progress)


def format_help_examples(*store_command_lines: str) -> str:
    """Return the examples at the end of a command's help."""
    return "\n\n".join(["Examples:", *(f"  $ sfm store {line}" for line in store_command_lines)])


@store_app.command(
    "ls", no_args_is_help=True, epilog=format_help_examples("ls ./store", "ls s3://team/stats --json")
)
def store_ls(url: StoreUrl, as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List the entries of a store."""
    with exit_on_error():
        from sfm.stats_store.store import open_store

        with show_slow_progress_and_exit_on_interrupt(quiet, "nothing was changed") as progress:
            entries, unreadable = open_store(url).list_summaries_and_problems(progress)
        if as_json:
            documents = [s.model_dump(mode="json") for s in entries]
            print_json({"entries": documents, "unreadable": unreadable})
        else:
            print_entry_table(f"Store {url}: {len(entries)} entries", entries)
            for reason in unreadable:
                print_line(f"note: left out: {reason}")


@store_app.command(
    "show",
    no_args_is_help=True,
    epilog=format_help_examples(
        "show ./store fashion-mnist-6k --backbone lite0", "show s3://team/stats birds --history --json"
    ),
)
def store_show(
    url: StoreUrl,
    dataset: DatasetName,
    backbone: BackboneFilter = None,
    image_size: ImageSizeFilter = None,
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
        from sfm.stats_store.class_accuracies import compute_held_out_class_accuracies
        from sfm.stats_store.entry_history import find_entry_history, list_visible_and_pinned_summaries
        from sfm.stats_store.entry_selection import select_only_summary
        from sfm.stats_store.store import open_store

        if history:
            with show_slow_progress_and_exit_on_interrupt(quiet, "nothing was changed") as progress:
                statuses = find_entry_history(open_store(url), dataset, backbone, image_size, progress)
            if as_json:
                print_json({"history": [store_tables.make_commit_document(g) for g in statuses]})
            else:
                store_tables.print_commit_history(f"History of {dataset} in {url}", statuses)
            return
        with show_slow_progress_and_exit_on_interrupt(quiet, "nothing was changed") as progress:
            store = open_store(url)
            summaries = list_visible_and_pinned_summaries(store, dataset, progress)
            summary = select_only_summary(
                summaries, dataset=dataset, backbone_spec=backbone, image_size=image_size
            )
            entry = store.open_entry(summary)
            document = store_tables.make_entry_document(entry)
            if per_class:
                store_tables.set_class_accuracies_in_document(
                    document, compute_held_out_class_accuracies(entry)
                )
        if as_json:
            print_json(document)
        else:
            store_tables.print_entry(document)


@store_app.command(
    "verify",
    no_args_is_help=True,
    epilog=format_help_examples("verify ./store", "verify s3://team/stats --dataset birds --json"),
)
def store_verify(
    url: StoreUrl,
    dataset: DatasetFilter = None,
    backbone: BackboneFilter = None,
    image_size: ImageSizeFilter = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare every byte of a store, or of some entries, with the published digests; exit 1 on damage."""
    with exit_on_error():
        from sfm import store_tables
        from sfm.stats_store.entry_history import list_visible_and_pinned_summaries
        from sfm.stats_store.entry_selection import filter_summaries_or_raise
        from sfm.stats_store.store import open_store
        from sfm.stats_store.verification import verify_entries

        has_filter = any(word is not None for word in (dataset, backbone, image_size))
        selected = None
        with show_slow_progress_and_exit_on_interrupt(quiet, "nothing was changed") as progress:
            store = open_store(url)
            if has_filter:
                summaries = list_visible_and_pinned_summaries(store, dataset or "", progress)
                selected = filter_summaries_or_raise(
                    summaries, dataset=dataset, backbone_spec=backbone, image_size=image_size
                )
            verdicts = verify_entries(store, selected, progress)
        if as_json:
            print_json({"entries": [store_tables.make_verdict_document(v) for v in verdicts]})
        else:
            store_tables.print_verdicts(f"Store {url}", verdicts)
        damaged = sum(not v.is_sound and v.is_access_granted for v in verdicts)
        if damaged:
            raise print_error_and_make_exit(
                f"{damaged} of {len(verdicts)} entries are damaged in {store.url}", 1
            )


@store_app.command(
    "copy",
    no_args_is_help=True,
    epilog=format_help_examples(
        "copy ./store s3://team/stats", "copy s3://team/stats ./mine --dataset birds --backbone lite0"
    ),
)
def store_copy(
    url: StoreUrl,
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="The store to copy to; created if it does not exist.")
    ],
    dataset: DatasetFilter = None,
    backbone: BackboneFilter = None,
    image_size: ImageSizeFilter = None,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Replace entries that TARGET has under the same key or had removed; publish damaged ones "
            "again.",
        ),
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Copy entries to another store, byte for byte. The same command resumes an interrupted copy."""
    with exit_on_error():
        from sfm import store_tables
        from sfm.stats_store.entry_copy import copy_entries
        from sfm.stats_store.entry_history import list_visible_and_pinned_summaries
        from sfm.stats_store.entry_selection import filter_summaries_or_raise
        from sfm.stats_store.store import open_or_create_store, open_store

        with show_slow_progress_and_exit_on_interrupt(
            quiet, "incomplete entries are not visible; run the same command again to resume"
        ) as progress:
            source = open_store(url)
            unreadable: list[str] = []
            if dataset or backbone or image_size:
                summaries = list_visible_and_pinned_summaries(source, dataset or "", progress)
                selected = filter_summaries_or_raise(
                    summaries, dataset=dataset, backbone_spec=backbone, image_size=image_size
                )
            else:
                selected, unreadable = source.list_summaries_and_problems(progress)
            result = copy_entries(
                source, open_or_create_store(target), selected, replace=replace, progress=progress
            )
        if as_json:
            documents = [store_tables.make_copy_document(c) for c in result]
            print_json({"entries": documents, "unreadable": unreadable})
        else:
            outcomes = [c.outcome for c in result]
            print_entry_table(f"From {url} to {target}", [c.summary for c in result], outcomes)
            for reason in unreadable:
                print_line(f"note: left out: {reason}")
        damaged = [c for c in result if c.outcome == "damaged"]
        if damaged:
            raise print_error_and_make_exit(
                f"{len(damaged)} of {len(result)} entries not copied: {damaged[0].detail}", 1
            )
        not_copied = [c for c in result if not c.is_in_target]
        if not_copied:
            advice = f"{target} holds others under their keys, or had them removed; --replace replaces them"
            reason = next((c.detail for c in not_copied if c.detail), advice)
            raise print_error_and_make_exit(
                f"{len(not_copied)} of {len(result)} entries not copied: {reason}", 2
            )
        if unreadable:
            raise print_error_and_make_exit(
                f"{len(unreadable)} entries of {url} were left out: {unreadable[0]}", 1
            )


@store_app.command(
    "merge",
    no_args_is_help=True,
    epilog=format_help_examples(
        "merge ./union ./mine#birds s3://team/stats#birds --name all-birds",
        "merge ./store spring autumn --backbone lite0",
    ),
)
def store_merge(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL", help="The store to publish the union to; created if it does not exist."
        ),
    ],
    input_names: Annotated[
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
    backbone: BackboneFilter = None,
    image_size: ImageSizeFilter = None,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda", help="Where the classifier is trained.")
    ] = "auto",
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Publish the next generation if this union is published already."),
    ] = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Publish the statistics of the union of disjoint datasets, from those of its parts, without images.

    Overlap between parts is not detected, unless two of them contain the same extraction: that is refused.
    """
    with exit_on_error():
        set_passive_openmp_wait_if_crowded(threads)
        from sfm.named_merge import merge_entries_by_name

        with show_slow_progress_and_exit_on_interrupt(
            quiet, "the union may not be published; run the same command again"
        ) as progress:
            result = merge_entries_by_name(
                url,
                input_names,
                union_name=name,
                backbone=backbone,
                image_size=image_size,
                device=device,
                replace=replace,
                threads=threads,
                progress=progress,
            )
        summary, outcome = result.publish_result.summary, result.publish_result.outcome
        if as_json:
            entry = {"outcome": outcome, **summary.model_dump(mode="json")}
            print_json({"store": url, "entry": entry, "notes": result.notes})
        else:
            print_entry_table(f"Store {url}", [summary], [outcome])
            for note in result.notes:
                print_line(f"note: {note}")


@store_app.command(
    "rm",
    no_args_is_help=True,
    epilog=format_help_examples(
        "rm ./store birds --backbone lite0", "rm s3://team/stats birds --all --dry-run"
    ),
)
def store_rm(
    url: StoreUrl,
    dataset: DatasetName,
    backbone: BackboneFilter = None,
    image_size: ImageSizeFilter = None,
    remove_all: Annotated[
        bool, typer.Option("--all", help="Remove all matching entries, of any backbone, size and role.")
    ] = False,
    dry_run: DryRun = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Remove an entry: readers no longer see it. Its bytes stay until `sfm store gc` deletes them."""
    with exit_on_error():
        from sfm.stats_store.concurrency import map_concurrently
        from sfm.stats_store.entry_history import find_entries_merged_from_removed, remove_entry
        from sfm.stats_store.entry_selection import filter_summaries_or_raise, select_only_summary
        from sfm.stats_store.store import open_store

        interrupt_note = (
            "nothing was changed"
            if dry_run
            else "some may be removed; run the same command again to remove the rest"
        )
        with show_slow_progress_and_exit_on_interrupt(quiet, interrupt_note) as progress:
            store = open_store(url)
            visible = store.list_summaries(progress)
            removed_entries = filter_summaries_or_raise(
                visible, dataset=dataset, backbone_spec=backbone, image_size=image_size
            )
            if not remove_all:
                removed_entries = [
                    select_only_summary(
                        visible, dataset=dataset, backbone_spec=backbone, image_size=image_size
                    )
                ]
            merged_entries = find_entries_merged_from_removed(store, visible, removed_entries, progress)
            if not dry_run:
                map_concurrently(
                    lambda summary: remove_entry(store, summary),
                    removed_entries,
                    progress,
                    "remove",
                    "entries",
                )
        if as_json:
            print_json(
                {
                    "dry_run": dry_run,
                    "removed": [s.model_dump(mode="json") for s in removed_entries],
                    "contained_in": [s.model_dump(mode="json") for s in merged_entries],
                }
            )
            return
        print_entry_table("Would be removed" if dry_run else "Removed", removed_entries)
        if merged_entries:
            print_entry_table("Still visible, and merged from the same data", merged_entries)
        if not dry_run:
            print_line(
                "The bytes are still there. To delete those of all removed entries: "
                f"{shlex.join(['sfm', 'store', 'gc', url, '--now'])}"
            )


@store_app.command(
    "gc",
    no_args_is_help=True,
    epilog=format_help_examples(
        "gc ./store --dry-run", "gc ./store --older-than 30d", "gc s3://team/stats --now"
    ),
)
def store_gc(
    url: StoreUrl,
    older_than: Annotated[
        str,
        typer.Option(
            help="Keep garbage younger than this, e.g. 12h, 7d, 4w. Choose more than the longest "
            "pause of a writer, or its unfinished run is deleted."
        ),
    ] = "7d",
    now: Annotated[
        bool, typer.Option("--now", help="Delete replaced and removed entries of any age.")
    ] = False,
    dry_run: DryRun = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Delete unreachable objects: replaced and removed entries, runs never committed, old staging."""
    with exit_on_error():
        from sfm import store_tables
        from sfm.stats_store.garbage_collection import collect_garbage, parse_duration
        from sfm.stats_store.store import open_store

        min_age = parse_duration(older_than)
        interrupt_note = (
            "nothing was changed"
            if dry_run
            else "some garbage may be deleted; run the same command again to resume"
        )
        with show_slow_progress_and_exit_on_interrupt(quiet, interrupt_note) as progress:
            result = collect_garbage(
                open_store(url), min_age=min_age, delete_replaced_now=now, dry_run=dry_run, progress=progress
            )
        if as_json:
            print_json(
                {
                    "dry_run": dry_run,
                    "deleted": [store_tables.make_garbage_document(g) for g in result.deleted],
                    "kept": [store_tables.make_garbage_document(g) for g in result.retained],
                    "notes": result.notes,
                }
            )
        else:
            store_tables.print_garbage_collection(result, "Would be deleted" if dry_run else "Deleted")
            for note in result.notes:
                print_line(f"note: not deleted, nor anything it may refer to: {note}")
