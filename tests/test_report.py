"""docs/report.py: one self-contained page from run folders that may be large, hostile or damaged."""

import importlib.util
import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

REPORT = Path(__file__).parent.parent / "docs" / "report.py"
spec = importlib.util.spec_from_file_location("report", REPORT)
report = importlib.util.module_from_spec(spec)
sys.modules["report"] = report  # dataclasses looks its module up
spec.loader.exec_module(report)

HOSTILE = "</i></pre></style><script>alert(1)</script><img src=x onerror=\"a('b')\"> &amp; "
HOSTILE += "\x00\x1b[31m\u202e\r\n\ud800"


def fake_sample(step: int, group: int, sample: int, rng: random.Random) -> dict:
    """A countdown completion whose later steps try less and are right more often."""
    correct = rng.random() < 0.15 + step / 100
    tries = ["(4-2)*9 4-2=2,2*9=18 18=18"] if correct else ["4+2+9 4+2=6,6+9=15 15<18", "4*2+9 4*2=8,8+9=17 17<18"]
    text = "\n".join(rng.sample(["9*4-2 9*4=36,36-2=34 34>18", "9+4*2 4*2=8,8+9=17 17<18"], rng.randint(0, 2)) + tries)
    answer = tries[-1].split()[0]
    pieces = [*text, "</think>", "<answer>", *answer, "</answer>"]
    logprobs = [math.log(1 - rng.random() ** 6 * 0.98) for _ in pieces]
    rewards = {"format": 0.1, "answer": answer, "correct": correct, "total": 1.1 if correct else 0.1}
    problem = {"numbers": [4, 2, 9], "target": 18, "number": 2 * step + group}  # each step draws new ones
    row = {"step": step, "group": group, "sample": sample, "problem": problem, "prompt": "4,2,9=18<think>"}
    row |= {"tokens": [ord(p[0]) for p in pieces], "pieces": pieces, "logprobs": logprobs, "mask": [1] * len(pieces)}
    return row | {"rewards": rewards, "advantage": 0.8 if correct else -0.4, "truncated": rng.random() < 0.1}


def fake_metrics(step: int, steps: int, seed: int, rng: random.Random) -> dict:
    x = step / steps

    def noisy(value: float, noise: float) -> float:
        return value + noise * rng.uniform(-1, 1)

    row = {
        "step": step,
        "seconds": 7.5 * step,
        "tokens": 51234 * step,
        "reward": noisy(0.31 + 0.4 * x + seed / 50, 0.05),
    }
    row |= {"reward_std": noisy(0.4, 0.03), "reward/format": 0.1, "accuracy": noisy(0.26 + 0.4 * x, 0.05)}
    row |= {"completion_length": noisy(74 + 90 * x, 6), "completion_length/correct": noisy(64 + 60 * x, 6)}
    row |= {"completion_length/wrong": noisy(84 + 120 * x, 9), "clipped_ratio": max(0, noisy(0.1 * x, 0.05))}
    row |= {"entropy": noisy(0.5 - 0.3 * x, 0.02), "kl": None if step == 1 else 0.002 * step, "clip_frac_low": 0.0}
    row |= {
        "clip_frac_high": abs(noisy(0, 0.004)),
        "grad_norm": noisy(0.4, 0.1) + 3 * (step == 40),
        "lr": 5e-4 * (1 - x),
    }
    row |= {"loss": noisy(0, 0.03), "frac_reward_zero_std": 0.2 + 0.3 * x, "frac_all_right": 0.4 * x}
    row |= {"tokens_per_s": noisy(6800, 300), "seconds_sample": noisy(4, 0.4), "seconds_train": noisy(3, 0.2)}
    if step % 10 == 0 or step == 1:
        row |= {"eval/accuracy": 0.26 + 0.42 * x, "eval/accuracy_se": 0.02, "eval/completion_length": 74 + 90 * x}
        row |= {f"eval/pass@{k}": 1 - (0.74 - 0.4 * x) ** (1 + 0.7 * math.log2(k)) for k in (1, 2, 4, 8, 16, 32, 64)}
    return row


def write_lines(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def fake_run(folder: Path, steps: int = 12, samples: int = 8, seed: int = 0, **config) -> Path:
    """A run folder as the scripts write it; every sixth step logs two groups."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    settings = {
        "model": "tiny",
        "task": "countdown",
        "lr": 5e-4,
        "group_size": 8,
        "kl_coef": 0.0,
        "out": "",
        "seed": seed,
    }
    about = {"script": "grpo.py", "command": f"python grpo.py --seed {seed}", "config": settings | config}
    about |= {"device": "1 cpu", "torch": "2.13.0"}
    (folder / "run.json").write_text(json.dumps(about), encoding="utf-8")
    write_lines(folder / "metrics.jsonl", [fake_metrics(s, steps, seed, rng) for s in range(1, steps + 1)])
    logged = [
        (s, g, i) for s in range(1, steps + 1) if s % 6 == 1 or s == steps for g in range(2) for i in range(samples)
    ]
    write_lines(folder / "samples.jsonl", [fake_sample(*where, rng) for where in logged])
    return folder


def draw(*folders: Path, out: Path | None = None) -> str:
    report.main([*map(str, folders), *(["--out", str(out)] if out else [])])
    return (out or folders[0] / "report.html").read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Collects tags and attribute names; fails on a tag that is closed out of order."""

    VOID = {"meta", "br"}

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.names = [], set(), set()
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}
        self.open += [] if tag in self.VOID else [tag]

    def handle_startendtag(self, tag, attrs):  # inside <svg>
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def cells(page: str) -> list[list[str]]:
    """Text of the cells of every table row."""
    rows = re.findall("<tr>(.*?)</tr>", page)
    return [[re.sub("<[^>]+>", "", cell) for cell in re.findall("<t[hd]>(.*?)</t[hd]>", row)] for row in rows]


def test_page_needs_nothing_but_itself(tmp_path, capsys):
    page = draw(fake_run(tmp_path / "a"))
    outline = Outline(page)
    assert not outline.tags & {"script", "link", "img", "iframe", "a", "object", "base"}
    assert not outline.names & {"src", "href", "srcset", "style"} and not any(n.startswith("on") for n in outline.names)
    assert not re.search(r"url\(|@import|https?:|//[a-z]", page)
    assert len(page.encode()) < 1_000_000 and "prefers-color-scheme:dark" in page and "@media print" in page
    assert capsys.readouterr().out.startswith("wrote ")


def test_panels_show_extremes_last_value_and_steps(tmp_path):
    run = fake_run(tmp_path / "a", steps=3)
    write_lines(run / "metrics.jsonl", [{"step": s, "loss": y} for s, y in ((1, 0.5), (2, -0.25), (9, 0.125))])
    (figure,) = re.findall("<figure>.*?</figure>", draw(run))
    assert "<strong>loss</strong>" in figure and re.search("<span[^>]*>0.125</span>", figure)
    assert re.findall("<text[^>]*>(.*?)</text>", figure) == ["0.500", "-0.250", "9", "step 1"]
    # x = 42 + 226 (s - 1) / 8, y = 92 - 84 (v + 0.25) / 0.75
    assert re.search('points="(.*?)"', figure)[1] == "42.0,8.0 70.2,92.0 268.0,50.0"


def test_evaluations_are_points_with_errors_and_a_single_value_is_seen(tmp_path):
    run = fake_run(tmp_path / "a")
    rows = [{"step": s, "eval/accuracy": s / 10, "eval/accuracy_se": 0.01} for s in (1, 2, 3)] + [
        {"step": 2, "kl": 0.1}
    ]
    write_lines(run / "metrics.jsonl", rows)
    first, second = re.findall("<figure>.*?</figure>", draw(run))
    assert first.count("<circle") == 3 and first.count("<path") == 1 + 3 and "eval/accuracy_se" not in first
    assert re.findall("<text[^>]*>(.*?)</text>", first)[:2] == ["0.310", "0.090"]  # the bars fit in
    assert second.count("<circle") == 1


def test_steps_share_one_axis(tmp_path):
    page = draw(fake_run(tmp_path / "a", steps=10), fake_run(tmp_path / "b", steps=30), out=tmp_path / "x.html")
    curves = page[page.index("<h2>Curves") : page.index("<h2>Settings")]
    ends = {tuple(re.findall("<text[^>]*>([^<]*)</text>", f)[2:]) for f in re.findall("<figure>.*?</figure>", curves)}
    assert ends == {("30", "step 1")}


def test_before_and_after(tmp_path):
    run = fake_run(tmp_path / "a")
    rows = [{"step": 0, "eval/accuracy": 0.25, "eval/accuracy_se": 0.02}, {"step": 5, "reward": 1.0}]
    write_lines(run / "metrics.jsonl", [*rows, {"step": 10, "eval/accuracy": 0.75, "eval/format": None}])
    assert cells(draw(run))[:2] == [
        ["metric", "run", "before", "after", "change", "at steps"],
        ["eval/accuracy", "a", "0.250 &plusmn; 0.020", "0.750", "+0.500", "0 to 10"],
    ]


def test_pass_at_k_first_and_last(tmp_path):
    run = fake_run(tmp_path / "a")
    rows = [{"step": 0, "eval/pass@1": 0.2, "eval/pass@16": 0.5}, {"step": 9, "eval/pass@1": 0.4, "eval/pass@16": 0.6}]
    write_lines(run / "metrics.jsonl", [*rows, {"step": 9, "eval/pass@4": 0.55}])
    page = draw(run)
    assert cells(page)[:3] == [
        ["run", "evaluated at", "k = 1", "k = 4", "k = 16"],
        ["a", "step 0", "0.200", "", "0.500"],
        ["a", "step 9", "0.400", "0.550", "0.600"],
    ]
    write_lines(run / "metrics.jsonl", [{"step": 0, "eval/pass@1": 0.2}])
    assert "<h2>pass@k" not in draw(run)


def test_pass_at_k_of_several_runs_by_method(tmp_path):
    """Runs from one base share its line; a name that is not unique gets its folder; steps may be few."""
    base, after, folders = {1: 0.25, 2: 0.5, 4: 0.75}, {1: 0.5, 2: 0.625, 4: 0.7}, []
    for name, mode, start in (("a", "psr", 0.25), ("b", "nsr", 0.25), ("c", "nsr", 0.3), ("d", None, 0.25)):
        folders.append(fake_run(tmp_path / name, steps=2, **({"mode": mode} if mode else {})))
        about = json.loads((folders[-1] / "run.json").read_text(encoding="utf-8"))
        about["script"] = "nsr.py" if mode else "grpo.py"
        (folders[-1] / "run.json").write_text(json.dumps(about), encoding="utf-8")
        ks = [k for k in base if name != "d" or k < 4]  # fewer samples: a base of its own
        first = {f"eval/pass@{k}": base[k] if k > 1 else start for k in ks}
        rows = [{"step": 16, "optimizer_steps": 43}] if mode else []
        last = {f"eval/pass@{k}": after[k] for k in ks}
        write_lines(folders[-1] / "metrics.jsonl", [*rows, {"step": 16} | last, {"step": 0} | first])
    page = draw(*folders, out=tmp_path / "x.html")
    part = page[page.index("<h2>pass@k") : page.index("<h2>Curves")]
    assert [row[:2] for row in cells(part)] == [
        ["run", "evaluated at"],
        ["base", "step 0"],
        ["nsr psr", "step 16, 43 updates"],
        ["nsr nsr (b)", "step 16, 43 updates"],
        ["base of nsr nsr (c)", "step 0"],
        ["nsr nsr (c)", "step 16, 43 updates"],
        ["base of grpo", "step 0"],
        ["grpo", "step 16"],
    ]
    assert cells(part)[2][2:] == ["0.500", "0.625", "0.700"] and cells(part)[7][2:] == ["0.500", "0.625", ""]
    (figure,) = re.findall("<figure>.*?</figure>", part)
    assert figure.count("<polyline") == 7 and figure.count('<polyline class="base first') == 3
    ticks = [re.search(f'<text x="([0-9.]+)"[^>]*>{k}</text>', figure)[1] for k in (1, 2, 4)]
    assert ticks == ["42.0", "155.0", "268.0"]  # log2 k: 2 lies half way
    Outline(page)


def test_several_runs_are_named_and_their_differences_come_first(tmp_path):
    runs = [fake_run(tmp_path / "a", lr=1e-3), fake_run(tmp_path / "b", lr=1e-4, clip=0.2)]
    page = draw(*runs, out=tmp_path / "both.html")
    assert not (runs[0] / "report.html").exists()
    assert ["lr", "0.001", "0.0001"] in cells(page) and ["clip", "&ndash;", "0.2"] in cells(page)
    assert (
        page.index("<h3>Different")
        < page.index("<td>lr</td>")
        < page.index("<h3>The same")
        < page.index("<dt>task</dt>")
    )
    assert "<dt>torch</dt><dd>2.13.0</dd>" in page and "<dt>device</dt><dd>1 cpu</dd>" in page
    assert not re.search("<t[hd]>task</", page)  # shared settings are in the list, not in the table
    reward = next(f for f in re.findall("<figure>.*?</figure>", page) if "<strong>reward</strong>" in f)
    assert re.findall('<polyline class="(c.) ', reward) == ["c0", "c1"]
    Outline(page)


def test_folders_of_one_name_are_told_apart(tmp_path):
    page = draw(fake_run(tmp_path / "x" / "run"), fake_run(tmp_path / "y" / "run"), out=tmp_path / "o.html")
    assert f"{tmp_path / 'x' / 'run'}"[:50] in page and f"{tmp_path / 'y' / 'run'}"[:50] in page


def test_tokens_are_coloured_and_marked(tmp_path):
    row = fake_sample(1, 0, 0, random.Random(0))
    row |= {"pieces": ["a", " ", "b\n", "<c>"], "tokens": [5, 6, 7, 8, 9], "mask": [1, 1, 1, 0], "truncated": True}
    row |= {"logprobs": [math.log(0.95), math.log(0.6), math.log(0.01), -0.5], "advantage": 0.25}
    text = report.card(row, 9999)
    assert text.endswith(
        '<pre><i class="p0" title="0.95">a</i><i class="p2" title="0.6"> </i>'
        '<i class="p5 e" title="0.01">b\\n</i>\n'
        '<i class="m" title="0.607">&lt;c&gt;</i><i class="">[9]</i></pre></div>'
    )
    for word in ("truncated", "5 tokens", "advantage <b>+0.250</b>", "format <b>0.100</b>", "sample <b>0</b>"):
        assert word in text


def test_long_completions_lose_their_middle():
    text = report.middle_out([f"<i>{i:03d}</i>" for i in range(100)], 100)  # 10 bytes each: 6 before, 4 after
    assert re.findall(r"\d+", text) == ["000", "001", "002", "003", "004", "005", "90", "096", "097", "098", "099"]


def test_first_middle_and_last_step_with_the_group_folded(tmp_path):
    page = draw(fake_run(tmp_path / "a", steps=31, samples=8))  # logged at 1, 7, 13, 19, 25, 31
    assert re.findall("<h3>Step (.*?)</h3>", page) == ["1", "19", "31"]
    assert page.count("<details>") == 6 and page.count('class="card"') == 3 * 2 * 8
    assert "7 more of this group&#x27;s 8" in page or "7 more of this group's 8" in page


def test_everything_hostile_is_escaped(tmp_path):
    kind = fake_run(tmp_path / "kind")
    row = fake_sample(1, 0, 0, random.Random(0)) | {"problem": HOSTILE, "prompt": HOSTILE, "group": HOSTILE}
    row |= {"sample": HOSTILE, "pieces": [HOSTILE] * 3, "rewards": {HOSTILE: HOSTILE, "answer": HOSTILE, "correct": 1}}
    evil = fake_run(tmp_path / "<b onclick=x>&\x1b[0m", **{HOSTILE: HOSTILE})
    about = json.loads((evil / "run.json").read_text()) | {"command": HOSTILE, "device": {HOSTILE: 1}}
    (evil / "run.json").write_text(json.dumps(about | {"parts": {HOSTILE: [HOSTILE]}, HOSTILE: HOSTILE}))
    write_lines(evil / "metrics.jsonl", [{"step": s, HOSTILE: s, f"eval/{HOSTILE}": s} for s in (1, 2)])
    write_lines(evil / "samples.jsonl", [row, row | {"sample": 2, "step": 2}])
    out = tmp_path / "o.html"
    benign, page = Outline(draw(kind, kind, out=out)), draw(evil, kind, out=out)
    outline = Outline(page)
    assert outline.tags <= benign.tags and outline.names <= benign.names
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", page)  # a line feed is the only control character
    assert r"\x1b[31m\u202e\r\n" in page and r"\ud800" in page and "&lt;script&gt;" in page


@pytest.mark.parametrize("rows", [
    [{"step": 1, "rewards": None, "tokens": None, "pieces": "abc", "logprobs": {}, "advantage": "x"}],
    [{"step": 1, "pieces": [None, 5, "x"], "tokens": [1], "logprobs": [None, "a", -1e400, 5.0], "mask": [0]}],
    [{"step": 1.5, "group": [1], "sample": {}, "rewards": {"total": None, "correct": None}, "pieces": []}],
    [{"step": 1, "prompt": None, "problem": None, "rewards": {str(i): i for i in range(99)}, "tokens": []}],
    [],
])  # fmt: skip
def test_odd_samples_are_drawn_or_left_out(tmp_path, rows):
    run = fake_run(tmp_path / "a")
    write_lines(run / "samples.jsonl", rows)
    Outline(draw(run))


def test_values_that_are_no_numbers(tmp_path, capsys):
    run = fake_run(tmp_path / "a")
    odd = (None, float("nan"), float("inf"), "text", True, [1], {}, 10**400, -(10**31))
    write_lines(
        run / "metrics.jsonl", [{"step": i, "loss": v} for i, v in enumerate(odd)] + [{"step": 20, "loss": 0.5}]
    )
    page = draw(run)
    assert page.count("<circle") == 1 and "loss: 2 values not finite" in page
    assert "report.py: note: a: loss: 2 values not finite" in capsys.readouterr().err


def test_a_step_logged_again_after_a_resume_replaces_the_first(tmp_path):
    run = fake_run(tmp_path / "a")
    write_lines(run / "metrics.jsonl", [{"step": s, "loss": y} for s, y in ((1, 1.0), (2, 9.0), (2, 2.0), (3, 3.0))])
    assert report.load_run(run, "a", 0).series["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_page_stays_under_a_megabyte(tmp_path):
    run, rng = fake_run(tmp_path / "a", steps=2), random.Random(1)
    row = fake_sample(1, 0, 0, rng) | {"prompt": "x" * 1_000_000, "problem": ["&"] * 100_000}
    row |= {"pieces": ["\x00<&\u00e4" * 9] * 2000, "tokens": [1] * 2000, "logprobs": [-0.1] * 2000, "mask": [1] * 2000}
    rows = [row | {"step": s, "group": g, "sample": i} for s in (1, 2, 3) for g in range(6) for i in range(3)]
    write_lines(run / "samples.jsonl", [*rows, row | {"step": 3, "group": 0, "sample": 9, "pieces": ["y" * 10**6]}])
    write_lines(run / "metrics.jsonl", [{f"m{i}": rng.random() for i in range(100)} | {"step": s} for s in range(600)])
    page = draw(run)
    assert 500_000 < len(page.encode()) < 1_000_000
    assert "tokens left out" in page and "characters more" in page and "4 of its 6 groups" in page
    assert "20 more metrics" in page
    Outline(page)


def test_twenty_runs_fit_one_page(tmp_path):
    runs = [fake_run(tmp_path / f"run{i}", steps=60, seed=i) for i in range(20)]
    page = draw(*runs, out=tmp_path / "o.html")
    assert len(page.encode()) < 1_000_000 and page.count("<h3>Step 60</h3>") == 20
    assert 'class="c7 d1"' in page and 'class="c0 d2"' in page  # colours come again with other dashes
    Outline(page)


def test_large_groups_are_cut_and_a_full_page_says_so(tmp_path):
    row = {"step": 1, "group": 0, "pieces": ["x"], "rewards": {"total": 0.5}}
    run = fake_run(tmp_path / "run0", steps=1)
    write_lines(run / "samples.jsonl", [row | {"sample": i} for i in range(300)])
    page = draw(run)
    assert page.count('class="card"') == 16 and "15 more of this group's 300" in page
    row["rewards"] = {f"{i}" + "&" * 40: "&" * 100 for i in range(12)}  # much text that is no token
    rows = [row | {"step": step, "group": group} for step in (1, 2, 3) for group in range(4)]
    runs = [fake_run(tmp_path / f"run{i}", steps=1) for i in range(1, 24)]
    for run in runs:
        write_lines(run / "samples.jsonl", rows)
    page = draw(*runs, out=tmp_path / "o.html")
    assert 800_000 < len(page.encode()) < 1_000_000 and "left out: the page is full" in page


def test_cut_off_last_line_is_left_out_with_a_note(tmp_path, capsys):
    run = fake_run(tmp_path / "a", steps=5)
    for name in ("metrics.jsonl", "samples.jsonl"):
        whole = (run / name).read_bytes()
        (run / name).write_bytes(whole[:-40])
        assert "the last one, is cut off" in draw(run) and f"{name}: line" in capsys.readouterr().err
    assert report.load_run(run, "a", 0).series["loss"][-1][0] == 4
    (run / "metrics.jsonl").write_bytes(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "\u00e4'.encode()[:-1]
    )  # inside a character
    assert "line 2, the last one, is cut off" in draw(run)


def test_missing_files_are_noted(tmp_path, capsys):
    run = fake_run(tmp_path / "a")
    (run / "run.json").unlink()
    (run / "samples.jsonl").unlink()
    page = draw(run)
    assert "no run.json" in page and "No completions logged" in page and "<h2>Settings" not in page
    (run / "metrics.jsonl").write_text("")
    assert "no numbers in metrics.jsonl yet" in draw(run)
    assert len(capsys.readouterr().err.splitlines()) == 3


def bad(tmp_path: Path, case: str) -> tuple[list[str], list[str]]:
    """Arguments that must be refused, and what the message must name."""
    run = fake_run(tmp_path / "out" / "a", steps=3)
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    if case == "missing folder":
        return [str(tmp_path / "none")], ["no such folder", "none"]
    if case == "file":
        return [str(metrics)], ["no such folder", "metrics.jsonl"]
    if case == "parent folder":
        return [str(tmp_path / "out")], ["no metrics.jsonl", str(run)]
    if case == "nothing":
        return [], ["RUN"]
    if case == "unknown flag":
        return [str(run), "--o", "x.html"], ["--o"]
    if case == "would overwrite":
        return [str(run), "--out", str(metrics)], [str(metrics), ".html"]
    if case == "no folder for out":
        return [str(run), "--out", str(tmp_path / "no" / "x.html")], ["No such file", "x.html"]
    if case == "bad settings":
        (run / "run.json").write_text("[]")
        return [str(run)], ["run.json", "object"]
    broken = {"broken line": '{"step": 2,', "number": "7", "no step": '{"loss": 1}', "deep": "[" * 10**6, "nul": "\x00"}
    metrics.write_text("\n".join([lines[0], broken[case], lines[2]]) + "\n")
    return [str(run)], ["metrics.jsonl:2"]


CASES = ["missing folder", "file", "parent folder", "nothing", "unknown flag", "would overwrite", "no folder for out"]
CASES += ["bad settings", "broken line", "number", "no step", "deep", "nul"]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_exit_2(tmp_path, capsys, case):
    args, words = bad(tmp_path, case)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        report.main(args)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.count("\n") == 1 and len(err) < 600
    assert err.startswith("report.py: error: ") and all(word in err for word in words)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_as_a_command(tmp_path):
    def command(*args: object) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-I", REPORT, *map(str, args)], capture_output=True, cwd=tmp_path)

    shown = command("--help")
    assert shown.returncode == 0 and b"--out" in shown.stdout and b"compare.html" in shown.stdout
    done = command(fake_run(tmp_path / "a"))
    assert (done.returncode, done.stderr) == (0, b"") and (tmp_path / "a" / "report.html").exists()
    failed = command("nowhere")
    assert failed.returncode == 2 and failed.stderr.startswith(b"report.py: error: no such folder: nowhere (")


def test_thinning_keeps_spikes_and_smoothing_keeps_lines():
    points = [(x, 0.0) for x in range(10_000)]
    points[4321] = (4321, 99.0)
    assert (4321, 99.0) in report.thin(points, 100) and len(report.thin(points, 100)) <= 100
    assert report.thin(points[:50], 100) == points[:50]
    smoothed = report.smooth([(x, 2.0 * x) for x in range(100)])
    assert [y for _, y in smoothed] == pytest.approx([2.0 * x for x, _ in smoothed])
    assert report.smooth([(x, x % 2) for x in range(100)])[50] == (50, 6 / 11)  # six odd x in 45 .. 55


def test_examples_in_docstrings():
    assert REPORT.read_text(encoding="utf-8").count(">>> ") >= 2
    done = subprocess.run([sys.executable, "-m", "doctest", str(REPORT)], capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"")


def test_same_problems_stand_side_by_side(tmp_path):
    """Of a prompt that came back, the first and the last time; of two runs, both; nothing where none came twice."""
    rows = [
        answer(text, 0.5, total, 0.0) | {"step": s} for s, text, total in ((1, "abc", 0), (2, "x", 0), (9, "abd", 1))
    ]
    run = rl_run(tmp_path, "grpo.py", [*rows, answer("q", 0.5, 0, 0.0) | {"step": 5, "problem": "once"}])
    page = draw(run)
    part = page[page.index("<h2>The same problems") : page.index("<h2>Completions")]
    assert re.findall(r"step (\d), (\d of \d) correct", part) == [("1", "0 of 1"), ("9", "1 of 1")]
    assert part.count('class="card"') == 2 and "once" not in part and ">x<" not in part
    faint = re.findall('<span class="s">(.*?)</span>', part)  # what the second answer shares with the first
    assert len(faint) == 1 and re.sub("<[^>]+>", "", faint[0]) == "ab"
    (tmp_path / "b").mkdir()
    other = rl_run(tmp_path / "b", "nsr.py", [answer("abc", 0.5, 1.0, 0.0)])
    page = draw(run, other, out=tmp_path / "x.html")
    assert [w for w, _ in re.findall(r"step (\d), (\d of \d) correct", page)] == ["1", "9", "1"]
    Outline(page)
    assert "<h2>The same problems" not in draw(other)


# --------------------------------------------------------------------------------------------------------- picture


def picture(tmp_path: Path, show: str, *folders: Path) -> str:
    report.main([*map(str, folders), "--out", str(tmp_path / "x.svg"), "--show", show])
    text = (tmp_path / "x.svg").read_text(encoding="utf-8")
    Outline(text)
    assert text.startswith('<svg xmlns="http://www.w3.org/2000/svg"') and "prefers-color-scheme:dark" in text
    assert not re.search(r"url\(|@import|<script|//[a-z](?!ww\.w3)", text) and len(text) < 40_000
    return text


def test_picture_of_metrics(tmp_path):
    """Panels in the order asked for; runs that differ in the seed behind their name share a colour; names are text."""
    names = "a-0", "a-1-261127-093012", "b<i>-0"  # as --out says, and with the time of the default
    runs = [fake_run(tmp_path / name, steps=30, seed=s) for s, name in enumerate(names)]
    text = picture(tmp_path, "reward,eval/pass@*", *runs)
    assert re.findall('class="title"[^>]*>(.*?)<', text) == ["reward", "eval/pass@*"]
    assert text.count('<polyline class="c0') == 4 and text.count('<polyline class="c1') == 2
    assert ">a, 2 runs<" in text and ">b&lt;i&gt;-0<" in text
    ticks = re.findall('<text x="[0-9.]+" y="105" text-anchor="middle">(\\d+)<', text)
    assert ticks == ["1", "2", "4", "8", "16", "32", "64"]
    assert "first" in re.sub(
        "<style>.*</style>", "", picture(tmp_path, "eval/pass@*", runs[0])
    )  # dashed, of one run alone


def test_picture_of_one_metric_over_another(tmp_path):
    run = fake_run(tmp_path / "a")
    row = {"step": 9, "gain/x": 0.5, "gain_se/x": 0.1, "cost/x": 2.0, "gain/y z": 0.25, "cost/y z": 4.0, "gain/w": 1.0}
    write_lines(run / "metrics.jsonl", [row])
    text = picture(tmp_path, "cost/*:gain/*", run)
    assert ">gain over cost<" in text and text.count("<circle") == 2 and ">x<" in text and ">y z<" in text
    assert ">w<" not in text  # it has no cost
    places = [float(y) for y in re.findall(r'<text x="\d+" y="(\d+)">[xy]', text)]
    assert len(places) == 2


def test_names_of_points_do_not_overlap():
    near = [(0.5, 0.5, f"way {i}") for i in range(8)]
    text = report.plot([("c0", [(0.0, 0.0), (1.0, 1.0)], {})], (0, 1), ("", ""), True, 240, (), near)
    tops = sorted(int(y) for y in re.findall(r'y="(\d+)">way', text))
    assert len(tops) == 8 and min(b - a for a, b in zip(tops, tops[1:], strict=False)) > 8


def test_pictures_that_cannot_be_drawn(tmp_path, capsys):
    run, svg = str(fake_run(tmp_path / "a")), str(tmp_path / "x.svg")
    bad = {("--out", svg, "--show", "nothing"): "no nothing in a", ("--out", svg): ".html, or --show"}
    bad |= {("--show", "loss"): ".svg with --show", ("--out", svg, "--show", "thinking"): "no thinking in a"}
    for args, words in bad.items():
        with pytest.raises(SystemExit) as stopped:
            report.main([run, *args])
        assert stopped.value.code == 2 and words in capsys.readouterr().err and not Path(svg).exists()


# ---------------------------------------------------------------------------------------------------- --explain


def explained(run: Path, where: str = "") -> list[str]:
    return report.explain(run, where)


def rl_run(tmp_path: Path, script: str, rows: list[dict], **config) -> Path:
    """A run with these samples, written as the scripts do it: without a number for the answers of a group."""
    run = fake_run(tmp_path / script.removesuffix(".py"), steps=1)
    config = {"batch_size": 4, "updates": 1, "advantage": "group", "aggregation": "sequence"} | config
    (run / "run.json").write_text(json.dumps({"script": script, "config": config}), encoding="utf-8")
    write_lines(run / "samples.jsonl", rows)
    return run


def answer(pieces: str, p: float, total: float, advantage: float, group: int = 0, **more) -> dict:
    row = {"step": 1, "group": group, "problem": {"target": 8}, "prompt": "4,4=8<think>", "pieces": list(pieces)}
    row |= {"tokens": [1] * len(pieces), "mask": [1] * len(pieces), "logprobs": [round(math.log(p), 4)] * len(pieces)}
    rewards = {"format": 1.0, "answer": pieces, "correct": total > 0.5, "total": total}
    return row | {"rewards": rewards, "advantage": advantage, "truncated": False} | more


def test_every_answer_of_a_group_is_kept_and_numbered(tmp_path):
    """The scripts write no number for an answer: none may replace another."""
    rows = [answer("ab", 0.5, 1.0, 0.7071), answer("abcd", 0.25, 0.0, -0.7071)]
    run = rl_run(tmp_path, "grpo.py", rows)
    assert [row["sample"] for row in report.load_run(run, "a", 0).samples] == [0, 1]
    assert draw(run).count('class="card"') == 2


@pytest.mark.parametrize("aggregation, shares", [("sequence", (50, 50)), ("token", (100 / 3, 200 / 3))])
def test_shares_of_the_loss_by_hand(tmp_path, aggregation, shares):
    """Two answers of 2 and 4 tokens, advantages +-0.7071: w is 1/n by answer, or the same for all tokens. A token of
    probability p is pushed by 1 - p: 0.5 and 0.75.
    """
    rows = [answer("ab", 0.5, 1.0, 0.7070), answer("abcd", 0.25, 0.0, -0.7070)]
    lines = explained(rl_run(tmp_path, "grpo.py", rows, aggregation=aggregation), "1.0.0")
    group = [line.split() for line in lines if re.match(r"[> ] {6}[01] ", line)]
    assert [float(line[-2]) for line in group] == pytest.approx(shares, abs=0.01) and lines[5].startswith(">")
    token = lines[-1].split()
    push = 0.5 * shares[0] / (0.5 * shares[0] + 0.75 * shares[1])
    assert token[:6] == ["1", "b", "0.500", "1", "+0.707", "no"]
    assert [float(x) for x in token[6:]] == pytest.approx([shares[0] / 2, 50 * push], abs=0.01)
    assert "gives the stored advantages" in " ".join(lines)


def test_what_samples_do_not_say_is_said(tmp_path):
    rows = [answer("ab", 0.5, 1.0, 0.9), answer("abcd", 0.25, 0.0, -0.9), answer("ef", 0.5, 0.0, 0.0, group=1)]
    told = " ".join(
        " ".join(explained(rl_run(tmp_path, "grpo.py", rows, overlong_cache=64, kl_coef=0.1), "1.0")).split()
    )
    assert "misses the stored advantages by 0.193: totals lack --overlong_cache 64" in told
    assert "the KL term is left out" in told
    told = explained(rl_run(tmp_path / "plain", "grpo.py", rows, format_weight=0.0), "1.0")
    assert "totals lack --format_weight 0.0" in " ".join(" ".join(told).split())
    told = " ".join(explained(rl_run(tmp_path, "ppo.py", rows), "1.0"))
    assert "stores none for a token" in told and "clipped is unknown" in " ".join(told.split()) and "   ?" in told
    late = rl_run(
        tmp_path, "nsr.py", rows, updates=4, batch_size=4
    )  # a mini-batch of one: the second is in a later one
    assert explained(late, "1.0.0")[-1].split()[5] == "no" and explained(late, "1.0.1")[-1].split()[5] == "?"
    cut = [row | {"truncated": True} for row in rows]
    (tmp_path / "x").mkdir()
    lines = explained(rl_run(tmp_path / "x", "grpo.py", cut, mask_truncated=True), "1.0.0")
    assert (
        lines[-1].split()[3] == "0" and lines[-1].split()[-2:] == ["0.00", "0.00"] and any("mask 0" in x for x in lines)
    )


def test_group_sample_and_step_are_chosen(tmp_path):
    rows = [answer("ab", 0.5, 1.0, 0.0), answer("abcd", 0.5, 1.0, -0.5), answer("xyz", 0.5, 1.0, 0.5, group=7)]
    run = rl_run(tmp_path, "grpo.py", [*rows, rows[0] | {"step": 3, "pieces": ["Q", "R"]}])
    assert "step 3 of 2 logged" in explained(run)[0] and explained(run)[-1].split()[1] == "R"
    assert "sample 1 of 2" in explained(run, "1")[0] and explained(run, "1.7")[-1].split()[1] == "z"
    for where, words in (("2", "no step 2"), ("1.8", "no group 8"), ("1.0.9", "no sample 9"), ("x", "no step x")):
        with pytest.raises(ValueError, match=words):
            explained(run, where)


@pytest.mark.parametrize("script", ["grpo.py", "ppo.py", "nsr.py", "budget_forcing.py", "specreason.py", "coconut.py"])
def test_explained_lines_fit_and_are_escaped(tmp_path, script):
    row = answer("ab", 0.5, 1.0, 0.5, problem=HOSTILE * 9, prompt=HOSTILE * 9) | {
        "pieces": [HOSTILE, "\u4e2d" * 99, " "]
    }
    row["rewards"] |= {"answer": HOSTILE, HOSTILE: 1.5, "b": 2.5, "c": 3.5}
    run = rl_run(tmp_path, script, [row, row | {"pieces": "abc", "logprobs": [None, "x", -(10**400)], "mask": None}])
    for lines in (explained(run), explained(run, "1.0.1")):
        assert max(map(report.cells, lines)) <= 100
        assert not re.search("[\x00-\x1f\x7f\u202e]", "".join(lines))
    (run / "run.json").unlink()
    assert "unknown script" in explained(run)[0]


def test_appended_tokens_of_a_budget(tmp_path):
    """Sampled 4 tokens, of which one was the end of thinking, taken away for the Wait: 3 sampled stay, 3 appended."""
    row = answer("12345", 0.5, 0.0, 0.0) | {"pieces": ["1", "wait", "2", "</think>", "<answer>", "3"]}
    row |= {"tokens": [1] * 6, "logprobs": [-0.7, 0.0, -0.7, 0.0, 0.0, -0.0], "mask": [1] * 6}
    run = rl_run(tmp_path, "budget_forcing.py", [row])
    told = "\n".join(explained(run))
    assert told.count("  ?") == 3 and "has no mask for appended tokens" in told
    record = {"number": 0, "sample": 0, "waits": 1, "sampled": 4, "thinking": 3, "forced": True}
    (run / "step-000001").mkdir()
    saved = {"of": ["tiny", "wait", 1, {"wait": "wait", "n_wait": 1}], "records": [record]}
    (run / "step-000001" / "records.json").write_text(json.dumps(saved), encoding="utf-8")
    told = "\n".join(explained(run))
    assert "inserted at t = 1: wait" in told and "appended at t = 3: </think><answer>" in told and "  ?" not in told
    assert told.count("    sampled") == 3 and "tiny, wait 1" in told


def test_kept_and_refused_steps(tmp_path):
    row = answer("ab\ncd\nef", 0.5, 1.0, 0.0)
    run = rl_run(tmp_path, "specreason.py", [row], threshold=5, first_n=1, delimiter="", max_step_tokens=48)
    assert "cannot be told" in "\n".join(explained(run))
    (run / "step-000001").mkdir()
    found = {"marks": [[7.0, True], [2.0, None]], "accepted": 1.0, "discarded": 9.0}
    (run / "step-000001" / "records.json").write_text(
        json.dumps({"records": [{"specreason": found}]}), encoding="utf-8"
    )
    steps = [line for line in explained(run) if line.startswith("step ")]
    assert "by the base, unasked" in steps[0] and "7 points and was kept" in steps[1] and "2 points" in steps[2]
    assert "refused" in steps[2] and "9 drafted tokens" in "\n".join(explained(run))
    assert "a solver says: the draft's was right" in steps[1] and "a solver" not in steps[2]


def test_explain_as_a_command(tmp_path, monkeypatch, capsys):
    """Plain in a pipe, bold heads on a terminal, one line for what cannot be; no page is written."""
    run = rl_run(tmp_path, "grpo.py", [answer("ab", 0.9999, 1.0, 0.5)])
    report.main([str(run), "--explain", "1"])
    plain = capsys.readouterr().out
    assert "\x1b" not in plain and plain.startswith("grpo: grpo.py, step 1") and not (run / "report.html").exists()
    monkeypatch.setattr(report.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    report.main([str(run), "--explain"])
    coloured = capsys.readouterr().out
    assert "\x1b[1mgrpo: grpo.py" in coloured and "\x1b[2m" in coloured
    assert re.sub(r"\x1b\[\dm", "", coloured) == plain
    for args, words in (
        ([str(run), "--explain", "9"], "no step 9"),
        ([str(run), str(run), "--explain", "1"], "one RUN"),
    ):
        with pytest.raises(SystemExit) as stopped:
            report.main(args)
        assert stopped.value.code == 2 and words in capsys.readouterr().err
    (run / "samples.jsonl").unlink()
    with pytest.raises(ValueError, match="no completions"):
        explained(run)
