"""Equal images have equal fingerprints, other images have others."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sfm.pipeline.fingerprint import FingerprintBuilder, digest_sample

IDS = ["ant", "bee", "cow"]
SAMPLES = st.lists(
    st.tuples(st.sampled_from(["train", "test"]), st.integers(0, 2), st.binary(max_size=8)),
    min_size=1,
    max_size=20,
)


def compute_fingerprint_of(samples: list[tuple[str, int, bytes]]) -> str:
    builder = FingerprintBuilder()
    for split, label, data in samples:
        digest = np.frombuffer(digest_sample(data), dtype=np.uint8)[None]
        builder.add_samples(split, IDS, np.array([label], dtype=np.int32), digest)
    return builder.compute_fingerprint()


@given(SAMPLES, st.randoms(use_true_random=False))
def test_the_fingerprint_is_independent_of_sample_order(samples, random):
    shuffled = samples.copy()
    random.shuffle(shuffled)
    assert compute_fingerprint_of(shuffled) == compute_fingerprint_of(samples)


@given(SAMPLES, st.data())
def test_a_changed_byte_a_changed_class_or_an_extra_sample_changes_the_fingerprint(samples, data):
    i = data.draw(st.integers(0, len(samples) - 1))
    split, label, content = samples[i]
    for other in (
        [*samples[:i], (split, label, content + b"x"), *samples[i + 1 :]],
        [*samples[:i], (split, (label + 1) % 3, content), *samples[i + 1 :]],
        [*samples, samples[i]],
    ):
        assert compute_fingerprint_of(other) != compute_fingerprint_of(samples)


def test_duplicate_samples_do_not_cancel_in_the_fingerprint():
    assert compute_fingerprint_of([("train", 0, b"a")] * 3) != compute_fingerprint_of([("train", 0, b"a")])


def test_the_sample_digest_includes_the_length():
    assert digest_sample(b"") != digest_sample(b"\0")
