"""A Hub on localhost: the few endpoints that a push or a download needs; what goes either way is kept for the tests."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

__all__ = ["HEAD", "HubStandIn", "serve", "serve_this_process"]

HEAD = "a" * 40
USERS = {"Bearer good": "write", "Bearer reader": "read"}


class HubStandIn(ThreadingHTTPServer):
    """`repositories` maps ids to `{private, files}`; `commits` and `created` record what clients asked for.

    A repository with `content` ({name: bytes}) can be read, unless it is `gated`, and is at `commit`; `served` counts
    the bytes by file.
    """

    request_queue_size = 128
    """Clients that may wait at once: beyond the usual five, Linux resets connections on a busy machine."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.commits: list[dict[str, Any]] = []
        self.created: list[dict[str, Any]] = []
        self.blobs: dict[str, bytes] = {}
        self.served: dict[str, int] = {}
        self.failed: set[str] = set()
        self.silence = 6.0
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


@contextmanager
def serve_this_process(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[HubStandIn]:
    """A running stand-in that this process's own client talks to, which read its switches when it was imported."""
    from huggingface_hub import constants  # others set switches before they import it

    with serve() as stand_in:
        template = stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setenv("HF_TOKEN", "good")
        yield stand_in


class _Handler(BaseHTTPRequestHandler):
    server: HubStandIn

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._resolve()

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            self._resolve()
            return
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
        if "/tree/" in self.path:
            if "/" in self.path.partition("?")[0].partition("/tree/")[2]:  # no repository here has folders
                self._refuse(404, "EntryNotFound")
                return
            self._answer([_listed(name, content) for name, content in repository.get("content", {}).items()])
            return
        files = [{"rfilename": name} for name in repository["files"]]
        self._answer(
            {"id": repo_id, "sha": repository.get("commit", HEAD), "private": repository["private"], "siblings": files}
        )

    def _resolve(self) -> None:
        """A file, or the part of it in the Range header, or the Hub's own words for why not."""
        repo_id, _, rest = self.path.lstrip("/").partition("/resolve/")
        name = rest.partition("/")[2]
        repository = self.server.repositories.get(repo_id)
        if repository is None or repository.get("gated"):
            self._refuse(401, "RepoNotFound" if repository is None else "GatedRepo")
        elif (content := repository["content"].get(name)) is None:
            self._refuse(404, "EntryNotFound")
        else:
            self._send(repo_id, name, content)

    def _send(self, repo_id: str, name: str, content: bytes) -> None:
        asked = self.headers.get("Range", "").removeprefix("bytes=")
        first, last = (int(edge) for edge in asked.split("-")) if asked else (0, len(content) - 1)
        part = content[first : last + 1]
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.server.repositories[repo_id].get("commit", HEAD))
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "GET":
            key = f"{repo_id}/{name}"
            self.server.served[key] = self.server.served.get(key, 0) + len(part)
            self.wfile.write(part)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

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
            repository = self.server.repositories.get("/".join(self.path.split("/")[3:5]), {})
            there = repository.get("branches", {}).get(_branch(self.path), {})
            self._answer({"files": [_upload_mode(name, there.get(name)) for name in names]})
        elif self.path.endswith("/lfs/objects/batch"):
            repo_id = self.path.lstrip("/").partition(".git/")[0]
            if fault := self._fault(repo_id, "batch"):
                self._fail(fault)
                return
            self._answer(
                {"transfer": "basic", "objects": [self._action(repo_id, o) for o in json.loads(body)["objects"]]}
            )
        elif "/commit/" in self.path:
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._answer({})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        repo_id, _, oid = self.path.removeprefix("/blob/").rpartition("/")
        if fault := self._fault(repo_id, "put"):
            self._fail(fault)
            return
        self.server.blobs[oid] = body
        self._answer({})

    def _create(self, wanted: dict[str, Any]) -> None:
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        self.server.created.append(wanted)
        known = repo_id in self.server.repositories
        private = wanted.get("visibility") == "private"
        self.server.repositories.setdefault(repo_id, {"private": private, "files": [".gitattributes"]})
        self._answer({"url": f"{self.server.url}/{repo_id}"}, 409 if known else 200)

    def _action(self, repo_id: str, wanted: dict[str, Any]) -> dict[str, Any]:
        return {**wanted, "actions": {"upload": {"href": f"{self.server.url}/blob/{repo_id}/{wanted['oid']}"}}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        header = next(line["value"] for line in lines if line["key"] == "header")
        if "conflict" in self.path:
            self._answer({"error": "A commit has happened since.\nPlease refresh and try again."}, 412)
            return
        repo_id = "/".join(self.path.split("/")[3:5])
        fault = self._fault(repo_id, "commit")
        if fault and fault != "lost":
            self._fail(fault)
            return
        files: dict[str, bytes] = {}
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.server.blobs[line["value"]["oid"]]
        deleted = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
        self.server.commits.append({"path": self.path, "header": header, "files": files, "deleted": deleted})
        known = self.server.repositories[repo_id]
        branches = known.setdefault("branches", {})
        branches[_branch(self.path)] = {**branches.get(_branch(self.path), {}), **files}
        known["content"] = {**known.get("content", {}), **files}
        known["files"] = sorted({*known["files"], *files} - set(deleted))
        if fault == "lost":
            self._fail("reset")
            return
        repository = f"{self.server.url}/{'/'.join(self.path.split('/')[3:5])}"
        urls = {"commitUrl": f"{repository}/commit/{'b' * 40}", "pullRequestUrl": f"{repository}/discussions/1"}
        self._answer({**urls, "commitOid": "b" * 40})

    def _fault(self, repo_id: str, where: str) -> str:
        """What goes wrong the first time with a repository called `fault-WHERE-WHAT`; the second time all is well."""
        place, _, fault = repo_id.partition("/fault-")[2].partition("-")
        if place != where or repo_id in self.server.failed:
            return ""
        self.server.failed.add(repo_id)
        return fault

    def _fail(self, fault: str) -> None:
        if fault.isdigit():
            self._answer({"error": f"injected {fault}"}, int(fault))
        else:  # the connection ends without an answer, at once or after longer than anyone waits
            if fault == "timeout":
                time.sleep(self.server.silence)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, data: Any, status: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _branch(path: str) -> str:
    """`main` of `/api/models/owner/name/commit/main?create_pr=1`."""
    return path.partition("?")[0].split("/")[6]


def _listed(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": _git_sha1(content)}


def _upload_mode(name: str, there: bytes | None) -> dict[str, Any]:
    mode = "lfs" if name.endswith(".safetensors") else "regular"
    oid = None
    if there is not None:
        oid = hashlib.sha256(there).hexdigest() if mode == "lfs" else _git_sha1(there)
    return {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
