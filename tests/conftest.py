"""What the tests of whole scripts share: a small random model, runs in this process and beside it, pretend ranks."""

import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes share two cores
os.environ["HF_HUB_OFFLINE"] = "1"  # no test looks for a network

import pytest  # noqa: E402
import torch  # noqa: E402

# Flags that make a step of a script take a fraction of a second. While the learning rate warms up it does not depend
# on --steps, so that a run which is made longer equals one that was long from the start.
SAME = "--steps 2 --batch_size 8 --max_new_tokens 40 --eval_problems 2 --eval_samples 2 --warmup_steps 10"
SMALL = {
    # rewards of a random model that differ, and a loss that is not 0 by construction
    "grpo": f"{SAME} --no-decay --aggregation token --group_size 4 --overlong_cache 40",
    "sft": SAME,
    # rewards and advantages that differ: by length, and by the tokens that an answer repeats
    "ppo": f"{SAME} --no-decay --group_size 4 --mini_batches 2 --reward cosine --repetition_penalty 1 --repetition_n 1",
    # all answers of a random model are wrong; their loss is 1 in every normaliser but this one
    "nsr": f"{SAME} --group_size 4 --updates 1 --normaliser sample",
    # the last stage: all steps are thoughts
    "coconut": f"{SAME} --mode no_curriculum".replace(" --warmup_steps 10", ""),
}
EVERY = SMALL | {  # the scripts that have a model of their own or train nothing
    "recurrent_depth": "--task s3:elements=10 --steps 2 --batch_size 8 --hidden_size 16 --num_heads 2 "
    "--eval_problems 3 --warmup_steps 10 --test_r 4",
    "budget_forcing": "--caps 4,8,12 --max_new_tokens 20 --eval_problems 3 --eval_samples 2 --waits 1,2 --tries 2",
    "specreason": "--draft tiny-draft --eval_problems 2 --sweep_problems 1 --max_new_tokens 24 --max_step_tokens 12 "
    "--thresholds 1,9",
}


FAULTS: list[dict] = []  # the rows of docs/faults.md that tests stand for


def fault(what: str, happens: str, code: int | str = 0):
    """Decorator of a test: the row of docs/faults.md that it proves. A test with the argument `code` or `happens` gets
    these words, to compare with what it sees: what stands in `backquotes` was said.
    """

    def note(test):
        place = f"{Path(test.__code__.co_filename).name}::{test.__name__}"
        FAULTS.append({"what": what, "happens": happens, "code": code, "test": place})
        given = {"code": code, "happens": happens}
        for name in given.keys() & inspect.signature(test).parameters:
            test = pytest.mark.parametrize(name, [given[name]], ids=[""])(test)
        return test

    return note


def says(happens: str, text: str) -> None:
    """Every part of `happens` in backquotes stands in the text, where ... is anything on one line."""
    for part in re.findall("`([^`]+)`", happens):
        assert re.search(".*".join(map(re.escape, part.split("..."))), text), f"{part!r} was not said:\n{text[-3000:]}"


@pytest.fixture(autouse=True)
def clean_process(monkeypatch):
    """No test inherits ranks from its surroundings or leaves signal handlers behind."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    """An empty folder to run in."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The folder of a random model with the tiny tokenizer: 2 layers, width 32."""
    folder = tmp_path_factory.mktemp("models") / "small"
    folder.mkdir()
    importlib.import_module("sft").make_tiny(folder, SimpleNamespace(num_layers=2, hidden_size=32, seed=0))
    return folder


@pytest.fixture
def run(cwd, small, capfd):
    """Run a script in this process, with the small model; returns (exit code, stdout, stderr)."""

    def run(script: str, flags: str = "", model=small, base: bool = True) -> SimpleNamespace:
        module = importlib.import_module(script)
        model = None if script == "recurrent_depth" and model is small else model
        argv = [*EVERY[script].split() * base, *(["--model", str(model)] if model else []), *flags.split()]
        capfd.readouterr()
        code = module.main(loop_of(module), module.Config, argv)
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


def loop_of(module):
    """`train`, or `solve` of a script that trains nothing."""
    return getattr(module, "train", None) or module.solve


def start(script: str, flags: str, folder: Path, launcher=(), **options) -> subprocess.Popen:
    """A script as a process of its own in `folder`."""
    command = [sys.executable, *launcher, str(ROOT / f"{script}.py"), *flags.split()]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=env, stdout=pipe, stderr=pipe, encoding="utf-8", **options)


def finish(process: subprocess.Popen, timeout: float = 300) -> SimpleNamespace:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()  # does nothing to one that has ended
    return SimpleNamespace(code=process.returncode, out=out, err=err)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics_of(folder: Path, evaluations: bool = False) -> list[dict]:
    """The lines of metrics.jsonl without times: those of training steps, or those of evaluations."""
    rows = [line for line in lines_of(folder / "metrics.jsonl") if ("eval/accuracy" in line) == evaluations]
    timed = re.compile("seconds|.*_per_s")
    return [{name: value for name, value in row.items() if not timed.match(name)} for row in rows]


class ThreadRanks:
    """torch.distributed as far as the scripts use it, for ranks that are threads of this process."""

    def __init__(self, world: int):
        self.world, self.slots, self.local = world, [None] * world, threading.local()
        self.barrier = threading.Barrier(world, timeout=60)

    def is_initialized(self) -> bool:
        return True

    def destroy_process_group(self) -> None: ...

    def exchange(self, value) -> list:
        self.slots[self.local.rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values

    def all_gather_object(self, values: list, value) -> None:
        values[:] = self.exchange(value)

    def all_reduce(self, tensor) -> None:
        values = self.exchange(tensor.clone())
        with torch.no_grad():
            tensor.copy_(sum(values[1:], values[0]))


@pytest.fixture
def run_ranks(cwd, small, monkeypatch):
    """Run a script on `world` ranks that are threads; (exit codes, gradients of each step on rank 0)."""

    def run_ranks(script: str, world: int, flags: str = "") -> tuple[list[int], list[torch.Tensor]]:
        module, ranks, gradients = importlib.import_module(script), ThreadRanks(world), []
        codes = [None] * world

        class Run(module.Run):
            def __init__(self, cfg):
                super().__init__(cfg)
                self.rank, self.world = ranks.local.rank, world

        def step(optimizer, *args, **kwargs):  # after the sum over ranks; the norm is far from the clip here
            if ranks.local.rank == 0:
                weights = [weight for group in optimizer.param_groups for weight in group["params"]]
                gradients.append(torch.cat([weight.grad.flatten().clone() for weight in weights]))

        def work(rank: int) -> None:
            ranks.local.rank = rank
            argv = [*SMALL[script].split(), "--model", str(small), *flags.split()]
            try:
                codes[rank] = module.main(module.train, module.Config, argv)
            finally:
                if codes[rank] != 0:
                    ranks.barrier.abort()  # the others do not wait for it

        with monkeypatch.context() as patch:
            patch.setattr(module, "dist", ranks)
            patch.setattr(module, "Run", Run)
            patch.setenv("WORLD_SIZE", str(world))
            patch.setattr(torch.optim.AdamW, "step", step)
            threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return codes, gradients

    return run_ranks


class FakeRun:
    """One rank of a pretended world: notes the gradient where the real one would step."""

    def __init__(self, cfg, rank: int = 0, world: int = 1, others: tuple = ()):
        self.cfg, self.rank, self.world, self.others = cfg, rank, world, others
        self.device, self.gradients, self.skipped = torch.device("cpu"), [], 0

    def gather(self, value) -> list:
        return [value, *self.others]

    def update(self, module, optimizer, lr: float) -> float:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
        self.gradients.append(torch.cat([g.flatten() for g in grads]))
        module.zero_grad()
        return 1.0


def eight_answers() -> list[list[int]]:
    """Tokens of eight answers of unequal length, as the tests of update_policy take them: two groups of four."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(44, 200, (n,), generator=generator).tolist() for n in (3, 17, 9, 30, 1, 12, 22, 5)]
