"""Does learning from wrong answers alone keep coverage (arXiv:2506.01347) where most are right?

nsr.py's own experiment cuts answers off and starts where four of five are wrong. The paper starts
where most answers to the training problems are right, and measures pass@k also on harder ones. So
here an answer is one guess, worked out, compared with the target and never cut off:

    7,1,5=2<think>5*1*7=5*7=35>2
    </think><answer>5*1*7</answer>

and the problems of two numbers are learnt from, which the base gets right in most cases. Coverage
is that of held-out problems of three numbers: the base guesses hardly better than chance, but in 64
guesses it solves nearly all. On-policy, one update a rollout, as many for each method, with a look
after 20 and 60: at equal updates, and at equal pass@1.

    python docs/experiments/coverage.py --seed 0 --out out/coverage-0

CLAIMS were written before the runs of seeds 0, 1, 2 (names as in docs/results/nsr_coverage.json).
entropy is that of held-out answers, trained_entropy of those of the last 8 rollouts (base: the
first). An update without a kept answer is none: nsr_updates counts.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from docs.experiments.runs import last_checkpoint, parse, parser_of, run_script, show_claims  # noqa: E402
from more.tasks import countdown_attempts, try_line  # noqa: E402
from rewards import Countdown  # noqa: E402

CLAIMS = [
    "min(nsr_60_pass_at_1, psr_60_pass_at_1) > base_pass_at_1",
    "nsr_60_pass_at_64 >= base_pass_at_64 - 0.02",
    "nsr_60_pass_at_64 - psr_60_pass_at_64 >= 0.03",
    "nsr_60_pass_at_16 - psr_60_pass_at_16 >= 0.02",
    "psr_60_entropy < nsr_60_entropy",
    "psr_60_trained_entropy < 0.6 * base_trained_entropy",
    "psr_20_pass_at_1 >= nsr_60_pass_at_1",
    "psr_20_pass_at_16 >= nsr_60_pass_at_16 - 0.01",
    "psr_20_pass_at_64 >= nsr_60_pass_at_64 - 0.02",
]
TASK = "docs/experiments/coverage.py:Guess"
BASE = f"--model tiny --task {TASK}:known=0.7,min_numbers=2 --steps 200 --lr 1e-3"
BASE += " --warmup_steps 10 --eval_problems 0"
LEARN = "--steps 60 --updates 1 --lr 1e-4 --batch_size 128 --max_new_tokens 64 --eval_problems 0"
LEARN += f" --task {TASK}:pool=64,easy=1 --save_every 20 --keep 0"
METHODS = ["psr", "nsr", "w-reinforce", "reinforce"]
MEASURE = "--steps 0 --max_new_tokens 64 --eval_problems 100 --eval_samples 64"


@dataclass
class Guess(Countdown):
    """Countdown with one try; a share of the traces guess a solution."""

    known: float = 0.5
    easy: bool = False  # train on problems of two numbers, whatever is held out

    def problem(self, split: str, seed: int, index: int) -> dict:
        if self.easy and split == "train":
            two = replace(self, min_numbers=2, max_numbers=2, easy=False)
            return two.problem(split, seed, index)
        return super().problem(split, seed, index)

    def trace(self, problem: dict, rng: Random) -> str:
        target, numbers = problem["target"], tuple(sorted(problem["numbers"]))
        attempts = [(v, chain) for v, _, chain in countdown_attempts(numbers, self.operators, 99)]
        hits = [attempt for attempt in attempts if attempt[0] == target]
        value, chain = rng.choice(hits if hits and rng.random() < self.known else attempts)
        answer = chain.partition("=")[0]
        return f"{try_line(value, chain, target)}</think><answer>{answer}</answer>"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS[:2])
    args, out, seed = parse(parser)
    values = {}

    def measure(name: str, model: Path) -> None:
        flags = f"--model {model} --task {TASK} {MEASURE}"
        (row,) = run_script(out / f"{name}-passk", "nsr.py", *flags.split(), *seed)
        for k in (1, 4, 16, 64):
            values[f"{name}_pass_at_{k}"] = row[f"eval/pass@{k}"]
        for measured in ("entropy", "format", "completion_length"):
            values[f"{name}_{measured}"] = row[f"eval/{measured}"]

    run_script(out / "base", "sft.py", *BASE.split(), *seed)
    base = last_checkpoint(out / "base")
    measure("base", base)
    for method in args.methods:
        name = method.replace("-", "_")
        flags = f"--model {base} {LEARN} --mode {method}"
        rows = run_script(out / name, "nsr.py", *flags.split(), *seed)
        values[f"{name}_updates"] = rows[-1]["optimizer_steps"]
        first = rows[0]  # the first rollout is the base's
        for measured in ("accuracy", "entropy"):
            values[f"base_trained_{measured}"] = first[measured]
            values[f"{name}_60_trained_{measured}"] = mean(row[measured] for row in rows[-8:])
        for step in (20, 60):
            measure(f"{name}_{step}", out / name / f"step-{step:06d}")
    show_claims(values, CLAIMS if args.methods[:2] == METHODS[:2] else [])


if __name__ == "__main__":
    main()
