"""Workflows made for ComfyUI-nunchaku: its node ids and inputs, in prompts and workflows written here.

Here the table and the nodes; test_migration_server.py and test_migration_editor.py run them in ComfyUI.
"""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from server_fixture import LORA

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
    from svdq.nodes import SVDQExtension, SVDQExtensionWithMigration

    usual = asyncio.run(SVDQExtension().get_node_list())
    added = asyncio.run(SVDQExtensionWithMigration(print).get_node_list())[len(usual) :]
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
    """The loader of release 0.1, a stack with one LoRA, and nodes without what they need or with null for it."""
    prompt = {
        "1": {"class_type": "NunchakuFluxDiTLoader", "inputs": {"model_path": FLUX, "cpu_offload": "auto"}},
        "2": {"class_type": "NunchakuFluxLoraStack", "inputs": {"model": ["1", 0], "lora_name_3": LORA}},
        "3": {"class_type": "NunchakuFluxLoraLoader"},
        "4": {"class_type": "KSampler", "inputs": {}},
        "5": {"class_type": "NunchakuFluxLoraLoader", "inputs": None, "_meta": None},
    }
    replaced = replace_in_prompt(prompt)
    assert replaced["1"]["inputs"] == {
        "model_name": FLUX, "cache_threshold": 0.0, "device_id": 0, "data_type": "bfloat16", "left_out": LEFT_OUT,
    }  # fmt: skip
    assert replaced["2"]["inputs"] == {"model": ["1", 0]} | NEW_STACK | {"lora_name_3": LORA}
    assert replaced["3"]["inputs"] == {"model": [], "lora_name": [], "strength_model": []}
    assert replaced["5"] == replaced["3"]
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
