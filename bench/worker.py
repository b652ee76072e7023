"""One provider on one case in a process of its own: `python -m bench.worker CASE PROVIDER QUICK [CHECKOUT]`.

Prints {"extra_bytes", "gradient_bytes"}: what a run needs at its peak beyond its inputs, and the dH and dW among it.
With CHECKOUT, mopd_kernels comes from there, and for every line on standard input a run's seconds are printed.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from pathlib import Path


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM, the peak since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def trim() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def memory(step, gradient_bytes: int) -> dict[str, int]:  # type: ignore[no-untyped-def]
    """The second run is measured: the first one compiles and loads libraries."""
    step()
    trim()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    kept = step()
    peak = resident("VmHWM")
    del kept
    return {"extra_bytes": peak - before, "gradient_bytes": gradient_bytes}


def main(case_name: str, provider_name: str, quick: str, checkout: str | None = None) -> None:
    if checkout:
        sys.path.insert(0, checkout)
    from .cases import CASES, QUICK, inputs
    from .peers import PROVIDERS

    case = (QUICK if quick == "1" else CASES)[case_name]
    drawn = inputs(case)
    step = PROVIDERS[provider_name].build(case, drawn)
    if checkout is None:
        gradients = 0 if case.task == "score" else drawn.hidden.nbytes + drawn.weight.nbytes
        print(json.dumps(memory(step, gradients)))
        return
    for _ in sys.stdin:
        begun = time.perf_counter()
        step()
        print(json.dumps(time.perf_counter() - begun), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
