"""Dask under TLS as docs/extraction.md shows it; certificate problems are explained in one line."""

import contextlib
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dask
import pytest
from typer.testing import CliRunner

from sfm.cli import app
from sfm.pipeline.worker_pool import scheduler_client

DOCS = Path(__file__).parents[2] / "docs" / "extraction.md"
EXAMPLE = re.compile(
    r"<!-- run by tests/pipeline/test_scheduler_tls.py -->\n\n```(?:sh|yaml)\n(.*?)```", re.DOTALL
)
MAKE_CERTIFICATES, CONFIGURATION, COMMANDS = EXAMPLE.findall(DOCS.read_text(encoding="utf-8"))


def make_certificates(folder: Path) -> Path:
    """Run the lines of the docs in a folder, with keys that are quicker to make; return Dask's file."""
    folder.mkdir()
    for line in MAKE_CERTIFICATES.replace("rsa:3072", "rsa:2048").splitlines():
        subprocess.run(shlex.split(line), cwd=folder, check=True, capture_output=True)
    file = folder / "dask.yaml"
    file.write_text(CONFIGURATION.replace("/shared/tls", str(folder)))
    return file


def find_free_port() -> int:
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def dask_tls_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the configuration of a cluster's processes."""
    return make_certificates(tmp_path_factory.mktemp("tls") / "cluster")


@pytest.fixture(scope="module")
def scheduler_address(dask_tls_config: Path) -> Iterator[str]:
    """Start a scheduler and a worker as the docs do; return the scheduler's address."""
    port = find_free_port()
    commands = COMMANDS.replace("HOST", "127.0.0.1").replace("8786", str(port)).splitlines()
    scheduler, worker, _ = (shlex.split(line)[1:] for line in commands)
    quiet: dict[str, Any] = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "cwd": dask_tls_config.parent,
    }
    environment = {**os.environ, "DASK_CONFIG": str(dask_tls_config)}
    running = [
        subprocess.Popen([sys.executable, "-m", "dask", *words, "--no-dashboard"], env=environment, **quiet)
        for words in (scheduler, [*worker, "--no-nanny"])
    ]
    try:
        wait_for_listener(port)
        yield f"tls://127.0.0.1:{port}"
    finally:
        for process in running:
            process.kill()
            process.wait()


def wait_for_listener(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    raise TimeoutError(port)


def dask_configuration(more: Mapping[str, Any]) -> Any:
    """Return a context in which Dask's configuration has this, too."""
    return dask.config.set(dask.config.merge(dask.config.config, more))


def run_extract_command(tmp_path: Path, scheduler: str, configuration: Mapping[str, Any]) -> tuple[int, str]:
    """Run the last command of the docs, on other images; return its exit status and what it printed."""
    words = shlex.split(COMMANDS.splitlines()[-1])[1:]
    given = {"--store": tmp_path / "store", "--staging": tmp_path / "staging", "--scheduler": scheduler}
    for option, value in given.items():
        words[words.index(option) + 1] = str(value)
    words[1] = "builtin:fashion-mnist-6k"
    small = ["--image-size", "32", "--limit-per-class", "10", "--sub-classes", "2", "--quiet"]
    with dask_configuration(configuration):
        done = CliRunner().invoke(app, [*words, *small])
    return done.exit_code, done.output


@pytest.mark.slow
def test_an_extraction_runs_on_a_worker_under_tls(
    tmp_path: Path, scheduler_address: str, dask_tls_config: Path
) -> None:
    status, printed = run_extract_command(
        tmp_path, scheduler_address, dask.config.collect(paths=[str(dask_tls_config)], env={})
    )
    assert status == 0, printed
    assert "published" in printed


def test_the_client_certificate_may_be_set_in_the_environment(
    tmp_path: Path, scheduler_address: str, dask_tls_config: Path
) -> None:
    names = re.findall(r"`(DASK_DISTRIBUTED__COMM__TLS__\w+)`", DOCS.read_text(encoding="utf-8"))
    environment = dict(
        zip(names, (str(dask_tls_config.parent / f"{x}.pem") for x in ("ca", "cert", "key")), strict=True)
    )
    configuration = dask.config.collect(paths=[], env=environment)
    with dask_configuration(configuration), scheduler_client(scheduler_address) as client:
        assert list(client.nthreads().values()) == [8]


def use_other_authority(folder: Path, dask_tls_config: Path) -> dict[str, Any]:
    return dask.config.collect(paths=[str(make_certificates(folder))], env={})


def use_rejected_certificate(folder: Path, dask_tls_config: Path) -> dict[str, Any]:
    configuration = use_other_authority(folder, dask_tls_config)
    configuration["distributed"]["comm"]["tls"]["ca-file"] = str(dask_tls_config.parent / "ca.pem")
    return configuration


def use_missing_file(folder: Path, dask_tls_config: Path) -> dict[str, Any]:
    configuration = dask.config.collect(paths=[str(dask_tls_config)], env={})
    configuration["distributed"]["comm"]["tls"]["client"]["key"] = str(folder / "nowhere.pem")
    return configuration


@pytest.mark.parametrize(
    ("scheme", "make", "reason"),
    [
        ("tls", None, "a tls:// address needs a certificate, and Dask's configuration names none"),
        ("tls", use_other_authority, "its certificate is not of the authority in Dask's configuration"),
        ("tls", use_rejected_certificate, "it does not accept the certificate in Dask's configuration"),
        ("tls", use_missing_file, "a file that Dask's configuration names for TLS is not there"),
        ("tcp", None, "it closes the connection: if it uses TLS, give its tls:// address"),
        ("tcp", use_other_authority, "Dask's configuration asks for encryption: give a tls:// address"),
    ],
)
def test_an_unsuitable_certificate_exits_with_code_2_and_a_one_line_error(
    tmp_path: Path, scheduler_address: str, dask_tls_config: Path, scheme: str, make: Any, reason: str
) -> None:
    begun = time.monotonic()
    scheduler = f"{scheme}{scheduler_address[3:]}"
    status, printed = run_extract_command(
        tmp_path, scheduler, make(tmp_path / "tls", dask_tls_config) if make else {}
    )
    assert status == 2, printed
    assert printed.splitlines()[-1] == f"error: cannot use the Dask scheduler at {scheduler}: {reason}"
    assert "Traceback" not in printed
    assert time.monotonic() - begun < 10
