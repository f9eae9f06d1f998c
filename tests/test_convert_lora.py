"""``convert --lora``: every naming finds its layers, what is baked in is what ComfyUI adds, and the rest is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compatibility_env
import pytest
import torch
from checks import assert_same, golden_names, load_golden, relative_error
from compatibility_env import sample
from conftest import GOLDEN
from files import Tensors, read_all, save_as_comfyui, tiny
from flux_models import relative
from lora_files import FAMILIES, LAYERS, NAMINGS, PLAIN_LAYERS, drawer, lora_file, named_lora, with_lora
from safetensors.torch import save_file
from torch import Tensor

from svdq.cli.convert import Lora, Result, convert
from svdq.cli.dequantize import effective
from svdq.kernels.int4 import MAX_RANK
from svdq.kernels.layout import deinterleave_rows
from svdq.loaders import AWQLinear, CheckpointError, PlainLayer, open_checkpoint
from svdq.quantizer.lora import read_loras, with_loras

env, float32 = compatibility_env.env, compatibility_env.float32  # fixtures

QKV, MOD = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_mod.lin"
WITHOUT_MODULATION = [name for name in LAYERS if name != MOD]
FACTORS = 4e-3  # what rounding two factors to bf16 may change of their product


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("dev"))


def bake(source: Path, tensors: Tensors, to: str | None = None, strength: float = 1.0, **options: Any) -> Path:
    """``source`` with a LoRA of these tensors, next to it."""
    folder = source.parent
    index = len(list(folder.iterdir()))
    path, out = folder / f"lora-{index}.safetensors", folder / f"baked-{index}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    convert(source, out, to, [Lora(str(path), strength)], **options)
    return out


def added(path: Path, source: Path, names: list[str]) -> dict[str, Tensor]:
    """Stock layer -> float32, what its dense weight has more than in ``source``."""
    after, before = open_checkpoint(path), open_checkpoint(source)
    dense = {name: [effective(file.layer(name), torch.float32)[0] for file in (after, before)] for name in names}
    return {name: new - old for name, (new, old) in dense.items()}


# ---- against the original tools


@pytest.mark.parametrize("name", [n for n in golden_names("lora_*.safetensors") if "expected" in n and "bfl" not in n])
def test_columns_are_those_of_the_original_converter(name: str, tmp_path: Path) -> None:
    expected = load_golden(name)
    source = GOLDEN / "svdq-int4_r16-tinyflux.safetensors"
    composed = [("lora_kohya_bfl_r4_alpha2", 0.8), ("lora_peft_r5_ragged", -0.5)]
    files = composed if "composed" in name else [(name.removesuffix(".expected.safetensors"), 1.0)]
    loras = [(str(GOLDEN / f"{stem}.safetensors"), strength) for stem, strength in files]
    checkpoint = open_checkpoint(source)
    deltas, left_out = read_loras(loras, checkpoint.config)
    assert left_out == 0
    compared = set()
    for stock, found in deltas.items():
        layer, before = with_loras(checkpoint.layer(stock), found), checkpoint.layer(stock)
        if isinstance(layer, PlainLayer):
            weight = sum(up @ down for down, up in (delta.factors(layer.shape[0]) for delta in found))
            assert relative_error(layer.weight.float(), before.weight.float() + weight) < 2e-3, stock
            continue
        if isinstance(layer, AWQLinear):
            stored = f"awq.{_stored_modulation(stock)}"
            if f"{stored}.lora_down" in expected:
                down, up = expected[f"{stored}.lora_down"], expected[f"{stored}.lora_up_stored_row_order"]
                product = deinterleave_rows(up.float(), layer.weight.splits) @ down.float()
                assert relative_error(layer.lora[1] @ layer.lora[0], product) < FACTORS, stock
                compared.add(stored)
            continue
        for index, (part, base) in enumerate(zip(layer.parts, before.parts, strict=True)):
            stored = f"w4a4.{_stored_part(stock, index)}"
            if f"{stored}.extra_down" not in expected:
                continue
            assert part.rank % 16 == 0 and part.rank > base.rank
            got = part.unpack()
            down, up = got.proj_down[base.rank :].float(), got.proj_up[:, base.rank :].float()
            product = expected[f"{stored}.extra_up"].float() @ expected[f"{stored}.extra_down"].float()
            assert relative_error(up @ down, product) < FACTORS, stored
            if "composed" not in name:
                assert part.rank == expected[f"{stored}.padded_total_rank"].item(), stored
            compared.add(stored)
    assert compared == {key.rpartition(".")[0] for key in expected if key.endswith((".extra_down", ".lora_down"))}


def _stored_modulation(stock: str) -> str:
    if stock.startswith("single"):
        return "single_transformer_blocks.0.norm.linear"
    return f"transformer_blocks.0.norm1{'_context' if 'txt' in stock else ''}.linear"


def _stored_part(stock: str, index: int) -> str:
    kind = {"qkv": "qkv_proj", "proj": "out_proj", "0": "mlp_fc1", "2": "mlp_fc2"}
    if stock.startswith("single"):
        names = {"linear1": ("qkv_proj", "mlp_fc1"), "linear2": ("out_proj", "mlp_fc2")}[stock.rpartition(".")[2]]
        return f"single_transformer_blocks.0.{names[index]}"
    name = kind[stock.rpartition(".")[2]]
    if "txt" in stock:
        name = name.replace("mlp", "mlp_context") if "mlp" in name else f"{name}_context"
    return f"transformer_blocks.0.{name}"


# ---- against ComfyUI


@pytest.mark.comfy
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_adds_what_comfyui_adds(naming: str, env: SimpleNamespace, tmp_path: Path) -> None:
    import comfy.lora
    import comfy.lora_convert

    model = env.pair("dev")[1].model
    tensors, keys = named_lora(naming), comfy.lora.model_lora_keys_unet(model, {})
    theirs = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), keys, log_missing=False)
    expected: dict[str, Tensor] = {}
    for target, adapter in theirs.items():
        key, offset, function = (*target, None, None)[:3] if isinstance(target, tuple) else (target, None, None)
        name = key.removeprefix("diffusion_model.").removesuffix(".weight")
        shape = model.diffusion_model.get_parameter(f"{name}.weight").shape
        weight = expected.setdefault(name, torch.zeros(shape))
        comfy.lora.calculate_weight([(0.7, adapter, 1.0, offset, function)], weight, key)
    # Blocks by which ComfyUI knows XLabs' form; the tiny model does not have them.
    tensors = {key: tensor for key, tensor in tensors.items() if "s.37." not in key and "s.18." not in key}
    save_file(tensors, tmp_path / "lora.safetensors")
    config = open_checkpoint(env.folder / "dev.safetensors").config
    deltas, _ = read_loras([(tmp_path / "lora.safetensors", 0.7)], config)
    assert deltas.keys() == expected.keys() and len(deltas) >= 5
    for name, found in deltas.items():
        got = sum(up @ down for down, up in (delta.factors(len(expected[name])) for delta in found))
        assert relative_error(got, expected[name]) < 1e-6, name


@pytest.mark.comfy
def test_a_baked_model_is_the_model_with_the_lora(env: SimpleNamespace, tmp_path: Path) -> None:
    from svdq.model import load_flux

    model = env.pair("dev")[0]
    tensors = lora_file(env, layers=[*WITHOUT_MODULATION, *PLAIN_LAYERS])
    expected = sample(with_lora(model, tensors, 0.6), env)
    source = tmp_path / "dev.safetensors"
    source.symlink_to(env.folder / "dev.safetensors")
    out = bake(source, tensors, strength=0.6)
    assert open_checkpoint(out).ranks == {32: 18, 48: 6}
    got = sample(load_flux(str(out), "16bit"), env)
    assert relative(got, expected) < 0.01
    assert relative(got, env.plain("dev")) > 0.2


@pytest.mark.comfy
def test_int8_takes_modulation_layers_too(env: SimpleNamespace, tmp_path: Path) -> None:
    import comfy.sd

    model = env.pair("dev")[0]
    tensors = lora_file(env, layers=[*LAYERS, "img_in"])
    expected = sample(with_lora(model, tensors, 0.6), env)
    source = tmp_path / "dev.safetensors"
    source.symlink_to(env.folder / "dev.safetensors")
    got = sample(comfy.sd.load_diffusion_model(str(bake(source, tensors, "comfy", 0.6))), env)
    assert relative(got, expected) < 0.12, "measured: 0.08, after two steps"
    assert relative(got, env.plain("dev")) > 0.2


# ---- where it goes


def lora_for(layers: Mapping[str, tuple[int, int]], rank: int = 4, seed: int = 3) -> Tensors:
    draw, tensors = drawer(seed), {}
    for name, (n, k) in layers.items():
        tensors[f"diffusion_model.{name}.lora_A.weight"] = draw(rank, k, scale=k**-0.5)
        tensors[f"diffusion_model.{name}.lora_B.weight"] = draw(n, rank, scale=0.1)
    return tensors


def product(tensors: Tensors, name: str) -> Tensor:
    return tensors[f"diffusion_model.{name}.lora_B.weight"] @ tensors[f"diffusion_model.{name}.lora_A.weight"]


def test_nothing_else_changes(dev: Path) -> None:
    """Tensors of other layers, and codes, scales and biases of the same one, are copied bit by bit"""
    names = {QKV: (768, 256), "single_blocks.1.linear2": (256, 1280), "final_layer.adaLN_modulation.1": (512, 256)}
    tensors = lora_for(names)
    out = bake(dev, tensors)
    before, after = read_all(dev)[0], read_all(out)[0]
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    single = "single_transformer_blocks.1"
    stored = ("transformer_blocks.0.qkv_proj", f"{single}.out_proj", f"{single}.mlp_fc2")
    branches = {f"{name}.{leaf}" for name in stored for leaf in ("lora_down", "lora_up")}
    assert changed == branches | {"norm_out.linear.weight"} and before.keys() == after.keys()
    for name, delta in added(out, dev, list(names)).items():
        assert relative_error(delta, product(tensors, name)) < 0.02, name  # a 16-bit weight is rounded as a whole
    columns = open_checkpoint(out).layer(QKV).parts[0].unpack()
    assert columns.proj_down[32:36].any(dim=1).all() and not columns.proj_down[36:].any()


def test_a_lora_for_a_part_of_a_layer_is_in_that_part(dev: Path) -> None:
    tensors = {"transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight": torch.ones(2, 256),
               "transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight": torch.ones(1024, 2)}  # fmt: skip
    layer = open_checkpoint(bake(dev, tensors)).layer("single_blocks.0.linear1")
    assert [part.rank for part in layer.parts] == [32, 48]


def test_alpha_and_strength(dev: Path) -> None:
    tensors = lora_for({QKV: (768, 256)})
    expected = product(tensors, QKV)
    tensors[f"diffusion_model.{QKV}.alpha"] = torch.tensor(2.0)
    delta = added(bake(dev, tensors, strength=-3.0), dev, [QKV])[QKV]
    assert relative_error(delta, -3.0 * 2.0 / 4 * expected) < FACTORS


def test_several_and_the_same_bytes_each_time(dev: Path, tmp_path: Path) -> None:
    loras = []
    for seed in (1, 2, 3):
        save_file(lora_for({QKV: (768, 256)}, rank=8, seed=seed), tmp_path / f"{seed}.safetensors")
        loras.append(Lora(str(tmp_path / f"{seed}.safetensors"), 0.5))
    for name in ("a", "b"):
        convert(dev, tmp_path / name, loras=loras)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert open_checkpoint(tmp_path / "a").layer(QKV).parts[0].rank == 32 + 32
    expected = sum(0.5 * product(lora_for({QKV: (768, 256)}, rank=8, seed=seed), QKV) for seed in (1, 2, 3))
    assert relative_error(added(tmp_path / "a", dev, [QKV])[QKV], expected) < FACTORS


@pytest.mark.parametrize("to", ["nunchaku", "comfy-svdquant"])
def test_fp16_and_a_saved_model(to: str, tmp_path: Path) -> None:
    source = save_as_comfyui(tiny(tmp_path, dtype="fp16"), tmp_path / "saved.safetensors")
    tensors = lora_for({QKV: (768, 256)})
    out = bake(source, {key: tensor.half() for key, tensor in tensors.items()}, to)
    assert open_checkpoint(out).dtype == torch.float16
    assert relative_error(added(out, source, [QKV])[QKV], product(tensors, QKV)) < 1e-3
    with pytest.raises(CheckpointError, match=r"a LoRA that leads beyond the range of float16, .*Lower its strength"):
        bake(source, tensors, to, strength=1e7)


def test_text_encoders_are_left_out(dev: Path, tmp_path: Path) -> None:
    tensors = lora_for({QKV: (768, 256)})
    extra = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(4),
             "text_encoders.clip_l.transformer.x.lora_A.weight": torch.zeros(4)}  # fmt: skip
    save_file(tensors | extra, tmp_path / "lora.safetensors")
    result = convert(dev, tmp_path / "out", loras=[Lora(str(tmp_path / "lora.safetensors"), 1.0)])
    assert result == Result(result.nbytes, "nunchaku", (), 2)
    for name, tensor in read_all(bake(dev, tensors))[0].items():
        assert_same(read_all(tmp_path / "out")[0][name], tensor, name)


# ---- what has no place


def test_modulation_layers(dev: Path, tmp_path: Path) -> None:
    tensors = lora_for({QKV: (768, 256), MOD: (1536, 256), "single_blocks.1.modulation.lin": (768, 256)})
    for to in ("nunchaku", "comfy-svdquant"):
        with pytest.raises(CheckpointError, match=rf"{MOD}, single_blocks\.1\.modulation\.lin: found a LoRA on 2 mod"):
            bake(dev, tensors, to)
        out = bake(dev, tensors, to, without_modulation=True)
        rest = bake(dev, lora_for({QKV: (768, 256)}), to)
        assert read_all(out)[0].keys() == read_all(rest)[0].keys()
        for name, tensor in read_all(rest)[0].items():
            assert_same(read_all(out)[0][name], tensor, name)
    # Files of ModelSave have a LoRA beside such a layer.
    saved = save_as_comfyui(dev, tmp_path / "saved.safetensors")
    contents = read_all(saved)[0]
    for leaf, shape in (("lora_down", (4, 256)), ("lora_up", (1536, 4))):
        contents[f"model.diffusion_model.{MOD}.{leaf}"] = torch.full(shape, 0.1)
    save_file(contents, saved)
    with pytest.raises(CheckpointError, match=rf"{MOD}: found a LoRA on 1 modulation layers"):
        convert(saved, tmp_path / "out", "nunchaku")
    convert(saved, tmp_path / "out", "nunchaku", without_modulation=True)
    assert_same(read_all(tmp_path / "out")[0]["proj_out.weight"], read_all(dev)[0]["proj_out.weight"])


def test_more_rank_than_kernels_take(dev: Path) -> None:
    tensors = lora_for({QKV: (768, 256)}, rank=MAX_RANK - 16)
    match = rf"{QKV}: found LoRAs of rank 240 in all, expected room for them beside the branch: {MAX_RANK} in all"
    with pytest.raises(CheckpointError, match=match):
        bake(dev, tensors)
    bake(dev, tensors, "comfy")
    assert open_checkpoint(bake(dev, lora_for({QKV: (768, 256)}, rank=MAX_RANK - 32))).rank == MAX_RANK


@pytest.mark.comfy
@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.startswith("LoRA") or "bias" in name])
def test_other_families_are_refused_by_name(family: str, env: SimpleNamespace, dev: Path) -> None:
    tensors = lora_file(env, FAMILIES[family], layers=[QKV])
    called = {
        "LoHa with DoRA": "DoRA", "BOFT": "OFT", "full difference": "full differences", "set": "new weights",
        "bias difference": "differences of biases", "LoRA with bias": "differences of biases",
    }  # fmt: skip
    what = called.get(family, family.partition(",")[0].partition(" ")[0])
    for to in ("nunchaku", "comfy"):
        with pytest.raises(CheckpointError, match=rf"{QKV}\..*: found {what} \(\d tensors\), .*SVDQ Quantize"):
            bake(dev, tensors, to)


@pytest.mark.parametrize("end", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_dora_as_peft_writes_it(end: str, dev: Path) -> None:
    """ComfyUI, which does not know it, would be bad advice"""
    tensors = lora_for({QKV: (768, 256)}) | {f"diffusion_model.{QKV}.{end}": torch.ones(768)}
    with pytest.raises(CheckpointError, match=rf"{QKV}\.{end}: found DoRA of PEFT \(1 tensors\), .* with PEFT: Com"):
        bake(dev, tensors)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t: t.pop(f"diffusion_model.{QKV}.lora_B.weight"), r"lora_A\.weight: found no up factor beside it"),
        (lambda t: t.update({"diffusion_model.double_blocks.7.img_attn.qkv.lora_A.weight": torch.zeros(4, 256)}),
         r"double_blocks\.7\.img_attn\.qkv\.lora_A\.weight: found 1 keys of no layer of this model"),
        (lambda t: t.update({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(4, 4)}), "1 keys of no layer"),
        (lambda t: t.update({f"diffusion_model.{QKV}.lora_A.weight": torch.zeros(4, 3072)}),
         r"found float32 \[4, 3072\], expected floats \[4, 256\] for double_blocks\.0\.img_attn\.qkv"),
        (lambda t: t.update({f"diffusion_model.{QKV}.lora_A.weight": torch.zeros(4, 256, dtype=torch.int8)}), "int8"),
        (lambda t: t.update({f"diffusion_model.{QKV}.lora_A.weight": torch.zeros(0, 256)}), r"\[0, 256\]"),
        (lambda t: t.update({f"diffusion_model.{QKV}.lora_A.weight": torch.full((4, 256), torch.nan)}), "values NaN"),
        (lambda t: t.update({f"diffusion_model.{QKV}.alpha": torch.zeros(2)}), r"alpha: found shape \[2\]"),
        (lambda t: t.update({"diffusion_model.img_in.alpha": torch.tensor(1.0)}), r"img_in\.alpha: found 1 keys of no"),
        (lambda t: [t.clear(), t.update({"lora_te_x": torch.zeros(1)})], "none for the transformer"),
    ],
)  # fmt: skip
def test_bad_loras(change: Callable[[Tensors], Any], match: str, dev: Path, tmp_path: Path) -> None:
    tensors = lora_for({QKV: (768, 256)})
    change(tensors)
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=match) as error:
        convert(dev, tmp_path / "out", loras=[Lora(str(tmp_path / "lora.safetensors"), 1.0)])
    assert str(error.value).startswith(str(tmp_path / "lora.safetensors")) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_loras(dev: Path, tmp_path: Path) -> None:
    for path, match in ((dev, "keys of no layer"), (tmp_path / "none", "readable file")):
        with pytest.raises(CheckpointError, match=match):
            convert(dev, tmp_path / "out", loras=[Lora(str(path), 1.0)])
    save_file(lora_for({QKV: (768, 256)}), tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="a file that is read"):
        convert(dev, tmp_path / "lora.safetensors", loras=[Lora(str(tmp_path / "lora.safetensors"), 1.0)], force=True)
