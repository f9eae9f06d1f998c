"""The legacy folder: blocks in one safetensors file, all other layers in a second one, configuration beside them."""

from __future__ import annotations

import os

from .nunchaku import build_checkpoint
from .safetensors_file import Reader, mapped_reader, problem, read_header
from .weights import Checkpoint

BLOCKS_FILE = "transformer_blocks.safetensors"
OUTER_FILE = "unquantized_layers.safetensors"
_CONFIGS = {"config": "config.json", "comfy_config": "comfy_config.json"}


def open_legacy_folder(path: str, reader: Reader = mapped_reader) -> Checkpoint:
    """Open a legacy folder. ``config.json`` and ``comfy_config.json`` may be missing. Raises CheckpointError."""
    for name, other in ((BLOCKS_FILE, OUTER_FILE), (OUTER_FILE, BLOCKS_FILE)):
        if not os.path.isfile(os.path.join(path, name)):
            if os.path.isfile(os.path.join(path, other)):
                raise problem(
                    path, name, f"no such file beside {other}", "both files of a legacy SVDQuant folder",
                    f"Download {name} into the folder",
                )  # fmt: skip
            raise problem(
                path, name, "no such file", f"a legacy SVDQuant folder with {BLOCKS_FILE} and {OUTER_FILE}",
                "Choose such a folder or a svdq-int4 .safetensors file",
            )  # fmt: skip
    headers = [read_header(os.path.join(path, name)) for name in (BLOCKS_FILE, OUTER_FILE)]
    return build_checkpoint(path, "nunchaku-legacy-folder", headers, _read_configs(path), reader)


def _read_configs(path: str) -> dict[str, str]:
    configs = {}
    for key, name in _CONFIGS.items():
        try:
            with open(os.path.join(path, name), encoding="utf-8") as file:
                configs[key] = file.read()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise problem(path, name, str(error), "a JSON file", f"Download {name} again, or remove it") from error
    return configs
