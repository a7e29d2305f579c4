"""Tasks of other files: how --task FILE.py:Class loads them, and those of more/tasks.py."""

import doctest
import itertools
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import test_rewards  # noqa: E402
from test_rewards import reversed_numbers, write  # noqa: E402

import rewards  # noqa: E402
from more import tasks  # noqa: E402
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


def test_files_are_found_from_other_folders(mine, tmp_path, monkeypatch):
    """A path counts from the working folder, then from the one of rewards.py; or it is absolute."""
    (tmp_path / "else" / "more").mkdir(parents=True)
    mine(PLAIN)
    monkeypatch.chdir(tmp_path / "else")
    for path in ("../mine.py", tmp_path / "mine.py"):
        assert type(make_task(f"{path}:Plain")).__name__ == "Plain"
    assert type(make_task("more/tasks.py:KnightsAndKnaves:max_people=2")).__name__ == "KnightsAndKnaves"
    (tmp_path / "else" / "more" / "tasks.py").write_text(PLAIN)
    with pytest.raises(BadInput, match="more/tasks.py has no class 'KnightsAndKnaves'"):
        make_task("more/tasks.py:KnightsAndKnaves")


BAD_FILES = {  # spec, then what stands in mine.py, and words of the complaint
    "no file": ("yours.py:Plain", PLAIN, "yours.py: .*No such file"),
    "no class": ("mine.py", PLAIN, "mine.py has no class ''"),
    "another class": ("mine.py:Plane:a=1", PLAIN, "mine.py has no class 'Plane'"),
    "no class but a function": ("mine.py:f", "def f(): ...", "mine.py has no class 'f'"),
    "no problem": ("mine.py:A", "class A:\n    def score(self): ...", r"mine.py has no class 'A' with problem\(\)"),
    "no score": ("mine.py:A", "class A:\n    def problem(self): ...", r"has no class 'A'.* and score\(\)"),
    "syntax": ("mine.py:A", "class A:\n    def f(:\n", "mine.py: SyntaxError .*line 2"),
    "bytes": ("mine.py:A", "\0", "mine.py: "),
    "error": ("mine.py:A", "x = 1\n\n1 / 0", "mine.py: ZeroDivisionError division by zero"),
    "name": ("mine.py:A", "x = y", "mine.py: NameError .*'y'"),
    "import": ("mine.py:A", "import no_such_module", "mine.py: ModuleNotFoundError .*no_such_module"),
    "exit": ("mine.py:A", "raise SystemExit(3)", "mine.py: SystemExit 3"),
    "several lines": ("mine.py:A", "raise KeyError('a\\nb')", "mine.py: KeyError"),
    "knob": ("mine.py:Plain:size=3", PLAIN, "mine.py:Plain: 'size=3' is none of its knobs, pool=int"),
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
    with pytest.raises(BadInput, match="Plain: 'data=x.jsonl' is none of its knobs, pool=int"):
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


# -------------------------------------------------------------------- the tasks of more/tasks.py


def test_doctests():
    result = doctest.testmod(tasks)
    assert result.attempted >= 10 and result.failed == 0


@pytest.mark.parametrize("name", [name for name, kind in rewards.TASKS.items() if isinstance(kind, str)])
def test_short_names(name, mine, tmp_path, monkeypatch):
    """A short name and FILE.py:Class are one task, from any folder; a file there of the same name is not read."""
    kind, data = rewards.TASKS[name], write(tmp_path / "a.jsonl", CHAIN_ROWS) if name == "chains" else ""
    mine("")
    (tmp_path / "more").mkdir()
    task, long = make_task(f"{name}:pool=3", data), make_task(f"{ROOT}/more/tasks.py:{kind}:pool=3", data)
    assert type(task).__name__ == kind and task.problem("train", 1, 5) == long.problem("train", 1, 2)
    (tmp_path / "more" / "tasks.py").write_text("1 / 0")
    assert type(make_task(name, data)).__name__ == kind
    with pytest.raises(BadInput, match=f"task {name}: 'size=3' is none of its knobs, pool=int"):
        make_task(f"{name}:size=3", data)


CHAIN_ROWS = [{"question": f"{i}?", "steps": ["1"], "answer": "1"} for i in range(50)]
HAND = {"kind": "solve", "rule": 13, "cards": ["3", "J", "K"], "numbers": [3, 11, 13], "target": 24, "failed": []}


@pytest.mark.parametrize(
    "expression, done, left",
    [
        ("2+3*4", ["3*4", "2+12"], ["2+12", "14"]),
        ("12*3+2*3", ["12*3", "2*3", "36+6"], ["36+2*3", "36+6", "42"]),
        ("9-4+2", ["9-4", "5+2"], ["5+2", "7"]),
        ("8/(3-2)*5", ["3-2", "8/1", "8*5"], ["8/1*5", "8*5", "40"]),
        ("(1+2)*(3+(4-2))", ["1+2", "4-2", "3+2", "3*5"], ["3*(3+(4-2))", "3*(3+2)", "3*5", "15"]),
        ("(5-2-1)*3", ["5-2", "3-1", "2*3"], ["(3-1)*3", "2*3", "6"]),
    ],
)
def test_operations_of_an_expression(expression, done, left):
    assert list(tasks.operations(expression)) == list(zip(done, left, strict=True))
    value = rewards.parse_expression(expression)[0]
    assert all(rewards.parse_expression(rest)[0] == value for rest in left)


def test_countdown_attempts():
    assert tasks.countdown_attempts((2, 3), "-*", 99) == [
        (1, "3-2", "3-2=1"),
        (6, "2*3", "2*3=6"),
        (6, "3*2", "3*2=6"),
    ]
    assert tasks.countdown_attempts((2, 3), "*", 5) == []  # 6 is above the limit
    attempts = tasks.countdown_attempts((2, 3, 4), "+-*/", 99)
    assert (14, "3*4", "2+3*4=2+12=14") in attempts and (20, "2+3", "(2+3)*4=5*4=20") in attempts
    assert (3, "3-2", "4-(3-2)=4-1=3") in attempts and (6, "4/2", "4/2*3=2*3=6") in attempts
    assert not any("10*10" in chain for _, _, chain in tasks.countdown_attempts((5, 10, 10), "+-*/", 99))
    for numbers in ((2, 3, 4), (1, 1, 5, 10)):
        attempts = tasks.countdown_attempts(numbers, "+-*/", 99)
        assert attempts == sorted(set(attempts))
        for value, first, chain in attempts:
            expression, *left = chain.split("=")
            assert sorted(rewards.parse_expression(expression)[1]) == list(numbers) and first in expression
            assert len(left) == len(numbers) - 1 and left[-1] == str(value)
            assert all(rewards.parse_expression(rest)[0] == value for rest in left)
            assert all(0 <= int(n) <= 99 for n in re.findall("[0-9]+", chain))


def test_solver_finds_what_random_expressions_prove_solvable():
    rng = random.Random(1)
    for problem in (rewards.Countdown(high=12).problem("train", 0, i) for i in range(30)):
        assert tasks.solve_countdown(problem["numbers"], problem["target"]) is not None
        numbers = [rng.randint(1, 12) for _ in range(rng.randint(2, 4))]
        text = str(numbers[0])
        for number in numbers[1:]:
            text = f"({text}){rng.choice('+-*')}{number}"
        target = rewards.parse_expression(text)[0]
        value, numerals = rewards.parse_expression(tasks.solve_countdown(numbers, target))
        assert value == target and Counter(numerals) == Counter(numbers)


def test_generalpoints_hands():
    """Ranks, values under both rules, a face card where asked for, one target or one of each hand's own."""
    for task in (tasks.GeneralPoints(), tasks.GeneralPoints(rule=13, faces=1), tasks.GeneralPoints(4, 24)):
        for p in (task.problem(split, 1, i) for split in ("train", "test") for i in range(20)):
            values = {card: value if task.rule == 13 else min(10, value) for card, value in tasks.RANKS.items()}
            assert p["numbers"] == [values[card] for card in p["cards"]] and len(p["cards"]) == task.cards
            assert sum(card in "JQK" for card in p["cards"]) >= task.faces
            assert task.target in (0, p["target"]) and tasks.solve_countdown(p["numbers"], p["target"])
    assert task.compact(HAND) == "R13|3,J,K=24<think>" and "K as 13" in task.question(HAND)


def test_generalpoints_traces_are_right_after_the_values():
    task = tasks.GeneralPoints(basics=0.5)
    kinds, misses = Counter(), 0
    for i in range(200):
        p = task.problem("train", 0, i)
        trace = task.trace(p, random.Random(i))
        kinds[p["kind"]] += 1
        attempts = tasks.countdown_attempts(tuple(sorted(p["numbers"])), "+-*/", 99)
        in_reach = p["kind"] == "read" or p["target"] in {value for value, _, _ in attempts}
        assert task.score(trace, p)["correct"] == in_reach
        misses += not in_reach
        if p["kind"] != "plain":
            assert trace.startswith(",".join(map(str, p["numbers"])) + "\n")
    assert misses < 6 and 75 < kinds["solve"] < 125 and min(kinds["read"], kinds["plain"]) > 30
    assert {task.problem("test", 0, i)["kind"] for i in range(50)} == {"solve"}
    read = HAND | {"kind": "read", "target": 0}
    assert task.compact(read) == "R13|3,J,K?<think>" and task.score("</think><answer>3,11,13</answer>", read)["correct"]
    assert not task.score("</think><answer>3,10,10</answer>", read)["correct"]


def test_generalpoints_revision():
    """A failed attempt and its verdict stand in the next prompt, and the generated ones are failures too."""
    task = tasks.GeneralPoints(rule=13, turns=5)
    after = task.revise(HAND, '</think><answer>{"formula": "13+11*3"}</answer>')
    assert after["failed"] == [["13+11*3", "wrong_value"]] and not HAND["failed"]
    after = task.revise(task.revise(after, "<answer>3*11</answer>"), "<answer>\x1b<think>3+</answer>")
    assert task.compact(after) == "R13|3,J,K=24 13+11*3#v 3*11#n 3+#s<think>"
    assert "You tried 3*11, which failed" in task.question(after)
    counts = Counter()
    for i in range(200):
        p = task.problem("train", 0, i)
        counts[len(p["failed"])] += 1
        for formula, verdict in p["failed"]:
            assert verdict == tasks.points_verdict(formula, p["numbers"], p["target"]) != "correct"
    assert set(counts) == {0, 1, 2, 3, 4} and min(counts.values()) > 20


@pytest.mark.parametrize(
    "answer, formula, verdict",
    [
        ('{"formula": "13+11*3=24"}', "13+11*3=24", "wrong_value"),
        ('{"formula": "(13-11)*3"} {"formula": "13+11*3"}', "(13-11)*3", "wrong_value"),
        ('{"formula": "13+11*0\\n"}', "13+11*0\n", "wrong_numbers"),
        ('{"formula": "13+11*3\\n"}', "13+11*3\n", "wrong_value"),
        ('{"formula": "13+11*3\n"}', "13+11*3\n", "wrong_value"),
        ('{"formula": "13\\/11\\/3"}', "13/11/3", "wrong_value"),
        ('{"formula": 24}', "24", "wrong_numbers"),
        ('{"formula": 24.0}', "24.0", "illegal"),
        ('{"formula": 007}', "007", "illegal"),
        ('{"formula": "\\x"}', "\\x", "illegal"),
        ('{"formula": null}', None, "illegal"),
        ('{"formula": "13+', None, "illegal"),
    ],
)
def test_generalpoints_reader(answer, formula, verdict):
    assert tasks.points_formula(answer) == formula
    assert tasks.GeneralPoints().score(f"</think><answer>{answer}</answer>", HAND)["verdict"] == verdict


def test_generalpoints_episode_ends():
    """The sixth answer is not looked at, and neither it nor a right one opens another turn."""
    task, problem = tasks.GeneralPoints(rule=13), HAND | {"target": 46}
    right, wrong = "</think><answer>13+11*3</answer>", "</think><answer>13+11+3</answer>"
    assert task.revise(problem, right) == problem
    for _ in range(5):
        problem = task.revise(problem, wrong)
    assert len(problem["failed"]) == 5 and task.revise(problem, wrong) == problem == task.revise(problem, right)
    assert task.score(right, problem)["verdict"] == "limit" and not task.score(right, problem)["correct"]
    assert task.compact(problem).count("#v") == 5 and task.question(problem).count("which failed") == 5


PUZZLE = {"statements": [["knave", 1], ["or", ["knight", 1], ["knave", 1]]]}  # A-B+


def test_knights_have_one_solution_and_traces_find_it():
    task, kinds = tasks.KnightsAndKnaves(2, 5), Counter()
    for p in (task.problem(split, 0, i) for split in ("train", "test") for i in range(150)):
        [roles] = tasks.solve_knights(p["statements"])
        thought, found = task.search(p["statements"])
        assert tuple(found) == roles and task.score(task.trace(p, random.Random(0)), p)["total"] == 1.1
        assert thought.count("!") == thought.count("\n")  # a line per dead end
        kinds.update(statement[0] for statement in p["statements"])
    kinds["claim"] = kinds.pop("knight") + kinds.pop("knave")
    assert set(kinds) == {"claim", "not", "and", "or", "implies", "iff"}
    assert max(kinds.values()) < 2.5 * min(kinds.values())


@pytest.mark.parametrize(
    "answer, right",
    [
        ("A-B+", True),
        ("B+, A-", True),
        ("Ada: knave; Ben: knight", True),
        ("Ada is a knave and Ben is a knight.", True),
        ("A-", False),
        ("A-B+A-", False),
        ("A-B+A+", False),
        ("A-B+C+", False),
        ("Ada is not a knave, Ben is a knight", False),
        ("", False),
    ],
)
def test_knights_answers(answer, right):
    assert tasks.solve_knights([["knave", 1], ["knight", 1]]) == [(1, 0), (0, 1)]
    assert tasks.solve_knights(PUZZLE["statements"]) == [(0, 1)]
    assert tasks.KnightsAndKnaves().score(f"</think><answer>{answer}</answer>", PUZZLE)["correct"] == right


def test_knights_count_statements():
    """Kleene's logic by hand: of k, l and m, how many are true once the roles of one, two or three are known."""
    claims = [["knight", 0], ["knight", 1], ["knave", 2]]
    for roles, expected in [
        ([], [0.5, 0.5, 0.5, 0.5]),
        ([1], [0, 0.5, 0.5, 0.5]),
        ([1, 0], [0, 0.5, 0.5, 0]),
        ([1, 0, 0], [0, 0, 1, 0]),
        ([0, 0, 1], [1, 0, 0, 0]),
    ]:
        assert [tasks.truth(["exactly", k, *claims], roles) for k in range(4)] == expected
    for world in itertools.product((0, 1), repeat=3):
        both = [tasks.truth([kind, *claims[:2]], world) for kind in ("and", "or")]
        assert tasks.truth(["exactly", 2, *claims[:2]], world) == both[0]
        assert tasks.truth(["not", ["exactly", 0, *claims[:2]]], world) == both[1]


def test_knights_with_names_of_their_own():
    """A knight who says that one of two is a knave; names that begin alike, the short form beside them."""
    said = [["exactly", 1, ["knave", 0], ["knave", 1]], ["knight", 0], ["exactly", 2, ["knight", 0], ["knave", 1]]]
    task, problem = tasks.KnightsAndKnaves(), {"statements": said, "names": ["Ann", "Anna", "Bea"]}
    assert tasks.solve_knights(said) == [(0, 0, 0)]
    assert task.compact(problem) == "A:1(A-,B-);B:A+;C:2(A+,B-)?<think>" == task.compact({"statements": said})
    puzzle = task.puzzle(problem)
    assert "3 people: Ann, Anna, Bea." in puzzle and 'Anna says: "Ann is a knight."' in puzzle
    assert 'Ann says: "exactly 1 of these are true: Ann is a knave; Anna is a knave."' in puzzle
    assert "Ann: knight; Anna: knave</answer>" in task.question(problem) and "Ada" in task.question(PUZZLE)
    for answer, right in [
        ("Ann: knave; Anna: knave; Bea: knave", True),
        ("Bea is a knave, Anna is a knave and Ann is a knave", True),
        ("Ann: knave; Anna: knight; Bea: knave", False),
        ("Ann: knave; Ann: knave; Bea: knave", False),
        ("Ada: knave; Ben: knave; Cleo: knave", False),
    ]:
        assert task.score(f"</think><answer>{answer}</answer>", problem)["correct"] == right
    assert task.score(task.trace(problem, random.Random(0)), problem)["correct"]


ROUTE = {"start": 350, "legs": [[10, 1, 0, 6], [190, 2, 3, 1]], "space": "relative"}


def test_navigation_routes():
    task = tasks.Navigation()
    assert task.compact(ROUTE) == "R>n A6;>>s D1|A6.D1<think>"
    actions = ["turn_direction(slightly right)", "forward()", "turn_direction(right)", *["forward()"] * 2, "stop()"]
    assert task.actions(ROUTE) == actions
    assert task.trace(ROUTE, None) == "> fA6\n>> f. fD1\n</think><answer>> f >> f f !</answer>"
    for answer in (", ".join(actions), "> f >> f f !", ">,f,>>,f,f,!"):
        assert task.score(f"</think><answer>{answer}</answer>", ROUTE)["correct"]
    wrong = "</think><answer>> f > f f !</answer>"
    assert not task.score(wrong, ROUTE)["correct"] and task.describe(wrong, ROUTE)["right_actions"] == 5 / 6
    other = ROUTE | {"space": "absolute"}
    assert task.compact(other)[1:] == task.compact(ROUTE)[1:] and task.actions(other)[0] == "turn_direction(north)"
    asked = task.question(ROUTE)
    assert "turn slightly right to face north" in asked and "Alder Inn is ahead" not in asked
    assert "the next intersection, where Alder Inn is left" in asked and "slightly right, right. Think" in asked
    for space in ("absolute", "relative"):
        task = tasks.Navigation(space=space, basics=0.3)
        routes = [task.problem("train", 0, i) for i in range(200)]
        assert all(task.score(task.trace(p, random.Random(0)), p)["total"] == 1.1 for p in routes)
        easy = [p for p in routes if p["legs"][0][1] == 0]
        assert 40 < len(easy) < 80 and {p["space"] for p in easy} == {"absolute", "relative"}
        assert all(task.problem("test", 0, i)["space"] == space for i in range(50))


BAD_KNOBS = ["GeneralPoints:cards=5", "GeneralPoints:rule=11", "GeneralPoints:turns=6"]
BAD_KNOBS += ["KnightsAndKnaves:max_people=9", "Navigation:space=up", "Navigation:min_legs=0"]


@pytest.mark.parametrize("spec", BAD_KNOBS)
def test_bad_knobs(spec):
    with pytest.raises(BadInput, match="allowed|absolute or relative"):
        make_task(f"more/tasks.py:{spec}")


def test_multiplication_task():
    task = tasks.Multiplication(3, 3)
    problem = {"a": 123, "b": 456}
    assert task.compact(problem) == "123*456=<think>" and task.key(problem) == "123*456"
    assert task.score(" </think><answer>56,088</answer>", problem)["total"] == 1.1
    assert all(len(str(task.problem("train", 0, i)["a"])) == 3 for i in range(50))
    with pytest.raises(BadInput, match="min_digits"):
        tasks.Multiplication(3, 2)


@pytest.mark.parametrize(
    "task", [tasks.AffineChain(), tasks.S3(), tasks.AffineChain(5, 10), tasks.S3(10)], ids=str
)
def test_chains(task):
    """Streams that never meet, steps that lead to the answer, a scorer that reads the last line."""
    streams = {s: [task.problem(s, 0, i) for i in range(200)] for s in ("train", "test")}
    assert streams["train"] == [task.problem("train", 0, i) for i in range(200)]
    assert streams["train"] != [task.problem("train", 1, i) for i in range(200)]
    keys = {split: {task.key(p) for p in problems} for split, problems in streams.items()}
    assert not keys["train"] & keys["test"]
    for problem in streams["train"] + streams["test"]:
        assert json.loads(json.dumps(problem)) == problem
        steps, answer = task.steps(problem), task.answer(problem)
        left, right = zip(*(step.split("=") for step in steps), strict=True)
        assert right[-1] == answer and all(a[0] == b for a, b in zip(left[1:], right, strict=False))
        assert left[0][0] == task.compact(problem)[0] and all(len(step) == 5 for step in steps)
        assert task.score("\n".join([*steps, answer]), problem)["correct"]
        assert task.score(answer, problem)["correct"] and not task.score(steps[-1], problem)["correct"]
    shares = Counter(task.answer(problem) for problem in streams["train"] + streams["test"])
    if isinstance(task, tasks.S3):
        assert len(shares) == 6 and max(shares.values()) < 400 * 0.25  # no answer is much likelier than another
    elif task == tasks.AffineChain():
        assert len(shares) == 7 and 0.2 < shares["0"] / 400 < 0.3  # what a guess gets right


def test_affine_chain_by_hand():
    task, problem = tasks.AffineChain(), {"start": 6, "operations": ["*6", "+1", "*3"]}
    assert task.compact(problem) == "6*6+1*3"
    assert task.steps(problem) == ["6*6=1", "1+1=2", "2*3=6"] and task.answer(problem) == "6"
    assert "6 and apply *6, then +1, then *3, each time modulo 7" in task.question(problem)
    with pytest.raises(BadInput, match="modulus"):
        tasks.AffineChain(modulus=11)


def test_s3_is_the_symmetric_group():
    pairs = [x + y for x, y in itertools.product("abcdef", repeat=2)]
    product = {pair: tasks.S3().products({"elements": pair})[1] for pair in pairs}
    for x, y, z in itertools.product("abcdef", repeat=3):
        assert product[product[x + y] + z] == product[x + product[y + z]]
    for x in "abcdef":
        assert product["a" + x] == product[x + "a"] == x and sorted(product[x + y] for y in "abcdef") == list("abcdef")
    # b swaps the last two, c the first two: first b, then c takes 0 to 1, 1 to 2, 2 to 0
    assert tasks.PERMUTATIONS[1:3] == [(0, 2, 1), (1, 0, 2)] and product["bc"] == "d" != product["cb"]
    assert tasks.PERMUTATIONS["abcdef".index("d")] == (1, 2, 0)
    with pytest.raises(BadInput, match="elements"):
        tasks.S3(1)


@pytest.mark.parametrize("text, right", [("### 1,080", True), ("x\n#### 1080\n", True), ("1080 #", False), ("", False)])
def test_score_last_line(text, right):
    assert tasks.score_last_line(text, "1080")["correct"] == right


def below(edges: list, root: str) -> dict[str, int]:
    """Distance from the root of every name that can be reached along the edges."""
    found = {root: 0}
    while new := {c: found[p] + 1 for p, c in edges if p in found and c not in found}:
        found |= {c: min(found[p] + 1 for p, x in edges if x == c and p in found) for c in new}
    return found


def graph_of(problem: dict, graph: dict) -> Counter:
    """What the vectors count in one graph; `labels` and `parents` of the nodes that have an edge."""
    edges, root = problem["edges"], problem["root"]
    nodes, children, parents = ({x for e in edges for x in e}, {p for p, _ in edges}, Counter(c for _, c in edges))
    reach, roots = below(edges, root), [n for n in nodes if n not in parents]
    depth = below(edges, next(r for r in problem["roots"] if r != root))[problem["other"]]
    kept = [i for i, above in enumerate(graph["parents"]) if above or any(i in p for p in graph["parents"])]
    families = Counter(graph["labels"][i] for i in kept)
    count = Counter(nodes=len(nodes), edges=len(edges), reach=len(reach) - 1, out=sum(p == root for p, _ in edges))
    count.update({f"path {reach[problem['target']]}": 1, f"other {depth}": 1, f"entities {min(len(roots), 4)}": 1})
    count.update({f"family {label}": n for label, n in families.items()})
    count.update({f"in {min(parents[n], 4)}": 1 for n in nodes if n in parents or n not in roots})
    assert problem["target"] not in children and problem["other"] not in children and problem["other"] not in reach
    assert sorted(roots) == sorted(n for n in nodes if n in tasks.ProsQA.ENTITIES)
    assert not any(n in below([e for e in edges if e[0] != n], c) for n, c in edges)  # no cycle
    leaves = [n for n in reach if n not in children]
    count["root 1"] = int(root == problem["roots"][1])
    count["deepest"] = int(reach[problem["target"]] == max(reach[n] for n in leaves))
    return count


def test_prosqa_has_the_statistics_of_the_released_data():
    """Means within 5 %, shares within .05 of the 300 released items, over 2,000 draws."""
    path = Path(__file__).parent / "vectors" / "latent.json"
    real = json.loads(path.read_text(encoding="utf-8"))["prosqa_graphs"]["aggregate"]
    task, rng, total, draws, first = tasks.ProsQA(), random.Random(0), Counter(), 0, 0
    while draws < 2000:
        graph = task.graph(rng)
        problem = task.dress(graph, rng)
        if problem:
            total.update(graph_of(problem, graph))
            draws, first = draws + 1, first + (not problem["swap"])
    mean = {name: count / draws for name, count in total.items()}
    for ours, theirs in (
        ("nodes", "nodes"),
        ("edges", "edges"),
        ("reach", "reachable_from_root"),
        ("out", "root_out_degree"),
    ):
        assert mean[ours] == pytest.approx(real[theirs]["mean"], rel=0.05), ours
    for name, theirs in (("path", "shortest_path_hist"), ("other", "neg_target_depth_hist")):
        for key, share in real[theirs].items():
            assert mean.get(f"{name} {key}", 0) == pytest.approx(share, abs=0.05), (name, key)
    for key in ("2", "3"):
        assert mean[f"entities {key}"] == pytest.approx(real["n_entities_hist"][key], abs=0.05)
    families = {1: "only_root0", 2: "only_root1"}
    for label, theirs in families.items():
        assert mean[f"family {label}"] == pytest.approx(real["mean_family_counts"][theirs], rel=0.05)
    assert mean["family 3"] < 2 and mean["family 0"] < 1
    assert mean["root 1"] == pytest.approx(real["root_index_hist"]["1"], abs=0.05)
    assert mean["deepest"] == pytest.approx(real["frac_target_at_max_leaf_depth"], abs=0.05)
    assert first / draws == pytest.approx(0.5, abs=0.05)


def test_prosqa_problems():
    task = tasks.ProsQA()
    streams = {s: [task.problem(s, 0, i) for i in range(100)] for s in ("train", "test")}
    assert streams["train"] == [task.problem("train", 0, i) for i in range(100)]
    assert not {task.key(p) for p in streams["train"]} & {task.key(p) for p in streams["test"]}
    for problem in streams["train"]:
        assert json.loads(json.dumps(problem)) == problem
        question, steps, answer = task.question(problem), task.steps(problem), task.answer(problem)
        assert len(steps) == below(problem["edges"], problem["root"])[problem["target"]] >= 3
        assert all(step in question for step in steps)  # each is a premise
        assert (
            steps[0].split()[0] == problem["root"] == answer.split()[0] and steps[-1].split()[-1] == answer.split()[-1]
        )
        assert task.score("\n".join([*steps, "### " + answer]), problem)["correct"]
        assert not task.score(f"### {problem['root']} is a {problem['other']}.", problem)["correct"]
    with pytest.raises(BadInput, match="10 to 36"):
        tasks.ProsQA(nodes=5)
    assert len(tasks.ProsQA(nodes=36).problem("train", 0, 0)["edges"]) > 20


CHAIN = {"question": "2 and 3?", "steps": ["2+3=5", "5*2=10"], "answer": "10"}
PRONTO = {
    "question": "Each cat is small. Sam is a cat.", "query": "True or false: Sam is small.", "answer": "True",
    "chain_of_thought": ["Sam is a cat.", "Each cat is small.", "Sam is small."],
}  # fmt: skip
CHAIN_FILES = {
    "list": json.dumps([CHAIN, CHAIN | {"answer": 10, "edges": [[0, 1]]}]),
    "lines": json.dumps(CHAIN) + "\n\n" + json.dumps(CHAIN),
    "one": json.dumps(CHAIN),
    "gsm8k": "2 and 3?||2+3=5 5*2=10 #### 10\n2 and 3?||2+3=5 5*2=10## 10\n",
}


@pytest.mark.parametrize("form", CHAIN_FILES)
def test_chain_files(form, tmp_path):
    (tmp_path / "a").write_text(CHAIN_FILES[form], encoding="utf-8")
    assert tasks.read_chains(str(tmp_path / "a")) == [CHAIN] * (1 if form == "one" else 2)


def test_chain_file_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf" + b"2 and 3?||2+3=5 #### 5\n")
    assert tasks.read_chains(str(tmp_path / "a"))[0]["question"] == "2 and 3?"


def test_prontoqa_file(tmp_path):
    examples = {f"example{i}": {"in_context_example0": PRONTO, "test_example": PRONTO} for i in (1, 2)}
    (tmp_path / "a").write_text(json.dumps(examples), encoding="utf-8")
    steps = ["Sam is a cat. Each cat is small.", "Sam is small."]
    question = "Each cat is small. Sam is a cat. True or false: Sam is small."
    assert tasks.read_chains(str(tmp_path / "a")) == [{"question": question, "steps": steps, "answer": "True"}] * 2


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "is empty"),
        ("[]", "is empty"),
        ("[1]", 'item 1: "steps" must be a list'),
        (json.dumps([CHAIN, CHAIN | {"steps": "2+3=5"}]), 'item 2: "steps" must be a list of texts'),
        (json.dumps([CHAIN | {"answer": " "}]), 'item 1: field "answer" is missing or empty'),
        (json.dumps({"example7": {"test_example": PRONTO | {"query": None}}}), 'item example7: field "question"'),
        (json.dumps({"example7": {"test_example": PRONTO | {"chain_of_thought": "x"}}}), "item example7: .steps"),
        (json.dumps(CHAIN) + "\n{\n", "line 2: "),
        ("2?||1 #### 1\nx\n\ny\n2?||1 #### 1\nz\n", "line 2: field .*; 2 more such lines: 4, 6$"),
        ("2 and 3?||2+3=5 #### 10\nno separator\n", 'line 2: field "answer" is missing'),
        ("[" * 100_000, "line 1: "),
    ],
)
def test_bad_chain_files(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=words) as error:
        make_task("more/tasks.py:Chains", data=str(tmp_path / "a.json"))
    assert "a.json" in str(error.value) and "\n" not in str(error.value)


def test_chains_task(tmp_path):
    rows = [CHAIN | {"question": f"{i} and 3?"} for i in range(100)]
    task = make_task("more/tasks.py:Chains", data=write(tmp_path / "a.jsonl", rows))
    assert len(task.streams["train"]) + len(task.streams["test"]) == 100 > len(task.streams["train"]) > 80
    problem = task.problem("train", 0, 0)
    assert task.steps(problem) == CHAIN["steps"] and task.score("2+3=5\n### 10", problem)["correct"]
    both = make_task(f"more/tasks.py:Chains:test={write(tmp_path / 'b.jsonl', rows[:3])}", data=str(tmp_path / "a.jsonl"))
    assert len(both.streams["train"]) == 100 and both.streams["test"] == tasks.read_chains(str(tmp_path / "b.jsonl"))
    with pytest.raises(BadInput, match="give --data"):
        make_task("more/tasks.py:Chains")


def test_two_notations():
    """Tries in signs and in letters; the consistency reward is the share of those in signs (R1)."""
    task, problem = tasks.Notations(worded=0.5, consistency=0.5), {"numbers": [4, 4, 6], "target": 6}
    text = "4x6x4e24x4e96>6\nwait4*6/4=24/4=6=6\n</think><answer>4*6/4</answer>"
    assert task.describe(text, problem) == {
        "tries": 2, "distinct_tries": 2, "gave_up": False, "first_notation": 0.5, "mixed": True,
    }  # fmt: skip
    assert task.score(text, problem)["total"] == 1.1 + 0.25
    assert tasks.Notations(consistency=1.0).describe("</think>", problem)["first_notation"] == 1.0
    traces = [task.trace(task.problem("train", 0, i), random.Random(i)) for i in range(300)]
    lines = [line for trace in traces for line in trace.partition("</think>")[0].splitlines()]
    share = sum("e" in line for line in lines) / len(lines)
    assert 0.4 < share < 0.6 and not any("e" in line and "=" in line for line in lines)
    plain = rewards.Countdown()  # whose traces are the same but for the notation
    for i, trace in enumerate(traces[:50]):
        problem = plain.problem("train", 0, i)
        details = task.describe(trace, problem)
        assert details["tries"] == plain.describe(plain.trace(problem, random.Random(i)), problem)["tries"]


# ------------------------------------------------- what test_rewards.py asks of tasks and verifiers


def other_space(problem: dict) -> dict:
    return problem | {"space": "relative"}


GENERATED = [
    (tasks.GeneralPoints(turns=3), reversed_numbers),
    (tasks.GeneralPoints(rule=13, faces=1, basics=0.4), reversed_numbers),
    (make_task("more/tasks.py:GeneralPoints", natural=True), reversed_numbers),
    (tasks.KnightsAndKnaves(), dict),
    (make_task("more/tasks.py:KnightsAndKnaves", natural=True), dict),
    (tasks.Navigation(), other_space),
    (make_task("more/tasks.py:Navigation:grain=1", natural=True), other_space),
]


@pytest.mark.parametrize("task, permute", GENERATED, ids=str)
def test_streams(task, permute):
    test_rewards.test_streams(task, permute)


JUDGES = {
    "cards": lambda text: tasks.GeneralPoints().score(text, HAND),
    "read cards": lambda text: tasks.GeneralPoints().score(text, HAND | {"kind": "read"}),
    "knights": lambda text: tasks.KnightsAndKnaves().score(text, PUZZLE),
    "route": lambda text: tasks.Navigation().score(text, ROUTE),
    "last line": lambda text: tasks.score_last_line(text, "gold"),
    "two notations": lambda text: tasks.Notations().score(text, test_rewards.COUNTDOWN),
}


def test_hostile_answers_are_wrong_and_cheap(monkeypatch):
    monkeypatch.setattr(test_rewards, "JUDGES", JUDGES)
    test_rewards.test_hostile_answers_are_wrong_and_cheap(monkeypatch)


@pytest.mark.parametrize("most, count", [(200, 300), (10**4, 30), (10**6, 3)])
def test_ugly_completions(most, count, monkeypatch):
    names = "generalpoints", "knights", "navigation", "notations:worded=0.3,consistency=1"
    monkeypatch.setattr(test_rewards, "UGLY", [*names, "affine", "s3", "prosqa"])
    test_rewards.test_ugly_completions(most, count)
