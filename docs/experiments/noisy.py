"""Wrong golds in verifiable data, and a filter against them (arXiv:2502.03373 sec. 5).

Web data has questions whose reference answers are partly wrong. The paper keeps a question where
one of two answers of a strong model is the reference, and trains on what is left. Here golds of
products are wrong, and the base makes the annotators' mistake itself: half of the traces that it
has learnt forget the last partial product, 39*79=39*70. GRPO then learns from these verdicts:

    clean     all golds are right
    random    a share is the product of another problem: nobody answers that
    near      the same share, at the same problems, is what the forgetful answer
    filtered  near, less the problems where none of two answers of a teacher is the gold

All see 256 problems in 16 steps; the filter has 512 to choose from. The teacher learnt to work
products out, and is what the base was before it learnt to forget.

    python docs/experiments/noisy.py --seed 0 --out out/noisy-0

CLAIMS were written before the runs of seeds 0, 1, 2; the shares, the base and the steps were chosen
on seed 100. Printed, too: how often the base answers each kind of wrong gold (hit), the share of
answers with signal, what the filter removes and loses, CPU seconds. A folder --out that holds a
finished part is gone on with.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import mean

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import sft  # noqa: E402
from docs.experiments.runs import (  # noqa: E402
    last_checkpoint,
    parse,
    parser_of,
    run_script,
    show_claims,
    write_jsonl,
)
from more.tasks import NoisyMultiplication  # noqa: E402
from rewards import in_groups  # noqa: E402

CLAIMS = [
    "clean - base >= 0.10",
    "abs(clean - random) <= 0.03",
    "clean - near >= 0.05",
    "filtered - near >= 0.02",
]
TASK = "docs/experiments/noisy.py:Forgetful:min_digits=2"
TEACHER = "--model tiny --task multiplication --steps 1600 --seed 100"
BASE = f"--task {TASK},noise=0,forget=0.5 --steps 150 --lr 1e-3 --warmup_steps 10"
LIMIT = "--max_new_tokens 64"
EVALUATION = f"--steps 0 {LIMIT} --eval_problems 400 --eval_samples 4"
POOL = 512  # problems to choose from; 16 steps see 256


@dataclass
class Forgetful(NoisyMultiplication):
    """Products whose traces may forget the last partial product, as the near golds do."""

    near: bool = True
    forget: float = 0.0  # share of such traces

    def trace(self, problem: dict, rng: Random) -> str:
        forgets = rng.random() < self.forget
        return super().trace(self.mistake(problem) if forgets else problem, rng)

    def describe(self, text: str, problem: dict) -> dict:
        """Whether the answer is that of the mistake."""
        return {"forgot": super().score(text, self.mistake(problem))["correct"]}


def answers_of(folder: str, problems: list[dict], samples: int, seed: int) -> list[list[str]]:
    """`samples` answers to each problem."""
    cfg = sft.Config(model=folder, seed=seed, device="cpu")
    run, model = sft.Run(cfg), sft.load_model(Path(folder), torch.device("cpu"))
    prompter = sft.Prompter(model, Forgetful(), chat=False)
    done = []
    for part in in_groups(list(enumerate(problems)), 64):
        done += sft.rollout(run, model, prompter, part, samples, 64, step=1)
    return [[c.score["answer"] for c in group] for group in in_groups(done, samples)]


def gold(problem: dict) -> str:
    scored = problem.get("scored_as", problem)
    return str(scored["a"] * scored["b"])


def is_wrong(problem: dict) -> bool:
    return gold(problem) != str(problem["a"] * problem["b"])


def make_golds(share: float, seed: int) -> dict[str, list[dict]]:
    """The same problems with right golds and with two kinds of wrong ones, at the same places."""
    golds = {}
    for name, noise, near in (("clean", 0, True), ("random", share, False), ("near", share, True)):
        task = Forgetful(noise=noise, near=near, min_digits=2)
        golds[name] = [task.problem("train", seed, i) for i in range(POOL)]
    return golds


def agreed(problems: list[dict], answers: list[list[str]]) -> list[dict]:
    """The problems whose gold is among a teacher's answers (sec. 5.1)."""
    return [x for x, found in zip(problems, answers, strict=True) if gold(x) in found]


def hits(base: str, golds: dict, seed: int) -> dict[str, float]:
    """How often the base answers the wrong golds of either kind."""
    wrong = [i for i, problem in enumerate(golds["near"]) if is_wrong(problem)][:100]
    answers = answers_of(base, [golds["clean"][i] for i in wrong], 8, seed)
    found = {}
    for name in ("random", "near"):
        pairs = zip(wrong, answers, strict=True)
        found[f"hit_{name}"] = mean(x.count(gold(golds[name][i])) / 8 for i, x in pairs)
    return found


def filter_counts(near: list[dict], left: list[dict]) -> dict[str, float]:
    wrong, wrong_left = sum(map(is_wrong, near)), sum(map(is_wrong, left))
    right_left = len(left) - wrong_left
    return {
        "noise": wrong / len(near),
        "removed_wrong": 1 - wrong_left / wrong,
        "lost_right": 1 - right_left / (len(near) - wrong),
        "noise_left": wrong_left / len(left),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--noise", type=float, default=0.5, help="share of wrong golds")
    parser.add_argument("--steps", default="16", help="of GRPO")
    parser.add_argument("--teacher", default="", help="checkpoint of sft.py, else it is trained")
    parser.add_argument("--arms", default="clean,random,near,filtered")
    args, out, seed = parse(parser)
    torch.set_num_threads(1)
    values = {}

    def evaluate(name: str, folder: str) -> None:
        flags = ["--model", folder, "--task", TASK, *EVALUATION.split(), *seed]
        [row] = run_script(out / f"{name}-after", "grpo.py", *flags)
        values[name] = row["eval/accuracy"]
        values[f"{name}_forgot"] = row["eval/forgot"]

    def learn(name: str, flags: str) -> str:
        run_script(out / name, "sft.py", *flags.split(), "--eval_problems", "0")
        return str(last_checkpoint(out / name))

    teacher = args.teacher or learn("teacher", TEACHER)
    base = learn("base", f"--model {teacher} {BASE} --seed {args.seed}")
    for name, folder in (("teacher", teacher), ("base", base)):
        evaluate(name, folder)
    golds = make_golds(args.noise, args.seed)
    values |= hits(base, golds, args.seed)
    golds["filtered"] = agreed(golds["near"], answers_of(teacher, golds["clean"], 2, args.seed + 1))
    values |= filter_counts(golds["near"], golds["filtered"])
    for arm in args.arms.split(","):
        path = out / f"{arm}.jsonl"
        write_jsonl(path, golds[arm])
        flags = ["--model", base, "--task", f"{TASK},kept={path}", "--steps", args.steps]
        flags += [*LIMIT.split(), "--eval_problems", "0", *seed]
        steps = run_script(out / arm, "grpo.py", *flags)
        values[f"{arm}_signal"] = mean(row["rows_trained"] for row in steps) / 256
        evaluate(arm, str(last_checkpoint(out / arm)))
    show_claims(values, CLAIMS)


if __name__ == "__main__":
    main()
    os._exit(0)
