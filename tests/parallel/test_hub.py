"""Ranks on one machine that are given a name on the hub: each file is downloaded once for all."""

import hashlib
import json
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest
from helpers import rank_jobs
from helpers.rank_processes import run_ranks

NAME, COMMIT = "someone/p4", "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The hub's API as far as a download needs it, over one folder."""

    folder: Path
    downloads: Counter

    def do_HEAD(self):
        self._send(self._body(), body=False)

    def do_GET(self):
        path = urlsplit(self.path).path
        if path.startswith("/api/"):
            self._send(self._api(path))
            return
        self.downloads[Path(path).name] += 1
        time.sleep(0.5)  # the other ranks ask meanwhile
        self._send(self._body())

    def _api(self, path: str) -> bytes:
        if "/tree/" in path:
            files = self.folder.iterdir()
            answer = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": sha(f)}
                for f in files
            ]
            return json.dumps(answer).encode()
        return json.dumps({"id": NAME, "sha": COMMIT, "siblings": []}).encode()

    def _body(self) -> bytes:
        return (self.folder / Path(urlsplit(self.path).path).name).read_bytes()

    def _send(self, data: bytes, *, body: bool = True):
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args):
        pass


def sha(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(model):
    handler = type("Handler", (Hub,), {"folder": model, "downloads": Counter()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler.downloads
        server.shutdown()


def test_every_file_is_downloaded_once(hub, model, tmp_path):
    address, downloads = hub
    run = ["generate", "--model", NAME, "-p", "Hello", "-n", "6", "--parallel", "streams"]
    first, second = run_ranks(2, rank_jobs.run_command_with_hub, address, tmp_path, [run, run])
    assert (first.exit_code, second.exit_code) == (0, 0), first.err
    assert first.out and not second.out
    # The case's expected values are none of a model's files.
    assert downloads == Counter({f.name for f in model.iterdir()} - {"expected.safetensors"})
