"""Every script as a user meets it: help, the files of a run, going on, ranks, interruption, faults.

A test calls main(train, Config, flags) in this process with a random model of two layers; what
needs a process of its own stands in test_processes.py. A new script takes part by its line in
conftest.TRAINING or SOLVING. What lies in a shared block alone is tested with one script.
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
from conftest import LONG, ROOT, SMALL, SOLVING, TRAINING, finish, lines_of, metrics_of, records_of
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from rewards import make_task


def module(script: str):
    return importlib.import_module(script)


def flags_of(script: str) -> set[str]:
    return {f.name for f in fields(module(script).Config)}


# scripts that train on groups of answers which they sample themselves
GROUPED = [script for script in TRAINING if "group_size" in flags_of(script)]
every = pytest.mark.parametrize("script", SMALL)
training = pytest.mark.parametrize("script", TRAINING)
grouped = pytest.mark.parametrize("script", GROUPED)
one = pytest.mark.parametrize("script", ["grpo"])  # what lies in the shared blocks alone
COMMON = "step seconds tokens loss grad_norm lr tokens_per_s "
GROUPS = COMMON + "entropy reward accuracy clipped_ratio completion_length rows_trained prompts "
GROUPS += "seconds_sample seconds_train sampler_gap clip_frac_low "
METRICS = {
    "grpo": GROUPS + "reward_std frac_reward_zero_std clip_frac_high kl sampler_gap_max",
    "nsr": GROUPS + "frac_all_right optimizer_steps sampler_gap_max",
    "ppo": GROUPS + "explained_variance value_mean value_loss approx_kl clip_frac_high "
    "critic_grad_norm critic_lr repeated_share kl",
    "sft": COMMON + "entropy",
    "coconut": COMMON + "entropy rows_right stage",
    "recurrent_depth": COMMON + "accuracy recurrences state_correlation",
}
SAMPLED = "eval/pass@1 eval/pass@2 eval/entropy eval/completion_length"
DEPTHS = "eval/accuracy@4 eval/loss/full eval/iterations/exit eval/agreement"
EVALUATIONS = "--eval_problems 2 --eval_every 1"
EVALUATED = dict.fromkeys(TRAINING, SAMPLED) | {"recurrent_depth": DEPTHS}


def checkpoint(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def weights(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def equal(first: dict, second: dict) -> bool:
    names = first.keys()
    return names == second.keys() and all(torch.equal(first[name], second[name]) for name in names)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples(folder: Path) -> list[dict]:
    path = folder / "samples.jsonl"
    return lines_of(path) if path.exists() else []


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
            quick = "--eval_problems 0" if script in TRAINING else ""
            done = run(script, f"{quick} {flags} --out {name}")
            assert (done.code, done.err) == (0, ""), done.err
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
    return run(script, f"--resume {folder} {flags}", base=False)


# ------------------------------------------------------------------------------ import and help


@pytest.mark.parametrize("name", ["rewards", *SMALL])
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
    command, pipe = [sys.executable, "-c", ALONE, *SMALL], subprocess.PIPE
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
    folder = made("a", script, LONG[script][0])
    files = {path.name for path in folder.iterdir()} - {"samples.jsonl"}
    steps = {path.name for path in module(script).checkpoints(folder)}
    assert files - steps == {"run.json", "metrics.jsonl", f"{script}.py"}
    assert (folder / f"{script}.py").read_bytes() == (ROOT / f"{script}.py").read_bytes()
    last = checkpoint(folder, LONG[script][1])
    assert max(steps) == last.name and metrics_of(folder)[-1]["step"] == LONG[script][1]
    found = {path.name for path in last.iterdir()}
    if script in SOLVING:
        assert found == {"records.json"}
        return
    files = {"config.json", "model.safetensors", "tokenizer.json", "trainer.pt"}
    if about(folder)["config"]["model"] != "scratch":  # what came with the model goes with it
        files |= {"generation_config.json", "tokenizer_config.json"}
    assert found == files
    assert len({oct(path.stat().st_mode) for path in last.glob("*.*")}) == 1  # as the umask has it


@every
def test_run_json_says_what_was_run(made, script, small):
    found = about(made("a", script, LONG[script][0]))
    assert found["script"] == f"{script}.py" and "cpu" in found["device"]
    assert found["torch"] == torch.__version__ and found["command"] == " ".join(sys.argv)
    assert set(found["config"]) == flags_of(script)
    assert found["config"]["model"] in (str(small), "scratch")
    for name, (chosen, _, _) in module(script).BY_SIZE.items():
        if f"--{name} " not in SMALL[script]:  # chosen, and noted as chosen
            assert found["config"][name] == chosen


@training
def test_metrics(made, script):
    rows = lines_of(made("a", script, EVALUATIONS) / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "loss" not in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert [row["step"] for row in evaluations] == [1, 2, 0]
    for row in steps:
        assert set(METRICS[script].split()) <= set(row), METRICS[script]
    for row in evaluations:
        assert {"eval/accuracy", "eval/accuracy_se", *EVALUATED[script].split()} <= set(row)
    assert all(isinstance(value, (int, float)) for row in rows for value in row.values())


@pytest.mark.parametrize("script", [script for script in SMALL if script != "sft"])
def test_samples(made, small, script):
    made_with = EVALUATIONS if script in TRAINING else LONG[script][0]
    rows = samples(made("a", script, made_with))
    names = "step group problem prompt tokens pieces logprobs mask rewards advantage truncated"
    folder = small if script in SOLVING else checkpoint(Path("a"), 2)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert rows
    for row in rows:
        assert set(row) == set(names.split())
        counts = {len(row[name]) for name in ("tokens", "pieces", "logprobs", "mask")}
        assert len(counts) == 1 and 0 < counts.pop() <= 64
        assert set(row["mask"]) <= {0, 1} and all(p <= 0 for p in row["logprobs"])
        text = tokenizer.decode(row["tokens"], skip_special_tokens=False)
        assert "".join(row["pieces"]) == text
    if script in GROUPED:
        assert [row["step"] for row in rows] == [1] * 8 + [2] * 8
        assert [row["group"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
        for row in rows:
            assert row["truncated"] == (len(row["tokens"]) == 40 and row["tokens"][-1] != 1)
            assert {"format", "answer", "correct", "total"} <= set(row["rewards"])
            assert set(row["problem"]) == {"numbers", "target"} and row["prompt"][-7:] == "<think>"


@training
def test_what_a_run_says(run, cwd, script):
    """Without a terminal: a line a step, a sample, a table, and how to go on."""
    done = run(script, "--out a --steps 11 --eval_problems 1 --eval_samples 1")
    assert (done.code, done.err) == (0, "") and "\r" not in done.out
    steps = [int(n) for n in re.findall(r"^step (\d+)/11\b", done.out, re.MULTILINE)]
    assert steps == [*range(1, 12), 11, 0]
    if script in GROUPED:
        assert len(re.findall(r"<think>' '", done.out)) == 2  # one sample every ten steps
    assert re.search(r"^eval/accuracy +\d\.\d+ -> +\d\.\d+$", done.out, re.MULTILINE)
    assert "--resume a --steps 22" in done.out


@every
def test_default_folder_has_the_time(run, cwd, script):
    assert run(script, "--steps 0 --eval_problems 0" if script in TRAINING else "").code == 0
    (folder,) = (cwd / "out").iterdir()
    task = type(make_task(about(folder)["config"]["task"])).__name__
    assert re.fullmatch(rf"{script}-{task}-0-\d{{6}}-\d{{6}}", folder.name)


@training
def test_another_seed_is_another_run(made, script):
    """That the same seed gives the same run, the tests of resuming show."""
    a, b = (metrics_of(made(name, script, f"--seed {i}")) for i, name in enumerate("ab"))
    assert all(one["loss"] != other["loss"] for one, other in zip(a, b, strict=True))
    assert all(row["rows_trained"] > 0 for row in a if script in GROUPED)


@training
def test_no_steps_only_evaluate(made, run, cwd, script):
    """And the evaluation of the start is the one that stands in the table of a run."""
    assert run(script, "--steps 0 --eval_problems 2 --out none").code == 0
    assert not list((cwd / "none").glob("step-*")) and not metrics_of(cwd / "none")
    (before,) = metrics_of(cwd / "none", True)
    *_, after, start = metrics_of(made("some", script, EVALUATIONS), True)
    assert (before["step"], after["step"], start["step"]) == (0, 2, 0)
    assert before == start != after


def test_a_folder_wins_over_a_short_name(run, cwd, small):
    shutil.copytree(small, cwd / "Qwen2.5-1.5B")
    assert run("grpo", "--out a --steps 0", model="Qwen2.5-1.5B").code == 0


# --------------------------------------------------------------------------------------- resume


def same_run(first: Path, second: Path, step: int) -> None:
    """Equal metrics but for times; equal samples, weights, trainer state or records."""
    assert metrics_of(first) == metrics_of(second)
    assert samples(first) == samples(second)
    folders = [checkpoint(run, step) for run in (first, second)]
    if records_of(first):
        assert records_of(first) == records_of(second)
        return
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


@training
def test_resumed_run_equals_the_unbroken_one(run, cwd, script, half_right):
    """With much to go on with; with little: test_a_run_that_is_broken_off_again_and_again."""
    flags = f"--eval_problems 0 {TRAINING[script][1]}"
    assert run(script, f"--steps 4 --out whole {flags}").code == 0
    rows = metrics_of(cwd / "whole")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[3]["grad_norm"] > 0
    if script == "grpo":
        assert rows[3]["kl"] > 0 and rows[3]["prompts"] > 8, "the case is to be harder than this"
    if script == "coconut":
        assert len({row["stage"] for row in rows}) > 1, "the case is to be harder than this"
    assert run(script, f"--out halves {flags}").code == 0
    done = go_on(run, script, "halves", "--steps 4")
    assert done.code == 0, done.err
    same_run(cwd / "whole", cwd / "halves", 4)


@one
def test_resume_of_a_finished_run_only_evaluates(made, run, cwd, script):
    before = metrics_of(made("a", script)), contents(checkpoint(cwd / "a", 2))
    assert go_on(run, script, "a", "--eval_problems 2").code == 0
    assert (metrics_of(cwd / "a"), contents(checkpoint(cwd / "a", 2))) == before
    assert len(metrics_of(cwd / "a", True)) == 2


@pytest.mark.parametrize("half_line", ["", '{"step": 3, "los', '{"step": 3, "p": {"t": 4}', "\0"])
def test_resume_drops_what_lies_beyond_the_checkpoint(made, run, cwd, half_line):
    """Whole lines of later steps, and the half of one that a kill or a full disk leaves."""
    made("whole", flags="--steps 3"), made("a")
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (cwd / "a" / name).open("a", encoding="utf-8") as file:
            file.write('{"step": 3, "loss": 9}\n' + half_line)
    assert go_on(run, "grpo", "a", "--steps 3").code == 0
    same_run(cwd / "whole", cwd / "a", 3)


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


# ------------------------------------------------------------------------ interruption and kills


class Killed(BaseException): ...


def die(*args, **options):
    raise Killed


def die_at_old(path, *args, remove=shutil.rmtree, **options):
    if re.fullmatch(r"step-\d+", Path(path).name):
        raise Killed
    remove(path, *args, **options)


def full(*args, **options):
    raise torch.OutOfMemoryError("CUDA out of memory.\nand more lines")


def interrupted(run, script: str, flags: str, number: int, monkeypatch):
    """A run that gets the signal as it logs its second step."""
    real = module(script).Run.log

    def log(self, step, *args, **options):
        if step == 2:
            os.kill(os.getpid(), number)
        real(self, step, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module(script).Run, "log", log)
        return run(script, flags)


def go_on_until_killed(run, script: str, place: tuple, monkeypatch) -> None:
    """Resume run a; where it saves, it dies. What is there of checkpoints then is whole."""
    with monkeypatch.context() as patch:
        patch.setattr(*place)
        with pytest.raises(Killed):
            go_on(run, script, "a", "--save_every 1" if script in TRAINING else "")
    for folder in module(script).checkpoints(Path("a")):
        whole = script in SOLVING or module(script).load_model(folder)
        assert whole and (folder / ("records.json" if script in SOLVING else "trainer.pt")).exists()


numbers = 4 * [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("script, number", list(zip(SMALL, numbers, strict=True)))
def test_a_run_that_is_broken_off_again_and_again(made, run, cwd, script, number, monkeypatch):
    """By a signal, no memory, kills within a save: each time it goes on, to the same end."""
    flags, last = LONG[script]
    made("whole", script, flags)
    done = interrupted(run, script, f"{flags} --out a", number, monkeypatch)
    assert (done.code, done.err) == (128 + number, "") and "--resume a" in done.out
    stopped = metrics_of(cwd / "a")[-1]["step"]
    assert module(script).checkpoints(cwd / "a")[-1] == checkpoint(cwd / "a", stopped)
    assert 2 <= stopped < last
    # its folder is not for another run
    before = contents(cwd)
    done = run(script, "--out a")
    assert done.code == 2 and done.err.count("\n") == 1 and "--resume" in done.err
    assert contents(cwd) == before
    # its logs go beyond the checkpoint, and end in half a line
    for log in (cwd / "a").glob("*.jsonl"):
        log.write_bytes(log.read_bytes() + b'{"step": 9, "loss": 9}\n{"st')
    places = [(Path, "rename", die)]
    if script in TRAINING:
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", full)
            done = go_on(run, script, "a")
        assert done.code == 1 and "--micro_batch_tokens" in done.err and done.err.count("\n") == 1
        places += [(module(script), "save_file", die), (torch, "save", die)]
        places += [(shutil, "rmtree", die_at_old)]  # of the old one, and the new one stands
    for place in places:
        go_on_until_killed(run, script, place, monkeypatch)
    done = go_on(run, script, "a")
    assert (done.code, done.err) == (0, "")
    same_run(cwd / "whole", cwd / "a", last)


@one
def test_a_signal_while_a_step_is_saved(run, cwd, script, monkeypatch):
    """It counts for the next step: no rank leaves alone, and none before what it did is saved."""
    real, waits = module(script).Run.gather, []

    def gather(self, value):
        if value == 0 and len(lines_of(cwd / "a" / "metrics.jsonl")) == 2:
            waits.append(value)  # for the signals of the ranks, then for the disk
            if len(waits) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return real(self, value)

    monkeypatch.setattr(module(script).Run, "gather", gather)
    done = run(script, "--steps 9 --eval_problems 0 --out a")
    assert done.code == 143 and len(waits) == 2
    assert [row["step"] for row in metrics_of(cwd / "a")] == [1, 2, 3]
    assert module(script).checkpoints(cwd / "a") == [checkpoint(cwd / "a", 3)]


# ---------------------------------------------------------------------------------------- ranks


def close(first: list[dict], second: list[dict], rel: float) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert one == pytest.approx(other, rel=rel, abs=2e-6)  # the log has six decimals


def same_on_ranks(run_ranks, cwd, script: str, flags: str, worlds: dict[int, str]) -> None:
    """Threads as ranks. No step is taken, so all gradients are those of the same weights."""
    codes, alone = run_ranks(script, 1, f"--out 1 {flags}")
    assert codes == [0] and alone
    for world, more in worlds.items():
        codes, gradients = run_ranks(script, world, f"--out {world} {flags} {more}")
        assert codes == [0] * world
        for first, other in zip(alone, gradients, strict=True):
            assert first.abs().max() > 1e-3
            torch.testing.assert_close(first, other, rtol=0, atol=1e-6)
        folders = cwd / "1", cwd / str(world)
        for evaluations in (False, True):
            close(*(metrics_of(folder, evaluations) for folder in folders), 1e-5)
        one, other = ([row["tokens"] for row in samples(folder)] for folder in folders)
        assert one == other
    assert len(list(cwd.iterdir())) == 1 + len(worlds)


@training
def test_ranks_give_the_gradient_of_one(run_ranks, cwd, script, half_right):
    worlds = {2: "", 3: ""}  # two prompts: the third rank has none
    if hasattr(module(script), "micro_batches"):  # else a pass has random numbers of its own
        worlds[2] = "--micro_batch_tokens 64"  # another number of passes on each rank
    same_on_ranks(run_ranks, cwd, script, f"{TRAINING[script][1]} --eval_problems 0", worlds)


@training
def test_more_ranks_than_rows(run_ranks, cwd, script, half_right):
    """Eight rows to learn, one problem held out."""
    same_on_ranks(run_ranks, cwd, script, "--steps 1 --eval_problems 1", {9: ""})


@pytest.mark.parametrize("script", SOLVING)
def test_ranks_answer_as_one(run_ranks, cwd, script):
    for world in (1, 2):
        codes, _ = run_ranks(script, world, f"--out {world} {LONG[script][0]}")
        assert codes == [0] * world
    one, two = cwd / "1", cwd / "2"
    close(metrics_of(one)[-1:], metrics_of(two)[-1:], 1e-5)
    assert records_of(one) == records_of(two) != []


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


@training
def test_a_run_whose_gradients_are_not_finite(run, cwd, script, monkeypatch):
    real, log, bad = module(script).Run.update, cwd / "a" / "metrics.jsonl", [2]

    def update(self, model, *args):
        if 1 + (len(metrics_of(cwd / "a")) if log.exists() else 0) in bad:
            next(weight for weight in model.parameters() if weight.grad is not None).grad *= nan
        return real(self, model, *args)

    nan = float("nan")
    monkeypatch.setattr(module(script).Run, "update", update)
    done = run(script, "--steps 3 --out a --eval_problems 0")
    assert done.code == 0 and "bad gradient" in done.out
    assert [row["step"] for row in metrics_of(cwd / "a")] == [1, 2, 3]
    assert ["grad_norm" in row for row in metrics_of(cwd / "a")] == [True, False, True]
    assert all(w.isfinite().all() for w in weights(checkpoint(cwd / "a", 3)).values())
    bad += range(4, 9)
    done = go_on(run, script, "a", "--steps 9 --save_every 1")
    assert done.code == 1 and "gradient" in done.err and done.err.count("\n") == 1
    newest = module(script).checkpoints(cwd / "a")[-1]
    assert all(w.isfinite().all() for w in weights(newest).values())


@pytest.mark.parametrize("script", ["grpo", "budget_forcing"])
def test_a_model_whose_logits_are_not_finite(run, cwd, small, script):
    """A broken model is not sampled from in silence."""
    broken = Path(shutil.copytree(small, cwd / "broken"))
    tensors = weights(broken)
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    done = run(script, "--out a", model=broken)
    assert done.code == 1 and "logits" in done.err and done.err.count("\n") == 1


@every
def test_a_slip_in_the_code_is_not_hidden(run, script, monkeypatch):
    def slip(*args, **options):
        raise KeyError("a slip of ours")

    monkeypatch.setattr(module(script).Run, "log", slip)
    with pytest.raises(KeyError, match="a slip of ours"):
        run(script, "--out a")


@grouped
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
