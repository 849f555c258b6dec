"""Find the columns of images and labels, and the class names, in the schema of a parquet dataset."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sfm.errors import InputError
from sfm.pipeline.sources.class_labels import (
    ParsedClassList,
    make_zero_padded_class_id,
    normalize_name_for_comparison,
)
from sfm.pipeline.sources.limits import require_class_names_within_limits
from sfm.stats_store.class_lists import normalize_class_id
from sfm.text import format_names
from sfm.untrusted_files import parse_json

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class ImageAndLabelColumns:
    """The columns of images and labels, and the class names of the metadata.

    Attributes
    ----------
    image_column, label_column : str
        Names of the columns.
    class_names : list of str or None
        Names of the label numbers 0, 1, … in the dataset's own metadata.
    """

    image_column: str
    label_column: str
    class_names: list[str] | None


def find_image_and_label_columns(
    schema: "pyarrow.Schema", location: str, chosen_image_column: str | None, chosen_label_column: str | None
) -> ImageAndLabelColumns:
    """Return the columns of images and labels.

    Parameters
    ----------
    location : str
        Location of the table, for messages.
    chosen_image_column, chosen_label_column : str or None
        Names that the user gave. By default the columns ``image`` and ``label``, or else the only ones of
        these kinds in the dataset's metadata.

    Raises
    ------
    InputError
        If there are none, or several; lists the columns.
    """
    features = parse_hugging_face_features(schema)
    columns = {}
    for role, chosen, kind in (
        ("image", chosen_image_column, "Image"),
        ("label", chosen_label_column, "ClassLabel"),
    ):
        of_kind = [name for name, feature in features.items() if feature.get("_type") == kind]
        name = chosen or (role if role in schema.names else of_kind[0] if len(of_kind) == 1 else None)
        if name is None or name not in schema.names:
            raise InputError(
                f"{location} has no {role} column{f' {name}' if name else ''}: choose one with ?{role}=NAME; "
                f"there are {format_names(schema.names, 20)}"
            )
        columns[role] = name
    repeated = [name for name in columns.values() if schema.names.count(name) > 1]
    if repeated:
        raise InputError(f"{location} has several columns {repeated[0]}: rename them")
    class_names = parse_class_names(features.get(columns["label"], {}))
    return ImageAndLabelColumns(columns["image"], columns["label"], class_names)


def parse_hugging_face_features(schema: "pyarrow.Schema") -> dict[str, dict[str, Any]]:
    """Return the features that the ``datasets`` library wrote into a schema, by column.

    Empty if there are none, or the metadata is from another program.
    """
    try:
        metadata = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
    except ValueError:
        return {}
    for name in ("info", "features"):
        metadata = metadata.get(name) if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict):
        return {}
    return {name: feature for name, feature in metadata.items() if isinstance(feature, dict)}


def parse_class_names(hugging_face_feature: dict[str, Any]) -> list[str] | None:
    """Return the class names of a feature of the ``datasets`` library; None unless it has a list of them."""
    names = hugging_face_feature.get("names")
    usable = isinstance(names, list) and names and all(isinstance(name, str) and name for name in names)
    return list(names) if usable and isinstance(names, list) else None


def list_notes_on_unusable_class_names(
    schema: "pyarrow.Schema", location: str, columns: ImageAndLabelColumns
) -> list[str]:
    """Return a note for the user if metadata that should name the classes cannot be used."""
    features = parse_hugging_face_features(schema)
    is_foreign = b"huggingface" in (schema.metadata or {}) and not features
    is_nameless = (
        features.get(columns.label_column, {}).get("_type") == "ClassLabel" and columns.class_names is None
    )
    if not (is_foreign or is_nameless):
        return []
    return [
        f"the metadata of {location} names no classes that can be read: labels stand for themselves; give "
        f"?names=LIST to name them"
    ]


def make_class_list_or_display_names(
    columns: ImageAndLabelColumns, location: str
) -> tuple[ParsedClassList | None, dict[str, str]]:
    """Return the class list of the label numbers in a dataset's own metadata, and display names by class id.

    Names that differ in case or blanks only cannot be ids: the classes are numbered, and there is no list.
    """
    if columns.class_names is None:
        return None, {}
    require_class_names_within_limits(columns.class_names, None, f"the metadata of {location}")
    if len({normalize_name_for_comparison(name) for name in columns.class_names}) == len(columns.class_names):
        return ParsedClassList(location, [normalize_class_id(name) for name in columns.class_names], {}), {}
    return None, {make_zero_padded_class_id(label): name for label, name in enumerate(columns.class_names)}
