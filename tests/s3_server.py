"""A real S3 server over HTTP on loopback, as a process of its own."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from obstore.store import S3Store

REGION = "eu-central-1"


def environment(endpoint: str) -> dict[str, str]:
    """What a user sets to reach a store on an S3 server of their own."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": REGION,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
    }


@contextmanager
def run_s3_server() -> Iterator[str]:
    """Run moto_server on a free port; yields its endpoint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_server(endpoint, process)
        yield endpoint
    finally:
        process.terminate()
        process.wait()


def wait_for_server(endpoint: str, process: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    """Wait until the server answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"{endpoint}/moto-api/", timeout=5).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def create_bucket(endpoint: str, bucket: str) -> None:
    """Make a bucket."""
    create = urllib.request.Request(
        f"{endpoint}/{bucket}",
        method="PUT",
        data=b"<CreateBucketConfiguration><LocationConstraint>"
        + REGION.encode()
        + b"</LocationConstraint></CreateBucketConfiguration>",
    )
    urllib.request.urlopen(create, timeout=10).close()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The endpoint of an S3 server that lives as long as the session."""
    with run_s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3_url(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket of one's own, with the credentials to use it in the environment."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in environment(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    bucket = f"store-{uuid.uuid4().hex[:12]}"
    create_bucket(s3_endpoint, bucket)
    return f"s3://{bucket}/team/stats"


def open_bucket(s3_url: str) -> S3Store:
    """The bucket behind a URL, for looking at and damaging what is in it."""
    return S3Store.from_url(s3_url)
