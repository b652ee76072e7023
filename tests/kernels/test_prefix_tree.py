import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mopd_kernels.prefix_tree import PrefixTree

# A tiny alphabet and repeats make shared prefixes, duplicates and prefixes of one another the usual case.
token_lists = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=9)


def tensors(lists):
    return [torch.tensor(tokens) for tokens in lists]


def prefixes(lists):
    return {tuple(tokens[: n + 1]) for tokens in lists for n in range(len(tokens))}


@given(token_lists)
@settings(max_examples=150, deadline=None)
def test_every_sequence_is_recovered_along_its_path(lists):
    tree = PrefixTree.pack(tensors(lists))
    for i, tokens in enumerate(lists):
        rows = tree.rows(i)
        assert tree.ids[rows].tolist() == tokens
        assert tree.positions[rows].tolist() == list(range(len(tokens)))
    assert tree.unique_tokens == len(prefixes(lists))
    assert tree.total_tokens == sum(map(len, lists))
    assert tree.max_length == max(map(len, lists))


@given(token_lists)
@settings(max_examples=150, deadline=None)
def test_runs_and_nodes_describe_the_same_ancestors(lists):
    tree = PrefixTree.pack(tensors(lists))
    paths = {}
    for i in range(len(lists)):
        rows = tree.rows(i).tolist()
        paths.update({row: rows[: n + 1] for n, row in enumerate(rows)})
    for run in tree.runs:
        prefix = [row for span in run.prefix for row in range(*span)]
        for row in range(run.start, run.stop):
            assert prefix + list(range(run.start, row + 1)) == paths[row]
    for node in tree.nodes:
        assert node.level == sum(other.start < node.start < other.end for other in tree.nodes)
        for row in range(node.start, node.stop):
            descendants = [other for other, path in paths.items() if row in path]
            assert sorted(descendants) == list(range(row, node.end))
    assert [node.start for node in tree.nodes[1:]] == [node.stop for node in tree.nodes[:-1]]


@given(token_lists, st.randoms())
@settings(max_examples=100, deadline=None)
def test_order_of_sequences_does_not_matter(lists, random):
    shuffled = random.sample(range(len(lists)), len(lists))
    one, other = PrefixTree.pack(tensors(lists)), PrefixTree.pack(tensors([lists[i] for i in shuffled]))
    assert one.ids.tolist() == other.ids.tolist()
    assert one.runs == other.runs
    assert one.nodes == other.nodes
    for j, i in enumerate(shuffled):
        assert one.rows(i).tolist() == other.rows(j).tolist()


def best_split(lists, budget):
    """Fewest tokens over all ways to cut the sorted sequences into packs within the budget."""
    ordered = sorted(map(tuple, lists))
    best = [0]
    for last in range(1, len(ordered) + 1):
        sizes = [(first, len(prefixes(ordered[first:last]))) for first in range(last)]
        best.append(min(best[first] + size for first, size in sizes if size <= budget))
    return best[-1]


@given(token_lists, st.integers(9, 30))
@settings(max_examples=150, deadline=None)
def test_packs_stay_in_budget_and_share_as_much_as_it_allows(lists, budget):
    packs = PrefixTree.pack_many(tensors(lists), budget)
    assert sorted(i for _, indices in packs for i in indices) == list(range(len(lists)))
    for tree, indices in packs:
        assert tree.unique_tokens <= budget
        for j, i in enumerate(indices):
            assert tree.ids[tree.rows(j)].tolist() == lists[i]
    assert sum(tree.unique_tokens for tree, _ in packs) == best_split(lists, budget)


def test_groups_are_split_between_not_within():
    prompts = [[p] * 10 for p in (1, 2)]
    lists = [prompts[i % 2] + [5 + i] * 3 for i in range(6)]  # two interleaved groups of 10 + 3 * 3 tokens
    packs = PrefixTree.pack_many(tensors(lists), 25)
    assert [indices for _, indices in packs] == [[0, 2, 4], [1, 3, 5]]
    assert [tree.unique_tokens for tree, _ in packs] == [19, 19]


def test_gather_reads_rows_and_sums_gradients_of_shared_ones():
    tree = PrefixTree.pack(tensors([[1, 2, 3], [1, 2, 4], [1, 2, 3]]))
    hidden = torch.arange(tree.unique_tokens * 2.0).view(-1, 2).requires_grad_()
    parts = [tree.gather(i, 1, 3, hidden=hidden) for i in range(3)]
    together = tree.gather_many([(i, 1, 3) for i in range(3)], hidden=hidden)
    assert torch.equal(together, torch.cat(parts))
    assert torch.equal(tree.hidden_of(1, hidden=hidden)[1:], parts[1])
    assert tree.gather_many([], hidden=hidden).shape == (0, 2)
    together.sum().backward()
    assert hidden.grad[:, 0].tolist() == [0.0, 3.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PrefixTree.pack([]), "at least one sequence"),
        (lambda: PrefixTree.pack([torch.tensor([1]), torch.zeros(0, dtype=torch.long)]), "sequence 1 .* shape .0,"),
        (lambda: PrefixTree.pack([torch.tensor([1.0])]), "dtype torch.float32"),
        (lambda: PrefixTree.pack([torch.tensor([True])]), "dtype torch.bool"),
        (lambda: PrefixTree.pack([[1, 2]]), "sequence 0 to be a tensor of token ids, got list"),
        (lambda: PrefixTree.pack_many(tensors([[1], [2, 3, 4]]), 2), "max_tokens=2 .* got 3 in sequence 1"),
        (lambda: PrefixTree.pack(tensors([[1, 2]])).rows(0, 1, 3), "stop <= 2 .* stop=3"),
        (lambda: PrefixTree.pack(tensors([[1, 2]])).hidden_of(0), "call forward"),
        (lambda: PrefixTree.pack(tensors([[1, 2]])).gather(0, hidden=torch.zeros(3, 1)), "== 2 .* got 3"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
