"""Downloads the face networks: `python -m avsi_jax.landmarks --fetch`. The code is in avsi_jax.face.landmarks."""

import sys

from avsi_jax.face.landmarks import main

if __name__ == "__main__":
    sys.exit(main())
