"""What clouds need from the environment, and what their errors mean: one line, and never a credential.

The variables are those that obstore reads. An error is told by its kind alone and never in its own words:
servers send back what they were sent, tokens included, and the address of an endpoint may hold a password.
"""

import ipaddress
import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from sfm.errors import InputError


@dataclass(frozen=True)
class Cloud:
    """A provider.

    Attributes
    ----------
    prefix : str
        What the names of its variables begin with.
    container : str
        What it calls a bucket.
    credentials : str
        How to give some.
    file : str
        Variable that names a file of credentials.
    address : str
        Variables that decide which server is asked.
    urls : tuple of str
        Variables that hold an address; obstore panics at some that are none.
    headers : tuple of str
        Variables that are sent in a header or as a part of an address; likewise.
    """

    prefix: str
    container: str
    credentials: str
    file: str
    address: str
    urls: tuple[str, ...]
    headers: tuple[str, ...]


AMAZON = Cloud(
    prefix="AWS",
    container="bucket",
    credentials=(
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket"
    ),
    file="AWS_WEB_IDENTITY_TOKEN_FILE",
    address="AWS_ENDPOINT_URL and AWS_REGION",
    urls=(
        "AWS_ENDPOINT",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_ENDPOINT_URL_STS",
        "AWS_METADATA_ENDPOINT",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ),
    headers=(
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_TOKEN",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    ),
)
GOOGLE = Cloud(
    prefix="GOOGLE",
    container="bucket",
    credentials="set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    file="GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT",
    address="GOOGLE_BASE_URL",
    urls=("GOOGLE_BASE_URL",),
    headers=("GOOGLE_BEARER_TOKEN",),
)
AZURE = Cloud(
    prefix="AZURE",
    container="container",
    credentials=(
        "set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or "
        "AZURE_SKIP_SIGNATURE=true for a public container"
    ),
    file="AZURE_FEDERATED_TOKEN_FILE",
    address="AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ENDPOINT",
    urls=(
        "AZURE_STORAGE_ENDPOINT",
        "AZURE_ENDPOINT",
        "AZURE_STORAGE_AUTHORITY_HOST",
        "AZURE_AUTHORITY_HOST",
        "AZURE_MSI_ENDPOINT",
        "AZURE_IDENTITY_ENDPOINT",
        "AZURE_FABRIC_TOKEN_SERVICE_URL",
        "AZURITE_BLOB_STORAGE_URL",
    ),
    headers=(
        "AZURE_STORAGE_ACCOUNT_NAME",
        "AZURE_STORAGE_TOKEN",
        "AZURE_FABRIC_WORKLOAD_HOST",
        "AZURE_FABRIC_SESSION_TOKEN",
        "AZURE_FABRIC_CLUSTER_IDENTIFIER",
    ),
)
CLOUDS = {"s3": AMAZON, "s3a": AMAZON, "gs": GOOGLE, "az": AZURE, "abfs": AZURE, "abfss": AZURE}
"""By the scheme of a URL."""

NO_CREDENTIALS = "no credentials in the environment; {credentials}"
NO_CONTAINER = "there is no such {container}"

REASONS = (
    ("/latest/api/token", NO_CREDENTIALS),
    ("/computeMetadata/", NO_CREDENTIALS),
    ("/metadata/identity", NO_CREDENTIALS),
    ("MissingAccount", "no AZURE_STORAGE_ACCOUNT_NAME in the environment; {credentials}"),
    ("InvalidAccessKey {", "AZURE_STORAGE_ACCOUNT_KEY in the environment is not an account key (base64)"),
    ("MissingSasComponent", "AZURE_STORAGE_SAS_TOKEN in the environment is not a shared access signature"),
    ("AzureCli", "AZURE_USE_AZURE_CLI is set, and `az` gives no token: run `az login`"),
    ("OpenCredentials", "the file that {file} names cannot be opened"),
    ("FederatedTokenFile", "the file that {file} names cannot be opened"),
    ("Failed to read token file", "the file that {file} names cannot be opened"),
    ("DecodeCredentials", "the file that {file} names does not hold credentials that are known here"),
    ("ReadPem", "the private key in the file that {file} names is not one"),
    (
        "ServiceAccountPathAndKeyProvided",
        "unset one of GOOGLE_SERVICE_ACCOUNT and GOOGLE_SERVICE_ACCOUNT_KEY",
    ),
    ("TokenRequest", "no token can be had for the credentials in the environment; {credentials}"),
    ("BadScheme", "its endpoint is plain http: set {prefix}_ALLOW_HTTP=true to use it all the same"),
    ("InvalidContentType", "its endpoint does not speak TLS: check {address}, and write http:// if it is so"),
    (
        "InvalidCertificate",
        "the certificate of its endpoint is not trusted: set SSL_CERT_FILE to its issuer's",
    ),
    ("NoSuchBucket", NO_CONTAINER),
    ("ContainerNotFound", NO_CONTAINER),
    ("ResourceNotFound", "there is no such {container} or account, or it is not public: check {address}"),
    ("PublicAccessNotPermitted", "the account has no public containers; {credentials}"),
    ("InvalidResourceName", "that is no name of a {container}"),
    ("OutOfRangeInput", "that is no name of a {container}; on an emulator, the endpoint ends in /ACCOUNT"),
    ("PermanentRedirect", "the bucket is in another region: set AWS_REGION"),
    ("InvalidAccessKeyId", "the server does not know the access key in the environment; {credentials}"),
    (
        "SignatureDoesNotMatch",
        "the secret in the environment is not that of the access key; {credentials}",
    ),
    (
        "Server failed to authenticate the request",
        "the server does not accept the key or token in the environment; {credentials}",
    ),
    ("ExpiredToken", "the credentials in the environment have expired; {credentials}"),
    ("dns error", "the name of its endpoint cannot be resolved: check {address}"),
    ("ConnectionRefused", "its endpoint refuses connections: check {address}"),
    ("ConnectionReset", "its endpoint breaks connections off: check {address}, https:// or http://"),
    ("TimedOut", "its endpoint does not answer: check {address}"),
    ("503 Service Unavailable", "its endpoint stays busy (503)"),
    ("500 Internal Server Error", "its endpoint keeps failing (500)"),
    ("400 Bad Request", "its endpoint does not understand the request (400): check {address}"),
    ("401 Unauthorized", "the server does not accept the credentials in the environment; {credentials}"),
    ("403 Forbidden", "permission denied by the server (403); {credentials}"),
    ("404 Not Found", "its endpoint has nothing at that address (404): check {address}"),
    ("501 Not Implemented", "its endpoint does not know the request (501): check {address}"),
    ("Config error", "a setting for it in the environment is not valid: look through {prefix}_..."),
    ("HTTP client", "a setting for it in the environment is not valid: look through {prefix}_..."),
    ("InvalidHeader", "a setting for it in the environment is not valid: look through {prefix}_..."),
    ("InvalidUri", "a setting for it in the environment is not valid: check {address}"),
    ("InvalidPort", "a setting for it in the environment is not valid: check {address}"),
    ("UnableToParse", "a setting for it in the environment is not valid: check {address}"),
    ("Unable to recognise URL", "the URL is not complete"),
)
"""Signs of an error's cause, first match first, and what is said then."""


def reason(error: BaseException, scheme: str) -> str:
    """Return why a cloud failed, and what to do about it, in one line without credentials."""
    text = str(error)
    said = next((said for sign, said in REASONS if sign in text), None)
    if said is None:
        said = f"the request failed ({type(error).__name__})"
    return said.format(**vars(CLOUDS[scheme]))


def is_without_container(error: BaseException) -> bool:
    """Say whether an object was not found because there is not even a bucket."""
    return any(sign in str(error) for sign in ("NoSuchBucket", "ContainerNotFound", "ResourceNotFound"))


def require_environment(scheme: str) -> None:
    """Refuse variables that no request can be made with; obstore panics at some.

    Raises
    ------
    InputError
        Names the variable; does not repeat its value.
    """
    cloud = CLOUDS[scheme]
    for name in cloud.urls:
        if not is_url(os.environ.get(name, "http://host")):
            raise InputError(
                f"{name} in the environment is not a URL: write http(s)://HOST or http(s)://HOST:PORT, or "
                f"unset it"
            )
    for name in cloud.headers:
        part_of_host = name.endswith(("_REGION", "_ACCOUNT_NAME"))
        if not re.fullmatch(r"[A-Za-z0-9-]*" if part_of_host else r"[!-~]*", os.environ.get(name, "")):
            raise InputError(
                f"{name} in the environment holds a space, a line break or another character that cannot be "
                f"part of it: set it again without"
            )


def is_url(text: str) -> bool:
    """Say whether a text is the address of a web server, in ASCII, by the stricter rules of browsers."""
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
        if "[" in parts.netloc:
            ipaddress.IPv6Address(host)
        elif re.fullmatch(r"(.*\.)?([0-9]+|0x[0-9a-f]*)\.?", host):
            ipaddress.IPv4Address(host)
        else:
            # Names in other scripts, written in ASCII.
            host.encode("ascii").decode("idna")
        valid = parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:
        return False
    # urlsplit forgives white space at the ends, which obstore does not.
    return (
        valid
        and bool(re.fullmatch(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+", text))
        and bool(re.fullmatch(r"(.*@)?([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?", parts.netloc))
    )
