"""Where a kernel runs: the device check of both backends, and the architecture that a configuration is keyed by."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # read by triton.jit when the kernels are defined, so fixed from here on
INTERPRETER = "interpreter"
BY_CAPABILITY = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
SMALL_SHARED_MEMORY = "sm_120"  # also 8.6 and 8.9: 99 KiB of shared memory a block, mma.sync


def require(example: Tensor, backend: str = "triton") -> None:
    """Raises ValueError for a tensor that no Triton kernel can run on here."""
    if example.is_cuda or INTERPRETED:
        return
    raise ValueError(
        f"backend {backend!r} needs CUDA or HIP tensors, got a tensor on {example.device}: use "
        "Execution(backend='eager'), or start Python with TRITON_INTERPRET=1 to interpret the kernels (slow)"
    )


def architecture(example: Tensor) -> str:
    """The key of `configs`: interpreter, gfx942 or sm_80, sm_90, sm_100, sm_120."""
    if INTERPRETED:
        return INTERPRETER
    return _architecture(example.device.index or 0)


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        raise ValueError(f"backend 'triton' needs compute capability >= (8, 0), got {capability}: use 'eager'")
    return BY_CAPABILITY.get(capability, SMALL_SHARED_MEMORY)


def processors(example: Tensor) -> int:
    """Streaming multiprocessors (compute units) of the device; 4 when interpreting."""
    return 4 if INTERPRETED else _processors(example.device.index or 0)


@functools.cache
def _processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
