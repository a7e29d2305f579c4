"""Every script as a user meets it: help, the files of a run, going on, ranks, interruption, faults.

A test calls main(train, Config, flags) in this process with a random model of two layers; what
needs a process of its own stands in test_processes.py. A new script takes part by its line in
conftest.NEW.
"""

import doctest
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import NEW, ROOT, finish, lines_of, metrics_of
from safetensors.torch import load_file, save_file

every = pytest.mark.parametrize("script", NEW)
one = pytest.mark.parametrize("script", ["grpo"])  # what lies in the shared blocks alone
COMMON = "step seconds tokens loss entropy grad_norm lr tokens_per_s reward accuracy clipped_ratio "
COMMON += "completion_length rows_trained prompts seconds_sample seconds_train sampler_gap"
OWN_METRICS = {
    "grpo": "reward_std frac_reward_zero_std clip_frac_low clip_frac_high kl sampler_gap_max",
    "nsr": "frac_all_right optimizer_steps clip_frac_low sampler_gap_max",
    "ppo": "explained_variance value_mean value_loss approx_kl clip_frac_low clip_frac_high "
    "critic_grad_norm critic_lr repeated_share kl",
}


def module(script: str):
    return importlib.import_module(script)


def checkpoint(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def weights(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def equal(first: dict, second: dict) -> bool:
    names = first.keys()
    return names == second.keys() and all(torch.equal(first[name], second[name]) for name in names)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def about(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture
def made(run, cwd, shelf):
    """A finished run of a name in the working folder; each set of flags is run only once."""

    def made(name: str, script: str = "grpo", flags: str = "") -> Path:
        kept = shelf / re.sub(r"\W+", "_", f"{script} {flags}")
        if not kept.exists():
            done = run(script, f"{flags} --eval_problems 0 --out {name}")
            assert done.code == 0, done.err
            shutil.copytree(cwd / name, kept)
        if not (cwd / name).exists():
            shutil.copytree(kept, cwd / name)
        return cwd / name

    return made


@pytest.fixture
def half_right(monkeypatch):
    """A verifier that finds about half of the answers of a random model right."""

    def score(self, text, problem, **options):
        right = len(text) % 2 == 0
        return {"format": 0.0, "answer": None, "correct": right, "total": float(right)}

    monkeypatch.setattr(module("rewards").Countdown, "score", score)


def go_on(run, script: str, folder: str, flags: str = ""):
    """A run that is resumed, by nothing but its folder and these flags."""
    return run(script, f"--resume {folder} {flags}", model=None, base=False)


# ------------------------------------------------------------------------------ import and help


@pytest.mark.parametrize("name", ["rewards", *NEW])
def test_docstring_examples(name):
    failed, _ = doctest.testmod(module(name))
    assert not failed


ALONE = """
import contextlib, io, os, socket, sys
def refuse(*args, **kwargs): raise OSError("a network was asked for")
socket.socket.connect = socket.getaddrinfo = refuse
for name in "matplotlib pandas datasets tensorboard wandb accelerate scipy peft trl".split():
    sys.modules[name] = None  # no script needs them
before, printed = sorted(os.listdir()), io.StringIO()
with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
    for name in sys.argv[1:]:
        __import__(name)
assert not printed.getvalue() and sorted(os.listdir()) == before, printed.getvalue()
print("imported")
"""


def test_import_runs_nothing(cwd):
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    env.pop("HF_HUB_OFFLINE")
    command, pipe = [sys.executable, "-c", ALONE, *NEW], subprocess.PIPE
    process = subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, encoding="utf-8")
    done = finish(process)
    assert (done.code, done.out, done.err) == (0, "imported\n", "")


@every
def test_help(script, run, cwd):
    done = run(script, "--help")
    assert (done.code, done.err) == (0, "") and not list(cwd.iterdir())
    assert module(script).__doc__.strip() in done.out
    text = " ".join(done.out.split())
    for f in fields(module(script).Config):
        assert re.search(rf"^  --{f.name}\b", done.out, re.MULTILINE), f.name
        assert " ".join(f.metadata["help"].split()) in text, f.name
    assert text.count("(default: ") == len(fields(module(script).Config))  # none twice


# --------------------------------------------------------------------------- the files of a run


@every
def test_files_of_a_run(made, script):
    folder = made("a", script)
    files = {"run.json", "metrics.jsonl", "samples.jsonl", f"{script}.py", "step-000002"}
    assert {path.name for path in folder.iterdir()} == files
    assert (folder / f"{script}.py").read_bytes() == (ROOT / f"{script}.py").read_bytes()
    names = "config generation_config tokenizer tokenizer_config".split()
    files = {f"{name}.json" for name in names} | {"model.safetensors", "trainer.pt"}
    assert {path.name for path in checkpoint(folder, 2).iterdir()} == files
    modes = {oct(path.stat().st_mode) for path in (folder / "step-000002").glob("*.*")}
    assert len(modes) == 1  # all readable by whoever may read one of them


@every
def test_run_json_says_what_was_run(made, script, small):
    found = about(made("a", script))
    assert found["script"] == f"{script}.py" and "cpu" in found["device"]
    assert found["torch"] == torch.__version__ and found["command"] == " ".join(sys.argv)
    assert set(found["config"]) == {f.name for f in fields(module(script).Config)}
    assert found["config"]["model"] == str(small) and found["config"]["batch_size"] == 8
    assert found["config"]["lr"] == module(script).BY_SIZE["lr"][0]  # chosen, and noted as chosen


@every
def test_metrics(run, cwd, script):
    assert run(script, "--out a").code == 0
    rows = lines_of(cwd / "a" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 2, 0]
    wanted = {*COMMON.split(), *OWN_METRICS.get(script, "").split()}
    for row in rows[:2]:
        assert wanted <= set(row), wanted - set(row)
    wanted = {"eval/accuracy", "eval/accuracy_se", "eval/pass@1", "eval/pass@2", "eval/entropy"}
    for row in rows[2:]:
        assert wanted <= set(row), wanted - set(row)
    assert all(isinstance(value, (int, float)) for row in rows for value in row.values())


@every
def test_samples(made, script):
    folder = made("a", script)
    rows = lines_of(folder / "samples.jsonl")
    assert [row["step"] for row in rows] == [1] * 8 + [2] * 8
    assert [row["group"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    names = "step group problem prompt tokens pieces logprobs mask rewards advantage truncated"
    tokenizer = module(script).load_model(checkpoint(folder, 2)).tokenizer
    for row in rows:
        assert set(row) == set(names.split())
        counts = {len(row[name]) for name in ("tokens", "pieces", "logprobs", "mask")}
        assert len(counts) == 1 and 0 < counts.pop() <= 40
        assert set(row["mask"]) <= {0, 1} and all(p <= 0 for p in row["logprobs"])
        text = tokenizer.decode(row["tokens"], skip_special_tokens=False)
        assert "".join(row["pieces"]) == text
        assert row["truncated"] == (len(row["tokens"]) == 40 and row["tokens"][-1] != 1)
        assert {"format", "answer", "correct", "total"} <= set(row["rewards"])
        assert set(row["problem"]) == {"numbers", "target"} and row["prompt"].endswith("<think>")


@every
def test_what_a_run_says(run, cwd, script):
    """Without a terminal: a line a step, a sample, a table, and how to go on."""
    done = run(script, "--out a --steps 11")
    assert (done.code, done.err) == (0, "") and "\r" not in done.out
    steps = [int(n) for n in re.findall(r"^step (\d+)/11\b", done.out, re.MULTILINE)]
    assert steps[:11] == list(range(1, 12))
    assert len(re.findall(r"<think>' '", done.out)) == 2  # one sample every ten steps
    assert re.search(r"^eval/accuracy +\d\.\d+ -> +\d\.\d+$", done.out, re.MULTILINE)
    assert "--resume a --steps 22" in done.out


@one
def test_default_folder_has_the_time(run, cwd, script):
    for _ in range(2):
        assert run(script, "--eval_problems 0 --steps 0").code == 0
        (folder,) = (cwd / "out").iterdir()
        assert re.fullmatch(rf"{script}-Countdown-0-\d{{6}}-\d{{6}}", folder.name)
        shutil.rmtree(cwd / "out")


@one
def test_a_folder_that_holds_a_run_is_refused(made, run, cwd, script):
    before = contents(made("a", script))
    done = run(script, "--out a")
    assert done.code == 2 and done.err.count("\n") == 1 and "--resume" in done.err
    assert contents(cwd) == before
    (cwd / "empty").mkdir()
    assert run(script, "--eval_problems 0 --out empty").code == 0


@every
def test_same_seed_same_run(run, cwd, script):
    for name, flags in {"a": "", "b": "", "c": "--seed 1", "d": "--micro_batch_tokens 64"}.items():
        assert run(script, f"--out {name} {flags}").code == 0
    same_run(cwd / "a", cwd / "b", 2)
    assert metrics_of(cwd / "a", True) == metrics_of(cwd / "b", True)
    a, c, d = (metrics_of(cwd / name) for name in "acd")
    assert all(one["loss"] != other["loss"] for one, other in zip(a, c, strict=True))
    close(a, d, 1e-5)  # the split into micro-batches changes nothing but rounding
    assert all(row["rows_trained"] > 0 for row in a)


@every
def test_no_steps_only_evaluate(run, cwd, script):
    """And the evaluation of the start is the one that stands in the table of a run."""
    assert run(script, "--steps 0 --out none").code == 0
    assert not list((cwd / "none").glob("step-*")) and not metrics_of(cwd / "none")
    assert run(script, "--out some").code == 0
    (before,) = metrics_of(cwd / "none", True)
    after, start = metrics_of(cwd / "some", True)
    assert (before["step"], after["step"], start["step"]) == (0, 2, 0)
    assert before == start != after


@every
def test_evaluations_while_training(run, cwd, script):
    assert run(script, "--out a --steps 3 --eval_every 1").code == 0
    assert [row["step"] for row in metrics_of(cwd / "a", True)] == [1, 2, 3, 0]
    assert [row["step"] for row in metrics_of(cwd / "a")] == [1, 2, 3]


def test_a_folder_wins_over_a_short_name(run, cwd, small):
    shutil.copytree(small, cwd / "Qwen2.5-1.5B")
    assert run("grpo", "--out a --steps 0", model="Qwen2.5-1.5B").code == 0


# --------------------------------------------------------------------------------------- resume


def same_run(first: Path, second: Path, step: int) -> None:
    """Equal metrics but for times; equal samples, weights and trainer state to the last bit."""
    assert metrics_of(first) == metrics_of(second)
    assert (first / "samples.jsonl").read_bytes() == (second / "samples.jsonl").read_bytes()
    folders = [checkpoint(run, step) for run in (first, second)]
    assert equal(*map(weights, folders))
    states = [torch.load(folder / "trainer.pt", weights_only=True) for folder in folders]
    assert same(*states), "the trainers' states differ"


def same(first, second) -> bool:
    """Equal to the last bit: tensors, dicts and lists of them, numbers."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        keys = first.keys()
        return keys == second.keys() and all(same(first[key], second[key]) for key in keys)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@every
@pytest.mark.parametrize("hard", [False, True], ids=["small", "hard"])
def test_resumed_run_equals_the_unbroken_one(run, cwd, script, hard, half_right):
    flags = NEW[script][1] if hard else ""
    assert run(script, f"--steps 4 --save_every 2 --out whole {flags}").code == 0
    rows = metrics_of(cwd / "whole")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[3]["grad_norm"] > 0
    if hard and script == "grpo":
        assert rows[3]["kl"] > 0 and rows[3]["prompts"] > 8, "the case is to be harder than this"
    # another command ends after two steps and goes on
    assert run(script, f"--out halves {flags}").code == 0
    done = go_on(run, script, "halves", "--steps 4")
    assert done.code == 0, done.err
    same_run(cwd / "whole", cwd / "halves", 4)
    # the same command lost everything after step 2, its logs did not
    shutil.copytree(cwd / "whole", cwd / "cut")
    shutil.rmtree(checkpoint(cwd / "cut", 4))
    assert go_on(run, script, "cut").code == 0
    same_run(cwd / "whole", cwd / "cut", 4)


@one
def test_resume_of_a_finished_run_only_evaluates(made, run, cwd, script):
    before = metrics_of(made("a", script)), contents(checkpoint(cwd / "a", 2))
    assert go_on(run, script, "a", "--eval_problems 2").code == 0
    assert (metrics_of(cwd / "a"), contents(checkpoint(cwd / "a", 2))) == before
    assert len(metrics_of(cwd / "a", True)) == 2


@pytest.mark.parametrize("half_line", ["", '{"step": 3, "los', '{"step": 3, "p": {"t": 4}', "\0"])
def test_resume_drops_what_lies_beyond_the_checkpoint(made, run, cwd, half_line):
    """Whole lines of later steps, and the half of one that a kill or a full disk leaves."""
    made("a"), made("b")
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (cwd / "b" / name).open("a", encoding="utf-8") as file:
            file.write('{"step": 3, "loss": 9}\n' + half_line)
    for name in "ab":
        assert go_on(run, "grpo", name, "--steps 3").code == 0
    same_run(cwd / "a", cwd / "b", 3)


@one
def test_resume_keeps_what_the_run_was_given(made, run, cwd, script):
    """Also what an earlier resume was given: the folder alone is enough to go on."""
    before = about(made("a", script))["config"]
    assert go_on(run, script, "a", "--steps 3 --lr 0.001").code == 0
    changed = {"steps": 3, "lr": 0.001, "resume": "a"}
    assert about(cwd / "a")["config"] == before | changed
    assert metrics_of(cwd / "a")[-1]["lr"] == pytest.approx(0.001 * 3 / 10)  # still warming up
    log = (cwd / "a" / "samples.jsonl").read_bytes()
    assert go_on(run, script, "a").code == 0
    assert [row["step"] for row in metrics_of(cwd / "a")] == [1, 2, 3]
    assert (cwd / "a" / "samples.jsonl").read_bytes() == log


@one
def test_only_the_newest_checkpoints_stay(made, run, cwd, script):
    made("a", script, "--steps 3 --save_every 1")
    assert {p.name for p in (cwd / "a").glob("step-*")} == {"step-000002", "step-000003"}
    unfinished = cwd / "a" / "step-000004.tmp"  # what a killed run leaves
    unfinished.mkdir()
    (unfinished / "trainer.pt").write_bytes(b"half")
    assert go_on(run, script, "a", "--steps 4").code == 0
    assert {p.name for p in (cwd / "a").glob("step-*")} == {"step-000003", "step-000004"}
    assert (checkpoint(cwd / "a", 4) / "trainer.pt").stat().st_size > 1000


# --------------------------------------------------------------------------------- interruption


@every
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_step(made, run, cwd, script, number, code, monkeypatch):
    """All is saved, and the run that goes on ends as the unbroken one."""
    made("whole", script, "--steps 4")
    real = module(script).Run.log

    def log(self, step, *args, **options):
        if step == 2:
            os.kill(os.getpid(), number)
        real(self, step, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module(script).Run, "log", log)
        done = run(script, "--steps 4 --eval_problems 0 --out a")
    assert (done.code, done.err) == (code, "") and "--resume a" in done.out
    assert [row["step"] for row in metrics_of(cwd / "a")] == [1, 2]
    assert go_on(run, script, "a").code == 0
    same_run(cwd / "whole", cwd / "a", 4)


@one
@pytest.mark.parametrize("ends_at", ["weights", "trainer", "rename", "removal of the old"])
def test_a_save_that_ends_anywhere(made, run, cwd, script, ends_at, monkeypatch):
    """A checkpoint appears whole or not at all, and the run goes on from a whole one."""
    made("whole", script, "--steps 5 --save_every 1")
    made("a", script, "--steps 3 --save_every 1")
    remove = shutil.rmtree

    class Killed(BaseException): ...

    def die(*args, **options):
        raise Killed

    def remove_tmp(path, *args, **options):
        if not str(path).endswith(".tmp"):
            raise Killed
        remove(path, *args, **options)

    parts = {"weights": (module(script), "save_file", die), "trainer": (torch, "save", die)}
    parts |= {"rename": (Path, "rename", die), "removal of the old": (shutil, "rmtree", remove_tmp)}
    with monkeypatch.context() as patch:
        patch.setattr(*parts[ends_at])
        with pytest.raises(Killed):
            go_on(run, script, "a", "--steps 5")
    for folder in (cwd / "a").glob("step-??????"):
        assert module(script).load_model(folder) and (folder / "trainer.pt").exists()
    assert go_on(run, script, "a", "--steps 5").code == 0
    same_run(cwd / "whole", cwd / "a", 5)


# ---------------------------------------------------------------------------------------- ranks


def close(first: list[dict], second: list[dict], rel: float) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert one == pytest.approx(other, rel=rel, abs=2e-6)  # the log has six decimals


@every
@pytest.mark.parametrize(
    "world, flags",
    [
        (2, ""),
        (2, "HARD"),
        (3, "HARD"),  # two prompts a batch: a rank without any
        (2, "--micro_batch_tokens 64"),  # another number of passes on each rank
        (9, ""),  # 8 rows: a rank without one
    ],
)
def test_ranks_give_the_gradient_of_one(run_ranks, cwd, script, world, flags, half_right):
    """Threads as ranks. No step is taken, so all gradients are those of the same weights."""
    flags, gradients = flags.replace("HARD", NEW[script][1]), {}
    for n in (1, world):
        codes, gradients[n] = run_ranks(script, n, f"--out {n} {flags}")
        assert codes == [0] * n
    assert len(gradients[1]) == len(gradients[world]) > 0
    for one, other in zip(gradients[1], gradients[world], strict=True):
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    folders = cwd / "1", cwd / str(world)
    close(*(metrics_of(folder) for folder in folders), 1e-5)
    close(*(metrics_of(folder, True) for folder in folders), 1e-5)
    samples = [lines_of(folder / "samples.jsonl") for folder in folders]
    assert [row["tokens"] for row in samples[0]] == [row["tokens"] for row in samples[1]]
    assert len(list(cwd.iterdir())) == 2


# --------------------------------------------------------------------------------------- faults


@one
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite(script, bad):
    """Skipped: weights and optimizer stay as they are. The fifth in a row ends the run."""
    run = module(script).Run(module(script).Config(device="cpu"))
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def update(value: float) -> float:
        for weight in model.parameters():
            weight.grad = torch.full_like(weight, 0.1)
        model.weight.grad[1, 1] = value
        return run.update(model, optimizer, 0.1)

    for _ in range(2):
        assert update(1.0) == pytest.approx((1.0 + 7 * 0.01) ** 0.5)
        before = [weight.detach().clone() for weight in model.parameters()]
        moments = [{n: v.clone() for n, v in s.items()} for s in optimizer.state.values()]
        for _ in range(4):
            assert not update(bad) < float("inf")
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same(moments, list(optimizer.state.values()))
        assert all(weight.grad is None for weight in model.parameters())
    with pytest.raises(FloatingPointError):
        update(bad)


@every
def test_a_run_whose_gradients_are_not_finite(run, cwd, script, monkeypatch):
    real, log, bad = module(script).chosen_logprobs, cwd / "a" / "metrics.jsonl", [2]

    def chosen_logprobs(*args, **options):
        logprobs, entropy = real(*args, **options)
        step = 1 + (len(metrics_of(cwd / "a")) if log.exists() else 0)
        return (logprobs * float("nan") if step in bad else logprobs), entropy

    monkeypatch.setattr(module(script), "chosen_logprobs", chosen_logprobs)
    done = run(script, "--steps 3 --out a --eval_problems 0")
    assert done.code == 0 and "gradient" in done.out
    assert [row["step"] for row in metrics_of(cwd / "a")] == [1, 2, 3]
    assert ["grad_norm" in row for row in metrics_of(cwd / "a")] == [True, False, True]
    assert all(w.isfinite().all() for w in weights(checkpoint(cwd / "a", 3)).values())
    bad += range(4, 9)
    done = go_on(run, script, "a", "--steps 9 --save_every 1")
    assert done.code == 1 and "gradient" in done.err and done.err.count("\n") == 1
    newest = module(script).checkpoints(cwd / "a")[-1]
    assert all(w.isfinite().all() for w in weights(newest).values())


@one
def test_a_model_whose_logits_are_not_finite(run, cwd, small, script):
    """A broken model is not sampled from in silence."""
    broken = Path(shutil.copytree(small, cwd / "broken"))
    tensors = weights(broken)
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    done = run(script, "--out a", model=broken)
    assert done.code == 1 and "logits" in done.err and done.err.count("\n") == 1


@one
def test_out_of_memory_names_the_flag_to_halve(made, run, cwd, script, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nand more lines")

    made("a", script)
    with monkeypatch.context() as patch:
        patch.setattr(module(script), "chosen_logprobs", full)
        done = go_on(run, script, "a", "--steps 3")
    assert done.code == 1 and "--micro_batch_tokens" in done.err and done.err.count("\n") == 1
    assert go_on(run, script, "a", "--steps 3").code == 0


@one
def test_a_slip_in_the_code_is_not_hidden(run, script, monkeypatch):
    def slip(*args, **options):
        raise KeyError("a slip of ours")

    monkeypatch.setattr(module(script), "chosen_logprobs", slip)
    with pytest.raises(KeyError, match="a slip of ours"):
        run(script)


@every
def test_a_verifier_that_raises(run, cwd, script, monkeypatch):
    """The answer is wrong, the first traceback is shown, and the run goes on."""

    def score(*args, **options):
        return {}["gone"]

    monkeypatch.setattr(module("rewards").Countdown, "score", score)
    monkeypatch.setattr(module("rewards"), "score_failures", 0)
    done = run(script, "--out a")
    assert done.code == 0 and done.err.count("Traceback") == 1 and "KeyError" in done.err
    rows = metrics_of(cwd / "a")
    assert len(rows) == 2 and all(row["accuracy"] == row["reward/format"] == 0 for row in rows)


@pytest.mark.parametrize(
    "script, flags",
    [
        ("grpo", "--overlong_cache 0"),  # all rewards are equal
        ("grpo", "--overlong_cache 0 --dynamic_sampling 1"),  # no group with signal is found
        ("nsr", "--mode psr"),  # no answer is right
    ],
)
def test_nothing_to_learn_changes_nothing(run, cwd, small, script, flags):
    """No optimizer step, which would move on momentum alone; the counters go on."""
    assert run(script, f"{flags} --steps 3 --out a --eval_problems 0").code == 0
    rows, last = metrics_of(cwd / "a"), checkpoint(cwd / "a", 3)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["prompts"] < rows[1]["prompts"] < rows[2]["prompts"]
    assert all(row["rows_trained"] == 0 for row in rows) and equal(weights(small), weights(last))
    assert not torch.load(last / "trainer.pt", weights_only=True)["optimizer"]["state"]
