"""A Hub to test against: the part of the Hugging Face Hub's HTTP protocol that models are pushed and pulled with.

    client                                      server
    POST /api/repos/create                      a repository with an empty first commit, or 409
    POST /api/models/<repo>/preupload/<rev>     which files go by LFS
    POST /<repo>.git/info/lfs/objects/batch     where to put those that are not there yet
    PUT  /_lfs/<sha256>                         the bytes
    POST /api/models/<repo>/commit/<rev>        small files in it, large ones by their hash: all of them or none
    GET  /<repo>/resolve/<rev>/<path>           the file, or a redirect to /_cdn/<sha256>

All of it is in memory, in one event loop, so that each request is handled whole before the next. `Fault`s are what
goes wrong: an error, a delay, a broken connection, an effect whose answer is lost, or a function of the test's, called
before or after the effect. Xet is left out: clients must set HF_HUB_DISABLE_XET.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".png")
TOKENS = {"hf_alice_write": ("alice", "write"), "hf_alice_read": ("alice", "read"), "hf_bob_write": ("bob", "write")}


@dataclass(frozen=True)
class File:
    """A file of a commit."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """git's name of the blob; with LFS that of the pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        blob = pointer.encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        lfs = {"lfs": {"oid": self.sha256, "sha256": self.sha256, "size": len(self.data), "pointerSize": 134}}
        return {"type": "file", "path": path, "oid": self.oid, "size": len(self.data), **(lfs if self.lfs else {})}


Tree = dict[str, File]


@dataclass
class Commit:
    id: str
    title: str
    tree: Tree


@dataclass
class Repo:
    owner: str
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commit(self, branch: str, title: str, tree: Tree) -> Commit:
        count = sum(map(len, self.branches.values()))
        made = Commit(hashlib.sha1(f"{self.owner} {title} {count}".encode()).hexdigest(), title, tree)
        self.branches.setdefault(branch, []).append(made)
        return made

    def at(self, revision: str) -> Commit:
        if revision in self.branches:
            return self.branches[revision][-1]
        found = [commit for commits in self.branches.values() for commit in commits if commit.id == revision]
        if not found:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0]


@dataclass
class Fault:
    """What goes wrong with requests whose "METHOD /path" matches `request`.

    Attributes:
        status: answered in the place of what would be.
        applied: the request has its effect first.
        drop: the connection breaks in the middle of the answer.
        keep: how many bytes of the answer arrive before.
        delay_s: time that passes before anything else.
        call: called before, or with `applied` after, the request has its effect.
        times: for how many requests.
    """

    request: str
    status: int | None = None
    applied: bool = False
    drop: bool = False
    keep: int = 0
    delay_s: float = 0.0
    call: Callable[[], None] | None = None
    times: int = 1


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Hub:
    """The server's state, for tests to look at and to spoil.

    Attributes:
        log: "METHOD /path status" of every request, in order.
    """

    def __init__(self) -> None:
        self.url = ""
        self.reset()

    def reset(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []

    def tree(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision; empty where there is no such repository."""
        found = self.repos.get(repo)
        return {path: file.data for path, file in found.at(revision).tree.items()} if found else {}

    def titles(self, repo: str, branch: str = "main") -> list[str]:
        return [commit.title for commit in self.repos[repo].branches[branch]][1:]

    def put(self, repo: str, files: dict[str, bytes], private: bool = False) -> None:
        """Make a repository that holds `files`, past HTTP."""
        made = self.repos.setdefault(repo, Repo(repo.split("/")[0], private))
        made.commit("main", "put", {name: File(data, name.endswith(LFS_SUFFIXES)) for name, data in files.items()})

    def fault(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and re.search(fault.request, request):
                fault.times -= 1
                return fault
        return None

    def user(self, request: Request) -> tuple[str | None, str]:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if given and given not in TOKENS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return TOKENS.get(given, (None, ""))

    def readable(self, request: Request) -> tuple[str, Repo]:
        name = "{ns}/{name}".format(**request.path_params)
        who, repo = self.user(request)[0], self.repos.get(name)
        if repo is None or (repo.private and who != repo.owner):  # the Hub does not tell the two apart
            raise Refusal(404 if who else 401, "Repository not found", "RepoNotFound")
        return name, repo

    def writable(self, request: Request) -> tuple[str, Repo]:
        name, repo = self.readable(request)
        self.check_may_write(request, repo.owner)
        return name, repo

    def check_may_write(self, request: Request, owner: str) -> None:
        who, role = self.user(request)
        if who is None:
            raise Refusal(401, "Invalid username or password.")
        if who != owner or role != "write":
            raise Refusal(403, f"Forbidden: this token may not write to {owner}'s repositories")

    async def whoami(self, request: Request) -> Response:
        who, role = self.user(request)
        if who is None:
            raise Refusal(401, "Invalid username or password.")
        return JSONResponse({"type": "user", "name": who, "orgs": [], "auth": {"accessToken": {"role": role}}})

    async def create(self, request: Request) -> Response:
        asked = await request.json()
        owner = asked.get("organization") or self.user(request)[0]
        self.check_may_write(request, owner)
        name = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.url}/{name}", "name": name, "id": name}
        if name in self.repos:
            return JSONResponse({**answer, "error": "You already created this model repo"}, 409)
        self.repos[name] = Repo(owner, asked.get("visibility") == "private" or bool(asked.get("private")))
        self.repos[name].commit("main", "initial commit", {})
        return JSONResponse(answer)

    async def branch(self, request: Request) -> Response:
        _, repo = self.writable(request)
        name = unquote(request.path_params["rev"])
        if name in repo.branches:
            raise Refusal(409, f"Reference already exists: refs/heads/{name}")
        start = json.loads(await request.body() or b"{}").get("startingPoint") or "main"
        repo.branches[name] = [repo.at(start)]
        return JSONResponse({"success": True})

    async def validate(self, request: Request) -> Response:
        block = re.match(r"---\n(.*?)\n---", (await request.json())["content"], re.DOTALL)
        try:
            found = yaml.safe_load(block[1]) if block else {}
            errors = [] if isinstance(found, dict) else [{"message": "metadata must be a mapping"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)

    async def preupload(self, request: Request) -> Response:
        _, repo = self.writable(request)
        tree = repo.at(unquote(request.path_params["rev"])).tree
        answer = []
        for asked in (await request.json())["files"]:
            path, there = asked["path"], tree.get(asked["path"])
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = (there.sha256 if there.lfs else there.oid) if there else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return JSONResponse({"files": answer})

    async def lfs_batch(self, request: Request) -> Response:
        self.writable(request)
        objects = []
        for asked in (await request.json())["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.blobs:  # without "actions" the client takes it to be there
                answer["actions"] = {"upload": {"href": f"{self.url}/_lfs/{asked['oid']}", "header": {}}}
            objects.append(answer)
        return JSONResponse({"transfer": "basic", "objects": objects}, media_type="application/vnd.git-lfs+json")

    async def lfs_put(self, request: Request) -> Response:
        """As to S3: with a signed address and no token."""
        data, sha256 = await request.body(), request.path_params["sha256"]
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Refusal(400, "BadDigest")
        self.blobs[sha256] = data
        return Response(headers={"ETag": f'"{sha256}"'})

    async def commit(self, request: Request) -> Response:
        name, repo = self.writable(request)
        branch = unquote(request.path_params["rev"])
        operations = [json.loads(line) for line in (await request.body()).splitlines() if line.strip()]
        header = next(operation["value"] for operation in operations if operation["key"] == "header")
        if header.get("parentCommit") not in (None, repo.at(branch).id):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(repo.at(branch).tree)
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                tree[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif kind == "lfsFile":
                if value["oid"] not in self.blobs:
                    raise Refusal(400, f"LFS object {value['oid']} was not uploaded")
                tree[value["path"]] = File(self.blobs[value["oid"]], True)
            elif kind == "deletedFile":
                del tree[value["path"]]
        made = repo.commit(branch, header["summary"], tree)
        url = f"{self.url}/{name}/commit/{made.id}"
        return JSONResponse({"success": True, "commitOid": made.id, "commitUrl": url, "hookOutput": ""})

    async def info(self, request: Request) -> Response:
        name, repo = self.readable(request)
        commit = repo.at(unquote(request.path_params.get("rev", "main")))
        card = re.match(rb"---\n(.*?)\n---", commit.tree["README.md"].data, re.DOTALL) if _has_card(commit) else None
        siblings = [{"rfilename": path, **file.entry(path)} for path, file in sorted(commit.tree.items())]
        answer = {"_id": name, "id": name, "sha": commit.id, "private": repo.private, "siblings": siblings, "tags": []}
        return JSONResponse({**answer, "cardData": yaml.safe_load(card[1]) if card else {}})

    async def listing(self, request: Request) -> Response:
        _, repo = self.readable(request)
        tree, folder = repo.at(unquote(request.path_params["rev"])).tree, unquote(request.path_params.get("path", ""))
        under = {path: file for path, file in tree.items() if not folder or path.startswith(f"{folder}/")}
        if folder and not under:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        return JSONResponse([file.entry(path) for path, file in sorted(under.items())])

    async def paths(self, request: Request) -> Response:
        _, repo = self.readable(request)
        tree = repo.at(unquote(request.path_params["rev"])).tree
        asked = parse_qs((await request.body()).decode())["paths"]
        return JSONResponse([tree[path].entry(path) for path in asked if path in tree])

    async def refs(self, request: Request) -> Response:
        _, repo = self.readable(request)
        names = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1].id}
            for name, commits in repo.branches.items()
        ]
        return JSONResponse({"branches": names, "converts": [], "tags": []})

    async def resolve(self, request: Request) -> Response:
        _, repo = self.readable(request)
        commit, path = repo.at(unquote(request.path_params["rev"])), unquote(request.path_params["path"])
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.tree:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return JSONResponse({"error": "Entry not found"}, 404, headers=headers)
        file = commit.tree[path]
        headers["ETag"] = f'"{file.oid}"'
        if not file.lfs:
            return _bytes(request, file.data, headers)
        self.blobs[file.sha256] = file.data
        headers |= {"X-Linked-Size": str(len(file.data)), "X-Linked-ETag": f'"{file.sha256}"'}
        # To another host, as the Hub does: clients follow a redirect to the same one when they ask for headers.
        headers["Location"] = f"{self.url}/_cdn/{file.sha256}".replace("127.0.0.1", "localhost")
        return Response(status_code=302, headers=headers)

    async def cdn(self, request: Request) -> Response:
        sha256 = request.path_params["sha256"]
        return _bytes(request, self.blobs[sha256], {"ETag": f'"{sha256}"'})

    def routes(self) -> list[Route]:
        model = "/api/models/{ns}/{name}"
        return [
            Route("/api/whoami-v2", self.whoami),
            Route("/api/repos/create", self.create, methods=["POST"]),
            Route("/api/validate-yaml", self.validate, methods=["POST"]),
            Route(model, self.info),
            Route(f"{model}/revision/{{rev}}", self.info),
            Route(f"{model}/refs", self.refs),
            Route(f"{model}/branch/{{rev}}", self.branch, methods=["POST"]),
            Route(f"{model}/preupload/{{rev}}", self.preupload, methods=["POST"]),
            Route(f"{model}/commit/{{rev}}", self.commit, methods=["POST"]),
            Route(f"{model}/tree/{{rev}}", self.listing),
            Route(f"{model}/tree/{{rev}}/{{path:path}}", self.listing),
            Route(f"{model}/paths-info/{{rev}}", self.paths, methods=["POST"]),
            Route("/{ns}/{name}.git/info/lfs/objects/batch", self.lfs_batch, methods=["POST"]),
            Route("/_lfs/{sha256}", self.lfs_put, methods=["PUT"]),
            Route("/{ns}/{name}/resolve/{rev}/{path:path}", self.resolve),
            Route("/_cdn/{sha256}", self.cdn),
        ]


def _has_card(commit: Commit) -> bool:
    return "README.md" in commit.tree


def _bytes(request: Request, data: bytes, headers: dict[str, str]) -> Response:
    """A file's bytes, or the part of them that a client asks for when it resumes."""
    part = re.match(r"bytes=(\d+)-", request.headers.get("range", ""))
    if not part:
        return Response(data, headers={**headers, "Accept-Ranges": "bytes"})
    start = int(part[1])
    return Response(data[start:], 206, {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"})


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    headers = {"X-Error-Message": str(error), **({"X-Error-Code": error.code} if error.code else {})}
    return JSONResponse({"error": str(error)}, error.status, headers=headers)


def application(hub: Hub) -> Callable[..., Awaitable[None]]:
    """The ASGI application: the routes, with the hub's log and faults around them."""
    inner = Starlette(routes=hub.routes(), exception_handlers={Refusal: _refused})

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        path = scope["raw_path"].decode().partition("?")[0]  # as sent: a branch may be called a%2Fb
        scope["path"], key = path, f"{scope['method']} {path}"
        answer: list[dict[str, Any]] = []

        async def keep(message: dict[str, Any]) -> None:
            answer.append(message)

        fault = hub.fault(key) or Fault("")
        await asyncio.sleep(fault.delay_s)
        if fault.call and not fault.applied:
            fault.call()
        if fault.status is None or fault.applied:
            await inner(scope, receive, keep)
        if fault.call and fault.applied:
            fault.call()
        if fault.status is not None:
            answer.clear()
            await JSONResponse({"error": "injected"}, fault.status)(scope, receive, keep)
        hub.log.append(f"{key} {answer[0]['status']}{' dropped' if fault.drop else ''}")
        if fault.drop:  # the headers promise more than comes; the server closes the connection
            await send(answer[0])
            await send({"type": "http.response.body", "body": answer[1]["body"][: fault.keep], "more_body": True})
            return
        for message in answer:
            await send(message)

    return outer


@contextmanager
def served() -> Iterator[Hub]:
    """A hub on a free port of this machine, served by a thread for as long as the context lasts."""
    hub = Hub()
    options = uvicorn.Config(application(hub), host="127.0.0.1", port=0, log_level="critical", lifespan="off")
    server = uvicorn.Server(options)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    hub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join(5)
