"""`python -m avsi_jax`: the list of commands."""

from __future__ import annotations

import avsi_jax

COMMANDS = {
    "avsi-inpaint": "restores gaps in the audio of clips",
    "avsi-app": "the same as a local web page",
    "avsi-prepare": "builds the dataset from raw Grid clips",
    "avsi-train": "trains a system",
    "avsi-evaluate": "evaluates a trained system and writes a report",
    "avsi-export": "writes a trained system as one jax.export program",
    "python -m avsi_jax.report": "writes a report again, or one that compares several runs",
    "python -m avsi_jax.weights": "writes a trained run as weights to share",
    "python -m avsi_jax.inference.refine": "trains a refiner on the predictions of a system",
    "python -m avsi_jax.landmarks": "verifies the face model files, or downloads them",
}


def main() -> None:
    """Prints the commands; each has --help."""
    width = max(map(len, COMMANDS))
    print(f"avsi_jax {avsi_jax.__version__}: restores missing speech from the surrounding audio and the speaker's lips\n")
    print("\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items()))


if __name__ == "__main__":
    main()
