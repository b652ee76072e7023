"""The least-memory mode: no chunk of logits exists, statistics and d(logits) are made from tiles on the chip.

Same statistics as the row kernels, with a `Product` in the place of a chunk of logits; and in the place of
gradients in place, `divergence_products` and `logprob_products`, which go on to dH, dW and db. Costs two more
products than chunks of logits do (four more for Jensen-Shannon): choose it where memory decides.
"""

from .linear_grad import divergence_products
from .linear_logprob_grad import logprob_products
from .linear_mixture import mixture_sums
from .linear_stats import pair_stats, side_stats
from .products import Product

__all__ = ["Product", "divergence_products", "logprob_products", "mixture_sums", "pair_stats", "side_stats"]
