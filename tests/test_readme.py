"""README.md, docs/ and docstrings tell the truth: commands, files, functions, results."""

import doctest
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, file_of

import grpo
import rewards
import sft


def load(path: Path):
    """A file of docs/ or more/ as a module."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPTS = {str(file_of(s).relative_to(ROOT)): importlib.import_module(s) for s in SMALL}
FILES = sorted([*ROOT.glob("docs/experiments/*.py"), *ROOT.glob("more/*.py")])
TOOLS = {file.relative_to(ROOT).as_posix(): load(file) for file in FILES}
traces, results = TOOLS["more/traces.py"], load(ROOT / "docs" / "results.py")
PAGES = [ROOT / "README.md", ROOT / "models" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
TEXTS = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in PAGES}
README = TEXTS["README.md"]
DOCSTRINGS = {name: module.__doc__ for name, module in (SCRIPTS | TOOLS).items() if module.__doc__}

# A shell that runs nothing: python and torchrun write down their words.
SHELL = """
python() { printf '%q ' "$@"; echo; }
torchrun() { printf 'torchrun '; python "$@"; }
cat() { :; }; head() { :; }; awk() { :; }; last() { echo tiny; }; cp() { :; }
"""
SHELL_LINE = re.compile(r"(python |torchrun |for \w+ in |done\b|head |\(awk )|\w+=\S")
NEEDS_FILES = "mine.py", "more/learned_reward.py"  # tasks that are nothing without a run's files
STAND_INS = {"S": "7", "M": "nsr", "median.py": "grpo.py"}  # what a reader fills in; a fork


def commands(text: str) -> list[list[str]]:
    """The words after `python` of every command in indented blocks and in `code`."""
    text = re.sub(r" *\\\n\s*| > \S+", " ", text)
    lines = [x for x in re.findall(r"^ {4,}(.*)$", text, re.M) if SHELL_LINE.match(x)]
    spans = [" ".join(x.split()) for x in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    lines += [x for x in spans if re.match(r"(\w+=\w+ )?(python|torchrun) \S", x)]
    shell = SHELL + "\n".join(lines)
    done = subprocess.run(["bash", "-c", shell], cwd="/", capture_output=True, text=True)
    assert done.stderr == "", done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def check(name: str, argv: list[str]) -> None:
    """Parse as the program would; of a tool without a parser here, its text knows the flags."""
    module = (SCRIPTS | TOOLS).get(name)
    if name == "more/traces.py":
        traces.check_flags(cfg := traces.make_parser().parse_args(argv))
    elif hasattr(module, "Config"):
        resumed = "--resume" in argv  # reads a folder
        cfg = grpo.parse_config(module.Config, [] if resumed else argv)
        if name == "sft.py":
            sft.check_flags(cfg)
    else:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert [word for word in argv if word.startswith("--") and word not in text] == []
        return
    if not cfg.data and cfg.task != "text" and not cfg.task.startswith(NEEDS_FILES):
        rewards.make_task(cfg.task)


@pytest.mark.parametrize("where", [*TEXTS, *DOCSTRINGS])
def test_commands_parse(where, cwd):
    found = commands((TEXTS | DOCSTRINGS)[where])
    for words in found:
        words = [STAND_INS.get(word, word) for word in words]
        at = next(i for i, word in enumerate(words) if re.match(r"\S+\.py$|-[cm]$", word))
        if words[at][0] != "-" and "..." not in words:
            check(words[at], words[at + 1 :])
    assert found or where not in (*SCRIPTS, "README.md")


# Flags of the README that are made small; SMALL of conftest.py has the others.
LIMITS = {"steps": 1, "batch_size": 8, "max_new_tokens": 40, "overlong_cache": 20}
LIMITS |= {"eval_problems": 2, "eval_samples": 2, "updates": 2, "sample": 16, "traces": 16}
LIMITS |= {"length_schedule": "20:0,40:1"}


def module_of(name: str) -> str:
    return name.removesuffix(".py").replace("/", ".")


def test_cpu_commands_of_the_readme_run(run, cwd, monkeypatch):
    """A step each, in their order: one reads what another wrote."""
    (old, new) = re.findall(r"^    [-+]( +\S.*)$", README, re.M)
    code = (ROOT / "grpo.py").read_text(encoding="utf-8")
    assert code.count(old + "\n") == 1
    (cwd / "median.py").write_text(code.replace(old, new))
    monkeypatch.syspath_prepend(cwd)
    ran = set()
    for number, (name, *argv) in enumerate(commands(README)):
        script = STAND_INS.get(name, name)
        argv += [f"--{flag}={value}" for flag, value in LIMITS.items() if f"--{flag}" in argv]
        if "Qwen2.5-1.5B" in argv:
            continue
        if name == "more/traces.py":
            assert traces.main([*argv, "--max_new_tokens", "24"]) == 0, argv
        elif script in SCRIPTS:
            flags = [SMALL[module_of(script)], f"--out out/{number}", shlex.join(argv)]
            done = run(module_of(name), " ".join(flags), base=False)
            assert done.code == 0, (name, argv, done.err)
        ran.add(name)
    assert ran >= {*SCRIPTS, "median.py", "more/traces.py"}


def test_bring_your_own_task(run, cwd):
    """The class of the README by hand, and in a step of the command."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (spec,) = re.findall(r"python grpo\.py .*--task (mine\S+)$", README, re.M)
    (cwd / "mine.py").write_text(code)
    task = rewards.make_task(spec)
    train = {task.problem("train", 0, i)["number"] for i in range(50)}
    assert not train & {task.problem("test", 0, i)["number"] for i in range(50)}
    problem = {"number": "313200900", "digit": "3"}
    assert task.score("it is 2</think> <answer>2</answer>", problem)["total"] == 1.1
    done = run("grpo", f"--task {spec} --steps 1")
    assert done.code == 2 and "compact" in done.err  # as the README says
    compact = "    def compact(self, problem):\n        return problem['number'] + '?<think>'\n"
    (cwd / "mine.py").write_text(f"{code}\n{compact}")
    done = run("grpo", f"--task {spec} --steps 1")
    assert done.code == 0 and "verifier failed" not in done.err
    assert [*cwd.glob("out/grpo-Digits-0-*/step-000001")]


def test_files_exist():
    """Every path that a page or a docstring names; links, pictures and their headings too."""
    for where, text in (TEXTS | DOCSTRINGS).items():
        plain = re.sub(r"\bout/\S+|https?://\S+|\bstep-\S+|/tasks\.md", "", text)
        names = set(re.findall(r"(?<![\w/*.-])(?:docs|tests|models|more|\.ci)/[\w./-]*\w", plain))
        names |= set(re.findall(r"(?<![\w/.-])[a-z_0-9]+\.py\b", plain)) - {"median.py", "mine.py"}
        for name in names:
            places = [ROOT, ROOT / "tests", ROOT / "docs"]
            assert any((folder / name).exists() for folder in places), f"{where} names {name}"
        for link, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
            if not link.startswith("https://"):
                path = (ROOT / where).parent / link if link else ROOT / where
                assert path.is_file(), f"{where} links to {link}"
                assert not heading or f"## {heading}\n" in path.read_text("utf-8"), (where, heading)
    linked = re.findall(r"\]\((\w+\.md)\)", TEXTS["docs/index.md"])
    pages = [path.name for path in ROOT.glob("docs/*.md") if path.name != "index.md"]
    assert sorted(linked) == sorted(pages) and len(README.encode()) <= 12 * 1024


def rows_of(page: str, columns: int) -> list[list[str]]:
    """Cells of the tables of a page that have so many columns, without their heads."""
    lines = re.findall(r"^\|(.*)\|$", TEXTS[page], re.M)
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]
    return [row for row in rows if len(row) == columns and set(row[0]) != {"-"}]


@pytest.mark.parametrize("page, columns, at", [("README.md", 4, 1), ("docs/papers.md", 5, 2)])
def test_functions_of_the_map_exist(page, columns, at):
    rows = rows_of(page, columns)[1:]
    assert len(rows) >= 20
    modules = *SCRIPTS.values(), *TOOLS.values(), rewards
    configs = [module.Config for module in modules if hasattr(module, "Config")]
    flags = {name for config in configs for name in config.__dataclass_fields__}
    flags |= {action.dest for action in traces.make_parser()._actions}
    for row in rows:
        assert set(re.findall(r"--(\w+)", row[3])) <= flags, row
        for name in re.findall(r"`([\w.]+)`", row[at]):
            first, _, rest = name.partition(".")
            found = [getattr(module, first) for module in modules if hasattr(module, first)]
            assert [x for x in found if not rest or hasattr(x, rest)], f"{name} of {row}"


def test_results_are_those_of_the_files(capsys):
    """docs/results.md is what docs/results.py writes."""
    assert results.main(["--check"]) == 0, capsys.readouterr().out
    assert doctest.testmod(results).failed == 0
