"""A thin trainer for Multi-Rollout On-Policy Distillation: `from mopd_train import Config, train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callbacks import Callback, Event
    from .config import Config
    from .train import train

__all__ = ["Callback", "Config", "Event", "train"]
HOMES = {"Callback": "callbacks", "Config": "config", "Event": "callbacks", "train": "train"}


def __getattr__(name: str) -> Any:
    """Loaded when first asked for: verifier processes import this package without torch."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
