"""Sign what was changed, as a hostile writer would: digests are right again, contents are not."""

import json
from pathlib import Path
from typing import Any

from sfm.stats_store.digests import compute_sha256, encode_canonical_json


def is_small(file: Path) -> bool:
    """Say whether a path is a file that can be read: not a link, a pipe, or a huge one."""
    return file.is_file() and not file.is_symlink() and file.stat().st_size < 2**26


def encode_json(document: Any) -> bytes:
    """Return a document in the one spelling that digests are of; a hostile writer may spell NaN, too."""
    try:
        return encode_canonical_json(document)
    except ValueError:
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def make_object_record(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": compute_sha256(data)}


def seal_commit(commit: Any) -> bytes:
    """Return the bytes of a commit object: a commit and its own digest."""
    return json.dumps({"commit": commit, "sha256": compute_sha256(encode_json(commit))}).encode()


def record_objects(commit: dict[str, Any], run: Path) -> None:
    """Make a commit list the objects of its run as they are on the disk now."""
    files = filter(is_small, run.rglob("*"))
    commit["objects"] = {
        path.relative_to(run).as_posix(): make_object_record(path.read_bytes()) for path in files
    }


def sign_entry(commit: Any) -> None:
    """Make the entry digest follow from what the commit says, where it says anything."""
    try:
        summary = commit["summary"]
        content = {
            "arrays": commit["arrays"],
            "backbone": summary["backbone_hash"],
            "dataset": summary["fingerprint"],
            "options": summary["options"],
        }
        summary["entry_digest"] = compute_sha256(encode_json(content))
    except (KeyError, TypeError, IndexError):
        pass


def find_commit_path(commit: Any, root: Path, file: Path) -> Path:
    """Return where a commit says that it belongs; `file`, where it lies, if it says nothing of the kind."""
    try:
        s = commit["summary"]
        wanted = root / "index" / s["backbone_hash"] / s["fingerprint"] / s["options"]
        wanted = wanted / f"{s['generation']:08d}.json"
        inside = wanted.relative_to(root / "index").parts
    except (KeyError, TypeError, ValueError, IndexError):
        return file
    # Not even a test of path traversal writes outside of its folder; names have at most 255 bytes.
    if len(inside) != 4 or ".." in inside or any("\0" in part or len(part) > 200 for part in inside):
        return file
    return wanted if wanted.as_posix().isprintable() else file


def sign_checkpoint(folder: Path) -> None:
    """Make a checkpoint hold the digest of its tensors as they are now."""
    about, tensors = folder / "checkpoint.json", folder / "state.safetensors"
    if not is_small(about) or not is_small(tensors):
        return
    try:
        card = json.loads(about.read_bytes())
        card["sha256"] = compute_sha256(tensors.read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return
    about.write_text(json.dumps(card))
