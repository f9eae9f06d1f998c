"""``inspect``: what is in a checkpoint, and how it would run here. Says as much as it can about any other file."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..loaders import Checkpoint
    from ..loaders.flux_names import Source

_KINDS = {
    "w4a4": "4-bit layers",
    "low_rank": "low-rank branches",
    "modulation": "modulation layers",
    "int8": "INT8 layers",
    "plain": "16-bit layers",
}

_FORMATS = {
    "nunchaku": "SVDQuant, single file",
    "nunchaku-legacy-folder": "SVDQuant, legacy folder",
    "comfyui": "SVDQuant, saved by ComfyUI",
    "comfy-kitchen": "SVDQuant, in comfy-kitchen's layouts",
}
_TELLING = ("_name_or_path", "_class_name", "_diffusers_version", "model_class", "method", "rank")
_SHOWN_CHARACTERS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a checkpoint file or legacy folder, or any other model file")
    parser.add_argument("--json", action="store_true", help="print JSON; what is wrong stands in its field error")


def run(args: argparse.Namespace) -> int:
    from ..loaders import CheckpointError

    facts, error = inspect(args.file)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print("\n".join(_text(facts)))
    if error is not None:
        raise CheckpointError(error)
    return 0


def inspect(path: str | os.PathLike[str]) -> tuple[dict[str, Any], str | None]:
    """(facts, error) about the file or folder ``path``.

    The facts can be written as JSON. If error is not None it is the one line that says why this is no usable
    checkpoint, and the facts are what can be said all the same; ``facts["error"]`` holds the same line.
    """
    from ..loaders import CheckpointError, open_checkpoint

    path = os.fspath(path)
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        return _other_facts(path, error.found) | {"error": str(error)}, str(error)
    return _checkpoint_facts(checkpoint) | {"machine": _machine_facts(), "error": None}, None


def _checkpoint_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    from ..quantizer.source import stock_shapes

    config = checkpoint.config
    sources = checkpoint.sources
    layers = Counter(_kind(source) for source in sources.values())
    dense_values = sum(math.prod(shape) for shape in stock_shapes(config).values())
    return {
        "path": checkpoint.path,
        "file_bytes": checkpoint.file_bytes,
        "format": checkpoint.format,
        "variant": checkpoint.variant,
        "precision": checkpoint.precision,
        "ranks": {str(rank): count for rank, count in checkpoint.ranks.items()},
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "config": {
            "hidden_size": config.hidden_size,
            "double_blocks": config.depth,
            "single_blocks": config.depth_single_blocks,
            "in_channels": config.in_channels,
            "context_in_dim": config.context_in_dim,
            "vec_in_dim": config.vec_in_dim,
            "guidance": config.guidance_embed,
        },
        "layers": dict(layers),
        "bytes": _bytes_by_kind(checkpoint) | {"all_in_16_bit": 2 * dense_values},
        "metadata": _metadata_facts(checkpoint.metadata),
        "notes": list(checkpoint.notes),
    }


def _kind(source: Source) -> str:
    from ..loaders.flux_names import AWQSource, Int8Source, W4A4Source

    return {W4A4Source: "w4a4", AWQSource: "modulation", Int8Source: "int8"}.get(type(source), "plain")


def _bytes_by_kind(checkpoint: Checkpoint) -> dict[str, int]:
    from ..loaders import flux_names, kitchen, saved
    from ..loaders.safetensors_file import read_header

    sources = checkpoint.sources
    headers = [read_header(file) for file in checkpoint.files]
    kinds = {name: _kind(source) for name, source in sources.items()}
    if checkpoint.format == "comfyui":
        low_rank, prefix = saved.LOW_RANK_LEAVES, saved.saved_prefix(headers[0])
    elif checkpoint.format == "comfy-kitchen":
        low_rank, prefix = kitchen.LOW_RANK_LEAVES, kitchen.kitchen_prefix(headers[0])
    else:
        low_rank, prefix = flux_names.LOW_RANK_LEAVES, ""
        stored = ((getattr(source, "parts", None) or (source.name,), source) for source in sources.values())
        kinds = {name: _kind(source) for names, source in stored for name in names}
    sizes = {kind: 0 for kind in _KINDS if kind != "int8" or kind in kinds.values()}
    for header in headers:
        for key, info in header.tensors.items():
            layer, _, leaf = flux_names.canonical_key(key.removeprefix(prefix)).rpartition(".")
            if layer in kinds:  # a saved model may have a VAE and text encoders with it
                sizes["low_rank" if leaf in low_rank else kinds[layer]] += info.nbytes
    return sizes


def _metadata_facts(metadata: dict[str, str]) -> dict[str, str]:
    """The short strings as they are, of JSON objects the entries that tell files apart."""
    facts = {}
    for key, value in metadata.items():
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict):
            facts |= {f"{key}.{name}": str(parsed[name])[:_SHOWN_CHARACTERS] for name in _TELLING if name in parsed}
        else:
            facts[key] = value[:_SHOWN_CHARACTERS]
    return facts


def _machine_facts() -> dict[str, Any]:
    """What would run the model here, and why not something faster."""
    import torch

    from .. import kernels
    from ..kernels.device import describe

    device = describe("cuda" if torch.cuda.is_available() else "cpu")
    facts = {"device": device.name, "architecture": device.architecture}
    try:
        chosen = kernels.backend_for(device)
    except kernels.BackendUnavailable as error:
        facts |= {"backend": "none", "reason": str(error)}
    else:
        facts |= {"backend": chosen.precision, "reason": chosen.reason}
    others = {backend.precision: backend.reason for backend in kernels.explain(device)}
    others.pop(facts["backend"], None)
    return facts | {"not_chosen": others}


def _other_facts(path: str, found: str) -> dict[str, Any]:
    """What can be said about something that is not a usable checkpoint."""
    from ..loaders import CheckpointError
    from ..loaders.safetensors_file import read_header

    facts: dict[str, Any] = {"path": path, "found": found}
    if os.path.isdir(path):
        names = sorted(os.listdir(path))
        files = [name for name in names if os.path.isfile(os.path.join(path, name))]
        return facts | {"files": {name: os.path.getsize(os.path.join(path, name)) for name in files[:20]}}
    if not os.path.isfile(path):
        return facts
    facts["file_bytes"] = os.path.getsize(path)
    try:
        header = read_header(path)
    except CheckpointError:
        return facts
    dtypes = Counter(info.dtype for info in header.tensors.values())
    keys = list(header.tensors)
    return facts | {
        "tensors": len(keys),
        "dtypes": dict(dtypes.most_common()),
        "first_keys": keys[:3],
        "metadata": _metadata_facts(header.metadata),
    }


def _text(facts: dict[str, Any]) -> list[str]:
    from ..loaders.safetensors_file import printable

    rows = _other_rows(facts) if facts["error"] else _checkpoint_rows(facts)
    return [printable(facts["path"])] + [f"  {label:<19} {printable(value)}" for label, value in rows]


def _other_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("found", facts["found"])] if facts["found"] else []
    if "file_bytes" in facts:
        rows.append(("size", _megabytes(facts["file_bytes"])))
    if "tensors" in facts:
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in facts["dtypes"].items())
        rows.append(("tensors", f"{facts['tensors']} ({dtypes})" if dtypes else "none"))
        rows += [("for example", key) for key in facts["first_keys"]]
    rows += [("metadata", f"{key}: {value}") for key, value in facts.get("metadata", {}).items()]
    rows += [("file", f"{name}, {_megabytes(size)}") for name, size in facts.get("files", {}).items()]
    return rows


def _checkpoint_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    config, sizes, machine = facts["config"], facts["bytes"], facts["machine"]
    ranks = ", ".join(f"{rank} ({count} weights)" for rank, count in facts["ranks"].items())
    rows = [
        ("format", _FORMATS[facts["format"]]),
        ("variant", f"FLUX.1 {facts['variant']}"),
        ("precision", f"{facts['precision']} weights, {facts['dtype']} scales and low-rank branches"),
        ("rank", ranks),
        ("blocks", f"{config['double_blocks']} double, {config['single_blocks']} single"),
        ("hidden size", str(config["hidden_size"])),
        ("input", f"{config['in_channels']} channels per 2x2 patch, guidance {'yes' if config['guidance'] else 'no'}"),
        ("layers", ", ".join(f"{facts['layers'][kind]} {_KINDS[kind]}" for kind in _KINDS if kind in facts["layers"])),
        ("size", _megabytes(facts["file_bytes"])),
    ]
    rows += [(f"  {name}", _megabytes(sizes[kind])) for kind, name in _KINDS.items() if kind in sizes]
    rows.append(("  all in 16 bit", _megabytes(sizes["all_in_16_bit"])))
    rows += [("metadata", f"{key}: {value}") for key, value in facts["metadata"].items()]
    rows += [("note", note) for note in facts["notes"]]
    rows.append(("on this machine", f"{machine['device']} ({machine['architecture']}): {machine['backend']}"))
    rows.append((f"  {machine['backend']}", machine["reason"]))
    rows += [(f"  not {precision}", reason) for precision, reason in machine["not_chosen"].items()]
    return rows


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"
