"""Tile choice: what it returns fits the hardware, fills it, and is a plain function. And the Hopper kernel's items."""

from __future__ import annotations

from dataclasses import replace

import pytest

from svdq.kernels import tiles
from svdq.kernels.tiles import Tile, choose_tile
from svdq.kernels.tiles_int8 import BLOCK, HOPPER, NO_PIECES, Plan, plan_items

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90")
FLUX_LINEARS = ((9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288))  # N, K


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_tile_fits_its_architecture(arch: str) -> None:
    for tile in tiles.TILES[arch]:
        assert tile.problem(128, arch) is None
        assert tile.warps * tile.blocks_per_sm(arch) / 4 >= 2, f"{tile}: fewer than two warps for each scheduler"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("n", "k"), FLUX_LINEARS)
@pytest.mark.parametrize("m", [1, 63, 512, 4096, 4608, 16896])
def test_choice_fits_the_shape(m: int, n: int, k: int, arch: str) -> None:
    tile = choose_tile(m, n, arch)
    assert tile.problem(n, arch) is None
    assert tile.blocks(m, n) * tile.block_m * tile.block_n >= m * n
    if m >= 512:
        assert tile.accumulators == 128, "the leanest main loop for every linear of FLUX"


def test_choice_by_amount_of_work() -> None:
    assert choose_tile(4608, 9216, "sm_86").block_m == 256
    assert choose_tile(512, 3072, "sm_86").block_m == 128
    assert choose_tile(1, 3072, "sm_86").block_m == 64
    assert choose_tile(4608, 9216, "sm_86", out_bits=32).accumulators == 64
    assert choose_tile(4608, 9216, "sm_86", epilogue="GELU").block_m == 128
    with pytest.raises(ValueError, match="no INT4 tiles for sm_70, expected one of sm_80"):
        choose_tile(1, 128, "sm_70")


def test_shared_memory_and_registers_by_hand() -> None:
    tile = Tile(128, 128, 2, 2, stages=2)
    # Two stages of two groups: 256 rows and columns of 64 nibbles and a 16-bit scale.
    assert tile.shared_bytes == 2 * 2 * 256 * (32 + 2)
    assert tile.accumulators == 128 and tile.m16_per_warp == 4 and tile.n8_per_warp == 8
    assert tile.blocks_per_sm("sm_86") == 2  # 255 registers by 128 threads, twice
    assert Tile(128, 128, 2, 2, stages=3).blocks_per_sm("sm_86") == 1  # shared memory


@pytest.mark.parametrize(
    ("tile", "n", "message"),
    [
        (Tile(32, 128, 1, 2, 2), 128, "whole blocks of 64 rows"),
        (Tile(64, 64, 2, 1, 2), 128, "whole tiles of 128 columns"),
        (Tile(128, 128, 2, 1, 2), 128, "256 accumulators"),
        (Tile(64, 128, 2, 2, 1), 128, "at least 2 stages"),
        (Tile(64, 256, 1, 4, 2), 384, "not a multiple of 256"),
        (Tile(256, 128, 4, 2, 4), 128, "bytes of shared memory"),
    ],
)
def test_tiles_that_cannot_run_say_why(tile: Tile, n: int, message: str) -> None:
    assert message in tile.problem(n, "sm_86")


# ---- the Hopper kernel of the INT8 GEMM

H200 = 132  # multiprocessors


def test_blocks_that_are_left_over_are_cut_where_that_pays() -> None:
    assert plan_items(1536, 3072, 96, HOPPER, H200) == Plan(264, 5, 384, 132)  # two waves and 24 blocks: 5 pieces each
    assert plan_items(1024, 3072, 96, HOPPER, H200) == Plan(132, 2, 252, 132)
    assert plan_items(4608, 3072, 96, HOPPER, H200).pieces == 1  # 72 of 132 would be two rounds of pieces
    assert plan_items(1536, 3072, 24, HOPPER, H200).pieces == 1  # too short
    assert plan_items(1536, 3072, 96, NO_PIECES, H200) == Plan(288, 1, 288, 132)
    assert plan_items(1, 256, 1, HOPPER, H200) == Plan(2, 1, 2, 2)


@pytest.mark.parametrize(("n", "k"), FLUX_LINEARS)
@pytest.mark.parametrize("m", [1, 63, 512, 1024, 1536, 4608, 16896])
@pytest.mark.parametrize("multiprocessors", [1, 78, H200])
def test_items_are_all_of_the_work(m: int, n: int, k: int, multiprocessors: int) -> None:
    for join in (0, HOPPER.join):
        plan = plan_items(m, n, k // 128, replace(HOPPER, join=join), multiprocessors)
        assert plan.whole + plan.split_blocks == -(-m // BLOCK) * -(-n // BLOCK)
        assert plan.items == plan.whole + plan.split_blocks * plan.pieces
        assert plan.whole % multiprocessors == 0 or plan.pieces == 1
        assert plan.grid == min(plan.items, multiprocessors)
        assert plan.split_blocks < 4 * multiprocessors, "as many counters as there are"
        assert k // 128 >= plan.pieces, "no piece is empty"
