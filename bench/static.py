"""Compile every registered Triton kernel ahead of time, for GPUs that need not be here, and report what the
compilers made of it; then the roofline time of well-known heads.

Compiled, not run: registers, spills and instructions are facts, times are a model. Exit code 1 on a spill, local
memory, a product without tensor-core instructions, or an offset that is not 64-bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  python -m bench static                                    all kernels, all architectures (about two minutes)
  python -m bench static --arch sm_90 --case divergence     some of them
  python -m bench static --quick --arch sm_90               one case of each kernel
  python -m bench static --explain                          with the arithmetic of occupancy and roofline
  python -m bench static --out static.json --markdown docs/static.md
"""
COLUMNS = (
    "kernel", "arch", "tile", "warps", "stages", "registers", "shared", "stack", "spills",
    "tensor cores", "blocks/SM", "occupancy", "main loop",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from mopd_kernels.backends.triton.configs import ARCHITECTURES

    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, metavar="ARCH")
    parser.add_argument("--case", default="", help="only kernels whose name contains this")
    parser.add_argument("--quick", action="store_true", help="one case of each kernel")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    parser.add_argument("--markdown", type=Path, help="write the tables as Markdown")
    parser.add_argument("--explain", action="store_true", help="print the arithmetic")


def main(options: argparse.Namespace) -> int:
    import triton
    from rich.console import Console
    from rich.progress import track

    from mopd_kernels.backends.triton.registry import CASES

    from .machine_code import compiled

    console = Console(width=None)
    chosen = [case for case in CASES if options.case in case.name]
    if options.quick:
        chosen = list({case.kernel: case for case in reversed(chosen)}.values())[::-1]
    wanted = [(case, arch) for case in chosen for arch in options.arch]
    codes = [compiled(case, arch) for case, arch in track(wanted, "compiling", console=Console(stderr=True))]
    rows, times = [code_row(code) for code in codes], time_rows()
    show(console, f"Compiled by Triton {triton.__version__}, not run", COLUMNS, rows)
    show(console, "Roofline at N = 8192, bfloat16: a model, not a measurement", TIME_COLUMNS, times)
    show(console, "Published by others: measured, forward and backward", PUBLISHED_COLUMNS, published_rows())
    if options.explain:
        explain(console, codes)
    if options.out:
        options.out.write_text(json.dumps(record(codes, triton.__version__), indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(rows, times, triton.__version__))
    faults = [f"{code.case} on {code.arch}: {', '.join(code.faults)}" for code in codes if code.faults]
    for fault in faults:
        console.print(f"[red]{fault}")
    console.print(f"{len(codes)} compiled, {len(faults)} with faults")
    return 1 if faults else 0


def code_row(code: Any) -> list[str]:
    from .occupancy import occupancy

    fit = occupancy(code)
    total = sum(code.loop.values())
    loop = ", ".join(f"{kind} {count}" for kind, count in code.loop.items())
    matrix = f"{code.matrix_count} {code.matrix_instruction}" if code.matrix_count else "-"
    spills = f"{code.spills} (+{code.scalar_spills} scalar)" if code.scalar_spills else code.spills
    sizes = (code.warps, code.stages or "-", code.registers, code.shared, code.stack, spills)
    occupied = f"{fit.share:.0%} ({fit.limit})"
    cells = (*sizes, matrix, fit.blocks, occupied, f"{total}: {loop}" if total else "no loop")
    return [code.case, code.arch, code.tile, *map(str, cells)]


TIME_COLUMNS = ("shape", "method", "TFLOP", "GB moved", "GB held", "A100 ms", "H100 ms", "B200 ms", "MI300X ms")
PUBLISHED_COLUMNS = ("shape", "device", "what", "ms", "MB", "source")


def time_rows() -> list[list[str]]:
    from .roofline import DEVICES, METHODS, SHAPES, seconds

    rows = []
    for name, shape in SHAPES.items():
        for method, work_of in METHODS.items():
            work = work_of(*shape)
            cells = [name, method, f"{work.flops / 1e12:.1f}", f"{work.bytes / 1e9:.1f}", f"{work.memory / 1e9:.2f}"]
            for device in DEVICES.values():
                time, bound = seconds(work, device)
                cells.append(f"{time * 1e3:.1f} {bound}")
            rows.append(cells)
    return rows


def published_rows() -> list[list[str]]:
    from .roofline import PUBLISHED

    return [[str(cell) for cell in row] for row in PUBLISHED]


def show(console: Any, title: str, columns: tuple[str, ...], rows: list[list[str]]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def explain(console: Any, codes: list[Any]) -> None:
    from . import roofline
    from .occupancy import occupancy

    for code in codes:
        console.print(f"{code.case} {code.arch}: {occupancy(code).arithmetic}")
    console.print(roofline.__doc__)
    for name, shape in roofline.SHAPES.items():
        for method, work_of in roofline.METHODS.items():
            work = work_of(*shape)
            console.print(f"{name}, {method}: {work.arithmetic} = {work.flops:.4g} FLOP, {work.bytes:.4g} bytes")
    for name, device in roofline.DEVICES.items():
        console.print(f"{name}: {device.flops:.4g} FLOP/s, {device.bandwidth:.4g} B/s, {device.source}")
    console.print(roofline.NOT_FOUND)


def record(codes: list[Any], version: str) -> dict[str, Any]:
    from . import roofline
    from .occupancy import occupancy

    times = [
        {"shape": name, "method": method, **work_of(*shape)._asdict()}
        | {f"{device}_s": roofline.seconds(work_of(*shape), peaks)[0] for device, peaks in roofline.DEVICES.items()}
        for name, shape in roofline.SHAPES.items()
        for method, work_of in roofline.METHODS.items()
    ]
    return {
        "triton": version,
        "compiled": [
            dataclasses.asdict(code) | {"occupancy": occupancy(code)._asdict(), "faults": code.faults} for code in codes
        ],
        "roofline, a model": times,
        "published": [dict(zip(PUBLISHED_COLUMNS, row, strict=True)) for row in published_rows()],
    }


def markdown(rows: list[list[str]], times: list[list[str]], version: str) -> str:
    from .roofline import NOT_FOUND

    return "\n\n".join(
        [
            "# Triton kernels, compiled",
            "Compiled, not run here. Written by `python -m bench static`; explained in [triton.md](triton.md).",
            f"Compiled by Triton {version}:",
            _table(COLUMNS, rows),
            "Roofline at N = 8192, bfloat16: a model, not a measurement:",
            _table(TIME_COLUMNS, times),
            "Published by others (measured, forward and backward):",
            _table(PUBLISHED_COLUMNS, published_rows()),
            NOT_FOUND + "\n",
        ]
    )


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [list(columns), *rows]]
    return "\n".join([lines[0], "|" + " --- |" * len(columns), *lines[1:]])
