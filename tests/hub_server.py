"""A small Hub on loopback, for the real `huggingface_hub` client to talk to.

It creates repositories, takes commits with regular and LFS files, validates the metadata of cards, keeps branches, and
lists and serves files, to those who may read them. Requests and error codes are those of the public Hub's HTTP
interface; there is one user, `me`, with the token `hf_me`.
"""

import base64
import hashlib
import itertools
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


USER, TOKEN = "me", "hf_me"
LARGE = {".bin", ".parquet", ".png", ".pt", ".pth", ".safetensors"}
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class File:
    """Content, and whether it came by LFS."""

    data: bytes
    large: bool = False

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.large else self.blob_id

    @property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    sha: str
    message: str
    files: dict[str, File]


@dataclass
class Repository:
    """Branches, each a list of commits, oldest first."""

    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        """The state of a branch or commit."""
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = itertools.chain.from_iterable(self.branches.values())
        return next((commit for commit in commits if commit.sha == revision), None)


class Refusal(Exception):
    """An answer other than success, with the code by which the client tells it."""

    def __init__(self, status: int, code: str, **content):
        super().__init__(code)
        self.status, self.code, self.content = status, code, content


class Hub:
    """The state of the server. Tests look into it."""

    def __init__(self, url: str):
        self.url = url
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.validated: list[str] = []
        self.lock = threading.Lock()
        self._numbers = itertools.count(1)

    def model(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a model."""
        return {name: file.data for name, file in self.repositories["model", repo_id].at(revision).files.items()}

    def commit(self, repository: Repository, branch: str, message: str, files: dict[str, File]) -> Commit:
        commit = Commit(hashlib.sha1(b"%d" % next(self._numbers)).hexdigest(), message, files)
        repository.branches.setdefault(branch, []).append(commit)
        return commit

    def find(self, kind: str, repo_id: str, reader: str | None) -> Repository:
        repository = self.repositories.get((kind, repo_id))
        if repository is None or (repository.private and reader != USER):
            raise Refusal(404 if reader else 401, "RepoNotFound")
        return repository

    def find_commit(self, kind: str, repo_id: str, revision: str, reader: str | None) -> Commit:
        commit = self.find(kind, repo_id, reader).at(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound")
        return commit


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
            return self._send_json(list(_children(folder, inside).values()))
        self._send_json([_entry(name, file) for name, file in inside.items()])

    def list_paths(self, kind: str, repo_id: str, revision: str) -> None:
        files = self.hub.find_commit(kind, repo_id, revision, self.reader).files
        form = self.headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded")
        paths = parse_qs(self.body.decode()).get("paths", []) if form else self._json()["paths"]
        everything = {name: entry for folder in _folders(files) for name, entry in _children(folder, files).items()}
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


def metadata_errors(content: str) -> list[str]:
    """What the Hub would not accept in the metadata of a model card."""
    block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if block is None:
        return ["there is no metadata"]
    try:
        values = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    lists = {name: values.get(name, []) for name in ("base_model", "datasets", "metrics", "tags")}
    lists = {name: value if isinstance(value, list) else [value] for name, value in lists.items()}
    checks = {
        **{f"{name} holds something else than text": all(isinstance(e, str) for e in v) for name, v in lists.items()},
        "base_model and datasets must be on the Hub": all(
            REPO_ID.fullmatch(str(each)) for name in ("base_model", "datasets") for each in lists[name]
        ),
        "library_name must be text": isinstance(values.get("library_name", ""), str),
        "pipeline_tag must be text": isinstance(values.get("pipeline_tag", ""), str),
        "license must be an identifier": re.fullmatch(r"[a-z0-9.-]*", str(values.get("license", ""))),
        "base_model_relation is not known": values.get("base_model_relation", "adapter") in ("adapter", "finetune"),
        "model-index is incomplete": all(map(_complete, values.get("model-index", []))),
    }
    return [message for message, fulfilled in checks.items() if not fulfilled]


def _complete(model: dict) -> bool:
    return bool(model["name"]) and all(
        result["task"]["type"]
        and result["dataset"]["type"]
        and result["dataset"]["name"]
        and all(metric["type"] and isinstance(metric["value"], int | float) for metric in result["metrics"])
        for result in model["results"]
    )


def _folders(files: dict[str, File]) -> set[str]:
    return {str(parent).removeprefix(".") for name in files for parent in PurePosixPath(name).parents}


def _children(folder: str, files: dict[str, File]) -> dict[str, dict]:
    """The files and folders that are in one folder, by path."""
    depth = len(PurePosixPath(folder).parts)
    found = {}
    for name, file in files.items():
        parts = PurePosixPath(name).parts
        if PurePosixPath(name).is_relative_to(folder or "."):
            path = "/".join(parts[: depth + 1])
            is_file = len(parts) == depth + 1
            found[path] = _entry(name, file) if is_file else {"type": "directory", "path": path, "oid": "0", "size": 0}
    return found


def _entry(name: str, file: File) -> dict:
    entry = {"type": "file", "path": name, "oid": file.blob_id, "size": len(file.data)}
    if file.large:
        entry["lfs"] = {"oid": file.etag, "size": len(file.data), "pointerSize": 128}
    return entry


_KIND, _REPO, _PART = r"/api/(model|dataset)s", r"([^/]+/[^/]+)", r"([^/]+)"

ROUTES = [
    (r"GET /api/whoami-v2", Handler.who_am_i),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"GET {_KIND}/{_REPO}(?:/revision/{_PART})?", Handler.describe),
    (rf"GET {_KIND}/{_REPO}/refs", Handler.list_branches),
    (rf"POST {_KIND}/{_REPO}/branch/{_PART}", Handler.create_branch),
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
