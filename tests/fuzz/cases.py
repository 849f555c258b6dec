"""Cases: which sound thing is changed how, which command meets it, and what must hold then."""

import hashlib
import json
import shutil
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from fuzz import mutations
from fuzz.hostile import NUMBERS, TEXTS, values
from fuzz.mutations import Json, Stale
from fuzz.seeds import DISTILLING, EVALUATING, EXTRACTING, Seeds
from fuzz.signing import place, record_objects, sealed, sign_checkpoint, sign_entry
from fuzz.worker import GROWTH, Outcome, Worker

# -- the commands --------------------------------------------------------------------------------------------
# They run in a folder with what was changed as `evil`, a sound store as `good`, a sound run as `run`, and a
# folder `canary` that belongs to somebody else. `{b}` is the backbone, `{seeds}` the folder of sound things.

EXTRACT = ("extract", "{source}", "--store", "new", "--backbone", "{b}", *EXTRACTING[:4], "--threads", 1)
DISTILL = ("distill", "--backbone", "{b}", *DISTILLING, "--json")
EVALUATE = ("evaluate", "run", "--store", "good", *EVALUATING, "--json")
MERGE = ("--name", "both", "--threads", 1)


def swapped(words: tuple[Any, ...], **others: str) -> tuple[Any, ...]:
    """Return a command with other words at the places of some."""
    return tuple(others.get(word, word) if isinstance(word, str) else word for word in words)


def extracting(source: str) -> tuple[Any, ...]:
    return tuple(source if word == "{source}" else word for word in EXTRACT)


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
        "distill one": (*swapped(DISTILL, birds="fish"), "--store", "evil", "--out", "new"),
        "evaluate": swapped(EVALUATE, good="evil"),
        "report": ("report", "run", "--store", "evil", "--out", "new.html"),
        "export classifier": ("export", "run", "--format", "classifier", "--store", "evil", "--out", "new"),
        "export": ("export", "run", "--format", "imagefolder", "--store", "evil", "--out", "new"),
        "extract": (*swapped(extracting("folder:{seeds}/fish"), new="evil"), *EXTRACTING[4:]),
    },
    "run": {
        "evaluate": swapped(EVALUATE, run="evil"),
        "report": ("report", "evil", "--store", "good", "--out", "new.html"),
        "report two": ("report", "run", "evil", "--out", "new.html"),
        "report evaluation": ("report", "run", "--evaluation", "evil/evaluation.json", "--out", "new.html"),
        "export folder": ("export", "evil", "--format", "imagefolder", "--out", "new"),
        "export shards": ("export", "evil", "--format", "webdataset", "--out", "new"),
        "export table": ("export", "evil", "--format", "parquet", "--out", "new", "--json"),
        "export classifier": ("export", "evil", "--format", "classifier", "--store", "good", "--out", "new"),
        "distill again": (*DISTILL, "--store", "good", "--out", "evil"),
        "resume": (*DISTILL, "--store", "good", "--out", "evil", "--resume"),
        "config": ("distill", "--config", "evil/run.json", "--store", "good", "--out", "new", "--steps", 2),
        "config evaluate": ("evaluate", "--config", "evil/evaluation.json", *EVALUATING, "--out", "new"),
    },
    "stopped": {
        "resume": (*DISTILL, "--store", "good", "--out", "evil", "--resume"),
        "distill again": (*DISTILL, "--store", "good", "--out", "evil"),
        "report": ("report", "evil", "--out", "new.html"),
    },
    "folder": {
        "extract": extracting("folder:evil"),
        "skip": (*extracting("folder:evil"), "--on-error", "skip"),
        "dry": (*extracting("folder:evil"), "--dry-run"),
        "exemplars": (*extracting("folder:evil"), "--exemplars", 2, "--limit-per-class", 2),
    },
    "shards": {
        "extract": extracting("wds:evil"),
        "names": extracting("wds:evil?names={seeds}/lists/names.txt"),
        "skip": (*extracting("wds:evil"), "--on-error", "skip"),
        "dry": (*extracting("wds:evil"), "--dry-run"),
    },
    "tables": {
        "extract": extracting("parquet:evil"),
        "skip": (*extracting("parquet:evil"), "--on-error", "skip", "--json"),
        "dry": (*extracting("parquet:evil"), "--dry-run"),
    },
    "idx": {"extract": extracting("idx:evil"), "dry": (*extracting("idx:evil"), "--dry-run")},
    "weights": {
        "safetensors": swapped(extracting("folder:{seeds}/folder"), **{"{b}": "timm/test_vit@evil/w.safetensors"}),
        "torch": swapped(extracting("folder:{seeds}/folder"), **{"{b}": "timm/test_vit@evil/w.pth"}),
        "distill": (*swapped(DISTILL, **{"{b}": "timm/test_vit@evil/w.pth"}), "--store", "good", "--out", "new"),
    },
    "config": {
        "extract": ("extract", "--config", "evil/extract.json", "--store", "new"),
        "extract only": ("extract", "--config", "evil/extract.json"),
        "distill": ("distill", "--config", "evil/distill.json", "--store", "good", "--out", "new", "--steps", 2),
        "distill only": ("distill", "--config", "evil/distill.json", "--steps", 2),
        "evaluate": ("evaluate", "--config", "evil/evaluate.json", *EVALUATING[:8], "--out", "new"),
        "report": ("report", "--config", "evil/report.json", "--out", "new.html"),
        "export": ("export", "--config", "evil/export.json", "--out", "new"),
    },
    "lists": {
        "distill": (*DISTILL, "--store", "good", "--out", "new", "--classes", "evil/classes.txt"),
        "names": extracting("wds:{seeds}/shards?names=evil/names.txt"),
    },
    "staging": {
        "extract": (
            *extracting("wds:{seeds}/shards"),
            *("--staging", "evil"),
        ),
    },
}

USES = {"good": "store", "run": "run"}
"""What else a command finds beside `evil`: copies of these."""

# -- drawing a case ------------------------------------------------------------------------------------------


def names_of(seeds: Seeds, subject: str) -> dict[str, list[str]]:
    """Return the files of a subject by kind, under names that are the same in every session."""
    known = {path: name for name, path in seeds.commits.items()} if subject == "store" else {}
    root, kinds = seeds.root / subject, dict[str, list[str]]()
    for file in sorted(root.rglob("*")):
        path = file.relative_to(root).as_posix()
        if file.is_file() and not path.endswith(".lock"):
            kinds.setdefault(kind_of(path), []).append(known.get(path, path))
    return kinds


def kind_of(path: str) -> str:
    """Return what files of this kind have in common: drawing one kind comes before drawing one file."""
    parts = path.split("/")
    if parts[0] == "index":
        return "commit" if path.endswith(".json") else "mark"
    if parts[0] == "runs":
        if len(parts) <= 3:
            return "cards" if len(parts) == 3 else "group"
        return "chunk" if "c" in parts[4:] else ("metadata" if len(parts) == 5 else "group")
    return parts[0] if len(parts) > 1 and parts[0] in ("images", "growth", "checkpoint") else Path(path).suffix


def json_changes(document: Any) -> "st.SearchStrategy[Json]":
    """Return strategies for a change of a document."""
    at = st.sampled_from(mutations.paths(document))
    return st.one_of(
        *[st.fixed_dictionaries({"how": st.just("set"), "path": at, "value": values()})] * 4,
        st.fixed_dictionaries({"how": st.just("take"), "path": at, "from": at}),
        st.fixed_dictionaries({"how": st.just("delete"), "path": at}),
        st.fixed_dictionaries({"how": st.just("rename"), "path": at, "value": st.sampled_from(TEXTS)}),
        st.fixed_dictionaries({"how": st.just("repeat"), "path": at}),
    )


SHARE = st.integers(0, 1000).map(lambda n: n / 1000)
SPAN = st.sampled_from((1, 4, 16, 200, 5000))
WHOLE = st.sampled_from([n for n in NUMBERS if isinstance(n, int)])
SCALAR = st.sampled_from((*TEXTS, *(n for n in NUMBERS if n == n)))


def kinds(**fields: Any) -> "st.SearchStrategy[Json]":
    """Return a strategy of mutations; fields that are no strategies are the same in all."""
    return st.fixed_dictionaries(
        {name: f if isinstance(f, st.SearchStrategy) else st.just(f) for name, f in fields.items()}
    )


BYTES = st.one_of(
    *[kinds(kind="bytes", how="flip", at=SHARE, value=st.integers(1, 255))] * 2,
    kinds(kind="bytes", how="cut", at=SHARE),
    kinds(kind="bytes", how="remove", at=SHARE, value=SPAN),
    kinds(kind="bytes", how="extend", value=st.integers(0, 255)),
    kinds(kind="bytes", how="clear", at=SHARE, value=SPAN),
    kinds(kind="bytes", how="splice", at=SHARE, value=SPAN, **{"from": SHARE}),
    kinds(kind="bytes", how="number", at=SHARE, format=st.sampled_from(("<I", ">I")), value=WHOLE.map(lambda n: n % 2**32)),
    kinds(kind="bytes", how="number", at=SHARE, format=st.sampled_from(("<Q", ">Q")), value=WHOLE.map(lambda n: n % 2**64)),
    *[kinds(kind="bytes", how="blob", value=st.sampled_from(sorted(mutations.BLOBS)))] * 2,
)

PATHS = kinds(
    kind="path",
    how=st.sampled_from(
        ("gone", "link folder", "link file", "link itself", "link parent", "link zeros", "pipe", "folder", "huge")
    ),
)

CONTAINERS: dict[str, "st.SearchStrategy[Json]"] = {
    "png": st.one_of(
        kinds(kind="png", field=st.sampled_from(sorted(mutations.PNG)), value=WHOLE),
        kinds(kind="png", chunk=st.sampled_from(sorted(mutations.PNG_CHUNKS))),
    ),
    "tar": st.one_of(
        kinds(kind="tar", member=st.integers(0, 11), field=st.sampled_from(sorted(mutations.TAR)), value=SCALAR),
        kinds(kind="tar", member=st.integers(0, 11), field=st.just("type"), value=st.sampled_from([*"0123456789SLKxgXVMND\0"])),
        kinds(kind="tar", member=st.integers(0, 11), field=st.just("size"), value=WHOLE),
        kinds(
            kind="pax",
            type=st.sampled_from("xgXLKS"),
            key=st.sampled_from(("size", "path", "linkpath", "mtime", "GNU.sparse.size", "GNU.sparse.map", "GNU.sparse.major", "GNU.sparse.realsize", "hdrcharset", "")),
            value=SCALAR,
        ),
    ),
    "parquet": st.one_of(
        kinds(kind="parquet", column=st.sampled_from(("image", "label")), row=st.integers(0, 11), all=st.booleans(), value=st.sampled_from((*mutations.BLOBS, *TEXTS, *NUMBERS, None, True))),
        kinds(kind="parquet", group=st.just(1), column=st.just("label"), row=st.integers(0, 11), value=WHOLE),
    ),
    "idx": kinds(kind="idx", number=st.integers(0, 3), value=WHOLE),
    "lines": st.one_of(
        kinds(kind="lines", how="cell", row=st.integers(0, 9), column=st.integers(0, 9), value=SCALAR | st.sampled_from(({mutations.MAKE: "long text"},))),
        kinds(kind="lines", how="line", row=st.integers(0, 9), value=SCALAR | st.sampled_from(({mutations.MAKE: "long text"},))),
        kinds(kind="lines", how=st.sampled_from(("repeat", "delete")), row=st.integers(0, 9)),
    ),
    "pickle": st.one_of(
        kinds(kind="pickle", pickle=st.sampled_from(sorted(mutations.PICKLES))),
        kinds(kind="pickle", number=st.integers(0, 400), value=WHOLE),
    ),
    "blosc": kinds(kind="blosc", field=st.sampled_from(sorted(mutations.BLOSC)), value=WHOLE),
    "crc": BYTES.map(lambda mutation: mutation | {"crc": True}),
    "array": kinds(kind="array", how=st.sampled_from(mutations.SPOILT)),
}
"""Mutations that keep to a format, but for one field."""


def changes_of(seeds: Seeds, subject: str, name: str) -> "st.SearchStrategy[Json]":
    """Return a strategy for the mutations of a file, named as the cases name it."""
    file, kind = seeds.path(subject, name), kind_of(seeds.commits.get(name, name))
    fitting: list[st.SearchStrategy[Json]] = []
    if file.suffix == ".json":
        fitting = [json_changes(inner(json.loads(file.read_bytes()))).map(lambda change: {"kind": "json"} | change)] * 6
    if file.suffix in (".png", ".tar", ".parquet"):
        fitting = [CONTAINERS[file.suffix[1:]]] * 3
    if file.suffix == ".parquet":
        described = json_changes({"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}}})
        fitting = [*fitting, described.map(lambda change: {"kind": "parquet", "metadata": change})]
    if file.suffix == ".safetensors":
        data = file.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        fitting = [json_changes(header).map(lambda change: {"kind": "safetensors"} | change)] * 4
        fitting = [*fitting, kinds(kind="safetensors", how="length", value=WHOLE)]
    if file.suffix in (".txt", ".csv"):
        fitting = [CONTAINERS["lines"]] * 3
    if file.suffix == ".pth":
        fitting = [CONTAINERS["pickle"]] * 2
    if "ubyte" in file.name:
        fitting = [CONTAINERS["idx"]] * 2
    if kind == "chunk":
        fitting = [CONTAINERS["blosc"], CONTAINERS["crc"]]
    if kind == "metadata" and subject == "store":
        fitting = [*fitting, *[CONTAINERS["array"]] * 6]
    return st.one_of(*fitting, BYTES, PATHS)


def inner(document: Any) -> Any:
    """Return what of a commit object is changed: the commit, not its envelope."""
    return document["commit"] if isinstance(document, dict) and set(document) == {"commit", "sha256"} else document


def cases(seeds: Seeds) -> "st.SearchStrategy[Json]":
    """Return a strategy for whole cases."""
    files = {subject: names_of(seeds, subject) for subject in COMMANDS}
    subjects = [*["store"] * 8, *["run"] * 4, *["stopped"] * 2, *COMMANDS]

    @st.composite
    def draw_case(draw: Any) -> Json:
        subject = draw(st.sampled_from(subjects))
        command = draw(st.sampled_from(sorted(COMMANDS[subject])))
        found = []
        for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
            kind = draw(st.sampled_from(sorted(files[subject])))
            name = draw(st.sampled_from(files[subject][kind]))
            found.append({"file": name} | draw(changes_of(seeds, subject, name)))
        signed = draw(st.sampled_from((True, True, False)))
        return {"subject": subject, "command": command, "signed": signed, "mutations": found}

    return draw_case()


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


def prepare(case: Json, seeds: Seeds, folder: Path) -> list[str]:
    """Lay out the folder of a case; return the words of its command."""
    (folder / "canary" / "train").mkdir(parents=True)
    (folder / "canary" / "mine").write_bytes(b"somebody's\n")
    (folder / "canary" / "train" / "mine.json").write_bytes(b"{}")
    subject = case["subject"]
    shutil.copytree(seeds.root / subject, folder / "evil")
    words = [str(word) for word in COMMANDS[subject][case["command"]]]
    for name, seed in USES.items():
        if any(word == name for word in words):
            shutil.copytree(seeds.root / seed, folder / name)
    spoil(case, seeds, folder / "evil")
    return [w.replace("{b}", seeds.backbone).replace("{seeds}", str(seeds.root)) for w in words]


def spoil(case: Json, seeds: Seeds, evil: Path) -> None:
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
        if again and not file.exists():
            continue
        if mutation["kind"] == "array":
            mutations.apply(file.parent, mutation, again)
            digest_array(evil, file.parent, seeds)
        elif mutation["file"] in names and mutation["kind"] == "json":
            try:
                commit = mutations.change_json(load(file)["commit"], mutation)
            except (Stale, KeyError, TypeError):
                if not again:
                    raise
                continue
            file.write_bytes(mutations.written({"commit": commit, "sha256": "0" * 64}))
        else:
            mutations.apply(file, mutation, again)
        if case["signed"] and store and mutation["file"] not in names:
            record_run(evil, mutation["file"], seeds)
    if case["signed"] and store:
        for name in {m["file"] for m in case["mutations"]} | set(names):
            if name in names:
                seal(evil, evil / names[name], move=any(m["file"] == name for m in case["mutations"]))
    if case["signed"] and case["subject"] in ("run", "stopped"):
        for saved in evil.glob("checkpoint/step_*"):
            sign_checkpoint(saved)


def load(file: Path) -> Any:
    """Read the JSON of a file that may be anything by now."""
    if file.is_symlink() or not file.is_file() or file.stat().st_size > 2**26:
        return None
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None


def commits_of(evil: Path, name: str, seeds: Seeds) -> Iterator[tuple[Path, Json]]:
    """Yield the commits of the run that a file of a store belongs to."""
    parts = name.split("/")
    for path in seeds.commits.values():
        document = load(evil / path)
        if isinstance(document, dict) and isinstance(document.get("commit"), dict):
            if parts[0] == "runs" and len(parts) > 2 and document["commit"].get("run") == parts[1]:
                yield evil / path, document["commit"]


def record_run(evil: Path, name: str, seeds: Seeds) -> None:
    """Make the commits of a run list its objects as they are."""
    for file, commit in commits_of(evil, name, seeds):
        run = evil / "runs" / name.split("/")[1]
        if not run.is_symlink():
            record_objects(commit, run)
            file.write_bytes(sealed(commit))


def digest_array(evil: Path, folder: Path, seeds: Seeds) -> None:
    """Make the commit of an array hold the digest of its values as they are."""
    import zarr

    from sfm.stats_store.digest import array_digest

    array = zarr.open_array(folder, mode="r", zarr_format=3)
    name = folder.relative_to(evil).as_posix()
    for file, commit in commits_of(evil, name, seeds):
        with_rows = array[...] if array.ndim else None
        if with_rows is not None and with_rows.dtype.kind != "M":
            commit["arrays"]["/".join(name.split("/")[2:])] = array_digest(with_rows)
            file.write_bytes(sealed(commit))


def seal(evil: Path, file: Path, move: bool) -> None:
    """Sign a commit, and put it where it says that it belongs."""
    document = load(file)
    if not isinstance(document, dict) or "commit" not in document:
        return
    commit = document["commit"]
    sign_entry(commit)
    target = place(commit, evil, file) if move else file
    file.write_bytes(sealed(commit))
    if target != file:
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
        target.with_suffix(".published").touch()
        file.with_suffix(".published").unlink(missing_ok=True)


def digests(folder: Path) -> dict[str, str]:
    """Return a digest of every file below a folder, and where links lead."""
    return {
        path.relative_to(folder).as_posix(): f"-> {path.readlink()}"
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def protected(case: Json, seeds: Seeds, evil: Path) -> dict[str, str]:
    """Return the objects of entries that nobody changed: they are somebody's, and current."""
    if case["subject"] != "store":
        return {}
    touched = {m["file"] for m in case["mutations"]}
    kept: dict[str, str] = {}
    for name in ("birds-1", "birds-tuning-1", "fish-2"):
        key = Path(seeds.commits[f"commit/{name}"]).parent.as_posix()
        own = {n for n, path in seeds.commits.items() if path.startswith(key)}
        run = json.loads((seeds.root / "store" / seeds.commits[f"commit/{name}"]).read_bytes())["commit"]["run"]
        if touched & own or any(t.startswith((f"runs/{run}", key, "zarr.json", "runs/zarr.json")) for t in touched):
            continue
        if any(t.split("/")[0] in ("index", "zarr.json") for t in touched):
            continue
        kept |= digests(evil / "runs" / run) and {
            f"runs/{run}/{path}": digest for path, digest in digests(evil / "runs" / run).items()
        }
    return kept


def run_case(case: Json, seeds: Seeds, worker: Worker, folder: Path) -> tuple[list[Problem], Outcome]:
    """Run a case in an empty folder; return what must not be."""
    words = prepare(case, seeds, folder)
    canary, evil = digests(folder / "canary"), folder / "evil"
    good = digests(folder / "good") if (folder / "good").exists() else {}
    theirs = protected(case, seeds, evil)
    outcome = worker(words, folder)
    found = list(problems(outcome, as_json="--json" in words))
    if digests(folder / "canary") != canary:
        found.append(Problem("canary", "the folder of somebody else was changed"))
    after = digests(folder / "good") if good else {}
    changed = [path for path, digest in good.items() if after.get(path) != digest]
    if changed:
        found.append(Problem("victim: good store", f"{changed[:3]} of the sound store are changed or gone"))
    if theirs:
        left = digests(evil)
        lost = [path for path, digest in theirs.items() if left.get(path) != digest]
        if lost:
            found.append(Problem("victim: other entries", f"{lost[:3]} of entries in use are changed or gone"))
    target = {"copy": words[-1], "merge": words[2]}.get(words[1]) if words[0] == "store" else None
    if words[-1] == "--replace":
        target = words[-2]
    if target and words[1] in ("copy", "merge") and (folder / target / "zarr.json").is_file():
        checked = worker(["store", "verify", target], folder)
        if checked.status != 0:
            told = checked.err.strip().splitlines()[-1:] or [""]
            found.append(Problem("unsound target", f"verify of {target} afterwards: {checked.status} {told[0]}"))
    found += markdown(folder / "new")
    return found, outcome


def problems(outcome: Outcome, as_json: bool) -> Iterator[Problem]:
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
    if outcome.growth > GROWTH:
        yield Problem("memory", f"{outcome.growth >> 20} MiB more than at the start")
    bad = sorted({c for c in outcome.out + outcome.err if c != "\n" and not is_plain(c)})
    if bad and not outcome.exception:
        yield Problem("control characters", ascii("".join(bad)))
    if as_json and outcome.status == 0:
        try:
            json.loads(outcome.out, parse_constant=not_json)
        except ValueError as error:
            yield Problem("--json is no JSON", str(error))


def not_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def is_plain(character: str) -> bool:
    """Say whether a character neither moves the cursor nor turns the writing direction."""
    return character in "\u200c\u200d" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def markdown(folder: Path) -> Iterator[Problem]:
    """Yield what must not be in the cards that were written."""
    for file in sorted(folder.glob("*.md")) if folder.is_dir() else ():
        text = file.read_text(encoding="utf-8", errors="surrogateescape")
        bad = sorted({c for c in text if c != "\n" and not is_plain(c)})
        if bad:
            yield Problem("control characters in a card", ascii("".join(bad)))
