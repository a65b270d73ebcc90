"""What the Hub of the tests holds: repositories, their commits and files, and the rules for a card's metadata."""

import hashlib
import itertools
import re
import threading
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import yaml


USER = "me"
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


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
    """Branches, each a list of commits, oldest first, and commits that have a tag."""

    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        """The state of a branch, tag or commit."""
        if revision in self.branches:
            return self.branches[revision][-1]
        if revision in self.tags:
            return self.tags[revision]
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
    return bool(model.get("name")) and all(map(_complete_result, model.get("results", [{}])))


def _complete_result(result: dict) -> bool:
    task, dataset, metrics = (result.get(name, {}) for name in ("task", "dataset", "metrics"))
    named = all([task.get("type"), dataset.get("type"), dataset.get("name")])
    return named and all(metric.get("type") and isinstance(metric.get("value"), int | float) for metric in metrics)


def folders_of(files: dict[str, File]) -> set[str]:
    return {str(parent).removeprefix(".") for name in files for parent in PurePosixPath(name).parents}


def children(folder: str, files: dict[str, File]) -> dict[str, dict]:
    """The files and folders that are in one folder, by path."""
    depth = len(PurePosixPath(folder).parts)
    found = {}
    for name, file in files.items():
        parts = PurePosixPath(name).parts
        if PurePosixPath(name).is_relative_to(folder or "."):
            path = "/".join(parts[: depth + 1])
            is_file = len(parts) == depth + 1
            found[path] = (
                entry_of(name, file) if is_file else {"type": "directory", "path": path, "oid": "0", "size": 0}
            )
    return found


def entry_of(name: str, file: File) -> dict:
    entry = {"type": "file", "path": name, "oid": file.blob_id, "size": len(file.data)}
    if file.large:
        entry["lfs"] = {"oid": file.etag, "size": len(file.data), "pointerSize": 128}
    return entry
