"""Runs as processes: signals, kill -9, a full disk, torchrun.

After each of them the newest checkpoint is whole, and the run that goes on from it ends with the
metrics, samples and weights of the unbroken one, to the last bit.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, TRAINING, finish, metrics_of, model_of, records_of, start
from test_scripts import (
    about,
    checkpoint,
    close,
    contents,
    flags_of,
    go_on,
    module,
    same_run,
    samples,
    weights,
)

slow = pytest.mark.slow
OTHERS = [pytest.param(script, marks=slow) for script in SMALL if script != "grpo"]
RUN = "--eval_problems 0 --out a"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture
def begin(cwd, small):
    """Start a script with the smallest flags and these as a process; `patch` is run before main."""
    running = []

    def begin(script: str, flags: str, patch: str = "", launcher=()) -> subprocess.Popen:
        argv = f"{SMALL[script]} --model {model_of(script, small)} {flags}".split()
        if not patch:
            running.append(start(script, " ".join(argv), cwd, launcher))
            return running[-1]
        (cwd.parent / "patched.py").write_text(PATCHED.format(script=script, patch=patch))
        command = [sys.executable, *launcher, str(cwd.parent / "patched.py"), *argv]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, encoding="utf-8")
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()


PATCHED = """
import importlib, os, signal, sys, time
from pathlib import Path
module = importlib.import_module({script!r})
{patch}
sys.exit(module.main(module.train, module.Config))
"""


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, finish(process).err
        assert time.monotonic() < end, f"there is no {path.name}"
        time.sleep(0.01)


def run_of(script: str) -> str:
    """Flags of run a, of which no learning rate depends on --steps."""
    return RUN + " --warmup_steps 100000" * ("warmup_steps" in flags_of(script))


def goes_on(run, cwd: Path, script: str) -> None:
    """The run in folder a, resumed for a step more, equals an unbroken run of as many steps."""
    last = int(module(script).checkpoints(cwd / "a")[-1].name[5:]) + 1
    assert go_on(run, script, "a", f"--steps {last} --save_every 0").code == 0
    assert run(script, f"{run_of(script)} --out whole --steps {last}").code == 0
    same_run(cwd / "whole", cwd / "a", last)


# -------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    "script, number, code",
    [
        ("grpo", signal.SIGINT, 130),
        *(pytest.param(script, signal.SIGTERM, 143, marks=slow) for script in TRAINING),
    ],
)
def test_one_signal_saves(begin, run, cwd, script, number, code):
    process = begin(script, f"{run_of(script)} --steps 100000")
    wait_for(cwd / "a" / "metrics.jsonl", process)
    process.send_signal(number)
    done = finish(process)
    assert (done.code, done.err) == (code, ""), done.err
    last = metrics_of(cwd / "a")[-1]["step"]
    assert checkpoint(cwd / "a", last).is_dir() and last < 100000
    command = re.search(r"python (\S+) --resume a", done.out)
    assert command[1].endswith(f"{script}.py")
    goes_on(run, cwd, script)


HANGS = """
import rewards
real = rewards.Countdown.score
def score(*args, **options):
    while Path("a/step-000002").exists():
        pass
    return real(*args, **options)
rewards.Countdown.score = score
"""


def test_the_second_ctrl_c_leaves_at_once(begin, run, cwd):
    """Even where a verifier hangs, so that the step never ends."""
    process = begin("grpo", f"{run_of('grpo')} --steps 9 --save_every 1", HANGS)
    wait_for(checkpoint(cwd / "a", 2), process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    for _ in range(20):  # more than once, where the machine is too busy to hear each
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    assert finish(process, 10).code == -signal.SIGINT
    goes_on(run, cwd, "grpo")


# --------------------------------------------------------------------------- kill -9, full disk

IN_SAVE = """
left, save = [{calls}], module.Run.after_step
def count(frame, event, argument):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
def after_step(*args, **options):
    sys.setprofile(count if Path("a/step-000001").exists() else None)
    try:
        return save(*args, **options)
    finally:
        sys.setprofile(None)
module.Run.after_step = after_step
"""


def killed(begin, run, cwd, script: str, calls: int) -> bool:
    """Kill -9 at that call or return within the saves after the first; whether it came so far."""
    done = finish(begin(script, f"{run_of(script)} --steps 3 --save_every 1", IN_SAVE.format(calls=calls)))
    assert done.code in (-signal.SIGKILL, 0), done.err
    for folder in module(script).checkpoints(cwd / "a"):
        assert module(script).load_model(folder) and weights(folder)
    goes_on(run, cwd, script)
    return done.code != 0


def test_kill_during_a_save(begin, run, cwd):
    assert killed(begin, run, cwd, "grpo", 400)


@slow
@pytest.mark.parametrize("script", TRAINING)
@pytest.mark.parametrize("seed", range(4))
def test_kill_at_any_moment_of_a_save(begin, run, cwd, script, seed):
    killed(begin, run, cwd, script, random.Random(f"{script} {seed}").randrange(2500))


@slow
@pytest.mark.parametrize("script", TRAINING)
def test_kill_at_any_moment(begin, run, cwd, script):
    process = begin(script, f"{run_of(script)} --steps 100000 --save_every 2")
    wait_for(checkpoint(cwd / "a", 2), process)
    time.sleep(random.uniform(0, 0.6))
    process.kill()
    finish(process)
    goes_on(run, cwd, script)


@pytest.mark.parametrize("part", ["model.safetensors", pytest.param("trainer.pt", marks=slow)])
def test_full_disk(begin, run, cwd, part):
    """A limit on the size of a file, so that this one does not fit."""
    assert run("grpo", f"{run_of('grpo')} --steps 2").code == 0
    before = contents(checkpoint(cwd / "a", 2))
    sizes = {path.name: len(text) for path, text in before.items()}
    size = sizes["model.safetensors"] + (-200 if part == "model.safetensors" else 2000)
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    (cwd.parent / "patched.py").write_text(PATCHED.format(script="grpo", patch=limit))
    command = [sys.executable, str(cwd.parent / "patched.py"), "--resume", "a", "--steps", "3"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr
    assert contents(checkpoint(cwd / "a", 2)) == before and not checkpoint(cwd / "a", 3).exists()
    goes_on(run, cwd, "grpo")


# ---------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("script", ["grpo", *OTHERS])
def test_torchrun_with_two_ranks_equals_one(begin, run, cwd, script):
    done = finish(begin(script, "--out two", launcher=TORCHRUN))
    assert done.code == 0, done.err
    assert run(script, "--out one").code == 0
    close(metrics_of(cwd / "one")[-1:], metrics_of(cwd / "two")[-1:], 1e-5)
    close(metrics_of(cwd / "one", True), metrics_of(cwd / "two", True), 1e-5)
    assert done.out.count("folder two") == 1 and about(cwd / "two")["device"] == "2 cpu"
    assert records_of(cwd / "one")[-1:] == records_of(cwd / "two")[-1:]
    if script in TRAINING:
        found = [samples(cwd / name) for name in ("one", "two")]
        assert [row["tokens"] for row in found[0]] == [row["tokens"] for row in found[1]]


@slow
def test_resume_on_another_number_of_ranks(begin, run, cwd, small):
    assert run("grpo", "--out one --steps 4").code == 0
    assert finish(begin("grpo", "--out two", launcher=TORCHRUN)).code == 0
    assert go_on(run, "grpo", "two", "--steps 3").code == 0
    done = finish(start("grpo", "--resume two --steps 4", cwd, TORCHRUN))
    assert done.code == 0, done.err
    close(metrics_of(cwd / "one"), metrics_of(cwd / "two"), 1e-4)


@slow
def test_sigterm_to_torchrun_saves_once(begin, run, cwd):
    process = begin("grpo", f"{run_of('grpo')} --steps 100000", launcher=TORCHRUN)
    wait_for(cwd / "a" / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    done = finish(process, 60)
    assert done.out.count("--resume a") == 1, done.err
    last = metrics_of(cwd / "a")[-1]["step"]
    assert checkpoint(cwd / "a", last).is_dir()
    assert go_on(run, "grpo", "a", f"--steps {last + 1}").code == 0


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--model ./qwen", "./qwen"),  # rank 0 sees it alone, before the ranks meet
        pytest.param("--batch_size 12 --group_size 8", "--batch_size 12", marks=slow),
        pytest.param("--out /dev/null/a", "/dev/null/a", marks=slow),  # rank 0 alone, later
    ],
)
def test_bad_input_under_torchrun_is_said_once(begin, cwd, flags, word):
    done = finish(begin("grpo", flags, launcher=TORCHRUN), 60)
    (line,) = [line for line in done.err.splitlines() if line.startswith("grpo.py: error: ")]
    assert done.code != 0 and word in line and not list(cwd.iterdir())


RANK_1_RAISES = """
real = module.chosen_logprobs
def chosen_logprobs(*args, **options):
    if os.environ["RANK"] == "1" and Path("a/step-000002").exists():
        raise RuntimeError("a slip of rank 1")
    return real(*args, **options)
module.chosen_logprobs = chosen_logprobs
"""


@slow
def test_a_rank_that_raises_ends_the_run(begin, run, cwd):
    """In seconds; its traceback is shown, and the checkpoint before is whole."""
    flags = f"{run_of('grpo')} --steps 5 --save_every 1"
    done = finish(begin("grpo", flags, RANK_1_RAISES, TORCHRUN), 60)
    assert done.code != 0 and "a slip of rank 1" in done.err
    assert go_on(run, "grpo", "a").code == 0
