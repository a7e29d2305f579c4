"""rewards.py, but for what answers.jsonl (equal answers) and test_vectors.py (rewards) hold."""

import hashlib
import json
import math
import random
import re
import resource
import time
from fractions import Fraction
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT

import rewards
from more import tasks
from more.tasks import Multiplication
from rewards import BadInput, make_task


def test_eq1_total_is_correct_plus_weighted_format():
    good = " 12*34 = 408 </think>\n<answer>408</answer>"
    parts = tasks.score_multiplication(good, 12, 34)
    assert parts == {"format": 1.0, "answer": "408", "correct": True, "total": 1.1}
    assert tasks.score_multiplication(good, 12, 34, format_weight=0.5)["total"] == 1.5
    assert tasks.score_multiplication(good, 12, 35)["total"] == 0.1
    for text in ("<answer>408</answer>", "<think>" + good):  # the prompt opened it already
        assert tasks.score_multiplication(text, 12, 34)["total"] == 1.0
    assert rewards.strict_format(good + "\n<|end|>\n", "<|end|>")
    assert not rewards.strict_format("</think></answer><answer>408")


def test_the_last_complete_answer_counts():
    assert rewards.extract_answer("<answer>1</answer> x </answer>") == "1"
    assert rewards.extract_answer("<answer>1<answer>2</answer>") == "2"
    assert rewards.extract_answer("</answer><answer>") is None
    assert rewards.extract_answer("</think><answer>1</answer></think> 2") is None
    assert rewards.extract_boxed(r"\boxed{1} or \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert rewards.extract_boxed(r"\boxed{}") == "" and rewards.extract_boxed("5}") is None
    assert rewards.extract_boxed(r"\boxed{1} and \boxed{\frac{1}{2}") is None
    assert rewards.extract_boxed(r"\boxed{1}</think> 1") is None


REFUSED = ["", "()", "1/0", "007", "1" * 13, "1\u00a0+1", "\u0663", "1" + " " * 500, "x", "2(3)"]
REFUSED += ["1+" * 100 + "1", "(" * 100 + "1" + ")" * 100, "1 2", "1**2", "4//2", "*1", "1+", ")1("]


def test_limits_of_expressions_and_answers():
    """Long answers are wrong unread; large powers are refused before they are computed."""
    assert rewards.parse_expression("(" * 99 + "7" + ")" * 99) == (7, [7])
    assert rewards.parse_expression("-(2-\n+5)*-3/2") == (Fraction(-9, 2), [2, 5, 3, 2])
    for text in REFUSED:
        with pytest.raises(ValueError):
            print(text[:20], rewards.parse_expression(text))
    refused = [(rewards.small_power, *x) for x in ((9, 9**9), (3, -(10**6)), (0, 0))]
    refused += [(rewards.small_integer, value) for value in (501, -1, Fraction(1, 2))]
    for function, *values in refused:
        with pytest.raises(ValueError):
            function(*map(Fraction, values))
    assert rewards.extract_boxed("\\boxed{" + "1" * 600 + "}") is None
    assert rewards.number_text("72") == "72" and rewards.number_text("72" + " " * 600) == ""


def test_a_late_or_dead_child_is_counted_and_replaced(monkeypatch):
    assert rewards.math_equal(r"\sqrt{12}", r"2\sqrt{3}")
    before = rewards.symbolic_timeouts
    with monkeypatch.context() as patch:
        patch.setattr(rewards, "SYMBOLIC_SECONDS", 1e-4)
        assert not rewards.math_equal(r"(x+y)^{20}(x-y)^{20}", r"(x^2-y^2)^{20}")  # 0.2 s
    assert rewards.symbolic_timeouts == before + 1
    rewards.running_child().kill()
    rewards.running_child().wait()
    assert rewards.math_equal(r"\sqrt{12}", r"2\sqrt{3}")


def test_an_interrupted_request_leaves_no_reply_for_the_next(monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rewards.time, "monotonic", interrupt)  # read between the child's two replies
        rewards.math_equal(r"\sqrt{12}", r"2\sqrt{3}")
    assert not rewards.math_equal(r"\sqrt{12}", r"3\sqrt{2}")


TASKS = "countdown generalpoints:turns=3 knights multiplication navigation notations affine s3 "
TASKS += "prosqa resolve generalpoints:rule=13,faces=1,basics=0.4"
NATURAL = "countdown multiplication generalpoints:cards=3 knights navigation:grain=1"
STREAMS = [(spec, False) for spec in TASKS.split()] + [(spec, True) for spec in NATURAL.split()]


@pytest.mark.parametrize("spec, natural", STREAMS)
def test_streams_repeat_differ_by_seed_and_never_meet(spec, natural):
    task = make_task(spec, natural=natural)
    for split in ("train", "test"):
        problems = [task.problem(split, 0, i) for i in range(30)]
        assert problems == [task.problem(split, 0, i) for i in range(30)]
        assert problems != [task.problem(split, 1, i) for i in range(30)]
        for problem in problems:
            assert rewards.split_of(task.key(problem)) == split
            assert json.loads(json.dumps(problem)) == problem
            other = problem | {"space": "relative", "a": problem.get("b"), "b": problem.get("a")}
            other["numbers"] = problem.get("numbers", [])[::-1]  # another order, other actions
            assert task.key(other) == task.key(problem)
            if not hasattr(task, "steps"):
                assert "<answer>" in task.question(problem)
                assert task.compact(problem).endswith("<think>")


LINES = (ROOT / "tests" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
HOSTILE = [pair["answer"] for pair in map(json.loads, LINES) if pair["kind"] == "hostile"]
HOSTILE += [
    # halves, characters without a shape, other alphabets, numbers that are none
    "\0", "\ud800", "\ufeff22", ")(", "\\", "$$", "!!!!", "|", "==", "1/0", "1e999999999", "9" * 400,
    "9" * 41 + "/3", "a" * 501, "4_0_8", "0x16", "18!", "\u0664\u0660\u0668", "22\u00b2", "\u2153",
    # large to compute, deep to read
    "9**9**9**9", "9^9^9^9^9", "2^{-9^9}", "x^{9^{9^9}}", "500!", "(x+y+z+w)^{20}(a+b+c+d)^{20}",
    "((x+1)^{20})^{20}", r"\sqrt[0]{2}", r"\sqrt[99999999]{2}", r"\log 0", r"\tan(\frac{\pi}{2})",
    "(" * 240 + "1" + ")" * 240, "-" * 400 + "1", r"\text{" * 100, r"\begin{pmatrix}" * 30,
    "&".join("1" * 200), ",".join(["x+1"] * 40) + ",x", r"\sqrt{2}," * 40 + "x",
    # long: what a pattern might go back and forth over
    "9" * 10**6, "\u4e00" * 10**6, " " * 10**5, "1 " * 10**5, "(" * 10**5, "-" * 10**5, "{" * 10**5,
    "<answer>" * 10**4, "</answer>" * 10**4, "<answer></answer>" * 10**4, "</think>" * 10**4,
    r"\boxed{" * 10**4, r"\boxed{}" * 10**4, "1,111" * 10**4, "$ " * 10**5, "-$-$" * 10**4,
    "." * 10**5, "```a" * 10**4, '"formula": "' * 10**4, '{"formula": "' + "(" * 10**5 + '"}',
    "Ada is a knight and " * 10**4, "A+" * 10**5, "is an an " * 10**4, "turn_direction(" * 10**4,
    "^{" * 10**5, "x=" * 10**5, "\u0301" * 10**5, "\ud800" * 10**5,
]  # fmt: skip
FORMS = " </think>\n<answer>{}</answer>", "</think> \\boxed{{{}}}", "#### {}", "{}"
COUNTDOWN = {"numbers": [3, 5, 7], "target": 22}
FIXED = {"countdown": COUNTDOWN, "multiplication": {"a": 12, "b": 34}}
WRONG = {"correct": False, "format": 0.0}
JUDGES = {
    "gsm8k": lambda text: rewards.score_gsm8k(text, "17"),
    "math": lambda text: rewards.score_math(text, "x^2-1"),
    "math, a root": lambda text: rewards.score_math(text, r"\sqrt{2}+x"),
    "words": lambda text: rewards.language_consistency(text) < 0 or WRONG,
}


def judge_of(spec: str):
    """The verifier of a task, for one problem; what it has to say of a completion is finite."""
    task = make_task(spec)
    problem = FIXED.get(spec) or task.problem("train", 0, 0)

    def judge(text: str) -> dict:
        seen = task.describe(text, problem) if hasattr(task, "describe") else {}
        assert all(math.isfinite(value) for value in seen.values())
        return task.score(text, problem)

    return judge


def seconds_of(judge, text: str, bound: float) -> float:
    for _ in range(3):  # CPU time of this process, in three tries
        started = time.process_time()
        result = judge(text)
        seconds = time.process_time() - started
        assert not result["correct"] and result["format"] in (0.0, 1.0), (text[:80], result)
        if seconds < bound:
            break
    return seconds


def test_hostile_answers_are_wrong_and_cheap(monkeypatch):
    """Every answer, in four forms, to every verifier: in linear time, without much memory."""
    symbolic, asked, failures = rewards.symbolic_equal, [], rewards.score_failures
    monkeypatch.setattr(rewards, "SYMBOLIC_SECONDS", 0.3)
    monkeypatch.setattr(rewards, "symbolic_equal", lambda *args: asked.append(1) or symbolic(*args))
    rewards.math_equal("x", "y")  # the import of sympy belongs to no answer
    judges = JUDGES | {spec: judge_of(spec) for spec in TASKS.split()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for answer in HOSTILE:
        bound = 0.01 if len(answer) <= 2000 else 0.5
        for text in [form.format(answer) for form in FORMS]:
            for name, judge in judges.items():
                asked.clear()
                seconds = seconds_of(judge, text, bound)
                assert seconds < (0.1 if asked else bound), (name, text[:80])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert rewards.score_failures == failures, "a verifier raised"


def test_a_bad_verifier_makes_answers_wrong_and_ends_no_run(monkeypatch):
    """But a fault of the machine is none of an answer."""
    good = {"format": 0.0, "answer": None, "correct": True, "total": 1.0}
    bad = [None, 1.0, good | {"total": math.nan}, good | {"total": math.inf}, good | {"total": "1"}]
    bad += [{"format": 0.0, "total": 1.0, "correct": True}, [], ValueError("\x1b[2J"), KeyError(1)]
    score = mock.Mock(side_effect=[*bad, good, OSError("no space left")])
    monkeypatch.setattr(rewards.Countdown, "score", score)
    monkeypatch.setattr(rewards, "score_failures", 0)
    task = make_task("countdown")
    for _ in bad:
        assert task.score("", COUNTDOWN) == good | {"correct": False, "total": 0.0}
    assert task.score("", COUNTDOWN) == good and rewards.score_failures == len(bad)
    with pytest.raises(OSError, match="no space left"):
        task.score("", COUNTDOWN)


def test_countdown_traces_end_on_their_answer():
    """A try a line, each compared with the target; only the last one may hit."""
    task = rewards.Countdown()
    for problem in (task.problem("train", 0, i) for i in range(150)):
        trace, target = task.trace(problem, random.Random(0)), problem["target"]
        parts, lines = task.score(trace, problem), trace.partition("</think>")[0].splitlines()
        tries = [re.search(f"=([0-9]+)([<>=]){target}$", line).groups() for line in lines]
        for value, mark in tries:
            assert mark == ("<" if int(value) < target else ">" if int(value) > target else "=")
        hits = [mark == "=" for _, mark in tries]
        assert not any(hits[:-1]) and hits[-1] == parts["correct"] and parts["format"] == 1.0
        assert parts["answer"] == lines[-1].removeprefix("wait").partition("=")[0]


def test_countdown_streams_stay():
    """Published results rest on these: a change of one character is another task."""
    task = rewards.Countdown()
    problems = [task.problem("train", 0, i) for i in range(500)]
    traces = [task.trace(p, random.Random(f"trace {i}")) for i, p in enumerate(problems)]
    text = "".join(task.compact(p) + trace for p, trace in zip(problems, traces, strict=True))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "6c3a301bc1043e47"


def test_knobs_pool_and_heldout():
    assert make_task("multiplication:max_digits=4", natural=True) == Multiplication(2, 4)
    task, whole = make_task("countdown:pool=3,high=12"), make_task("countdown:high=12")
    for i in range(7):
        assert task.problem("train", 0, i) == whole.problem("train", 0, i % 3)
        assert task.problem("test", 0, i) == whole.problem("test", 0, i)
    task = Multiplication()
    problems = rewards.heldout(task, 100)
    assert len({task.key(p) for p in problems}) == 100
    assert problems[:10] == rewards.heldout(task, 10) != rewards.heldout(task, 10, seed=1)


def write(path: Path, rows: list) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return str(path)


def test_a_problem_of_a_file_stays_on_its_side(tmp_path):
    rows = [{"problem": f"p{i}", "answer": f"\\frac{{{i}}}{{2}}"} for i in range(200)]
    rows += [{"problem": f" p{i}\n", "answer": i / 2} for i in range(50)]  # the same again
    task = make_task("math", data=write(tmp_path / "math.jsonl", rows))
    keys = {split: {task.key(row) for row in stream} for split, stream in task.streams.items()}
    assert not keys["train"] & keys["test"] and len(keys["train"] | keys["test"]) == 200
    assert task.score("</think> \\boxed{1.5}", {"answer": r"\frac{3}{2}"})["correct"]


ROW = b'{"question": "q", "answer": "#### 1"}'
BAD_FILES = {
    "line 1: .*answer 'many' is not a number": ROW.replace(b"1", b"many"),
    "cannot read": b"\xff\xfe",
    "line 1: RecursionError": b'{"question": ' + b"[" * 100_000,
    "item 2: not a JSON object: '5'$": b"[" + ROW + b", 5]",
    "line 1: .*; 9 more such lines: 3, 4, 5, 6, 7$": b"{}\n" + ROW + b"\n" + b"{}\n" * 9,
}


def test_the_faults_of_a_file_are_one_line(tmp_path):
    for words, content in BAD_FILES.items():
        (tmp_path / "a.jsonl").write_bytes(content)
        with pytest.raises(BadInput, match=words) as error:
            make_task("gsm8k", data=str(tmp_path / "a.jsonl"))
        assert "a.jsonl" in str(error.value) and "\n" not in str(error.value)


USER, REPLY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM, HUMAN = {"role": "system", "content": ""}, {"from": "human", "value": "2+2?"}


def test_read_chat():
    assert rewards.read_chat({"messages": [SYSTEM, USER, REPLY], "id": 7}) == [SYSTEM, USER, REPLY]
    assert rewards.read_chat({"prompt": [USER], "completion": [REPLY]}) == [USER, REPLY]
    shared = [{"from": "system", "value": ""}, HUMAN, {"from": "gpt", "value": "4"}]
    assert rewards.read_chat({"conversations": shared}) == [SYSTEM, USER, REPLY]
    bad = [{"messages": [USER, {"role": "assistant"}]}, {"prompt": [USER], "completion": "4"}]
    for row in [*bad, {"prompt": "2+2?", "completion": 4}]:
        with pytest.raises(BadInput, match="message"):
            rewards.read_chat(row)


def test_metrics_of_an_evaluation_by_hand():
    """Two problems x 4 answers: 3 and 1 right; the error is one of the problems' means."""
    done = []
    for right in (1, 1, 1, 0, 0, 0, 0, 1):
        score = {"correct": bool(right), "format": 0.0}
        done.append(rewards.Completion(0, {}, [1], [5] * 2, [-0.5] * 2, True, "wait", score))
    found = rewards.describe_evaluation(done, 4, None)
    expected = {"accuracy": 0.5, "accuracy_se": 0.25, "entropy": 0.5, "pass@1": 0.5}
    expected |= {"pass@2": (1 + 1 / 2) / 2, "pass@4": 1.0}
    found = {name: found[f"eval/{name}"] for name in expected}
    assert found == pytest.approx(expected)
