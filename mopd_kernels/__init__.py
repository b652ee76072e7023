"""Fused teacher-student losses and log-probs over large vocabularies: hidden states in, logits never whole."""

from .mixing import contrastive_hidden, trust_region_teacher
from .model_heads import softcap_of
from .ops import grouped_logprobs, linear_divergence, linear_logprobs
from .prefix_tree import PrefixTree
from .spec import Divergence, Execution, LMHead, LogProbs, VocabShard

__all__ = [
    "Divergence",
    "Execution",
    "LMHead",
    "LogProbs",
    "PrefixTree",
    "VocabShard",
    "contrastive_hidden",
    "grouped_logprobs",
    "linear_divergence",
    "linear_logprobs",
    "softcap_of",
    "trust_region_teacher",
]
