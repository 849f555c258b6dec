"""Cloud providers: check their environment variables, and explain their errors without credentials.

The variables are those that obstore reads. An explanation never quotes the error: servers echo requests,
tokens included, and the address of an endpoint may hold a password.
"""

import ipaddress
import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from sfm.errors import InputError


@dataclass(frozen=True)
class CloudProvider:
    """A cloud provider: its environment variables and its terms, as error messages name them.

    Attributes
    ----------
    variable_prefix : str
        Prefix of the names of its variables.
    container_term : str
        Its term for a bucket.
    credentials_advice : str
        How to set credentials.
    credentials_file_variables : str
        Variables that hold the path of a credentials file.
    endpoint_variables : str
        Variables that determine the server.
    url_variables : tuple of str
        Variables that hold a URL; obstore panics at some invalid ones.
    header_or_host_variables : tuple of str
        Variables that are sent in a header or as a part of a host name; likewise.
    """

    variable_prefix: str
    container_term: str
    credentials_advice: str
    credentials_file_variables: str
    endpoint_variables: str
    url_variables: tuple[str, ...]
    header_or_host_variables: tuple[str, ...]


AMAZON = CloudProvider(
    variable_prefix="AWS",
    container_term="bucket",
    credentials_advice=(
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket"
    ),
    credentials_file_variables="AWS_WEB_IDENTITY_TOKEN_FILE",
    endpoint_variables="AWS_ENDPOINT_URL and AWS_REGION",
    url_variables=(
        "AWS_ENDPOINT",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_ENDPOINT_URL_STS",
        "AWS_METADATA_ENDPOINT",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ),
    header_or_host_variables=(
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_TOKEN",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    ),
)
GOOGLE = CloudProvider(
    variable_prefix="GOOGLE",
    container_term="bucket",
    credentials_advice=(
        "set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket"
    ),
    credentials_file_variables="GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT",
    endpoint_variables="GOOGLE_BASE_URL",
    url_variables=("GOOGLE_BASE_URL",),
    header_or_host_variables=("GOOGLE_BEARER_TOKEN",),
)
AZURE = CloudProvider(
    variable_prefix="AZURE",
    container_term="container",
    credentials_advice=(
        "set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or "
        "AZURE_SKIP_SIGNATURE=true for a public container"
    ),
    credentials_file_variables="AZURE_FEDERATED_TOKEN_FILE",
    endpoint_variables="AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ENDPOINT",
    url_variables=(
        "AZURE_STORAGE_ENDPOINT",
        "AZURE_ENDPOINT",
        "AZURE_STORAGE_AUTHORITY_HOST",
        "AZURE_AUTHORITY_HOST",
        "AZURE_MSI_ENDPOINT",
        "AZURE_IDENTITY_ENDPOINT",
        "AZURE_FABRIC_TOKEN_SERVICE_URL",
        "AZURITE_BLOB_STORAGE_URL",
    ),
    header_or_host_variables=(
        "AZURE_STORAGE_ACCOUNT_NAME",
        "AZURE_STORAGE_TOKEN",
        "AZURE_FABRIC_WORKLOAD_HOST",
        "AZURE_FABRIC_SESSION_TOKEN",
        "AZURE_FABRIC_CLUSTER_IDENTIFIER",
    ),
)
PROVIDERS_BY_SCHEME = {"s3": AMAZON, "s3a": AMAZON, "gs": GOOGLE, "az": AZURE, "abfs": AZURE, "abfss": AZURE}
"""By the scheme of a URL."""

MISSING_CREDENTIALS = "no credentials in the environment; {credentials_advice}"
MISSING_CONTAINER = "there is no such {container_term}"

ERROR_EXPLANATIONS = (
    ("/latest/api/token", MISSING_CREDENTIALS),
    ("/computeMetadata/", MISSING_CREDENTIALS),
    ("/metadata/identity", MISSING_CREDENTIALS),
    ("MissingAccount", "no AZURE_STORAGE_ACCOUNT_NAME in the environment; {credentials_advice}"),
    ("InvalidAccessKey {", "AZURE_STORAGE_ACCOUNT_KEY in the environment is not an account key (base64)"),
    ("MissingSasComponent", "AZURE_STORAGE_SAS_TOKEN in the environment is not a shared access signature"),
    ("AzureCli", "AZURE_USE_AZURE_CLI is set, and `az` gives no token: run `az login`"),
    ("OpenCredentials", "the file that {credentials_file_variables} names cannot be opened"),
    ("FederatedTokenFile", "the file that {credentials_file_variables} names cannot be opened"),
    ("Failed to read token file", "the file that {credentials_file_variables} names cannot be opened"),
    (
        "DecodeCredentials",
        "the file that {credentials_file_variables} names does not hold credentials that are known here",
    ),
    ("ReadPem", "the private key in the file that {credentials_file_variables} names is not one"),
    (
        "ServiceAccountPathAndKeyProvided",
        "unset one of GOOGLE_SERVICE_ACCOUNT and GOOGLE_SERVICE_ACCOUNT_KEY",
    ),
    ("TokenRequest", "no token can be had for the credentials in the environment; {credentials_advice}"),
    ("BadScheme", "its endpoint is plain http: set {variable_prefix}_ALLOW_HTTP=true to use it all the same"),
    (
        "InvalidContentType",
        "its endpoint does not speak TLS: check {endpoint_variables}, and write http:// if it is so",
    ),
    (
        "InvalidCertificate",
        "the certificate of its endpoint is not trusted: set SSL_CERT_FILE to its issuer's",
    ),
    ("NoSuchBucket", MISSING_CONTAINER),
    ("ContainerNotFound", MISSING_CONTAINER),
    (
        "ResourceNotFound",
        "there is no such {container_term} or account, or it is not public: check {endpoint_variables}",
    ),
    ("PublicAccessNotPermitted", "the account has no public containers; {credentials_advice}"),
    ("InvalidResourceName", "that is no name of a {container_term}"),
    (
        "OutOfRangeInput",
        "that is no name of a {container_term}; on an emulator, the endpoint ends in /ACCOUNT",
    ),
    ("InvalidBucketName", "that is no name of a {container_term}"),
    ("AuthorizationHeaderMalformed", "the bucket is in another region: set AWS_REGION"),
    ("PermanentRedirect", "the bucket is in another region: set AWS_REGION"),
    (
        "InvalidAccessKeyId",
        "the server does not know the access key in the environment; {credentials_advice}",
    ),
    (
        "SignatureDoesNotMatch",
        "the secret in the environment is not that of the access key; {credentials_advice}",
    ),
    (
        "Server failed to authenticate the request",
        "the server does not accept the key or token in the environment; {credentials_advice}",
    ),
    ("ExpiredToken", "the credentials in the environment have expired; {credentials_advice}"),
    ("dns error", "the name of its endpoint cannot be resolved: check {endpoint_variables}"),
    ("ConnectionRefused", "its endpoint refuses connections: check {endpoint_variables}"),
    (
        "ConnectionReset",
        "its endpoint breaks connections off: check {endpoint_variables}, https:// or http://",
    ),
    ("TimedOut", "its endpoint does not answer: check {endpoint_variables}"),
    ("503 Service Unavailable", "its endpoint stays busy (503)"),
    ("500 Internal Server Error", "its endpoint keeps failing (500)"),
    ("400 Bad Request", "its endpoint does not understand the request (400): check {endpoint_variables}"),
    (
        "401 Unauthorized",
        "the server does not accept the credentials in the environment; {credentials_advice}",
    ),
    ("403 Forbidden", "permission denied by the server (403); {credentials_advice}"),
    ("404 Not Found", "its endpoint has nothing at that address (404): check {endpoint_variables}"),
    ("501 Not Implemented", "its endpoint does not know the request (501): check {endpoint_variables}"),
    ("Config error", "a setting for it in the environment is not valid: look through {variable_prefix}_..."),
    ("HTTP client", "a setting for it in the environment is not valid: look through {variable_prefix}_..."),
    ("InvalidHeader", "a setting for it in the environment is not valid: look through {variable_prefix}_..."),
    ("InvalidUri", "a setting for it in the environment is not valid: check {endpoint_variables}"),
    ("InvalidPort", "a setting for it in the environment is not valid: check {endpoint_variables}"),
    ("UnableToParse", "a setting for it in the environment is not valid: check {endpoint_variables}"),
    ("Unable to recognise URL", "the URL is not complete"),
)
"""Texts that identify an error, and what to tell the user about it; the first match counts."""


def explain_cloud_error(error: BaseException, url_scheme: str) -> str:
    """Return why a request to a cloud failed and what to do about it, in one line without credentials."""
    text = str(error)
    explanation = next(
        (explanation for error_text, explanation in ERROR_EXPLANATIONS if error_text in text), None
    )
    if explanation is None:
        explanation = f"the request failed ({type(error).__name__})"
    return explanation.format(**vars(PROVIDERS_BY_SCHEME[url_scheme]))


def is_missing_bucket_error(error: BaseException) -> bool:
    """Return whether an error says that the bucket or container does not exist."""
    return any(
        error_text in str(error) for error_text in ("NoSuchBucket", "ContainerNotFound", "ResourceNotFound")
    )


def require_valid_cloud_environment(url_scheme: str) -> None:
    """Check the environment variables of a provider; obstore panics at some invalid ones.

    Raises
    ------
    InputError
        Names an invalid variable, without its value.
    """
    cloud = PROVIDERS_BY_SCHEME[url_scheme]
    for name in cloud.url_variables:
        if not is_http_url(os.environ.get(name, "http://host")):
            raise InputError(
                f"{name} in the environment is not a URL: write http(s)://HOST or http(s)://HOST:PORT, or "
                f"unset it"
            )
    for name in cloud.header_or_host_variables:
        is_host_part = name.endswith(("_REGION", "_ACCOUNT_NAME"))
        if not re.fullmatch(r"[A-Za-z0-9-]*" if is_host_part else r"[!-~]*", os.environ.get(name, "")):
            raise InputError(
                f"{name} in the environment holds a space, a line break or another character that cannot be "
                f"part of it: set it again without"
            )


def is_http_url(text: str) -> bool:
    """Return whether a text is an ASCII http or https URL, by the stricter rules of browsers."""
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
        if "[" in parts.netloc:
            ipaddress.IPv6Address(host)
        elif re.fullmatch(r"(.*\.)?([0-9]+|0x[0-9a-f]*)\.?", host):
            ipaddress.IPv4Address(host)
        else:
            # Decodes internationalized names, which ASCII spells as xn--.
            host.encode("ascii").decode("idna")
        valid = parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:
        return False
    # urlsplit strips white space at the ends; obstore does not.
    return (
        valid
        and bool(re.fullmatch(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+", text))
        and bool(re.fullmatch(r"(.*@)?([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?", parts.netloc))
    )
