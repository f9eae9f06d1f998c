"""Training of the tiny FLUX: autoencoder, reader of pictures, transformer; one after the other within a time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from ...loaders.demo_assets import DEMO_PROMPT_TOKENS, byte_numbers
from ...loaders.write import write_tensors
from . import flow
from .autoencoder import Autoencoder, crops, psnr
from .data import Batch, Samples, make_batch
from .glyphs import load as load_glyphs
from .pictures import SIZE, Sample, prompts, render, sign
from .score import Scorer, targets
from .score import loss as reader_loss

TRANSFORMER, VAE, READER = "demo-flux-bf16.safetensors", "demo-flux-vae.safetensors", "demo-flux-reader.safetensors"
CHECKPOINT, SHEET = "checkpoint.safetensors", "samples.png"
HELD_OUT_SEED = 1
SHOWN = ("hello", "open", "flux", "cat", "stop", "welcome", "juice", "zebra")
_PATCHES = SIZE // 16
_DECAY = 0.999  # of the average of the weights
_SUBJECT = 4.0  # how much a latent pixel on a letter or shape counts, elsewhere 1
_DROPPED = 0.05  # prompts that are left empty


@dataclass(frozen=True)
class Settings:
    """out: folder for the results · minutes: for everything · autoencoder, reader: seconds of these · pool: encoded
    pictures that the transformer sees · batch, rate: of the transformer · compiled: whether to use torch.compile ·
    workers: processes that make samples · report, test, save: seconds between lines, between pictures made for held-out
    prompts, between checkpoints · tested: number of held-out prompts."""

    out: Path
    minutes: float = 7.0
    autoencoder: float = 65.0
    reader: float = 30.0
    pool: int = 250_000
    batch: int = 512
    rate: float = 2.5e-3
    seed: int = 0
    compiled: bool = True
    workers: int = 0
    report: float = 10.0
    test: float = 60.0
    save: float = 60.0
    tested: int = 256


class Trainer:
    """Everything that the three parts share. device: the first GPU, or the CPU."""

    def __init__(self, settings: Settings, started: float) -> None:
        self.settings, self._started = settings, started
        # Before the first use of CUDA.
        self.samples = Samples(settings.pool, settings.seed, settings.workers)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(settings.seed)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        self.atlas = load_glyphs(self.device)
        settings.out.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started:6.1f} s] {text}", flush=True)

    def left(self) -> float:
        """Seconds of the time that was given."""
        return 60 * self.settings.minutes - (time.monotonic() - self._started)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def draw(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return render(rows, self.atlas)

    def during(self, seconds: float, steps: int = 50) -> Iterator[tuple[float, bool]]:
        """(share of ``seconds`` that has passed, whether to report), until they have; at least one step is made.

        The clock is read when the device has caught up: every ``steps`` steps, or each time on the CPU.
        """
        begun = last = time.monotonic()
        share, count, pace, before = 0.0, 0, 0.0, 0.0
        while share < 1:
            count += 1
            now = time.monotonic()
            if self.device.type == "cpu" or count % steps == 0:
                self._wait()
                now = time.monotonic()
                share = min((now - begun) / seconds, 1.0)
                before, pace = share, (share - before) / steps
            else:
                share = min(share + pace, 1.0)
            report = now - last > self.settings.report or share >= 1
            last = now if report else last
            yield share, report

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def train(trainer: Trainer) -> None:
    """All of it; parts whose files are in the folder already are taken from there."""
    settings = trainer.settings
    trainer.say(f"{trainer.device.type}, {settings}")
    autoencoder = train_autoencoder(trainer)
    reader = train_reader(trainer, autoencoder)
    model = train_flow(trainer, autoencoder, reader)
    save_transformer(settings.out / TRANSFORMER, model)
    sizes = {name: (settings.out / name).stat().st_size / 1e6 for name in (TRANSFORMER, VAE, READER)}
    trainer.say("wrote " + ", ".join(f"{name} {size:.2f} MB" for name, size in sizes.items()))


def train_autoencoder(trainer: Trainer) -> Autoencoder:
    settings, path = trainer.settings, trainer.settings.out / VAE
    model = Autoencoder().to(trainer.device, memory_format=torch.channels_last)
    if path.is_file():
        model.load(load_file(path))
        trainer.say(f"autoencoder: {path}")
        return model.to(trainer.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    rows = trainer.samples.first(min(settings.pool, 65536)).rows.to(trainer.device)
    tested = trainer.draw(make_batch(0, min(settings.tested, 128), HELD_OUT_SEED, True).rows.to(trainer.device))[0]
    batch = min(settings.batch, 128)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    trainer.say("autoencoder")
    for count, (share, report) in enumerate(trainer.during(settings.autoencoder)):
        pictures = trainer.draw(rows[torch.randint(len(rows), (batch,), device=trainer.device)])[0]
        pictures = crops(pictures, SIZE // 2).contiguous(memory_format=torch.channels_last)
        _set_rate(optimizer, 2e-3 * min(1.0, count / 50) * _decayed(share))
        with trainer.autocast():
            loss = model.loss(pictures)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if report:
            model.eval()
            with torch.no_grad(), trainer.autocast():
                quality = psnr(model.decode(model.encode(tested)).clamp(0, 1), tested)
            model.train()
            trainer.say(f"  step {count}, loss {loss.item():.4f}, held-out pictures {quality:.1f} dB")
    model.eval().requires_grad_(False)
    model.finish()
    model.save(path)
    model.load(load_file(path))  # in fp16, as shipped
    model.to(trainer.device, memory_format=torch.channels_last)
    with torch.no_grad(), trainer.autocast():
        latents = model.encode(tested).float()
        trainer.say(
            f"  done: {psnr(model.decode(latents).clamp(0, 1), tested):.1f} dB, latents {latents.std():.2f}, "
            f"largest {latents.abs().max():.1f}"
        )
    return model


def train_reader(trainer: Trainer, autoencoder: Autoencoder) -> Scorer:
    """On pictures as drawn, blurred, noisy, and on some that went through the autoencoder."""
    settings, path = trainer.settings, trainer.settings.out / READER
    if path.is_file():
        trainer.say(f"reader: {path}")
        return Scorer.load(path).to(trainer.device)
    reader = Scorer().to(trainer.device, memory_format=torch.channels_last)
    data = trainer.samples.first(min(settings.pool, 180_000))
    pictures = draw_pool(trainer, autoencoder, data.rows)
    wanted = data.wanted.to(trainer.device)
    batch, quarter = settings.batch, max(1, settings.batch // 4)
    optimizer = torch.optim.AdamW(reader.parameters(), 1e-3, weight_decay=0.01, fused=True)
    names = list(targets([]))
    trainer.say("reader")
    for count, (share, report) in enumerate(trainer.during(settings.reader)):
        index = torch.randint(len(data), (batch,), device=trainer.device)
        part = (pictures[index].float() / 255).contiguous(memory_format=torch.channels_last)
        part[:quarter] = functional.avg_pool2d(part[:quarter], 3, 1, 1, count_include_pad=False)
        part += 0.1 * torch.rand(batch, 1, 1, 1, device=trainer.device) * torch.randn_like(part)
        _set_rate(optimizer, 4e-3 * min(1.0, count / 50) * _decayed(share))
        with trainer.autocast():
            loss = reader_loss(reader, part, dict(zip(names, wanted[index].long().unbind(1), strict=True)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if report:
            trainer.say(f"  step {count}, loss {loss.item():.4f}")
    del pictures
    reader.eval().requires_grad_(False).save(path)
    reader = Scorer.load(path).to(trainer.device)
    samples = prompts(settings.tested * 2, HELD_OUT_SEED)
    pictures = trainer.draw(torch.tensor([sample.row for sample in samples], device=trainer.device))[0]
    with torch.no_grad(), trainer.autocast():
        coded_pictures = autoencoder.decode(autoencoder.encode(pictures)).float()
    trainer.say(f"  held-out pictures as drawn: {_means(reader.score(pictures, samples))}")
    trainer.say(f"  and from their latents: {_means(reader.score(coded_pictures, samples))}")
    return reader


def draw_pool(trainer: Trainer, autoencoder: Autoencoder, rows: Tensor) -> Tensor:
    """uint8 [N, 3, SIZE, SIZE]: pictures as drawn; every eighth as it comes back from latents with some noise."""
    drawn = []
    for index, part in enumerate(rows.split(256)):
        pictures = trainer.draw(part.to(trainer.device))[0]
        if index % 8 == 0:
            with torch.no_grad(), trainer.autocast():
                latents = autoencoder.encode(pictures.contiguous(memory_format=torch.channels_last))
                level = 0.4 * torch.rand(len(part), 1, 1, 1, device=trainer.device)
                pictures = autoencoder.decode(latents + level * torch.randn_like(latents)).float().clamp(0, 1)
        drawn.append((255 * pictures).round().byte())
    return torch.cat(drawn).contiguous()


def encode_pool(trainer: Trainer, autoencoder: Autoencoder, data: Batch) -> tuple[Tensor, Tensor]:
    """Latents fp16 [N, 16, 16, 16] of all pictures, and fp16 [N, 16, 16]: what each latent pixel counts."""
    latents, weights = [], []
    for rows in data.rows.split(512):
        pictures, subject = trainer.draw(rows.to(trainer.device))
        with torch.no_grad(), trainer.autocast():
            latents.append(autoencoder.encode(pictures.contiguous(memory_format=torch.channels_last)).half())
        weights.append((1 + (_SUBJECT - 1) * functional.avg_pool2d(subject[:, None], 8)[:, 0]).half())
    return torch.cat(latents).contiguous(), torch.cat(weights)


class Step:
    """Loss and gradients of one batch of random pictures, noise and noise levels."""

    def __init__(self, trainer: Trainer, model: nn.Module) -> None:
        self._trainer, self._model = trainer, model
        self._loss = torch.compile(flow.loss, dynamic=False) if trainer.settings.compiled else flow.loss
        self._pe = flow.positions(model, DEMO_PROMPT_TOKENS, _PATCHES, _PATCHES, trainer.device)

    def __call__(self, latents: Tensor, weights: Tensor, numbers: Tensor) -> Tensor:
        """The mean square error, float32 []; its gradients are added to the model's."""
        device, batch = self._trainer.device, self._trainer.settings.batch
        index = torch.randint(len(latents), (batch,), device=device)
        clean = latents[index].float()
        kept = torch.rand(batch, 1, 1, device=device) >= _DROPPED
        low, high = flow.GUIDANCE
        guidance = low + (high - low) * torch.rand(batch, device=device)
        sigma, noise = flow.draw_sigmas(batch, device), torch.randn_like(clean)
        with self._trainer.autocast():
            loss = self._loss(
                self._model, clean, weights[index].float(), numbers[index] * kept, sigma, noise, guidance, self._pe
            )
        loss.backward()
        return loss.detach()


def train_flow(trainer: Trainer, autoencoder: Autoencoder, reader: Scorer) -> nn.Module:
    """Returns the average of the weights over the last thousand steps or so."""
    settings, device = trainer.settings, trainer.device
    data = trainer.samples.first(settings.pool)
    latents, weights = encode_pool(trainer, autoencoder, data)
    numbers = data.numbers.to(device)
    del data
    held_out = make_batch(0, settings.tested, HELD_OUT_SEED, True).to(device)
    held_out_latents, held_out_weights = encode_pool(trainer, autoencoder, held_out)
    model, average = flow.make_model().to(device), flow.make_model().to(device).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    step, spent = resume(settings.out / CHECKPOINT, model, average, optimizer)
    trainer.say(f"transformer: {len(latents)} pictures encoded, {sum(p.numel() for p in model.parameters())} weights")
    make_gradients = Step(trainer, model)
    # The end needs a moment for the last pictures and files.
    seconds = max(trainer.left() - 12.0, 1.0)
    saved = tested = time.monotonic()
    counted, since = step, time.monotonic()
    mean = torch.zeros((), device=device)
    for share, report in trainer.during(seconds):
        # A run that goes on from a checkpoint has its schedule over both.
        share = (spent + share * seconds) / (spent + seconds)
        _set_rate(optimizer, settings.rate * min(1.0, step / 400) * (1 - share))
        mean += make_gradients(latents, weights, numbers)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        now = time.monotonic()
        if report:
            done, took = step - counted, now - since
            pace = done * settings.batch / took
            trainer.say(f"  step {step}, {share:4.0%}, loss {mean.item() / done:.4f}, {pace:,.0f} pictures/s")
            mean.zero_()
            counted, since = step, time.monotonic()
        if now - tested > settings.test or share >= 1:
            tested = now
            _test(trainer, average, autoencoder, reader, (held_out, held_out_latents, held_out_weights))
            sheet(trainer, average, autoencoder, reader)
            counted, since = step, time.monotonic()
            mean.zero_()
        if now - saved > settings.save or share >= 1:
            saved = now
            save_checkpoint(settings.out / CHECKPOINT, model, average, optimizer, step, share * (spent + seconds))
            save_transformer(settings.out / TRANSFORMER, average)
    return average


def _test(
    trainer: Trainer, model: nn.Module, autoencoder: Autoencoder, reader: Scorer, held_out: tuple[Batch, Tensor, Tensor]
) -> None:
    """Print the error on held-out pictures at fixed noise, and what the reader says about pictures made for them."""
    batch, latents, weights = held_out
    device = trainer.device
    generator = torch.Generator(device).manual_seed(HELD_OUT_SEED)
    noise = torch.randn(latents.shape, device=device, generator=generator)
    pe = flow.positions(model, DEMO_PROMPT_TOKENS, _PATCHES, _PATCHES, device)
    guidance = torch.full((len(noise),), 3.5, device=device)
    errors = {}
    with torch.no_grad(), trainer.autocast():
        for sigma in (1.0, 0.9, 0.7, 0.4):
            level = torch.full((len(noise),), sigma, device=device)
            error = flow.loss(model, latents.float(), weights.float(), batch.numbers, level, noise, guidance, pe)
            errors[sigma] = error.item()
        made = flow.sample(model, batch.numbers, noise, pe)
        pictures = autoencoder.decode(made).float()
    result = _means(reader.score(pictures, prompts(len(noise), HELD_OUT_SEED)))
    trainer.say(f"  held out: error {', '.join(f'{e:.3f} at {s}' for s, e in errors.items())}; {result}")


def sheet(trainer: Trainer, model: nn.Module, autoencoder: Autoencoder, reader: Scorer) -> None:
    """A picture of pictures: signs with `SHOWN`, then held-out prompts."""
    from PIL import Image

    samples = [sign(word) for word in SHOWN] + prompts(min(56, trainer.settings.tested // 8 * 8), HELD_OUT_SEED)
    noise = torch.randn(len(samples), 16, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), trainer.autocast():
        numbers = pack_prompts(samples).to(trainer.device)
        pe = flow.positions(model, DEMO_PROMPT_TOKENS, _PATCHES, _PATCHES, trainer.device)
        pictures = autoencoder.decode(flow.sample(model, numbers, noise.to(trainer.device), pe)).float().clamp(0, 1)
    trainer.say(f"  {', '.join(SHOWN)} are read as {', '.join(reader.read_words(pictures[: len(SHOWN)]))}")
    grid = pictures.reshape(-1, 8, 3, SIZE, SIZE).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray((255 * grid).round().byte().cpu().numpy()).save(trainer.settings.out / SHEET)


def pack_prompts(samples: list[Sample]) -> Tensor:
    """uint8 [B, T, 5] of `flow.encode_prompts`."""
    return flow.pack_numbers([byte_numbers(sample.prompt.encode()) for sample in samples])


def save_transformer(path: Path, model: nn.Module) -> None:
    """bf16, under Black Forest Labs' names."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("_norm.weight", "_norm.scale")
        tensors[name] = tensor.to(torch.bfloat16)
    write_tensors(path, tensors, {}, force=True)


def save_checkpoint(
    path: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float
) -> None:
    """Weights, their average, and the optimizer's moments."""
    tensors = {}
    names = [name for name, _ in model.named_parameters()]
    states = optimizer.state_dict()["state"]
    for index, name in enumerate(names):
        tensors[f"model.{name}"] = model.get_parameter(name)
        tensors[f"average.{name}"] = average.get_parameter(name)
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = states[index][moment]
    write_tensors(path, tensors, {"step": json.dumps(step), "seconds": json.dumps(seconds)}, force=True)


def resume(path: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Take what `save_checkpoint` wrote, if it is there. Returns steps made and seconds spent so far."""
    if not path.is_file():
        return 0, 0.0
    with safe_open(path, "pt") as file:
        step, seconds = (json.loads(file.metadata()[key]) for key in ("step", "seconds"))
    tensors = load_file(path)
    states = {}
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            parameter.copy_(tensors[f"model.{name}"])
            average.get_parameter(name).copy_(tensors[f"average.{name}"])
            states[index] = {moment: tensors[f"{moment}.{name}"] for moment in ("exp_avg", "exp_avg_sq")}
            states[index]["step"] = torch.tensor(float(step))
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    return step, seconds


def warm_up(trainer: Trainer) -> None:
    """Compile the transformer's step once, for the compiler's cache on disk; `train` then finds it there."""
    step = Step(trainer, flow.make_model().to(trainer.device))
    latents = torch.zeros(8, 16, SIZE // 8, SIZE // 8, dtype=torch.float16, device=trainer.device)
    numbers = torch.zeros(8, DEMO_PROMPT_TOKENS, 5, dtype=torch.uint8, device=trainer.device)
    step(latents, torch.ones_like(latents[:, 0]), numbers)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _decayed(share: float) -> float:
    """Full rate for a third of the time, then down to zero."""
    return min(1.0, 1.5 * (1 - share))


def _means(scores: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {values.nanmean().item():.3f}" for name, values in scores.items())
