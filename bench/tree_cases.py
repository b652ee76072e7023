"""What `bench tree` compares: groups of random token ids, the plain way of transformers, and the tree's.

Every sequence of a context is equally long, so padded batches waste nothing here: real groups favour the tree more.

Legend: G rollouts of a group, N completion tokens, H hidden.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopd_kernels import LMHead, PrefixTree, linear_logprobs
from mopd_train.config import ContextConfig
from mopd_train.contexts import choose_peers, encode_prompt
from mopd_train.padding import padded
from mopd_train.rollout import Group, Prompt, Rollout
from mopd_train.sampler import Sampling
from mopd_train.scoring import completion_hidden
from mopd_train.tasks import arithmetic, as_messages

BATCH_SIZES = (1, 2, 4, 8)
HEADER, INSTRUCTION = 8, 12  # tokens that open a block of a peer, and that end the message
Pairs = list[tuple[list[int], list[int]]]  # what is read, the rollout


@dataclass(frozen=True)
class Shape:
    """Tokens and groups of the cases."""

    prompt: int = 64
    rollout: int = 128
    groups: tuple[int, ...] = (2, 4, 8, 16)
    analysis_rollout: int = 8  # short: the plain way has to stay under half a minute
    student_prompt: int = 128
    student_rollout: int = 64
    new_tokens: int = 32


QUICK = Shape(12, 10, (2, 4), 4, 12, 10, 6)


def random_group(size: int, prompt: int, rollout: int, vocabulary: int) -> Group:
    """Random token ids; every other rollout succeeds."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    rollouts = [Rollout(ids(rollout), "shown", True, float(i % 2 == 0)) for i in range(size)]
    return Group(Prompt([], ids(prompt), {}), rollouts)


def teacher_pairs(group: Group, context: str) -> Pairs:
    """Sequences of the shape that templates give: prompt, a block a peer, instruction; then the rollout."""
    pairs: Pairs = []
    settings = ContextConfig(context=context)  # type: ignore[arg-type]
    for peers, rollout in zip(choose_peers(group, settings, seed=0), group.rollouts, strict=True):
        read = list(group.prompt.token_ids)
        for i in (*peers.successes, *peers.failures, *peers.attempts):
            right = group.rollouts[i].succeeded(settings.success_reward_threshold)
            read += [11 if right else 12] * HEADER + group.rollouts[i].token_ids
        if context != "none":
            read += [13] * INSTRUCTION
        pairs.append((read, rollout.token_ids))
    return pairs


def student_pairs(group: Group) -> Pairs:
    return [(group.prompt.token_ids, rollout.token_ids) for rollout in group.rollouts]


def padded_hidden(model: Any, pairs: Pairs, batch: int) -> Tensor:  # (N, H)
    """The trunk of transformers on padded batches, without logits."""
    parts = [
        completion_hidden(model, *map(list, zip(*pairs[first : first + batch], strict=True)), pad_id=2, tree=False)[0]
        for first in range(0, len(pairs), batch)
    ]
    return torch.cat(parts)


def tree_hidden(model: Any, pairs: Pairs) -> Tensor:  # (N, H)
    return completion_hidden(model, *map(list, zip(*pairs, strict=True)), pad_id=2, tree=True)[0]


def padded_backward(model: Any, pairs: Pairs, batch: int) -> None:
    for first in range(0, len(pairs), batch):
        part = pairs[first : first + batch]
        backward(model, padded_hidden(model, part, batch), part)


def tree_backward(model: Any, pairs: Pairs) -> None:
    backward(model, tree_hidden(model, pairs), pairs)


def backward(model: Any, hidden: Tensor, pairs: Pairs) -> None:
    """Through the loss as well: the mean of -log q over the rollouts' tokens."""
    labels = torch.tensor([token for _, rollout in pairs for token in rollout])
    (-linear_logprobs(hidden, LMHead.from_model(model), labels).logprobs.sum() / 512).backward()


def best_batch(run: Callable[[int], Any], most: int) -> tuple[int, dict[int, float]]:
    """The batch size of least time a sequence, by the faster of two batches of each size; and those times."""
    sizes = [size for size in BATCH_SIZES if size <= most]
    run(1)
    times = {size: min(timed(lambda: run(size)) for _ in range(2)) / size for size in sizes}  # noqa: B023
    return min(sizes, key=times.__getitem__), times


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round: one run of each variant a round, the first to go alternating."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds):
        for name in list(variants)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(timed(variants[name]))
    return times


def summary(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "runs": values}


def difference(actual: Tensor, expected: Tensor) -> float:
    """Relative error in the 2-norm."""
    return float((actual - expected).norm() / expected.norm())


def sharing(pairs: Pairs) -> tuple[int, int]:
    """Unique and total tokens."""
    tree = PrefixTree.pack([torch.tensor(read + rollout) for read, rollout in pairs])
    return tree.unique_tokens, tree.total_tokens


def generated(
    model: Any, prompts: list[list[int]], sampling: Sampling, stops: list[int], pad_id: int, seed: int
) -> list[list[list[int]]]:
    """model.generate with the arguments and the result of mopd_train.sampler.sample."""
    torch.manual_seed(seed)
    per_batch, completions = max(1, sampling.batch_size // sampling.num_generations), []
    for first in range(0, len(prompts), per_batch):
        ids, mask = padded(prompts[first : first + per_batch], pad_id, model.device, "left")
        output = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            num_return_sequences=sampling.num_generations,
            max_new_tokens=sampling.max_completion_length,
            eos_token_id=stops or [-1],
            pad_token_id=pad_id,
        )
        rows = [up_to_stop(row, stops) for row in output[:, ids.size(1) :].tolist()]
        completions += [rows[i : i + sampling.num_generations] for i in range(0, len(rows), sampling.num_generations)]
    return completions


def example_prompts(folder: Path, count: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of the embedded task, and the token that ends an answer."""
    from mopd_train.models import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    train, _ = arithmetic.rows()
    return [encode_prompt(as_messages(row["prompt"]), tokenizer, {}) for row in train[:count]], [tokenizer.eos_token_id]


@torch.no_grad()
def linear_layers(model: Any, rows: int) -> None:
    """The products of one decoding step and nothing else: at few rows the time it takes to read the weights."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.functional.linear(layer.weight.new_zeros(rows, layer.weight.size(1)), layer.weight)


def up_to_stop(row: list[int], stops: list[int]) -> list[int]:
    ends = [place + 1 for place, token in enumerate(row) if token in stops]
    return row[: ends[0]] if ends else row


def peak_memory(folder: str, way: str, batch: int, shape: Shape) -> int:
    """Bytes of resident memory that teacher scoring of the largest measured group of up to 8 adds, at its peak, to a
    loaded model that has run once. Meant for a process of its own (Linux)."""
    from mopd_train.models import load_model

    model = load_model(folder)
    group = random_group(min(8, shape.groups[-1]), shape.prompt, shape.rollout, model.config.vocab_size)
    pairs = teacher_pairs(group, "2s1f")
    with torch.no_grad():
        padded_hidden(model, [(pairs[0][0][:16], [5])], 1)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before = _status("VmHWM")
        if way == "tree":
            tree_hidden(model, pairs)
        else:
            padded_hidden(model, pairs, batch)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
