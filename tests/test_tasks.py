"""Tasks of other files: how --task FILE.py:Class loads them, and those of more/tasks.py."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rewards  # noqa: E402
from rewards import BadInput, make_task  # noqa: E402

# ------------------------------------------------------------------------ a file of the user's

PLAIN = """
class Plain:
    def problem(self, split, seed, index):
        return {"split": split, "index": index}

    def compact(self, problem):
        return f"{problem['index']}<think>"

    def score(self, text, problem, **kw):
        import rewards
        return rewards.score(text, None, text == str(problem["index"]), **kw)
"""
KNOBS = """
from __future__ import annotations
from dataclasses import dataclass, field

@dataclass
class Knobs:
    data: str = ""
    count: int = 3
    share: float = 0.5
    loud: bool = True
    words: list[str] = field(default_factory=list)
    NATURAL = {"count": 9}

    def __post_init__(self):
        if self.count == 7:
            raise ZeroDivisionError("seven")

    def problem(self, split, seed, index):
        return {}

    score = key = question = problem
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Write mine.py into the working folder."""
    monkeypatch.chdir(tmp_path)
    return (tmp_path / "mine.py").write_text


def test_a_plain_class_is_a_task(mine):
    """No knobs but pool, no key and no describe; the verifier is guarded."""
    mine(PLAIN)
    task = make_task("mine.py:Plain", natural=True)
    assert rewards.heldout(task, 3) == [{"split": "test", "index": i} for i in range(3)]
    assert task.score("4", {"index": 4})["correct"] and rewards.prompt(task, {"index": 4}, "compact") == "4<think>"
    assert task.score("4", {}) == {"format": 0.0, "answer": None, "correct": False, "total": 0.0}
    with pytest.raises(BadInput, match="Plain has no question prompt: give a tiny --model"):
        rewards.prompt(task, {"index": 4}, "chat")
    task = make_task("mine.py:Plain:pool=2")
    assert [task.problem("train", 0, i)["index"] for i in range(5)] == [0, 1, 0, 1, 0]
    assert task.problem("test", 0, 4)["index"] == 4


def test_knobs_of_a_dataclass(mine):
    mine(KNOBS)
    task = make_task("mine.py:Knobs:share=1e-1,loud=0", data="x.jsonl", natural=True)
    assert (task.data, task.count, task.share, task.loud) == ("x.jsonl", 9, 0.1, 0)
    assert make_task("./mine.py:Knobs").count == 3


BAD_FILES = {  # spec, then what stands in mine.py, and words of the complaint
    "no file": ("yours.py:Plain", PLAIN, "no file yours.py"),
    "no class": ("mine.py", PLAIN, "mine.py has no class ''"),
    "another class": ("mine.py:Plane:a=1", PLAIN, "mine.py has no class 'Plane'"),
    "no class but a function": ("mine.py:f", "def f(): ...", "mine.py has no class 'f'"),
    "no problem": ("mine.py:A", "class A:\n    def score(self): ...", r"mine.py: the class A has no problem\(\)"),
    "no score": ("mine.py:A", "class A:\n    score = 1\n    def problem(self): ...", r"A has no score\(\)"),
    "syntax": ("mine.py:A", "class A:\n    def f(:\n", "mine.py: SyntaxError .*line 2"),
    "bytes": ("mine.py:A", "\0", "mine.py: "),
    "error": ("mine.py:A", "x = 1\n\n1 / 0", "mine.py: ZeroDivisionError division by zero"),
    "name": ("mine.py:A", "x = y", "mine.py: NameError .*'y'"),
    "import": ("mine.py:A", "import no_such_module", "mine.py: ModuleNotFoundError .*no_such_module"),
    "exit": ("mine.py:A", "raise SystemExit(3)", "mine.py: SystemExit 3"),
    "several lines": ("mine.py:A", "raise KeyError('a\\nb')", "mine.py: KeyError"),
    "knob": ("mine.py:Plain:size=3", PLAIN, "mine.py:Plain does not understand 'size=3'; its knobs are pool=int"),
    "kind": ("mine.py:Knobs:words=a", KNOBS, "'words=a'.* data=str, count=int, share=float, loud=int"),
    "value": ("mine.py:Knobs:share=nan", KNOBS, "'share=nan'"),
    "constructor": ("mine.py:Knobs:count=7", KNOBS, "mine.py:Knobs: ZeroDivisionError seven"),
    "must be given": ("mine.py:Plain", PLAIN + "\n    def __init__(self, x): ...", "Plain: TypeError .*'x'"),
    "frozen": ("mine.py:Knobs", KNOBS.replace("@dataclass", "@dataclass(frozen=True)"), "mine.py:Knobs: .*assign"),
    "pool": ("mine.py:Plain:pool=-1", PLAIN, "pool=-1"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_what_is_wrong_with_a_file_is_one_line(case, mine):
    spec, text, words = BAD_FILES[case]
    mine(text)
    with pytest.raises(BadInput, match=words) as error:
        make_task(spec)
    assert "\n" not in str(error.value)


def test_no_data_for_a_class_without_the_field(mine):
    mine(PLAIN)
    with pytest.raises(BadInput, match="drop 'x.jsonl'"):
        make_task("mine.py:Plain", data="x.jsonl")


@pytest.mark.parametrize("script", ["grpo", "sft", "budget_forcing"])
def test_a_script_runs_it(run, cwd, script):
    """The run folder is named after the class; a class that fails is one line."""
    text = PLAIN + "\n    def trace(self, problem, rng):\n        return '</think>1'"
    (cwd / "mine.py").write_text(text)
    done = run(script, "--task mine.py:Plain")
    (folder,) = (cwd / "out").iterdir()
    assert done.code == 0 and folder.name.startswith(f"{script}-Plain-0-")
    assert json.loads((folder / "run.json").read_text())["config"]["task"] == "mine.py:Plain"
    assert run(script, f"--resume {folder} --eval_problems 1").code == 0
    (cwd / "mine.py").write_text("1 +")
    done = run(script, "--task mine.py:Plain")
    assert done.code == 2 and done.err.count("\n") == 1 and "mine.py" in done.err
