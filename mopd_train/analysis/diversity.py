"""How different the rollouts of a group are: measures of one group. Words are runs of letters and digits or single
signs, so that figures of different tokenizers compare. None where a measure is undefined, never 0.

Legend: n rollouts of a group.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence

from ..evaluate import pass_at_k
from ..rollout import Group
from .ast_distance import ast_distance, syntax_tree

WORD = re.compile(r"\w+|[^\w\s]")
PAIRS = 28  # pairs of programs compared of a group, which are all of 8; of more, that many drawn


def words(text: str) -> list[str]:
    return WORD.findall(text)


def unique_ratio(texts: Sequence[str]) -> float:
    """Different texts over all texts."""
    return len(set(texts)) / len(texts)


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Different n-grams over all n-grams of the group (Li et al. 2016)."""
    grams = [gram for text in texts for gram in zip(*(words(text)[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(texts: Sequence[str]) -> float | None:
    """Mean BLEU-4 of each text against the others (Zhu et al. 2018); high means alike. A text of fewer than four words
    is judged by the n-grams it has, zero counts are smoothed (Chen and Cherry 2014, method 1)."""
    if len(texts) < 2:
        return None
    try:
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    except ImportError as error:
        raise ImportError("self-BLEU needs nltk: pip install 'mopd[analysis]'") from error
    smooth, split = SmoothingFunction().method1, [words(text) for text in texts]
    scores = []
    for i, own in enumerate(split):
        others = split[:i] + split[i + 1 :]
        if own:
            scores.append(sentence_bleu(others, own, smoothing_function=smooth, auto_reweigh=True))
        else:
            scores.append(float([] in others))
    return float(sum(scores) / len(scores))


def code_distance(texts: Sequence[str]) -> tuple[float | None, float]:
    """Mean syntax-tree distance over pairs of the programs that parse, and the share that does."""
    trees = [tree for tree in map(syntax_tree, texts) if tree is not None]
    pairs = list(itertools.combinations(range(len(trees)), 2))
    if len(pairs) > PAIRS:
        pairs = random.Random(len(pairs)).sample(pairs, PAIRS)
    distances = [ast_distance(trees[i], trees[j]) for i, j in pairs]
    return (sum(distances) / len(distances) if distances else None), len(trees) / len(texts)


def group_diversity(group: Group, threshold: float, code: bool) -> dict[str, float | None]:
    """Every measure of one group; pass@k for k = 1 ... its judged rollouts."""
    texts = [rollout.text.strip() for rollout in group.rollouts]
    judged = [rollout for rollout in group.rollouts if rollout.reward is not None]
    correct = sum(rollout.succeeded(threshold) for rollout in judged)
    result: dict[str, float | None] = {
        "unique_ratio": unique_ratio(texts),
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        "self_bleu_4": self_bleu(texts),
    }
    if code:
        result["ast_distance"], result["parse_rate"] = code_distance(texts)
    return result | {f"pass@{k}": pass_at_k(len(judged), correct, k) for k in range(1, len(judged) + 1)}
