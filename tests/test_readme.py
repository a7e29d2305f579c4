"""README.md, docs/ and docstrings tell the truth: commands parse; files, flags, functions, metrics, figures exist."""

import ast
import doctest
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import budget_forcing  # noqa: E402
import coconut  # noqa: E402
import grpo  # noqa: E402
import nsr  # noqa: E402
import ppo  # noqa: E402
import recurrent_depth  # noqa: E402
import rewards  # noqa: E402
import sft  # noqa: E402
import specreason  # noqa: E402


def load(name: str, folder: str = "docs"):
    """A file of docs/ as a module."""
    path = ROOT / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


report, results = load("report"), load("results")
SCRIPTS = {"grpo.py": grpo, "ppo.py": ppo, "nsr.py": nsr, "sft.py": sft, "coconut.py": coconut}
SCRIPTS |= {"recurrent_depth.py": recurrent_depth, "budget_forcing.py": budget_forcing, "specreason.py": specreason}
TOOLS = {
    f"docs/experiments/{path.name}": load(path.stem, "docs/experiments")
    for path in sorted((ROOT / "docs" / "experiments").glob("*.py"))
}
TOOLS["more/traces.py"] = traces = load("traces", "more")
TOOLS["more/tasks.py"] = load("tasks", "more")
PAGES = ["README.md", "models/README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
README, METRICS = TEXTS["README.md"], TEXTS["docs/metrics.md"]
DOCSTRINGS = {name: module.__doc__ for name, module in SCRIPTS.items()}
DOCSTRINGS |= {"docs/report.py": report.__doc__, "docs/results.py": results.__doc__}
for helper in ("bench", "smollm2", "test_shared_blocks"):
    DOCSTRINGS[f"tests/{helper}.py"] = ast.get_docstring(
        ast.parse((ROOT / "tests" / f"{helper}.py").read_text("utf-8"))
    )
EXPERIMENTS = results.all_results()

# ---------------------------------------------------------------------------------------------------- commands

# what a reader fills in, or a shell; forks stand for the script that they are copied from
STAND_INS = {r"\bS\b": "7", r"--mode M\b": "--mode nsr", r"\bCHECKPOINT\b": "tiny", r"\$\(last [^)]*\)": "tiny"}
STAND_INS |= {r"mine\.py:Digits\S*": "countdown"}  # test_bring_your_own_task runs it
STAND_INS |= {r"--perturb \$rule": "--perturb shuffle:0.67", r"--select \$rule": "--select random"}
STAND_INS |= {r"--loss_on \$part": "--loss_on answer", r"--mode \$m": "--mode psr", r"\bmedian\.py\b": "grpo.py"}


def commands(text: str) -> list[list[str]]:
    """The words of every command line of Python and torchrun in indented lines and in `code`, without comments."""
    named = dict(re.findall(r"(\w+)=((?:countdown|more/tasks|s3)\S*?)(?:;|\n)", text))
    named |= dict(re.findall(r'(\w+)="(--[^"]*)"', text))
    text = re.sub(r"\$(\w+)", lambda m: named.get(m[1], m[0]), re.sub(r"\\\n\s*", "", text))
    lines = re.findall(r"^ {2,}(\S.*)$", text, re.MULTILINE)
    lines += [re.sub(r"\s+", " ", code) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    found = []
    for line in lines:
        for part in re.split(r" && | \|\| |; |;$", line.partition(" #")[0].partition("   ")[0]):
            part = re.sub(r"^do ", "", part.strip())
            for pattern, stand_in in STAND_INS.items():
                part = re.sub(pattern, stand_in, part)
            if re.match(r"(python|torchrun) .*(\.py| -m )", part) and "..." not in part and " -c " not in part:
                found.append(shlex.split(re.sub(r"\$\w+", "2", part)))
    return found


EVERY = [(where, words) for where, text in (TEXTS | DOCSTRINGS).items() for words in commands(text or "")]


@pytest.mark.parametrize("where, line", sorted({(where, shlex.join(words)) for where, words in EVERY}))
def test_commands_parse(where, line):
    """Scripts and docs/*.py through their own parsers; of other files in tests/, the flags that their text knows."""
    words = shlex.split(line)
    at = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m")
    name, argv = words[at], words[at + 1 :]
    if name == "-m":
        assert argv[0] in ("pytest", "doctest")
    elif name in SCRIPTS:
        if "--resume" not in argv:
            cfg = SCRIPTS[name].parse_config(SCRIPTS[name].Config, argv)
            if not cfg.data and cfg.task != "text":
                rewards.make_task(cfg.task)
            if name == "sft.py":
                sft.check_flags(cfg)
    elif name == "more/traces.py":
        traces.make_parser().parse_args(argv)
    elif hasattr(TOOLS.get(name), "Config"):
        grpo.parse_config(TOOLS[name].Config, argv)
    elif name in ("docs/report.py", "docs/results.py"):
        args = (report if name == "docs/report.py" else results).arguments(argv)
        assert not getattr(args, "show", "") or Path(args.out).suffix == ".svg"
    else:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert all(word in text for word in argv if word.startswith("--"))


def test_every_kind_of_command_is_found():
    """The reader of commands reads: each script from its docstring, the README's block of pictures, inline code."""
    named = {word for _, words in EVERY for word in words}
    assert (
        set(SCRIPTS) | {"docs/report.py", "docs/results.py", "tests/bench.py", "tests/test_shared_blocks.py"} <= named
    )
    assert sum("--show" in words for where, words in EVERY if where == "README.md") >= 7
    assert ["python", "grpo.py", "--seed", "7"] in commands("so `python grpo.py --seed\nS` it is")
    assert len(EVERY) >= 100


# ------------------------------------------------------------------------------------ files, flags, functions


def test_files_exist():
    """Every path that a page or a docstring names; links and pictures too. What a run writes lies in out/."""
    for where, text in (TEXTS | DOCSTRINGS).items():
        plain = re.sub(r"\bout/\S+|https?://\S+|\bstep-\S+", "", text or "")
        names = set(re.findall(r"(?<![\w/*.-])(?:docs|tests|models|more|\.ci)/[\w./-]*\w", plain))
        names |= set(re.findall(r"(?<![\w/.-])[a-z_0-9]+\.py\b", plain)) - {"median.py", "mine.py"}
        for name in names:
            places = [ROOT, ROOT / "tests", ROOT / "docs"]
            assert any((folder / name).exists() for folder in places), f"{where} names {name}"
        for link in re.findall(r"\]\(([^)#]+)", text or ""):
            if not link.startswith("https://"):
                assert ((ROOT / where).parent / link).is_file(), f"{where} links to {link}"


def test_flags_exist():
    known = {name for module in SCRIPTS.values() for name in module.Config.__dataclass_fields__}
    known |= {"help", "standalone", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}  # argparse, torchrun
    known |= {"deps", "index-url"}  # pip
    for tool in TOOLS.values():
        known |= set(getattr(tool, "Config", grpo.Config).__dataclass_fields__)
    helpers = ["tests/bench.py", "tests/test_shared_blocks.py", "docs/report.py", "docs/results.py"]
    for helper in (*helpers, "more/traces.py"):
        known |= set(re.findall(r'"--(\w+)"', (ROOT / helper).read_text(encoding="utf-8")))
    for where, text in (TEXTS | DOCSTRINGS).items():
        flags = set(re.findall(r"(?<![\w-])--(?:no-)?(\w[\w-]*)", text or ""))
        assert flags - known == set(), where


def test_functions_of_the_map_exist():
    rows = [line for line in README.splitlines() if line.startswith("| ") and "arxiv.org" in line]
    assert len(rows) >= 15
    for row in rows:
        for name in re.findall(r"`([\w.]+)`", row.split("|")[3]):
            modules = (*SCRIPTS.values(), *TOOLS.values(), rewards)
            found = [m for m in modules if hasattr(m, name.split(".")[0])]
            found = [m for m in found if all(hasattr(getattr(m, name.split(".")[0]), n) for n in name.split(".")[1:])]
            assert found, f"{name} of {row}"


def test_the_line_that_the_fork_changes_is_there():
    (line,) = re.findall(r"^    -( +\S.*)$", README, re.MULTILINE)
    assert (ROOT / "grpo.py").read_text(encoding="utf-8").count(line + "\n") == 1


def test_bring_your_own_task(run, cwd):
    """The class of the README by hand, and in a step of the command."""
    (section,) = re.findall(r"^## Bring your own task.*?(?=^## )", README, re.M | re.S)
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    (spec,) = re.findall(r"python grpo\.py .*--task (mine\S+)$", section, re.M)
    (cwd / "mine.py").write_text(code)
    task = rewards.make_task(spec)
    problems = {split: [task.problem(split, 0, i) for i in range(50)] for split in ("train", "test")}
    assert not {p["number"] for p in problems["train"]} & {p["number"] for p in problems["test"]}
    good, problem = "it is 2</think> <answer>2</answer>", {"number": "313200900", "digit": "3"}
    assert task.score(good, problem) == {"format": 1.0, "answer": "2", "correct": True, "total": 1.1}
    assert task.score(good, problem | {"digit": "9"})["total"] == 0.1 and "313200900" in task.question(problem)
    done = run("grpo", f"--task {spec} --steps 1")
    assert done.code == 2 and "compact" in done.err  # as the README says
    compact = "\n    def compact(self, problem):\n        return f\"{problem['number']}?{problem['digit']}<think>\"\n"
    (cwd / "mine.py").write_text(code + compact)
    done = run("grpo", f"--task {spec} --steps 1")
    assert done.code == 0 and "verifier failed" not in done.err and (*cwd.glob("out/grpo-Digits-0-*/step-000001"),)


# ----------------------------------------------------------------------------------------------------- metrics


def explained_metrics() -> set[str]:
    found = set()
    for row in METRICS[METRICS.index("| metric | meaning |") :].splitlines()[2:]:
        for name in re.findall(r"`([^`]+)`", row.split("|")[1]):
            found.add(f"completion_length{name}" if name.startswith("/") else name)
    return found


def test_every_metric_of_a_run_is_explained(tmp_path):
    """One step of each script; every key of metrics.jsonl has a row in docs/metrics.md, and none is stale."""
    small = "--steps 1 --batch_size 4 --eval_problems 2 --eval_samples 2".split()
    more = {"grpo.py": "--group_size 2", "ppo.py": "--group_size 2 --mini_batches 1", "sft.py": "--num_layers 1"}
    more["coconut.py"] = "--hidden_size 32"
    more["nsr.py"] = "--group_size 2 --updates 1 --normaliser sample"
    more["recurrent_depth.py"] = "--hidden_size 16 --num_heads 2"
    more["budget_forcing.py"] = "--model tiny --caps 4,8,12 --max_new_tokens 20 --waits 1 --eval_problems 2"
    more["specreason.py"] = "--eval_problems 2 --max_new_tokens 16"
    ways = r"/(base|draft|specreason|spec_decode|hierarchical|coin|oracle|threshold [\d.]+)$"  # who writes
    written = set()
    for name, module in SCRIPTS.items():
        out, trains = tmp_path / name.removesuffix(".py"), hasattr(module, "train")
        flags = [*small * trains, *more[name].split(), "--out", str(out)]
        if trains and name != "recurrent_depth.py":
            flags += ["--max_new_tokens", "16"]
        assert module.main(module.train if trains else module.solve, module.Config, flags) == 0
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            keys = set(grpo.json.loads(line))
            written |= {re.sub(ways, "/model", key) for key in keys} if name == "specreason.py" else keys
    explained = explained_metrics()
    written = {re.sub(r"pass@\d+", "pass@k", name) for name in written}
    written = {re.sub(r"@\d+$", "@r", name) for name in written}  # recurrent_depth.py: iterations, ways to read a row
    written = {re.sub(r"/(full|exit|warm|shared|both)$", "/way", name) for name in written}
    written = {re.sub(r"/tiny/\w+?(_se|)$", r"/model/side\1", name) for name in written}  # budget_forcing.py
    assert written - explained == set()
    optional = {"completion_length/correct", "reflections/correct", "entropy"}
    optional |= {"explained_variance", "flipped/model/side", "kept", "eval/auc"}  # or what other tasks and flags write
    optional |= {f"eval/{name}" for name in ("cache/way", "same")}  # by docs/experiments
    kinds = "iterations", "passes", "seconds"
    optional |= {f"eval/{kind}/{way}" for kind in kinds for way in ("greedy", "speculative")}
    optional |= {place + name for place in ("", "eval/") for name in ("first_notation", "mixed", "right_actions")}
    rest = explained - written - optional
    assert not rest, sorted(rest)  # only what a batch without right answers lacks


def test_pictures_show_metrics_that_exist():
    explained = explained_metrics()
    shown = [words[words.index("--show") + 1] for _, words in EVERY if "--show" in words]
    assert len(shown) >= 7
    for name in {part for names in shown for part in re.split("[,:]", names)} - {"thinking", "NAMES"}:
        assert any(name.replace("*", end) in explained for end in ("k", "r", "model")), name


# ----------------------------------------------------------------------------------------------------- figures


def test_results_are_those_of_the_files(capsys):
    """README's table and docs/results.md are what docs/results.py writes; a changed number is seen."""
    assert results.main(["--check"]) == 0, capsys.readouterr().out
    assert doctest.testmod(results).failed == 0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_claim_evaluates(name):
    about = EXPERIMENTS[name]
    assert about["script"] in SCRIPTS and set(about["versions"]) >= {"python", "torch"}
    for claim in about["claims"]:
        assert isinstance(results.holds(claim, results.means(about)), bool)
        assert results.verdict(claim, about).strip("*").split()[0] in {"yes", "no", "0", "1", "2", "3"}
        assert results.measured(claim, about)  # a claim without a value says nothing


BROKEN = {"before": "comparison", "a < __import__('os')": "allowed", "after - nothing > 0": "allowed"}
BROKEN |= {"x == 'y'": "allowed", "a < True": "allowed", "a in x": "comparison", "a <": "comparison"}


@pytest.mark.parametrize("claim", BROKEN)
def test_a_claim_that_is_none_is_refused(claim):
    with pytest.raises(ValueError, match=BROKEN[claim]):
        results.holds(claim, {"after": 1.0, "a": 1.0, "x": 1.0})


def test_results_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    good = (ROOT / "docs" / "results" / "grpo.json").read_text(encoding="utf-8")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    bad = good.replace("[0, 1, 2]", "[0, 1]"), good.replace('"script"', '"scripts"'), "{", good.replace("0.30", "x")
    for text in bad:
        (tmp_path / "grpo.json").write_text(text, encoding="utf-8")
        assert results.main(["--check"]) == 2
        assert capsys.readouterr().err.startswith("results.py: error: ")


def test_a_claim_is_held_per_seed_and_on_the_mean():
    about = {"seeds": [0, 1, 2], "claims": ["a > b"], "values": {"a": [1, 2, 9], "b": [2, 1, 3]}}
    assert results.verdict("a > b", about) == "**2 of 3; mean: yes**" and results.measured("a > b", about) == (
        "1, 2, 9 against 2, 1, 3"
    )
    assert results.verdict("a - b > 5", about) == "**1 of 3; mean: no**" and results.verdict("a > 0", about)[0] == "3"


def test_ppo_is_compared_with_the_grpo_that_is_stored():
    assert EXPERIMENTS["ppo"]["values"]["grpo"] == EXPERIMENTS["grpo"]["values"]["after"]


def figures(script: str) -> list[float]:
    """Every number that the results of a script hold: values, their means, the sides of the claims."""
    found: list[float] = []
    for name, about in EXPERIMENTS.items():
        if about["script"] == script or name.startswith(script.removesuffix(".py")):
            seeds = [results.of_seed(about, i) for i in range(len(about["seeds"]))] + [results.means(about)]
            found += [number for seed in seeds for number in seed.values()]
            parts = [side for claim in about["claims"] for side in results.sides(claim)]
            found += [results.value_of(side, seed) for side in parts for seed in seeds]
    return found


def unknown(text: str, known: list[float]) -> list[str]:
    """Numbers with two decimals or more, or with one behind tens, that no result rounds to."""
    written = re.findall(r"(?<![\d.\-/:])(\d\.\d{2,4}|\d\d+\.\d)(?![\d.]|e-)", re.sub(r"`[^`]*`|\]\([^)]*\)", "", text))
    return [x for x in written if not any(abs(float(x) - abs(y)) <= 0.501 * 10 ** -len(x.split(".")[1]) for y in known)]


COVERED = ["grpo.py", "ppo.py", "nsr.py", "coconut.py", "recurrent_depth.py"]


@pytest.mark.parametrize("script", COVERED)
def test_figures_of_the_prose_are_those_of_the_files(script):
    """README's section of the script and *Expect* of its docstring repeat stored results only."""
    known, (section,) = figures(script), re.findall(rf"^### {re.escape(script)}.*?(?=^##)", README, re.M | re.S)
    expect = re.search(r"^Expect\n(.*?)\n\n", DOCSTRINGS[script], re.M | re.S)[1]
    assert unknown(section, known) == [] and unknown(expect, known) == [], "not in docs/results"


def test_figures_of_the_fork_are_those_of_the_files():
    about, (section,) = EXPERIMENTS["grpo_fork"], re.findall(r"^## Fork it.*?(?=^## )", README, re.M | re.S)
    assert (
        unknown(section, [*results.means(about).values(), about["minutes"]]) == []
        and len(re.findall(r"\b0\.\d{3}\b", section)) >= 3
    )


def test_figures_of_the_map_are_those_of_the_files():
    rows = [line.split("|") for line in README.splitlines() if line.startswith("| ") and line.count("|") == 7]
    rows = [cells for cells in rows if ".py" in cells[2] and "`" in cells[3]]
    assert sum(bool(re.search(r"\d\.\d", cells[6])) for cells in rows) >= 7
    for cells in rows:
        known = [number for script in re.findall(r"\w+\.py", cells[2]) for number in figures(script)]
        assert unknown(cells[6], known) == [], cells[6]


def test_the_reader_of_figures_reads():
    assert unknown("0.343 -> 0.72, 18.6 tokens, 2506.01347, 5e-4, arXiv:2503.2, `0.999`, 0.1", [0.343125, 0.715]) == [
        "18.6"
    ]
    assert unknown("0.345 and 0.71", [0.343125, 0.715]) == ["0.345"]
