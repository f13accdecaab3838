"""The run's page live on this machine: http.server on the loopback address, drawn anew when the run's files change.

A web framework would bring routes, workers and a port open to the network; this answers one path to one person.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from toolkit.errors import ResourceError
from toolkit.report.page import render_page
from toolkit.run_folder import RunFolder

__all__ = ["REFRESH_SECONDS", "page_server"]

REFRESH_SECONDS = 5
_OURS = ("127.0.0.1", "localhost")


def page_server(run: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server of the page at `http://127.0.0.1:PORT/`, for the caller to run and close; port 0 takes a free one.

    Raises:
        ModelError: there is no run here. ResourceError: the port is taken.
    """
    render_page(run)
    drawn: dict[tuple[int, ...], bytes] = {}

    def page() -> bytes:
        folder = RunFolder(run)
        files = (folder.recipe, folder.plan, folder.metrics, folder.experts, folder.summary)
        stamp = tuple(file.stat().st_mtime_ns if file.is_file() else 0 for file in files)
        if stamp not in drawn:
            drawn.clear()
            drawn[stamp] = render_page(run, REFRESH_SECONDS).encode()
        return drawn[stamp]

    try:
        return ThreadingHTTPServer((_OURS[0], port), _handler(page))
    except OSError as error:
        raise ResourceError(f"--port {port}: {error.strerror}; give another, or 0 for a free one") from None


def _handler(page: Callable[[], bytes]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page elsewhere may point a name of its own at this address; the name it asks under gives it away.
            if self.headers.get("Host", "").rpartition(":")[0] not in _OURS or self.path != "/":
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            body = page()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: one person reads this."""

    return Handler
