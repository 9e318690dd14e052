"""What a model is, from its config.json alone: no weights, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.config import Dtype, ModelConfig
from headrace.demo_model import DEMO, demo_model_path
from headrace.errors import CheckpointError, ConfigError
from headrace.models.families import read_model_config
from headrace.models.json_file import read_json
from headrace.models.model_folder import is_hub_id, resolve_model_folder

_ACTIVATION_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    file: Path
    hf_config: Mapping[str, Any]
    model: ModelConfig

    def activation_dtype(self, dtype: Dtype) -> str:
        """bfloat16 or float32, as loading the model would choose.

        Raises:
            ConfigError: AUTO, and config.json does not say.
        """
        if dtype is not Dtype.AUTO:
            return str(dtype.value)
        name = self.hf_config.get("dtype") or self.hf_config.get("torch_dtype")
        if name not in _ACTIVATION_BYTES:
            raise ConfigError(f"{self.file} names {name!r} as dtype; give --dtype bfloat16 or float32")
        return "float32" if name == "float32" else "bfloat16"

    def activation_bytes(self, dtype: Dtype) -> int:
        """Of an element."""
        return _ACTIVATION_BYTES[self.activation_dtype(dtype)]


def read_config_file(model: str, revision: str | None = None) -> ConfigFile:
    """The config.json that `model` names: the file, its folder, or a hub id.

    Raises:
        CheckpointError: there is none, or Headrace cannot use it; says why.
    """
    file = _find(model, revision)
    hf_config = read_json(file)
    try:
        return ConfigFile(file=file, hf_config=hf_config, model=read_model_config(hf_config)[1])
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None


def check_local_model(model: str) -> None:
    """Refuse a folder that holds no model before torch is imported for it; a hub id is left to the hub.

    Raises:
        CheckpointError: no such folder, or no config.json that Headrace can use; says why.
    """
    if Path(model).expanduser().exists() or not is_hub_id(model):
        read_config_file(str(resolve_model_folder(model, None, show_progress=False)))


def _find(model: str, revision: str | None) -> Path:
    path = demo_model_path() if model == DEMO else Path(model).expanduser()
    if path.is_dir():
        return path / "config.json"
    if path.exists():
        return path
    # Looking at the hub takes its library half a second to import.
    from headrace.models.hub import download_config

    if not is_hub_id(model):
        raise CheckpointError(
            f"'{model}' does not exist; give a config.json, the folder of one, or a hub id of the form "
            "organization/name"
        )
    return download_config(model, revision)
