"""What stays, goes and is said when LoRAs are added, changed, shared, removed, or do not fit."""

from __future__ import annotations

from types import SimpleNamespace

import compatibility_env
import pytest
import torch
from compatibility_env import LIMIT, node, sample
from flux_models import relative
from lora_files import FAMILIES, LAYERS, NAMINGS, drawer, logged, lora_file, named_lora, with_lora

pytestmark = pytest.mark.comfy

env, float32 = compatibility_env.env, compatibility_env.float32  # fixtures

KINDS = ("LoRA", "DoRA", "LoHa", "LoKr", "GLoRA", "OFT", "BOFT", "full difference", "set", "bias difference")


def kind(env: SimpleNamespace, name: str, **options) -> dict[str, torch.Tensor]:
    return lora_file(env, FAMILIES[name], **options)


def test_two_branches_of_one_graph_with_different_loras(env: SimpleNamespace) -> None:
    """Two branches of one graph with different LoRAs, in turns: each gives its own bits, and the base model its own."""
    base = env.pair("dev")[0]
    first, second = with_lora(base, kind(env, "LoRA")), with_lora(base, kind(env, "LoHa", seed=5), -0.6)
    both = with_lora(first, kind(env, "LoKr", seed=6))
    expected = [sample(model, env) for model in (first, second, both)]
    for _ in range(2):
        assert torch.equal(sample(second, env), expected[1])
        assert torch.equal(sample(base, env), env.plain("dev"))
        assert torch.equal(sample(first, env), expected[0])
        assert torch.equal(sample(both, env), expected[2])


@pytest.mark.parametrize("name", KINDS)
def test_removing_restores_every_bit(name: str, env: SimpleNamespace) -> None:
    """Adding and removing a LoRA of every kind, also on 16-bit layers: every bit is as before."""
    import comfy.model_management as management

    base = env.pair("dev")[0]
    layers = (*LAYERS, "img_in", "final_layer.linear")
    patched = with_lora(base, kind(env, name, layers=layers))
    once = sample(patched, env)
    assert not torch.equal(once, env.plain("dev"))
    assert torch.equal(sample(base, env), env.plain("dev"))
    assert torch.equal(sample(patched, env), once)
    management.unload_all_models()
    assert torch.equal(sample(base, env), env.plain("dev"))


@pytest.mark.parametrize("name", ["LoRA", "LoHa", "set"])
def test_another_strength_needs_no_fresh_model(name: str, env: SimpleNamespace) -> None:
    """Another strength gives the bits of a fresh model with that strength; 0 gives those of none."""
    base, lora = env.pair("dev")[0], kind(env, name)
    strong = sample(with_lora(base, lora, 0.9), env)
    weak = sample(with_lora(base, lora, 0.3), env)
    assert torch.equal(sample(with_lora(base, dict(lora), 0.9), env), strong)
    if name != "set":  # which has no strength, as in ComfyUI
        assert relative(weak, strong) > 1e-3
        assert torch.equal(sample(with_lora(base, lora, 0.0), env), env.plain("dev"))


@pytest.mark.parametrize("strength", [0.0, 0.5])
@pytest.mark.parametrize("name", FAMILIES)
def test_patches_without_effect_are_known(name: str, strength: float, env: SimpleNamespace) -> None:
    # Those that leave a weight as it is in ComfyUI's own arithmetic. At strength 0 that is all but ``set``.
    import comfy.lora

    from svdq.model.lora import has_effect

    quantized, dense = env.pair("dev")
    leaf = "bias" if name == "bias difference" else "weight"
    key = f"diffusion_model.{LAYERS[1]}.{leaf}"
    patches = with_lora(quantized, kind(env, name, layers=LAYERS[1:2])).patches[key]
    shape = dense.model.get_parameter(key).shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for patch in patches:
        patch = (strength, *patch[1:])
        changed = not torch.equal(comfy.lora.calculate_weight([patch], weight.clone(), key), weight)
        assert has_effect(patch) == changed == (strength != 0.0 or name == "set")
        for other in ((strength, patch[1], 0.5, *patch[3:]), (strength, [(weight, None), patch], 0.5, *patch[3:])):
            assert has_effect(other), "the weight itself is scaled"
    merge = (0.0, [(weight, lambda value, **options: value)], 1.0, None, None)
    assert not has_effect(merge) and torch.equal(comfy.lora.calculate_weight([merge], weight.clone(), key), weight)


def test_a_lora_of_rank_0_is_none(env: SimpleNamespace) -> None:
    """A LoRA of rank 0 on a layer, as trainers write it for one that they left out, does nothing."""
    base, lora = env.pair("dev")[0], kind(env, "LoRA")
    name = "diffusion_model.double_blocks.1.img_attn.proj"
    empty = {f"{name}.lora_down.weight": torch.zeros(0, 256), f"{name}.lora_up.weight": torch.zeros(256, 0)}
    assert torch.equal(sample(with_lora(base, lora | empty), env), sample(with_lora(base, lora), env))


def test_order_does_not_matter(env: SimpleNamespace) -> None:
    """The order of LoRAs that add something does not matter."""
    base, latents = env.pair("dev")[0], []
    files = [kind(env, "LoRA", seed=3), kind(env, "LoHa", seed=4), kind(env, "LoRA", seed=5, layers=LAYERS[1:3])]
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        model = base
        for i in order:
            model = with_lora(model, files[i], 0.5)
        latents.append(sample(model, env))
    assert max(relative(latent, latents[0]) for latent in latents) <= LIMIT


@pytest.mark.parametrize("name", ["LoRA", "LoKr"])
def test_the_same_lora_twice(name: str, env: SimpleNamespace) -> None:
    """The same LoRA twice at half the strength is that LoRA once; with both signs it is none."""
    base, lora = env.pair("dev")[0], kind(env, name)
    twice = with_lora(with_lora(base, lora, 0.4), lora, 0.4)
    assert relative(sample(twice, env), sample(with_lora(base, lora, 0.8), env)) <= LIMIT
    opposite = with_lora(with_lora(base, lora, 0.8), lora, -0.8)
    assert relative(sample(opposite, env), env.plain("dev")) <= LIMIT


@pytest.mark.parametrize("naming", NAMINGS)
def test_as_many_keys_as_a_dense_model(naming: str, env: SimpleNamespace) -> None:
    """Every naming reaches the same layers as in a dense model."""
    quantized, dense = (with_lora(model, named_lora(naming)) for model in env.pair("dev"))
    assert {key: len(patches) for key, patches in quantized.patches.items()} == {
        key: len(patches) for key, patches in dense.patches.items()
    }


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_partly_loaded_model(share: float, env: SimpleNamespace) -> None:
    """A partly loaded model has the same LoRAs as a completely loaded one."""
    import comfy.model_management as management

    model = env.pair("dev")[0]
    for name in ("LoRA", "LoHa", "GLoRA"):  # no biases: those that are not resident are not rounded to 16 bits
        model = with_lora(model, kind(env, name), 0.3)
    expected = sample(model, env)
    management.unload_all_models()
    with pytest.MonkeyPatch.context() as patch:
        load = type(model).load
        budget = {"lowvram_model_memory": int(model.model_size() * share), "full_load": False}
        patch.setattr(type(model), "load", lambda self, device, **options: load(self, device, **(options | budget)))
        actual = sample(model, env)
        assert 0 < model.loaded_size() < model.model_size()
    management.unload_all_models()
    assert torch.equal(sample(env.pair("dev")[0], env), env.plain("dev"))
    assert relative(actual, expected) <= LIMIT


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_other_loras_leave_the_model_where_it_is(share: float, env: SimpleNamespace) -> None:
    """Another LoRA, and none, leave the model where it is, loaded as a whole or in part; LoRAs on 16-bit layers are
    applied by ComfyUI, which loads the model anew."""
    import comfy.model_management as management
    from comfy.model_patcher import ModelPatcher
    from comfy.patcher_extension import CallbacksMP

    base = env.pair("dev")[0]
    first, second = with_lora(base, kind(env, "LoRA")), with_lora(base, kind(env, "LoHa", seed=5), -0.6)
    plain_layer = with_lora(base, kind(env, "LoRA", layers=(*LAYERS, "img_in")))
    models, loads, told = [base, first, second, base, plain_layer, first, first], [], []
    expected = []
    for model in models:
        management.unload_all_models()
        expected.append(sample(model, env))
    management.unload_all_models()
    clones = [model.clone() for model in models]
    for clone in clones:
        clone.add_callback(CallbacksMP.ON_LOAD, lambda patcher, *_: told.append(patcher))
    load, part = ModelPatcher.load, int(base.model_size() * share)
    budget = {"lowvram_model_memory": part, "full_load": False} if share < 1 else {}

    def counted(self, device, **options):
        if self.model is base.model:
            loads.append(self)
        return load(self, device, **(options | (budget if self.model is base.model else {})))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelPatcher, "load", counted)
        for clone, latent in zip(clones, expected, strict=True):
            there = [getattr(module, "comfy_patched_weights", False) for module in base.model.modules()]
            assert relative(sample(clone, env), latent) <= (0 if share == 1 else LIMIT)
            if clone in clones[1:4]:
                assert there == [getattr(m, "comfy_patched_weights", False) for m in base.model.modules()]
    management.unload_all_models()
    if share == 1:
        assert loads == [clones[0], clones[4], clones[5]], "only with 16-bit layers, and back, is it loaded anew"
        assert told == clones[:6], "once for each change"


def test_dynamic_vram_keeps_what_loras_do_not_change(env: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy.model_patcher import ModelPatcherDynamic

    from svdq.model.patcher import SVDQModelPatcherDynamic, quantized_modules

    model = env.pair("dev")[0].model
    modules = quantized_modules(model)
    before, with_bias, without = modules[:3]
    assert not any(module.owns("bias") for module in modules[:3])

    def load(self, device, dirty: bool = False) -> None:
        """What core does to the modules of a model whose patches have changed, if it is ``dirty``."""
        for module in modules:
            if dirty:
                module._v_signature = None
            module.bias_lowvram_function = None
        with_bias.bias_lowvram_function = object()

    patcher = object.__new__(SVDQModelPatcherDynamic)  # one that is made needs the GPU's library
    patcher.model, patcher.backup = model, {}
    monkeypatch.setattr(ModelPatcherDynamic, "load", load)
    try:
        for module in modules:
            module._v, module._v_signature = object(), "there"
        before.bias_lowvram_function = object()
        patcher.load("cuda")
        assert all(module._v_signature == "there" for module in modules)
        before.bias_lowvram_function, with_bias.bias_lowvram_function = object(), None
        patcher.load("cuda", dirty=True)
        assert [module for module in modules if module._v_signature is None] == [before, with_bias]
        assert without._v_signature == "there"
    finally:
        for module in modules:
            del module._v, module._v_signature
            module.bias_lowvram_function = None


def test_dynamic_vram_leaves_small_parameters_in_their_place(
    env: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dynamic VRAM small weights stay in their place from picture to picture, and so do the CUDA graphs."""
    from comfy.model_patcher import ModelPatcherDynamic
    from comfy.utils import get_attr, set_attr_param

    from svdq.model.patcher import SVDQModelPatcherDynamic

    model = env.pair("dev")[0].model
    keys = [f"diffusion_model.single_blocks.0.norm.{name}_norm.weight" for name in ("query", "key")]
    stored = {key: get_attr(model, key) for key in keys}
    added = 0.0

    def load(self, *args: object, **kwargs: object) -> None:
        for key, backup in list(self.backup.items()):
            set_attr_param(model, key, backup.weight)
        for key in keys:
            self.backup[key] = SimpleNamespace(weight=get_attr(model, key))
            set_attr_param(model, key, stored[key].detach() + added)

    patcher = object.__new__(SVDQModelPatcherDynamic)  # one that is made needs the GPU's library
    patcher.model, patcher.backup = model, {}
    monkeypatch.setattr(ModelPatcherDynamic, "load", load)
    try:
        patcher.load("cuda")
        places = [get_attr(model, key).data_ptr() for key in keys]
        for added in (0.0, 0.5, 0.0):
            patcher.load("cuda")
            assert [get_attr(model, key).data_ptr() for key in keys] == places
            assert all(torch.equal(get_attr(model, key), stored[key] + added) for key in keys)
    finally:
        for key in keys:
            set_attr_param(model, key, stored[key])


# ---- what does not fit

WRONG = {
    "LoRA": lambda draw, n, k: {"lora_down.weight": draw(4, k + 64), "lora_up.weight": draw(n, 4)},
    "LoRA, as many values in another shape": lambda draw, n, k: {
        "lora_down.weight": draw(4, k // 2, scale=k**-0.5), "lora_up.weight": draw(n * 2, 4, scale=0.2),
    },
    "DoRA": lambda draw, n, k: {
        "lora_down.weight": draw(4, k), "lora_up.weight": draw(n, 4), "dora_scale": draw(n + 1, 1),
    },
    "LoHa": lambda draw, n, k: {f"hada_w{i}_{x}": draw(*s) for i in "12" for x, s in (("a", (n, 4)), ("b", (4, 9)))},
    "LoKr": lambda draw, n, k: {"lokr_w1": draw(4, 4), "lokr_w2": draw(5, 5)},
    "OFT": lambda draw, n, k: {"oft_blocks": draw(3, 5, 5), "alpha": torch.tensor(0.5)},
    "full difference": lambda draw, n, k: {"diff": draw(n, k + 1)},
    "bias difference": lambda draw, n, k: {"diff_b": draw(n + 1)},
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_patch_that_does_not_fit_is_named_once(name: str, env: SimpleNamespace) -> None:
    """A patch that does not fit is named in the log once, as in ComfyUI, and changes nothing; all others work."""
    layer = "double_blocks.1.txt_mlp.2"  # with unsigned activations: its bias is ours to patch, too
    latents, complaints = [], []
    for model in env.pair("dev"):
        right = with_lora(model, kind(env, "LoRA"))
        with logged() as messages:
            wrong = with_lora(right, lora_file(env, WRONG[name], layers=[layer]))
            latents.append(sample(wrong, env, steps=3))
        complaints.append([message for message in messages if layer in message])
        other = sample(right, env, steps=3)
        if "as many values" not in name:
            assert relative(latents[-1], other) <= LIMIT
    assert [len(messages) for messages in complaints] == ([0, 0] if "as many values" in name else [1, 1])
    assert relative(*latents) <= LIMIT
    if complaints[0]:
        assert complaints[0][0].split()[:2] == complaints[1][0].split()[:2]


def test_a_patch_that_does_not_fit_is_named_again_when_it_comes_back(env: SimpleNamespace) -> None:
    """A patch that does not fit is named again when it comes back after a run without it."""
    base = env.pair("dev")[0]
    wrong = with_lora(base, lora_file(env, WRONG["LoRA"], layers=LAYERS[:1]))
    with logged() as messages:
        for model in (wrong, wrong, base, wrong):
            assert torch.equal(sample(model, env), env.plain("dev"))
    assert len([message for message in messages if LAYERS[0] in message]) == 2


def test_keys_that_no_layer_has_are_named_once(env: SimpleNamespace) -> None:
    """Keys that no layer has are named once; the rest of the file works."""
    lora = lora_file(env) | {"lora_unet_double_blocks_99_img_attn_qkv.lora_up.weight": drawer(1)(768, 4)}
    with logged() as messages:
        latent = sample(with_lora(env.pair("dev")[0], lora), env)
    # ComfyUI may also collect models of other tests here, and say so.
    messages = [message for message in messages if "lora" in message.lower()]
    assert len(messages) == 1 and "99" in messages[0], messages
    assert torch.equal(latent, sample(with_lora(env.pair("dev")[0], lora_file(env)), env))


def test_a_lora_of_another_model_changes_nothing(env: SimpleNamespace) -> None:
    """A LoRA of another model, of which no key has a layer here, is named key by key and changes no bit."""
    draw = drawer(2)
    keys = [f"lora_unet_input_blocks_4_1_proj_in.lora_{side}.weight" for side in ("down", "up")]
    with logged() as messages:
        model = with_lora(env.pair("dev")[0], {key: draw(4, 4) for key in keys})
        assert torch.equal(sample(model, env), env.plain("dev"))
    assert all(any(key in message for message in messages) for key in keys)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, torch.nan) for name in ("LoRA", "LoHa", "LoKr", "full difference", "set", "bias difference")),
        ("LoRA", torch.inf),
        ("LoRA", -torch.inf),
    ],
)
def test_values_that_are_not_finite_are_refused(name: str, value: float, env: SimpleNamespace) -> None:
    """A LoRA with NaN or infinite values is refused by the node that loads it; the model is as before."""
    base, layer = env.pair("dev")[0], LAYERS[1]
    good, damaged = kind(env, name), kind(env, name, seed=3)
    next(tensor for key, tensor in damaged.items() if layer in key and tensor.ndim).view(-1)[-1] = value
    expected = sample(with_lora(base, good), env)
    patches = {key: list(found) for key, found in base.patches.items()}
    with pytest.raises(ValueError, match=rf"{layer}\S*: found NaN or infinite values \(in 1 of 5 ") as error:
        with_lora(base, damaged)
    assert str(error.value).endswith("use another one.") and "\n" not in str(error.value)
    assert base.patches == patches
    assert torch.equal(sample(base, env), env.plain("dev"))
    assert torch.equal(sample(with_lora(base, good), env), expected)


@pytest.mark.parametrize("part", ["alpha", "lora_down.weight in float8", "img_in"])
def test_one_nan_anywhere_is_found(part: str, env: SimpleNamespace) -> None:
    leaf, _, how = part.partition(" in ")
    layers = (*LAYERS, "img_in")
    lora = kind(env, "LoRA", layers=layers, dtype=torch.float8_e4m3fn if how else torch.float32)
    key = next(key for key in lora if leaf in key)
    lora[key] = (lora[key].float() * torch.nan).to(lora[key].dtype)
    with pytest.raises(ValueError, match="found NaN or infinite values \\(in 1 of 6 weights"):
        with_lora(env.pair("dev")[0], lora)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_only_what_is_not_finite_is_found(dtype: torch.dtype, env: SimpleNamespace) -> None:
    """Every value of float16, bfloat16 and float8 in a LoRA is told apart by its bits: finite or not."""
    from svdq.model.lora import _is_finite

    if dtype.itemsize <= 2:
        bits = torch.arange(1 << 8 * dtype.itemsize).to(torch.uint8 if dtype.itemsize == 1 else torch.uint16)
        values = bits.view(dtype)
    else:
        limits = torch.finfo(dtype)
        values = torch.tensor([0.0, limits.max, limits.tiny, torch.inf, torch.nan], dtype=dtype)
        values = torch.cat([values, -values])
    finite = values.float().isfinite() if dtype.itemsize <= 2 else values.isfinite()
    raw = torch.uint8 if dtype.itemsize == 1 else dtype  # torch 2.9 does not index float8 by a mask
    right, wrong = (values.view(raw)[which].view(dtype) for which in (finite, ~finite))
    assert _is_finite(right) and not finite.all()
    for value in wrong[:: max(1, len(values) // 512)]:
        row = right[:7].clone()
        row[3] = value
        assert not _is_finite(row) and not _is_finite(row[1::2]), value


def test_values_are_read_once(env: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not for every strength; but again when they have changed.
    from svdq.model import lora as model_lora

    read = []
    looks_finite = model_lora._looks_finite
    monkeypatch.setattr(model_lora, "_looks_finite", lambda value: read.append(value) or looks_finite(value))
    base, lora = env.pair("dev")[0], kind(env, "LoRA")
    for strength in (0.8, 0.3):
        with_lora(base, lora, strength)
        assert len(read) == sum(".lora_" in key for key in lora)
    key = next(key for key in lora if ".lora_" in key)
    lora[key][0, 0] = torch.nan
    with pytest.raises(ValueError, match="found NaN or infinite values"):
        with_lora(base, lora)
    with torch.inference_mode():  # in which ComfyUI's nodes run, and where tensors have no versions
        inner = {key: tensor.nan_to_num(0.1) for key, tensor in lora.items()}
        read.clear()
        for strength in (0.8, 0.3):
            with_lora(base, inner, strength)
        assert len(read) == sum(".lora_" in key for key in lora)


def test_a_hook_with_values_that_are_not_finite_is_refused(env: SimpleNamespace) -> None:
    """A hook of a LoRA with NaN is refused when sampling starts; the next run is as before."""
    import comfy.hooks

    base = env.pair("dev")[0]
    lora = {key: tensor * torch.nan for key, tensor in kind(env, "LoRA").items()}
    good = {key: tensor.nan_to_num(0.1) for key, tensor in lora.items()}

    def hooked(file: dict[str, torch.Tensor]) -> torch.Tensor:
        hooks = comfy.hooks.create_hook_lora(file, 0.5, 0.0)
        positive = node("hooks", "ConditioningSetProperties", env.prompt, 1.0, "default", hooks=hooks)
        return sample(base, env, positive)

    expected = hooked(good)
    with pytest.raises(ValueError, match="found NaN or infinite values"):
        hooked(lora)
    assert torch.equal(sample(base, env), env.plain("dev"))
    assert torch.equal(hooked(good), expected)


def test_a_layer_with_a_patch_that_does_not_fit_keeps_its_columns(env: SimpleNamespace) -> None:
    """A patch that does not fit does not keep a layer from the fast path."""
    base = env.pair("dev")[0]
    model = with_lora(with_lora(base, kind(env, "LoRA")), lora_file(env, WRONG["full difference"]))
    sample(model, env)
    layer = base.model.diffusion_model.double_blocks[0].img_attn.qkv
    columns, rest = layer._split_patches(torch.zeros(1, 256))
    assert columns.down.shape == (8, 256) and rest == []


def test_a_replaced_forward_keeps_a_layer_out_of_fused_blocks(env: SimpleNamespace) -> None:
    """A layer whose forward somebody replaced (a bypass LoRA) or hooked is not fused."""
    import comfy.sd

    base = env.pair("dev")[0]
    sample(base, env)
    layer = base.model.diffusion_model.double_blocks[0].img_attn.qkv
    assert layer.plain(torch.bfloat16)
    bypassed, _ = comfy.sd.load_bypass_lora_for_models(base, None, lora_file(env), 0.8, 0)
    bypassed.inject_model()
    assert not layer.plain(torch.bfloat16)
    bypassed.eject_model()
    assert layer.plain(torch.bfloat16)
    handle = layer.register_forward_hook(lambda *_: None)
    assert not layer.plain(torch.bfloat16)
    handle.remove()
    assert layer.plain(torch.bfloat16)


def test_a_lora_beside_the_kernel_of_a_modulation_layer(env: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modulation layers: the kernel gets a LoRA's factors, in one place for all strengths, or leaves it to PyTorch."""
    import comfy.model_management as management

    from svdq.kernels import reference

    base, lora = env.pair("dev")[0], kind(env, "LoRA", layers=("double_blocks.0.img_mod.lin",))
    linear = base.model.diffusion_model.double_blocks[0].img_mod.lin
    x = torch.randn(2, linear.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    given: list = []

    def linear_awq(x, weight, bias, factors=None):
        given.append(factors)
        if len(x) > 1:
            return None
        y = x.float() @ reference.dequantize_packed_awq(weight, x.dtype).float().t() + bias.float()
        return y if factors is None else y + x.float() @ factors[0].float().t() @ factors[1].float().t()

    for strength in (1.0, -0.5, 0.0, 1.0):
        patched = with_lora(base, lora, strength)
        management.load_models_gpu([patched])
        expected = linear(x)
        with monkeypatch.context() as patch:
            layers = SimpleNamespace(linear_awq=linear_awq, max_awq_rows=1)
            fake = SimpleNamespace(kernels=True, precision="int8", layers=layers)
            patch.setattr(type(linear), "backend", fake)
            found = torch.cat([linear(x[:1]), linear(x[1:])])
            assert relative(found, expected) < 6e-3
            assert torch.equal(linear(x), expected), "more rows than the kernel takes"
    pairs = [pair for pair in given if pair is not None]
    assert len(pairs) == 6 and {tuple(f.data_ptr() for f in pair) for pair in pairs[:4]} == {
        tuple(f.data_ptr() for f in pairs[0])
    }
    before, values = [f.data_ptr() for f in linear.factors(x)], [f.clone() for f in linear.factors(x)]
    other = kind(env, "LoRA", layers=("double_blocks.0.img_mod.lin",), seed=7)
    management.load_models_gpu([with_lora(base, other, 0.5)])
    assert [f.data_ptr() for f in linear.factors(x)] == before, "another LoRA of the same rank"
    assert not any(torch.equal(a, b) for a, b in zip(linear.factors(x), values, strict=True))
