"""What a soak does: a small pool of configurations, and runs drawn from it, most of them several times.

Everything follows from a seed. Imports neither torch nor ComfyUI.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

MODELS = ("svdq-int4_r16-demo-flux.safetensors", "svdq-int4_r32-soak.safetensors")
VAE = "demo-flux-vae.safetensors"
WEIGHTS = ("auto", "int4", "int8")  # of the loader; they change no bit, so each run has another one
LORAS = ("all", "kohya", "parts", "outer", "lokr")  # kinds of files, see soak_files.py
SIZES = ((128, 128), (64, 96), (192, 128), (96, 96))
SAMPLERS = ("euler", "dpmpp_2m")
TEXTS = ("a sign that says soak", "a blue sign with white letters that says again", "a small red circle")

LEAST_RUNS = 12
POOL = 24  # configurations at most
INTERRUPTED_STEPS = 200  # so many that an interrupt comes in time

# Kind of a bad run -> the node that has to refuse it.
REFUSED = {"truncated": "LoraLoaderModelOnly", "nan": "LoraLoaderModelOnly", "unavailable": "SVDQFluxLoader"}
# Kinds of runs with a LoRA that does not fit: it has to be named, and to change nothing.
NAMED = ("sizes", "sdxl")


@dataclass(frozen=True)
class Configuration:
    """What determines a picture, and which way it is computed. loras: (kind of file, strength), in order."""

    model: str
    precision: str
    loras: tuple[tuple[str, float], ...]
    size: tuple[int, int]
    batch: int
    steps: int
    sampler: str
    seed: int
    text: str

    @property
    def picture(self) -> Configuration:
        """The same for all that may, but need not, give the same image: ``auto`` is one of the precisions."""
        return replace(self, precision="")

    def __str__(self) -> str:
        loras = " ".join(f"{kind}:{strength}" for kind, strength in self.loras) or "none"
        width, height = self.size
        return (
            f"{self.model}, {self.precision}, LoRAs {loras}, {width}x{height}x{self.batch}, {self.steps} steps of "
            f"{self.sampler}, seed {self.seed}"
        )

    def prompt(self, weights: str, number: int) -> dict[str, Any]:
        """The graph for ComfyUI's API. ``number`` changes nothing but what ComfyUI's cache knows: with CFG 1 the
        negative prompt is not used, but the sampler and all behind it run again."""
        model: list[Any] = ["loader", 0]
        loader = {"model_name": self.model, "precision": self.precision, "weights": weights}
        prompt: dict[str, Any] = {"loader": node("SVDQFluxLoader", **loader)}
        for index, (kind, strength) in enumerate(self.loras):
            name = f"lora{index}"
            prompt[name] = node(
                "LoraLoaderModelOnly", model=model, lora_name=lora_name(self.model, kind), strength_model=strength
            )
            model = [name, 0]
        width, height = self.size
        return prompt | {
            "vae": node("VAELoader", vae_name=VAE),
            "latent": node("EmptySD3LatentImage", width=width, height=height, batch_size=self.batch),
            "text": node("SVDQDemoPrompt", model=["loader", 0], text=self.text),
            "negative": node("SVDQDemoPrompt", model=["loader", 0], text=f"run {number}"),
            "sampler": node(
                "KSampler", model=model, positive=["text", 0], negative=["negative", 0], latent_image=["latent", 0],
                seed=self.seed, steps=self.steps, cfg=1.0, sampler_name=self.sampler, scheduler="simple", denoise=1.0,
            ),
            "decode": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
            "record": node("SoakRecord", latent=["sampler", 0], images=["decode", 0]),
        }  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One prompt. kind: plain, interrupted, or one of REFUSED and NAMED · changed: the configuration with what makes
    the run bad · stop_at: node or step at which it is interrupted · free: what is posted to /free, before the prompt or
    while it samples."""

    kind: str
    configuration: Configuration
    changed: Configuration
    weights: str
    stop_at: str | int | None = None
    free: dict[str, bool] | None = None
    free_during: bool = False


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """A node of a graph."""
    return {"class_type": kind, "inputs": inputs}


def lora_name(model: str, kind: str) -> str:
    """The file with a LoRA for ``model``."""
    return f"{model.removesuffix('.safetensors')}-{kind}.safetensors"


def plan(runs: int, seed: int, precisions: Sequence[str], unavailable: Sequence[str] = ()) -> list[Run]:
    """``runs`` runs, at least LEAST_RUNS. precisions: those that the device can compute · unavailable: those that it
    cannot.

    One in ten is interrupted and one in 25 is bad in each way. What follows a run of these kinds is a plain run of the
    same configuration, on the model that had to stay as it was.
    """
    draw = random.Random(seed)
    bad = [*REFUSED, *NAMED] if unavailable else [kind for kind in (*REFUSED, *NAMED) if kind != "unavailable"]
    special = ["interrupted"] * max(1, runs // 10) + bad * max(1, runs // 25)
    plain = _passes(_pool(min(POOL, max(3, (runs - len(special)) // 5)), precisions, draw), runs - len(special), draw)
    places = [draw.randrange(1, len(plain)) for _ in special]
    found: list[Run] = []
    for place, run in enumerate(plain):
        found += [
            _special(kind, run, draw, unavailable) for kind, at in zip(special, places, strict=True) if at == place
        ]
        found.append(run)
    return [_with_free(run, draw) for run in found]


def _pool(count: int, precisions: Sequence[str], draw: random.Random) -> list[Configuration]:
    """Different configurations, with all models and precisions, and up to three LoRAs."""
    kinds = list(itertools.product(MODELS, precisions))
    draw.shuffle(kinds)
    return [
        Configuration(
            *kinds[index % len(kinds)],
            loras=tuple((kind, _strength(draw)) for kind in draw.sample(LORAS, index % 4)),
            size=draw.choice(SIZES),
            batch=draw.choice((1, 1, 2)),
            steps=draw.choice((2, 3, 4)),
            sampler=draw.choice(SAMPLERS),
            seed=draw.randrange(2**32),
            text=draw.choice(TEXTS),
        )
        for index in range(count)
    ]


def _passes(pool: list[Configuration], count: int, draw: random.Random) -> list[Run]:
    """The pool in one order after the other. Within one, models with the same arithmetic have the same ``weights``, so
    that ComfyUI's cache has some of them."""
    found: list[Run] = []
    while len(found) < count:
        weights = {(one.model, one.precision): draw.choice(WEIGHTS) for one in pool}
        order = draw.sample(pool, len(pool))
        found += [Run("plain", one, one, weights[one.model, one.precision]) for one in order]
    return found[:count]


def _special(kind: str, run: Run, draw: random.Random, unavailable: Sequence[str]) -> Run:
    """``run`` interrupted or with something bad."""
    wanted = run.configuration
    if kind == "interrupted":
        stop_at = draw.choice(("loader", "text", "sampler", 1, 2, 3, 4))
        return replace(run, kind=kind, changed=replace(wanted, steps=INTERRUPTED_STEPS), stop_at=stop_at)
    if kind == "unavailable":
        return replace(run, kind=kind, changed=replace(wanted, precision=draw.choice(unavailable)))
    loras = list(wanted.loras)
    loras.insert(draw.randint(0, len(loras)), (kind, _strength(draw)))
    return replace(run, kind=kind, changed=replace(wanted, loras=tuple(loras)))


def _with_free(run: Run, draw: random.Random) -> Run:
    """With a request to unload models or to forget results, or both, in one of six runs."""
    if draw.random() > 1 / 6:
        return run
    flags = draw.choice((("unload_models",), ("free_memory",), ("unload_models", "free_memory")))
    return replace(run, free=dict.fromkeys(flags, True), free_during=draw.random() < 0.5)


def _strength(draw: random.Random) -> float:
    """Of a LoRA; never zero, with which ComfyUI would not read the file."""
    return round(draw.choice((-1, 1)) * draw.uniform(0.1, 1.2), 3)
