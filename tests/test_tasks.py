"""Tasks of other files: how --task FILE.py:Class loads them, and those of more/tasks.py; what
holds for every task is in test_rewards.py, cases of the papers' code in test_vectors.py."""

import doctest
import itertools
import json
import random
import re

import pytest
from test_rewards import write

import rewards
from more import tasks, traces
from rewards import BadInput, make_task

MINE = """from __future__ import annotations
from dataclasses import dataclass, field
import rewards

@dataclass
class Knobs:
    data: str = ""
    count: int = 3
    share: float = 0.5
    loud: bool = True
    words: list[str] = field(default_factory=list)
    NATURAL = {"count": 9}

    def __post_init__(self):
        1 / (self.count - 7)

    def problem(self, split, seed, index):
        return {"split": split, "index": index}

    def compact(self, problem):
        return f"{problem['index']}<think>"

    def score(self, text, problem, **kw):
        return rewards.score(text, None, text == str(problem["index"]), **kw)
"""


def test_a_class_of_a_file_is_a_task(cwd):
    (cwd / "mine.py").write_text(MINE)
    task = make_task("./mine.py:Knobs:share=1e-1,loud=0", data="x.jsonl", natural=True)
    assert (task.data, task.count, task.share, task.loud) == ("x.jsonl", 9, 0.1, 0)
    assert rewards.heldout(task, 3) == [{"split": "test", "index": i} for i in range(3)]
    assert rewards.prompt(task, {"index": 4}, "compact") == "4<think>"
    assert task.score("4", {"index": 4})["correct"] and task.score("4", {})["total"] == 0
    with pytest.raises(BadInput, match="Knobs has no question prompt: give a tiny --model"):
        rewards.prompt(task, {"index": 4}, "chat")


BAD = {  # a task, words of the complaint
    "mine.py:A": r"no class 'A' with problem\(\)",
    "bad.py:A": "bad.py: SyntaxError .*line 2",
    "mine.py:Knobs:words=a": "'words=a'.* pool=int, data=str, count=int, share=float, loud=int",
    "mine.py:Knobs:count=7": "mine.py:Knobs: ZeroDivisionError",
    "knights:max_people=9": "allowed",
    "knights:kinds=nor": "kinds are some of",
    "chains": "--data",
}


@pytest.mark.parametrize("spec", BAD)
def test_what_is_wrong_with_a_task_is_one_line(spec, cwd):
    (cwd / "mine.py").write_text(MINE)
    (cwd / "bad.py").write_text("class A:\n    def f(:\n")
    with pytest.raises(BadInput, match=BAD[spec]) as error:
        make_task(spec)
    assert "\n" not in str(error.value)


def test_docstring_examples():
    assert doctest.testmod(tasks).failed == doctest.testmod(traces).failed == 0


HAND = {"kind": "solve", "rule": 13, "cards": ["3", "J", "K"], "numbers": [3, 11, 13]}
HAND |= {"target": 24, "failed": []}


def test_generalpoints_hands_and_traces():
    """Traces read the hand, then find the target where integers up to 99 lead to it."""
    task, kinds, misses = tasks.GeneralPoints(rule=13, faces=1, basics=0.5), set(), 0
    for p in (task.problem("train", 0, i) for i in range(100)):
        trace = task.trace(p, random.Random(0))
        kinds.add(p["kind"])
        values = [min(p["rule"], tasks.RANKS[card]) for card in p["cards"]]
        assert p["numbers"] == values and any(card in "JQK" for card in p["cards"])
        assert p["kind"] == "plain" or trace.startswith(",".join(map(str, values)) + "\n")
        assert p["kind"] == "read" or tasks.solve_countdown(values, p["target"])
        misses += not task.score(trace, p)["correct"]
    assert misses < 6 and kinds == {"solve", "read", "plain"}


BAD_TOYS = "f(x)=", "f(w)=1", "f(x)=y", "f(x)=(x+1", "f(x)=(x^2)", "f(x)=(x1)", "f(x)=min(x)", "x"
BAD_TOYS += "f(x)=min(x,1,2)", "f(x)=01", "f(x)=x\n", "f(x)=neg x", "f(x)=" + 13 * "neg(" + "x" + 13 * ")"
BAD_TOYS += "f(x)=(x + 1)", f"f(x)=({'9' * 60}+x)", "", "f(x)=(x-1)(x)", "f(x)=\u0661"


def test_toy_programs_that_are_none_and_how_deep_they_go():
    assert [p for p in BAD_TOYS if tasks.run_toy(p, [1]) != ("error", "syntax")] == []
    assert tasks.run_toy(f"f(x)={11 * 'neg('}x{11 * ')'}", [3]) == ("ok", -3)  # 12 levels
    assert tasks.run_toy("f(x)=(((99*99)*99)+((99*99)*3))", [0]) == ("ok", 970299 + 29403)
    assert tasks.run_toy("f(x,y,z)=if(eq(x,y),(x/0),z)", [1, 2, 7]) == ("ok", 7)


def test_toycode_problems_and_traces():
    """At least five hidden tests, not all alike; a trace checks its program on what is shown."""
    task, right, shares, rng = make_task("toycode"), [], set(), random.Random(0)
    for p in (task.problem("train", 0, i) for i in range(300)):
        assert len(p["shown"]) == 3 and len(p["tests"]) >= 5
        assert len({y for _, y in p["shown"] + p["tests"]}) > 1
        assert not {x for [x], _ in p["shown"]} & {x for [x], _ in p["tests"]}
        assert all(task.passed(p["program"], p["shown"] + p["tests"]))
        text = task.trace(p, rng)
        parts, lines = task.score(text, p), text.partition("</think>")[0].splitlines()
        right.append(parts["correct"])
        shares.add(parts["passed"] / parts["tests"])
        assert parts["format"] and lines[-1].startswith(parts["answer"] + ";")
        assert (parts["shown"] == 3) == (lines[-1][-1] == "+") and parts["shown"] > 0
        assert all(line[-1] == "-" for line in lines[:-1])
        seen, other = task.describe(text, p), task.describe(text.replace("+\n", "-\n"), p)
        assert seen["tries"] == len(lines) and seen["mark_true"]
        assert other["mark_true"] == (parts["shown"] < 3)
    assert 0.6 < sum(right) / 300 < 0.8 and len(shares) > 5


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
    for p in (task.problem("train", 0, i) for i in range(100)):
        for formula, verdict in p["failed"]:  # that the stream makes up
            assert verdict == tasks.points_verdict(formula, p["numbers"], p["target"]) != "correct"


def test_multiplication_is_worked_out_or_answered_at_once():
    task, thoughts = tasks.Multiplication(max_digits=3, at_once=0.5), []
    for i in range(100):
        problem = task.problem("train", 0, i)
        text = task.trace(problem, random.Random(i))
        thoughts.append(text.partition("</think>")[0])
        assert task.score(text, problem)["correct"]
        for line in filter(None, thoughts[-1].split("\n")):
            x, sign, y, result = re.fullmatch(r"(\d+)([*+])(\d+)=(\d+)", line).groups()
            assert int(result) == tasks.ARITHMETIC[sign](int(x), int(y))
    assert 30 < thoughts.count("") < 70
    assert tasks.Multiplication().trace({"a": 37, "b": 405}, random.Random(0)) == (
        "37*400=14800\n37*5=185\n14800+185=14985</think><answer>14985</answer>"
    )


def test_knights_have_one_solution_and_traces_find_it():
    task = tasks.KnightsAndKnaves(2, 5)
    for p in (task.problem("train", 0, i) for i in range(200)):
        assert len(tasks.solve_knights(p["statements"])) == 1
        assert task.score(task.trace(p, random.Random(0)), p)["total"] == 1.1


def test_a_line_of_checks_copies_and_judges_every_statement_up_to_a_contradiction():
    task = tasks.KnightsAndKnaves(2, 4, check=True, kinds="claim/not/and/implies")
    for p in (task.problem("train", 0, i) for i in range(60)):
        trace, prompt = task.trace(p, None), task.compact(p).removesuffix("?<think>")
        assert task.score(trace, p)["total"] == 1.1 and "|" not in prompt
        *failed, last = lines = trace.partition("\n</think>")[0].split("\n")
        assert all(line.endswith("!") for line in failed) and "!" not in last
        worlds = [re.match("[A-Da-d]+", line)[0] for line in lines]
        assert worlds == sorted(worlds) and worlds[0].isupper()  # all knights first
        said = re.findall("[1-4][^1-4]+", prompt)  # each person's statement
        whole = task.checked(p["statements"], [0] * len(said), stop=False)  # past a contradiction
        assert len(re.findall("[1-4]", whole)) == len(said) and "!" not in whole
        for world, line in zip(worlds, lines, strict=True):
            checked = re.findall("[1-4][^1-4!]+", line)
            assert [re.sub("[-+]|=[-+]$", "", s) for s in checked] == said[: len(checked)]
            for claim, value in re.findall("([A-Da-d])([-+])", line):
                assert (value == "+") == (claim in world)


PUZZLE = {"statements": [["knave", 1], ["or", ["knight", 1], ["knave", 1]]]}  # A-B+
COUNTED = [["exactly", 1, ["knave", 0], ["knave", 1]], ["knight", 0]]
COUNTED += [["exactly", 2, ["knight", 0], ["knave", 1]]]
COUNTED = {"statements": COUNTED, "names": ["Ann", "Anna", "Bea"]}  # A-B-C-


ANSWERS = [  # right ones, wrong ones
    (PUZZLE, ["B+, A-", "Ada is a knave and Ben is a knight."]),
    (PUZZLE, ["A-", "A-B+A-", "A-B+ or not", "Ada is not a knave, Ben is a knight"]),
    (COUNTED, ["Bea: knave, Anna: knave and Ann: knave"]),
    (COUNTED, ["Ann: knave; Ann: knave; Bea: knave", "Ada: knave; Ben: knave; Cleo: knave"]),
]


def test_knights_answers():
    for i, (problem, answers) in enumerate(ANSWERS):
        for answer in answers:
            parts = tasks.KnightsAndKnaves().score(f"</think><answer>{answer}</answer>", problem)
            assert parts["correct"] == (i % 2 == 0), answer
    assert tasks.solve_knights(COUNTED["statements"]) == [(0, 0, 0)]
    assert tasks.KnightsAndKnaves().compact(COUNTED) == "A:1(A-,B-);B:A+;C:2(A+,B-)?<think>"


ROUTE = {"start": 350, "legs": [[10, 1, 0, 6], [190, 2, 3, 1]], "space": "relative"}


def test_navigation_routes():
    task = tasks.Navigation()
    assert task.trace(ROUTE, None) == "> fA6\n>> f. fD1\n</think><answer>> f >> f f !</answer>"
    for answer in (", ".join(task.actions(ROUTE)), ">,f,>>,f,f,!"):
        assert task.score(f"</think><answer>{answer}</answer>", ROUTE)["correct"]
    assert task.describe("</think><answer>> f > f f !</answer>", ROUTE)["right_actions"] == 5 / 6
    assert task.actions(ROUTE | {"space": "absolute"})[0] == "turn_direction(north)"
    task = tasks.Navigation(space="relative", basics=0.3)
    routes = [task.problem("train", 0, i) for i in range(200)]
    assert all(task.score(task.trace(p, random.Random(0)), p)["total"] == 1.1 for p in routes)


@pytest.mark.parametrize("spec", ["affine", "s3", "affine:modulus=10"])
def test_steps_lead_to_the_answer(spec):
    task = make_task(spec)
    for problem in (task.problem("train", 0, i) for i in range(300)):
        steps, answer = task.steps(problem), task.answer(problem)
        left, right = zip(*(step.split("=") for step in steps), strict=True)
        assert right[-1] == answer and [a[0] for a in left[1:]] == list(right[:-1])
        assert left[0][0] == task.compact(problem)[0] and all(len(step) == 5 for step in steps)
        assert task.score("\n".join([*steps, answer]), problem)["correct"]
        assert not task.score(steps[-1], problem)["correct"]


def test_affine_chain_by_hand():
    problem = {"start": 6, "operations": ["*6", "+1", "*3"]}
    assert tasks.AffineChain().steps(problem) == ["6*6=1", "1+1=2", "2*3=6"]
    assert tasks.AffineChain().trace(problem, None) == "\n6*6=1\n1+1=2\n2*3=6\n6"
    assert tasks.AffineChain(modulus=10).steps(problem) == ["6*6=6", "6+1=7", "7*3=1"]
    for text, right in [("### 1,080", 1), ("x\n#### 1080\n", 1), ("# 1080 #", 0), ("", 0)]:
        assert tasks.score_last_line(text, "1080")["correct"] == right


def test_resolve_by_hand_and_what_it_does_not_need():
    lines = [["e", "b"], ["d", "1"], ["a", "3"], ["b", "a"], ["c", "a"]]
    task, problem = make_task("resolve"), {"lines": lines, "asked": "e"}
    assert (task.plan(problem), task.steps(problem)) == ("a b e", ["3", "0", "0"])
    assert task.compact(problem) == "eb;d1;a3;ba;ca?e"
    assert task.question(problem).startswith("e = b * 2, d = 1, a = 3, b = a + 2, c = a + 3, all")
    for p in (task.problem("train", 0, i) for i in range(200)):
        names = task.plan(p).split()
        [spare] = [source for name, source in p["lines"] if name not in names]
        assert (spare.isdigit() or spare in names) and len(p["lines"]) == len(names) + 1
        assert task.score("\n".join([*task.steps(p), task.answer(p)]), p)["correct"]


def test_s3_is_the_symmetric_group():
    pairs = [x + y for x, y in itertools.product("abcdef", repeat=2)]
    product = {pair: tasks.S3().products({"elements": pair})[1] for pair in pairs}
    for x, y, z in itertools.product("abcdef", repeat=3):
        assert product[product[x + y] + z] == product[x + product[y + z]]
        assert product["a" + x] == product[x + "a"] == x
    # b swaps the last two, c the first two
    assert tasks.PERMUTATIONS[1:4] == [(0, 2, 1), (1, 0, 2), (1, 2, 0)]
    assert product["bc"] == "d" != product["cb"]


CHAIN = {"question": "2 and 3?", "steps": ["2+3=5", "5*2=10"], "answer": "10"}


def test_chain_files(tmp_path):
    for text in (
        json.dumps([CHAIN, CHAIN | {"answer": 10, "edges": [[0, 1]]}]),
        "2 and 3?||2+3=5 5*2=10 #### 10\n2 and 3?||2+3=5 5*2=10## 10\n",
    ):
        (tmp_path / "a").write_text(text, encoding="utf-8-sig")
        assert tasks.read_chains(str(tmp_path / "a")) == [CHAIN, CHAIN]
    rows = [CHAIN | {"question": f"{i} and 3?"} for i in range(100)]
    data, test = write(tmp_path / "b", rows), write(tmp_path / "c", rows[:3])
    assert make_task(f"chains:test={test}", data).streams == {"train": rows, "test": rows[:3]}
    bad = write(tmp_path / "d", [CHAIN, CHAIN | {"steps": "2+3=5"}])
    with pytest.raises(BadInput, match='line 2: "steps" must be a list of text'):
        make_task("chains", bad)
    bad = write(tmp_path / "e", [CHAIN | {"plan": plan} for plan in ("add, double", "p", "q", " ")])
    with pytest.raises(BadInput, match="e, line 4: plan is missing or empty"):
        make_task("plans", bad)
    assert tasks.read_chains(bad)[0] == CHAIN


def test_notations_pay_for_the_first_one():
    """Tries in signs and in letters; the reward is the share of those in signs (R1)."""
    task, problem = tasks.Notations(consistency=0.5), {"numbers": [4, 4, 6], "target": 6}
    text = "4x6x4e24x4e96>6\nwait4*6/4=24/4=6=6\n</think><answer>4*6/4</answer>"
    expected = {"tries": 2, "distinct_tries": 2, "gave_up": False}
    assert task.describe(text, problem) == expected | {"first_notation": 0.5, "mixed": True}
    assert task.score(text, problem)["total"] == 1.1 + 0.25
    lines = []
    for i in range(200):
        problem = task.problem("train", 0, i)
        lines += task.trace(problem, random.Random(i)).partition("</think>")[0].splitlines()
    worded = [line for line in lines if "e" in line]
    assert 0.4 < len(worded) / len(lines) < 0.6 and not any("=" in line for line in worded)


def test_prosqa_asks_for_a_shortest_path():
    task = tasks.ProsQA()
    for problem in (task.problem("train", 0, i) for i in range(300)):
        root, target, other = (problem[name] for name in ("root", "target", "other"))
        steps, answer, reach = task.steps(problem), task.answer(problem), [{root}]
        while target not in reach[-1]:
            reach.append({child for parent, child in problem["edges"] if parent in reach[-1]})
        assert len(steps) == len(reach) - 1 >= 3 and not any(other in names for names in reach)
        assert steps[0].split()[0] == root and steps[-1].endswith(f"is a {target}.")
        assert all(step in task.question(problem) for step in steps)
    assert task.score("\n".join([*steps, "### " + answer]), problem)["correct"]
    assert not task.score(f"### {root} is a {other}.", problem)["correct"]
