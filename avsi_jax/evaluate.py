"""The evaluation command: `python -m avsi_jax.evaluate`; the code is in avsi_jax.evaluation.cli."""

import sys

from avsi_jax.evaluation.cli import main

if __name__ == "__main__":
    sys.exit(main())
