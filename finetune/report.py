"""The run as one self-contained HTML page: curves, phases, samples, proofs, configuration, environment.

The page asks nothing of any network (its content security policy forbids it), runs no script, and every text that comes
from the run is escaped. Curves are drawn as SVG here: a plotting library would weigh more than the page is worth.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

WIDTH, HEIGHT = 520, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 14, 42
"""Size of a chart and of its margins, in SVG units (pixels at full width)."""
PER_TOKEN = "nats per token"

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --faint: #667079; --line: #d9dee3; --paper: #ffffff; --card: #f5f7f9;
  --one: #0b62c4; --two: #c2410c; --good: #18794e; --bad: #c62a2f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --faint: #9aa4ae; --line: #363c43; --paper: #14171a;
  --card: #1d2125; --one: #6cb2ff; --two: #ff9b5e; --good: #5bd69a; --bad: #ff8b8b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { margin: 0; font-size: 1.6rem; } h2 { margin: 2.5rem 0 .75rem; font-size: 1.15rem; }
.sub { color: var(--faint); margin: .25rem 0 0; } .good { color: var(--good); } .bad { color: var(--bad); }
.cards, .charts { display: grid; gap: .75rem; }
.cards { grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); margin-top: 1.5rem; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
.card, figure, .sample { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.card, figure, .sample { padding: .75rem 1rem; }
.card b { display: block; font-size: 1.2rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
.card span { color: var(--faint); }
figure { margin: 0; } figcaption { font-weight: 600; display: flex; justify-content: space-between; gap: 1rem; }
.key { font-weight: 400; color: var(--faint); } .key i { font-style: normal; font-weight: 700; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--faint); font-size: 11px; }
.grid { stroke: var(--line); stroke-width: 1; } .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.s0 { stroke: var(--one); color: var(--one); } .s1 { stroke: var(--two); color: var(--two); }
circle.s0 { fill: var(--one); } circle.s1 { fill: var(--two); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--faint); font-weight: 600; white-space: nowrap; } td.n, th.n { text-align: right; }
td.long { word-break: break-all; } .bar { background: var(--one); height: .6rem; border-radius: 3px; min-width: 2px; }
td.fill { width: 40%; vertical-align: middle; } .sample { margin-bottom: .75rem; }
.sample h3 { margin: .5rem 0 .15rem; font-size: .8rem; color: var(--faint); font-weight: 600; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, Consolas, monospace; }
details { border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem; } summary { cursor: pointer; }
details pre { margin-top: .75rem; } ul { padding-left: 1.2rem; margin: 0; }
"""


def write_report(run_dir: Path) -> Path:
    """Write `report.html` from what the run directory holds; whatever is not there is left out.

    Args:
        run_dir: with run.json and, as far as they exist, metrics.jsonl, config.yaml, samples.md, export/*/export.json.

    Returns:
        The path of the page.
    """
    record = _read_json(run_dir / "run.json") or {}
    lines = _read_lines(run_dir / "metrics.jsonl")
    proofs = [proof for path in sorted(run_dir.glob("export/*/export.json")) if (proof := _read_json(path))]
    sections = [
        _head(run_dir, record, proofs),
        _section("Curves", _charts(lines, str(record.get("loss_unit", PER_TOKEN)))),
        _section("Time and memory by phase", _phases(record.get("phases") or {})),
        _section("Samples", _samples(_read_text(run_dir / "samples.md"))),
        _section("Exports and their proofs", _proofs(proofs)),
        _section("Notes", _notes(record.get("notes") or [])),
        _section("Configuration", _details("config.yaml", _read_text(run_dir / "config.yaml"))),
        _section("Environment", _environment(record)),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(str(record.get('name', run_dir.name)))} · finetune</title>\n<style>{STYLE}</style>\n</head>\n"
        "<body>\n" + "\n".join(part for part in sections if part) + "\n</body>\n</html>\n"
    )
    target, draft = run_dir / "report.html", run_dir / ".tmp-report.html"
    draft.write_text(page, "utf-8")
    os.replace(draft, target)
    return target


def _read_text(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.is_file() else ""


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where the file is absent or torn."""
    try:
        value = json.loads(_read_text(path) or "null")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a torn last line (a run that was killed) is left out."""
    lines = []
    for raw in _read_text(path).splitlines():
        try:
            lines.append(json.loads(raw))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict)]


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


# ---- the summary


def _head(run_dir: Path, record: dict[str, Any], proofs: list[dict[str, Any]]) -> str:
    status = str(record.get("status", "unknown"))
    tone = {"finished": "good", "failed": "bad"}.get(status, "")
    facts = [record.get("started"), record.get("device"), record.get("dtype")]
    about = " · ".join(escape(str(fact)) for fact in facts if fact)
    cards = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for label, value in _figures(record, proofs)
    )
    error = f'<p class="bad">{escape(str(record["error"]))}</p>' if record.get("error") else ""
    return (
        f"<header>\n<h1>{escape(str(record.get('name', run_dir.name)))} "
        f'<small class="{tone}">{escape(status)}</small></h1>\n<p class="sub">{about}</p>\n{error}'
        f'<div class="cards">{cards}</div>\n</header>'
    )


def _figures(record: dict[str, Any], proofs: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The figures a reader looks for first, as (label, value)."""
    first, best = record.get("first_eval"), record.get("best_eval")
    phases = [phase for phase in (record.get("phases") or {}).values() if isinstance(phase, dict)]
    figures: list[tuple[str, str]] = []
    if _number(first) and _number(best):
        figures.append((f"held-out loss, {record.get('loss_unit', PER_TOKEN)}", f"{first:.2f} → {best:.2f}"))
        figures.append(("lower than the untuned base", f"{1 - best / first:.1%}"))
    before = record.get("first_metrics") or {}
    for name, value in (record.get("best_metrics") or {}).items():
        if _number(value) and _number(before.get(name)):
            figures.append((name, f"{before[name]:.3f} → {value:.3f}"))
    if _number(record.get("steps")):
        figures.append(("optimizer steps", f"{record['steps']:,}"))
    if phases:
        figures.append(("wall time", _duration(sum(phase.get("seconds") or 0 for phase in phases))))
        figures.append(("peak memory", f"{max(phase.get('peak_memory_bytes') or 0 for phase in phases) / 1e9:.2f} GB"))
    if proofs:
        figures.append(("exports proven", f"{sum(bool(p.get('passed')) for p in proofs)} of {len(proofs)}"))
    return figures


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---- curves


@dataclass(frozen=True)
class Curve:
    """A named line of a chart; points are (step, value), in order."""

    name: str
    points: list[tuple[float, float]]


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _curve(lines: Sequence[dict[str, Any]], key: str, name: str, scale: float = 1.0) -> Curve:
    pairs = ((line.get("step"), line.get(key)) for line in lines)
    return Curve(name, [(float(x), float(y) * scale) for x, y in pairs if _number(x) and _number(y)])


def _charts(lines: Sequence[dict[str, Any]], unit: str) -> str:
    measured = dict.fromkeys(key for line in lines for key in line if key.startswith("eval_") and key != "eval_loss")
    judged = [
        (key.removeprefix("eval_").capitalize(), "of held-out rows", [_curve(lines, key, key)]) for key in measured
    ]
    wanted = [
        ("Loss", unit, [_curve(lines, "loss", "training"), _curve(lines, "eval_loss", "held out")]),
        *judged,
        ("Learning rate", "learning rate", [_curve(lines, "learning_rate", "learning rate")]),
        ("Gradient norm", "norm before clipping", [_curve(lines, "grad_norm", "gradient norm")]),
        ("Speed", "tokens per second", [_curve(lines, "tokens_per_second", "speed")]),
        ("Peak memory", "gigabytes (10⁹ bytes)", [_curve(lines, "peak_memory_bytes", "memory", 1e-9)]),
    ]
    drawn = [_chart(title, unit, [c for c in curves if c.points]) for title, unit, curves in wanted]
    figures = "".join(figure for figure in drawn if figure)
    return f'<div class="charts">{figures}</div>' if figures else ""


def _chart(title: str, unit: str, curves: list[Curve]) -> str:
    """One figure: axes with round ticks, a line a curve, dots where there are few points."""
    if not curves:
        return ""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    y_ticks = ticks(min(ys), max(ys), outer=True)
    (left, right), (low, high) = _span(xs), _span(y_ticks)
    x_ticks = ticks(left, right) if len(set(xs)) > 1 else [left + (right - left) / 2]

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}, {unit}, by step")}">']
    for y in y_ticks:
        down = place(left, y)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{tick_label(y, y_ticks)}</text>')
    for x in x_ticks:
        across = place(x, low)[0]
        label = tick_label(x, x_ticks)
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>')
    middle, centre = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">optimizer step</text>')
    turned = f'transform="rotate(-90 12 {centre})" text-anchor="middle"'
    parts.append(f'<text x="12" y="{centre}" {turned}>{escape(unit)}</text>')
    for number, curve in enumerate(curves):
        parts.append(_line(curve, number, place))
    keys = " ".join(
        f'<span><i class="s{n}">—</i> {escape(curve.name)}</span>' for n, curve in enumerate(curves) if len(curves) > 1
    )
    caption = f'<figcaption>{escape(title)}<span class="key">{keys}</span></figcaption>'
    return f"<figure>{caption}{''.join(parts)}</svg></figure>"


def _line(curve: Curve, number: int, place: Any) -> str:
    placed = [place(x, y) for x, y in curve.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    dots = "".join(
        f'<circle class="s{number}" cx="{px:.1f}" cy="{py:.1f}" r="2.6"><title>step {x:g}: {y:.6g}</title></circle>'
        for (px, py), (x, y) in zip(placed, curve.points, strict=True)
    )
    return f'<polyline class="curve s{number}" points="{path}"/>' + (dots if len(placed) <= 40 else "")


def _span(values: Iterable[float]) -> tuple[float, float]:
    """From the least to the greatest; widened where they are one."""
    every = list(values)
    low, high = min(every), max(every)
    return (low, high) if high > low else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))


def ticks(low: float, high: float, about: int = 5, outer: bool = False) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart), about so many, within [low, high] or (`outer`) around it.

    Where low is high there is one, that very number.
    """
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = low / step, high / step
    begin = math.floor(first + 1e-9) if outer else math.ceil(first - 1e-9)
    end = math.ceil(last - 1e-9) if outer else math.floor(last + 1e-9)
    return [number * step for number in range(begin, end + 1)]


def tick_label(value: float, marks: Sequence[float]) -> str:
    """A tick with as many digits as its neighbours need to be told apart; powers of ten for the very small."""
    step = abs(marks[1] - marks[0]) if len(marks) > 1 else abs(value) or 1
    top = max(abs(mark) for mark in marks)
    if top and top < 1e-2:
        exponent = math.floor(math.log10(top))
        digits = max(0, exponent - math.floor(math.log10(step)))
        return "0" if not value else f"{value / 10.0**exponent:.{digits}f}e{exponent}"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{digits}f}"


# ---- tables and texts


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> str:
    """A table of cells that are HTML already."""
    right = set(numeric)
    kind = [' class="n"' if column in right else "" for column in range(len(head))]
    top = "".join(f"<th{k}>{cell}</th>" for k, cell in zip(kind, head, strict=True))
    lines = ("".join(f"<td{k}>{cell}</td>" for k, cell in zip(kind, row, strict=True)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _phases(phases: dict[str, Any]) -> str:
    known = {name: phase for name, phase in phases.items() if isinstance(phase, dict)}
    if not known:
        return ""
    longest = max(phase.get("seconds") or 0 for phase in known.values()) or 1
    rows = [
        (
            escape(name),
            _duration(phase.get("seconds") or 0),
            f"{(phase.get('peak_memory_bytes') or 0) / 1e9:.2f} GB",
            f'<div class="bar" style="width:{100 * (phase.get("seconds") or 0) / longest:.1f}%"></div>',
        )
        for name, phase in known.items()
    ]
    return _table(("phase", "wall time", "peak memory", ""), rows, (1, 2)).replace("<td><div", '<td class="fill"><div')


def _samples(text: str) -> str:
    """samples.md: sections divided by `---`, in each a bold title and a quoted text, four times."""
    blocks = []
    for section in text.split("\n---\n"):
        cells: list[str] = []
        quoted: list[str] = []
        title = ""
        for line in [*section.splitlines(), "****"]:
            if line.startswith("**") and line.endswith("**"):
                if title:
                    body = escape("\n".join(quoted))
                    cells.append(f"<h3>{escape(title)}</h3><pre>{body}</pre>")
                title, quoted = line.strip("*"), []
            elif line.startswith(">"):
                quoted.append(line[1:].removeprefix(" "))
        if cells:
            blocks.append(f'<div class="sample">{"".join(cells)}</div>')
    return "".join(blocks)


PROOF_ROWS = (
    ("opened by", "runtime", ""), ("size, MB", "bytes", ".1f"), ("bits per weight", "bits_per_weight", ".2f"),
    ("KL from the unmerged model, mean, nats per token", "kl_mean", ".2g"), ("KL, 99th percentile", "kl_p99", ".2g"),
    ("same likeliest token", "top1_agreement", ".1%"), ("held-out loss of the base", "loss_base", ".4f"),
    ("held-out loss after training", "loss_trained", ".4f"), ("held-out loss of the export", "loss_export", ".4f"),
    ("improvement kept", "retained", ".2%"), ("rows", "rows", ",d"), ("learnt tokens", "tokens", ",d"),
)  # fmt: skip


def _proofs(proofs: list[dict[str, Any]]) -> str:
    """A column a format, its verdict on top."""
    if not proofs:
        return ""
    verdicts = []
    for proof in proofs:
        word = '<b class="good">passed</b>' if proof.get("passed") else '<b class="bad">failed</b>'
        verdicts.append(word + (f": {escape(str(proof['reason']))}" if proof.get("reason") else ""))
    rows = [("proof", *verdicts)]
    for title, key, form in PROOF_ROWS:
        rows.append((title, *(_cell(proof.get(key), key, form) for proof in proofs)))
    return _table(("", *(escape(str(proof.get("format"))) for proof in proofs)), rows)


def _cell(value: Any, key: str, form: str) -> str:
    if form and _number(value):
        return format(value / 1e6 if key == "bytes" else value, form)
    return escape("-" if value is None else str(value))


def _notes(notes: Sequence[Any]) -> str:
    return "<ul>" + "".join(f"<li>{escape(str(note))}</li>" for note in notes) + "</ul>" if notes else ""


def _details(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>" if text else ""


def _environment(record: dict[str, Any]) -> str:
    """Everything in run.json that is shown nowhere else."""
    shown = {"phases", "notes", "error", "name", "status"}
    rows = [(escape(key), escape(value)) for key, value in _flat({k: v for k, v in record.items() if k not in shown})]
    return _table(("", ""), rows).replace("<td>", '<td class="long">') if rows else ""


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as dotted keys and text."""
    pairs: list[tuple[str, str]] = []
    for key, inner in value.items():
        name = f"{prefix}{key}"
        pairs += _flat(inner, f"{name}.") if isinstance(inner, dict) else [(name, "-" if inner is None else str(inner))]
    return pairs
