"""Unpacking of int4 words for NVIDIA's GPUs: its instructions, carried out here one by one on every word there is."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from headrace.kernels.triton import nibbles

_WORDS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


def run_ptx(text: str, inputs: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Registers after the instructions of `nibbles`, of which $4 holds the inputs; int64 with 32 bits."""
    registers = {"$4": inputs}

    def value(operand: str) -> torch.Tensor:
        return registers[operand] if operand in registers else torch.tensor(int(operand, 0))

    for instruction in re.findall(r"[^;{}]+;", text.replace(".reg .b32 t, one, power, minus_bias;", "")):
        name, *operands = instruction.strip(" \n;").replace(",", " ").split()
        a, *others = map(value, operands[1:])
        if name == "mov.b32":
            found = a
        elif name == "shr.b32":
            found = a >> others[0]
        elif name == "lop3.b32":
            found = _lop3(a, *others)
        elif name in ("fma.rn.bf16x2", "fma.rn.f16x2"):
            halves = [(x.broadcast_to(inputs.shape)[:, None] >> torch.tensor([0, 16])) & 0xFFFF for x in (a, *others)]
            x, y, z = (half.to(torch.uint16).view(dtype).double() for half in halves)
            bits = (x * y + z).to(dtype).view(torch.uint16).long()
            found = bits[:, 0] | bits[:, 1] << 16
        else:
            raise NotImplementedError(name)
        registers[operands[0]] = found
    return registers


def _lop3(a, b, c, table):
    """Each bit of the result is that bit of the table whose number the bits of a, b and c write."""
    a, b, c = torch.broadcast_tensors(a, b, c)
    index = sum(((x[..., None] >> torch.arange(32)) & 1) << place for x, place in ((a, 2), (b, 1), (c, 0)))
    return (((table >> index) & 1) << torch.arange(32)).sum(-1)


@pytest.mark.parametrize("name", ["bf16x2", "f16x2"])
def test_instructions_give_the_nibbles_of_two_words(name):
    text, dtype = {
        "bf16x2": (nibbles.PTX_BFLOAT16, torch.bfloat16),
        "f16x2": (nibbles.PTX_FLOAT16, torch.float16),
    }[name]
    low, high = _WORDS, _WORDS.flip(0) ^ 0x0A50
    registers = run_ptx(text.value, (low.long() & 0xFFFF) | (high.long() & 0xFFFF) << 16, dtype)
    for i in range(4):
        for word, shift in ((low, 0), (high, 16)):
            out = ((registers[f"${i}"] >> shift) & 0xFFFF).to(torch.uint16).view(dtype)
            assert torch.equal(out.int(), ((word.int() >> (4 * i)) & 15) - 8)
