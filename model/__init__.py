"""What lives inside ComfyUI's FLUX model. ``load_flux`` is the way in."""

from .core_names import require

require()  # before what would fail in less clear ways

from .kept_weights import WEIGHTS  # noqa: E402
from .load import load_flux  # noqa: E402

__all__ = ["WEIGHTS", "load_flux"]
