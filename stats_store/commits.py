"""Commits and the cards they vouch for: where they lie, how they are parsed, what makes one damaged.

Anybody may have written them. Whatever is wrong with one is a :class:`~sfm.errors.DamageError` that names it,
so that it can be passed over.
"""

import json
import re
import threading
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sfm.backbones.card import BackboneCard
from sfm.constrained_types import MAX_GENERATION
from sfm.errors import DamageError, InputError
from sfm.stats_store.cards import (
    SCHEMA_MINOR,
    ClassifierCard,
    Commit,
    DatasetCard,
    ExtractionCard,
    SchemaVersion,
    Summary,
)
from sfm.stats_store.digest import canonical, entry_digest, sha256
from sfm.stats_store.schema import UpgradeError, require_readable
from sfm.text import sanitize_line
from sfm.untrusted_files import MAX_JSON_BYTES, parse_json

Card = TypeVar("Card", bound=BaseModel)

MARK = ".published"
"""Ending of the empty object beside a commit that its writer knows to be there."""

COMMIT = re.compile(r"index/([0-9a-f]{64}/[0-9a-f]{64}/[0-9a-f]{64})/([0-9]{8})(\.json|\.published)")
"""Path of a commit or its mark: key, generation, ending. Nothing else in the index means anything."""

KEY_FOLDER = re.compile(r"index(/[0-9a-f]{64}){0,3}")
"""Path of a folder of the index in which there may be commits."""

RUN_METADATA_BYTES = 2 * MAX_JSON_BYTES
"""Most bytes of all metadata of a run, which opening its entry reads and holds."""

LATER = ("literal_error", "extra_forbidden")
"""What pydantic calls a word that a later version may have introduced."""

ONE_AT_A_TIME = threading.Lock()
"""Held while a document is parsed, whose values may take 30 times its length."""


@dataclass(frozen=True)
class Cards:
    """What an entry says about itself, in the root metadata of its run."""

    backbone: BackboneCard
    dataset: DatasetCard
    extraction: ExtractionCard
    classifier: ClassifierCard


def commit_name(generation: int) -> str:
    """Return the file name of a generation's commit."""
    return f"{generation:08d}.json"


def commit_path(summary: Summary) -> str:
    """Return where the commit of a summary lies."""
    return f"index/{summary.key}/{commit_name(summary.generation)}"


def generation_of(path: str) -> int:
    """Return the generation that a commit's path names."""
    return int(path.rpartition("/")[2].partition(".")[0])


class LastGenerationError(InputError):
    """A key has no generation left: somebody's doing, or a mistake."""


def generation_after(latest: int, key: str) -> int:
    """Return the generation that follows the highest of a key.

    Raises
    ------
    LastGenerationError
        If it is the last that a path can name.
    """
    if latest >= MAX_GENERATION:
        raise LastGenerationError(
            f"index/{key} holds the last possible generation: delete {latest}.json and {latest}{MARK} there"
        )
    return latest + 1


def is_commit(path: str) -> bool:
    """Say whether a path of the index is that of a commit."""
    found = COMMIT.fullmatch(path)
    return found is not None and found[3] == ".json"


def parse_commit(data: bytes, path: str) -> Commit:
    """Parse the bytes of a commit.

    Raises
    ------
    DamageError
        If they do not match their own digest, belong elsewhere in the index, or hold what no writer writes.
    UpgradeError
        If it was written with a schema that this version cannot read.
    """
    commit = parse_sealed(data, path)
    if isinstance(commit, DamageError):
        raise commit
    return commit


def parse_sealed(data: bytes, path: str) -> Commit | DamageError:
    """Parse the bytes of a commit; return what is wrong with one that its own digest vouches for.

    Such a one was written so: it did not suffer on the way, and need not be asked for again.

    Raises
    ------
    DamageError, UpgradeError
        See :func:`parse_commit`.
    """
    with ONE_AT_A_TIME:
        content = unseal(data, path)
        try:
            return read_commit(content, path)
        except DamageError as error:
            return error


def seal(content: Any) -> bytes:
    """Return the bytes of a commit of this content: it and its digest, as :func:`unseal` reads them."""
    return json.dumps({"commit": content, "sha256": sha256(canonical(content))}).encode()


def unseal(data: bytes, path: str) -> Any:
    """Return the content of a commit, which matches its digest.

    Raises
    ------
    DamageError
        If it does not, or the bytes are no such document.
    """
    try:
        # Bounds length and depth first; json alone lets a name that stands twice be noticed.
        parse_json(data)
        sealed = json.loads(data, object_pairs_hook=unambiguous)
        content = sealed["commit"]
        intact = sha256(canonical(content)) == sealed["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamageError(f"damaged commit {path}: not readable as a commit") from error
    if not intact:
        raise DamageError(f"damaged commit {path}: it does not match its own digest")
    return content


def unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, of which two readers may not see different values.

    Raises
    ------
    ValueError
        If it has a name twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name appears twice")
    return found


def read_commit(content: Any, path: str) -> Commit:
    """Return the commit that JSON describes; see :func:`parse_commit` for the errors."""
    what = f"damaged commit {path}"
    schema = parse_card(SchemaVersion, content, "schema", what, SCHEMA_MINOR)
    require_readable(schema, named_place(content, path))
    try:
        commit = Commit.model_validate(content)
    except ValidationError as error:
        raise refusal(error, what, schema.minor) from error
    # A commit says where it belongs: one that lies elsewhere would pass for another entry's.
    if commit.summary is None or commit_path(commit.summary) != path:
        raise DamageError(f"{what}: it belongs to another place in the index")
    problem = commit_problem(commit, commit.summary) if commit.kind == "entry" else ""
    if problem:
        raise DamageError(f"{what}: {problem}")
    return commit


def named_place(content: dict[str, Any], path: str) -> str:
    """Return the path of a commit, with the name of its dataset where a later version still says it so."""
    summary = content.get("summary")
    name = summary.get("dataset") if isinstance(summary, dict) else None
    return f"the entry of {sanitize_line(name, max_length=80)} ({path})" if isinstance(name, str) else path


def commit_problem(commit: Commit, summary: Summary) -> str:
    """Return what parts of a commit of an entry do not agree in, or ""."""
    lacking = {"zarr.json", *(f"{name}/zarr.json" for name in commit.arrays)} - commit.objects.keys()
    if lacking:
        return f"it lists no {min(lacking)}"
    metadata = sum(r.size for name, r in commit.objects.items() if name.rpartition("/")[2] == "zarr.json")
    if metadata > RUN_METADATA_BYTES:
        return f"its metadata has {metadata} bytes, at most {RUN_METADATA_BYTES} are read"
    key = (summary.backbone_hash, summary.fingerprint, summary.options)
    if entry_digest(commit.arrays, *key) != summary.entry_digest:
        return f"the digest {summary.entry_digest[:12]} is not that of its content"
    return ""


def root_schema(data: bytes) -> SchemaVersion:
    """Parse the root metadata of a store.

    Raises
    ------
    DamageError
        If it is not that of a store.
    """
    try:
        return SchemaVersion.model_validate(parse_json(data)["attributes"]["schema"])
    except (ValueError, KeyError, TypeError) as error:
        raise DamageError("not the root of a store") from error


def read_cards(commit: Commit, data: bytes) -> Cards:
    """Parse the cards of an entry from the root metadata of its run; they agree with its commit.

    Raises
    ------
    DamageError
        If they hold what no writer writes, or say other things than the commit.
    UpgradeError
        If a later version wrote words that this one does not know.
    """
    what, minor = f"damaged object runs/{commit.run}/zarr.json", commit.schema_version.minor
    with ONE_AT_A_TIME:
        try:
            found = parse_json(data)["attributes"]
        except (ValueError, KeyError, TypeError) as error:
            raise DamageError(f"{what}: not readable as the cards of an entry") from error
        cards = Cards(
            backbone=parse_card(BackboneCard, found, "backbone", what, minor),
            dataset=parse_card(DatasetCard, found, "dataset", what, minor),
            extraction=parse_card(ExtractionCard, found, "extraction", what, minor),
            classifier=parse_card(ClassifierCard, found, "classifier", what, minor),
        )
    shown = commit.summary.model_dump() if commit.summary else {}
    differing = [name for name, value in summary_fields(cards).items() if shown.get(name) != value]
    if differing:
        raise DamageError(f"{what}: its {', '.join(differing)} differ from the commit's")
    return cards


def summary_fields(cards: Cards) -> dict[str, Any]:
    """Return all that a summary repeats of the cards of its entry."""
    backbone, dataset = cards.backbone, cards.dataset
    return {
        "dataset": dataset.name,
        "backbone": backbone.spec,
        "model": backbone.model,
        "backbone_hash": backbone.hash,
        "image_size": backbone.preprocessing.input_size,
        "fingerprint": dataset.fingerprint,
        "options": sha256(canonical(cards.extraction.options)),
        "role": cards.extraction.role,
        "classes": len(dataset.class_ids),
        "features": backbone.features,
        "train_samples": dataset.train_samples,
        "test_samples": dataset.test_samples,
        "held_out_top1": cards.classifier.held_out_top1,
        "listing": cards.extraction.listing,
    }


def parse_card(card: type[Card], found: Any, name: str, what: str, minor: int) -> Card:
    """Return the card that JSON holds under a name; `what` says in errors of what it is a part."""
    try:
        return card.model_validate(found[name])
    except ValidationError as error:
        raise refusal(error, f"{what}: {name}", minor) from error
    except (KeyError, TypeError, IndexError) as error:
        raise DamageError(f"{what}: it has no {name}") from error


def refusal(error: ValidationError, what: str, minor: int) -> DamageError | UpgradeError:
    """Return what to raise for data that break a rule: damage, unless a later version may know better.

    Parameters
    ----------
    minor : int
        Of the schema it was written with. A later one may add fields and arrays, which are ignored, and
        words.
    """
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    first = problems[0]
    where, why = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    line = sanitize_line(f"{what}: {where}: {why}" if where else f"{what}: {why}", max_length=500)
    if minor > SCHEMA_MINOR and all(problem["type"] in LATER for problem in problems):
        return UpgradeError(f"{line}; it is of schema 1.{minor}: upgrade sfm-distill")
    return DamageError(line)
