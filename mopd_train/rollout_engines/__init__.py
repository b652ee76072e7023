"""What samples the rollouts. A new engine is one class here and one line in ENGINES."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Config
from ..rollout import Group, Prompt, generate
from ..sampler import Sampling

Around = Callable[[], AbstractContextManager[None]]


class RolloutEngine(Protocol):
    def generate(self, prompts: list[Prompt], sampling: Sampling, stop_ids: list[int], seed: int) -> list[Group]:
        """G rollouts of every prompt, in the prompts' order; token ids as sampled, with the stop token. Prompt i draws
        by `seed + i`, so that prompts may be cut over processes. Every process has to call it, without prompts too."""

    def update_weights(self, model: PreTrainedModel) -> None:
        """From now on rollouts are `model`'s. Every process has to call it: sharded weights are gathered."""


class TransformersRollouts:
    """The student samples for itself: rollouts are on-policy by construction and carry no log-probs.

    `around` is entered for as long as it samples: a training run's precision, and forwards in step with the other
    processes.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, around: Around = nullcontext
    ) -> None:
        self.model, self.tokenizer, self.around = model, tokenizer, around

    def generate(self, prompts: list[Prompt], sampling: Sampling, stop_ids: list[int], seed: int) -> list[Group]:
        with self.around():
            return generate(self.model, self.tokenizer, prompts, sampling, stop_ids, seed)

    def update_weights(self, model: PreTrainedModel) -> None:
        self.model = model


Builder = Callable[[Config, PreTrainedModel, PreTrainedTokenizerBase, Around], RolloutEngine]


def _transformers(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, around: Around
) -> RolloutEngine:
    return TransformersRollouts(model, tokenizer, around)


def _colocate(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, around: Around
) -> RolloutEngine:
    from .colocate import ColocatedRollouts

    return ColocatedRollouts(config, tokenizer, model.device)


def _server(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, around: Around
) -> RolloutEngine:
    from .server import ServerRollouts

    return ServerRollouts(config.rollout, tokenizer)


ENGINES: dict[str, Builder] = {"transformers": _transformers, "colocate": _colocate, "server": _server}


def engine_name(config: Config) -> str:
    return config.rollout.vllm_mode if config.rollout.use_vllm else "transformers"


def check_rollout_engine(config: Config) -> None:
    """ImportError or ConnectionError where the configured engine cannot work, before anything is loaded."""
    if engine_name(config) == "colocate":
        from .colocate import NAME, require_vllm

        require_vllm(NAME)
    elif engine_name(config) == "server":
        from .server import Server

        Server(config.rollout).wait_until_ready()


def build_rollout_engine(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, around: Around = nullcontext
) -> RolloutEngine:
    """The configured engine. It holds `model`'s weights only after `update_weights(model)`. `around`: see
    TransformersRollouts; vLLM's forwards are not the student's and take no part in it."""
    return ENGINES[engine_name(config)](config, model, tokenizer, around)
