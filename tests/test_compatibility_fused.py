"""The cases of compatibility once more with fused blocks, in the arithmetic of INT8 and bf16 as on a GPU, by PyTorch:
within rounding of the same layers one by one. The other files compare those with the dense model, in float32."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from types import SimpleNamespace

import compatibility_env
import pytest
import reference_layers
import torch
from compatibility_env import CASES, sample
from flux_models import dense_state_dict, relative
from test_lora_families import (  # noqa: F401  once more, with the fixture of this file
    test_a_partly_loaded_model,
    test_another_strength_needs_no_fresh_model,
    test_removing_restores_every_bit,
    test_two_branches_of_one_graph_with_different_loras,
)

from svdq.loaders import open_checkpoint

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

for _kind in ("conditioning", "lora", "models", "patches", "sampling"):
    importlib.import_module(f"test_compatibility_{_kind}")
# Copies are loaded anew, without what is in place of kernels here; torch.compile leaves fused blocks alone.
NAMES = [name for name in CASES if not any(word in name for word in ("MultiGPU", "copy", "Device", "torch.compile"))]
LIMIT = 2.0  # measured: up to 1.5, where CFG and a second step amplify what four blocks round


@pytest.fixture(scope="module")
def env(comfy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """As compatibility_env's; models(variant): {"fused", "stock", "dense"}, ``which`` of them ``pair`` gives, and how
    many blocks have been computed fused."""
    import comfy.sd

    from svdq.cli.synth import synth
    from svdq.model import flux

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        layers = reference_layers.in_place_of_kernels(patch)["int8"]
        env = SimpleNamespace(**vars(compatibility_env._make_env(tmp_path_factory.mktemp("fused") / "env")))
        env.which, env.computed = "fused", 0

        @functools.cache
        def models(variant: str) -> dict:
            path = env.folder / f"{variant}.safetensors"
            if not path.exists():
                synth(path, variant=variant, scale="tiny", seed=len(list(env.folder.iterdir())))
            sd = dense_state_dict(open_checkpoint(path), torch.bfloat16, torch.device("cpu"))
            found = {
                "fused": reference_layers.load(path, layers, fused=True),
                "stock": reference_layers.load(path, layers, fused=False),
                "dense": comfy.sd.load_diffusion_model_state_dict(sd, model_options={"dtype": torch.bfloat16}),
            }
            for patcher in found.values():
                patcher.model.manual_cast_dtype = None  # or ComfyUI would compute in float32 on a CPU
            return found

        def count(compute):
            def counted(self, *arguments):
                env.computed += 1
                return compute(self, *arguments)

            return counted

        for block in (flux.FusedDoubleBlock, flux.FusedSingleBlock):
            patch.setattr(block, "_compute", count(block._compute))
        plain = functools.cache(lambda which, variant: sample(models(variant)[which], env))
        env.models, env.plain = models, lambda variant: plain(env.which, variant)
        env.pair = lambda variant: (models(variant)[env.which], models(variant)["dense"])
        torch.set_num_threads(1)
        yield env
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fused_by_default(env: SimpleNamespace) -> None:
    env.which = "fused"


@pytest.mark.parametrize("name", NAMES)
def test_fused_blocks_agree(name: str, env: SimpleNamespace) -> None:
    case, latents = CASES[name], {}
    for env.which in ("stock", "dense", "fused"):
        env.computed = 0
        latents[env.which] = case.run(env.models(case.variant)[env.which], env)
    fused, stock, dense = (latents[which] for which in ("fused", "stock", "dense"))
    if not env.computed:  # something looks inside the blocks, or changes dense weights
        assert torch.equal(fused, stock)
    assert relative(fused, stock) <= LIMIT * relative(stock, dense)
