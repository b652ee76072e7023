"""The least-memory mode: no chunk of logits exists, statistics and d(logits) are made from tiles on the chip.

Same statistics as the row kernels, with a `Product` in the place of a chunk of logits; and in the place of
gradients in place, `divergence_products` and `logprob_products`, which go on to dH, dW and db. Costs two more
products than chunks of logits do (four more for Jensen-Shannon): choose it where memory decides.
"""

import torch
from torch import Tensor

from . import device
from .linear_grad import divergence_products
from .linear_logprob_grad import logprob_products
from .linear_mixture import mixture_sums
from .linear_stats import pair_stats, side_stats
from .products import Product

__all__ = ["Product", "divergence_products", "logprob_products", "mixture_sums", "pair_stats", "require", "side_stats"]


def require(example: Tensor) -> None:
    """Raises ValueError for a tensor on another device, TypeError for a dtype without tensor cores."""
    device.require(example, "triton-tiles")
    if example.dtype == torch.float64:
        raise TypeError("backend 'triton-tiles' takes float32, bfloat16 or float16, got torch.float64: use 'triton'")
