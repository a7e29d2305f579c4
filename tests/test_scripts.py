"""Every script as a user meets it: help, files, resume, interruption, ranks, bad input, faults.

Most tests call main(train, Config, flags) in this process with a random model of two layers; what needs a process of
its own (signals, kill -9, torchrun, the exit code) starts one. A new script takes part by a line in conftest.SMALL.
"""

import doctest
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, fault, finish, lines_of, metrics_of, says, start
from safetensors.torch import load_file, save_file

every = pytest.mark.parametrize("script", SMALL)
both = pytest.mark.parametrize("script", ["grpo", "sft"])  # what lies in the shared blocks: two scripts are enough
NAMES = {script: f"out/{script}-countdown-0" for script in SMALL} | {"coconut": "out/coconut-affine-0"}
# everything that a resumed run must restore
HARD = "--lr 0.01 --updates 2 --kl_coef 0.1 --ref_every 1 --dynamic_sampling 1"


def module(script):
    return importlib.import_module(script)


def checkpoint(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def weights(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture
def made(run, cwd, shelf):
    """A finished run under a name in the working folder; each set of flags is run once and then copied."""

    def made(name: str, script: str = "grpo", flags: str = "") -> Path:
        kept = shelf / re.sub(r"\W+", "_", f"{script} {flags}")
        if not kept.exists():
            assert run(script, f"{flags} --eval_problems 0 --out {name}").code == 0
            shutil.copytree(cwd / name, kept)
        return cwd / name if (cwd / name).exists() else Path(shutil.copytree(kept, cwd / name))

    return made


@pytest.fixture
def half_right(monkeypatch):
    """A verifier that finds about half of the answers of a random model right, group by group."""

    def score(self, text, problem, format_weight=0.1, **kwargs):
        right = len(text) % 2 == 0
        return {"format": 0.0, "answer": None, "correct": right, "total": float(right)}

    monkeypatch.setattr(module("rewards").Countdown, "score", score)


# ---------------------------------------------------------------------------------------- help, import, docstrings


@pytest.mark.parametrize("name", ["rewards", *SMALL])
def test_docstring_examples(name):
    failed, tried = doctest.testmod(module(name))
    assert tried and not failed


NO_NETWORK = """
import contextlib, io, os, runpy, socket, sys
def refuse(*args, **kwargs): raise OSError("a network was asked for")
socket.socket.connect = socket.getaddrinfo = refuse
before, printed = sorted(os.listdir()), io.StringIO()
with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
    for name in sys.argv[1:]:
        __import__(name)
assert not printed.getvalue() and sorted(os.listdir()) == before, printed.getvalue()
print("imported")
"""


def test_import_and_help_as_processes(cwd):
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    env.pop("HF_HUB_OFFLINE")
    command, pipe = [sys.executable, "-c", NO_NETWORK, *SMALL], subprocess.PIPE
    imports = subprocess.Popen(command, cwd=cwd, env=env, stdout=pipe, stderr=pipe, encoding="utf-8")
    helps = {script: start(script, "--help", cwd) for script in SMALL}
    done = finish(imports)
    assert (done.code, done.out, done.err) == (0, "imported\n", "")
    for script, process in helps.items():
        done = finish(process)
        assert (done.code, done.err) == (0, "") and f"python {script}.py" in done.out
    assert not tree(cwd)


@every
def test_help(script, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("a network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(SystemExit) as left:
        module(script).main(module(script).train, module(script).Config, ["--help"])
    out, err = capsys.readouterr()
    assert left.value.code == 0 and err == ""
    assert module(script).__doc__.strip() in out
    for f in fields(module(script).Config):
        assert re.search(rf"^  --{f.name}\b", out, re.MULTILINE), f.name
        assert " ".join(f.metadata["help"].split()) in " ".join(out.split()), f.name
    flags = len(fields(module(script).Config))
    assert flags <= 50
    assert " ".join(out.split()).count("(default: ") == flags  # none twice, none without
    end = out.rstrip().splitlines()[-4:]
    assert end[0] == "examples:" and end[1].strip() == f"python {script}.py" and "--model Qwen2.5-1.5B" in end[2]


# ------------------------------------------------------------------------------------------------ the files of a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Each script run for two steps as a process of its own, from the models that its default takes."""
    folder = tmp_path_factory.mktemp("finished")
    flags = {"grpo": "--max_new_tokens 96 --overlong_cache 96", "sft": "--num_layers 2 --hidden_size 64"}
    flags["nsr"] = flags["ppo"] = "--max_new_tokens 96"
    flags["coconut"] = "--hidden_size 32"
    running = {script: start(script, f"{SMALL[script]} {flags[script]}", folder) for script in SMALL}
    done = {script: finish(process) for script, process in running.items()}
    for script, result in done.items():
        assert result.code == 0, result.err
        result.folder = folder / NAMES[script]
    return done


@every
def test_files_of_a_run(finished, script):
    folder = finished[script].folder
    expected = {"run.json", "metrics.jsonl", f"{script}.py", "step-000002"}
    expected |= {"samples.jsonl"} if script != "sft" else set()
    assert {path.name for path in folder.iterdir()} == expected
    assert (folder / f"{script}.py").read_bytes() == (ROOT / f"{script}.py").read_bytes()
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert about["script"] == f"{script}.py" and "--steps 2" in about["command"]
    assert set(about["config"]) == {f.name for f in fields(module(script).Config)}
    assert about["config"]["batch_size"] == 8 and about["config"]["lr"] == about["chosen"]["lr"] > 0
    assert (about["device"], about["dtype"], about["ranks"]) == ("cpu", "torch.float32", 1)
    assert about["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert not list(folder.rglob("*.tmp"))


@every
def test_metrics(finished, script):
    rows = lines_of(finished[script].folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    wanted = {"step", "seconds", "tokens", "loss", "entropy", "grad_norm", "lr", "tokens_per_s"}
    if script == "grpo":
        wanted |= {"reward", "reward_std", "frac_reward_zero_std", "completion_length", "clipped_ratio", "accuracy"}
        wanted |= {"clip_frac_low", "clip_frac_high", "kl", "seconds_sample", "seconds_train", "prompts"}
    if script == "ppo":
        wanted |= {"explained_variance", "value_mean", "value_loss", "approx_kl", "clip_frac_low", "clip_frac_high"}
        wanted |= {"critic_grad_norm", "critic_lr", "repeated_share", "accuracy", "clipped_ratio", "kl", "sampler_gap"}
    if script == "coconut":
        wanted |= {"stage", "rows_right"}
    if script == "nsr":
        wanted |= {"accuracy", "frac_all_right", "rows_trained", "optimizer_steps", "clip_frac_low", "sampler_gap"}
        assert all(row["sampler_gap"] <= row["sampler_gap_max"] < 1e-4 for row in steps)
        start = next(row for row in rows if row["step"] == 0)  # the sampled estimate of what training computes exactly
        assert start["eval/entropy"] == pytest.approx(steps[0]["entropy"], rel=0.3)  # other problems
    for row in steps:
        assert wanted <= set(row), wanted - set(row)
    evaluations = {row["step"]: row for row in rows if "eval/accuracy" in row}
    assert set(evaluations) == {0, 2}
    wanted = {"eval/accuracy", "eval/accuracy_se", "eval/pass@1", "eval/pass@2", "eval/completion_length"}
    assert all(wanted <= set(row) for row in evaluations.values())
    assert all(isinstance(value, (int, float)) for row in rows for value in row.values())


def test_samples(finished):
    rows = lines_of(finished["grpo"].folder / "samples.jsonl")
    assert [row["step"] for row in rows] == [1] * 8 + [2] * 8
    assert [row["group"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    names = "step group problem prompt tokens pieces logprobs mask rewards advantage truncated".split()
    tokenizer = module("grpo").load_tokenizer(checkpoint(finished["grpo"].folder, 2))
    for row in rows:
        assert sorted(row) == sorted(names)
        assert len(row["tokens"]) == len(row["pieces"]) == len(row["logprobs"]) == len(row["mask"]) > 0
        assert set(row["mask"]) <= {0, 1} and all(p <= 0 for p in row["logprobs"])
        assert "".join(row["pieces"]) == tokenizer.decode(row["tokens"], skip_special_tokens=False)
        assert row["truncated"] == (len(row["tokens"]) == 96 and row["tokens"][-1] != 1)
        assert {"format", "answer", "correct", "total"} <= set(row["rewards"])
        assert set(row["problem"]) == {"numbers", "target"} and row["prompt"].endswith("<think>")
    for i in range(0, 16, 4):
        assert abs(sum(row["advantage"] for row in rows[i : i + 4])) < 1e-3


@both
def test_checkpoint_opens_everywhere(finished, script):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = checkpoint(finished[script].folder, 2)
    names = "config generation_config tokenizer tokenizer_config".split()
    assert {p.name for p in folder.iterdir()} == {f"{n}.json" for n in names} | {"model.safetensors", "trainer.pt"}
    assert "lr" not in json.loads((folder / "config.json").read_text(encoding="utf-8"))  # the model's, not ours
    ours, theirs = module(script).load_model(folder), AutoModelForCausalLM.from_pretrained(folder).float()
    tokens = torch.tensor([AutoTokenizer.from_pretrained(folder)("5,10,6=8<think>5+6")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(ours.lm_head(ours(tokens)), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    state = torch.load(folder / "trainer.pt", weights_only=True)
    assert (state["step"], state["world"]) == (2, 1)
    mode = {path.name: oct(path.stat().st_mode) for path in folder.iterdir()}
    assert len(set(mode.values())) == 1, mode


@every
def test_what_a_run_says(finished, script):
    done = finished[script]
    assert done.err == ""
    heads = [line.split(" ")[0] for line in done.out.splitlines()]
    for head in ("device", "model", "task", "batch", "memory", "folder", "step", "log", "go", "report"):
        assert head in heads, head
    assert "no CUDA device" in done.out and "eval/accuracy" in done.out and "\r" not in done.out
    assert f"python {script}.py --resume {NAMES[script]} --steps 4" in done.out
    assert f"python docs/report.py {NAMES[script]}" in done.out


@both
def test_default_folder_takes_the_next_free_number(run, script, cwd):
    (cwd / (NAMES[script] + "-3")).mkdir(parents=True)
    for _ in range(3):
        assert run(script, "--eval_problems 0").code == 0
    found = {str(path.parent.relative_to(cwd)) for path in cwd.glob("out/*/run.json")}
    assert found == {NAMES[script], NAMES[script] + "-2", NAMES[script] + "-4"}


@both
def test_taken_out_is_refused(run, script, cwd):
    assert run(script, "--eval_problems 0 --out a/b").code == 0
    before = {path: path.read_bytes() for path in cwd.rglob("*") if path.is_file()}
    done = run(script, "--out a/b")
    assert done.code == 2 and done.err.startswith(f"{script}.py: error: a/b holds a run at step 2")
    assert "--resume a/b" in done.err and "--out a/b-2" in done.err and done.err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in cwd.rglob("*") if path.is_file()}
    (cwd / "empty").mkdir()
    assert run(script, "--eval_problems 0 --out empty").code == 0


@every
def test_same_seed_same_metrics(run, script, cwd):
    for name, flags in (("a", ""), ("b", ""), ("c", "--seed 1"), ("d", "--micro_batch_tokens 64")):
        assert run(script, f"--out {name} {flags}").code == 0
    a, b, c, d = (metrics_of(cwd / name) for name in "abcd")
    assert a == b and metrics_of(cwd / "a", evaluations=True) == metrics_of(cwd / "b", evaluations=True)
    assert equal(weights(checkpoint(cwd / "a", 2)), weights(checkpoint(cwd / "b", 2)))
    assert a != c and all(x["loss"] != y["loss"] for x, y in zip(a, c, strict=True))
    for x, y in zip(a, d, strict=True):  # the split into micro-batches changes nothing but rounding
        assert x == pytest.approx(y, rel=1e-5, abs=2e-6)
    if script != "sft":
        assert a[0].get("rows_trained", 1) > 0  # coconut trains all
        lines = [(cwd / name / "samples.jsonl").read_text(encoding="utf-8") for name in "ab"]
        assert lines[0] == lines[1]


@both
def test_bfloat16(run, script, cwd):
    """The path of a GPU, float32 weights with a bfloat16 copy to sample from, on the CPU."""
    assert run(script, "--dtype bfloat16 --out a").code == 0 and run(script, "--out b").code == 0
    assert all(w.dtype == torch.float32 for w in weights(checkpoint(cwd / "a", 2)).values())
    a, b = metrics_of(cwd / "a")[0], metrics_of(cwd / "b")[0]
    assert a["entropy"] == pytest.approx(b["entropy"], rel=0.02) and a["grad_norm"] > 0


def test_evaluations_while_training(run, cwd):
    assert run("grpo", "--out a --steps 3 --eval_every 1").code == 0
    rows = lines_of(cwd / "a" / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [1, 2, 3, 0]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]


@both
def test_check(run, script, cwd, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    done = run(script, "--check --steps 100")
    assert (done.code, done.err) == (0, "")
    for word in ("weights, gradients, Adam", "KV cache", "activations", "logits", "check passed"):
        assert word in done.out, word
    assert not tree(cwd) and not tree(tmp_path / "temporary")


@both
def test_failed_check_leaves_nothing_behind(run, script, cwd, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(module(script), "chosen_logprobs", out_of_memory)
    assert run(script, "--check").code == 1
    assert not tree(cwd) and not tree(tmp_path / "temporary")


# ------------------------------------------------------------------------------------------------------- resuming


def same_run(first: Path, second: Path, step: int) -> None:
    """Equal metrics and samples but for times, equal weights and optimizer to the last bit."""
    assert metrics_of(first) == metrics_of(second)
    assert equal(weights(checkpoint(first, step)), weights(checkpoint(second, step)))
    states = [torch.load(checkpoint(run, step) / "trainer.pt", weights_only=True) for run in (first, second)]
    a, b = (state["optimizer"]["state"] for state in states)
    assert a.keys() == b.keys() and all(equal(a[i], b[i]) for i in a)
    assert {k: v for k, v in states[0].items() if isinstance(v, int)} == {
        k: v for k, v in states[1].items() if isinstance(v, int)
    }
    logs = [path / "samples.jsonl" for path in (first, second)]
    assert (logs[0].read_bytes() if logs[0].exists() else b"") == (logs[1].read_bytes() if logs[1].exists() else b"")


@pytest.mark.parametrize(
    "script, flags",
    [
        ("grpo", ""),
        ("grpo", HARD),
        ("nsr", "--updates 2 --lr 0.01"),
        ("sft", ""),
        ("sft", "--dtype bfloat16"),
        ("coconut", "--mode coconut --stage_steps 1"),
    ],
)
def test_resumed_run_equals_the_unbroken_one(run, cwd, script, flags, half_right):
    assert run(script, f"--steps 4 --save_every 2 --out whole {flags}").code == 0
    rows = metrics_of(cwd / "whole")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(row["grad_norm"] > 0 for row in rows)
    if flags == HARD:
        assert rows[-1]["kl"] > 0 and rows[-1]["prompts"] > 8, "the case is to be harder than this"
        assert any(row["clip_frac_low"] + row["clip_frac_high"] >= 0 for row in rows)
    # another command ends after two steps and goes on
    assert run(script, f"--out halves {flags}").code == 0
    done = run(script, "--resume halves --steps 4", model=None, base=False)
    assert done.code == 0 and "resumed from halves/step-000002" in done.out
    same_run(cwd / "whole", cwd / "halves", 4)
    # the same command lost everything after step 2, its logs did not
    shutil.copytree(cwd / "whole", cwd / "cut")
    shutil.rmtree(checkpoint(cwd / "cut", 4))
    assert run(script, "--resume cut", model=None, base=False).code == 0
    same_run(cwd / "whole", cwd / "cut", 4)


@both
def test_resume_of_a_finished_run_does_nothing_but_evaluate(run, cwd, script):
    assert run(script, "--out a").code == 0
    before = metrics_of(cwd / "a"), weights(checkpoint(cwd / "a", 2))
    assert run(script, "--resume a", model=None, base=False).code == 0
    assert metrics_of(cwd / "a") == before[0] and equal(weights(checkpoint(cwd / "a", 2)), before[1])


@both
def test_resume_auto_takes_the_newest_run(run, cwd, script):
    for _ in range(2):
        assert run(script, "--eval_problems 0").code == 0
    os.utime(cwd / NAMES[script] / "run.json", (1, 1))
    done = run(script, "--resume auto --steps 3", model=None, base=False)
    assert done.code == 0 and f"resumed from {NAMES[script]}-2/step-000002" in done.out


@both
def test_checkpointing_changes_no_bit(made, cwd, script):
    made("a", script)
    made("b", script, "--checkpointing on")
    same_run(cwd / "a", cwd / "b", 2)


@pytest.mark.parametrize("half_line", ['{"step": 3, "los', '{"step": 3, "problem": {"target": 4}', "\x00\x00"])
def test_resume_drops_what_lies_beyond_the_checkpoint(run, made, cwd, half_line):
    made("a")
    made("b")
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (cwd / "b" / name).open("a", encoding="utf-8") as file:
            file.write('{"step": 3, "loss": 9}\n' + half_line)
    assert run("grpo", "--resume b --steps 3", model=None, base=False).code == 0
    assert run("grpo", "--resume a --steps 3", model=None, base=False).code == 0
    same_run(cwd / "a", cwd / "b", 3)


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:100])


OTHER_STATE = {"step": 4, "world": 1, "optimizer": {"state": {}, "param_groups": [{"params": [0], "lr": 1}]}}
CORRUPTIONS = {
    "short weights": truncate("model.safetensors"),
    "short state": truncate("trainer.pt"),
    "empty state": lambda folder: (folder / "trainer.pt").write_bytes(b""),
    "other state": lambda folder: (folder / "trainer.pt").write_bytes(b"not a state at all" * 9),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no state": lambda folder: (folder / "trainer.pt").unlink(),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "broken config": lambda folder: (folder / "config.json").write_text("{"),
    "broken tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "no tokenizer settings": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "state without an optimizer": lambda folder: torch.save({"step": 4, "world": 1}, folder / "trainer.pt"),
    "state that is a list": lambda folder: torch.save([1, 2], folder / "trainer.pt"),
    "state of another model": lambda folder: torch.save(OTHER_STATE, folder / "trainer.pt"),
    "other weights": lambda folder: shrink(folder),
}


def shrink(folder: Path) -> None:
    """Weights and config.json of a whole model, but of another size."""
    module("sft").make_tiny(folder, SimpleNamespace(num_layers=1, hidden_size=32, seed=0))


@fault("newest checkpoint broken", "`cannot be read (`, `taking the one before`; ends with the same bits", 0)
@pytest.mark.parametrize("case", CORRUPTIONS)
def test_corrupt_newest_checkpoint(run, made, cwd, case, code, happens):
    made("a", flags="--steps 4 --save_every 2")
    CORRUPTIONS[case](checkpoint(made("b", flags="--steps 4 --save_every 2"), 4))
    done = run("grpo", "--resume b", model=None, base=False)
    assert done.code == code, done.err
    says(happens, done.out)
    assert "note: b/step-000004 cannot be read" in done.out and "resumed from b/step-000002" in done.out
    same_run(cwd / "a", cwd / "b", 4)


@fault("no checkpoint can be read", "refused, `no checkpoint there can be read; start again without --resume`", 2)
def test_no_checkpoint_left(run, made, cwd, code, happens):
    made("a")
    truncate("trainer.pt")(checkpoint(cwd / "a", 2))
    log = (cwd / "a" / "metrics.jsonl").read_bytes()
    done = run("grpo", "--resume a --steps 3", model=None, base=False)
    assert done.code == code and done.err.count("\n") == 1
    says(happens, done.err)
    assert (cwd / "a" / "metrics.jsonl").read_bytes() == log


@pytest.mark.parametrize(
    "script, flags, differences",
    [
        ("grpo", "--seed 1", ["seed"]),
        ("grpo", "--group_size 8", ["group_size"]),
        ("grpo", "--task multiplication", ["task"]),
        ("grpo", "--model tiny", ["model"]),
        ("grpo", "--seed 5 --group_size 8", ["seed", "group_size"]),
        ("sft", "--seed 1", ["seed"]),
        ("sft", "--task countdown:high=20 --model scratch", ["task", "model"]),
    ],
)
def test_resume_refuses_another_run(run, made, cwd, script, flags, differences):
    made("a", script)
    before = {path: path.read_bytes() for path in cwd.rglob("*") if path.is_file()}
    done = run(script, f"--resume a --steps 3 {flags}", model=None, base=False)
    assert done.code == 2 and done.err.count("\n") == 1 and done.err.startswith(f"{script}.py: error: --resume a")
    for name in ("model", "task", "seed", "group_size"):
        assert (f"--{name} " in done.err) == (name in differences), name
    assert before == {path: path.read_bytes() for path in cwd.rglob("*") if path.is_file()}


def test_resume_keeps_what_was_chosen_by_model_size(run, made, cwd):
    before = json.loads((made("a") / "run.json").read_text(encoding="utf-8"))["chosen"]
    assert run("grpo", "--resume a --steps 3", model=None, base=False).code == 0
    assert json.loads((cwd / "a" / "run.json").read_text(encoding="utf-8"))["chosen"] == before != {}


def test_signal_in_the_last_evaluation_leaves_at_once(run, cwd, monkeypatch):
    """Everything is saved by then."""
    left, grpo = [], module("grpo")
    monkeypatch.setattr(grpo.os, "_exit", left.append)

    def evaluate(run, *args):
        run.on_signal(signal.SIGINT, None)
        return {}

    monkeypatch.setattr(grpo, "evaluate", evaluate)
    run("grpo", "--out a")
    assert left[0] == 128 + signal.SIGINT and checkpoint(cwd / "a", 2).exists()


def test_resume_with_the_same_flags_or_another_lr_goes_on(run, made, cwd, small):
    made("a")
    flags = f"--resume a --steps 3 --model {small} --seed 0 --group_size 4 --lr 0.001"
    assert run("grpo", flags, model=None, base=False).code == 0
    assert metrics_of(cwd / "a")[-1]["lr"] == pytest.approx(0.001 * 3 / 10)


def test_resume_keeps_what_the_last_one_was_given(run, made, cwd, monkeypatch):
    """The command that an interrupted run prints names the folder alone, so the folder has to know the rest."""
    made("a")
    real = module("grpo").Run.after_step

    def after_step(self, step, *args, **kwargs):
        self.signal = signal.SIGINT if step == 3 else 0
        return real(self, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module("grpo").Run, "after_step", after_step)
        assert run("grpo", "--resume a --steps 5", model=None, base=False).code == 130
    assert run("grpo", "--resume a", model=None, base=False).code == 0
    assert [row["step"] for row in metrics_of(cwd / "a")] == [1, 2, 3, 4, 5]


def test_old_checkpoints_and_unfinished_folders_go(run, made, cwd):
    made("a", flags="--steps 3 --save_every 1")
    assert {p.name for p in (cwd / "a").glob("step-*")} == {"step-000002", "step-000003"}
    for name in ("step-000004.tmp", "step-000007.tmp"):  # what a killed run leaves
        (cwd / "a" / name).mkdir()
        (cwd / "a" / name / "trainer.pt").write_bytes(b"half")
    assert run("grpo", "--resume a --steps 4", model=None, base=False).code == 0
    assert {p.name for p in (cwd / "a").glob("step-*")} == {"step-000003", "step-000004"}


def test_check_of_a_resumed_run_does_not_touch_it(run, made, cwd):
    made("a")
    before = {path: path.read_bytes() for path in cwd.rglob("*") if path.is_file()}
    run("grpo", "--resume a --check", model=None, base=False)  # may run or be refused
    assert before == {path: path.read_bytes() for path in cwd.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------- interruption


def wait_for(condition, process, seconds=60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, finish(process).err
        assert time.monotonic() < until, "the run did not get there"
        time.sleep(0.01)


@pytest.mark.parametrize("line", ['{"loss": 1}', "{", "[]", "7", "\x00"])
@fault("a line of metrics.jsonl or samples.jsonl is broken", "refused, `has a line without a step`; nothing is lost", 2)
def test_broken_line_of_a_log(run, made, cwd, line, code, happens):
    log = made("a") / "metrics.jsonl"
    text = log.read_text(encoding="utf-8")
    log.write_text(line + "\n" + text, encoding="utf-8")
    done = run("grpo", "--resume a --steps 3", model=None, base=False)
    assert done.code == code and done.err.count("\n") == 1 and log.read_text(encoding="utf-8").endswith(text)
    says(happens, done.err)


@fault("a save that ends behind any of its files", "the checkpoint before is whole; ends with the same bits", "")
@pytest.mark.parametrize("last", ["config.json", "model.safetensors", "trainer.pt", "rename"])
def test_save_that_ends_anywhere(run, made, cwd, last, monkeypatch):
    """A save that stops after each of its files; the run goes on from the checkpoint before."""
    grpo = module("grpo")
    made("whole", flags="--steps 5 --save_every 1")
    made("a", flags="--steps 3 --save_every 1")

    class Killed(BaseException): ...

    def die(*args, **kwargs):
        raise Killed

    def remove(path, *args, real=shutil.rmtree, **kwargs):
        return die() if Path(path).name == "step-000002" else real(path, *args, **kwargs)

    after = {"config.json": (grpo, "save_file", die), "model.safetensors": (torch, "save", die)}
    after |= {"trainer.pt": (Path, "rename", die), "rename": (shutil, "rmtree", remove)}
    with monkeypatch.context() as patch:
        patch.setattr(*after[last])
        with pytest.raises(Killed):
            run("grpo", "--resume a --steps 5", model=None, base=False)
    assert run("grpo", "--resume a --steps 5", model=None, base=False).code == 0
    same_run(cwd / "whole", cwd / "a", 5)


# ------------------------------------------------------------------------------------------------------------ ranks


def close(first: list[dict], second: list[dict], rel: float) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert one == pytest.approx(other, rel=rel, abs=2e-6)  # the log has six decimals


@pytest.mark.parametrize(
    "script, world, flags",
    [
        ("grpo", 2, ""),
        ("grpo", 2, HARD),
        ("grpo", 3, HARD),
        ("grpo", 2, "--aggregation sequence --advantage batch --mask_truncated --micro_batch_tokens 64"),
        ("nsr", 3, "--mode nsr --updates 2 --batch_size 16"),
        ("sft", 2, ""),
        ("sft", 3, "--loss_on all --micro_batch_tokens 128"),
        ("coconut", 3, "--micro_batch_tokens 64"),
    ],
)
def test_ranks_give_the_same_gradient(run_ranks, cwd, script, world, flags, half_right):
    """Threads as ranks. No step is taken, so that all gradients are those of the same weights."""
    gradients = {}
    for n in (1, world):
        codes, gradients[n] = run_ranks(script, n, f"--out {n} {flags}")
        assert codes == [0] * n
    assert len(gradients[1]) == len(gradients[world]) > 0
    for one, other in zip(gradients[1], gradients[world], strict=True):
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    close(metrics_of(cwd / "1"), metrics_of(cwd / str(world)), 1e-5)
    evaluations = (metrics_of(cwd / str(n), evaluations=True) for n in (1, world))
    close(*evaluations, 1e-5)
    assert len(list(cwd.glob("*"))) == 2
    if script == "grpo":
        a, b = (lines_of(cwd / str(n) / "samples.jsonl") for n in (1, world))
        assert [row["tokens"] for row in a] == [row["tokens"] for row in b]


def test_ranks_sample_the_same_file(run_ranks, cwd):
    """Rejection sampling over more problems than one chunk, shared by three ranks."""
    for n in (1, 3):
        codes, _ = run_ranks("sft", n, f"--sample 70 --keep all --eval_problems 0 --out {n}")
        assert codes == [0] * n
    one, other = (lines_of(cwd / str(n) / "sampled.jsonl") for n in (1, 3))
    assert one == other and len({line["prompt"] for line in one}) > 5


LAUNCH = ["-m", "torch.distributed.run"]


@both
def test_torchrun_with_two_ranks(run, cwd, small, script):
    flags = f"{SMALL[script]} --model {small}"
    done = finish(start(script, f"{flags} --out two", cwd, [*LAUNCH, "--standalone", "--nproc_per_node=2"]))
    assert done.code == 0, done.err
    assert run(script, "--out one").code == 0
    close(metrics_of(cwd / "one"), metrics_of(cwd / "two"), 1e-5)
    close(metrics_of(cwd / "one", evaluations=True), metrics_of(cwd / "two", evaluations=True), 1e-5)
    assert json.loads((cwd / "two" / "run.json").read_text(encoding="utf-8"))["ranks"] == 2
    assert done.out.count("device cpu") == done.out.count("folder two") == 1
    if script == "grpo":  # the same completions, whoever sampled them
        a, b = (lines_of(cwd / name / "samples.jsonl") for name in ("one", "two"))
        assert [row["tokens"] for row in a] == [row["tokens"] for row in b]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_nodes(run, cwd, small):
    flags, port = f"{SMALL['grpo']} --model {small} --out two", free_port()
    launch = [*LAUNCH, "--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
    nodes = [start("grpo", flags, cwd, [*launch, f"--node_rank={rank}"]) for rank in (0, 1)]
    for done in [finish(node) for node in nodes]:
        assert done.code == 0, done.err
    assert run("grpo", "--out one").code == 0
    close(metrics_of(cwd / "one"), metrics_of(cwd / "two"), 1e-5)


@pytest.mark.slow
def test_resume_on_another_number_of_ranks(run, cwd, small):
    launch = [*LAUNCH, "--standalone", "--nproc_per_node=2"]
    assert run("grpo", "--out a --steps 4").code == 0
    assert finish(start("grpo", f"{SMALL['grpo']} --model {small} --out b", cwd, launch)).code == 0
    done = run("grpo", "--resume b --steps 4", model=None, base=False)
    assert done.code == 0 and "note: a run of 2 rank(s) goes on with 1" in done.out
    close(metrics_of(cwd / "a"), metrics_of(cwd / "b"), 1e-4)
    done = finish(start("grpo", "--resume b --steps 5", cwd, launch))
    assert done.code == 0 and done.out.count("note: a run of 1 rank(s) goes on with 2") == 1


@pytest.mark.slow
def test_signal_to_torchrun_stops_all_ranks_after_one_step(run, cwd, small):
    flags = f"{SMALL['grpo']} --model {small} --steps 100000 --eval_problems 0 --out a"
    process = start("grpo", flags, cwd, [*LAUNCH, "--standalone", "--nproc_per_node=2"])
    wait_for((cwd / "a" / "metrics.jsonl").exists, process)
    process.send_signal(signal.SIGTERM)
    done = finish(process, 60)
    assert done.out.count("stopped by SIGTERM") == 1, done.err
    step = metrics_of(cwd / "a")[-1]["step"]
    assert checkpoint(cwd / "a", step).is_dir()
    assert run("grpo", f"--resume a --steps {step + 1}", model=None, base=False).code == 0


@pytest.mark.slow
def test_bad_input_under_torchrun_is_said_once(cwd, small):
    process = start("grpo", "--model ./qwen", cwd, [*LAUNCH, "--standalone", "--nproc_per_node=2"])
    done = finish(process, 60)
    assert done.code != 0 and done.err.count("grpo.py: error: no such folder: ./qwen") == 1 and not tree(cwd)


# -------------------------------------------------------------------------------------------------------- bad input


def edit_tensors(folder: Path, change) -> None:
    tensors = weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


UNREACHABLE = "Qwen/Qwen2.5-1.5B is not in the local cache and huggingface.co cannot be reached"


def refused(script: str, done: SimpleNamespace, message: str) -> None:
    assert "Traceback" not in done.err and done.err.startswith(f"{script}.py: error: "), done.err
    assert message in done.err and done.err.count("\n") == 1, done.err
    assert done.code == 2


@fault("a model that the hub refuses or does not know", "refused, with the hub's answer and what to do", 2)
@pytest.mark.parametrize("status, words", [(401, "hf auth login"), (403, "hf auth login"), (404, "check the name")])
def test_gated_or_unknown_on_the_hub(run, cwd, monkeypatch, status, words):
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def answer(*args, **kwargs):
        kind = RepositoryNotFoundError if status == 404 else GatedRepoError
        error = kind.__new__(kind)  # their __init__ differs from version to version
        error.response = SimpleNamespace(status_code=status)
        raise error

    monkeypatch.setattr(module("grpo"), "snapshot_download", answer)
    done = run("grpo", "--model owner/name")
    refused("grpo", done, f"huggingface.co answers {status}")
    assert "owner/name" in done.err and words in done.err.lower() and not tree(cwd)


@fault("no network", "refused at once, with the command that fetches the model elsewhere", 2)
def test_lost_network(run, cwd, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def answer(repo, **kwargs):
        asked.append(repo)
        raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder ... \nand more")

    monkeypatch.setattr(module("sft"), "snapshot_download", answer)
    started = time.monotonic()
    refused("sft", run("sft", "--model Qwen2.5-1.5B"), UNREACHABLE)
    assert time.monotonic() - started < 10  # it does not ask again and again
    assert asked == ["Qwen/Qwen2.5-1.5B"] and not tree(cwd)


def test_a_folder_wins_over_a_short_name(run, cwd, small):
    shutil.copytree(small, cwd / "Qwen2.5-1.5B")
    assert run("grpo", "--out a", model="Qwen2.5-1.5B").code == 0


def test_batch_size_by_model_size_fits_any_group(run, cwd):
    """Who did not give --batch_size is not told that it does not divide."""
    for flags in ("--group_size 12", "--group_size 8 --updates 5"):
        done = run("grpo", f"--batch_size 0 --max_new_tokens 4 --overlong_cache 0 --steps 1 --eval_problems 0 {flags}")
        assert done.code == 0, done.err


def test_long_examples_are_dropped_and_counted(run, cwd):
    rows = [{"prompt": "1+1=", "completion": "2"}] * 3 + [{"prompt": "1" * 99, "completion": "2"}] * 2
    (cwd / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("sft", "--data data.jsonl --max_length 50 --out a")
    assert done.code == 0 and "note: 2 of 5 examples exceed 50 tokens and were dropped" in done.out


def test_lines_of_a_data_file_end_at_newlines_only(run, cwd):
    rows = [{"prompt": "1+1=", "completion": "2\u2028\x85\x0b"}] * 2
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + "\n"  # and a blank line
    (cwd / "data.jsonl").write_text(text, encoding="utf-8")
    done = run("sft", "--data data.jsonl --out a")
    assert done.code == 0, done.err


def test_sft_of_no_steps_evaluates(run, cwd):
    assert run("sft", "--steps 0 --out a").code in (0, 2)


# ------------------------------------------------------------------------------------------------------------ faults


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.98 GiB.\nand more lines")


def no_cpu_memory(*args, **kwargs):
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")


def memory_error(*args, **kwargs):
    raise MemoryError


@fault("out of memory", "one line, `out of memory (`; `--micro_batch_tokens`; the last checkpoint is whole", 1)
@both
@pytest.mark.parametrize("raised", [out_of_memory, no_cpu_memory, memory_error])
def test_out_of_memory(run, made, cwd, script, raised, monkeypatch, code, happens):
    made("a", script)
    with monkeypatch.context() as patch:
        patch.setattr(module(script), "chosen_logprobs", raised)
        done = run(script, "--resume a --steps 3", model=None, base=False)
    assert done.code == code and done.err.startswith(f"{script}.py: error: out of memory")
    assert done.err.count("\n") == 1
    says(happens, done.err)
    assert run(script, "--resume a --steps 3", model=None, base=False).code == 0


@fault("a slip in the code", "its traceback, once", 1)
def test_other_errors_are_not_hidden(run, cwd, monkeypatch):
    def fault(*args, **kwargs):
        raise RuntimeError("a slip of ours")

    monkeypatch.setattr(module("grpo"), "chosen_logprobs", fault)
    with pytest.raises(RuntimeError, match="a slip of ours"):
        run("grpo")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite(bad, capsys):
    """Skipped and counted; weights and optimizer stay as they are; the fifth in a row stops the run."""
    grpo = module("grpo")
    surroundings, model = grpo.Run(grpo.Config(device="cpu")), torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def update(value: float) -> float:
        for weight in model.parameters():
            weight.grad = torch.full_like(weight, 0.1)
        model.weight.grad[1, 1] = value
        return surroundings.update(model, optimizer, 0.1)

    update(1.0)
    before = [w.detach().clone() for w in model.parameters()]
    moments = [{n: v.clone() for n, v in state.items()} for state in optimizer.state.values()]
    for count in range(1, 5):
        assert not update(bad) < float("inf") and surroundings.skipped == count
    assert "4 in a row, 5 stop the run" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(equal(a, b) for a, b in zip(moments, optimizer.state.values(), strict=True))
    assert all(w.grad is None for w in model.parameters())
    update(1.0)
    assert surroundings.skipped == 0 and not torch.equal(before[0], model.weight)
    for _ in range(4):
        update(bad)
    with pytest.raises(FloatingPointError, match="lr"):
        update(bad)
    surroundings.rank, surroundings.skipped = 1, 4
    with pytest.raises(SystemExit, match="1"):  # of all ranks that stop one says why
        update(bad)


@both
def test_run_whose_gradients_are_not_finite(run, cwd, script, monkeypatch):
    real, log = module(script).chosen_logprobs, cwd / "a" / "metrics.jsonl"

    def sometimes(*args, **kwargs):
        logprobs, entropy = real(*args, **kwargs)
        second = log.exists() and len(metrics_of(cwd / "a")) == 1  # the first step is logged
        return (logprobs * float("nan") if second else logprobs), entropy

    monkeypatch.setattr(module(script), "chosen_logprobs", sometimes)
    done = run(script, "--steps 3 --out a --eval_problems 0 --save_every 1")
    assert done.code == 0 and done.out.count("note: gradient not finite") == 1
    rows = metrics_of(cwd / "a")
    assert [row["step"] for row in rows] == [1, 2, 3] and "grad_norm" not in rows[1] and rows[2]["grad_norm"] > 0
    assert all(torch.isfinite(w).all() for w in weights(checkpoint(cwd / "a", 3)).values())


@fault("five gradients in a row that are not finite", "the run ends; the last checkpoint is whole", 1)
@both
def test_five_gradients_in_a_row_that_are_not_finite(run, cwd, script, monkeypatch):
    real = module(script).chosen_logprobs
    monkeypatch.setattr(module(script), "chosen_logprobs", lambda *a: (real(*a)[0] * float("nan"), real(*a)[1]))
    done = run(script, "--steps 9 --out a --eval_problems 0 --save_every 1")
    assert done.code == 1 and "lower --lr" in done.err and done.err.count("\n") == 1


@fault("all rewards of a batch are equal", "advantage exactly 0: no optimizer step, counters go on", 0)
def test_equal_rewards_change_nothing(run, cwd, small):
    done = run("grpo", "--overlong_cache 0 --steps 3 --out a --eval_problems 0")
    assert done.code == 0
    rows = metrics_of(cwd / "a")
    assert [row["prompts"] for row in rows] == [2, 4, 6] and [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["frac_reward_zero_std"] == 1 and row["rows_trained"] == 0 for row in rows)
    assert all(row["advantage"] == 0 for row in lines_of(cwd / "a" / "samples.jsonl"))
    assert equal(weights(small), weights(checkpoint(cwd / "a", 3)))
    assert not torch.load(checkpoint(cwd / "a", 3) / "trainer.pt", weights_only=True)["optimizer"]["state"]


@fault("a batch without one answer to learn from", "no optimizer step, counters go on", 0)
@pytest.mark.parametrize("script, flags", [("grpo", "--dynamic_sampling 2 --overlong_cache 0"), ("nsr", "--mode psr")])
def test_empty_batch(run, cwd, small, script, flags):
    assert run(script, f"{flags} --steps 2 --eval_problems 0 --out a").code == 0
    rows = metrics_of(cwd / "a")
    assert [row["step"] for row in rows] == [1, 2] and all(row["rows_trained"] == 0 for row in rows)
    assert equal(weights(small), weights(checkpoint(cwd / "a", 2)))


@pytest.mark.parametrize("value", [0.1, 1.1, -0.3, 7.7, 0.0])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_have_no_advantage(value, scale, dtype):
    rewards = torch.tensor([value] * 8 + [0.0, 1.0] * 4, dtype=dtype)
    advantages = module("grpo").group_advantages(rewards, 8, scale, 1e-8)
    assert advantages[:8].tolist() == [0.0] * 8 and advantages[8:].abs().min() > 0.1


@fault("a model whose logits are not finite", "one line with step and share of rows", 1)
def test_logits_that_are_not_numbers(run, cwd, small):
    """A broken model is not sampled from in silence."""
    broken = Path(shutil.copytree(small, cwd / "broken"))
    edit_tensors(broken, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    done = run("grpo", "--out a", model=broken)
    assert done.code == 1 and "not finite" in done.err and done.err.count("\n") == 1


def test_a_line_cut_short_leaves_the_log(tmp_path):
    """By a full disk or a kill: the resumed run would write its next line behind the fragment."""
    log = tmp_path / "samples.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"st', encoding="utf-8")
    module("grpo").cut_log(log, 2)
    assert log.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n'
