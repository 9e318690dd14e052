"""Writes a checkpoint again with its linear weights as integers, in Headrace's own format."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from headrace.config import WeightFormat
from headrace.errors import CheckpointError, ConfigError, KernelError, nearest_name
from headrace.kernels import Kernels, kernel_choice_from, resolve_kernels
from headrace.layers.context import LayerContext
from headrace.models.checkpoint import Checkpoint
from headrace.models.decoder import Decoder
from headrace.models.loading import Progress
from headrace.models.model_folder import resolve_model_folder
from headrace.models.progress import bytes_progress
from headrace.models.quantization import quantization_config, quantized_names
from headrace.models.source import ModelSource, open_model
from headrace.parallel.group import OneRankGroup

_SHARD_BYTES = 256 * 2**20
_COPIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "generation_config.json", "chat_template.*")


def quantize(
    model: str, output: str | Path, weight_format: str, *, revision: str | None = None, show_progress: bool = False
) -> Path:
    """Quantize the linear weights of a folder or hub id to "int8" or "int4" and save the result to a new folder.

    Raises:
        CheckpointError: the model cannot be read, or the result not written.
        ConfigError: an unknown format, an output that exists, a source that is quantized already.
    """
    allowed = [WeightFormat.INT8.value, WeightFormat.INT4.value]
    if weight_format not in allowed:
        raise ConfigError(f"weight_format is '{weight_format}'; {nearest_name(weight_format, allowed)}")
    source = open_model(resolve_model_folder(model, revision, show_progress))
    kernels = resolve_kernels(kernel_choice_from())
    with bytes_progress("quantizing", source.checkpoint_bytes, show_progress) as progress, torch.inference_mode():
        quantize_checkpoint(source, WeightFormat(weight_format), Path(output), kernels, progress)
    return Path(output)


def quantize_checkpoint(
    source: ModelSource, weight_format: WeightFormat, output: Path, kernels: Kernels, progress: Progress
) -> None:
    """Save `source` to the folder `output`, which must not exist yet.

    Everything is written beside `output` first and moved there when it is whole: a full disk or an interruption leaves
    neither half a checkpoint nor anything else behind. Memory: one shard, whatever the size of the model.

    Raises:
        ConfigError: the output exists, or the source is quantized already.
        CheckpointError: a tensor cannot be quantized, or the files cannot be written.
    """
    if source.stored_format is not None:
        raise ConfigError(
            f"the checkpoint is already quantized to {source.stored_format.value}; start from the original"
        )
    if output.exists():
        raise ConfigError(f"{output} exists; give a folder that does not, so that nothing is overwritten")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
            _write(source, weight_format, Path(scratch), kernels, progress)
            Path(scratch).chmod(0o755)
            Path(scratch).rename(output)
            # TemporaryDirectory removes its folder on leaving; after the move it finds an empty stand-in.
            Path(scratch).mkdir()
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(_existing(output)).free
        raise CheckpointError(f"cannot write {output} ({free} bytes free there): {error}") from None


def _write(
    source: ModelSource, weight_format: WeightFormat, folder: Path, kernels: Kernels, progress: Progress
) -> None:
    for pattern in _COPIED:
        for file in source.folder.glob(pattern):
            shutil.copy(file, folder / file.name)
    hf_config = {**source.hf_config, "quantization_config": quantization_config(weight_format)}
    (folder / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")
    shards = _Shards(folder)
    for name, tensor in _tensors(source, weight_format, kernels, progress):
        shards.add(name, tensor)
    shards.finish()


def _tensors(
    source: ModelSource, weight_format: WeightFormat, kernels: Kernels, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    """The new checkpoint's tensors, in the old one's order."""
    quantizable = _quantizable_names(source, kernels)
    for name, info in source.checkpoint.tensors.items():
        if name in quantizable:
            names = quantized_names(name)
            yield from zip(names, _quantize(source.checkpoint, name, weight_format, kernels), strict=True)
        else:
            yield name, source.checkpoint.read_whole(name).clone()
        source.checkpoint.release(name)
        progress(info.num_bytes)


def _quantizable_names(source: ModelSource, kernels: Kernels) -> set[str]:
    context = LayerContext(kernels=kernels, tp_group=OneRankGroup())
    decoder = Decoder(source.config, context, dtype=torch.float32, max_model_len=source.config.max_position_embeddings)
    return {
        source.family.locate(part.name, source.config).name
        for parameter in decoder.parameters()
        if parameter.is_quantizable and parameter.is_matrix
        for part in parameter.slices
    }


def _quantize(
    checkpoint: Checkpoint, name: str, weight_format: WeightFormat, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    blocks = []
    for _, rows in checkpoint.row_blocks(name, range(checkpoint.tensors[name].shape[0])):
        try:
            blocks.append(kernels.quantize_rows(rows, weight_format))
        except KernelError as error:
            raise CheckpointError(f"tensor '{name}': {error}") from None
    qweights, scales = zip(*blocks, strict=True)
    return torch.cat(qweights), torch.cat(scales)


class _Shards:
    """Collects tensors and writes a file whenever enough have come together."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, Tensor] = {}
        self._written: list[tuple[Path, list[str], int]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        self._pending[name] = tensor
        if sum(t.nbytes for t in self._pending.values()) >= _SHARD_BYTES:
            self._flush()

    def finish(self) -> None:
        """Write the rest, give files their final names, and an index if there are several."""
        self._flush()
        if len(self._written) == 1:
            self._written[0][0].rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, (file, names, _) in enumerate(self._written, start=1):
            final = f"model-{number:05d}-of-{len(self._written):05d}.safetensors"
            file.rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": sum(size for *_, size in self._written)}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _flush(self) -> None:
        if self._pending:
            file = self._folder / f"shard-{len(self._written)}.safetensors"
            save_file(self._pending, file, metadata={"format": "pt"})
            size = sum(tensor.nbytes for tensor in self._pending.values())
            self._written.append((file, list(self._pending), size))
            self._pending = {}


def _existing(path: Path) -> Path:
    """The nearest parent that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())
