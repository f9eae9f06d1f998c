"""SVDQ FLUX Sampler: guidance and sampling in one node, on ComfyUI's own sampling code."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import node_helpers
from comfy_api.latest import io

# ComfyUI's nodes.py; this package's own "nodes" is only ever reached by relative imports.
from nodes import ConditioningZeroOut, common_ksampler

MAX_SEED = 0xFFFFFFFFFFFFFFFF


class SVDQFluxSampler(io.ComfyNode):
    """KSampler with the settings that FLUX needs: distilled guidance, no negative prompt unless one is connected."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQFluxSampler",
            display_name="SVDQ FLUX Sampler",
            category="SVDQ",
            description=(
                "Samples a FLUX model: sets the guidance on the prompt, then denoises the latent as KSampler does. "
                "Works with any FLUX MODEL. Without a negative prompt each step evaluates the model once."
            ),
            search_aliases=["ksampler", "sampler", "flux sampler", "flux guidance", "nunchaku", "denoise", "img2img"],
            inputs=[
                io.Model.Input("model", tooltip="The FLUX model that denoises the latent."),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="What to start from: an empty latent of the wanted size, or an encoded picture.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="The noise to start from. The same seed and settings give the same picture.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=10000,
                    tooltip="Number of denoising steps: about 20 to 30 for dev models, 4 for schnell.",
                ),
                io.Float.Input(
                    "guidance",
                    default=3.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip=(
                        "How strictly a dev model follows the prompt, at no cost in time: 2.5 to 4 for text to image, "
                        "10 to 30 for canny, depth and fill. schnell has no guidance and ignores it."
                    ),
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="euler",
                    tooltip="The sampling algorithm. euler is what FLUX was made with.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    default="simple",
                    tooltip="How the noise level falls from step to step. simple and beta suit FLUX.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 ignores the content of the latent, lower values keep more of it (image to image).",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    advanced=True,
                    tooltip=(
                        "Classifier-free guidance against the negative prompt; has no effect without one. "
                        "Anything but 1 doubles the time of a step."
                    ),
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What to avoid. Leave it unconnected for plain FLUX; it only acts with cfg above 1.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="The denoised latent, for a VAE decode node.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: list,
        latent_image: dict[str, Any],
        seed: int,
        steps: int,
        guidance: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        cfg: float,
        negative: list | None = None,
    ) -> io.NodeOutput:
        positive = node_helpers.conditioning_set_values(positive, {"guidance": guidance})
        if negative is None:
            # At cfg 1 ComfyUI never evaluates the negative; it only has to have the right shapes.
            (negative,), cfg = ConditioningZeroOut().zero_out(positive), 1.0
        else:
            negative = node_helpers.conditioning_set_values(negative, {"guidance": guidance})
        (latent,) = common_ksampler(
            model,
            seed,
            steps,
            cfg,
            sampler_name,
            scheduler,
            positive,
            negative,
            latent_image,
            denoise=denoise,
        )
        return io.NodeOutput(latent)
