"""From the name of a model to a folder on this machine."""

from pathlib import Path

from headrace.demo_model import DEMO, demo_model_path
from headrace.errors import CheckpointError

_NO_GGUF = (
    "GGUF is not read: give the folder or hub id of the original model, with safetensors, and --quantize int4 or int8 "
    "for weights of that size"
)


def resolve_model_folder(model: str, revision: str | None, show_progress: bool) -> Path:
    """The folder of a model: `model` itself if it is one, the shipped model's for "demo", else the hub's snapshot, see
    `hub.download_model`.

    Raises:
        CheckpointError: no such folder, repository or revision, no access, no network, no space, no safetensors.
    """
    if model == DEMO:
        return demo_model_path()
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists() and any(folder.glob("*.gguf")):
            raise CheckpointError(f"{model} has no config.json, only GGUF; {_NO_GGUF}")
        return folder
    if folder.exists() and folder.suffix == ".gguf":
        raise CheckpointError(f"'{model}': {_NO_GGUF}")
    if folder.exists():
        raise CheckpointError(f"'{model}' is a file; give the folder that holds config.json and the safetensors files")
    if not is_hub_id(model):
        raise CheckpointError(
            f"the folder '{model}' does not exist; give an existing folder, or a hub id of the form organization/name"
        )
    # Here, because the hub's library takes a quarter of a second to import, and a folder needs none of it.
    from headrace.models.hub import download_model

    return download_model(model, revision, show_progress)


def is_hub_id(model: str) -> bool:
    """Whether a name has the form organization/name and is not written as a path."""
    return not model.startswith((".", "/", "~")) and model.count("/") == 1 and all(model.split("/"))
