"""docs/report.py: pages, pictures and groups of answers from run folders, also from bad ones."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

REPORT = Path(__file__).resolve().parent.parent / "docs" / "report.py"
sys.path.insert(0, str(REPORT.parent))
import report  # noqa: E402

HOSTILE = "$x^$</span></pre></style><script>alert(1)</script><img src=x onerror=\"a('b')\">&amp;"
HOSTILE += "\x00\x1b[31m\u202e\r\ud800"


@pytest.fixture
def drawing():
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install matplotlib")


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def answer(pieces: list[str], p: float, advantage: float, group: int = 0, **more) -> dict:
    row = {"step": 1, "group": group, "problem": {"target": 8}, "prompt": "4,4=8", "pieces": pieces}
    row |= {"mask": [1] * len(pieces), "logprobs": [math.log(p)] * len(pieces), "truncated": False}
    return row | {"rewards": {"total": 1.0}, "advantage": advantage} | more


def make_run(folder: Path, rewards: tuple = (0.1, 0.3, 0.2), **settings) -> Path:
    """A run as the scripts write it: a reward for each step, an evaluation before and after."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"config": {"seed": 0} | settings}))
    rows = [{"step": i, "reward": reward, "kl": 0.0} for i, reward in enumerate(rewards, 1)]
    after = {"eval/accuracy": 0.75, "eval/accuracy_se": 0.0625}
    after |= {"eval/pass@1": 0.5, "eval/pass@2": 0.625, "eval/pass@4": 0.75}
    rows += [{"step": len(rewards)} | after, {"step": 0, "eval/accuracy": 0.25, "eval/pass@1": 0}]
    write_lines(folder / "metrics.jsonl", rows)
    samples = [answer(["a\n", "b"], 0.25, 0.5), answer(["c", "d"], 0.95, -0.5)]
    write_lines(folder / "samples.jsonl", samples + [answer(["e"], 0.6, -0.5, group=1)])
    return folder


def refusal(capsys, *args) -> str:
    """The one line on stderr, with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        report.main([*map(str, args)])
    done = capsys.readouterr()
    assert stopped.value.code == 2 and done.out == "" and done.err.count("\n") == 1
    return done.err


def test_seeds_are_a_mean_between_the_lowest_and_the_highest(tmp_path):
    rewards = (1.0, 4.0, 9.0), (3.0, 2.0)  # the second was stopped after two steps
    runs = [report.read_run(make_run(tmp_path / str(i), r)) for i, r in enumerate(rewards)]
    assert report.curve(runs, "reward") == [(1, 2.0, 1.0, 3.0), (2, 3.0, 2.0, 4.0)]


def test_one_run_has_its_standard_error(tmp_path):
    run = report.read_run(make_run(tmp_path / "a"))
    points = [report.curve([run], name)[-1] for name in ("reward", "eval/accuracy")]
    assert points == [(3, 0.2, 0.2, 0.2), (3, 0.75, 0.6875, 0.8125)]
    run.series.update({"eval/gap/x": {1: 2.0}, "eval/gap_se/x": {1: 0.5}})
    assert report.curve([run], "eval/gap/x") == [(1, 2.0, 1.5, 2.5)]


def test_a_page_draws_what_changes(tmp_path):
    """Not the constant kl, and no curve of two evaluations; an arm has one colour everywhere."""
    run = report.read_run(make_run(tmp_path / "a"))
    panels = report.panels_of({"a": [run], "b": [run, run]}, "")
    assert list(panels) == ["reward", "eval/pass@*"]
    for lines in panels.values():
        assert [line[:2] for line in lines] == [("a", "C0"), ("b", "C1")]
    assert [point[:2] for point in lines[0][2]] == [(1, 0.5), (2, 0.625), (4, 0.75)]


def test_one_metric_over_another(tmp_path):
    run = report.read_run(make_run(tmp_path / "a"))
    run.series.update({"cost/x/q": {5: 2.0}, "gain/x/q": {5: 0.5}, "gain/x/q_se": {5: 0.25}})
    run.series.update({"cost/z/q": {5: 4.0}, "gain/z/q": {5: 0.5}, "gain/y/q": {5: 1.0}})
    lines = report.panels_of({"a": [run]}, "cost/*/q:gain/*/q")["cost/*/q:gain/*/q"]
    assert [(label, points) for label, _, points in lines] == [
        ("x, a", [(2.0, 0.5, 0.25, 0.75)]),
        ("z, a", [(4.0, 0.5, 0.5, 0.5)]),  # y has no cost
    ]


def test_numbers_that_cannot_be_drawn_are_left_out(tmp_path):
    run = make_run(tmp_path / "a")
    odd = None, math.nan, -math.inf, "text", True, [1], 10**400, 0.5
    write_lines(run / "metrics.jsonl", [{"step": i, "loss": value} for i, value in enumerate(odd)])
    assert report.read_run(run).series["loss"] == {7: 0.5}


def test_a_picture_names_arms_axes_and_units(drawing, tmp_path):
    a, b = (make_run(tmp_path / f"a-{i}", (i, 3.0, 2.0)) for i in (0, 1))
    out = str(tmp_path / "x.svg")
    for arms, name in ([f"long={a},{b}"], "long"), ([str(a), str(b)], str(tmp_path / "a")):
        report.main([*arms, f"short={b}", "--out", out, "--show", "reward,eval/pass@*"])
        words = {text.strip() for text in ElementTree.parse(out).getroot().itertext()}
        assert "fill-opacity" in Path(out).read_text(encoding="utf-8")  # the band
        assert {f"{name} (2 seeds)", "short", "step", "eval/pass@* (share)", "k (samples)"} <= words


def test_a_picture_of_nothing_is_refused(drawing, tmp_path, capsys):
    run = make_run(tmp_path / "a")
    for name in ("kl", "eval/accuracy", "nothing", "no/*:reward/*", "x@*"):
        assert name in refusal(capsys, run, "--out", tmp_path / "x.svg", "--show", name)
    assert "x.xyz" in refusal(capsys, run, "--out", tmp_path / "x.xyz", "--show", "reward")
    assert list(tmp_path.iterdir()) == [run]


def test_a_page_is_self_contained_and_complete(drawing, tmp_path):
    runs = make_run(tmp_path / "a", lr=0.001), make_run(tmp_path / "b", lr=0.002)
    report.main([*map(str, runs)])
    page = (runs[0] / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 1 and "accuracy_se" not in page
    assert not re.search(r"<(script|link|img|image|iframe)\b|\bsrc=|url\((?!#)", page)
    assert re.search(r"^lr +0.001 \| 0.002$", page, re.MULTILINE)
    assert re.search(r"seed +0$", page, re.MULTILINE)  # once, where all have the same
    assert re.search(r"^eval/accuracy .*0\.250 .*0\.750", page, re.MULTILINE)
    assert '<span class="c32">a\\n{25%}</span>|\n' in page and '<span class="c2">c</span>' in page


def test_hostile_text_stays_text(drawing, tmp_path):
    """Names of metrics, settings and arms, pieces, prompts and rewards add no tag."""
    kind, evil = make_run(tmp_path / "kind"), make_run(tmp_path / "evil")
    (evil / "run.json").write_text(json.dumps({"config": {HOSTILE: HOSTILE}, HOSTILE: [HOSTILE]}))
    metric = HOSTILE.replace("/", "")
    write_lines(evil / "metrics.jsonl", [{"step": i, metric: i} for i in (1, 2, 3)])
    more = {"problem": HOSTILE, "prompt": HOSTILE, "rewards": {HOSTILE: HOSTILE}}
    write_lines(evil / "samples.jsonl", [answer([HOSTILE] * 2, 0.6, 0.5, **more)])
    tags = []
    for folder, arm in (kind, "kind"), (evil, HOSTILE.replace("=", "")):
        report.main([f"{arm}={folder}", "--html", str(tmp_path / "x.html")])
        page = (tmp_path / "x.html").read_text(encoding="utf-8")
        tags.append(set(re.findall(r"<(\w+)", page)))
    assert tags[1] <= tags[0] and "&lt;script&gt;" in page
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", page)


def test_a_group_token_by_token(tmp_path, capsys, monkeypatch):
    """In colour on a terminal and nowhere else: red, green, and faint what was certain."""

    def is_terminal():
        return True

    run = str(make_run(tmp_path / "a"))
    report.main([run, "--explain", "1"])
    plain = capsys.readouterr().out
    assert "a\\n{25%}|\nb{25%}|\n" in plain and "c|d|" in plain and "e|" not in plain
    assert "advantage 0.5" in plain and "advantage -0.5" in plain and "\x1b" not in plain
    monkeypatch.setattr(sys.stdout, "isatty", is_terminal, raising=False)
    report.main([run, "--explain", "1"])
    coloured = capsys.readouterr().out
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain
    assert "\x1b[32mb{25%}\x1b[0m" in coloured and "\x1b[2mc\x1b[0m" in coloured
    report.main([run, "--explain", "1.1"])
    assert "\x1b[31me\x1b[0m" in capsys.readouterr().out
    for where in ("2", "1.9", "x"):
        assert f"--explain {where}: " in refusal(capsys, run, "--explain", where)


BROKEN = {"half": b'{"step": 1, "rew', "no object": b"[1]", "no step": b'{"reward": 1}'}
BROKEN |= {"not a step": b'{"step": NaN}', "deep": b"[" * 100_000, "bytes": b'{"step": "\xff"}'}


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_lines_are_one_line(tmp_path, capsys, case, name):
    run = make_run(tmp_path / "a")
    (run / name).write_bytes((run / name).read_bytes() + BROKEN[case])
    assert name in refusal(capsys, run, "--explain", "1")
    (run / "samples.jsonl").write_text('{"step": 1}')  # whole, but no answer
    assert ".jsonl" in refusal(capsys, run, "--explain", "1")


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    for name in ("metrics.jsonl", "run.json"):
        (run / name).unlink()
        assert f"a/{name}" in refusal(capsys, run, "--explain", "1")
    (run / "run.json").write_text('{"config": 5}')
    assert "a/run.json" in refusal(capsys, run, "--explain", "1")


def test_without_matplotlib_one_line_says_what_to_install(tmp_path):
    make_run(tmp_path / "a")
    code = "import sys, docs.report; sys.modules['matplotlib'] = None; docs.report.main()"
    for flags, lines in (f"--html {tmp_path}/x.html", 1), ("--explain 1", 0):
        command = [sys.executable, "-c", code, str(tmp_path / "a"), *flags.split()]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPORT.parents[1])
        assert done.returncode == 2 * lines and done.stderr.count("\n") == lines
        assert ("pip install matplotlib" in done.stderr) == (lines == 1)
