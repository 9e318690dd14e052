"""Triton kernels as they are launched on a GPU, to be compiled without one.

Each module here has a list VARIANTS. A variant names the types and constants of one launch; `compile_variants` builds
them for each target. A list is representative, not exhaustive: a compilation takes half a second, or ten.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One launch of a kernel.

    name: unique among the variants of its module.
    signature: Triton's type of each argument that is no constant, such as "*bf16", "*i64", "i32" or "fp32".
    constexprs: the values of all others.
    indivisible: pointers that need not be multiples of 16 bytes, and so are read by single entries.
    divisible: integers that are multiples of 16, as launches find out by themselves.
    targets: where it is launched so, if not everywhere.
    instructions: what its code for sm_90 must contain, by the start of the line in PTX; it may then spill no registers
        there either, nor on sm_80.
    weights_per_round: that a lane multiplies in one round of its longest loop; 0: nobody counts.
    most_instructions: for each of those weights on sm_90.
    is_rare: compiled with --all alone, where it takes long and is much like another.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    indivisible: tuple[str, ...] = ()
    divisible: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("sm_90", "sm_80", "gfx942")
    instructions: tuple[str, ...] = ()
    weights_per_round: int = 0
    most_instructions: float = 0.0
    is_rare: bool = False

    @property
    def multiples_of_16(self) -> list[int]:
        """Places of arguments, in the order of the kernel's."""
        names = [name for name, kind in self.signature.items() if kind.startswith("*") and name not in self.indivisible]
        return [i for i, name in enumerate(self.kernel.arg_names) if name in names or name in self.divisible]


def all_variants() -> dict[str, Variant]:
    """By name, with that of the module in front."""
    found: dict[str, Variant] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem.startswith("_"):
            continue
        for variant in import_module(f"{__name__}.{path.stem}").VARIANTS:
            name = f"{path.stem}-{variant.name}"
            if name in found:
                raise ValueError(f"two variants are named {name}")
            found[name] = variant
    return found


def representative(variants: Mapping[str, Variant]) -> list[tuple[str, str]]:
    """Names and targets for every day: each kernel's first variant for all of its targets, the others for one,
    in turn, and the rare ones for none."""
    seen: set[str] = set()
    chosen = []
    for i, (name, variant) in enumerate(variants.items()):
        if variant.is_rare:
            continue
        kernel = variant.kernel.fn.__qualname__
        targets = [variant.targets[i % len(variant.targets)]] if kernel in seen else variant.targets
        seen.add(kernel)
        chosen += [(name, target) for target in targets]
    return chosen
