"""A base and a draft for which SpecReason's regime exists (arXiv:2504.07891).

In the paper a pass of the base costs many tokens of the draft, steps are kept in 38 to 80 of 100
cases, and nearly every answer ends. So here:

    task     countdown whose whole search fits: three numbers up to 20, + - *, sums and products
             written one way only: 16 tries are all there are in the mean, of which at least two
             are hits in the problems that are asked
    base     models/tiny-rl with 8 layers more, 14 in all, which learns these searches. The new
             layers start as the identity; at the end the model without them is asked as well
    draft    models/tiny-draft, which learns the searches and then the base's right answers

    python docs/experiments/deep_base.py --out out/deep --seed 0

makes both unless they are there, and answers the problems of a seed by
docs/experiments/specreason.py. What is printed is that of all seeds in --out, as in
docs/results/specreason_deep.json. Claims, written before the runs of seeds 0, 1, 2, are in CLAIMS;
threshold, depth and limits were settled on training problems (--task ...:Settling, seed 100).
"""

import json
import math
import re
import sys
from collections import defaultdict
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
    write_traces,
)
from docs.experiments.specreason import auc, compare, deepen, marks_of  # noqa: E402
from docs.results import verdict  # noqa: E402
from more.tasks import countdown_attempts, operations, try_line  # noqa: E402
from rewards import BadInput, Countdown, heldout, mean, read_json  # noqa: E402
from sft import load_model, save_model  # noqa: E402

TASK = "docs/experiments/deep_base.py:Searches"
ASKED = f"{TASK}:hits=2"
ADDED = 8  # layers
CLAIMS = [  # all but the first two by seed, too
    "gap_low >= -0.02",
    "problems >= 500",
    "speedup >= 1.3",
    "acceptance > 0.42",
    "c <= 0.2",
    "abs(token_speedup / predicted - 1) <= 0.2",
    "base >= 0.85",
    "base - draft >= 0.10",
    "sweep - coin >= 0.03",
    "auc >= 0.75",
    "without <= base - 0.3",
]
BASE = "--lr 1e-3 --micro_batch_tokens 2048 --warmup_steps 20 --save_every 100 --eval_problems 0"
DRAFT = "--steps 1200 --lr 2e-3 --eval_problems 0"
ANSWERS = "--sample 1600 --attempts 1 --temperature 0.6 --max_new_tokens 192 --seed 7"
DISTIL = "--steps 400 --lr 2e-3 --eval_problems 0 --seed 7"
ANSWERED = "--brief --threshold 1 --thresholds 0.3 --temperature 0.6 --max_new_tokens 384"
ANSWERED += " --max_step_tokens 42"


@dataclass
class Searches(Countdown):
    """Countdown with three numbers up to 20 and no division: 16 tries are all, in the mean.

    In its traces a sum or product has its larger number first, so that no try comes twice.
    """

    high: int = 20
    operators: str = "+-*"
    hits: int = 1  # tries that reach the target, at least

    def problem(self, split: str, seed: int, index: int) -> dict:
        for again in range(1000):
            problem = super().problem(split, seed, index + again * 10**6)
            attempts = plain_attempts(tuple(sorted(problem["numbers"])), self.operators)
            reached = [value for value, _, _ in attempts].count(problem["target"])
            if self.hits == 1 or reached >= self.hits:
                return problem
        raise BadInput(f"{self}: no such problem found")

    def trace(self, problem: dict, rng: Random) -> str:
        """Tries with the same first operation together, in random order, up to a hit.

        Half of the searches are seen from at most two tries before their end: so a hit is likely
        early on, and a model learns to look for one.
        """
        target = problem["target"]
        attempts = plain_attempts(tuple(sorted(problem["numbers"])), self.operators)
        rank = {}
        for first in sorted({first for _, first, _ in attempts}):
            rank[first] = rng.random()
        ordered = sorted((rank[first], rng.random(), v, chain) for v, first, chain in attempts)
        tries = [(value, chain) for _, _, value, chain in ordered]
        hits = [i for i, (value, _) in enumerate(tries) if value == target]
        end = hits[0] + 1 if hits else len(tries)
        start = 0 if rng.random() < 0.5 else max(0, end - 1 - rng.randint(0, 2))
        lines = [try_line(value, chain, target) for value, chain in tries[start:end]]
        answer = tries[end - 1][1].partition("=")[0]
        return f"{''.join(lines)}</think><answer>{answer}</answer>"


def plain_attempts(numbers: tuple[int, ...], operators: str) -> list[tuple]:
    """The attempts in which every sum and product has its larger number first.

    >>> [chain for _, _, chain in plain_attempts((2, 3), "-*")]
    ['3-2=1', '3*2=6']
    """
    return [a for a in countdown_attempts(numbers, operators, 99) if is_plain(a[2])]


def is_plain(chain: str) -> bool:
    for done, _ in operations(chain.partition("=")[0]):
        found = re.fullmatch(r"(\d+)[+*](\d+)", done)
        if found and int(found[1]) < int(found[2]):
            return False
    return True


@dataclass
class Settling(Searches):
    """The same with training problems where held-out ones are asked for: to settle a threshold."""

    def problem(self, split: str, seed: int, index: int) -> dict:
        return super().problem("train", seed, index)


# ---- base and draft


def make_models(out: Path) -> tuple[Path, Path]:
    """The folders of base and draft, which are made unless they are there."""
    if not (out / "start").exists():
        write_deeper(ROOT / "models/tiny-rl", out / "start", ADDED)
    flags = f"--model {out}/start --task {TASK} {BASE} --steps 500 --seed 0"
    run_script(out / "base-0", "sft.py", *flags.split())
    flags = f"--model {last_checkpoint(out / 'base-0')} --task {TASK} {BASE} --steps 400 --seed 1"
    run_script(out / "base", "sft.py", *flags.split())
    base = last_checkpoint(out / "base")
    flags = f"--model tiny-draft --task {TASK} {DRAFT}"
    run_script(out / "draft-0", "sft.py", *flags.split())
    flags = f"--model {base} --task {TASK} {ANSWERS}"
    write_traces(out / "answers.jsonl", *flags.split())
    start = last_checkpoint(out / "draft-0")
    flags = f"--model {start} --task {TASK} --data {out}/answers.jsonl {DISTIL}"
    run_script(out / "draft", "sft.py", *flags.split())
    return base, last_checkpoint(out / "draft")


def write_deeper(model: Path, folder: Path, layers: int) -> None:
    """A copy of a model with layers added that do nothing yet; fewer than none: without its last."""
    copied = load_model(model)
    deepen(copied, max(0, layers))
    if layers < 0:
        del copied.model.layers[layers:]
        copied.config["num_hidden_layers"] += layers
    save_model(copied, folder)


def accuracy(model: Path, run: Path) -> float:
    """Of a model alone, one answer to each of the 500 problems of seed 0."""
    flags = f"--model {model} --task {ASKED} --temperature 0.6 --max_new_tokens 384"
    flags += " --steps 0 --eval_samples 1 --eval_problems 500"
    return evaluations(run_script(run, "sft.py", *flags.split()))[-1]["eval/accuracy"]


# ---- what is measured


def figures(run: Path) -> dict[str, float]:
    """The values of a seed: over all its problems, and over those answered in every way."""
    records = read_json(last_checkpoint(run) / "records.json")["records"]
    found = read_json(run / "predictions.json")
    of_all, swept = compare(records), compare([r for r in records if "coin" in r])
    tokens, base_tokens = of_all["eval/tokens/specreason"], of_all["eval/tokens/base"]
    values = {
        "base": of_all["eval/accuracy/base"],
        "specreason": of_all["eval/accuracy/specreason"],
        "gap": of_all["eval/gap/specreason"],
        "gap_se": of_all["eval/gap_se/specreason"],
        "speedup": of_all["eval/speedup/specreason"],
        "token_speedup": of_all["eval/speedup/specreason"] * tokens / base_tokens,
        "predicted": found["predicted specreason"],
        "acceptance": of_all["eval/acceptance/specreason"],
        "break_even": found["break-even acceptance"],
        "c": seconds_a_token(swept, "draft") / seconds_a_token(swept, "base"),
        "v": found["v of a step"],
        "auc": auc(*marks_of(records)),
        "tokens": tokens,
        "base_tokens": base_tokens,
        "clipped": of_all["eval/clipped_ratio/specreason"],
        "base_clipped": of_all["eval/clipped_ratio/base"],
        "sweep": swept["eval/accuracy/specreason"],
        "sweep_base": swept["eval/accuracy/base"],
    }
    for way in ("draft", "coin", "oracle", "spec_decode", "hierarchical", "threshold 0.3"):
        name = "threshold_03" if way == "threshold 0.3" else way
        values[name] = swept[f"eval/accuracy/{way}"]
        values[f"{name}_speedup"] = swept[f"eval/speedup/{way}"]
        values[f"{name}_acceptance"] = swept[f"eval/acceptance/{way}"]
    return values


def seconds_a_token(metrics: dict[str, float], way: str) -> float:
    return metrics[f"eval/seconds_{way}/{way}"] / metrics[f"eval/tokens/{way}"]


def pooled(runs: dict[int, Path]) -> dict[str, float]:
    """The gap over the problems of all seeds, and its one-sided 95 % bound."""
    task, by_problem = Searches(hits=2), defaultdict(list)
    for seed, run in runs.items():
        records = read_json(last_checkpoint(run) / "records.json")["records"]
        for problem, record in zip(heldout(task, len(records), seed), records, strict=True):
            gap = record["specreason"]["accuracy"] - record["base"]["accuracy"]
            by_problem[task.key(problem)].append(gap)
    gap, error = mean_and_error(list(by_problem.values()))
    return {"pooled_gap": gap, "gap_low": gap - 1.645 * error, "problems": len(by_problem)}


def mean_and_error(groups: list[list[float]]) -> tuple[float, float]:
    """The mean of all values and its standard error, where groups are independent, not values.

    Seeds share problems, so answers to one problem stand in one group.

    >>> mean_and_error([[1.0], [0.0], [1.0], [0.0]]), mean_and_error([[1.0, 1.0], [0.0, 0.0]])
    ((0.5, 0.25), (0.5, 0.3535533905932738))
    """
    values = sum(groups, [])
    average = mean(values)
    squares = [sum(value - average for value in group) ** 2 for group in groups]
    return average, math.sqrt(sum(squares)) / len(values)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--problems", type=int, default=500, help="held-out problems of the seed")
    parser.add_argument("--sweep", type=int, default=60, help="of them answered in every way")
    args, out, seed = parse(parser)
    base, draft = make_models(out)
    write_deeper(base, out / "shallow", -ADDED)
    alone = {
        "draft_500": accuracy(draft, out / "alone"),
        "without": accuracy(out / "shallow", out / "without"),
    }
    flags = f"--model {base} --draft {draft} --task {ASKED} {ANSWERED}"
    flags += f" --eval_problems {args.problems} --sweep_problems {args.sweep}"
    run = out / f"seed-{args.seed}"
    if not (run / "predictions.json").exists():  # its last line is another one than run_script's
        run_script(run, "docs/experiments/specreason.py", *flags.split(), *seed)
    runs = {}
    for run in sorted(out.glob("seed-*/")):
        runs[int(run.name.removeprefix("seed-"))] = run
    rows = [figures(run) | pooled(runs) | alone for run in runs.values()]
    values = {name: [round(row[name], 4) for row in rows] for name in rows[0]}
    about = {"seeds": list(runs), "values": values}
    print(json.dumps(about, indent=2))
    for claim in CLAIMS:
        print(f"{verdict(claim, about):24}{claim}")


if __name__ == "__main__":
    main()
