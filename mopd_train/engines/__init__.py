"""What samples the rollouts. A new engine is one class here and one line in ENGINES."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Config
from ..rollout import Group, Prompt, generate
from ..sampler import Sampling


class Engine(Protocol):
    def generate(self, prompts: list[Prompt], sampling: Sampling, stop_ids: list[int], seed: int) -> list[Group]:
        """G rollouts of every prompt, in the prompts' order; token ids as sampled, with the stop token."""

    def update_weights(self, model: PreTrainedModel) -> None:
        """From now on rollouts are `model`'s. Every process of a sharded model has to call it."""


class TransformersEngine:
    """The student samples for itself: rollouts are on-policy by construction and carry no log-probs."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def generate(self, prompts: list[Prompt], sampling: Sampling, stop_ids: list[int], seed: int) -> list[Group]:
        return generate(self.model, self.tokenizer, prompts, sampling, stop_ids, seed)

    def update_weights(self, model: PreTrainedModel) -> None:
        self.model = model


def _transformers(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
    return TransformersEngine(model, tokenizer)


def _colocate(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
    from .colocate import ColocatedEngine

    return ColocatedEngine(config, tokenizer, model.device)


def _server(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
    from .server import ServerEngine

    return ServerEngine(config.rollout, tokenizer)


ENGINES: dict[str, Callable[[Config, PreTrainedModel, PreTrainedTokenizerBase], Engine]] = {
    "transformers": _transformers,
    "colocate": _colocate,
    "server": _server,
}


def engine_name(config: Config) -> str:
    return config.rollout.vllm_mode if config.rollout.use_vllm else "transformers"


def check_engine(config: Config) -> None:
    """ImportError or ConnectionError where the configured engine cannot work, before anything is loaded."""
    if engine_name(config) == "colocate":
        from .colocate import NAME, require_vllm

        require_vllm(NAME)
    elif engine_name(config) == "server":
        from .server import Server

        Server(config.rollout).wait_until_ready()


def build_engine(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """The configured engine. It holds `model`'s weights only after `update_weights(model)`."""
    return ENGINES[engine_name(config)](config, model, tokenizer)
