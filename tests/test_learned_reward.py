"""more/learned_reward.py: eq. 1 by hand, a step of grpo.py on it, what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import lines_of
from test_reward_model import SMALL, equal

from more import reward_model as rm
from rewards import BadInput, make_task, prompt

SPEC = "more/learned_reward.py:LearnedReward:folder="
RIGHT, WRONG, CUT = "2*3=6\n</think><answer>2*3</answer>", "</think><answer>2</answer>", "2*3=6\n"
PROBLEM = {"numbers": [2, 3], "target": 6}


@pytest.fixture
def folder(run, small, cwd) -> Path:
    """A checkpoint of a reward model of outcomes, trained for four steps."""
    flags = f"--model {small} {SMALL} --kind outcome --sample 3 --attempts 2 --out rm"
    flags = f"{flags} --task countdown:high=20,give_up=0"
    assert run("more.reward_model", flags, base=False).code == 0
    return cwd / "rm/step-000004"


def test_eq1_by_hand(folder):
    """Right, wrong, without an end; the row that is scored is the one that was learnt from."""
    model, (head, about) = rm.load_model(folder), rm.load_head(folder, 32)
    for shift in (-99, 198):  # no score is above 1 sd below the mean; then all are
        head.bias.data += shift * about["std"]
        rm.save_head(head, folder, about)
        task = make_task(f"{SPEC}{folder.parent},weight=2,rule_weight=3")
        for text in RIGHT, WRONG, CUT:
            row = task.prompter.encode("2,3=6<think>" + text) + [1] * (text != CUT)
            r = head(model(torch.tensor([row]))[0, -1]).item()
            z = (r - about["mean"]) / about["std"]
            if text == CUT:
                assert (z > -1) == (shift > 0)
                z = min(z, -1.0)
            parts = task.score(text, PROBLEM)
            assert parts["correct"] == (text == RIGHT)
            equal([parts["learned"], parts["reward"]], [z, 3 * (text == RIGHT) + 2 * z], 1e-4)
            assert task.describe(text, PROBLEM)["learned"] == parts["learned"]
    assert task.problem("train", 0, 5) == make_task("countdown:high=20").problem("train", 0, 5)
    assert task.describe(CUT, PROBLEM)["tries"] == 1


def test_grpo_learns_from_it(folder, run, cwd):
    flags = f"--format_weight 0 --overlong_cache 0 --out run --task {SPEC}{folder},weight=0.5"
    assert run("grpo", flags).code == 0
    for row in lines_of(cwd / "run/metrics.jsonl")[:2]:
        assert row["reward"] == pytest.approx(0.5 * row["learned"], abs=2e-6)
    assert "eval/learned" in lines_of(cwd / "run/metrics.jsonl")[-1]


def test_what_it_refuses(folder, small):
    with pytest.raises(BadInput, match="LearnedReward has no question prompt"):
        prompt(make_task(f"{SPEC}{folder}"), PROBLEM, "text")
    for spec, words in (("", "needs folder="), (f"{small}", "no value_head.safetensors")):
        with pytest.raises(BadInput, match=words):
            make_task(SPEC + spec)
    file = folder / "value_head.json"
    about = json.loads(file.read_text())
    for change in ({"style": "text"}, {"kind": "process"}, {"std": 0.0}, {"style": None}):
        file.write_text(json.dumps(about | change))
        with pytest.raises(BadInput, match="learnt from|no scale"):
            make_task(f"{SPEC}{folder}")
    file.write_text(json.dumps(about))
    alone = shutil.copytree(folder, folder.parent.parent / "alone")
    with pytest.raises(BadInput, match="give task=NAME"):
        make_task(f"{SPEC}{alone}")
    assert make_task(f"{SPEC}{alone},task=countdown").inner.high == 10
    tokens = (alone / "tokenizer.json").read_text().replace('"=": ', '"no": ')
    (alone / "tokenizer.json").write_text(tokens)
    with pytest.raises(BadInput, match="its vocabulary cannot write"):
        make_task(f"{SPEC}{alone},task=countdown")
