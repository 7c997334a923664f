"""BLIP captioning, visual question answering and image-text matching behind one predictor.

For programs: `Blip`, which loads the models, `Match`, which it gives, and `UserError`, which it raises.
"""

from typing import TYPE_CHECKING, Any

from blip.errors import UserError

if TYPE_CHECKING:
    from blip.engine import Match
    from blip.library import Blip

__all__ = ["Blip", "Match", "UserError", "__version__"]
__version__ = "1.0.0"


def __getattr__(name: str) -> Any:
    """Import torch only for those who ask for what needs it."""
    if name in ("Blip", "Match"):
        from blip import library

        return getattr(library, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
