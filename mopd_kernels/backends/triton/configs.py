"""Launch choices by kernel and architecture: plain numbers, so that ahead-of-time compilation, the tests and
a run on the device all take the same ones. `python -m bench static` shows what each costs.

Architectures: sm_80 (A100), sm_90 (Hopper), sm_100 (data-centre Blackwell), sm_120 (99 KiB of shared memory a
block: consumer Blackwell, Ada, 8.6), gfx942 (MI300X), interpreter (CPU, small blocks).
"""

from typing import NamedTuple

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


class Rows(NamedTuple):
    """A row kernel: `block` columns a step; a row is split over programs in pieces of at least `least` columns."""

    block: int
    warps: int
    least: int


ROWS = {
    "sm_80": Rows(block=1024, warps=4, least=8192),
    "sm_90": Rows(block=1024, warps=4, least=8192),
    "sm_100": Rows(block=1024, warps=4, least=8192),
    "sm_120": Rows(block=1024, warps=4, least=8192),
    "gfx942": Rows(block=1024, warps=4, least=8192),
    "interpreter": Rows(block=256, warps=1, least=256),
}
