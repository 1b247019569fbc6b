"""A model hub on loopback: serves local folders under hub ids, as far as downloading asks."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(models: Mapping[str, Path]) -> Iterator[str]:
    """Yields the URL for HF_ENDPOINT.

    models: folders by hub id.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self, with_body: bool) -> None:
            path = urlsplit(self.path).path.lstrip("/")
            for name, folder in models.items():
                if path.startswith(f"api/models/{name}/revision/"):
                    return self._send(json.dumps(_listing(name, folder)).encode(), {}, with_body)
                if path.startswith(f"api/models/{name}/tree/"):
                    return self._send(json.dumps(_tree(folder)).encode(), {}, with_body)
                file = folder / path.rpartition("/")[2]
                if path.startswith(f"{name}/resolve/") and file.is_file():
                    body = file.read_bytes()
                    tag = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
                    return self._send(body, tag, with_body)
            return self.send_error(404)

        def _send(self, body: bytes, headers: Mapping[str, str], with_body: bool) -> None:
            self.send_response(200)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _listing(name: str, folder: Path) -> dict[str, object]:
    return {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file["path"]} for file in _tree(folder)]}


def _tree(folder: Path) -> list[dict[str, object]]:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name} for file in files]
