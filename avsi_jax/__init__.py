"""avsi_jax: restores missing speech from the surrounding audio and the speaker's lips.

    from avsi_jax import Inpainter

docs/index.md lists the packages. Importing avsi_jax loads none of them: the names below are loaded on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avsi_jax.inpainting.api import FileRepair, Gap, Inpainter, Repair

__version__ = "0.1.0"
__all__ = ["FileRepair", "Gap", "Inpainter", "Repair", "__version__"]


def __getattr__(name: str) -> Any:
    """The public classes, imported (with jax and everything else they need) on first use."""
    if name in ("FileRepair", "Gap", "Inpainter", "Repair"):
        from avsi_jax.inpainting import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
