"""Turn one or several run folders into one HTML page that needs nothing but itself, a picture, or a look at one group.

    python docs/report.py out/grpo-0                                writes out/grpo-0/report.html
    python docs/report.py out/grpo-* out/nsr-* --out compare.html   runs overlaid, differing settings first
    python docs/report.py out/grpo-* --out grpo.svg --show reward,completion_length     a picture of these metrics
    python docs/report.py out/grpo-0 --explain 16                   one group of step 16, token by token, as text

The page shows each evaluation metric before and after; pass@k of the base and of each run where k takes several
values, as a table and over log2 k, several runs by script and mode; accuracy over thinking tokens, the cap side and the
extend side apart, where a run has them; one small panel per logged metric; the settings; problems that were logged more
than once, by a run or by several, side by side; sampled completions token by token, from the first, the middle and the
last logged step. No script, no network, light and dark, under 1 MB: long curves are thinned (each bucket keeps its
lowest and highest point), long completions lose their middle, and the page says what is left out.

--explain prints a group's rewards, advantages and shares of the loss and one answer's tokens (grpo, ppo, nsr), what was
appended (budget_forcing), which steps were kept (specreason). Files of a run are read and never written.
"""

import argparse
import html
import itertools
import json
import math
import os
import re
import sys
import textwrap
import unicodedata
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
    """Setting -> HTML of its value: the flags, then what else the script noted (device, torch, command)."""
    about = parse(path.read_bytes(), str(path))
    found = as_dict(about.pop("config", {}))
    for name, value in about.items():
        found |= {f"{name}: {key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return {key: esc(value, 400) or "&ldquo;&rdquo;" for key, value in list(found.items())[-MAX_SETTINGS:]}


def load_run(folder: Path, name: str, index: int) -> Run:
    """Raises ValueError where the folder or one of its files cannot be used."""
    run = Run(name, f"c{index % 8} d{index // 8 % 3}")
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder} (give the folder that holds metrics.jsonl)")
    if not (folder / "metrics.jsonl").is_file():
        inner = min(folder.glob("*/metrics.jsonl"), default=Path("out/grpo-0/metrics.jsonl"))
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
        counts = Counter()  # the scripts write the answers of a group one after the other, without a number
        for row in read_jsonl(folder / "samples.jsonl", run.notes):
            where = row["step"], str(row.get("group"))
            row.setdefault("sample", counts[where])
            counts[where] += 1
            run.samples.append(row)
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


def plot(
    lines: list, ends: tuple, names: tuple, dots: bool, most: int = 240, ticks: tuple = (), marked: list | tuple = ()
) -> str:
    """The inside of a figure of 276 x 108. lines: (css, points, {x: standard error}); ends, names: of the x axis;
    ticks: (x, name); marked: (x, y, name) of a point.
    """
    ys = [y + side * e.get(x, 0) for _, points, e in lines for x, y in points for side in (-1, 1)]
    low, high, marks = min(ys), max(ys), ""

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
    grid = "".join(f"M{LEFT},{y}H{RIGHT}" for y in (TOP, (TOP + BOTTOM) / 2, BOTTOM))
    texts = (LEFT - 5, TOP + 3, num(high)), (LEFT - 5, BOTTOM + 3, num(low)), (RIGHT, BOTTOM + 13, names[1])
    labels = "".join(f'<text x="{x}" y="{y}" text-anchor="end">{text}</text>' for x, y, text in texts)
    labels += f'<text x="{LEFT}" y="{BOTTOM + 13}">{names[0]}</text>'
    middle = f'y="{BOTTOM + 13}" text-anchor="middle"'
    labels += "".join(f'<text x="{at(x, low)[0]}" {middle}>{text}</text>' for x, text in ticks)
    taken = []  # boxes of the names of points: the next one goes where there is room, the nearest place first
    for x, y, text in marked:
        (cx, cy), width = map(float, at(x, y)), 5 * len(text)
        left = cx - 5 - width if cx > (LEFT + 2 * RIGHT) / 3 else cx + 5
        tops = sorted(range(TOP, BOTTOM + 1), key=lambda top: abs(top - cy - 3))
        free = (top for top in tops if all(abs(top - v) > 8 or left > w or left + width < u for u, w, v in taken))
        taken.append((left, left + width, top := next(free, cy)))
        labels += f'<text x="{left:.0f}" y="{top:.0f}">{esc(text, 30)}</text>'
    return f'<path class="grid" d="{grid}"/>{marks}{labels}'


def panel(title: str, lines: list, *axes) -> str:
    """One figure of the page: a title, the last value of each line, and their plot."""
    last = "".join(f'<span class="{css}">{num(points[-1][1])}</span>' for css, points, _ in lines)
    svg = f'<svg viewBox="0 0 276 108">{plot(lines, *axes)}</svg>'
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
    chart = panel("pass@k over log2 k (dashed: base)", lines, axis, ("", ""), True, 240, ticks)
    head = ["run", "evaluated at", *(f"k = {k}" for k in ks)]
    return table(head, rows) + f'<div class="panels one">{chart}</div>'


SIDE = re.compile(r"[a-z_]+/(?P<of>[^/]+/(?P<side>cap|reject|prompt|wait|none|word|vote|best|any))(_se)?")
APART = {"budgets below": ("cap", "reject", "prompt")}  # the picture in which a side is drawn
APART["extended, or k samples"] = ("wait", "none", "word", "vote", "best", "any")


def thinking_lines(runs: list[Run], sides: tuple) -> tuple[list, list, tuple, tuple]:
    """budget_forcing.py: accuracy over log2 of the thinking tokens, a line for each model and side: the lines, (run and
    name, css) of each, and ends and names of the axis.
    """
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
            legend.append((of if len(runs) == 1 else f"{of} ({run.name})", css))
    xs = [x for _, points, _ in lines for x, _ in points] or [0]
    return lines, legend, (min(xs), max(xs)), tuple(f"{2**x:.0f} tokens" for x in (min(xs), max(xs)))


def thinking_tokens(runs: list[Run]) -> str:
    """Both pictures of `thinking_lines`; "" without runs of budget_forcing.py."""
    found = ""
    for title, sides in APART.items():
        lines, legend, *axis = thinking_lines(runs, sides)
        if lines:
            chips = "".join(chip(runs[0], name, css) for name, css in legend)
            found += f'<p>{chips}</p><div class="panels one">{panel(title, lines, *axis, True)}</div>'
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


def tokens_of(row: dict) -> list[dict]:
    """The tokens of a sample: piece, p (None if unknown), mask, and whether its log-probability is stored as 0."""
    found, keys = [], ("tokens", "pieces", "logprobs", "mask")
    columns = (row[key] if isinstance(row.get(key), list) else [] for key in keys)
    for token, piece, logprob, mask in itertools.zip_longest(*columns):
        if token is None and piece is None:
            continue
        known = number(logprob) is not None
        token = {"piece": piece if isinstance(piece, str) else f"[{token}]", "mask": int(mask != 0)}
        token |= {"p": math.exp(min(logprob, 0.0)) if known else None}
        found.append(token | {"zero": known and logprob == 0 and math.copysign(1, logprob) > 0})
    return found


def spans(row: dict) -> list[str]:
    """One <i> per token: p1 (likely) to p5 (surprising), m = not trained on, e = has an escaped character."""
    found = []
    for token in tokens_of(row):
        piece, p, css, title = token["piece"], token["p"], "m" * (not token["mask"]), ""
        if p is not None:
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


def card(row: dict, room: float, equal: int = 0) -> str:
    """One completion: rewards, advantage, flags, then its tokens in about `room` bytes, the first `equal` faint."""
    words, tokens = [f"sample <b>{esc(row.get('sample'), 20)}</b>"], spans(row)
    for key, value in list(as_dict(row.get("rewards")).items())[:12]:
        shown = f"{esc(key, 40)} <b>{esc(value, 100) if number(value) is None else num(value)}</b>"
        verdict = "<b class=good>&#10003; correct</b>" if value else "<b class=bad>&#10007; wrong</b>"
        words.append(verdict if key == "correct" else shown)
    if number(row.get("advantage")) is not None:
        words.append(f"advantage <b>{num(row['advantage'], '+')}</b>")
    words += [f"{len(tokens):,} tokens", "<b class=bad>truncated</b>" if row.get("truncated") else ""]
    top = "".join(f"<span>{word}</span>" for word in words)
    faint = f'<span class="s">{middle_out(tokens[:equal], room / 2)}</span>' * (equal > 0)
    return f'<div class="card"><p>{top}</p><pre>{faint}{middle_out(tokens[equal:], room)}</pre></div>'


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


def same_prompts(runs: list[Run], room: float) -> str:
    """Problems that were logged more than once, by steps of a run or by several runs, side by side: of each run
    the first and the last time. "" where none came twice.
    """
    found: dict[str, dict] = {}  # problem, or prompt without one -> (run, step) -> its answers
    for i, run in enumerate(runs):
        for row in run.samples:
            key = json.dumps(row.get("problem") or row.get("prompt"))
            found.setdefault(key, {}).setdefault((i, row["step"]), []).append(row)
    twice = []
    for times in found.values():
        of_run = [[when for when in sorted(times) if when[0] == i] for i in range(len(runs))]
        ends = [when for steps in of_run for when in dict.fromkeys([*steps[:1], *steps[-1:]])]
        twice += [{when: times[when] for when in ends[:4]}] if len(ends) > 1 else []
    twice.sort(key=lambda times: (-len(times), -max(step for _, step in times)))  # most columns, then the latest
    text = ""
    for times in twice[:4]:
        first, columns = next(iter(times.values()))[0], ""
        start = [token["piece"] for token in tokens_of(first)]
        for (i, step), rows in times.items():
            pieces = [token["piece"] for token in tokens_of(rows[0])]
            equal = sum(itertools.takewhile(bool, (a == b for a, b in zip(start, pieces, strict=False))))
            equal *= rows[0] is not first
            right = sum(bool(as_dict(row.get("rewards")).get("correct")) for row in rows)
            head = f"{chip(runs[i])}step {num(step)}, {right} of {len(rows)} correct"
            columns += f"<div><p>{head}</p>{card(rows[0], room / 4 / len(times) - 800, equal)}</div>"
        text += f'<pre class="problem">{esc(first.get("problem"), 300)}\n{esc(first.get("prompt") or "", 300)}</pre>'
        text += f'<div class="panels beside">{columns}</div>'
    return text


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
.card p{overflow-wrap:anywhere;display:flex;flex-wrap:wrap;gap:0 1.3em}p b{color:var(--ink);font-weight:600}
p .good{color:var(--good)}p .bad{color:var(--bad)}
i{font-style:normal;border-radius:2px;unicode-bidi:isolate;print-color-adjust:exact}
.p1{background:rgb(var(--hot)/.1)}.p2{background:rgb(var(--hot)/.2)}.p3{background:rgb(var(--hot)/.33)}
.p4{background:rgb(var(--hot)/.48)}.p5{background:rgb(var(--hot)/.66)}.e{color:var(--c0)}
.m{color:var(--soft);border-bottom:1px dotted}.s{opacity:.45}.beside{align-items:start;
grid-template-columns:repeat(auto-fit,minmax(250px,1fr))}summary{cursor:pointer;margin:.4rem 0}
@media print{html{font-size:11px}body{padding:0;font-size:1rem}.legend{position:static}.wide{overflow:visible}
th,td{padding-left:.8rem}.panels{grid-template-columns:repeat(3,1fr)}}
"""

COLOURS = "".join(f".c{i}{{--c:var(--c{i})}}" for i in range(8)) + ".base{--c:var(--ink)}"
INSIDE = "".join(re.findall(r":root\{[^}]*\}|@media screen[^}]*\}\}", STYLE)).replace("\n", "") + COLOURS
INSIDE += "text{font:9.5px system-ui,sans-serif;fill:var(--soft)}.title{font-size:11px;fill:var(--ink)}"
INSIDE += "".join(re.findall(r"polyline,path\{[^}]*\}circle\{[^}]*\}|\.grid\{.*\n|\.thin\{.*\n", STYLE)).replace(
    "\n", ""
)


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
    ):
        body += f"<h2>{heading}</h2>{text}" * bool(text)
    room = max(0, PAGE_BYTES - len(body.encode()) - len(STYLE))
    if beside := same_prompts(runs, min(room / 4, 150_000)):
        told = "Of each run the first and the last time that a problem was logged. Faint: as in the first column."
        body += f"<h2>The same problems, side by side</h2><p>{told}</p>{beside}"
        room = max(0, room - len(beside.encode()))
    body += f"<h2>Completions, token by token</h2><p>Colour: probability when sampled.</p><pre>{LEGEND}</pre>"
    for run in runs:
        text = traces(run, room / len(runs))
        fits = len(body.encode()) + len(text.encode()) + len(STYLE) < PAGE_BYTES + 20_000
        body += text if fits else f"<p>{chip(run)} left out: the page is full; draw this run alone</p>"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{esc(title)}</title><style>{STYLE}{COLOURS}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


# ---------------------------------------------------------------------------------------------------- picture

WIDE, HIGH, HEAD = 290, 134, 18  # of a panel in a picture, with its title and the space around it


def over_metric(runs: list[Run], across: str, up: str) -> tuple:
    """What `plot` needs: the last values of metric `up` over those of `across` with the same text in place of the *."""
    lines, labels, pattern = [], [], re.compile(re.escape(up).replace(r"\*", "(.+)"))
    for run in runs:
        for way, points in ((m[1], run.series[m[0]]) for m in map(pattern.fullmatch, run.series) if m):
            if other := run.series.get(across.replace("*", way)):
                x, y, error = other[-1][1], points[-1][1], run.series.get(up.replace("/*", "_se/*").replace("*", way))
                lines.append((run.css, [(x, y)], {x: error[-1][1]} if error else {}))
                labels.append((x, y, way))
    ends = min((x for x, _, _ in labels), default=0), max((x for x, _, _ in labels), default=0)
    return lines, ends, tuple(map(num, ends)), True, 240, (), labels


def over_number(runs: list[Run], name: str) -> tuple:
    """What `plot` needs: the last values of a metric over log2 of the number in place of its *, a line for each run; of
    a single run also the first values, dashed.
    """
    lines, ticks, pattern = [], {}, re.compile(re.escape(name).replace(r"\*", r"([1-9]\d{0,6})"))
    for run in runs:
        found = {int(m[1]): run.series[m[0]] for m in map(pattern.fullmatch, run.series) if m}
        ticks |= {math.log2(k): k for k in found}
        twice = len(runs) == 1 and any(len(points) > 1 for points in found.values())
        for when in ([0] * twice + [-1]) if found else ():
            points = [(math.log2(k), found[k][when][1]) for k in sorted(found)]
            lines.append((run.css + " first" * (when == 0), points, {}))
    ends = min(ticks, default=0), max(ticks, default=0)
    return lines, ends, ("", ""), True, 240, tuple(ticks.items())


def over_steps(runs: list[Run], name: str) -> tuple:
    lines = [(r.css, r.series[name], dict(r.series.get(name + "_se", ()))) for r in runs if name in r.series]
    steps = [x for _, points, _ in lines for x, _ in points] or [0]
    ends = min(steps), max(steps)
    return lines, ends, (f"step {num(ends[0])}", num(ends[1])), name.startswith("eval/"), 120


def picture(runs: list[Run], names: list[str]) -> str:
    """A few panels as one SVG for a README, readable in light and dark.

    A name is a metric (over steps), one with a * for a number (over log2 of it, at the last evaluation), ACROSS:UP, two
    metrics with a * each (one over the other), or thinking (both pictures of budget_forcing.py).
    """
    arms: dict[str, list[Run]] = {}  # runs whose names differ in the seed, and the time after it, share a colour
    for run in runs:
        arms.setdefault(re.sub(r"-\d+(-\d{6}-\d{6})?$", "", run.name), []).append(run)
    for i, of_arm in enumerate(arms.values()):
        for run in of_arm:
            run.css = f"c{i % 8} d{i // 8 % 3}"
    panels, legend = [], [(f"{arm}, {len(of)} runs" if of[1:] else of[0].name, of[0].css) for arm, of in arms.items()]
    for name in names:
        if name == "thinking":
            found = {f"accuracy, {title}": thinking_lines(runs, sides) for title, sides in APART.items()}
            panels += [(title, (lines, *axis, True)) for title, (lines, _, *axis) in found.items() if lines]
            legend = list(dict.fromkeys(one for _, (_, chips, *_) in found.items() for one in chips))
        elif ":" in name:
            title = " over ".join(part.removesuffix("/*") for part in reversed(name.split(":", 1)))
            panels.append((title, over_metric(runs, *name.split(":", 1))))
        else:
            panels.append((name, (over_number if "*" in name else over_steps)(runs, name)))
    empty = [title for title, (lines, *_) in panels if not lines] or ["thinking"] * (not panels)
    if empty:
        raise ValueError(f"--show: no {empty[0]} in {', '.join(run.name for run in runs)}")
    across, body = min(3, len(panels)), ""
    for i, (title, drawn) in enumerate(panels):
        body += f'<g transform="translate({i % across * WIDE + 4} {i // across * HIGH + HEAD})">'
        body += f'<text class="title" x="{LEFT}" y="-4">{esc(title, 60)}</text>{plot(*drawn)}</g>'
    x, y = 8.0, math.ceil(len(panels) / across) * HIGH + 14
    for text, css in legend:
        width = 36 + 5.5 * len(text)
        x, y = (8.0, y + 16) if x + width > across * WIDE else (x, y)
        body += f'<path class="{css}" d="M{x:.0f},{y - 3}h18"/><text x="{x + 23:.0f}" y="{y}">{esc(text, 60)}</text>'
        x += width
    back = f'<rect fill="var(--bg)" width="{across * WIDE}" height="{y + 8}"/>'
    size = f'width="{max(2, across) * WIDE}" viewBox="0 0 {across * WIDE} {y + 8}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{INSIDE}</style>{back}{body}</svg>\n'


# ---------------------------------------------------------------------------------------------------- explain

WIDTH = 100  # columns of a line in the terminal


def cells(text: str) -> int:
    """Columns that a terminal gives the text.

    >>> cells("a\\u4e2d")
    3
    """
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def fit(value: object, size: int) -> str:
    """Any value as escaped text of exactly `size` columns."""
    text = visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    while cells(text) > size:
        text = text[: size - 3] + "..." if len(text) > size else text[:-4] + "..."
    return text + " " * (size - cells(text))


def fold(label: str, text: str, indent: int = 10) -> list[str]:
    """A labelled text in lines of at most WIDTH columns, cut between characters."""
    lines = [label.ljust(indent)]
    for c in visible(clip(text, 2000)):
        if cells(lines[-1] + c) > WIDTH:
            lines.append(" " * indent)
        lines[-1] += c
    return lines


def prose(label: str, text: str, indent: int = 10) -> list[str]:
    """A labelled sentence of ours in lines of at most WIDTH columns, cut between words."""
    ends = {"initial_indent": label.ljust(indent), "subsequent_indent": " " * indent}
    return textwrap.wrap(visible(text), WIDTH, **ends)


def shown(piece: str) -> str:
    """A piece with quotes where its ends would not be seen."""
    return piece if piece.strip() == piece != "" or "\n" in piece else f"'{piece}'"


def share(part: float, whole: float) -> str:
    return f"{100 * part / (whole or 1):7.2f}"


def rl_weights(script: str, flags: dict, rows: list[dict], first: int) -> tuple[list, list, list[str]]:
    """For each answer of a group: |w A| of one token, up to a factor that the step has in common, or None where it is
    unknown; "no" where no token of it can have been clipped, else "?"; and what the numbers leave out.

    `first` counts the trained answers of the step in front of this group. With one update per rollout, and in the
    first of several, pi is pi_old: the ratio is 1 and nothing is clipped.
    """
    notes, per_token, clipped, place = [], [], [], first
    size = max(1, (number(flags.get("batch_size")) or 0) // (number(flags.get("updates")) or 1))
    by_length = "sequence" in (flags.get("aggregation"), flags.get("normaliser"))
    for row in rows:
        a, length = abs(number(row.get("advantage")) or 0), len(tokens_of(row)) or 1
        per_token.append(None if script == "ppo.py" else a / length if by_length else a)
        clipped.append("no" if place < size and script != "ppo.py" else "?")
        place += in_a_batch(script, row)
    if script == "ppo.py":
        notes.append("the advantage shown is the mean over the answer: samples.jsonl stores none for a token, and no "
                     "value V, so shares of the loss cannot be told")  # fmt: skip
        notes.append("mini-batches are drawn at random, and no ratios are stored: what was clipped is unknown")
    elif "?" in clipped:
        notes.append("?: trained in a later update of the rollout, and no ratios are stored")
    if flags.get("mask_truncated"):
        notes.append("--mask_truncated: answers that were cut off have mask 0 here; samples.jsonl says 1")
    if flags.get("kl_coef"):
        notes.append("the KL term is left out: log-probabilities under the reference are not stored")
    return per_token, clipped, notes


def in_a_batch(script: str, row: dict) -> bool:
    """nsr.py cuts answers with advantage 0 before it makes its mini-batches."""
    return script != "nsr.py" or bool(number(row.get("advantage")))


def check_equation_1(flags: dict, rows: list[dict]) -> str:
    """Whether the stored totals give the stored advantages by eq. 1 of grpo.py."""
    totals = [number(as_dict(row.get("rewards")).get("total")) for row in rows]
    advantages = [number(row.get("advantage")) for row in rows]
    if flags.get("advantage") == "batch" or len(rows) < 2 or None in totals or None in advantages:
        return "eq. 1 cannot be checked: it needs the rewards of the whole step (--advantage batch), or two answers"
    mean = sum(totals) / len(totals)
    std = math.sqrt(sum((r - mean) ** 2 for r in totals) / (len(totals) - 1))
    scale = std + 1e-4 if flags.get("advantage") == "group" else 1.0
    if max(totals) - min(totals) <= 1e-8:
        scale = math.inf
    gap = max(abs((r - mean) / scale - a) for r, a in zip(totals, advantages, strict=True))
    told = f"eq. 1 from the totals above (mean {mean:.3f}, std {std:.3f}) "
    if gap < 2e-4:
        return told + "gives the stored advantages"
    usual = {"overlong_cache": 0, "language_weight": 0, "format_weight": 0.1}  # with these the total is the reward
    more = [f"--{name} {flags[name]}" for name, value in usual.items() if flags.get(name, value) != value]
    return told + f"misses the stored advantages by {gap:.3f}: totals lack {', '.join(more) or 'a part of the reward'}"


def explain_group(script: str, flags: dict, rows: list[dict], chosen: int, first: int) -> tuple[list[str], list[dict]]:
    """The answers of a group as a table, and the tokens of one of them with their columns."""
    per_token, clipped, notes = rl_weights(script, flags, rows, first)
    texts, by_probability = [tokens_of(row) for row in rows], flags.get("objective") == "probability"
    for row, text, w in zip(rows, texts, per_token, strict=True):
        for token in text:
            token["mask"] *= not (flags.get("mask_truncated") and row.get("truncated"))
            p = 0.0 if token["p"] is None else token["p"]
            token["loss %"] = None if w is None else w * token["mask"] * (p if by_probability else 1)
            token["push %"] = None if w is None else token["loss %"] * (1 - p)
    whole = {key: sum(token[key] or 0 for text in texts for token in text) for key in ("loss %", "push %")}
    parts = [k for k, v in as_dict(rows[0].get("rewards")).items() if number(v) is not None and k != "total"][:3]
    lines = ["  sample tokens  end " + "".join(f"{visible(k)[:10]:>11}" for k in [*parts, "total", "advantage"])]
    lines[0] += "  right  loss %  answer"
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        rewards, a = as_dict(row.get("rewards")), number(row.get("advantage"))
        numbers = (number(rewards.get(key)) for key in [*parts, "total"])
        line = f"{'>' if i == chosen else ' '}{i:7}{len(text):7}  {'cut' if row.get('truncated') else '   '} "
        line += "".join(f"{'' if v is None else format(v, '.3f'):>11}" for v in numbers)
        line += f"{'' if a is None else format(a, '+.3f'):>11}  {'yes' if rewards.get('correct') else 'no ':5}"
        sums = sum(token["loss %"] or 0 for token in text)
        line += f"{'      ?' if per_token[i] is None else share(sums, whole['loss %'])}   "
        lines.append(line + fit(rewards.get("answer") or "", max(6, WIDTH - len(line))).rstrip())
    lines += prose("note:", check_equation_1(flags, rows)) if script == "grpo.py" else []
    for i, text in enumerate(texts):
        for token in text:
            token["clipped"] = clipped[i]
            for key in whole:
                token[key] = "      ?" if token[key] is None else share(token[key], whole[key])
    head = "loss %: share of |w A| of all tokens of the group; push %: the same times 1 - p, which is how far a step "
    head += "moves the token's own logit: what was certain is not pushed"
    return lines + prose("note:", head) + [line for text in notes for line in prose("note:", text)], texts[chosen]


def token_lines(tokens: list[dict], columns: dict[str, int], first: int = 0) -> list[str]:
    """A line for each token, the `first` of the trace on: its piece, p, and more columns of these sizes."""
    lines = [f"{'t':>6}  {'token':20}{'p':>7}" + "".join(f"{name:>{size}}" for name, size in columns.items())]
    for t, token in enumerate(tokens, first):
        p = "      ?" if token["p"] is None else f"{token['p']:7.3f}"
        more = "".join(f"{token[name]:>{size}}" for name, size in columns.items())
        lines.append(f"{t:6}  {fit(shown(token['piece']), 20)}{p}{more}")
    return lines


def explain_budget(folder: Path, row: dict, sample: int) -> list[str]:
    """A trace of budget_forcing.py, with what was appended to it as far as the records tell."""
    path, tokens, lines = folder / f"step-{int(row['step']):06d}" / "records.json", tokens_of(row), []
    saved = parse(path.read_bytes(), str(path)) if path.is_file() else {}
    of = saved.get("of") if isinstance(saved.get("of"), list) and len(saved["of"]) == 4 else None
    records = saved.get("records") if isinstance(saved.get("records"), list) else []
    at = [r for r in map(as_dict, records) if (r.get("number"), r.get("sample")) == (row.get("group"), sample)]
    zeros, wait, appended = sum(token["zero"] for token in tokens), "", None
    if of:
        lines += fold("setting", f"{of[0]}, {of[1]} {of[2]}: {json.dumps(of[3])}")
        wait = str(as_dict(of[3]).get("wait", ""))
    if at and number(at[0].get("sampled")) is not None and number(at[0].get("waits")) is not None:
        r = at[0]
        told = f"{r['sampled']} tokens sampled, {r.get('thinking')} of them thinking; {r['waits']} times the end of "
        told += f"thinking was taken away; {'cut off by the budget' if r.get('forced') else 'ended by itself'}"
        lines += prose("record", told)
        appended = len(tokens) - (r["sampled"] - r["waits"])  # each end taken away was one sampled token
    sure = appended is not None and appended == zeros
    for token in tokens:
        token["source"] = ("appended" if sure else "?") if token["zero"] else "sampled"
    lines += ["", *token_lines(tokens, {"source": 12}), ""]
    for is_zero, part in itertools.groupby(enumerate(tokens), lambda item: item[1]["zero"]):
        (start, first), *rest = part
        text = first["piece"] + "".join(token["piece"] for _, token in rest)
        if is_zero and sure:
            lines += fold("", f"{'inserted' if wait and text == wait else 'appended'} at t = {start}: {text}")
    if not sure:
        lines += prose("note:", "samples.jsonl has no mask for appended tokens, only a log-probability of 0, which "
                       "what was sampled with probability 1 has as well: those are marked ?")  # fmt: skip
    return lines


def explain_steps(folder: Path, flags: dict, row: dict) -> list[str]:
    """A trace of specreason.py step by step: who wrote it, and the points of the draft's step."""
    tokens, lines, group = tokens_of(row), [], row.get("group")
    paths, record = sorted(folder.glob("step-*/records.json")), {}
    records = parse(paths[-1].read_bytes(), str(paths[-1])).get("records") if paths else None
    if isinstance(records, list) and type(group) is int and 0 <= group < len(records):
        record = as_dict(as_dict(records[group]).get("specreason"))
    marks = [m for m in record.get("marks") or [] if isinstance(m, list) and len(m) == 2 and number(m[0]) is not None]
    first, threshold = number(flags.get("first_n")) or 0, number(flags.get("threshold"))
    for delimiter in filter(None, (flags.get("delimiter"), "\n", "\n\n")):
        steps, limit = [[]], number(flags.get("max_step_tokens")) or math.inf
        for token in tokens:
            if steps[-1] and (delimiter in steps[-1][-1]["piece"] or len(steps[-1]) >= limit):
                steps.append([])
            steps[-1].append(token)
        if len(steps) == first + len(marks):
            break
    known = bool(marks) and len(steps) == first + len(marks) and threshold is not None
    kept = sum(points >= threshold for points, _ in marks) if known else 0
    known = known and kept == record.get("accepted")
    if known:
        gone = number(record.get("discarded")) or 0
        told = f"{len(steps)}, of which the draft's stand in {kept} (threshold {threshold:g}); "
        lines += prose("steps", f"{told}{gone:g} drafted tokens were thrown away")
    t = 0
    for i, step in enumerate(steps):
        head = f"step {i}"
        if known and i < first:
            head += ": by the base, unasked (--first_n)"
        elif known:
            points, right = marks[i - first]
            head += f": the draft's step got {points:.3g} points and was "
            head += "kept" if points >= threshold else "refused; the base wrote this one"
            if right is not None:  # a solver was asked, by docs/experiments/specreason.py
                head += f" (a solver says: the draft's was {'right' if right else 'wrong'})"
        lines += ["", *prose("", head, 0), *token_lines(step, {}, t)]
        t += len(step)
    lines.append("")
    if not known:
        lines += prose("note:", "who wrote which step cannot be told: the records in step-*/records.json are missing "
                       "or do not fit this trace, and samples.jsonl names no writers")  # fmt: skip
    told = "p is the base's, whoever wrote the token; refused drafts are not stored, only their points"
    return lines + prose("note:", told)


def explain(folder: Path, where: str) -> list[str]:
    """One group or one trace of a run, token by token, as lines of at most WIDTH columns.

    where: "", "STEP", "STEP.GROUP" or "STEP.GROUP.SAMPLE"; without them the last step logged, its first group, and the
    shortest answer that is trained on. Raises ValueError where there is no such step, group or sample.
    """
    run = load_run(folder, folder.resolve().name, 0)
    about = parse((folder / "run.json").read_bytes(), "run.json") if (folder / "run.json").is_file() else {}
    script, flags = str(about.get("script", "")), as_dict(about.get("config"))
    groups: dict[tuple, list] = {}
    for row in run.samples:
        groups.setdefault((row["step"], str(row.get("group"))), []).append(row)

    def pick(given: str, among: list, what: str) -> object:
        names = [f"{name:g}" if type(name) is float else str(name) for name in among]
        if given and given not in names:
            raise ValueError(f"--explain {where}: no {what} {given} in samples.jsonl; there: {clip(', '.join(names))}")
        return among[names.index(given)] if given else None

    if not groups:
        raise ValueError(f"{folder}: no completions in samples.jsonl to explain")
    asked = [*where.split("."), "", ""][:3]
    steps = list(dict.fromkeys(step for step, _ in groups))
    step = pick(asked[0], steps, "step") if asked[0] else steps[-1]
    names = [name for s, name in groups if s == step]
    name = pick(asked[1], names, "group") if asked[1] else names[0]
    rows = groups[step, name]
    signal = [i for i, row in enumerate(rows) if number(row.get("advantage"))] or [0]
    chosen = min(signal, key=lambda i: len(tokens_of(rows[i])))
    chosen = pick(asked[2], list(range(len(rows))), "sample") if asked[2] else chosen
    row, rewards = rows[chosen], as_dict(rows[chosen].get("rewards"))

    title = f"{run.name}: {script or 'unknown script'}, step {step} of {len(steps)} logged, {steps[0]} to {steps[-1]}, "
    title += f"group {name} of {', '.join(names)}, sample {chosen} of {len(rows)}"
    lines = prose("", clip(title, 300), 0) + fold("problem", json.dumps(row.get("problem"), ensure_ascii=False))
    lines += fold("prompt", str(row.get("prompt") or ""))
    if script in ("grpo.py", "ppo.py", "nsr.py"):
        before = sum(in_a_batch(script, row) for other in names[: names.index(name)] for row in groups[step, other])
        table_lines, tokens = explain_group(script, flags, rows, chosen, before)
        sign = number(row.get("advantage")) or 0
        way = "makes every token of it " + ("likelier" if sign > 0 else "less likely") if sign else "does nothing to it"
        way = "differs by token" if script == "ppo.py" else way
        lines += ["", *table_lines, "", f"sample {chosen}: the loss {way}"]
        for token in tokens:
            token["advantage"] = f"{sign:+.3f}"
        columns = {"mask": 6, "advantage": 11}
        columns |= {"clipped": 9, "loss %": 9, "push %": 9} if script != "ppo.py" else {}
        return lines + token_lines(tokens, columns)
    lines += fold("rewards", json.dumps(rewards, ensure_ascii=False))
    if script == "budget_forcing.py":
        return lines + explain_budget(folder, row, chosen)
    if script == "specreason.py":
        return lines + explain_steps(folder, flags, row)
    lines += ["", *token_lines(tokens_of(row), {"mask": 6})]
    return lines + prose("note:", "no advantages: this script is not reinforcement learning")


def paint(line: str) -> str:
    """A line for a terminal that shows colours: headings bold, what was certain dim."""
    if re.match(r" *\d+  .{1,20} +1\.000( |$)", line):
        return f"\x1b[2m{line}\x1b[0m"
    return f"\x1b[1m{line}\x1b[0m" if line[:1] not in ("", " ") and not line.startswith("note") else line


def stop(message: str) -> None:
    print(f"report.py: error: {visible(message)}", file=sys.stderr)
    sys.exit(2)


def print_lines(folder: Path, where: str) -> None:
    """`explain` on the terminal; plain text where it goes into a file or a pipe."""
    sys.stdout.reconfigure(errors="backslashreplace")
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    try:
        for line in explain(folder, where):
            print(paint(line.rstrip()) if colours else line.rstrip())
    except BrokenPipeError:  # the reader has seen enough: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        stop(str(error))


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("report.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder that a script wrote")
    about = "page, or with --show picture, to write (default: report.html in the first RUN)"
    parser.add_argument("--out", default="", metavar="FILE.html|FILE.svg", help=about)
    about = "metrics of a picture, between commas: reward, eval/pass@* (over the number), a/*:b/* (b over a), thinking"
    parser.add_argument("--show", default="", metavar="NAMES", help=about)
    where = "print one group or trace token by token, and write no page (default: the last step)"
    parser.add_argument("--explain", nargs="?", const="", metavar="STEP[.GROUP[.SAMPLE]]", help=where)
    parser.error = stop  # one line, no usage
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    folders = [Path(run) for run in args.runs]
    if args.explain is not None:
        if len(folders) > 1 or args.out or args.show:
            stop("--explain prints one group of one RUN: give one folder, no --out and no --show")
        return print_lines(folders[0], args.explain)
    names = [folder.resolve().name for folder in folders]
    names = [name if names.count(name) == 1 else str(folders[i]) for i, name in enumerate(names)]
    out, ends = Path(args.out or folders[0] / "report.html"), (".svg",) if args.show else (".html", ".htm")
    if out.suffix not in ends:  # so that a slip does not overwrite a run's file
        stop(f"--out {out}: give a file name that ends in {ends[0]}{' with' if args.show else ', or'} --show")
    try:
        runs = [load_run(folder, names[i], i) for i, folder in enumerate(folders)]
        text = picture(runs, args.show.split(",")) if args.show else page(runs)
        out.write_text(text, encoding="utf-8", newline="\n")
    except (ValueError, OSError) as error:
        stop(str(error))
    for note in [f"{run.name}: {note}" for run in runs for note in run.notes]:
        print(f"report.py: note: {visible(note)}", file=sys.stderr)
    print(f"wrote {visible(str(out))} ({out.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
