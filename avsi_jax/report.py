"""Reports of finished evaluations: `python -m avsi_jax.report`; the code is in avsi_jax.evaluation.report."""

import sys

from avsi_jax.evaluation.report import main

if __name__ == "__main__":
    sys.exit(main())
