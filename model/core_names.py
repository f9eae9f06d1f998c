"""Everything of ComfyUI below its public API that this pack uses, in one list, and a check of it.

Another ComfyUI may have renamed something. The check runs once, when ComfyUI loads the pack, so that this is said then
and not in the middle of a picture. It reads, and changes nothing.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from types import ModuleType

TESTED = "0.30.0"

# Module: what we take from it. "Class.method(a, b)": with parameters of these names · ".name": an attribute that the
# module's code has for models, patchers, patches and modules, where there is no definition to look for; it puts
# "weight" or "bias" before some that begin with an underscore.
NAMES = {
    "comfy.ldm.flux.layers": (
        "DoubleStreamBlock.forward(img, txt, vec, pe, attn_mask, modulation_dims_img, modulation_dims_txt, "
        "transformer_options)",
        "SingleStreamBlock.forward(x, vec, pe, attn_mask, modulation_dims, transformer_options)",
        "EmbedND.forward(ids)", "Modulation", "attention", ".axes_dim", ".hidden_size", ".img_attn", ".linear1",
        ".linear2", ".num_heads", ".theta", ".txt_mlp",
    ),
    "comfy.ldm.flux.math": ("attention", "optimized_attention"),
    "comfy.ldm.flux.model": ("Flux", ".double_blocks", ".pe_embedder", ".single_blocks"),
    "comfy.ldm.modules.attention": ("attention_pytorch",),
    "comfy.lora": ("calculate_weight(patches, weight, key, intermediate_dtype, original_weights)",),
    "comfy.memory_management": ("interpret_gathered_like(tensors, gathered)", "vram_aligned_size(tensor)"),
    "comfy.model_management": (
        "cast_to_device(tensor, device, dtype)", "current_stream(device)", "device_supports_non_blocking",
        "free_memory(memory_required, device)", "get_free_memory", "get_offload_stream(device)", "get_torch_device",
        "get_total_memory", "minimum_inference_memory", "pin_memory(tensor)", "resolve_gpu_device_option",
        "supports_fp64(device)", "sync_stream(device, stream)", "synchronize",
        "throw_exception_if_processing_interrupted", "unpin_memory(tensor)", ".as_context",
    ),
    "comfy.model_patcher": (
        "LowVramPatch(key, patches)", "ModelPatcher.__del__", "ModelPatcher.add_hook_patches(hook, patches)",
        "ModelPatcher.add_patches(patches)", "ModelPatcher.clone", "ModelPatcher.detach",
        "ModelPatcher.get_all_callbacks", "ModelPatcher._load_list", "ModelPatcher.loaded_size",
        "ModelPatcher.model_size", "ModelPatcher.model_state_dict(filter_prefix)",
        "ModelPatcher.model_state_dict_for_saving(model, prefix)",
        "ModelPatcher.patch_cached_hook_weights(cached_weights, key, memory_counter)",
        "ModelPatcher.patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)",
        "ModelPatcher.patch_weight_to_device(key, device_to, inplace_update, return_weight)",
        "ModelPatcher.partially_load(device_to, extra_memory, force_patch_weights)",
        "ModelPatcher.partially_unload(device_to, memory_to_free, force_patch_weights)",
        "ModelPatcher.pin_weight_to_device(key)", "ModelPatcher.unpatch_hooks(whitelist_keys_set)",
        "ModelPatcher.unpatch_model(device_to, unpatch_weights)", "ModelPatcher.unpin_weight(key)",
        "ModelPatcher.use_ejected", "ModelPatcherDynamic.load(dirty)", "ModelPatcherDynamic.partially_load",
        "get_key_weight", ".backup", ".cached_hook_patches", ".cached_patcher_init", ".comfy_force_cast_weights",
        ".comfy_patched_weights", ".current_weight_patches_uuid", ".force_cast_weights", ".lowvram_patch_counter",
        ".model_loaded_weight_memory", ".model_lowvram", ".patches", ".patches_uuid", ".pinned",
        ".weight_wrapper_patches", "._v", "._v_signature", "._lowvram_function", "._comfy_model_dtype",
    ),
    "comfy.ops": (
        "cast_bias_weight(s, input, dtype, device, bias_dtype, offloadable)", "manual_cast.Linear", "run_every_op",
        "uncast_bias_weight(s, weight, bias, offload_stream)", ".bias_function", ".comfy_need_lazy_init_bias",
        ".is_lowvram_patch", "._v", "._v_bias", "._v_signature", "._v_weight", ".weight_function",
        "._lowvram_function",
    ),
    "comfy.patcher_extension": ("CallbacksMP.ON_CLONE", "CallbacksMP.ON_DETACH", "CallbacksMP.ON_LOAD"),
    "comfy.quant_ops": ("QuantizedTensor",),
    "comfy.sample": ("prepare_noise", "sample"),
    "comfy.samplers": ("KSampler.SAMPLERS", "KSampler.SCHEDULERS"),
    "comfy.sd": ("load_diffusion_model_state_dict(sd, model_options, metadata, disable_dynamic)",),
    "comfy.utils": ("DISABLE_MMAP", "ProgressBar", "get_attr", "load_torch_file", "set_attr", "set_attr_param"),
    "comfy.weight_adapter": ("LoRAAdapter(loaded_keys, weights)",),
    "comfy.weight_adapter.base": ("WeightAdapterBase",),
    "comfy_aimdo.model_vbar": (
        "ModelVBAR(size, device)", "ModelVBAR.alloc(num_bytes)", "ModelVBAR.free_memory", "ModelVBAR.loaded_size",
        "ModelVBAR.prioritize", "vbar_fault(alloc)", "vbar_signature_compare(a, b)", "vbar_unpin(alloc)",
    ),
    "comfy_aimdo.torch": ("aimdo_to_tensor(alloc, device)",),
    "comfy_kitchen.tensor.base": (
        "BaseLayoutParams", "QuantizedLayout", "QuantizedTensor.__tensor_flatten__",
        "QuantizedTensor.__tensor_unflatten__", "QuantizedTensor.dequantize", "QuantizedTensor.layout_cls",
        "register_layout_class", "._layout_cls", "._params", "._qdata",
    ),
}  # fmt: skip
_NAME = re.compile(r"([\w.]+)(?:\(([^)]*)\))?")


def missing() -> list[str]:
    """What of ``NAMES`` the ComfyUI here has not, as "comfy.ops.run_every_op" or "comfy.lora.calculate_weight(key)"."""
    return [
        ".".join(filter(None, (module, name.lstrip("."))))
        for module, names in NAMES.items()
        for name in _absent(module, names)
    ]


def require() -> None:
    """Raise ImportError, one line, if ComfyUI lacks something."""
    absent = missing()
    if absent:
        try:
            version = importlib.import_module("comfyui_version").__version__
        except (ImportError, AttributeError):
            version = "of an unknown version"
        shown = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        raise ImportError(
            f"SVDQ FLUX: ComfyUI {version} is without {shown}, which this pack needs (tested with ComfyUI {TESTED}): "
            f"update the pack, or ComfyUI if it is the older one"
        )


def _absent(module_name: str, names: tuple[str, ...]) -> list[str]:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        return [""]
    return [name for name in names if not _is_there(module, *_NAME.fullmatch(name).groups())]


def _is_there(module: ModuleType, name: str, parameters: str | None) -> bool:
    if name.startswith("."):
        return name[1:] in _words(module)
    found = functools.reduce(lambda owner, part: getattr(owner, part, None), name.split("."), module)
    if found is None:
        return hasattr(module, name)
    if not parameters:
        return True
    accepted = inspect.signature(found).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        return True
    return all(parameter in accepted for parameter in re.split(r",\s*", parameters))


@functools.cache
def _words(module: ModuleType) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", inspect.getsource(module)))
