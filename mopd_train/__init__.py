"""A thin trainer for Multi-Rollout On-Policy Distillation."""
