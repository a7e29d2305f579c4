"""README.md tells the truth: the commands parse, the flags, files, functions and metrics it names exist."""

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

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"grpo.py": grpo, "ppo.py": ppo, "nsr.py": nsr, "sft.py": sft, "coconut.py": coconut}
SCRIPTS |= {"recurrent_depth.py": recurrent_depth, "budget_forcing.py": budget_forcing, "specreason.py": specreason}
TEXTS = {"README.md": README, "models/README.md": (ROOT / "models" / "README.md").read_text(encoding="utf-8")}
TEXTS |= {name: module.__doc__ for name, module in SCRIPTS.items()}
COMMANDS = sorted(
    {
        (script, line.partition(" #")[0].strip())
        for text in TEXTS.values()
        for line in re.sub(r"\\\n\s*", "", text).splitlines()
        for script in SCRIPTS
        if re.match(
            rf"\s*(python|torchrun .*?)\s+{re.escape(script)}\b",
            line.replace("pip install -r requirements.txt && ", ""),
        )
    }
)


@pytest.mark.parametrize("script, line", COMMANDS)
def test_commands_parse(script, line):
    words = shlex.split(line.replace("pip install -r requirements.txt && ", ""))
    argv = words[words.index(script) + 1 :]
    if "--resume" not in argv:
        SCRIPTS[script].parse_config(SCRIPTS[script].Config, argv)


def test_there_are_commands():
    assert len(COMMANDS) >= 8


DATA = (ROOT / "docs" / "sft_experiments.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^    +(python .*)$", DATA, re.MULTILINE))))
def test_experiments_parse(line):
    """The shell's variables stand for numbers, tasks and rules; the tasks exist."""
    named = dict(re.findall(r"(\w+)=((?:countdown|generalpoints|knights)\S*?)(?:;|\n)", DATA))
    line = re.sub(r"\$\(last [^)]*\)", "tiny", line)
    for name, flags in re.findall(r'(\w+)="(--[^"]*)"', DATA):
        line = line.replace(f"${name} ", f"{flags} ")
    line = re.sub(r"--perturb \$rule", "--perturb shuffle:0.67", line)
    line = re.sub(r"--select \$rule", "--select random", line)
    line = re.sub(r"--loss_on \$part", "--loss_on answer", line)
    line = re.sub(r"--task \$(\w+)", lambda m: f"--task {named[m[1]]}", line)
    _, script, *argv = shlex.split(re.sub(r"\$\w+", "2", line))
    if "--resume" not in argv:
        cfg = SCRIPTS[script].parse_config(SCRIPTS[script].Config, argv)
        rewards.make_task(cfg.task)
        if script == "sft.py":
            sft.check_flags(cfg)


def test_flags_and_functions_exist():
    flags = set(re.findall(r"(?<![\w-])--(\w+)", README)) - {"fix", "help", "standalone", "nproc_per_node"}
    known = {name for module in SCRIPTS.values() for name in module.Config.__dataclass_fields__}
    known |= set(re.findall(r'"--(\w+)"', (ROOT / "tests" / "bench.py").read_text(encoding="utf-8")))
    assert flags - known - {"index"} == set()
    rows = [line for line in README.splitlines() if line.startswith("| ") and ".py" in line]
    assert len(rows) >= 8
    for row in rows:
        names = re.findall(r"`([\w.]+)`", row.split("|")[3])
        for name in names:
            found = [m for m in (*SCRIPTS.values(), rewards) if hasattr(m, name.split(".")[0])]
            found = [m for m in found if all(hasattr(getattr(m, name.split(".")[0]), n) for n in name.split(".")[1:])]
            assert found, f"{name} of {row}"


def test_every_metric_of_a_run_is_explained(tmp_path):
    """One step of each script; every key of metrics.jsonl has a row in the README's table, and none is stale."""
    small = "--steps 1 --batch_size 4 --eval_problems 2 --eval_samples 2 --max_new_tokens 16".split()
    more = {"grpo.py": "--group_size 2", "ppo.py": "--group_size 2 --mini_batches 1", "sft.py": "--num_layers 1"}
    more["coconut.py"] = "--hidden_size 32"
    more["nsr.py"] = "--group_size 2 --updates 1 --normaliser sample"
    more["recurrent_depth.py"] = "--hidden_size 16 --num_heads 2"
    more["budget_forcing.py"] = "--model tiny --caps 4,8,12 --max_new_tokens 20 --waits 1 --eval_problems 2"
    more["specreason.py"] = "--eval_problems 2 --sweep_problems 1 --max_new_tokens 16"
    ways = r"/(base|draft|specreason|spec_decode|hierarchical|coin|oracle|threshold [\d.]+)$"  # who writes
    written = set()
    for name, module in SCRIPTS.items():
        out, trains = tmp_path / name.removesuffix(".py"), hasattr(module, "train")
        flags = [*small * trains, *more[name].split(), "--out", str(out)]
        assert module.main(module.train if trains else module.solve, module.Config, flags) == 0
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            keys = set(grpo.json.loads(line))
            written |= {re.sub(ways, "/model", key) for key in keys} if name == "specreason.py" else keys
    table = README[README.index("| metric | meaning |") :].partition("\n\n")[0]
    explained = set()
    for row in table.splitlines()[2:]:
        for name in re.findall(r"`([^`]+)`", row.split("|")[1]):
            explained.add(f"completion_length{name}" if name.startswith("/") else name)
    written = {re.sub(r"pass@\d+", "pass@k", name) for name in written}
    written = {re.sub(r"@\d+$", "@r", name) for name in written}  # recurrent_depth.py: iterations, ways to read a row
    written = {re.sub(r"/(full|exit|warm|shared|both)$", "/way", name) for name in written}
    written = {re.sub(r"/tiny/\w+?(_se|)$", r"/model/side\1", name) for name in written}  # budget_forcing.py
    assert written - explained == set()
    optional = {"completion_length/correct", "reflections/correct", "eval/accuracy_not_given_up", "entropy"}
    optional |= {"explained_variance", "flipped/model/side", "kept", "eval/auc"}  # or what other tasks and flags write
    optional |= {place + name for place in ("", "eval/") for name in ("first_notation", "mixed", "right_actions")}
    assert explained - written - optional == set()  # only what a batch without right answers lacks
