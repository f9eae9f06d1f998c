"""SVDQ FLUX Loader: a 4-bit checkpoint becomes a stock ComfyUI MODEL."""

from __future__ import annotations

from comfy_api.latest import io

from ..kernels import PRECISIONS
from ..model import WEIGHTS, load_flux
from .model_files import fingerprint, model_names, model_path


class SVDQFluxLoader(io.ComfyNode):
    """Loads SVDQuant INT4 FLUX.1 files: single safetensors files and legacy Nunchaku folders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQFluxLoader",
            display_name="SVDQ FLUX Loader",
            category="SVDQ",
            description=(
                "Loads a 4-bit SVDQuant FLUX.1 checkpoint (the files made for Nunchaku) into ComfyUI's own FLUX model. "
                "The output is a normal MODEL: KSampler, LoRA, ControlNet and guider nodes take it."
            ),
            search_aliases=[
                "nunchaku",
                "nunchaku flux dit loader",
                "svdquant",
                "svdq",
                "int4",
                "4-bit",
                "4bit",
                "w4a4",
                "quantized flux",
                "flux",
                "load diffusion model",
                "unet loader",
                "low vram",
            ],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_names(),
                    tooltip=(
                        "An SVDQuant INT4 FLUX.1 file (svdq-int4_...safetensors) or a legacy Nunchaku folder, from the "
                        "diffusion_models folders and those of extra_model_paths.yaml."
                    ),
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    tooltip=(
                        "Arithmetic of the 4-bit layers. auto takes the fastest that this device has: int4 (INT4 "
                        "tensor cores), int8 (INT8 tensor cores) or 16bit (any device, the most exact). "
                        "One that cannot run here is refused with the reason."
                    ),
                ),
                io.Combo.Input(
                    "weights",
                    options=list(WEIGHTS),
                    default="auto",
                    optional=True,
                    tooltip=(
                        "What stays in VRAM where the arithmetic is int8. int4: the weights as they are. int8: INT8 "
                        "copies too, which are not made anew in every step: faster, 9 GB more for FLUX.1. auto: copies "
                        "where twice their size is free when the model is loaded. ComfyUI takes them back first when "
                        "VRAM is short. The picture is the same."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip="FLUX with 4-bit weights, a normal MODEL for samplers, LoRA, ControlNet and guider nodes.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str, precision: str, weights: str = "auto") -> str:
        return fingerprint(model_path(model_name))

    @classmethod
    def execute(cls, model_name: str, precision: str, weights: str = "auto") -> io.NodeOutput:
        return io.NodeOutput(load_flux(model_path(model_name), precision=precision, weights=weights))
