"""Turn one or several run folders into one HTML page that needs nothing but itself.

    python docs/report.py out/grpo-countdown-0                      writes out/grpo-countdown-0/report.html
    python docs/report.py out/grpo-* out/nsr-* --out compare.html   runs overlaid, differing settings first

The page shows each evaluation metric before and after; pass@k of the base and of each run where k takes several
values, as a table and over log2 k, several runs by script and mode; accuracy over thinking tokens, the cap side and the
extend side apart, where a run has them; one small panel per logged metric; the settings;
sampled completions token by token, from the first, the middle and the last logged step. No script, no network, light
and dark, under 1 MB: long curves are thinned (each bucket keeps its lowest and highest point), long completions lose
their middle, and the page says what is left out. Of each folder, run.json, metrics.jsonl and samples.jsonl are read
and never written.
"""

import argparse
import html
import itertools
import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

PAGE_BYTES, CURVE_BYTES = 950_000, 350_000  # of the page; of its curves. The traces get what the rest leaves
MAX_PANELS, MAX_SETTINGS, MAX_GROUPS, MAX_CARDS = 80, 150, 4, 16
LEFT, RIGHT, TOP, BOTTOM = 42, 268, 8, 92  # edges of the plot inside a panel of 276 x 108
LIKELY = (0.9, 0.7, 0.5, 0.25, 0.05)  # a token below the i-th of these probabilities gets colour i + 1


@dataclass
class Run:
    name: str
    css: str  # class of its colour and, past the eighth run, of its dashes
    settings: dict = field(default_factory=dict)  # setting -> HTML
    series: dict = field(default_factory=dict)  # metric -> [(step, value), ...], steps rising
    samples: list = field(default_factory=list)
    notes: list = field(default_factory=list)


# ------------------------------------------------------------------------------------------- text and numbers


def visible(text: str) -> str:
    r"""`text` with what has no shape of its own (control, direction, zero width) as an escape.

    >>> print(visible("red\x1b[31m" + chr(10) + chr(0x202e)))
    red\x1b[31m\n\u202e
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def clip(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text) - most:,} characters more)"


def esc(value: object, most: int = 200) -> str:
    """Any value as HTML text, safe inside quotes too; cut after `most` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return html.escape(visible(clip(text, most)))


def number(value: object) -> float | None:
    """`value` if it is a number that can be drawn; None for null, text, booleans, NaN and beyond 1e30."""
    return value if type(value) in (int, float) and abs(value) < 1e30 else None


def num(value: float, sign: str = "-") -> str:
    """At most eight characters, and as many decimals as its neighbours in a column.

    >>> [num(v) for v in (0.31, 1.0, 12.345, 51234, 0.00049, 240, -2.5e9)]
    ['0.310', '1.000', '12.3', '51,234', '4.9e-4', '240', '-2.5e9']
    """
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return re.sub(r"e\+?(-?)0?", r"e\1", f"{value:{sign}.1e}")
    decimals = 0 if size >= 1000 or type(value) is int else 1 if size >= 10 else 3
    return f"{value:{sign},.{decimals}f}"


def as_dict(value: object) -> dict:
    return value if isinstance(value, dict) else {}


# ---------------------------------------------------------------------------------------------------- reading


def parse(raw: bytes, where: str) -> dict:
    try:
        row = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({clip(str(error))}): repair or remove it") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} should be an object, is {clip(str(row))}: repair or remove it")
    return row


def read_jsonl(path: Path, notes: list) -> list[dict]:
    """The objects of a file, one a line, each with a "step". A last line cut off by a kill becomes a note."""
    rows, lines = [], path.read_bytes().split(b"\n")
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse(line, f"{path}:{i}")
        except ValueError:
            if i < len(lines):  # it has its line end, so it was not cut off
                raise
            notes.append(f"{path.name}: line {i}, the last one, is cut off and was left out")
            break
        if number(row.get("step")) is None:
            raise ValueError(f'{path}:{i} has {clip(str(row.get("step")))} under "step": give it a number')
        rows.append(row)
    return rows


def read_settings(path: Path) -> dict:
    """Setting -> HTML of its value: flags, what the script chose, versions, device, command."""
    about = parse(path.read_bytes(), str(path))
    parts = (("", "config"), ("chosen: ", "chosen"), ("version: ", "versions"))
    found = {mark + key: value for mark, part in parts for key, value in as_dict(about.get(part)).items()}
    found |= {key: about.get(key) for key in ("script", "device", "command")}
    return {key: esc(value, 400) or "&ldquo;&rdquo;" for key, value in list(found.items())[-MAX_SETTINGS:]}


def load_run(folder: Path, name: str, index: int) -> Run:
    """Raises ValueError where the folder or one of its files cannot be used."""
    run = Run(name, f"c{index % 8} d{index // 8 % 3}")
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder} (give the folder that holds metrics.jsonl)")
    if not (folder / "metrics.jsonl").is_file():
        inner = min(folder.glob("*/metrics.jsonl"), default=Path("out/grpo-countdown-0/metrics.jsonl"))
        raise ValueError(f"no metrics.jsonl in {folder}: give the folder of one run, such as {inner.parent}")
    if (folder / "run.json").is_file():
        run.settings = read_settings(folder / "run.json")
    else:
        run.notes.append("no run.json: settings unknown")
    values, faults = {}, Counter()  # metric -> {step: value}; a step that is logged again replaces the first
    for row in read_jsonl(folder / "metrics.jsonl", run.notes):
        for key, value in row.items():
            if key != "step" and number(value) is not None:
                values.setdefault(key, {})[row["step"]] = value
            elif type(value) is float:
                faults[key] += 1
    run.series = {key: sorted(by_step.items()) for key, by_step in values.items()}
    run.notes += [f"{key}: {count} values not finite" for key, count in faults.most_common(8)]
    run.notes += [] if values else ["no numbers in metrics.jsonl yet"]
    if (folder / "samples.jsonl").is_file():
        rows = read_jsonl(folder / "samples.jsonl", run.notes)
        run.samples = list({(r["step"], str(r.get("group")), str(r.get("sample"))): r for r in rows}.values())
    return run


# ----------------------------------------------------------------------------------------------------- curves


def thin(points: list, most: int) -> list:
    """About `most` of the points: the lowest and the highest of each bucket, so that no spike is lost."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    buckets = (points[i : i + size] for i in range(0, len(points), size))
    return [p for b in buckets for p in sorted({min(b, key=lambda p: p[1]), max(b, key=lambda p: p[1])})]


def smooth(points: list) -> list:
    """Mean over a tenth of the curve; the window shrinks towards the ends, so lines stay straight."""
    total = [0.0, *itertools.accumulate(y for _, y in points)]
    reach = [min(len(points) // 20, i, len(points) - 1 - i) for i in range(len(points))]
    return [(points[i][0], (total[i + r + 1] - total[i - r]) / (2 * r + 1)) for i, r in enumerate(reach)]


def panel(title: str, lines: list, ends: tuple, names: tuple, dots: bool, most: int = 240, ticks: tuple = ()) -> str:
    """One figure. lines: (css, points, {x: standard error}) per run; ends, names: of the x axis; ticks: (x, name)."""
    ys = [y + side * e.get(x, 0) for _, points, e in lines for x, y in points for side in (-1, 1)]
    low, high, marks, last = min(ys), max(ys), "", ""

    def at(x: float, y: float) -> tuple[str, str]:
        across = (x - ends[0]) / ((ends[1] - ends[0]) or 1)
        up = (y - low) / (high - low) if high > low else 0.5  # a constant runs through the middle
        return f"{LEFT + across * (RIGHT - LEFT):.1f}", f"{BOTTOM - up * (BOTTOM - TOP):.1f}"

    for css, points, errors in lines:
        noisy = len(points) >= 40 and not dots
        for style, line in [("thin", points), ("", smooth(points))] if noisy else [("", points)]:
            path = " ".join(",".join(at(*point)) for point in thin(line, most))
            marks += f'<polyline class="{css} {style}" points="{path}"/>'
        for x, y in thin(points, 60) if dots or len(points) == 1 else ():
            (cx, cy), bar = at(x, y), (at(x, y + side * errors.get(x, 0))[1] for side in (-1, 1))
            marks += f'<path class="{css}" d="M{cx},{"V".join(bar)}"/>' * (x in errors)
            marks += f'<circle class="{css}" cx="{cx}" cy="{cy}" r="2.2"><title>{num(y)}</title></circle>'
        last += f'<span class="{css}">{num(points[-1][1])}</span>'
    grid = "".join(f"M{LEFT},{y}H{RIGHT}" for y in (TOP, (TOP + BOTTOM) / 2, BOTTOM))
    texts = (LEFT - 5, TOP + 3, num(high)), (LEFT - 5, BOTTOM + 3, num(low)), (RIGHT, BOTTOM + 13, names[1])
    labels = "".join(f'<text x="{x}" y="{y}" text-anchor="end">{text}</text>' for x, y, text in texts)
    labels += f'<text x="{LEFT}" y="{BOTTOM + 13}">{names[0]}</text>'
    middle = f'y="{BOTTOM + 13}" text-anchor="middle"'
    labels += "".join(f'<text x="{at(x, low)[0]}" {middle}>{text}</text>' for x, text in ticks)
    svg = f'<svg viewBox="0 0 276 108"><path class="grid" d="{grid}"/>{marks}{labels}</svg>'
    return f"<figure><figcaption><strong>{esc(title, 60)}</strong>{last}</figcaption>{svg}</figure>"


def curves(runs: list[Run]) -> str:
    """Evaluation panels, then training panels, over one common axis of steps."""
    names = list(dict.fromkeys(name for run in runs for name in run.series))
    names = [n for n in names if n[-3:] != "_se" or n[:-3] not in names]  # those are bars on their metric
    names = [n for n in names if not SIDE.fullmatch(n)]  # their steps are settings: see thinking_tokens
    names.sort(key=lambda name: name.startswith(("seconds", "tokens")))  # else in the order of the log
    steps = [x for run in runs for points in run.series.values() for x, _ in (points[0], points[-1])] or [0]
    axis = (min(steps), max(steps)), (f"step {num(min(steps))}", num(max(steps)))
    most = min(240, CURVE_BYTES // (24 * len(runs) * min(len(names) + 1, MAX_PANELS)))
    found = {True: "", False: ""}
    for name in names[:MAX_PANELS]:
        dots, have = name.startswith("eval/"), [run for run in runs if name in run.series]
        lines = [(run.css, run.series[name], dict(run.series.get(name + "_se", ()))) for run in have]
        found[dots] += panel(name, lines, *axis, dots, most)
    more = f"<p>{len(names) - MAX_PANELS} more metrics in metrics.jsonl</p>" * (len(names) > MAX_PANELS)
    return "".join(f'<div class="panels">{panels}</div>' for panels in found.values() if panels) + more


# ----------------------------------------------------------------------------------------------------- tables


def table(head: list[str], rows: list[list[str]], css: str = "") -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{css}"><tr>{top}</tr>{body}</table></div>'


def chip(run: Run, name: str = "", css: str = "") -> str:
    css = css or run.css
    line = f'<svg viewBox="0 0 22 8"><path class="{css}" d="M1,4H21"/></svg>'
    return f'<span class="run {css}">{line}{esc(name or run.name, 60)}</span>'


def method(run: Run) -> str:
    """Script and mode, as "nsr psr"; the folder's name where there is no run.json."""
    script = run.settings.get("script", run.name).removesuffix(".py")
    return f"{script} {run.settings.get('mode', '')}".strip()


def before_after(runs: list[Run]) -> str:
    """First and last value of each evaluation metric, one row per metric and run; "" without evaluations."""
    rows, names = [], dict.fromkeys(name for run in runs for name in run.series)
    for name in (n for n in names if n.startswith("eval/") and not re.search(r"_se$|pass@\d+$", n)):
        label = esc(name, 60)
        for run in (r for r in runs if name in r.series):
            (x0, y0), (x1, y1) = ends = run.series[name][0], run.series[name][-1]
            errors = dict(run.series.get(name + "_se", ()))
            bars = (f"<small> &plusmn; {num(errors[x])}</small>" if x in errors else "" for x, _ in ends)
            cells = [num(y) + bar for (_, y), bar in zip(ends, bars, strict=True)]
            rows.append([label, chip(run), *cells, num(y1 - y0, "+"), f"{num(x0)} to {num(x1)}"])
            label = ""  # a metric is named once, above its runs
    return table(["metric", "run", "before", "after", "change", "at steps"], rows) if rows else ""


def pass_at_k(runs: list[Run]) -> str:
    """pass@k of the base, the first evaluation, and at the last one of each run, as a table and over log2 k; "" with
    fewer than two k. Runs from equal bases share one line of it.
    """
    names = {name for run in runs for name in run.series if re.fullmatch(r"eval/pass@[1-9]\d{0,6}", name)}
    ks, rows, lines, bases = sorted(int(name.split("@")[1]) for name in names)[:16], [], [], []
    several, methods = len(runs) > 1, [method(run) for run in runs]
    for run, name in zip(runs, methods, strict=True) if len(ks) > 1 else ():
        name = name if methods.count(name) == 1 else f"{name} ({run.name})"
        updates = dict(run.series.get("optimizer_steps", ()))
        for when in (0, -1):  # a single evaluation is the last one
            found = {k: run.series.get(f"eval/pass@{k}", []) for k in ks}
            found = {k: points[when] for k, points in found.items() if len(points) > 1 + when}
            if not found or when == 0 and found in bases:
                continue
            css, label = run.css, name if several else run.name
            if when == 0:
                css = "base first" if several else css + " first"
                label = label if not several else f"base of {name}" if bases else "base"
                bases.append(found)
            step = max(x for x, _ in found.values())
            made = f", {num(updates[step])} updates" if step in updates else ""
            values = (num(found[k][1]) if k in found else "" for k in ks)
            rows.append([chip(run, label, css), f"step {num(step)}{made}", *values])
            lines.append((css, [(math.log2(k), y) for k, (_, y) in found.items()], {}))
    if not rows:
        return ""
    axis, ticks = (math.log2(ks[0]), math.log2(ks[-1])), tuple((math.log2(k), k) for k in ks)
    chart = panel("pass@k over log2 k (dashed: base)", lines, axis, ("", ""), True, ticks=ticks)
    head = ["run", "evaluated at", *(f"k = {k}" for k in ks)]
    return table(head, rows) + f'<div class="panels one">{chart}</div>'


SIDE = re.compile(r"[a-z_]+/(?P<of>[^/]+/(?P<side>cap|reject|prompt|wait|none|word|vote|best|any))(_se)?")
APART = {"budgets below": ("cap", "reject", "prompt")}  # the picture in which a side is drawn
APART["extended, or k samples"] = ("wait", "none", "word", "vote", "best", "any")


def thinking_tokens(runs: list[Run]) -> str:
    """budget_forcing.py: accuracy over log2 of the thinking tokens, a line per model and side; "" without such runs."""
    found = ""
    for title, sides in APART.items():
        lines, legend = [], []
        for run in runs:
            for name in (n for n in run.series if n.startswith("accuracy/") and SIDE.fullmatch(n)):
                of, side = SIDE.fullmatch(name).group("of", "side")
                tokens = dict(run.series.get(f"thinking_tokens/{of}", ()))
                points = {math.log2(tokens[x]): (y, x) for x, y in run.series[name] if tokens.get(x, 0) > 0}
                if name[-3:] == "_se" or side not in sides or not points:
                    continue
                errors, css = dict(run.series.get(name + "_se", ())), f"c{len(lines) % 8} d{len(lines) // 8 % 3}"
                bars = {x: errors[step] for x, (_, step) in points.items() if step in errors}
                lines.append((css, [(x, y) for x, (y, _) in sorted(points.items())], bars))
                legend.append(chip(run, of if len(runs) == 1 else f"{of} ({run.name})", css))
        if lines:
            xs = [x for _, points, _ in lines for x, _ in points]
            ends = min(xs), max(xs)
            chart = panel(title, lines, ends, tuple(f"{2**x:.0f} tokens" for x in ends), True)
            found += f'<p>{"".join(legend)}</p><div class="panels one">{chart}</div>'
    return found


def settings(runs: list[Run]) -> str:
    """What differs between the runs first, one column each; then what they share."""
    values = {key: [run.settings.get(key, "&ndash;") for run in runs] for run in runs for key in run.settings}
    differ = [[esc(key, 60), *cells] for key, cells in values.items() if len(set(cells)) > 1]
    same = [(key, cells[0]) for key, cells in values.items() if len(set(cells)) == 1]
    found = f"<h3>Different</h3>{table(['setting', *map(chip, runs)], differ, 'differ')}" * (len(differ) > 0)
    found += "<h3>The same in all runs</h3>" * (len(runs) > 1 and len(same) > 0)
    shared = "".join(f"<div><dt>{esc(key, 60)}</dt><dd>{value}</dd></div>" for key, value in same)
    return found + f"<dl>{shared}</dl>" * (len(same) > 0)


# ----------------------------------------------------------------------------------------------------- traces


def spans(row: dict) -> list[str]:
    """One <i> per token: p1 (likely) to p5 (surprising), m = not trained on, e = has an escaped character."""
    found, keys = [], ("tokens", "pieces", "logprobs", "mask")
    columns = (row[key] if isinstance(row.get(key), list) else [] for key in keys)
    for token, piece, logprob, mask in itertools.zip_longest(*columns):
        if token is None and piece is None:
            continue
        piece, css, title = piece if isinstance(piece, str) else f"[{token}]", "m" * (mask == 0), ""
        if number(logprob) is not None:
            p = math.exp(min(logprob, 0.0))
            css, title = css or f"p{sum(p < c for c in LIKELY)}", f' title="{p:.3g}"'
        css += " e" * (visible(piece) != piece)
        found.append(f'<i class="{css}"{title}>{esc(piece)}</i>' + "\n" * ("\n" in piece))
    return found


def middle_out(parts: list[str], room: float) -> str:
    """The parts joined; where they exceed `room` bytes, the middle is left out and counted."""
    sizes = [len(part.encode()) for part in parts]
    if sum(sizes) <= max(room, 0):
        return "".join(parts)
    head = sum(total <= room * 0.6 for total in itertools.accumulate(sizes))
    tail = sum(total <= room * 0.4 for total in itertools.accumulate(reversed(sizes)))
    note = f"<b> &hellip; {len(parts) - head - tail:,} tokens left out &hellip; </b>"
    return "".join(parts[:head]) + note + "".join(parts[len(parts) - tail :])


def card(row: dict, room: float) -> str:
    """One completion: its rewards, advantage and flags, then its tokens in about `room` bytes."""
    words, tokens = [f"sample <b>{esc(row.get('sample'), 20)}</b>"], spans(row)
    for key, value in list(as_dict(row.get("rewards")).items())[:12]:
        shown = f"{esc(key, 40)} <b>{esc(value, 100) if number(value) is None else num(value)}</b>"
        verdict = "<b class=good>&#10003; correct</b>" if value else "<b class=bad>&#10007; wrong</b>"
        words.append(verdict if key == "correct" else shown)
    if number(row.get("advantage")) is not None:
        words.append(f"advantage <b>{num(row['advantage'], '+')}</b>")
    words += [f"{len(tokens):,} tokens", "<b class=bad>truncated</b>" if row.get("truncated") else ""]
    top = "".join(f"<span>{word}</span>" for word in words)
    return f'<div class="card"><p>{top}</p><pre>{middle_out(tokens, room)}</pre></div>'


def group(rows: list[dict], room: float) -> str:
    """The problem, the first completion in at most half of `room` bytes, the rest folded away."""
    count = min(len(rows), MAX_CARDS, 1 + int(room // 4000))
    first = card(rows[0], room / 2 - 800)  # 800: what stands around the tokens
    share = (room - len(first.encode())) / max(count - 1, 1) - 800
    rewards = [as_dict(row.get("rewards")) for row in rows]
    totals = [r["total"] for r in rewards if number(r.get("total")) is not None]
    facts = f"{sum(bool(r.get('correct')) for r in rewards)} of {len(rows)} correct"
    facts += f", mean reward {num(sum(totals) / len(totals))}" if totals else ""
    prompt = "\\n\n".join(map(visible, clip(str(rows[0].get("prompt") or ""), 1500).split("\n")))
    text = f"<h4>Group {esc(rows[0].get('group'), 20)}<small>{facts}</small></h4>"
    text += f'<pre class="problem">{esc(rows[0].get("problem"), 300)}\n{html.escape(prompt)}</pre>{first}'
    rest = f"<summary>{count - 1} more of this group's {len(rows)} completions</summary>"
    rest += "".join(card(row, share) for row in rows[1:count])
    return text + f"<details>{rest}</details>" * (count > 1)


def traces(run: Run, room: float) -> str:
    """Groups of the first, the middle and the last logged step in about `room` bytes."""
    found, steps = f"<h3>{chip(run)}</h3>", sorted({row["step"] for row in run.samples})
    for step in sorted({steps[0], steps[len(steps) // 2], steps[-1]} if steps else ()):
        groups = {}
        for row in (r for r in run.samples if r["step"] == step):
            groups.setdefault(str(row.get("group")), []).append(row)
        shown = list(groups.values())[:MAX_GROUPS]
        of = f", {len(shown)} of its {len(groups)} groups" * (len(groups) > len(shown))
        blocks = (group(rows, room / 3 / len(shown)) for rows in shown)
        found += f"<h3>Step {num(step)}{of}</h3>{''.join(blocks)}"
    return found if steps else found + "<p>No completions logged (samples.jsonl).</p>"


# ------------------------------------------------------------------------------------------------------- page

LEGEND = '<i class="p0">p &ge; 0.9</i> '
LEGEND += "".join(f'<i class="p{i}">&lt; {p}</i> ' for i, p in enumerate(LIKELY, 1))
LEGEND += '<i class="m">not trained on</i> <i class="e">\\n</i> escaped character'

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--ink:#20242a;--soft:#666d76;--line:#e1e2e0;--card:#fff;
--good:#1b7a4b;--bad:#b3362b;--hot:214 90 20;--note:#f3efe2;--c0:#2762b0;--c1:#bd5412;--c2:#1b7f63;
--c3:#963a87;--c4:#8a6d00;--c5:#c02f55;--c6:#4c6a78;--c7:#6a51c4}
@media screen and (prefers-color-scheme:dark){:root{--bg:#15181c;--ink:#dfe2e6;--soft:#959ca6;--line:#2d3238;
--card:#1b1f24;--good:#62c394;--bad:#f0897d;--hot:240 120 50;--note:#2a2820;--c0:#74aaf2;--c1:#f0975a;
--c2:#57c6a4;--c3:#d98ccb;--c4:#d5b54a;--c5:#f2859f;--c6:#9db6c2;--c7:#ab9bf5}}body{margin:0 auto;
max-width:1180px;padding:2rem 1.6rem 4rem;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,"Segoe UI","Liberation Sans",sans-serif;font-variant-numeric:tabular-nums}
h1{font-size:1.5rem;margin:0}
h2{font-size:1.15rem;margin:2.4rem 0 .8rem;padding-top:.9rem;border-top:1px solid var(--line)}
h3{font-size:.95rem;margin:1.6rem 0 .6rem}h4{font-size:.88rem;margin:1.2rem 0 .3rem}
p,small,th,dt,summary,.problem,figcaption,pre b{color:var(--soft);font-weight:400;font-size:.86rem}
h4 small{margin-left:.8em}p{margin:.3rem 0}.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem}td small{font-size:.9em}
th,td{padding:.28rem 0 .28rem 1.3rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
:is(th,td):first-child{padding-left:0}
:is(th,td):is(:first-child,:nth-child(2)),.differ :is(th,td){text-align:left}
.differ td{white-space:normal;overflow-wrap:anywhere;min-width:8em;padding-right:1rem}
.differ td+td{background:var(--note)}
code,pre,dd,td+td:is(.differ td){
font:.82rem/1.75 ui-monospace,"SF Mono",Consolas,"DejaVu Sans Mono",monospace}
.legend{position:sticky;top:0;z-index:1;max-height:30vh;overflow:auto;padding:.5rem 0;background:var(--bg)}
.run{white-space:nowrap;color:var(--c);font-weight:600;margin-right:1.2em}
.run svg{width:22px;margin-right:.45em}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:.8rem;margin:.9rem 0}
figure,.card{margin:0;padding:.6rem .75rem .4rem;background:var(--card);border:1px solid var(--line);
border-radius:7px}figure{break-inside:avoid}figcaption{display:flex;flex-wrap:wrap;gap:0 .8em}
figcaption span{color:var(--c);font-weight:600}
strong{font-weight:500;color:var(--ink);margin-right:auto;overflow-wrap:anywhere}
.one{grid-template-columns:minmax(250px,640px)}.one text{font-size:6px}
.one :is(polyline,path){stroke-width:1}.one circle{r:1.5px}
strong:has(~span~span){width:100%}figcaption .first{display:none}
figure svg{display:block;width:100%;margin-top:.3rem}text{font-size:9.5px;fill:var(--soft)}
polyline,path{fill:none;stroke:var(--c);stroke-width:1.7;stroke-linejoin:round}circle{fill:var(--c)}
.grid{stroke:var(--line);stroke-width:1}.d1,.first{stroke-dasharray:5 3}.d2{stroke-dasharray:1.5 3}
.thin{stroke-width:1;stroke-dasharray:none;opacity:.38}circle{stroke:none}
dl{margin:0;columns:3 290px;column-gap:2.2rem}dl div{display:flex;gap:1em;justify-content:space-between;
break-inside:avoid;border-bottom:1px solid var(--line)}dd{margin:0;text-align:right;overflow-wrap:anywhere}
pre{margin:.3rem 0;white-space:pre-wrap;overflow-wrap:anywhere}.card{margin:.5rem 0;overflow:hidden}
.card p{display:flex;flex-wrap:wrap;gap:0 1.3em}p b{color:var(--ink);font-weight:600}
p .good{color:var(--good)}p .bad{color:var(--bad)}
i{font-style:normal;border-radius:2px;unicode-bidi:isolate;print-color-adjust:exact}
.p1{background:rgb(var(--hot)/.1)}.p2{background:rgb(var(--hot)/.2)}.p3{background:rgb(var(--hot)/.33)}
.p4{background:rgb(var(--hot)/.48)}.p5{background:rgb(var(--hot)/.66)}.e{color:var(--c0)}
.m{color:var(--soft);border-bottom:1px dotted}summary{cursor:pointer;margin:.4rem 0}
@media print{html{font-size:11px}body{padding:0;font-size:1rem}.legend{position:static}.wide{overflow:visible}
th,td{padding-left:.8rem}.panels{grid-template-columns:repeat(3,1fr)}}
"""


def page(runs: list[Run]) -> str:
    """The whole HTML text."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    notes = "<br>".join(f"{esc(run.name, 60)}: {esc(note)}" for run in runs for note in run.notes)
    hint = "Beside a name: the last value. Thick: mean over a tenth of the run; thin: each step, or the lowest "
    hint += "and the highest of a few where a run is long. Bars: one standard error."
    body = f'<h1>{esc(title)}</h1><div class="legend">{"".join(map(chip, runs))}</div><p>{notes}</p>'
    for heading, text in (
        ("Before and after", before_after(runs)),
        ("pass@k", pass_at_k(runs)),
        ("Accuracy over thinking tokens", thinking_tokens(runs)),
        ("Curves", f"<p>{hint}</p>{curves(runs)}"),
        ("Settings", settings(runs)),
        ("Completions, token by token", f"<p>Colour: probability when sampled.</p><pre>{LEGEND}</pre>"),
    ):
        body += f"<h2>{heading}</h2>{text}" * bool(text)
    room = max(0, PAGE_BYTES - len(body.encode()) - len(STYLE))
    for run in runs:
        text = traces(run, room / len(runs))
        fits = len(body.encode()) + len(text.encode()) + len(STYLE) < PAGE_BYTES + 20_000
        body += text if fits else f"<p>{chip(run)} left out: the page is full; draw this run alone</p>"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    colours = "".join(f".c{i}{{--c:var(--c{i})}}" for i in range(8)) + ".base{--c:var(--ink)}"
    head += f"<title>{esc(title)}</title><style>{STYLE}{colours}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def stop(message: str) -> None:
    print(f"report.py: error: {visible(message)}", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("report.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder that a script wrote")
    parser.add_argument("--out", default="", help="page to write (default: report.html in the first RUN)")
    parser.error = stop  # one line, no usage
    args = parser.parse_args(argv)
    folders = [Path(run) for run in args.runs]
    names = [folder.resolve().name for folder in folders]
    names = [name if names.count(name) == 1 else str(folders[i]) for i, name in enumerate(names)]
    out = Path(args.out or folders[0] / "report.html")
    if out.suffix not in (".html", ".htm"):  # so that a slip does not overwrite a run's file
        stop(f"--out {out}: give a file name that ends in .html")
    try:
        runs = [load_run(folder, names[i], i) for i, folder in enumerate(folders)]
        out.write_text(page(runs), encoding="utf-8", newline="\n")
    except (ValueError, OSError) as error:
        stop(str(error))
    for note in [f"{run.name}: {note}" for run in runs for note in run.notes]:
        print(f"report.py: note: {visible(note)}", file=sys.stderr)
    print(f"wrote {visible(str(out))} ({out.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
