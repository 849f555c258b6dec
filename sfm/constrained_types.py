"""Constrained pydantic types for values of untrusted JSON that become paths, sizes or loop bounds.

This program writes values within these limits only, so that a value beyond them is damage.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    FailFast,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)

MAX_NAME_LENGTH = 1000
"""Characters of a name: of a dataset, a class, a class id, a backbone, an object of a run."""

MAX_OBJECT_BYTES = 2**31
"""Bytes of one object of a run; the codec of the arrays, Blosc, cannot make a larger one."""

MAX_INPUT_PIXELS = 4096
"""Pixels of a side of a backbone's input."""

MAX_CLASSES = 2**20

MAX_FEATURES = 2**16
"""Length of a feature vector."""

MAX_LABEL_VIEWS = 1000
"""Views that the soft label of an image is averaged over."""

MIN_LABEL_TEMPERATURE, MAX_LABEL_TEMPERATURE = 0.01, 1000.0
"""Divisors of logits that give finite soft labels, neither of one class nor equal for all."""

MAX_GENERATION = 99_999_999
"""The name of a commit has eight digits."""

PATH_SEGMENT_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}"

RUN_ID_PATTERN = r"[0-9a-f]{32}"

RunId = Annotated[str, StringConstraints(pattern=f"^{RUN_ID_PATTERN}$")]

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256, hexadecimal."""

OptionalDigest = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")]
"""A SHA-256, hexadecimal, or empty."""

ObjectName = Annotated[
    str,
    StringConstraints(
        pattern=rf"^{PATH_SEGMENT_PATTERN}(/{PATH_SEGMENT_PATTERN})*$", max_length=MAX_NAME_LENGTH
    ),
]
"""A path below a run, or the name of an array: no part is empty, begins with a dot or needs quoting."""

Name = Annotated[str, StringConstraints(max_length=MAX_NAME_LENGTH)]

ObjectSize = Annotated[int, Field(ge=0, le=MAX_OBJECT_BYTES)]

Count = Annotated[int, Field(ge=0, le=10**15)]
"""Number of samples, files, bytes or iterations."""

ClassCount = Annotated[int, Field(ge=1, le=MAX_CLASSES)]

FeatureCount = Annotated[int, Field(ge=1, le=MAX_FEATURES)]

GenerationNumber = Annotated[int, Field(ge=1, le=MAX_GENERATION)]

VersionNumber = Annotated[int, Field(ge=0, le=10**6)]

InputPixels = Annotated[int, Field(ge=1, le=MAX_INPUT_PIXELS)]

ResizedPixels = Annotated[int, Field(ge=1, le=4 * MAX_INPUT_PIXELS)]

FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]

NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

ChannelMean = Annotated[float, Field(ge=-1e6, le=1e6)]

ChannelStd = Annotated[float, Field(ge=1e-6, le=1e6)]
"""Values are divided by it."""


def make_item_limit_validator(max_items: int) -> BeforeValidator:
    """Return a validator that refuses a longer list or dict before any item is validated."""

    def check_length(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > max_items:
            raise ValueError(f"{len(value)} items, at most {max_items} are read")
        return value

    return BeforeValidator(check_length)


def make_fail_fast_dict_validator(key_type: Any, value_type: Any) -> BeforeValidator:
    """Return a validator of the items of a dict that stops at the first that is not valid.

    Pydantic alone reports all of them, which takes a hundred times the memory of the JSON.
    """
    adapter: TypeAdapter[tuple[Any, Any]] = TypeAdapter(tuple[key_type, value_type])

    def validate_items(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        validated = {}
        for key, item in value.items():
            try:
                validated[key] = adapter.validate_python((key, item))[1]
            except ValidationError as error:
                first = error.errors(include_url=False, include_context=False, include_input=False)[0]
                raise ValueError(f"{key[:80]!r}: {first['msg']}") from None
        return validated

    return BeforeValidator(validate_items)


def require_distinct_values(values: Sequence[str]) -> Sequence[str]:
    """Refuse a list that holds a value twice; return it otherwise.

    Raises
    ------
    ValueError
        If a value is repeated.
    """
    if len(set(values)) < len(values):
        raise ValueError("should not hold a value twice")
    return values


def require_valid_extraction_options(options: dict[str, Any]) -> dict[str, Any]:
    """Refuse options of an extraction that are not of the types that this program reads; return them.

    Raises
    ------
    ValueError
        If a known option is of another type, or any holds NaN or an infinity.
    """
    require_finite_json(options)
    views = options.get("views", 1)
    if not isinstance(views, int) or not 1 <= views <= 10**6:
        raise ValueError("views should be a number from 1")
    for name in ("background", "white"):
        if isinstance(options.get(name), list | dict):
            raise ValueError(f"{name} should be one value")
    return options


def require_finite_json(value: Any) -> Any:
    """Refuse JSON data that holds NaN or an infinity at any depth; return it otherwise.

    Raises
    ------
    ValueError
        If there is one.
    """
    json.dumps(value, allow_nan=False)
    return value


ClassIds = Annotated[
    list[Name],
    FailFast(),
    Field(min_length=1, max_length=MAX_CLASSES),
    AfterValidator(require_distinct_values),
]

Names = Annotated[list[Name], FailFast()]

Texts = Annotated[list[str], FailFast()]

LeafFingerprints = Annotated[list[Digest], FailFast(), Field(min_length=1)]

PackageVersions = Annotated[dict[str, str], make_item_limit_validator(1000)]

CountsByName = Annotated[dict[str, Count], make_item_limit_validator(100_000)]

ExtractionOptions = Annotated[dict[str, Any], AfterValidator(require_valid_extraction_options)]
