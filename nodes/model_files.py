"""The model dropdown: what is in ComfyUI's ``diffusion_models`` folders, with a legacy Nunchaku folder as one entry.

A legacy folder is listed by its own name instead of its two files, also when one of them is missing: opening it then
says which.
"""

from __future__ import annotations

import os

import folder_paths

from ..loaders import CheckpointError
from ..loaders.legacy import BLOCKS_FILE, OUTER_FILE

FOLDER = "diffusion_models"
LEGACY_FILES = (BLOCKS_FILE, OUTER_FILE)


def model_names() -> list[str]:
    """Names for the dropdown, those with "svdq" in them first."""
    names = {_entry(name) for name in folder_paths.get_filename_list(FOLDER)}
    return sorted(names, key=lambda name: ("svdq" not in name.lower(), name.lower(), name))


def _entry(name: str) -> str:
    """The dropdown entry that stands for the file ``name``: its folder for the files of a legacy folder."""
    folder, file = os.path.split(name)
    return folder if folder and file in LEGACY_FILES else name


def model_path(name: str) -> str:
    """Absolute path of a dropdown entry. Only listed names resolve, so that no name leads out of the folders."""
    if name not in model_names():
        folders = ", ".join(folder_paths.get_folder_paths(FOLDER))
        raise CheckpointError(
            f"model {name!r} is not in ComfyUI's {FOLDER} folders ({folders}): put the file there and press R"
        )
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        candidates = (os.path.join(base, name) for base in folder_paths.get_folder_paths(FOLDER))
        path = next((p for p in candidates if any(os.path.isfile(os.path.join(p, f)) for f in LEGACY_FILES)), None)
    if path is None:
        raise CheckpointError(f"model {name!r} is listed but cannot be read: a broken link? Restore it or pick another")
    return os.path.abspath(path)


def fingerprint(path: str) -> str:
    """Changes whenever a file of the model is replaced or written: name, size and time of each."""
    files = [path] if os.path.isfile(path) else [os.path.join(path, file) for file in LEGACY_FILES]
    stats = [(file, os.stat(file)) for file in files if os.path.isfile(file)]
    return ";".join(f"{file}|{stat.st_size}|{stat.st_mtime_ns}" for file, stat in stats)
