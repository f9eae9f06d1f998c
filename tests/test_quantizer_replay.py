"""Runs of the calibration that only start some blocks: the same bits as whole runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from quantizer_models import CONTEXT, HIDDEN, POOLED, conditioning, load_dense
from test_quantizer_solve import heavy_tailed
from torch import Tensor

from svdq.loaders.weights import FluxConfig
from svdq.quantizer import activations, convert
from svdq.quantizer.replay import Replay
from svdq.quantizer.source import stock_shapes

pytestmark = pytest.mark.usefixtures("comfy")
CONFIG = FluxConfig(HIDDEN, 2, 3, 64, 64, CONTEXT, POOLED, guidance_embed=True)
BLOCKS = [f"double_blocks.{i}" for i in range(2)] + [f"single_blocks.{i}" for i in range(3)]
PROMPTS, STEPS = 2, 2


@pytest.fixture(scope="module")
def model(comfy: Any) -> Any:
    """Two double and three single blocks; a patch changes what lies between two of them."""
    tensors = {
        name: (heavy_tailed(*shape, seed) if len(shape) == 2 else heavy_tailed(1, shape[0], seed)[0] / 10).bfloat16()
        for seed, (name, shape) in enumerate(stock_shapes(CONFIG).items())
    }
    patcher = load_dense(tensors)

    def brighter(arguments: dict[str, Any], extra: dict[str, Callable]) -> dict[str, Tensor]:
        out = extra["original_block"](arguments | {"img": arguments["img"] * 1.25})
        return out | {"img": out["img"] + 0.5}

    for kind, index in (("double_block", 1), ("single_block", 1)):
        patcher.set_model_patch_replace(brighter, "dit", kind, index)
    return patcher


@pytest.fixture
def calibration(model: Any) -> Any:
    from svdq.nodes.graph_model import FluxCalibration

    return FluxCalibration(model, conditioning(PROMPTS), 64, 64, STEPS, 0)


@pytest.fixture
def started(calibration: Any) -> Iterator[Counter]:
    """Block -> how often it was computed."""
    counts: Counter = Counter()
    handles = []
    for name in BLOCKS:
        linear = f"{name}.img_attn.qkv" if name.startswith("double") else f"{name}.linear1"

        def count(*_: Any, name: str = name) -> None:
            counts[name] += 1

        handles.append(calibration.flux.get_submodule(linear).register_forward_pre_hook(count))
    yield counts
    for handle in handles:
        handle.remove()


def sections() -> dict[str, list[slice]]:
    """Of all quantized linears, in model order."""
    shapes = stock_shapes(CONFIG)
    units = convert.units_of(CONFIG)
    return {name: found for unit in units for name, found in convert.input_sections(unit, shapes).items()}


def silent(done: int, total: int) -> None:
    pass


def moments(calibration: Any, cuts: list[int], replay: Replay) -> dict[tuple[str, int], Tensor]:
    """Of all linears, a part up to each of ``cuts`` and the rest in a run of its own."""
    every, found = sections(), {}
    names = list(every)
    for start, stop in zip([0, *cuts], [*cuts, len(names)], strict=True):
        wanted = {name: every[name] for name in names[start:stop]}
        found |= activations.collect_moments(calibration, wanted, silent, partial(replay.part, wanted, names[stop:]))
    return found


@pytest.mark.parametrize("cuts", [[9], [5, 9, 22], [3, 6, 9, 12, 15, 18, 21, 24, 26], list(range(1, 29))], ids=len)
@pytest.mark.parametrize("whole_first", [True, False], ids=["statistics", "gone on with"])
def test_the_same_moments(
    whole_first: bool, cuts: list[int], calibration: Any, started: Counter, tmp_path: Path
) -> None:
    expected = activations.collect_moments(calibration, sections(), silent)
    replay = Replay(calibration.flux, calibration.run, tmp_path / "inputs")
    if whole_first:
        activations.collect(calibration, list(sections()), silent, replay.all)
    started.clear()
    found = moments(calibration, cuts, replay)
    assert len(sections()) == 29 and set(found) == set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    # A block that two parts share is computed in both, one between two parts once.
    names = list(sections())
    spans = zip([0, *cuts], [*cuts, len(names)], strict=True)
    parts = [{".".join(name.split(".")[:2]) for name in names[start:stop]} for start, stop in spans]
    evaluations = PROMPTS * STEPS
    for name in BLOCKS:
        runs = sum(name in part for part in parts)
        if not whole_first:
            runs += name not in parts[0]
        assert started[name] == evaluations * runs, name
    assert "forward" not in vars(calibration.flux)
    assert not any("forward" in vars(calibration.flux.get_submodule(name)) for name in BLOCKS)


def test_parts_that_are_not_next_to_each_other(calibration: Any, started: Counter, tmp_path: Path) -> None:
    """As when work goes on that had finished some units."""
    every = sections()
    expected = activations.collect_moments(calibration, every, silent)
    first = {name: found for name, found in every.items() if name.startswith("double_blocks.0.")}
    last = {name: found for name, found in every.items() if name.startswith("single_blocks.2.")}
    replay = Replay(calibration.flux, calibration.run, tmp_path)
    replay.all(silent)
    started.clear()
    found = activations.collect_moments(calibration, first, silent, partial(replay.part, first, list(last)))
    assert started == {name: 4 for name in BLOCKS[:-1]}, "what the last one reads has to be computed"
    found |= activations.collect_moments(calibration, last, silent, partial(replay.part, last, []))
    assert started == {name: 4 for name in BLOCKS}
    assert found and all(torch.equal(found[key], expected[key]) for key in found)


def test_other_inputs_are_found_out(calibration: Any, tmp_path: Path) -> None:
    replay = Replay(calibration.flux, calibration.run, tmp_path)
    replay.all(silent)
    calibration._seed += 1
    with pytest.raises(RuntimeError, match="evaluation 0 of the model has other inputs"):
        replay.part(["double_blocks.0.img_attn.qkv"], ["double_blocks.1.img_attn.qkv"], silent)
    assert "forward" not in vars(calibration.flux)


def test_interrupted_while_inputs_are_kept(calibration: Any, tmp_path: Path) -> None:
    """The next run does not take what is there for all of it."""
    replay = Replay(calibration.flux, calibration.run, tmp_path)
    expected = activations.collect_moments(calibration, sections(), silent, replay.all)
    names = list(sections())

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        replay.part(names[:3], names[14:], interrupt)
    wanted = {name: found for name, found in sections().items() if name in names[14:]}
    found = activations.collect_moments(calibration, wanted, silent, partial(replay.part, wanted, []))
    assert all(torch.equal(found[key], expected[key]) for key in found)
