"""What of the Hugging Face hub its library asks for: repositories of folders, with large files on another host."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ranged_server import Asked, Handler, Server, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_c2VjcmV0dG9rZW4"


@dataclass
class Hub:
    """A hub, and the host that keeps its large files."""

    hub: Server
    store: Server
    revisions: dict[str, set[str]] = field(default_factory=dict)
    """Of each repository, its branches and tags; all of them mean one commit."""
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Repositories that are not given: a status, and the code of the error."""
    gated: set[str] = field(default_factory=set)
    """Repositories of which anybody may know what they hold, and who has no token gets no file."""
    signature: str = "c2lnbmVk"

    def environment(self, home: Path) -> dict[str, str]:
        """Variables with which the library finds it."""
        return {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}


@contextmanager
def hub_of(root: Path) -> Iterator[Hub]:
    """Serve each folder of folders ``org/name`` as a repository."""
    with serving(root) as hub, serving(root, "localhost") as store:
        held = Hub(hub, store)
        hub.answer = lambda handler, asked: _answer(held, handler, asked)
        store.answer = lambda handler, asked: _stored(held, handler, asked)
        yield held


def _answer(held: Hub, handler: Handler, asked: Asked) -> bool:
    parts = asked.path.partition("?")[0].strip("/").split("/")
    if parts[0] == "api":
        assert parts[1] == "models"
        kind, revision, *inside = parts[4:] or ["revision", "main"]
        repo, folder = "/".join(parts[2:4]), "/".join(inside)
    else:
        repo, kind, revision, folder = "/".join(parts[:2]), parts[2], parts[3], "/".join(parts[4:])
    revision = revision.replace("%2F", "/")
    place = held.hub.root / repo
    if repo in held.refused:
        status, code = held.refused[repo]
        handler.reply(status, b"{}", X_Error_Code=code)
    elif not place.is_dir():
        handler.reply(404, b"{}", X_Error_Code="RepoNotFound")
    elif revision not in {COMMIT, "main", *held.revisions.get(repo, ())}:
        handler.reply(404, b"{}", X_Error_Code="RevisionNotFound")
    elif kind == "revision":
        siblings = [{"rfilename": str(path.relative_to(place))} for path in place.rglob("*.*")]
        _json(handler, {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
    elif kind == "tree" and not (place / folder).is_dir():
        handler.reply(404, b"{}", X_Error_Code="EntryNotFound")
    elif kind == "tree":
        deep = "recursive=true" in asked.path.lower()
        paths = (place / folder).rglob("*") if deep else (place / folder).iterdir()
        _json(handler, [_entry(path, place) for path in sorted(paths)])
    elif not (place / folder).is_file():
        handler.reply(404, b"", X_Error_Code="EntryNotFound")
    elif repo in held.gated and asked.headers["Authorization"] is None:
        handler.reply(401, b"", X_Error_Code="GatedRepo")
    else:
        _give(held, handler, asked, place / folder, f"{repo}/{folder}")
    return True


def _give(held: Hub, handler: Handler, asked: Asked, path: Path, name: str) -> None:
    raw = path.read_bytes()
    facts = {"X_Repo_Commit": COMMIT, "ETag": f'"{hashlib.sha1(raw).hexdigest()}"'}
    if path.suffix == ".safetensors":
        facts |= {"X_Linked_Size": str(len(raw)), "X_Linked_ETag": f'"{hashlib.sha256(raw).hexdigest()}"'}
        location = f"{held.store.url}/{name}?X-Amz-Signature={held.signature}"
        handler.reply(302, Location=location, **facts)
    else:
        handler.reply(200, raw, **facts)


def _stored(held: Hub, handler: Handler, asked: Asked) -> bool:
    if not asked.path.endswith(held.signature):
        handler.reply(403)
        return True
    return False


def _entry(path: Path, place: Path) -> dict[str, Any]:
    name = str(path.relative_to(place))
    if path.is_dir():
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
    raw = path.read_bytes()
    entry: dict[str, Any] = {"type": "file", "oid": hashlib.sha1(raw).hexdigest(), "size": len(raw), "path": name}
    if path.suffix == ".safetensors":
        entry["lfs"] = {"oid": hashlib.sha256(raw).hexdigest(), "size": len(raw), "pointerSize": 134}
    return entry


def _json(handler: Handler, value: object) -> None:
    handler.reply(200, json.dumps(value).encode(), Content_Type="application/json")
