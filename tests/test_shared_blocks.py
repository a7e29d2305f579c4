"""The text that scripts repeat is equal to the last character, and no script outgrows its limits.

A repeated room stands between lines `# >>> shared: NAME` and `# <<< shared: NAME`. Change it in one
script, then copy it over all others, those of more/ too; the source is named by hand, so that an
edit made in a copy is never lost. A folder after --sizes is another checkout to measure:

    python tests/test_shared_blocks.py --fix NAME SCRIPT
    python tests/test_shared_blocks.py --sizes
"""

import argparse
import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# top-level names that may differ from script to script
FREE = {"Config", "train", "solve", "BY_SIZE", "check_flags", "sample_batch", "update_policy"}
BLOCK = re.compile(r"(?ms)^# >>> shared: (\w+)\n(.*?)^# <<< shared: \1$")
LIKE_A_MARKER = re.compile(r"(?im)^[ \t]*#\s*(>>|<<)[<>]?\s*shared.*")

# Lines are the non-blank ones, docstrings and comments included; on the screen blank ones count.
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
            if text != right:
                both = f"{name_of(source)} and {name_of(path)}"
                command = f"python tests/test_shared_blocks.py --fix {name}"
                message = f"block {name} differs in {both}; fix: {command}"
                found.append(f"{message} {name_of(source)}, or {name_of(path)}")
    return found


def definitions(path: Path) -> dict[str, str]:
    """The top-level names that a script defines or imports outside its blocks, with their code."""
    found = {}
    for node in ast.parse(split(path)[1]).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            origin = getattr(node, "module", "")
            found |= {a.asname or a.name: f"{origin}.{a.name}" for a in node.names}
            continue
        parts = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
        names = [n.id for n in parts if isinstance(n.ctx, ast.Store)]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        found |= dict.fromkeys(names, ast.unparse(node))
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
    config = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config"]
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    loops = [n for n in functions if n.name in ("train", "solve")]
    inside = [n for loop in loops for n in ast.walk(loop) if isinstance(n, ast.Call)]
    calls = {ast.unparse(n.func) for n in inside}
    return {
        "machine lines": count(machine),
        "machine bytes": len(machine.encode()),
        "own lines": count(outside) - sum(count(outside, node) for node in top),
        "screen lines": text.count("\n"),
        "bytes": len(text.encode()),
        "columns": max(map(len, text.split("\n"))),
        "mean line": sum(len(x) for x in text.split("\n") if x.strip()) / count(text),
        "function": max((count(text, n) for n in functions if n not in loops), default=0),
        "train": max((count(text, n) for n in loops), default=0),
        "run.calls": sum(call.startswith("run.") for call in calls),
        "flags": sum(isinstance(f, ast.AnnAssign) for c in config for f in c.body),
        "lines": count(text),
    }


def excesses(path: Path) -> dict[str, float]:
    """What exceeds its limit: {name: number}."""
    limits, found = LIMITS | SPECIAL.get(name_of(path), {}), measure(path)
    return {name: found[name] for name in limits if found[name] > limits[name]}


def size_tables(folder: Path) -> str:
    """Lines and bytes of each block, and the numbers that LIMITS bounds."""
    found = {path: split(path)[0] for path in scripts(folder)}
    names = list(dict.fromkeys(name for blocks in found.values() for name in blocks))
    sizes, numbers = [["lines bytes", *names]], [["(!: over)", *LIMITS]]
    for path, blocks in found.items():
        blocks = {name: BLOCK.sub(r"\2", text) for name, text in blocks.items()}
        texts = [blocks.get(name, "") for name in names]
        sizes.append([name_of(path), *(f"{count(text)} {len(text.encode())}" for text in texts)])
        own, over = measure(path), excesses(path)
        numbers.append([name_of(path), *(f"{own[n]:.5g}{'!' * (n in over)}" for n in LIMITS)])
    lines = []
    for table in (sizes, numbers):
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += ["  ".join(map(str.rjust, row, widths)) for row in table] + [""]
    return "\n".join(lines)


def test_blocks_and_names():
    assert scripts(ROOT) and differences(ROOT) + clashes(ROOT) == []


@pytest.mark.parametrize("path", scripts(ROOT), ids=name_of)
def test_limits(path):
    assert excesses(path) == {}, f"at most {LIMITS | SPECIAL.get(name_of(path), {})}"


def test_limits_of_rewards():
    """What every reader of a script has beside it."""
    found = measure(ROOT / "rewards.py")
    assert found["lines"] <= 1150
    assert found["function"] <= LIMITS["function"] and found["columns"] <= LIMITS["columns"]


def test_made_scripts(tmp_path, capsys):
    """A difference is found and mended; found: a name with two texts, a limit, a marker alone."""
    (tmp_path / "more").mkdir()
    paths = [tmp_path / name for name in ("a.py", "more/c.py")]
    for edit in ("ONE = 2", "ONE = 1 ", "ONE = 1\r", "ONE = 1\n"):
        for path, block in zip(paths, ("ONE = 1", edit), strict=True):
            text = f"f = 1\n# >>> shared: model\n{block}\n# <<< shared: model\n"
            path.write_bytes(text.encode())
        assert main([str(tmp_path)]) == 1
        assert "--fix model a.py, or more/c.py" in capsys.readouterr().out
    assert main(["--fix", "model", "a.py", str(tmp_path)]) == 0
    assert differences(tmp_path) == [] and "ONE = 1\n#" in read(paths[1])
    text = read(paths[0])
    paths[1].write_text(text.replace("f = 1", "f = 2"))
    assert clashes(tmp_path)[0].startswith("f is not the same in a.py and more/c.py")
    paths[1].write_text(text.replace("ONE = 1\n", "X = 1\n" * 621))
    assert excesses(paths[1]) == {"machine lines": 621}
    paths[1].write_text(text.replace("# <<<", " # <<<"))
    assert main(["--sizes", str(tmp_path)]) == 2


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
