"""Tasks of other files: how --task FILE.py:Class loads them, and those of more/tasks.py.

What holds for every task (streams, hostile answers, random text) is in test_rewards.py.
"""

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
from test_rewards import write  # noqa: E402

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

    def trace(self, problem, rng):
        return "</think>1"
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

    def problem(self): ...
    score = problem
"""


@pytest.fixture
def mine(cwd):
    """Write mine.py into the working folder."""
    return (cwd / "mine.py").write_text


def test_a_plain_class_is_a_task(mine):
    """No knobs but pool, no key and no describe; the verifier is guarded."""
    mine(PLAIN)
    task = make_task("mine.py:Plain", natural=True)
    assert rewards.heldout(task, 3) == [{"split": "test", "index": i} for i in range(3)]
    assert rewards.prompt(task, {"index": 4}, "compact") == "4<think>"
    assert task.score("4", {"index": 4})["correct"] and task.score("4", {})["total"] == 0
    with pytest.raises(BadInput, match="Plain has no question prompt: give a tiny --model"):
        rewards.prompt(task, {"index": 4}, "chat")
    with pytest.raises(BadInput, match="Plain: 'data=x.jsonl' is none of its knobs, pool=int"):
        make_task("mine.py:Plain", data="x.jsonl")


def test_knobs_of_a_dataclass(mine):
    mine(KNOBS)
    task = make_task("mine.py:Knobs:share=1e-1,loud=0", data="x.jsonl", natural=True)
    assert (task.data, task.count, task.share, task.loud) == ("x.jsonl", 9, 0.1, 0)
    assert make_task("./mine.py:Knobs").count == 3


def test_files_are_found_from_other_folders(mine, cwd, monkeypatch):
    """A path counts from the working folder, then from the one of rewards.py; or it is absolute."""
    mine(PLAIN)
    assert make_task("more/tasks.py:S3:elements=9").elements == 9
    (cwd / "more").mkdir()
    (cwd / "more" / "tasks.py").write_text(PLAIN)
    with pytest.raises(BadInput, match="more/tasks.py has no class 'S3'"):
        make_task("more/tasks.py:S3")
    monkeypatch.chdir(cwd / "more")
    for path in ("../mine.py", cwd / "mine.py"):
        assert type(make_task(f"{path}:Plain")).__name__ == "Plain"


BAD_FILES = [  # what follows mine.py in the spec, what stands in it, words of the complaint
    ("", PLAIN, "mine.py has no class ''"),
    (":Plane:a=1", PLAIN, "mine.py has no class 'Plane'"),
    (":f", "def f(): ...", "mine.py has no class 'f'"),
    (":A", "class A:\n    def score(self): ...", r"no class 'A' with problem\(\)"),
    (":A", "class A:\n    def problem(self): ...", r"no class 'A'.* and score\(\)"),
    (":A", "class A:\n    def f(:\n", "mine.py: SyntaxError .*line 2"),
    (":A", "\0", "mine.py: "),
    (":A", "1 / 0", "mine.py: ZeroDivisionError division by zero"),
    (":A", "raise SystemExit(3)", "mine.py: SystemExit 3"),
    (":A", "raise KeyError('a\\nb')", "mine.py: KeyError"),
    (":Plain:size=3", PLAIN, "mine.py:Plain: 'size=3' is none of its knobs, pool=int"),
    (":Plain:pool=-1", PLAIN, "pool=-1"),
    (":Knobs:words=a", KNOBS, "'words=a'.* data=str, count=int, share=float, loud=int"),
    (":Knobs:share=nan", KNOBS, "'share=nan'"),
    (":Knobs:count=7", KNOBS, "mine.py:Knobs: ZeroDivisionError seven"),
    (":Knobs", KNOBS.replace("@dataclass", "@dataclass(frozen=True)"), "mine.py:Knobs: .*assign"),
]


@pytest.mark.parametrize("rest, text, words", BAD_FILES)
def test_what_is_wrong_with_a_file_is_one_line(rest, text, words, mine):
    mine(text)
    with pytest.raises(BadInput, match=words) as error:
        make_task("mine.py" + rest)
    assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match="yours.py: .*No such file"):
        make_task("yours.py:Plain")


@pytest.mark.parametrize("script", ["grpo", "sft"])
def test_a_script_runs_it(run, cwd, script, mine):
    """The run folder is named after the class; a class that fails is one line."""
    mine(PLAIN)
    done = run(script, "--task mine.py:Plain --steps 1")
    (folder,) = (cwd / "out").iterdir()
    assert done.code == 0 and folder.name.startswith(f"{script}-Plain-0-")
    assert run(script, f"--resume {folder} --eval_problems 1").code == 0
    mine("1 +")
    done = run(script, "--task mine.py:Plain")
    assert done.code == 2 and done.err.count("\n") == 1 and "mine.py" in done.err


def test_a_copy_without_more_says_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "more", None)
    assert make_task("countdown").problem("train", 0, 0)
    with pytest.raises(BadInput, match="more/tasks.py"):
        make_task("s3")


# ----------------------------------------------------------- more/tasks.py: countdown, cards


def test_doctests():
    result = doctest.testmod(tasks)
    assert result.attempted >= 10 and result.failed == 0


@pytest.mark.parametrize("name", [n for n, kind in rewards.TASKS.items() if isinstance(kind, str)])
def test_short_names(name, cwd):
    """A short name is the class of more/tasks.py, also where a file of that name stands."""
    (cwd / "more").mkdir()
    (cwd / "more" / "tasks.py").write_text("1 / 0")
    rows = [{"question": f"{i}?", "steps": ["1"], "answer": "1"} for i in range(50)]
    data = write(cwd / "a.jsonl", rows) if name == "chains" else ""
    task = make_task(f"{name}:pool=3", data)
    assert type(task) is getattr(tasks, rewards.TASKS[name])
    assert task.problem("train", 1, 5) == make_task(name, data).problem("train", 1, 2)
    with pytest.raises(BadInput, match=f"task {name}: 'size=3' is none of its knobs, pool=int"):
        make_task(f"{name}:size=3", data)


BAD_KNOBS = "generalpoints:cards=5 generalpoints:rule=11 generalpoints:turns=6 knights:max_people=9 "
BAD_KNOBS += "navigation:space=up navigation:min_legs=0 multiplication:max_digits=19 s3:elements=1 "
BAD_KNOBS += "multiplication:min_digits=3 affine:modulus=11 prosqa:nodes=5 prosqa:nodes=37 chains"


@pytest.mark.parametrize("spec", BAD_KNOBS.split())
def test_bad_knobs(spec):
    with pytest.raises(BadInput, match="allowed|absolute or relative| to 1|digits|elements|--data"):
        make_task(spec)


def test_countdown_attempts_are_all_ways_in_range_step_by_step():
    assert list(tasks.operations("2+3*4")) == [("3*4", "2+12"), ("2+12", "14")]
    assert [left for _, left in tasks.operations("2*3+12*3")] == ["6+12*3", "6+36", "42"]
    assert [left for _, left in tasks.operations("9-4+2")] == ["5+2", "7"]
    assert tasks.countdown_attempts((2, 3), "*", 5) == []  # 6 is above the limit
    attempts = tasks.countdown_attempts((2, 3, 4), "+-*/", 99)
    assert (3, "3-2", "4-(3-2)=4-1=3") in attempts and (6, "4/2", "4/2*3=2*3=6") in attempts
    chains = [chain for _, _, chain in tasks.countdown_attempts((5, 10, 10), "+-*/", 99)]
    assert not any("10*10" in chain for chain in chains)
    for numbers in ((2, 3, 4), (1, 1, 5, 10)):
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


@pytest.mark.parametrize("knobs", ["", ":rule=13,faces=1", ":cards=4,target=24"])
def test_generalpoints_hands_are_solvable(knobs):
    task = make_task("generalpoints" + knobs)
    for i in range(20):
        p = task.problem("train", 1, i)
        values = [min(task.rule, tasks.RANKS[card]) for card in p["cards"]]
        assert p["numbers"] == values and len(values) == task.cards
        assert sum(card in "JQK" for card in p["cards"]) >= task.faces
        assert task.target in (0, p["target"])
        assert tasks.solve_countdown(p["numbers"], p["target"])


def test_generalpoints_traces_are_right_after_the_values():
    task, kinds, misses = tasks.GeneralPoints(basics=0.5), Counter(), 0
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
    assert task.compact(read) == "R13|3,J,K?<think>"
    assert not task.score("</think><answer>3,10,10</answer>", read)["correct"]


def test_generalpoints_failed_attempts_stand_in_the_prompt():
    task = tasks.GeneralPoints(rule=13, turns=5)
    assert task.compact(HAND) == "R13|3,J,K=24<think>" and "K as 13" in task.question(HAND)
    after = task.revise(HAND, '</think><answer>{"formula": "13+11*3"}</answer>')
    assert after["failed"] == [["13+11*3", "wrong_value"]] and not HAND["failed"]
    after = task.revise(task.revise(after, "<answer>3*11</answer>"), "<answer>\x1b<think>3+</answer>")
    assert task.compact(after) == "R13|3,J,K=24 13+11*3#v 3*11#n 3+#s<think>"
    assert "You tried 3*11, which failed" in task.question(after)
    counts = Counter()
    for i in range(100):
        p = task.problem("train", 0, i)
        counts[len(p["failed"])] += 1
        for formula, verdict in p["failed"]:  # that the stream makes up
            assert verdict == tasks.points_verdict(formula, p["numbers"], p["target"]) != "correct"
    assert set(counts) == {0, 1, 2, 3, 4} and min(counts.values()) > 8


def test_generalpoints_reads_broken_json():
    for answer, formula, verdict in [
        ('{"formula": "(13-11)*3"} {"formula": "13+11*3"}', "(13-11)*3", "wrong_value"),
        ('{"formula": "13+11*0\\n"}', "13+11*0\n", "wrong_numbers"),
        ('{"formula": "13+11*3\n"}', "13+11*3\n", "wrong_value"),
        ('{"formula": "13\\/11\\/3"}', "13/11/3", "wrong_value"),
        ('{"formula": 24.0}', "24.0", "illegal"),
        ('{"formula": 007}', "007", "illegal"),
        ('{"formula": "\\x"}', "\\x", "illegal"),
        ('{"formula": "13+', None, "illegal"),
    ]:
        assert tasks.points_formula(answer) == formula
        parts = tasks.GeneralPoints().score(f"</think><answer>{answer}</answer>", HAND)
        assert parts["verdict"] == verdict


def test_generalpoints_episode_ends():
    """The sixth answer is not looked at; neither it nor a right one opens another turn."""
    task, problem = tasks.GeneralPoints(rule=13), HAND | {"target": 46}
    right, wrong = "</think><answer>13+11*3</answer>", "</think><answer>13+11+3</answer>"
    assert task.revise(problem, right) == problem
    for _ in range(5):
        problem = task.revise(problem, wrong)
    assert task.compact(problem).count("#v") == task.question(problem).count("which failed") == 5
    assert task.revise(problem, wrong) == problem
    parts = task.score(right, problem)
    assert parts["verdict"] == "limit" and not parts["correct"]


# --------------------------------------------------------------------------- knights, routes

PUZZLE = {"statements": [["knave", 1], ["or", ["knight", 1], ["knave", 1]]]}  # A-B+


def test_knights_have_one_solution_and_traces_find_it():
    task, kinds = tasks.KnightsAndKnaves(2, 5), Counter()
    for p in (task.problem("train", 0, i) for i in range(200)):
        assert len(tasks.solve_knights(p["statements"])) == 1
        assert task.score(task.trace(p, random.Random(0)), p)["total"] == 1.1
        kinds.update(statement[0] for statement in p["statements"])
    kinds["claim"] = kinds.pop("knight") + kinds.pop("knave")
    assert len(kinds) == 6 and max(kinds.values()) < 2.5 * min(kinds.values())


NAMED = ["Ann", "Anna", "Bea"]
COUNTED = [["exactly", 1, ["knave", 0], ["knave", 1]], ["knight", 0]]
COUNTED = {"statements": [*COUNTED, ["exactly", 2, ["knight", 0], ["knave", 1]]], "names": NAMED}


@pytest.mark.parametrize(
    "problem, answer, right",
    [
        (PUZZLE, "B+, A-", True),
        (PUZZLE, "Ada: knave; Ben: knight", True),
        (PUZZLE, "Ada is a knave and Ben is a knight.", True),
        (PUZZLE, "A-", False),
        (PUZZLE, "A-B+A-", False),
        (PUZZLE, "A-B+C+", False),
        (PUZZLE, "Ada is not a knave, Ben is a knight", False),
        (COUNTED, "Bea is a knave, Anna is a knave and Ann is a knave", True),
        (COUNTED, "Ann: knave; Ann: knave; Bea: knave", False),
        (COUNTED, "Ada: knave; Ben: knave; Cleo: knave", False),
    ],
)
def test_knights_answers(problem, answer, right):
    score = tasks.KnightsAndKnaves().score
    assert score(f"</think><answer>{answer}</answer>", problem)["correct"] == right


def test_knights_count_statements_and_have_names_of_their_own():
    """Kleene's logic: how many of k, l and m are true once one, two or three roles are known."""
    claims = [["knight", 0], ["knight", 1], ["knave", 2]]
    for roles, expected in [
        ([], [0.5, 0.5, 0.5, 0.5]),
        ([1], [0, 0.5, 0.5, 0.5]),
        ([1, 0], [0, 0.5, 0.5, 0]),
        ([1, 0, 0], [0, 0, 1, 0]),
    ]:
        assert [tasks.truth(["exactly", k, *claims], roles) for k in range(4)] == expected
    task = tasks.KnightsAndKnaves()
    assert tasks.solve_knights(COUNTED["statements"]) == [(0, 0, 0)]
    assert task.compact(COUNTED) == "A:1(A-,B-);B:A+;C:2(A+,B-)?<think>"
    asked = task.question(COUNTED)
    assert "3 people: Ann, Anna, Bea." in asked and 'Anna says: "Ann is a knight."' in asked
    assert 'Ann says: "exactly 1 of these are true: Ann is a knave; Anna is a knave."' in asked
    assert "Ann: knight; Anna: knave</answer>" in asked and "Ada" in task.question(PUZZLE)


ROUTE = {"start": 350, "legs": [[10, 1, 0, 6], [190, 2, 3, 1]], "space": "relative"}


def test_navigation_routes():
    task = tasks.Navigation()
    assert task.compact(ROUTE) == "R>n A6;>>s D1|A6.D1<think>"
    assert task.trace(ROUTE, None) == "> fA6\n>> f. fD1\n</think><answer>> f >> f f !</answer>"
    actions = task.actions(ROUTE)
    assert actions[:3] == ["turn_direction(slightly right)", "forward()", "turn_direction(right)"]
    for answer in (", ".join(actions), ">,f,>>,f,f,!"):
        assert task.score(f"</think><answer>{answer}</answer>", ROUTE)["correct"]
    wrong = "</think><answer>> f > f f !</answer>"
    assert not task.score(wrong, ROUTE)["correct"]
    assert task.describe(wrong, ROUTE)["right_actions"] == 5 / 6
    assert task.actions(ROUTE | {"space": "absolute"})[0] == "turn_direction(north)"
    asked = task.question(ROUTE)
    assert "turn slightly right to face north" in asked and "Alder Inn is ahead" not in asked
    assert "the next intersection, where Alder Inn is left" in asked and "right. Think" in asked
    task = tasks.Navigation(space="relative", basics=0.3)
    routes = [task.problem("train", 0, i) for i in range(200)]
    assert all(task.score(task.trace(p, random.Random(0)), p)["total"] == 1.1 for p in routes)
    easy = [p["space"] for p in routes if p["legs"][0][1] == 0]
    assert 40 < len(easy) < 80 and {*easy} == {"absolute", "relative"}
    assert all(task.problem("test", 0, i)["space"] == "relative" for i in range(50))


# -------------------------------------------------------------------------- chains of steps


@pytest.mark.parametrize("spec", ["affine", "s3", "affine:length=5,modulus=10", "s3:elements=10"])
def test_steps_lead_to_the_answer(spec):
    task, shares = make_task(spec), Counter()
    for problem in (task.problem("train", 0, i) for i in range(300)):
        steps, answer = task.steps(problem), task.answer(problem)
        left, right = zip(*(step.split("=") for step in steps), strict=True)
        assert right[-1] == answer and [a[0] for a in left[1:]] == list(right[:-1])
        assert left[0][0] == task.compact(problem)[0] and all(len(step) == 5 for step in steps)
        assert task.score("\n".join([*steps, answer]), problem)["correct"]
        assert not task.score(steps[-1], problem)["correct"]
        shares[answer] += 1
    if spec[0] == "s3":
        assert len(shares) == 6 and max(shares.values()) < 75  # none is much likelier than another
    elif spec == "affine":
        assert len(shares) == 7 and 60 < shares["0"] < 90  # what a guess gets right


def test_affine_chain_by_hand():
    task, problem = tasks.AffineChain(), {"start": 6, "operations": ["*6", "+1", "*3"]}
    assert task.compact(problem) == "6*6+1*3" and task.answer(problem) == "6"
    assert task.steps(problem) == ["6*6=1", "1+1=2", "2*3=6"]
    assert "6 and apply *6, then +1, then *3, each time modulo 7" in task.question(problem)


def test_s3_is_the_symmetric_group():
    pairs = [x + y for x, y in itertools.product("abcdef", repeat=2)]
    product = {pair: tasks.S3().products({"elements": pair})[1] for pair in pairs}
    for x, y, z in itertools.product("abcdef", repeat=3):
        assert product[product[x + y] + z] == product[x + product[y + z]]
    for x in "abcdef":
        assert product["a" + x] == product[x + "a"] == x
        assert {product[x + y] for y in "abcdef"} == set("abcdef")
    # b swaps the last two, c the first two: first b, then c takes 0 to 1, 1 to 2, 2 to 0
    assert tasks.PERMUTATIONS[1:4] == [(0, 2, 1), (1, 0, 2), (1, 2, 0)]
    assert product["bc"] == "d" != product["cb"]


def test_score_last_line():
    for text, right in [("### 1,080", 1), ("x\n#### 1080\n", 1), ("# 1080 #", 0), ("", 0)]:
        assert tasks.score_last_line(text, "1080")["correct"] == right


def below(edges: list, root: str) -> dict[str, int]:
    """Distance from the root of every name that can be reached along the edges."""
    found, names = {root: 0}, [root]
    for name in names:  # it grows while it is read
        for child in (c for p, c in edges if p == name and c not in found):
            found[child] = found[name] + 1
            names.append(child)
    return found


def count_graph(problem: dict, labels: list[int]) -> Counter:
    """What the vectors count in one graph."""
    edges, root = problem["edges"], problem["root"]
    nodes, children = {x for edge in edges for x in edge}, {c for _, c in edges}
    reach, parents = below(edges, root), {p for p, _ in edges}
    [other_root] = {*problem["roots"]} - {root}
    depth = below(edges, other_root)[problem["other"]]
    assert problem["target"] not in parents and problem["other"] not in {*parents, *reach}
    assert nodes - children == nodes & {*tasks.ProsQA.ENTITIES}
    deepest = max(reach[n] for n in reach if n not in parents)
    count = Counter(nodes=len(nodes), edges=len(edges), reachable_from_root=len(reach) - 1)
    count["root_out_degree"] = sum(parent == root for parent, _ in edges)
    count[f"path {reach[problem['target']]}"] += 1
    count[f"other {depth}"] += 1
    count[f"entities {len(nodes - children)}"] += 1
    count["root 1"] += root == problem["roots"][1]
    count["deepest"] += reach[problem["target"]] == deepest
    count["swap"] += problem["swap"]
    return count + Counter(f"family {label}" for label in labels)


def test_prosqa_has_the_statistics_of_the_released_data():
    """Means within 5 %, shares within .05 of the 300 released items, over 2,000 draws."""
    path = Path(__file__).parent / "vectors" / "latent.json"
    real = json.loads(path.read_text(encoding="utf-8"))["prosqa_graphs"]["aggregate"]
    task, rng, total, draws = tasks.ProsQA(), random.Random(0), Counter(), 0
    while draws < 2000:
        graph = task.graph(rng)
        problem = task.dress(graph, rng)
        if problem:
            used = {i for pair in enumerate(graph["parents"]) if pair[1] for i in (pair[0], *pair[1])}
            total += count_graph(problem, [graph["labels"][i] for i in used])
            draws += 1
    means = {name: real[name]["mean"] for name in ("nodes", "edges", "reachable_from_root")}
    means["root_out_degree"] = real["root_out_degree"]["mean"]
    means["family 1"] = real["mean_family_counts"]["only_root0"]
    means["family 2"] = real["mean_family_counts"]["only_root1"]
    for name, mean in means.items():
        assert total[name] / draws == pytest.approx(mean, rel=0.05), name
    shares = {f"path {k}": share for k, share in real["shortest_path_hist"].items()}
    shares |= {f"other {k}": share for k, share in real["neg_target_depth_hist"].items()}
    shares |= {f"entities {k}": real["n_entities_hist"][k] for k in "23"}
    shares |= {"root 1": real["root_index_hist"]["1"], "swap": 0.5}
    shares["deepest"] = real["frac_target_at_max_leaf_depth"]
    for name, share in shares.items():
        assert total[name] / draws == pytest.approx(share, abs=0.05), name


def test_prosqa_steps_are_a_shortest_path_of_premises():
    task = tasks.ProsQA()
    for problem in (task.problem("train", 0, i) for i in range(100)):
        steps, answer = task.steps(problem), task.answer(problem)
        assert len(steps) == below(problem["edges"], problem["root"])[problem["target"]] >= 3
        assert all(step in task.question(problem) for step in steps)
        assert steps[0].split()[0] == problem["root"] == answer.split()[0]
        assert steps[-1].split()[-1] == answer.split()[-1]
        assert task.score("\n".join([*steps, "### " + answer]), problem)["correct"]
        assert not task.score(f"### {problem['root']} is a {problem['other']}.", problem)["correct"]


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
    for text in CHAIN_FILES:
        (tmp_path / "a").write_text(text, encoding="utf-8-sig")
        assert tasks.read_chains(str(tmp_path / "a")) == [CHAIN, CHAIN]
    (tmp_path / "a").write_text(json.dumps(CHAIN))
    assert tasks.read_chains(str(tmp_path / "a")) == [CHAIN]
    (tmp_path / "a").write_text(json.dumps({"example1": {"test_example": PRONTO}}))
    [chain] = tasks.read_chains(str(tmp_path / "a"))
    assert chain["steps"] == ["Sam is a cat. Each cat is small.", "Sam is small."]
    assert chain["question"] == "Each cat is small. Sam is a cat. True or false: Sam is small."


@pytest.mark.parametrize(
    "text, words",
    [
        ("[]", "is empty"),
        ("[1]", 'item 1: "steps" must be a list'),
        (json.dumps([CHAIN, CHAIN | {"steps": "2+3=5"}]), 'item 2: "steps" must be a list of texts'),
        (json.dumps({"e7": {"test_example": PRONTO | {"query": None}}}), 'item e7: field "question"'),
        (json.dumps({"e7": {"test_example": PRONTO | {"chain_of_thought": "x"}}}), "e7: .steps"),
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


def test_chains_take_a_test_file(tmp_path):
    rows = [CHAIN | {"question": f"{i} and 3?"} for i in range(100)]
    data = write(tmp_path / "a.jsonl", rows)
    streams = make_task("chains", data).streams
    assert len(streams["train"]) + len(streams["test"]) == 100 > len(streams["train"]) > 80
    streams = make_task(f"chains:test={write(tmp_path / 'b.jsonl', rows[:3])}", data).streams
    assert streams == {"train": rows, "test": rows[:3]}


# ------------------------------------------------------------------------------ two notations


def test_notations_pay_for_the_first_one():
    """Tries in signs and in letters; the reward is the share of those in signs (R1)."""
    task, problem = tasks.Notations(consistency=0.5), {"numbers": [4, 4, 6], "target": 6}
    text = "4x6x4e24x4e96>6\nwait4*6/4=24/4=6=6\n</think><answer>4*6/4</answer>"
    expected = {"tries": 2, "distinct_tries": 2, "gave_up": False}
    assert task.describe(text, problem) == expected | {"first_notation": 0.5, "mixed": True}
    assert task.score(text, problem)["total"] == 1.1 + 0.25
    unmixed = {"first_notation": 1.0, "mixed": False}
    assert task.describe("</think>", problem).items() >= unmixed.items()
    lines = []
    for i in range(300):
        problem, plain = task.problem("train", 0, i), rewards.Countdown()
        trace = task.trace(problem, random.Random(i))
        lines += trace.partition("</think>")[0].splitlines()
        tries = plain.describe(plain.trace(problem, random.Random(i)), problem)["tries"]
        assert task.describe(trace, problem)["tries"] == tries
    worded = [line for line in lines if "e" in line]
    assert 0.4 < len(worded) / len(lines) < 0.6 and not any("=" in line for line in worded)
