"""avsi_jax: speech with a hole and a video of the talking face become the speech, whole.

    from avsi_jax import Inpainter

The rooms, in the order the sound travels, are listed in docs/index.md. Importing this package loads none of them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avsi_jax.inpainting.api import Inpainter

__version__ = "0.1.0"
__all__ = ["Inpainter", "__version__"]


def __getattr__(name: str) -> Any:
    """`Inpainter`, loaded (with jax and all it needs) when it is first asked for."""
    if name == "Inpainter":
        from avsi_jax.inpainting.api import Inpainter

        return Inpainter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
