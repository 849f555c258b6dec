"""What is wrong with a cloud, in one line that says what to do and tells no secret.

The answers ContainerNotFound, ResourceNotFound, AuthorizationFailure, InvalidResourceName and OutOfRangeInput
were recorded from Azurite 3. All others are as the documentation of Azure, Amazon and Google has them.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from obstore.exceptions import GenericError

from sfm.errors import InputError
from sfm.stats_store.cloud_providers import (
    ERROR_EXPLANATIONS,
    PROVIDERS_BY_SCHEME,
    is_http_url,
    require_valid_cloud_environment,
)
from sfm.stats_store.location import connect_object_store, explain_store_error
from sfm.stats_store.store import Store, open_or_create_store, open_store

CANARY = "C4N4RY"
KEY = "QzRONFJZ"
AZURE = {"AZURE_STORAGE_ACCOUNT_NAME": "account", "AZURE_STORAGE_ACCOUNT_KEY": KEY}
PUBLIC = {"GOOGLE_SKIP_SIGNATURE": "true"}
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def clear_cloud_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of a cloud, no credentials in the home folder, and one attempt."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "AZURITE_", "GOOGLE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sfm.stats_store.objects.RETRY_DELAYS", ())
    monkeypatch.setitem(connect_object_store.__globals__["SHORT_RETRY"], "max_retries", 0)


@contextmanager
def serve_error(status: int, code: str, message: str) -> Iterator[str]:
    """Serve one error, as a cloud does, to every request; return the address."""
    body = (
        f'<?xml version="1.0"?>\n<Error>\n<Code>{code}</Code>\n<Message>{message}</Message></Error>'.encode()
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def assert_open_error(url: str, reason: str, open_it: Callable[[str], object] = open_store) -> None:
    with pytest.raises(InputError) as error:
        open_it(url)
    line = str(error.value)
    assert line.startswith(f"cannot use {url}: {reason}"), line
    assert CANARY not in line
    assert KEY not in line
    assert "\n" not in line
    assert error.value.__cause__ is None


UNSIGNED = (403, "AuthorizationFailure", "Server failed to authenticate the request. Make sure the value of")
ANSWERS = [
    (
        "s3",
        (400, "AuthorizationHeaderMalformed", "The region is wrong."),
        "the bucket is in another region: se",
    ),
    ("s3", (400, "InvalidBucketName", "The specified bucket is not valid."), "that is no name of a bucket"),
    (
        "s3",
        (403, "AccessDenied", "Access Denied"),
        "permission denied by the server (403); set AWS_ACCESS_KEY_ID",
    ),
    (
        "az",
        (404, "ContainerNotFound", "The specified container does not exist."),
        "there is no such container",
    ),
    (
        "az",
        (404, "ResourceNotFound", "The specified resource does not exist."),
        "there is no such container or",
    ),
    ("az", UNSIGNED, "the server does not accept the key or token in the environment; set AZURE_STORAGE_ACC"),
    ("az", (403, "AuthenticationFailed", UNSIGNED[2]), "the server does not accept the key or token in the"),
    (
        "az",
        (400, "InvalidResourceName", "The name contains invalid characters."),
        "that is no name of a contai",
    ),
    (
        "az",
        (400, "OutOfRangeInput", "The length is not within the limits."),
        "that is no name of a container; on",
    ),
    (
        "az",
        (409, "PublicAccessNotPermitted", "Public access is not permitted."),
        "the account has no public co",
    ),
    ("gs", (404, "NoSuchBucket", "The specified bucket does not exist."), "there is no such bucket"),
    (
        "gs",
        (403, "AccessDenied", "Access denied."),
        "permission denied by the server (403); set GOOGLE_APPLICAT",
    ),
    (
        "gs",
        (401, "AuthenticationRequired", "Authentication required."),
        "the server does not accept the crede",
    ),
]


@pytest.mark.parametrize(("scheme", "answer", "reason"), ANSWERS, ids=[f"{a[0]}-{a[1][1]}" for a in ANSWERS])
def test_cloud_server_error_names_the_variables_to_set(
    scheme: str, answer: tuple[int, str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, code, message = answer
    with serve_error(status, code, f"{message} {CANARY}") as address:
        variables = {**AZURE, "AZURE_STORAGE_ENDPOINT": f"{address}/account", "AZURE_ALLOW_HTTP": "true"}
        variables |= {"AWS_ENDPOINT_URL": address, "AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": "k"}
        variables |= {**PUBLIC, "GOOGLE_BASE_URL": address, "AWS_SECRET_ACCESS_KEY": CANARY}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        for open_it in (open_store, open_or_create_store):
            assert_open_error(f"{scheme}://place/x", reason, open_it)


ENVIRONMENTS = [
    (
        "az",
        {},
        "no AZURE_STORAGE_ACCOUNT_NAME in the environment; set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_",
    ),
    (
        "az",
        {**AZURE, "AZURE_STORAGE_ENDPOINT": NOWHERE},
        "its endpoint is plain http: set AZURE_ALLOW_HTTP=true",
    ),
    (
        "gs",
        {**PUBLIC, "GOOGLE_BASE_URL": NOWHERE, "GOOGLE_ALLOW_HTTP": "false"},
        "its endpoint is plain http: set G",
    ),
    (
        "az",
        {**AZURE, "AZURE_STORAGE_ENDPOINT": NOWHERE, "AZURE_ALLOW_HTTP": "true"},
        "its endpoint refuses connections: check AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ENDPOINT",
    ),
    ("gs", {**PUBLIC, "GOOGLE_BASE_URL": NOWHERE}, "its endpoint refuses connections: check GOOGLE_BASE_URL"),
    (
        "az",
        {**AZURE, "AZURE_STORAGE_ENDPOINT": "https://no.invalid"},
        "the name of its endpoint cannot be resolved",
    ),
    (
        "az",
        {**AZURE, "AZURE_STORAGE_ACCOUNT_KEY": f"{CANARY}!"},
        "AZURE_STORAGE_ACCOUNT_KEY in the environment is n",
    ),
    (
        "az",
        {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_SAS_TOKEN": CANARY},
        "AZURE_STORAGE_SAS_TOKEN in the environment is not a shared access signature",
    ),
    (
        "az",
        {**AZURE, "AZURE_ALLOW_HTTP": CANARY},
        "a setting for it in the environment is not valid: look through A",
    ),
    (
        "gs",
        {"GOOGLE_SKIP_SIGNATURE": CANARY},
        "a setting for it in the environment is not valid: look through GOO",
    ),
    (
        "gs",
        {"GOOGLE_APPLICATION_CREDENTIALS": f"/{CANARY}"},
        "the file that GOOGLE_APPLICATION_CREDENTIALS or GOOGLE",
    ),
    (
        "gs",
        {"GOOGLE_SERVICE_ACCOUNT": f"/{CANARY}"},
        "the file that GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE",
    ),
    (
        "gs",
        {"GOOGLE_SERVICE_ACCOUNT_KEY": CANARY},
        "the file that GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_A",
    ),
    (
        "gs",
        {"GOOGLE_SERVICE_ACCOUNT": CANARY, "GOOGLE_SERVICE_ACCOUNT_KEY": CANARY},
        "unset one of GOOGLE_SERVICE_ACCOUNT and GOOGLE_SERVICE_ACCOUNT_KEY",
    ),
]


@pytest.mark.parametrize(("scheme", "variables", "reason"), ENVIRONMENTS)
def test_invalid_cloud_environment_gives_a_one_line_error(
    scheme: str, variables: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert_open_error(f"{scheme}://place/x", reason)


NO_KEY = {"type": "service_account", "private_key": CANARY, "private_key_id": "", "client_email": "a@b"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (f"{{{CANARY}", "does not hold credentials that are known here"),
        ("{}", "does not hold credentials that are known here"),
        (
            json.dumps({"type": "external_account", "audience": CANARY}),
            "does not hold credentials that are known",
        ),
        (
            json.dumps({**NO_KEY, "project_id": "p", "client_id": "1"}),
            "the private key in the file that GOOGLE_APP",
        ),
        (None, "does not hold credentials that are known here"),
    ],
)
def test_invalid_google_credentials_file_is_reported(
    content: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / CANARY
    file.mkdir() if content is None else file.write_text(content)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    with pytest.raises(InputError, match=r"^cannot use gs://place/x: the ") as error:
        open_store("gs://place/x")
    assert reason in str(error.value)
    assert CANARY not in str(error.value)


@pytest.mark.parametrize(
    "value",
    [
        *("", CANARY, "http://", "://", "http://[", "http://host:x", "http://host:99999", "http://host:0"),
        *(
            f"http://u:{CANARY}/x@host",
            "ftp://host",
            "file:///x",
            " http://host",
            "http://host\n",
            "http://ho st",
        ),
        "http://é.invalid",
    ],
)
@pytest.mark.parametrize(
    "cloud", [*{id(c): c for c in PROVIDERS_BY_SCHEME.values()}.values()], ids=lambda c: c.variable_prefix
)
def test_invalid_cloud_endpoint_is_refused_before_any_request(
    cloud: object, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = next(scheme for scheme, known in PROVIDERS_BY_SCHEME.items() if known is cloud)
    for name in PROVIDERS_BY_SCHEME[scheme].url_variables:
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(InputError, match=f"^{name} in the environment is not a URL: .*or unset it$"):
                connect_object_store(f"{scheme}://place/x")


@pytest.mark.parametrize("end", ["\n", " ", "é", "\r\nX-Evil: 1"])
def test_credential_invalid_in_a_header_is_refused_before_any_request(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for scheme, cloud in PROVIDERS_BY_SCHEME.items():
        for name in cloud.header_or_host_variables:
            with monkeypatch.context() as patch:
                patch.setenv(name, CANARY + end)
                with pytest.raises(InputError, match=f"^{name} in the environment holds a ") as error:
                    connect_object_store(f"{scheme}://place/x")
                assert CANARY not in str(error.value)


parts = st.text(st.sampled_from('ahtp:/[]@.%#?1 \\"<>^`{|}\té'), max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@example(scheme="http://", rest=".1")
@example(scheme="http://", rest="xn--0")
@given(scheme=st.sampled_from(["http://", "https://"]), rest=parts)
def test_accepted_endpoint_url_does_not_panic_obstore(
    scheme: str, rest: str, capfd: pytest.CaptureFixture[str]
) -> None:
    address = f"{scheme}{rest}"
    if not is_http_url(address):
        return
    # Through a proxy that is not there, so that no name of the test's is asked for on the network.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOOGLE_BASE_URL", address)
        patch.setenv("GOOGLE_PROXY_URL", NOWHERE)
        patch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
        with pytest.raises(InputError):
            open_store("gs://place/x")
    assert "panicked" not in capfd.readouterr().err


def test_obstore_panic_gives_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "account.json"
    content = {"gcs_base_url": CANARY, "disable_oauth": True, "client_email": "", "private_key": ""}
    file.write_text(json.dumps({**content, "private_key_id": ""}))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(file))
    assert_open_error(
        "gs://place/x", "a setting for it in the environment is not valid: check GOOGLE_BASE_URL"
    )


def test_every_error_explanation_can_be_formatted_for_every_cloud() -> None:
    for scheme, cloud in PROVIDERS_BY_SCHEME.items():
        for sign, _ in ERROR_EXPLANATIONS:
            line = explain_store_error(GenericError(sign), f"{scheme}://place/x")
            assert "{" not in line
        require_valid_cloud_environment(scheme)
        plain = explain_store_error(GenericError("BadScheme"), f"{scheme}://place/x")
        assert plain.endswith(f"set {cloud.variable_prefix}_ALLOW_HTTP=true to use it all the same")


def test_store_repr_does_not_call_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Obstore panics at the text of an Azure store whose account is in the environment."""
    for name, value in AZURE.items():
        monkeypatch.setenv(name, value)
    assert repr(Store("az://place/x", connect_object_store("az://place/x"))) == "Store(url='az://place/x')"
