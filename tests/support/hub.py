"""A model hub on loopback that speaks the HTTP protocol of the Hugging Face Hub, as far as its clients read from it.

Repositories are directories, one for each revision. Git files are served by the hub itself; weights and Parquet files
are LFS files, which it redirects to a store on another host name (`localhost`), where a token must not be sent.
Statuses, headers and sentences are those of the real hub (docs of huggingface_hub, `hf_raise_for_status`).
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".parquet", ".bin")
PAGE = 3
"""Entries in one page of a listing, few so that readers have to follow pages (the real hub: 1000)."""
PUBLIC_FILES = ("README.md", ".gitattributes")
"""Files of a gated repository that everybody may read."""

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass(frozen=True)
class Snapshot:
    """Files of a repository at one commit."""

    directory: Path

    @cached_property
    def files(self) -> dict[str, bytes]:
        found = sorted(file for file in self.directory.rglob("*") if file.is_file())
        return {file.relative_to(self.directory).as_posix(): file.read_bytes() for file in found}

    @cached_property
    def commit(self) -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for name, content in self.files.items():
            digest.update(name.encode() + content)
        return digest.hexdigest()

    def entry(self, name: str) -> dict[str, Any]:
        """What listings say of a file."""
        content = self.files[name]
        entry = {"type": "file", "path": name, "size": len(content), "oid": etag(name, content)[:40]}
        if name.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": etag(name, content), "size": len(content), "pointerSize": 134}
        return entry

    def folders(self) -> set[str]:
        """Directories below the root."""
        parents = {parent.as_posix() for name in self.files for parent in Path(name).parents}
        return parents - {"."}

    def entries(self, directory: str, *, recursive: bool) -> list[dict[str, Any]]:
        """The listing of a directory."""
        inside = directory + "/" if directory else ""
        folders = [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(self.folders())]
        everything = [*folders, *map(self.entry, self.files)]
        below = [entry for entry in everything if entry["path"].startswith(inside)]
        return [entry for entry in below if recursive or "/" not in entry["path"].removeprefix(inside)]


def etag(name: str, content: bytes) -> str:
    """SHA-256 of LFS files, git's blob id of the others."""
    if name.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass
class Repository:
    """A model or a dataset. ``readers`` are the tokens that may read it; ``None`` means everybody."""

    revisions: dict[str, Snapshot]
    readers: frozenset[str] | None = None
    gated: bool = False

    def find(self, revision: str) -> Snapshot | None:
        """By branch, tag or commit."""
        commits = {snapshot.commit: snapshot for snapshot in self.revisions.values()}
        return self.revisions.get(revision) or commits.get(revision)


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    path: str
    token: str | None


class RefusedError(Exception):
    """An answer other than success."""

    def __init__(self, status: int, code: str | None, message: str, commit: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.commit = status, code, message, commit

    @property
    def headers(self) -> dict[str, str]:
        named = {"X-Error-Code": self.code, "X-Error-Message": self.message, "X-Repo-Commit": self.commit}
        return {name: value for name, value in named.items() if value}


@dataclass
class Hub:
    """A running hub.

    ``fail_with`` is the HTTP status of every answer, as in an outage; before ``silent`` is set there is no answer.
    ``blobs`` are the LFS files whose addresses were given out: name and content by digest.
    """

    port: int
    tokens: frozenset[str] = frozenset({"hf_owner", "hf_stranger"})
    fail_with: int | None = None
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    blobs: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    silent: threading.Event | None = None

    @property
    def endpoint(self) -> str:
        """The address for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which the hub's libraries reach it, and it alone."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}

    def add(
        self,
        kind: str,
        name: str,
        revisions: Mapping[str, Path],
        readers: set[str] | None = None,
        *,
        gated: bool = False,
    ) -> None:
        """Adds the repository ``name`` of ``kind`` models or datasets."""
        snapshots = {revision: Snapshot(directory) for revision, directory in revisions.items()}
        allowed = None if readers is None else frozenset(readers)
        self.repositories[kind, name] = Repository(snapshots, allowed, gated)

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for, once for each time."""
        paths = [request.path for request in self.requests if request.method == "GET"]
        git = [match[4] for match in map(RESOLVE.fullmatch, paths) if match and not match[4].endswith(LFS_SUFFIXES)]
        lfs = [self.blobs[path.removeprefix("/lfs/")][0] for path in paths if path.startswith("/lfs/")]
        return sorted(git + lfs)

    def repository(self, kind: str, name: str, token: str | None, *, content: bool) -> Repository:
        """The repository, if ``token`` may see it. What a gated one is called, and what it holds, everybody may see."""
        if token is not None and token not in self.tokens:
            raise RefusedError(401, None, "Invalid credentials in Authorization header")
        found = self.repositories.get((kind, name))
        may_read = found is not None and (found.readers is None or token in found.readers)
        if found is None or not (may_read or found.gated):
            raise RefusedError(404 if token else 401, "RepoNotFound", "Repository not found")
        if content and not may_read:
            restricted = f"Access to {kind[:-1]} {name} is restricted"
            if token is None:
                raise RefusedError(401, "GatedRepo", f"{restricted}. You must have access to it and be authenticated.")
            raise RefusedError(403, "GatedRepo", f"{restricted} and you are not in the authorized list.")
        return found

    def snapshot(self, kind: str, name: str, revision: str, token: str | None, *, content: bool = False) -> Snapshot:
        """The files at ``revision``."""
        found = self.repository(kind, name, token, content=content).find(unquote(revision))
        if found is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {unquote(revision)}")
        return found


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 as the base class
        """Says nothing: requests are in ``hub.requests``."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        form = parse_qs(self.rfile.read(length).decode())
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append(Request(self.command, url.path, token))
        if self.hub.silent:
            self.hub.silent.wait()
            self.close_connection = True
            return
        try:
            if self.hub.fail_with:
                raise RefusedError(self.hub.fail_with, None, "The hub is down for maintenance.")
            if url.path.startswith("/lfs/"):
                self._send_blob(url.path.removeprefix("/lfs/"))
            elif match := RESOLVE.fullmatch(url.path):
                self._send_file("datasets" if match[1] else "models", match[2], match[3], unquote(match[4]), token)
            elif match := API.fullmatch(url.path):
                self._send_api(match, parse_qs(url.query), form, token)
            else:
                raise RefusedError(404, None, "Sorry, we can't find the page you are looking for.")
        except RefusedError as refused:
            self._send(refused.status, refused.headers, json.dumps({"error": refused.message}).encode())

    def _send_api(
        self, match: re.Match[str], query: dict[str, list[str]], form: dict[str, list[str]], token: str | None
    ) -> None:
        kind, name, what, revision, path = match.groups()
        snapshot = self.hub.snapshot(kind, name, revision or "main", token)
        if what == "tree":
            entries = snapshot.entries(unquote(path or ""), recursive=query.get("recursive") == ["true"])
            if path and not entries:
                raise RefusedError(404, "EntryNotFound", f"{path} does not exist on {revision}", snapshot.commit)
            start = int(query.get("cursor", ["0"])[0])
            headers = {}
            if start + PAGE < len(entries):
                kept = "".join(f"{key}={query[key][0]}&" for key in ("recursive", "expand") if key in query)
                link = f"{self.hub.endpoint}{urlsplit(self.path).path}?{kept}cursor={start + PAGE}"
                headers["Link"] = f'<{link}>; rel="next"'
            self._send_json(entries[start : start + PAGE], headers)
        elif what == "paths-info":
            wanted = form.get("paths", [])
            self._send_json([entry for entry in snapshot.entries("", recursive=True) if entry["path"] in wanted], {})
        else:
            repository = self.hub.repositories[kind, name]
            info = {
                "_id": "0" * 24,
                "id": name,
                "sha": snapshot.commit,
                "private": repository.readers is not None and not repository.gated,
                "gated": "manual" if repository.gated else False,
                "disabled": False,
                "tags": [],
                "siblings": [{"rfilename": each} for each in snapshot.files],
            }
            self._send_json(info, {})

    def _send_file(self, kind: str, name: str, revision: str, path: str, token: str | None) -> None:
        snapshot = self.hub.snapshot(kind, name, revision, token, content=path not in PUBLIC_FILES)
        content = snapshot.files.get(path)
        if content is None:
            raise RefusedError(404, "EntryNotFound", "Entry not found", snapshot.commit)
        tag = etag(path, content)
        headers = {"X-Repo-Commit": snapshot.commit, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        if path.endswith(LFS_SUFFIXES):
            self.hub.blobs[tag] = path, content
            headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(content))}
            self._send(302, headers | {"Location": f"http://localhost:{self.hub.port}/lfs/{tag}"}, b"Found")
        else:
            self._send_ranged(content, headers)

    def _send_blob(self, tag: str) -> None:
        if self.headers.get("Authorization"):  # as S3 answers to a signed address with a second way to authenticate
            raise RefusedError(400, None, "Only one auth mechanism allowed")
        if tag not in self.hub.blobs:
            raise RefusedError(403, None, "Access denied")
        self._send_ranged(self.hub.blobs[tag][1], {"ETag": f'"{tag}"', "Accept-Ranges": "bytes"})

    def _send_ranged(self, content: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._send(200, headers, content)
            return
        start = int(asked[1])
        end = min(int(asked[2] or len(content) - 1), len(content) - 1)
        if start > end:
            self._send(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
            return
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._send(206, headers, content[start : end + 1])

    def _send_json(self, value: Any, headers: dict[str, str]) -> None:
        self._send(200, headers | {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def run_hub() -> Iterator[Hub]:
    """Starts an empty hub on a free port of loopback."""

    class HubHandler(Handler):
        """One connection to this hub."""

    with ThreadingHTTPServer(("127.0.0.1", 0), HubHandler) as server:
        server.daemon_threads = True
        hub = HubHandler.hub = Hub(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
