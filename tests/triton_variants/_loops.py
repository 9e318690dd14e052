"""How many instructions a kernel's main loop has, in the machine code of an NVIDIA GPU."""

import re
import subprocess
from pathlib import Path

import triton

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA\b.*\((\.L_x_\d+)\)")


def loop_instructions(cubin: str) -> int | None:
    """Of the longest loop: from a label to a branch back to it. None without nvdisasm, which Triton brings along."""
    nvdisasm = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    if not nvdisasm.exists():
        return None
    command = [str(nvdisasm), "--print-code", cubin]
    return longest_loop(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def longest_loop(text: str) -> int:
    labels: dict[str, int] = {}
    count = longest = 0
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = count
        elif instruction := _INSTRUCTION.search(line):
            count += 1
            branch = _BRANCH.search(instruction[1])
            if branch and branch[1] in labels:
                longest = max(longest, count - labels[branch[1]])
    return longest
