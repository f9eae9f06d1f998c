"""Tile choice: what it returns fits the hardware, fills it, and is a plain function."""

from __future__ import annotations

import pytest

from svdq.kernels import tiles
from svdq.kernels.tiles import Tile, choose_tile

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
