"""ComfyUI node pack: SVDQuant INT4 FLUX checkpoints inside ComfyUI's own FLUX model."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Entry point of ComfyUI's V3 node API; returns the pack's ``ComfyExtension``."""
    from .nodes import SVDQExtensionWithMigration

    return SVDQExtensionWithMigration(_on_each_prompt)


def _on_each_prompt(handler):
    """Not part of ComfyUI's public API, and only there while a server runs: the server's list of prompt handlers."""
    from server import PromptServer

    PromptServer.instance.add_on_prompt_handler(handler)
