"""The nodes in this process: dropdown, fingerprints, schemas and translations; the demo's stand-in files."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from svdq.loaders import CheckpointError
from svdq.loaders.demo_assets import (
    DEMO_PROMPT_TOKENS,
    PROMPT_FEATURES,
    byte_features,
    byte_numbers,
    demo_prompt_embedding,
    write_demo_vae,
)
from svdq.loaders.legacy import BLOCKS_FILE, OUTER_FILE

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = sorted(path.name for path in (ROOT / "locales").iterdir())
# vue-i18n gives these a meaning inside a translated text.
I18N_SYNTAX = "{}@|$"


@pytest.fixture
def nodes(comfy: ModuleType) -> ModuleType:
    """This pack's nodes."""
    import svdq.nodes

    return svdq.nodes


@pytest.fixture
def folders(comfy: ModuleType, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two empty diffusion_models folders in place of ComfyUI's, and two secret models beside them."""
    import folder_paths

    both = (tmp_path / "models", tmp_path / "more")
    for folder in both:
        folder.mkdir()
    touch(tmp_path, "secret.safetensors")
    touch(tmp_path, "secret-folder", BLOCKS_FILE)
    saved = folder_paths.folder_names_and_paths["diffusion_models"]
    folder_paths.folder_names_and_paths["diffusion_models"] = ([str(folder) for folder in both], saved[1])
    folder_paths.filename_list_cache.pop("diffusion_models", None)
    yield both
    folder_paths.folder_names_and_paths["diffusion_models"] = saved
    folder_paths.filename_list_cache.pop("diffusion_models", None)


def touch(*parts: str | Path) -> Path:
    path = Path(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def schemas(nodes: ModuleType, migration: bool = False) -> dict[str, object]:
    """Node id -> schema. migration: also those for workflows made for Nunchaku."""
    import asyncio

    extension = nodes.SVDQExtensionWithMigration(print) if migration else nodes.SVDQExtension()
    classes = asyncio.run(extension.get_node_list())
    return {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in classes}


@pytest.mark.comfy
def test_node_ids_and_inputs_are_those_of_saved_workflows(nodes: ModuleType) -> None:
    """Public names: workflows on people's disks hold them. Add, never rename or reorder."""
    inputs = {node_id: [entry.id for entry in schema.inputs] for node_id, schema in schemas(nodes).items()}
    assert inputs == {
        "SVDQFluxLoader": ["model_name", "precision", "weights"],
        "SVDQFluxSampler": [
            "model", "positive", "latent_image", "seed", "steps", "guidance", "sampler_name", "scheduler", "denoise",
            "cfg", "negative",
        ],
        "SVDQFluxQuantize": [
            "model", "conditioning", "filename", "folder", "rank", "gptq", "width", "height", "steps",
            "calibration_seed", "overwrite", "iterations", "dtype", "target_error",
            "keep_16bit", "keep_int8",
        ],
        "SVDQSaveConditioning": ["conditioning", "filename_prefix"],
        "SVDQLoadConditioning": ["file"],
        "SVDQDemoPrompt": ["model", "text"],
    }  # fmt: skip


@pytest.mark.comfy
def test_precisions_are_those_of_the_kernels(nodes: ModuleType) -> None:
    from svdq.kernels import PRECISIONS

    (precision,) = (entry for entry in schemas(nodes)["SVDQFluxLoader"].inputs if entry.id == "precision")
    assert tuple(precision.options) == PRECISIONS and precision.default == "auto"


@pytest.mark.comfy
def test_a_saved_workflow_without_weights_is_one_with_auto(nodes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from svdq.model import WEIGHTS
    from svdq.nodes import flux_loader

    (weights,) = (entry for entry in schemas(nodes)["SVDQFluxLoader"].inputs if entry.id == "weights")
    assert tuple(weights.options) == WEIGHTS and weights.default == "auto" and weights.optional
    seen = []
    monkeypatch.setattr(flux_loader, "load_flux", lambda path, **options: seen.append(options))
    monkeypatch.setattr(flux_loader, "model_path", str)
    for given in ({}, {"weights": "int8"}):
        flux_loader.SVDQFluxLoader.execute("file", "int8", **given)
    assert seen == [{"precision": "int8", "weights": "auto"}, {"precision": "int8", "weights": "int8"}]


@pytest.mark.comfy
def test_legacy_folder_is_one_entry(nodes: ModuleType, folders: tuple[Path, Path]) -> None:
    from svdq.nodes.model_files import model_names, model_path

    first, second = folders
    for file in (BLOCKS_FILE, OUTER_FILE):
        touch(second, "flux", "svdq-legacy", file)
    touch(first, "half-a-folder", OUTER_FILE)
    touch(first, "z.safetensors")
    touch(first, "svdq-file.safetensors")
    touch(first, BLOCKS_FILE)  # loose: there is no folder to name
    names = model_names()
    assert names == [
        os.path.join("flux", "svdq-legacy"),
        "svdq-file.safetensors",
        "half-a-folder",
        BLOCKS_FILE,
        "z.safetensors",
    ]
    assert model_path(names[0]) == str(second / "flux" / "svdq-legacy")
    assert model_path("half-a-folder") == str(first / "half-a-folder")
    assert model_path("svdq-file.safetensors") == str(first / "svdq-file.safetensors")


@pytest.mark.comfy
def test_new_file_appears_without_a_restart(nodes: ModuleType, folders: tuple[Path, Path]) -> None:
    from svdq.nodes.model_files import model_names

    assert model_names() == []
    touch(folders[0], "svdq-new.safetensors")
    os.utime(folders[0], ns=(0, 1))  # two changes within one tick of the clock have the same time
    assert model_names() == ["svdq-new.safetensors"]


@pytest.mark.comfy
@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "../secret-folder",
        "sub/../../secret.safetensors",
        "{outside}",
        "",
        ".",
        "..",
        "no-such.safetensors",
        "a\0b",
    ],
)
def test_names_outside_the_dropdown_do_not_resolve(nodes: ModuleType, folders: tuple[Path, Path], name: str) -> None:
    from svdq.nodes.model_files import model_path

    touch(folders[0], "sub", "svdq.safetensors")
    name = name.replace("{outside}", str(folders[0].parent / "secret.safetensors"))
    with pytest.raises(CheckpointError) as refusal:
        model_path(name)
    assert "is not in ComfyUI's diffusion_models folders" in str(refusal.value)
    assert repr(name) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.comfy
def test_linked_files_and_folders_work(nodes: ModuleType, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """People keep models on another disk and link them in; a link that leads nowhere is explained."""
    from svdq.nodes.model_files import model_path

    touch(tmp_path, "disk", "svdq.safetensors")
    try:
        (folders[0] / "linked").symlink_to(tmp_path / "disk")
        (folders[0] / "broken.safetensors").symlink_to(tmp_path / "gone.safetensors")
    except OSError:
        pytest.skip("this system makes no links")
    assert model_path(os.path.join("linked", "svdq.safetensors")).endswith("svdq.safetensors")
    with pytest.raises(CheckpointError, match=r"broken\.safetensors"):
        model_path("broken.safetensors")


@pytest.mark.comfy
@pytest.mark.parametrize("replaced", [("svdq.safetensors",), ("legacy", BLOCKS_FILE), ("legacy", OUTER_FILE)])
def test_fingerprint_follows_the_files(
    nodes: ModuleType, folders: tuple[Path, Path], replaced: tuple[str, ...]
) -> None:
    for parts in (("svdq.safetensors",), ("legacy", BLOCKS_FILE), ("legacy", OUTER_FILE)):
        touch(folders[0], *parts)
    file = folders[0].joinpath(*replaced)

    def fingerprint() -> str:
        return nodes.SVDQFluxLoader.fingerprint_inputs(model_name=replaced[0], precision="auto")

    before = fingerprint()
    assert fingerprint() == before
    file.write_bytes(b"more")
    longer = fingerprint()
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    assert len({before, longer, fingerprint()}) == 3


@pytest.mark.comfy
def test_demo_prompt_refuses_other_models(nodes: ModuleType) -> None:
    model = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1)))
    with pytest.raises(ValueError, match=r"needs a FLUX model, got Linear"):
        nodes.SVDQDemoPrompt.execute(model=model, text="a")


@pytest.mark.comfy
def test_english_texts_are_those_of_the_schemas(nodes: ModuleType) -> None:
    expected = {}
    for node_id, schema in schemas(nodes, migration=True).items():
        expected[node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {entry.id: {"name": entry.id, "tooltip": entry.tooltip} for entry in schema.inputs},
            "outputs": {
                str(i): {"name": entry.display_name, "tooltip": entry.tooltip} for i, entry in enumerate(schema.outputs)
            },
        }
    assert json.loads((ROOT / "locales/en/nodeDefs.json").read_text(encoding="utf-8")) == expected


@pytest.mark.comfy
def test_every_node_has_a_help_page_that_names_its_inputs(nodes: ModuleType) -> None:
    found = schemas(nodes, migration=True)
    assert {path.stem for path in (ROOT / "web/docs").glob("*.md")} == set(found)
    for node_id, schema in found.items():
        page = (ROOT / "web/docs" / f"{node_id}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {schema.display_name}\n")
        # The fifteen slots of the LoRA stack are described once.
        names = {re.sub(r"_(\d+)$", "_1", entry.id) for entry in schema.inputs}
        assert [name for name in sorted(names) if f"`{name}`" not in page] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_translation_is_complete_and_plain(language: str) -> None:
    def texts(entry: object, path: str = "") -> dict[str, str]:
        if isinstance(entry, str):
            return {path: entry}
        return {key: text for name, value in entry.items() for key, text in texts(value, f"{path}/{name}").items()}

    def read(name: str) -> dict[str, str]:
        return texts(json.loads((ROOT / "locales" / name).read_text(encoding="utf-8")))

    for file in ("nodeDefs.json", "main.json"):
        translated = read(f"{language}/{file}")
        assert translated.keys() == read(f"en/{file}").keys()
        assert [key for key, text in translated.items() if not text or any(c in text for c in I18N_SYNTAX)] == []


def test_pack_never_imports_its_nodes_by_an_absolute_name(comfy: ModuleType) -> None:
    """``import nodes`` must mean ComfyUI's nodes.py, in this process as in the server."""
    import svdq.nodes  # noqa: F401

    assert Path(sys.modules["nodes"].__file__).name == "nodes.py"


def test_demo_embedding_has_a_token_for_each_byte() -> None:
    text = "a small house"
    context, pooled = demo_prompt_embedding(text, PROMPT_FEATURES, PROMPT_FEATURES)
    assert context.shape == (1, DEMO_PROMPT_TOKENS, PROMPT_FEATURES) and pooled.shape == (1, PROMPT_FEATURES)
    assert (context[0, : len(text)].abs() == 1).all() and not context[0, len(text) :].any()
    assert pooled.square().mean().item() == pytest.approx(1)

    changed, changed_pooled = demo_prompt_embedding("a small mouse", PROMPT_FEATURES, PROMPT_FEATURES)
    differs = (changed != context).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [8]
    assert not torch.equal(pooled, changed_pooled)


def test_demo_embedding_tells_bytes_and_places_apart() -> None:
    """Every byte, and every place that the features can tell, has a code of its own; those of ASCII are orthogonal."""
    bytes_ = torch.zeros(256, 5, dtype=torch.uint8)
    bytes_[:, 0] = torch.arange(256)
    codes = byte_features(bytes_)[:, :128]
    assert len(codes.unique(dim=0)) == 256
    assert torch.equal(codes[:128] @ codes[:128].t(), 128 * torch.eye(128))

    numbers = byte_numbers(b"to be\nor not")
    assert [row[0] for row in numbers] == list(b"to be\nor not")
    # place in the word, bytes left of it, index of the word, words left; a space ends its word
    assert [row[1:] for row in numbers[:4]] == [(0, 2, 0, 3), (1, 1, 0, 3), (2, 0, 0, 3), (0, 2, 1, 2)]
    assert numbers[-1][1:] == (2, 1, 3, 0)
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("text", ["", "a", "ä", "x" * 1000, "line\nbreak", "  two  spaces "])
def test_demo_embedding_fits_any_model(text: str) -> None:
    tokens = min(len(text.encode()), DEMO_PROMPT_TOKENS)
    for widths in ((64, 8), (128, 64), (4096, 768)):
        context, pooled = demo_prompt_embedding(text, *widths)
        assert context.shape == (1, DEMO_PROMPT_TOKENS, widths[0]) and pooled.shape == (1, widths[1])
        assert context.isfinite().all() and pooled.isfinite().all()
        assert int(context.any(-1).sum()) == (77 if len(text) == 1000 else tokens)  # 13 bytes share a token


def test_demo_embedding_is_the_same_on_every_machine() -> None:
    context, pooled = demo_prompt_embedding("a sign", 8, 4)
    assert context[0, 0, :4].tolist() == pytest.approx([-2.0, 1.125, -2.0, 0.375], abs=1e-5)
    assert pooled[0].tolist() == pytest.approx([-0.468521, 0.546608, 1.405564, -0.937043], abs=1e-5)


def test_every_byte_of_a_long_text_counts() -> None:
    text = "x" * 1000
    context, _ = demo_prompt_embedding(text, 64, 8)
    for position in (0, 500, 999):
        changed, _ = demo_prompt_embedding(text[:position] + "y" + text[position + 1 :], 64, 8)
        assert (changed != context).any(-1).sum() == 1


def test_demo_vae_file_is_small_reproducible_and_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        write_demo_vae(tmp_path / "sub" / name)
    first, second = (tmp_path / "sub" / name for name in ("a.safetensors", "b.safetensors"))
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < 6_000_000
    assert all(tensor.isfinite().all() for tensor in load_file(first).values())

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_demo_vae(tmp_path / "sub" / "c.safetensors")
    assert sorted(os.listdir(tmp_path / "sub")) == ["a.safetensors", "b.safetensors"]


@pytest.fixture(scope="module")
def vae(comfy: ModuleType, tmp_path_factory: pytest.TempPathFactory):
    """The demo VAE as ComfyUI's own VAE object; the file has exactly the weights that it asks for."""
    path = tmp_path_factory.mktemp("vae") / "demo.safetensors"
    write_demo_vae(path)
    state_dict, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    vae = comfy.sd.VAE(sd=state_dict, metadata=metadata)
    assert set(state_dict) == set(vae.first_stage_model.state_dict())
    return vae


@pytest.mark.comfy
class TestDemoVAE:
    """Through ComfyUI's own VAE class, as the VAELoader node makes it."""

    @staticmethod
    def smooth_picture(height: int, width: int) -> torch.Tensor:
        y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
        return torch.stack((x, y, 0.5 + 0.5 * torch.sin(6 * x + 4 * y)), -1).unsqueeze(0)

    @staticmethod
    def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
        return -10 * (a - b).square().mean().log10().item()

    def test_picture_survives_encode_and_decode(self, vae) -> None:
        picture = self.smooth_picture(192, 256)
        with torch.inference_mode():
            latent = vae.encode(picture)
            decoded = vae.decode(latent)
        assert latent.shape == (1, 16, 24, 32) and decoded.shape == picture.shape
        # Measured: 35 dB. Without the edge blocks the grey frame costs 8 dB.
        assert self.psnr(decoded, picture) > 34

    @pytest.mark.parametrize("colour", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.5, 0.5, 0.5), (1.0, 0.0, 0.0)])
    def test_plain_colour_stays_plain(self, vae, colour: tuple[float, ...]) -> None:
        picture = torch.tensor(colour).expand(1, 64, 64, 3)
        with torch.inference_mode():
            decoded = vae.decode(vae.encode(picture))
        # The decoder's input limiter takes off up to 6 % of the strongest colours; edges and corners are like the rest.
        assert (decoded - picture).abs().max() < 0.07
        assert (decoded - decoded[:, 32:33, 32:33]).abs().max() < 1e-3

    def test_latents_are_in_the_range_of_noise(self, vae) -> None:
        """The sampler mixes them with unit noise: much smaller or larger ones would make denoise meaningless."""
        import comfy.latent_formats

        with torch.inference_mode():
            latent = comfy.latent_formats.Flux().process_in(vae.encode(self.smooth_picture(256, 256)))
        assert 0.2 < latent.std() < 1.5
        assert latent.abs().max() < 2.5

    def test_live_preview_shows_the_colours_of_the_result(self, vae) -> None:
        import comfy.latent_formats
        import latent_preview

        flux = comfy.latent_formats.Flux()
        latent = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            decoded = vae.decode(flux.process_out(latent))
        previewer = latent_preview.Latent2RGBPreviewer(flux.latent_rgb_factors, flux.latent_rgb_factors_bias)
        preview = torch.from_numpy(np.asarray(previewer.decode_latent_to_preview(latent)).astype("float32"))
        small = torch.nn.functional.avg_pool2d(decoded.movedim(-1, 1), 8)[0].movedim(0, -1)
        for channel in range(3):
            both = torch.stack((small[..., channel].flatten(), preview[..., channel].flatten()))
            assert torch.corrcoef(both)[0, 1] > 0.75
