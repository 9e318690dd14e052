"""From a hub id to a folder on this machine.

Knows the hub's errors and puts each into one line; what is inside the files is the loader's business.
`huggingface_hub` reads HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE from the environment.
"""

import errno
import json
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from headrace.errors import CheckpointError
from headrace.models.hub_download import HTTP_ERROR, download_files, list_repo, select_files


def download_config(repo_id: str, revision: str | None) -> Path:
    """The config.json of a hub repository and nothing else; without a network that of an earlier download.

    Raises:
        CheckpointError: no such repository, revision or file, no access, no network, no space.
    """
    try:
        list_repo(repo_id, revision)  # fails at once, where a download without a network tries for half a minute
        return Path(hf_hub_download(repo_id, "config.json", revision=revision))
    except HFValidationError as error:
        raise CheckpointError(f"'{repo_id}' is not a hub id ({_one_line(error)}) and no such path exists") from error
    except (OSError, HTTP_ERROR) as error:
        if _is_unreachable(error):
            return _cached_config(repo_id, revision, error)
        if isinstance(error, EntryNotFoundError):
            raise CheckpointError(f"'{repo_id}'{_at(revision)} has no config.json; it is no model") from error
        raise CheckpointError(_explain(error, repo_id, revision)) from error


def download_model(model: str, revision: str | None, show_progress: bool) -> Path:
    """The hub's snapshot of a model, downloaded where it is missing.

    Only files that Headrace reads are downloaded. A transfer that was cut off goes on where it stopped. Without a
    network, a complete snapshot from an earlier download serves.

    Raises:
        CheckpointError: no such repository or revision, no access, no network, no space, no safetensors.
    """
    try:
        repo = list_repo(model, revision)
        return download_files(repo, select_files(repo), show_progress)
    except HFValidationError as error:
        raise CheckpointError(f"'{model}' is not a hub id ({_one_line(error)}) and no such folder exists") from error
    except (OSError, HTTP_ERROR) as error:
        if not _is_unreachable(error):
            raise CheckpointError(_explain(error, model, revision)) from error
        return _cached_snapshot(model, revision, error)


def _is_unreachable(error: Exception) -> bool:
    """No answer, a broken connection, offline mode or a fault of the server: an earlier download may serve."""
    if isinstance(error, HfHubHTTPError):
        return int(error.response.status_code) >= 500
    return isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError, HTTP_ERROR))


def _explain(error: Exception, model: str, revision: str | None) -> str:
    if isinstance(error, GatedRepoError):
        return (
            f"'{model}' is gated: accept its conditions on its page at {constants.ENDPOINT}, "
            "then set HF_TOKEN to a token of that account"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"'{model}' was not found: no such folder here, and no such repository at {constants.ENDPOINT} "
            "(check the spelling; if it is private, set HF_TOKEN)"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"'{model}' has no revision '{revision}'; give a branch, a tag or a commit, or leave it out"
    if isinstance(error, HfHubHTTPError):
        return f"{constants.ENDPOINT} refused '{model}': {_one_line(error)}; check HF_TOKEN, or try again later"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk of {constants.HF_HUB_CACHE} is full while downloading '{model}'; free some space there and run "
            "again (the transfer goes on where it stopped), or set HF_HOME to a folder on another disk"
        )
    return f"cannot download '{model}' into {constants.HF_HUB_CACHE}: {_one_line(error)}"


def _cached_config(repo_id: str, revision: str | None, cause: Exception) -> Path:
    """
    Raises:
        CheckpointError: no earlier download brought it; says why the hub was not asked.
    """
    try:
        return Path(hf_hub_download(repo_id, "config.json", revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        why, advice = _why_not_asked(cause)
        raise CheckpointError(
            f"the config.json of '{repo_id}'{_at(revision)} is not in {constants.HF_HUB_CACHE}, and {why}; {advice}"
        ) from cause


def _cached_snapshot(model: str, revision: str | None, cause: Exception) -> Path:
    """A complete snapshot from an earlier download.

    Raises:
        CheckpointError: there is none; says why the hub was not asked.
    """
    why, advice = _why_not_asked(cause)
    try:
        folder = Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns="config.json"))
        missing = missing_files(folder)
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"'{model}'{_at(revision)} is not in {constants.HF_HUB_CACHE}, and {why}; {advice}"
        ) from cause
    if missing:
        raise CheckpointError(
            f"the copy of '{model}'{_at(revision)} in {constants.HF_HUB_CACHE} is incomplete "
            f"({', '.join(missing[:3])} missing), and {why}; {advice}"
        ) from cause
    return folder


def _why_not_asked(cause: Exception) -> tuple[str, str]:
    """And what to do about it."""
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set", "unset it once to download"
    return (
        f"{constants.ENDPOINT} cannot be reached or the connection broke ({_one_line(cause)})",
        "check the network and run again (a transfer goes on where it stopped)",
    )


def missing_files(folder: Path) -> list[str]:
    """What a snapshot lacks to be loaded: its configuration, or safetensors that its index names."""
    if not (folder / "config.json").is_file():
        return ["config.json"]
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
        names = sorted(set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [] if any(folder.glob("*.safetensors")) else ["the safetensors"]
    return [name for name in names if not (folder / name).is_file()]


def _at(revision: str | None) -> str:
    return f" at revision '{revision}'" if revision else ""


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
