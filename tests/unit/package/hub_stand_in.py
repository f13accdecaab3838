"""A Hub on localhost: the few endpoints that a push needs, everything it receives kept for the tests to look at."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["HEAD", "HubStandIn", "serve"]

HEAD = "a" * 40
USERS = {"Bearer good": "write", "Bearer reader": "read"}


class HubStandIn(ThreadingHTTPServer):
    """`repositories` maps ids to `{private, files}`; `commits` and `created` record what clients asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.commits: list[dict[str, Any]] = []
        self.created: list[dict[str, Any]] = []
        self.blobs: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve() -> Iterator[HubStandIn]:
    """A running stand-in, stopped afterwards."""
    with HubStandIn() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubStandIn

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        role = USERS.get(self.headers.get("Authorization", ""))
        if self.path == "/api/whoami-v2":
            if role is None:
                self._answer({"error": "Invalid username or password."}, 401)
            else:
                self._answer({"name": "alice", "type": "user", "auth": {"accessToken": {"role": role}}})
            return
        repo_id = "/".join(self.path.split("/")[3:5])
        repository = self.server.repositories.get(repo_id)
        if repository is None:
            self._answer({"error": "Not found"}, 404)
            return
        files = [{"rfilename": name} for name in repository["files"]]
        self._answer({"id": repo_id, "sha": HEAD, "private": repository["private"], "siblings": files})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer good":
            self._answer({"error": "Forbidden"}, 403)
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [_upload_mode(name) for name in names]})
        elif self.path.endswith("/lfs/objects/batch"):
            self._answer({"transfer": "basic", "objects": [self._action(o) for o in json.loads(body)["objects"]]})
        elif "/commit/" in self.path:
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._answer({})

    def do_PUT(self) -> None:
        self.server.blobs[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({})

    def _create(self, wanted: dict[str, Any]) -> None:
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        self.server.created.append(wanted)
        known = repo_id in self.server.repositories
        private = wanted.get("visibility") == "private"
        self.server.repositories.setdefault(repo_id, {"private": private, "files": [".gitattributes"]})
        self._answer({"url": f"{self.server.url}/{repo_id}"}, 409 if known else 200)

    def _action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {**wanted, "actions": {"upload": {"href": f"{self.server.url}/blob/{wanted['oid']}"}}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        header = next(line["value"] for line in lines if line["key"] == "header")
        if "conflict" in self.path:
            self._answer({"error": "A commit has happened since.\nPlease refresh and try again."}, 412)
            return
        files = {}
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.server.blobs[line["value"]["oid"]]
        deleted = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
        self.server.commits.append({"path": self.path, "header": header, "files": files, "deleted": deleted})
        repository = f"{self.server.url}/{'/'.join(self.path.split('/')[3:5])}"
        urls = {"commitUrl": f"{repository}/commit/{'b' * 40}", "pullRequestUrl": f"{repository}/discussions/1"}
        self._answer({**urls, "commitOid": "b" * 40})

    def _answer(self, data: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _upload_mode(name: str) -> dict[str, Any]:
    mode = "lfs" if name.endswith(".safetensors") else "regular"
    return {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": None}
