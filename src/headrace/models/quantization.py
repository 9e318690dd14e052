"""How a checkpoint that Headrace quantized says so, in its config.json and in its tensor names."""

from collections.abc import Mapping
from typing import Any

from headrace.config import WeightFormat
from headrace.errors import CheckpointError
from headrace.kernels import QUANTIZATION_GROUP_SIZE

QUANT_METHOD = "headrace"
_FORMATS = {WeightFormat.INT8.value: WeightFormat.INT8, WeightFormat.INT4.value: WeightFormat.INT4}


def quantization_config(weight_format: WeightFormat) -> dict[str, Any]:
    """The `quantization_config` entry of config.json."""
    return {"quant_method": QUANT_METHOD, "weight_format": weight_format.value, "group_size": QUANTIZATION_GROUP_SIZE}


def read_quantization(config: Mapping[str, Any]) -> WeightFormat | None:
    """The format of a checkpoint's quantized tensors, None if it is not quantized.

    Raises:
        CheckpointError: quantized by another method, or in a form this version does not read.
    """
    entry = config.get("quantization_config")
    if entry is None:
        return None
    method = entry.get("quant_method") if isinstance(entry, Mapping) else entry
    if method != QUANT_METHOD:
        raise CheckpointError(
            f"the checkpoint is quantized by '{method}'; Headrace reads its own format (headrace quantize) "
            "and unquantized weights"
        )
    if str(entry.get("weight_format")) not in _FORMATS or entry.get("group_size") != QUANTIZATION_GROUP_SIZE:
        raise CheckpointError(
            f"quantization_config is {dict(entry)}; allowed: weight_format {' or '.join(_FORMATS)}, "
            f"group_size {QUANTIZATION_GROUP_SIZE}"
        )
    return _FORMATS[entry["weight_format"]]


def quantized_names(name: str) -> tuple[str, str]:
    """Names of the integers and the scales that stand for tensor `name` (X.weight becomes X.qweight and X.scales)."""
    stem = name.removesuffix(".weight")
    return f"{stem}.qweight", f"{stem}.scales"
