"""Sequences that share prefixes, packed so that every distinct prefix token is stored and computed once.

Legend: T packed (unique) tokens, H hidden size, n sequences. A *row* is an index into the packed layout.

Sorting the sequences lexicographically makes the layout trivial: neighbours share their longest prefixes, so the
concatenation of what each sequence adds to its predecessor *is* the prefix tree in depth-first order. Two views of
that layout are kept:

* a **run** is what one sequence added: a chain of rows that attends to a prefix of earlier runs and to itself. There
  is one per distinct sequence, so kernels that loop do so over runs;
* a **node** is a run cut wherever another sequence branches off: the compressed trie. All rows of a node have the
  same ancestors, and its descendants are the rows [stop, end).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

Span = tuple[int, int]


@dataclass(frozen=True)
class Run:
    """Rows [start, stop), attending to the rows of `prefix` (in path order) and causally to themselves."""

    start: int
    stop: int
    prefix: tuple[Span, ...]

    @property
    def depth(self) -> int:
        """Position of the first row: the number of rows in `prefix`."""
        return sum(stop - start for start, stop in self.prefix)


@dataclass(frozen=True)
class Node:
    """Rows [start, stop) without branching; [stop, end) are all rows that continue them; `level` counts ancestors."""

    start: int
    stop: int
    end: int
    level: int


@dataclass(eq=False)
class PrefixTree:
    """The packed prefix tree of n token sequences; build one with `PrefixTree.pack`.

    Token t of sequence i lives in row `rows(i)[t]`, and its position is t: the depth in the tree. `forward` computes
    hidden states of all rows; `hidden_of` and `gather` read sequences out of them. All of it is differentiable.
    """

    ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, depth of each row
    runs: tuple[Run, ...]
    spans: tuple[tuple[Span, ...], ...]  # per sequence, the rows of its tokens in order
    hidden: Tensor | None = field(default=None, repr=False)  # (T, H), result of the last forward

    @classmethod
    def pack(cls, sequences: Sequence[Tensor]) -> PrefixTree:
        """Pack 1-D integer tensors. Equal sequences, and a prefix of another sequence, cost nothing.

        ValueError for no sequences, an empty one, or one that is not a 1-D integer tensor.
        """
        order, shared = _sort(sequences)
        pieces, depths, runs = [], [], []
        spans: list[tuple[Span, ...]] = [()] * len(sequences)
        path: list[Span] = []
        size = 0
        for index, common in zip(order, shared, strict=True):
            tokens = sequences[index]
            path = _truncate(path, common)
            if common < len(tokens):
                stop = size + len(tokens) - common
                runs.append(Run(size, stop, tuple(path)))
                path = _extend(path, (size, stop))
                pieces.append(tokens[common:])
                depths.append(torch.arange(common, len(tokens)))
                size = stop
            spans[index] = tuple(path)
        ids = torch.cat(pieces).long()
        return cls(ids, torch.cat(depths).to(ids.device), tuple(runs), tuple(spans))

    @classmethod
    def pack_many(cls, sequences: Sequence[Tensor], max_tokens: int) -> list[tuple[PrefixTree, list[int]]]:
        """Pack into as many trees of at most `max_tokens` unique tokens as needed: [(tree, indices)].

        `indices[j]` is the place in `sequences` of the tree's sequence j. Cuts fall between neighbours in sorted
        order where they repeat the fewest tokens; among those, the fewest packs are made.
        ValueError if one sequence alone has more than `max_tokens` tokens.
        """
        order, shared = _sort(sequences)
        lengths = [len(sequences[index]) for index in order]
        longest = max(range(len(order)), key=lengths.__getitem__)
        if lengths[longest] > max_tokens:
            raise ValueError(
                f"expected at most max_tokens={max_tokens} tokens in a sequence, "
                f"got {lengths[longest]} in sequence {order[longest]}"
            )
        packs = []
        for first, last in _cheapest_cuts(lengths, shared, max_tokens):
            indices = sorted(order[first:last])
            packs.append((cls.pack([sequences[index] for index in indices]), indices))
        return packs

    @property
    def unique_tokens(self) -> int:
        """T: tokens that a forward computes."""
        return len(self.ids)

    @property
    def total_tokens(self) -> int:
        """Tokens of all sequences: what one forward per sequence would compute, without padding."""
        return sum(self.length(i) for i in range(len(self.spans)))

    @property
    def max_length(self) -> int:
        return max(run.depth + run.stop - run.start for run in self.runs)

    def length(self, i: int) -> int:
        """Tokens in sequence i."""
        return sum(stop - start for start, stop in self.spans[i])

    def rows(self, i: int, start: int = 0, stop: int | None = None) -> Tensor:  # (stop - start,) int64
        """Rows of tokens [start, stop) of sequence i."""
        length = self.length(i)
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise ValueError(
                f"expected 0 <= start <= stop <= {length} for sequence {i}, got start={start}, stop={stop}"
            )
        rows = torch.cat([torch.arange(a, b) for a, b in self.spans[i]])
        return rows[start:stop].to(self.ids.device)

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """The compressed trie, depth first."""
        cuts = {row for run in self.runs for row in (run.start, run.stop, *(stop for _, stop in run.prefix))}
        cuts |= {stop for spans in self.spans for _, stop in spans}  # a sequence may end where nothing branches
        edges = sorted(cuts)
        positions = self.positions.tolist()
        ends, levels = [0] * (len(edges) - 1), []
        open_nodes: list[int] = []
        for node, row in enumerate(edges[:-1]):
            while open_nodes and positions[edges[open_nodes[-1]]] >= positions[row]:
                ends[open_nodes.pop()] = row
            levels.append(len(open_nodes))
            open_nodes.append(node)
        for node in open_nodes:
            ends[node] = edges[-1]
        return tuple(map(Node, edges[:-1], edges[1:], ends, levels))

    def forward(self, model: nn.Module, *, kernel: str = "auto") -> Tensor:  # (T, H)
        """Final hidden states (after the last norm) of every row, from the decoder trunk of `model`.

        The trunk alone runs: no lm_head, no logits. Equal to one forward per sequence up to rounding, and so are the
        gradients. Models that cannot follow a tree run one sequence each, with one log line (tree_forward.py).
        A wrapper's own forward is not run, so DDP does not average these gradients over processes: do it yourself.
        The result is kept in `hidden` until the next forward or `release`.
        """
        from .tree_forward import forward_tree

        self.hidden = forward_tree(model, self, kernel=kernel)
        return self.hidden

    def release(self) -> None:
        """Forget the hidden states of the last forward, and with them its autograd graph."""
        self.hidden = None

    def hidden_of(self, i: int, *, hidden: Tensor | None = None) -> Tensor:  # (length(i), H)
        """Hidden states of sequence i, out of `hidden` or else of the last forward."""
        return self.gather(i, hidden=hidden)

    def gather(self, i: int, start: int = 0, stop: int | None = None, *, hidden: Tensor | None = None) -> Tensor:
        """Hidden states (stop - start, H) of tokens [start, stop) of sequence i."""
        return self._hidden(hidden).index_select(0, self.rows(i, start, stop))

    def gather_many(self, spans: Sequence[tuple[int, int, int]], *, hidden: Tensor | None = None) -> Tensor:
        """Hidden states (N, H) of [(i, start, stop), ...], concatenated: one gather, so one scatter in backward."""
        rows = torch.cat([self.ids.new_empty(0), *(self.rows(*span) for span in spans)])
        return self._hidden(hidden).index_select(0, rows)

    def _hidden(self, hidden: Tensor | None) -> Tensor:
        hidden = self.hidden if hidden is None else hidden
        if hidden is None:
            raise ValueError("no hidden states: call forward(model) first, or pass hidden=")
        if len(hidden) != self.unique_tokens:
            raise ValueError(f"expected hidden.size(0) == {self.unique_tokens} unique tokens, got {len(hidden)}")
        return hidden


def _sort(sequences: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Lexicographic order, and the tokens each sequence shares with its predecessor in that order."""
    if not len(sequences):
        raise ValueError("expected at least one sequence, got none")
    for i, tokens in enumerate(sequences):
        if not isinstance(tokens, Tensor):
            raise ValueError(f"expected sequence {i} to be a tensor of token ids, got {type(tokens).__name__}")
        if tokens.dim() != 1 or not len(tokens) or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ValueError(
                f"expected sequence {i} to be a non-empty 1-D integer tensor, "
                f"got shape {tuple(tokens.shape)} and dtype {tokens.dtype}"
            )
    local = [tokens.detach().cpu() for tokens in sequences]
    keys = [tuple(tokens.tolist()) for tokens in local]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    shared = [0] + [_shared_prefix(local[a], local[b]) for a, b in pairwise(order)]
    return order, shared


def _shared_prefix(a: Tensor, b: Tensor) -> int:
    length = min(len(a), len(b))
    different = (a[:length] != b[:length]).nonzero()
    return int(different[0]) if len(different) else length


def _truncate(path: list[Span], length: int) -> list[Span]:
    kept = []
    for start, stop in path:
        if length <= 0:
            break
        kept.append((start, min(stop, start + length)))
        length -= stop - start
    return kept


def _extend(path: list[Span], span: Span) -> list[Span]:
    if path and path[-1][1] == span[0]:
        return [*path[:-1], (path[-1][0], span[1])]
    return [*path, span]


def _cheapest_cuts(lengths: list[int], shared: list[int], max_tokens: int) -> list[Span]:
    """Split sorted sequences into ranges of at most max_tokens unique tokens, minimising all tokens, then ranges.

    Starting a range at k computes shared[k] tokens again; dynamic programming over the first k sequences.
    """
    added = list(accumulate((length - common for length, common in zip(lengths, shared, strict=True)), initial=0))
    best: list[tuple[int, int, int]] = [(0, 0, 0)]  # (repeated tokens, ranges, first of the last range)
    for last in range(1, len(lengths) + 1):
        choices = []
        for first in range(last - 1, -1, -1):
            if added[last] - added[first] > max_tokens:
                break
            if added[last] - added[first] + shared[first] > max_tokens:
                continue  # an earlier start shares less with its predecessor and may fit again
            repeated, ranges, _ = best[first]
            choices.append((repeated + shared[first], ranges + 1, first))
        best.append(min(choices))
    cuts, last = [], len(lengths)
    while last:
        first = best[last][2]
        cuts.append((first, last))
        last = first
    return cuts[::-1]
