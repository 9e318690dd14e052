"""Compile variants for GPUs that need not be here: python -m triton_variants --all, in tests/

Prints a line of JSON for each variant and target. A process of its own, since kernels are decorated when they are
imported, for the interpreter or for the compiler.
"""

import argparse
import json
import os
import re
import subprocess
import time
import traceback
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from triton_variants import Variant, all_variants, representative
from triton_variants._loops import loop_instructions

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true", help="each variant for each of its targets")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--only", default="", help="variants whose names hold this")
    parser.add_argument("--keep", type=Path, help="write assembly there, to be read")
    options = parser.parse_args()
    part, num_parts = map(int, options.part.split("/"))
    variants = all_variants()
    every = [(name, target) for name, variant in variants.items() for target in variant.targets]
    for name, target in (every if options.all else representative(variants))[part::num_parts]:
        if options.only in name:
            facts = report(name, variants[name], target, options.keep)
            print(json.dumps({"variant": name, "target": target} | facts), flush=True)


def report(name: str, variant: Variant, target: str, keep: Path | None) -> dict[str, object]:
    start_s = time.monotonic()
    try:
        compiled = compile_variant(variant, target)
    except Exception:
        return {"error": traceback.format_exc(limit=-3)}
    facts = {"seconds": round(time.monotonic() - start_s, 2), "shared_bytes": compiled.metadata.shared}
    if target == "sm_90":
        facts["missing"] = [text for text in variant.instructions if text not in compiled.asm["ptx"]]
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        for kind in ("ttgir", "ptx", "amdgcn"):
            if kind in compiled.asm:
                (keep / f"{name}.{target}.{kind}").write_text(compiled.asm[kind])
    if "cubin" not in compiled.asm:
        return facts | resources_of_amdgcn(compiled)
    return facts | resources_of_cubin(compiled) | instructions_per_weight(compiled, variant)


def compile_variant(variant: Variant, target: str):
    constants = dict.fromkeys(variant.constexprs, "constexpr")
    source = ASTSource(
        fn=variant.kernel,
        signature={name: (variant.signature | constants)[name] for name in variant.kernel.arg_names},
        constexprs=dict(variant.constexprs),
        attrs={(i,): [["tt.divisibility", 16]] for i in variant.multiples_of_16},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    return triton.compile(source, target=TARGETS[target], options=options)


def cubin_of(compiled) -> str | None:
    """Its file."""
    return triton.runtime.cache.get_cache_manager(compiled.hash).get_file(f"{compiled.metadata.name}.cubin")


def instructions_per_weight(compiled, variant: Variant) -> dict[str, object]:
    cubin = cubin_of(compiled)
    if not variant.weights_per_round or cubin is None or (found := loop_instructions(cubin)) is None:
        return {}
    return {"instructions_per_weight": round(found / variant.weights_per_round, 2)}


def resources_of_cubin(compiled) -> dict[str, object]:
    """Registers of a thread, and the bytes of its stack that registers were spilled to."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    cubin = cubin_of(compiled)
    if not cuobjdump.exists() or cubin is None:
        return {}
    command = [str(cuobjdump), "--dump-resource-usage", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        name: int(found[1])
        for name, pattern in (("registers", r"REG:(\d+)"), ("stack_bytes", r"STACK:(\d+)"))
        if (found := re.search(pattern, text))
    }


def resources_of_amdgcn(compiled) -> dict[str, object]:
    patterns = {"registers": r"\.vgpr_count:\s+(\d+)", "stack_bytes": r"\.private_segment_fixed_size:\s+(\d+)"}
    text = compiled.asm["amdgcn"]
    return {name: int(found[1]) for name, pattern in patterns.items() if (found := re.search(pattern, text))}


if __name__ == "__main__":
    main()
