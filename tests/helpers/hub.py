"""The hub, as far as kdb asks it, on loopback; and the folder of files that every commit holds.

Only the network is pretended: huggingface_hub talks to it as it does to the real one, and DuckDB reads files from it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.util
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

TOKEN = "hf_test"


def refuse(status: int, code: str, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})


@dataclass
class Hub:
    """Datasets by name: their commits, each a mapping of paths to contents, and what was asked."""

    url: str = ""
    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    sent: int = 0
    read_only: bool = False
    rivals: list[Any] = field(default_factory=list)
    """Called, one at a commit, just before it: others who push at that moment."""

    def files(self, name: str) -> dict[str, bytes]:
        """The files of a dataset as it is now."""
        return list(self.commits[name].values())[-1]

    def commit(self, name: str, added: dict[str, bytes]) -> str:
        history = self.commits.setdefault(name, {})
        files = {**(self.files(name) if history else {}), **added}
        sha = hashlib.sha1(repr((len(history), sorted(files))).encode()).hexdigest()
        history[sha] = files
        return sha

    def app(self) -> Starlette:
        routes = [
            Route("/api/validate-yaml", self._validate, methods=["POST"]),
            Route("/api/repos/create", self._create, methods=["POST"]),
            Route("/api/datasets/{owner}/{name}/preupload/{revision}", self._preupload, methods=["POST"]),
            Route("/api/datasets/{owner}/{name}/commit/{revision}", self._commit, methods=["POST"]),
            Route("/api/datasets/{owner}/{name}/revision/{revision}", self._info),
            Route("/api/datasets/{owner}/{name}/tree/{revision}", self._tree),
            Route("/datasets/{owner}/{name}/resolve/{revision}/{path:path}", self._resolve),
            Route("/content/{owner}/{name}/{revision}/{path:path}", self._content),
        ]
        return Starlette(routes=routes)

    def _at(self, request: Request) -> dict[str, bytes] | JSONResponse:
        name = "{owner}/{name}".format(**request.path_params)
        self.asked.append((request.method, request.url.path))
        if name not in self.commits:
            return refuse(404, "RepoNotFound", "Repository not found")
        revision = request.path_params["revision"]
        if revision != "main" and revision not in self.commits[name]:
            return refuse(404, "RevisionNotFound", "Invalid rev id")
        return self.files(name) if revision == "main" else self.commits[name][revision]

    def _may_write(self, request: Request) -> JSONResponse | None:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return refuse(401, "", "Invalid username or password.")
        return refuse(403, "", "You don't have the rights") if self.read_only else None

    async def _create(self, request: Request) -> Response:
        if refused := self._may_write(request):
            return refused
        asked = await request.json()
        name = f"{asked.get('organization')}/{asked['name']}"
        if name in self.commits:
            return JSONResponse({"error": "You already created this", "url": f"{self.url}/datasets/{name}"}, 409)
        self.commit(name, {".gitattributes": b"*.parquet filter=lfs\n"})
        return JSONResponse({"url": f"{self.url}/datasets/{name}"})

    async def _validate(self, request: Request) -> Response:
        if "license: no-such-licence" in (await request.json())["content"]:
            return JSONResponse({"errors": [{"message": '"license" must be one of …'}], "warnings": []}, 400)
        return JSONResponse({"errors": [], "warnings": []})

    async def _preupload(self, request: Request) -> Response:
        if refused := self._may_write(request):
            return refused
        files = (await request.json())["files"]
        return JSONResponse(
            {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        )

    async def _commit(self, request: Request) -> Response:
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        name = "{owner}/{name}".format(**request.path_params)
        if self.rivals:
            self.rivals.pop()()
        parent = next(line["value"] for line in lines if line["key"] == "header").get("parentCommit")
        if parent is not None and parent != list(self.commits[name])[-1]:
            return refuse(412, "", "The commit is not based on the latest one")
        added = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        sha = self.commit(name, added)
        return JSONResponse(
            {"commitUrl": f"{self.url}/datasets/{name}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None}
        )

    async def _info(self, request: Request) -> Response:
        files = self._at(request)
        if isinstance(files, JSONResponse):
            return files
        name, revision = "{owner}/{name}".format(**request.path_params), request.path_params["revision"]
        sha = list(self.commits[name])[-1] if revision == "main" else revision
        return JSONResponse({"id": name, "sha": sha, "siblings": [{"rfilename": path} for path in files]})

    async def _tree(self, request: Request) -> Response:
        files = self._at(request)
        if isinstance(files, JSONResponse):
            return files
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]
        return JSONResponse(entries)

    async def _resolve(self, request: Request) -> Response:
        """Small files, or where the content of others lies: as the hub does with those that git-lfs keeps."""
        files = self._at(request)
        if isinstance(files, JSONResponse):
            return files
        path = request.path_params["path"]
        if path not in files:
            return refuse(404, "EntryNotFound", "Entry not found")
        name, revision = "{owner}/{name}".format(**request.path_params), request.path_params["revision"]
        sha = list(self.commits[name])[-1] if revision == "main" else revision
        content = files[path]
        about = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if not path.endswith(".parquet"):
            return self._part(request, content, about)
        about |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        raw = request.scope["raw_path"].decode().removeprefix(f"/datasets/{name}/resolve/{revision}/")
        elsewhere = self.url.replace(
            "127.0.0.1", "localhost"
        )  # huggingface_hub stays on the host that tells a file's hash
        return RedirectResponse(f"{elsewhere}/content/{name}/{sha}/{raw}", 302, about)

    async def _content(self, request: Request) -> Response:
        files = self._at(request)
        return files if isinstance(files, JSONResponse) else self._part(request, files[request.path_params["path"]], {})

    def _part(self, request: Request, content: bytes, about: dict[str, str]) -> Response:
        """The content, or the range of bytes that is asked for."""
        about = {**about, "Accept-Ranges": "bytes"}
        if request.method == "HEAD":
            return Response(headers={**about, "Content-Length": str(len(content))})
        status = 200
        if asked := request.headers.get("range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(content)), len(content) - 1)
            about["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[start : end + 1], 206
        self.sent += len(content)
        return Response(content, status, about)


@contextlib.contextmanager
def listening(app: Any) -> Iterator[str]:
    """An ASGI application on a port of its own, until the block ends; its URL."""
    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def attaching() -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB with httpfs, as it is packaged for Python: DuckDB itself would fetch it."""
    found = importlib.util.find_spec("duckdb_extension_httpfs")
    if found is None or found.origin is None:
        pytest.skip("duckdb-extension-httpfs is not installed")
    extension = Path(found.origin).parent / f"extensions/v{duckdb.__version__}/httpfs.duckdb_extension"
    with duckdb.connect() as connection:
        connection.execute(f"LOAD '{extension}'")
        yield connection


@contextlib.contextmanager
def pretended() -> Iterator[Hub]:
    """A hub that has no datasets yet."""
    hub = Hub()
    with listening(hub.app()) as hub.url:
        yield hub
