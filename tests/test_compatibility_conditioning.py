"""Conditionings, Redux and ControlNets, on the quantized model and on its dense twin: the same latent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import compatibility_env
import pytest
import torch
from compatibility_env import case, check, names, node, sample

pytestmark = pytest.mark.comfy

env, float32 = compatibility_env.env, compatibility_env.float32  # fixtures


# ---- conditioning


@case("Conditioning (Combine)")
def _(model, env):
    return sample(model, env, [*env.prompt, *env.other])


@case("Conditioning (Set Mask): regional prompts")
def _(model, env):
    set_mask = env.nodes.ConditioningSetMask().append
    left = set_mask(env.prompt, env.mask, "default", 1.0)[0]
    right = set_mask(env.other, 1 - env.mask, "default", 1.0)[0]
    return sample(model, env, [*left, *right])


@case("Conditioning timestep ranges")
def _(model, env):
    set_range = env.nodes.ConditioningSetTimestepRange().set_range
    return sample(model, env, [*set_range(env.prompt, 0.0, 0.3)[0], *set_range(env.other, 0.3, 1.0)[0]])


@case("Attention mask on the text")
def _(model, env):
    context, extra = env.prompt[0]
    tokens = context.shape[1]
    mask = torch.zeros(1, tokens + 16, tokens + 16)
    mask[:, :, : tokens // 2] = -10.0
    return sample(model, env, [[context, extra | {"attention_mask": mask, "attention_mask_img_shape": (4, 4)}]])


@case("Latent noise mask")
def _(model, env):
    return sample(model, env, latent=env.latent | {"noise_mask": env.mask[:, None]})


@case("DifferentialDiffusion")
def _(model, env):
    gradient = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    return sample(node("differential_diffusion", "DifferentialDiffusion", model), env,
                  latent=env.latent | {"noise_mask": gradient})  # fmt: skip


@case("Kontext: ReferenceLatent", "kontext")
def _(model, env):
    return sample(model, env, node("edit_model", "ReferenceLatent", env.prompt, env.latent))


@case("Kontext: two references, each method", "kontext")
def _(model, env):
    positive = node("edit_model", "ReferenceLatent", env.prompt, env.latent)
    positive = node("edit_model", "ReferenceLatent", positive, {"samples": env.latent["samples"].flip(-1)})
    out = []
    for method in ("offset", "index", "uxo/uno"):  # index_timestep_zero fails in ComfyUI 0.30.0 with any FLUX.1
        chosen = node("flux", "FluxKontextMultiReferenceLatentMethod", positive, method)
        out.append(sample(model, env, chosen))
    assert not torch.equal(out[0], out[1])
    return torch.cat(out)


@case("Fill: InpaintModelConditioning", "fill")
def _(model, env):
    positive, negative, latent = env.nodes.InpaintModelConditioning().encode(
        env.prompt, env.other, env.image, env.vae, env.mask
    )
    return sample(model, env, positive, negative=negative, latent=latent)


@case("Canny, Depth: InstructPixToPixConditioning", "canny")
def _(model, env):
    positive, negative, latent = node("ip2p", "InstructPixToPixConditioning", env.prompt, env.other, env.image, env.vae)
    return sample(model, env, positive, negative=negative, latent=latent)


@case("Conditioning (Set Area)")
def _(model, env):
    area = env.nodes.ConditioningSetArea().append(env.other, 32, 64, 0, 32, 0.7)[0]
    return sample(model, env, [*env.prompt, *area])


# ---- Redux


def redux(env: SimpleNamespace, positive: list, strength: float, strength_type: str) -> list:
    from comfy.ldm.flux.redux import ReduxImageEncoder
    from comfy.sd import StyleModel

    generator = torch.Generator().manual_seed(5)
    encoder = ReduxImageEncoder(redux_dim=24, txt_in_features=positive[0][0].shape[2]).requires_grad_(False)
    for parameter in encoder.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    seen = SimpleNamespace(last_hidden_state=torch.randn(1, 6, 24, generator=generator))
    return env.nodes.StyleModelApply().apply_stylemodel(positive, StyleModel(encoder), seen, strength, strength_type)[0]


@case("Redux: StyleModelApply")
def _(model, env):
    return sample(model, env, redux(env, env.prompt, 0.7, "multiply"))


@case("Redux: StyleModelApply, attn_bias, two pictures")
def _(model, env):
    return sample(model, env, redux(env, redux(env, env.prompt, 0.5, "attn_bias"), 0.3, "attn_bias"))


# ---- ControlNet, in every form that ComfyUI loads for FLUX


def control_net(env: SimpleNamespace, form: str, seed: int = 1, modes: int = 0, channels: int = 16) -> Any:
    """A network with one block of each kind as load_controlnet_state_dict reads it from a file of one form: "xlabs"
    (without single blocks), "mistoline" or "diffusers" (InstantX, Shakker and most others; ``modes`` for Union)."""
    import comfy.controlnet
    import comfy.ldm.flux.controlnet
    import comfy.ops
    import comfy.utils

    config = dict(env.pair("dev")[0].model.model_config.unet_config)
    config |= {"depth": 1, "depth_single_blocks": 0 if form == "xlabs" else 1, "dtype": torch.float32}
    if form == "diffusers":
        config |= {"latent_input": True, "control_latent_channels": channels, "num_union_modes": modes}
    network = comfy.ldm.flux.controlnet.ControlNetFlux(
        mistoline=form == "mistoline", operations=comfy.ops.manual_cast, **config
    )
    generator = torch.Generator().manual_seed(seed)
    sd = {name: torch.randn(value.shape, generator=generator) * 0.05 for name, value in network.state_dict().items()}
    if form == "diffusers":
        sources = comfy.utils.flux_to_diffusers(config)
        stock, sd = sd, {name: value for name, value in sd.items() if name.startswith("controlnet_")}
        for name, source in sources.items():
            key, part, *_ = (source, None) if isinstance(source, str) else source
            if key in stock:
                sd[name] = stock[key] if part is None else stock[key].narrow(*part).clone()
    else:
        sd = {name.replace("_norm.weight", "_norm.scale"): value for name, value in sd.items()}
    if form == "mistoline":
        sd = comfy.utils.state_dict_prefix_replace(sd, {"controlnet_single_blocks.": "single_controlnet_blocks."})
    return comfy.controlnet.load_controlnet_state_dict(sd, model_options={"dtype": torch.float32})


def controlled(model: Any, env: SimpleNamespace, *nets: Any, start: float = 0.0, end: float = 1.0) -> torch.Tensor:
    """Sample with networks on both conditionings."""
    positive, negative = env.prompt, env.other
    for net in nets:
        vae = env.vae if net.latent_format is not None else None
        positive, negative = env.nodes.ControlNetApplyAdvanced().apply_controlnet(
            positive, negative, net, env.image, 0.8, start, end, vae=vae
        )
    return sample(model, env, positive, negative=negative)


@case("ControlNet (InstantX form), twice at once")
def _(model, env):
    return controlled(model, env, *(control_net(env, "diffusers", seed) for seed in (1, 2)))


@case("ControlNet (Union: InstantX, Shakker), a type and auto")
def _(model, env):
    net = control_net(env, "diffusers", modes=7)
    out = [
        controlled(model, env, node("controlnet", "SetUnionControlNetType", net, kind)) for kind in ("depth", "auto")
    ]
    assert not torch.equal(*out)
    return torch.cat(out)


@case("ControlNet (XLabs form)")
def _(model, env):
    return controlled(model, env, control_net(env, "xlabs"))


@case("ControlNet (MistoLine form)")
def _(model, env):
    return controlled(model, env, control_net(env, "mistoline"))


@case("ControlNet (AliMama inpainting form)")
def _(model, env):
    positive, negative = node(
        "controlnet", "ControlNetInpaintingAliMamaApply", env.prompt, env.other,
        control_net(env, "diffusers", channels=17), env.vae, env.image, env.mask, 0.9, 0.0, 1.0,
    )  # fmt: skip
    return sample(model, env, positive, negative=negative)


@case("ControlNet, three forms at once, CFG 2, batch of 2")
def _(model, env):
    nets = (control_net(env, "xlabs"), control_net(env, "diffusers", 2), control_net(env, "diffusers", 3, modes=7))
    latent = {"samples": env.latent["samples"].repeat(2, 1, 1, 1)}
    positive, negative = env.prompt, env.other
    for net in nets:
        positive, negative = env.nodes.ControlNetApplyAdvanced().apply_controlnet(
            positive, negative, net, env.image, 0.5, 0.0, 1.0, vae=env.vae if net.latent_format else None
        )
    return sample(model, env, positive, negative=negative, latent=latent, cfg=2.0)


@case("ControlNet on a part of the steps")
def _(model, env):
    return controlled(model, env, control_net(env, "diffusers"), start=0.4)


# ---- the test


@pytest.mark.parametrize("name", names(__name__))
def test_same_latent_as_the_dense_model(name: str, env: SimpleNamespace) -> None:
    check(name, env)
