"""A small Hub on loopback, for the real `huggingface_hub` client to talk to.

It creates repositories, takes commits with regular and LFS files, validates the metadata of cards, keeps branches and
tags, and lists and serves files, to those who may read them. Requests and error codes are those of the public Hub's
HTTP interface; there is one user, `me`, with the token `hf_me`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from hub_state import USER, File, Hub, Refusal, Repository, children, entry_of, folders_of, metadata_errors


TOKEN = "hf_me"
LARGE = {".bin", ".parquet", ".png", ".pt", ".pth", ".safetensors"}
DATE = "2026-01-01T00:00:00.000Z"


@contextmanager
def running_hub():
    """Starts a Hub on a free port of this machine, and stops it at the end."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def client_of(hub: Hub, home: Path) -> dict[str, str]:
    """The environment of a program that is its user's and keeps its files in `home`."""
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home)}
    # This Hub stores large files by LFS.
    switches = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**os.environ, **settings, **switches}


class Handler(BaseHTTPRequestHandler):
    """One request: finds the function for its path and writes what that returns."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._answer("GET")

    def do_HEAD(self):
        self._answer("GET")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def log_message(self, *args):
        pass

    @property
    def hub(self) -> Hub:
        return self.server.hub

    @property
    def reader(self) -> str | None:
        return USER if self.headers.get("Authorization") == f"Bearer {TOKEN}" else None

    def _answer(self, method: str) -> None:
        self.body = self._read_body()
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        try:
            for pattern, action in ROUTES:
                match = re.fullmatch(pattern, f"{method} {url.path}")
                if match:
                    return action(self, *(unquote(part or "") for part in match.groups()))
            raise Refusal(404, "NoSuchPath")
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.code}
            self._send_json({"error": refusal.code, **refusal.content}, refusal.status, headers)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _json(self) -> dict:
        return json.loads(self.body)

    def _send_json(self, content, status: int = 200, headers: dict | None = None) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data: bytes, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _require_user(self) -> None:
        if self.reader is None:
            raise Refusal(401, "Unauthorized")

    # ---- Repositories ----

    def who_am_i(self) -> None:
        self._require_user()
        self._send_json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        self._require_user()
        asked = self._json()
        kind = asked.get("type") or "model"
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        prefix = "" if kind == "model" else f"{kind}s/"
        answer = {"url": f"{self.hub.url}/{prefix}{repo_id}", "name": repo_id}
        with self.hub.lock:
            if (kind, repo_id) in self.hub.repositories:
                raise Refusal(409, "RepoExists", **answer)
            # Older clients ask for `private`, newer ones for a visibility.
            repository = Repository(bool(asked.get("private")) or asked.get("visibility") == "private")
            self.hub.commit(repository, "main", "initial commit", {".gitattributes": File(b"* -text\n")})
            self.hub.repositories[kind, repo_id] = repository
        self._send_json(answer)

    def describe(self, kind: str, repo_id: str, revision: str) -> None:
        repository = self.hub.find(kind, repo_id, self.reader)
        commit = self.hub.find_commit(kind, repo_id, revision or "main", self.reader)
        names = {"_id": "0" * 24, "id": repo_id, "modelId": repo_id, "author": USER, "sha": commit.sha}
        facts = {"private": repository.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        lists = {"tags": [], "siblings": [{"rfilename": name} for name in commit.files]}
        self._send_json({**names, **facts, **lists, "lastModified": DATE, "createdAt": DATE})

    def list_branches(self, kind: str, repo_id: str) -> None:
        branches = self.hub.find(kind, repo_id, self.reader).branches
        named = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1].sha}
            for name, commits in branches.items()
        ]
        self._send_json({"branches": named, "tags": [], "converts": []})

    def create_branch(self, kind: str, repo_id: str, name: str) -> None:
        self._require_user()
        repository = self.hub.find(kind, repo_id, self.reader)
        repository.branches[name] = [repository.at("main")]
        self._send_json({})

    def create_tag(self, kind: str, repo_id: str, revision: str) -> None:
        self._require_user()
        repository = self.hub.find(kind, repo_id, self.reader)
        repository.tags[self._json()["tag"]] = self.hub.find_commit(kind, repo_id, revision, self.reader)
        self._send_json({})

    # ---- Commits ----

    def validate(self) -> None:
        content = self._json()["content"]
        self.hub.validated.append(content)
        errors = [{"message": message} for message in metadata_errors(content)]
        if errors:
            raise Refusal(400, "InvalidMetadata", errors=errors, warnings=[])
        self._send_json({"errors": [], "warnings": []})

    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        self._require_user()
        self.hub.find_commit(kind, repo_id, revision, self.reader)
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if PurePosixPath(file["path"]).suffix in LARGE else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in self._json()["files"]
        ]
        self._send_json({"files": modes})

    def batch(self, repo_id: str) -> None:
        self._require_user()
        objects = []
        for wanted in self._json()["objects"]:
            upload = {"href": f"{self.hub.url}/large/{wanted['oid']}"}
            known = wanted["oid"] in self.hub.large
            objects.append({**wanted, **({} if known else {"actions": {"upload": upload}})})
        self._send_json({"transfer": "basic", "objects": objects})

    def receive(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "WrongContent")
        self.hub.large[oid] = self.body
        self._send(b"", 200, {})

    def receive_commit(self, kind: str, repo_id: str, branch: str) -> None:
        self._require_user()
        with self.hub.lock:
            repository = self.hub.find(kind, repo_id, self.reader)
            if branch not in repository.branches:
                raise Refusal(404, "RevisionNotFound")
            files, message = dict(repository.at(branch).files), ""
            for line in self.body.splitlines():
                operation = json.loads(line)
                if operation["key"] == "header":
                    message = operation["value"]["summary"]
                else:
                    self._apply(operation["key"], operation["value"], files)
            commit = self.hub.commit(repository, branch, message, files)
        self._send_json(
            {"success": True, "commitOid": commit.sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit.sha}"}
        )

    def _apply(self, key: str, value: dict, files: dict[str, File]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = File(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            files[path] = File(self.hub.large[value["oid"]], large=True)
        else:
            raise Refusal(400, f"No {key} here")

    # ---- Reading ----

    def list_tree(self, kind: str, repo_id: str, revision: str, folder: str) -> None:
        files = self.hub.find_commit(kind, repo_id, revision, self.reader).files
        inside = {name: file for name, file in files.items() if PurePosixPath(name).is_relative_to(folder or ".")}
        if folder and not inside:
            raise Refusal(404, "EntryNotFound")
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            return self._send_json(list(children(folder, inside).values()))
        self._send_json([entry_of(name, file) for name, file in inside.items()])

    def list_paths(self, kind: str, repo_id: str, revision: str) -> None:
        files = self.hub.find_commit(kind, repo_id, revision, self.reader).files
        form = self.headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded")
        paths = parse_qs(self.body.decode()).get("paths", []) if form else self._json()["paths"]
        everything = {name: entry for folder in folders_of(files) for name, entry in children(folder, files).items()}
        self._send_json([everything[path] for path in paths if path in everything])

    def resolve(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        commit = self.hub.find_commit(kind, repo_id, revision, self.reader)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            found = {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "EntryNotFound"}
            return self._send(b"", 404, found)
        file = commit.files[path]
        headers["ETag"] = f'"{file.etag}"'
        if file.large:
            headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": len(file.data)}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            return self._send(file.data, 200, headers)
        first, last = int(part[1]), int(part[2] or len(file.data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(file.data)}"
        self._send(file.data[first : last + 1], 206, headers)


_KIND, _REPO, _PART = r"/api/(model|dataset)s", r"([^/]+/[^/]+)", r"([^/]+)"

ROUTES = [
    (r"GET /api/whoami-v2", Handler.who_am_i),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"GET {_KIND}/{_REPO}(?:/revision/{_PART})?", Handler.describe),
    (rf"GET {_KIND}/{_REPO}/refs", Handler.list_branches),
    (rf"POST {_KIND}/{_REPO}/branch/{_PART}", Handler.create_branch),
    (rf"POST {_KIND}/{_REPO}/tag/{_PART}", Handler.create_tag),
    (rf"POST {_KIND}/{_REPO}/preupload/{_PART}", Handler.preupload),
    (rf"POST {_KIND}/{_REPO}/commit/{_PART}", Handler.receive_commit),
    (rf"GET {_KIND}/{_REPO}/tree/{_PART}(?:/(.+))?", Handler.list_tree),
    (rf"POST {_KIND}/{_REPO}/paths-info/{_PART}", Handler.list_paths),
    (rf"POST /(?:datasets/)?{_REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /large/([0-9a-f]{64})", Handler.receive),
    (rf"GET /(dataset)s/{_REPO}/resolve/{_PART}/(.+)", Handler.resolve),
    (
        rf"GET /()(?!datasets/){_REPO}/resolve/{_PART}/(.+)",
        lambda self, _, *rest: Handler.resolve(self, "model", *rest),
    ),
]
