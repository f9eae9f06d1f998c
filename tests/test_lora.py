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
    columns = Columns((), (1.0,), down, (up,), ((rank, None),), n)
    extended = extend_parts(parts, axis, columns)
    assert all(new.rank % 16 == 0 and new.rank >= old.rank + rank for new, old in zip(extended, parts, strict=True))
    before, _ = reference.dequantize_parts(parts, axis, torch.float32)
    after, _ = reference.dequantize_parts(extended, axis, torch.float32)
    torch.testing.assert_close(after, before + up.float() @ down.float(), rtol=1e-5, atol=1e-5)


def test_parts_that_a_lora_does_not_touch_stay_as_they_are(comfy) -> None:
    from svdq.model.lora import Columns, extend_parts

    parts = (part(256, 128, 16), part(128, 128, 32))
    ups, spans = (torch.ones(128, 8), torch.ones(128, 4)), ((8, (0, 0, 128)), (4, (0, 128, 128)))
    columns = Columns((), (1.0, 1.0), torch.ones(12, 128).half(), ups, spans, 384)
    assert [columns.used(0, *rows) for rows in ((0, 256), (0, 64), (128, 256), (256, 384))] == [
        [slice(0, 12)], [slice(0, 8)], [slice(8, 12)], []
    ]  # fmt: skip
    assert columns.used(1, 0, 64) == [slice(0, 12)], "an offset along the other axis says nothing"
    extended = extend_parts(parts, 0, columns)
    assert extended[0].rank == 32
    assert extended[1] is parts[1]


@pytest.mark.parametrize("axis", [0, 1])
def test_another_strength_in_place_is_that_strength_from_the_start(comfy, axis: int) -> None:
    """Two LoRAs of ranks that need padding, one of them for some rows or inputs only, so that a part has but one."""
    from comfy.weight_adapter import LoRAAdapter

    from svdq.model.lora import build_columns, change_strengths, extend_parts

    parts = (part(256, 128, 16), part(128, 128, 32)) if axis == 0 else (part(128, 128, 16), part(128, 256, 32, True))
    shape = (384, 128) if axis == 0 else (128, 384)
    offset = (axis, 0, 64)
    generator = torch.Generator().manual_seed(axis)

    def adapter(rank: int, n: int, k: int, alpha: float | None) -> LoRAAdapter:
        up, down = (torch.randn(*size, generator=generator).bfloat16() for size in ((n, rank), (rank, k)))
        return LoRAAdapter(set(), (up, down, alpha, None, None, None))

    whole = adapter(5, *shape, alpha=2.0)
    partial = adapter(20, *((64, 128) if axis == 0 else (128, 64)), alpha=None)

    def columns(first: float, second: float, cached=None):
        # ComfyUI makes new adapters of the same tensors.
        values = [LoRAAdapter(set(), value.weights) for value in (whole, partial)]
        patches = [(first, values[0], 1.0, None, None), (second, values[1], 1.0, offset, None)]
        return build_columns(patches, shape, torch.device("cpu"), torch.float16, cached)

    before = columns(1.0, 0.3)
    assert columns(1.0, 0.3, before) is before
    after = columns(-0.7, 0.9, before)
    assert after.down is before.down and after.ups is before.ups
    changed, expected = extend_parts(parts, axis, before), extend_parts(parts, axis, columns(-0.7, 0.9))
    places = [new.proj_up.data_ptr() for new in changed]
    change_strengths(parts, axis, after, [new.proj_up for new in changed])
    for new, fresh, place in zip(changed, expected, places, strict=True):
        assert torch.equal(new.proj_down, fresh.proj_down) and torch.equal(new.proj_up, fresh.proj_up)
        assert new.proj_up.data_ptr() == place
    assert torch.equal(after.up, columns(-0.7, 0.9).up)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("ranks", [(2,), (4,), (8,), (16,), (48,), (16, 8), (32, 16, 4), (16, 1), (4, 16), (8, 8)])
def test_strengths_are_written_where_they_go(
    comfy, axis: int, dtype: torch.dtype, ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without packing anything anew where a LoRA's columns fill tiles or a part of one; the same bits anyway."""
    from svdq.model import lora

    parts = (part(256, 128, 16), part(128, 128, 32)) if axis == 0 else (part(128, 128, 16), part(128, 256, 32, True))
    n, k = (384, 128) if axis == 0 else (128, 384)
    generator = torch.Generator().manual_seed(sum(ranks))
    offsets = [None, (0, 32, 64), (1, 0, 64)][: len(ranks)]
    ups = tuple(
        torch.randn(n if offset is None or offset[0] else offset[2], rank, generator=generator).to(dtype)
        for rank, offset in zip(ranks, offsets, strict=True)
    )
    down = torch.randn(sum(ranks), k, generator=generator).half()

    def columns(*scales: float) -> lora.Columns:
        return lora.Columns((), scales, down, ups, tuple(zip(ranks, offsets, strict=True)), n)

    packed = []
    pack = lora.pack_lowrank_up
    monkeypatch.setattr(lora, "pack_lowrank_up", lambda up: packed.append(1) or pack(up))
    changed = lora.extend_parts(parts, axis, columns(*[0.3] * len(ranks)))
    scales = [-0.7, 1.1, 0.37][: len(ranks)]
    lora.change_strengths(parts, axis, columns(*scales), [new.proj_up for new in changed])
    for new, fresh in zip(changed, lora.extend_parts(parts, axis, columns(*scales)), strict=True):
        assert torch.equal(new.proj_up, fresh.proj_up)
    assert bool(packed) == (dtype == torch.bfloat16 or ranks in [(16, 1), (4, 16)])
