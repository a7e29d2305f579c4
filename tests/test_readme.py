"""README.md, docs/ and docstrings tell the truth: commands, files, functions, metrics, figures."""

import doctest
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, lines_of

import grpo
import rewards
import sft


def load(path: Path):
    """A file of docs/ or more/ as a module."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPTS = {f"{name}.py": importlib.import_module(name) for name in SMALL}
FILES = sorted([*ROOT.glob("docs/experiments/*.py"), *ROOT.glob("more/*.py")])
TOOLS = {file.relative_to(ROOT).as_posix(): load(file) for file in FILES}
traces, results = TOOLS["more/traces.py"], load(ROOT / "docs" / "results.py")
PAGES = [ROOT / "README.md", ROOT / "models" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
TEXTS = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in PAGES}
README = TEXTS["README.md"]
DOCSTRINGS = {name: module.__doc__ for name, module in (SCRIPTS | TOOLS).items() if module.__doc__}
EXPERIMENTS = results.all_results()

# ------------------------------------------------------------------------------- commands

# A shell that runs nothing: python and torchrun write down their words.
SHELL = """
python() { printf '%q ' "$@"; echo; }
torchrun() { printf 'torchrun '; python "$@"; }
cat() { :; }; head() { :; }; awk() { :; }; last() { echo tiny; }; cp() { :; }
"""
SHELL_LINE = re.compile(r"(python |torchrun |for \w+ in |done\b|head |\(awk )|\w+=\S")
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
        cfg = traces.make_parser().parse_args(argv)
        traces.check_flags(cfg)
    elif hasattr(module, "Config"):
        resumed = "--resume" in argv  # reads a folder
        cfg = grpo.parse_config(module.Config, [] if resumed else argv)
        if name == "sft.py":
            sft.check_flags(cfg)
    else:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert [word for word in argv if word.startswith("--") and word not in text] == []
        return
    if not cfg.data and cfg.task != "text" and not cfg.task.startswith("mine.py"):
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
FORMS = {  # of a metric's name in docs/metrics.md
    r"/(base|draft|specreason|spec_decode)$": "/model",  # who writes, in specreason.py
    r"/tiny(-rl)?/\w+?(_se|)$": r"/model/side\2",  # budget_forcing.py
    r"/(full|exit)$": "/way",  # recurrent_depth.py
    r"pass@\d+$": "pass@k",
    r"@\d+$": "@r",
}


def test_cpu_commands_of_the_readme_run(run, cwd, monkeypatch):
    """A step each, in their order: one reads what another wrote. What they log is explained."""
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
            flags = [SMALL[script.removesuffix(".py")], f"--out out/{number}", shlex.join(argv)]
            done = run(name.removesuffix(".py"), " ".join(flags), base=False)
            assert done.code == 0, (name, argv, done.err)
        ran.add(name)
    assert ran >= {*SCRIPTS, "median.py", "more/traces.py"}

    names = re.findall(r"`([^`]+)`", " ".join(cell for cell, _ in rows_of("docs/metrics.md", 2)))
    explained = {f"completion_length{name}" if name[0] == "/" else name for name in names}
    logs = [line for log in cwd.glob("out/*/metrics.jsonl") for line in lines_of(log)]
    for name in {key for line in logs for key in line}:
        assert {re.sub(pattern, form, name) for pattern, form in FORMS.items()} & explained, name


def test_bring_your_own_task(run, cwd):
    """The class of the README by hand, and in a step of the command."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (spec,) = re.findall(r"python grpo\.py .*--task (mine\S+)$", README, re.M)
    (cwd / "mine.py").write_text(code)
    task = rewards.make_task(spec)
    train = {task.problem("train", 0, i)["number"] for i in range(50)}
    assert not train & {task.problem("test", 0, i)["number"] for i in range(50)}
    good, problem = "it is 2</think> <answer>2</answer>", {"number": "313200900", "digit": "3"}
    assert task.score(good, problem)["total"] == 1.1 and "313200900" in task.question(problem)
    assert task.score(good, problem | {"digit": "9"})["total"] == 0.1
    done = run("grpo", f"--task {spec} --steps 1")
    assert done.code == 2 and "compact" in done.err  # as the README says
    compact = "    def compact(self, problem):\n        return problem['number'] + '?<think>'\n"
    (cwd / "mine.py").write_text(f"{code}\n{compact}")
    done = run("grpo", f"--task {spec} --steps 1")
    assert done.code == 0 and "verifier failed" not in done.err
    assert [*cwd.glob("out/grpo-Digits-0-*/step-000001")]


# -------------------------------------------------------------- files, functions, formats


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
    flags = {name for module in SCRIPTS.values() for name in module.Config.__dataclass_fields__}
    flags |= {action.dest for action in traces.make_parser()._actions}
    for row in rows:
        assert set(re.findall(r"--(\w+)", row[3])) <= flags, row
        for name in re.findall(r"`([\w.]+)`", row[at]):
            first, _, rest = name.partition(".")
            found = [getattr(module, first) for module in modules if hasattr(module, first)]
            assert [x for x in found if not rest or hasattr(x, rest)], f"{name} of {row}"


def test_the_page_of_tasks(tmp_path):
    """Its table of equal answers, a line for each task with a file, each form of a conversation."""
    rows = [row for row in rows_of("docs/tasks.md", 3) if row[2] in ("yes", "no")]
    assert len(rows) >= 15
    for gold, answer, equal in rows:
        assert rewards.math_equal(gold.strip("`"), answer.strip("`")) == (equal == "yes"), gold
    chats = re.findall(r'\| `(\{"\w+": \[\{.*\})` \|$', TEXTS["docs/tasks.md"], re.M)
    assert [len(rewards.read_chat(json.loads(chat))) for chat in chats] == [2, 2, 2]
    rows = r"^\| `--task (\w+) --data FILE` \| `(.*)` \|$"
    lines = re.findall(rows, TEXTS["docs/tasks.md"], re.M)
    assert [name for name, _ in lines] == ["gsm8k", "math"]
    for name, line in lines:
        (tmp_path / name).write_text(line)
        rewards.make_task(name, str(tmp_path / name))


# -------------------------------------------------------------------------------- figures


def test_results_are_those_of_the_files(capsys):
    """docs/results.md is what docs/results.py writes."""
    assert results.main(["--check"]) == 0, capsys.readouterr().out
    assert doctest.testmod(results).failed == 0
    for about in EXPERIMENTS.values():
        assert about["script"] in SCRIPTS and "torch" in about["versions"]
        assert all(results.measured(claim, about) for claim in about["claims"])  # of some value


def test_a_claim_is_held_per_seed_and_on_the_mean():
    values = {"a": [1, 2, 9], "b": [2, 1, 3]}
    about = {"seeds": [0, 1, 2], "claims": ["a > b"], "values": values}
    assert results.verdict("a > b", about) == "**2 of 3; mean: yes**"
    assert results.measured("a > b", about) == "1, 2, 9 against 2, 1, 3"
    assert results.verdict("a - b > 5", about) == "**1 of 3; mean: no**"
    assert results.verdict("a > 0", about)[0] == "3"
    for claim in "a", "a <", "a in x", "a < __import__('os')", "a - no > 0", "x == 'y'", "a < True":
        with pytest.raises(ValueError, match="allowed|comparison"):
            results.holds(claim, {"a": 1.0, "x": 1.0})


def test_results_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    good = (ROOT / "docs" / "results" / "grpo.json").read_text(encoding="utf-8")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    for text in (good.replace("[0, 1, 2]", "[0, 1]"), good.replace('"script"', '"scripts"'), "{"):
        (tmp_path / "grpo.json").write_text(text, encoding="utf-8")
        assert results.main(["--check"]) == 2
        assert capsys.readouterr().err.startswith("results.py: error: ")


def figures(script: str) -> list[float]:
    """Every number that the results of a script hold: values, their means, sides of claims."""
    found = []
    for about in EXPERIMENTS.values():
        if about["script"] == script:
            seeds = [results.of_seed(about, i) for i in range(len(about["seeds"]))]
            sides = [side for claim in about["claims"] for side in results.sides(claim)]
            for values in [*seeds, results.means(about)]:
                found += [*values.values(), *(results.value_of(side, values) for side in sides)]
    return found


def unknown(text: str, script: str) -> list[str]:
    """Numbers with two decimals or more, or with one after tens, that no result rounds to."""
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)
    missing, known = [], figures(script)
    for number in re.findall(r"(?<![\d.\-/:])(\d\.\d{2,4}|\d\d+\.\d)(?![\d.]|e-)", text):
        margin = 0.501 * 10 ** -len(number.split(".")[1])
        if not any(abs(float(number) - abs(value)) <= margin for value in known):
            missing.append(number)
    return missing


def test_figures_of_the_prose_are_those_of_the_files(monkeypatch):
    """The README, sections of docs/experiments.md and *Expect* of docstrings, a script each."""
    page = TEXTS["docs/experiments.md"]
    for script in "grpo.py ppo.py nsr.py coconut.py recurrent_depth.py".split():
        sections = re.findall(rf"^## {script} ?.*?(?=^## )", page, re.M | re.S)
        sections += re.findall(r"^Expect\n(.*?)\n\n", DOCSTRINGS[script], re.M | re.S)
        assert len(sections) >= 2 and unknown("".join(sections), script) == [], script
    for row in rows_of("README.md", 4)[1:]:
        (name,) = re.findall(r"python (\S+\.py)", row[2])
        script = name if name in SCRIPTS else "sft.py"  # more/traces.py: learnt by sft.py
        assert unknown(row[3], script) == [], row
    prose = re.sub(r"^(\|| {4})[^\n]*$|```.*?```", "", README, flags=re.M | re.S)
    assert unknown(prose, "grpo.py") == []
    about = {"script": "x.py", "seeds": [0], "claims": [], "values": {"a": [0.3431]}}
    monkeypatch.setitem(EXPERIMENTS, "x", about)
    text = "0.345, 0.343, 18.6 tokens, 2506.01347, 5e-4, `0.999`, 0.1"
    assert unknown(text, "x.py") == ["0.345", "18.6"]
