"""`retort ui [RUN_DIR]`: the report, made anew whenever the run has gone on, at an address of this machine."""

import argparse
import hashlib
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from retort.cli.report import page_of
from retort.cli.report.run_files import read_run, read_run_status
from retort.cli.status import newest_run

LOCAL = {"127.0.0.1", "localhost"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", nargs="?", type=Path, help="directory of the run; default: the newest under runs/")
    parser.add_argument("--port", type=int, default=0, help="default: any free one")


def main(args: argparse.Namespace) -> int:
    """Serve until interrupted. Raises ConfigError when there is no such run."""
    with make_server(args.run_dir or newest_run(Path("runs")), args.port) as server:
        print(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


def make_server(run_dir: Path, port: int) -> ThreadingHTTPServer:
    read_run(run_dir)
    return ThreadingHTTPServer(("127.0.0.1", port), partial(_Answer, LiveReport(run_dir)))


class LiveReport:
    """The newest page of a run."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._lock = Lock()
        self._made_of = ""
        self._page = b""

    def stamp(self) -> str:
        """Changes when a file does that the page is made of."""
        files = [self._run_dir / name for name in ("config.toml", "metrics.jsonl")]
        times = [file.stat().st_mtime_ns for file in files if file.exists()]
        # The launcher writes status.json anew all the time; of it only how the run ended makes another page.
        ended = read_run_status(self._run_dir).get("exit_code")
        return hashlib.sha256(repr([*times, ended]).encode()).hexdigest()[:16]

    def page(self) -> bytes:
        with self._lock:
            stamp = self.stamp()
            if stamp != self._made_of:
                self._page, self._made_of = page_of(read_run(self._run_dir), stamp), stamp
            return self._page


class _Answer(BaseHTTPRequestHandler):
    def __init__(self, report: LiveReport, *connection: object) -> None:
        self._report = report
        super().__init__(*connection)  # type: ignore[arg-type]  # as the server passes them

    def do_GET(self) -> None:
        # Another name for this address could be a web site's, which must not read a run (DNS rebinding).
        if self.headers.get("Host", "").rpartition(":")[0] not in LOCAL:
            self.send_error(HTTPStatus.FORBIDDEN, "use http://127.0.0.1")
        elif self.path == "/":
            self._send(self._report.page(), "text/html; charset=utf-8")
        elif self.path == "/stamp":
            self._send(self._report.stamp().encode(), "text/plain")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nobody wants a line for every request."""
