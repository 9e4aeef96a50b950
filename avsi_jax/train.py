"""Forwards `python -m avsi_jax.train` to the command avsi-train (avsi_jax/training/cli.py)."""

from avsi_jax.training.cli import command

if __name__ == "__main__":
    command()
