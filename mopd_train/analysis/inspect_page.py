"""Self-contained HTML pages: one file with its style, its script and its data, that opens from disk, loads nothing.

Data is JSON in a script element that is not run; `<` in it is written \\u003c, so no text can end the element. A
content security policy allows the page's own script and style by their hashes, and nothing else: no network, and no
script that a text might smuggle in.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from dataclasses import dataclass, field
from importlib.resources import files
from string import Template
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..rollout import Group, Messages, Rollout
from .inspect_scores import RolloutScores, TeacherScores, TokenScores

# Stored integers are -log p in 1e-3 nats (own token, entropy), divergence in 1e-4 nats, alternatives in 1e-3 nats;
# the same three constants stand at the top of page/inspect.js.
LOGPROB, DIVERGENCE, LIKELY = 1e-3, 1e-4, 1e-3

PAGES = {  # scripts and styles in the order in which they are joined
    "inspect": (
        ("dom.js", "colors.js", "inspect.js", "inspect_view.js", "inspect_panel.js", "inspect_keys.js"),
        ("page.css", "inspect.css"),
    ),
    "report": (("dom.js", "charts.js", "report.js"), ("page.css", "report.css")),
}


def render(kind: str, title: str, data: dict[str, Any]) -> str:
    """The page of PAGES[kind] around `data`, which its script finds as `data`."""
    folder = files(__package__) / "page"
    scripts, styles = (
        "\n".join((folder / name).read_text(encoding="utf-8") for name in names) for names in PAGES[kind]
    )
    return Template((folder / "frame.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        style=styles,
        style_hash=_policy_hash(styles),
        script=scripts,
        script_hash=_policy_hash(scripts),
        data=embedded_json({"title": title, **data}),
    )


def embedded_json(value: Any) -> str:
    """JSON that may stand in a script element. A lone surrogate, which UTF-8 cannot hold, stays an escape."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _policy_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _place(places: dict[Any, int], key: Any) -> int:
    """Where `key` stands among the first occurrences of all keys."""
    return places.setdefault(key, len(places))


@dataclass
class GroupData:
    """Groups and their scores, as the inspector's script reads them."""

    tokenizer: PreTrainedTokenizerBase
    threshold: float  # of success
    groups: list[dict[str, Any]] = field(default_factory=list)
    token_ids: dict[int, int] = field(default_factory=dict)  # token id -> its number on the page
    prompts: dict[str, int] = field(default_factory=dict)  # teacher prompt -> its number on the page

    def add(self, number: int, task: str, group: Group, scored: list[RolloutScores]) -> None:
        rollouts = zip(group.rollouts, scored, strict=True)
        self.groups.append(
            {
                "number": number,
                "task": task,
                "prompt": turns(group.prompt.messages),
                "columns": {key: shortened(value) for key, value in group.prompt.row.items() if key != "prompt"},
                "rollouts": [self._rollout(i, rollout, scores) for i, (rollout, scores) in enumerate(rollouts, 1)],
            }
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "tokenIds": list(self.token_ids),
            "vocabulary": [self._token_text(i) for i in self.token_ids],
            "prompts": list(self.prompts),
            "groups": self.groups,
        }

    def _rollout(self, number: int, rollout: Rollout, scores: RolloutScores) -> dict[str, Any]:
        return {
            "number": number,
            "verdict": verdict(rollout.reward, self.threshold),
            "reward": rollout.reward,
            "feedback": as_text(rollout.feedback),
            "finished": rollout.finished,
            "text": rollout.text,
            "tokens": self._tokens(rollout.token_ids),
            "alternatives": [self._tokens(ids) for ids in scores.alternatives],
            **_side(scores.student),
            "teacher": [self._teacher(teacher) for teacher in scores.teacher],
            "contexts": list(scores.contexts.values()),
        }

    def _teacher(self, teacher: TeacherScores) -> dict[str, Any]:
        prompt = teacher.prompt
        return {
            "prompt": _place(self.prompts, str(self.tokenizer.decode(prompt.token_ids))),
            "length": len(prompt.token_ids),
            "successes": [i + 1 for i in prompt.peers.successes],
            "failures": [i + 1 for i in prompt.peers.failures],
            "attempts": [i + 1 for i in prompt.peers.attempts],
            "feedback": prompt.shows_feedback,
            "divergence": [round(value / DIVERGENCE) for value in teacher.divergence],
            **_side(teacher),
        }

    def _tokens(self, token_ids: list[int]) -> list[int]:
        return [_place(self.token_ids, i) for i in token_ids]

    def _token_text(self, token_id: int) -> str:
        text = str(self.tokenizer.decode([token_id]))
        if "\N{REPLACEMENT CHARACTER}" in text:  # a part of a character: the tokenizer's own name of its bytes
            text = str(self.tokenizer.convert_ids_to_tokens(token_id))
        return text


def _side(scores: TokenScores) -> dict[str, Any]:
    return {
        "logprobs": [round(-value / LOGPROB) for value in scores.logprobs],
        "entropy": [round(value / LOGPROB) for value in scores.entropy],
        "likely": [[round(-value / LIKELY) for value in row] for row in scores.alternatives],
    }


def verdict(reward: float | None, threshold: float) -> str:
    if reward is None:
        return "none"
    return "success" if reward >= threshold else "failure"


def turns(messages: Messages) -> str:
    """A conversation as text; one message needs no role."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def as_text(value: Any) -> str | None:
    """What verifiers and datasets call text may be any JSON value."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def shortened(value: Any, limit: int = 200) -> str:
    """A column of the dataset."""
    text = as_text(value) or ""
    return text if len(text) <= limit else text[: limit - 1] + "…"
