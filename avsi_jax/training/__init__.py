"""The command avsi-train: objective, training step, loop, checkpoints and run directory."""
