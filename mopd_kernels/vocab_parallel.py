"""Every collective of a split vocabulary, and nothing else.

Each rank holds the vocabulary rows [start, stop) of both heads and all tokens. Per chunk of C tokens and P ranks:

    KL                one all-gather of the rows' statistics, 11 floats a token
    Jensen-Shannon    10 floats a token, then one sum of 2 floats
    top-k             one all-gather of the candidates (3 k numbers), one of the rest's statistics (10 floats)
    each context      one all-gather of 1 float a token before it is mixed in
    log-probs         one all-gather of 5 floats a token

and per call one handshake of a few numbers, and one sum of dH (N, H). Statistics are saved: the backward
exchanges nothing but dH. Every rank computes the merged numbers in the same order, so all hold the same bits.

Legend: P ranks, C tokens of a chunk, V vocabulary, k support.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from .losses import topk
from .losses.stats import PairStats, SideStats, merge_sides

WIDTH = 32  # numbers in a handshake, the same for every operation
OPERATIONS = ("refused", "divergence", "logprobs")  # what a rank says it is about to do
BEYOND = 2**24 - 1  # index of a padded candidate: past every vocabulary, exact in float32


class Part(NamedTuple):
    """What a rank holds of the vocabulary, and how many tokens a chunk it would choose."""

    start: int
    rows: int
    vocabulary: int  # of all ranks
    chunk: int


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a vocabulary; with group None this process has all of it and nothing is exchanged."""

    group: dist.ProcessGroup | None = None

    @classmethod
    def named(cls, name: str) -> Ranks:
        """The group by the name that custom operators carry, "" for none."""
        return cls(dist.distributed_c10d._resolve_process_group(name) if name else None)  # type: ignore[arg-type]

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def agree(self, operation: str, facts: dict[str, float], part: Part, device: torch.device) -> int:
        """Tokens a chunk that all ranks take. Raises ValueError on every rank where `facts` differ between
        ranks, where the parts do not tile the vocabulary, or where a rank refused its arguments."""
        if self.group is None:
            return part.chunk
        numbers = [float(OPERATIONS.index(operation)), *map(float, part), *map(float, facts.values())]
        assert len(numbers) <= WIDTH
        numbers += [0.0] * (WIDTH - len(numbers))
        said = self._gather(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()
        refusing = [rank for rank, numbers in enumerate(said) if numbers[0] == 0]
        if refusing:
            raise ValueError(f"ranks {refusing} of the vocabulary's group refused their arguments; see their errors")
        names = ["operation", *Part._fields, *facts]
        for place, name in enumerate(names):
            values = [numbers[place] for numbers in said]
            if name not in ("start", "rows", "chunk") and len(set(values)) > 1:
                raise ValueError(f"expected the same {name} on every rank of the vocabulary's group, got {values}")
        _check_tiling([Part(*map(int, numbers[1:5])) for numbers in said])
        return min(int(numbers[4]) for numbers in said)

    def refuse(self, device: torch.device) -> None:
        """Take part in the others' `agree`, so that they raise with this rank instead of waiting for it."""
        if self.group is not None:
            self._gather(torch.zeros(WIDTH, dtype=torch.float64, device=device))

    def _gather(self, part: Tensor) -> Tensor:
        """(P, ...) of every rank's `part`."""
        parts = part.new_empty(self.size, *part.shape)
        dist.all_gather(list(parts.unbind(0)), part.contiguous(), group=self.group)
        return parts

    def pair(self, stats: PairStats, alpha: float) -> PairStats:
        """Statistics of whole rows from every rank's part of them."""
        if self.group is None:
            return stats
        cross = () if stats.cross is None else (stats.cross,)
        columns = self._gather(torch.stack([*stats.student, *stats.teacher, *cross])).unbind(1)
        student, factor_s = merge_sides(SideStats(*columns[:5]))
        teacher, factor_t = merge_sides(SideStats(*columns[5:10]))
        if stats.cross is None:
            return PairStats(student, teacher, None)
        factor = factor_s if alpha == 1 else factor_t
        return PairStats(student, teacher, torch.where(factor > 0, factor * columns[10], 0.0).sum(0))

    def side(self, stats: SideStats) -> SideStats:
        if self.group is None:
            return stats
        return merge_sides(SideStats(*self._gather(torch.stack(list(stats))).unbind(1)))[0]

    def logsumexp(self, stats: SideStats) -> Tensor:
        """(C,) of whole rows."""
        if self.group is None:
            return stats.logsumexp
        return self._gather(stats.logsumexp).logsumexp(0)

    def sums(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        if self.group is None:
            return first, second
        both = torch.stack([first, second])
        dist.all_reduce(both, group=self.group)
        return both[0], both[1]

    def support(self, candidates: topk.Support, k: int) -> topk.Support:
        """The k best of every rank's candidates; ranks with fewer than k valid rows pad with -inf."""
        if self.group is None:
            return topk.merged(candidates, k)
        missing = (0, k - candidates.student.size(1))
        z = pad(torch.stack(candidates[:2]), missing, value=float("-inf"))
        indices = pad(candidates.indices.to(z.dtype), missing, value=BEYOND)
        student, teacher, indices = self._gather(torch.cat([z, indices[None]])).permute(1, 2, 0, 3).flatten(2)
        return topk.merged(topk.Support(student, teacher, indices.long()), k)

    def reduce(self, hidden: Tensor | None) -> None:
        """Sum dH (N, H) over ranks, in place."""
        if self.group is not None and hidden is not None:
            dist.all_reduce(hidden, group=self.group)


def group_name(group: dist.ProcessGroup | None) -> str:
    """The name that `Ranks.named` takes; None is the default group."""
    if group is None and not dist.is_initialized():
        raise ValueError("VocabShard(group=None) means the default process group: call init_process_group first")
    return str((group or dist.distributed_c10d._get_default_group()).group_name)


def refuse(group: dist.ProcessGroup | None, device: torch.device) -> None:
    """`Ranks.refuse` of the group that a VocabShard names; nothing where there is none yet."""
    if group is not None or dist.is_initialized():
        Ranks.named(group_name(group)).refuse(device)


def _check_tiling(parts: list[Part]) -> None:
    held = sorted((part.start, part.start + part.rows) for part in parts if part.rows > 0)
    ends = [0, *(stop for _, stop in held)]
    if [start for start, _ in held] != ends[:-1] or ends[-1] != parts[0].vocabulary:
        raise ValueError(
            f"expected shards that tile the rows [0, {parts[0].vocabulary}) without gap or overlap, "
            f"got [start, stop) {held}"
        )
