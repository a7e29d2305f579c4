"""Runs as processes: signals, kill -9, a full disk, torchrun.

After each the newest checkpoint is whole, and the run that goes on ends as the unbroken one.
"""

import random
import signal
import time
from pathlib import Path

import pytest
from conftest import SMALL, TRAINING, file_of, finish, metrics_of, model_of, records_of, start
from test_scripts import checkpoint, close, contents, go_on, module, same_run

slow = pytest.mark.slow
TRAINED = ["grpo", *(pytest.param(script, marks=slow) for script in TRAINING if script != "grpo")]
OTHERS = [pytest.param(script, marks=slow) for script in SMALL if script != "grpo"]
RUN = "--eval_problems 0 --out a"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
PATCHED = """
import importlib, os, resource, signal, sys
from pathlib import Path
module = importlib.import_module({script!r})
{patch}
os._exit(module.main(module.train, module.Config))
"""


@pytest.fixture
def begin(cwd, small):
    """Start a script with the smallest flags and these as a process; `patch` is run before main."""
    running = []

    def begin(script: str, flags: str, patch: str = "", launcher=()):
        if "--resume" not in flags:
            flags = f"{SMALL[script]} --model {model_of(script, small)} {flags}"
        if patch:
            patched = cwd.parent / "patched"
            patched.with_suffix(".py").write_text(PATCHED.format(script=script, patch=patch))
            script = str(patched)
        running.append(start(script, flags, cwd, launcher))
        return running[-1]

    yield begin
    for process in running:
        process.kill()


def interrupted(process, log: Path):
    """Its end, after a SIGTERM as soon as there is a step in the log."""
    end = time.monotonic() + 60
    while not log.exists():
        assert process.poll() is None and time.monotonic() < end, finish(process).err
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    return finish(process, 60)


def run_of(script: str) -> str:
    """Flags of run a, of which no learning rate depends on --steps."""
    return RUN + " --warmup_steps 100000" * ("--warmup_steps" in SMALL[script])


def goes_on(run, cwd: Path, script: str) -> None:
    """The run in folder a, resumed for a step more, equals an unbroken run of as many steps."""
    last = int(module(script).checkpoints(cwd / "a")[-1].name[5:]) + 1
    assert go_on(run, script, "a", f"--steps {last} --save_every 0").code == 0
    assert run(script, f"{run_of(script)} --out whole --steps {last}").code == 0
    same_run(cwd / "whole", cwd / "a", last)


@pytest.mark.parametrize("script", TRAINED)
def test_one_signal_saves(begin, run, cwd, script):
    process = begin(script, f"{run_of(script)} --steps 100000")
    done = interrupted(process, cwd / "a" / "metrics.jsonl")
    said = f"{file_of(script).name} --resume a"
    assert (done.code, done.err) == (143, "") and said in done.out, done.err
    assert checkpoint(cwd / "a", metrics_of(cwd / "a")[-1]["step"]).is_dir()
    goes_on(run, cwd, script)


def test_the_second_ctrl_c_leaves_at_once():
    """Even where a verifier hangs, so that the step never ends: by then it is not handled."""
    begun = object.__new__(module("grpo").Run)
    begun.on_signal(signal.SIGINT, None)
    assert begun.got == signal.SIGINT and signal.getsignal(signal.SIGINT) is signal.SIG_DFL


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


@pytest.mark.parametrize("script", TRAINED)
def test_kill_at_any_moment_of_a_save(begin, run, cwd, script):
    """Kill -9 at some call or return within the saves after the first."""
    calls = 8000 if script == "grpo" else random.randrange(55000)  # weights but no trainer.pt; any
    patch = IN_SAVE.format(calls=calls)
    done = finish(begin(script, f"{run_of(script)} --steps 3 --save_every 1", patch))
    assert done.code == -signal.SIGKILL or script != "grpo", done.err
    for folder in module(script).checkpoints(cwd / "a"):
        assert module(script).load_model(folder) and (folder / "trainer.pt").exists()
    goes_on(run, cwd, script)


def test_full_disk(begin, run, cwd):
    """A limit on the size of a file, so that the weights do not fit."""
    assert run("grpo", f"{run_of('grpo')} --steps 2").code == 0
    saved = checkpoint(cwd / "a", 2)
    before, size = contents(saved), (saved / "model.safetensors").stat().st_size - 200
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    done = finish(begin("grpo", "--resume a --steps 3", limit))
    assert done.code == 1 and done.err
    assert contents(saved) == before and not checkpoint(cwd / "a", 3).exists()
    goes_on(run, cwd, "grpo")


@pytest.mark.parametrize("script", ["grpo", *OTHERS])
def test_torchrun_with_two_ranks_equals_one(begin, run, cwd, script):
    done = finish(begin(script, "--out two", launcher=TORCHRUN))
    assert done.code == 0, done.err
    assert done.out.count("folder two") == 1 and "2 cpu" in done.out
    assert run(script, "--out one").code == 0
    one, two = cwd / "one", cwd / "two"
    # eq. 3 of prime.py divides by the largest of tiny sums: other micro-batches move it as much
    rel = 1e-3 if script == "more.prime" else 1e-5
    close(metrics_of(one)[-1:], metrics_of(two)[-1:], rel)
    close(metrics_of(one, True), metrics_of(two, True), 1e-5)
    assert records_of(one)[-1:] == records_of(two)[-1:]


@slow
def test_sigterm_to_torchrun_saves_once_and_one_rank_goes_on(begin, run, cwd):
    process = begin("grpo", f"{run_of('grpo')} --steps 100000", launcher=TORCHRUN)
    done = interrupted(process, cwd / "a" / "metrics.jsonl")
    assert done.out.count("--resume a") == 1, done.err
    last = metrics_of(cwd / "a")[-1]["step"] + 1
    assert go_on(run, "grpo", "a", f"--steps {last}").code == 0
    assert run("grpo", f"{run_of('grpo')} --out one --steps {last}").code == 0
    close(metrics_of(cwd / "one"), metrics_of(cwd / "a"), 1e-4)


def test_bad_input_under_torchrun_is_said_once(begin, cwd):
    """Rank 0 sees it alone, before the ranks meet."""
    done = finish(begin("grpo", "--model ./qwen", launcher=TORCHRUN), 60)
    (line,) = [line for line in done.err.splitlines() if line.startswith("grpo.py: error: ")]
    assert done.code != 0 and "./qwen" in line and not list(cwd.iterdir())
