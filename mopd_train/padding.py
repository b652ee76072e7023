"""Sequences of unequal length as one padded batch. Legend: B sequences, T tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def padded(
    sequences: list[list[int]], pad_id: int, device: torch.device, side: Literal["left", "right"]
) -> tuple[Tensor, Tensor]:  # (B, T) ids and mask
    rows = [torch.tensor(sequence) for sequence in sequences]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)
