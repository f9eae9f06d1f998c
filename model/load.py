"""Checkpoint -> ComfyUI MODEL."""

from __future__ import annotations

import logging

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
from comfy.patcher_extension import CallbacksMP
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from ..kernels import backend_for
from ..loaders import Checkpoint, PlainLayer, open_checkpoint
from .flux import fuse_blocks, give_back
from .kept_weights import WEIGHTS
from .layout_svdq import quantized_weight
from .ops import make_operations
from .patcher import adopt, quantized_modules

log = logging.getLogger(__name__)


def load_flux(
    path: str, precision: str = "auto", weights: str = "auto", disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """Load an SVDQuant INT4 FLUX checkpoint (file, legacy folder or saved model) into ComfyUI's own Flux.

    weights: what stays in VRAM where the arithmetic is INT8 (kept_weights.py). int4: the weights as they are; int8:
    INT8 copies beside them; auto: the copies where twice their size is free.

    Returns a MODEL as a stock loader would. ``disable_dynamic`` asks for a patcher without dynamic VRAM, as ComfyUI
    does through ``cached_patcher_init``. Raises loaders.CheckpointError, kernels.BackendUnavailable or ValueError.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}, expected one of {', '.join(WEIGHTS)}")
    backend = backend_for(comfy.model_management.get_torch_device(), precision)
    checkpoint = open_checkpoint(path, reader=_comfy_reader)
    for note in checkpoint.notes:
        log.warning("%s", note)
    sd, loras = state_dict(checkpoint)
    patcher = comfy.sd.load_diffusion_model_state_dict(
        sd,
        # Without an explicit type ComfyUI would take the most frequent one it sees, or float32 on a CPU.
        model_options={"custom_operations": make_operations(backend), "dtype": checkpoint.dtype},
        metadata=checkpoint.metadata,
        disable_dynamic=disable_dynamic,
    )
    if patcher is None:
        raise RuntimeError(f"{path}: ComfyUI does not recognise the model as FLUX; please report this with `inspect`")
    fuse_blocks(patcher.model.diffusion_model, backend, weights)
    if weights == "int8" and backend.precision != "int8":
        log.warning("SVDQ FLUX: weights int8 changes nothing: the arithmetic here is %s", backend.precision)
    patcher.add_patches(loras)
    patcher.add_callback(CallbacksMP.ON_DETACH, _on_detach)
    # Tells ComfyUI how to make a second, independent copy: for hooks, torch.compile and several GPUs.
    patcher.cached_patcher_init = (load_flux, (path, precision, weights))
    log.info(
        "SVDQ FLUX: %s, FLUX.1 %s, %d + %d blocks, rank %s, %s, %.2f GB; computes in %s: %s",
        checkpoint.format,
        checkpoint.variant,
        checkpoint.config.depth,
        checkpoint.config.depth_single_blocks,
        "/".join(str(rank) for rank in checkpoint.ranks),
        checkpoint.precision,
        checkpoint.file_bytes / 1e9,
        backend.precision,
        backend.reason,
    )
    return adopt(patcher)


def state_dict(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, LoRAAdapter]]:
    """(stock parameter names -> tensors, keys of parameters -> LoRAs that a saved model has beside them).

    Quantized layers are QuantizedTensors; everything shares the mapped file's memory.
    """
    sd: dict[str, Tensor] = {}
    loras: dict[str, LoRAAdapter] = {}
    for name, layer in checkpoint.layers():
        if isinstance(layer, PlainLayer):
            sd[f"{name}.weight"] = layer.weight
        else:
            sd[f"{name}.weight"] = quantized_weight(layer, checkpoint.dtype)
            if layer.lora is not None:
                down, up = layer.lora
                loras[f"diffusion_model.{name}.weight"] = LoRAAdapter(set(), (up, down, None, None, None, None))
        if layer.bias is not None:
            sd[f"{name}.bias"] = layer.bias
    return sd, loras


def _on_detach(patcher: comfy.model_patcher.ModelPatcher, unpatch_all: bool) -> None:
    """Graphs, INT8 copies and factors of LoRAs go when the model leaves the GPU, not when another clone takes its place
    or a clone is deleted."""
    if unpatch_all:
        give_back(patcher.model.diffusion_model)
        for module in quantized_modules(patcher.model):
            module.free()


def _comfy_reader(path: str):
    """Reads through ComfyUI, which knows its own options about mapping files and, in dynamic VRAM mode, reads slices of
    the file straight to the GPU."""
    return comfy.utils.load_torch_file(path).__getitem__
