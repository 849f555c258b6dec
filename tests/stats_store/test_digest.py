"""Equal content has equal digests, however it was cut, stored or computed."""

import hashlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from sfm.stats_store.digests import (
    BLOCK_ROWS,
    combine_block_digests,
    compute_array_digest,
    compute_block_digest,
    compute_chunked_array_digest,
    compute_entry_digest,
    encode_canonical_json,
)

DTYPES = ["uint8", "int32", "int64", "float16", "float32", "float64"]

small_arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: arrays_of.arrays(
        dtype, arrays_of.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=6)
    )
)


@st.composite
def tall_arrays(draw: st.DrawFn) -> npt.NDArray[np.generic]:
    """Arrays of up to three blocks; the rows follow from a seed, since their values are not the point."""
    rows = draw(st.sampled_from([1, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 2 * BLOCK_ROWS, 10_000]))
    dtype = draw(st.sampled_from(DTYPES))
    return np.random.default_rng(draw(st.integers(0, 99))).integers(0, 200, (rows, 3)).astype(dtype)


def test_array_digest_matches_its_definition() -> None:
    array = np.arange(10_000, dtype=np.int32).reshape(5_000, 2)
    blocks = [hashlib.sha256(array[i : i + 4096].astype("<i4").tobytes()).digest() for i in (0, 4096)]
    assert compute_array_digest(array) == hashlib.sha256(b"".join(blocks) + b'["<i4",[5000,2]]').hexdigest()


@given(tall_arrays())
def test_block_digests_combine_to_the_array_digest(array: npt.NDArray[np.generic]) -> None:
    blocks = [compute_block_digest(array[i : i + BLOCK_ROWS]) for i in range(0, len(array), BLOCK_ROWS)]
    assert combine_block_digests(blocks, array.dtype, array.shape) == compute_array_digest(array)


@given(tall_arrays(), st.lists(st.integers(0, 10_000), max_size=6))
def test_array_digest_is_independent_of_chunk_boundaries(
    array: npt.NDArray[np.generic], cuts: list[int]
) -> None:
    parts = np.split(array, sorted(min(cut, len(array)) for cut in cuts))
    assert compute_chunked_array_digest(parts, array.dtype, array.shape) == compute_array_digest(array)


@given(small_arrays)
def test_array_digest_is_independent_of_byte_order_and_memory_layout(array: npt.NDArray[np.generic]) -> None:
    assert compute_array_digest(array.astype(array.dtype.newbyteorder(">"))) == compute_array_digest(array)
    assert compute_array_digest(np.asfortranarray(array)) == compute_array_digest(array)
    assert compute_array_digest(np.repeat(array, 2, axis=0)[::2]) == compute_array_digest(array)


@given(small_arrays, st.data())
def test_array_digest_depends_on_every_bit_dtype_and_shape(
    array: npt.NDArray[np.generic], data: st.DataObject
) -> None:
    changed = bytearray(array.tobytes())
    bit = data.draw(st.integers(0, 8 * len(changed) - 1))
    changed[bit // 8] ^= 1 << bit % 8
    flipped = np.frombuffer(bytes(changed), array.dtype).reshape(array.shape)
    assert compute_array_digest(flipped) != compute_array_digest(array)
    assert compute_array_digest(array[None]) != compute_array_digest(array)
    if array.dtype.itemsize in (2, 4, 8):
        assert compute_array_digest(array.view(f"uint{8 * array.dtype.itemsize}")) != compute_array_digest(
            array
        )


def test_chunked_array_digest_raises_value_error_on_a_row_count_mismatch() -> None:
    with pytest.raises(ValueError, match="3 rows given, 4 announced"):
        compute_chunked_array_digest([np.zeros(3)], np.dtype(float), (4,))


def test_digest_of_an_empty_array_depends_on_dtype_and_shape() -> None:
    empty = [np.zeros((0, 3), np.float32), np.zeros((0, 4), np.float32), np.zeros((0, 3), np.float64)]
    assert len({compute_array_digest(array) for array in empty}) == 3


def test_canonical_json_is_sorted_and_compact_and_refuses_nan() -> None:
    assert encode_canonical_json({"b": [1, 2.5], "a": None}) == b'{"a":null,"b":[1,2.5]}'
    with pytest.raises(ValueError, match="Out of range float values"):
        encode_canonical_json({"a": float("nan")})


def test_entry_digest_covers_arrays_backbone_dataset_and_options_in_any_order() -> None:
    arrays = {"train/mean": "a", "train/count": "b"}
    digest = compute_entry_digest(arrays, "backbone", "data", "options")
    assert compute_entry_digest(dict(reversed(arrays.items())), "backbone", "data", "options") == digest
    others = [
        compute_entry_digest(arrays | {"train/mean": "c"}, "backbone", "data", "options"),
        compute_entry_digest(arrays | {"test/label": "d"}, "backbone", "data", "options"),
        compute_entry_digest(arrays, "other", "data", "options"),
        compute_entry_digest(arrays, "backbone", "other", "options"),
        compute_entry_digest(arrays, "backbone", "data", "other"),
    ]
    assert len({digest, *others}) == 6
