"""Explain in one line why a Dask scheduler cannot be used."""

from sfm.text import sanitize_line

CONNECTION_PROBLEMS = (
    ("ssl_context", "a tls:// address needs a certificate, and Dask's configuration names none"),
    ("encryption required", "Dask's configuration asks for encryption: give a tls:// address"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not of the authority in Dask's configuration"),
    ("KEY_VALUES_MISMATCH", "certificate and key in Dask's configuration do not belong together"),
    ("No such file", "a file that Dask's configuration names for TLS is not there"),
    ("[SSL]", "a file that Dask's configuration names for TLS holds no certificate or key"),
    ("[X509", "a file that Dask's configuration names for TLS holds no certificate or key"),
    ("cannot convert to SSL", "it does not use TLS: give its tcp:// address"),
)
"""Substrings of error messages, and their explanation; the first match counts."""

DISCONNECT_SIGNS = ("ALERT", "EOF occurred", "reset by peer", "Stream is closed", "Broken pipe")


def explain_scheduler_error(address: str, error: BaseException) -> str:
    """Return one line that says why a scheduler cannot be used."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    reason = next(
        (reason for sign, reason in CONNECTION_PROBLEMS if any(sign in text for text in texts)), None
    )
    if reason is None and isinstance(error, ValueError):
        reason = f"{sanitize_line(str(error), 200)}: write tcp://HOST:PORT or tls://HOST:PORT"
    if reason is None and any(sign in text for text in texts for sign in DISCONNECT_SIGNS):
        reason = (
            "it does not accept the certificate in Dask's configuration"
            if address.startswith("tls://")
            else "it closes the connection: if it uses TLS, give its tls:// address"
        )
    if reason is None:
        return f"no Dask scheduler answers at {address}: start one with `dask scheduler`"
    return f"cannot use the Dask scheduler at {address}: {reason}"
