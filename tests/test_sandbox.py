"""more/sandbox.py: right programs pass, hostile ones pass nothing and leave nothing behind."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "more"))
import sandbox  # noqa: E402

from rewards import BadInput, make_task  # noqa: E402

GOOD = """
from collections import Counter

def f(x):
    return x + 1

def g(text):
    return Counter(text)
"""


@pytest.mark.parametrize(
    "test, right",
    [
        ("assert f(3) == 4", True),
        ("assert f(3) == 4, 'a message'", True),
        ("assert f(3) == 5", False),
        ("assert f(3) != 5", True),
        ("assert f(-1) == False", True),  # as in Python
        ("assert not f(-1)", True),
        ("assert not f(1)", False),
        ("assert f(1) < 3 < 4", True),
        ("assert abs(f(0.5) - 1.5) < 1e-9", True),
        ("assert f(3) in (4, 5)", True),
        ("assert f(3) not in [4]", False),
        ("assert f(float('inf')) == float('inf')", True),
        ("assert [f(1), (f(2), {f(3)}), set()] == [2, (3, {4}), set()]", True),
        ("assert g('aab') == {'a': 2, 'b': 1}", True),
        ("assert sorted([f(2), f(1)]) == sorted([3, 2])", True),
        ("assert f(2) is None", False),
        ("assert f(2) < 'a'", False),
        ("assert f('3') == 4", False),
        ("assert missing(3) == 4", False),
    ],
)
def test_a_test_passes_as_in_python(test, right):
    assert sandbox.run_tests(GOOD, [test]) == ([right], "ok")


def test_a_test_that_hangs_fails_alone():
    program = "def f(x):\n    while x == 2: pass\n    return x"
    tests = [f"assert f({n}) == {n}" for n in range(5)]
    began = time.monotonic()
    assert sandbox.run_tests(program, tests, seconds=0.5) == ([1, 1, 0, 1, 1], "timeout")
    assert time.monotonic() - began < 3
    assert sandbox.run_tests(program, tests[2:3] * 9, seconds=0.5, total=1.2)[1] == "timeout"
    assert time.monotonic() - began < 6


@pytest.mark.parametrize("test", ["f(3) == 4", "assert", "assert f(1); assert f(2)", "x = 1", "\0"])
def test_what_is_no_assert_is_refused(test):
    with pytest.raises(ValueError, match="not one assert"):
        sandbox.run_tests(GOOD, [test])


def test_the_program_of_an_answer():
    answer = "First\n```python\nx = 1\n```\nno:\n```py\nx = 2\n```\n```\nshell\n```"
    assert sandbox.program_of(answer) == "x = 2\n"
    assert sandbox.program_of("x = 3") == "x = 3"


SECRET = 736455182
FORGE = "import os\nfor fd in range(3, 32):\n  try: os.write(fd, LINES)\n  except OSError: pass\n"
FIND = r"""
import gc, re, sys
def f(x):
    frame, seen = sys._getframe(), []
    while frame:
        seen += [str(v) for v in (*frame.f_locals.values(), *frame.f_globals.values())]
        frame = frame.f_back
    seen += [str(thing) for thing in gc.get_objects()]
    return int((re.findall(r"\b7364[0-9]{5}\b", " ".join(seen)) or [0])[0])
"""
HOSTILE = {  # name: program, its status
    "syntax": ("def f(x)", "syntax"),
    "null byte": ("x = '\0'", "syntax"),
    "deep syntax": ("(" * 5000, "syntax"),
    "error": ("1 / 0", "error"),
    "sys.exit": ("import sys; sys.exit(0)", "error"),
    "os._exit": ("import os; os._exit(0)", "killed"),
    "exit in the function": ("import os\ndef f(x): os._exit(0)", "killed"),
    "raise SystemExit": ("def f(x): raise SystemExit(0)", "ok"),
    "says passed": ("print('passed', 'ok')\ndef f(x): print('passed')", "ok"),
    "forged lines": (FORGE.replace("LINES", 'b\'["ok"]\\n["1"]\\n\' * 99'), "ok"),
    "forged nonsense": (FORGE.replace("LINES", "b'[[{]\\n\\xff\\n'"), "killed"),
    "no end of a line": (FORGE.replace("LINES", "b'x' * 10**6"), "killed"),
    "closed descriptors": ("import os; os.closerange(0, 99)", "killed"),
    "equal to all": ("class E:\n  def __eq__(s, o): return True\ndef f(x): return E()", "ok"),
    "equal int": ("class E(int):\n  def __eq__(s, o): return True\ndef f(x): return E()", "ok"),
    "own text": ("class E:\n  def __repr__(s): return '736455182'\ndef f(x): return E()", "ok"),
    "builtins": ("import builtins\nbuiltins.repr = builtins.type = lambda *a: '1'\nf = str", "ok"),
    "sleep": ("import time; time.sleep(60)", "timeout"),
    "loop": ("while True: pass", "timeout"),
    "ignored signals": ("import signal as s\ns.signal(15, s.SIG_IGN)\nwhile 1: pass", "timeout"),
    "thread": ("from threading import *\nThread(target=exec, args=('while 1: 1',)).start()", None),
    "regex": ("import re\ndef f(x): return re.match('(a+)+$', 'a' * 40 + 'b')", "timeout"),
    "recursion": ("def f(x): return f(x)", "ok"),
    "endless print": ("while True: print('x' * 1000)", "timeout"),
    "memory": ("x = [0] * 10**9", "memory"),
    "memory in the function": ("def f(x): return 'x' * 10**10", "memory"),
    "long value": ("def f(x): return 'x' * 10**7", "ok"),
    "huge number": ("def f(x): return 9 ** 9 ** 9", "timeout"),
    "fork": ("import os\nwhile True: os.fork()", "error"),
    "fork without os": ("import _posixsubprocess", "error"),
    "new session": ("import os; os.setsid(); os.system('sleep 99')", "error"),
    "subprocess": ("import subprocess; subprocess.Popen(['sleep', '99'])", "error"),
    "kill": ("import os; os.kill(os.getppid(), 9)", "error"),
    "socket": ("import socket; socket.create_connection(('127.0.0.1', 80))", "error"),
    "ctypes": ("import ctypes", "error"),
    "write": ("open('/tmp/sandbox-was-here', 'w').write('x')", "error"),
    "remove": ("import shutil; shutil.rmtree('/tmp/sandbox-victim')", "error"),
    "finds what is expected": (FIND, "ok"),
    "reads stdin": ("import sys\ndef f(x): return int(sys.stdin.read() or 0)", "ok"),
    "environment": ("import os\ndef f(x): return int(os.environ['SECRET'])", "ok"),
}


def children() -> set[str]:
    """Processes that run a child's text, by number."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"sys.addaudithook(deny)" in path.read_bytes():
                found.add(path.parent.name)
        except OSError:
            pass
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs(name, tmp_path, monkeypatch):
    program, expected = HOSTILE[name]
    victim = Path("/tmp/sandbox-victim")
    victim.mkdir(exist_ok=True)
    monkeypatch.setenv("SECRET", str(SECRET))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before, began = children(), time.monotonic()
    passed, status = sandbox.run_tests(program, [f"assert f(3) == {SECRET}"], 0.5, 2.0, 2**28)
    assert passed == [False] and time.monotonic() - began < 4
    assert status == expected or expected is None
    assert children() <= before and not list(tmp_path.iterdir())  # neither process nor file stays
    assert not os.path.exists("/tmp/sandbox-was-here") and victim.exists()
    victim.rmdir()


LINE = {
    "question": "Write f(x), x plus one.",
    "test_cases": ["assert f(3) == 4", "assert f(0) == 1"],
}


def answer_of(body: str) -> str:
    return f"Think.</think><answer>```python\ndef f(x):\n    return {body}\n```</answer>"


def test_code_is_a_task_of_its_own(tmp_path):
    path = tmp_path / "code.jsonl"
    path.write_text("\n".join(json.dumps(LINE | {"question": f"{i}"}) for i in range(30)))
    task = make_task("code:allow=1,max_tests=1", str(path), natural=True)
    problem = task.problem("train", 0, 0)
    assert problem["tests"] == ["assert f(3) == 4"]
    assert problem["question"] in task.question(problem)
    whole = {"tests": LINE["test_cases"]}
    for body, rate in (("x + 1", 1.0), ("4", 0.5), ("x +", 0.0), ("1 / 0", 0.0)):
        found = task.score(answer_of(body), whole)
        assert (found["correct"], found["passed"]) == (rate == 1, 2 * rate), body
        assert found["total"] == (rate == 1) + 0.1
    assert task.score("no answer", whole)["passed"] == 0


@pytest.mark.parametrize(
    "spec, line, said",
    [
        ("code", LINE, "allow=1"),
        ("code:allow=1", LINE | {"test_cases": ["f(3) == 4"]}, "not one assert"),
        ("code:allow=1", LINE | {"test_cases": "assert f(3)"}, "list of asserts"),
        ("code:allow=1", LINE | {"question": ""}, "question"),
    ],
)
def test_code_refuses(tmp_path, spec, line, said):
    path = tmp_path / "code.jsonl"
    path.write_text(json.dumps(line))
    with pytest.raises(BadInput, match=said):
        make_task(spec, str(path), natural=True)
