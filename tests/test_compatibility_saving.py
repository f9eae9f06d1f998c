"""ModelSave and CheckpointSave: what they write loads again and is the same model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compatibility_env
import pytest
import torch
from compatibility_env import LIMIT, node, sample
from files import read_all, save_as_comfyui
from flux_models import relative
from lora_files import FAMILIES, LAYERS, PLAIN_LAYERS, bfl_control_lora, logged, lora_file, named_lora, with_lora

from svdq.loaders import open_checkpoint

pytestmark = pytest.mark.comfy

env, float32 = compatibility_env.env, compatibility_env.float32  # fixtures


def save(model: Any, folder: Path) -> Path:
    """What the node ModelSave does; returns the file."""
    import comfy_extras.nodes_model_merging as merging

    saver = merging.ModelSave()
    saver.output_dir = str(folder)
    before = set(folder.rglob("*.safetensors"))
    saver.save(model, "saved", prompt={"1": {"class_type": "KSampler"}}, extra_pnginfo={"workflow": {"nodes": []}})
    (file,) = set(folder.rglob("*.safetensors")) - before
    return file


def load(path: Path) -> Any:
    from svdq.model import load_flux

    return load_flux(str(path), "16bit")


def in_bf16(lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same LoRA in values that a low-rank branch holds without rounding."""
    return {key: value.bfloat16().float() for key, value in lora.items()}


@pytest.mark.parametrize("variant", ["dev", "schnell", "fill", "depth"])
def test_a_saved_model_is_the_same_model(variant: str, env: SimpleNamespace, tmp_path: Path) -> None:
    """ModelSave: the file holds the quantized model bit by bit, SVDQ FLUX Loader reads it, and gives the same bits"""
    model = env.pair(variant)[0]
    with logged() as messages:
        path = save(model, tmp_path)
        again = load(path)
    assert messages == []
    saved, expected = read_all(path)[0], model.model.state_dict()
    assert saved.keys() == {f"model.{key}" for key in expected if key.startswith("diffusion_model.")}
    written = read_all(save_as_comfyui(env.folder / f"{variant}.safetensors", tmp_path / "expected.safetensors"))[0]
    for key, value in saved.items():
        assert torch.equal(value, written[key]) and value.dtype == written[key].dtype, key
    assert again.patches == {}
    assert torch.equal(sample(again, env), env.plain(variant))
    assert torch.equal(sample(model, env), env.plain(variant)), "saving leaves nothing behind"
    resaved = read_all(save(again, tmp_path))[0]
    assert resaved.keys() == saved.keys() and all(torch.equal(resaved[key], saved[key]) for key in saved)


def test_a_saved_model_with_quantized_activations(
    env: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with the arithmetic of INT4"""
    env.pair("dev")
    monkeypatch.setenv("SVDQ_BACKEND", "int4-reference")
    model = load(env.folder / "dev.safetensors")
    expected = sample(model, env)
    assert not torch.equal(expected, env.plain("dev"))
    assert torch.equal(sample(load(save(model, tmp_path)), env), expected)


LORAS = {
    "LoRA": lambda env: [(lora_file(env), 0.5)],
    "on layers of 16 bits too": lambda env: [(lora_file(env, layers=LAYERS + PLAIN_LAYERS), 0.5)],
    "two, one twice, negative": lambda env: [
        (lora_file(env), 0.5), (lora_file(env, seed=4), -1.0), (lora_file(env), 0.25),
    ],
    "for q, k and v": lambda env: [(named_lora("diffusers PEFT, ai-toolkit (transformer.)"), 1.0)],
    "kohya": lambda env: [(named_lora("kohya"), 1.0)],
    "rank 250": lambda env: [(lora_file(env, lambda random, n, k: {
        "lora_down.weight": random(250, k, scale=k**-0.5), "lora_up.weight": random(n, 250, scale=0.05)}), 1.0)],
    "biases": lambda env: [(lora_file(env, FAMILIES["bias difference"]), 0.5)],
    "with biases": lambda env: [(lora_file(env, FAMILIES["LoRA with bias"]), 0.5)],
    "Depth as a LoRA that widens img_in": lambda env: [(bfl_control_lora(), 1.0)],
}  # fmt: skip


@pytest.mark.parametrize("name", LORAS)
def test_a_saved_lora(name: str, env: SimpleNamespace, tmp_path: Path) -> None:
    """ModelSave with LoRAs: the saved model is the patched one; only the LoRA's factors are rounded to 16 bits"""
    base = patched = env.pair("dev")[0]
    for lora, strength in LORAS[name](env):
        patched = with_lora(patched, in_bf16(lora), strength)
    expected = sample(patched, env)
    with logged() as messages:
        path = save(patched, tmp_path)
    again = load(path)
    assert messages == []
    # What is in layers of 16 bits has the same rounding, which is core's.
    error = relative(sample(again, env), expected)
    assert error <= LIMIT, f"{error:.3g} from the patched model"
    assert relative(expected, env.plain("dev")) > 0.01, "the LoRA does something"
    assert torch.equal(sample(base, env), env.plain("dev")), "saving leaves nothing behind"


def test_a_saved_lora_is_rounded(env: SimpleNamespace, tmp_path: Path) -> None:
    patched = with_lora(env.pair("dev")[0], lora_file(env), 0.7)
    expected = sample(patched, env)
    error = relative(sample(load(save(patched, tmp_path)), env), expected)
    assert 0 < error < 0.01 * relative(expected, env.plain("dev"))


def test_biases_of_a_model_that_is_not_loaded(env: SimpleNamespace, tmp_path: Path) -> None:
    # With dynamic VRAM, and for layers that stay off the GPU, core has not applied the patches of biases.
    patched = with_lora(env.pair("dev")[0], lora_file(env, FAMILIES["bias difference"]), 0.5)
    patched.unpatch_model()
    found = patched.model_state_dict_for_saving(patched.model.diffusion_model, "diffusion_model.")
    saved = read_all(save(patched, tmp_path))[0]
    checkpoint = open_checkpoint(env.folder / "dev.safetensors")
    for name in LAYERS:
        assert torch.equal(found[f"{name}.bias"], saved[f"model.diffusion_model.{name}.bias"]), name
        assert (found[f"{name}.bias"].float() - checkpoint.layer(name).bias.float()).std() > 0.01, name


def test_what_a_saved_lora_looks_like(env: SimpleNamespace, tmp_path: Path) -> None:
    """A saved LoRA is columns of the low-rank branch; without room for that it is a LoRA of the new model"""
    rank_8, rank_230 = lora_file(env), lora_file(env, lambda random, n, k: {
        "lora_down.weight": random(230, k), "lora_up.weight": random(n, 230)}, layers=LAYERS[3:4])  # fmt: skip
    path = save(with_lora(env.pair("dev")[0], rank_8, 0.5), tmp_path)
    checkpoint = open_checkpoint(path)
    ranks = {name: [part.rank for part in checkpoint.layer(name).parts] for name in LAYERS if "mod" not in name}
    assert ranks == {LAYERS[0]: [48], LAYERS[1]: [48], LAYERS[3]: [48, 48], LAYERS[4]: [48, 48]}
    (beside,) = [name for name, layer in checkpoint.layers() if getattr(layer, "lora", None)]
    assert beside == LAYERS[2] and checkpoint.layer(beside).lora[0].shape == (8, 256)
    model = load(path)
    assert list(model.patches) == [f"diffusion_model.{beside}.weight"]
    # Saved again, with another LoRA that does not fit any more.
    patched = with_lora(model, rank_230, 0.5)
    again = save(patched, tmp_path)
    assert {name for name, layer in open_checkpoint(again).layers() if getattr(layer, "lora", None)} == {
        beside, LAYERS[3],
    }  # fmt: skip
    assert open_checkpoint(again).layer(LAYERS[3]).lora[0].shape == (230, 256)
    assert torch.equal(sample(load(again), env), sample(patched, env)), "a LoRA beside a weight is not rounded"
    # ComfyUI's own copies of such a model have it once.
    assert torch.equal(sample(model.clone(force_deepcopy=True), env), sample(model, env))


def test_patches_that_cannot_be_saved_are_named(env: SimpleNamespace, tmp_path: Path) -> None:
    """ModelSave names what has no 4-bit form and is not in the file (LoHa, DoRA, merges and so on), once in the log"""
    model = with_lora(env.pair("dev")[0], lora_file(env, FAMILIES["LoHa"], LAYERS[:1]), 0.5)
    model = with_lora(model, lora_file(env, FAMILIES["DoRA"]), 0.5)
    model = with_lora(model, lora_file(env, FAMILIES["full difference"], PLAIN_LAYERS + LAYERS[3:4]), 0.5)
    model = with_lora(model, in_bf16(lora_file(env)), 0.5)
    with logged() as messages:
        again = load(save(model, tmp_path))
    assert messages == [
        "SVDQ FLUX: the saved model is without "
        "DoRA on 5 quantized layers "
        "(double_blocks.0.img_mod.lin, double_blocks.0.img_attn.qkv, double_blocks.1.txt_mlp.2, ...); "
        "LoHa on 1 quantized layer (double_blocks.0.img_attn.qkv); "
        "full difference on 1 quantized layer (single_blocks.0.linear1)"
    ]
    rest = with_lora(env.pair("dev")[0], lora_file(env, FAMILIES["full difference"], PLAIN_LAYERS), 0.5)
    assert relative(sample(again, env), sample(with_lora(rest, in_bf16(lora_file(env)), 0.5), env)) <= LIMIT


def test_a_merge_that_cannot_be_saved_says_what_can_be_done(env: SimpleNamespace, tmp_path: Path) -> None:
    # A file with the merge in its 16-bit layers alone is neither model.
    merged = node("model_merging", "ModelMergeSimple", env.pair("dev")[0], env.pair("krea")[1], 0.5)
    with logged() as messages:
        save(merged, tmp_path)
    (message,) = messages
    assert message.startswith("SVDQ FLUX: the saved model is without merge on 26 quantized layers (")
    assert message.endswith("...); to keep a merge, merge models in 16 bits and quantize the result")


def test_checkpoint_save_with_a_vae(env: SimpleNamespace, tmp_path: Path) -> None:
    """CheckpointSave: the loader reads the model of the file, and says that it leaves the other models alone"""
    import comfy.sd

    comfy.sd.save_checkpoint(str(tmp_path / "all.safetensors"), env.pair("dev")[0], vae=env.vae)
    with logged() as messages:
        again = load(tmp_path / "all.safetensors")
    assert len(messages) == 1 and "tensors of other models (VAE, text encoders)" in messages[0]
    assert torch.equal(sample(again, env), env.plain("dev"))


def test_the_largest_rank_is_that_of_the_kernels(comfy) -> None:
    pytest.importorskip("triton")
    from svdq.kernels.quantize import MAX_RANK
    from svdq.model import saving

    assert saving.MAX_RANK == MAX_RANK
