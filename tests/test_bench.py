"""``bench kernels``: the prediction's limits, and the rows without compiling or measuring anything."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from svdq.benchmarks import kernels, measure, sass
from svdq.benchmarks.predict import GPUS, predict_gemm
from svdq.cli import RESTARTED, bench, main
from svdq.kernels.tiles import TILES, choose_tile

GPU = {gpu.name: gpu for gpu in GPUS}
QKV = {"m": 4608, "n": 9216, "k": 3072}


@pytest.fixture(autouse=True)
def this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command would look for a Python of its own; this one is right."""
    monkeypatch.setenv(RESTARTED, "1")


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
    assert main(["bench", "kernels", "--static", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(asked) == len(set(asked)), "a kernel was compiled twice"
    assert len(rows) == len(GPUS) * len(kernels.OPS) * len(kernels.TOKENS) * 2
    assert {row["arch"] for row in rows} == {"sm_80", "sm_86", "sm_89"}
    wanted = {"op", "arch", "m", "n", "k", "rank", "instructions_per_mma", "registers", "spill_bytes", "shared_bytes",
              "epilogue_instructions", "predicted_tops", "triton"}  # fmt: skip
    assert all(wanted <= set(row) and 0 < row["predicted_tops"] < row["ceiling_tops"] for row in rows)


class Fake:
    """Kernels that note what they are called with, and a clock by which every call takes a millisecond."""

    def __init__(self) -> None:
        self.gemms: list[tuple] = []

    def quantize_act(self, x: torch.Tensor, weight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert x.dtype == weight.smooth_factor.dtype and x.shape[1] == weight.k == weight.proj_down.shape[0]
        assert (x.min() >= -0.171875) == weight.act_unsigned, "what GELU puts out, and only that, is unsigned"
        m, k = x.shape
        return (
            torch.zeros(m, k // 8, dtype=torch.int32),
            torch.zeros(m, k // 64).bfloat16(),
            torch.zeros(m, weight.rank),
        )

    def gemm_w4a4(self, codes, ascales, lora_act, weight, bias, after, second) -> None:
        m, n = lora_act.shape[0], weight.n
        after.check(m, n, ascales.dtype)
        assert lora_act.shape[1] == weight.rank and bias.shape == (n,) and weight.wscales.shape == (weight.k // 64, n)
        assert second is None or (second[3].n == n and second[3].act_unsigned and second[2].shape == lora_act.shape)
        self.gemms.append((weight.act_unsigned, after.name if second is None else "two inputs"))

    def gemm_gelu_quantize(self, codes, ascales, lora_act, weight, following, bias) -> None:
        assert following.k == weight.n and following.act_unsigned and bias.shape == (weight.n,)
        self.gemms.append((weight.act_unsigned, "GELU_QUANTIZE"))

    def gemv_w4a16(self, x, weight, bias) -> None:
        assert (x.shape[1], bias.shape) == (weight.k, (weight.n,)) and weight.wzeros.shape == weight.wscales.shape

    def time_calls(self, calls, seconds: float = 0.3) -> measure.Timing:
        assert len(calls) > 1, "operands take turns"
        for call in calls:
            call()
        return measure.Timing(1000.0, 900.0, 1100.0, 10)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    for name in ("quantize_act", "gemm_w4a4", "gemm_gelu_quantize", "gemv_w4a16"):
        monkeypatch.setattr(kernels, name, getattr(fake, name))
    monkeypatch.setattr(measure, "time_calls", fake.time_calls)
    monkeypatch.setattr(measure, "copy_gbs", lambda card: 500.0)
    monkeypatch.setattr(measure, "synchronize", lambda: None)
    monkeypatch.setattr(kernels, "TOKENS", (192, 64))
    monkeypatch.setattr(kernels, "EMULATED_TOKENS", (64,))
    monkeypatch.setattr(kernels, "MODULATION", (768, 128))
    monkeypatch.setattr(kernels, "QUANTIZE_INPUTS", (("qkv", 128, False), ("fc2", 512, True)))
    small = (replace(op, n=op.n // 24, k=op.k // 24, second_k=op.second_k // 24) for op in kernels.MEASURED_OPS)
    monkeypatch.setattr(kernels, "MEASURED_OPS", tuple(small))
    return fake


def test_measured_rows(fake: Fake) -> None:
    card = measure.Card("a card", "sm_86", l2_bytes=1000, int4_tops=100.0, device="cpu")
    rows = list(kernels.measured_rows(card))
    compiled, quantized, modulation, gemms = rows[0], rows[1:5], rows[5:8], rows[8:]
    assert (compiled["op"], compiled["unit"], compiled["percent"]) == ("compile all", "kernels", None)
    assert [(row["op"], row["k"], row["rank"]) for row in quantized] == [
        ("quantize_s4", 128, 0), ("quantize_s4", 128, 32), ("quantize_u4", 512, 0), ("quantize_u4", 512, 32),
    ]  # fmt: skip
    # x and smooth_factor, and as the fake's outputs have it half a byte and 2 / 64 of one per element.
    moved = 192 * 128 * (2 + 0.5 + 2 / 64) + 2 * 128
    assert quantized[0]["value"] == pytest.approx(moved / 1e-3 / 1e9, abs=0.05)
    assert [(row["op"], row["m"]) for row in modulation] == [("gemv", 1), ("gemv", 2), ("gemv", 8)]
    assert {(row["m"], row["rank"]) for row in gemms} == {(m, rank) for m in (192, 64) for rank in (0, 32)}
    assert len(gemms) == 4 * len(kernels.MEASURED_OPS)
    for row in rows[1:]:
        assert row["low_us"] <= row["us"] <= row["high_us"]
        assert row["ceiling"] == (500.0 if row["unit"] == "GB/s" else 100.0)
        assert not row["emulated"]
    kinds = {"NONE", "GELU", "GATE_RESIDUAL", "NORM_ROPE", "GELU_QUANTIZE", "two inputs"}
    assert {kind for _, kind in fake.gemms} == kinds
    assert (True, "NONE") in fake.gemms and (False, "NONE") in fake.gemms
    compiled_first = [kind for _, kind in fake.gemms[:10]]  # five of a step, for two numbers of tokens
    assert set(compiled_first) == kinds - {"NONE", "GELU"}


def test_percent_of_the_ceiling(fake: Fake) -> None:
    card = measure.Card("a card", "sm_86", l2_bytes=1000, int4_tops=0.5, device="cpu")
    row = kernels._gemm_row(card, kernels.Op("gemm_int4", "a", 1024, 256), 640, 0)
    tops = 2 * 640 * 1024 * 256 / 1e-3 / 1e12
    assert row.value == pytest.approx(tops, abs=0.05) and row.percent == pytest.approx(100 * tops / 0.5, abs=0.1)


def test_emulated_and_missing_gemms(fake: Fake) -> None:
    emulated = list(kernels.measured_rows(measure.Card("H", "sm_90", 1000, None, device="cpu")))[8:]
    expected = [(op.name, 64, 32) for op in kernels.MEASURED_OPS]
    assert [(row["op"], row["m"], row["rank"]) for row in emulated] == expected
    assert all(row["emulated"] and row["percent"] is None for row in emulated)
    assert len(list(kernels.measured_rows(measure.Card("B", "sm_120", 1000, None, device="cpu")))) == 8


def test_operands_leave_the_cache() -> None:
    card = measure.Card("a card", "sm_86", l2_bytes=6_000_000, int4_tops=1.0)
    assert len(measure.rotating(object, 1_000_000, card)) == 18
    assert len(measure.rotating(object, 1_000_000_000, card)) == 2


def test_empty_triton_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from triton import knobs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with measure.empty_triton_cache() as folder:
        assert knobs.cache.dir == str(folder) and not list(folder.iterdir())
    assert knobs.cache.dir == str(tmp_path)


def test_table_and_saved_file(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "benchmarks").mkdir()
    card = measure.Card("NVIDIA GeForce RTX 3090", "sm_86", 1000, 100.0, device="cpu")
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "_measured", lambda status: kernels.measured_rows(card, status.update))
    assert main(["bench", "kernels", "--save"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["op", "linear"] and len(lines) == 1 + 8 + 4 * len(kernels.MEASURED_OPS)
    (saved,) = (tmp_path / "benchmarks" / "results").iterdir()
    assert saved.name.startswith("kernels-nvidia-geforce-rtx-3090-20") and saved.suffix == ".json"
    assert len(json.loads(saved.read_text())["rows"]) == len(lines) - 1


def test_saving_static_rows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--static", "--save"]) == 2
    assert "--save is for measured rows" in capsys.readouterr().err


def test_measuring_without_a_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "kernels"]) == 2
    assert "add --static" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.slow
def test_measured_on_this_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """On an idle GPU of the INT4 path, or of another kind, what is measured stays below its ceiling."""
    assert main(["bench", "kernels", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"compile all", "quantize_s4", "quantize_u4", "gemv"} <= {row["op"] for row in rows}
    assert all(row["us"] > 0 and row["low_us"] <= row["us"] <= row["high_us"] for row in rows)
    assert all(0 < row["percent"] <= 105 for row in rows if row["percent"] is not None)
