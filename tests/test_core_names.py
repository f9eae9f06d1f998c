"""The list of what we use of ComfyUI below its public API is complete, and what ComfyUI lacks of it is noticed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.comfy

FILES = sorted([*ROOT.glob("model/*.py"), *ROOT.glob("nodes/*.py")])


def used(path: Path) -> Iterator[str]:
    """Dotted names of comfy, comfy_aimdo and comfy_kitchen that a file uses, and their beginnings."""
    tree, names = ast.parse(path.read_text(encoding="utf-8")), {}
    for found in ast.walk(tree):
        if isinstance(found, ast.Import):
            names |= {a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                      for a in found.names}  # fmt: skip
        elif isinstance(found, ast.ImportFrom) and not found.level:
            names |= {alias.asname or alias.name: f"{found.module}.{alias.name}" for alias in found.names}

    def dotted(expression: ast.expr) -> str | None:
        if isinstance(expression, ast.Name):
            return names.get(expression.id)
        owner = dotted(expression.value) if isinstance(expression, ast.Attribute) else None
        return owner and f"{owner}.{expression.attr}"

    whole = {*names.values(), *(dotted(e) for e in ast.walk(tree) if isinstance(e, ast.Attribute))}
    yield from (name for name in whole if name and name.partition(".")[0] in ("comfy", "comfy_aimdo", "comfy_kitchen"))


def test_the_list_is_complete(comfy) -> None:
    from svdq.model.core_names import NAMES

    listed = {f"{module}.{name.partition('(')[0]}" for module, names in NAMES.items() for name in names}
    assert "comfy.ops.run_every_op" in listed
    missed = []
    for path in FILES:
        for name in used(path):
            known = any(f"{other}.".startswith(f"{name}.") or f"{name}.".startswith(f"{other}.") for other in listed)
            if not known:
                missed.append(f"{path.relative_to(ROOT)}: {name}")
    assert missed == [], "add them to model/core_names.py"


def test_all_of_it_is_there(comfy) -> None:
    from svdq.model.core_names import missing, require

    assert missing() == []
    require()


def test_what_is_missing_is_named(comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_patcher
    import comfy.ops

    from svdq.model import core_names

    monkeypatch.delattr(comfy.ops, "run_every_op")
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "unpin_weight", lambda self, name: None)
    monkeypatch.setitem(core_names.NAMES, "comfy.lora", (".a_name_that_nothing_has",))
    monkeypatch.setitem(core_names.NAMES, "comfy.not_there", ("anything",))
    expected = {
        "comfy.ops.run_every_op", "comfy.model_patcher.ModelPatcher.unpin_weight(key)",
        "comfy.lora.a_name_that_nothing_has", "comfy.not_there",
    }  # fmt: skip
    assert set(core_names.missing()) == expected
    with pytest.raises(ImportError, match=r"is without .*comfy.ops.run_every_op.* \(tested with ComfyUI 0.30.0\)"):
        core_names.require()
