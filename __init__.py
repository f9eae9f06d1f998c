"""ComfyUI node pack: SVDQuant INT4 FLUX checkpoints inside ComfyUI's own FLUX model."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Entry point of ComfyUI's V3 node API; returns the pack's ``ComfyExtension``."""
    from .nodes import SVDQExtension

    return SVDQExtension()
