"""Downloads a hub repository into huggingface_hub's own cache, going on where an earlier transfer stopped.

`snapshot_download` starts a file from its beginning in every process (its part file is private to the process), which
for a shard of several gigabytes and a connection that breaks may never end. Large files are therefore fetched first,
over HTTP ranges, into the place where the cache keeps them; `snapshot_download` then finds them there and does the
rest. Part files have the name that huggingface_hub 1.0 gives them: `blobs/<sha256>.incomplete`.
"""

import hashlib
import re
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import BinaryIO

from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not re-exported by name
    WeakFileLock,
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
)

from headrace.errors import CheckpointError

# What the HTTP library itself raises: httpx's or httpx2's base class, as the version of huggingface_hub has it.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]

_API_TIMEOUT_S = 30.0
_NUM_CONNECTIONS = 4
_DISK_MARGIN_BYTES = 64 * 2**20
_TEXT_FILES = ("*.json", "*.jinja", "tokenizer.model")
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")


@dataclass(frozen=True, kw_only=True)
class RepoFile:
    """sha256: of files kept in large-file storage, None for small ones."""

    name: str
    size_bytes: int
    sha256: str | None


@dataclass(frozen=True, kw_only=True)
class Repo:
    """One commit of a repository; `revision` is what was asked for, None for the default branch."""

    repo_id: str
    revision: str | None
    commit: str
    files: tuple[RepoFile, ...]

    @property
    def cache_name(self) -> str:
        return "models--" + self.repo_id.replace("/", "--")

    def blob_path(self, file: RepoFile) -> Path:
        """Where the cache keeps a large file's bytes."""
        return Path(constants.HF_HUB_CACHE) / self.cache_name / "blobs" / str(file.sha256)

    def part_path(self, file: RepoFile) -> Path:
        return self.blob_path(file).with_suffix(".incomplete")


def list_repo(repo_id: str, revision: str | None) -> Repo:
    """Ask the hub for the commit behind a revision, and its files."""
    info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=_API_TIMEOUT_S)
    files = tuple(
        RepoFile(
            name=sibling.rfilename, size_bytes=sibling.size or 0, sha256=sibling.lfs.sha256 if sibling.lfs else None
        )
        for sibling in info.siblings or ()
    )
    return Repo(repo_id=repo_id, revision=revision, commit=str(info.sha), files=files)


def select_files(repo: Repo) -> tuple[RepoFile, ...]:
    """The files Headrace reads: configuration, tokenizer and one set of safetensors, never pickles.

    Raises:
        CheckpointError: there are no safetensors.
    """
    top_level = [file for file in repo.files if "/" not in file.name]
    weights = _select_weights([file for file in top_level if file.name.endswith(".safetensors")])
    if not weights:
        raise CheckpointError(
            f"'{repo.repo_id}' has no model weights as safetensors{_other_weights(top_level)}; "
            "choose a repository that has, or convert the weights and give the folder"
        )
    return tuple(file for file in top_level if any(fnmatch(file.name, text) for text in _TEXT_FILES)) + tuple(weights)


def _select_weights(candidates: list[RepoFile]) -> list[RepoFile]:
    """One copy of the weights: shards if there are any, else model.safetensors, else all but other tools' copies."""
    candidates = [file for file in candidates if not file.name.startswith(("consolidated", "adapter"))]
    shards = [file for file in candidates if _SHARD.search(file.name)]
    single = [file for file in candidates if file.name == "model.safetensors"]
    return shards or single or candidates


def _other_weights(files: list[RepoFile]) -> str:
    endings = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".safetensors")
    others = [file.name for file in files if file.name.endswith(endings)]
    return f", only {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}" if others else ""


def download_files(repo: Repo, files: tuple[RepoFile, ...], show_progress: bool) -> Path:
    """Complete the cached snapshot of `repo` with `files` and return its folder.

    Raises:
        CheckpointError: not enough space, or a file whose checksum is wrong.
    """
    missing = [file for file in files if _is_resumable(file) and not repo.blob_path(file).exists()]
    _check_disk_space(repo, missing)
    with _progress_bars(show_progress):
        _fetch_all(repo, missing)
        # fnmatch would read brackets in a file name as a set of characters
        names = [re.sub(r"([\[*?])", r"[\1]", file.name) for file in files]
        return Path(snapshot_download(repo.repo_id, revision=repo.revision, allow_patterns=names))


def _is_resumable(file: RepoFile) -> bool:
    """Small files are not worth it; the hub does not serve the largest over plain HTTP."""
    return file.sha256 is not None and file.size_bytes <= constants.MAX_HTTP_DOWNLOAD_SIZE


def _check_disk_space(repo: Repo, missing: list[RepoFile]) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    here = sum(path.stat().st_size for path in map(repo.part_path, missing) if path.exists())
    needed = sum(file.size_bytes for file in missing) - here
    free = shutil.disk_usage(cache).free
    if missing and needed + _DISK_MARGIN_BYTES > free:
        raise CheckpointError(
            f"'{repo.repo_id}' needs {needed / 1e9:.1f} GB more in {cache}, where {free / 1e9:.1f} GB are free; "
            "free some space there, or set HF_HOME to a folder on another disk"
        )


def _fetch_all(repo: Repo, files: list[RepoFile]) -> None:
    """Fetch over a few connections; the first error ends the rest, and so does Ctrl-C.

    Daemon threads, because those of a ThreadPoolExecutor would keep an interrupted process until the last byte.
    """
    waiting: deque[RepoFile] = deque(files)
    outcomes: SimpleQueue[Exception | None] = SimpleQueue()

    def work() -> None:
        while waiting:
            try:
                _fetch(repo, waiting.popleft())
                outcomes.put(None)
            except IndexError:  # another thread took the last one
                return
            except Exception as error:
                outcomes.put(error)

    for _ in range(min(_NUM_CONNECTIONS, len(files))):
        Thread(target=work, daemon=True, name="headrace-download").start()
    try:
        for _ in files:
            if error := outcomes.get():
                raise error
    finally:
        waiting.clear()


def _fetch(repo: Repo, file: RepoFile) -> None:
    """Append what is missing of one file to its part file, check the whole, and put it in its place."""
    blob, part = repo.blob_path(file), repo.part_path(file)
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / repo.cache_name / f"{blob.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    blob.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        _fetch_rest(repo, file, part)
        _check_sha256(repo, file, part)
        part.rename(blob)


def _fetch_rest(repo: Repo, file: RepoFile, part: Path) -> None:
    """Ask for the bytes after those of the part file, again and again as long as some arrive."""
    if part.exists() and part.stat().st_size > file.size_bytes:
        part.unlink()
    with part.open("ab", buffering=0) as stream:
        while True:
            start = stream.tell()
            try:
                return _append(repo, file, stream)
            except HTTP_ERROR as error:
                if isinstance(error, HfHubHTTPError) or stream.tell() == start:
                    raise


def _append(repo: Repo, file: RepoFile, stream: BinaryIO) -> None:
    http_get(
        hf_hub_url(repo.repo_id, file.name, revision=repo.commit),
        stream,
        resume_size=stream.tell(),
        headers=build_hf_headers(library_name="headrace"),
        expected_size=file.size_bytes,
        displayed_filename=file.name,
    )


def _check_sha256(repo: Repo, file: RepoFile, part: Path) -> None:
    with part.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != file.sha256:
        part.unlink()
        raise CheckpointError(
            f"'{file.name}' of '{repo.repo_id}' arrived with another checksum than the hub lists "
            f"(sha256 {found[:12]}... instead of {str(file.sha256)[:12]}...); it was deleted, run again to fetch it"
        )


@contextmanager
def _progress_bars(show: bool) -> Iterator[None]:
    """huggingface_hub draws its bars unless told not to, for the whole process; its state is put back afterwards."""
    if show or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
