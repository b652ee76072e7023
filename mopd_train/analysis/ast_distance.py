"""Distance of two Python programs by their syntax trees. Legend: n, m nodes of the two trees."""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Tree:
    """Nodes in postorder. leftmost[i]: first leaf below node i; keyroots: nodes with a left sibling, and the root."""

    labels: tuple[str, ...]
    leftmost: tuple[int, ...]

    @property
    def keyroots(self) -> list[int]:
        return sorted({leaf: node for node, leaf in enumerate(self.leftmost)}.values())


def syntax_tree(text: str) -> Tree | None:
    """Of the last fenced block, or of the whole text; None if that is not Python.

    A label is the node's type, with its value if it is a constant: renaming a variable changes nothing.
    """
    blocks = FENCE.findall(text)
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes and of `is` with a literal, in sampled code
            module = ast.parse(blocks[-1] if blocks else text)
        labels: list[str] = []
        leftmost: list[int] = []
        _postorder(module, labels, leftmost)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # all of which ast.parse raises of bad programs
        return None
    return Tree(tuple(labels), tuple(leftmost))


def _postorder(node: ast.AST, labels: list[str], leftmost: list[int]) -> int:
    """Append the nodes below and then the node; the index of its first leaf."""
    first: int | None = None
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr_context):
            leaf = _postorder(child, labels, leftmost)
            first = leaf if first is None else first
    value = f" {node.value!r}" if isinstance(node, ast.Constant) else ""
    labels.append(type(node).__name__ + value)
    leftmost.append(len(labels) - 1 if first is None else first)
    return leftmost[-1]


def ast_distance(a: Tree, b: Tree) -> float:
    """Tree edit distance over the larger tree's nodes, at most 1 (the complement of TSED, arXiv 2404.08817)."""
    if a == b:
        return 0.0
    return min(1.0, tree_edit_distance(a, b) / max(len(a.labels), len(b.labels)))


def tree_edit_distance(a: Tree, b: Tree) -> int:
    """Fewest insertions, deletions and relabellings that turn a into b: Zhang and Shasha 1989, O(n m) memory."""
    distance = [[0] * len(b.labels) for _ in a.labels]  # between subtrees
    b_roots = b.keyroots
    for i in a.keyroots:
        for j in b_roots:
            _forests(a, b, i, j, distance)
    return distance[-1][-1]


def _forests(a: Tree, b: Tree, i: int, j: int, distance: list[list[int]]) -> None:
    """Distances between all prefixes of the forests that end in subtrees i and j; fills `distance` where both
    prefixes are whole subtrees."""
    first_a, first_b = a.leftmost[i], b.leftmost[j]
    columns = range(first_b, j + 1)
    above = list(range(len(columns) + 1))
    rows = [above]
    for x in range(first_a, i + 1):
        row = [above[0] + 1]
        whole_x, label, to = a.leftmost[x] == first_a, a.labels[x], distance[x]
        before_x = rows[a.leftmost[x] - first_a]
        for column, y in enumerate(columns, start=1):
            best = min(above[column], row[-1]) + 1
            if whole_x and b.leftmost[y] == first_b:
                best = min(best, above[column - 1] + (label != b.labels[y]))
                to[y] = best
            else:
                best = min(best, before_x[b.leftmost[y] - first_b] + to[y])
            row.append(best)
        rows.append(row)
        above = row
