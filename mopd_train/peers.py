"""Which rollouts the teacher of a rollout is shown. Leave-one-out: a rollout is never its own peer.

Sources: arXiv 2605.12652 and its official code, whose unseeded draws are seeded here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .config import ContextConfig
from .rollout import Group, Rollout
from .tasks.answers import without_thinking


@dataclass(frozen=True)
class Peers:
    """Places in the group of the rollouts shown to the teacher of one rollout, in the order in which they stand."""

    successes: tuple[int, ...]  # labelled as successes, failures as failures, whatever a control puts there
    failures: tuple[int, ...]
    attempts: tuple[int, ...] = ()  # chosen whatever the verdict; each is labelled with its own
    strangers: tuple[int, ...] = ()  # places among the successes of other prompts, by a control
    summaries: tuple[int, ...] = ()  # shown in one sentence, each labelled with its verdict


def shown_text(rollout: Rollout, config: ContextConfig) -> str:
    """What a peer shows of itself; empty where it ended at once or within its thinking. Then it is nobody's peer."""
    text = without_thinking(rollout.text) if config.remove_thinking_from_demonstration else rollout.text
    return text.strip()


# Peers out of the other judged rollouts of the group, which come in drawn order; threshold of success.
Chooser = Callable[[Group, list[int], float], Peers]


def counted(successes: int | None, failures: int | None) -> Chooser:
    """The first so many successes, then failures; None for every one."""

    def choose(group: Group, others: list[int], threshold: float) -> Peers:
        right = [i for i in others if group.rollouts[i].succeeded(threshold)]
        wrong = [i for i in others if group.rollouts[i].failed(threshold)]
        return Peers(tuple(right[:successes]), tuple(wrong[:failures]))

    return choose


def random_peer(group: Group, others: list[int], threshold: float) -> Peers:
    """The first in drawn order: a control for showing any peer at all."""
    return Peers((), (), tuple(others[:1]))


def score_ordered(group: Group, others: list[int], threshold: float) -> Peers:
    """Every peer from the lowest reward to the highest, so that the best stands nearest to the answer."""
    return Peers((), (), tuple(sorted(others, key=lambda i: group.rollouts[i].reward or 0.0)))


CONTEXTS: dict[str, Chooser] = {
    "none": counted(0, 0),
    "1s": counted(1, 0),
    "2s": counted(2, 0),
    "1f": counted(0, 1),
    "1s1f": counted(1, 1),
    "2s1f": counted(2, 1),
    "all": counted(None, None),
    "random_peer": random_peer,
    "score_ordered": score_ordered,
}


@dataclass(frozen=True)
class Candidates:
    """What a control may fill blocks with; both lists in drawn order."""

    group: Group
    others: list[int]  # judged rollouts of the group that are not itself
    strangers: list[tuple[int, Rollout]]  # successes of other prompts with their places
    config: ContextConfig

    def length(self, index: int) -> int:
        return len(self.group.rollouts[index].token_ids)


def relabelled_peers(peers: Peers, candidates: Candidates) -> Peers:
    """Each block keeps its label and takes a peer whatever its verdict: the next drawn, or the nearest in tokens."""
    free = list(candidates.others)

    def fill(slots: tuple[int, ...]) -> tuple[int, ...]:
        filled = []
        for slot in slots:
            wanted, by_token = candidates.length(slot), candidates.config.peer_control_match == "token"
            taken = min(free, key=lambda i: abs(candidates.length(i) - wanted)) if by_token else free[0]
            free.remove(taken)
            filled.append(taken)
        return tuple(filled)

    return replace(peers, successes=fill(peers.successes), failures=fill(peers.failures))


def unrelated_successes(peers: Peers, candidates: Candidates) -> Peers:
    """Successes of other prompts only."""
    budget = sum(_cost(candidates, candidates.group.rollouts[i]) for i in (*peers.successes, *peers.failures))
    return Peers((), (), strangers=_within(budget, candidates, candidates.strangers)[0])


def same_prompt_successes(peers: Peers, candidates: Candidates) -> Peers:
    """Successes of the same prompt, in the failure's block too; where they do not suffice, of other prompts."""
    rollouts, threshold = candidates.group.rollouts, candidates.config.success_reward_threshold
    right = [(i, rollouts[i]) for i in candidates.others if rollouts[i].succeeded(threshold)]
    budget = sum(_cost(candidates, rollouts[i]) for i in (*peers.successes, *peers.failures))
    own, left = _within(budget, candidates, right)
    return Peers(own, (), strangers=_within(left, candidates, candidates.strangers)[0])


def _cost(candidates: Candidates, rollout: Rollout) -> int:
    return len(rollout.token_ids) if candidates.config.peer_control_match == "token" else 1


def _within(budget: int, candidates: Candidates, pool: list[tuple[int, Rollout]]) -> tuple[tuple[int, ...], int]:
    """The first places of the pool that use up the budget of blocks or tokens, and what is left of it."""
    taken = []
    for place, rollout in pool:
        if budget <= 0:
            break
        taken.append(place)
        budget -= _cost(candidates, rollout)
    return tuple(taken), budget


CONTROLS: dict[str, Callable[[Peers, Candidates], Peers]] = {
    "random_peer": relabelled_peers,
    "unrelated_prompt": unrelated_successes,
    "success_only_matched": same_prompt_successes,
}


def choose_peers(group: Group, config: ContextConfig, seed: int, strangers: Sequence[Rollout] = ()) -> list[Peers]:
    """Peers of every rollout, among the judged rollouts that are not itself and have a text to show, in an order drawn
    from `seed`: one order a group (shared) or one a rollout (random). `strangers`: successes of other prompts, for the
    controls."""
    choose, chosen = CONTEXTS[config.context], []
    fit = {i for i, r in enumerate(group.rollouts) if r.reward is not None and shown_text(r, config)}
    for own in range(len(group.rollouts)):
        order = list(range(len(group.rollouts)))
        rng = random.Random(seed if config.peer_choice == "shared" else f"{seed}/{own}")
        rng.shuffle(order)
        others = [i for i in order if i != own and i in fit]
        peers = choose(group, others, config.success_reward_threshold)
        if config.failure_solution_condition == "when_no_solution" and peers.successes:
            peers = replace(peers, failures=())
        if config.peer_control_mode != "none":
            pool = list(enumerate(strangers))
            rng.shuffle(pool)
            peers = CONTROLS[config.peer_control_mode](peers, Candidates(group, others, pool, config))
        if config.summary_k:
            peers = replace(peers, summaries=_summarised(group, others, peers, config))
        chosen.append(peers)
    return chosen


def _summarised(group: Group, others: list[int], peers: Peers, config: ContextConfig) -> tuple[int, ...]:
    """The next peers in drawn order that are not shown whole."""
    shown = {*peers.successes, *peers.failures, *peers.attempts}
    wanted = {"success": (True,), "failure": (False,), "all": (True, False)}[config.summary_source]
    threshold = config.success_reward_threshold
    left = [i for i in others if i not in shown and group.rollouts[i].succeeded(threshold) in wanted]
    return tuple(left[: config.summary_k])


def strangers_of(group: Group, batch: Sequence[Group], config: ContextConfig) -> list[Rollout]:
    """Successes of the batch's other prompts that have a text to show; a group of the same prompt drawn twice is no
    other prompt."""
    return [
        rollout
        for other in batch
        if other.prompt.token_ids != group.prompt.token_ids
        for rollout in other.rollouts
        if rollout.succeeded(config.success_reward_threshold) and shown_text(rollout, config)
    ]
