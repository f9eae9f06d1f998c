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

BF16_LIMIT = 2e-2


def test_the_page_lists_the_cases() -> None:
    assert compatibility_table.PAGE.read_text(encoding="utf-8") == compatibility_table.page(), (
        "run: python tests/compatibility_table.py"
    )


@pytest.mark.gpu
def test_same_latent_in_bf16(env: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA on both models in the file's type."""
    import test_compatibility_lora  # noqa: F401  (puts its cases on the list)
    from comfy import model_management

    monkeypatch.setattr(model_management, "FORCE_FP32", False)
    monkeypatch.setattr(model_management, "LORA_COMPUTE_DTYPES", {})
    quantized, dense = load_pair(env.folder / "dev.safetensors", torch.bfloat16)
    case = CASES["LoraLoaderModelOnly: LoRA"]
    assert relative(case.run(quantized, env), case.run(dense, env)) <= BF16_LIMIT
