"""Name checkpoints of the Hugging Face hub, look at what they hold, and download or address it.

Names are taken apart, tokens and the endpoint found, and downloads made and resumed by huggingface_hub, into its cache.
"""

from __future__ import annotations

import glob
import importlib.util
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ckptdiff.errors import CheckpointError

__all__ = [
    "GATED",
    "HubFile",
    "HubFolder",
    "cached_folder",
    "download",
    "is_hub_name",
    "is_offline",
    "link_cached",
    "look_up",
    "may_be_hub",
    "require_hub",
]

_LOGIN = "hf auth login, or a token in HF_TOKEN"
GATED = "the model is gated", f"ask for access on its page in the hub; then {_LOGIN}"
"""What is said of a model that its owner gives to those who ask, and what to do."""
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of one commit of a model."""

    repo: str
    commit: str
    path: str

    @property
    def shown(self) -> str:
        """As the hub's own libraries write it."""
        return f"hf://{self.repo}@{self.commit}/{self.path}"

    def request(self, renew: bool) -> tuple[str, dict[str, str]]:
        """The URL that leads to it, by a redirect that is signed anew each time, and the token for the hub alone."""
        from huggingface_hub import get_token, hf_hub_url

        token = get_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return hf_hub_url(self.repo, self.path, revision=self.commit), headers

    def beside(self, name: str) -> HubFile:
        """Another file in the folder of this one."""
        folder, slash, _ = self.path.rpartition("/")
        return HubFile(self.repo, self.commit, f"{folder}{slash}{name}")


@dataclass(frozen=True, slots=True)
class HubFolder:
    """A folder of one commit of a model.

    Attributes
    ----------
    repo, revision, commit : str
        The revision as it was named, or "main".
    folder : str
        Empty for the whole of it, else its path with a slash behind it.
    hashes : dict of str to str
        Names of its files, and the hash of the content of each: SHA-256 of those in large file storage, that of Xet of
        others; empty for those in neither.
    """

    repo: str
    revision: str
    commit: str
    folder: str
    hashes: dict[str, str]

    @property
    def address(self) -> HubFile:
        """Of a file of no name in it."""
        return HubFile(self.repo, self.commit, self.folder)


def is_hub_name(path: str) -> bool:
    """Whether a path looks like ``org/name`` or ``org/name@revision``."""
    return _ID.fullmatch(path) is not None


def may_be_hub(path: str) -> bool:
    """Whether a path names a model of the hub: ``hf://...``, or ``org/name`` if there is no such file or folder."""
    if path.startswith("hf://"):
        return True
    return is_hub_name(path) and importlib.util.find_spec("huggingface_hub") is not None and _free(path)


def require_hub(path: str) -> None:
    """Raise CheckpointError that names the extra if huggingface_hub is missing."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CheckpointError(
            "models of the hub need huggingface_hub, which is not installed",
            file=path,
            hint="pip install 'ckptdiff[hub]'",
        )


def look_up(path: str) -> HubFolder:
    """Ask the hub which commit a name means, and what is in its folder.

    Raises
    ------
    CheckpointError
        A name that is none, no such model or revision, one that is gated, or a hub that cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with _told(path):
        repo, revision, folder = _parse(path)
        api = HfApi()
        commit = api.repo_info(repo, revision=revision, timeout=30).sha or ""
        found = list(api.list_repo_tree(repo, folder or None, revision=commit))
    inside = f"{folder}/" if folder else ""
    hashes = {}
    for entry in found:
        if isinstance(entry, RepoFile):
            content = f"sha256:{entry.lfs.sha256}" if entry.lfs else f"xet:{entry.xet_hash}" if entry.xet_hash else ""
            hashes[entry.path.removeprefix(inside)] = content
    return HubFolder(repo, revision or "main", commit, inside, hashes)


def download(place: HubFolder, names: Iterable[str]) -> str:
    """Bring files into the usual cache, or find them there; an interrupted download goes on.

    Returns
    -------
    str
        The folder that holds them.

    Raises
    ------
    CheckpointError
        If one cannot be had.
    """
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(place.folder + name) for name in names]
    with _told(place.address.shown):
        # By the name of the revision, which the cache then knows without the hub.
        top = Path(snapshot_download(place.repo, revision=place.revision, allow_patterns=patterns))
    if top.name != place.commit:
        raise CheckpointError(
            "the model was updated meanwhile",
            file=place.address.shown,
            expected=f"commit {place.commit}",
            found=f"commit {top.name}",
            hint="run again, or name a commit",
        )
    return str(top / place.folder)


def link_cached(source: HubFolder, target: HubFolder) -> None:
    """Give files that the cache holds for one model, and that another has too by their hash, a second name for that.

    They are no symbolic links, so either model may be removed from the cache. What cannot be linked is downloaded.
    """
    held, new = (_cache_of(place.repo) / "blobs" for place in (source, target))
    if held == new:
        return
    for content in {*source.hashes.values()} & {*target.hashes.values()}:
        kind, _, digest = content.partition(":")
        # The cache calls a file by its ETag: the SHA-256 of what lies in large file storage.
        if kind == "sha256" and (held / digest).is_file() and not (new / digest).exists():
            with suppress(OSError):
                new.mkdir(parents=True, exist_ok=True)
                (new / digest).hardlink_to((held / digest).resolve())


def is_offline() -> bool:
    """Whether the hub must not be asked (``HF_HUB_OFFLINE``)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cached_folder(path: str) -> tuple[str, dict[str, str]]:
    """Where the cache holds a model, and its ``repo`` and ``commit``; CheckpointError if it does not hold it.

    Not by huggingface_hub's own look-up, which asks for every file of a model, and not only for its weights.
    """
    with _told(path):
        repo, revision, folder = _parse(path)
    held = _cache_of(repo)
    reference = held / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision or ""
    top = held / "snapshots" / commit
    if not commit or not top.is_dir():
        raise CheckpointError(
            "the model is not in the cache, and HF_HUB_OFFLINE forbids to ask the hub",
            file=path,
            expected=f"a snapshot in {held}",
            hint="unset HF_HUB_OFFLINE",
        )
    return str(top / folder), {"repo": repo, "commit": commit}


def _cache_of(repo: str) -> Path:
    """The folder in which the cache holds a model."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))


def _parse(path: str) -> tuple[str, str | None, str]:
    from huggingface_hub import parse_hf_uri

    found = parse_hf_uri(path if path.startswith("hf://") else f"hf://{path}")
    if found.type != "model":
        raise ValueError(f"a {found.type}")
    return found.id, found.revision, found.path_in_repo.rstrip("/")


def _free(path: str) -> bool:
    return not Path(path).exists() and not Path(path).is_symlink()


@contextmanager
def _told(path: str) -> Iterator[None]:
    """Turn errors of huggingface_hub into ours; their texts may hold signed URLs, so that none of them is told."""
    from huggingface_hub import errors

    known: dict[type[BaseException], tuple[str, str]] = {
        errors.GatedRepoError: GATED,
        errors.RepositoryNotFoundError: (
            "no such file or folder here, and no such model in the hub that this token may see",
            f"check the name; if it is private: {_LOGIN}",
        ),
        errors.RevisionNotFoundError: ("the model has no such revision", "name a branch, a tag or a commit of it"),
        errors.LocalEntryNotFoundError: ("the model is not in the cache, or not whole", "unset HF_HUB_OFFLINE"),
        errors.OfflineModeIsEnabled: ("the hub must not be asked", "unset HF_HUB_OFFLINE"),
        errors.EntryNotFoundError: ("the model has no such file or folder", "check the name"),
        errors.HfHubHTTPError: ("the hub does not answer as it should", "run again later"),
        ValueError: ("not the name of a model in the hub", "org/name, org/name@revision or hf://org/name/folder"),
    }
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        problem, hint = next(
            (told for kind, told in known.items() if isinstance(error, kind)),
            ("the hub cannot be reached", "look at the network; HF_HUB_OFFLINE=1 takes what the cache holds"),
        )
        status = getattr(getattr(error, "response", None), "status_code", None)
        found = f"{type(error).__name__}, HTTP {status}" if status else type(error).__name__
        raise CheckpointError(problem, file=path, found=found, hint=hint) from None
