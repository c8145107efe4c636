"""A hub of one repository on a local port, as far as `huggingface_hub` asks for it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    def __init__(self, repository: str, files: Mapping[str, bytes]) -> None:
        self.repository = repository
        self.files = files
        self.fetched: list[str] = []
        """Names of the files whose content was sent."""
        self.url = ""


@contextmanager
def fake_hub(repository: str, files: Mapping[str, bytes]) -> Iterator[FakeHub]:
    hub = FakeHub(repository, files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = self.path.split("?")[0]
            file = path.removeprefix(f"/{hub.repository}/resolve/").partition("/")[2]
            if path.startswith(f"/api/models/{hub.repository}"):
                siblings = [{"rfilename": name, "size": len(content)} for name, content in hub.files.items()]
                listing = {"id": hub.repository, "sha": COMMIT, "siblings": siblings}
                if "/tree/" in path:
                    entries = [
                        {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                        for name, content in hub.files.items()
                    ]
                    self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"}, body)
                else:
                    self._send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"}, body)
            elif file in hub.files:
                content = hub.files[file]
                if body:
                    hub.fetched.append(file)
                tag = hashlib.sha1(content).hexdigest()
                self._send(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, body)
            else:
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)

        def _send(self, status: int, content: bytes, headers: Mapping[str, str], body: bool) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
