"""README.md tells the truth: the commands parse, the flags, files, functions and metrics it names exist."""

import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
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
SCRIPTS |= {"recurrent_depth.py": recurrent_depth, "specreason.py": specreason}
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
    more["specreason.py"] = "--eval_problems 2 --sweep_problems 1 --max_new_tokens 16"  # trains nothing
    written = set()
    for name, module in SCRIPTS.items():
        out, few = tmp_path / name.removesuffix(".py"), [] if name == "specreason.py" else small
        assert module.main(module.train, module.Config, [*few, *more[name].split(), "--out", str(out)]) == 0
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            written |= set(grpo.json.loads(line))
    table = README[README.index("| metric | meaning |") :].partition("\n\n")[0]
    explained = set()
    for row in table.splitlines()[2:]:
        for name in re.findall(r"`([^`]+)`", row.split("|")[1]):
            explained.add(f"completion_length{name}" if name.startswith("/") else name)
    written = {re.sub(r"pass@\d+", "pass@k", name) for name in written}
    written = {re.sub(r"@\d+$", "@r", name) for name in written}  # recurrent_depth.py: iterations, ways to read a row
    written = {re.sub(r"/(full|exit|warm|shared|both)$", "/way", name) for name in written}
    ways = r"/(base|draft|specreason|spec_decode|hierarchical|coin|oracle|threshold [\d.]+)$"
    written = {re.sub(ways, "/model", name) for name in written}  # specreason.py: who writes
    assert written - explained == set()
    optional = {"completion_length/correct", "reflections/correct", "eval/accuracy_not_given_up", "entropy"}
    optional |= {"explained_variance", "eval/auc"}
    assert explained - written - optional == set()  # only what a batch without right answers lacks
