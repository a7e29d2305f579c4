"""Every script as a user meets it: help, the files of a run, going on, ranks, interruption, faults.

A test calls main(train, Config, flags) here; what needs a process stands in test_processes.py. A
new script takes part by its line in conftest. A shared block alone is tested with one script.
"""

import doctest
import importlib
import os
import re
import shutil
import signal
from dataclasses import fields
from itertools import cycle
from pathlib import Path

import pytest
import torch
from conftest import LONG, SMALL, SOLVING, TRAINING, file_of, lines_of, metrics_of, records_of
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.distributed.run import get_args_parser

from rewards import read_json


def module(script: str):
    return importlib.import_module(script)


def flags_of(script: str) -> set[str]:
    return {f.name for f in fields(module(script).Config)}


GROUPED = [script for script in TRAINING if "group_size" in flags_of(script)]
every = pytest.mark.parametrize("script", SMALL)
training = pytest.mark.parametrize("script", TRAINING)
EVALUATIONS = "--eval_problems 2 --eval_every 1"


def checkpoint(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def weights(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def same(first, second) -> None:
    """Equal to the last bit: tensors, dicts and lists of them, numbers."""
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples(folder: Path) -> list[dict]:
    path = folder / "samples.jsonl"
    return lines_of(path) if path.exists() else []


@pytest.fixture
def made(run, cwd, tmp_path_factory):
    """A finished run of a name in the working folder; each set of flags is run only once."""

    def made(name: str, script: str = "grpo", flags: str = "") -> Path:
        kept = tmp_path_factory.getbasetemp() / re.sub(r"\W+", "_", f"made {script} {flags}")
        if not kept.exists():
            quick = "--eval_problems 0" if script in TRAINING else ""
            done = run(script, f"{quick} {flags} --out {name}")
            assert (done.code, done.err) == (0, ""), done.err
            shutil.copytree(cwd / name, kept)
        return Path(shutil.copytree(kept, cwd / name, dirs_exist_ok=True))

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


@pytest.mark.parametrize("name", ["rewards", *SMALL])
def test_docstring_examples(name):
    failed, _ = doctest.testmod(module(name))
    assert not failed


def test_torchrun_takes_no_flag_for_its_own():
    """It reads the script's flags, too, and what begins one of its own it takes for that one."""
    theirs = get_args_parser()._option_string_actions
    for script in SMALL:
        for f in fields(module(script).Config):
            assert not [name for name in theirs if name.startswith(f"--{f.name}")], (script, f.name)


@every
def test_files_of_a_run(made, script):
    folder = made("a", script, LONG[script][0])
    last = checkpoint(folder, LONG[script][1])
    files = {path.name for path in folder.iterdir() if path.is_file()} - {"samples.jsonl"}
    name = file_of(script).name
    assert files == {"run.json", "metrics.jsonl", name}
    assert (folder / name).read_bytes() == file_of(script).read_bytes()
    assert module(script).checkpoints(folder)[-1] == last
    found = read_json(folder / "run.json")
    assert found["script"] == name and set(found["config"]) == flags_of(script)
    for name, (chosen, _, _) in module(script).BY_SIZE.items():
        if f"--{name} " not in SMALL[script]:  # chosen, and noted as chosen
            assert found["config"][name] == chosen
    files = {"config.json", "model.safetensors", "tokenizer.json", "trainer.pt"}
    if script in SOLVING:
        files = {"records.json"}
    elif found["config"]["model"] != "scratch":  # what came with the model goes with it
        files |= {"generation_config.json", "tokenizer_config.json"}
    assert {path.name for path in last.iterdir()} == files
    assert len({path.stat().st_mode for path in last.glob("*.*")}) == 1  # as the umask has it


@training
def test_metrics(made, run, cwd, script):
    """The evaluation of the start is the one of --steps 0."""
    rows = lines_of(made("a", script, EVALUATIONS) / "metrics.jsonl")
    steps, evaluations = metrics_of(cwd / "a"), metrics_of(cwd / "a", True)
    assert [row["step"] for row in steps] == [1, 2]
    assert [row["step"] for row in evaluations] == [1, 2, 0]
    assert all({"loss", "lr", "grad_norm", "tokens"} <= row.keys() for row in steps)
    assert all(isinstance(value, (int, float)) for row in rows for value in row.values())
    assert run(script, "--steps 0 --eval_problems 2 --out none").code == 0
    assert not list((cwd / "none").glob("step-*")) and not metrics_of(cwd / "none")
    assert metrics_of(cwd / "none", True) == evaluations[2:]
    assert evaluations[2].items() - {("step", 0)} != evaluations[1].items() - {("step", 2)}


@pytest.mark.parametrize("script", [script for script in SMALL if script != "sft"])
def test_samples(made, small, script):
    rows = samples(made("a", script, EVALUATIONS if script in TRAINING else LONG[script][0]))
    folder = small if script in SOLVING else checkpoint(Path("a"), 2)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert rows
    for row in rows:
        assert len({len(row[name]) for name in ("tokens", "pieces", "logprobs", "mask")}) == 1
        assert set(row["mask"]) <= {0, 1} and all(p <= 0 for p in row["logprobs"])
        assert "".join(row["pieces"]) == tokenizer.decode(row["tokens"], skip_special_tokens=False)
    if script in GROUPED:
        assert [row["step"] for row in rows] == [1] * 8 + [2] * 8
        assert [row["group"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
        assert all(row["truncated"] == (row["tokens"][-1] != 1) for row in rows)


def same_run(first: Path, second: Path, step: int) -> None:
    """Equal metrics but for times; equal samples, weights, trainer state or records."""
    assert metrics_of(first) == metrics_of(second)
    assert samples(first) == samples(second)
    assert records_of(first) == records_of(second)
    if not records_of(first):
        one, other = checkpoint(first, step), checkpoint(second, step)
        same(weights(one), weights(other))
        paths = one / "trainer.pt", other / "trainer.pt"
        same(*(torch.load(path, weights_only=True) for path in paths))


@training
def test_resumed_run_equals_the_unbroken_one(run, cwd, script, half_right):
    """With much to go on with; with little: test_a_run_that_is_broken_off_again_and_again."""
    flags = f"--eval_problems 0 {TRAINING[script][1]}"
    assert run(script, f"--steps 4 --out whole {flags}").code == 0
    rows = metrics_of(cwd / "whole")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[3]["grad_norm"] > 0
    assert run(script, f"--out halves {flags}").code == 0
    done = go_on(run, script, "halves", "--steps 4")
    assert done.code == 0, done.err
    same_run(cwd / "whole", cwd / "halves", 4)


@pytest.mark.parametrize("half_line", ["", '{"step": 3, "los', '{"step": 3, "p": {"t": 4}', "\0"])
def test_resume_drops_what_lies_beyond_the_checkpoint(made, run, cwd, half_line):
    """Whole lines of later steps, and the half of one that a kill or a full disk leaves."""
    made("whole", flags="--steps 3"), made("a")
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (cwd / "a" / name).open("a", encoding="utf-8") as file:
            file.write('{"step": 3, "loss": 9}\n' + half_line)
    assert go_on(run, "grpo", "a", "--steps 3").code == 0
    same_run(cwd / "whole", cwd / "a", 3)


def test_resume_keeps_what_the_run_was_given(made, run, cwd):
    """Also what an earlier resume was given; a finished run is only evaluated."""
    before = read_json(made("a") / "run.json")["config"]
    assert go_on(run, "grpo", "a", "--steps 3 --lr 0.001").code == 0
    changed = {"steps": 3, "lr": 0.001, "resume": "a"}
    assert read_json(cwd / "a" / "run.json")["config"] == before | changed
    rows, log, saved = metrics_of(cwd / "a"), samples(cwd / "a"), contents(checkpoint(cwd / "a", 3))
    assert go_on(run, "grpo", "a", "--eval_problems 2").code == 0
    assert (metrics_of(cwd / "a"), samples(cwd / "a")) == (rows, log)
    assert contents(checkpoint(cwd / "a", 3)) == saved and len(metrics_of(cwd / "a", True)) == 2


def test_only_the_newest_checkpoints_stay(made, run, cwd):
    made("a", flags="--steps 3 --save_every 1")
    assert {p.name for p in (cwd / "a").glob("step-*")} == {"step-000002", "step-000003"}
    unfinished = cwd / "a" / "step-000004.tmp"  # what a killed run leaves
    unfinished.mkdir()
    (unfinished / "trainer.pt").write_bytes(b"half")
    assert go_on(run, "grpo", "a", "--steps 4").code == 0
    assert {p.name for p in (cwd / "a").glob("step-*")} == {"step-000003", "step-000004"}
    assert (checkpoint(cwd / "a", 4) / "trainer.pt").stat().st_size > 1000


class Killed(BaseException): ...


def die(*args, **options):
    raise Killed


def die_at_old(path, *args, remove=shutil.rmtree, **options):
    if re.fullmatch(r"step-\d+", Path(path).name):
        raise Killed
    remove(path, *args, **options)


def no_memory(*args, **options):
    raise torch.OutOfMemoryError("CUDA out of memory.\nand more lines")


NUMBERS = cycle([signal.SIGINT, signal.SIGTERM])


@pytest.mark.parametrize("script, number", list(zip(SMALL, NUMBERS, strict=False)))
def test_a_run_that_is_broken_off_again_and_again(made, run, cwd, script, number, monkeypatch):
    """By a signal, no memory, kills within a save: each time it goes on, to the same end."""
    flags, last = LONG[script]
    made("whole", script, flags)
    real = module(script).Run.log

    def log(self, step, *args, **options):
        if step == 2:
            os.kill(os.getpid(), number)
        real(self, step, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module(script).Run, "log", log)
        done = run(script, f"{flags} --out a")
    assert (done.code, done.err) == (128 + number, "") and "--resume a" in done.out
    stopped = metrics_of(cwd / "a")[-1]["step"]
    assert module(script).checkpoints(cwd / "a")[-1] == checkpoint(cwd / "a", stopped)
    assert 2 <= stopped < last
    # its logs go beyond the checkpoint, and end in half a line
    for path in (cwd / "a").glob("*.jsonl"):
        path.write_bytes(path.read_bytes() + b'{"step": 9, "loss": 9}\n{"st')
    places, more, file = [(Path, "rename", die)], "", "records.json"
    if script in TRAINING:
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", no_memory)
            done = go_on(run, script, "a")
        assert done.code == 1 and "--micro_batch_tokens" in done.err and done.err.count("\n") == 1
        places += [(module(script), "save_file", die), (torch, "save", die)]
        places += [(shutil, "rmtree", die_at_old)]  # of the old one, and the new one stands
        more, file = "--save_every 1", "trainer.pt"
    for place in places:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(*place)
            go_on(run, script, "a", more)
        # what is there of checkpoints is whole
        assert all((folder / file).exists() for folder in module(script).checkpoints(cwd / "a"))
    done = go_on(run, script, "a")
    assert (done.code, done.err) == (0, "")
    same_run(cwd / "whole", cwd / "a", last)


def test_a_signal_while_a_step_is_saved(run, cwd, monkeypatch):
    """It counts for the next step: no rank leaves alone, and none before what it did is saved."""
    real, waits = module("grpo").Run.gather, []

    def gather(self, value):
        if value == 0 and len(lines_of(cwd / "a" / "metrics.jsonl")) == 2:
            waits.append(value)  # for the signals of the ranks, then for the disk
            if len(waits) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return real(self, value)

    monkeypatch.setattr(module("grpo").Run, "gather", gather)
    done = run("grpo", "--steps 9 --eval_problems 0 --out a")
    assert done.code == 143 and len(waits) == 2
    assert [row["step"] for row in metrics_of(cwd / "a")] == [1, 2, 3]
    assert module("grpo").checkpoints(cwd / "a") == [checkpoint(cwd / "a", 3)]


def close(first: list[dict], second: list[dict], rel: float) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert one == pytest.approx(other, rel=rel, abs=2e-6)  # the log has six decimals


@training
def test_ranks_give_the_gradient_of_one(run_ranks, cwd, script, half_right):
    """No step is taken, so all are of the same weights; nine ranks are more than rows."""
    more = ""
    if hasattr(module(script), "micro_batches"):  # else a pass has random numbers of its own
        more = "--micro_batch_tokens 64"  # another number of passes on each rank
    found = {}
    for world, flags in ((1, ""), (2, more), (9, "")):
        flags += f" {TRAINING[script][1]} --eval_problems 1 --out {world}"
        codes, found[world] = run_ranks(script, world, flags)
        assert codes == [0] * world
        for first, other in zip(found[1], found[world], strict=True):
            assert first.abs().max() > 1e-3
            torch.testing.assert_close(first, other, rtol=0, atol=1e-6)
        for evaluations in (False, True):
            close(*(metrics_of(cwd / name, evaluations) for name in ("1", str(world))), 1e-5)
        one, other = samples(cwd / "1"), samples(cwd / str(world))
        assert [row["tokens"] for row in one] == [row["tokens"] for row in other]
    assert found[1] and len(list(cwd.iterdir())) == 3


@pytest.mark.parametrize("script", SOLVING)
def test_ranks_answer_as_one(run_ranks, cwd, script):
    for world in (1, 2):
        codes, _ = run_ranks(script, world, f"--out {world} {LONG[script][0]}")
        assert codes == [0] * world
    one, two = cwd / "1", cwd / "2"
    close(metrics_of(one)[-1:], metrics_of(two)[-1:], 1e-5)
    assert records_of(one) == records_of(two) != []


@training
def test_a_gradient_that_is_not_finite(run, cwd, script, monkeypatch):
    """The second is skipped, and the next is as ever; the fifth in a row ends the run."""
    real, log = module(script).Run.update, cwd / "a" / "metrics.jsonl"
    bad = dict.fromkeys((2, 5, 7), float("nan")) | dict.fromkeys((4, 6, 8), float("inf"))

    def update(self, model, *args):
        step = 1 + (len(lines_of(log)) if log.exists() else 0)
        next(w for w in model.parameters() if w.grad is not None).grad *= bad.get(step, 1.0)
        return real(self, model, *args)

    monkeypatch.setattr(module(script).Run, "update", update)
    done = run(script, "--steps 9 --save_every 1 --out a --eval_problems 0")
    assert done.code == 1 and "gradient" in done.err and done.err.count("\n") == 1
    logged = ["grad_norm" in row for row in metrics_of(cwd / "a")]
    skips = 2 if script == "ppo" else 4  # two updates a step; one
    assert logged == [True, False, True] + [False] * skips
    states = [weights(folder) for folder in module(script).checkpoints(cwd / "a")]
    same(*states)
    assert all(weight.isfinite().all() for weight in states[0].values())


@pytest.mark.parametrize("script", ["grpo", "budget_forcing"])
def test_a_model_whose_logits_are_not_finite(run, cwd, small, script):
    """A broken model is not sampled from in silence."""
    broken = Path(shutil.copytree(small, cwd / "broken"))
    tensors = weights(broken)
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    done = run(script, "--out a", model=broken)
    assert done.code == 1 and "logits" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("script, flags", [("grpo", "--overlong_cache 0"), ("nsr", "--mode psr")])
def test_nothing_to_learn_changes_nothing(run, cwd, small, script, flags):
    """No optimizer step, which would move on momentum alone, and the same evaluations."""
    assert run(script, f"{flags} --steps 3 --out a --eval_every 1").code == 0
    rows, last = metrics_of(cwd / "a"), checkpoint(cwd / "a", 3)
    assert rows[0]["prompts"] < rows[1]["prompts"] < rows[2]["prompts"]
    assert [row["rows_trained"] for row in rows] == [0, 0, 0]
    same(weights(small), weights(last))
    first, *others = [row | {"step": 0} for row in metrics_of(cwd / "a", True)]
    assert others == [first] * 3
    assert not torch.load(last / "trainer.pt", weights_only=True)["optimizer"]["state"]
