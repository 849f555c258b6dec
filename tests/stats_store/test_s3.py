"""A store on S3, through a real server: variables, anonymous readers, failures in one line, no secrets."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import boto3
import numpy as np
import obstore
import pytest
from s3_faults import Proxy, run_fault_proxy
from s3_server import REGION, environment
from store_processes import make_forkserver_context, run_sfm_command, start_process
from toy_entries import publish_fake_commits, publish_with_placeholder_cards, write_random_arrays

from sfm.errors import InputError
from sfm.stats_store.cards import Summary
from sfm.stats_store.entry_copy import copy_entries
from sfm.stats_store.entry_history import remove_entry
from sfm.stats_store.garbage_collection import collect_garbage
from sfm.stats_store.location import connect_object_store
from sfm.stats_store.objects import list_objects
from sfm.stats_store.publication import Draft
from sfm.stats_store.store import open_or_create_store, open_store
from sfm.stats_store.verification import verify_entries

CANARY = "C4N4RY"
SECRETS = {
    "AWS_ACCESS_KEY_ID": f"{CANARY}KEY",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}/secret+value",
    "AWS_SESSION_TOKEN": f"{CANARY}//token==",
}


@pytest.fixture
def proxy(s3_endpoint: str, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that everything goes through; breaks nothing until told to."""
    with run_fault_proxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def published_summary(s3_url: str) -> Summary:
    """An entry in the store at ``s3_url``."""
    draft = Draft(open_or_create_store(s3_url))
    write_random_arrays(draft)
    return publish_with_placeholder_cards(draft).summary


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3"])
def test_custom_s3_endpoint_is_used_with_path_style_requests(
    proxy: Proxy, s3_url: str, published_summary: Summary, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv(variable, proxy.endpoint)
    before = len(proxy.seen)
    store = open_store(s3_url)
    assert store.url == s3_url
    assert store.list_summaries() == [published_summary]
    bucket = urlsplit(s3_url).netloc
    assert len(proxy.seen) - before == 3
    assert all(request.path.startswith(f"/{bucket}") for request in proxy.seen[before:])


def test_stores_in_one_bucket_are_independent(s3_url: str, published_summary: Summary) -> None:
    assert open_or_create_store(f"{s3_url}-2").list_summaries() == []
    assert open_store(f"{s3_url}/").list_summaries() == [published_summary]


def test_public_bucket_is_read_with_unsigned_requests(
    proxy: Proxy, s3_endpoint: str, s3_url: str, published_summary: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = urlsplit(s3_url).netloc
    client = boto3.client("s3", endpoint_url=s3_endpoint, region_name=REGION)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with pytest.raises(InputError, match=r"permission denied by the server \(403\); .*AWS_SKIP_SIGNATURE"):
        open_store(s3_url)
    for item in client.list_objects_v2(Bucket=bucket)["Contents"]:
        client.put_object_acl(Bucket=bucket, Key=item["Key"], ACL="public-read")
    before = len(proxy.seen)
    store = open_store(s3_url)
    (summary,) = store.list_summaries()
    assert store.open_entry(summary).read_array("train/mean").shape == (4, 6)
    assert verify_entries(store)[0].is_sound
    assert summary == published_summary
    assert not any("authorization" in request.headers for request in proxy.seen[before:])


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "its endpoint refuses connections"),
        ({"AWS_ENDPOINT_URL": f"http://u:{CANARY}@127.0.0.1:9"}, "its endpoint refuses connections"),
        (
            {"AWS_ENDPOINT_URL": f"http://u:{CANARY}@no.invalid:9"},
            "the name of its endpoint cannot be resolved",
        ),
        ({"AWS_ALLOW_HTTP": ""}, "plain http: set AWS_ALLOW_HTTP=true"),
        ({"AWS_CONDITIONAL_PUT": CANARY}, "a setting for it in the environment is not valid"),
        (
            {
                "AWS_ACCESS_KEY_ID": "",
                "AWS_SECRET_ACCESS_KEY": "",
                "AWS_METADATA_ENDPOINT": "http://127.0.0.1:9",
            },
            "no credentials in the environment; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP",
        ),
    ],
)
def test_unreachable_s3_store_gives_a_one_line_error_with_the_reason(
    s3_url: str, variables: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    for attempt in (open_store, open_or_create_store):
        with pytest.raises(InputError) as error:
            attempt(s3_url)
        assert str(error.value).startswith(f"cannot use {s3_url}: ")
        assert reason in str(error.value)
        assert "\n" not in str(error.value)
        assert CANARY not in str(error.value)
        assert error.value.__cause__ is None
        assert error.value.__suppress_context__


@pytest.mark.parametrize(
    "endpoint", [f"http://u:{CANARY}/x@host:9", f"{CANARY}:9000", "http://", "http://host:x"]
)
def test_invalid_s3_endpoint_is_refused(s3_url: str, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(InputError, match=r"^AWS_ENDPOINT_URL in the environment is not a URL") as error:
        open_store(s3_url)
    assert CANARY not in str(error.value)


def test_missing_bucket_is_reported(s3_url: str) -> None:
    for attempt in (open_store, open_or_create_store):
        with pytest.raises(InputError, match="cannot use s3://no-such-bucket/x: there is no such bucket"):
            attempt("s3://no-such-bucket/x")


def test_bucket_without_a_store_is_reported(s3_url: str) -> None:
    with pytest.raises(InputError, match=rf"{s3_url} is not a store: .* create one with `sfm extract`"):
        open_store(s3_url)


@pytest.mark.parametrize("entries", [25, pytest.param(1000, marks=pytest.mark.torture)])
def test_listing_costs_one_request_per_entry(
    proxy: Proxy, s3_url: str, published_summary: Summary, entries: int
) -> None:
    store = open_or_create_store(s3_url)
    publish_fake_commits(store, published_summary, entries - 1)
    before = len(proxy.seen)
    assert len(store.list_summaries()) == entries
    requests = proxy.seen[before:]
    listings = [r for r in requests if "list-type=2" in r.path]
    assert len(requests) - len(listings) == entries
    assert len(listings) == -(-(2 * entries) // 1000)
    print(f"\ntorture: `ls` of {entries} entries on S3: {entries} requests and {len(listings)} listings")


def test_publishing_and_reading_cost_few_requests_per_object(proxy: Proxy, s3_url: str) -> None:
    store = open_or_create_store(s3_url)
    counts = [len(proxy.seen)]
    draft = Draft(store)
    write_random_arrays(draft)
    summary = publish_with_placeholder_cards(draft).summary
    counts.append(len(proxy.seen))
    entry = store.open_entry(summary)
    for name in entry.list_array_names():
        entry.read_array(name)
    counts.append(len(proxy.seen))
    writing, reading = np.diff(counts)
    objects = len(entry.commit.objects)
    assert writing <= 3 * objects
    assert reading == objects + 1
    print(
        f"\ntorture: an entry of {objects} objects on S3: {writing} requests to publish it, "
        f"{reading} to read all of it"
    )


def test_every_object_is_written_with_if_none_match(proxy: Proxy, s3_url: str) -> None:
    store = open_or_create_store(s3_url)
    draft = Draft(store)
    write_random_arrays(draft)
    summary = publish_with_placeholder_cards(draft).summary
    copy_entries(store, open_or_create_store(f"{s3_url}-copy"), [summary])
    remove_entry(store, summary)
    collect_garbage(store, delete_replaced_now=True)
    writing = [request for request in proxy.seen if request.method in ("PUT", "POST")]
    assert len(writing) > 20
    assert [r.path for r in writing if not r.creates and "delete" not in r.path] == []


def make_store_commands(url: str, other: str, out: Path) -> dict[str, list[str]]:
    """Return every command that takes a store, as a user would give it."""
    size = ("--image-size", "32")
    return {
        "extract": [
            *("extract", "builtin:fashion-mnist-6k", "--store", url, "--backbone", "lite0", *size),
            *("--limit-per-class", "5", "--sub-classes", "2", "--name", "garments", "--exemplars", "2"),
            *("--staging", str(out.parent / "staging")),
        ],
        "ls": ["store", "ls", url],
        "show": ["store", "show", url, "garments", "--history"],
        "verify": ["store", "verify", url],
        "copy": ["store", "copy", url, other],
        "distill": [
            *("distill", "--store", url, "--backbone", "lite0", "--dataset", "garments", *size),
            *("--out", str(out), "--steps", "3"),
        ],
        "evaluate": [
            *("evaluate", str(out), "--store", url, "--seeds", "1", "--epochs", "2", "--views", "2"),
            *("--projector-views", "2"),
        ],
        "merge": ["store", "merge", f"{url}-merged", f"{url}#garments", f"{other}#garments"],
        "rm": ["store", "rm", url, "garments"],
        "gc": ["store", "gc", url, "--now"],
    }


def run_sfm(arguments: list[str], output: Path, variables: dict[str, str]) -> tuple[int | None, str]:
    """Run a command in a process of its own; return its exit status and all it printed."""
    process = start_process(
        make_forkserver_context(), run_sfm_command, arguments, str(output), environment=variables
    )
    process.join()
    return process.exitcode, output.read_text()


def list_canary_forms() -> list[str]:
    """Return the secrets as they are, and as they look in a URL."""
    return [*SECRETS.values(), *(quote(value, safe="") for value in SECRETS.values()), CANARY]


@pytest.mark.slow
def test_credentials_do_not_appear_in_output_or_files_of_any_command(s3_url: str, tmp_path: Path) -> None:
    variables = {**environment(os.environ["AWS_ENDPOINT_URL"]), **SECRETS}
    out = tmp_path / "distilled"
    for name, arguments in make_store_commands(s3_url, f"{s3_url}-copy", out).items():
        status, printed = run_sfm(arguments, tmp_path / "printed", variables)
        if name == "merge":
            # The copy holds the very same images, and these may not be counted twice.
            assert status == 2, printed
        else:
            assert status == 0, f"{name}: {printed}"
        assert not any(form in printed for form in list_canary_forms()), name
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert CANARY.encode() not in file.read_bytes(), file
    run = json.loads((out / "run.json").read_text())
    assert run["store"] == s3_url
    for url in (s3_url, f"{s3_url}-copy"):
        objects = connect_object_store(url)
        for item in list_objects(objects):
            assert CANARY.encode() not in bytes(obstore.get(objects, item["path"]).bytes()), item["path"]


def assert_no_secrets(name: str, printed: str) -> None:
    """Check that a command that failed told no secret, and told it in a line."""
    assert not any(form in printed for form in list_canary_forms()), f"{name}: {printed}"
    assert "Traceback" not in printed, f"{name}: {printed}"


@pytest.mark.parametrize(
    "kind",
    [
        "a server that sends back all it was sent",
        "a URL",
        pytest.param("an endpoint", marks=pytest.mark.torture),
    ],
)
def test_credentials_do_not_appear_in_errors_of_any_command(
    proxy: Proxy, s3_url: str, published_summary: Summary, kind: str, tmp_path: Path
) -> None:
    out = make_distilled_folder(tmp_path)
    variables, url = {**environment(proxy.endpoint), **SECRETS}, s3_url
    proxy.choose = lambda _: "echo"
    if kind == "an endpoint":
        secret = quote(SECRETS["AWS_SECRET_ACCESS_KEY"], safe="")
        variables["AWS_ENDPOINT_URL"] = f"http://u:{secret}@127.0.0.1:9"
    if kind == "a URL":
        url = s3_url.replace("s3://", f"s3://u:{SECRETS['AWS_SECRET_ACCESS_KEY']}@")
    for name, arguments in make_store_commands(url, str(tmp_path / "copy"), out).items():
        status, printed = run_sfm(arguments, tmp_path / "printed", variables)
        assert_no_secrets(name, printed)
        assert status == 2, f"{name}: {printed}"
        assert printed.splitlines()[-1].startswith("error: "), f"{name}: {printed}"
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or CANARY.encode() not in file.read_bytes(), file


@pytest.mark.parametrize("moments", [[4], pytest.param(range(2, 62, 4), marks=pytest.mark.torture)])
def test_credentials_do_not_appear_in_errors_when_the_server_fails_midway(
    proxy: Proxy, s3_url: str, published_summary: Summary, moments: Iterable[int], tmp_path: Path
) -> None:
    out, failed = make_distilled_folder(tmp_path), 0
    variables = {**environment(proxy.endpoint), **SECRETS}
    for moment in moments:
        for name, arguments in make_store_commands(s3_url, f"{s3_url}-{moment}", out).items():
            last = len(proxy.seen) + moment
            proxy.choose = lambda r, last=last: "echo" if r.number >= last else None  # type: ignore[misc]
            status, printed = run_sfm(arguments, tmp_path / "printed", variables)
            assert_no_secrets(name, printed)
            failed += bool(status)
    assert failed
    print(f"\ntorture: {failed} commands that failed with all secrets in the server's answer told none")


def make_distilled_folder(folder: Path) -> Path:
    """Return a folder that looks like one that ``sfm distill`` wrote."""
    out = folder / "distilled"
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"command": "distill", "config": {}, "image_size": 96}))
    return out


def test_canary_credentials_are_sent_to_the_server(proxy: Proxy, s3_url: str, tmp_path: Path) -> None:
    """Otherwise the two tests above would find nothing because there is nothing to find."""
    variables = {**environment(proxy.endpoint), **SECRETS}
    run_sfm(["store", "ls", s3_url], tmp_path / "printed", variables)
    headers = proxy.seen[-1].headers
    assert headers["x-amz-security-token"] == SECRETS["AWS_SESSION_TOKEN"]
    assert f"Credential={SECRETS['AWS_ACCESS_KEY_ID']}/" in headers["authorization"]
    proxy.choose = lambda _: "echo"
    request = urllib.request.Request(f"{proxy.endpoint}/x", headers={"x-amz-security-token": CANARY})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert CANARY.encode() in error.value.read()
