"""Does the solver follow the template, and does the navigator learn to name a good one?

    python docs/experiments/reasonflux.py --seed S

Makes a solver from models/tiny with sft.py (300 steps, the command of models/README.md, this seed),
then runs more/reasonflux.py with it. On 200 held-out problems x 4 samples, at most 128 new tokens,
the same random numbers for all, the accuracy of

    true      the solver by a pattern that reaches the target, drawn at random among these
    random    the solver by one of the 16 patterns
    fixed     the solver by the one pattern that is best on 200 training problems
    sft       the solver by the navigator's plans before DPO
    after     the solver by the navigator's plans after DPO
    none      models/tiny, the plain search, cut so that its mean length is that of `after`
    none_128  models/tiny with 128 tokens

and plan_reward_sft, plan_reward_after: mean R (eq. 2) of the navigator's plans over X_sim. tokens_*
are mean lengths, se_* standard errors over problems, named_* shares of plans that name a template.

CLAIMS were written before the runs of seeds 0, 1, 2; the traces, learning rates, beta, a and numbers
of steps were chosen on seed 100.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)
from more import reasonflux as rf  # noqa: E402
from rewards import heldout, in_groups, make_task, mean  # noqa: E402

CLAIMS = [
    "true - random >= 0.20",
    "plan_reward_after - plan_reward_sft >= 0.05",
    "after - random >= 0.10",
]
SOLVER = "--model tiny --task patterns:guided=0.8 --steps 300 --lr 2e-3 --warmup_steps 20"
LIMIT, SAMPLES = 128, 4


def run_script(script: str, flags: str, out: Path) -> float:
    """Run a script of this repository; its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(f"{out}.log", "w") as log:
        command = [sys.executable, ROOT / script, *flags.split(), "--out", str(out)]
        subprocess.run(command, check=True, stdout=log, stderr=log)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Answering:
    """A frozen model that answers problems, each with a plan or without one."""

    def __init__(self, folder: Path, seed: int):
        cfg = rf.Config(seed=seed, max_new_tokens=LIMIT, device="cpu")
        self.run = rf.Run(cfg)
        self.model = rf.load_model(rf.resolve_model(str(folder))).requires_grad_(False)
        library = rf.read_library(cfg.library)
        self.guided = rf.Prompter(self.model, rf.Asked(PATTERNS, library, tiny=True), False)
        self.plain = rf.Prompter(self.model, PATTERNS, False)

    def answers(self, problems: list[dict], samples: int) -> list:
        prompter = self.guided if "plan" in problems[0] else self.plain
        numbered = list(enumerate(problems))
        return rf.rollout(self.run, self.model, prompter, numbered, samples, LIMIT, 0)


PATTERNS = make_task("patterns")


def describe(name: str, done: list) -> dict[str, float]:
    """Accuracy, its standard error over problems, mean length."""
    rates = [mean(c.score["correct"] for c in group) for group in in_groups(done, SAMPLES)]
    centre = mean(rates)
    variance = sum((x - centre) ** 2 for x in rates) / (len(rates) - 1)
    tokens = mean(len(c.tokens) for c in done)
    return {name: centre, f"se_{name}": (variance / len(rates)) ** 0.5, f"tokens_{name}": tokens}


def best_pattern(solver: Answering, seed: int) -> int:
    """The pattern by which the solver gets most of 200 training problems right."""
    problems = [PATTERNS.problem("train", seed, i) for i in range(10_000, 10_200)]
    rates = []
    for plan in range(16):
        done = solver.answers([problem | {"plan": plan} for problem in problems], 1)
        rates.append(mean(c.score["correct"] for c in done))
    return rates.index(max(rates))


def cut_to(done: list, tokens: float) -> dict[str, float]:
    """Accuracy and mean length under the largest limit whose mean length is at most `tokens`."""
    found = {}
    for limit in range(1, LIMIT + 1):
        length = mean(min(len(c.tokens), limit) for c in done)
        if length <= tokens:
            right = [c.score["correct"] and len(c.tokens) <= limit for c in done]
            found = {"none": mean(right), "tokens_none": length, "limit_none": limit}
    return found


def evaluations(folder: Path) -> dict[int, dict]:
    """What a run logged at each of its evaluations."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "eval/accuracy" in line}


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flags", default="", help="more flags of more/reasonflux.py, one word")
    parser.add_argument("--solver", default="", help="a solver that is there")
    parser.add_argument("--out", default="", help="folder of both runs")
    args = parser.parse_args()
    seed = f"--seed {args.seed}"
    out = Path(args.out or f"out/reasonflux-arms-{args.seed}-{time.strftime('%y%m%d-%H%M%S')}")
    out.mkdir(parents=True, exist_ok=True)
    result = {"seed": args.seed}
    folder = args.solver
    if not folder:
        flags = f"{SOLVER} {seed} --eval_problems 0"
        result["cpu_seconds_solver"] = run_script("sft.py", flags, out / "solver")
        folder = out / "solver" / "step-000300"

    solver = Answering(folder, args.seed)
    tiny = Answering("tiny", args.seed)
    rng = Random(args.seed)
    problems = heldout(PATTERNS, 200)
    fixed = best_pattern(solver, args.seed)
    plans = {
        "true": [rng.choice(PATTERNS.reaching(problem)) for problem in problems],
        "random": [rng.randrange(16) for _ in problems],
        "fixed": [fixed] * len(problems),
    }
    for name, chosen in plans.items():
        asked = [p | {"plan": plan} for p, plan in zip(problems, chosen, strict=True)]
        result |= describe(name, solver.answers(asked, SAMPLES))
    plain = tiny.answers(problems, SAMPLES)
    result |= describe("none_128", plain) | {"fixed_pattern": fixed}
    print(json.dumps(result), flush=True)

    flags = f"{seed} --solver {folder} --eval_samples {SAMPLES} {args.flags}"
    result["cpu_seconds"] = run_script("more/reasonflux.py", flags, out / "run")
    found = evaluations(out / "run")
    for name, step in (("sft", sorted(found)[1]), ("after", max(found))):
        row = found[step]
        result[name] = row["eval/accuracy"]
        result[f"se_{name}"] = row["eval/accuracy_se"]
        result[f"tokens_{name}"] = row["eval/completion_length"]
        for more in ("plan_reward", "named", "plan_entropy"):
            result[f"{more}_{name}"] = row[f"eval/{more}"]
    result |= cut_to(plain, result["tokens_after"])
    line = json.dumps({name: round(value, 4) for name, value in result.items()})
    print(line, flush=True)
    (out / "result.json").write_text(line)


if __name__ == "__main__":
    main()
