"""What a kernel is compiled with ahead of time: every kernel lists its cases beside it as CASES.

Types of numbers come from the kernel's own annotations, blocks and warps from `configs`, so that a case states
only what the launch decides at run time: pointer types, options, and which operands are tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import configs

ALIGNED = ("stride", "size", "columns", "width", "tokens")  # multiples of 16 for the usual heads
PRECISION_ON_AMD = "ieee"  # tensor-float products are Nvidia's; gfx942 has float32 matrix instructions
MATRIX_INSTRUCTIONS = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync",
    "gfx942": "v_mfma",
}


@dataclass(frozen=True)
class CompileCase:
    """One specialisation of a kernel, compiled for every architecture in `launch`.

    pointers: Triton types of the tensor arguments, e.g. {"z_s": "*fp32"}.
    constexprs: options, without those that `launch` gives.
    operands: tile operands and their blocks, e.g. {"h_s": "mk"}; tensor descriptors where the tile has tma.
    """

    name: str
    kernel: Any
    pointers: Mapping[str, str]
    constexprs: Mapping[str, Any]
    launch: Mapping[str, configs.Rows | configs.Tile]
    operands: Mapping[str, str] = field(default_factory=dict)

    @property
    def products(self) -> bool:
        """Whether tensor cores must show up in the compiled code."""
        return bool(self.operands)

    def options(self, arch: str) -> dict[str, int]:
        launch = self.launch[arch]
        stages = {"num_stages": launch.stages} if isinstance(launch, configs.Tile) else {}
        return {"num_warps": launch.warps, **stages}

    def constants(self, arch: str) -> dict[str, Any]:
        launch, constants = self.launch[arch], dict(self.constexprs)
        if isinstance(launch, configs.Tile):
            constants |= {"BM": launch.m, "BN": launch.n, "BK": launch.k, "TMA": launch.tma, "PIECES": launch.pieces}
        else:
            constants |= {"BLOCK": launch.block, "DEEP": launch.deep}
        if arch.startswith("gfx") and constants.get("PRECISION", "").startswith("tf32"):
            constants["PRECISION"] = PRECISION_ON_AMD
        return {name: value for name, value in constants.items() if name in self.kernel.arg_names}

    def signature(self, arch: str) -> dict[str, str]:
        return {parameter.name: self._type(parameter, arch) for parameter in self.kernel.params}

    def _type(self, parameter: Any, arch: str) -> str:
        if parameter.is_constexpr:
            return "constexpr"
        launch = self.launch[arch]
        if parameter.name in self.operands and isinstance(launch, configs.Tile) and launch.tma:
            block = ",".join(str(getattr(launch, letter)) for letter in self.operands[parameter.name])
            return f"tensordesc<{self.pointers[parameter.name].removeprefix('*')}[{block}]>"
        return self.pointers.get(parameter.name) or parameter.annotation_type

    def attributes(self, arch: str) -> dict[tuple[int], list[list[Any]]]:
        """Divisibility by 16 of pointers, strides and sizes, as at run time."""
        return {
            (place,): [["tt.divisibility", 16]]
            for place, (name, kind) in enumerate(self.signature(arch).items())
            if kind.startswith("*") or (kind[0] == "i" and name.startswith(ALIGNED))
        }
