"""Merges, copies, compilation and devices, on the quantized model and on its dense twin: the same latent."""

from __future__ import annotations

from types import SimpleNamespace

import compatibility_env
import pytest
import torch
from compatibility_env import ROUNDED_LIMIT, case, check, names, node, sample
from lora_files import lora_file, with_lora

pytestmark = pytest.mark.comfy

env, float32 = compatibility_env.env, compatibility_env.float32  # fixtures


@case("ModelMergeSimple with a 16-bit model", limit=ROUNDED_LIMIT)
def _(model, env):
    return sample(node("model_merging", "ModelMergeSimple", model, env.pair("krea")[1], 0.5), env)


@case("ModelMergeFlux1 with another quantized model, changed blocks", limit=ROUNDED_LIMIT)
def _(model, env):
    other = env.pair("krea")[0]
    ratios = {"double_blocks.0.": 0.2, "single_blocks.1.": 0.7}
    return sample(node("model_merging_model_specific", "ModelMergeFlux1", model, other, **ratios), env)


@case("Merged weights and MLP biases of quantized layers alone")
def _(model, env):
    merged = model.clone()
    other = env.pair("krea")[0].get_key_patches("diffusion_model.")
    for key, value in other.items():
        if "_blocks." in key and "norm" not in key and key.endswith((".weight", "mlp.2.bias", "linear2.bias")):
            assert merged.add_patches({key: value}, 0.3, 0.7)
    return sample(merged, env)


@case("ModelMergeSimple with itself", limit=ROUNDED_LIMIT, changes=False)
def _(model, env):
    return sample(node("model_merging", "ModelMergeSimple", model, model, 0.5), env)


@case("ModelMergeFlux1 with a 16-bit model, and a LoRA on both", limit=ROUNDED_LIMIT)
def _(model, env):
    other = with_lora(env.pair("krea")[1], lora_file(env, seed=3), 0.4)
    ratios = {"double_blocks.1.": 0.6, "single_blocks.0.": 0.3, "img_in.": 0.5, "final_layer.": 0.8}
    merged = node("model_merging_model_specific", "ModelMergeFlux1", with_lora(model, lora_file(env)), other, **ratios)
    return sample(with_lora(merged, lora_file(env, seed=4), 0.3), env)


@case("ModelMergeSubtract, then ModelMergeAdd", limit=ROUNDED_LIMIT)
def _(model, env):
    difference = node("model_merging", "ModelSubtract", env.pair("krea")[1], env.pair("dev")[1], 0.5)
    return sample(node("model_merging", "ModelAdd", model, difference), env)


@case("16-bit model merged with this one", limit=ROUNDED_LIMIT)
def _(model, env):
    return sample(node("model_merging", "ModelMergeSimple", env.pair("krea")[1], model, 0.5), env)


# ---- copies and devices


@case("torch.compile of a block as TorchCompileModel does it (backend eager), with a LoRA")
def _(model, env):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    # The node compiles the whole model with inductor or as CUDA graphs: minutes, or a GPU.
    compiled = with_lora(model, lora_file(env)).clone(disable_dynamic=True)
    set_torch_compile_wrapper(model=compiled, backend="eager", keys=["diffusion_model.single_blocks.1"])
    try:
        return sample(compiled, env)
    finally:
        torch._dynamo.reset()


@case("SelectModelDevice: cpu, after a LoRA")
def _(model, env):
    return sample(node("multigpu", "SelectModelDeviceNode", with_lora(model, lora_file(env)), "cpu"), env)


@case("MultiGPU CFG Split: two devices, a LoRA and a hook")
def _(model, env):
    import comfy.hooks
    import comfy.model_management as management

    if model.load_device.type != "cpu":
        pytest.skip("two devices that are one: only a CPU can do that")
    devices = [torch.device("cpu"), torch.device("cpu", 1)]  # to ComfyUI two devices, to PyTorch one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(management, "get_all_torch_devices", lambda exclude_current=False: devices)
        split = node("multigpu", "MultiGPUCFGSplitNode", with_lora(model, lora_file(env)), 2)
    (copy,) = split.get_additional_models_with_key("multigpu")
    assert copy.model is not model.model and copy.load_device == devices[1]
    hooks = comfy.hooks.create_hook_lora(lora_file(env, seed=5), 0.5, 0.0)
    positive = node("hooks", "ConditioningSetProperties", env.prompt, 1.0, "default", hooks=hooks)
    return sample(split, env, positive, cfg=2.0)


@case("A second, independent copy of the model (clone with force_deepcopy)")
def _(model, env):
    return sample(with_lora(model, lora_file(env)).clone(force_deepcopy=True), env)


# ---- the test


@pytest.mark.parametrize("name", names(__name__))
def test_same_latent_as_the_dense_model(name: str, env: SimpleNamespace) -> None:
    check(name, env)
