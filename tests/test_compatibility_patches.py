"""Patches of models, as stock nodes and other packs make them, on the quantized model and on its dense twin: the same
latent."""

from __future__ import annotations

from types import SimpleNamespace

import compatibility_env
import pytest
import torch
from compatibility_env import ROUNDED_LIMIT, case, check, names, node, run_guider, sample

pytestmark = pytest.mark.comfy

env, float32 = compatibility_env.env, compatibility_env.float32  # fixtures


@case('patches_replace["dit"], double and single block')
def _(model, env):
    model = model.clone()

    def replace(arguments: dict, extra: dict) -> dict:
        out = extra["original_block"](arguments)
        return {name: value * 1.05 for name, value in out.items()}

    model.set_model_patch_replace(replace, "dit", "double_block", 0)
    model.set_model_patch_replace(replace, "dit", "single_block", 1)
    return sample(model, env)


@case("attn1_patch and attn1_output_patch")
def _(model, env):
    model = model.clone()
    model.set_model_attn1_patch(lambda q, k, v, pe, attn_mask, extra_options: {"q": q * 1.1, "v": v * 0.9})
    model.set_model_attn1_output_patch(lambda attention, extra_options: attention * 1.1)
    return sample(model, env)


@case("post_input patch")
def _(model, env):
    model = model.clone()
    model.set_model_post_input_patch(lambda arguments: arguments | {"img": arguments["img"] * 1.1})
    return sample(model, env)


@case("DIFFUSION_MODEL wrapper")
def _(model, env):
    from comfy.patcher_extension import WrappersMP

    model = model.clone()
    model.add_wrapper_with_key(
        WrappersMP.DIFFUSION_MODEL, "test", lambda executor, *args, **kwargs: executor(*args, **kwargs) * 1.05
    )
    return sample(model, env)


@case("optimized_attention_override")
def _(model, env):
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda original, *args, **kwargs: (
        original(*args, **kwargs) * 1.1
    )
    return sample(model, env)


@case("EasyCache")
def _(model, env):
    return run_guider(node("custom_sampler", "CFGGuider", node("easycache", "EasyCacheNode", model, 5.0, 0.0, 1.0,
                      False), env.prompt, env.other, 2.0), env, model)  # fmt: skip


@case("LazyCache")
def _(model, env):
    return sample(node("easycache", "LazyCacheNode", model, 5.0, 0.0, 1.0, False), env, cfg=2.0)


@case("SkipLayerGuidanceDiT")
def _(model, env):
    return sample(node("slg", "SkipLayerGuidanceDiT", model, 3.0, 0.0, 1.0, "0", "1"), env, cfg=2.0)


@case("NAGuidance")
def _(model, env):
    return sample(node("nag", "NAGuidance", model, 5.0, 0.5, 1.5), env, cfg=2.0)


@case("CFGZeroStar")
def _(model, env):
    return sample(node("cfg", "CFGZeroStar", model), env, cfg=3.0)


@case("FreSca")
def _(model, env):
    return sample(node("fresca", "FreSca", model, 0.8, 1.5, 2), env, cfg=3.0)


@case("APG")
def _(model, env):
    return sample(node("apg", "APG", model, 0.5, 5.0, 0.1), env, cfg=3.0)


@case("TCFG")
def _(model, env):
    return sample(node("tcfg", "TCFG", model), env, cfg=3.0)


@case("EpsilonScaling")
def _(model, env):
    return sample(node("eps", "EpsilonScaling", model, 1.05), env)


@case("ScaleROPE")
def _(model, env):
    return sample(node("rope", "ScaleROPE", model, 1.5, 0.0, 1.5, 0.0, 1.0, 0.0), env)


@case("model_function_wrapper")
def _(model, env):
    model = model.clone()
    model.set_model_unet_function_wrapper(
        lambda apply, arguments: apply(arguments["input"], arguments["timestep"], **arguments["c"]) * 1.05
    )
    return sample(model, env)


@case("Sampler functions before and after CFG")
def _(model, env):
    model = model.clone()
    model.set_model_sampler_pre_cfg_function(lambda arguments: [out * 1.02 for out in arguments["conds_out"]])
    model.set_model_sampler_cfg_function(lambda arguments: arguments["cond"] * 2 - arguments["uncond"])
    model.set_model_sampler_post_cfg_function(lambda arguments: arguments["denoised"] * 1.02)
    return sample(model, env, cfg=3.0)


@case("Wrappers: OUTER_SAMPLE, CALC_COND_BATCH, APPLY_MODEL")
def _(model, env):
    from comfy.patcher_extension import WrappersMP

    model, seen = model.clone(), []
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL):

        def wrap(executor, *args, kind=kind, **kwargs):
            seen.append(kind)
            out = executor(*args, **kwargs)
            return out * 1.05 if isinstance(out, torch.Tensor) else out

        model.add_wrapper_with_key(kind, "test", wrap)
    out = sample(model, env)
    assert len(set(seen)) == 3
    return out


@case("Weight wrapper on quantized layers", limit=ROUNDED_LIMIT)  # it gets weights in the file's type
def _(model, env):
    model = model.clone()
    for layer in ("double_blocks.0.img_mlp.0", "double_blocks.1.txt_mlp.2", "double_blocks.0.img_mod.lin"):
        model.add_weight_wrapper(f"diffusion_model.{layer}.weight", lambda weight: weight * 1.25)
    return sample(model, env)


@case("Object patch of a block and of a layer's forward")
def _(model, env):
    model = model.clone()
    block = model.get_model_object("diffusion_model.single_blocks.0")
    layer = model.get_model_object("diffusion_model.double_blocks.0.img_mlp.0")
    block_forward, layer_forward = block.forward, layer.forward
    model.add_object_patch(
        "diffusion_model.single_blocks.0.forward", lambda *args, **kwargs: block_forward(*args, **kwargs) * 1.02
    )
    model.add_object_patch("diffusion_model.double_blocks.0.img_mlp.0.forward", lambda x: layer_forward(x) * 1.1)
    return sample(model, env)


@case("Forward hooks of PyTorch on a block and on layers")
def _(model, env):
    flux = model.model.diffusion_model
    handles = [
        flux.double_blocks[1].img_attn.qkv.register_forward_hook(lambda module, inputs, out: out * 1.1),
        flux.single_blocks[0].linear1.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.9,)),
        flux.single_blocks[1].register_forward_hook(lambda module, inputs, out: out * 1.01),
    ]
    try:
        return sample(model, env)
    finally:
        for handle in handles:
            handle.remove()


# ---- the test


@pytest.mark.parametrize("name", names(__name__))
def test_same_latent_as_the_dense_model(name: str, env: SimpleNamespace) -> None:
    check(name, env)
