"""What the compilers made of a kernel: resources, tensor-core instructions and the main loop, read from PTX, SASS
and amdgcn. Needs no GPU; cuobjdump comes with the triton wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mopd_kernels.backends.triton.cases import MATRIX_INSTRUCTIONS, CompileCase

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

# First match decides. SASS, then amdgcn.
KINDS = {
    "tensor": r"HMMA|IMMA|HGMMA|QGMMA|UTC\w*MMA|v_mfma",
    "special": r"MUFU|v_exp|v_log|v_rcp|v_sqrt",
    "global": r"LDG|STG|LDGSTS|UTMALDG|UTMASTG|LDTM|STTM|global_|buffer_|flat_",
    "shared": r"LDS|STS|LDSM|STSM|ds_",
    "local": r"LDL|STL|scratch_",
    "float": r"F(ADD|MUL|FMA|MNMX|SETP|SEL|SET|CHK)|H(ADD|MUL|FMA)|F2F"
    r"|v_(pk_)?(add|mul|fma|sub|max|min|cvt)\w*_[fb](16|32)",
    "barrier": r"BAR|SYNCS|DEPBAR|WARPSYNC|ARRIVES|s_barrier|s_waitcnt",
    "branch": r"BRA|EXIT|BSSY|BSYNC|CALL|RET|s_c?branch",
}


@dataclass(frozen=True)
class Code:
    """One kernel compiled for one architecture."""

    case: str
    kernel: str
    arch: str
    tile: str
    warps: int
    stages: int | None
    registers: int  # a thread: 32-bit, vector registers on AMD
    shared: int  # bytes a block
    stack: int  # bytes a thread
    spills: int  # local loads and stores, or spilled vector registers on AMD
    scalar_spills: int  # AMD: scalar registers kept in lanes of vector registers, not in memory
    matrix_instruction: str
    matrix_count: int
    wide_multiplies: int  # 64-bit address products
    products: bool
    loop: dict[str, int] = field(default_factory=dict)  # instructions of the main loop by kind

    @property
    def faults(self) -> list[str]:
        """What must not be: spills, local memory, a product without tensor cores, 32-bit offsets."""
        found = [f"{self.spills} spills"] * (self.spills > 0) + [f"{self.stack} bytes of stack"] * (self.stack > 0)
        if self.products and self.matrix_count == 0:
            found.append(f"no {self.matrix_instruction}")
        if self.wide_multiplies == 0:
            found.append("no 64-bit offset")
        return found


def target(arch: str) -> GPUTarget:
    return (
        GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    )


def compiled(case: CompileCase, arch: str) -> Code:
    """Compile a case as its launch would. Raises what the compiler raises."""
    source = ASTSource(
        fn=case.kernel,
        signature=case.signature(arch),
        constexprs=case.constants(arch),
        attrs=case.attributes(arch),
    )
    kernel = triton.compile(source, target=target(arch), options=case.options(arch))
    read = _amd if arch.startswith("gfx") else _nvidia
    launch, constants = case.launch[arch], case.constants(arch)
    tile = "x".join(str(constants[name]) for name in ("BM", "BN", "BK", "DEEP", "BLOCK") if name in constants)
    return Code(
        case=case.name,
        kernel=case.kernel.__name__,
        arch=arch,
        tile=tile,
        warps=launch.warps,
        stages=case.options(arch).get("num_stages"),
        shared=kernel.metadata.shared,
        matrix_instruction=MATRIX_INSTRUCTIONS[arch],
        wide_multiplies=len(re.findall(r"arith\.muli .*i64", kernel.asm["ttir"])),
        products=case.products,
        **read(kernel.asm, MATRIX_INSTRUCTIONS[arch]),
    )


def _nvidia(asm: dict[str, Any], instruction: str) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _run("-res-usage", file.name)
        sass = _run("-sass", file.name)
    registers, stack = (int(_found(rf"{name}:(\d+)", usage)) for name in ("REG", "STACK"))
    listing = [
        (int(place, 16), code) for place, code in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]+);", sass)
    ]
    return {
        "registers": registers,
        "stack": stack,
        "spills": sum(code.startswith(("STL", "LDL")) for _, code in listing),
        "scalar_spills": 0,
        "matrix_count": len(re.findall(re.escape(instruction), asm["ptx"])),
        "loop": main_loop(listing, _sass_jumps(listing)),
    }


def _amd(asm: dict[str, Any], instruction: str) -> dict[str, Any]:
    text = asm["amdgcn"]
    numbers = {
        name: int(_found(rf"\.{name}:\s+(\d+)", text))
        for name in ("vgpr_count", "agpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    }
    listing, labels = [], {}
    for place, line in enumerate(text.splitlines()):
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = place
        elif code := re.match(r"\s+([a-z]\w+.*)", line):
            listing.append((place, code[1]))
    jumps = [
        (place, labels[jump[1]])
        for place, code in listing
        if (jump := re.match(r"s_c?branch\w*\s+(\.LBB\w+)", code)) and labels.get(jump[1], place) < place
    ]
    return {
        "registers": numbers["vgpr_count"] + numbers["agpr_count"],
        "stack": numbers["private_segment_fixed_size"],
        "spills": numbers["vgpr_spill_count"],
        "scalar_spills": numbers["sgpr_spill_count"],
        "matrix_count": len(re.findall(instruction, text)),
        "loop": main_loop(listing, jumps),
    }


def _sass_jumps(listing: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """(from, to) of backward branches, but for the trap loop behind the last EXIT."""
    jumps = []
    for place, code in listing:
        if (jump := re.search(r"BRA\S*\s+(?:\S+,\s*)?`?\(?(?:\.L_x_\w+|0x([0-9a-f]+))", code)) and jump[1]:
            to = int(jump[1], 16)
            if to < place:
                jumps.append((place, to))
    return jumps


def main_loop(listing: list[tuple[int, str]], jumps: list[tuple[int, int]]) -> dict[str, int]:
    """Instructions by kind of the smallest loop with tensor-core instructions: that over H, inside of that over the
    vocabulary. Without any, of the longest loop; empty where the kernel has none."""
    loops = [Counter(kind_of(code) for place, code in listing if start <= place <= end) for end, start in jumps]
    products = [loop for loop in loops if loop["tensor"]]
    if products:
        return dict(min(products, key=Counter.total).most_common())
    return dict(max(loops, key=Counter.total).most_common()) if loops else {}


def kind_of(code: str) -> str:
    opcode = code.split()[0]
    return next((kind for kind, pattern in KINDS.items() if re.match(pattern, opcode)), "integer")


def _run(option: str, file: str) -> str:
    return subprocess.run([CUOBJDUMP, option, file], capture_output=True, text=True, check=True).stdout


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"expected {pattern!r} in the compiler's listing")
    return match[1]
