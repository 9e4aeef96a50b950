"""The training command: `python -m avsi_jax.train`; the code is in avsi_jax.training.cli."""

from avsi_jax.training.cli import command

if __name__ == "__main__":
    command()
