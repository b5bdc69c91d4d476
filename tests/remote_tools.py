"""A web server in this process that lists folders, and misbehaves as it is told."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """What the server has, and how it misbehaves."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)
    """Further links of every folder's listing."""
    faults: list[int] = field(default_factory=list)
    """Statuses of the next answers, before all is well."""
    always: int | None = None
    cut: str | None = None
    """Bodies that end early: "honest" about their length before, or "silent"."""
    pause: float = 0.0
    """Seconds before each eighth of a body."""
    requests: Counter = field(default_factory=Counter)

    def gets(self, path: str) -> int:
        return self.requests["GET", path]


class Handler(BaseHTTPRequestHandler):
    server: "Server"

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        site, path = self.server.site, self.path.partition("?")[0]
        site.requests[self.command, path] += 1
        status = site.always or (site.faults.pop(0) if site.faults else 200)
        body = site.files.get(path)
        below = {name[len(path) :] for name in site.files if name.startswith(path)}
        if status != 200:
            self.head(status, {"Content-Length": "0"})
        elif body is not None:
            self.send(site, body, with_body)
        elif path.endswith("/") and below:
            entries = sorted({name.partition("/")[0] + "/" * ("/" in name) for name in below})
            links = [f'<a href="{name}">x</a>' for name in [*site.links, *entries]]
            listing = "".join(links).encode()
            size = {"Content-Length": str(len(listing)), "Content-Type": "text/html"}
            self.head(200, size)
            self.wfile.write(listing * with_body)
        elif any(name.startswith("/") for name in below):
            self.head(301, {"Location": path + "/", "Content-Length": "0"})
        else:
            self.head(404, {"Content-Length": "0"})

    def send(self, site: Site, body: bytes, with_body: bool) -> None:
        size = {"Content-Length": str(len(body))} if not (with_body and site.cut) else {}
        if site.cut == "honest":
            size = {"Content-Length": str(len(body))}
        self.head(200, size | {"Connection": "close"} | site.headers)
        step = len(body) // 8 + 1
        for start in range(0, len(body) if with_body else 0, step):
            if site.cut and start > len(body) // 2:
                return
            time.sleep(site.pause)
            self.wfile.write(body[start : start + step])

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    site: Site

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that are killed


@contextmanager
def serving() -> Iterator[Site]:
    """A server on a free port of this machine."""
    server = Server(("127.0.0.1", 0), Handler)
    server.site = Site(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server.site
    finally:
        server.shutdown()
        server.server_close()
