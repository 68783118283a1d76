"""Shows a report with its viewer in a browser on this machine, by a server that gives out nothing else.

It listens on 127.0.0.1 alone, and wants a random token as the first part of every path: other users of the machine, and
pages of other sites in the same browser, do not know it. (A cookie would be sent to the servers on all ports.)
"""

import logging
import secrets
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from voxquilt.distributed.signals import interrupts_raised
from voxquilt.errors import ConfigError
from voxquilt.report.page import REPORT
from voxquilt.report.served_files import Answer, ServedFiles
from voxquilt.text import reason_of

log = logging.getLogger("voxquilt")

HOST = "127.0.0.1"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Connection": "close",
}


class ReportServer:
    """Serves the report of one output folder.

    Args:
        folder: The output folder, as it is when the server is made.
        port: The port; 0 takes a free one.

    Raises:
        InputError: the folder has no manifest.
        ConfigError: the port cannot be had.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.token = secrets.token_urlsafe(24)
        self._files = ServedFiles(folder)
        try:
            self._server = ThreadingHTTPServer((HOST, port), partial(_Handler, self))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"the server cannot listen on port {port} of {HOST}: {error}.") from error

    @property
    def port(self) -> int:
        """The port on which it listens."""
        return self._server.server_address[1]

    @property
    def hosts(self) -> list[list[str]]:
        """What a request's Host headers may be, which is one."""
        return [[f"{host}:{self.port}"] for host in (HOST, "localhost")]

    @property
    def url(self) -> str:
        """The address of the report."""
        return f"http://{HOST}:{self.port}/{self.token}/{REPORT}"

    def run(self) -> None:
        """Serve until Ctrl-C, or until another thread calls `stop`."""
        try:
            with interrupts_raised():
                self._server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            return

    def stop(self) -> None:
        """End `run`."""
        self._server.shutdown()

    def __enter__(self) -> "ReportServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.server_close()

    def find(self, path: str) -> Callable[[], Answer] | None:
        """What makes the answer to a request's path; None where nothing is served, or the token is wrong."""
        empty, token, rest = [*urlsplit(path).path.split("/", 2), "", ""][:3]
        if empty or not secrets.compare_digest(token.encode("utf-8", "replace"), self.token.encode()):
            return None
        return self._files.find(unquote_to_bytes(rest))


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    server_version = "voxquilt"
    sys_version = ""
    timeout = 60  # seconds that a connection may say nothing

    def __init__(self, report: ReportServer, *arguments: Any) -> None:
        self._report = report
        super().__init__(*arguments)

    def handle_one_request(self) -> None:
        """Answer a request; methods other than GET and HEAD are refused, with the same headers."""
        self.raw_requestline = self.rfile.readline(65537)
        self.close_connection = True  # one request per connection: there are few, and none waits for another
        if not self.raw_requestline or len(self.raw_requestline) > 65536 or not self.parse_request():
            return
        try:
            self._answer()
        except (BrokenPipeError, ConnectionResetError):  # the browser has left the page
            return

    def _answer(self) -> None:
        if self.command not in ("GET", "HEAD"):
            self._send(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET and HEAD", Allow="GET, HEAD")
        elif self.headers.get_all("Host") not in self._report.hosts:
            # A page of another site whose name leads to 127.0.0.1 (DNS rebinding) has that name here.
            self._send(HTTPStatus.MISDIRECTED_REQUEST, b"this is another server")
        elif self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            self._send(HTTPStatus.FORBIDDEN, b"asked for by another site")
        elif (make := self._report.find(self.path)) is None:
            self._send(HTTPStatus.NOT_FOUND, b"there is nothing here")
        else:
            self._make(make)

    def _make(self, make: Callable[[], Answer]) -> None:
        try:
            body, kind = make()
        except Exception as error:  # such as of a file that is gone or damaged
            log.warning("%s", reason_of(error))
            self._send(HTTPStatus.NOT_FOUND, reason_of(error).encode("utf-8", "backslashreplace"))
        else:
            self._send(HTTPStatus.OK, body, kind)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what is not HTTP, with the same headers."""
        self._send(HTTPStatus(code), (message or "").encode("utf-8", "backslashreplace"))

    def _send(self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8", **more: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in {**_HEADERS, **more}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: requests have the token in their paths."""
