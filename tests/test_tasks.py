"""Tasks of other files: how --task FILE.py:Class loads them, and those of more/tasks.py.

What holds for every task (streams, hostile answers) is in test_rewards.py, the verifiers' cases of
the papers' code in test_vectors.py, a run of a user's task in test_readme.py.
"""

import doctest
import itertools
import json
import random
import re
import sys
from collections import Counter

import pytest
from conftest import vectors
from test_rewards import write

import rewards
from more import tasks
from rewards import BadInput, make_task

# ------------------------------------------------------------------------ a file of the user's

MINE = """from __future__ import annotations
from dataclasses import dataclass, field
import rewards

class Plain:
    def problem(self, split, seed, index):
        return {"split": split, "index": index}

    def compact(self, problem):
        return f"{problem['index']}<think>"

    def score(self, text, problem, **kw):
        return rewards.score(text, None, text == str(problem["index"]), **kw)

@dataclass
class Knobs(Plain):
    data: str = ""
    count: int = 3
    share: float = 0.5
    loud: bool = True
    words: list[str] = field(default_factory=list)
    NATURAL = {"count": 9}

    def __post_init__(self):
        1 / (self.count - 7)
"""


@pytest.fixture
def mine(cwd):
    """Write mine.py into the working folder."""
    return (cwd / "mine.py").write_text


def test_a_class_of_a_file_is_a_task(mine):
    """A plain one has no knob but pool, no key and no describe; the verifier is guarded."""
    mine(MINE)
    task = make_task("mine.py:Plain", natural=True)
    assert rewards.heldout(task, 3) == [{"split": "test", "index": i} for i in range(3)]
    assert rewards.prompt(task, {"index": 4}, "compact") == "4<think>"
    assert task.score("4", {"index": 4})["correct"] and task.score("4", {})["total"] == 0
    with pytest.raises(BadInput, match="Plain has no question prompt: give a tiny --model"):
        rewards.prompt(task, {"index": 4}, "chat")
    task = make_task("./mine.py:Knobs:share=1e-1,loud=0", data="x.jsonl", natural=True)
    assert (task.data, task.count, task.share, task.loud) == ("x.jsonl", 9, 0.1, 0)


def test_files_are_found_from_other_folders(mine, cwd, monkeypatch):
    """A path counts from the working folder, then from the one of rewards.py; or it is absolute."""
    mine(MINE)
    assert make_task("more/tasks.py:S3:elements=9").elements == 9
    (cwd / "more").mkdir()
    (cwd / "more" / "tasks.py").write_text(MINE)
    assert make_task("more/tasks.py:Knobs").count == 3 and make_task("s3:pool=3").elements == 5
    monkeypatch.chdir(cwd / "more")
    for path in ("../mine.py", cwd / "mine.py"):
        assert make_task(f"{path}:Knobs").count == 3


BAD_FILES = [  # what follows mine.py in the spec, what stands in it, words of the complaint
    (":A", "class A:\n    def score(self): ...", r"no class 'A' with problem\(\)"),
    (":A", "class A:\n    def f(:\n", "mine.py: SyntaxError .*line 2"),
    (":A", "raise SystemExit('a\\nb')", "mine.py: SystemExit a b"),
    (":Plain:pool=-1", MINE, "pool=-1"),
    (":Knobs:words=a", MINE, "'words=a'.* pool=int, data=str, count=int, share=float, loud=int"),
    (":Knobs:share=nan", MINE, "'share=nan'"),
    (":Knobs:count=7", MINE, "mine.py:Knobs: ZeroDivisionError"),
]


@pytest.mark.parametrize("rest, text, words", BAD_FILES)
def test_what_is_wrong_with_a_file_is_one_line(rest, text, words, mine):
    mine(text)
    with pytest.raises(BadInput, match=words) as error:
        make_task("mine.py" + rest)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec",
    "generalpoints:cards=5 generalpoints:rule=11 generalpoints:turns=6 knights:max_people=9 "
    "navigation:space=up navigation:min_legs=0 multiplication:max_digits=19 s3:elements=1 "
    "multiplication:min_digits=3 affine:modulus=11 prosqa:nodes=5 chains".split(),
)
def test_bad_knobs(spec):
    with pytest.raises(BadInput, match="allowed|absolute or relative| to 1|digits|elements|--data"):
        make_task(spec)


def test_a_copy_without_more_says_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "more", None)
    assert make_task("countdown").problem("train", 0, 0)
    with pytest.raises(BadInput, match="more/tasks.py"):
        make_task("s3")


# ----------------------------------------------------------- more/tasks.py: countdown, cards


def test_doctests():
    result = doctest.testmod(tasks)
    assert result.attempted >= 10 and result.failed == 0


def test_countdown_attempts_are_all_ways_in_range_step_by_step():
    assert [left for _, left in tasks.operations("9-4+2*3")] == ["9-4+6", "5+6", "11"]
    for numbers in ((2, 3, 4), (5, 10, 10)):
        attempts = tasks.countdown_attempts(numbers, "+-*/", 99)
        assert attempts == sorted(set(attempts))
        for value, first, chain in attempts:
            expression, *left = chain.split("=")
            assert sorted(rewards.parse_expression(expression)[1]) == list(numbers)
            assert first in expression and len(left) == len(numbers) - 1 and left[-1] == str(value)
            assert all(rewards.parse_expression(rest)[0] == value for rest in left)
            assert all(0 <= int(n) <= 99 for n in re.findall("[0-9]+", chain))


HAND = {"kind": "solve", "rule": 13, "cards": ["3", "J", "K"], "numbers": [3, 11, 13]}
HAND |= {"target": 24, "failed": []}


def test_generalpoints_hands_and_traces():
    """Traces read the hand, then find the target where integers up to 99 lead to it."""
    task, kinds, misses = tasks.GeneralPoints(rule=13, faces=1, basics=0.5), Counter(), 0
    for i in range(100):
        p = task.problem("train", 0, i)
        trace = task.trace(p, random.Random(i))
        kinds[p["kind"]] += 1
        values = [min(p["rule"], tasks.RANKS[card]) for card in p["cards"]]
        assert p["numbers"] == values and any(card in "JQK" for card in p["cards"])
        assert p["kind"] == "plain" or trace.startswith(",".join(map(str, values)) + "\n")
        assert p["kind"] == "read" or tasks.solve_countdown(values, p["target"])
        misses += not task.score(trace, p)["correct"]
    assert misses < 6 and 35 < kinds["solve"] < 65 and min(kinds["read"], kinds["plain"]) > 15
    assert {task.problem("test", 0, i)["kind"] for i in range(50)} == {"solve"}
    read = HAND | {"kind": "read", "target": 0}
    assert task.compact(read) == "R13|3,J,K?<think>"
    assert not task.score("</think><answer>3,10,10</answer>", read)["correct"]


def test_generalpoints_failed_attempts_stand_in_the_prompt():
    task = tasks.GeneralPoints(rule=13, turns=5)
    assert task.compact(HAND) == "R13|3,J,K=24<think>" and "K as 13" in task.question(HAND)
    assert tasks.points_verdict("+3*8", [3, 8], 24) == "illegal"  # a sign in front
    after = task.revise(HAND, '</think><answer>{"formula": "13+11*3"}</answer>')
    assert after["failed"] == [["13+11*3", "wrong_value"]] and not HAND["failed"]
    after = task.revise(after, "<answer>3*11</answer>")
    after = task.revise(after, "<answer>\x1b<think>3+</answer>")
    assert task.compact(after) == "R13|3,J,K=24 13+11*3#v 3*11#n 3+#s<think>"
    assert "You tried 3*11, which failed" in task.question(after)
    counts = Counter()
    for i in range(100):
        p = task.problem("train", 0, i)
        counts[len(p["failed"])] += 1
        for formula, verdict in p["failed"]:  # that the stream makes up
            assert verdict == tasks.points_verdict(formula, p["numbers"], p["target"]) != "correct"
    assert set(counts) == {0, 1, 2, 3, 4} and min(counts.values()) > 8


# --------------------------------------------------------------------------- knights, routes


def test_knights_have_one_solution_and_traces_find_it():
    task, kinds = tasks.KnightsAndKnaves(2, 5), Counter()
    for p in (task.problem("train", 0, i) for i in range(200)):
        assert len(tasks.solve_knights(p["statements"])) == 1
        assert task.score(task.trace(p, random.Random(0)), p)["total"] == 1.1
        kinds.update(statement[0] for statement in p["statements"])
    kinds["claim"] = kinds.pop("knight") + kinds.pop("knave")
    assert len(kinds) == 6 and max(kinds.values()) < 2.5 * min(kinds.values())


PUZZLE = {"statements": [["knave", 1], ["or", ["knight", 1], ["knave", 1]]]}  # A-B+
COUNTED = [["exactly", 1, ["knave", 0], ["knave", 1]], ["knight", 0]]
COUNTED += [["exactly", 2, ["knight", 0], ["knave", 1]]]
COUNTED = {"statements": COUNTED, "names": ["Ann", "Anna", "Bea"]}  # A-B-C-


@pytest.mark.parametrize(
    "problem, answer, right",
    [
        (PUZZLE, "B+, A-", True),
        (PUZZLE, "Ada is a knave and Ben is a knight.", True),
        (PUZZLE, "A-", False),
        (PUZZLE, "A-B+A-", False),
        (PUZZLE, "A-B+C+", False),
        (PUZZLE, "A-B+ or not", False),
        (PUZZLE, "Ada is not a knave, Ben is a knight", False),
        (COUNTED, "Bea: knave, Anna: knave and Ann: knave", True),
        (COUNTED, "Ann: knave; Ann: knave; Bea: knave", False),
        (COUNTED, "Ada: knave; Ben: knave; Cleo: knave", False),
    ],
)
def test_knights_answers(problem, answer, right):
    score = tasks.KnightsAndKnaves().score
    assert score(f"</think><answer>{answer}</answer>", problem)["correct"] == right


def test_knights_may_count_statements():
    assert tasks.solve_knights(COUNTED["statements"]) == [(0, 0, 0)]
    assert tasks.KnightsAndKnaves().compact(COUNTED) == "A:1(A-,B-);B:A+;C:2(A+,B-)?<think>"
    asked = tasks.KnightsAndKnaves().question(COUNTED)
    assert 'Ann says: "exactly 1 of these are true: Ann is a knave; Anna is a knave."' in asked


ROUTE = {"start": 350, "legs": [[10, 1, 0, 6], [190, 2, 3, 1]], "space": "relative"}


def test_navigation_routes():
    task = tasks.Navigation()
    assert task.trace(ROUTE, None) == "> fA6\n>> f. fD1\n</think><answer>> f >> f f !</answer>"
    actions = task.actions(ROUTE)
    for answer in (", ".join(actions), ">,f,>>,f,f,!"):
        assert task.score(f"</think><answer>{answer}</answer>", ROUTE)["correct"]
    wrong = "</think><answer>> f > f f !</answer>"
    for text in (wrong, "</think><answer>> >> f f f !</answer>"):
        assert not task.score(text, ROUTE)["correct"]
    assert task.describe(wrong, ROUTE)["right_actions"] == 5 / 6
    assert task.actions(ROUTE | {"space": "absolute"})[0] == "turn_direction(north)"
    task = tasks.Navigation(space="relative", basics=0.3)
    routes = [task.problem("train", 0, i) for i in range(200)]
    assert all(task.score(task.trace(p, random.Random(0)), p)["total"] == 1.1 for p in routes)
    easy = [p["space"] for p in routes if p["legs"][0][1] == 0]
    assert 40 < len(easy) < 80 and {*easy} == {"absolute", "relative"}
    assert all(task.problem("test", 0, i)["space"] == "relative" for i in range(50))


# -------------------------------------------------------------------------- chains of steps


@pytest.mark.parametrize("spec, most", [("affine", 90), ("s3", 75), ("affine:modulus=10", 90)])
def test_steps_lead_to_the_answer(spec, most):
    task, shares = make_task(spec), Counter()
    for problem in (task.problem("train", 0, i) for i in range(300)):
        steps, answer = task.steps(problem), task.answer(problem)
        left, right = zip(*(step.split("=") for step in steps), strict=True)
        assert right[-1] == answer and [a[0] for a in left[1:]] == list(right[:-1])
        assert left[0][0] == task.compact(problem)[0] and all(len(step) == 5 for step in steps)
        assert task.score("\n".join([*steps, answer]), problem)["correct"]
        assert not task.score(steps[-1], problem)["correct"]
        shares[answer] += 1
    assert max(shares.values()) < most  # what a guess gets right


def test_affine_chain_by_hand():
    problem = {"start": 6, "operations": ["*6", "+1", "*3"]}
    assert tasks.AffineChain().steps(problem) == ["6*6=1", "1+1=2", "2*3=6"]
    assert tasks.AffineChain(modulus=10).steps(problem) == ["6*6=6", "6+1=7", "7*3=1"]
    for text, right in [("### 1,080", 1), ("x\n#### 1080\n", 1), ("# 1080 #", 0), ("", 0)]:
        assert tasks.score_last_line(text, "1080")["correct"] == right


def test_s3_is_the_symmetric_group():
    pairs = [x + y for x, y in itertools.product("abcdef", repeat=2)]
    product = {pair: tasks.S3().products({"elements": pair})[1] for pair in pairs}
    for x, y, z in itertools.product("abcdef", repeat=3):
        assert product[product[x + y] + z] == product[x + product[y + z]]
        assert product["a" + x] == product[x + "a"] == x
    # b swaps the last two, c the first two: first b, then c takes 0 to 1, 1 to 2, 2 to 0
    assert tasks.PERMUTATIONS[1:4] == [(0, 2, 1), (1, 0, 2), (1, 2, 0)]
    assert product["bc"] == "d" != product["cb"]


def below(edges: list, root: str) -> dict[str, int]:
    """Distance from the root of every name that can be reached along the edges."""
    found, names = {root: 0}, [root]
    for name in names:  # it grows while it is read
        for child in (c for p, c in edges if p == name and c not in found):
            found[child] = found[name] + 1
            names.append(child)
    return found


def test_prosqa_has_the_statistics_of_the_released_data():
    """Means within 5 %, shares within .05 of the 300 released items; paths are the shortest."""
    real = vectors("latent")["prosqa_graphs"]["aggregate"]
    task, total, draws = tasks.ProsQA(), Counter(), 1500
    for i in range(draws):
        problem = task.problem("train", 0, i)
        edges, root, target, other = (problem[x] for x in ("edges", "root", "target", "other"))
        parents, children = {p for p, _ in edges}, {c for _, c in edges}
        reach = below(edges, root)
        assert not {target, other} & parents and other not in reach
        assert parents - children == (parents | children) & {*task.ENTITIES}
        total.update(nodes=len(parents | children), edges=len(edges))
        total.update(reachable_from_root=len(reach) - 1, swap=problem["swap"])
        total.update([f"path {reach[target]}", f"entities {len(parents - children)}"])
        [other_root] = {*problem["roots"]} - {root}
        total.update([f"other {below(edges, other_root)[other]}"])
        steps, answer = task.steps(problem), task.answer(problem)
        assert len(steps) == reach[target] >= 3 and steps[0].split()[0] == root == answer.split()[0]
        assert steps[-1].split()[-1] == answer.split()[-1] == target + "."
        assert all(step in task.question(problem) for step in steps)
    assert task.score("\n".join([*steps, "### " + answer]), problem)["correct"]
    assert not task.score(f"### {root} is a {other}.", problem)["correct"]
    for name in ("nodes", "edges", "reachable_from_root"):
        assert total[name] / draws == pytest.approx(real[name]["mean"], rel=0.05), name
    shares = {f"path {k}": share for k, share in real["shortest_path_hist"].items()}
    shares |= {f"other {k}": share for k, share in real["neg_target_depth_hist"].items()}
    shares |= {f"entities {k}": real["n_entities_hist"][k] for k in "23"} | {"swap": 0.5}
    for name, share in shares.items():
        assert total[name] / draws == pytest.approx(share, abs=0.05), name


# ------------------------------------------------------------------------- steps from a file

CHAIN = {"question": "2 and 3?", "steps": ["2+3=5", "5*2=10"], "answer": "10"}
PRONTO = {
    "question": "Each cat is small. Sam is a cat.",
    "query": "True or false: Sam is small.",
    "answer": "True",
    "chain_of_thought": ["Sam is a cat.", "Each cat is small.", "Sam is small."],
}
CHAIN_FILES = [
    json.dumps([CHAIN, CHAIN | {"answer": 10, "edges": [[0, 1]]}]),
    json.dumps(CHAIN) + "\n\n" + json.dumps(CHAIN),
    "2 and 3?||2+3=5 5*2=10 #### 10\n2 and 3?||2+3=5 5*2=10## 10\n",
]


def test_chain_files(tmp_path):
    path = tmp_path / "a"
    for text in CHAIN_FILES:
        path.write_text(text, encoding="utf-8-sig")
        assert tasks.read_chains(str(path)) == [CHAIN, CHAIN]
    path.write_text(json.dumps({"example1": {"test_example": PRONTO}}))
    [chain] = tasks.read_chains(str(path))
    assert chain["steps"] == ["Sam is a cat. Each cat is small.", "Sam is small."]
    assert chain["question"] == "Each cat is small. Sam is a cat. True or false: Sam is small."
    rows = [CHAIN | {"question": f"{i} and 3?"} for i in range(100)]
    data, test = write(tmp_path / "b", rows), write(tmp_path / "c", rows[:3])
    streams = make_task("chains", data).streams
    assert len(streams["train"]) + len(streams["test"]) == 100 > len(streams["train"]) > 80
    assert make_task(f"chains:test={test}", data).streams == {"train": rows, "test": rows[:3]}


@pytest.mark.parametrize(
    "text, words",
    [
        ("[]", "is empty"),
        (json.dumps([CHAIN, CHAIN | {"steps": "2+3=5"}]), 'item 2: "steps" must be a list of text'),
        (json.dumps({"e7": {"test_example": PRONTO | {"query": None}}}), 'e7: field "question"'),
        (json.dumps(CHAIN) + "\n{\n", "line 2: "),
        ("2?||1 #### 1\nx\n\ny\n2?||1 #### 1\nz\n", "line 2: field .*; 2 more such lines: 4, 6$"),
        ("[" * 100_000, "line 1: "),
    ],
)
def test_bad_chain_files(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=words) as error:
        make_task("chains", data=str(tmp_path / "a.json"))
    assert "a.json" in str(error.value) and "\n" not in str(error.value)


def test_notations_pay_for_the_first_one():
    """Tries in signs and in letters; the reward is the share of those in signs (R1)."""
    task, problem = tasks.Notations(consistency=0.5), {"numbers": [4, 4, 6], "target": 6}
    text = "4x6x4e24x4e96>6\nwait4*6/4=24/4=6=6\n</think><answer>4*6/4</answer>"
    expected = {"tries": 2, "distinct_tries": 2, "gave_up": False}
    assert task.describe(text, problem) == expected | {"first_notation": 0.5, "mixed": True}
    assert task.score(text, problem)["total"] == 1.1 + 0.25
    assert task.describe("1+2=3\n3-2=1\n", problem)["first_notation"] == 1
    lines = []
    for i in range(200):
        problem = task.problem("train", 0, i)
        lines += task.trace(problem, random.Random(i)).partition("</think>")[0].splitlines()
    worded = [line for line in lines if "e" in line]
    assert 0.4 < len(worded) / len(lines) < 0.6 and not any("=" in line for line in worded)
