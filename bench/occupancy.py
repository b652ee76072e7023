"""Blocks that fit a multiprocessor at a time, from what a kernel uses and what the hardware has.

Nvidia: registers are given out to warps in units of 256; a block's shared memory counts with 1 KiB of the system's.
AMD: a SIMD has 512 vector registers a lane, given out in units of 8; a compute unit has 4 SIMDs.
"""

from __future__ import annotations

from typing import NamedTuple

from .machine_code import Code


class Processor(NamedTuple):
    registers: int  # 32-bit ones of a multiprocessor; vector registers of a lane of a SIMD on AMD
    shared: int  # bytes
    warps: int
    blocks: int


PROCESSORS = {
    "sm_80": Processor(65536, 164 << 10, 64, 32),
    "sm_90": Processor(65536, 228 << 10, 64, 32),
    "sm_100": Processor(65536, 228 << 10, 64, 32),
    "sm_120": Processor(65536, 100 << 10, 48, 24),
    "gfx942": Processor(512, 64 << 10, 32, 32),
}


class Occupancy(NamedTuple):
    blocks: int
    warps: int  # resident
    share: float  # of the most warps
    limit: str  # what decides
    arithmetic: str


def occupancy(code: Code) -> Occupancy:
    processor, amd = PROCESSORS[code.arch], code.arch.startswith("gfx")
    if amd:
        given = -(-max(1, code.registers) // 8) * 8
        waves = min(8, processor.registers // given)
        by_registers = 4 * waves // code.warps
        registers = f"4 SIMDs x {processor.registers} // {given} = {4 * waves} waves // {code.warps}"
    else:
        given = -(-code.registers * 32 // 256) * 256
        by_registers = processor.registers // (given * code.warps)
        registers = f"{processor.registers} // ({given} x {code.warps})"
    memory = code.shared + (0 if amd else 1024)
    limits = {
        "registers": by_registers,
        "shared memory": processor.shared // memory if memory else processor.blocks,
        "warps": processor.warps // code.warps,
        "blocks": processor.blocks,
    }
    limit = min(limits, key=lambda name: limits[name])
    blocks = limits[limit]
    return Occupancy(
        blocks,
        blocks * code.warps,
        blocks * code.warps / processor.warps,
        limit,
        f"registers {registers} = {by_registers}; shared {processor.shared} // {memory} = {limits['shared memory']}; "
        f"warps {processor.warps} // {code.warps} = {limits['warps']}",
    )
