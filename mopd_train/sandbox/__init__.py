"""Untrusted Python, run apart from everything. docs/sandbox.md has the threat model."""

from .jail import SandboxUnavailable
from .sandbox import Sandbox
from .session import Result, Session, SessionEnded

__all__ = ["Result", "Sandbox", "SandboxUnavailable", "Session", "SessionEnded"]
