"""Turns a workflow as the editor saves it into a prompt as ComfyUI's ``/prompt`` takes it.

The editor does this in JavaScript; this is the part of it that flat workflows of stock nodes need. What is not
covered (subgraphs, widgets that grow other widgets) is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

Prompt = dict[str, dict[str, Any]]

_WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR")
_GROWING_TYPES = ("COMFY_DYNAMICCOMBO_V3",)
_SEED_NAMES = ("seed", "noise_seed")
_UPLOADS = ("image_upload", "audio_upload", "video_upload", "file_upload")

# Nodes of the editor alone: the server does not know them.
_NOTES = ("Note", "MarkdownNote")
_REROUTE = "Reroute"
_PRIMITIVE = "PrimitiveNode"

_MODE_MUTED = 2
_MODE_BYPASSED = 4


class WorkflowError(ValueError):
    """A workflow that cannot be turned into a prompt, or a prompt that lacks what is asked for."""


def to_prompt(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> Prompt:
    """API-format prompt of a UI-format ``workflow``; ``object_info`` is the server's description of its nodes."""
    if not isinstance(workflow.get("nodes"), list):
        raise WorkflowError("this is no workflow of the editor: it has no list of nodes")
    graph = _Graph(workflow)
    prompt: Prompt = {}
    for node in graph.nodes.values():
        kind = node["type"]
        if kind in (*_NOTES, _REROUTE, _PRIMITIVE) or node.get("mode") in (_MODE_MUTED, _MODE_BYPASSED):
            continue
        if kind in graph.subgraphs:
            raise WorkflowError(f"{_name(node)} is a subgraph; unpack it in the editor first")
        if kind not in object_info:
            raise WorkflowError(f"{_name(node)} is of class {kind}, which this ComfyUI does not have")
        inputs = {**_widget_inputs(node, object_info[kind]), **_linked_inputs(node, graph)}
        title = node.get("title") or object_info[kind].get("display_name") or kind
        prompt[str(node["id"])] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
    return prompt


def find_node(prompt: Prompt, node: str) -> str:
    """Id of the one node whose class or title is ``node``."""
    found = [key for key, entry in prompt.items() if node in (entry["class_type"], entry.get("_meta", {}).get("title"))]
    if len(found) != 1:
        raise WorkflowError(f"{len(found)} nodes of class or title {node!r}, expected one")
    return found[0]


def offered_file(object_info: Mapping[str, Any], node: str, name: str, patterns: Iterable[str]) -> str | None:
    """The first file that the server offers for a loader's input and whose name fits; earlier patterns go first."""
    spec = object_info[node]["input"]["required"][name]
    offered = spec[0] if isinstance(spec[0], list) else spec[1]["options"]
    fitting = (file for pattern in patterns for file in offered if fnmatch(Path(file).name.lower(), pattern))
    return next(fitting, None)


def set_input(prompt: Prompt, node: str, name: str, value: Any) -> None:
    """Set an existing input of the one node whose class or title is ``node``."""
    inputs = prompt[find_node(prompt, node)]["inputs"]
    if name not in inputs:
        raise WorkflowError(f"{node} has no input {name!r}, only: {', '.join(inputs)}")
    inputs[name] = value


class _Graph:
    """Nodes by id and links by id."""

    def __init__(self, workflow: Mapping[str, Any]) -> None:
        self.nodes: dict[int, dict[str, Any]] = {node["id"]: node for node in workflow["nodes"]}
        self.subgraphs = {entry["id"] for entry in workflow.get("definitions", {}).get("subgraphs", [])}
        self._origins: dict[int, tuple[int, int]] = {}
        for link in workflow.get("links", []):
            if isinstance(link, dict):
                self._origins[link["id"]] = (link["origin_id"], link["origin_slot"])
            else:
                self._origins[link[0]] = (link[1], link[2])

    def source(self, link: int | None) -> tuple[dict[str, Any], int] | None:
        """The node and output slot that feed ``link``, past reroutes and bypassed nodes; None if nothing does."""
        seen: set[int] = set()
        while link is not None:
            if link not in self._origins or self._origins[link][0] not in self.nodes:
                raise WorkflowError(f"link {link} comes from nowhere; save the workflow again in the editor")
            if link in seen:
                raise WorkflowError(f"link {link} goes in a circle")
            seen.add(link)
            node, slot = self.nodes[self._origins[link][0]], self._origins[link][1]
            if node.get("mode") == _MODE_MUTED:
                return None
            if node["type"] == _REROUTE:
                link = node["inputs"][0].get("link")
            elif node.get("mode") == _MODE_BYPASSED:
                link = _bypass(node, slot)
            else:
                return node, slot
        return None


def _bypass(node: Mapping[str, Any], slot: int) -> int | None:
    """The input link that a bypassed node passes on to output ``slot``: the first of its type, same slot preferred."""
    wanted = node["outputs"][slot]["type"]
    inputs = node.get("inputs", [])
    candidates = [*inputs[slot : slot + 1], *inputs]
    links = (entry.get("link") for entry in candidates if entry["type"] == wanted)
    return next((link for link in links if link is not None), None)


def _linked_inputs(node: Mapping[str, Any], graph: _Graph) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for entry in node.get("inputs", []):
        source = graph.source(entry.get("link"))
        if source is None:
            continue
        origin, slot = source
        if origin["type"] == _PRIMITIVE:
            # A primitive's first value is that of the widget it stands for.
            inputs[entry["name"]] = origin["widgets_values"][0]
        else:
            inputs[entry["name"]] = [str(origin["id"]), slot]
    return inputs


def _widget_inputs(node: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    values = node.get("widgets_values") or []
    if isinstance(values, dict):
        return {name: values[name] for name, _ in _widgets(node, info) if name in values}
    inputs: dict[str, Any] = {}
    position = 0
    for name, (kind, options) in _widgets(node, info):
        if position < len(values):
            inputs[name] = values[position]
        elif "default" in options:
            # Saved before this widget existed.
            inputs[name] = options["default"]
        else:
            raise WorkflowError(f"{_name(node)} has no value for {name}; open and save the workflow in the editor")
        position += 1 + _companions(name, kind, options)
    if len(values) > position:
        raise WorkflowError(f"{_name(node)} has {len(values)} widget values, this ComfyUI expects {position}")
    return inputs


def _widgets(node: Mapping[str, Any], info: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, Mapping[str, Any]]]]:
    """Name, type and options of each input that has a widget, in the editor's order."""
    for group in ("required", "optional"):
        specs = info["input"].get(group, {})
        for name in info.get("input_order", {}).get(group, specs):
            spec = specs[name]
            kind = "COMBO" if isinstance(spec[0], list) else spec[0]
            options = spec[1] if len(spec) > 1 else {}
            if kind in _GROWING_TYPES:
                raise WorkflowError(f"{_name(node)}: input {name} of type {kind} is not supported here")
            if kind in _WIDGET_TYPES and not options.get("forceInput"):
                yield name, (kind, options)


def _companions(name: str, kind: str, options: Mapping[str, Any]) -> int:
    """How many values of the editor alone follow this widget's: "randomize" after a seed, an upload button's label."""
    control = options.get("control_after_generate", kind == "INT" and name in _SEED_NAMES)
    return int(bool(control)) + int(any(options.get(upload) for upload in _UPLOADS))


def _name(node: Mapping[str, Any]) -> str:
    return f"node {node['id']} ({node.get('title') or node['type']})"
