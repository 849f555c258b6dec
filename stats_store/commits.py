"""Encode, decode and validate commits and the cards of the runs they make visible.

Commits are untrusted. Every invalid commit raises a :class:`~sfm.errors.DamageError` that names it, so that
readers can skip it.
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
from sfm.stats_store.digests import compute_entry_digest, compute_sha256, encode_canonical_json
from sfm.stats_store.schema import UpgradeNeededError, require_supported_schema
from sfm.text import sanitize_line
from sfm.untrusted_files import MAX_JSON_BYTES, parse_json

CardModel = TypeVar("CardModel", bound=BaseModel)

PUBLISHED_SUFFIX = ".published"
"""Suffix of the empty object beside a commit that shows that the commit was published."""

COMMIT_PATH = re.compile(r"index/([0-9a-f]{64}/[0-9a-f]{64}/[0-9a-f]{64})/([0-9]{8})(\.json|\.published)")
"""Path of a commit or its published mark: key, generation, suffix. Other paths in the index are ignored."""

KEY_FOLDER_PATH = re.compile(r"index(/[0-9a-f]{64}){0,3}")
"""Path of an index folder that may contain commits."""

MAX_RUN_METADATA_BYTES = 2 * MAX_JSON_BYTES
"""Limit on all metadata of a run together: opening its entry reads and holds them."""

NEWER_SCHEMA_ERRORS = ("literal_error", "extra_forbidden")
"""Types of pydantic errors that a value of a newer schema causes."""

PARSE_LOCK = threading.Lock()
"""Held while a document is parsed: its values may take 30 times its length in memory."""


@dataclass(frozen=True)
class EntryCards:
    """The cards of an entry, as the root metadata of its run holds them."""

    backbone: BackboneCard
    dataset: DatasetCard
    extraction: ExtractionCard
    classifier: ClassifierCard


def make_commit_file_name(generation: int) -> str:
    """Return the file name of the commit of a generation."""
    return f"{generation:08d}.json"


def make_commit_path(summary: Summary) -> str:
    """Return the path of the commit that holds a summary."""
    return f"index/{summary.key}/{make_commit_file_name(summary.generation)}"


def parse_generation(commit_path: str) -> int:
    """Return the generation number in the path of a commit."""
    return int(commit_path.rpartition("/")[2].partition(".")[0])


class LastGenerationError(InputError):
    """A key has reached the highest possible generation number."""


def get_next_generation(latest_generation: int, entry_key: str) -> int:
    """Return the generation number that follows the latest one of a key.

    Raises
    ------
    LastGenerationError
        If `latest_generation` is the last number that a path can hold.
    """
    if latest_generation >= MAX_GENERATION:
        raise LastGenerationError(
            f"index/{entry_key} holds the last possible generation: delete {latest_generation}.json and "
            f"{latest_generation}{PUBLISHED_SUFFIX} there"
        )
    return latest_generation + 1


def is_commit_path(path: str) -> bool:
    """Return whether a path is that of a commit."""
    match = COMMIT_PATH.fullmatch(path)
    return match is not None and match[3] == ".json"


def parse_commit(encoded_commit: bytes, path: str) -> Commit:
    """Parse and validate the bytes of a commit.

    Raises
    ------
    DamageError
        If they do not match their own digest, belong to another path, or hold invalid values.
    UpgradeNeededError
        If it was written with a schema that this version cannot read.
    """
    commit = parse_commit_or_damage(encoded_commit, path)
    if isinstance(commit, DamageError):
        raise commit
    return commit


def parse_commit_or_damage(encoded_commit: bytes, path: str) -> Commit | DamageError:
    """Parse the bytes of a commit; return the error if its digest is right and its content is not.

    Such a commit was written that way, not damaged in transit: reading it again does not help.

    Raises
    ------
    DamageError, UpgradeNeededError
        See :func:`parse_commit`.
    """
    with PARSE_LOCK:
        content = decode_and_verify_commit_content(encoded_commit, path)
        try:
            return validate_commit(content, path)
        except DamageError as error:
            return error


def encode_commit_with_digest(content: Any) -> bytes:
    """Return a commit as JSON, content and digest: see :func:`decode_and_verify_commit_content`."""
    return json.dumps({"commit": content, "sha256": compute_sha256(encode_canonical_json(content))}).encode()


def decode_and_verify_commit_content(encoded_commit: bytes, path: str) -> Any:
    """Return the content of an encoded commit after comparing it with its digest.

    Raises
    ------
    DamageError
        If they differ, or the bytes are not an encoded commit.
    """
    try:
        # Two parsers: the first bounds length and depth, only the second reports duplicate keys.
        parse_json(encoded_commit)
        encoded = json.loads(encoded_commit, object_pairs_hook=make_dict_without_duplicates)
        content = encoded["commit"]
        is_intact = compute_sha256(encode_canonical_json(content)) == encoded["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamageError(f"damaged commit {path}: not readable as a commit") from error
    if not is_intact:
        raise DamageError(f"damaged commit {path}: it does not match its own digest")
    return content


def make_dict_without_duplicates(key_value_pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the members of a JSON object: an `object_pairs_hook` that refuses duplicate keys.

    Two readers could take different values for such a key.

    Raises
    ------
    ValueError
        If a key appears twice.
    """
    members = dict(key_value_pairs)
    if len(members) < len(key_value_pairs):
        raise ValueError("a name appears twice")
    return members


def validate_commit(content: Any, path: str) -> Commit:
    """Validate the content of a commit, also against its path; raises as :func:`parse_commit` does."""
    subject = f"damaged commit {path}"
    schema = parse_card(SchemaVersion, content, "schema", subject, SCHEMA_MINOR)
    require_supported_schema(schema, describe_commit_path_and_dataset(content, path))
    try:
        commit = Commit.model_validate(content)
    except ValidationError as error:
        raise make_invalid_value_error(error, subject, schema.minor) from error
    # A commit names its own path. A commit under another path would pass for another entry.
    if commit.summary is None or make_commit_path(commit.summary) != path:
        raise DamageError(f"{subject}: it belongs to another place in the index")
    problem = find_commit_inconsistency(commit, commit.summary) if commit.kind == "entry" else None
    if problem:
        raise DamageError(f"{subject}: {problem}")
    return commit


def describe_commit_path_and_dataset(content: dict[str, Any], path: str) -> str:
    """Return the path of a commit for messages, with its dataset if the content names one."""
    summary = content.get("summary")
    name = summary.get("dataset") if isinstance(summary, dict) else None
    return f"the entry of {sanitize_line(name, max_length=80)} ({path})" if isinstance(name, str) else path


def find_commit_inconsistency(commit: Commit, summary: Summary) -> str | None:
    """Return how the parts of an entry's commit contradict each other; None if they do not."""
    unlisted = {"zarr.json", *(f"{name}/zarr.json" for name in commit.arrays)} - commit.objects.keys()
    if unlisted:
        return f"it lists no {min(unlisted)}"
    metadata = sum(r.size for name, r in commit.objects.items() if name.rpartition("/")[2] == "zarr.json")
    if metadata > MAX_RUN_METADATA_BYTES:
        return f"its metadata has {metadata} bytes, at most {MAX_RUN_METADATA_BYTES} are read"
    key = (summary.backbone_hash, summary.fingerprint, summary.options)
    if compute_entry_digest(commit.arrays, *key) != summary.entry_digest:
        return f"the digest {summary.entry_digest[:12]} is not that of its content"
    return None


def parse_store_schema_version(root_zarr_json: bytes) -> SchemaVersion:
    """Return the schema version in the root metadata of a store.

    Raises
    ------
    DamageError
        If the metadata is not that of a store.
    """
    try:
        return SchemaVersion.model_validate(parse_json(root_zarr_json)["attributes"]["schema"])
    except (ValueError, KeyError, TypeError) as error:
        raise DamageError("not the root of a store") from error


def parse_entry_cards(commit: Commit, run_zarr_json: bytes) -> EntryCards:
    """Parse the cards of an entry from the root metadata of its run, and compare them with its commit.

    Raises
    ------
    DamageError
        If they hold invalid values, or differ from the commit.
    UpgradeNeededError
        If a newer version wrote values that this one does not know.
    """
    subject, minor = f"damaged object runs/{commit.run}/zarr.json", commit.schema_version.minor
    with PARSE_LOCK:
        try:
            attributes = parse_json(run_zarr_json)["attributes"]
        except (ValueError, KeyError, TypeError) as error:
            raise DamageError(f"{subject}: not readable as the cards of an entry") from error
        cards = EntryCards(
            backbone=parse_card(BackboneCard, attributes, "backbone", subject, minor),
            dataset=parse_card(DatasetCard, attributes, "dataset", subject, minor),
            extraction=parse_card(ExtractionCard, attributes, "extraction", subject, minor),
            classifier=parse_card(ClassifierCard, attributes, "classifier", subject, minor),
        )
    published = commit.summary.model_dump() if commit.summary else {}
    differing = [name for name, value in make_summary_fields(cards).items() if published.get(name) != value]
    if differing:
        raise DamageError(f"{subject}: its {', '.join(differing)} differ from the commit's")
    return cards


def make_summary_fields(cards: EntryCards) -> dict[str, Any]:
    """Return the fields of a summary that follow from the cards of its entry."""
    backbone, dataset = cards.backbone, cards.dataset
    return {
        "dataset": dataset.name,
        "backbone": backbone.spec,
        "model": backbone.model,
        "backbone_hash": backbone.hash,
        "image_size": backbone.preprocessing.input_size,
        "fingerprint": dataset.fingerprint,
        "options": compute_sha256(encode_canonical_json(cards.extraction.options)),
        "role": cards.extraction.role,
        "classes": len(dataset.class_ids),
        "features": backbone.features,
        "train_samples": dataset.train_samples,
        "test_samples": dataset.test_samples,
        "held_out_top1": cards.classifier.held_out_top1,
        "listing": cards.extraction.listing,
    }


def parse_card(
    card_type: type[CardModel], attributes: Any, card_name: str, error_subject: str, schema_minor: int
) -> CardModel:
    """Validate the attribute `card_name` as a card; error messages begin with `error_subject`."""
    try:
        return card_type.model_validate(attributes[card_name])
    except ValidationError as error:
        raise make_invalid_value_error(error, f"{error_subject}: {card_name}", schema_minor) from error
    except (KeyError, TypeError, IndexError) as error:
        raise DamageError(f"{error_subject}: it has no {card_name}") from error


def make_invalid_value_error(
    error: ValidationError, error_subject: str, schema_minor: int
) -> DamageError | UpgradeNeededError:
    """Return the exception for invalid values: damage, or an upgrade error if a newer schema may allow them.

    Parameters
    ----------
    schema_minor : int
        Minor version of the schema that the values were written with. A newer one may add fields and arrays,
        which are ignored, and new values.
    """
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    first = problems[0]
    location, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    text = f"{error_subject}: {location}: {reason}" if location else f"{error_subject}: {reason}"
    line = sanitize_line(text, max_length=500)
    if schema_minor > SCHEMA_MINOR and all(problem["type"] in NEWER_SCHEMA_ERRORS for problem in problems):
        return UpgradeNeededError(f"{line}; it is of schema 1.{schema_minor}: upgrade sfm-distill")
    return DamageError(line)
