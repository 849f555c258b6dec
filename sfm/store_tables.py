"""Tables and JSON documents of the `sfm store` commands: entries, history, verdicts, copies, garbage."""

import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sfm.stats_store.entry_copy import CopyResult
from sfm.stats_store.entry_history import CommitStatus
from sfm.stats_store.garbage import GarbageItem
from sfm.stats_store.garbage_collection import GarbageCollectionResult
from sfm.stats_store.schema import is_array_in_schema
from sfm.stats_store.store import Entry
from sfm.stats_store.verification import EntryVerdict
from sfm.tables import print_table
from sfm.terminal import open_console, print_line, sanitize_line_for_console
from sfm.text import format_percent


def make_entry_document(entry: Entry) -> dict[str, Any]:
    """Return the document of an entry for ``sfm store show``."""
    bytes_by_array = sum_stored_bytes_by_array(entry)
    arrays = {
        name: make_array_document(entry, name, bytes_by_array[name]) for name in entry.list_array_names()
    }
    known_arrays = [a for a in arrays.values() if a["bytes"] is not None]
    array_bytes = sum(a["bytes"] for a in known_arrays)
    stored_bytes = sum(a["stored_bytes"] for a in known_arrays)
    return {
        "summary": entry.summary.model_dump(mode="json"),
        "backbone": entry.backbone.model_dump(mode="json"),
        "dataset": entry.dataset.model_dump(mode="json", exclude={"class_ids", "class_names"}),
        "extraction": entry.extraction.model_dump(mode="json"),
        "classifier": entry.classifier.model_dump(mode="json"),
        "classes": make_class_documents(entry),
        "arrays": arrays,
        "run": entry.commit.run,
        "bytes": array_bytes,
        "stored_bytes": sum(record.size for record in entry.commit.objects.values()),
        "compression_ratio": array_bytes / stored_bytes if stored_bytes else None,
    }


def make_class_documents(entry: Entry) -> list[dict[str, Any]]:
    """Return id, name and sample counts of every class; held-out counts are None if labels are not stored."""
    ids, train = entry.dataset.class_ids, entry.read_array("train/count").tolist()
    test_counts: list[int] | list[None] = [None] * len(ids)
    if "test/label" in entry:
        test_counts = np.bincount(entry.read_array("test/label"), minlength=len(ids)).tolist()
    return [
        {"class_id": class_id, "name": name, "train_samples": count, "test_samples": test}
        for class_id, name, count, test in zip(
            ids, entry.dataset.class_names, train, test_counts, strict=True
        )
    ]


def set_class_accuracies_in_document(
    entry_document: dict[str, Any], class_accuracies: npt.NDArray[np.float64] | None
) -> None:
    """Add the held-out accuracy of every class to the document of an entry; None where it is undefined."""
    for index, class_document in enumerate(entry_document["classes"]):
        is_defined = class_accuracies is not None and np.isfinite(class_accuracies[index])
        class_document["held_out_top1"] = (
            float(class_accuracies[index]) if class_accuracies is not None and is_defined else None
        )


def sort_by_ascending_accuracy(class_documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort class documents by held-out accuracy, worst first; those without one come last."""
    return sorted(
        class_documents, key=lambda c: (c.get("held_out_top1") is None, c.get("held_out_top1") or 0.0)
    )


def sum_stored_bytes_by_array(entry: Entry) -> dict[str, int]:
    """Return the stored bytes of every array, metadata included."""
    stored_bytes = dict.fromkeys(entry.list_array_names(), 0)
    for path, record in entry.commit.objects.items():
        name = path.removesuffix("/zarr.json").partition("/c/")[0]
        if name in stored_bytes:
            stored_bytes[name] += record.size
    return stored_bytes


def make_array_document(entry: Entry, array_name: str, stored_bytes: int) -> dict[str, Any]:
    """Return shape, type and sizes of an array; None for an array of a newer schema, which is not opened."""
    if not is_array_in_schema(array_name):
        return {
            "shape": None,
            "dtype": None,
            "bytes": None,
            "stored_bytes": stored_bytes,
            "compression_ratio": None,
        }
    array = entry.open_array(array_name)
    return {
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "bytes": int(array.nbytes),
        "stored_bytes": stored_bytes,
        "compression_ratio": array.nbytes / stored_bytes,
    }


def print_entry(entry_document: dict[str, Any], max_class_rows: int = 30) -> None:
    """Print the document of an entry as tables: cards, classes and arrays."""
    summary = entry_document["summary"]
    console = open_console()
    pinned = f"{summary['dataset']}@{summary['entry_digest'][:12]}"
    console.print(sanitize_line_for_console(pinned, console), style="bold", soft_wrap=True)
    for card in ("dataset", "backbone", "extraction", "classifier"):
        console.print(card, style="bold")
        for name, value in entry_document[card].items():
            console.print(sanitize_line_for_console(f"  {name}: {value}", console), soft_wrap=True)
    classes = sort_by_ascending_accuracy(entry_document["classes"])
    has_accuracies = any("held_out_top1" in c for c in classes)
    print_table(
        f"{len(classes)} classes"
        + (f" (the first {max_class_rows})" if len(classes) > max_class_rows else ""),
        ["id", "name", "train", "held out", *(["top-1 %"] if has_accuracies else [])],
        [
            [
                c["class_id"],
                c["name"],
                str(c["train_samples"]),
                "–" if c["test_samples"] is None else str(c["test_samples"]),
                *([format_percent(c["held_out_top1"])] if has_accuracies else []),
            ]
            for c in classes[:max_class_rows]
        ],
        right_aligned_heads={"train", "held out", "top-1 %"},
    )
    print_table(
        "arrays",
        ["array", "shape", "dtype", "KiB", "stored KiB", "ratio"],
        [
            [
                name,
                "of a later schema" if a["shape"] is None else "x".join(map(str, a["shape"])),
                a["dtype"] or "–",
                "–" if a["bytes"] is None else f"{a['bytes'] / 1024:.1f}",
                f"{a['stored_bytes'] / 1024:.1f}",
                "–" if a["compression_ratio"] is None else f"{a['compression_ratio']:.2f}",
            ]
            for name, a in entry_document["arrays"].items()
        ],
        right_aligned_heads={"KiB", "stored KiB", "ratio"},
    )
    ratio = entry_document["compression_ratio"]
    print_line(
        f"{format_size(entry_document['stored_bytes'])} stored"
        + (f", compression ratio {ratio:.2f}" if ratio else "")
    )


def make_commit_document(status: CommitStatus) -> dict[str, Any]:
    """Return the document of a commit for ``sfm store show --history --json``."""
    commit, summary = status.commit, status.summary
    return {
        "key": status.key,
        "generation": status.generation,
        "state": status.state,
        "run": commit.run if commit and commit.kind == "entry" else None,
        "stored_bytes": status.run_size_bytes,
        "problem": status.problem,
        "summary": summary.model_dump(mode="json") if summary else None,
    }


def print_commit_history(title: str, statuses: Sequence[CommitStatus]) -> None:
    """Print a table of commits, oldest first within each key."""
    rows = []
    for g in statuses:
        s = g.summary
        rows.append(
            [
                s.dataset if s else "–",
                s.backbone if s else "–",
                str(s.image_size) if s else "–",
                s.role if s else "–",
                g.key.rpartition("/")[2][:12],
                str(g.generation),
                g.state,
                s.created if s else "–",
                s.entry_digest[:12] if s else "–",
                format_size(g.run_size_bytes),
            ]
        )
    columns = [
        *("dataset", "backbone", "px", "role", "options", "generation"),
        *("state", "committed", "digest", "stored"),
    ]
    print_table(title, columns, rows, right_aligned_heads={"px", "generation", "stored"})


def make_garbage_document(garbage: GarbageItem) -> dict[str, Any]:
    """Return the document of a piece of garbage for ``sfm store gc --json``."""
    return {
        "path": garbage.path,
        "reason": garbage.reason,
        "since": garbage.garbage_since.isoformat(timespec="seconds"),
        "objects": garbage.object_count,
        "bytes": garbage.size_bytes,
    }


def print_garbage_collection(collection: GarbageCollectionResult, deleted_table_title: str) -> None:
    """Print tables of deleted and retained garbage; `deleted_table_title` is the title of the first."""
    now = datetime.datetime.now(datetime.UTC)
    for title, garbage_items in (
        (deleted_table_title, collection.deleted),
        ("Left (too young, or in use)", collection.retained),
    ):
        if garbage_items:
            rows = [
                [
                    g.path,
                    g.reason,
                    format_hours_or_days(now - g.garbage_since),
                    str(g.object_count),
                    format_size(g.size_bytes),
                ]
                for g in garbage_items
            ]
            columns = ["path", "why", "age", "objects", "size"]
            total = format_size(sum(g.size_bytes for g in garbage_items))
            print_table(
                f"{title}: {len(garbage_items)}, {total}",
                columns,
                rows,
                right_aligned_heads={"age", "objects", "size"},
            )
    if not collection.deleted:
        print_line("nothing to delete")


def format_size(byte_count: int) -> str:
    """Return a number of bytes with a unit."""
    if byte_count < 2**10:
        return f"{byte_count} B"
    for unit, scale in (("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30)):
        if byte_count < 1024 * scale or unit == "GiB":
            return f"{byte_count / scale:.1f} {unit}"
    raise AssertionError(byte_count)


def format_hours_or_days(duration: datetime.timedelta) -> str:
    """Return a duration in hours or days."""
    hours = max(duration.total_seconds(), 0) / 3600
    return f"{hours / 24:.1f} d" if hours >= 48 else f"{hours:.1f} h"


def make_verdict_document(verdict: EntryVerdict) -> dict[str, Any]:
    """Return the document of a verdict for ``sfm store verify --json``."""
    return {
        "sound": verdict.is_sound,
        "readable": verdict.is_access_granted,
        "problems": verdict.problems,
        "commit": verdict.commit_path,
        "objects": verdict.object_count,
        "bytes": verdict.size_bytes,
        "summary": verdict.summary.model_dump(mode="json") if verdict.summary else None,
    }


def print_verdicts(title: str, verdicts: Sequence[EntryVerdict]) -> None:
    """Print a table of verdicts, then every problem."""
    rows = [
        [
            v.summary.dataset if v.summary else v.commit_path,
            v.summary.entry_digest[:12] if v.summary else "–",
            v.summary.backbone if v.summary else "–",
            str(v.summary.image_size) if v.summary else "–",
            v.summary.role if v.summary else "–",
            str(v.object_count),
            format_size(v.size_bytes),
            "sound" if v.is_sound else "DAMAGED" if v.is_access_granted else "not read",
        ]
        for v in verdicts
    ]
    columns = ["dataset", "digest", "backbone", "px", "role", "objects", "size", "verdict"]
    print_table(
        f"{title}: {len(rows)} entries checked", columns, rows, right_aligned_heads={"px", "objects", "size"}
    )
    for verdict in verdicts:
        for problem in verdict.problems:
            print_line(problem if verdict.is_access_granted else f"note: left out: {problem}")


def make_copy_document(result: CopyResult) -> dict[str, Any]:
    """Return the document of a copied entry for ``sfm store copy --json``."""
    return {
        "outcome": result.outcome,
        "detail": result.detail,
        "objects_written": result.written_object_count,
        "objects_found": result.existing_object_count,
        **result.summary.model_dump(mode="json"),
    }
