"""SVDQ Save Conditioning and SVDQ Load Conditioning: encoded prompts as files."""

from __future__ import annotations

import os
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from ..loaders import CheckpointError
from ..quantizer.prompts import Prompt, read_prompts, write_prompts

_SUFFIX = ".safetensors"


class SVDQSaveConditioning(io.ComfyNode):
    """Writes one file with all prompts that arrive."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQSaveConditioning",
            display_name="SVDQ Save Conditioning",
            category="SVDQ",
            is_output_node=True,
            is_input_list=True,
            description=(
                "Writes encoded FLUX prompts into one file of the output folder. The command quantize takes it with "
                "--conditioning and then needs no text encoders; SVDQ Load Conditioning reads it back."
            ),
            search_aliases=["conditioning to file", "export prompt", "calibration prompts", "svdq"],
            inputs=[
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="One or more encoded prompts: Conditioning (Combine) puts them together, lists work too.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="svdq-prompts",
                    tooltip="Name in the output folder, to which a number is added; may have folders in it.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The file that was written.")],
        )

    @classmethod
    def execute(cls, conditioning: list[list], filename_prefix: list[str]) -> io.NodeOutput:
        given = joined(conditioning)
        prompts = [Prompt(text[0], pooled_output(extra)[0], extra.get("guidance")) for text, extra in given]
        folder, name, counter, _, _ = folder_paths.get_save_image_path(
            filename_prefix[0], folder_paths.get_output_directory()
        )
        path = os.path.join(folder, f"{name}_{counter:05}_{_SUFFIX}")
        write_prompts(path, prompts)
        return io.NodeOutput(path, ui=ui.PreviewText(f"{len(prompts)} prompts in {path}"))


class SVDQLoadConditioning(io.ComfyNode):
    """Reads such a file from the input folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQLoadConditioning",
            display_name="SVDQ Load Conditioning",
            category="SVDQ",
            description="Reads a file of SVDQ Save Conditioning: its prompts, combined, as SVDQ Quantize takes them.",
            search_aliases=["conditioning from file", "import prompt", "calibration prompts", "svdq"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=conditioning_names(),
                    tooltip="A .safetensors file of ComfyUI's input folder that SVDQ Save Conditioning has written.",
                )
            ],
            outputs=[io.Conditioning.Output(display_name="CONDITIONING", tooltip="All prompts of the file, combined.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        stat = os.stat(_conditioning_path(file))
        return f"{stat.st_size}|{stat.st_mtime_ns}"

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        conditioning = []
        for prompt in read_prompts(_conditioning_path(file)):
            extra: dict[str, Any] = {"pooled_output": prompt.pooled[None]}
            if prompt.guidance is not None:
                extra["guidance"] = prompt.guidance
            conditioning.append([prompt.context[None], extra])
        return io.NodeOutput(conditioning)


def conditioning_names() -> list[str]:
    """Files for the dropdown."""
    folder = folder_paths.get_input_directory()
    return sorted(name for name in os.listdir(folder) if name.endswith(_SUFFIX)) if os.path.isdir(folder) else []


def _conditioning_path(name: str) -> str:
    """Only listed names resolve, so that no name leads out of the folder."""
    if name not in conditioning_names():
        raise CheckpointError(f"file {name!r} is not in ComfyUI's input folder: put it there and press R")
    return os.path.join(folder_paths.get_input_directory(), name)


def joined(conditioning: list[list]) -> list:
    """The prompts of a list of CONDITIONINGs; raises ValueError if one is not for FLUX."""
    prompts = [prompt for one in conditioning for prompt in one]
    if not prompts:
        raise ValueError("the conditioning has no prompt in it: connect CLIP Text Encode")
    for _, extra in prompts:
        pooled_output(extra)
    return prompts


def pooled_output(extra: dict[str, Any]) -> Any:
    """[1, P]."""
    pooled = extra.get("pooled_output")
    if pooled is None:
        raise ValueError("the conditioning is not for FLUX (no pooled output): use DualCLIPLoader with type flux")
    return pooled
