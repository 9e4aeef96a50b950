"""Writes a trained run as a folder of weights to share: `python -m avsi_jax.weights`; the code is in avsi_jax.inference.weights."""

import sys

from avsi_jax.inference.weights import main

if __name__ == "__main__":
    sys.exit(main())
