"""Shows a report in a browser on this machine, and writes it again while its sweep goes on.

Only this machine is answered, and only under its own names (a page of another site cannot reach it through a name that
it has point here). Only what report writes is given out, by a walk that follows no link.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
import stat
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from peft_align.errors import Fault, InputError, WorkError
from peft_align.reporting.subject import Subject
from peft_align.terminal import say

ADDRESS = "127.0.0.1"
PAGE, TEXTS = "report.html", ("findings.md", "results.md")
TEXT = "text/plain; charset=utf-8"
TYPES = {
    **dict.fromkeys((".csv", ".md", ".tex"), TEXT),
    ".html": "text/html; charset=utf-8",
    ".svg": "image/svg+xml",
    ".pdf": "application/pdf",
    ".parquet": "application/octet-stream",
}
SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
FRAMED = "frame-ancestors 'none'"
INERT = f"default-src 'none'; style-src 'unsafe-inline'; sandbox; {FRAMED}"  # of a drawing: it runs nothing
POLL = 5000  # milliseconds between two questions for the version
# Of the served page alone; the file asks nobody. It keeps the place that is read.
SCRIPT = """
(() => {
  const shown = "VERSION", kept = "peft_align_scroll";
  const place = sessionStorage.getItem(kept);
  sessionStorage.removeItem(kept);
  if (place !== null) addEventListener("load", () => scrollTo(0, Number(place)));
  setInterval(async () => {
    try {
      const answer = await fetch("/version", {cache: "no-store"});
      if (!answer.ok || await answer.text() === shown) return;
      sessionStorage.setItem(kept, String(scrollY));
      location.reload();
    } catch { /* the server has ended: what is shown stays */ }
  }, POLL);
})();
"""
POLICY = re.compile(rb'<meta http-equiv="Content-Security-Policy" content="[^">]*">')


class Watched(Protocol):
    """What is reported on: read anew, and a cheap answer to whether it changed."""

    @property
    def subject(self) -> Callable[[], Subject]: ...

    @property
    def state(self) -> Callable[[], str]: ...


@dataclass
class Refresher:
    """Writes the report when what it is of has changed.

    Attributes:
        known: the state that was written last.
    """

    source: Watched
    write: Callable[[Subject], object]
    every: float
    known: str = ""
    ended: threading.Event = field(default_factory=threading.Event)

    def look(self) -> bool:
        """Write if something changed; whether it did."""
        state = self.source.state()  # before reading: what changes meanwhile is seen by the next look
        if state == self.known:
            return False
        self.write(self.source.subject())
        self.known = state
        return True

    def run(self) -> None:
        """Look again and again, until told to end; a fault is told, and does not end it."""
        told = ""
        while not self.ended.wait(self.every):
            try:
                self.look()
                told = ""
            except (InputError, WorkError, OSError) as error:
                text = error.render() if isinstance(error, InputError) else str(error)
                if text != told:
                    say(f"the report was not written again: {text}", file=sys.stderr)
                told = text


def serve(source: Watched, write: Callable[[Subject], object], folder: Path, port: int, every: float) -> None:
    """Write the report, show it until interrupted (Ctrl-C, TERM), and keep it up to date.

    Args:
        source: what is reported on.
        write: writes a subject's files.
        folder: where they lie.
        port: 0: any that is free.
        every: seconds between two looks.

    Raises:
        InputError: the port is in use; or the report cannot be written.
    """
    refresher = Refresher(source, write, every)
    with listening(folder, port) as server:
        thread = threading.Thread(target=refresher.run, name="refresh")
        try:
            refresher.look()
            say(f"http://{ADDRESS}:{server.server_port}/ shows {folder}; Ctrl-C ends it", flush=True)
            thread.start()
            server.serve_forever()
        except KeyboardInterrupt:
            say("ended; the report stays where it is")
        finally:
            refresher.ended.set()
            if thread.is_alive():
                thread.join()


def listening(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of a folder that does not answer yet. Raises InputError."""
    handler = type("Handler", (_Handler,), {"folder": folder.absolute()})
    try:
        server = ThreadingHTTPServer((ADDRESS, port), handler)
    except OSError as error:
        told = f"cannot be listened at: {error.strerror}"
        raise InputError([Fault(f"--serve {port}", told, "give another port, or none for any that is free")]) from None
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    """One request. Nothing of it is printed: it is text of others."""

    folder: Path
    timeout = 30  # seconds that a silent client holds a thread

    def do_GET(self) -> None:
        own: Any = self.server.server_address
        if self.headers.get_all("Host") not in [[f"{name}:{own[1]}"] for name in (ADDRESS, "localhost")]:
            return self._answer(HTTPStatus.FORBIDDEN, b"this host is not served\n")
        try:
            path = unquote(urlsplit(self.path).path, errors="strict")
        except ValueError:
            return self._answer(HTTPStatus.NOT_FOUND, b"there is no such file\n")
        if path == "/version":
            return self._answer(HTTPStatus.OK, version(self.folder).encode())
        if path in ("/", f"/{PAGE}"):
            return self._answer(HTTPStatus.OK, page(self.folder), TYPES[".html"])
        suffix = Path(path).suffix
        content = read_below(self.folder, path.removeprefix("/")) if suffix in TYPES else None
        if content is None:
            return self._answer(HTTPStatus.NOT_FOUND, b"there is no such file\n")
        inert = suffix in (".html", ".svg")
        return self._answer(HTTPStatus.OK, content, TYPES[suffix], INERT if inert else FRAMED)

    do_HEAD = do_GET

    def _refuse(self) -> None:
        self._answer(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET and HEAD\n", Allow="GET, HEAD")

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

    def _answer(self, status: HTTPStatus, content: bytes, kind: str = TEXT, policy: str = FRAMED, **more: str) -> None:
        self.send_response(status)
        told = SAFE | {"Content-Security-Policy": policy, "Content-Type": kind, "Content-Length": str(len(content))}
        for name, value in (told | more).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def version_string(self) -> str:
        return "peft_align"

    def log_message(self, format: str, *args: Any) -> None:
        pass


def version(folder: Path) -> str:
    """What changes when the page is written again."""
    stamps = []
    for name in (PAGE, *TEXTS):
        try:
            found = os.lstat(folder / name)
        except OSError:
            continue
        stamps.append(f"{name[:1]}{found.st_mtime_ns:x}-{found.st_ino:x}")
    return ".".join(stamps)


def page(folder: Path) -> bytes:
    """The report's page with the script that asks for the version; where there is none, its texts."""
    code = SCRIPT.replace("VERSION", version(folder)).replace("POLL", str(POLL)).encode()
    script = b"<script>" + code + b"</script>"
    found = read_below(folder, PAGE)
    if found is None:
        texts = [(read_below(folder, name) or b"").decode("utf-8", "replace") for name in TEXTS]
        shown = "".join(f"<pre>{html.escape(text)}</pre>\n" for text in texts)
        found = f"<!doctype html>\n<meta charset=utf-8>\n<title>Report</title>\n{shown}</body>".encode()
    # the page's own policy lets its own scripts run alone, and ask nobody: this one may, this server
    mark = b"'sha256-" + base64.b64encode(hashlib.sha256(code).digest()) + b"'"
    found = POLICY.sub(lambda policy: _widened(policy[0], mark), found, count=1)
    before, end, after = found.rpartition(b"</body>")
    return before + script + end + after if end else found + script


def _widened(policy: bytes, mark: bytes) -> bytes:
    """A page's policy that also lets the script with this digest run, and ask this server."""
    return policy.replace(b"script-src ", b"connect-src 'self'; script-src " + mark + b" ", 1)


def read_below(folder: Path, path: str) -> bytes | None:
    """The content of a plain file below a folder; None if there is none, or a link stands in the way.

    Each part is opened from the folder before it, so that nothing can be put in its place in between.
    """
    parts = path.split("/")
    if any(not part or part.startswith(".") or "\\" in part or "\0" in part for part in parts):
        return None
    at = -1
    try:
        at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for i, part in enumerate(parts):
            kind = os.O_NONBLOCK if i == len(parts) - 1 else os.O_DIRECTORY
            deeper = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | kind, dir_fd=at)
            os.close(at)
            at = deeper
        if not stat.S_ISREG(os.fstat(at).st_mode):
            return None
        with os.fdopen(at, "rb", closefd=False) as file:
            return file.read()
    except OSError:
        return None
    finally:
        if at >= 0:
            os.close(at)
