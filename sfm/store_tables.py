"""What a person, or a script, sees of a store: entries, their history, and what became of them."""

import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sfm.stats_store.collect import Collection
from sfm.stats_store.copying import Copied
from sfm.stats_store.garbage import Garbage
from sfm.stats_store.history import Generation
from sfm.stats_store.schema import is_known
from sfm.stats_store.store import Entry
from sfm.stats_store.verify import Verdict
from sfm.tables import print_table
from sfm.terminal import fit_to_line, open_console, print_line
from sfm.text import format_percent


def entry_document(entry: Entry) -> dict[str, Any]:
    """Return all that ``sfm store show`` shows of an entry."""
    stored_bytes = bytes_by_array(entry)
    arrays = {name: array_document(entry, name, stored_bytes[name]) for name in entry.names()}
    known = [a for a in arrays.values() if a["bytes"] is not None]
    whole, stored = sum(a["bytes"] for a in known), sum(a["stored_bytes"] for a in known)
    return {
        "summary": entry.summary.model_dump(mode="json"),
        "backbone": entry.backbone.model_dump(mode="json"),
        "dataset": entry.dataset.model_dump(mode="json", exclude={"class_ids", "class_names"}),
        "extraction": entry.extraction.model_dump(mode="json"),
        "classifier": entry.classifier.model_dump(mode="json"),
        "classes": class_documents(entry),
        "arrays": arrays,
        "run": entry.commit.run,
        "bytes": whole,
        "stored_bytes": sum(record.size for record in entry.commit.objects.values()),
        "compression_ratio": whole / stored if stored else None,
    }


def class_documents(entry: Entry) -> list[dict[str, Any]]:
    """Return id, name and number of samples of every class; of held-out ones only where labels are stored."""
    ids, train = entry.dataset.class_ids, entry.read("train/count").tolist()
    held: list[int] | list[None] = [None] * len(ids)
    if "test/label" in entry:
        held = np.bincount(entry.read("test/label"), minlength=len(ids)).tolist()
    return [
        {"class_id": class_id, "name": name, "train_samples": count, "test_samples": test}
        for class_id, name, count, test in zip(ids, entry.dataset.class_names, train, held, strict=True)
    ]


def add_accuracies(document: dict[str, Any], shares: npt.NDArray[np.float64] | None) -> None:
    """Add the held-out accuracy of every class to what is shown of an entry; None where there is none."""
    for place, one in enumerate(document["classes"]):
        known = shares is not None and np.isfinite(shares[place])
        one["held_out_top1"] = float(shares[place]) if shares is not None and known else None


def worst_first(classes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Order classes by their held-out accuracy, if it was asked for; those without one come last."""
    return sorted(classes, key=lambda c: (c.get("held_out_top1") is None, c.get("held_out_top1") or 0.0))


def bytes_by_array(entry: Entry) -> dict[str, int]:
    """Return the stored size of every array, metadata included."""
    found = dict.fromkeys(entry.names(), 0)
    for path, record in entry.commit.objects.items():
        name = path.removesuffix("/zarr.json").partition("/c/")[0]
        if name in found:
            found[name] += record.size
    return found


def array_document(entry: Entry, name: str, stored: int) -> dict[str, Any]:
    """Return shape, type and sizes of an array; an array of a later schema is not opened."""
    if not is_known(name):
        return {
            "shape": None,
            "dtype": None,
            "bytes": None,
            "stored_bytes": stored,
            "compression_ratio": None,
        }
    array = entry.array(name)
    return {
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "bytes": int(array.nbytes),
        "stored_bytes": stored,
        "compression_ratio": array.nbytes / stored,
    }


def print_entry(document: dict[str, Any], most: int = 30) -> None:
    """Print an entry for a person: its cards, classes and arrays."""
    summary = document["summary"]
    console = open_console()
    pinned = f"{summary['dataset']}@{summary['entry_digest'][:12]}"
    console.print(fit_to_line(pinned, console), style="bold", soft_wrap=True)
    for card in ("dataset", "backbone", "extraction", "classifier"):
        console.print(card, style="bold")
        for name, value in document[card].items():
            console.print(fit_to_line(f"  {name}: {value}", console), soft_wrap=True)
    classes = worst_first(document["classes"])
    asked = any("held_out_top1" in c for c in classes)
    print_table(
        f"{len(classes)} classes" + (f" (the first {most})" if len(classes) > most else ""),
        ["id", "name", "train", "held out", *(["top-1 %"] if asked else [])],
        [
            [
                c["class_id"],
                c["name"],
                str(c["train_samples"]),
                "–" if c["test_samples"] is None else str(c["test_samples"]),
                *([format_percent(c["held_out_top1"])] if asked else []),
            ]
            for c in classes[:most]
        ],
        right_aligned={"train", "held out", "top-1 %"},
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
            for name, a in document["arrays"].items()
        ],
        right_aligned={"KiB", "stored KiB", "ratio"},
    )
    ratio = document["compression_ratio"]
    print_line(
        f"{size(document['stored_bytes'])} stored" + (f", compression ratio {ratio:.2f}" if ratio else "")
    )


def generation_document(generation: Generation) -> dict[str, Any]:
    """Return what ``sfm store show --history --json`` shows of one commit."""
    commit, summary = generation.commit, generation.summary
    return {
        "key": generation.key,
        "generation": generation.number,
        "state": generation.state,
        "run": commit.run if commit and commit.kind == "entry" else None,
        "stored_bytes": generation.stored_bytes,
        "problem": generation.problem,
        "summary": summary.model_dump(mode="json") if summary else None,
    }


def print_history(title: str, history: Sequence[Generation]) -> None:
    """Print commits, oldest first within each key."""
    rows = []
    for g in history:
        s = g.summary
        rows.append(
            [
                s.dataset if s else "–",
                s.backbone if s else "–",
                str(s.image_size) if s else "–",
                s.role if s else "–",
                g.key.rpartition("/")[2][:12],
                str(g.number),
                g.state,
                s.created if s else "–",
                s.entry_digest[:12] if s else "–",
                size(g.stored_bytes),
            ]
        )
    columns = [
        *("dataset", "backbone", "px", "role", "options", "generation"),
        *("state", "committed", "digest", "stored"),
    ]
    print_table(title, columns, rows, right_aligned={"px", "generation", "stored"})


def garbage_document(garbage: Garbage) -> dict[str, Any]:
    """Return what ``sfm store gc --json`` shows of one piece of garbage."""
    return {
        "path": garbage.path,
        "reason": garbage.reason,
        "since": garbage.since.isoformat(timespec="seconds"),
        "objects": garbage.objects,
        "bytes": garbage.size,
    }


def print_collection(collection: Collection, verb: str) -> None:
    """Print what was deleted, or would be, and what was left."""
    now = datetime.datetime.now(datetime.UTC)
    for title, found in ((verb, collection.deleted), ("Left (too young, or in use)", collection.kept)):
        if found:
            rows = [[g.path, g.reason, age(now - g.since), str(g.objects), size(g.size)] for g in found]
            columns = ["path", "why", "age", "objects", "size"]
            total = size(sum(g.size for g in found))
            print_table(
                f"{title}: {len(found)}, {total}", columns, rows, right_aligned={"age", "objects", "size"}
            )
    if not collection.deleted:
        print_line("nothing to delete")


def size(number: int) -> str:
    """Return a number of bytes for a person."""
    if number < 2**10:
        return f"{number} B"
    for unit, scale in (("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30)):
        if number < 1024 * scale or unit == "GiB":
            return f"{number / scale:.1f} {unit}"
    raise AssertionError(number)


def age(duration: datetime.timedelta) -> str:
    """Return a duration for a person."""
    hours = max(duration.total_seconds(), 0) / 3600
    return f"{hours / 24:.1f} d" if hours >= 48 else f"{hours:.1f} h"


def verdict_document(verdict: Verdict) -> dict[str, Any]:
    """Return what ``sfm store verify --json`` shows of one entry."""
    return {
        "sound": verdict.sound,
        "readable": verdict.readable,
        "problems": verdict.problems,
        "commit": verdict.commit,
        "objects": verdict.objects,
        "bytes": verdict.size,
        "summary": verdict.summary.model_dump(mode="json") if verdict.summary else None,
    }


def print_verdicts(title: str, verdicts: Sequence[Verdict]) -> None:
    """Print one line per entry, then every problem."""
    rows = [
        [
            v.summary.dataset if v.summary else v.commit,
            v.summary.entry_digest[:12] if v.summary else "–",
            v.summary.backbone if v.summary else "–",
            str(v.summary.image_size) if v.summary else "–",
            v.summary.role if v.summary else "–",
            str(v.objects),
            size(v.size),
            "sound" if v.sound else "DAMAGED" if v.readable else "not read",
        ]
        for v in verdicts
    ]
    columns = ["dataset", "digest", "backbone", "px", "role", "objects", "size", "verdict"]
    print_table(
        f"{title}: {len(rows)} entries checked", columns, rows, right_aligned={"px", "objects", "size"}
    )
    for verdict in verdicts:
        for problem in verdict.problems:
            print_line(problem if verdict.readable else f"note: left out: {problem}")


def copied_document(copied: Copied) -> dict[str, Any]:
    """Return what ``sfm store copy --json`` shows of one entry."""
    return {
        "outcome": copied.outcome,
        "detail": copied.detail,
        "objects_written": copied.written,
        "objects_found": copied.found,
        **copied.summary.model_dump(mode="json"),
    }
