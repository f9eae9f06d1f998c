"""What ModelSave and CheckpointSave write for quantized layers: loaders/saved.py reads it back bit by bit.

Weights go to the file as they are. A LoRA becomes more columns of a layer's low-rank branch, exactly those with which
kernels run it; where the branch has no room, or there is none (modulation, INT8), it goes beside the weight, and the
loader adds it as a LoRA again. Biases get their patches. Everything else that core computes on dense weights (LoHa,
DoRA, merges and so on) has no 4-bit form: it is left out, and the log says so.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

import torch
from comfy.weight_adapter import LoRAAdapter
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor

from ..kernels.int4 import MAX_RANK
from ..loaders.saved import LORA_LEAVES
from . import lora
from .layout_svdq import SVDQInt4Layout, packed_parts
from .ops import QuantizedLinear, is_quantized

log = logging.getLogger(__name__)

_SHOWN = 3
_NAMES = {"loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT", "boft": "BOFT"}


class SaveMixin:
    """A patcher with this writes quantized layers with the patches that they can hold."""

    def model_state_dict_for_saving(self, model: torch.nn.Module | None = None, prefix: str = "") -> dict:
        modules = (self.model if model is None else model).named_modules()
        layers = {name: m for name, m in modules if isinstance(m, QuantizedLinear) and is_quantized(m.weight)}
        # Core would wrap each inner tensor into a lazily cast Parameter, which integer tensors cannot be (322). It
        # skips modules that count as patched already.
        marked = [m for m in layers.values() if not getattr(m, "comfy_patched_weights", False)]
        for module in marked:
            module.comfy_patched_weights = True
        try:
            saved = super().model_state_dict_for_saving(model, prefix)
        finally:
            for module in marked:
                del module.comfy_patched_weights
        left_out: dict[str, list[str]] = defaultdict(list)
        for name, module in layers.items():
            weight_patches = self.patches.get(f"{prefix}{name}.weight", [])
            bias_key = f"{prefix}{name}.bias"
            bias_patches = self.patches.get(bias_key, [])
            for patch in weight_patches:
                if not lora.is_plain(patch, (module.out_features, module.in_features)) and lora.has_effect(patch):
                    left_out[_kind(patch[1])].append(name)
            for leaf, tensor in _with_lora(module, weight_patches).items():
                saved[f"{name}.{leaf}"] = tensor
            if bias_patches and module.owns("bias"):
                saved[f"{name}.bias"] = _patched_bias(module, bias_patches, bias_key)
            elif bias_patches and bias_key not in self.backup:  # else core has applied them already
                bias = self.patch_weight_to_device(bias_key, device_to=self.load_device, return_weight=True)
                saved[f"{name}.bias"] = bias.detach().cpu()
        if left_out:
            remedy = "; to keep a merge, merge models in 16 bits and quantize the result" if "merge" in left_out else ""
            log.warning("SVDQ FLUX: the saved model is without %s%s", _listed(left_out), remedy)
        return saved


def _with_lora(module: QuantizedLinear, patches: list[lora.Patch]) -> dict[str, Tensor]:
    """Leaf -> tensor, for what plain LoRAs change in the saved form of a layer. On the CPU."""
    weight, shape = module.weight, (module.out_features, module.in_features)
    plain = [patch for patch in patches if lora.has_effect(patch) and lora.is_plain(patch, shape)]
    if not plain:
        return {}
    if weight._layout_cls == SVDQInt4Layout.__name__:
        columns = lora.build_columns(plain, shape, weight.device, weight._params.scale.dtype, None)
        parts = lora.extend_parts(packed_parts(weight._qdata, weight._params), weight._params.axis, columns)
        if max(part.rank for part in parts) <= MAX_RANK:
            names = ("weight",) if len(parts) == 1 else ("weight_head", "weight")
            return {
                f"{name}_{leaf}": factor.cpu()
                for name, part in zip(names, parts, strict=True)
                for leaf, factor in (("down", part.proj_down), ("up", part.proj_up))
            }
    # Not rounded: that is done in the type of the activations, as for the LoRA itself.
    columns = lora.build_columns(plain, shape, torch.device("cpu"), torch.float32, None)
    return dict(zip(LORA_LEAVES, (columns.down, columns.up), strict=True))


def _patched_bias(module: QuantizedLinear, patches: list[lora.Patch], key: str) -> Tensor:
    """float32 [N] on the CPU: the stored bias of a layer whose dense bias has ``patches``."""
    dense = module.convert_bias(module.bias)
    shift = dense - module.bias.float()
    return (lora.apply(patches, dense.clone(), key) - shift).cpu()


def _kind(value: Any) -> str:
    """What users call a patch."""
    if isinstance(value, LoRAAdapter):
        return "LoRA" if value.weights[4] is None else "DoRA"
    if isinstance(value, WeightAdapterBase):
        return _NAMES.get(value.name, value.name)
    if isinstance(value, list):
        return "merge"
    return {"set": "replacement", "model_as_lora": "model as LoRA"}.get(value[0], "full difference")


def _listed(left_out: dict[str, list[str]]) -> str:
    described = []
    for kind, found in sorted(left_out.items()):
        names = list(dict.fromkeys(found))
        more = ", ..." if len(names) > _SHOWN else ""
        layers = "layer" if len(names) == 1 else "layers"
        described.append(f"{kind} on {len(names)} quantized {layers} ({', '.join(names[:_SHOWN])}{more})")
    return "; ".join(described)
