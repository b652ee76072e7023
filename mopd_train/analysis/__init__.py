"""What the teacher's log-probs say about rollouts, and how rollouts differ from each other."""

from .summary import Analysis
from .teacher_signal import analyze

__all__ = ["Analysis", "analyze"]
