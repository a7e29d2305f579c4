"""rewards.py: cases worked out by hand, hostile answers with wall-clock bounds, properties of the tasks."""

import ast
import doctest
import hashlib
import itertools
import json
import math
import operator
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
from more.tasks import Multiplication, countdown_attempts  # noqa: E402
from rewards import BadInput  # noqa: E402


def test_doctests():
    result = doctest.testmod(rewards)
    assert result.attempted >= 5 and result.failed == 0


# ------------------------------------------------------------------------------------------ format and totals

GOOD = " 12*34 = 408 </think>\n<answer>408</answer>"


@pytest.mark.parametrize(
    "text, layout",
    [
        (GOOD, 1.0),
        (GOOD + "\n ", 1.0),
        (GOOD + "<|end|>", 1.0),
        (GOOD + "\n<|end|>\n", 1.0),
        (GOOD + "<|end|><|end|>", 0.0),  # stripped once
        (GOOD + " done", 0.0),
        ("<think>" + GOOD, 0.0),  # the prompt already opened the block
        (GOOD.replace("\n", " so "), 0.0),
        (GOOD.replace("</think>", ""), 0.0),
        ("<answer>408</answer></think>", 0.0),
        (" </think></answer><answer>408", 0.0),
        (" </think><answer> </answer>", 0.0),
        ("", 0.0),
    ],
)
def test_strict_format(text, layout):
    assert rewards.score_multiplication(text, 12, 34, eos="<|end|>")["format"] == layout


def test_total_is_correct_plus_weighted_format():
    parts = rewards.score_multiplication(GOOD, 12, 34)
    assert parts == {"format": 1.0, "answer": "408", "correct": True, "total": 1.1}
    assert rewards.score_multiplication(GOOD, 12, 34, format_weight=0.5)["total"] == 1.5
    assert rewards.score_multiplication(GOOD, 12, 35)["total"] == 0.1
    assert rewards.score_multiplication("<answer>408</answer>", 12, 34)["total"] == 1.0


def test_extraction():
    assert rewards.extract_answer("<answer>1</answer> x </answer>") == "1"
    assert rewards.extract_answer("<answer>1<answer>2</answer>") == "2"
    assert rewards.extract_answer("</answer><answer>") is None
    assert rewards.extract_answer("<answer>1</answer></think> 2") is None
    assert rewards.extract_boxed(r"\boxed{1} or \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert rewards.extract_boxed(r"\boxed{}") == "" and rewards.extract_boxed("5}") is None
    assert rewards.extract_boxed(r"\boxed{1} and \boxed{\frac{1}{2}") is None
    assert rewards.extract_boxed(r"\boxed{1}</think> 1") is None


@pytest.mark.parametrize(
    "text, value",
    [
        ("$1,080.50", Fraction(2161, 2)),
        ("-$5", -5),
        ("$-5", -5),
        ("1/2", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("18 dollars.", 18),
        ("50%", 50),
        ("1/0", None),
        ("18 or 19", None),
        ("1,08", None),
        ("2^3", None),
        ("3*6", None),
        ("", None),
        ("\u0661\u0668", None),
        ("9" * 41, None),
    ],
)
def test_plain_number(text, value):
    assert rewards.plain_number(text) == value


def test_gold_that_cannot_be_read_is_bad_input():
    for gold in (None, "", "eighteen"):
        with pytest.raises(BadInput):
            rewards.score_gsm8k("#### 18", gold)
    for gold in (None, "", r"\frac{1}{2", "1" * 501):
        with pytest.raises(BadInput):
            rewards.score_math(r"\boxed{1}", gold)
    assert rewards.score_gsm8k("#### 1,080", 1080)["correct"]


# ------------------------------------------------------------------------------------------- expressions


@pytest.mark.parametrize(
    "text, value",
    [
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("2-3-4", -5),
        ("8/4/2", 1),
        ("-2*-3", 6),
        ("- -2", 2),
        ("+5", 5),
        ("8/(3-8/3)", 24),
        ("\t1\n+ 1\r", 2),
        ("(" * 99 + "7" + ")" * 99, 7),
        ("0", 0),
    ],
)
def test_parse_expression(text, value):
    assert rewards.parse_expression(text)[0] == value


BAD_EXPRESSIONS = ["", "()", "2**3", "7//2", "1.5", "1 0", "(2)(3)", "2(3)", "1/0", "1/(1-1)", "007", "1+", "*1"]
BAD_EXPRESSIONS += [")(", "(1", "1)", "1,2", "2^3", "5!", "\u0663", "\u00d7", "1\u00a0+1", "x", "1" * 13, "1_0"]
BAD_EXPRESSIONS += ["1" + " " * 500, "1+" * 100 + "1", "(" * 100 + "1" + ")" * 100, " " * 501, "sqrt(4)", "0x1", "1e3"]


@pytest.mark.parametrize("text", BAD_EXPRESSIONS, ids=lambda text: repr(text[:12]))
def test_parse_expression_refuses(text):
    with pytest.raises(ValueError):
        rewards.parse_expression(text)


def exact_value(text: str) -> Fraction | None:
    """An expression as Python reads it, worked out exactly on its syntax tree; None if it is none of ours."""
    try:
        node = ast.parse(re.sub("[ \t\r\n]", " ", text).strip(" "), mode="eval").body
        numerals = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
        if not all(type(n) is int and n < 10**12 for n in numerals) or re.search(r"[^-+*/()0-9 \n\r\t]|\b0[0-9]", text):
            return None
        return value_of_tree(node)
    except (SyntaxError, ZeroDivisionError, KeyError, RecursionError, MemoryError, ValueError):
        return None


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
SIGNS = {ast.USub: operator.neg, ast.UAdd: operator.pos}


def value_of_tree(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](value_of_tree(node.left), value_of_tree(node.right))
    if isinstance(node, ast.UnaryOp):
        return SIGNS[type(node.op)](value_of_tree(node.operand))
    if not isinstance(node, ast.Constant):
        raise KeyError(node)
    return Fraction(node.value)


def random_expression(rng: random.Random, depth: int) -> str:
    """A text of the grammar, with redundant brackets, signs and spaces."""
    if depth == 0 or rng.random() < 0.15:
        return str(rng.choice((0, 1, 2, 3, 7, 10, 12, 99, 10**11)) if rng.random() < 0.3 else rng.randint(0, 30))
    left, right = (random_expression(rng, depth - 1) for _ in range(2))
    space = rng.choice(("", "", " ", "\n", "\t "))
    shape = rng.choice(
        ("{}{s}{o}{s}{}", "({}{o}{})", "({s}{}{s}{o}{}{s})", "-({}{o}{})", "-{}{o}{}", "{}{o}-{}", "+{}{o}{}")
    )
    return shape.format(left, right, o=rng.choice("+-*/"), s=space)


def damaged(text: str, rng: random.Random) -> str:
    """One or two characters more, fewer or others."""
    for _ in range(rng.randint(1, 2)):
        i = rng.randrange(len(text) + 1)
        piece = rng.choice(
            ("", "(", ")", "*", "/", "+", "-", " ", "0", "7", ".", "_", "e", "**", "//", "()", "x", "\u0663")
        )
        text = text[:i] + piece + text[i + rng.randint(0, 1) :]
    return text


def compare_with_python(count: int, seed: int) -> None:
    """Half of the expressions are good, the others damaged; we agree with Python on what is one and on its value."""
    rng, valid = random.Random(seed), 0
    for i in range(count):
        text = random_expression(rng, rng.randint(1, 4))
        text = damaged(text, rng) if i % 2 else text
        expected = exact_value(text)
        try:
            value, numerals = rewards.parse_expression(text)
            assert numerals == [int(n) for n in re.findall("[0-9]+", text)], text
        except ValueError:
            value = None
        if len(text) > 500 or len(re.findall("[0-9]+|[^0-9\\s]", text)) > 200:
            expected = None  # too long for us
        assert value == expected, f"{text!r}: ours {value}, Python's {expected}"
        valid += expected is not None
    assert 0.5 * count < valid < 0.9 * count


def test_expressions_against_python():
    compare_with_python(10_000, 0)


@pytest.mark.slow
def test_many_expressions_against_python():
    compare_with_python(90_000, 1)


# ------------------------------------------------------------------------------------------ LaTeX answers

EQUAL = [
    (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"),
    (r"2\sin(x)\cos(x)", r"\sin(2x)"),
    (r"e^{i\pi}", "-1"),
    (r"\sqrt[3]{27}", "3"),
    (r"2\sqrt[3]{4}", r"\sqrt[3]{32}"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty,2) \cup (3,+\infty)"),  # as text
    ("2^3^2", "512"),
    ("-2^2", "-4"),
    (r"x \in [-2,7]", "[-2, 7]"),
    ("y = 2x + 3", "2x+3"),
    ("2516_8", "2516_{8}"),
    ("12", "12 square units"),
    (r"-2\frac{1}{3}", r"-\frac{7}{3}"),
    ("50%", "1/2"),
    ("12.5", r"12.5\%"),
    ("(1000,2000)", "(1000, 2000)"),
    ("1,000,000", "1000000"),
    (r"10 \text{ and } 12", "12, 10"),
    (r"\text{Evelyn}", "evelyn"),
    ("(1,2),(3,4)", "(3,4), (1,2)"),
]
UNEQUAL = [
    ("10", "1 0"),
    ("5", "5 or 6"),
    ("2", r"2 \sin x"),
    ("yes", "sey"),
    ("1/2", "1/2%"),
    ("0.5", "0.5%"),
    (r"\frac{x}{0}", r"\frac{y}{0}"),
    (r"\frac{1}{0}", r"\frac{2}{0}"),
    (r"\pi", "3.14159265358979323846264338327950288"),
    ("3", "3.0000000000000000000001"),
    (r"\ln 10", r"\log 10"),
    (r"\sqrt{x^2}", "x"),
    ("2,2,3", "2,3,3"),
    ("(1,2,3)", "1,2,3"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\frac{1}{2", r"\frac{1}{2"),
    ("3", "\u0663"),
    ("x=y=3", "3"),
]


@pytest.mark.parametrize("gold, pred", EQUAL)
def test_math_equal(gold, pred):
    assert rewards.math_equal(gold, pred) and rewards.math_equal(pred, gold)


@pytest.mark.parametrize("gold, pred", UNEQUAL)
def test_math_not_equal(gold, pred):
    assert not rewards.math_equal(gold, pred) and not rewards.math_equal(pred, gold)


def test_powers_are_refused_before_they_are_computed():
    with pytest.raises(ValueError):
        rewards.small_power(Fraction(9), Fraction(9**9))
    for value in (Fraction(501), Fraction(-1), Fraction(1, 2)):  # of a factorial or a binomial coefficient
        with pytest.raises(ValueError):
            rewards.small_integer(value)
    started = time.process_time()
    assert not rewards.math_equal("9^{9^{9^{9}}}", "1")
    assert not rewards.math_equal("x^{9^{9^{9}}}", "x")
    assert time.process_time() - started < 0.2


# --------------------------------------------------------------------------------------- the symbolic child


def test_a_late_child_is_killed_counted_and_replaced(monkeypatch):
    assert rewards.math_equal(r"\sqrt{12}", r"2\sqrt{3}")
    before = rewards.symbolic_timeouts
    monkeypatch.setattr(rewards, "SYMBOLIC_SECONDS", 1e-4)
    assert not rewards.math_equal(r"(x+y)^{20}(x-y)^{20}", r"(x^2-y^2)^{20}")  # 0.2 s
    assert rewards.symbolic_timeouts == before + 1
    monkeypatch.undo()
    assert rewards.math_equal(r"\sqrt{12}", r"2\sqrt{3}")


def test_a_dead_child_is_replaced():
    assert rewards.math_equal(r"\sqrt{8}", r"2\sqrt{2}")
    child = rewards.running_child()
    child.kill()
    child.wait()
    assert rewards.math_equal(r"\sqrt{8}", r"2\sqrt{2}")


def test_an_interrupted_request_leaves_no_reply_for_the_next(monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    assert rewards.math_equal(r"\sqrt{8}", r"2\sqrt{2}")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rewards.time, "monotonic", interrupt)  # read between the child's two replies
        rewards.math_equal(r"\sqrt{8}", r"2\sqrt{2}")
    assert not rewards.math_equal(r"\sqrt{8}", r"3\sqrt{2}")


def test_threads_share_the_child():
    verdicts = []
    ask = [(r"\sqrt{12}", r"2\sqrt{3}", True), (r"\sqrt{12}", r"3\sqrt{2}", False)] * 4
    threads = [
        threading.Thread(target=lambda g, p, e: verdicts.append(rewards.math_equal(g, p) == e), args=a) for a in ask
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [True] * 8


def test_the_users_script_runs_once(tmp_path):
    script = tmp_path / "no_main_guard.py"
    script.write_text("import rewards\nprint('ran', rewards.math_equal('x^2-1', '(x-1)(x+1)'))\n", encoding="utf-8")
    run = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (run.stdout, run.stderr, run.returncode) == ("ran True\n", "", 0)


# ------------------------------------------------------------------------------------------ hostile answers

TOWER = "9**9**9**9"
HOSTILE = [
    "", " ", "\n", "\0", "\x1b[31m", "\ud800", "\ufeff22", "NaN", "inf", "-", "+", "()", ")(", "((", "[",
    "]", "{", "}", "\\", "\\\\", "$", "$$", "%", "%%", "!", "!!!!", "^", "_", "|", ",", ",,,,", ";", "=",
    "==", ".", "..", "/", "1/0", "0/0", "1/(1-1)", "9" * 400, "9" * 5000, "9" * 10**6, "1" + "0" * 4400,
    TOWER, "9^9^9^9^9", "99**98**97", "9^{9^{9^{9^9}}}", "2^{-9^9}", "x^{9^{9^9}}",
    "(x+y+z+w)^{20}(a+b+c+d)^{20}", "((x+1)^{20})^{20}", "500!", "((5!)!)!", "10^{10}!",
    r"\binom{10^9}{10^8}", r"\binom{500}{250}", "1e999", "1e-999", "1e999999999", "(" * 400,
    "(" * 240 + "1" + ")" * 240, "(" * 10**6, "-" * 400 + "1", "-" * 10**5, "1+" * 200 + "1", "1+" * 10**5,
    "{" * 10**5, r"\frac{" * 80, r"\frac{1}{" * 40 + "1" + "}" * 40, r"\sqrt{" * 60 + "2" + "}" * 60,
    r"\sqrt[0]{2}", r"\sqrt[99999999]{2}", r"\sqrt{10^{400}+1}", r"\sin(\cos(\tan(x^{19}+y)))^{19}",
    r"\sin(10^{400})", r"\tan(\frac{\pi}{2})", r"\log 0", r"\ln(-1)", r"\text{" * 100, r"\left(" * 50,
    r"\begin{pmatrix}" * 30, r"\begin{pmatrix}1\end{bmatrix}", "&".join("1" * 200), ",".join("x" * 100),
    ",".join(["x+1"] * 40) + ",x", r"\sqrt{2}," * 40 + "x", r"\cup" * 100, r"\pm" * 100,
    "(1," * 100 + "1" + ")" * 100, "__import__('os').system('true')", "exec('1')", "lambda: 0",
    "().__class__", "os.abort()", "print", "Symbol('x')", "3,5,7", "3 5 7", "3.0*5+7", "3*5+7=22", "35+7",
    "12*34", "408.0", "4_0_8", "\u0664\u0660\u0668", "22\u00b2", "0x16", "</answer>", "<answer>",
    "</think>", "<answer><answer>", "<think>" * 1000, "<answer>" * 10**4, "</answer>" * 10**4,
    "</think>" * 10**4, "<answer></answer>" * 10**4, "####" * 10**4, r"\boxed{" * 10**4,
    r"\boxed{}" * 10**4, r"\boxed", "#### ", "#### 1/0", "#### " + "1," * 400, "$" * 10**5, "a" * 10**6,
    " " * 10**6, "\u4e00" * 10**6, "1 " * 10**5,
    # other alphabets and characters without a shape
    "\uff12\uff12", "\u00bd", "\u2153", "\u00b2\u00b2", "\u2462", "2\u200b2", "2\u202e2", "\u202e22", "2\u03012",
    "\U0001f600", "\u2212" * 400, "\u00d7" * 400, "3\u22c55-7", "\ud83d", "\x00" * 500, "\x7f", "\x9b31m", "\r\n" * 200,
    "\x1b]0;title\x07", "\x1b[2J\x1b[H", "\u2028" * 100, "\u0660" * 40, "\u0967\u096e", "\u516b\u5341", "XVIII",
    "\u2167",
    # other languages
    "<script>alert(1)</script>", "{{7*7}}", "${7*7}", "%s%s%n", "'; DROP TABLE x; --", "$(reboot)", "`reboot`",
    "1;1", "1\n2",
    r"\input{/etc/passwd}", r"\write18{true}", r"\def\a{\a\a}\a", r"\newcommand{\x}{1}\x", r"\boxed{\boxed{18}",
    "&#49;&#56;",
    "True", "None", "18j", "0b10", "1_8", "18L", "1e1", "18.0.0", "+-18", "--18", "18-", "1 8", "1,8", "18:1",
    "18!", "\u221e",
    "import os", "getattr(1,'real')", "[x for x in (1,)]", "sum(range(10**9))", "1 if 1 else 1", "a" * 501,
    "9" * 41 + "/3",
    # what a pattern might go back and forth over
    "1," * 10**5, "1,111" * 10**5, "$ " * 10**5, "-$-$" * 10**5, "." * 10**5, "1/" * 10**5, " /1" * 10**5,
    "```a" * 10**5,
    '"formula"' * 10**5, '"formula": "' * 10**5, '{"formula": "' + "(" * 10**5 + '"}', "[" * 10**5, '{"a":' * 10**5,
    "Ada" * 10**5, "Ada is a knight and " * 10**4, "A+" * 10**5, "is an an " * 10**5, "f" * 10**5, "f " * 10**5,
    "forward()" * 10**5,
    "turn_direction(" * 10**5, "a(" * 10**5, ">" * 10**6, "\\frac" * 10**5, "\\text{" * 10**5, "^{" * 10**5,
    "}" * 10**6,
    "x=" * 10**5, "\\cdot" * 10**5, "\n" * 10**6, "#" * 10**6, "\t" * 10**6, "\u0301" * 10**6, "\ud800" * 10**5,
]  # fmt: skip
SCORERS = {
    "countdown": lambda text: rewards.score_countdown(text, [3, 5, 7], 22),
    "multiplication": lambda text: rewards.score_multiplication(text, 12, 34),
    "gsm8k": lambda text: rewards.score_gsm8k(text, "17"),
    "math": lambda text: rewards.score_math(text, "x^2-1"),
}


JUDGES = SCORERS | {
    "math, a root": lambda text: rewards.score_math(text, r"\\sqrt{2}+x"),
    "countdown's tries": lambda text: rewards.Countdown().describe(text, COUNTDOWN) and WRONG,
    "words": lambda text: rewards.language_consistency(text) + rewards.reflection_count(text) < 0 or WRONG,
}
COUNTDOWN, WRONG = {"numbers": [3, 5, 7], "target": 22}, {"correct": False, "format": 0.0}
LINUX = Path("/proc/self/clear_refs").exists()


def peak() -> float:
    """The most memory that this process has held since `forget_peak`, in MB."""
    status = Path("/proc/self/status").read_text() if LINUX else "VmHWM: 0 kB"
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1024


def forget_peak() -> None:
    if LINUX:
        Path("/proc/self/clear_refs").write_text("5")


def seconds_of(judge, text: str, bound: float) -> float:
    """CPU time of this process, the best of up to three tries; the symbolic child is bounded by the clock."""
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
    """Every answer, in four forms, to every verifier."""
    assert len(set(HOSTILE)) == len(HOSTILE) >= 150
    symbolic, asked = rewards.symbolic_equal, []
    monkeypatch.setattr(rewards, "SYMBOLIC_SECONDS", 0.3)
    monkeypatch.setattr(rewards, "symbolic_equal", lambda *args: asked.append(1) or symbolic(*args))
    rewards.math_equal("x", "y")  # the import of sympy belongs to no answer
    for answer in HOSTILE:
        bound = 0.01 if len(answer) <= 2000 else 0.5  # linear time
        forget_peak()
        before = peak()
        for form in (" </think>\n<answer>{}</answer>", "</think> \\boxed{{{}}}", "#### {}", "{}"):
            text = form.format(answer)
            for name, judge in JUDGES.items():
                asked.clear()
                seconds = seconds_of(judge, text, bound)
                assert seconds < (0.1 if asked else bound), f"{name}: {seconds:.3f} s for {text[:80]!r}"
        assert peak() - before < 50, f"{peak() - before:.0f} MB for {answer[:80]!r}"


PIECES = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<ans",
    "wer>",
    "\\boxed{",
    "}",
    "{",
    "####",
    "=",
    "(",
    ")",
    "\n",
    " ",
]
PIECES += list("0123456789+-*/,.$%#^_!|;:<>\"'`~") + [
    "wait",
    "\x00",
    "\x1b[31m",
    "\u202e",
    "\ud800",
    "\u0663",
    "\u4e00",
    "\U0001f600",
]
PIECES += [
    "3*5+7=15+7=22",
    "Ada is a knight",
    "forward()",
    '"formula": "',
    "\\frac{1}{2}",
    "\\sqrt{",
    "\r",
    "\u2028",
    "e",
    "9" * 50,
]


def ugly(rng: random.Random, most: int) -> str:
    """A completion of tags, digits, signs, odd characters and plain noise, up to `most` characters."""
    length, some = int(most ** rng.random()), rng.sample(PIECES, rng.randint(1, 12))
    text = "".join(rng.choices(some, k=length // 3 + 1))
    for _ in range(rng.randint(0, 4)):
        i = rng.randrange(len(text) + 1)
        text = text[:i] + rng.choice(("</think>", "<answer>", "</answer>", "\\boxed{18}", "#### 5", "<eos>")) + text[i:]
    return text[:most]


UGLY = "countdown", "multiplication"


@pytest.mark.parametrize("most, count", [(200, 600), (10**4, 60), (10**6, 6)])
def test_ugly_completions(most, count):
    rng = random.Random(most)
    tasks = [rewards.make_task(name) for name in UGLY]
    for i in range(count):
        text, before = ugly(rng, most), rewards.score_failures
        for task in tasks:
            problem = task.problem("train", 0, i)
            parts = task.score(text, problem)
            assert 0 <= parts["total"] <= 2.1 and parts["correct"] in (True, False) and parts["format"] in (0.0, 1.0)
            assert parts["answer"] is None or parts["answer"] in text.replace(",", "") or parts["answer"] in text
            seen = task.describe(text, problem) if hasattr(task, "describe") else {}
            assert all(math.isfinite(value) for value in seen.values())
        assert rewards.score_failures == before, "a verifier raised"


BAD_VERIFIERS = {
    "raises": lambda *args, **kw: {}["gone"],
    "returns None": lambda *args, **kw: None,
    "returns a number": lambda *args, **kw: 1.0,
    "returns nan": lambda *args, **kw: {"format": 0.0, "answer": None, "correct": True, "total": math.nan},
    "returns inf": lambda *args, **kw: {"format": 0.0, "answer": None, "correct": True, "total": math.inf},
    "returns text": lambda *args, **kw: {"format": 0.0, "answer": None, "correct": True, "total": "1"},
    "returns half": lambda *args, **kw: {"total": 1.0, "correct": True},
    "shows controls": lambda text, *args, **kw: int("\x1b[2J" + text),
}


@pytest.mark.parametrize("case", BAD_VERIFIERS)
def test_bad_verifiers(case, monkeypatch, capsys):
    monkeypatch.setattr(rewards.Countdown, "score", BAD_VERIFIERS[case])
    monkeypatch.setattr(rewards, "score_failures", 0)
    task = rewards.make_task("countdown")
    for _ in range(9):
        found = task.score("</think><answer>3*5+7</answer>", COUNTDOWN)
        assert found == {"format": 0.0, "answer": None, "correct": False, "total": 0.0}
    err = capsys.readouterr().err
    assert err.count("Traceback") == 1 and "\x1b" not in err
    assert re.findall(r"failed on (\d+) answer", err) == ["1", "2", "4", "8"] and rewards.score_failures == 9


def test_a_fault_of_the_machine_is_none_of_an_answer(monkeypatch):
    def score(*args, **kw):
        raise OSError("no space left")

    monkeypatch.setattr(rewards.Countdown, "score", score)
    with pytest.raises(OSError, match="no space left"):
        rewards.make_task("countdown").score("", COUNTDOWN)


# -------------------------------------------------------------------------- shaped rewards and metrics


def test_cosine_reward_by_hand():
    values = {"r0c": 2.0, "rLc": 1.0, "r0w": -10.0, "rLw": 0.0, "r_exceed": -7.0, "max_length": 100}
    # cos(pi/3) = 1/2 at a third of the way: rL + 3/4 (r0 - rL)
    assert rewards.cosine_reward(0, True, **values) == 2.0
    assert rewards.cosine_reward(50, True, **values) == pytest.approx(1.5)
    assert rewards.cosine_reward(30, False, **(values | {"max_length": 90})) == pytest.approx(-7.5)
    assert [rewards.cosine_reward(n, True, **values) for n in (100, 101, 1000)] == [-7.0] * 3
    assert rewards.cosine_reward(84, True, **values, margin=16) == -7.0
    assert rewards.cosine_reward(83, True, **values, margin=16) > 1.0


def test_repetition_by_hand():
    # 9 9 9 9 with n = 2: the 2-grams at 1 and 2 were seen at 0
    assert rewards.repetition_penalty([9, 9, 9, 9], n=2, penalty=-1.0) == [0.0, -1.0, -1.0, -1.0]
    assert rewards.repetition_penalty([], n=2) == [] and rewards.repetition_penalty([1], n=2) == [0.0]
    # a run of 42 equal tokens with the paper's n = 40 is penalised at 1..41
    assert rewards.repetition_penalty([7] * 42) == [0.0] + [-0.05] * 41


def test_soft_overlong_by_hand():
    assert [rewards.soft_overlong(n, 100, 20) for n in (80, 85, 100, 500)] == [0.0, -0.25, -1.0, -1.0]


def test_language_consistency_by_hand():
    assert rewards.language_consistency("the sum \u4e00\u4e8c") == 0.5
    assert rewards.language_consistency("the sum \u4e00\u4e8c", "zh") == 0.5
    assert rewards.language_consistency("\u0434\u0430 yes", "ru") == 0.5
    assert rewards.language_consistency("```\u4e00```  3+4") == 1.0
    with pytest.raises(BadInput, match="choose one of en"):
        rewards.language_consistency("x", "tlh")


def test_reflection_lists():
    assert len(rewards.REFLECTIONS) == 11
    assert rewards.reflection_count("Try again. Let me try again, wait.") == 2


def test_pass_at_k_against_counting():
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                expected = 1 - math.comb(n - c, k) / math.comb(n, k)
                assert rewards.pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)
    for bad in ((4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0)):
        with pytest.raises(ValueError):
            rewards.pass_at_k(*bad)


# -------------------------------------------------------------------------------------------------- tasks


def swapped(problem: dict) -> dict:
    return {"a": problem["b"], "b": problem["a"]}


def reversed_numbers(problem: dict) -> dict:
    return problem | {"numbers": problem["numbers"][::-1]}


# a generated task and a function that writes the same problem in another order
GENERATED = [
    (rewards.Countdown(), reversed_numbers),
    (rewards.make_task("countdown", natural=True), reversed_numbers),
    (Multiplication(), swapped),
    (Multiplication(1, 1), swapped),
    (rewards.make_task("multiplication", natural=True), swapped),
]


@pytest.mark.parametrize("task, permute", GENERATED, ids=str)
def test_streams(task, permute):
    streams = {s: [task.problem(s, 0, i) for i in range(300)] for s in ("train", "test")}
    assert streams["train"] == [task.problem("train", 0, i) for i in range(300)]
    assert streams["train"] != [task.problem("train", 1, i) for i in range(300)]
    keys = {split: {task.key(p) for p in problems} for split, problems in streams.items()}
    assert not keys["train"] & keys["test"]
    for problem in streams["train"] + streams["test"]:
        assert json.loads(json.dumps(problem)) == problem
        assert task.key(permute(problem)) == task.key(problem)
        assert task.compact(problem).endswith("<think>") and "<answer>" in task.question(problem)


def test_split_share():
    share = sum(rewards.split_of(str(i)) == "test" for i in range(10_000)) / 10_000
    assert 0.09 < share < 0.115


def test_countdown_problems_are_in_range():
    task = rewards.Countdown(min_numbers=2, max_numbers=4, low=2, high=12, min_target=5, max_target=40)
    problems = [task.problem("train", 0, i) for i in range(60)]
    assert {len(p["numbers"]) for p in problems} == {2, 3, 4}
    for p in problems:
        assert all(2 <= n <= 12 for n in p["numbers"]) and 5 <= p["target"] <= 40
    for bad in ({"min_numbers": 1}, {"max_numbers": 7}, {"low": 0}, {"min_target": 9, "max_target": 8}):
        with pytest.raises(BadInput):
            rewards.Countdown(**bad)
    with pytest.raises(BadInput, match="some of"):
        rewards.Countdown(operators="+%")
    with pytest.raises(BadInput, match="widen the ranges"):
        rewards.Countdown(low=1, high=1, min_target=98).problem("train", 0, 0)


def test_countdown_traces():
    task, solved, waits, tries = rewards.Countdown(), 0, 0, []
    for i in range(600):
        problem = task.problem("train", 0, i)
        trace = task.trace(problem, random.Random(f"trace {i}"))
        assert trace == task.trace(problem, random.Random(f"trace {i}"))
        parts, seen = task.score(trace, problem), task.describe(trace, problem)
        lines, _, answer = trace.partition("</think>")
        lines = lines.splitlines()
        assert answer == f"<answer>{parts['answer']}</answer>" and parts["format"] == 1.0
        expressions = [line.removeprefix("wait").partition("=")[0] for line in lines]
        assert expressions[-1] == parts["answer"]  # the last try is the answer
        assert (seen["tries"], seen["distinct_tries"]) == (len(lines), len(lines)) and len(lines) <= 30
        assert seen["gave_up"] == (not parts["correct"])
        for line in lines[:-1]:  # only the last try may hit
            assert f"={problem['target']}={problem['target']}" not in line
        sign = re.search("[<>=][0-9]+$", lines[-1])[0]
        assert (sign[0] == "=") == parts["correct"] and sign[1:] == str(problem["target"])
        solved, waits = solved + parts["correct"], waits + sum(line.startswith("wait") for line in lines)
        tries.append(len(lines))
    assert 0.27 < 1 - solved / 600 < 0.39  # give_up
    assert 0.2 < waits / (sum(tries) - 600) < 0.3 and max(tries) > 10
    # depth first: tries with the same first operation stand together
    attempts = {chain: first for _, first, chain in countdown_attempts((2, 3, 4), "+-*/", 99)}
    lines = rewards.Countdown(give_up=0.0).trace({"numbers": [2, 3, 4], "target": 98}, random.Random(0)).splitlines()
    firsts = [attempts[re.sub("^wait|[<>=][0-9]+$", "", line)] for line in lines if line.endswith("98")]
    assert len(firsts) > 1 and len(list(itertools.groupby(firsts))) == len(set(firsts))
    problem = task.problem("train", 0, 0)
    never, always = rewards.Countdown(give_up=0.0), rewards.Countdown(give_up=1.0)
    assert never.score(never.trace(problem, random.Random(0)), problem)["correct"]
    assert not always.score(always.trace(problem, random.Random(0)), problem)["correct"]


def test_countdown_streams_stay():
    """Published results rest on these problems and traces: a change of one character is another task."""
    task, text = rewards.Countdown(), ""
    for i in range(500):
        problem = task.problem("train", 0, i)
        text += task.compact(problem) + task.trace(problem, random.Random(f"trace {i}"))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "6c3a301bc1043e47"


def test_countdown_trace_marks():
    """Above, below and on the target: the value, then > < or =, then the target."""
    problem, marks = {"numbers": [1, 2, 3], "target": 5}, set()
    for i in range(50):
        trace = rewards.Countdown().trace(problem, random.Random(i))
        for value, mark, target in re.findall(r"=([0-9]+)([<>=])([0-9]+)\n", trace):
            marks.add(mark)
            assert target == "5" and mark == ("=" if value == "5" else "<" if int(value) < 5 else ">")
    assert marks == {"<", "=", ">"}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", (0, 0, False)),
        ("1+2+3=3+3=6>5\nwait2*3-1=6-1=5=5\n</think><answer>2*3-1</answer>", (2, 2, False)),
        ("1+2+3=3+3=6>5\nwait1+2+3=3+3=6>5\n</think><answer>1+2+3</answer>", (2, 1, True)),
        ("1+2+3=3+3=6>5\n", (1, 1, False)),  # cut off, not given up
        ("nothing to see\n</think>", (0, 0, False)),
    ],
)
def test_countdown_describe(text, expected):
    got = rewards.Countdown().describe(text, {"numbers": [1, 2, 3], "target": 5})
    assert (got["tries"], got["distinct_tries"], got["gave_up"]) == expected


def test_pool_of_training_problems():
    task, whole = rewards.make_task("countdown:pool=3,high=12"), rewards.make_task("countdown:high=12")
    assert [task.problem("train", 0, i) for i in range(7)] == [whole.problem("train", 0, i % 3) for i in range(7)]
    assert [task.problem("test", 0, i) for i in range(7)] == [whole.problem("test", 0, i) for i in range(7)]


def test_heldout():
    task = Multiplication()
    problems = rewards.heldout(task, 100)
    assert len({task.key(p) for p in problems}) == 100
    assert problems[:10] == rewards.heldout(task, 10) != rewards.heldout(task, 10, seed=1)
    with pytest.raises(BadInput, match="fewer than 40"):
        rewards.heldout(Multiplication(1, 1), 40)


def test_prompts():
    task, problem = Multiplication(), {"a": 12, "b": 34}
    assert rewards.prompt(task, problem, "compact") == "12*34=<think>"
    text = rewards.prompt(task, problem, "text")
    assert "User: What is 12 * 34?" in text and text.endswith("\nAssistant: " + rewards.ASSISTANT_PREFIX)
    assert rewards.ASSISTANT_PREFIX == "Let me solve this step by step.\n<think>"
    assert rewards.prompt(task, problem, "chat") == [{"role": "user", "content": task.question(problem)}]


def test_make_task():
    assert rewards.make_task("multiplication:max_digits=4") == Multiplication(1, 4)
    assert rewards.make_task("multiplication:max_digits=4", natural=True) == Multiplication(2, 4)
    for spec, words in [
        ("chess", "countdown, gsm8k, math, .*affine, s3, prosqa, chains or FILE.py:Class"),
        ("multiplication:size=3", "'size=3'.*min_digits=int, max_digits=int"),
        ("multiplication:max_digits=two", "'max_digits=two'.*max_digits=int"),
        ("multiplication:max_digits=99", "<= 18"),
        ("multiplication:max_digits", "'max_digits'"),
        ("gsm8k", "--data"),
    ]:
        with pytest.raises(BadInput, match=words) as error:
            rewards.make_task(spec)
        assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match="multiplication: 'data=x.jsonl' is none of its knobs, pool=int, min_digits=int"):
        rewards.make_task("multiplication", data="x.jsonl")


def write(path: Path, rows: list) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return str(path)


def test_gsm8k_file(tmp_path):
    rows = [{"question": f"How many is {i}?", "answer": f"It is <<{i}={i}>>.\n#### {i:,}"} for i in range(2000, 2200)]
    task = rewards.make_task("gsm8k", data=write(tmp_path / "gsm8k.jsonl", rows))
    train, test = task.streams["train"], task.streams["test"]
    assert len(train) + len(test) == 200 and 5 < len(test) < 40
    epoch = [task.problem("train", 0, i)["question"] for i in range(len(train))]
    following = [task.problem("train", 0, len(train) + i)["question"] for i in range(len(train))]
    assert sorted(epoch) == sorted(row["question"] for row in train) == sorted(following)
    assert epoch != following and epoch != [row["question"] for row in train]
    assert task.problem("test", 0, len(test) + 1) == test[1]
    problem = task.problem("train", 0, 0)
    assert task.score(f"</think> <answer>{problem['answer']}</answer>", problem)["total"] == 1.1
    assert problem["question"] in task.question(problem)
    with pytest.raises(BadInput, match="pre-trained"):
        rewards.prompt(task, problem, "compact")


def test_math_file(tmp_path):
    rows = [{"problem": f"p{i}", "answer": f"\\frac{{{i}}}{{2}}", "level": 1 + i % 5} for i in range(200)]
    rows += [{"problem": f" p{i}\n", "answer": i / 2} for i in range(50)]  # the same again: on the same side
    task = rewards.make_task("math", data=write(tmp_path / "math.jsonl", rows))
    keys = {split: {task.key(row) for row in stream} for split, stream in task.streams.items()}
    assert not keys["train"] & keys["test"] and len(keys["train"] | keys["test"]) == 200
    problem = next(row for row in task.streams["train"] + task.streams["test"] if row["question"] == "p3")
    assert task.score("</think> \\boxed{1.5}", problem)["correct"]
    assert not task.score("</think> \\boxed{3}", problem)["correct"]
    assert problem["question"] in task.question(problem) and r"\frac{1}{2}" in task.question(problem)
    count = len(keys["test"])
    assert len(rewards.heldout(task, count)) == count
    with pytest.raises(BadInput, match=f"only {count}"):
        rewards.heldout(task, count + 1)
    with pytest.raises(BadInput, match="pre-trained"):
        rewards.prompt(task, problem, "compact")
    one = rewards.make_task("math", data=write(tmp_path / "one.jsonl", rows[:1]))
    empty = "train" if one.streams["test"] else "test"
    with pytest.raises(BadInput, match=f"no {empty} rows"):
        one.problem(empty, 0, 0)
    with pytest.raises(BadInput, match="line 1: math: the gold answer"):
        rewards.make_task("math", data=write(tmp_path / "bad.jsonl", [{"problem": "p", "answer": r"\frac{1"}]))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"{}\n", 'line 1: field "question"'),
        (b'{"question": "q", "answer": "#### 1"}\n\n[1]\n', "line 3: not a JSON object"),
        (b'{"question": "q", "answer": "#### 1"}\n{"question"', 'line 2: .*{"question"'),
        (b'{"question": "q", "answer": ""}', 'field "answer" is missing or empty'),
        (b'{"question": "q", "answer": null}', 'field "answer" is missing or empty'),
        (b'{"question": "q", "answer": "#### many"}', "line 1: gsm8k: the gold answer 'many' is not a number"),
        (b'{"question": " ", "answer": "#### 1"}', 'line 1: field "question" is missing or empty'),
        (b"\xff\xfe", "cannot read"),
        (b"[" * 100_000, "RecursionError"),
        (b'[{"question": "q", "answer": "#### 1"}, 5]', "item 2: not a JSON object: '5'$"),
        (b'[{"question": "q", "answer": "#### 1"},\n]', "line 2 column 1"),
        (b"[]", "is empty"),
        (b'{"question": "q"}\n\n{"question": "q"}', "line 1: .*; 1 more such line: 3$"),
        (b"{}\n" + b'{"question": "q", "answer": "1"}\n' + b"{}\n" * 9, "line 1: .*; 9 more such lines: 3, 4, 5, 6, 7$"),
    ],
)
def test_bad_files(tmp_path, content, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=words) as error:
        rewards.make_task("gsm8k", data=str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["lines", "list", "indented list"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_forms_of_a_file(tmp_path, form, mark):
    """JSON lines or one JSON list, with and without the mark of the byte order that some editors write first."""
    rows = [{"question": f"\u4e00 {i}?", "answer": f"#### {i}"} for i in range(30)]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if form != "lines":
        text = json.dumps(rows, indent=2 if form == "indented list" else None)
    (tmp_path / "rows").write_bytes(mark + text.encode())
    streams = rewards.make_task("gsm8k", data=str(tmp_path / "rows")).streams
    assert sorted(int(row["answer"]) for row in streams["train"] + streams["test"]) == list(range(30))


USER, REPLY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": ""}
CHATS = {
    "messages": ({"messages": [SYSTEM, USER, REPLY], "source": "x"}, [SYSTEM, USER, REPLY]),
    "prompt and completion": ({"prompt": [SYSTEM, USER], "completion": [REPLY]}, [SYSTEM, USER, REPLY]),
    "conversations": (
        {"id": 7, "conversations": [{"from": "system", "value": ""}, {"from": "human", "value": "2+2?"}, REPLY]},
        [SYSTEM, USER, REPLY],
    ),
    "gpt": ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, [USER, REPLY]),
}


@pytest.mark.parametrize("case", CHATS)
def test_read_chat(case):
    row, messages = CHATS[case]
    assert rewards.read_chat(row) == messages


@pytest.mark.parametrize(
    "row, words",
    [
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 has no role or no content"),
        ({"messages": [{"content": "2+2?"}]}, "message 1"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2"),
        ({"messages": [USER, "4"]}, "message 2"),
        ({"prompt": [USER], "completion": "4"}, "message 2"),
        ({"conversations": [{"from": "human", "text": "2+2?"}]}, "message 1"),
        ({"messages": []}, "list of messages"),
        ({"conversations": {"from": "human", "value": "2+2?"}}, "list of messages"),
        ({"prompt": "2+2?", "completion": 4}, "list of messages"),
        ({"question": "2+2?", "answer": "4"}, "list of messages"),
    ],
)
def test_bad_chats(row, words):
    with pytest.raises(BadInput, match=words):
        rewards.read_chat(row)


@pytest.mark.parametrize("end", ["<think>", "<think>\n", "<think>\n\n"])
def test_open_thinking(end):
    """A template that opens the thinking itself keeps its own end; any other gets the prefix."""
    closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert rewards.open_thinking("<|im_start|>assistant\n" + end) == "<|im_start|>assistant\n" + end
    assert rewards.open_thinking(closed) == closed + rewards.ASSISTANT_PREFIX


def test_missing_file():
    with pytest.raises(BadInput, match="cannot read the data file nowhere.jsonl"):
        rewards.make_task("math", data="nowhere.jsonl")
