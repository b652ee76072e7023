"""Do the teacher's scores of a group's rollouts agree with their rewards, and under which context?

A rollout's score is the mean log-prob of its tokens under its own leave-one-out context (arXiv 2605.12652).
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Config
from ..contexts import CONTEXTS
from ..models import load_model
from ..rollout import Group
from .controls import MATCHED
from .groups import SavedGroup
from .scored import score_groups
from .sides import tokenizer_of
from .summary import Analysis, summarise


def analyze(
    model: PreTrainedModel | str,
    groups: Iterable[Group | SavedGroup],
    contexts: Iterable[str] | None = None,  # None: all nine
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,  # None: the one saved with the model
    config: Config | None = None,  # as in training: template, temperature, threshold, tree, seed
    controls: bool = True,
    resamples: int = 2000,
    reference: str = "none",  # the context from which differences are taken
) -> Analysis:
    """Score judged groups under each context and compare scores with rewards.

    `Analysis.rows` and `.rollouts` are lists of flat dicts, ready for pandas.DataFrame. Groups whose rewards are all
    equal have nothing to agree with: they are counted and not scored. ValueError for unknown contexts and where no
    group is left.
    """
    names = check_contexts(contexts, reference)
    config = config or Config()
    if isinstance(model, str):
        model = load_model(model, config.model.dtype, config.model.attn_implementation)
    tokenizer = tokenizer or tokenizer_of(str(model.name_or_path))
    scored = list(score_groups(model, tokenizer, groups, with_controls(names, controls), config))
    return summarise(scored, names, config.context.success_reward_threshold, resamples, config.training.seed, reference)


def check_contexts(contexts: Iterable[str] | None, reference: str) -> list[str]:
    names = list(dict.fromkeys(CONTEXTS if contexts is None else contexts))
    unknown = [name for name in (*names, reference) if name not in CONTEXTS]
    if unknown or not names:
        raise ValueError(f"expected contexts out of {list(CONTEXTS)}, got {unknown or names}")
    if reference not in names and reference != "none":
        raise ValueError(f"expected the reference among the contexts {names}, got {reference!r}")
    return names


def with_controls(contexts: list[str], controls: bool) -> list[str]:
    """Everything to score: each context, and the same with matched numbers of peers."""
    return contexts + [name + MATCHED for name in contexts if controls and name != "none"]
