"""rewards.py: layout, expressions, the symbolic child, hostile text, tasks and their files.

Equality of answers is in answers.jsonl, shaped rewards and metrics are in test_vectors.py.
"""

import doctest
import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rewards  # noqa: E402
from more.tasks import Multiplication  # noqa: E402
from rewards import BadInput, make_task  # noqa: E402


def test_doctests():
    result = doctest.testmod(rewards)
    assert result.attempted >= 5 and result.failed == 0


# ------------------------------------------------------------------------- layout and answer

GOOD = " 12*34 = 408 </think>\n<answer>408</answer>"


def test_format_is_strict():
    """What the vectors do not hold: the prompt opened the block already; tags out of order."""
    assert rewards.strict_format(GOOD + "\n<|end|>\n", "<|end|>")
    for text in ("<think>" + GOOD, GOOD + " done", "</think></answer><answer>408"):
        assert not rewards.strict_format(text)


def test_eq1_total_is_correct_plus_weighted_format():
    parts = rewards.score_multiplication(GOOD, 12, 34)
    assert parts == {"format": 1.0, "answer": "408", "correct": True, "total": 1.1}
    assert rewards.score_multiplication(GOOD, 12, 34, format_weight=0.5)["total"] == 1.5
    assert rewards.score_multiplication(GOOD, 12, 35)["total"] == 0.1
    assert rewards.score_multiplication("<answer>408</answer>", 12, 34)["total"] == 1.0


def test_the_last_complete_answer_counts():
    assert rewards.extract_answer("<answer>1</answer> x </answer>") == "1"
    assert rewards.extract_answer("<answer>1<answer>2</answer>") == "2"
    assert rewards.extract_answer("</answer><answer>") is None
    assert rewards.extract_answer("</think><answer>1</answer></think> 2") is None
    assert rewards.extract_boxed(r"\boxed{1} or \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert rewards.extract_boxed(r"\boxed{}") == "" and rewards.extract_boxed("5}") is None
    assert rewards.extract_boxed(r"\boxed{1} and \boxed{\frac{1}{2}") is None
    assert rewards.extract_boxed(r"\boxed{1}</think> 1") is None


def test_gold_that_cannot_be_read_is_bad_input():
    for gold in (None, "", "eighteen"):
        with pytest.raises(BadInput):
            rewards.score_gsm8k("#### 18", gold)
    for gold in (None, "", r"\frac{1}{2", "1" * 501):
        with pytest.raises(BadInput):
            rewards.score_math(r"\boxed{1}", gold)
    assert rewards.score_gsm8k("#### 1,080", 1080)["correct"]


# ------------------------------------------------------------------------------- expressions

REFUSED = ["", "()", "1/0", "007", "1" * 13, "1\u00a0+1", "\u0663", "1" + " " * 500]
REFUSED += ["1+" * 100 + "1", "(" * 100 + "1" + ")" * 100]


def test_limits_of_an_expression():
    assert rewards.parse_expression("(" * 99 + "7" + ")" * 99) == (7, [7])
    for text in REFUSED:
        with pytest.raises(ValueError):
            print(text[:20], rewards.parse_expression(text))


def value_in_python(text: str) -> Fraction | None:
    """What Python makes of a text in which only our signs occur, with exact numerals."""
    if re.search(r"[^-+*/()0-9 \n]|\*\*|//|\(\s*\)|\b0[0-9]", text):
        return None
    exact = re.sub("[0-9]+", r"Fraction(\g<0>)", " ".join(text.split()))
    try:
        value = eval(exact)
    except (SyntaxError, TypeError, ZeroDivisionError):
        return None
    return value if isinstance(value, Fraction) else None


def test_expressions_against_python():
    """Random signs and numerals: both agree on what is an expression and on its value."""
    rng, valid = random.Random(0), 0
    for _ in range(20_000):
        text = "".join(rng.choices([*"1237+-*/() \n", "10", "0", "x", "-", "(", ")"], k=rng.randint(1, 9)))
        expected = value_in_python(text)
        try:
            value, numerals = rewards.parse_expression(text)
            assert numerals == [int(n) for n in re.findall("[0-9]+", text)], text
        except ValueError:
            value = None
        assert value == expected, text
        valid += value is not None
    assert valid > 1000


def test_powers_are_refused_before_they_are_computed():
    with pytest.raises(ValueError):
        rewards.small_power(Fraction(9), Fraction(9**9))
    for value in (Fraction(501), Fraction(-1), Fraction(1, 2)):  # of a factorial or a binomial
        with pytest.raises(ValueError):
            rewards.small_integer(value)


# ------------------------------------------------------------------------ the symbolic child

ROOT_12, ROOT_8 = (r"\sqrt{12}", r"2\sqrt{3}"), (r"\sqrt{8}", r"2\sqrt{2}")


def test_a_late_or_dead_child_is_counted_and_replaced(monkeypatch):
    assert rewards.math_equal(*ROOT_12)
    before = rewards.symbolic_timeouts
    monkeypatch.setattr(rewards, "SYMBOLIC_SECONDS", 1e-4)
    assert not rewards.math_equal(r"(x+y)^{20}(x-y)^{20}", r"(x^2-y^2)^{20}")  # 0.2 s
    assert rewards.symbolic_timeouts == before + 1
    monkeypatch.undo()
    assert rewards.math_equal(*ROOT_12)
    rewards.running_child().kill()
    rewards.running_child().wait()
    assert rewards.math_equal(*ROOT_12)


def test_an_interrupted_request_leaves_no_reply_for_the_next(monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    assert rewards.math_equal(*ROOT_8)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rewards.time, "monotonic", interrupt)  # read between the child's two replies
        rewards.math_equal(*ROOT_8)
    assert not rewards.math_equal(r"\sqrt{8}", r"3\sqrt{2}")


def test_threads_share_the_child():
    verdicts = []

    def ask(left, right, expected):
        verdicts.append(rewards.math_equal(left, right) == expected)

    asked = [(*ROOT_12, True), (r"\sqrt{12}", r"3\sqrt{2}", False)] * 4
    threads = [threading.Thread(target=ask, args=args) for args in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [True] * 8


def test_the_users_script_runs_once(tmp_path):
    script = tmp_path / "no_main_guard.py"
    script.write_text("import rewards\nprint('ran', rewards.math_equal('x^2-1', '(x-1)(x+1)'))\n")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert (run.stdout, run.stderr, run.returncode) == ("ran True\n", "", 0)


# ---------------------------------------------------------------- every task, every verifier

TINY = "countdown,generalpoints:turns=3,knights,multiplication,navigation,notations,affine,s3,prosqa"
TASKS = [(spec, False) for spec in TINY.split(",")]
TASKS += [("generalpoints:rule=13,faces=1,basics=0.4", False), ("multiplication:max_digits=1", False)]
TASKS += [(spec, True) for spec in ("countdown", "multiplication", "generalpoints", "knights")]
TASKS += [("navigation:grain=1", True), ("notations:worded=0.3,consistency=1", False)]


def rewritten(problem: dict) -> dict:
    """The same problem in another order, or for other actions."""
    other = problem | {"space": "relative", "a": problem.get("b"), "b": problem.get("a")}
    return other | {"numbers": problem.get("numbers", [])[::-1]}


@pytest.mark.parametrize("spec, natural", TASKS)
def test_streams_repeat_differ_by_seed_and_never_meet(spec, natural):
    task = make_task(spec, natural=natural)
    for split in ("train", "test"):
        problems = [task.problem(split, 0, i) for i in range(40)]
        assert problems == [task.problem(split, 0, i) for i in range(40)]
        assert problems != [task.problem(split, 1, i) for i in range(40)]
        for problem in problems:
            assert rewards.split_of(task.key(problem)) == split
            assert json.loads(json.dumps(problem)) == problem
            assert task.key(rewritten(problem)) == task.key(problem)
            if not hasattr(task, "steps"):
                assert "<answer>" in task.question(problem)
                assert task.compact(problem).endswith("<think>")


LINES = (ROOT / "tests" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
HOSTILE = [pair["answer"] for pair in map(json.loads, LINES) if pair["kind"] == "hostile"]
HOSTILE += [
    # halves, characters without a shape, other alphabets, numbers that are none
    "\0", "\x1b[31m", "\ud800", "\ufeff22", ")(", "((", "]", "\\", "$$", "%", "!!!!", "^", "|", ",,,,", "==",
    "1/0", "1e999999999", "9" * 400, "9" * 41 + "/3", "a" * 501, "4_0_8", "0x16", "3.0*5+7", "35+7", "18!",
    "\u0664\u0660\u0668", "22\u00b2", "\uff12\uff12", "\u2153", "\u516b\u5341", "XVIII", "%s%s%n",
    "</answer>", "<answer><answer>", "\\boxed", "#### 1/0", r"\def\a{\a\a}\a", "().__class__",
    # large to compute, deep to read
    "9**9**9**9", "9^9^9^9^9", "2^{-9^9}", "x^{9^{9^9}}", "500!", "(x+y+z+w)^{20}(a+b+c+d)^{20}",
    "((x+1)^{20})^{20}", r"\sqrt[0]{2}", r"\sqrt[99999999]{2}", r"\sqrt{10^{400}+1}", r"\log 0",
    r"\sin(\cos(\tan(x^{19}+y)))^{19}", r"\tan(\frac{\pi}{2})", "(" * 240 + "1" + ")" * 240,
    "-" * 400 + "1", "1+" * 200 + "1", r"\text{" * 100, r"\pm" * 100, r"\begin{pmatrix}" * 30,
    "&".join("1" * 200), ",".join(["x+1"] * 40) + ",x", r"\sqrt{2}," * 40 + "x",
    # long: what a pattern might go back and forth over
    "9" * 10**6, "\u4e00" * 10**6, " " * 10**5, "1 " * 10**5, "(" * 10**5, "-" * 10**5, "{" * 10**5,
    "<think>" * 1000, "<answer>" * 10**4, "</answer>" * 10**4, "<answer></answer>" * 10**4,
    "</think>" * 10**4, "####" * 10**4, r"\boxed{" * 10**4, r"\boxed{}" * 10**4, "1,111" * 10**4,
    "$ " * 10**5, "-$-$" * 10**4, "." * 10**5, " /1" * 10**4, "```a" * 10**4, '"formula": "' * 10**4,
    '{"formula": "' + "(" * 10**5 + '"}', "Ada is a knight and " * 10**4, "A+" * 10**5, "f " * 10**5,
    "is an an " * 10**4, "turn_direction(" * 10**4, "\\frac" * 10**4, "\\text{" * 10**4, "^{" * 10**5,
    "x=" * 10**5, "\\cdot" * 10**4, "\u0301" * 10**5, "\ud800" * 10**5,
]  # fmt: skip
COUNTDOWN = {"numbers": [3, 5, 7], "target": 22}
WRONG = {"correct": False, "format": 0.0}
JUDGES = {
    "gsm8k": lambda text: rewards.score_gsm8k(text, "17"),
    "math": lambda text: rewards.score_math(text, "x^2-1"),
    "math, a root": lambda text: rewards.score_math(text, r"\sqrt{2}+x"),
    "words": lambda text: rewards.language_consistency(text) < 0 or WRONG,
}
LINUX = Path("/proc/self/clear_refs").exists()


def judge_of(spec: str):
    """The verifier of a task, for one problem; what it has to say of a completion is finite."""
    task = make_task(spec)
    fixed = {"countdown": COUNTDOWN, "multiplication": {"a": 12, "b": 34}}
    problem = fixed.get(spec) or task.problem("train", 0, 0)

    def judge(text: str) -> dict:
        seen = task.describe(text, problem) if hasattr(task, "describe") else {}
        assert all(math.isfinite(value) for value in seen.values())
        return task.score(text, problem)

    return judge


def peak() -> float:
    """The most memory in MB that this process has held since the last time it was asked."""
    status = Path("/proc/self/status").read_text() if LINUX else "VmHWM: 0 kB"
    if LINUX:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1024


def seconds_of(judge, text: str, bound: float) -> float:
    """CPU time of this process, the best of three tries; the clock bounds the symbolic child."""
    best = math.inf
    for _ in range(3):
        started, clock = time.process_time(), time.monotonic()
        result = judge(text)
        best = min(best, time.process_time() - started)
        assert not result["correct"] and result["format"] in (0.0, 1.0), (text[:80], result)
        assert time.monotonic() - clock < 20, "late"
        if best < bound:
            break
    return best


def test_hostile_answers_are_wrong_and_cheap(monkeypatch):
    """Every answer, in four forms, to every verifier: in linear time, without much memory."""
    symbolic, asked, failures = rewards.symbolic_equal, [], rewards.score_failures
    monkeypatch.setattr(rewards, "SYMBOLIC_SECONDS", 0.3)
    monkeypatch.setattr(rewards, "symbolic_equal", lambda *args: asked.append(1) or symbolic(*args))
    rewards.math_equal("x", "y")  # the import of sympy belongs to no answer
    tasks = "countdown multiplication generalpoints:turns=3 knights navigation notations prosqa"
    judges = JUDGES | {spec: judge_of(spec) for spec in tasks.split()}
    for answer in HOSTILE:
        bound = 0.01 if len(answer) <= 2000 else 0.5
        peak()
        before = peak()
        for form in (" </think>\n<answer>{}</answer>", "</think> \\boxed{{{}}}", "#### {}", "{}"):
            text = form.format(answer)
            for name, judge in judges.items():
                asked.clear()
                seconds = seconds_of(judge, text, bound)
                assert seconds < (0.1 if asked else bound), (name, text[:80])
        assert peak() - before < 50, answer[:80]
    assert rewards.score_failures == failures, "a verifier raised"


PIECES = "<think> </think> <answer> </answer> wer> \\boxed{ #### ( ) = + - * / 0 3 7 , . $ % { } # ^ ! e"
PIECES += " \\frac{1}{2} \\sqrt{ 3*5+7=15+7=22 forward() wait \" ' ` ~ | ; \x1b[31m \u202e \u0663 \u4e00"
PIECES = [*PIECES.split(), '"formula": "', "Ada is a knight", "\ud800", " ", "\n", "\x00", "9" * 50]


@pytest.mark.parametrize("spec", [spec for spec, natural in TASKS if not natural])
def test_random_text_ends_no_run(spec):
    rng, task, failures = random.Random(spec), make_task(spec), rewards.score_failures
    for i in range(200):
        some = rng.sample(PIECES, rng.randint(1, 12))
        text = "".join(rng.choices(some, k=int(2000 ** rng.random())))
        for tag in rng.sample(["</think>", "<answer>", "</answer>", "\\boxed{18}", "#### 5"], 3):
            place = rng.randrange(len(text) + 1)
            text = text[:place] + tag + text[place:]
        parts = task.score(text, task.problem("train", 0, i))
        assert 0 <= parts["total"] <= 2.1 and parts["correct"] in (True, False)
        answer = parts["answer"] or ""
        assert answer in text or answer in text.replace(",", "")
    assert rewards.score_failures == failures, "a verifier raised"


GIVEN = {"format": 0.0, "answer": None, "correct": True, "total": 1.0}
BAD_SCORES = [None, 1.0, GIVEN | {"total": math.nan}, GIVEN | {"total": math.inf}]
BAD_SCORES += [GIVEN | {"total": "1"}, {"total": 1.0, "correct": True}]


@pytest.mark.parametrize("given", [*BAD_SCORES, ValueError("\x1b[2J"), OSError("no space left")], ids=str)
def test_a_bad_verifier_makes_answers_wrong_and_ends_no_run(given, monkeypatch, capsys):
    """But a fault of the machine is none of an answer. Failures are told when they double."""

    def score(*args, **kw):
        if isinstance(given, Exception):
            raise given
        return given

    monkeypatch.setattr(rewards.Countdown, "score", score)
    monkeypatch.setattr(rewards, "score_failures", 0)
    task = make_task("countdown")
    if isinstance(given, OSError):
        with pytest.raises(OSError, match="no space left"):
            task.score("", COUNTDOWN)
        return
    wrong = {"format": 0.0, "answer": None, "correct": False, "total": 0.0}
    assert [task.score("</think><answer>3*5+7</answer>", COUNTDOWN) for _ in range(9)] == [wrong] * 9
    err = capsys.readouterr().err
    assert err.count("Traceback") == 1 and "\x1b" not in err and rewards.score_failures == 9
    assert re.findall(r"failed on (\d+) answer", err) == ["1", "2", "4", "8"]


def test_metrics_where_the_vectors_leave_a_gap():
    assert rewards.language_consistency("\u0434\u0430 yes", "ru") == 0.5
    assert rewards.language_consistency("```\u4e00```  3+4") == 1.0
    with pytest.raises(BadInput, match="choose one of en"):
        rewards.language_consistency("x", "tlh")
    for bad in ((4, 5, 1), (4, -1, 1), (4, 1, 0)):
        with pytest.raises(ValueError):
            rewards.pass_at_k(*bad)


# ------------------------------------------------------------------------ countdown, streams


def test_countdown_problems_are_in_range():
    knobs = "min_numbers=2,max_numbers=4,low=2,high=12,min_target=5,max_target=40"
    task = make_task(f"countdown:{knobs}")
    problems = [task.problem("train", 0, i) for i in range(60)]
    assert {len(p["numbers"]) for p in problems} == {2, 3, 4}
    for p in problems:
        assert all(2 <= n <= 12 for n in p["numbers"]) and 5 <= p["target"] <= 40
    for bad in ("min_numbers=1", "max_numbers=7", "low=0", "min_target=9,max_target=8", "operators=+%"):
        with pytest.raises(BadInput, match="some of"):
            make_task(f"countdown:{bad}")
    with pytest.raises(BadInput, match="widen the ranges"):
        make_task("countdown:low=1,high=1,min_target=98").problem("train", 0, 0)


def test_countdown_traces_end_on_their_answer():
    """A try a line, each compared with the target; only the last one may hit."""
    task = rewards.Countdown()
    for i in range(300):
        problem = task.problem("train", 0, i)
        trace, target = task.trace(problem, random.Random(i)), problem["target"]
        parts, seen = task.score(trace, problem), task.describe(trace, problem)
        lines = trace.partition("</think>")[0].splitlines()
        marks = [re.search(f"=([0-9]+)([<>=]){target}$", line).groups() for line in lines]
        for value, mark in marks:
            assert (int(value) < target, int(value) > target) == (mark == "<", mark == ">")
        assert [mark for _, mark in marks[:-1]].count("=") == 0
        assert (marks[-1][1] == "=") == parts["correct"] == (not seen["gave_up"])
        assert parts["answer"] == lines[-1].removeprefix("wait").partition("=")[0]
        assert parts["format"] == 1.0 and len(lines) <= 30
        assert seen["tries"] == seen["distinct_tries"] == len(lines)
    for give_up in (0, 1):
        task = rewards.Countdown(give_up=give_up)
        assert task.score(task.trace(problem, random.Random(0)), problem)["correct"] != give_up


def test_countdown_streams_stay():
    """Published results rest on these: a change of one character is another task."""
    task, text = rewards.Countdown(), ""
    for i in range(500):
        problem = task.problem("train", 0, i)
        text += task.compact(problem) + task.trace(problem, random.Random(f"trace {i}"))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "6c3a301bc1043e47"


def test_countdown_describes_tries():
    miss, hit = "1+2+3=3+3=6>5\n", "2*3-1=6-1=5=5\n"
    for text, expected in [
        (f"{miss}wait{hit}</think><answer>2*3-1</answer>", (2, 2, False)),
        (f"{miss}wait{miss}</think><answer>1+2+3</answer>", (2, 1, True)),
        (miss, (1, 1, False)),  # cut off, not given up
        ("nothing to see\n</think>", (0, 0, False)),
    ]:
        seen = rewards.Countdown().describe(text, {"numbers": [1, 2, 3], "target": 5})
        assert tuple(seen.values()) == expected


def test_pool_and_heldout():
    task, whole = make_task("countdown:pool=3,high=12"), make_task("countdown:high=12")
    for i in range(7):
        assert task.problem("train", 0, i) == whole.problem("train", 0, i % 3)
        assert task.problem("test", 0, i) == whole.problem("test", 0, i)
    task = Multiplication()
    problems = rewards.heldout(task, 100)
    assert len({task.key(p) for p in problems}) == 100
    assert problems[:10] == rewards.heldout(task, 10) != rewards.heldout(task, 10, seed=1)
    with pytest.raises(BadInput, match="fewer than 40"):
        rewards.heldout(Multiplication(1, 1), 40)
    assert 900 < sum(rewards.split_of(str(i)) == "test" for i in range(10_000)) < 1150


def test_prompts():
    task, problem = Multiplication(), {"a": 12, "b": 34}
    end = "Let me solve this step by step.\n<think>"
    assert rewards.prompt(task, problem, "compact") == "12*34=<think>"
    text = rewards.prompt(task, problem, "text")
    assert "User: What is 12 * 34?" in text and text.endswith("\nAssistant: " + end)
    user = {"role": "user", "content": task.question(problem)}
    assert rewards.prompt(task, problem, "chat") == [user]
    for text in ("<think>", "<think>\n\n"):  # of a template that opens the thinking itself
        assert rewards.open_thinking(text) == text
    closed = "<think>\n\n</think>\n\n"
    assert rewards.open_thinking(closed) == closed + end


def test_make_task():
    assert make_task("multiplication:max_digits=4") == Multiplication(1, 4)
    assert make_task("multiplication:max_digits=4", natural=True) == Multiplication(2, 4)
    for spec, data, words in [
        ("chess", "", "countdown, gsm8k, math, .*chains or FILE.py:Class"),
        ("multiplication:max_digits=two", "", "'max_digits=two'.*max_digits=int"),
        ("multiplication", "x.jsonl", "'data=x.jsonl' is none of its knobs, pool=int"),
        ("gsm8k", "", "--data"),
        ("math", "nowhere.jsonl", "cannot read the data file nowhere.jsonl"),
    ]:
        with pytest.raises(BadInput, match=words) as error:
            make_task(spec, data)
        assert "\n" not in str(error.value)


# --------------------------------------------------------------------------- files and chats


def write(path: Path, rows: list) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return str(path)


def test_a_file_is_shuffled_anew_each_epoch(tmp_path):
    rows = [{"question": f"Is it {i}?", "answer": f"<<>>\n#### {i:,}"} for i in range(2000, 2200)]
    task = make_task("gsm8k", data=write(tmp_path / "gsm8k.jsonl", rows))
    train, test = task.streams["train"], task.streams["test"]
    assert len(train) + len(test) == 200 and 5 < len(test) < 40
    drawn = [task.problem("train", 0, i) for i in range(2 * len(train))]
    first, second = drawn[: len(train)], drawn[len(train) :]
    assert all(row in first and row in second for row in train) and train != first != second
    assert task.problem("test", 0, len(test) + 1) == test[1]
    assert task.score(f"</think> <answer>{first[0]['answer']}</answer>", first[0])["total"] == 1.1
    assert first[0]["question"] in task.question(first[0])
    with pytest.raises(BadInput, match="pre-trained"):
        rewards.prompt(task, first[0], "compact")


def test_a_problem_of_a_file_stays_on_its_side(tmp_path):
    rows = [{"problem": f"p{i}", "answer": f"\\frac{{{i}}}{{2}}"} for i in range(200)]
    rows += [{"problem": f" p{i}\n", "answer": i / 2} for i in range(50)]  # the same again
    task = make_task("math", data=write(tmp_path / "math.jsonl", rows))
    keys = {split: {task.key(row) for row in stream} for split, stream in task.streams.items()}
    assert not keys["train"] & keys["test"] and len(keys["train"] | keys["test"]) == 200
    assert task.score("</think> \\boxed{1.5}", {"answer": r"\frac{3}{2}"})["correct"]
    one = make_task("math", data=write(tmp_path / "one.jsonl", rows[:1]))
    empty = "train" if one.streams["test"] else "test"
    with pytest.raises(BadInput, match=f"no {empty} rows"):
        one.problem(empty, 0, 0)


ROW = b'{"question": "q", "answer": "#### 1"}'


@pytest.mark.parametrize(
    "content, words",
    [
        (b"[]", "is empty"),
        (ROW.replace(b'"#### 1"', b"null"), 'field "answer" is missing or empty'),
        (ROW.replace(b"q", b" "), 'line 1: field "question" is missing or empty'),
        (ROW.replace(b"1", b"many"), "line 1: .*answer 'many' is not a number"),
        (b"\xff\xfe", "cannot read"),
        (b"[" * 100_000, "RecursionError"),
        (b'{"question": ' + b"[" * 100_000, "line 1: RecursionError"),
        (b"[" + ROW + b", 5]", "item 2: not a JSON object: '5'$"),
        (b"[" + ROW + b",\n]", "line 2 column 1"),
        (b"{}\n\n{}", "line 1: .*; 1 more such line: 3$"),
        (b"{}\n" + ROW + b"\n" + b"{}\n" * 9, "line 1: .*; 9 more such lines: 3, 4, 5, 6, 7$"),
    ],
)
def test_the_faults_of_a_file_are_one_line(tmp_path, content, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=words) as error:
        make_task("gsm8k", data=str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("indent", [0, None, 2])
def test_forms_of_a_file(tmp_path, indent):
    """JSON lines or one JSON list, with and without a mark of the byte order."""
    rows = [{"question": f"\u4e00 {i}?", "answer": f"#### {i}"} for i in range(30)]
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    if indent == 0:
        text = "\n".join(map(json.dumps, rows))
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "rows").write_text(text, encoding)
        streams = make_task("gsm8k", data=str(tmp_path / "rows")).streams
        found = [*streams["train"], *streams["test"]]
        assert sorted(int(row["answer"]) for row in found) == [*range(30)]


USER, REPLY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
HUMAN = {"from": "human", "value": "2+2?"}


def test_read_chat():
    """Messages, TRL's prompt and completion, and ShareGPT's names; an empty text is one."""
    system = {"role": "system", "content": ""}
    assert rewards.read_chat({"messages": [system, USER, REPLY], "id": 7}) == [system, USER, REPLY]
    assert rewards.read_chat({"prompt": [USER], "completion": [REPLY]}) == [USER, REPLY]
    shared = [{"from": "system", "value": ""}, HUMAN, {"from": "gpt", "value": "4"}]
    assert rewards.read_chat({"conversations": shared}) == [system, USER, REPLY]


def test_bad_chats():
    for row, words in [
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 has no role or no content"),
        ({"messages": [{"content": "2+2?"}]}, "message 1"),
        ({"prompt": [USER], "completion": "4"}, "message 2"),
        ({"messages": []}, "list of messages"),
        ({"conversations": HUMAN}, "list of messages"),
        ({"prompt": "2+2?", "completion": 4}, "list of messages"),
    ]:
        with pytest.raises(BadInput, match=words):
            rewards.read_chat(row)


def test_limits_of_length_and_depth(tmp_path):
    """Long answers are wrong unread, huge powers of either sign and deep JSON are refused."""
    assert rewards.extract_boxed("\\boxed{" + "1" * 600 + "}") is None
    assert rewards.extract_boxed("\\boxed{" + "1" * 400 + "}") == "1" * 400
    assert rewards.number_text("72") == "72" and rewards.number_text("72" + " " * 600) == ""
    for exponent in (10**6, -(10**6)):
        with pytest.raises(ValueError):
            rewards.small_power(Fraction(3), Fraction(exponent))
    (tmp_path / "deep").write_text('{"question": ' + "[" * 100_000, encoding="utf-8")
    with pytest.raises(BadInput, match="line 1"):
        rewards.make_task("gsm8k", data=str(tmp_path / "deep"))
