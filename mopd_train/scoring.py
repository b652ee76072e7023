"""Hidden states that predict each token of a completion, from a decoder trunk: logits are never built.

Legend: B sequences a batch, T tokens, N completion tokens over all sequences, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


def right_padded(sequences: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) ids and mask."""
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [pad_id] * (longest - len(s)) for s in sequences], device=device)
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences], device=device)
    return ids, mask


def completion_hidden(
    model: PreTrainedModel,
    prompts: list[list[int]],
    completions: list[list[int]],
    pad_id: int,
) -> Tensor:  # (N, H), sequence after sequence
    """The states at positions prompt_length - 1 ... end - 1: each predicts one completion token."""
    ids, mask = right_padded([p + c for p, c in zip(prompts, completions, strict=True)], pad_id, model.device)
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    rows = [
        row * ids.size(1) + len(prompt) - 1 + offset
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        for offset in range(len(completion))
    ]
    return hidden.flatten(0, 1)[torch.tensor(rows, device=hidden.device)]
