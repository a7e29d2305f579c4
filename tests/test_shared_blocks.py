"""The text that scripts repeat is equal to the last character, and no script outgrows its limits.

A repeated room stands between two marker lines:

    # >>> shared: NAME
    # <<< shared: NAME

Change it in one script, then copy it over all others, those of more/ too:

    python tests/test_shared_blocks.py --fix NAME SCRIPT
    python tests/test_shared_blocks.py --sizes

The source is named by hand, so that an edit made in a copy is never lost. --sizes prints lines and
bytes of every block and script; a folder after it is another checkout to measure.
"""

import argparse
import ast
import re
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# top-level names that may differ from script to script
FREE = {"Config", "train", "solve", "BY_SIZE", "check_flags", "sample_batch", "update_policy"}
BLOCK = re.compile(r"(?ms)^# >>> shared: (\w+)\n(.*?)^# <<< shared: \1$")
LIKE_A_MARKER = re.compile(r"(?im)^[ \t]*#\s*(>>|<<)[<>]?\s*shared.*")

# Lines are the non-blank ones, docstrings and comments included; on the screen blank ones count.
ROOMS = {  # lines of blocks that belong together: shown by --sizes, only the sum is a limit
    "layers + model + files": 200,
    "sampler": 95,
    "logprobs": 45,
    "rollout + batch": 115,
    "run": 125,
    "config": 40,
}
LIMITS = {
    "machine lines": 620,
    "machine bytes": 33 * 1024,
    "own lines": 380,  # after the imports and outside the blocks
    "screen lines": 1200,
    "bytes": 56 * 1024,
    "columns": 100,
    "mean line": 54,
    "function": 60,  # the longest
    "train": 80,  # or solve
    "run.calls": 8,  # different ones, in train or solve
    "flags": 36,
}
SHORT = {"own lines": 300, "screen lines": 1100, "bytes": 50 * 1024}
SPECIAL = {"grpo.py": SHORT, "nsr.py": SHORT, "sft.py": SHORT, "ppo.py": {"flags": 40}}
SPECIAL["recurrent_depth.py"] = {"own lines": 850, "lines": 850}  # its own model: the whole file


def read(path: Path) -> str:
    with path.open(encoding="utf-8", newline="") as file:  # as on disk: \r\n is a difference
        return file.read()


def name_of(path: Path) -> str:
    return f"more/{path.name}" if path.parent.name == "more" else path.name


def scripts(folder: Path) -> list[Path]:
    """The scripts that have blocks, or something that looks like one."""
    paths = sorted(folder.glob("*.py")) + sorted(folder.glob("more/*.py"))
    return [path for path in paths if LIKE_A_MARKER.search(read(path))]


def split(path: Path) -> tuple[dict[str, str], str]:
    """{name: text} of the blocks with their markers, and all the rest."""
    text = read(path)
    found = [(block[1], block[0]) for block in BLOCK.finditer(text)]
    wrong = LIKE_A_MARKER.search(BLOCK.sub(r"\n\2", text))
    if wrong:
        number = wrong.string[: wrong.start()].count("\n") + 1
        raise ValueError(f"{name_of(path)} line {number}: no marker of a pair: {wrong[0]!r}")
    if len(found) > len(dict(found)):
        raise ValueError(f"{name_of(path)}: one block twice in {[name for name, _ in found]}")
    return dict(found), BLOCK.sub("", text)


def differences(folder: Path) -> list[str]:
    """One message for each block that is not the text of the first script that has it."""
    first_holder, found = {}, []
    for path in scripts(folder):
        for name, text in split(path)[0].items():
            source, right = first_holder.setdefault(name, (path, text))
            pairs = zip_longest(right.split("\n"), text.split("\n"))
            lines = next((pair for pair in pairs if pair[0] != pair[1]), ())
            if lines:
                found.append(f"block {name} differs in {name_of(source)} and {name_of(path)}; fix:")
            for file, line in zip((source, path), lines, strict=False):
                command = f"python tests/test_shared_blocks.py --fix {name} {name_of(file)}"
                found[-1] += f"\n    {command}  # {line!r}"
    return found


def definitions(path: Path) -> dict[str, str]:
    """The top-level names that a script defines or imports outside its blocks, with their code."""
    found = {}
    for node in ast.parse(split(path)[1]).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = ast.unparse(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                found[alias.asname or alias.name] = getattr(node, "module", "") + "." + alias.name
        else:
            for name in ast.walk(node):
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                    found[name.id] = ast.unparse(node)
    return found


def clashes(folder: Path) -> list[str]:
    """One message for each name outside the blocks that two scripts define differently."""
    seen, found = {}, []
    for path in scripts(folder):
        for name, code in definitions(path).items():
            other, before = seen.setdefault(name, (path, code))
            if name not in FREE and code != before:
                both = f"{name_of(other)} and {name_of(path)}"
                found.append(f"{name} is not the same in {both}: one text, two names or a block")
    return found


def fix(folder: Path, name: str, source: str) -> list[str]:
    """Copy a block of `source` over all others; the names of the scripts that changed."""
    blocks = {path: split(path)[0] for path in scripts(folder)}  # before anything is written
    own = {name_of(path): found for path, found in blocks.items()}.get(source, {})
    if name not in own:
        raise ValueError(f"{source} has no block {name}; it has {[*own]}")
    changed = []
    for path, found in blocks.items():
        wrong = found.get(name, own[name])
        if wrong != own[name]:
            path.write_bytes(read(path).replace(wrong, own[name]).encode())
            changed.append(name_of(path))
    return changed


def count(text: str, node: ast.AST | None = None) -> int:
    """Lines that are not blank, of a text or of a node in it."""
    lines = text.split("\n")
    if node:
        lines = lines[node.lineno - 1 : node.end_lineno]
    return sum(line.strip() != "" for line in lines)


def measure(path: Path) -> dict[str, float]:
    """The numbers of a script that LIMITS bounds."""
    (blocks, outside), text = split(path), read(path)
    machine = "".join(BLOCK.sub(r"\2", block) for block in blocks.values())
    tree, body = ast.parse(text), ast.parse(outside).body
    top = [n for n in body if n is body[0] or isinstance(n, (ast.Import, ast.ImportFrom))]
    head = sum(count(outside, node) for node in top)
    config = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config"]
    longest, loop, calls = 0, 0, set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        size = count(text, node)
        if node.name in ("train", "solve"):
            loop = size
            calls = {ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
        else:
            longest = max(longest, size)
    return {
        "machine lines": count(machine),
        "machine bytes": len(machine.encode()),
        "own lines": count(outside) - head,
        "screen lines": text.count("\n"),
        "bytes": len(text.encode()),
        "columns": max(map(len, text.split("\n"))),
        "mean line": sum(len(x) for x in text.split("\n") if x.strip()) / count(text),
        "function": longest,
        "train": loop,
        "run.calls": sum(call.startswith("run.") for call in calls),
        "flags": sum(isinstance(f, ast.AnnAssign) for c in config for f in c.body),
        "lines": count(text),
    }


def excesses(path: Path) -> dict[str, float]:
    """What exceeds its limit: {name: number}."""
    limits, found = LIMITS | SPECIAL.get(name_of(path), {}), measure(path)
    return {name: found[name] for name in limits if found[name] > limits[name]}


def size_tables(folder: Path) -> str:
    """Lines and bytes of each block; lines of each room; the numbers that LIMITS bounds."""
    found = {path: split(path)[0] for path in scripts(folder)}
    names = list(dict.fromkeys(name for blocks in found.values() for name in blocks))
    sizes, rooms = [["lines bytes", *names]], [["lines", *(f"{r} ({ROOMS[r]})" for r in ROOMS)]]
    numbers = [["(!: over)", *LIMITS]]
    for path, blocks in found.items():
        blocks = {name: BLOCK.sub(r"\2", text) for name, text in blocks.items()}
        texts = [blocks.get(name, "") for name in names]
        sizes.append([name_of(path), *(f"{count(text)} {len(text.encode())}" for text in texts)])
        parts = ["".join(blocks.get(name, "") for name in room.split(" + ")) for room in ROOMS]
        rooms.append([name_of(path), *(str(count(part)) for part in parts)])
        own, over = measure(path), excesses(path)
        numbers.append([name_of(path), *(f"{own[n]:.5g}{'!' * (n in over)}" for n in LIMITS)])
    lines = []
    for table in (sizes, rooms, numbers):
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += ["  ".join(map(str.rjust, row, widths)) for row in table] + [""]
    return "\n".join(lines)


def test_blocks_and_names():
    found = differences(ROOT) + clashes(ROOT)
    assert scripts(ROOT)
    assert not found, "\n\n" + "\n\n".join(found)


@pytest.mark.parametrize("path", scripts(ROOT), ids=name_of)
def test_limits(path):
    assert excesses(path) == {}, f"at most {LIMITS | SPECIAL.get(name_of(path), {})}"


def test_limits_of_rewards():
    """What every reader of a script has beside it."""
    found = measure(ROOT / "rewards.py")
    assert found["lines"] <= 1150
    assert found["function"] <= LIMITS["function"] and found["columns"] <= LIMITS["columns"]


# ------------------------------------------------------------------ each check, on made scripts


def script(block: str = "ONE = 1", before: str = "", after: str = "", name: str = "model") -> str:
    markers = f"# >>> shared: {name}\n{block}\n# <<< shared: {name}"
    return f'"""A script."""\n\n{before}\n{markers}\n{after}\n'


def write(folder: Path, *texts: str) -> Path:
    """Write scripts a.py, b.py and more/c.py."""
    (folder / "more").mkdir(exist_ok=True)
    for name, text in zip(("a.py", "b.py", "more/c.py"), texts, strict=False):
        (folder / name).write_bytes(text.encode())
    return folder


@pytest.mark.parametrize(
    "edit", ["ONE = 2", "ONE = 1 ", "ONE = 1\r", "ONE = 1\n", "ONE = 1\nX = 2"]
)
def test_any_difference_fails(tmp_path, edit):
    [message] = differences(write(tmp_path, script(), script(before="X = 1"), script(edit)))
    assert "block model differs in a.py and more/c.py" in message
    assert "--fix model a.py" in message and "--fix model more/c.py" in message
    first = next(line for line in edit.split("\n") + [""] if line != "ONE = 1")
    assert repr(first) in message  # the line that differs


BROKEN = {
    "not closed": script().replace("# <<< shared: model\n", ""),
    "twice": script() + script(),
    "nested": script(script(name="run")),
    "a note": script().replace("model\n", "model (mine)\n", 1),
    "indented": script().replace("# <<<", " # <<<"),
    "two signs": script().replace("# >>>", "# >>"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_markers_fail(tmp_path, case, capsys):
    folder = str(write(tmp_path, script(), BROKEN[case]))
    for argv in ([folder], ["--fix", "model", "a.py", folder], ["--sizes", folder]):
        assert main(argv) == 2
        assert re.match("b.py( line [48]: no marker|: one block twice)", capsys.readouterr().err)


@pytest.mark.parametrize(
    "first, second",
    [
        ("def f():\n    return 1", "def f():\n    return 2"),
        ("import os\n@os.wraps\ndef f(): ...", "import os\n@os.other\ndef f(): ..."),
        ("class f:\n    x = 1", "class f:\n    y = 1"),
        ("e, f = 1, 2", "f: int = 2"),
        ("from a import f", "from b import f"),
    ],
)
def test_one_name_with_two_texts_fails(tmp_path, first, second):
    texts = script(before=first + "\nBY_SIZE = {}"), script(after=second + "\nBY_SIZE = {1: 2}")
    [message] = clashes(write(tmp_path, *texts))
    assert message.startswith("f is not the same in a.py and b.py")


def test_fix_copies_the_named_source_over_all_others(tmp_path, capsys):
    good = "ONE = 1\n\n\ndef f():\n    return 1"
    texts = script("X = 2", "X = 1", "Y = 1"), script(good, "X = 1"), script(good + "  # edit")
    folder = write(tmp_path, *texts)
    for name, source in (("run", "a.py"), ("model", "d.py"), ("model", "c.py")):
        assert main(["--fix", name, source, str(folder)]) == 2
        assert f"{source} has no block {name}" in capsys.readouterr().err
    assert [read(path) for path in scripts(folder)] == list(texts)
    command = [sys.executable, __file__, "--fix", "model", "b.py", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "a.py, more/c.py" in done.stdout
    right = [script(good, "X = 1", "Y = 1"), texts[1], script(good)]
    assert [read(path) for path in scripts(folder)] == right


def test_measured_by_hand(tmp_path, capsys):
    before = "import os\nimport sys\n\nclass Config:\n    a: int = 1\n    'Doc'\n    b: int = 2\n\n"
    before += "def f():\n    return 1\n\ndef train():\n    run.a(round(run.b()))\n\n    run.a()\n"
    text = script("ONE = 1\n\nTWO = 2", before + "X = 'e' " + 85 * "#", "END = 1")
    folder = write(tmp_path, text)
    expected = [2, 17, 11, 24, len(text), 93, (len(text) - 24) / 18, 2, 3, 2, 2, 18]
    assert list(measure(folder / "a.py").values()) == expected
    assert main(["--sizes", str(folder)]) == 0 and "2 17" in capsys.readouterr().out
    write(folder, script("X = 1\n" * 620, "#" * 100), script("X = 1\n" * 621, "#" * 101))
    assert excesses(folder / "a.py") == {}
    assert excesses(folder / "b.py") == {"machine lines": 621, "columns": 101}
    assert sum(ROOMS.values()) == LIMITS["machine lines"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--fix", nargs=2, metavar=("NAME", "SCRIPT"), help="copy a block")
    parser.add_argument("--sizes", action="store_true", help="lines and bytes of every block")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT, help="another checkout")
    args = parser.parse_args(argv)
    try:
        if args.fix:
            print("copied over", ", ".join(fix(args.folder, *args.fix)) or "none, all are equal")
        if args.sizes:
            print(size_tables(args.folder))
            return 0
        found = differences(args.folder) + clashes(args.folder)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n\n".join(found) or "all shared blocks are equal")
    return int(len(found) > 0)


if __name__ == "__main__":
    sys.exit(main())
