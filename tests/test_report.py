"""docs/report.py: curves and pages from run folders, also from bad ones."""

import json
import math
import re
from pathlib import Path

import pytest

from docs import report

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
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"config": {"seed": 0} | settings}))
    rows = [{"step": i, "reward": reward, "kl": 0.0} for i, reward in enumerate(rewards, 1)]
    after = {"eval/accuracy": 0.75, "eval/accuracy_se": 0.0625}
    rows += [{"step": len(rewards)} | after, {"step": 0, "eval/accuracy": 0.25}]
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


def test_curves(tmp_path):
    """Seeds: the mean between the lowest and the highest; one run: its standard error."""
    rewards = (1.0, 4.0, 9.0), (3.0, 2.0)  # the second was stopped after two steps
    runs = [report.read_run(make_run(tmp_path / str(i), r)) for i, r in enumerate(rewards)]
    assert report.curve(runs, "reward") == [(1, 2.0, 1.0, 3.0), (2, 3.0, 2.0, 4.0)]
    assert report.curve(runs[:1], "eval/accuracy")[-1] == (3, 0.75, 0.6875, 0.8125)
    odd = None, math.nan, -math.inf, "text", True, [1], 10**400, 0.5
    rows = [{"step": i, "loss": value} for i, value in enumerate(odd)]
    write_lines(tmp_path / "0" / "metrics.jsonl", rows)
    assert report.read_run(tmp_path / "0").series["loss"] == {7: 0.5}


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
    assert tags[0] >= tags[1] and not tags[0] & {"script", "link", "img", "image", "iframe"}
    assert "&lt;script&gt;" in page
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", page)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "run.json"])
def test_a_broken_run_is_one_line(tmp_path, capsys, name):
    run = make_run(tmp_path / "a")
    for content in (b'{"step": 1, "rew', b"[1]", b'{"config": 5}', b"[" * 100_000):
        (run / name).write_bytes(content)
        assert name in refusal(capsys, run, "--explain", "1")
