"""The command avsi-train: objective, training step, loop, checkpoints, run directory."""
