"""What the teacher's log-probs say about rollouts."""
