"""SVDQ Demo Prompt: a conditioning without text encoders, for the demo and for tiny checkpoints."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..loaders.demo_assets import demo_prompt_embedding


class SVDQDemoPrompt(io.ComfyNode):
    """Turns text into one token per byte, by formula: enough for the demo's tiny FLUX, which was trained on them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQDemoPrompt",
            display_name="SVDQ Demo Prompt (no text encoder)",
            category="SVDQ",
            is_experimental=True,
            description=(
                "For the demo only: turns each byte of a text into a token by formula, so that the demo's tiny FLUX, "
                "which was trained on such tokens, runs without the 5 GB text encoders. With a real FLUX checkpoint "
                "the picture has nothing to do with the text; use DualCLIPLoader and CLIP Text Encode there."
            ),
            search_aliases=["demo", "test prompt", "no text encoder", "dummy conditioning", "svdq"],
            inputs=[
                io.Model.Input("model", tooltip="The FLUX model to make a conditioning for; only its sizes are read."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="a sign that says hello",
                    tooltip=(
                        "What the picture should show. The demo's model knows signs that say a word of 2 to 7 small "
                        "letters, and coloured shapes."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="CONDITIONING",
                    tooltip="A stand-in for an encoded prompt, for the sampler's positive input.",
                )
            ],
        )

    @classmethod
    def execute(cls, model: Any, text: str) -> io.NodeOutput:
        flux = model.model.diffusion_model
        if not (hasattr(flux, "txt_in") and hasattr(flux, "vector_in")):
            raise ValueError(f"SVDQ Demo Prompt needs a FLUX model, got {type(flux).__name__}: use SVDQ FLUX Loader")
        context, pooled = demo_prompt_embedding(text, flux.txt_in.in_features, flux.vector_in.in_layer.in_features)
        return io.NodeOutput([[context, {"pooled_output": pooled}]])
