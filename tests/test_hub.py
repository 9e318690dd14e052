"""From a model's name to a folder: paths, downloads that are cut off, and every way a hub says no.

Downloads run in a subprocess, because huggingface_hub reads its environment when it is imported.
HF_HUB_DISABLE_XET=1 is set although nothing needs it: large files go over HTTP ranges in any case.
"""

import errno
import json
import os
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, FakeRepo, run_fake_hub
from huggingface_hub.errors import LocalEntryNotFoundError

from headrace.demo_model import demo_model_path
from headrace.errors import CheckpointError
from headrace.models import hub as hub_module
from headrace.models import hub_download
from headrace.models.hub import download_config, missing_files
from headrace.models.hub_download import Repo, RepoFile, select_files
from headrace.models.model_folder import is_hub_id, resolve_model_folder

MIB = 2**20
# huggingface_hub writes in pieces of 10 MiB; a file must be longer to be cut in the middle.
LARGE = random.Random(0).randbytes(24 * MIB)
SMALL_FILES = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "chat_template.jinja": b"x"}
UNWANTED = {"README.md": b"text", "pytorch_model.bin": b"pickle", "original/consolidated.00.pth": b"pickle"}

SCRIPT = textwrap.dedent("""
    import sys
    from headrace.errors import CheckpointError
    from headrace.models.model_folder import resolve_model_folder
    for name in sys.argv[1:]:
        model, _, revision = name.partition("@")
        try:
            print("folder", resolve_model_folder(model, revision or None, False))
        except CheckpointError as error:
            print("error", error)
""")


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    repos = {
        "tiny": FakeRepo(SMALL_FILES | UNWANTED | {"model.safetensors": b"w" * 5000}),
        "large": FakeRepo(SMALL_FILES | {"model.safetensors": LARGE}),
        "gated": FakeRepo(SMALL_FILES | {"model.safetensors": b"w" * 5000}, is_gated=True),
        "pickled": FakeRepo(SMALL_FILES | UNWANTED),
    }
    with run_fake_hub(**repos) as running:
        yield running


class Downloader:
    """Starts downloads into one cache; tqdm and logs go to stderr, the folder or the error to stdout."""

    def __init__(self, hub: FakeHub, home: Path) -> None:
        self.hub, self.home = hub, home

    def start(self, *names: str, **env: str) -> subprocess.Popen[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        fixed = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *names],
            env=clean | fixed | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def folder(self, name: str, **env: str) -> Path:
        (line,) = self._run(name, **env)
        assert line.startswith("folder "), line
        return Path(line.removeprefix("folder "))

    def errors(self, *names: str, **env: str) -> list[str]:
        """One line for each name."""
        lines = self._run(*names, **env)
        assert len(lines) == len(names)
        assert all(line.startswith("error ") for line in lines)
        return [line.removeprefix("error ") for line in lines]

    def _run(self, *names: str, **env: str) -> list[str]:
        output, errors = (process := self.start(*names, **env)).communicate(timeout=30)
        assert process.returncode == 0, output + errors
        assert "Traceback" not in errors
        return output.splitlines()

    def kill_in_the_middle(self, model: str) -> None:
        """SIGKILL once a part of the large file is on disk and the hub has fallen silent."""
        self.hub.stall_after = 15 * MIB
        process = self.start(model)
        assert self.hub.has_stalled.wait(20)
        deadline = time.monotonic() + 20
        while not any(part.stat().st_size for part in self.home.rglob("*.incomplete")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.communicate()


@pytest.fixture
def downloader(hub: FakeHub, tmp_path: Path) -> Downloader:
    return Downloader(hub, tmp_path)


def test_a_download_brings_what_headrace_reads_and_no_pickles(downloader, hub):
    folder = downloader.folder("test/tiny")
    assert {path.name for path in folder.iterdir()} == {*SMALL_FILES, "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == b"w" * 5000
    assert not {sent.name for sent in hub.sent} & set(UNWANTED)


def test_a_second_run_downloads_nothing_and_needs_no_network(downloader, hub):
    folder = downloader.folder("test/tiny")
    hub.sent.clear()
    assert downloader.folder("test/tiny") == folder
    assert downloader.folder("test/tiny", HF_HUB_OFFLINE="1") == folder
    assert downloader.folder("test/tiny", HF_ENDPOINT="http://127.0.0.1:9") == folder
    hub.is_down = True
    assert downloader.folder("test/tiny") == folder
    assert hub.sent == []


def test_a_broken_connection_is_taken_up_where_it_broke(downloader, hub):
    hub.break_after = 15 * MIB
    folder = downloader.folder("test/large")
    assert (folder / "model.safetensors").read_bytes() == LARGE
    first, second = hub.sent_of("model.safetensors")
    assert first.start == 0
    assert second.start > 0
    assert second.num_bytes == len(LARGE) - second.start


def test_a_killed_download_is_taken_up_by_the_next_run(downloader, hub):
    downloader.kill_in_the_middle("test/large")
    folder = downloader.folder("test/large")
    assert (folder / "model.safetensors").read_bytes() == LARGE
    first, second = hub.sent_of("model.safetensors")
    assert first.start == 0
    assert second.start > 0
    assert second.num_bytes < len(LARGE)
    assert not list(downloader.home.rglob("*.incomplete"))


def test_a_part_file_that_is_wrong_is_found_out_and_removed(downloader, hub):
    downloader.kill_in_the_middle("test/large")
    (part,) = downloader.home.rglob("*.incomplete")
    part.write_bytes(b"x" * part.stat().st_size)
    (line,) = downloader.errors("test/large")
    assert "another checksum" in line
    assert (downloader.folder("test/large") / "model.safetensors").read_bytes() == LARGE


def test_an_incomplete_copy_does_not_serve_offline(downloader, hub):
    folder = downloader.folder("test/tiny")
    (folder / "model.safetensors").unlink()
    (line,) = downloader.errors("test/tiny", HF_HUB_OFFLINE="1")
    assert "incomplete" in line
    assert "HF_HUB_OFFLINE is set" in line


def test_every_refusal_is_one_line_that_says_what_to_do(downloader):
    refused = {
        "test/absent": "'test/absent' was not found: no such folder here, and no such repository",
        "test/gated": "'test/gated' is gated: accept its conditions",
        "test/pickled": "no model weights as safetensors, only pytorch_model.bin; choose a repository that has",
        "test/tiny@v9": "has no revision 'v9'; give a branch, a tag or a commit",
        "te st/tiny!": "is not a hub id",
    }
    for line, expected in zip(downloader.errors(*refused), refused.values(), strict=True):
        assert expected in line


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set; unset it once to download"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
    ],
)
def test_without_a_network_and_a_copy(downloader, env, expected):
    (line,) = downloader.errors("test/tiny", **env)
    assert expected in line


def test_a_disk_that_is_too_small_is_noticed_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_download.constants, "HF_HUB_CACHE", str(tmp_path))
    file = RepoFile(name="model.safetensors", size_bytes=10**18, sha256="0" * 64)
    monkeypatch.setattr(hub_download.constants, "MAX_HTTP_DOWNLOAD_SIZE", 10**19)
    with pytest.raises(CheckpointError, match=r"needs 1000000000\.0 GB more in .* are free; free some space"):
        hub_download.download_files(Repo(repo_id="test/x", revision=None, commit="0", files=(file,)), (file,), False)


def test_a_disk_that_fills_up_is_one_line(monkeypatch):
    def list_repo(*_: object) -> Repo:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub_module, "list_repo", list_repo)
    with pytest.raises(CheckpointError, match="is full while downloading 'test/x'; free some space"):
        resolve_model_folder("test/x", None, False)


def test_a_configuration_is_not_asked_for_again_and_again_without_a_network(monkeypatch):
    def list_repo(*_):
        raise hub_download.HTTP_ERROR("no route")

    def download(repo_id, filename, *, revision, local_files_only):
        assert local_files_only
        raise LocalEntryNotFoundError("no copy")

    monkeypatch.setattr(hub_module, "list_repo", list_repo)
    monkeypatch.setattr(hub_module, "hf_hub_download", download)
    with pytest.raises(CheckpointError, match=r"config.json of 'test/x' is not in .*no route.*; check the network"):
        download_config("test/x", None)


def test_a_folder_is_used_as_it_is(tmp_path):
    assert resolve_model_folder(str(tmp_path), None, False) == tmp_path


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "~/absent", "absent", "a/b/c"])
def test_what_looks_like_a_path_must_exist(name):
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_model_folder(name, None, False)


def test_gguf_is_refused_with_what_there_is_instead(tmp_path):
    (tmp_path / "model-q4_0.gguf").touch()
    for model in (tmp_path, tmp_path / "model-q4_0.gguf"):
        with pytest.raises(CheckpointError, match=r"GGUF is not read: give .* the original model.* --quantize int4"):
            resolve_model_folder(str(model), None, False)
    (tmp_path / "config.json").touch()
    assert resolve_model_folder(str(tmp_path), None, False) == tmp_path


def test_the_shipped_model_has_a_name():
    assert resolve_model_folder("demo", None, False) == demo_model_path()


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model_folder(str(tmp_path / "model.safetensors"), None, False)


@pytest.mark.parametrize(("name", "expected"), [("org/name", True), ("name", False), ("org/", False), ("./x", False)])
def test_hub_ids_have_one_slash(name, expected):
    assert is_hub_id(name) is expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (["model.safetensors", "model-00001-of-00001.safetensors"], ["model-00001-of-00001.safetensors"]),
        (["model.safetensors-00001-of-00002.safetensors"], ["model.safetensors-00001-of-00002.safetensors"]),
        (["weights.safetensors", "original/model.safetensors"], ["weights.safetensors"]),
        (["model.safetensors", "model.fp16.safetensors"], ["model.safetensors"]),
    ],
)
def test_one_copy_of_the_weights_is_chosen(names, expected):
    files = tuple(RepoFile(name=name, size_bytes=1, sha256=None) for name in names)
    chosen = select_files(Repo(repo_id="test/x", revision=None, commit="0", files=files))
    assert [file.name for file in chosen] == expected


def test_consolidated_weights_alone_are_not_enough():
    file = RepoFile(name="consolidated.safetensors", size_bytes=1, sha256=None)
    with pytest.raises(CheckpointError, match=r"only consolidated\.safetensors"):
        select_files(Repo(repo_id="test/x", revision=None, commit="0", files=(file,)))


def test_missing_shards_are_named(tmp_path):
    assert missing_files(tmp_path) == ["config.json"]
    (tmp_path / "config.json").write_text("{}")
    assert missing_files(tmp_path) == ["the safetensors"]
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").touch()
    assert missing_files(tmp_path) == ["model-2.safetensors"]


def test_the_command_line_takes_a_hub_id(tmp_path):
    files = {
        file.name: file.read_bytes() for file in demo_model_path().iterdir() if file.suffix != ".py" and file.is_file()
    }
    command = [
        sys.executable,
        "-m",
        "headrace",
        "generate",
        "Hello",
        "--model",
        "test/small",
        "--max-tokens",
        "4",
        "--json",
    ]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    with run_fake_hub(small=FakeRepo(files=files)) as hub:
        env = clean | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        online = subprocess.run(command, env=env, capture_output=True, text=True, timeout=50, check=True)
    # The hub is gone: the copy serves.
    offline = subprocess.run(command, env=env, capture_output=True, text=True, timeout=50, check=True)
    assert json.loads(online.stdout)["text"] == json.loads(offline.stdout)["text"] != ""
