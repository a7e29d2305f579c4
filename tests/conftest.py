"""What the tests of whole scripts share: a small model, runs here and as processes, ranks."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes share two cores
os.environ["HF_HUB_OFFLINE"] = "1"  # no test looks for a network

import pytest  # noqa: E402
import torch  # noqa: E402

from rewards import Completion  # noqa: E402

# Flags of quick steps whose losses are not 0. While the learning rate warms up it does not depend on
# --steps, so that a run which is made longer equals one that was long from the start.
SAME = "--steps 2 --batch_size 8 --max_new_tokens 40 --eval_problems 2 --eval_samples 2"
WARM = f"{SAME} --warmup_steps 10"
GROUPS = f"{WARM} --group_size 4"
NOISE = "--reward cosine --repetition_penalty 1 --repetition_n 1"  # by length and repeated tokens
CRITIC = "--kl_coef 0.1 --value_clip 0.5 --gae_lambda 0.9 --critic_warmup 1"
RECURRENT = "--task s3:elements=10 --steps 2 --batch_size 8 --hidden_size 16 --num_heads 2"
THOUGHTS = "--mode coconut --stage_steps 2 --uniform_prob 0.2 --c 2 --weight_decay 0.1"
# Pairs of a random model's answers need a verifier that finds some of them right.
PAIRS = f"--task {ROOT}/tests/coin.py:Coin --sample 12 --attempts 4 --sft_coef 0.5"
# Scripts that train: the smallest flags; more, so that a checkpoint and ranks have much to hold.
TRAINING = {
    "grpo": (
        f"{GROUPS} --no-decay --aggregation token --overlong_cache 40",
        "--lr 0.01 --updates 2 --kl_coef 0.1 --ref_every 1 --dynamic_sampling 1",
    ),
    "nsr": (f"{GROUPS} --updates 1 --normaliser sample", "--updates 2 --lr 0.01"),
    "ppo": (f"{GROUPS} --no-decay --mini_batches 2 {NOISE}", f"{CRITIC} --epochs 2 --lr 0.01"),
    "sft": (WARM, "--loss_on thought --micro_batch_tokens 64 --lr 0.01"),
    "coconut": (f"{SAME} --mode no_curriculum", f"{THOUGHTS} --lr 0.01"),  # one stage; two
    "recurrent_depth": (
        f"{RECURRENT} --eval_problems 3 --eval_samples 1 --warmup_steps 10 --test_r 4",
        "--lr 0.01 --micro_batch_tokens 44",  # two micro-batches, each with its own r
    ),
    # another reference, so that no margin of the first step is 0 but for rounding
    "more.dpo": (f"{WARM} {PAIRS}", "--reference tiny --label_smoothing 0.1 --lr 0.01"),
    # another PRM, so that q is not 0 in the first step
    "more.prime": (
        f"{GROUPS} --task {ROOT}/tests/coin.py:Coin --prm_updates 1",
        "--prm tiny --prm_beta 1 --prm_updates 2 --updates 2 --lr 0.01 --prm_lr 0.01",
    ),
    "more.r_capsule": (WARM, "--k 3 --bottleneck 8 --recon 0.5 --lr 0.01"),
    # a rate at which models/tiny names letters after one step
    "more.reasonflux": (
        f"{WARM} --sft_steps 1 --sft_lr 0.1 --sample 8 --attempts 32 --max_plan_tokens 1",
        "--micro_batch_tokens 64 --beta 1 --sft_lr 0.01 --lr 0.01",
    ),
}
SPECULATION = "--max_new_tokens 12 --max_step_tokens 6 --save_every 1"
SOLVING = {  # scripts that train nothing: the smallest flags
    "budget_forcing": "--caps 4,8,12 --max_new_tokens 20 --eval_problems 3 --waits 1,2",
    "specreason": f"--draft tiny-draft --eval_problems 2 {SPECULATION}",
    "more.best_of_n": f"--N 2 --probe 1 --width 2 --search both --eval_problems 2 {SPECULATION}",
    "more.kinetics": "--eval_samples 2 --blocks 1,2 --block 2 --recent 2 --eval_problems 2"
    " --max_new_tokens 12 --save_every 1",
}
SMALL = {script: flags for script, (flags, _) in TRAINING.items()} | SOLVING
# flags of a run of four steps or more without evaluations; what is its last step
LONG = dict.fromkeys(TRAINING, ("--steps 4 --eval_problems 0", 4))
LONG |= {"budget_forcing": ("", 5), "specreason": ("--eval_problems 4", 4)}
LONG["more.best_of_n"] = LONG["more.kinetics"] = "--eval_problems 4", 4


@pytest.fixture(autouse=True)
def clean_process():
    """No test leaves signal handlers behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    """An empty folder to run in."""
    (folder := tmp_path / "cwd").mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The folder of a random model with the tiny tokenizer: 2 layers, width 32."""
    (folder := tmp_path_factory.mktemp("models") / "small").mkdir()
    sizes = SimpleNamespace(num_layers=2, hidden_size=32, seed=0)
    importlib.import_module("sft").make_tiny(folder, sizes)
    return folder


@pytest.fixture
def run(cwd, small, capfd):
    """Run a script in this process, with the small model; returns (exit code, stdout, stderr)."""

    def run(script: str, flags: str = "", model=small, base: bool = True) -> SimpleNamespace:
        module = importlib.import_module(script)
        if base:
            flags = f"{SMALL[script]} --model {model_of(script, model)} {flags}"
        capfd.readouterr()
        try:
            code = module.main(loop_of(module), module.Config, flags.split())
        except SystemExit as left:  # argparse
            code = left.code
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


def model_of(script: str, model) -> str:
    """The small model, or for a script that has a model of its own a new one."""
    own = script == "recurrent_depth" and Path(model).name == "small"
    return "scratch" if own else str(model)


def file_of(script: str) -> Path:
    """The file of a script of the tables: more.dpo is more/dpo.py."""
    return ROOT / f"{script.replace('.', '/')}.py"


def loop_of(module):
    """`train`, or `solve` of a script that trains nothing."""
    return getattr(module, "train", None) or module.solve


def start(script: str, flags: str, folder: Path, launcher=()) -> subprocess.Popen:
    """A script, or another program by its path, as a process of its own in `folder`."""
    path = file_of(script) if script in SMALL else f"{script}.py"
    command = [sys.executable, *launcher, str(path), *flags.split()]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=env, **pipes)


def finish(process: subprocess.Popen, timeout: float = 300) -> SimpleNamespace:
    out, err = process.communicate(timeout=timeout)
    return SimpleNamespace(code=process.returncode, out=out, err=err)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


VECTORS = Path(os.environ.get("VECTORS") or ROOT / "tests" / "vectors")


def vectors(name: str) -> dict:
    """Numbers from reference implementations."""
    content = json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))
    return content.get("sections", content)


def metrics_of(folder: Path, evaluations: bool = False) -> list[dict]:
    """The lines of metrics.jsonl, without times: of the training steps, or of the evaluations."""
    timed = re.compile(r"(eval/)?(seconds|speedup)|.*_per_s")
    lines = lines_of(folder / "metrics.jsonl")
    rows = [row for row in lines if ("eval/accuracy" in row) == evaluations and len(row) > 2]
    return [{name: x for name, x in row.items() if not timed.match(name)} for row in rows]


def records_of(folder: Path) -> list:
    """What the checkpoints of a script that trains nothing hold, without times and scores."""

    def kept(x: dict) -> dict:  # the rows beside it change the last digits of a score
        return {k: v for k, v in x.items() if k != "score" and "seconds" not in k}

    paths = sorted(folder.glob("step-*/records.json"))
    return [json.loads(path.read_text(encoding="utf-8"), object_hook=kept) for path in paths]


def nothing(*args) -> None: ...


class ThreadRanks:
    """torch.distributed as far as the scripts use it, for ranks that are threads."""

    init_process_group = destroy_process_group = nothing

    def __init__(self, world: int):
        self.world, self.slots, self.local = world, [None] * world, threading.local()
        self.barrier = threading.Barrier(world, timeout=60)

    def is_initialized(self) -> bool:
        return True

    def exchange(self, value) -> list:
        self.slots[self.local.rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values

    def all_gather_object(self, values: list, value) -> None:
        values[:] = self.exchange(value)

    def all_reduce(self, tensor) -> None:
        with torch.no_grad():
            tensor.copy_(sum(self.exchange(tensor.clone())))


@pytest.fixture
def run_ranks(cwd, small, monkeypatch):
    """Run a script on `world` ranks that are threads; (exit codes, gradients on rank 0)."""

    def run_ranks(script: str, world: int, flags: str = "") -> tuple[list[int], list[torch.Tensor]]:
        module, ranks = importlib.import_module(script), ThreadRanks(world)
        codes, gradients, begin = [None] * world, [], module.Run.__init__
        argv = f"{SMALL[script]} --model {model_of(script, small)} {flags}".split()

        def init(self, cfg):
            begin(self, cfg)
            self.rank, self.world = ranks.local.rank, world

        def step(optimizer, *args, **kwargs):  # after the sum over ranks
            if ranks.local.rank == 0:
                weights = [weight for group in optimizer.param_groups for weight in group["params"]]
                gradients.append(torch.cat([weight.grad.flatten().clone() for weight in weights]))

        def work(rank: int) -> None:
            ranks.local.rank = rank
            try:
                codes[rank] = module.main(loop_of(module), module.Config, argv)
            finally:
                if codes[rank] != 0:
                    ranks.barrier.abort()  # the others do not wait for it

        with monkeypatch.context() as patch:
            patch.setattr(module, "dist", ranks)
            patch.setattr(signal, "signal", nothing)  # a thread may not set a handler
            patch.setattr(module.Run, "__init__", init)
            patch.setenv("WORLD_SIZE", str(world))
            patch.setattr(torch.optim.AdamW, "step", step)
            with ThreadPoolExecutor(world) as pool:
                list(pool.map(work, range(world)))
        return codes, gradients

    return run_ranks


def float64(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def close(ours: torch.Tensor, expected, tolerance: float = 1e-9) -> bool:
    return torch.allclose(ours.detach().double(), float64(expected), rtol=0, atol=tolerance)


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
    """Tokens of two groups of four answers of unequal length, for the tests of update_policy."""
    generator, lengths = torch.Generator().manual_seed(0), (3, 17, 9, 30, 1, 12, 22, 5)
    return [torch.randint(44, 200, (n,), generator=generator).tolist() for n in lengths]


def completion(number: int, tokens: list[int], finished=True, correct=False, format=0.0):
    """An answer to the prompt 46, 47, 3."""
    score = {"format": format, "correct": correct, "outcome": correct}
    return Completion(number, {}, [46, 47, 3], tokens, [0.0] * len(tokens), finished, "", score)


class Moving(FakeRun):
    """The policy moves with each update."""

    def update(self, module, optimizer, lr: float) -> float:
        module.model.norm.weight.data *= 3
        return super().update(module, optimizer, lr)


@pytest.fixture(scope="module")
def model(small):
    """The small model in float64; its block is the same text in every script."""
    return importlib.import_module("grpo").load_model(small).double()
