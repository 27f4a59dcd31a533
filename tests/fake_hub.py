"""A Hugging Face hub of our own in a thread: the endpoints that huggingface_hub uses to upload to a
repository of models and to download from it, without xet."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKENS = {"hf_writes": "write", "hf_reads": "read"}
"""Tokens of the user ``me``, and what they may do."""


def blob_id(content: bytes) -> str:
    """As git has it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class FakeHub(ThreadingHTTPServer):
    """``repos`` has the files of every repository by their path; ``commits`` what came in each
    commit, (repository, summary, paths); ``licences`` what cards of models and data sets say."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, str, list[str]]] = []
        self.licences: dict[str, str] = {}
        self.stored: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def sha(self) -> str:
        """Of the last commit."""
        return f"{len(self.commits):040x}"


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        for method, pattern, do in ROUTES:
            if method == self.command and (found := re.fullmatch(pattern, path)):
                return do(self, body, *found.groups())
        self.say(404, {"error": f"no such endpoint: {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *_: Any) -> None:
        pass

    def say(self, status: int, value: Any, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def may(self, repo: str = "") -> bool:
        """Whether the token may write; if not, says so."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in TOKENS:
            self.say(401, {"error": "Invalid username or password."})
        elif TOKENS[token] == "read" or (repo and not repo.startswith("me/")):
            said = "You don't have the rights to create a model under this namespace"
            self.say(403, {"error": said}, X_Error_Message=said)
        else:
            return True
        return False

    def whoami(self, body: bytes) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token in TOKENS:
            self.say(200, {"name": "me", "type": "user", "orgs": []})
        else:
            self.say(401, {"error": "Invalid credentials"})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if self.may(repo):
            self.server.repos[repo] = {}
            self.say(200, {"url": f"{self.server.url}/{repo}", "name": repo})

    def files(self, repo: str) -> dict[str, bytes] | None:
        if repo not in self.server.repos:
            self.say(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return self.server.repos.get(repo)

    def info(self, body: bytes, kind: str, repo: str) -> None:
        card = {"id": repo, "sha": self.server.sha, "siblings": [], "tags": [], "private": False}
        if repo in self.server.licences:
            self.say(200, card | {"cardData": {"license": self.server.licences[repo]}})
        elif self.files(repo) is not None:
            self.say(200, card)

    def tree(self, body: bytes, repo: str) -> None:
        if (files := self.files(repo)) is not None:
            rows = [
                {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
                for path, content in files.items()
            ]
            self.say(200, rows)

    def validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        good = content.startswith("---\n") and "\n---\n" in content
        self.say(200 if good else 400, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str) -> None:
        if not self.may(repo) or (files := self.files(repo)) is None:
            return
        modes = []
        for file in json.loads(body)["files"]:
            path, there = file["path"], files.get(file["path"])
            lfs = path.endswith(".safetensors")
            mode = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if there is not None:
                mode["oid"] = hashlib.sha256(there).hexdigest() if lfs else blob_id(there)
            modes.append(mode)
        self.say(200, {"files": modes})

    def batch(self, body: bytes, repo: str) -> None:
        if not self.may(repo):
            return
        objects = []
        for wanted in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"},
                "verify": {"href": f"{self.server.url}/lfs-verify"},
            }
            is_there = wanted["oid"] in self.server.stored
            objects.append(wanted | ({} if is_there else {"actions": actions}))
        self.say(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        whole = hashlib.sha256(body).hexdigest() == oid
        if whole:
            self.server.stored[oid] = body
        self.say(200 if whole else 400, {})

    def verify(self, body: bytes) -> None:
        asked = json.loads(body)
        content = self.server.stored.get(asked["oid"], b"")
        self.say(200 if len(content) == asked["size"] else 400, {})

    def commit(self, body: bytes, repo: str) -> None:
        if not self.may(repo) or (files := self.files(repo)) is None:
            return
        header, *operations = [json.loads(line) for line in body.splitlines()]
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert operation["key"] == "lfsFile", operation["key"]
                files[value["path"]] = self.server.stored[value["oid"]]
        paths = [operation["value"]["path"] for operation in operations]
        self.server.commits.append((repo, header["value"]["summary"], paths))
        url = f"{self.server.url}/{repo}/commit/{self.server.sha}"
        self.say(200, {"commitUrl": url, "commitOid": self.server.sha})

    def resolve(self, body: bytes, repo: str, path: str) -> None:
        if (files := self.files(repo)) is None:
            return
        commit = {"X_Repo_Commit": self.server.sha}
        if path in files:
            etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
            self.say(200, files[path], ETag=etag, **commit)
        else:
            self.say(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", **commit)


REPO = "([^/]+/[^/]+)"
MODEL = f"/api/models/{REPO}"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"{MODEL}/preupload/main", Handler.preupload),
    ("POST", f"{MODEL}/commit/main", Handler.commit),
    ("GET", f"{MODEL}/tree/main", Handler.tree),
    ("GET", f"/api/(models|datasets)/{REPO}(?:/revision/main)?", Handler.info),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/lfs/([0-9a-f]+)", Handler.store),
    ("POST", "/lfs-verify", Handler.verify),
    ("GET", f"/{REPO}/resolve/[^/]+/(.+)", Handler.resolve),
    ("HEAD", f"/{REPO}/resolve/[^/]+/(.+)", Handler.resolve),
]
"""Methods, paths, and what answers."""


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """The server, in a thread."""
    with FakeHub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
