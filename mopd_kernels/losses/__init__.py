"""Loss families: the dense definition that every backend is checked against, and the closed forms
that the backends compute."""

from . import divergence, logprob, topk

LOSSES = {
    "divergence": divergence.dense_divergence,
    "topk": topk.dense_topk_divergence,
    "logprob": logprob.dense_logprobs,
}

__all__ = ["LOSSES", "divergence", "logprob", "topk"]
