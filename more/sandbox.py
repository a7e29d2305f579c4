"""Run a program that a model wrote against tests, in a child process that is killed.

    python more/sandbox.py FILE 'assert f(3) == 4' 'assert not f(0)'

The child has limits on time, memory and descriptors, writes no file, starts no process, opens no
socket, and sees neither stdin nor the environment. It gets the left side of a test alone and
answers with its value; what was expected is compared here. So a program cannot claim to have
passed: it would have to know the value. Where the right side is no constant, it can.

It is a fence against accidents and simple tricks, not a wall: a Python program that wants out of
the interpreter finds a way, and files can be read. Run it in a container, without a network. It
needs Unix; only the standard library is there to import.
"""

import ast
import json
import operator
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMPARE = {  # by the node of the syntax tree
    "Eq": operator.eq,
    "NotEq": operator.ne,
    "Lt": operator.lt,
    "LtE": operator.le,
    "Gt": operator.gt,
    "GtE": operator.ge,
    "Is": operator.eq,
    "IsNot": operator.ne,
    "In": lambda a, b: a in b,
    "NotIn": lambda a, b: a not in b,
}
MOST = 2**16  # bytes of a value; longer ones are no answer
FAULTS = ["syntax"], ["error"], ["memory"]  # of a program before its first test

CHILD = '''
import collections, json, os, resource, sys

job = json.load(sys.stdin)
out, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
for number in (0, 1, 2):
    os.dup2(null, number)
os.close(null)
for name, most in job["limits"].items():
    try:
        resource.setrlimit(getattr(resource, name), (most, most))
    except (ValueError, OSError):
        pass  # lower already, or not on this system
DENIED = "os.", "socket.", "subprocess.", "ctypes.", "shutil.", "signal.", "fcntl.", "pty."
READING = "os.listdir", "os.scandir", "os.walk", "os.fwalk"
MODULES = "_posixsubprocess", "_ctypes", "_socket", "_multiprocessing", "_winapi"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC

def deny(event, args, denied=DENIED, reading=READING, modules=MODULES, writing=WRITING):
    if event.startswith(denied) and event not in reading:
        raise PermissionError(event)
    if event == "import" and args[0] in modules:
        raise PermissionError(args[0])
    if event == "open" and isinstance(args[2], int) and args[2] & writing:
        raise PermissionError("open for writing")

def plain(value):
    """A plain value as JSON; subclasses, whose == could say anything, are refused."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (dict, collections.Counter, collections.defaultdict, collections.OrderedDict):
        return {"dict": [[plain(k), plain(v)] for k, v in value.items()]}
    if kind is bytes:
        return {"bytes": list(value)}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    parts = [plain(part) for part in value]
    if kind is list:
        return parts
    if kind is tuple:
        return {"tuple": parts}
    if kind in (set, frozenset):
        return {"set": parts}
    raise TypeError(kind)

def say(*line):
    os.write(out, (json.dumps(line) + "\\n").encode())

def answer(texts, namespace):
    """["ok", value of each text], or why there is none."""
    try:
        found = ["ok", *[plain(eval(text, namespace)) for text in texts]]
        return found if len(json.dumps(found)) < job["most"] else ["too long"]
    except MemoryError:
        return ["memory"]
    except BaseException:  # a program may raise whatever it likes, SystemExit, too
        return ["error"]

sys.addaudithook(deny)
namespace, status = {"__name__": "program"}, "ok"
try:
    code = compile(job["program"], "program", "exec")
    try:
        exec(code, namespace)
    except MemoryError:
        status = "memory"
    except BaseException:  # as above
        status = "error"
except (SyntaxError, ValueError, RecursionError, MemoryError):
    status = "syntax"
say(status)
if status == "ok":
    for texts in job["tests"]:
        say(*answer(texts, namespace))
os._exit(0)
'''


def program_of(text: str) -> str:
    """The last block of an answer that says python, else all of it."""
    blocks = re.findall(r"```(?:python|py)[ \t]*\n(.*?)```", text, re.DOTALL)
    return blocks[-1] if blocks else text


def read_test(test: str) -> tuple[list[str], object]:
    """What a child has to evaluate, and a function of these values: did the test pass?

    ValueError where it is not one assert.

    >>> read_test("assert f(3) == [4]")[0], read_test("assert f(3) < g(4)")[0]
    (['f(3)'], ['f(3)', 'g(4)'])
    """
    try:
        (statement,) = ast.parse(test.strip()).body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"not one assert: {test!r}") from error
    if not isinstance(statement, ast.Assert):
        raise ValueError(f"not one assert: {test!r}")
    asked = statement.test
    if isinstance(asked, ast.UnaryOp) and isinstance(asked.op, ast.Not):
        return [ast.unparse(asked.operand)], operator.not_
    if not isinstance(asked, ast.Compare) or len(asked.ops) > 1:
        return [ast.unparse(asked)], bool
    compare = COMPARE[type(asked.ops[0]).__name__]
    left, right = ast.unparse(asked.left), asked.comparators[0]
    try:
        expected = ast.literal_eval(right)
    except (ValueError, TypeError):  # no constant: the child evaluates it, too
        return [left, ast.unparse(right)], compare
    return [left], lambda value: compare(value, expected)


KINDS = {"dict": dict, "tuple": tuple, "set": set, "bytes": bytes}


def value_of(found: object) -> object:
    """A value from what a child says of it in JSON; ValueError or TypeError where it is none."""
    if isinstance(found, list):
        return [value_of(part) for part in found]
    if not isinstance(found, dict):
        return found
    ((kind, parts),) = found.items()
    parts = value_of(parts)
    return complex(*parts) if kind == "complex" else KINDS[kind](parts)


def passes(said: list, judge) -> bool:
    """Whether the values that a child gave pass."""
    try:
        return said[0] == "ok" and bool(judge(*map(value_of, said[1:])))
    except (TypeError, ValueError, LookupError, ArithmeticError, RecursionError):
        return False  # no values, or such as do not compare


def run_tests(
    program: str, tests: list[str], seconds: float = 1.0, total: float = 15.0, memory: int = 2**29
) -> tuple[list[bool], str]:
    """Which tests a program passes, and how it went.

    seconds: for the program, and for each test; total: for everything; memory in bytes. A test
    that hangs fails, and a new child goes on behind it. Status: ok, syntax, error (of the program
    itself), timeout, memory, killed (the child ended by itself). ValueError: a test is no assert.
    """
    wanted = [read_test(test) for test in tests]
    passed, status, end, done = [False] * len(tests), "ok", time.monotonic() + total, 0
    while done < len(tests):
        if time.monotonic() > end:
            return passed, "timeout"
        with Child(program, [texts for texts, _ in wanted[done:]], total, memory) as child:
            began = child.line(min(seconds + 1.0, end - time.monotonic()))  # a second to start
            if began is None:
                return passed, child.fault
            if began != ["ok"]:
                return passed, began[0] if began in FAULTS else "killed"
            for texts, judge in wanted[done:]:
                said = child.line(min(seconds, end - time.monotonic()))
                if said is None:
                    status = child.fault
                    break
                if said == ["memory"]:
                    status = "memory"
                passed[done] = len(said) == 1 + len(texts) and passes(said, judge)
                done += 1
        if done < len(tests):
            done += 1  # past the test that hung or ended the child
    return passed, status


class Child:
    """The process of a program, in a session and an empty folder of its own; gone at the end."""

    def __init__(self, program, tests, total, memory):
        limits = {"RLIMIT_AS": memory, "RLIMIT_CPU": int(total) + 1, "RLIMIT_FSIZE": 0}
        limits |= {"RLIMIT_NOFILE": 32, "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0}
        job = {"program": program, "tests": tests, "limits": limits, "most": MOST}
        self.folder, self.text, self.fault = tempfile.TemporaryDirectory(), b"", "timeout"
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self.folder.name,
            env={},
            start_new_session=True,
        )
        try:
            self.process.stdin.write(json.dumps(job).encode())
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended: no line will come

    def line(self, seconds: float) -> list | None:
        """The next line that it says, None if none comes in time; then `fault` says why."""
        end, pipe = time.monotonic() + seconds, self.process.stdout
        while b"\n" not in self.text:
            left = end - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                return None
            read = os.read(pipe.fileno(), 2**16)
            self.text += read
            if not read or len(self.text) > 4 * MOST:
                self.fault = "killed"
                return None
        line, _, self.text = self.text.partition(b"\n")
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            return []
        return found if isinstance(found, list) else []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.stdout.close()
        self.process.wait()
        self.folder.cleanup()


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__)
        return 2
    passed, status = run_tests(program_of(Path(sys.argv[1]).read_text()), sys.argv[2:])
    for test, right in zip(sys.argv[2:], passed, strict=True):
        print("passed" if right else "failed", test)
    print(status)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
