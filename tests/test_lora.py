"""LoRA columns beside and inside the low-rank branch of a quantized linear, on the CPU."""

from __future__ import annotations

import pytest
import torch

from svdq.kernels import reference
from svdq.kernels.int4 import W4A4

pytestmark = pytest.mark.comfy


def part(n: int, k: int, rank: int, unsigned: bool = False):
    generator = torch.Generator().manual_seed(n + k)
    return W4A4(
        q=torch.randint(-8, 8, (n, k), generator=generator).to(torch.int8),
        wscales=(torch.rand(n, k // 64, generator=generator) * 0.02).half(),
        smooth_factor=torch.rand(k, generator=generator).add(0.5).half(),
        proj_down=torch.randn(rank, k, generator=generator).half() * 0.1,
        proj_up=torch.randn(n, rank, generator=generator).half() * 0.1,
        act_unsigned=unsigned,
    ).pack()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rank", [1, 16, 20])
def test_columns_inside_the_branch_are_columns_beside_it(comfy, axis: int, rank: int) -> None:
    from svdq.model.lora import Columns, extend_parts

    parts = (part(256, 128, 16), part(128, 128, 32)) if axis == 0 else (part(128, 128, 16), part(128, 256, 32, True))
    n, k = (384, 128) if axis == 0 else (128, 384)
    generator = torch.Generator().manual_seed(rank)
    down, up = torch.randn(rank, k, generator=generator).half() * 0.1, torch.randn(n, rank, generator=generator).half()
    columns = Columns((), down, up, (), ((rank, None),))
    extended = extend_parts(parts, axis, columns)
    assert all(new.rank % 16 == 0 and new.rank >= old.rank + rank for new, old in zip(extended, parts, strict=True))
    before, _ = reference.dequantize_parts(parts, axis, torch.float32)
    after, _ = reference.dequantize_parts(extended, axis, torch.float32)
    torch.testing.assert_close(after, before + up.float() @ down.float(), rtol=1e-5, atol=1e-5)


def test_parts_that_a_lora_does_not_touch_stay_as_they_are(comfy) -> None:
    from svdq.model.lora import Columns, extend_parts

    parts = (part(256, 128, 16), part(128, 128, 32))
    up = torch.zeros(384, 12).half()
    up[:128, :8] = 1
    up[128:256, 8:] = 1
    columns = Columns((), torch.ones(12, 128).half(), up, (), ((8, (0, 0, 128)), (4, (0, 128, 128))))
    assert [columns.used(0, *rows) for rows in ((0, 256), (0, 64), (128, 256), (256, 384))] == [
        [slice(0, 12)], [slice(0, 8)], [slice(8, 12)], []
    ]  # fmt: skip
    assert columns.used(1, 0, 64) == [slice(0, 12)], "an offset along the other axis says nothing"
    extended = extend_parts(parts, 0, columns)
    assert extended[0].rank == 32
    assert extended[1] is parts[1]
