"""Where the tests of Triton's kernels run: compiled on a GPU where there is one, else in Triton's interpreter.

A test makes its tensors on DEVICE and takes DTYPES as its parameters, so that the same cases run in both places:

    from triton_device import DEVICE, DTYPES

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_some_op(dtype: torch.dtype) -> None:
        kernels = resolve_kernels(KernelChoice.TRITON, device=DEVICE)
        x = torch.randn(5, 576, dtype=dtype, device=DEVICE)
"""

import os

import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Set by tests/conftest.py where there is no GPU, before any kernel is defined."""

DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda:0")

DTYPES = (torch.float32, torch.float16) if IS_INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
"""The interpreter's tl.dot of bfloat16 is wrong; on a GPU that type is the one that counts."""
