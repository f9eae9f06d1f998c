"""cli/workflow.py on small hand-made workflows; the shipped ones are checked against the real server elsewhere."""

from __future__ import annotations

import json
from typing import Any

import pytest

from svdq.cli.workflow import WorkflowError, find_node, set_input, to_prompt

OBJECT_INFO: dict[str, Any] = {
    "Loader": {
        "input": {"required": {"file": [["a.safetensors", "b.safetensors"]]}},
        "display_name": "Load",
    },
    "Sampler": {
        # JSON objects have no order that counts; input_order has.
        "input": {
            "optional": {"negative": ["CONDITIONING"]},
            "required": {
                "steps": ["INT", {"default": 20}],
                "model": ["MODEL"],
                "seed": ["INT", {"default": 0, "control_after_generate": True}],
                "name": ["COMBO", {"options": ["euler", "heun"]}],
                "strength": ["FLOAT", {"default": 1.0, "forceInput": True}],
            },
        },
        "input_order": {"required": ["model", "seed", "steps", "name", "strength"], "optional": ["negative"]},
        "display_name": "Sample",
    },
    "Pass": {"input": {"required": {"text": ["STRING", {}], "model": ["MODEL"], "latent": ["LATENT"]}}},
    "Upload": {"input": {"required": {"image": [["x.png"], {"image_upload": True}]}}},
    "Grows": {"input": {"required": {"codec": ["COMFY_DYNAMICCOMBO_V3", {}]}}},
    "Newer": {"input": {"required": {"text": ["STRING"], "later": ["INT", {"default": 7}], "no_default": ["INT", {}]}}},
}


def node(id: int, type: str, values: Any = None, inputs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A node of the editor. ``inputs``: name -> link, or (type, link)."""
    slots = []
    for name, link in (inputs or {}).items():
        kind, link = link if isinstance(link, tuple) else ("MODEL", link)
        slots.append({"name": name, "type": kind, "link": link})
    return {"id": id, "type": type, "mode": 0, "inputs": slots, "widgets_values": values or [], **more}


def workflow(*nodes: dict[str, Any], links: list[Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"nodes": list(nodes), "links": links or [], **more}


LOADER = node(1, "Loader", ["b.safetensors"])
SAMPLER = node(2, "Sampler", [5, "randomize", 8, "heun"], {"model": 10})


def test_widgets_links_and_title() -> None:
    prompt = to_prompt(workflow(LOADER, SAMPLER, links=[[10, 1, 0, 2, 0, "MODEL"]]), OBJECT_INFO)
    assert prompt == {
        "1": {"class_type": "Loader", "inputs": {"file": "b.safetensors"}, "_meta": {"title": "Load"}},
        "2": {
            "class_type": "Sampler",
            "inputs": {"seed": 5, "steps": 8, "name": "heun", "model": ["1", 0]},
            "_meta": {"title": "Sample"},
        },
    }


def test_links_of_the_newer_schema_are_objects() -> None:
    link = {"id": 10, "origin_id": 1, "origin_slot": 0, "target_id": 2, "target_slot": 0, "type": "MODEL"}
    prompt = to_prompt(workflow(LOADER, SAMPLER, links=[link]), OBJECT_INFO)
    assert prompt["2"]["inputs"]["model"] == ["1", 0]


def test_a_link_replaces_the_widgets_value() -> None:
    sampler = node(2, "Sampler", [5, "fixed", 8, "heun"], {"model": 10, "steps": ("INT", 11)})
    links = [[10, 1, 0, 2, 0, "MODEL"], [11, 1, 3, 2, 1, "INT"]]
    assert to_prompt(workflow(LOADER, sampler, links=links), OBJECT_INFO)["2"]["inputs"]["steps"] == ["1", 3]


def test_a_primitive_gives_its_value_and_a_note_nothing() -> None:
    sampler = node(2, "Sampler", [5, "fixed", 8, "heun"], {"model": 10, "steps": ("INT", 11)})
    links = [[10, 1, 0, 2, 0, "MODEL"], [11, 3, 0, 2, 1, "INT"]]
    extras = (node(3, "PrimitiveNode", [33, "fixed"]), node(4, "Note", ["hello"]), node(5, "MarkdownNote", ["# hello"]))
    prompt = to_prompt(workflow(LOADER, sampler, *extras, links=links), OBJECT_INFO)
    assert prompt["2"]["inputs"]["steps"] == 33
    assert set(prompt) == {"1", "2"}


def test_reroutes_are_followed() -> None:
    links = [[8, 1, 0, 3, 0, "*"], [9, 3, 0, 4, 0, "*"], [10, 4, 0, 2, 0, "*"]]
    reroutes = (node(3, "Reroute", inputs={"": 8}), node(4, "Reroute", inputs={"": 9}))
    prompt = to_prompt(workflow(LOADER, SAMPLER, *reroutes, links=links), OBJECT_INFO)
    assert prompt["2"]["inputs"]["model"] == ["1", 0]
    assert set(prompt) == {"1", "2"}


def test_a_bypassed_node_passes_on_its_input_of_the_same_type() -> None:
    outputs = [{"type": "MODEL"}, {"type": "LATENT"}]
    bypassed = node(3, "Pass", ["t"], {"latent": ("LATENT", None), "model": 9}, mode=4, outputs=outputs)
    links = [[9, 1, 0, 3, 1, "MODEL"], [10, 3, 0, 2, 0, "MODEL"]]
    prompt = to_prompt(workflow(LOADER, SAMPLER, bypassed, links=links), OBJECT_INFO)
    assert prompt["2"]["inputs"]["model"] == ["1", 0]
    assert "3" not in prompt


def test_a_muted_node_is_gone_and_so_is_what_it_fed() -> None:
    muted = node(1, "Loader", ["a.safetensors"], mode=2)
    prompt = to_prompt(workflow(muted, SAMPLER, links=[[10, 1, 0, 2, 0, "MODEL"]]), OBJECT_INFO)
    assert set(prompt) == {"2"}
    assert "model" not in prompt["2"]["inputs"]


def test_values_of_the_editor_alone_are_skipped() -> None:
    assert to_prompt(workflow(node(1, "Upload", ["x.png", "image"])), OBJECT_INFO)["1"]["inputs"] == {"image": "x.png"}
    # Saved by an editor that did not write the button's label.
    assert to_prompt(workflow(node(1, "Upload", ["x.png"])), OBJECT_INFO)["1"]["inputs"] == {"image": "x.png"}


def test_values_by_name() -> None:
    by_name = node(1, "Pass", {"text": "t", "videopreview": {}})
    assert to_prompt(workflow(by_name), OBJECT_INFO)["1"]["inputs"] == {"text": "t"}


def test_widgets_that_came_later_get_their_default() -> None:
    with pytest.raises(WorkflowError, match=r"node 1 \(Newer\) has no value for no_default"):
        to_prompt(workflow(node(1, "Newer", ["t"])), OBJECT_INFO)
    inputs = to_prompt(workflow(node(1, "Newer", ["t", 1, 2])), OBJECT_INFO)["1"]["inputs"]
    assert inputs == {"text": "t", "later": 1, "no_default": 2}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"prompt": {}}, "no workflow of the editor"),
        (workflow(node(4, "Nowhere", title="My node")), r"node 4 \(My node\) is of class Nowhere, which this ComfyUI"),
        (workflow(node(1, "Loader", ["a", "b"])), "has 2 widget values, this ComfyUI expects 1"),
        (workflow(node(1, "Grows", ["h264"])), "input codec of type COMFY_DYNAMICCOMBO_V3 is not supported"),
        (workflow(SAMPLER), "link 10 comes from nowhere"),
        (workflow(node(1, "ab-cd"), definitions={"subgraphs": [{"id": "ab-cd"}]}), "is a subgraph"),
        (
            workflow(SAMPLER, node(3, "Reroute", inputs={"": 9}), links=[[9, 3, 0, 3, 0, "*"], [10, 3, 0, 2, 0, "*"]]),
            "goes in a circle",
        ),
    ],
)
def test_what_cannot_be_converted_is_named(broken: dict[str, Any], message: str) -> None:
    with pytest.raises(WorkflowError, match=message):
        to_prompt(broken, OBJECT_INFO)


def test_conversion_leaves_the_workflow_alone() -> None:
    ui = workflow(LOADER, SAMPLER, links=[[10, 1, 0, 2, 0, "MODEL"]])
    before = json.dumps(ui)
    set_input(to_prompt(ui, OBJECT_INFO), "Sampler", "steps", 1)
    assert json.dumps(ui) == before


def test_set_input_by_class_and_by_title() -> None:
    twins = workflow(
        node(1, "Pass", ["a"], title="Positive"), node(2, "Pass", ["b"], title="Negative"), LOADER | {"id": 3}
    )
    prompt = to_prompt(twins, OBJECT_INFO)
    set_input(prompt, "Negative", "text", "changed")
    set_input(prompt, "Loader", "file", "a.safetensors")
    assert prompt["2"]["inputs"]["text"] == "changed"
    assert prompt[find_node(prompt, "Loader")]["inputs"]["file"] == "a.safetensors"
    with pytest.raises(WorkflowError, match="2 nodes of class or title 'Pass', expected one"):
        set_input(prompt, "Pass", "text", "?")
    with pytest.raises(WorkflowError, match="0 nodes"):
        find_node(prompt, "Absent")
    with pytest.raises(WorkflowError, match="Loader has no input 'seed', only: file"):
        set_input(prompt, "Loader", "seed", 1)
