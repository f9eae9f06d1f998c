"""Writes the list in docs/compatibility.md from the names of the tests: ``python tests/compatibility_table.py``."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"
START, END = "<!-- written by tests/compatibility_table.py -->", "<!-- end -->"
# Heading -> test file, whose cases are listed, and then the tests that have a docstring of their own.
FILES = {
    "Samplers, guiders, sizes": "test_compatibility_sampling",
    "Conditioning, Redux, ControlNet": "test_compatibility_conditioning",
    "Patches of the model": "test_compatibility_patches",
    "LoRA and hooks": "test_compatibility_lora",
    "LoRAs added, changed, shared, removed": "test_lora_families",
    "Merges, copies, devices": "test_compatibility_models",
    "Saving": "test_compatibility_saving",
}


def page() -> str:
    """The page as it has to be; what stands around the list stays."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    sections = ["\n".join([f"## {heading}\n", *_lines(name)]) for heading, name in FILES.items()]
    return "\n\n".join([before + START, *sections, END + after])


def _lines(name: str) -> list[str]:
    from compatibility_env import names

    module = importlib.import_module(name)
    tests = [value for key, value in vars(module).items() if key.startswith("test_") and value.__doc__]
    works = [test for test in tests if not any(mark.name == "xfail" for mark in getattr(test, "pytestmark", ()))]
    told = [inspect.cleandoc(test.__doc__).replace("\n", " ").rstrip(".") for test in works]
    return [f"- {line}" for line in (*names(name), *told)]


if __name__ == "__main__":
    import conftest  # noqa: F401  (makes the package importable)

    PAGE.write_text(page(), encoding="utf-8")
