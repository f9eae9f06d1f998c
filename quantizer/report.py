"""How near a quantized model is to its original: JSON for programs, one self-contained HTML page for people."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .measure import BINS, FIRST_BIN
from .source import Source

QUALITIES = {
    "calibration_sqnr_db": "Output, activations of the calibration",
    "output_sqnr_db": "Output, random activations",
    "weight_sqnr_db": "Weight",
}
_WORST = 15
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 960, 220, 46, 24  # of a plot, and of its margins
_SUMMARIZED = {"w4a4": "4-bit layers", "w4a16": "modulation", "w8a8": "int8 layers"}
_KINDS = ("qkv", "attention out", "fc1", "fc2", "modulation")
_INT8 = len(_KINDS)  # number of their kind; only reports that have some name it

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --k0: #4477aa; --k1: #ee6677; --k2: #228833; --k3: #ccbb44;
  --k4: #aa3377; --k5: #66ccee; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: currentColor; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left;
  border-bottom: 1px solid var(--line); } td.n { text-align: right; font-variant-numeric: tabular-nums; }
td { white-space: nowrap; } td:last-child { white-space: normal; }
.k { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin: 0 .3em 0 1em; }
"""


def report_path(out: str | os.PathLike[str], kind: str = "json") -> Path:
    """kind: "json" or "html"."""
    return Path(f"{os.fspath(out)}.report.{kind}")


def make_report(
    model: Source,
    name: str,
    settings: dict[str, Any],
    device: str,
    facts: list[dict[str, Any]],
    nbytes: int,
    seconds: float,
) -> dict[str, Any]:
    """name: of the file · facts: of each stored layer (convert.py) · seconds: of the last run."""
    kinds = {}
    for kind in _SUMMARIZED:
        chosen = [fact for fact in facts if fact["kind"] == kind]
        if not chosen and kind == "w8a8":
            continue
        kinds[kind] = {"layers": len(chosen)} | {
            quality: _spread(fact[quality] for fact in chosen if quality in fact) for quality in QUALITIES
        }
    return {
        "version": 1,
        "source": os.path.basename(os.path.abspath(model.path)),
        "file": name,
        "settings": settings,
        "device": device,
        "bytes": nbytes,
        "source_bytes": model.nbytes,
        "seconds": round(sum(fact["seconds"] for fact in facts), 1),
        "seconds_of_the_last_run": round(seconds, 1),
        "summary": kinds,
        "layers": facts,
    }


def _spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Smallest and mean; exact layers (None) do not count."""
    known = [value for value in values if value is not None]
    return {"min": min(known), "mean": round(sum(known) / len(known), 2)} if known else None


def write_reports(folder: Path, out: Path, report: dict[str, Any]) -> None:
    """Both files beside ``out``; each takes its name in one step, from ``folder``."""
    for kind, text in (("json", json.dumps(report, indent=1) + "\n"), ("html", as_html(report))):
        unfinished = folder / f"report.{kind}"
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, report_path(out, kind))


# ---- the page


def as_html(report: dict[str, Any]) -> str:
    """A page without scripts and without anything from elsewhere."""
    layers = report["layers"]
    kinds = (*_KINDS, "int8") if "w8a8" in report["summary"] else _KINDS
    shown = [name for name in QUALITIES if any(layer.get(name) is not None for layer in layers)]
    parts = [
        f"<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8><title>{_text(report['file'])}</title>",
        f"<style>{_STYLE}</style></head><body><h1>{_text(report['file'])}</h1>",
        _facts(report),
        "<h2>How near each layer is</h2><p>Signal to noise in dB, in the order of the model: higher is nearer. "
        "Point at a dot for its name.</p><p>",
        *(f"<span class=k style='background:var(--k{i})'></span>{kind}" for i, kind in enumerate(kinds)),
        "</p>",
        *(f"<h3>{_text(QUALITIES[name])}</h3>{_dots(layers, name)}" for name in shown),
        f"<h2>The {min(_WORST, len(layers))} worst layers</h2>{_worst(layers, shown)}",
        _histograms(layers),
        "</body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _text(value: object) -> str:
    return html.escape(str(value))


def _facts(report: dict[str, Any]) -> str:
    rows = [
        ("Source", report["source"]),
        ("Size", f"{report['bytes'] / 1e6:,.1f} MB, of {report['source_bytes'] / 1e6:,.1f} MB"),
        ("Time", f"{report['seconds']:,.1f} s for layers, on {report['device']}"),
        ("Settings", ", ".join(f"{name} {_plain(value)}" for name, value in report["settings"].items())),
    ]
    for name, text in QUALITIES.items():
        for kind, what in _SUMMARIZED.items():
            spread = report["summary"].get(kind, {}).get(name)
            if spread:
                rows.append((f"{text}, {what}", f"{spread['mean']} dB on average, {spread['min']} dB at least"))
    return "<table>" + "".join(f"<tr><th>{_text(name)}<td>{_text(value)}" for name, value in rows) + "</table>"


def _plain(value: Any) -> Any:
    """Without the brackets of a list."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _kind(layer: dict[str, Any]) -> int:
    """Index into _KINDS, or _INT8."""
    if layer["kind"] == "w8a8":
        return _INT8
    name = layer["name"].rpartition(".")[2]
    for index, part in enumerate(("qkv", "out_proj", "fc1", "fc2")):
        if part in name:
            return index
    return 4


def _dots(layers: Sequence[dict[str, Any]], quality: str) -> str:
    points = [(i, layer, layer[quality]) for i, layer in enumerate(layers) if layer.get(quality) is not None]
    low = min(value for _, _, value in points) // 5 * 5
    high = max(max(value for _, _, value in points), low + 5)
    width = (_WIDTH - _LEFT - 10) / max(1, len(layers) - 1)

    def y(value: float) -> float:
        return 8 + (_HEIGHT - _BOTTOM - 8) * (high - value) / (high - low)

    parts = [_line(y(tick), f"{tick:g} dB") for tick in range(int(low), int(high) + 1, 5)]
    for i, layer, value in points:
        title = f"{layer['name']}: {value} dB" + (f", rank {layer['rank']}" if "rank" in layer else "")
        parts.append(
            f"<circle cx='{_LEFT + 5 + i * width:.1f}' cy='{y(value):.1f}' r='3' fill='var(--k{_kind(layer)})'>"
            f"<title>{_text(title)}</title></circle>"
        )
    return _svg(parts)


def _line(y: float, label: str) -> str:
    return (
        f"<line x1='{_LEFT}' x2='{_WIDTH}' y1='{y:.1f}' y2='{y:.1f}' stroke='var(--line)'/>"
        f"<text x='{_LEFT - 4}' y='{y + 4:.1f}' text-anchor='end'>{label}</text>"
    )


def _svg(parts: Iterable[str]) -> str:
    return f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img'>{''.join(parts)}</svg>"


def _worst(layers: Sequence[dict[str, Any]], shown: Sequence[str]) -> str:
    """By the most telling of the qualities that all of them have."""
    chosen = shown[0] if shown else "weight_sqnr_db"
    known = sorted((layer for layer in layers if layer.get(chosen) is not None), key=lambda layer: layer[chosen])
    head = "".join(f"<th>{_text(QUALITIES[name])}" for name in shown)
    rows = []
    for layer in known[:_WORST]:
        cells = "".join(f"<td class=n>{layer.get(name, '')}" for name in shown)
        shape = " x ".join(str(size) for size in layer["shape"])
        rows.append(f"<tr><td>{_text(layer['name'])}<td>{shape}{cells}<td class=n>{layer['seconds']} s")
    return f"<table><tr><th>Layer<th>Shape{head}<th>Time{''.join(rows)}</table>"


def _histograms(layers: Sequence[dict[str, Any]]) -> str:
    """Means over layers."""
    parts = []
    for name, text in (("weight_histogram", "Weights"), ("activation_histogram", "Activations")):
        found = [layer[name] for layer in layers if name in layer]
        if found:
            shares = [sum(counts) / len(found) / 1e6 for counts in zip(*found, strict=True)]
            parts.append(f"<h3>{text}</h3>{_bars(shares)}")
    if not parts:
        return ""
    note = "Magnitudes relative to a layer's root mean square, mean of all 4-bit layers. Outliers are far right."
    return f"<h2>Weights and activations</h2><p>{note}</p>{''.join(parts)}"


def _bars(shares: Sequence[float]) -> str:
    step, top = (_WIDTH - _LEFT) / BINS, max(shares) or 1.0
    scale = (_HEIGHT - _BOTTOM - 8) / top
    parts = [_line(_HEIGHT - _BOTTOM - share * scale, f"{share:.0%}") for share in (0, top / 2, top)]
    for index, share in enumerate(shares):
        x, height, power = _LEFT + index * step, share * scale, FIRST_BIN + index
        parts.append(
            f"<rect x='{x + 1:.1f}' y='{_HEIGHT - _BOTTOM - height:.1f}' width='{step - 2:.1f}' height='{height:.1f}' "
            f"fill='var(--k0)'><title>2^{power} to 2^{power + 1}: {share:.4%}</title></rect>"
            f"<text x='{x + step / 2:.1f}' y='{_HEIGHT - 8}' text-anchor='middle'>2^{power}</text>"
        )
    return _svg(parts)
