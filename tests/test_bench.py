"""``bench kernels --static``: the prediction's limits, and the rows without compiling anything."""

from __future__ import annotations

import json
from collections import Counter

import pytest

pytest.importorskip("triton")

from svdq.benchmarks import kernels, sass
from svdq.benchmarks.predict import GPUS, predict_gemm
from svdq.cli import main
from svdq.kernels.tiles import TILES, choose_tile

GPU = {gpu.name: gpu for gpu in GPUS}
QKV = {"m": 4608, "n": 9216, "k": 3072}


def predict(gpu: str, rank: int = 0, per_mma: float = 11.5, epilogue: int = 300, **shape: int) -> float:
    shape = QKV | shape
    tile = choose_tile(shape["m"], shape["n"], GPU[gpu].arch)
    return predict_gemm(GPU[gpu], tile, **shape, rank=rank, instructions_per_mma=per_mma,
                        epilogue_instructions=epilogue).seconds  # fmt: skip


@pytest.mark.parametrize("gpu", GPU)
def test_never_above_the_tensor_cores(gpu: str) -> None:
    rates = GPU[gpu]
    ceiling = 16384 / rates.mma_cycles * 4 * rates.sms * rates.ghz * 1e9
    operations = 2 * QKV["m"] * QKV["n"] * QKV["k"]
    assert 0.4 * ceiling < operations / predict(gpu) < ceiling


def test_what_makes_it_slower() -> None:
    assert predict("RTX 3090", per_mma=16.0) == predict("RTX 3090")  # the tensor cores are the limit up to here
    assert predict("RTX 3090", per_mma=18.7) == pytest.approx(predict("RTX 3090") * 18.7 / 16, rel=0.02)
    assert predict("RTX 3090", rank=32) > predict("RTX 3090")
    assert predict("RTX 3090", epilogue=3000) > predict("RTX 3090")
    assert predict("RTX 4090", k=12288) > 3.5 * predict("RTX 4090")


def test_small_problems_do_not_fill_a_gpu() -> None:
    small = {"m": 64, "n": 3072, "k": 3072}
    per_operation = predict("RTX 4090", **small) / 64
    assert per_operation > 3 * predict("RTX 4090") / 4608 / 3


def test_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def figures(tile, arch: str, **options: object) -> sass.Figures:
        asked.append((tile, arch, tuple(options.items())))
        assert tile in TILES[arch]
        return sass.Figures(11.5, 128, 255, 0, tile.shared_bytes, 300, Counter(IMMA=128))

    monkeypatch.setattr(sass, "gemm_int4_figures", figures)
    # The command would look for a Python of its own; this one is right.
    monkeypatch.setenv("SVDQ_CLI_RESTARTED", "1")
    assert main(["bench", "kernels", "--static", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(asked) == len(set(asked)), "a kernel was compiled twice"
    assert len(rows) == len(GPUS) * len(kernels.OPS) * len(kernels.TOKENS) * 2
    assert {row["arch"] for row in rows} == {"sm_80", "sm_86", "sm_89"}
    wanted = {"op", "arch", "m", "n", "k", "rank", "instructions_per_mma", "registers", "spill_bytes", "shared_bytes",
              "epilogue_instructions", "predicted_tops", "triton"}  # fmt: skip
    assert all(wanted <= set(row) and 0 < row["predicted_tops"] < row["ceiling_tops"] for row in rows)


def test_measured_rows_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SVDQ_CLI_RESTARTED", "1")
    assert main(["bench", "kernels"]) == 2
    assert "add --static" in capsys.readouterr().err
