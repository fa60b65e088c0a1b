"""The loop, objectives, optimizers, checkpoints, preflight and tracking."""
