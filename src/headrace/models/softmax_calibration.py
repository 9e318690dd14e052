"""The range of a model's attention logits, layer by layer, and the constant that asynchronized softmax takes from it.

FlashDecoding++ (arXiv:2311.01282) has one constant for a model, taken from the range of all logits. What must fit is
less: a row is computed right if its largest logit lies near enough to the constant, however small the others are. So
each layer has its own, from the range of its rows' maxima, and a layer whose rows differ too much stays synchronized.

A file holds what was observed and no decision: that depends on the longest context and on the KV cache's format too.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

from headrace.config import KvCacheFormat, SoftmaxScheme
from headrace.demo_model import demo_model_path
from headrace.errors import CheckpointError, ConfigError
from headrace.kernels import SoftmaxSpec
from headrace.user_cache import user_cache_folder

FILE_NAME = "softmax_calibration.json"
MARGIN = 20.0
"""Room kept on both sides for text that was not seen, in natural logarithms."""

_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LogitRange:
    """What one layer's softmax was given: scaled and capped logits that their queries may see.

    least, largest: of all; low_quantile, high_quantile: 99.99 % lie between them (0.005 % and 99.995 %).
    least_row_max, largest_row_max: of the largest logit of each query and head.
    largest_value: the largest absolute entry of V.
    """

    least: float
    low_quantile: float
    high_quantile: float
    largest: float
    least_row_max: float
    largest_row_max: float
    largest_value: float


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """softmax: for one layer; safe_row_max: maxima of rows that it computes once, None for a layer that is switched
    off, and then reason says why."""

    softmax: SoftmaxSpec
    safe_row_max: tuple[float, float] | None
    reason: str | None = None


def sound_interval(*, num_keys: int, largest_value: float, cache_format: KvCacheFormat) -> tuple[float, float]:
    """What row maximum - unified_max may be for any row of up to `num_keys` keys (native/attention.h).

    low:  n 2^-102 <= sum (n 2^-64 for int8), and sum >= e^low
    high: sum <= 2^126 and |o| < 2^128, where sum <= n e^high and |o| <= n e^high max|v|
    """
    log_keys, log_value = math.log(num_keys), math.log(max(1.0, largest_value))
    low = log_keys - (64 if cache_format is KvCacheFormat.INT8 else 102) * math.log(2)
    return low, min(126 * math.log(2), 128 * math.log(2) - log_value) - log_keys


def asynchronized_spec(logits: LogitRange, *, max_model_len: int, cache_format: KvCacheFormat) -> SoftmaxSpec:
    """The middle of the row maxima comes to lie in the middle of the sound interval, whether or not they all fit."""
    low, high = sound_interval(num_keys=max_model_len, largest_value=logits.largest_value, cache_format=cache_format)
    unified_max = (logits.least_row_max + logits.largest_row_max - low - high) / 2
    return SoftmaxSpec(scheme=SoftmaxScheme.ASYNCHRONIZED, unified_max=unified_max)


def choose_layer(logits: LogitRange, *, max_model_len: int, cache_format: KvCacheFormat) -> LayerChoice:
    """Asynchronized where all row maxima fit into the sound interval with a margin on both sides."""
    low, high = sound_interval(num_keys=max_model_len, largest_value=logits.largest_value, cache_format=cache_format)
    span, room = logits.largest_row_max - logits.least_row_max, max(0.0, high - low - 2 * MARGIN)
    if span > room:
        reason = (
            f"row maxima from {logits.least_row_max:.1f} to {logits.largest_row_max:.1f}, a span of {span:.1f}; "
            f"float32 has room for {room:.1f}"
        )
        return LayerChoice(softmax=SoftmaxSpec(), safe_row_max=None, reason=reason)
    softmax = asynchronized_spec(logits, max_model_len=max_model_len, cache_format=cache_format)
    return LayerChoice(softmax=softmax, safe_row_max=(softmax.unified_max + low, softmax.unified_max + high))


def choose_layers(
    layers: Sequence[LogitRange], *, max_model_len: int, cache_format: KvCacheFormat
) -> tuple[LayerChoice, ...]:
    return tuple(choose_layer(layer, max_model_len=max_model_len, cache_format=cache_format) for layer in layers)


def calibration_file(folder: Path) -> Path:
    """Where the ranges of the model in a folder lie, written or not: beside it, but for the model inside the package.

    Its folder is not the user's, and may be shared or read-only: its ranges lie in the user's cache, by the digest of
    its weights, which another version of the package may have changed.
    """
    if folder.resolve() != demo_model_path():
        return folder / FILE_NAME
    with (folder / "model.safetensors").open("rb") as weights:
        digest = file_digest(weights, "sha256").hexdigest()[:16]
    return user_cache_folder() / "calibration" / f"{digest}.json"


def prepare_calibration_file(folder: Path) -> Path:
    """The same, before time goes into a calibration: in a folder that exists and can be written.

    Raises:
        ConfigError: as `save_calibration` would.
    """
    file = calibration_file(folder)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(file, error.strerror or str(error)) from None
    check_can_save(file)
    return file


def save_calibration(layers: Sequence[LogitRange], file: Path) -> None:
    """Write all of the file or nothing.

    Raises:
        ConfigError: it cannot be written.
    """
    text = json.dumps({"version": _VERSION, "layers": [asdict(layer) for layer in layers]}, indent=2)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        try:
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(file, error.strerror or str(error)) from None


def check_can_save(file: Path) -> None:
    """Before time goes into a calibration.

    Raises:
        ConfigError: as `save_calibration` would.
    """
    if file.is_dir():
        raise _cannot_write(file, "it is a folder")
    if not file.parent.is_dir():
        raise _cannot_write(file, f"there is no folder {file.parent}")
    if not os.access(file.parent, os.W_OK):
        raise _cannot_write(file, f"{file.parent} is read-only")


def load_calibration(file: Path, *, num_layers: int) -> tuple[LogitRange, ...] | None:
    """For each layer; None if there is no such file.

    Raises:
        CheckpointError: a file that is broken or belongs to another model.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(file, f"cannot be read: {error}") from None
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        raise _broken(file, f"is no calibration of version {_VERSION}")
    layers = content.get("layers")
    if not isinstance(layers, list):
        raise _broken(file, "has no list of layers")
    if len(layers) != num_layers:
        raise _broken(file, f"has {len(layers)} layers, the model {num_layers}")
    return tuple(_logit_range(file, index, layer) for index, layer in enumerate(layers))


def _logit_range(file: Path, index: int, layer: Any) -> LogitRange:
    names = tuple(LogitRange.__dataclass_fields__)
    if not isinstance(layer, dict) or set(layer) != set(names):
        raise _broken(file, f"layer {index} must have {', '.join(names)}")
    for name, value in layer.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 3.5e38:
            raise _broken(file, f"layer {index} has {name} = {value!r:.40}; it must be a finite float32 number")
    found = LogitRange(**{name: float(value) for name, value in layer.items()})
    if not (
        found.least <= found.low_quantile <= found.high_quantile <= found.largest
        and found.least <= found.least_row_max <= found.largest_row_max <= found.largest
        and found.largest_value >= 0
    ):
        raise _broken(file, f"layer {index} has numbers out of order")
    return found


def _broken(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file} {what}; run `headrace calibrate` for this model again, or delete the file")


def _cannot_write(file: Path, why: str) -> ConfigError:
    return ConfigError(f"{file} cannot be written: {why}; name another file with --output")
