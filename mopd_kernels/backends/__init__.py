"""Row kernels by backend. Each module offers the same functions on chunks of logits:

    side_stats(z, labels, start)                     -> SideStats
    pair_stats(z_s, z_t, labels, start, alpha)       -> PairStats
    mixture_sums(z_s, z_t, lse_s, lse_t, alpha)      -> KL(q||M), KL(p||M)
    mix_(log_p, z_k, lse_k, log_weight)              log_p <- log(exp(log_p) + w exp(z_k - lse_k))
    divergence_grad_(z_s, z_t, terms, coefficient, alpha, cap, grad_filter)   z_s <- coefficient * d/dx
    logprob_grad_(z, lse, entropy, labels, start, grads, cap)                 z <- d/dx
    topk(z, k)                                       -> values, columns (optional: eager's serves all)
    divergence_grad_kept_(z_s, z_t, ... as divergence_grad_)                  -> entries above the filter or None
                                                     (optional: sparse products; None: z_s is the dense gradient)
    divergence_products, logprob_products, Product    the backend never forms logits: statistics take a Product in
                                                     their place, see `tiled` (optional)
    add_product_(dW, grad, hidden, factor, add)      dW (+)= factor gradᵀ hidden, low precision into float32 (optional)
    require(example)                                 raises for tensors it cannot run on here (optional)
    COLUMN_MAJOR                                     chunks lie by vocabulary row, strides (1, C) (optional)

`start` is the global index of column 0, `cap` is softcap / temperature or None: with it the gradient
is taken before the cap, d/dx = d/dz (1 - (z / cap)^2). `backends` never import each other.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache
from types import ModuleType

from torch import Tensor

BACKENDS = {"eager": ".eager", "cpu": ".cpu", "triton": ".triton", "triton-tiles": ".triton.tiles"}

logger = logging.getLogger(__name__)


def pick(name: str | None, example: Tensor) -> ModuleType:
    """The backend module by name, or the device's best: triton on CUDA, cpu on CPU where it is built, else eager."""
    chosen = name or ("triton" if example.is_cuda else _on_cpu() if example.device.type == "cpu" else "eager")
    if chosen not in BACKENDS:
        raise ValueError(f"expected Execution.backend in {sorted(BACKENDS)}, got {chosen!r}")
    return importlib.import_module(BACKENDS[chosen], __name__)


@cache
def _on_cpu() -> str:
    try:
        importlib.import_module(BACKENDS["cpu"], __name__)
    except OSError as error:
        logger.warning(
            "no C++ kernels (%s): CPU tensors run on the eager backend, slower and exact all the same", error
        )
        return "eager"
    return "cpu"


def topk(backend: ModuleType) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """The backend's top-k, or eager's where it has none."""
    own = getattr(backend, "topk", None)
    return own or importlib.import_module(BACKENDS["eager"], __name__).topk
