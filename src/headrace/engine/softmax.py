"""Which softmax each layer's attention uses: what the user asked for, with what is known of the model."""

from pathlib import Path

from headrace.config import KvCacheFormat, Softmax, SoftmaxScheme
from headrace.errors import ConfigError
from headrace.kernels import Kernels, SoftmaxSpec
from headrace.models.softmax_calibration import FILE_NAME, choose_layers, load_calibration


def resolve_softmax(
    choice: Softmax,
    kernels: Kernels,
    folder: Path,
    *,
    num_layers: int,
    max_model_len: int,
    cache_format: KvCacheFormat,
) -> tuple[SoftmaxSpec, ...]:
    """For each layer. Asynchronized without a calibration subtracts 0, which rows it does not suit make up for.

    Raises:
        ConfigError: a scheme that these kernels lack.
        CheckpointError: a calibration that cannot be used.
    """
    scheme = SoftmaxScheme.SYNCHRONIZED if choice is Softmax.AUTO else SoftmaxScheme(choice.value)
    if scheme not in kernels.softmax_schemes:
        allowed = ", ".join(known.value for known in kernels.softmax_schemes)
        raise ConfigError(f"softmax is '{scheme.value}', which these kernels lack; allowed: auto, {allowed}")
    if scheme is SoftmaxScheme.ASYNCHRONIZED:
        layers = load_calibration(folder / FILE_NAME, num_layers=num_layers)
        if layers is not None:
            choices = choose_layers(layers, max_model_len=max_model_len, cache_format=cache_format)
            return tuple(layer.softmax for layer in choices)
    return (SoftmaxSpec(scheme=scheme),) * num_layers
