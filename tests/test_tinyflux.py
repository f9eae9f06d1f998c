"""The demo's tiny FLUX: the pictures that it is trained on, the training, the reader, and the files in assets/."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT, find_comfyui
from PIL import Image
from safetensors.torch import load_file

from svdq.benchmarks.tinyflux import glyphs
from svdq.benchmarks.tinyflux.pictures import COLOURS, ROW, SIZE, is_held_out, prompts, render, sign
from svdq.benchmarks.tinyflux.score import READER, Scorer
from svdq.cli.demo import ASSETS, DEMO_VAE
from svdq.loaders import open_checkpoint
from svdq.loaders.demo_assets import DEMO_PROMPT_TOKENS, PROMPT_FEATURES, demo_prompt_embedding
from svdq.quantizer.prompts import read_prompts

INT4, DENSE = "svdq-int4_r16-demo-flux.safetensors", "demo-flux-bf16.safetensors"
MOST_BYTES = 12_000_000
TRAINING = ROOT / "benchmarks" / "tinyflux"


def test_a_sample_depends_on_seed_and_index_alone() -> None:
    first, again = prompts(40, seed=5), prompts(10, seed=5, start=30)
    assert first[30:] == again
    assert prompts(10, seed=6) != first[:10]
    assert [sample.prompt for sample in prompts(3, seed=0)] == [
        "a blue sign with white letters that says bsicfoc",
        "a pink triangle above a black ring on an orange background",
        "a purple circle below a green ring on a pink background",
    ]


def test_words_of_the_test_are_not_those_of_the_training() -> None:
    held_out = {sample.word for sample in prompts(400, seed=0) if sample.kind == "sign"}
    trained = {sample.word for sample in prompts(400, seed=0, held_out=False) if sample.kind == "sign"}
    assert len(held_out) > 200 and len(trained) > 200
    assert all(map(is_held_out, held_out)) and not any(map(is_held_out, trained))


def test_every_prompt_fits_the_tokens_and_says_what_is_shown() -> None:
    for sample in prompts(500, seed=3):
        assert len(sample.prompt.encode()) <= DEMO_PROMPT_TOKENS
        assert len(sample.row) == ROW
        words = sample.prompt.split()
        for value in (sample.background, sample.board, sample.letters, *(shape.kind for shape in sample.shapes)):
            assert value is None or value in words
        if sample.kind == "sign":
            assert words[-1] == sample.word


def test_pictures_are_drawn_alike_everywhere_and_hold_their_colours() -> None:
    samples = prompts(64, seed=2)
    pictures, subject = render(samples)
    assert pictures.shape == (64, 3, SIZE, SIZE) and subject.shape == (64, SIZE, SIZE)
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert torch.equal(pictures[10:12], render(samples[10:12])[0])
    for sample, picture, covered in zip(samples, pictures, subject, strict=True):
        colour = torch.tensor(COLOURS[list(COLOURS)[sample.surfaces[0]]])
        assert (picture[:, 0, 0] - colour).abs().max() < 0.04
        assert 0.01 < covered.mean() < 0.6


def test_a_sign_shows_a_letter_in_each_cell() -> None:
    sample = sign("hello", seed=1)
    assert sample.prompt == "a sign that says hello"
    _, _, count, pitch, left, *_ = sample.row
    row = torch.tensor([sample.row])
    without = row.clone()
    without[:, 9:16] = 26
    ink = (render(row)[0] - render(without)[0]).abs().amax((0, 1, 2))  # by column
    assert count == 5
    for cell in range(5):
        assert ink[round(left + cell * pitch) : round(left + (cell + 1) * pitch)].max() > 0.3
    assert not ink[: int(left)].any() and not ink[int(left + 5 * pitch) + 1 :].any()
    # The same letter in another cell.
    assert len({sample.row[index] for index in (11, 12)}) == 1 and sample.row[9] != sample.row[10]


def test_words_that_cannot_be_drawn_are_refused() -> None:
    for word in ("a", "abcdefgh", "Abc", "ab c"):
        with pytest.raises(ValueError, match="2 to 7 letters"):
            sign(word)


def test_the_glyphs_are_those_of_the_fonts() -> None:
    try:
        for face in glyphs.FACES:
            glyphs.find_font(face, glyphs.font_folders())
    except FileNotFoundError as error:
        pytest.skip(str(error))
    stored = load_file(glyphs.FILE)["distance"].int()
    made = glyphs.make(glyphs.font_folders()).int()
    # Versions of FreeType and Pillow round outlines differently.
    assert ((made - stored).abs() > 16).float().mean() < 0.01


def test_missing_fonts_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"DejaVuSans\.ttf.*fonts-dejavu-core"):
        glyphs.make([tmp_path])


def test_reader_refuses_files_and_pictures_of_something_else() -> None:
    with pytest.raises(ValueError, match="reader"):
        Scorer.load(glyphs.FILE)
    scorer = Scorer().eval()
    with pytest.raises(ValueError, match=r"\[2, 3, 128, 128\]"):
        scorer.score(torch.zeros(3, 3, SIZE, SIZE), prompts(2))


def test_reader_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scorer, samples = Scorer().eval(), prompts(4)
    scorer.save(tmp_path / "reader.safetensors")
    loaded = Scorer.load(tmp_path / "reader.safetensors")
    for name, tensor in loaded.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, scorer.state_dict()[name].half().float())
    result = loaded.score(render(samples)[0], samples)
    signs = torch.tensor([sample.kind == "sign" for sample in samples])
    assert torch.equal(result["word"].isnan(), ~signs) and torch.equal(result["shape"].isnan(), signs)


def run(*argv: object, folder: Path) -> str:
    comfyui = find_comfyui()
    if comfyui is None:
        pytest.skip("no ComfyUI")
    result = subprocess.run(
        [sys.executable, str(TRAINING), *map(str, argv)],
        env=os.environ | {"COMFYUI_PATH": str(comfyui), "CUDA_VISIBLE_DEVICES": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.comfy
@pytest.mark.slow
def test_training_runs_and_its_files_are_what_the_loaders_take(comfy: ModuleType, tmp_path: Path) -> None:
    out = run("train", "out", "--smoke", folder=tmp_path)
    assert "held out: error" in out and "wrote demo-flux-bf16" in out
    folder = tmp_path / "out"
    dense = comfy.sd.load_diffusion_model_state_dict(load_file(folder / DENSE))
    assert dense.model.diffusion_model.params.context_in_dim == PROMPT_FEATURES
    vae = comfy.sd.VAE(sd=load_file(folder / DEMO_VAE))
    assert set(load_file(folder / DEMO_VAE)) == set(vae.first_stage_model.state_dict())
    Scorer.load(folder / READER.name)
    assert Image.open(folder / "samples.png").size == (8 * SIZE, SIZE)


    checkpoint = load_file(folder / "checkpoint.safetensors")
    moments = [tensor for name, tensor in checkpoint.items() if name.startswith("exp_avg.")]
    assert len(moments) == len(list(dense.model.diffusion_model.parameters()))
    assert any(moment.any() for moment in moments)


def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    from svdq.benchmarks.tinyflux.train import resume, save_checkpoint

    def make() -> tuple[torch.nn.Module, torch.nn.Module, torch.optim.Optimizer]:
        model, average = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2).requires_grad_(False)
        return model, average, torch.optim.AdamW(model.parameters(), 0.1)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    path = tmp_path / "checkpoint.safetensors"
    model, average, optimizer = make()
    assert resume(path, model, average, optimizer) == (0, 0.0)
    train(model, optimizer)
    save_checkpoint(path, model, average, optimizer, 1, 2.5)
    again, its_average, its_optimizer = make()
    assert resume(path, again, its_average, its_optimizer) == (1, 2.5)
    assert torch.equal(its_average.weight, average.weight)
    for pair in ((model, optimizer), (again, its_optimizer)):
        train(*pair)
    assert torch.equal(again.weight, model.weight) and torch.equal(again.bias, model.bias)


@pytest.mark.comfy
def test_the_transformer_is_trained_as_comfyui_runs_it(comfy: ModuleType) -> None:
    """Our walk through the modules gives what ComfyUI's forward pass gives, for the same numbers."""
    from svdq.benchmarks.tinyflux import flow
    from svdq.benchmarks.tinyflux.train import pack_prompts

    management = sys.modules["comfy.model_management"]
    try:
        model = flow.make_model(depth_single_blocks=1)
    finally:
        management.in_training = False
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    samples = prompts(2)
    context, pooled = flow.encode_prompts(pack_prompts(samples))
    for index, sample in enumerate(samples):
        expected = demo_prompt_embedding(sample.prompt, PROMPT_FEATURES, PROMPT_FEATURES)
        assert torch.equal(context[index], expected[0][0])
        assert torch.allclose(pooled[index], expected[1][0], atol=1e-6)
    x = torch.randn(2, 16, 16, 16, generator=generator)
    sigma, guidance = torch.tensor([0.2, 1.0]), torch.tensor([3.5, 1.0])
    with torch.no_grad():
        pe = flow.positions(model, DEMO_PROMPT_TOKENS, 8, 8, x.device)
        ours = flow.velocity(model, x, sigma, context, pooled, guidance, pe)
        theirs = model(x, sigma, context, pooled, guidance)
    assert theirs.std() > 0.1
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_sigmas_are_those_of_comfyui(comfy: ModuleType) -> None:
    import comfy.model_sampling
    import comfy.samplers

    from svdq.benchmarks.tinyflux import flow

    theirs = comfy.samplers.simple_scheduler(comfy.model_sampling.ModelSamplingFlux(), 20)
    t = torch.linspace(1, 0, 21)
    assert torch.allclose(flow.SHIFT * t / (1 + (flow.SHIFT - 1) * t), theirs, atol=1e-3)


def test_prompts_for_calibration(tmp_path: Path) -> None:
    run("prompts", "prompts.safetensors", "--count", 5, folder=tmp_path)
    found = read_prompts(tmp_path / "prompts.safetensors")
    assert len(found) == 5 and found[0].context.shape == (DEMO_PROMPT_TOKENS, PROMPT_FEATURES)


# ---------------------------------------------------------------------------------------------------------- assets


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer.load()


def test_assets_are_small_and_of_one_model() -> None:
    files = list(ASSETS.glob("*.safetensors"))
    assert {path.name for path in files} == {INT4, DENSE, DEMO_VAE, READER.name}
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    checkpoint = open_checkpoint(ASSETS / INT4)
    dense = load_file(ASSETS / DENSE)
    assert checkpoint.ranks.keys() == {16} and checkpoint.variant == "dev"
    for name, layer in checkpoint.layers():
        if type(layer).__name__ == "PlainLayer" and f"{name}.weight" in dense:
            assert torch.equal(layer.weight, dense[f"{name}.weight"]), name


def test_reader_reads_what_is_drawn(scorer: Scorer) -> None:
    samples = prompts(300, seed=4)
    result = scorer.score(render(samples)[0], samples)
    for name in ("letters", "word", "shape", "colour", "place", "surface"):
        assert result[name].nanmean() > 0.95, name
    # And it is not easily pleased.
    shuffled = samples[1:] + samples[:1]
    assert scorer.score(render(samples)[0], shuffled)["word"].nanmean() < 0.05


@pytest.fixture(scope="module")
def pipeline(comfy: ModuleType) -> Any:
    """prompt, seed -> picture float32 [1, 3, 128, 128] in 0..1, through our nodes and ComfyUI's."""
    from svdq import nodes
    from svdq.model.load import load_flux

    model = load_flux(str(ASSETS / INT4), "auto")
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(ASSETS / DEMO_VAE)))

    def make(text: str, seed: int) -> torch.Tensor:
        (positive,) = nodes.SVDQDemoPrompt.execute(model=model, text=text).args
        latent = {"samples": torch.zeros(1, 16, SIZE // 8, SIZE // 8)}
        with torch.inference_mode():
            (made,) = nodes.SVDQFluxSampler.execute(
                model, positive, latent, seed, 12, 3.5, "euler", "simple", 1.0, 1.0
            ).args
            return vae.decode(made["samples"]).movedim(-1, 1)

    return make


@pytest.mark.comfy
def test_the_demo_spells(pipeline: Any, scorer: Scorer) -> None:
    words = [scorer.read_words(pipeline(f"a sign that says {word}", 6))[0] for word in ("hello", "open", "zebra")]
    assert words == ["hello", "open", "zebra"]


@pytest.mark.comfy
def test_the_demo_draws_what_the_prompt_says(pipeline: Any, scorer: Scorer) -> None:
    samples = prompts(8, seed=9)
    pictures = torch.cat([pipeline(sample.prompt, index) for index, sample in enumerate(samples)])
    result = scorer.score(pictures, samples)
    assert result["letters"].nanmean() > 0.8
    assert result["colour"].nanmean() > 0.8
