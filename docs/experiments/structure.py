"""Structure, not content (arXiv:2502.07374 sec. 4): wrong answers cost little, shuffled steps much.

The paper's wrong answers are those of whole thoughts that went wrong somewhere. Here a thought is a
chain of four small sums and products modulo 5, and a wrong one has one wrong step, at any place,
with which the rest goes on:

    3+2*4+1..=<think>3+2=0
    0*4=3                          it is 0
    3+1=4                          ... and so on, up to a wrong answer

A base that has begun to learn such chains learns on from 7680 damaged traces, and answers without
sampling (--temperature 0), as the paper's model nearly does: a model that samples repeats the share
of faults that it has learnt.

    correct      no damage
    wrong        a wrong step in every trace, so every answer is wrong
    answer       the thought is right, the answer is another digit: what more/traces.py damages
    shuffle_67   two of three lines change places; shuffle_100: all
    delete_67    two of three lines are gone; insert_67: get a line of another problem in front

    python docs/experiments/structure.py --seed 0 --out out/structure-0

CLAIMS were written before the runs of seeds 0, 1, 2. A folder --out that holds a finished part is
gone on with.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from docs.experiments.runs import (  # noqa: E402
    evaluations,
    last_checkpoint,
    parse,
    parser_of,
    run_script,
    show_claims,
    write_traces,
)
from more.tasks import AffineChain  # noqa: E402
from rewards import extract_answer, score  # noqa: E402

CLAIMS = [
    "correct - base >= 0.30",
    "wrong - shuffle_67 >= 0.08",
    "correct - wrong <= 0.15",
    "wrong - shuffle_100 >= 0.08",
]
TASK = "docs/experiments/structure.py:Steps"
DAMAGES = "shuffle:0.67", "shuffle:1", "delete:0.67", "insert:0.67", "answer:1"
BASE = f"--num_layers 2 --hidden_size 128 --task {TASK} --steps 160"
TRACES = 7680
LEARN = "--steps 240 --lr 2e-3 --warmup_steps 10"
QUICK = "--micro_batch_tokens 4096 --save_every 0 --max_new_tokens 96"
QUICK += " --eval_problems 400 --eval_samples 1 --temperature 0"


@dataclass
class Steps(AffineChain):
    """Affine chains with a thought before the answer."""

    length: int = 4
    modulus: int = 5
    slip: float = 0.0  # share of traces with a wrong step and so a wrong answer

    def compact(self, problem: dict) -> str:
        return super().compact(problem) + "=<think>"

    def trace(self, problem: dict, rng: Random) -> str:
        right = self.answer(problem)
        steps, answer = self.steps(problem), right
        slips = rng.random() < self.slip
        while slips and answer == right:  # a product with 0 mends what was wrong before
            place = rng.randrange(self.length)
            steps = self.steps(problem)[:place] + self.slipped(problem, place, rng)
            answer = steps[-1].rpartition("=")[2]
        thought = "\n".join(steps)
        return f"{thought}\n</think><answer>{answer}</answer>"

    def slipped(self, problem: dict, place: int, rng: Random) -> list[str]:
        """The steps from `place` on, this one with a wrong value."""
        left, _, value = self.steps(problem)[place].partition("=")
        wrong = (int(value) + rng.randrange(1, self.modulus)) % self.modulus
        rest = {"start": wrong, "operations": problem["operations"][place + 1 :]}
        return [f"{left}={wrong}", *self.steps(rest)]

    def score(self, text: str, problem: dict, **kw) -> dict:
        answer = extract_answer(text)
        return score(text, answer, answer == self.answer(problem), **kw)

    def describe(self, text: str, problem: dict) -> dict:
        """Whether the thought is the right one."""
        lines = text.partition("</think>")[0].rstrip().split("\n")
        return {"right_steps": lines == self.steps(problem)}


def arm_name(damage: str) -> str:
    kind, _, share = damage.partition(":")
    return "answer" if kind == "answer" else f"{kind}_{round(100 * float(share))}"


def main() -> None:
    args, out, seed = parse(parser_of(__doc__))
    values = {}

    def learn(name: str, flags: str) -> None:
        rows = run_script(out / name, "sft.py", *flags.split(), *QUICK.split(), *seed)
        after = evaluations(rows)[-1]
        values[name] = after["eval/accuracy"]
        values[f"{name}_steps"] = after["eval/right_steps"]

    learn("base", BASE)
    base = last_checkpoint(out / "base")
    student = f"--model {base} {LEARN}"
    learn("correct", f"{student} --task {TASK}")
    learn("wrong", f"{student} --task {TASK}:slip=1")
    for damage in DAMAGES:
        name = arm_name(damage)
        data = out / f"{name}.jsonl"
        made = ["--task", TASK, "--traces", str(TRACES), "--perturb", damage]
        write_traces(data, *made, *seed)
        learn(name, f"{student} --task {TASK} --data {data}")
    show_claims(values, CLAIMS)


if __name__ == "__main__":
    main()
    os._exit(0)
