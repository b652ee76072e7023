"""Two controls for the label leak of leave-one-out: a success never stands among its own peers, so what is shown to it
holds one success fewer than what is shown to a failure of the same group.

composition  predicts the verdict from nothing but how many successes and failures were shown: how much a scorer that
             only counts peers could know. 0.5 where every rollout is shown the same numbers.
matched      shows every rollout of the group the same number of successes and of failures: what is left of a
             context's AUC is not owed to counting.
"""

from __future__ import annotations

from dataclasses import replace

from ..contexts import Peers
from ..rollout import Group

MATCHED = "/matched"  # suffix of a context's name


def composition(group: Group, peers: Peers, threshold: float) -> tuple[int, int]:
    """Successes and failures shown."""
    shown = (*peers.successes, *peers.failures, *peers.attempts)
    successes = sum(group.rollouts[i].succeeded(threshold) for i in shown)
    return successes, len(shown) - successes


def matched_peers(group: Group, chosen: list[Peers], threshold: float) -> list[Peers]:
    """The peers chosen for each rollout, cut to the smallest numbers of successes and failures that any judged
    rollout of the group is shown; the last in each list go first."""
    counts = [
        composition(group, peers, threshold)
        for peers, rollout in zip(chosen, group.rollouts, strict=True)
        if rollout.reward is not None
    ]
    if not counts:
        return chosen
    successes, failures = (min(column) for column in zip(*counts, strict=True))
    return [_cut(group, peers, successes, failures, threshold) for peers in chosen]


def _cut(group: Group, peers: Peers, successes: int, failures: int, threshold: float) -> Peers:
    right = [i for i in peers.attempts if group.rollouts[i].succeeded(threshold)][:successes]
    wrong = [i for i in peers.attempts if group.rollouts[i].failed(threshold)][:failures]
    return replace(
        peers,
        successes=peers.successes[:successes],
        failures=peers.failures[:failures],
        attempts=tuple(i for i in peers.attempts if i in right or i in wrong),
    )
