"""Integers of 4 bits out of int16 words, in a type that tensor cores multiply.

A nibble written into the lowest places of the mantissa of a power of two adds its value to that power: 2^7 + (q + 8) in
bfloat16, 2^10 + (q + 8) in float16, from which 2^7 + 8 or 2^10 + 8 is then taken, exactly. Two neighbouring words lie
in one register, as two neighbouring columns of a tensor core's operand do, so that in PTX one instruction serves two
weights: 1.4 for each weight, with the shift that three of four nibbles need. Triton's own code for the same takes 2.7
(counted in flat GEMM on sm_90), since it takes words of 16 bits apart and packs what comes of them.

Source: Kim et al., "Who Says Elephants Can't Run" (arXiv:2211.10017).
"""

import triton
import triton.language as tl


def _ptx(kind: str, power: int, minus_bias: int) -> tl.constexpr:
    """Two words in $4 to two numbers in each of $0 to $3; the arguments are bits. 0xEA: (a & b) | c."""
    steps = [
        f"shr.b32 t, $4, {4 * i}; lop3.b32 t, t, 0x000F000F, power, 0xEA; fma.rn.{kind} ${i}, t, one, minus_bias;"
        for i in range(4)
    ]
    one = {"bf16x2": 0x3F80, "f16x2": 0x3C00}[kind]
    constants = [
        f"mov.b32 {name}, {bits << 16 | bits:#010x};"
        for name, bits in (("one", one), ("power", power), ("minus_bias", minus_bias))
    ]
    return tl.constexpr("\n".join(["{ .reg .b32 t, one, power, minus_bias;", *constants, *steps, "}"]))


PTX_BFLOAT16 = _ptx("bf16x2", 0x4300, 0xC308)
PTX_FLOAT16 = _ptx("f16x2", 0x6400, 0xE408)
REGISTERS = tl.constexpr("=r,=r,=r,=r,r")
_FOUR_BFLOAT16 = tl.constexpr((tl.bfloat16,) * 4)
_FOUR_FLOAT16 = tl.constexpr((tl.float16,) * 4)


@triton.jit
def unpack(words, DTYPE: tl.constexpr, IS_PTX: tl.constexpr):
    """q of nibbles 0 to 3 of int16 words (`BlockedWeight`), in DTYPE. IS_PTX: compiled for an NVIDIA GPU."""
    if IS_PTX and DTYPE.is_bf16():
        pieces = tl.inline_asm_elementwise(PTX_BFLOAT16, REGISTERS, [words], _FOUR_BFLOAT16, is_pure=True, pack=2)
    elif IS_PTX and DTYPE.is_fp16():
        pieces = tl.inline_asm_elementwise(PTX_FLOAT16, REGISTERS, [words], _FOUR_FLOAT16, is_pure=True, pack=2)
    else:
        pieces = (
            _nibbles(words, 0, DTYPE),
            _nibbles(words, 4, DTYPE),
            _nibbles(words, 8, DTYPE),
            _nibbles(words, 12, DTYPE),
        )
    return pieces


@triton.jit
def _nibbles(words, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    biased = (((words >> SHIFT) & 15) | 0x4300).to(tl.bfloat16, bitcast=True)
    return biased.to(DTYPE) - 136.0


@triton.jit
def half(pair, INDEX: tl.constexpr):
    """One of the two float16 in an int32, as float32: the scales of a block's two groups."""
    bits = pair >> 16 if INDEX == 1 else pair & 0xFFFF
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
