"""The quantized model inside ComfyUI's own Flux, in this process: numbers, names, sizes, patches, clones."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from flux_models import forward, inputs, load_dense, relative

from svdq.loaders import CheckpointError, open_checkpoint

pytestmark = pytest.mark.comfy

TINY = "svdq-int4_r16-tinyflux.safetensors"
# Files -> options of synth: every shape of FLUX.1, both 16-bit types, both containers.
SYNTHETIC = {
    "dev": {},
    "schnell": {},
    "fill": {},
    "canny": {"rank": 16},
    "kontext": {"dtype": "fp16", "rank": 64},
    "krea": {"container": "folder"},
}
LORAS = ("lora_kohya_bfl_r4_alpha2", "lora_peft_r5_ragged", "lora_comfy_diffusion_model_r4")


@pytest.fixture(scope="module")
def checkpoint_path(tmp_path_factory: pytest.TempPathFactory):
    """Path of a tiny synthetic checkpoint by variant."""
    from svdq.cli.synth import synth

    folder = tmp_path_factory.mktemp("checkpoints")

    def make(variant: str) -> Path:
        options = SYNTHETIC[variant]
        path = folder / (variant if options.get("container") == "folder" else f"{variant}.safetensors")
        if not path.exists():
            synth(path, variant=variant, scale="tiny", seed=1, **options)
        return path

    return make


@pytest.fixture
def load(comfy):
    from svdq.model import load_flux

    return load_flux


@pytest.fixture
def tiny(golden: Path, load):
    """The golden tiny model, and its dense twin."""
    return load(str(golden / TINY)), load_dense(golden / TINY)


@pytest.fixture
def arguments(golden: Path):
    return inputs(open_checkpoint(golden / TINY))


def lora_patches(golden: Path, name: str) -> dict:
    import comfy.utils

    return comfy.utils.load_torch_file(str(golden / f"{name}.safetensors"))


def with_lora(patcher, lora: dict, strength: float = 1.0):
    import comfy.sd

    return comfy.sd.load_lora_for_models(patcher, None, lora, strength, 0)[0]


# ---- numbers


@pytest.mark.parametrize("variant", SYNTHETIC)
def test_16bit_equals_the_dense_model(variant: str, checkpoint_path, load) -> None:
    path = checkpoint_path(variant)
    arguments = inputs(open_checkpoint(path))
    expected = forward(load_dense(path), arguments)
    actual = forward(load(str(path), "16bit"), arguments)
    assert torch.isfinite(actual).all()
    assert torch.equal(actual, expected)


def test_golden_model_equals_its_dense_twin(tiny, arguments) -> None:
    quantized, dense = tiny
    assert torch.equal(forward(quantized, arguments), forward(dense, arguments))


def test_int4_arithmetic_is_close_to_16bit(golden: Path, tiny, arguments, load, monkeypatch) -> None:
    monkeypatch.setenv("SVDQ_BACKEND", "int4")
    int4 = load(str(golden / TINY))
    error = relative(forward(int4, arguments), forward(tiny[1], arguments))
    assert 1e-3 < error < 0.05  # measured 0.027: activations are quantized, and this model's weights are random


def test_a_lora_leaves_the_weights_where_they_are(checkpoint_path, load) -> None:
    """On another device than the one for offloaded weights, which takes what core sends there for good."""
    import comfy.sd

    path = checkpoint_path("dev")
    arguments, patcher = inputs(open_checkpoint(path)), load(str(path))
    expected = forward(patcher, arguments)
    hidden = patcher.model.diffusion_model.hidden_size
    lora = {
        f"diffusion_model.double_blocks.0.img_attn.qkv.lora_{side}.weight": torch.ones(*shape)
        for side, shape in {"down": (4, hidden), "up": (3 * hidden, 4)}.items()
    }
    models = [comfy.sd.load_lora_for_models(patcher, None, lora, strength, 0)[0] for strength in (1.0, 0.5)]
    for model in (patcher, *models):
        model.offload_device = torch.device("meta")
    outs = [forward(model, arguments) for model in (*models, patcher)]
    assert torch.equal(outs[-1], expected)
    assert all(relative(out, expected) > 1e-3 for out in outs[:-1])
    for model in (patcher, *models):
        model.offload_device = patcher.load_device


@pytest.mark.parametrize("inside", [True, False])
def test_moved_in_inference_mode_and_outside(checkpoint_path, load, inside: bool) -> None:
    """ComfyUI runs prompts in inference mode, and unloads on request or at exit outside of it."""
    import comfy.model_management as management
    import comfy.sd

    path = checkpoint_path("dev")
    arguments = inputs(open_checkpoint(path))
    with torch.inference_mode(inside):
        patcher = load(str(path))
        management.load_models_gpu([patcher])
    with torch.inference_mode():
        expected = forward(patcher, arguments)
        hidden = patcher.model.diffusion_model.hidden_size
        shapes = {"down": (4, hidden), "up": (3 * hidden, 4)}
        lora = {
            f"diffusion_model.double_blocks.0.img_attn.qkv.lora_{side}.weight": torch.ones(*shape)
            for side, shape in shapes.items()
        }
        forward(comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0)[0], arguments)
    management.unload_all_models()
    assert torch.equal(forward(patcher, arguments), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["golden", *SYNTHETIC])
def test_int4_kernels_agree_with_pytorch(variant: str, golden: Path, checkpoint_path, load, monkeypatch) -> None:
    """Codes that fall to the other side of a tie are amplified by a whole model of random weights, so the yardstick is
    the error of INT4 activations: both are equally far from 16-bit ones, and no further from each other than that."""
    path = golden / TINY if variant == "golden" else checkpoint_path(variant)
    arguments, outputs = inputs(open_checkpoint(path)), {}
    for backend in ("int4", "int4-reference", "16bit"):
        monkeypatch.setenv("SVDQ_BACKEND", backend)
        outputs[backend] = forward(load(str(path)), arguments)
    error = relative(outputs["int4-reference"], outputs["16bit"])
    print(f"{variant}: {relative(outputs['int4'], outputs['int4-reference']):.4f} apart, "
          f"{relative(outputs['int4'], outputs['16bit']):.4f} and {error:.4f} from 16bit")  # fmt: skip
    assert relative(outputs["int4"], outputs["int4-reference"]) <= error
    assert relative(outputs["int4"], outputs["16bit"]) <= 1.1 * error


def test_a_second_load_gives_the_same_bits(golden: Path, arguments, load) -> None:
    first, second = (forward(load(str(golden / TINY)), arguments) for _ in range(2))
    assert torch.equal(first, second)


# ---- what ComfyUI sees


def test_a_dropped_model_is_gone_at_once(comfy, golden: Path) -> None:
    """Its weights must not keep their memory until the garbage collector comes."""
    import gc
    import weakref

    from svdq.model import load_flux

    gc.collect()
    gc.disable()
    try:
        patcher = load_flux(str(golden / TINY))
        alive = [weakref.ref(module) for module in (patcher.model, *patcher.model.modules())]
        first, second = patcher.model.diffusion_model.double_blocks[0].img_mlp[::2]
        copied = copy.deepcopy(first._functions["weight"], {id(first): second})
        assert copied._module() is second
        del patcher, first, second, copied
        assert not [module() for module in alive if module() is not None]
    finally:
        gc.enable()


def test_stock_names_and_shapes(tiny) -> None:
    quantized, dense = (patcher.model for patcher in tiny)
    dense_shapes = {name: parameter.shape for name, parameter in dense.named_parameters()}
    assert {name: parameter.shape for name, parameter in quantized.named_parameters()} == dense_shapes
    assert set(dense.state_dict()) <= set(quantized.state_dict())


def test_every_state_dict_key_is_an_attribute(tiny) -> None:
    tiny[0].get_key_patches("diffusion_model.")  # raises where one is not (merges and hooks call it)


@pytest.mark.parametrize("variant", SYNTHETIC)
def test_reported_size_is_the_size_in_memory(variant: str, checkpoint_path, load) -> None:
    path = checkpoint_path(variant)
    checkpoint = open_checkpoint(path)
    # smooth_orig is in the file and not in the model.
    assert load(str(path)).model_size() == pytest.approx(checkpoint.file_bytes, rel=0.03)


def test_detected_as_the_right_class(checkpoint_path, load) -> None:
    import comfy.supported_models

    classes = {"dev": "Flux", "schnell": "FluxSchnell", "fill": "FluxInpaint"}
    for variant, name in classes.items():
        config = load(str(checkpoint_path(variant))).model.model_config
        assert type(config) is getattr(comfy.supported_models, name)


def test_no_missing_and_no_unexpected_keys(golden: Path, load, caplog) -> None:
    with caplog.at_level("INFO"):
        load(str(golden / TINY))
    assert not [record for record in caplog.messages if "missing" in record or "left over" in record]
    assert any("rank 16" in record and "16bit" in record for record in caplog.messages)


def test_unavailable_precision_says_why(golden: Path, load) -> None:
    from svdq.kernels import BackendUnavailable

    with pytest.raises(BackendUnavailable, match=r"int8.*Choose auto or one of"):
        load(str(golden / TINY), "int8")


def test_a_wrong_file_is_refused(golden: Path, load) -> None:
    with pytest.raises(CheckpointError, match="LoRA"):
        load(str(golden / "lora_comfy_diffusion_model_r4.safetensors"))


def test_interrupt_stops_a_forward_pass(tiny, arguments) -> None:
    import comfy.model_management as management

    forward(tiny[0], arguments)
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        forward(tiny[0], arguments, load=False)
    assert torch.isfinite(forward(tiny[0], arguments)).all()  # the flag clears itself


# ---- patches


@pytest.mark.parametrize("name", LORAS)
@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_stock_lora_equals_the_dense_model(name: str, strength: float, golden: Path, tiny, arguments) -> None:
    lora = lora_patches(golden, name)
    quantized, dense = (forward(with_lora(p, lora, strength), arguments) for p in tiny)
    base = forward(tiny[0], arguments)
    # Ours stay 16-bit in layers that are not quantized, where core rounds a LoRA into the bf16 weight.
    assert relative(quantized, dense) < 4e-3
    assert relative(quantized, base) > 0.02


def test_as_many_lora_keys_as_a_dense_model(golden: Path, tiny) -> None:
    for name in (*LORAS, "lora_bfl_control_r3_in128"):
        quantized, dense = (with_lora(p, lora_patches(golden, name)) for p in tiny)
        assert set(quantized.patches) == set(dense.patches)


def test_removing_a_lora_restores_every_bit(golden: Path, tiny, arguments) -> None:
    before = forward(tiny[0], arguments)
    forward(with_lora(tiny[0], lora_patches(golden, LORAS[0])), arguments)
    assert torch.equal(forward(tiny[0], arguments), before)


def test_partly_loaded_equals_fully_loaded(golden: Path, tiny, arguments) -> None:
    import comfy.model_management as management

    # This LoRA touches quantized layers only; core rounds others differently when they are resident.
    patched = with_lora(tiny[0], lora_patches(golden, LORAS[2]))
    full = forward(patched, arguments)
    management.unload_all_models()
    patched.partially_load(patched.load_device, extra_memory=patched.model_size() // 2)
    assert 0 < patched.loaded_size() < patched.model_size()
    partial = forward(patched, arguments, load=False)
    patched.detach()
    assert torch.equal(partial, full)


def test_full_difference_patch(tiny, arguments) -> None:
    """A patch that is not low rank: goes to ComfyUI's arithmetic on the dequantized weight."""
    generator = torch.Generator().manual_seed(3)
    changed = []
    for patcher in tiny:
        generator.manual_seed(3)
        clone = patcher.clone()
        for key in ("img_mlp.2", "img_attn.qkv", "img_mod.lin"):
            name = f"diffusion_model.double_blocks.0.{key}.weight"
            shape = patcher.model.get_parameter(name).shape
            difference = torch.randn(shape, generator=generator) * 0.05
            assert clone.add_patches({name: ("diff", (difference,))}, 0.5) == [name]
        changed.append(forward(clone, arguments))
    assert relative(*changed) < (1e-5 if tiny[0].load_device.type == "cpu" else 6e-3)  # a GPU computes in bf16
    assert relative(changed[0], forward(tiny[0], arguments)) > 0.01


def test_lora_hooks(golden: Path, tiny, arguments) -> None:
    import comfy.hooks
    import comfy.model_management as management

    outputs = []
    for patcher in tiny:
        clone = patcher.clone()
        group = comfy.hooks.create_hook_lora(lora_patches(golden, LORAS[2]), 0.8, 0.0)
        clone.register_all_hook_patches(group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
        base = forward(clone, arguments)
        management.load_models_gpu([clone])
        steps = []
        for hooks in (group, None, group):  # applied, removed, applied from the cache
            clone.patch_hooks(hooks)
            steps.append(forward(clone, arguments, load=False))
        clone.patch_hooks(None)
        assert torch.equal(steps[1], base)
        assert relative(steps[0], base) > 0.02
        outputs.append(steps)
    assert torch.equal(outputs[0][0], outputs[0][2])
    assert relative(outputs[0][0], outputs[1][0]) < 4e-3


# ---- clones and saving


@pytest.mark.parametrize("how", [{}, {"force_deepcopy": True}, {"disable_dynamic": True}])
def test_clones_stay_ours(how: dict, golden: Path, tiny, arguments) -> None:
    expected = forward(with_lora(tiny[0], lora_patches(golden, LORAS[0])), arguments)
    clone = with_lora(tiny[0], lora_patches(golden, LORAS[0])).clone(**how)
    assert type(clone).__name__.startswith("SVDQModelPatcher")
    assert torch.equal(forward(clone, arguments), expected)


def test_cached_patcher_init_makes_an_independent_copy(tiny, arguments) -> None:
    factory, factory_arguments = tiny[0].cached_patcher_init
    copy = factory(*factory_arguments, disable_dynamic=True)
    assert copy.model is not tiny[0].model
    assert not copy.is_dynamic()
    assert torch.equal(forward(copy, arguments), forward(tiny[0], arguments))


def test_saving_keeps_quantized_weights(tiny) -> None:
    saved = tiny[0].state_dict_for_saving()
    key = "model.diffusion_model.single_blocks.0.linear2"
    assert saved[f"{key}.weight"].dtype == torch.int8
    parameters = tiny[0].model.diffusion_model.single_blocks[0].linear2.weight._params
    assert torch.equal(saved[f"{key}.weight_head_scale"], parameters.head_scale)
