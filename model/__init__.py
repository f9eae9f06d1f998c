"""What lives inside ComfyUI's FLUX model. ``load_flux`` is the way in."""

from .load import load_flux

__all__ = ["load_flux"]
