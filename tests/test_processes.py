"""Runs as processes: signals, kill -9, a full disk, ranks that raise or hang, broken checkpoints, no terminal.

After each of them the checkpoint before is whole, and the run that goes on from it ends with the metrics, samples and
weights of the unbroken one, to the last bit. To import torch costs seconds, so one process imports every script once
and forks a run for each request (`serve`).
"""

import importlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import EVERY, ROOT, fault, lines_of, loop_of, says
from test_scripts import checkpoint, close, equal, metrics_of, same_run, weights

# --------------------------------------------------------------------------------------------- runs by forking


def serve() -> None:
    """For each line of JSON on stdin fork a run, whose process id, exit code and words become files of its job."""
    for name in EVERY:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the watchers
    print("ready", flush=True)
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            watch(json.loads(line))


def watch(job: dict) -> None:
    """Fork the run itself, write down its id, wait for it, write down how it ended."""
    folder, pid = Path(job["folder"]), os.fork()
    if pid == 0:
        run_job(job, folder)
    (folder / "pid").write_text(str(pid))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    (folder / "code.tmp").write_text(str(code))
    (folder / "code.tmp").rename(folder / "code")
    os._exit(0)


def run_job(job: dict, folder: Path) -> None:
    """The script's main in this process, as `python script.py` calls it."""
    os.chdir(job["cwd"])
    os.environ |= job["env"]
    for number, path in ((0, os.devnull), (1, folder / "out"), (2, folder / "err")):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    module = importlib.import_module(job["script"])
    sys.argv, code = [f"{job['script']}.py", *job["argv"]], 1
    try:
        exec(job["patch"], {"module": module, "os": os, "sys": sys, "signal": signal, "time": time, "torch": torch})
        code = module.record(module.main)(loop_of(module), module.Config)
    except BaseException:  # as the interpreter would
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Job:
    """A run that was asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    def ended(self) -> bool:
        return (self.folder / "code").exists()

    def send(self, number: int) -> None:
        until(lambda: (self.folder / "pid").exists(), self)
        os.kill(int((self.folder / "pid").read_text()), number)

    def wait(self, seconds: float = 120) -> SimpleNamespace:
        stop = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > stop:
                self.send(signal.SIGKILL)
                raise AssertionError(f"the run did not end in {seconds} s:\n{self.said()}")
            time.sleep(0.01)
        out, err = ((self.folder / name).read_text(encoding="utf-8") for name in ("out", "err"))
        return SimpleNamespace(code=int((self.folder / "code").read_text()), out=out, err=err)

    def said(self) -> str:
        return "".join(p.read_text(encoding="utf-8") for p in (self.folder / "out", self.folder / "err") if p.exists())


def until(condition, job: Job, seconds: float = 120) -> None:
    stop = time.monotonic() + seconds
    while not condition():
        assert not job.ended() or condition(), job.said()
        assert time.monotonic() < stop, job.said()
        time.sleep(0.005)


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, __file__, "--serve"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, encoding="utf-8", env=env, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    process.wait(10)


@pytest.fixture
def fork(server, small, cwd, tmp_path):
    """Start a script in the working folder with the smallest flags and these; resume=True: with these alone."""
    jobs = []

    def fork(script: str, flags: str, patch: str = "", resume: bool = False, **env: str) -> Job:
        folder = tmp_path / f"job{len(jobs)}"
        folder.mkdir()
        model = [] if script == "recurrent_depth" else ["--model", str(small)]
        argv = [*([] if resume else [*EVERY[script].split(), *model]), *flags.split()]
        job = {"script": script, "argv": argv, "cwd": str(cwd), "patch": patch, "env": env, "folder": str(folder)}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        jobs.append(Job(folder))
        return jobs[-1]

    yield fork
    for job in jobs:
        if not job.ended() and (job.folder / "pid").exists():
            job.send(signal.SIGKILL)


more = pytest.mark.slow  # of the same kind
TRAINED = [script for script in EVERY if script not in ("budget_forcing", "specreason")]
STEPS = 5
RUN = f"--steps {STEPS} --save_every 1 --eval_problems 0"
SLOWLY = """
log = module.Run.log
def slowly(run, *args, **options):
    log(run, *args, **options)
    time.sleep(0.1)
module.Run.log = slowly
"""


@pytest.fixture
def whole(fork, cwd, tmp_path_factory):
    """The folder of an unbroken run, made once."""

    def whole(script: str, world: int = 1) -> Path:
        kept = tmp_path_factory.getbasetemp() / f"whole-{script}-{world}"
        if not kept.exists():
            for job in ranks(fork, script, f"{flags_of(script)} --out whole", world):
                done = job.wait()
                assert done.code == 0, done.err
            shutil.move(cwd / "whole", kept)
        return kept

    return whole


def flags_of(script: str) -> str:
    return RUN if script in TRAINED else "--save_every 1 --eval_problems 3" if script == "specreason" else ""


def ranks(fork, script: str, flags: str, world: int = 2, patch: str = "", resume: bool = False) -> list[Job]:
    """The jobs of a run on several ranks of this machine."""
    if world == 1:
        return [fork(script, flags, patch, resume)]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [fork(script, flags, patch, resume, RANK=str(r), LOCAL_RANK=str(r), **env) for r in range(world)]


def goes_on(fork, whole: Path, run: Path, script: str, world: int = 1) -> None:
    """The newest checkpoint loads, and the resumed run ends as the unbroken one did."""
    for job in ranks(fork, script, f"--resume {run.name}", world, resume=True):
        done = job.wait()
        assert done.code == 0, done.err
    if script == "budget_forcing":
        assert records(run) == records(whole) and timeless(run) == timeless(whole)
        assert (run / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    elif script == "specreason":
        assert records(run)[-1] == records(whole)[-1]
    else:
        same_run(whole, run, STEPS)
    assert not list(run.rglob("*.tmp"))


def records(run: Path) -> list:
    """What stands in records.json of each step, without seconds."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(run.glob("step-*/records.json"))]
    return [json.loads(re.sub(r'"(seconds\w*|costs)": ([\d.e-]+|{[^}]*})', '"": 0', text)) for text in texts]


def timeless(run: Path) -> list[dict]:
    rows = lines_of(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in rows]


# ---------------------------------------------------------------------------------------------------- signals

STOPS = "finishes the step, saves, says `stopped by ... after step` and `Continue: python`"


@fault("Ctrl-C, once", STOPS, 130)
def test_ctrl_c(fork, whole, cwd, code, happens):
    stopped_by(signal.SIGINT, "Ctrl-C", "grpo", fork, whole, cwd, code, happens)


@fault("SIGTERM, once", STOPS, 143)
def test_sigterm(fork, whole, cwd, code, happens):
    stopped_by(signal.SIGTERM, "SIGTERM", "sft", fork, whole, cwd, code, happens)


def stopped_by(number, name, script, fork, whole, cwd, code, happens) -> None:
    job = fork(script, f"{RUN} --out a", SLOWLY)
    until((cwd / "a" / "metrics.jsonl").exists, job)
    job.send(number)
    done = job.wait()
    assert (done.code, done.err) == (code, "")
    says(happens, done.out)
    said = re.search(
        rf"stopped by {name} after step (\d+); saved (\S+)\. Continue: python {script}\.py --resume a\n", done.out
    )
    assert int(said[1]) < STEPS and checkpoint(cwd / "a", int(said[1])) == cwd / said[2]
    assert metrics_of(cwd / "a")[-1]["step"] == int(said[1])
    goes_on(fork, whole(script), cwd / "a", script)


@fault("Ctrl-C or SIGTERM, twice", "leaves at once, within a step; the last checkpoint is whole", 143)
def test_second_signal(fork, whole, cwd, code):
    slow = (
        "update = module.Run.update\ndef wait(*a, **k):\n    time.sleep(60 * module.Path('a/step-000002').exists())\n"
    )
    job = fork("grpo", f"{RUN} --out a", slow + "    return update(*a, **k)\nmodule.Run.update = wait")
    until(checkpoint(cwd / "a", 2).exists, job)
    job.send(signal.SIGINT)
    until(lambda: "once more leaves at once" in job.said(), job)
    before = time.monotonic()
    job.send(signal.SIGTERM)
    done = job.wait(20)
    assert done.code == code and time.monotonic() - before < 10 and "Traceback" not in done.err
    goes_on(fork, whole("grpo"), cwd / "a", "grpo")


# ----------------------------------------------------------------------------------------------------- kill -9

IN_SAVE = """
saves = {{"grpo": "save", "budget_forcing": "save_answers", "specreason": "save_records"}}.get({script!r}, "save")
holder = module if hasattr(module, saves) else module.Run
real, left = getattr(holder, saves), [{calls}]
def count(frame, event, argument):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
def save(*args, **options):
    if list(module.Path("a").glob("step-*")):
        sys.setprofile(count)
    try:
        return real(*args, **options)
    finally:
        sys.setprofile(None)
setattr(holder, saves, save)
"""


def killed_in_a_save(fork, whole, cwd, script: str, calls: int) -> bool:
    """Kill at the so manieth call or return within the saves behind the first; whether the run got so far."""
    job = fork(script, f"{flags_of(script)} --out a", IN_SAVE.format(script=script, calls=calls))
    done = job.wait()
    assert done.code in (-signal.SIGKILL, 0), done.err
    goes_on(fork, whole(script), cwd / "a", script)
    shutil.rmtree(cwd / "a")
    return done.code != 0


def killed_while_running(fork, whole, cwd, script: str, seconds: float) -> bool:
    job = fork(script, f"{flags_of(script)} --out a", SLOWLY)
    until(lambda: checkpoint(cwd / "a", 1).exists() or checkpoint(cwd / "a", 2).exists(), job)
    time.sleep(seconds)
    job.send(signal.SIGKILL) if not job.ended() else None
    killed = job.wait().code != 0
    goes_on(fork, whole(script), cwd / "a", script)
    shutil.rmtree(cwd / "a")
    return killed


KILLED = "the checkpoint before is whole; --resume goes on from it and ends with the same bits"


@fault("kill -9 while training", KILLED, 137)
def test_kill_while_running(fork, whole, cwd):
    assert killed_while_running(fork, whole, cwd, "grpo", 0.2)


@fault("kill -9 during a save", KILLED, 137)
@pytest.mark.parametrize("script, calls", [("grpo", 400), ("budget_forcing", 40)])
def test_kill_during_a_save(fork, whole, cwd, script, calls):
    assert killed_in_a_save(fork, whole, cwd, script, calls)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["grpo", "ppo", "coconut", "recurrent_depth", "budget_forcing", "specreason"])
def test_kills_at_random_moments(fork, whole, cwd, script):
    """Eight a script, seeded: four at any moment, four within a save."""
    rng, killed, calls = random.Random(script), 0, 2500 if script in TRAINED else 100
    for _ in range(4):
        killed += killed_while_running(fork, whole, cwd, script, rng.uniform(0, 0.6))
        killed += killed_in_a_save(fork, whole, cwd, script, rng.randrange(calls))
    assert killed >= 4


# ----------------------------------------------------------------------------------------------------- full disk


@fault(
    "disk full",
    "one line: the system's reason, or the step that cannot be written; the checkpoint before is whole and loads",
    1,
)
@pytest.mark.parametrize(
    "what", ["run.json", "model.safetensors", *(pytest.param(w, marks=more) for w in ("samples.jsonl", "trainer.pt"))]
)
def test_full_disk(fork, whole, cwd, what, code):
    """A limit on the size of a file, so that this one does not fit."""
    run = Path(shutil.copytree(whole("grpo"), cwd / "a"))
    shutil.rmtree(checkpoint(run, STEPS))
    last = checkpoint(run, STEPS - 1)
    limit = {path.name: path.stat().st_size for path in (run / "run.json", last / "model.safetensors")}
    limit |= {"trainer.pt": limit["model.safetensors"] + 2000}
    if what == "samples.jsonl":
        limit[what] = sum(len(line) for line in (run / what).open("rb") if json.loads(line)["step"] < STEPS)
        assert limit[what] > (run / "metrics.jsonl").stat().st_size
    size = limit[what] + {"samples.jsonl": 10, "trainer.pt": 0}.get(what, -200)
    patch = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    before = {path: path.read_bytes() for path in last.iterdir()}
    done = fork("grpo", "--resume a", patch, resume=True).wait()
    assert done.code == code and done.err.count("\n") == 1 and done.err.startswith("grpo.py: error: "), done.err
    says("`; the last checkpoint is whole, `" if ".json" in what else "`step-000005 cannot be written`", done.err)
    assert before == {path: path.read_bytes() for path in last.iterdir()} and not checkpoint(run, STEPS).exists()
    goes_on(fork, whole("grpo"), run, "grpo")


# --------------------------------------------------------------------------------------------------------- ranks

AT_STEP_3 = """
real = module.chosen_logprobs
def chosen_logprobs(*args):
    if os.environ["RANK"] == "1" and module.Path("a/step-000002").exists():
        {}
    return real(*args)
module.chosen_logprobs = chosen_logprobs
"""


@fault("a rank raises", "its traceback is shown, once; the others end in seconds, `another rank ended or hangs`", 1)
def test_a_rank_that_raises(fork, whole, cwd, code, happens):
    patch = AT_STEP_3.format("raise RuntimeError('a slip of rank 1')")
    done = [job.wait(60) for job in ranks(fork, "grpo", f"{RUN} --out a", patch=patch)]
    assert [d.code for d in done] == [code, code]
    assert done[1].err.count("RuntimeError: a slip of rank 1") == 1
    assert done[0].err.count("\n") == 1, done[0].err
    says(happens, done[0].err)
    goes_on(fork, whole("grpo", 2), cwd / "a", "grpo", 2)


@fault("a rank hangs", "after --timeout the others end, `another rank ended or hangs`", 1)
def test_a_rank_that_hangs(fork, whole, cwd, code, happens):
    patch = "from datetime import timedelta\nmodule.timedelta = lambda minutes: timedelta(seconds=4)\n"
    jobs = ranks(fork, "grpo", f"{RUN} --out a", patch=patch + AT_STEP_3.format("time.sleep(1000)"))
    done = jobs[0].wait(60)
    jobs[1].send(signal.SIGKILL)  # torchrun ends it
    assert done.code == code and done.err.count("\n") == 1, done.err
    says(happens, done.err)
    jobs[1].wait()
    goes_on(fork, whole("grpo", 2), cwd / "a", "grpo", 2)


ON_RANK_1 = """
def bad():
    return os.environ["RANK"] == "1" and module.Path("a/step-000002").exists()
"""
NUMBERS = {
    "loss": """
real = module.chosen_logprobs
def chosen_logprobs(*args):
    logprobs, entropy = real(*args)
    return (logprobs * float({value!r}) if bad() else logprobs), entropy
module.chosen_logprobs = chosen_logprobs
""",
    "gradient": """
real = module.Run.update
def update(run, model, *args, **options):
    if bad():
        next(model.parameters()).grad[3] = float({value!r})
    return real(run, model, *args, **options)
module.Run.update = update
""",
    "logits": """
real = module.emit
def emit(s, logits):
    real(s, logits * float({value!r}) if bad() else logits)
module.emit = emit
""",
}
HANGS = """
import rewards
real = rewards.Countdown.score
def score(*args, **options):
    while module.Path("a/step-000002").exists():
        pass
    return real(*args, **options)
rewards.Countdown.score = score
"""


@fault(
    "NaN or Inf in loss or gradient of one rank",
    "`note: gradient not finite; update skipped on all ranks (1 in a row, 5 stop the run)`; weights and optimizer stay",
    0,
)
@pytest.mark.parametrize(
    "where, value",
    [("loss", "nan"), *(pytest.param(*case, marks=more) for case in (("gradient", "inf"), ("loss", "-inf")))],
)
def test_numbers_of_one_rank(fork, whole, cwd, where, value, code, happens):
    flags = f"{RUN.replace(f'--steps {STEPS}', '--steps 3')} --out a"
    jobs = ranks(fork, "grpo", flags, patch=ON_RANK_1 + NUMBERS[where].format(value=value))
    done = [job.wait(60) for job in jobs]
    assert [d.code for d in done] == [code, code], done[0].err + done[1].err
    says(happens, done[0].out)
    assert (
        done[1].out == "" and "grad_norm" not in metrics_of(cwd / "a")[2] and metrics_of(cwd / "a")[1]["grad_norm"] > 0
    )
    before, after = (weights(checkpoint(cwd / "a", step)) for step in (2, 3))
    assert equal(before, after) and all(w.isfinite().all() for w in after.values())
    states = [
        torch.load(checkpoint(cwd / "a", n) / "trainer.pt", weights_only=True)["optimizer"]["state"] for n in (2, 3)
    ]
    assert all(equal(states[0][i], states[1][i]) for i in states[0])


@fault(
    "NaN in the logits of one rank while sampling",
    "`rank 1: step 3: ... of ... rows met logits that are not finite`",
    1,
)
def test_logits_of_one_rank(fork, whole, cwd, code, happens):
    patch = ON_RANK_1 + NUMBERS["logits"].format(value="nan")
    done = [job.wait(60) for job in ranks(fork, "grpo", f"{RUN} --out a", patch=patch)]
    assert [d.code for d in done] == [code, code]
    assert done[1].err.count("\n") == done[0].err.count("\n") == 1, done[0].err
    says(happens, done[1].err)
    goes_on(fork, whole("grpo", 2), cwd / "a", "grpo", 2)


@fault(
    "a verifier that hangs",
    "Ctrl-C twice leaves at once; other ranks end after --timeout; `once more leaves at once`",
    130,
)
def test_a_verifier_that_hangs(fork, whole, cwd, code, happens):
    job = fork("grpo", f"{RUN} --out a", HANGS)
    until(checkpoint(cwd / "a", 2).exists, job)
    job.send(signal.SIGINT)
    until(lambda: "once more leaves at once" in job.said(), job)
    job.send(signal.SIGINT)
    done = job.wait(20)
    assert done.code == code
    says(happens, done.out)
    goes_on(fork, whole("grpo"), cwd / "a", "grpo")


@fault("resumed on another number of ranks", "goes on, `note: a run of 1 rank(s) goes on with 2`", 0)
def test_another_number_of_ranks(fork, whole, cwd, code, happens):
    run = Path(shutil.copytree(whole("grpo"), cwd / "a"))
    shutil.rmtree(checkpoint(run, STEPS))
    done = [job.wait() for job in ranks(fork, "grpo", "--resume a", resume=True)]
    assert [d.code for d in done] == [code, code], done[0].err
    says(happens, done[0].out)
    assert done[1].out == ""
    close(metrics_of(whole("grpo")), metrics_of(run), 1e-4)


# -------------------------------------------------------------------------------------------------- surroundings


@fault("stdout is not a terminal", "no bar, one plain line a step, `step 5/5`", 0)
def test_no_terminal(fork, cwd, code, happens):
    done = fork("grpo", f"{RUN} --out a").wait()
    assert (done.code, done.err) == (code, "") and "\r" not in done.out and "\x1b" not in done.out
    says(happens, done.out)
    assert len(re.findall(r"^step \d/5 \{", done.out, re.MULTILINE)) == 5


@fault("stdout is closed (| head)", "one line, `Broken pipe`; the last checkpoint is whole", 1)
def test_broken_pipe(fork, whole, cwd, code, happens):
    patch = SLOWLY.replace("time.sleep(0.1)", "r, w = os.pipe(); os.close(r); os.dup2(w, 1)")
    done = fork("grpo", f"{RUN} --out a", patch).wait()
    assert done.code == code and done.err.startswith("grpo.py: error: "), done.err
    says(happens, done.err)


@fault("no matplotlib, tensorboard, datasets, pandas", "nothing asks for them", 0)
def test_without_optional_packages(fork, cwd, code):
    names = "matplotlib tensorboard datasets pandas wandb accelerate sklearn scipy peft trl bitsandbytes triton".split()
    patch = "for name in {names}:\n    [sys.modules.pop(n) for n in list(sys.modules) if n.split('.')[0] == name]\n"
    patch += "    sys.modules[name] = None\nassert not any(map(sys.modules.get, {names}))"
    assert fork("grpo", f"{RUN} --out a --eval_problems 2", patch.format(names=names)).wait().code == code
    command = f"import sys; sys.modules |= dict.fromkeys({names})\nsys.argv[1:] = ['a']\nimport report; report.main()"
    env = os.environ | {"PYTHONPATH": str(ROOT / "docs")}
    done = subprocess.run([sys.executable, "-c", command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and (cwd / "a" / "report.html").exists(), done.stderr


if __name__ == "__main__" and sys.argv[1:] == ["--serve"]:
    serve()
