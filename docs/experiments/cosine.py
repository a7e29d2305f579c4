"""Which way a cosine reward moves the length, by the accuracy alone (arXiv:2502.03373 sec. 4.2).

Under `ppo.py --reward cosine-trl` length pays in a wrong answer what it costs in a right one. In
a search length and outcome hang together: what is cut from it is the hit that was not found. So
here an answer has room that means nothing, up to 16 waits before one guess, which is worked out and
compared with the target:

    7,1,5=2<think>waitwaitwait5*1*7=5*7=35>2
    </think><answer>5*1*7</answer>

One base is taught this on two and three numbers. With two (high) it is right in more than half of
its answers, with three (low) in a fifth; the limit of 64 tokens is two to three times as long as
answers are, where the cosine is steep. Each start learns under cosine-trl and, the control, under
the plain reward, from the same random numbers.

    python docs/experiments/cosine.py --seed 0 --out out/cosine-0

CLAIMS were written after seed 100 and before any other (names as in docs/results/ppo_direction.json).
Lengths and accuracies are held-out ones; of two numbers there are 19 problems that are held out, and
trained_accuracy is that of the first rollout.
"""

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
)
from more.tasks import countdown_attempts, try_line  # noqa: E402
from rewards import Countdown  # noqa: E402

CLAIMS = [
    "low_accuracy < 0.5 < high_accuracy",
    "low_cosine_length >= 1.05 * low_length",
    "high_cosine_length <= 0.95 * high_length",
    "low_cosine_length - low_plain_length >= 4",
    "high_plain_length - high_cosine_length >= 3",
    "high_cosine_accuracy >= high_plain_accuracy - 0.05",
]
TASK = "docs/experiments/cosine.py:Waits"
STARTS = {"high": (2, 19), "low": (3, 50)}  # numbers, held-out problems
BASE = f"--model tiny --task {TASK}:min_numbers=2 --steps 200 --lr 1e-3 --warmup_steps 10"
LEARN = "--max_new_tokens 64 --batch_size 128 --steps 24 --lr 3e-4 --eval_samples 16 --save_every 0"


@dataclass
class Waits(Countdown):
    """Countdown with one guess behind a number of waits that say nothing."""

    most: int = 16
    misses: float = 0.2  # traces that may end on one: a base that never saw it goes on searching

    def trace(self, problem: dict, rng: Random) -> str:
        target, numbers = problem["target"], tuple(sorted(problem["numbers"]))
        attempts = [(v, chain) for v, _, chain in countdown_attempts(numbers, self.operators, 99)]
        hits = [attempt for attempt in attempts if attempt[0] == target]
        known = hits and rng.random() >= self.misses
        value, chain = rng.choice(hits if known else attempts)
        waits = "wait" * rng.randint(0, self.most)
        answer = chain.partition("=")[0]
        return f"{waits}{try_line(value, chain, target)}</think><answer>{answer}</answer>"


def main() -> None:
    args, out, seed = parse(parser_of(__doc__))
    run_script(out / "base", "sft.py", *BASE.split(), "--eval_problems", "0", *seed)
    base, values = last_checkpoint(out / "base"), {}
    for start, (numbers, problems) in STARTS.items():
        task = f"{TASK}:min_numbers={numbers},max_numbers={numbers}"
        for name, reward in {"plain": "plain", "cosine": "cosine-trl"}.items():
            flags = f"--model {base} --task {task} --reward {reward} {LEARN}"
            flags += f" --eval_problems {problems}"
            rows = run_script(out / f"{start}-{name}", "ppo.py", *flags.split(), *seed)
            before, after = evaluations(rows)
            values[f"{start}_trained_accuracy"] = rows[0]["accuracy"]
            values[f"{start}_accuracy"] = before["eval/accuracy"]
            values[f"{start}_length"] = before["eval/completion_length"]
            for measure in ("accuracy", "completion_length", "clipped_ratio"):
                short = measure.removeprefix("completion_").removesuffix("_ratio")
                values[f"{start}_{name}_{short}"] = after[f"eval/{measure}"]
    show_claims(values, CLAIMS)


if __name__ == "__main__":
    main()
