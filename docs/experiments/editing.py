"""Does a search go on better when failed lines are dropped from it (arXiv:2509.19284 sec. 5)?

models/tiny gives up after a few misses. Such starts, of at least two lines, go on for 160 tokens
without the end of their thought, 6 times each, with the same random numbers in every arm:

    whole    all failed lines stay
    first    the first one is dropped    last     the last one is dropped
    random   one of them is dropped      all      all are dropped: the problem anew

    python docs/experiments/editing.py --seed 0

The paper's branches mislead what comes after them; a failed try of this search only says what not to
try again, so the claim, written down before the runs of seeds 0, 1, 2, is expected to fail:

    first >= whole + 0.05

A prototype had 0.195 for whole, 0.182, 0.135 and 0.257 for first, last and all (100 starts).
"""

import argparse
import math
import os
import sys
from pathlib import Path
from random import Random
from statistics import stdev

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from docs.results import holds  # noqa: E402
from more import best_of_n as bn  # noqa: E402
from rewards import Completion, heldout, in_groups, make_task, mean  # noqa: E402

CLAIMS = ["first >= whole + 0.05"]  # 0.182, 0.195
ARMS = "whole", "first", "last", "random", "all"
STARTS, SAMPLES, LIMIT = 100, 6, 160


def edited(lines: list[str], how: str, rng: Random) -> list[str]:
    """The lines that an arm leaves; no search begins with wait.

    >>> lines = ["1+2=3<4", "wait2+1=3<4"]
    >>> [edited(lines, how, Random(0)) for how in ("whole", "first", "last", "all")]
    [['1+2=3<4', 'wait2+1=3<4'], ['2+1=3<4'], ['1+2=3<4'], []]
    """
    number = {"first": 0, "last": len(lines) - 1, "random": rng.randrange(len(lines))}.get(how)
    left = [line for i, line in enumerate(lines) if i != number and how != "all"]
    return [line.removeprefix("wait") for line in left[:1]] + left[1:]


class Continuer(bn.Prompter):
    """A prompter whose prompts go on where a search stopped."""

    def text(self, problem: dict) -> str:
        return super().text(problem) + problem.get("thought", "")


def failed_lines(c: Completion) -> list[str]:
    """The lines of a search that gave up, else none."""
    thought, end, _ = c.text.partition("</think>")
    lines = thought.removesuffix("\n").split("\n")
    gave_up = end and c.finished and not c.score["correct"]
    tries = [line for line in lines if line.count("=") > 1 and line[-1].isdigit()]
    missed = all("<" in line or ">" in line for line in lines)
    return lines if gave_up and missed and len(tries) == len(lines) > 1 else []


def starts_of(run, model, prompter, seed: int) -> list[tuple[int, dict, list[str]]]:
    """(number, problem, lines) of the first held-out problems on which the model gives up."""
    found = []
    for part in in_groups(list(enumerate(heldout(prompter.task, 320, seed))), 80):
        for c in bn.rollout(run, model, prompter, part, 1, 320, 0):
            lines = failed_lines(c)
            if lines and len(found) < STARTS:
                found.append((c.number, c.problem, lines))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    torch.set_num_threads(1)
    run = bn.Selection(bn.Config(model="tiny", seed=seed, temperature=1.0))
    model = run.load(bn.BY_SIZE)[1]
    prompter = Continuer(model, make_task("countdown"), False)
    starts, right, values = starts_of(run, model, prompter, seed), {}, {}
    values["starts"] = float(len(starts))
    values["lines"] = mean(len(lines) for *_, lines in starts)
    for arm in ARMS:
        problems = []
        for number, problem, lines in starts:
            left = edited(lines, arm, Random(f"edit {seed} {number}"))
            thought = "".join(line + "\n" for line in left)
            problems.append((number, problem | {"thought": thought}))
        done = bn.rollout(run, model, prompter, problems, SAMPLES, LIMIT, 1)
        groups = in_groups(done, SAMPLES)
        right[arm] = [mean(c.score["correct"] for c in group) for group in groups]
        gaps = [a - b for a, b in zip(right[arm], right["whole"], strict=True)]
        values[arm] = mean(right[arm])
        values[f"{arm}_gap_se"] = stdev(gaps) / math.sqrt(len(gaps))
        values[f"{arm}_tokens"] = mean(len(c.tokens) for c in done)
    for name, value in values.items():
        print(f"{name:20}{value:9.3f}")
    for claim in CLAIMS:
        print(f"{'held' if holds(claim, values) else 'NOT held':9}{claim}")


if __name__ == "__main__":
    main()
    os._exit(0)
