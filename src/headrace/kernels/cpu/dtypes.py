"""Element types as the native module names them."""

import torch

from headrace import _native

DTYPES = {torch.float32: _native.DType.FLOAT32, torch.bfloat16: _native.DType.BFLOAT16}
"""Of activations."""
