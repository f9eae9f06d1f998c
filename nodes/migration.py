"""What becomes of the nodes of ComfyUI-nunchaku when that pack is not installed.

Facts from its releases 0.1 to 1.2: node ids, names and order of their inputs. ComfyUI replaces a node only if no pack
has registered its id, so both packs can be installed (app/node_replace_manager.py). Its rules shape this table:

* The editor finds old widget values by position (``old_widget_ids``), a prompt for the API has them by name.
* A prompt has to have each input that is mapped, and ``_meta``, which the editor's exports have and programs leave out:
  ComfyUI 0.30.0 answers with "500 Internal Server Error" otherwise. ``complete_prompt`` adds what is absent.
* An input that carries a link keeps its name: while ComfyUI replaces the node before, it still looks for the old one.
* Outputs are mapped although their numbers stay the same: the editor drops the links of all others.
"""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyAPI, io

# ComfyUI's nodes.py; this package's own "nodes" is only ever reached by relative imports.
from nodes import NODE_CLASS_MAPPINGS

from .nunchaku import DATA_TYPES, LORA_SLOTS, NO_EQUIVALENT, NO_LORA

_LOADER_WIDGETS = ("model_path", "cache_threshold", "attention", "cpu_offload", "device_id", "data_type", "i2f_mode")
_ENCODER_WIDGETS = ("model_type", "text_encoder1", "text_encoder2", "t5_min_length", "use_4bit_t5", "int4_model")
_STACK_WIDGETS = tuple(f"lora_{kind}_{slot}" for slot in LORA_SLOTS for kind in ("name", "strength"))

# What an input means that a prompt does not have.
_DEFAULTS: dict[str, Any] = {
    "cache_threshold": 0.0,
    "device_id": 0,
    "data_type": DATA_TYPES[0],
    "t5_min_length": 512,
    **{f"lora_name_{slot}": NO_LORA for slot in LORA_SLOTS},
    **{f"lora_strength_{slot}": 1.0 for slot in LORA_SLOTS},
}

# Inputs of the nodes without equivalent that carry links; the others have a model.
_LINKS = {
    "NunchakuPulidApply": ("model", "image"),
    "NunchakuFluxPuLIDApplyV2": ("model", "image"),
    "NunchakuFluxIPAdapterApply": ("model", "image"),
    "NunchakuDepthPreprocessor": ("image",),
    "SVDQuantDepthPreprocessor": ("image",),
    "NunchakuModelMerger": (),
    "NunchakuWheelInstaller": (),
}


def node_replacements() -> list[io.NodeReplace]:
    """One replacement for each FLUX node that ComfyUI-nunchaku has had."""
    encoders = {name: name for name in ("text_encoder1", "text_encoder2", "t5_min_length")}
    return [
        _replace(
            "NunchakuFluxDiTLoader",
            "SVDQNunchakuFluxLoader",
            {name: name for name in ("cache_threshold", "device_id", "data_type")} | {"model_path": "model_name"},
            _LOADER_WIDGETS,
            left_out="attention, cpu_offload, i2f_mode",
        ),
        _replace(
            "SVDQuantFluxDiTLoader",
            "SVDQNunchakuFluxLoader",
            {"model_path": "model_name"},
            _LOADER_WIDGETS[:1],  # what follows differs from release to release
            left_out="cpu_offload, device_id",
        ),
        _replace(
            "NunchakuFluxLoraLoader",
            "LoraLoaderModelOnly",
            {"model": "model", "lora_name": "lora_name", "lora_strength": "strength_model"},
            ("lora_name", "lora_strength"),
        ),
        _replace(
            "SVDQuantFluxLoraLoader",
            "SVDQNunchakuLoraStack",
            {"model": "model", "lora_name": "lora_name_1", "lora_strength": "lora_strength_1"},
            ("lora_name", "lora_format", "base_model_name", "lora_strength", "save_converted_lora"),
            left_out="lora_format, base_model_name, save_converted_lora",
        ),
        _replace(
            "NunchakuFluxLoraStack",
            "SVDQNunchakuLoraStack",
            {"model": "model"} | {name: name for name in _STACK_WIDGETS},
            _STACK_WIDGETS,
        ),
        *(
            _replace(old, "SVDQNunchakuTextEncoders", encoders, _ENCODER_WIDGETS, left_out=left_out)
            for old, left_out in (
                ("NunchakuTextEncoderLoader", "use_4bit_t5, int4_model"),
                ("NunchakuTextEncoderLoaderV2", ""),
                ("SVDQuantTextEncoderLoader", "use_4bit_t5, t5_precision, int4_model"),
            )
        ),
        *(
            _replace(
                old,
                "SVDQNunchakuNoEquivalent",
                {name: name for name in _LINKS.get(old, ("model",))},
                (),
                old_node=old,
            )
            for old in NO_EQUIVALENT
        ),
    ]


def _replace(old: str, new: str, inputs: dict[str, str], widgets: tuple[str, ...], **values: str) -> io.NodeReplace:
    """inputs: old name -> new name · widgets: names of the old widgets in their order · values: new name -> value."""
    kept = [{"old_id": old_name, "new_id": new_name} for old_name, new_name in inputs.items()]
    return io.NodeReplace(
        new_node_id=new,
        old_node_id=old,
        old_widget_ids=list(widgets),
        input_mapping=[*kept, *({"new_id": name, "set_value": value} for name, value in values.items())],
        output_mapping=[{"old_idx": 0, "new_idx": 0}],
    )


def complete_prompt(request: dict[str, Any]) -> dict[str, Any]:
    """Add to the old nodes in the body of a POST to /prompt what ComfyUI needs to replace them; returns ``request``.

    A required input that is absent becomes an empty link, which ComfyUI's validation reports by name.
    """
    mappings = {entry.old_node_id: entry.input_mapping for entry in node_replacements()}
    for node in request.get("prompt", {}).values():
        kind = node.get("class_type")
        if kind not in mappings or kind in NODE_CLASS_MAPPINGS:
            continue
        # Programs that write null mean that there is none.
        node["_meta"] = node.get("_meta") or {}
        inputs = node["inputs"] = node.get("inputs") or {}
        for name in (entry["old_id"] for entry in mappings[kind] if "old_id" in entry):
            inputs.setdefault(name, _DEFAULTS.get(name, []))
    return request


async def register_replacements() -> None:
    """Tell ComfyUI; needs a running server."""
    for replacement in node_replacements():
        await ComfyAPI().node_replacement.register(replacement)
