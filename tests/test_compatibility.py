"""The page of what works, and one case in the type that a GPU computes in. The cases are in test_compatibility_*.py."""

from __future__ import annotations

from types import SimpleNamespace

import compatibility_env
import compatibility_table
import pytest
import torch
from compatibility_env import CASES, load_pair
from flux_models import relative

pytestmark = pytest.mark.comfy

env, float32 = compatibility_env.env, compatibility_env.float32  # fixtures

BF16_LIMIT = 1.25


def test_the_page_lists_the_cases() -> None:
    assert compatibility_table.PAGE.read_text(encoding="utf-8") == compatibility_table.page(), (
        "run: python tests/compatibility_table.py"
    )


@pytest.mark.gpu
def test_bf16_is_as_near_to_float32_as_the_twin(env: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA on both models in the file's type. Core rounds the sum of weight and LoRA to it, we the product of each;
    after a few steps of sampling both have gone their own ways, the same distance from the float32 result."""
    import test_compatibility_lora  # noqa: F401  (puts its cases on the list)
    from comfy import model_management

    case, path = CASES["LoraLoaderModelOnly: LoRA"], env.folder / "dev.safetensors"
    exact = case.run(load_pair(path, torch.float32)[1], env)
    monkeypatch.setattr(model_management, "FORCE_FP32", False)
    monkeypatch.setattr(model_management, "LORA_COMPUTE_DTYPES", {})
    ours, twin = (relative(case.run(model, env), exact) for model in load_pair(path, torch.bfloat16))
    print(f"{ours:.4f} from float32, the twin {twin:.4f}")
    assert 0 < ours <= BF16_LIMIT * twin
