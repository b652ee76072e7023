"""Launch choices by kernel and architecture: plain numbers, so that ahead-of-time compilation, the tests and
a run on the device all take the same ones. `python -m bench static` shows what each costs.

Architectures: sm_80 (A100), sm_90 (Hopper), sm_100 (data-centre Blackwell), sm_120 (99 KiB of shared memory a
block: consumer Blackwell, Ada, 8.6), gfx942 (MI300X), interpreter (CPU, small blocks).
"""

from typing import NamedTuple

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


class Rows(NamedTuple):
    """A row kernel: `block` lanes of `deep` columns a step; a row is split over programs in pieces of at least
    `least` columns."""

    block: int
    warps: int
    least: int
    deep: int = 1

    def of_items(self, size: int) -> "Rows":
        """The same bytes a load for elements of `size` bytes: numbers here are for 4. Lanes must fill the warps
        with 128-bit loads exactly, or the columns of a lane would lie in several warps."""
        return self._replace(block=self.block * 4 // size, deep=max(1, self.deep * size // 4))


ROWS = {
    "sm_80": Rows(block=1024, warps=4, least=8192),
    "sm_90": Rows(block=1024, warps=4, least=8192),
    "sm_100": Rows(block=1024, warps=4, least=8192),
    "sm_120": Rows(block=1024, warps=4, least=8192),
    "gfx942": Rows(block=1024, warps=4, least=8192),
    "interpreter": Rows(block=256, warps=1, least=256),
}

STATISTICS = {
    "sm_80": Rows(block=512, warps=4, least=8192, deep=4),
    "sm_90": Rows(block=512, warps=4, least=8192, deep=4),
    "sm_100": Rows(block=512, warps=4, least=8192, deep=4),
    "sm_120": Rows(block=512, warps=4, least=8192, deep=4),
    "gfx942": Rows(block=1024, warps=4, least=8192, deep=4),
    "interpreter": Rows(block=64, warps=1, least=256, deep=4),
}

# Sorting networks are unrolled: the block decides how long the code and its compilation are.
TOPK = {
    "sm_80": Rows(block=512, warps=4, least=0),
    "sm_90": Rows(block=512, warps=4, least=0),
    "sm_100": Rows(block=256, warps=4, least=0),
    "sm_120": Rows(block=512, warps=4, least=0),
    "gfx942": Rows(block=512, warps=4, least=0),
    "interpreter": Rows(block=256, warps=1, least=0),
}


class Tile(NamedTuple):
    """A product of (m, k) and (n, k) blocks.

    pieces: what follows the product takes the tile's columns in so many pieces, to need fewer registers.
    tma: operands come through tensor descriptors; else by pointers.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    pieces: int = 1
    tma: bool = False


TILES = {
    # One side's product and its statistics.
    "logprob": {
        "sm_80": Tile(128, 128, 32, warps=8, stages=4, pieces=2),
        "sm_90": Tile(128, 256, 64, warps=8, stages=3, tma=True),
        "sm_100": Tile(128, 128, 64, warps=8, stages=3, pieces=4, tma=True),
        "sm_120": Tile(128, 128, 32, warps=8, stages=3, pieces=2),
        "gfx942": Tile(128, 128, 32, warps=8, stages=2),
        "interpreter": Tile(16, 32, 32, warps=1, stages=1, pieces=2),
    },
    "logprob gradient": {
        "sm_80": Tile(128, 128, 32, warps=8, stages=4, pieces=2),
        "sm_90": Tile(128, 128, 64, warps=8, stages=4, tma=True),
        "sm_100": Tile(128, 128, 64, warps=8, stages=3, pieces=4, tma=True),
        "sm_120": Tile(128, 128, 32, warps=8, stages=3, pieces=2),
        "gfx942": Tile(128, 128, 32, warps=8, stages=2),
        "interpreter": Tile(16, 32, 32, warps=1, stages=1, pieces=4),
    },
    # Both sides' products: twice the accumulators, so smaller tiles where they live in registers.
    "divergence": {
        "sm_80": Tile(128, 64, 32, warps=8, stages=4, pieces=2),
        "sm_90": Tile(128, 128, 64, warps=8, stages=4, tma=True),
        "sm_100": Tile(128, 128, 128, warps=8, stages=2, pieces=4, tma=True),
        "sm_120": Tile(128, 64, 32, warps=8, stages=4, pieces=2),
        "gfx942": Tile(128, 128, 32, warps=8, stages=2),
        "interpreter": Tile(16, 32, 32, warps=1, stages=1, pieces=2),
    },
    "mixture": {
        "sm_80": Tile(128, 64, 32, warps=8, stages=4, pieces=2),
        "sm_90": Tile(128, 128, 64, warps=8, stages=3, pieces=4, tma=True),
        "sm_100": Tile(128, 128, 64, warps=8, stages=3, pieces=4, tma=True),
        "sm_120": Tile(128, 64, 32, warps=8, stages=4, pieces=2),
        "gfx942": Tile(128, 128, 32, warps=8, stages=2),
        "interpreter": Tile(16, 32, 32, warps=1, stages=1, pieces=4),
    },
    "gradient": {
        "sm_80": Tile(128, 64, 32, warps=8, stages=4, pieces=2),
        "sm_90": Tile(128, 128, 64, warps=8, stages=3, pieces=4, tma=True),
        "sm_100": Tile(128, 128, 64, warps=8, stages=3, pieces=4, tma=True),
        "sm_120": Tile(128, 64, 32, warps=8, stages=4, pieces=2),
        "gfx942": Tile(128, 128, 32, warps=8, stages=2),
        "interpreter": Tile(16, 32, 32, warps=1, stages=1, pieces=2),
    },
    # Rows of d(logits) times rows of the weight or of the hidden states.
    "accumulate": {
        "sm_80": Tile(128, 128, 32, warps=8, stages=4),
        "sm_90": Tile(128, 256, 64, warps=8, stages=3, pieces=2, tma=True),
        "sm_100": Tile(128, 256, 64, warps=8, stages=3, pieces=4, tma=True),
        "sm_120": Tile(128, 128, 32, warps=8, stages=3),
        "gfx942": Tile(128, 128, 32, warps=8, stages=2),
        "interpreter": Tile(32, 32, 16, warps=1, stages=1),
    },
    # float32 operands: wider elements, and three tensor-float products for one.
    "logprob fp32": {
        "sm_80": Tile(64, 64, 32, warps=8, stages=3, pieces=2),
        "sm_90": Tile(64, 64, 32, warps=4, stages=3, pieces=2),
        "sm_100": Tile(64, 64, 32, warps=8, stages=3),
        "sm_120": Tile(64, 64, 32, warps=8, stages=3, pieces=2),
        "gfx942": Tile(64, 64, 32, warps=4, stages=2),
        "interpreter": Tile(16, 32, 32, warps=1, stages=1, pieces=2),
    },
    "fp32": {
        "sm_80": Tile(64, 32, 32, warps=4, stages=3, pieces=2),
        "sm_90": Tile(64, 64, 32, warps=4, stages=3, pieces=2),
        "sm_100": Tile(64, 64, 32, warps=8, stages=3),
        "sm_120": Tile(64, 32, 32, warps=4, stages=3, pieces=2),
        "gfx942": Tile(64, 64, 32, warps=4, stages=2),
        "interpreter": Tile(16, 32, 32, warps=1, stages=1),
    },
}


def tile(role: str, arch: str, *, single: bool) -> Tile:
    """The tile of a kernel; `single` for float32 operands."""
    if single:
        role = "logprob fp32" if role == "logprob" else "fp32"
    return TILES[role][arch]
