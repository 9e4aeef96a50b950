"""Trains a refiner on a trained system's predictions: `python -m avsi_jax.refine`; the code is in avsi_jax.inference.refine."""

import sys

from avsi_jax.inference.refine import main

if __name__ == "__main__":
    sys.exit(main())
