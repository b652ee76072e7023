"""How long the losses would take on a GPU that runs at its peaks: a model, not a measurement.

time = max(FLOPs / peak, bytes / bandwidth), with all bytes that pass through HBM by the algorithm; launches, waves
that do not fill and clocks below boost are left out, so real times are longer: a good GEMM reaches 60-85% of peak.

Legend: N tokens, V vocabulary, H hidden (both sides alike), C tokens a chunk, B vocabulary rows a block; bfloat16.
"""

from __future__ import annotations

import math
from typing import NamedTuple

N = 8192
BUDGET = 1 << 30  # bytes of logits, as in mopd_kernels.chunked
LOW, WIDE = 2, 4  # bytes of bfloat16 and float32
ROW_BLOCK = 128 * 16  # tokens whose blocks walk the vocabulary together, and read its weight once


class Device(NamedTuple):
    flops: float  # dense bfloat16 tensor-core peak
    bandwidth: float  # bytes a second
    source: str


DEVICES = {
    "A100": Device(312e12, 2.039e12, "A100 80GB SXM data sheet"),
    "H100": Device(989e12, 3.35e12, "H100 SXM data sheet"),
    "B200": Device(2250e12, 8.0e12, "HGX B200 data sheet, per GPU, dense"),
    "MI300X": Device(1307e12, 5.3e12, "MI300X data sheet"),
}


class Shape(NamedTuple):
    vocabulary: int
    hidden: int


SHAPES = {
    "Qwen3-8B": Shape(151936, 4096),
    "Llama-3-8B": Shape(128256, 4096),
    "Gemma-2-2B": Shape(256000, 2304),
    "SmolLM2": Shape(49152, 576),
}


class Work(NamedTuple):
    flops: float
    bytes: float
    memory: float  # peak bytes beside inputs and gradients
    arithmetic: str


def four_products(v: int, h: int) -> Work:
    """z_s, z_t, dH, dW as plain GEMMs: the floor of an exact, dense method."""
    logits = N * v * LOW
    traffic = 4 * logits + 3 * v * h * LOW + 4 * N * h * LOW
    return Work(4 * _product(v, h), traffic, 2 * logits, "4 x 2NVH")


def divergence_rows(v: int, h: int) -> Work:
    """backend="triton": chunks of both logits in float32, gradients with the loss."""
    chunk = min(N, max(1, BUDGET // (v * (2 * WIDE + LOW))))
    chunks = math.ceil(N / chunk)
    a_side = 2 * LOW + WIDE  # product out, read, widened
    statistics, gradient, lowered = 2 * WIDE, 3 * WIDE, WIDE + LOW
    logits = N * v * (2 * a_side + statistics + gradient + lowered + 2 * LOW)
    weights = chunks * v * h * (3 * LOW + 2 * WIDE)
    memory = chunk * v * (2 * WIDE + LOW) + v * h * WIDE
    return Work(
        4 * _product(v, h),
        logits + weights,
        memory,
        f"4 x 2NVH; {logits // (N * v)} bytes an entry of the logits, {chunks} chunks x VH x 14",
    )


def divergence_tiles(v: int, h: int, jensen_shannon: bool = False) -> Work:
    """backend="triton-tiles": statistics, then blocks of d(logits); with Jensen-Shannon one more pass."""
    passes = 3 if jensen_shannon else 2
    products = 2 * passes + 2
    block = _block(v)
    walks = math.ceil(N / ROW_BLOCK)
    weights = v * h * LOW * (2 * passes * walks + walks + 1)  # both sides a pass; W for dH; dW written once
    gradient = N * v * 3 * LOW  # written, read for dH and for dW
    hidden = math.ceil(v / block) * N * h * 2 * WIDE  # dH is added to once a block
    memory = N * block * LOW + N * h * WIDE
    return Work(
        products * _product(v, h),
        weights + gradient + hidden,
        memory,
        f"{products} x 2NVH; 6 bytes an entry of d(logits), W read {2 * passes * walks + walks} times",
    )


def logprobs_rows(v: int, h: int) -> Work:
    """linear_logprobs, backend="triton": forward and backward over chunks of one side's logits."""
    chunk = min(N, max(1, BUDGET // (v * (WIDE + LOW))))
    chunks = math.ceil(N / chunk)
    a_side, gradient, lowered = 2 * LOW + WIDE, 2 * WIDE, WIDE + LOW
    logits = N * v * (2 * a_side + WIDE + gradient + lowered + 2 * LOW)
    weights = chunks * v * h * (3 * LOW + 2 * WIDE)
    memory = chunk * v * (WIDE + LOW) + v * h * WIDE
    return Work(4 * _product(v, h), logits + weights, memory, f"4 x 2NVH; {logits // (N * v)} bytes an entry")


def logprobs_tiles(v: int, h: int) -> Work:
    """linear_logprobs, backend="triton-tiles"."""
    block, walks = _block(v, one_side=True), math.ceil(N / ROW_BLOCK)
    weights = v * h * LOW * (3 * walks + 1)
    traffic = weights + N * v * 3 * LOW + math.ceil(v / block) * N * h * 2 * WIDE
    memory = N * block * LOW + N * h * WIDE
    return Work(4 * _product(v, h), traffic, memory, f"4 x 2NVH; 6 bytes an entry, W read {3 * walks} times")


METHODS = {
    "four plain GEMMs": four_products,
    "divergence, rows": divergence_rows,
    "divergence, tiles": divergence_tiles,
    "Jensen-Shannon, tiles": lambda v, h: divergence_tiles(v, h, jensen_shannon=True),
    "log-probs, rows": logprobs_rows,
    "log-probs, tiles": logprobs_tiles,
}

# Measured by others, at N = 8192 and these shapes, forward and backward.
PUBLISHED = [
    ("Gemma-2-2B", "A100", "CCE cross-entropy", 134.8, 1164, "README of apple/ml-cross-entropy, benchmark output"),
    ("Gemma-2-2B", "A100", "torch.compile cross-entropy", 144.0, 16000, "README of apple/ml-cross-entropy"),
    ("Gemma-2-2B", "A100", "dense cross-entropy", 208.8, 28000, "README of apple/ml-cross-entropy"),
    ("Llama-3-8B", "A100", "Liger FusedLinearKLDiv", 129.2, 2000, "linkedin/Liger-Kernel pull request 1423"),
    ("Llama-3-8B", "A100", "dense linear + KL", 195.3, 19000, "linkedin/Liger-Kernel pull request 1423"),
]
NOT_FOUND = "No published figure of Liger or CCE was found for Qwen3-8B or SmolLM2 at N = 8192."


def seconds(work: Work, device: Device) -> tuple[float, str]:
    compute, memory = work.flops / device.flops, work.bytes / device.bandwidth
    return max(compute, memory), "compute" if compute >= memory else "memory"


def _product(v: int, h: int) -> float:
    return 2.0 * N * v * h


def _block(v: int, one_side: bool = False) -> int:
    """Vocabulary rows of d(logits), as mopd_kernels.tiled takes them from the budget."""
    chunk = BUDGET // (v * ((1 if one_side else 2) * WIDE + LOW))
    return min(v, max(128, chunk * v // N))
