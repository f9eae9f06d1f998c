"""Workflows made for ComfyUI-nunchaku: its node ids and inputs, in prompts and workflows written here."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from server_fixture import DEMO_MODEL, DEMO_VAE, EXTRA_MODEL, LEGACY_MODEL, LORA, RunningServer, demo_prompt
from test_browser import Editor, browser, editor  # noqa: F401  (fixtures)

from svdq.cli.comfy_client import ExecutionFailed, PromptRejected, images_of
from svdq.cli.comfy_server import ComfyServer
from svdq.loaders import CheckpointError

FLUX = "svdq-int4_r32-flux.1-dev.safetensors"
FOUR_BIT_T5 = "awq-int4-flux.1-t5xxl.safetensors"
LEFT_OUT = "attention, cpu_offload, i2f_mode"
ENCODERS = {"text_encoder1": "t5xxl_fp16.safetensors", "text_encoder2": "clip_l.safetensors", "t5_min_length": 512}
NEW_STACK = {f"lora_{kind}_{i}": value for i in range(1, 16) for kind, value in (("name", "None"), ("strength", 1.0))}
STACK = {
    "lora_name_1": "a.safetensors",
    "lora_strength_1": 0.5,
    "lora_name_2": "b.safetensors",
    "lora_strength_2": -1.0,
}
LOADER = {
    "model_path": FLUX,
    "cache_threshold": 0.12,
    "attention": "flash-attention2",
    "cpu_offload": "enable",
    "device_id": 1,
    "data_type": "float16",
}
NEW_LOADER = {"model_name": FLUX, "cache_threshold": 0.12, "device_id": 1, "data_type": "float16", "left_out": LEFT_OUT}
OLD_LOADER = {"model_name": FLUX, "left_out": "cpu_offload, device_id"}
OLD_LORA = {
    "lora_name_1": LORA,
    "lora_strength_1": 0.7,
    "left_out": "lora_format, base_model_name, save_converted_lora",
}

# Old node, its widgets in the order of one release, the new node and its values.
RELEASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "loader": ("NunchakuFluxDiTLoader", LOADER, "SVDQNunchakuFluxLoader", NEW_LOADER),
    "loader with i2f_mode": (
        "NunchakuFluxDiTLoader", LOADER | {"i2f_mode": "enabled"}, "SVDQNunchakuFluxLoader", NEW_LOADER,
    ),
    "first loader": (
        "SVDQuantFluxDiTLoader", {"model_path": FLUX, "device_id": 0}, "SVDQNunchakuFluxLoader", OLD_LOADER,
    ),
    "first loader with offload": (
        "SVDQuantFluxDiTLoader", {"model_path": FLUX, "cpu_offload": "auto", "device_id": 0},
        "SVDQNunchakuFluxLoader", OLD_LOADER,
    ),
    "LoRA": (
        "NunchakuFluxLoraLoader", {"lora_name": LORA, "lora_strength": 0.7},
        "LoraLoaderModelOnly", {"lora_name": LORA, "strength_model": 0.7},
    ),
    "first LoRA": (
        "SVDQuantFluxLoraLoader",
        {
            "lora_name": LORA, "lora_format": "auto", "base_model_name": "svdq-int4-flux.1-dev", "lora_strength": 0.7,
            "save_converted_lora": "disable",
        },
        "SVDQNunchakuLoraStack", OLD_LORA,
    ),
    "LoRA stack": ("NunchakuFluxLoraStack", NEW_STACK | STACK, "SVDQNunchakuLoraStack", NEW_STACK | STACK),
    "text encoders": (
        "NunchakuTextEncoderLoader",
        {"model_type": "flux", **ENCODERS, "use_4bit_t5": "enable", "int4_model": "svdq-flux.1-t5"},
        "SVDQNunchakuTextEncoders", ENCODERS | {"left_out": "use_4bit_t5, int4_model"},
    ),
    "text encoders V2": (
        "NunchakuTextEncoderLoaderV2", {"model_type": "flux.1", **ENCODERS},
        "SVDQNunchakuTextEncoders", ENCODERS | {"left_out": ""},
    ),
    "first text encoders": (
        "SVDQuantTextEncoderLoader", {"model_type": "flux", **ENCODERS, "t5_precision": "BF16"},
        "SVDQNunchakuTextEncoders", ENCODERS | {"left_out": "use_4bit_t5, t5_precision, int4_model"},
    ),
}  # fmt: skip

# Old node -> its inputs with links and its widgets.
WITHOUT_EQUIVALENT: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "NunchakuPulidLoader": (("model",), {}),
    "NunchakuPulidApply": (("pulid", "image", "model"), {"ip_weight": 1.0}),
    "NunchakuPuLIDLoaderV2": (
        ("model",), {"pulid_file": "p.safetensors", "eva_clip_file": "e.pt", "insight_face_provider": "gpu"},
    ),
    "NunchakuFluxPuLIDApplyV2": (
        ("model", "pulid_pipline", "image"), {"weight": 1.0, "start_at": 0.0, "end_at": 1.0},
    ),
    "NunchakuIPAdapterLoader": (("model",), {}),
    "NunchakuFluxIPAdapterApply": (("model", "ipadapter_pipeline", "image"), {"weight": 1.0}),
    "NunchakuDepthPreprocessor": (("image",), {"model_path": "depth"}),
    "SVDQuantDepthPreprocessor": (("image",), {"model_path": "depth"}),
    "NunchakuModelMerger": ((), {"model_folder": "svdq-int4-flux.1-dev", "save_name": "merged"}),
    "NunchakuWheelInstaller": ((), {"version": "latest"}),
}  # fmt: skip

NEW_INPUTS = {
    "SVDQNunchakuFluxLoader": ["model_name", "cache_threshold", "device_id", "data_type", "left_out"],
    "SVDQNunchakuLoraStack": ["model", *NEW_STACK, "left_out"],
    "SVDQNunchakuTextEncoders": ["text_encoder1", "text_encoder2", "t5_min_length", "left_out"],
    "SVDQNunchakuNoEquivalent": ["model", "image", "old_node"],
}


@pytest.fixture
def nunchaku(comfy: ModuleType) -> ModuleType:
    """This pack's nodes for migrated workflows."""
    import svdq.nodes.nunchaku

    return svdq.nodes.nunchaku


@pytest.fixture
def migration(comfy: ModuleType) -> ModuleType:
    import svdq.nodes.migration

    return svdq.nodes.migration


@pytest.fixture
def replace_in_prompt(migration: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """What the server does with a prompt before it validates it, by ComfyUI's own replacement manager."""
    from app.node_replace_manager import NodeReplaceManager

    import nodes as comfy_nodes

    manager = NodeReplaceManager()
    for replacement in migration.node_replacements():
        manager.register(replacement)
        monkeypatch.setitem(comfy_nodes.NODE_CLASS_MAPPINGS, replacement.new_node_id, object)

    def replace(prompt: dict[str, Any]) -> dict[str, Any]:
        request = migration.complete_prompt({"prompt": copy.deepcopy(prompt)})
        manager.apply_replacements(request["prompt"])
        return request["prompt"]

    return replace


def schemas(nunchaku: ModuleType) -> dict[str, Any]:
    from svdq.nodes import SVDQExtensionWithMigration

    added = asyncio.run(SVDQExtensionWithMigration(print).get_node_list())[3:]
    return {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in added}


# ---- the table


@pytest.mark.comfy
def test_every_flux_node_of_every_release_is_replaced(migration: ModuleType) -> None:
    replaced = [entry.old_node_id for entry in migration.node_replacements()]
    assert sorted(replaced) == sorted({old for old, *_ in RELEASES.values()} | set(WITHOUT_EQUIVALENT))


@pytest.mark.comfy
def test_new_node_ids_and_inputs_are_those_of_migrated_workflows(nunchaku: ModuleType) -> None:
    """Public names: workflows that were migrated and saved hold them. Add, never rename or reorder."""
    found = schemas(nunchaku)
    assert {node_id: [entry.id for entry in schema.inputs] for node_id, schema in found.items()} == NEW_INPUTS
    for schema in found.values():
        assert schema.is_deprecated, "it would be offered for new workflows"
        assert schema.description and all(entry.tooltip for entry in [*schema.inputs, *schema.outputs])


@pytest.mark.comfy
def test_replacements_follow_comfyuis_rules(migration: ModuleType, nunchaku: ModuleType) -> None:
    inputs = NEW_INPUTS | {"LoraLoaderModelOnly": ["model", "lora_name", "strength_model"]}
    for entry in migration.node_replacements():
        assert {mapped["new_id"] for mapped in entry.input_mapping} <= set(inputs[entry.new_node_id])
        assert entry.output_mapping == [{"old_idx": 0, "new_idx": 0}]
        for mapped in entry.input_mapping:
            is_link = "old_id" in mapped and mapped["old_id"] not in entry.old_widget_ids
            assert not is_link or mapped["old_id"] == mapped["new_id"]


@pytest.mark.comfy
@pytest.mark.parametrize("with_meta", [True, False], ids=["exported", "by a program"])
@pytest.mark.parametrize("release", RELEASES)
def test_prompt_of_each_release(replace_in_prompt, release: str, with_meta: bool) -> None:
    old, widgets, new, values = RELEASES[release]
    links = {"model": ["1", 0]} if "LoRA" in release else {}
    node = {"class_type": old, "inputs": widgets | links} | ({"_meta": {"title": "mine"}} if with_meta else {})
    replaced = replace_in_prompt({"1": {"class_type": "UNETLoader", "inputs": {}}, "2": node})["2"]
    assert replaced["class_type"] == new
    assert replaced["inputs"] == values | links
    assert replaced["_meta"] == ({"title": "mine"} if with_meta else {})


@pytest.mark.comfy
@pytest.mark.parametrize("release", RELEASES)
def test_widgets_of_each_release_in_the_editor(migration: ModuleType, release: str) -> None:
    """As the editor does it: old values by position, nothing where there is no value."""
    old, widgets, new, values = RELEASES[release]
    (entry,) = (entry.as_dict() for entry in migration.node_replacements() if entry.old_node_id == old)
    saved, found = list(widgets.values()), {}
    for mapped in entry["input_mapping"]:
        if "set_value" in mapped:
            found[mapped["new_id"]] = mapped["set_value"]
        elif mapped["old_id"] in entry["old_widget_ids"]:
            found[mapped["new_id"]] = saved[entry["old_widget_ids"].index(mapped["old_id"])]
    assert (entry["new_node_id"], found) == (new, values)


@pytest.mark.comfy
@pytest.mark.parametrize("old", WITHOUT_EQUIVALENT)
def test_prompt_with_a_node_without_equivalent(replace_in_prompt, old: str) -> None:
    links, widgets = WITHOUT_EQUIVALENT[old]
    node = {"class_type": old, "inputs": {name: ["1", 0] for name in links} | widgets}
    replaced = replace_in_prompt({"1": {"class_type": "LoadImage", "inputs": {}}, "2": node})["2"]
    kept = {name: ["1", 0] for name in links if name in ("model", "image")}
    assert replaced["class_type"] == "SVDQNunchakuNoEquivalent"
    assert replaced["inputs"] == kept | {"old_node": old}


@pytest.mark.comfy
def test_what_a_prompt_lacks_is_added(replace_in_prompt) -> None:
    """The loader of release 0.1, a stack with one LoRA, and nodes without what they need."""
    prompt = {
        "1": {"class_type": "NunchakuFluxDiTLoader", "inputs": {"model_path": FLUX, "cpu_offload": "auto"}},
        "2": {"class_type": "NunchakuFluxLoraStack", "inputs": {"model": ["1", 0], "lora_name_3": LORA}},
        "3": {"class_type": "NunchakuFluxLoraLoader"},
        "4": {"class_type": "KSampler", "inputs": {}},
    }
    replaced = replace_in_prompt(prompt)
    assert replaced["1"]["inputs"] == {
        "model_name": FLUX, "cache_threshold": 0.0, "device_id": 0, "data_type": "bfloat16", "left_out": LEFT_OUT,
    }  # fmt: skip
    assert replaced["2"]["inputs"] == {"model": ["1", 0]} | NEW_STACK | {"lora_name_3": LORA}
    assert replaced["3"]["inputs"] == {"model": [], "lora_name": [], "strength_model": []}
    assert replaced["4"] == prompt["4"]


@pytest.mark.comfy
def test_installed_nodes_are_left_alone(replace_in_prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    import nodes as comfy_nodes

    monkeypatch.setitem(comfy_nodes.NODE_CLASS_MAPPINGS, "NunchakuFluxDiTLoader", object)
    prompt = {"1": {"class_type": "NunchakuFluxDiTLoader", "inputs": {"model_path": FLUX}}}
    assert replace_in_prompt(prompt) == prompt


@pytest.mark.comfy
def test_request_without_a_prompt_is_left_to_comfyui(migration: ModuleType) -> None:
    assert migration.complete_prompt({"client_id": "x"}) == {"client_id": "x"}


# ---- the nodes


@pytest.mark.comfy
def test_easy_cache_has_its_own_defaults(nunchaku: ModuleType) -> None:
    from comfy_extras.nodes_easycache import EasyCacheNode

    assert {entry.id: entry.default for entry in EasyCacheNode.GET_SCHEMA().inputs[1:]} == nunchaku.EASY_CACHE


@pytest.fixture
def loaded(nunchaku: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Everything the loader node does to the model, in order."""
    done: list[tuple[Any, ...]] = []
    model = SimpleNamespace(clone=lambda: model, set_model_compute_dtype=lambda dtype: done.append(("dtype", dtype)))
    monkeypatch.setattr(nunchaku, "model_path", lambda name: name)
    monkeypatch.setattr(nunchaku, "load_flux", lambda path: done.append(("load", path)) or model)

    def stock_node(node_id: str, model: Any, **inputs: Any) -> Any:
        done.append((node_id, inputs))
        return model

    monkeypatch.setattr(nunchaku, "stock_node", stock_node)
    return done


@pytest.mark.comfy
def test_loader_hands_settings_to_comfyuis_own_means(
    nunchaku: ModuleType, loaded: list, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "resolve_gpu_device_option", lambda option: option)
    nunchaku.SVDQNunchakuFluxLoader.execute(**NEW_LOADER)
    assert loaded == [
        ("load", FLUX),
        ("SelectModelDevice", {"device": "gpu:1"}),
        ("dtype", torch.float16),
        ("EasyCache", nunchaku.EASY_CACHE),
    ]
    assert f"left out {LEFT_OUT}" in caplog.text
    assert "cache_threshold 0.12" in caplog.text


@pytest.mark.comfy
def test_loader_leaves_defaults_to_comfyui(
    nunchaku: ModuleType, loaded: list, caplog: pytest.LogCaptureFixture
) -> None:
    nunchaku.SVDQNunchakuFluxLoader.execute(FLUX)
    assert loaded == [("load", FLUX)]
    assert caplog.text == ""


@pytest.mark.comfy
def test_gpu_that_is_not_there_is_named(nunchaku: ModuleType, loaded: list, caplog: pytest.LogCaptureFixture) -> None:
    nunchaku.SVDQNunchakuFluxLoader.execute(FLUX, device_id=63)
    assert loaded == [("load", FLUX)]
    assert "there is no GPU 63 here" in caplog.text


@pytest.mark.comfy
def test_stack_loads_the_slots_in_use(nunchaku: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_self: Any, model: tuple, name: str, strength: float) -> tuple[tuple]:
        return ((*model, (name, strength)),)

    monkeypatch.setattr(nunchaku.LoraLoaderModelOnly, "load_lora_model_only", load)
    slots = (
        NEW_STACK | STACK | {"lora_name_9": "c.safetensors", "lora_strength_9": 0.0, "lora_name_15": "d.safetensors"}
    )
    result = nunchaku.SVDQNunchakuLoraStack.execute(model=(), **slots)
    assert result[0] == (("a.safetensors", 0.5), ("b.safetensors", -1.0), ("d.safetensors", 1.0))
    assert nunchaku.SVDQNunchakuLoraStack.execute(model=())[0] == ()


@pytest.fixture
def encoder_folder(comfy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(tmp_path)], {".safetensors"}))
    for name, key in ((FOUR_BIT_T5, "encoder.block.0.layer.0.SelfAttention.q.qweight"), ("clip_l.safetensors", "w")):
        save_file({key: torch.zeros(1)}, tmp_path / name)
    (tmp_path / "t5xxl_fp16.safetensors").write_bytes(b"not examined here")
    return tmp_path


@pytest.mark.comfy
@pytest.mark.parametrize("position", ["text_encoder1", "text_encoder2"])
def test_4bit_t5_is_refused_with_the_file_to_choose(nunchaku: ModuleType, encoder_folder: Path, position: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        nunchaku.SVDQNunchakuTextEncoders.execute(**(ENCODERS | {position: FOUR_BIT_T5}))
    message = str(refusal.value)
    assert FOUR_BIT_T5 in message and "t5xxl_fp8_e4m3fn_scaled.safetensors" in message and "\n" not in message


@pytest.mark.comfy
def test_text_encoders_are_loaded_by_the_stock_node(
    nunchaku: ModuleType, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, int] = {}
    clip = SimpleNamespace(clone=lambda: clip, set_tokenizer_option=options.__setitem__)
    calls = []
    monkeypatch.setattr(nunchaku.DualCLIPLoader, "load_clip", lambda _, *files: calls.append(files) or (clip,))
    assert nunchaku.SVDQNunchakuTextEncoders.execute(**ENCODERS)[0] is clip
    assert calls == [("t5xxl_fp16.safetensors", "clip_l.safetensors", "flux")]
    assert options == {"t5xxl_min_length": 512}


@pytest.mark.comfy
def test_prompt_is_padded_as_nunchaku_pads_it(comfy: ModuleType) -> None:
    """Nunchaku sets the number on the tokenizer, this pack in the options of the CLIP object."""
    from comfy.text_encoders.flux import FluxTokenizer

    ours = FluxTokenizer().tokenize_with_weights("a fox", tokenizer_options={"t5xxl_min_length": 512})
    theirs = FluxTokenizer()
    theirs.t5xxl.min_length = 512
    assert ours == theirs.tokenize_with_weights("a fox")
    assert len(ours["t5xxl"][0]) == 512


# ---- the server

EXPORTED = {"_meta": {"title": "as the editor exports it"}}
EXPORTED_LOADER = {
    "class_type": "NunchakuFluxDiTLoader",
    "inputs": {
        "model_path": DEMO_MODEL,
        "cache_threshold": 0,
        "attention": "nunchaku-fp16",
        "cpu_offload": "auto",
        "device_id": 0,
        "data_type": "bfloat16",
        "i2f_mode": "enabled",
    },
    **EXPORTED,
}


def old_loader(**inputs: Any) -> dict[str, Any]:
    return EXPORTED_LOADER | {"inputs": EXPORTED_LOADER["inputs"] | inputs}


def picture(server: RunningServer, prompt: dict[str, Any]) -> np.ndarray:
    """Run the prompt; the one image that it saved, uint8 [height, width, 3]."""
    (image,) = images_of(server.client.run(prompt, timeout=120))
    return np.asarray(Image.open(io.BytesIO(server.client.image(**image))).convert("RGB"))


def behind_the_loader(**nodes: dict[str, Any]) -> dict[str, Any]:
    """The demo prompt with nodes between loader and sampler; the last one feeds the sampler."""
    return demo_prompt(sampler={"model": [list(nodes)[-1], 0]}) | nodes


def lora(model: str, strength: float) -> dict[str, Any]:
    inputs = {"model": [model, 0], "lora_name": LORA, "strength_model": strength}
    return {"class_type": "LoraLoaderModelOnly", "inputs": inputs}


@pytest.mark.server
def test_editor_is_told_all_replacements(comfy_server: RunningServer) -> None:
    told = comfy_server.client.get_json("/node_replacements")
    assert {old for old, *_ in RELEASES.values()} | set(WITHOUT_EQUIVALENT) <= set(told)
    assert told["NunchakuFluxDiTLoader"][0]["old_widget_ids"][:2] == ["model_path", "cache_threshold"]


@pytest.mark.server
@pytest.mark.parametrize(
    "loader",
    [
        EXPORTED_LOADER,
        {key: value for key, value in EXPORTED_LOADER.items() if key != "_meta"},
        {"class_type": "NunchakuFluxDiTLoader", "inputs": {"model_path": DEMO_MODEL, "cpu_offload": "auto"}},
        {"class_type": "SVDQuantFluxDiTLoader", "inputs": {"model_path": DEMO_MODEL, "device_id": 0}, **EXPORTED},
        old_loader(model_path=LEGACY_MODEL),
        old_loader(model_path=EXTRA_MODEL),
        old_loader(device_id=7),
    ],
    ids=["exported", "by a program", "early", "first", "legacy folder", "extra_model_paths", "no such GPU"],
)
def test_old_loader_makes_the_same_picture(comfy_server: RunningServer, loader: dict[str, Any]) -> None:
    ours = picture(comfy_server, demo_prompt(sampler={"seed": 71}))
    assert np.array_equal(picture(comfy_server, demo_prompt(sampler={"seed": 71}) | {"loader": loader}), ours)


@pytest.mark.server
def test_log_names_what_was_left_out(comfy_server: RunningServer) -> None:
    comfy_server.client.free()
    picture(comfy_server, demo_prompt(sampler={"seed": 72}) | {"loader": EXPORTED_LOADER})
    assert f"Nunchaku workflow: left out {LEFT_OUT}\n" in comfy_server.server.log_text()


@pytest.mark.server
def test_cache_threshold_turns_easy_cache_on(comfy_server: RunningServer) -> None:
    cache = {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    easy = {"class_type": "EasyCache", "inputs": {"model": ["loader", 0], **cache}}
    stock = picture(comfy_server, behind_the_loader(cache=easy))
    log = len(comfy_server.server.log_text())
    old = picture(comfy_server, demo_prompt() | {"loader": old_loader(cache_threshold=0.12)})
    assert np.array_equal(old, stock)
    assert "EasyCache enabled - threshold: 0.2" in comfy_server.server.log_text()[log:]


@pytest.mark.server
def test_float16_computes_in_float16(comfy_server: RunningServer) -> None:
    half = {"class_type": "ModelComputeDtype", "inputs": {"model": ["loader", 0], "dtype": "fp16"}}
    stock = picture(comfy_server, behind_the_loader(half=half))
    old = picture(comfy_server, demo_prompt() | {"loader": old_loader(data_type="float16")})
    assert np.array_equal(old, stock)
    full = picture(comfy_server, demo_prompt())
    # Another number format, the same picture.
    assert not np.array_equal(old, full) and np.abs(old.astype(int) - full.astype(int)).mean() < 1


@pytest.mark.server
@pytest.mark.parametrize("node", ["NunchakuFluxLoraLoader", "SVDQuantFluxLoraLoader", "NunchakuFluxLoraStack"])
def test_old_lora_nodes_do_what_the_stock_node_does(comfy_server: RunningServer, node: str) -> None:
    single = {"model": ["loader", 0], "lora_name": LORA, "lora_strength": 0.8}
    first = {"lora_format": "auto", "base_model_name": "svdq-int4-flux.1-dev", "save_converted_lora": "disable"}
    slots = {"lora_name_1": LORA, "lora_strength_1": 0.8, "lora_name_4": LORA, "lora_strength_4": -0.3}
    inputs = {
        "NunchakuFluxLoraLoader": single,
        "SVDQuantFluxLoraLoader": single | first,
        "NunchakuFluxLoraStack": {"model": ["loader", 0]} | NEW_STACK | slots,
    }[node]
    chain = {"a": lora("loader", 0.8)} | ({"b": lora("a", -0.3)} if node.endswith("Stack") else {})
    stock = picture(comfy_server, behind_the_loader(**chain))
    prompt = behind_the_loader(old={"class_type": node, "inputs": inputs, **EXPORTED}) | {"loader": EXPORTED_LOADER}
    assert np.array_equal(picture(comfy_server, prompt), stock)
    assert not np.array_equal(stock, picture(comfy_server, demo_prompt()))


@pytest.mark.server
@pytest.mark.parametrize("node", ["NunchakuFluxPuLIDApplyV2", "NunchakuFluxIPAdapterApply", "NunchakuPulidApply"])
def test_node_without_equivalent_is_refused_by_name(comfy_server: RunningServer, node: str) -> None:
    links, widgets = WITHOUT_EQUIVALENT[node]
    origin = {"model": ["loader", 0], "image": ["picture", 0]}
    inputs = {name: origin.get(name, ["other", 1]) for name in links} | widgets
    prompt = behind_the_loader(
        picture={"class_type": "LoadImage", "inputs": {"image": "example.png"}, **EXPORTED},
        other={"class_type": "NunchakuPuLIDLoaderV2", "inputs": {"model": ["loader", 0]}, **EXPORTED},
        apply={"class_type": node, "inputs": inputs, **EXPORTED},
    )
    with pytest.raises(PromptRejected, match=f"{node} has no equivalent: use .* bypass this node"):
        comfy_server.client.queue(prompt | {"loader": EXPORTED_LOADER})


@pytest.mark.server
def test_depth_preprocessor_is_refused_by_name(comfy_server: RunningServer) -> None:
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
        "2": {"class_type": "NunchakuDepthPreprocessor", "inputs": {"image": ["1", 0], "model_path": "depth"}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
    }
    with pytest.raises(PromptRejected, match=r"NunchakuDepthPreprocessor has no equivalent: use .*Depth Anything 3"):
        comfy_server.client.queue(prompt)


@pytest.mark.server
def test_what_is_missing_is_named(comfy_server: RunningServer) -> None:
    with pytest.raises(PromptRejected, match=r"Value not in list: model_name: 'svdq-fp4_r32-flux.1-dev.safetensors'"):
        comfy_server.client.queue(demo_prompt() | {"loader": old_loader(model_path=FLUX.replace("int4", "fp4"))})
    with pytest.raises(PromptRejected, match="model_name"):
        comfy_server.client.queue(demo_prompt() | {"loader": {"class_type": "NunchakuFluxDiTLoader", "inputs": {}}})


@pytest.mark.server
def test_4bit_t5_is_explained_in_one_line(comfy_server: RunningServer) -> None:
    save_file(
        {"encoder.block.0.layer.0.SelfAttention.q.qweight": torch.zeros(1)},
        comfy_server.models / "text_encoders" / FOUR_BIT_T5,
    )
    encoders = {"model_type": "flux.1", "text_encoder1": FOUR_BIT_T5, "text_encoder2": "clip_l.safetensors"}
    prompt = demo_prompt() | {
        "clip": {"class_type": "NunchakuTextEncoderLoaderV2", "inputs": encoders | {"t5_min_length": 512}, **EXPORTED},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": "a fox"}},
    }
    with pytest.raises(ExecutionFailed) as failure:
        comfy_server.client.run(prompt, timeout=60)
    message = failure.value.details["exception_message"].strip()
    assert FOUR_BIT_T5 in message and "t5xxl_fp16.safetensors" in message and "\n" not in message


NUNCHAKU_STUB = """
class NunchakuFluxDiTLoader:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model_path": ("STRING",)}})
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = ("STRING",), "load", "Nunchaku", True

    def load(self, model_path):
        return {"ui": {"text": ["Nunchaku loads " + model_path]}, "result": (model_path,)}

NODE_CLASS_MAPPINGS = {"NunchakuFluxDiTLoader": NunchakuFluxDiTLoader}
"""


@pytest.mark.server
@pytest.mark.parametrize("folder", ["ComfyUI-nunchaku", "zz-nunchaku"], ids=["loaded first", "loaded last"])
def test_both_packs_side_by_side(tmp_path: Path, folder: str) -> None:
    """A pack that has Nunchaku's node id keeps it; what it lacks is still replaced."""
    pack = tmp_path / "custom_nodes" / folder
    pack.mkdir(parents=True)
    (pack / "__init__.py").write_text(NUNCHAKU_STUB, encoding="utf-8")
    with ComfyServer(tmp_path, cpu=True, pack_name="svdq-flux-under-test") as server:
        assert server.client.object_info("NunchakuFluxDiTLoader")["NunchakuFluxDiTLoader"]["category"] == "Nunchaku"
        loader = {"class_type": "NunchakuFluxDiTLoader", "inputs": {"model_path": "a.safetensors"}}
        entry = server.client.run({"1": loader}, timeout=60)
        assert entry["outputs"] == {"1": {"text": ["Nunchaku loads a.safetensors"]}}
        assert entry["prompt"][2]["1"]["class_type"] == "NunchakuFluxDiTLoader"
        merger = {"class_type": "NunchakuModelMerger", "inputs": {"model_folder": "a", "save_name": "b"}}
        preview = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
        with pytest.raises(PromptRejected, match="NunchakuModelMerger has no equivalent"):
            server.client.queue({"1": merger, "2": preview})


# ---- the editor


class Workflow:
    """A workflow as the editor saves it, built node by node."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []

    def add(self, kind: str, outputs: str = "", widgets: list[Any] | None = None, **inputs: tuple[int, int]) -> int:
        """``inputs``: name -> (node, output slot). Returns the node's id."""
        number = len(self.nodes) + 1
        slots = []
        for name, (origin, slot) in inputs.items():
            output = self.nodes[origin - 1]["outputs"][slot]
            output["links"].append(len(self.links) + 1)
            self.links.append([len(self.links) + 1, origin, slot, number, len(slots), output["type"]])
            slots.append({"name": name, "type": output["type"], "link": len(self.links)})
        self.nodes.append(
            {
                "id": number,
                "type": kind,
                "pos": [(number - 1) % 4 * 420, (number - 1) // 4 * 420],
                "size": [360, 220],
                "flags": {},
                "order": number - 1,
                "mode": 0,
                "inputs": slots,
                "outputs": [{"name": name, "type": name, "links": []} for name in outputs.split()],
                "properties": {"Node name for S&R": kind},
                "widgets_values": widgets or [],
            }
        )
        return number

    def add_rest(self, model: int) -> None:
        """From the model to a saved picture."""
        text = self.add("SVDQDemoPrompt", "CONDITIONING", ["a test"], model=(model, 0))
        latent = self.add("EmptySD3LatentImage", "LATENT", [96, 64, 1])
        settings = [1, "fixed", 3, 3.5, "euler", "simple", 1, 1]
        links = {"model": (model, 0), "positive": (text, 0), "latent_image": (latent, 0)}
        sampler = self.add("SVDQFluxSampler", "LATENT", settings, **links)
        vae = self.add("VAELoader", "VAE", [DEMO_VAE])
        image = self.add("VAEDecode", "IMAGE", samples=(sampler, 0), vae=(vae, 0))
        self.add("SaveImage", "", ["migrated"], images=(image, 0))

    def as_dict(self) -> dict[str, Any]:
        count = {"last_node_id": len(self.nodes), "last_link_id": len(self.links)}
        return {**count, "nodes": self.nodes, "links": self.links, "groups": [], "extra": {}, "version": 0.4}


def open_file(editor: Editor, workflow: dict[str, Any]) -> None:  # noqa: F811
    """As if the file were dropped on the canvas."""
    if editor.find("[data-testid=template-workflows-content]"):
        from selenium.webdriver.common.keys import Keys

        editor.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
        editor.wait(lambda: editor.find("[data-testid=dialog-overlay]") is None, "the template browser to close")
    editor.js(
        "return window.app.handleFile(new File([arguments[0]], 'old.json', {type: 'application/json'}))",
        json.dumps(workflow),
    )
    count = len(workflow["nodes"])
    editor.wait(lambda: len(editor.graph()["nodes"]) == count, "the workflow to open")


def click_when_free(editor: Editor, css: str) -> None:  # noqa: F811
    """Click an element that a message may cover for some seconds."""
    from selenium.common.exceptions import ElementClickInterceptedException

    def clicked() -> bool:
        element = editor.find(css)
        try:
            return element is not None and element.click() is None
        except ElementClickInterceptedException:
            return False

    editor.wait(clicked, css)


def replace_all(editor: Editor) -> str:  # noqa: F811
    """Click through the editor's offer to replace nodes; the text of the offer."""
    editor.click("[data-testid=error-overlay-see-errors]")
    button = editor.wait(lambda: editor.find("button", text="Replace All"), "the offer to replace nodes")
    offer = editor.find("[data-testid=properties-panel]").text
    button.click()
    editor.wait(lambda: "Nunchaku" not in {n["type"][:8] for n in editor.graph()["nodes"]}, "the new nodes")
    return offer


def nodes_by_type(editor: Editor) -> dict[str, dict[str, Any]]:  # noqa: F811
    return {node["type"]: node for node in editor.graph()["nodes"]}


@pytest.mark.browser
@pytest.mark.server
def test_old_workflow_from_file_to_picture(editor: Editor) -> None:  # noqa: F811
    workflow = Workflow()
    loader = workflow.add(
        "NunchakuFluxDiTLoader", "MODEL", [DEMO_MODEL, 0.12, "nunchaku-fp16", "auto", 0, "bfloat16", "enabled"]
    )
    single = workflow.add("NunchakuFluxLoraLoader", "MODEL", [LORA, 0.8], model=(loader, 0))
    slots = NEW_STACK | {"lora_name_2": LORA, "lora_strength_2": -0.3}
    stack = workflow.add("NunchakuFluxLoraStack", "MODEL", list(slots.values()), model=(single, 0))
    encoders = ["flux.1", "t5xxl_fp8_e4m3fn.safetensors", "clip_l.safetensors", 384]
    clip = workflow.add("NunchakuTextEncoderLoaderV2", "CLIP", encoders)
    workflow.add("CLIPTextEncode", "CONDITIONING", ["not used: the encoders are stand-ins"], clip=(clip, 0))
    workflow.add_rest(stack)

    open_file(editor, workflow.as_dict())
    offer = replace_all(editor).replace("\n", "")
    for old in ("NunchakuFluxDiTLoader", "NunchakuFluxLoraLoader", "NunchakuFluxLoraStack"):
        assert old in offer
    assert editor.complaints() == ""
    nodes = nodes_by_type(editor)
    assert nodes["SVDQNunchakuFluxLoader"]["widgets_values"] == [DEMO_MODEL, 0.12, 0, "bfloat16", LEFT_OUT]
    assert nodes["LoraLoaderModelOnly"]["widgets_values"] == [LORA, 0.8]
    assert nodes["SVDQNunchakuLoraStack"]["widgets_values"] == [*slots.values(), ""]
    assert nodes["SVDQNunchakuTextEncoders"]["widgets_values"] == [*encoders[1:], ""]
    migrated = editor.graph()
    assert migrated["links"] == workflow.links

    click_when_free(editor, "[data-testid=queue-button]")
    assert editor.wait(editor.pictures, "a picture in the Save Image node")[0]["width"] == 96
    assert editor.complaints() == ""
    open_file(editor, migrated)
    editor.js("return new Promise(resolve => setTimeout(resolve, 1000))")  # complaints come a moment later
    assert editor.complaints() == ""
    assert nodes_by_type(editor)["SVDQNunchakuFluxLoader"]["widgets_values"][-1] == LEFT_OUT


@pytest.mark.browser
@pytest.mark.server
def test_node_without_equivalent_says_so_and_can_be_bypassed(editor: Editor) -> None:  # noqa: F811
    workflow = Workflow()
    loader = workflow.add("NunchakuFluxDiTLoader", "MODEL", [DEMO_MODEL, 0, "nunchaku-fp16", "auto", 0, "bfloat16"])
    face = workflow.add("LoadImage", "IMAGE MASK", ["example.png", "image"])
    files = ["pulid.safetensors", "eva.pt", "gpu"]
    pulid = workflow.add("NunchakuPuLIDLoaderV2", "MODEL PULID_PIPELINE", files, model=(loader, 0))
    links = {"model": (pulid, 0), "pulid_pipline": (pulid, 1), "image": (face, 0)}
    applied = workflow.add("NunchakuFluxPuLIDApplyV2", "MODEL", [1, 0, 1], **links)
    depth = workflow.add("NunchakuDepthPreprocessor", "IMAGE", ["depth-anything"], image=(face, 0))
    workflow.add("PreviewImage", images=(depth, 0))
    workflow.add_rest(applied)

    open_file(editor, workflow.as_dict())
    replace_all(editor)
    named = [n["widgets_values"][0] for n in editor.graph()["nodes"] if n["type"] == "SVDQNunchakuNoEquivalent"]
    assert named == ["NunchakuPuLIDLoaderV2", "NunchakuFluxPuLIDApplyV2", "NunchakuDepthPreprocessor"]
    click_when_free(editor, "[data-testid=queue-button]")
    click_when_free(editor, "[data-testid=error-overlay-see-errors]")
    editor.wait(lambda: editor.find("[aria-label^='Info for No Equivalent']"), "the errors by node")
    closed = "[aria-label^='Info for No Equivalent'][aria-expanded=false]"

    def all_read() -> bool:
        """Opens one more entry at a time; a click that comes too soon closes one, and it is opened again."""
        from selenium.common.exceptions import ElementClickInterceptedException

        panel = editor.find("[data-testid=properties-panel]")
        if all(f"{node} has no equivalent: use" in panel.text for node in named):
            return True
        button = editor.find(closed)
        if button:
            with contextlib.suppress(ElementClickInterceptedException):
                button.click()
        return False

    editor.wait(all_read, "what to use instead")

    editor.js("for (const n of window.app.graph._nodes) if (n.type === 'SVDQNunchakuNoEquivalent') n.mode = 4")
    click_when_free(editor, "[data-testid=queue-button]")
    assert editor.wait(editor.pictures, "a picture in the Save Image node")[0]["width"] == 96
