"""The native names of torch's dtypes."""

import torch

from headrace import _native
from headrace.errors import KernelError

DTYPES = {torch.float32: _native.DType.FLOAT32, torch.bfloat16: _native.DType.BFLOAT16}


def native_dtype(dtype: torch.dtype) -> _native.DType:
    """
    Raises:
        KernelError: a dtype the native kernels do not compute in.
    """
    if dtype not in DTYPES:
        raise KernelError(f"the cpu kernels compute in float32 and bfloat16, not in {dtype}")
    return DTYPES[dtype]
