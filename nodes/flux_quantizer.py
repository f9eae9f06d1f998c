"""SVDQ Quantize: the MODEL of the graph, LoRAs included, becomes a 4-bit file calibrated on the graph's prompts."""

from __future__ import annotations

import os
from typing import Any

import comfy.model_management as management
import comfy.utils
import folder_paths
from comfy_api.latest import io, ui

from ..quantizer import job
from .conditioning_files import joined
from .flux_sampler import MAX_SEED
from .graph_model import NAME, FluxCalibration, GraphModel
from .model_files import FOLDER

FOLDERS = (FOLDER, "output")
_SUFFIX = ".safetensors"


class SVDQFluxQuantize(io.ComfyNode):
    """Makes an SVDQuant INT4 file; interrupted work goes on at the next run with the same inputs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQFluxQuantize",
            display_name="SVDQ Quantize",
            category="SVDQ",
            is_output_node=True,
            is_input_list=True,
            description=(
                "Makes a 4-bit SVDQuant file from a 16-bit FLUX.1 MODEL with its LoRAs. First the MODEL runs on your "
                "prompts, and what its layers see is recorded; then each layer is quantized so that its output stays "
                "near. SVDQ FLUX Loader reads the file. If you cancel, the next run with the same inputs goes on."
            ),
            search_aliases=[
                "quantize",
                "svdquant",
                "nunchaku",
                "deepcompressor",
                "int4",
                "4-bit",
                "compress model",
                "convert",
                "calibrate",
                "bake lora",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A FLUX.1 model in 16 bits (or fp8), from Load Diffusion Model. LoRAs are baked in.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip=(
                        "Encoded prompts like those that you use: 16 or more are good, one works. Conditioning "
                        "(Combine) puts them together, lists work too. Regions and ControlNets are ignored."
                    ),
                ),
                io.String.Input(
                    "filename",
                    default="svdq-int4_r32-my-flux",
                    tooltip="Name of the file without its ending; may have folders in it.",
                ),
                io.Combo.Input(
                    "folder",
                    options=list(FOLDERS),
                    default=FOLDER,
                    tooltip="diffusion_models: where SVDQ FLUX Loader finds it after pressing R. output: elsewhere.",
                ),
                io.Int.Input(
                    "rank",
                    default=32,
                    min=16,
                    max=job.MAX_RANK,
                    step=16,
                    tooltip="Rank of the 16-bit branch: more is nearer to the original and larger. 32 is usual.",
                ),
                io.Boolean.Input(
                    "gptq",
                    default=False,
                    tooltip="Let the weights of a layer make up for each other's rounding: better, slower.",
                ),
                io.Int.Input(
                    "width",
                    default=1024,
                    min=job.SIDES[0],
                    max=job.SIDES[1],
                    step=16,
                    tooltip="Width of the pictures that are computed to see the activations; they are not shown.",
                ),
                io.Int.Input(
                    "height", default=1024, min=job.SIDES[0], max=job.SIDES[1], step=16, tooltip="Their height."
                ),
                io.Int.Input(
                    "steps",
                    default=8,
                    min=1,
                    max=job.MAX_STEPS,
                    tooltip="Sampling steps for each prompt, spread over all noise levels: 8 for dev, 4 for schnell.",
                ),
                io.Int.Input(
                    "calibration_seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    tooltip="Of the noise, and of what is random in quantizing. The same inputs give the same file.",
                ),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace a file of that name."),
                io.Int.Input(
                    "iterations",
                    default=job.Settings.iterations,
                    min=1,
                    max=job.MAX_ITERATIONS,
                    advanced=True,
                    tooltip="Rounds of branch and codes for each layer: 1 is fast, 8 better.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(job.DTYPES),
                    default=job.Settings.dtype,
                    advanced=True,
                    tooltip="Type of scales, branches and unquantized layers. bf16 is what published files have.",
                ),
                io.Float.Input(
                    "target_error",
                    default=0.0,
                    min=0.0,
                    max=job.MAX_TARGET_ERROR,
                    step=0.01,
                    advanced=True,
                    tooltip=(
                        "Above 0: each layer gets the smallest rank, up to rank, with which the error of its output is "
                        "not larger than this part of it. 0.1 is a start. Other programs may expect one rank for all."
                    ),
                ),
                io.String.Input(
                    "keep_16bit",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Linears that are not quantized, by ComfyUI's names, with * for anything and blanks between: "
                        "double_blocks.0.* *.txt_mlp.2. Other programs cannot read such a file."
                    ),
                ),
                io.String.Input(
                    "keep_int8",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Linears that get 8 bits instead of 4, with 8-bit activations, named as in keep_16bit. Other "
                        "programs cannot read such a file."
                    ),
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The file that was written.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, **inputs: list[Any]) -> io.NodeOutput:
        from server import PromptServer  # which imports every node's module

        conditioning = joined(inputs.pop("conditioning"))
        single = {name: values[0] for name, values in inputs.items()}
        out = target(single["folder"], single["filename"])
        if os.path.exists(out) and not single["overwrite"]:
            raise ValueError(f"{out} exists: choose another filename, or switch overwrite on")
        model = GraphModel(single["model"])
        settings = job.Settings(
            single["rank"],
            single["dtype"],
            single["iterations"],
            single["calibration_seed"],
            gptq=single["gptq"],
            target_error=single["target_error"],
            keep_16bit=tuple(single.get("keep_16bit", "").split()),
            keep_int8=tuple(single.get("keep_int8", "").split()),
        )
        how = (single[name] for name in ("width", "height", "steps", "calibration_seed"))
        calibration = FluxCalibration(single["model"], conditioning, *how)
        bar = comfy.utils.ProgressBar(1)

        node_id, said = cls.hidden.unique_id if cls.hidden else None, ""

        def progress(done: int, total: int, what: str) -> None:
            nonlocal said
            management.throw_exception_if_processing_interrupted()
            what = what if what.startswith(job.WATCHING) else "quantizing"
            if what != said and node_id is not None:
                said = what
                PromptServer.instance.send_progress_text(what, node_id)
            bar.update_absolute(done, total)

        os.makedirs(os.path.dirname(out), exist_ok=True)
        # The loader looks for the variant in it.
        name = f"{NAME} {os.path.basename(model.files[0] if model.files else out)}"
        metadata = job.file_metadata(name, model.config, single["rank"])
        # Others lack float64.
        device = "cuda" if management.get_torch_device().type == "cuda" else "cpu"
        result = job.quantize(model, out, settings, metadata, device, single["overwrite"], progress, calibration)
        quality = result.report["summary"]["w4a4"]["calibration_sqnr_db"]
        text = f"{out}: {result.nbytes / 1e6:,.1f} MB; outputs of 4-bit layers {quality and quality['mean']} dB"
        return io.NodeOutput(out, ui=ui.PreviewText(text))


def target(folder: str, filename: str) -> str:
    """Absolute path of the file to write; raises ValueError for a name that is none or leads out of the folder."""
    if folder == FOLDER:
        folders = folder_paths.get_folder_paths(FOLDER)
        base = next((path for path in folders if os.path.basename(path) == FOLDER), folders[0])
    else:
        base = folder_paths.get_output_directory()
    base = os.path.abspath(base)
    name = filename.removesuffix(_SUFFIX)
    path = os.path.abspath(os.path.join(base, name + _SUFFIX))
    if not os.path.basename(name) or "\0" in name or os.path.commonpath([base, path]) != base:
        raise ValueError(f"filename {filename!r} is not a name inside the folder {base}: choose another one")
    return path
