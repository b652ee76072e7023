"""Every collective of the trainer, except those of FSDP (fsdp.py). With one process each is the identity.

Prompts, and so rollouts, verdicts and trunk forwards, are cut over all processes. With `model.vocab_parallel: n`, n
neighbours form a group: they exchange their rollouts, each computes hidden states of its part of a micro-batch, and
after a gather every one of them holds all tokens of the group but only its rows of the heads:

    rank       0         1         2         3          vocab_parallel 2
    prompts    0..1      2..3      4..5      6..7
    examples   0..3                4..7                 of the group
    head       V/2 rows  V/2 rows  V/2 rows  V/2 rows   of the group's tokens

Losses carry the global token count, so gradients are summed over all processes, never averaged.
Legend: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mopd_kernels import LMHead, VocabShard

BUCKET = 64 * 2**20  # bytes of gradients summed by one collective: large enough for full bandwidth

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    vocab_parallel: int = 1  # neighbours that split the heads' rows
    group: dist.ProcessGroup | None = None  # those neighbours, where there are several

    @classmethod
    def of(cls, rank: int, size: int, device: torch.device, vocab_parallel: int) -> Ranks:
        """ValueError unless the number of processes is a multiple of `vocab_parallel`."""
        if size % vocab_parallel:
            raise ValueError(
                f"expected a number of processes that model.vocab_parallel={vocab_parallel} divides, got {size}"
            )
        group = None
        if vocab_parallel > 1:  # every process must take part in making every group
            groups = [
                dist.new_group(list(range(first, first + vocab_parallel))) for first in range(0, size, vocab_parallel)
            ]
            group = groups[rank // vocab_parallel]
        return cls(rank, size, device, vocab_parallel, group)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def place(self) -> int:
        """Of this process in its vocabulary group."""
        return self.rank % self.vocab_parallel

    def slice(self, count: int) -> tuple[int, int]:
        """[first, stop) of `count` things that this process works on; parts differ by at most one."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def totals(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums by name over processes. Members of a vocabulary group have the same values, which count once. A process
        may lack names that others have."""
        if self.size == 1:
            return dict(values)
        names = list(dict.fromkeys(name for part in self.everywhere(list(values)) for name in part))
        counted = [values.get(name, 0.0) / self.vocab_parallel for name in names]
        total = torch.tensor(counted, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(names, total.tolist(), strict=True))

    def most(self, value: int) -> int:
        """The largest over processes."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def any(self, flag: bool) -> bool:
        return bool(self.most(int(flag)))

    def gathered(self, items: list[T]) -> list[T]:
        """On the main process the items of all, in order; nothing on the others."""
        if self.size == 1:
            return items
        parts: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(items, parts)
        return [item for part in parts or [] for item in part]

    def everywhere(self, value: T) -> list[T]:
        """Every process's value, on every process; also a barrier."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: T) -> T:
        """The main process's value, on every process."""
        if self.size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises on the main process, on every process."""
        outcome: tuple[Any, Exception | None] = None, None
        if self.is_main:
            try:
                outcome = work(), None
            except Exception as error:
                outcome = None, error
        value, failure = self.from_main(outcome)
        if failure is not None:
            raise failure
        return value

    def exchanged(self, items: list[T]) -> list[T]:
        """The items of all members of the vocabulary group, in order."""
        if self.group is None:
            return items
        parts: list[Any] = [None] * self.vocab_parallel
        dist.all_gather_object(parts, items, group=self.group)
        return [item for part in parts for item in part]

    def part_of(self, items: Sequence[T]) -> Sequence[T]:
        """What this member of the vocabulary group computes of the group's items."""
        return _parts(items, self.vocab_parallel)[self.place]

    def gather_rows(self, own: Tensor, counts: list[int]) -> Tensor:  # (sum of counts, H)
        """Rows of every member of the vocabulary group; member i has counts[i]. The gradient of the own rows is taken
        as it comes: the split head has summed dH over the group already."""
        if self.group is None:
            return own
        rows: Tensor = _GatherRows.apply(own, counts, self.place, self.group)
        return rows

    def token_counts(self, items: Sequence[Sequence[int]]) -> list[int]:
        """Tokens in each member's part of the group's token lists."""
        return [sum(map(len, part)) for part in _parts(items, self.vocab_parallel)]

    def rows_of(self, head: LMHead, vocabulary: int) -> LMHead:
        """This member's rows of a head, as views; the last one also holds what is padding past `vocabulary`."""
        if self.group is None:
            return head
        first = vocabulary * self.place // self.vocab_parallel
        stop = vocabulary * (self.place + 1) // self.vocab_parallel
        if self.place == self.vocab_parallel - 1:
            stop = head.weight.size(0)
        bias = None if head.bias is None else head.bias[first:stop]
        shard = VocabShard(first, self.group)
        return replace(head, weight=head.weight[first:stop], bias=bias, vocab_size=vocabulary, shard=shard)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gradients summed over processes, in place and in float32, by few large collectives. A parameter without a
        gradient here may have one elsewhere and counts as zero. All processes hold the same parameters."""
        if self.size == 1:
            return
        for bucket in _buckets([p for p in parameters if p.requires_grad]):
            for parameter in bucket:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            wide = torch.promote_types(bucket[0].dtype, torch.float32)
            flat = torch.cat([_grad(parameter).flatten().to(wide) for parameter in bucket])
            dist.all_reduce(flat)
            pieces = flat.split([parameter.numel() for parameter in bucket])
            for parameter, piece in zip(bucket, pieces, strict=True):
                _grad(parameter).copy_(piece.view_as(parameter))


def common_vocabulary(student: LMHead, teacher: LMHead) -> int:
    """Rows that both heads have: where a split is cut, so that both are cut alike."""
    return min(head.vocab_size or head.weight.size(0) for head in (student, teacher))


def _parts(items: Sequence[T], count: int) -> list[Sequence[T]]:
    edges = [len(items) * i // count for i in range(count + 1)]
    return [items[first:stop] for first, stop in pairwise(edges)]


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbours of one dtype, up to BUCKET bytes; a larger parameter is a bucket of its own."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (parameter.dtype != bucket[0].dtype or size + parameter.nbytes > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: list[int], place: int, group: dist.ProcessGroup) -> Tensor:
        first = sum(counts[:place])
        ctx.rows = slice(first, first + counts[place])
        same = own.new_zeros(max(counts), own.size(1))  # collectives want equal shapes
        same[: len(own)] = own
        parts = [torch.empty_like(same) for _ in counts]
        dist.all_gather(parts, same, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0][ctx.rows], None, None, None
