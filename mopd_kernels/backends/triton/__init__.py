"""Triton row kernels (see backends/__init__.py for the contract). Importing this package imports triton, so it
is done only when the backend is picked. Runs on CUDA and HIP tensors, and on CPU tensors under TRITON_INTERPRET=1.
"""

from .accumulate import add_product_
from .device import require
from .mixture import mix_, mixture_sums
from .row_grad import divergence_grad_, logprob_grad_
from .row_stats import pair_stats, side_stats
from .topk import topk

__all__ = [
    "add_product_",
    "divergence_grad_",
    "logprob_grad_",
    "mix_",
    "mixture_sums",
    "pair_stats",
    "require",
    "side_stats",
    "topk",
]
