"""Nodes that take the place of ComfyUI-nunchaku's in workflows made for it; migration.py says which and how.

They take the old settings under their old names, hand them to ComfyUI's own means, and name those that were left out.
New workflows do not need them: they are marked as deprecated, which keeps them out of the editor's lists.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io

# ComfyUI's nodes.py; this package's own "nodes" is only ever reached by relative imports.
from nodes import NODE_CLASS_MAPPINGS, DualCLIPLoader, LoraLoaderModelOnly

from ..loaders import CheckpointError
from ..loaders.recognise import FOUR_BIT_ENCODER
from ..loaders.safetensors_file import problem, read_header
from ..model import load_flux
from .model_files import fingerprint, model_names, model_path

log = logging.getLogger(__name__)

LORA_SLOTS = range(1, 16)
NO_LORA = "None"
SMALLEST_STRENGTH = 1e-5  # below it Nunchaku does not load the LoRA
DATA_TYPES = ("bfloat16", "float16")
EASY_CACHE = {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}  # its defaults

_PULID = (
    "use a PuLID pack for ComfyUI's own FLUX (ComfyUI_PuLID_Flux_ll is one; not tested here), or bypass this node "
    "(Ctrl+B) to run without PuLID"
)
_IP_ADAPTER = (
    "use ComfyUI's own Redux (Apply Style Model) or an IP-Adapter pack for ComfyUI's own FLUX (none tested here), or "
    "bypass this node (Ctrl+B) to run without IP-Adapter"
)
_DEPTH = (
    "use ComfyUI's own Depth Anything 3 nodes, or connect a finished depth map in place of the picture and bypass this "
    "node (Ctrl+B)"
)
NO_EQUIVALENT = {
    "NunchakuPulidLoader": _PULID,
    "NunchakuPulidApply": _PULID,
    "NunchakuPuLIDLoaderV2": _PULID,
    "NunchakuFluxPuLIDApplyV2": _PULID,
    "NunchakuIPAdapterLoader": _IP_ADAPTER,
    "NunchakuFluxIPAdapterApply": _IP_ADAPTER,
    "NunchakuDepthPreprocessor": _DEPTH,
    "SVDQuantDepthPreprocessor": _DEPTH,
    "NunchakuModelMerger": "SVDQ FLUX Loader reads the folder as it is; remove this node",
    "NunchakuWheelInstaller": "this pack has nothing to install; remove this node",
}
"""Node of Nunchaku -> what to do instead."""


def left_out_input(tooltip: str) -> io.String.Input:
    # One line: when it replaces a node, the editor does not draw the larger text boxes until the workflow is reopened.
    return io.String.Input("left_out", optional=True, tooltip=tooltip)


class SVDQNunchakuFluxLoader(io.ComfyNode):
    """SVDQ FLUX Loader with those settings of Nunchaku's loader that mean something in ComfyUI."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQNunchakuFluxLoader",
            display_name="SVDQ FLUX Loader (Nunchaku workflow)",
            category="SVDQ",
            is_deprecated=True,
            description=(
                "Takes the place of Nunchaku FLUX DiT Loader in old workflows. In new ones use SVDQ FLUX Loader, with "
                "EasyCache, Select Model Device and ModelComputeDtype behind it where you want them."
            ),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_names(),
                    tooltip="An SVDQuant INT4 FLUX.1 file or a legacy Nunchaku folder, from diffusion_models.",
                ),
                io.Float.Input(
                    "cache_threshold",
                    optional=True,
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip=(
                        "Above 0: ComfyUI's EasyCache skips steps, with its own default settings. Nunchaku's number "
                        "measures something else and is not used."
                    ),
                ),
                io.Int.Input(
                    "device_id",
                    optional=True,
                    default=0,
                    min=0,
                    max=63,
                    tooltip="Above 0: the GPU with this number, as Select Model Device does. 0: ComfyUI's choice.",
                ),
                io.Combo.Input(
                    "data_type",
                    optional=True,
                    options=list(DATA_TYPES),
                    default=DATA_TYPES[0],
                    tooltip="float16: compute in it, as ModelComputeDtype does. bfloat16: ComfyUI's choice.",
                ),
                left_out_input(
                    "Settings of the old node that mean nothing here, for your information: ComfyUI chooses attention "
                    "and memory use itself, and i2f_mode is about kernels that this pack does not have."
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="FLUX with 4-bit weights, a normal MODEL.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str, **settings: Any) -> str:
        return fingerprint(model_path(model_name))

    @classmethod
    def execute(
        cls,
        model_name: str,
        cache_threshold: float = 0.0,
        device_id: int = 0,
        data_type: str = DATA_TYPES[0],
        left_out: str = "",
    ) -> io.NodeOutput:
        report_left_out(left_out)
        model = load_flux(model_path(model_name))
        if device_id > 0:
            device = f"gpu:{device_id}"
            if comfy.model_management.resolve_gpu_device_option(device) is None:
                log.warning("Nunchaku workflow: there is no GPU %d here; ComfyUI's default device is used", device_id)
            else:
                model = stock_node("SelectModelDevice", model=model, device=device)
        if data_type == "float16":
            model = model.clone()
            model.set_model_compute_dtype(torch.float16)
        if cache_threshold > 0:
            log.warning(
                "Nunchaku workflow: EasyCache with reuse_threshold %g in place of cache_threshold %g",
                EASY_CACHE["reuse_threshold"],
                cache_threshold,
            )
            model = stock_node("EasyCache", model=model, **EASY_CACHE)
        return io.NodeOutput(model)


class SVDQNunchakuLoraStack(io.ComfyNode):
    """LoraLoaderModelOnly, once for each slot that is in use."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        loras = [NO_LORA, *folder_paths.get_filename_list("loras")]
        slots: list[io.Input] = []
        for slot in LORA_SLOTS:
            slots += [
                io.Combo.Input(
                    f"lora_name_{slot}", optional=True, options=loras, tooltip=f"LoRA {slot}; None leaves the slot out."
                ),
                io.Float.Input(
                    f"lora_strength_{slot}",
                    optional=True,
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip=f"Strength of LoRA {slot}. It can be negative.",
                ),
            ]
        return io.Schema(
            node_id="SVDQNunchakuLoraStack",
            display_name="LoRA Stack (Nunchaku workflow)",
            category="SVDQ",
            is_deprecated=True,
            description=(
                "Takes the place of Nunchaku FLUX LoRA Stack in old workflows. In new ones put one LoraLoaderModelOnly "
                "behind the other: this node does the same."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that the LoRAs change."),
                *slots,
                left_out_input("Settings of the old node that mean nothing here: LoRAs need no conversion."),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The model with all LoRAs.")],
        )

    @classmethod
    def execute(cls, model: Any, left_out: str = "", **slots: Any) -> io.NodeOutput:
        report_left_out(left_out)
        for slot in LORA_SLOTS:
            name, strength = slots.get(f"lora_name_{slot}", NO_LORA), slots.get(f"lora_strength_{slot}", 1.0)
            if name != NO_LORA and abs(strength) >= SMALLEST_STRENGTH:
                (model,) = LoraLoaderModelOnly().load_lora_model_only(model, name, strength)
        return io.NodeOutput(model)


class SVDQNunchakuTextEncoders(io.ComfyNode):
    """DualCLIPLoader for FLUX, then the shortest length of T5's input as T5TokenizerOptions sets it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        encoders = folder_paths.get_filename_list("text_encoders")
        return io.Schema(
            node_id="SVDQNunchakuTextEncoders",
            display_name="FLUX Text Encoders (Nunchaku workflow)",
            category="SVDQ",
            is_deprecated=True,
            description=(
                "Takes the place of Nunchaku Text Encoder Loader (V2) in old workflows. In new ones use DualCLIPLoader "
                "of type flux, with T5 Tokenizer Options behind it if you want the padding that Nunchaku used."
            ),
            inputs=[
                io.Combo.Input("text_encoder1", options=encoders, tooltip="CLIP-L or T5-XXL, in any order."),
                io.Combo.Input("text_encoder2", options=encoders, tooltip="The other one of the two."),
                io.Int.Input(
                    "t5_min_length",
                    optional=True,
                    default=512,
                    min=0,
                    max=10000,
                    tooltip="Prompts are padded to this many T5 tokens. ComfyUI's own number for FLUX is 256.",
                ),
                left_out_input(
                    "Settings of the old node that mean nothing here, for your information: Nunchaku's 4-bit T5 cannot "
                    "be read. Choose t5xxl_fp8_e4m3fn_scaled.safetensors or t5xxl_fp16.safetensors."
                ),
            ],
            outputs=[io.Clip.Output(display_name="CLIP", tooltip="Both text encoders, for CLIP Text Encode.")],
        )

    @classmethod
    def execute(
        cls, text_encoder1: str, text_encoder2: str, t5_min_length: int = 512, left_out: str = ""
    ) -> io.NodeOutput:
        report_left_out(left_out)
        for name in (text_encoder1, text_encoder2):
            refuse_4bit_encoder(folder_paths.get_full_path_or_raise("text_encoders", name))
        (clip,) = DualCLIPLoader().load_clip(text_encoder1, text_encoder2, "flux")
        clip = clip.clone()
        clip.set_tokenizer_option("t5xxl_min_length", t5_min_length)
        return io.NodeOutput(clip)


class SVDQNunchakuNoEquivalent(io.ComfyNode):
    """Stands where a node was that nothing replaces: keeps its links, and says what to do when the workflow is run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQNunchakuNoEquivalent",
            display_name="No Equivalent (Nunchaku workflow)",
            category="SVDQ",
            is_deprecated=True,
            description=(
                "Takes the place of a Nunchaku node that has no equivalent. The workflow does not run with it; the "
                "error says what to use instead. Bypass the node (Ctrl+B) to run the workflow without it."
            ),
            inputs=[
                io.Model.Input("model", optional=True, tooltip="What was connected to the old node."),
                io.Image.Input("image", optional=True, tooltip="What was connected to the old node."),
                io.Combo.Input("old_node", options=list(NO_EQUIVALENT), tooltip="The node that was here."),
            ],
            outputs=[io.AnyType.Output(display_name="*", tooltip="Nothing: where the old node was connected.")],
        )

    @classmethod
    def validate_inputs(cls, old_node: str) -> str:
        return f"{old_node} has no equivalent: {NO_EQUIVALENT.get(old_node, 'remove this node, or bypass it (Ctrl+B)')}"

    @classmethod
    def execute(cls, old_node: str, **inputs: Any) -> io.NodeOutput:
        raise RuntimeError(cls.validate_inputs(old_node))


def report_left_out(names: str) -> None:
    """Tell the person who reads the log which settings have no effect."""
    if names:
        log.warning("Nunchaku workflow: left out %s", names)


def stock_node(node_id: str, **inputs: Any) -> Any:
    """First output of one of ComfyUI's own V3 nodes."""
    return NODE_CLASS_MAPPINGS[node_id].execute(**inputs)[0]


def refuse_4bit_encoder(path: str) -> None:
    """Raise CheckpointError for Nunchaku's 4-bit T5. Files that cannot be examined are left to ComfyUI's loader."""
    try:
        tensors = read_header(path).tensors
    except CheckpointError:
        return
    key = next((name for name in tensors if name.endswith(".qweight")), None)
    if key is not None:
        what, remedy = FOUR_BIT_ENCODER
        raise problem(os.path.basename(path), key, what, "a text encoder of 8 or 16 bits", remedy)
