"""File order <-> natural order: the golden files byte for byte, the index formulas element by element, round trips."""

from __future__ import annotations

import pytest
import torch
from checks import assert_same, golden_names, load_golden

from svdq.kernels import int4, layout
from svdq.kernels.int4 import AWQ, W4A4, PackedAWQ, PackedW4A4


def _random(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _codes(n: int, k: int, low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(low, high + 1, (n, k), generator=torch.Generator().manual_seed(n + k)).to(dtype)


def _numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape)


# ---- golden files


@pytest.mark.parametrize("name", golden_names("layer_int4_*.safetensors"))
def test_golden_w4a4(name: str) -> None:
    tensors = load_golden(name)
    logical = {key.removeprefix("logical."): tensors[key] for key in tensors if key.startswith("logical.")}
    packed = {key.removeprefix("packed."): tensors[key] for key in tensors if key.startswith("packed.")}
    n, k, rank = *logical["q"].shape, logical["lora_down"].shape[0]
    weight = PackedW4A4(
        packed["qweight"], packed["wscales"], packed["smooth"], packed["lora_down"], packed["lora_up"]
    ).unpack()
    assert_same(weight.q[:n, :k], logical["q"], "q")
    assert_same(weight.wscales[:n, : k // int4.GROUP], logical["wscales"], "wscales")
    assert_same(weight.smooth_factor[:k], logical["smooth"], "smooth")
    assert_same(weight.proj_down[:rank, :k], logical["lora_down"], "lora_down")
    assert_same(weight.proj_up[:n, :rank], logical["lora_up"], "lora_up")
    for leaf, name_of_logical, size in (("bias", "bias_stored", n), ("smooth_orig", "smooth_orig", k)):
        assert_same(layout.unpack_vector(packed[leaf])[:size], logical[name_of_logical], leaf)
    assert not weight.proj_down[rank:].any() and not weight.proj_up[:, rank:].any(), "padded ranks must be zero"

    again = weight.pack()
    for leaf, field in (
        ("qweight", again.qweight), ("wscales", again.wscales), ("smooth", again.smooth_factor),
        ("lora_down", again.proj_down), ("lora_up", again.proj_up),
    ):  # fmt: skip
        assert_same(field, packed[leaf], f"packed {leaf}")


@pytest.mark.parametrize("name", golden_names("layer_int4_*.safetensors"))
def test_golden_w4a4_from_logical(name: str) -> None:
    """Packing what the original converter was given gives the bytes that it wrote, where nothing was padded."""
    tensors = load_golden(name)
    logical = {key.removeprefix("logical."): tensors[key] for key in tensors if key.startswith("logical.")}
    (n, k), rank = logical["q"].shape, logical["lora_down"].shape[0]
    if n % 128 or k % 128 or rank % 16:
        with pytest.raises(ValueError, match="multiple of"):
            W4A4(*(logical[f] for f in ("q", "wscales", "smooth", "lora_down", "lora_up"))).pack()
        return
    packed = W4A4(*(logical[f] for f in ("q", "wscales", "smooth", "lora_down", "lora_up"))).pack()
    assert_same(packed.qweight, tensors["packed.qweight"])
    assert_same(packed.wscales, tensors["packed.wscales"])
    assert_same(packed.smooth_factor, tensors["packed.smooth"])
    assert_same(packed.proj_down, tensors["packed.lora_down"])
    assert_same(packed.proj_up, tensors["packed.lora_up"])
    assert_same(layout.pack_vector(logical["bias_stored"]), tensors["packed.bias"])


@pytest.mark.parametrize("name", golden_names("awq_*.safetensors"))
def test_golden_awq(name: str) -> None:
    tensors = load_golden(name)
    splits = int(name.rpartition("_s")[2].partition(".")[0])
    codes = tensors["logical.q_signed_original_row_order"]
    scales = tensors["logical.wscales_original_row_order"]
    packed = PackedAWQ(*(tensors[f"packed.{leaf}"] for leaf in ("qweight", "wscales", "wzeros")), splits)
    weight = packed.unpack()
    assert_same(weight.code, (codes + 7).to(torch.uint8), "code")
    assert_same(weight.wscales, scales, "wscales")
    assert_same(weight.wzeros, -(7 * scales), "wzeros")

    again = weight.pack(splits)
    groups = scales.shape[1]
    assert_same(again.qweight, tensors["packed.qweight"])
    assert_same(again.wscales, tensors["packed.wscales"][:groups])
    assert_same(again.wzeros, tensors["packed.wzeros"][:groups])

    bias = tensors["packed.bias"].clone().reshape(-1, splits)
    bias[:, 1::3] -= 1 if splits > 1 else 0
    expected = layout.interleave_rows(tensors["input.bias_original"], splits).reshape(-1, splits)
    # The file rounds after adding 1: bf16 has steps of 2^-8 there (2^-7 above 2).
    assert (bias.float() - expected.float()).abs().max() <= 2**-7


# ---- index formulas, written out once more


def test_qweight_formula() -> None:
    n, k = 256, 256
    codes = _codes(n, k, -8, 7, torch.int8)
    packed = layout.pack_qweight(codes)
    rows, columns = torch.meshgrid(torch.arange(n), torch.arange(k), indexing="ij")
    word = ((rows // 128 * (k // 64) + columns // 64) * 8 + rows // 16 % 8) * 8 + rows % 8
    word = (word * 4 + columns // 8 % 4) * 4 + rows // 8 % 2 * 2 + columns // 32 % 2
    byte = packed.view(torch.uint8).reshape(-1)[word * 4 + columns % 8 // 2].int()
    nibble = byte >> (4 * (columns % 2)) & 0xF
    assert torch.equal((nibble ^ 8) - 8, codes.int())


def test_vector_and_wscales_formula() -> None:
    n, groups = 384, 6
    m = torch.arange(n)
    position = m % 128 // 16 * 16 + m % 8 // 2 * 4 + m // 8 % 2 * 2 + m % 2
    assert torch.equal(layout.unpack_vector(_numbered(n)), (m // 128 * 128 + position).int())
    flat = (m // 128 * (groups * 128) + position)[:, None] + torch.arange(groups) * 128
    assert torch.equal(layout.unpack_wscales(_numbered(groups, n)), flat.int())


def test_lowrank_formulas() -> None:
    k, r = 256, 48
    rank, column = torch.meshgrid(torch.arange(r), torch.arange(k), indexing="ij")
    down = (column // 16 * (r // 16) + rank // 16) * 256 + rank % 8 * 32 + column % 8 // 2 * 8
    down = down + rank // 8 % 2 * 4 + column // 8 % 2 * 2 + column % 2
    assert torch.equal(layout.unpack_lowrank_down(_numbered(k, r)), down.int())

    n = 256
    row, rank = torch.meshgrid(torch.arange(n), torch.arange(r), indexing="ij")
    up = (row // 16 * (r // 16) + rank // 16) * 256 + row % 8 * 32 + rank % 8 // 2 * 8
    up = up + row // 8 % 2 * 4 + rank // 8 % 2 * 2 + rank % 2
    assert torch.equal(layout.unpack_lowrank_up(_numbered(n, r)), up.int())


def test_awq_formula() -> None:
    n, k = 24, 192
    codes = _codes(n, k, 0, 15, torch.uint8)
    packed = layout.pack_awq(codes)
    rows, columns = torch.meshgrid(torch.arange(n), torch.arange(k), indexing="ij")
    word = rows // 4 * (k // 2) + columns // 64 * 32 + rows % 4 * 8 + columns % 64 // 32 * 4 + columns % 8 // 2
    bit = 16 * (columns % 2) + 4 * (columns % 32 // 8)
    assert torch.equal((packed.reshape(-1)[word] >> bit & 0xF).to(torch.uint8), codes)


def test_interleave_formula() -> None:
    hidden, splits = 5, 6
    stored = layout.interleave_rows(_numbered(splits * hidden), splits)
    for i in range(splits):
        for j in range(hidden):
            assert stored[j * splits + i] == i * hidden + j


# ---- round trips and views


@pytest.mark.parametrize("n, k, rank", [(128, 128, 16), (384, 256, 32), (256, 640, 128), (128, 128, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_w4a4_round_trip(n: int, k: int, rank: int, dtype: torch.dtype) -> None:
    weight = W4A4(
        _codes(n, k, -8, 7, torch.int8), _random((n, k // 64), dtype), _random((k,), dtype), _random((rank, k), dtype),
        _random((n, rank), dtype), act_unsigned=True,
    )  # fmt: skip
    packed = weight.pack()
    assert (packed.n, packed.k, packed.rank) == (n, k, rank)
    assert tuple(packed.wscales.shape) == (k // 64, n)
    again = packed.unpack()
    for field in ("q", "wscales", "smooth_factor", "proj_down", "proj_up"):
        assert_same(getattr(again, field), getattr(weight, field), field)
    assert again.act_unsigned and packed.act_unsigned


@pytest.mark.parametrize("splits", [3, 6])
def test_awq_round_trip(splits: int) -> None:
    n, k = 128 * splits, 128
    weight = AWQ(_codes(n, k, 0, 15, torch.uint8), _random((n, k // 64)), _random((n, k // 64)))
    packed = weight.pack(splits)
    assert (packed.n, packed.k) == (n, k)
    nan_rows = torch.full((14, n), float("nan"), dtype=torch.bfloat16)
    padded = PackedAWQ(
        packed.qweight, torch.cat((packed.wscales, nan_rows)), torch.cat((packed.wzeros, nan_rows)), splits
    )
    for again in (packed.unpack(), padded.unpack()):
        for field in ("code", "wscales", "wzeros"):
            assert_same(getattr(again, field), getattr(weight, field), field)


def test_rows_are_a_cut_of_the_unpacked_weight_and_share_memory() -> None:
    n, k, rank = 512, 256, 32
    weight = W4A4(
        _codes(n, k, -8, 7, torch.int8), _random((n, 4)), _random((k,)), _random((rank, k)), _random((n, rank))
    )
    packed = weight.pack()
    cut = packed.rows(128, 384)
    assert cut.qweight.untyped_storage().data_ptr() == packed.qweight.untyped_storage().data_ptr()
    unpacked = cut.unpack()
    assert_same(unpacked.q, weight.q[128:384])
    assert_same(unpacked.wscales, weight.wscales[128:384])
    assert_same(unpacked.proj_up, weight.proj_up[128:384])
    assert_same(unpacked.proj_down, weight.proj_down)


def test_layouts_run_on_meta_tensors() -> None:
    packed = PackedW4A4(
        *(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in (
            ((256, 64), torch.int8), ((2, 256), torch.bfloat16), ((128,), torch.bfloat16),
            ((128, 16), torch.bfloat16), ((256, 16), torch.bfloat16),
        )),
    )  # fmt: skip
    assert packed.unpack().q.shape == (256, 128)
    assert packed.unpack().pack().wscales.shape == (2, 256)


@pytest.mark.parametrize(
    "call",
    [
        lambda: layout.pack_qweight(torch.zeros(64, 128, dtype=torch.int8)),
        lambda: layout.pack_qweight(torch.zeros(128, 64, dtype=torch.int8)),
        lambda: layout.pack_vector(torch.zeros(130)),
        lambda: layout.pack_wscales(torch.zeros(100, 2)),
        lambda: layout.pack_lowrank_down(torch.zeros(20, 128)),
        lambda: layout.pack_lowrank_up(torch.zeros(128, 20)),
        lambda: layout.pack_awq(torch.zeros(6, 64, dtype=torch.uint8)),
        lambda: layout.pack_awq(torch.zeros(8, 96, dtype=torch.uint8)),
    ],
)
def test_sizes_that_do_not_fit_are_refused(call) -> None:
    with pytest.raises(ValueError, match=r"is \d+, but the packed layout needs a multiple of \d+"):
        call()
