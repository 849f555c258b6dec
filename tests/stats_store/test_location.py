"""A URL becomes a place, or one clear line; never a credential."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore.exceptions import GenericError
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store
from toy_entries import publish_with_placeholder_cards, write_random_arrays

from sfm.errors import InputError
from sfm.stats_store.location import (
    REMOTE_SCHEMES,
    connect_object_store,
    explain_store_error,
    parse_local_path,
    redact_url,
)
from sfm.stats_store.publication import Draft
from sfm.stats_store.store import open_or_create_store, open_store

SECRET = "CANARY+secret/9f8e7d"

words = st.text("abcdefghijklmnopqrstuvwxyz0123456789-._~", min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("./store", "./store"),
        ("/data/my store", "/data/my store"),
        ("file:///data/store", "file:///data/store"),
        ("s3://bucket/team/stats/", "s3://bucket/team/stats"),
        ("s3://key:secret@bucket/stats?X-Amz-Signature=1#f", "s3://bucket/stats"),
        ("az://account/container?sig=abc", "az://account/container"),
        ("s3://key:sec/ret@bucket/stats", "s3://bucket/stats"),
        ("https://user:secret@host/x?token=y", "https://host/x"),
    ],
)
def test_redact_url_removes_credentials(url: str, expected: str) -> None:
    assert redact_url(url) == expected


@given(st.sampled_from(REMOTE_SCHEMES), words, words, words, words)
def test_redact_url_removes_user_password_query_and_fragment(
    scheme: str, user: str, bucket: str, path: str, query: str
) -> None:
    secret = "S3CR3T"
    url = f"{scheme}://{user}{secret}:{secret}@{bucket}/{path}?{query}={secret}#{secret}"
    assert secret not in redact_url(url)
    assert redact_url(redact_url(url)) == redact_url(url)


@pytest.mark.parametrize(
    "url",
    [
        f"s3://key:{SECRET}@bucket/stats",
        f"s3://{SECRET.replace('/', '')}@bucket/stats",
        f"s3://key:{SECRET}",
        f"s3://bucket/{SECRET}@bucket",
        f"s3://bucket/stats?X-Amz-Security-Token={SECRET}",
        f"az://container/stats?sig={SECRET}",
        f"gs://bucket/stats#{SECRET}",
    ],
)
def test_url_with_credentials_is_refused_without_printing_them(url: str) -> None:
    with pytest.raises(InputError, match="put credentials in the environment") as error:
        connect_object_store(url)
    assert "CANARY" not in str(error.value)


@pytest.mark.parametrize(
    "url", [f"https://user:{SECRET}@host/stats", f"ftp://{SECRET}/x", "hdfs://host/x", "s3://[x"]
)
def test_unsupported_url_scheme_is_refused_naming_the_supported_ones(url: str) -> None:
    with pytest.raises(InputError, match="use a local path, s3://, gs:// or az:// URL") as error:
        connect_object_store(url)
    assert "CANARY" not in str(error.value)


@pytest.mark.parametrize("url", ["s3://", "s3:///stats", "s3:/bucket/stats", "gs:bucket"])
def test_url_without_a_bucket_is_refused_and_creates_no_folder(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"names no bucket: write .*://BUCKET/PATH"):
        open_or_create_store(url)
    assert list(tmp_path.iterdir()) == []


def test_local_paths_and_file_urls_are_parsed_to_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert parse_local_path("~/store") == Path("/home/someone/store")
    assert parse_local_path("file:///data/my%20store") == Path("/data/my store")
    assert parse_local_path("store") == Path("store")
    assert parse_local_path("s3://bucket/store") is None


def test_path_and_file_url_open_the_same_store(tmp_path: Path) -> None:
    draft = Draft(open_or_create_store(str(tmp_path / "my store")))
    write_random_arrays(draft)
    summary = publish_with_placeholder_cards(draft).summary
    assert open_store(f"file://{tmp_path}/my%20store").list_summaries() == [summary]


def test_missing_store_folder_is_refused_suggesting_the_extract_command(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(
        InputError, match=f"no store at {missing}: no such folder; create one with `sfm extract"
    ):
        open_store(str(missing))
    assert not missing.exists()


def test_url_scheme_selects_the_obstore_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    assert isinstance(connect_object_store("s3://bucket/stats"), S3Store)
    assert isinstance(connect_object_store("gs://bucket/stats"), GCSStore)
    assert isinstance(connect_object_store("az://container/stats"), AzureStore)
    assert isinstance(connect_object_store(str(tmp_path)), LocalStore)


def test_missing_azure_account_name_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(InputError, match="AZURE_STORAGE_ACCOUNT_NAME"):
        connect_object_store("az://container/stats")


@given(st.text(max_size=200))
def test_errors_do_not_repeat_server_messages(answer: str) -> None:
    line = explain_store_error(
        GenericError(f"Generic S3 error: {answer} {SECRET}\n{answer}"), "s3://bucket/stats"
    )
    assert line.startswith("cannot use s3://bucket/stats: ")
    assert "CANARY" not in line
    assert "\n" not in line


def test_no_space_left_error_is_distinguished_from_other_errors() -> None:
    error = GenericError(
        "Generic LocalFileSystem error: Unable to copy: No space left on device (os error 28)\n\n"
    )
    assert explain_store_error(error, "/data/store") == (
        "no space left on the disk of /data/store: free some and run the same command again"
    )
    assert explain_store_error(GenericError("Generic error: something else\n\nDebug"), "/data/store") == (
        "cannot use /data/store: Generic error: something else"
    )


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
@pytest.mark.parametrize(
    "path", ["a/../c", "a/./c", "a//c", "..", ".", "/", "a/%2e%2E/c", "a/.\t./c", "a/..", "/a", "a//"]
)
def test_bucket_path_with_empty_or_dot_segments_is_refused(scheme: str, path: str) -> None:
    with pytest.raises(InputError, match=r"has an empty part, \. or \.\. in its path: write") as error:
        connect_object_store(f"{scheme}://bucket/{path}")
    assert "\n" not in str(error.value)
