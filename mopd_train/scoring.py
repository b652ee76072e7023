"""Hidden states that predict each token of a completion, from a decoder trunk: logits are never built.

Legend: B sequences a batch, T tokens, N completion tokens over all sequences, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mopd_kernels import PrefixTree

from .padding import padded


def completion_hidden(
    model: PreTrainedModel,
    prompts: list[list[int]],
    completions: list[list[int]],
    pad_id: int,
    tree: bool,
    max_pack_tokens: int | None = None,
) -> tuple[Tensor, int]:  # (N, H), sequence after sequence; tokens computed
    """The states at positions prompt_length - 1 ... end - 1: each predicts one completion token.

    tree: prefixes that sequences share are computed once (PrefixTree); otherwise one padded batch.
    max_pack_tokens: without gradients, packs of about that many tokens, one after the other. With gradients all
    activations stay until the backward, so cutting would save nothing.
    """
    if tree:
        return _packed(model, prompts, completions, None if torch.is_grad_enabled() else max_pack_tokens)
    ids, mask = padded([p + c for p, c in zip(prompts, completions, strict=True)], pad_id, model.device, "right")
    hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    rows = [
        row * ids.size(1) + len(prompt) - 1 + offset
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        for offset in range(len(completion))
    ]
    return hidden.flatten(0, 1)[torch.tensor(rows, device=hidden.device)], ids.numel()


def _packed(
    model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]], max_tokens: int | None
) -> tuple[Tensor, int]:
    sequences = [torch.tensor(p + c, device=model.device) for p, c in zip(prompts, completions, strict=True)]
    lengths = [len(sequence) for sequence in sequences]
    packs = PrefixTree.pack_many(sequences, max(max_tokens or sum(lengths), *lengths))
    parts: dict[int, Tensor] = {}
    for packed, indices in packs:
        hidden = packed.forward(model)
        packed.release()
        spans = [(j, len(prompts[i]) - 1, lengths[i] - 1) for j, i in enumerate(indices)]
        gathered = packed.gather_many(spans, hidden=hidden)
        parts |= zip(indices, gathered.split([len(completions[i]) for i in indices]), strict=True)
    states = gathered if len(packs) == 1 else torch.cat([parts[i] for i in range(len(sequences))])
    return states, sum(packed.unique_tokens for packed, _ in packs)
