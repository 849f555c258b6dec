"""An HTTP proxy in front of the S3 server that breaks requests on purpose, and counts them."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal[
    "500",
    "503",
    "drop",  # the request never arrives
    "truncate",  # half of the answer's body, then the connection closes
    "short",  # half of the answer's body, and a length that says that this is all
    "lose answer",  # the request is carried out, and the connection closes before the answer
    "500 after",  # the request is carried out, and the answer says that it failed
    "501",
    "unconditional",  # the condition is ignored, as by a server that does not know it
    "echo",  # refused, with everything the client sent in the answer, as some servers do
]

ERRORS = {
    "500": (500, b"<Error><Code>InternalError</Code><Message>We broke it.</Message></Error>"),
    "501": (501, b"<Error><Code>NotImplemented</Code><Message>No conditions here.</Message></Error>"),
    "503": (503, b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"),
    "500 after": (500, b"<Error><Code>InternalError</Code><Message>We broke it.</Message></Error>"),
}


@dataclass(frozen=True)
class Request:
    """A request as the proxy saw it."""

    number: int
    method: str
    path: str
    headers: dict[str, str]

    @property
    def creates(self) -> bool:
        """Whether it may only create an object that is not there."""
        return self.headers.get("if-none-match") == "*"


@dataclass
class Proxy:
    """What the proxy does and has seen.

    Attributes
    ----------
    endpoint : str
        Where it listens.
    choose : callable
        Returns the fault that befalls a request, or None; may be replaced at any time.
    latency : float
        Seconds that every answer takes more.
    seen, broken : list of Request
    most : int
        Most requests that waited for their answers at a time.
    """

    endpoint: str
    choose: Callable[[Request], Fault | None] = lambda _: None
    latency: float = 0.0
    seen: list[Request] = field(default_factory=list)
    broken: list[Request] = field(default_factory=list)
    under_way: int = 0
    most: int = 0


@contextmanager
def run_fault_proxy(upstream: str) -> Iterator[Proxy]:
    """Run a proxy in front of `upstream` on a free port."""
    host, port = urlsplit(upstream).hostname, urlsplit(upstream).port
    lock, creating, over = threading.Lock(), threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            with lock:
                proxy.under_way += 1
                proxy.most = max(proxy.most, proxy.under_way)
            ended = over.wait(proxy.latency)
            with lock:
                # Before it is answered: a client that has its answer may already be at the next.
                proxy.under_way -= 1
            if ended:
                self.close_connection = True
            else:
                self.handle_one()

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            with lock:
                request = Request(len(proxy.seen), self.command, self.path, headers)
                proxy.seen.append(request)
                fault = proxy.choose(request)
                if fault:
                    proxy.broken.append(request)
            if fault == "drop":
                self.close_connection = True
                return
            if fault in ("500", "501", "503"):
                self.answer(*ERRORS[fault])
                return
            if fault == "echo":
                lines = "".join(f"{k}: {v}\n" for k, v in headers.items())
                self.answer(
                    403, f"<Error><Code>InvalidToken</Code><T>{self.path}\n{lines}</T></Error>".encode()
                )
                return
            if fault == "unconditional":
                headers.pop("if-none-match", None)
            # moto looks and then writes, so two creations can both succeed there; S3 does not let them.
            with creating if request.creates else threading.Lock():
                status, answer_headers, data = self.forward(headers, body)
            if fault == "lose answer":
                self.close_connection = True
            elif fault == "500 after":
                self.answer(*ERRORS[fault])
            elif fault == "truncate":
                self.answer(status, data, answer_headers, send=len(data) // 2)
                self.close_connection = True
            elif fault == "short":
                self.answer(status, data[: len(data) // 2], answer_headers)
            else:
                self.answer(status, data, answer_headers)

        def forward(self, headers: dict[str, str], body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection(host or "", port, timeout=60)
            # The host that the client signed: the server must see the same one.
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            return answer.status, answer.getheaders(), data

        def answer(
            self,
            status: int,
            data: bytes,
            headers: list[tuple[str, str]] | None = None,
            send: int | None = None,
        ) -> None:
            self.send_response_only(status)
            own = ("content-length", "connection", "transfer-encoding")
            for name, value in headers or []:
                if name.lower() not in own:
                    self.send_header(name, value)
            length = {name.lower(): value for name, value in headers or []}.get("content-length")
            head = self.command == "HEAD" and length is not None
            self.send_header("Content-Length", str(length if head else len(data)))
            self.end_headers()
            self.wfile.write(data if send is None else data[:send])
            self.wfile.flush()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        over.set()
        server.shutdown()
        server.server_close()
