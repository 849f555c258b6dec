"""Cases: which sound thing is changed how, which command meets it, and what must hold then."""

import json
import os
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from fuzz import mutations
from fuzz.hostile import NUMBERS, TEXTS, draw_value
from fuzz.mutations import InapplicableMutation, Json
from fuzz.seeds import DISTILLING, EVALUATING, EXTRACTING, MODES, Seeds, make_run_id
from fuzz.signing import find_commit_path, is_small, record_objects, seal_commit, sign_checkpoint, sign_entry
from fuzz.worker import MAX_MEMORY_GROWTH, Outcome, Worker

from sfm.stats_store.digests import compute_sha256

# -- the commands --------------------------------------------------------------------------------------------
# They run in a folder with what was changed as `evil`, a sound store as `good`, a sound run as `run`, and a
# folder `canary` that belongs to somebody else. `{b}` is the backbone, `{seeds}` the folder of sound things.

EXTRACT = ("extract", "{source}", "--store", "new", "--backbone", "{b}", *EXTRACTING[:4], "--threads", 1)
DISTILL = ("distill", "--backbone", "{b}", *DISTILLING, "--json")
EVALUATE = ("evaluate", "run", "--store", "good", *EVALUATING, "--json")
NEW = ("--out", "new", "--steps", 2)
MERGE = ("--name", "both", "--threads", 1)


ALL_MODE_OPTIONS = tuple(word for mode in MODES for word in ("--mode", mode))


def replace_words(words: tuple[Any, ...], **others: str) -> tuple[Any, ...]:
    """Return a command with other words at the places of some."""
    return tuple(others.get(word, word) if isinstance(word, str) else word for word in words)


def make_extract_command(source: str) -> tuple[Any, ...]:
    return tuple(source if word == "{source}" else word for word in EXTRACT)


FROM_EXTRACT = ("--config", "evil/extract.json")
FROM_DISTILL = ("--config", "evil/distill.json")
FROM_EVALUATE = ("--config", "evil/evaluate.json", *EVALUATING, "--out", "new")

COMMANDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "store": {
        "ls": ("store", "ls", "evil"),
        "ls json": ("store", "ls", "evil", "--json"),
        "show": ("store", "show", "evil", "birds"),
        "show json": ("store", "show", "evil", "fish", "--json"),
        "show history": ("store", "show", "evil", "fish", "--history"),
        "show history json": ("store", "show", "evil", "union", "--history", "--json"),
        "show per class": ("store", "show", "evil", "birds", "--per-class"),
        "verify": ("store", "verify", "evil"),
        "verify json": ("store", "verify", "evil", "--json"),
        "verify one": ("store", "verify", "evil", "--dataset", "birds"),
        "copy to new": ("store", "copy", "evil", "new"),
        "copy to good": ("store", "copy", "evil", "good"),
        "copy over good": ("store", "copy", "evil", "good", "--replace"),
        "merge": ("store", "merge", "new", "evil#birds", "evil#fish", *MERGE),
        "merge with good": ("store", "merge", "good", "evil#birds", "fish", *MERGE),
        "rm": ("store", "rm", "evil", "birds"),
        "rm all": ("store", "rm", "evil", "birds", "--all"),
        "gc dry": ("store", "gc", "evil", "--dry-run"),
        "gc": ("store", "gc", "evil", "--now"),
        "gc old": ("store", "gc", "evil", "--older-than", "0h", "--json"),
        "distill": (*DISTILL, "--store", "evil", "--out", "new"),
        "distill one": (*replace_words(DISTILL, birds="fish"), "--store", "evil", "--out", "new"),
        "evaluate": replace_words(EVALUATE, good="evil"),
        "report": ("report", "run", "--store", "evil", "--out", "new.html"),
        "export classifier": ("export", "run", "--format", "classifier", "--store", "evil", "--out", "new"),
        "export": ("export", "run", "--format", "imagefolder", "--store", "evil", "--out", "new"),
        "extract": (*replace_words(make_extract_command("folder:{seeds}/fish"), new="evil"), *EXTRACTING[4:]),
    },
    "run": {
        "evaluate": replace_words(EVALUATE, run="evil"),
        "report": ("report", "evil", "--store", "good", "--out", "new.html"),
        "report two": ("report", "run", "evil", "--out", "new.html"),
        "report evaluation": ("report", "run", "--evaluation", "evil/evaluation.json", "--out", "new.html"),
        "export folder": ("export", "evil", "--format", "imagefolder", "--out", "new"),
        "export shards": ("export", "evil", "--format", "webdataset", "--out", "new"),
        "export table": ("export", "evil", "--format", "parquet", "--out", "new", "--json"),
        "export classifier": ("export", "evil", "--format", "classifier", "--store", "good", "--out", "new"),
        "distill again": (*DISTILL, "--store", "good", "--out", "evil"),
        "resume": (*DISTILL, "--store", "good", "--out", "evil", "--resume"),
        "config": ("distill", "--config", "evil/run.json", "--store", "good", "--backbone", "{b}", *NEW),
        "config evaluate": (
            *("evaluate", "run", "--config", "evil/evaluation.json", "--store", "good"),
            *(*EVALUATING, "--out", "new"),
        ),
    },
    "stopped": {
        "resume": (*DISTILL, "--store", "good", "--out", "evil", "--resume"),
        "report": ("report", "evil", "--out", "new.html"),
    },
    "folder": {
        "extract": make_extract_command("folder:evil"),
        "skip": (*make_extract_command("folder:evil"), "--on-error", "skip"),
        "dry": (*make_extract_command("folder:evil"), "--dry-run"),
        "exemplars": (*make_extract_command("folder:evil"), "--exemplars", 2, "--limit-per-class", 2),
    },
    "shards": {
        "extract": make_extract_command("wds:evil"),
        "names": make_extract_command("wds:evil?names={seeds}/lists/names.txt"),
        "skip": (*make_extract_command("wds:evil"), "--on-error", "skip"),
        "dry": (*make_extract_command("wds:evil"), "--dry-run"),
    },
    "tables": {
        "extract": make_extract_command("parquet:evil"),
        "skip": (*make_extract_command("parquet:evil"), "--on-error", "skip", "--json"),
        "dry": (*make_extract_command("parquet:evil"), "--dry-run"),
    },
    "idx": {
        "extract": make_extract_command("idx:evil"),
        "dry": (*make_extract_command("idx:evil"), "--dry-run"),
    },
    "weights": {
        "safetensors": replace_words(
            make_extract_command("folder:{seeds}/folder"), **{"{b}": "timm/test_vit@evil/w.safetensors"}
        ),
        "torch": replace_words(
            make_extract_command("folder:{seeds}/folder"), **{"{b}": "timm/test_vit@evil/w.pth"}
        ),
        "distill": (
            *replace_words(DISTILL, **{"{b}": "timm/test_vit@evil/w.pth"}),
            "--store",
            "good",
            "--out",
            "new",
        ),
    },
    "config": {
        "extract": ("extract", "folder:{seeds}/folder", *FROM_EXTRACT, "--store", "new", "--backbone", "{b}"),
        "extract trusted": ("extract", *FROM_EXTRACT, "--store", "new", "--trust-config"),
        "extract only": ("extract", *FROM_EXTRACT),
        "distill": ("distill", *FROM_DISTILL, "--store", "good", "--backbone", "{b}", *NEW),
        "distill trusted": ("distill", *FROM_DISTILL, "--trust-config", "--store", "good", *NEW),
        "distill only": ("distill", *FROM_DISTILL, "--steps", 2),
        "evaluate": ("evaluate", "run", *FROM_EVALUATE, "--store", "good"),
        "evaluate trusted": ("evaluate", *FROM_EVALUATE, "--trust-config"),
        "report": ("report", "run", "--config", "evil/report.json", "--out", "new.html"),
        "report trusted": ("report", "--config", "evil/report.json", "--out", "new.html", "--trust-config"),
        "export": ("export", "run", "--config", "evil/export.json", "--out", "new"),
        "export trusted": ("export", "--config", "evil/export.json", "--out", "new", "--trust-config"),
    },
    "lists": {
        "distill": (*DISTILL, "--store", "good", "--out", "new", "--classes", "evil/classes.txt"),
        "names": make_extract_command("wds:{seeds}/shards?names=evil/names.txt"),
    },
    "half": {"evaluate": (*EVALUATE, *ALL_MODE_OPTIONS, "--out", "evil")},
    "staging": {"extract": (*make_extract_command("wds:{seeds}/shards"), *("--staging", "evil"))},
}

USES = {"good": "store", "run": "run"}
"""What else a command finds beside `evil`: copies of these."""

# -- drawing a case ------------------------------------------------------------------------------------------


def detect_file_kind(path: str) -> str:
    """Return what files of this kind have in common: drawing one kind comes before drawing one file."""
    parts = path.split("/")
    if parts[0] == "index":
        return "commit" if path.endswith(".json") else "mark"
    if parts[0] == "runs":
        if len(parts) <= 3:
            return "cards" if len(parts) == 3 else "group"
        return "chunk" if "c" in parts[4:] else ("metadata" if len(parts) == 5 else "group")
    return parts[0] if len(parts) > 1 and parts[0] in ("images", "growth", "checkpoint") else Path(path).name


WEIGHTS = {
    "commit": 6,
    "cards": 6,
    "metadata": 6,
    "chunk": 4,
    "run.json": 4,
    "evaluation.json": 4,
    "checkpoint": 4,
}
SUBJECTS = [*["store"] * 8, *["run"] * 5, *["stopped"] * 2, *["folder", "shards", "tables", "idx"], *COMMANDS]


def draw_integer(rng: Random) -> int:
    return rng.choice([n for n in NUMBERS if isinstance(n, int)])


def draw_scalar(rng: Random) -> Any:
    return rng.choice(TEXTS) if rng.random() < 0.6 else rng.choice([n for n in NUMBERS if n == n])


def draw_json(rng: Random, document: Any) -> Json:
    """Draw a change of a document."""
    every = mutations.list_json_paths(document)
    path = rng.choice(every)
    how = rng.choice(("set",) * 6 + ("take", "delete", "rename", "repeat"))
    change = {"how": how, "path": path}
    if how == "set":
        change["value"] = draw_value(rng, like=mutations.get_json_value(document, path))
    elif how == "take":
        change["from"] = rng.choice(every)
    elif how == "rename":
        change["value"] = rng.choice(TEXTS)
    return change


def draw_bytes(rng: Random) -> Json:
    """Draw a change of bytes, whatever they mean."""
    how = rng.choice(("flip", "flip", "cut", "remove", "extend", "clear", "splice", "number", "blob", "blob"))
    change: Json = {"kind": "bytes", "how": how, "at": rng.randrange(1001) / 1000}
    change["value"] = rng.choice((1, 4, 16, 200, 5000))
    if how in ("flip", "extend"):
        change["value"] = rng.randrange(1, 256)
    elif how == "splice":
        change["from"] = rng.randrange(1001) / 1000
    elif how == "number":
        change["format"] = rng.choice(("<I", ">I", "<Q", ">Q"))
        change["value"] = draw_integer(rng) % (2**32 if "I" in change["format"] else 2**64)
    elif how == "blob":
        change["value"] = rng.choice(sorted(mutations.BLOBS))
    return change


def draw_path(rng: Random) -> Json:
    return {"kind": "path", "how": rng.choice(mutations.PATHS), "up": rng.randrange(1, 5)}


def draw_png(rng: Random) -> Json:
    if rng.random() < 0.5:
        return {"kind": "png", "chunk": rng.choice(sorted(mutations.PNG_CHUNKS))}
    return {"kind": "png", "field": rng.choice(sorted(mutations.PNG)), "value": draw_integer(rng)}


def draw_tar(rng: Random) -> Json:
    if rng.random() < 0.3:
        key = rng.choice(
            ("size", "path", "linkpath", "mtime", "hdrcharset", "GNU.sparse.size", "GNU.sparse.map")
        )
        return {"kind": "pax", "type": rng.choice("xgXLKS"), "key": key, "value": draw_scalar(rng)}
    field = rng.choice((*sorted(mutations.TAR), "type", "size"))
    value = rng.choice("0123456789SLKxgXVMND\0") if field == "type" else draw_integer(rng)
    if field not in ("type", "size"):
        value = draw_scalar(rng)
    return {"kind": "tar", "member": rng.randrange(24), "field": field, "value": value}


def draw_parquet(rng: Random) -> Json:
    if rng.random() < 0.3:
        label = {"names": ["a", "b", "c"], "_type": "ClassLabel"}
        described = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
        return {"kind": "parquet", "metadata": draw_json(rng, described)}
    value = rng.choice((*mutations.BLOBS, *TEXTS, *NUMBERS, None, True))
    column = rng.choice(("image", "label"))
    whole_column = rng.random() < 0.5
    return {
        "kind": "parquet",
        "column": column,
        "row": rng.randrange(24),
        "all": whole_column,
        "value": value,
    }


def draw_idx(rng: Random) -> Json:
    return {"kind": "idx", "number": rng.randrange(4), "value": draw_integer(rng)}


def draw_lines(rng: Random) -> Json:
    how = rng.choice(("cell", "cell", "line", "repeat", "delete"))
    value = draw_scalar(rng) if rng.random() < 0.9 else {mutations.MAKE: "long text"}
    return {"kind": "lines", "how": how, "row": rng.randrange(9), "column": rng.randrange(9), "value": value}


def draw_pickle(rng: Random) -> Json:
    if rng.random() < 0.3:
        return {"kind": "pickle", "pickle": rng.choice(sorted(mutations.PICKLES))}
    return {"kind": "pickle", "number": rng.randrange(400), "value": draw_integer(rng)}


def draw_chunk(rng: Random) -> Json:
    if rng.random() < 0.5:
        return draw_bytes(rng) | {"crc": True}
    return {"kind": "blosc", "field": rng.choice(sorted(mutations.BLOSC)), "value": draw_integer(rng)}


def draw_array(rng: Random) -> Json:
    return {"kind": "array", "how": rng.choice(mutations.ARRAY_DAMAGE)}


BY_SUFFIX: dict[str, Callable[[Random], Json]] = {
    ".png": draw_png,
    ".tar": draw_tar,
    ".parquet": draw_parquet,
    ".txt": draw_lines,
    ".csv": draw_lines,
    ".pth": draw_pickle,
    "": draw_idx,
}


def get_signed_content(document: Any) -> Any:
    """Return what is changed of a document that holds a digest of something else: that."""
    if isinstance(document, dict) and "sha256" in document:
        if "commit" in document:
            return document["commit"]
        if "row" in document:
            return json.loads(document["row"])
    return document


@dataclass(frozen=True)
class Site:
    """A file that may be changed: its name in cases, its kind, and its JSON, if it holds any."""

    name: str
    kind: str
    suffix: str
    document: Any

    def draw(self, rng: Random) -> Json:
        """Draw a mutation of the file: mostly one that keeps to its format, but for one thing."""
        if rng.random() < 0.2:
            return draw_path(rng) if rng.random() < 0.4 else draw_bytes(rng)
        if self.kind == "chunk":
            return draw_chunk(rng)
        if self.kind == "metadata" and rng.random() < 0.6:
            return draw_array(rng)
        if self.suffix == ".safetensors" and rng.random() < 0.2:
            return {"kind": "safetensors", "how": "length", "value": draw_integer(rng)}
        if self.document is not None:
            return {"kind": self.suffix[1:]} | draw_json(rng, self.document)
        return BY_SUFFIX.get(self.suffix, draw_bytes)(rng)


def find_sites(seeds: Seeds, subject: str) -> list[list[Site]]:
    """Return the files of a subject by kind; kinds that matter more come several times."""
    known = {path: name for name, path in seeds.commits.items()} if subject == "store" else {}
    root, found = seeds.root / subject, dict[str, list[Site]]()
    for file in sorted(root.rglob("*")):
        path = file.relative_to(root).as_posix()
        if not file.is_file() or path.endswith(".lock"):
            continue
        document = None
        if file.suffix == ".json":
            document = get_signed_content(json.loads(file.read_bytes()))
        elif file.suffix == ".safetensors":
            data = file.read_bytes()
            document = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        site = Site(known.get(path, path), detect_file_kind(path), file.suffix, document)
        found.setdefault(site.kind, []).append(site)
    return [sites for kind, sites in sorted(found.items()) for _ in range(WEIGHTS.get(kind, 1))]


class Cases:
    """Draws cases; equal states of the random numbers give equal cases."""

    def __init__(self, seeds: Seeds) -> None:
        self.sites = {subject: find_sites(seeds, subject) for subject in COMMANDS}

    def draw(self, rng: Random) -> Json:
        """Draw a case: one to three mutations of a subject, and the command that meets it."""
        subject = rng.choice(SUBJECTS)
        command = rng.choice(sorted(COMMANDS[subject]))
        words = " ".join(map(str, COMMANDS[subject][command]))
        met = [[site] for kind in self.sites[subject] for site in kind if f"evil/{site.name}" in words]
        found = []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            sites = rng.choice(met or self.sites[subject])
            if subject == "store" and "gc" not in command and rng.random() < 0.85:
                # Of the entry that the command is about.
                own = "fish-2" if " fish " in f"{words} " else "birds-1"
                sites = [
                    s for s in sites if s.name.startswith((f"commit/{own}", f"runs/{make_run_id(own)}"))
                ] or sites
            site = rng.choice(sites)
            found.append({"file": site.name} | site.draw(rng))
        return {"subject": subject, "command": command, "signed": rng.random() < 2 / 3, "mutations": found}


# -- running a case ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What a case showed that must not be.

    Attributes
    ----------
    kind : str
        Equal for what is most likely one fault.
    detail : str
    """

    kind: str
    detail: str


def prepare_case(case: Json, seeds: Seeds, folder: Path) -> list[str]:
    """Lay out the folder of a case; return the words of its command."""
    (folder / "canary" / "train").mkdir(parents=True)
    (folder / "canary" / "mine").write_bytes(b"somebody's\n")
    (folder / "canary" / "train" / "mine.json").write_bytes(b"{}")
    subject = case["subject"]
    copy_seed_files(seeds.root / subject, folder / "evil")
    words = [str(word) for word in COMMANDS[subject][case["command"]]]
    for name, seed in USES.items():
        if any(word == name for word in words):
            copy_seed_files(seeds.root / seed, folder / name)
    apply_mutations(case, seeds, folder / "evil")
    return [w.replace("{b}", seeds.backbone).replace("{seeds}", str(seeds.root)) for w in words]


def copy_seed_files(sound: Path, target: Path) -> None:
    """Copy a sound thing; of a store, whose objects nobody may ever overwrite, links will do."""
    shutil.copytree(sound, target, copy_function=os.link if sound.name == "store" else shutil.copy2)


def replace_file(file: Path, data: bytes) -> None:
    """Write a file that may be a link to a sound one."""
    file.unlink(missing_ok=True)
    file.write_bytes(data)


def apply_mutations(case: Json, seeds: Seeds, evil: Path) -> None:
    """Apply the mutations of a case, and sign what they left if the case says so."""
    store = case["subject"] == "store"
    names = seeds.commits if store else {}
    # Commits come last: they hold the digests of all else. What is no file any more cannot be changed.
    ordered = sorted(case["mutations"], key=lambda m: (m["file"] in names, m["kind"] == "path"))
    met = set[str]()
    for mutation in ordered:
        file = evil / names.get(mutation["file"], mutation["file"])
        again = mutation["file"] in met or any(m["kind"] in ("array", "path") for m in ordered[:-1])
        met.add(mutation["file"])
        if mutation["kind"] == "array":
            mutations.apply_mutation(file.parent, mutation, again)
            digest_array(evil, file.parent, seeds)
        elif mutation["file"] in names and mutation["kind"] == "json":
            try:
                commit = mutations.change_json(load_json(file)["commit"], mutation)
            except (InapplicableMutation, KeyError, TypeError):
                if not again:
                    raise
                continue
            replace_file(file, mutations.encode_hostile_json({"commit": commit, "sha256": "0" * 64}))
        elif case["subject"] == "half" and mutation["kind"] == "json" and not again:
            row = mutations.encode_hostile_json(
                mutations.change_json(get_signed_content(load_json(file)), mutation)
            ).decode()
            digest = compute_sha256(row.encode()) if case["signed"] else "0" * 64
            replace_file(file, json.dumps(load_json(file) | {"row": row, "sha256": digest}).encode())
        else:
            mutations.apply_mutation(file, mutation, again)
        if case["signed"] and store and mutation["file"] not in names:
            record_run(evil, mutation["file"], seeds)
    if case["signed"] and store:
        for name in {m["file"] for m in case["mutations"]} | set(names):
            if name in names:
                sign_commit(evil, evil / names[name], move=any(m["file"] == name for m in case["mutations"]))
    if case["signed"] and case["subject"] in ("run", "stopped"):
        for saved in evil.glob("checkpoint/step_*"):
            sign_checkpoint(saved)


def load_json(file: Path) -> Any:
    """Read the JSON of a file that may be anything by now."""
    if not is_small(file):
        return None
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None


def find_commits(evil: Path, name: str, seeds: Seeds) -> Iterator[tuple[Path, Json]]:
    """Yield the commits of the run that a file of a store belongs to."""
    parts = name.split("/")
    for path in seeds.commits.values():
        document = load_json(evil / path)
        commit = document.get("commit") if isinstance(document, dict) else None
        if isinstance(commit, dict) and len(parts) > 2 and commit.get("run") == parts[1]:
            yield evil / path, commit


def record_run(evil: Path, name: str, seeds: Seeds) -> None:
    """Make the commits of a run list its objects as they are."""
    for file, commit in find_commits(evil, name, seeds):
        run = evil / "runs" / name.split("/")[1]
        if not run.is_symlink():
            record_objects(commit, run)
            replace_file(file, seal_commit(commit))


def digest_array(evil: Path, folder: Path, seeds: Seeds) -> None:
    """Make the commit of an array hold the digest of its values as they are."""
    import zarr

    from sfm.stats_store.digests import compute_array_digest

    array = zarr.open_array(folder, mode="r", zarr_format=3)
    name = folder.relative_to(evil).as_posix()
    for file, commit in find_commits(evil, name, seeds):
        with_rows = array[...] if array.ndim else None
        if with_rows is not None and with_rows.dtype.kind != "M":
            commit["arrays"]["/".join(name.split("/")[2:])] = compute_array_digest(with_rows)
            replace_file(file, seal_commit(commit))


def sign_commit(evil: Path, file: Path, move: bool) -> None:
    """Sign a commit, and put it where it says that it belongs."""
    document = load_json(file)
    if not isinstance(document, dict) or "commit" not in document:
        return
    commit = document["commit"]
    sign_entry(commit)
    target = find_commit_path(commit, evil, file) if move else file
    replace_file(file, seal_commit(commit))
    if target != file:
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
        target.with_suffix(".published").touch()
        file.with_suffix(".published").unlink(missing_ok=True)


def snapshot_files(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Return what tells whether a file below a folder was changed or replaced, for every file and link."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink() or path.is_file():
            state = path.lstat()
            found[path.relative_to(folder).as_posix()] = (state.st_ino, state.st_size, state.st_mtime_ns)
    return found


def snapshot_untouched_entries(case: Json, seeds: Seeds, evil: Path) -> dict[str, tuple[Any, ...]]:
    """Return the objects of current entries of a store whose key nobody touched: they are somebody's."""
    touched = [mutation["file"] for mutation in case["mutations"]]
    if case["subject"] != "store" or any(not t.startswith(("commit/", "runs/")) for t in touched):
        return {}
    kept: dict[str, tuple[Any, ...]] = {}
    for name in ("birds-1", "birds-tuning-1", "fish-2"):
        run = load_json(seeds.path("store", f"commit/{name}"))["commit"]["run"]
        changed = (f"commit/{name.rpartition('-')[0]}-", f"runs/{run}/")
        if not any(t.startswith(changed) for t in touched):
            kept |= {
                f"runs/{run}/{path}": state for path, state in snapshot_files(evil / "runs" / run).items()
            }
    return kept


def run_case(case: Json, seeds: Seeds, worker: Worker, folder: Path) -> tuple[list[Problem], Outcome]:
    """Run a case in an empty folder; return what must not be."""
    words = prepare_case(case, seeds, folder)
    canary, evil = snapshot_files(folder / "canary"), folder / "evil"
    good = snapshot_files(folder / "good") if (folder / "good").exists() else {}
    theirs = snapshot_untouched_entries(case, seeds, evil)
    outcome = worker(words, folder)
    found = list(find_outcome_problems(outcome, as_json="--json" in words))
    if snapshot_files(folder / "canary") != canary:
        found.append(Problem("canary", "the folder of somebody else was changed"))
    after = snapshot_files(folder / "good") if good else {}
    changed = [path for path, state in good.items() if after.get(path) != state]
    if changed:
        found.append(Problem("victim: good store", f"{changed[:3]} of the sound store are changed or gone"))
    if theirs:
        left = snapshot_files(evil)
        lost = [path for path, state in theirs.items() if left.get(path) != state]
        if lost:
            found.append(
                Problem("victim: other entries", f"{lost[:3]} of entries in use are changed or gone")
            )
    target = {"copy": words[-1], "merge": words[2]}.get(words[1]) if words[0] == "store" else None
    if words[-1] == "--replace":
        target = words[-2]
    if target and words[1] in ("copy", "merge") and (folder / target / "zarr.json").is_file():
        checked = worker(["store", "verify", target], folder)
        if checked.status != 0:
            told = checked.err.strip().splitlines()[-1:] or [""]
            found.append(
                Problem("unsound target", f"verify of {target} afterwards: {checked.status} {told[0]}")
            )
    found += find_output_problems(folder / "new")
    return found, outcome


def find_outcome_problems(outcome: Outcome, as_json: bool) -> Iterator[Problem]:
    """Yield what must not be about how a command ended and what it printed."""
    lines = outcome.err.splitlines()
    if outcome.exception or "Traceback (most recent call last)" in outcome.err + outcome.out:
        told = next((line for line in reversed(lines) if line and not line.startswith(" ")), "")
        yield Problem(outcome.exception or "traceback printed", told[:300])
    elif outcome.status is None:
        yield Problem("timeout", f"{outcome.seconds:.0f} s")
    elif outcome.status not in (0, 1, 2):
        yield Problem(f"status {outcome.status}", outcome.err[-300:])
    elif outcome.status:
        errors = [line for line in lines if line.startswith("error: ")]
        if len(errors) != 1 or lines[-1] != errors[0]:
            yield Problem("not one error line", outcome.err[-300:])
        elif len(errors[0]) > 2000:
            yield Problem("long error line", f"{len(errors[0])} characters: {errors[0][:200]}")
    if any("Warning" in line and ".py:" in line for line in lines):
        line = next(line for line in lines if "Warning" in line)
        where = line.split(".py:")[0].rpartition("site-packages/")[2]
        yield Problem(f"warning printed by {where}", line[:300])
    if outcome.growth > MAX_MEMORY_GROWTH:
        yield Problem("memory", f"{outcome.growth >> 20} MiB more than at the start")
    bad = sorted({c for c in outcome.out + outcome.err if c != "\n" and not is_printable(c)})
    if bad and not outcome.exception:
        yield Problem("control characters", ascii("".join(bad)))
    if as_json and outcome.status == 0:
        try:
            json.loads(outcome.out, parse_constant=reject_constant)
        except ValueError as error:
            yield Problem("--json is no JSON", str(error))


def reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def is_printable(character: str) -> bool:
    """Say whether a character neither moves the cursor nor turns the writing direction."""
    return character in "\u200c\u200d" or unicodedata.category(character) not in (
        "Cc",
        "Cf",
        "Cs",
        "Zl",
        "Zp",
    )


def find_output_problems(folder: Path) -> Iterator[Problem]:
    """Yield what must not be in the cards and the page that were written."""
    for file in sorted(folder.glob("*.md")) if folder.is_dir() else ():
        text = file.read_text(encoding="utf-8", errors="surrogateescape")
        bad = sorted({c for c in text if c != "\n" and not is_printable(c)})
        if bad:
            yield Problem("control characters in a card", ascii("".join(bad)))
    page = folder.with_suffix(".html")
    if page.is_file() and "<script>alert(1)" in page.read_text(encoding="utf-8"):
        yield Problem("script in a page", "a name is not escaped")
