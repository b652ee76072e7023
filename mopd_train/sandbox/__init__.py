"""Untrusted Python, run apart from everything. docs/sandbox.md has the threat model."""

from .jail import SandboxUnavailable
from .sandbox import Sandbox
from .session import START_SECONDS, Result, Session, SessionEnded

__all__ = ["START_SECONDS", "Result", "Sandbox", "SandboxUnavailable", "Session", "SessionEnded"]
