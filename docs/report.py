"""Look at runs: a page or a picture (pip install matplotlib), or a group of answers as text.

    python docs/report.py out/mean out/median          the page out/mean/report.html, or --html FILE
    python docs/report.py out/grpo-0 --explain 16.1    step 16, its group 1, token by token
    python docs/report.py long=out/a,out/b short=out/c --out sft.svg --show loss,eval/accuracy

An arm is a folder (out/a-0 and out/a-1: two seeds of the arm out/a), or name=FOLDER,FOLDER. Panels
of --show: metrics over steps, eval/pass@* over the number at *, X:Y with a * in both, Y over X.
"""

import argparse
import html
import io
import json
import math
import re
import signal
import sys
from collections import namedtuple
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # rewards.py is one folder up
from rewards import BadInput, read_json, read_jsonl, reading  # noqa: E402

NOTE = "one run: bars of one standard error; several: mean, band or bars from lowest to highest"
UNITS = {
    "nats": "entropy|(approx_)?kl|sampler_gap.*",
    "tokens": "(completion_length|(thinking_|generated_)?tokens|sampled)(/.*)?",
    "share": "((last_)?accuracy|pass@|(clip_)?frac|gave_up|acceptance).*|.*(_ratio|_share)",
}
STYLE = """body { max-width: 80em; margin: auto } svg { max-width: 100% } .c2 { color: gray }
pre { white-space: pre-wrap; overflow-wrap: anywhere } .c31 { color: red } .c32 { color: green }"""

Run = namedtuple("Run", "folder settings series samples")  # series: metric -> {step: value}


def visible(value: object) -> str:
    """Text with escapes for control and direction characters; other values as JSON."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # NaN is not


def check_row(row: dict) -> dict:
    if not is_number(row.get("step")):
        raise ValueError("no step")
    return row


def read_run(folder: Path) -> Run:
    """BadInput where it is no run, or a line of a log is broken or half written."""
    about = read_json(folder / "run.json")
    with reading(folder / "run.json"):
        settings = dict(about.pop("config")) | about
    series, samples = {}, []
    for row in read_jsonl(str(folder / "metrics.jsonl"), check_row):
        for name, value in row.items():
            if is_number(value) and name != "step":
                series.setdefault(name, {})[row["step"]] = value
    if (folder / "samples.jsonl").is_file():
        samples = read_jsonl(str(folder / "samples.jsonl"), check_row)
    return Run(folder, settings, series, samples)


def names_of(arms: dict) -> list[str]:
    names = dict.fromkeys(name for runs in arms.values() for run in runs for name in run.series)
    return [name for name in names if not re.search("_se(/|$)", name)]  # bars, no metrics


def curve(runs: list[Run], name: str) -> list[tuple]:
    """(step, mean, low, high) of a metric at the steps that all runs logged."""
    series = [run.series.get(name, {}) for run in runs]
    metric, _, way = name.rpartition("/")  # eval/accuracy_se/base
    errors = runs[0].series.get(name + "_se") or runs[0].series.get(f"{metric}_se/{way}", {})
    points = []
    for step in sorted(set(series[0]).intersection(*series)):
        values = [of_run[step] for of_run in series]
        error = errors.get(step, 0) if len(runs) == 1 else 0
        points.append((step, sum(values) / len(values), min(values) - error, max(values) + error))
    return points


def lines_of(arms: dict, panel: str) -> list[tuple]:
    """(label, colour, points) of each line of a panel. Two points make no curve."""
    across, colon, up = panel.rpartition(":")
    known = re.compile(re.escape(up).replace(r"\*", "(.+)" if colon else r"(\d{1,7})"))
    ways = [match[1] for match in map(known.fullmatch, names_of(arms)) if match and "*" in up]
    lines = []
    for i, (arm, runs) in enumerate(arms.items()):
        curves = {way: curve(runs, up.replace("*", way)) for way in ways}
        if "*" not in up:
            lines.append((arm, f"C{i}", curve(runs, up)))
        elif not colon:  # at the last evaluation
            points = sorted((int(way), *found[-1][1:]) for way, found in curves.items() if found)
            lines.append((arm, f"C{i}", points))
        for way, found in curves.items() if colon else ():
            xs = {step: mean for step, mean, *_ in curve(runs, across.replace("*", way))}
            points = sorted((xs[step], *values) for step, *values in found if step in xs)
            lines.append((f"{visible(way)}, {arm}", f"C{len(lines)}", points))
    return [line for line in lines if len(line[2]) > 2 or colon and line[2]]


def panels_of(arms: dict, show: str) -> dict[str, list[tuple]]:
    """The lines of the panels in `show`, or of all metrics that change (but for a/model/side)."""
    names = [re.sub(r"@\d+$", "@*", name) for name in names_of(arms) if name.count("/") < 2]
    panels = {}
    for name in show.split(",") if show else names:
        lines = lines_of(arms, name)
        if len({y for *_, points in lines for _, y, *_ in points}) > 1 or lines and ":" in name:
            panels[name] = lines
        elif show:
            raise BadInput(f"--show {name}: a curve needs three points, and not all equal")
    return panels


def draw_panel(ax, panel: str, lines: list[tuple]) -> None:
    across, colon, up = panel.rpartition(":")
    is_measured = "*" in panel or up.startswith("eval/")  # now and then: points with bars
    for label, colour, points in lines:
        x, mean, low, high = zip(*points, strict=True)
        ax.plot(x, mean, "o-" if is_measured else "-", markersize=3, color=colour, label=label)
        if is_measured:
            ax.vlines(x, low, high, colors=colour)
        elif low != high:
            ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    if "*" in panel and 0 < 4 * ax.dataLim.x0 < ax.dataLim.x1:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
    if colon:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=6)
    elif "*" in up:
        across = "k (samples)" if "pass@" in up else "r (iterations)"
    for name, set_label in (across or "step", ax.set_xlabel), (up, ax.set_ylabel):
        units = [u for u in UNITS if re.fullmatch(UNITS[u], name.removeprefix("eval/"))]
        set_label(visible(name[:40]) + "".join(f" ({unit})" for unit in units))


def draw(arms: dict, panels: dict[str, list[tuple]], file: object) -> None:
    """All panels as one picture in a file, an SVG where its name does not say otherwise."""
    with reading("pictures need matplotlib (pip install matplotlib)", ImportError):
        from matplotlib import figure, lines, rcParams
    rcParams.update({"svg.fonttype": "none", "savefig.format": "svg", "text.parse_math": False})
    columns, rows = min(len(panels), 3), math.ceil(len(panels) / 3)
    picture = figure.Figure((max(4 * columns, 7), 3 * rows + 1), layout="constrained")  # inches
    for i, panel in enumerate(panels, 1):
        draw_panel(picture.add_subplot(rows, columns, i), panel, panels[panel])
    names = [f"{arm} ({len(runs)} seeds)" if runs[1:] else arm for arm, runs in arms.items()]
    marks = [lines.Line2D([], [], color=f"C{i}", label=name) for i, name in enumerate(names)]
    if any(":" not in panel for panel in panels):
        picture.legend(handles=marks, loc="outside upper center", ncols=4)
    picture.supxlabel(NOTE, fontsize=8)
    with reading(file):
        picture.savefig(file, metadata={"Date": None})


@reading("samples.jsonl")
def explain(run: Run, where: str, colour: bool) -> str:
    """The answers of a group: STEP.GROUP, or STEP for its first one."""
    step, _, group = where.partition(".")
    rows = [row for row in run.samples if str(row["step"]) == step]
    rows = [row for row in rows if str(row.get("group")) == (group or str(rows[0].get("group")))]
    if not rows:
        steps = sorted({row["step"] for row in run.samples})
        raise BadInput(f"--explain {where}: no such group in the steps {steps}"[:200])
    text = f"{visible(rows[0]['problem'])}\n{visible(rows[0]['prompt'])}\n"
    text += "{p} after unlikely tokens; in colour, green is made likelier, red less likely"
    for row in rows:
        facts = {"advantage": row["advantage"], "cut off": row["truncated"]} | row["rewards"]
        text += "\n\n" + ", ".join(f"{visible(key)} {visible(facts[key])}" for key in facts) + "\n"
        for piece, logprob, mask in zip(row["pieces"], row["logprobs"], row["mask"], strict=True):
            p = math.exp(min(logprob, 0))
            token = visible(piece) + (f"{{{p:.0%}}}" if p < 0.5 else "")
            code = 32 if row["advantage"] > 0 else 31
            if p > 0.9 or not mask or not row["advantage"]:
                code = 2  # faint: hardly moved
            text += f"\x1b[{code}m{token}\x1b[0m|" if colour else f"{token}|"
            text += "\n" * piece.count("\n")
    return text


def tables(arms: dict) -> str:
    """Settings, one value where all runs have the same; evaluations before and after."""
    runs = [run for runs in arms.values() for run in runs]
    text = ""
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        values = [visible(run.settings.get(name)) for run in runs]
        text += f"{visible(name):24} {' | '.join(values if len(set(values)) > 1 else values[:1])}\n"
    for name in [name for name in names_of(arms) if name.startswith("eval/")]:
        for arm, points in [(arm, curve(runs, name)) for arm, runs in arms.items()]:
            values = [f"{y:.3f} ({a:.3f}, {b:.3f})" for _, y, a, b in points[:1] + points[1:][-1:]]
            text += f"\n{visible(name):32} {arm:20} {' -> '.join(values)}"
    return text


def page(arms: dict, show: str) -> str:
    """One HTML file: curves, tables, answers of three steps of each arm's first run."""
    picture = io.StringIO()
    draw(arms, panels_of(arms, show), picture)
    text = f"<!doctype html><meta charset=utf-8><title>runs</title><style>{STYLE}</style>\n"
    text += "<svg" + picture.getvalue().partition("<svg")[2]
    text += f"<h2>Settings, before and after</h2><pre>{html.escape(tables(arms))}</pre>"
    for arm, runs in arms.items():
        steps = sorted({row["step"] for row in runs[0].samples})
        for step in sorted({*steps[:1], *steps[len(steps) // 2 :][:1], *steps[-1:]}):
            group = html.escape(explain(runs[0], str(step), colour=True))
            group = re.sub(r"\x1b\[(\d+)m(.*?)\x1b\[0m", r'<span class="c\1">\2</span>', group)
            text += f"<h2>{html.escape(arm)}, step {step}</h2><pre>{group}</pre>\n"
    return text


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("report.py", argparse.SUPPRESS, __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", metavar="ARM")
    parser.add_argument("--show", default="", metavar="PANEL,PANEL")
    kinds = parser.add_mutually_exclusive_group()
    for flag, value in ("--html", "FILE"), ("--out", "FILE.svg"), ("--explain", "STEP.GROUP"):
        kinds.add_argument(flag, default="", metavar=value)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    arms: dict[str, list[Run]] = {}
    try:
        for word in args.runs:
            name, equals, folders = word.partition("=")
            name = name if equals else re.sub(r"-\d{1,2}/?$", "", word)
            runs = [read_run(Path(folder)) for folder in (folders or word).split(",")]
            arms.setdefault(visible(name), []).extend(runs)
        if args.explain:
            for runs in arms.values():
                print(explain(runs[0], args.explain, sys.stdout.isatty()))
        elif args.out:
            draw(arms, panels_of(arms, args.show), args.out)
        else:
            file = Path(args.html or next(iter(arms.values()))[0].folder / "report.html")
            with reading(file):
                file.write_text(page(arms, args.show), encoding="utf-8")
    except BadInput as error:
        print(f"report.py: error: {visible(str(error))}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head ends it quietly
    main()
