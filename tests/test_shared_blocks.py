"""The text that scripts repeat is equal to the last character; this file checks it and repairs it.

A repeated room stands between two marker lines:

    # >>> shared: NAME (same text in every script that has it; see tests/test_shared_blocks.py)
    # <<< shared: NAME

A change is made in one script and copied over all others by

    python tests/test_shared_blocks.py --fix NAME SCRIPT

The source is always named by hand, so that an edit made in a copy is never lost.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# top-level names that may differ from script to script
FREE = {"Config", "train", "solve", "BY_SIZE", "check_flags", "sample_batch", "update_policy"}
MAX_LINES = 1705  # of a file, on screen
MAX_SHARED = 900  # lines of code (no blank lines, comments, docstrings) in all blocks of a script
# lines of code outside the blocks
MAX_OWN = {"grpo.py": 255, "sft.py": 300, "nsr.py": 250, "ppo.py": 325, "coconut.py": 302}
MAX_OWN |= {"recurrent_depth.py": 480, "specreason.py": 440}  # its own model; two papers, eleven ways
MAX_OWN["budget_forcing.py"] = 445  # the machine of the rows, five baselines, its own --resume
DEFAULT_OWN = 300
NOTE = "(same text in every script that has it; see tests/test_shared_blocks.py)"
MARKER = re.compile(rf"# (?:>>> shared: (?P<open>[a-z_]+) {re.escape(NOTE)}|<<< shared: (?P<close>[a-z_]+))")
LIKE_A_MARKER = re.compile(r"\s*#\s*(>>>|<<<|>>|<<)\s*shared", re.IGNORECASE)


def scripts(folder: Path) -> list[Path]:
    """The top-level scripts that have blocks, or something that looks like one."""
    return [p for p in sorted(folder.glob("*.py")) if any(map(LIKE_A_MARKER.match, read(p).split("\n")))]


def read(path: Path) -> str:
    with path.open(encoding="utf-8", newline="") as file:  # as it is on disk: \r\n is a difference
        return file.read()


def find_blocks(path: Path) -> dict[str, tuple[int, int]]:
    """{name: (first, last)}: line numbers of the markers, from 1. ValueError for markers that do not pair."""
    blocks, name, first = {}, None, 0
    for number, line in enumerate(read(path).split("\n"), 1):
        if not LIKE_A_MARKER.match(line):
            continue
        marker = MARKER.fullmatch(line)
        if not marker:
            raise ValueError(f"{path.name} line {number}: not a marker of the exact form: {line.strip()!r}")
        if marker["open"]:
            if name:
                raise ValueError(f"{path.name} line {first}: block {name} is not closed before line {number}")
            if marker["open"] in blocks:
                raise ValueError(f"{path.name} line {number}: block {marker['open']} is there twice")
            name, first = marker["open"], number
        else:
            if marker["close"] != name:
                raise ValueError(f"{path.name} line {number}: closes {marker['close']}, but {name} is open")
            blocks[name], name = (first, number), None
    if name:
        raise ValueError(f"{path.name} line {first}: block {name} is not closed")
    return blocks


def block_lines(path: Path, span: tuple[int, int]) -> list[str]:
    return read(path).split("\n")[span[0] - 1 : span[1]]


def differences(folder: Path) -> list[str]:
    """One message for each block of a script that is not the text of the first script that has it."""
    first_holder, found = {}, []
    for path in scripts(folder):
        for name, span in find_blocks(path).items():
            source, source_span = first_holder.setdefault(name, (path, span))
            pairs = zip_longest(block_lines(source, source_span), block_lines(path, span))
            offset = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            if offset is None:
                continue
            message = [f"block {name} differs between {source.name} and {path.name}; first differing line:"]
            for file, (start, _) in ((source, source_span), (path, span)):
                line = read(file).split("\n")[start - 1 + offset]  # a marker, where this block is the shorter
                message.append(f"  {file.name}:{start + offset}: {line!r}")
            message.append("copy the text that you want over all others with one of")
            message += [f"  python tests/test_shared_blocks.py --fix {name} {f.name}" for f in (source, path)]
            found.append("\n".join(message))
    return found


def definitions(path: Path) -> dict[str, str]:
    """The top-level names that a script defines or imports outside its blocks, with their text."""
    text, found = read(path), {}
    lines, shared = text.split("\n"), find_blocks(path).values()
    for node in ast.parse(text).body:
        if any(start <= node.lineno <= end for start, end in shared):
            continue
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        source = "\n".join(lines[start - 1 : node.end_lineno])
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name] = source
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                module = getattr(node, "module", None)
                found[alias.asname or alias.name] = f"from {module} " * bool(module) + f"import {alias.name}"
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in ast.walk(node):
                if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                    found[target.id] = source
    return found


def clashes(folder: Path) -> list[str]:
    """One message for each name outside the blocks that two scripts define with different text."""
    seen, found = {}, []
    for path in scripts(folder):
        for name, source in definitions(path).items():
            other, text = seen.setdefault(name, (path, source))
            if name not in FREE and source != text:
                found.append(
                    f"{name} is defined outside the blocks with different text in {other.name} and "
                    f"{path.name}: give it one text, two names, or a shared block"
                )
    return found


def fix(folder: Path, name: str, source: str) -> list[str]:
    """Copy a block of `source` over the same block of all other scripts; the names of those that changed."""
    holders = {path.name: path for path in scripts(folder)}
    spans = {file: find_blocks(path) for file, path in holders.items()}  # before anything is written
    if name not in spans.get(source, {}):
        known = ", ".join(spans.get(source, {})) or "none"
        raise ValueError(f"{source} has no block {name}; its blocks: {known}")
    right, changed = block_lines(holders[source], spans[source][name]), []
    for file, path in holders.items():
        if name in spans[file] and block_lines(path, spans[file][name]) != right:
            (start, end), lines = spans[file][name], read(path).split("\n")
            with path.open("w", encoding="utf-8", newline="") as out:
                out.write("\n".join(lines[: start - 1] + right + lines[end:]))
            changed.append(file)
    return changed


def code_lines(text: str) -> set[int]:
    """Numbers of the lines with code: no blank lines, comments or docstrings."""
    silent, numbers = ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if tokenize.tok_name[token.type] not in silent:
            numbers |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            numbers -= set(range(node.lineno, node.end_lineno + 1))
    return numbers


# --------------------------------------------------------------------------------- the scripts themselves


def test_blocks_are_equal():
    assert scripts(ROOT), "no script with shared blocks was found"
    assert not (found := differences(ROOT)), "\n\n" + "\n\n".join(found)


def test_names_outside_the_blocks():
    assert not (found := clashes(ROOT)), "\n" + "\n".join(found)


@pytest.mark.parametrize("path", scripts(ROOT), ids=lambda path: path.name)
def test_size(path):
    text = read(path)
    code = code_lines(text)
    shared = {n for start, end in find_blocks(path).values() for n in range(start, end + 1)}
    count = {"lines": text.count("\n"), "shared": len(code & shared), "own": len(code - shared)}
    assert count["lines"] <= MAX_LINES, f"{path.name} has {count['lines']} lines"
    assert count["shared"] <= MAX_SHARED, f"the blocks of {path.name} have {count['shared']} lines of code"
    most = MAX_OWN.get(path.name, DEFAULT_OWN)
    assert count["own"] <= most, f"{path.name} has {count['own']} own lines of code"


# ------------------------------------------------------------------- each check, on files made for it


def script(block: str = "ONE = 1", before: str = "", after: str = "", name: str = "model") -> str:
    markers = f"# >>> shared: {name} {NOTE}\n{block}\n# <<< shared: {name}"
    return f'"""A script."""\n\n{before}\n{markers}\n{after}\n'


@pytest.fixture
def write(tmp_path):
    """Write scripts a.py, b.py, ... and return their folder."""

    def write(*texts: str) -> Path:
        for letter, text in zip("abcdef", texts, strict=False):
            (tmp_path / f"{letter}.py").write_bytes(text.encode())
        return tmp_path

    return write


def test_equal_blocks_pass(write):
    other = script("TWO = 2", name="run")
    folder = write(script(before="X = 1"), script(after="Y = 2"), other, "import os\n")
    assert [path.name for path in scripts(folder)] == ["a.py", "b.py", "c.py"]
    assert differences(folder) == clashes(folder) == []


EDITS = ["ONE = 2", "ONE = 1 ", "ONE = 1\r", "ONE = 1\n", "ONE = 1\nTWO = 2", "ONE = 1  # why"]


@pytest.mark.parametrize("other", EDITS)
def test_any_difference_fails(write, other):
    (message,) = differences(write(script(), script(other, before="X = 1\n\n"), script()))
    assert "block model differs between a.py and b.py" in message
    assert "python tests/test_shared_blocks.py --fix model a.py" in message
    assert "python tests/test_shared_blocks.py --fix model b.py" in message


def test_first_differing_line_is_named(write):
    first, second = "ONE = 1\nTWO = 2\nEND = 3", "ONE = 1\nTWO = 4\nEND = 4"
    (message,) = differences(write(script(first), script(second, before="X = 1\nY = 2")))
    assert "a.py:6: 'TWO = 2'" in message and "b.py:7: 'TWO = 4'" in message and "END" not in message


def test_a_shorter_block_fails(write):
    (message,) = differences(write(script("ONE = 1\nTWO = 2"), script("ONE = 1")))
    assert "a.py:6: 'TWO = 2'" in message and "b.py:6: '# <<< shared: model'" in message


def test_every_block_is_compared(write):
    texts = [script() + script(text, name="run") for text in ("TWO = 2", "TWO = 3", "TWO = 4")]
    first, second = differences(write(*texts))
    assert "block run differs between a.py and b.py" in first and "a.py and c.py" in second


BROKEN = {
    "not closed": (script().replace("# <<< shared: model\n", ""), "line 4: block model is not closed"),
    "twice": (script() + script(), "block model is there twice"),
    "nested": (script(script(name="run")[17:]), "line 4: block model is not closed before line 6"),
    "closed twice": (script(after="# <<< shared: model"), "closes model, but None is open"),
    "closed by another": (script().replace("<<< shared: model", "<<< shared: run"), "closes run, but model"),
    "other note": (script().replace(NOTE, "(same text)"), "not a marker of the exact form"),
    "no note": (script().replace(" " + NOTE, ""), "not a marker of the exact form"),
    "indented": (script().replace("# <<<", " # <<<"), "not a marker of the exact form"),
    "two signs": (script().replace("# >>>", "# >>"), "not a marker of the exact form"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_markers_fail(write, case):
    text, message = BROKEN[case]
    folder = write(script(), text)
    for check in (differences, clashes, lambda folder: fix(folder, "model", "a.py")):
        with pytest.raises(ValueError, match=re.escape(message)) as raised:
            check(folder)
        assert "b.py" in str(raised.value)


CLASHES = {
    "function": ("def f():\n    return 1", "def f():\n    return 2"),
    "decorator": ("import os\n@os.wraps\ndef f(): ...", "import os\n@os.other\ndef f(): ..."),
    "class": ("class f:\n    x = 1", "class f:\n    y = 1"),
    "constant": ("f = 1", "f = 2"),
    "annotated": ("f: int = 1", "f: int = 2"),
    "one of two": ("e, f = 1, 2", "f = 2"),
    "comment in it": ("def f():\n    return 1  # one", "def f():\n    return 1"),
    "import": ("from a import f", "from b import f"),
    "import and function": ("import f", "def f(): ..."),
}


@pytest.mark.parametrize("case", CLASHES)
def test_one_name_with_two_texts_fails(write, case):
    first, second = CLASHES[case]
    (message,) = clashes(write(script(before=first), script(after=second)))
    assert message.startswith("f is defined outside the blocks with different text in a.py and b.py")


def test_names_that_may_differ(write):
    mine = "class Config: ...\ndef train(cfg): return 1\nBY_SIZE = {}\ndef flag(): return 1"
    other = "class Config:\n    x = 1\ndef train(cfg): return 2\nBY_SIZE = {1: 2}\nMORE = 3"
    assert clashes(write(script(before=mine), script(before=other))) == []
    assert len(clashes(write(script(before=mine), script(before="def flag(): return 2")))) == 1


def test_fix_copies_the_named_source_over_all_others(write):
    good = "ONE = 1\n\n\ndef f():\n    return 1"
    texts = [script("OLD = 1", "X = 1", "Y = 1"), script(good, "X = 1"), script(good + "  # edit", "Z = 1")]
    texts += ["import os\n", script("TWO = 2", name="run")]
    folder = write(*texts)
    command = [sys.executable, __file__, "--fix", "model", "b.py", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "a.py, c.py" in done.stdout
    assert differences(folder) == []
    assert read(folder / "a.py") == script(good, "X = 1", "Y = 1")
    assert [read(folder / f"{x}.py") for x in "bde"] == [texts[1], *texts[3:]]
    assert read(folder / "c.py") == script(good, "Z = 1")
    assert fix(folder, "model", "b.py") == []


@pytest.mark.parametrize("name, source", [("run", "a.py"), ("model", "none.py"), ("model", "../a.py")])
def test_fix_refuses_what_is_not_there(write, name, source, capsys):
    folder = write(script(), script("ONE = 2"))
    before = [read(path) for path in scripts(folder)]
    assert main(["--fix", name, source, str(folder)]) == 2
    assert f"{source} has no block {name}" in capsys.readouterr().err
    assert [read(path) for path in scripts(folder)] == before


def test_code_lines():
    text = '"""Doc\n\nstring."""\n\n# comment\nX = 1  # why\n\n\ndef f():\n    """Doc."""\n    return (\n1)\n'
    assert code_lines(text) == {6, 9, 11, 12}
    assert code_lines("def f(): ...\n") == {1}
    assert code_lines('X = """a\nb\n"""\n') == {1, 2, 3}  # a string that is used is code


# --------------------------------------------------------------------------------------------- the command


def main(argv: list[str]) -> int:
    """--fix BLOCK SCRIPT [FOLDER] repairs; without arguments all checks; the exit code."""
    folder = Path(argv[3]) if len(argv) == 4 else ROOT
    try:
        if argv and (argv[0] != "--fix" or len(argv) not in (3, 4)):
            raise ValueError("usage: python tests/test_shared_blocks.py [--fix BLOCK SCRIPT]")
        if argv:
            changed = fix(folder, argv[1], argv[2])
            others = ", ".join(changed) or "no other script: all are equal"
            print(f"block {argv[1]} of {argv[2]} copied to {others}")
        found = differences(folder) + clashes(folder)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n\n".join(found) or "all shared blocks are equal")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
