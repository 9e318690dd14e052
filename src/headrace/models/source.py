"""A model folder that has been read but not loaded: what it is, and the decoder it becomes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headrace.config import Dtype, LoadConfig, ModelConfig, Quantize, WeightFormat
from headrace.errors import CheckpointError, ConfigError
from headrace.layers.context import LayerContext
from headrace.models.checkpoint import Checkpoint
from headrace.models.decoder import Decoder
from headrace.models.families import Family, read_model_config
from headrace.models.json_file import read_json
from headrace.models.loading import Progress, WeightFormats, WeightLoader
from headrace.models.quantization import read_quantization

_QUANTIZED = {Quantize.INT8: WeightFormat.INT8, Quantize.INT4: WeightFormat.INT4}
_HALF = ("bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """hf_config: config.json as it is; stored_format: integer format of the checkpoint's linear weights, if any."""

    folder: Path
    hf_config: Mapping[str, Any]
    family: Family
    config: ModelConfig
    checkpoint: Checkpoint
    stored_format: WeightFormat | None

    @property
    def checkpoint_bytes(self) -> int:
        return sum(info.num_bytes for info in self.checkpoint.tensors.values())


def open_model(folder: Path) -> ModelSource:
    """Read config.json and the headers of the weight files.

    Raises:
        CheckpointError: the folder is not a model Headrace can load; says why.
    """
    hf_config = read_json(folder / "config.json")
    try:
        family, config = read_model_config(hf_config)
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    return ModelSource(
        folder=folder,
        hf_config=hf_config,
        family=family,
        config=config,
        checkpoint=Checkpoint(folder),
        stored_format=read_quantization(hf_config),
    )


def resolve_formats(source: ModelSource, load: LoadConfig) -> WeightFormats:
    """The formats weights will have in memory.

    Raises:
        ConfigError: a quantized checkpoint asked for in another integer format.
    """
    dense = _dense_format(source, load.dtype)
    wanted = _QUANTIZED.get(load.quantize)
    if source.stored_format is not None and wanted not in (None, source.stored_format):
        raise ConfigError(
            f"the checkpoint is already quantized to {source.stored_format.value}; it cannot be loaded as "
            f"{load.quantize.value}: quantize the original instead"
        )
    return WeightFormats(dense=dense, linear=source.stored_format or wanted or dense)


def load_decoder(
    source: ModelSource,
    context: LayerContext,
    formats: WeightFormats,
    *,
    max_model_len: int,
    progress: Progress,
    layer_range: range | None = None,
) -> Decoder:
    """Build the decoder, or the stage of it that has these layers, and fill it.

    Raises:
        CheckpointError: tensors that are missing, unknown or misshapen.
    """
    decoder = Decoder(source.config, context, dtype=formats.dtype, max_model_len=max_model_len, layer_range=layer_range)
    loader = WeightLoader(
        source.checkpoint, source.family, source.config, context.kernels, formats, source.stored_format, progress
    )
    is_whole = decoder.layer_range == range(source.config.num_hidden_layers)
    model = decoder if is_whole else Decoder(source.config, context, dtype=formats.dtype, max_model_len=max_model_len)
    with torch.inference_mode():
        loader.load(list(decoder.parameters()), model=list(model.parameters()))
    return decoder


def _dense_format(source: ModelSource, dtype: Dtype) -> WeightFormat:
    if dtype is not Dtype.AUTO:
        return WeightFormat(dtype.value)
    name = source.hf_config.get("dtype") or source.hf_config.get("torch_dtype") or _stored_dtype(source.checkpoint)
    return WeightFormat.BFLOAT16 if name in _HALF else WeightFormat.FLOAT32


def _stored_dtype(checkpoint: Checkpoint) -> str:
    """The floating-point type that most of the checkpoint's bytes have."""
    sizes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        if info.dtype.is_floating_point:
            name = str(info.dtype).removeprefix("torch.")
            sizes[name] = sizes.get(name, 0) + info.num_bytes
    return max(sizes, key=lambda name: sizes[name], default="float32")
