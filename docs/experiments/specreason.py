"""What specreason.py is measured against: controls, sweeps, predicted speed-ups, a base as judge.

A run writes the records and logs of specreason.py, on the same random numbers, with more ways to
answer each of the first --sweep_problems problems:

    draft           every step of the draft is kept
    threshold t     SpecReason at each of --thresholds
    coin            steps kept at random, as many as SpecReason kept of this problem
    oracle          a solver judges; the ceiling of any score
    hierarchical    SpecReason, and speculative decoding where the base writes

and afterwards a solver says which drafted steps were right. At the end stand the costs of single
passes and what they predict, and what the score knew:

    tokens per pass of the base = 1 + sum_k prod_i<=k alpha_i                                  (5)
    speed-up of speculative decoding = eq. 5 / (gamma c + v)                                   (6)
    speed-up of SpecReason           = s / (c s + v + (1 - a) s)

c is the cost of a token of the draft and v that of a pass over what was drafted, in tokens of the
base; s tokens make a step, a is the share kept. No gain is possible below a = c + v / s.

    python docs/experiments/specreason.py --seed 0
    python docs/experiments/specreason.py --tables out/A,out/B     # runs that lie there, again
    python docs/experiments/specreason.py --idle_layers 6 --eval_problems 2
    python docs/experiments/specreason.py --model tiny-judge --score digit --threshold 7

--idle_layers makes the base deeper and changes not one word. --score digit needs a base that was
taught what <score> asks for, as models/tiny-judge was, on the lines that

    python docs/experiments/specreason.py --grade out/drafted.jsonl --out out/steps.jsonl

makes of a draft's countdown answers (models/README.md has all commands).
"""

import copy
import json
import math
import os
import sys
import time
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
import torch
from torch import nn

import specreason
from more.tasks import countdown_attempts, try_line
from rewards import BadInput, Countdown, make_task, mean, read_json, read_jsonl
from specreason import Pair, Reader, checkpoints, compare, main, option, solve, write


@dataclass
class Config(specreason.Config):
    sweep_problems: int = option(20, "problems that are answered in every way", 1)
    thresholds: str = option("0.1,1,5", "thresholds of the sweep")
    brief: bool = option(False, "after these problems only the base and SpecReason answer")
    idle_layers: int = option(0, "layers added to the base that change its time and not one word")
    tables: str = option("", "only print the tables of these run folders (a,b)")
    grade: str = option("", "only write training lines for <score> of these answers to --out")


# ------------------------------------------------------------------------ ways to answer


def deepen(model, count: int) -> None:
    """Add layers whose outputs are zero: the same function at the cost of a deeper model."""
    for _ in range(count):
        layer = copy.deepcopy(model.model.layers[0])
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
        model.model.layers.append(layer)
    model.config["num_hidden_layers"] += count


def thresholds_of(cfg: Config) -> list[float]:
    try:
        return [float(text) for text in cfg.thresholds.split(",") if text]
    except ValueError:
        raise BadInput(f"--thresholds {cfg.thresholds}: 1,3,5 is the form") from None


class Experiment(Pair):
    """Base and draft, with controls, and a solver that looks on afterwards."""

    def __init__(self, cfg, base, draft, prompter):
        deepen(base, cfg.idle_layers)
        super().__init__(cfg, base, draft, prompter)
        if base.lm_head.weight.is_cpu and torch.get_num_threads() == 1:
            self.clock = time.process_time  # other work on the machine does not count
        self.thresholds = [t for t in thresholds_of(cfg) if t != cfg.threshold]
        if base.is_tiny:
            self.request = prompter.encode("<score>")
            if cfg.score == "digit" and not knows_score(self):
                raise BadInput(f"--score digit: {cfg.model} was not taught <score>; try tiny-judge")
        self.step_tokens = cfg.max_step_tokens // (3 if base.is_tiny else 4)
        self.costs = measure(self, (self.step_tokens, cfg.gamma + 1))

    def ways(self, number):
        ways = super().ways(number)
        if number >= self.cfg.sweep_problems:
            if self.cfg.brief:
                del ways["spec_decode"]
            return ways
        judged = ways["specreason"]
        ways["coin"] = judged | {"score": self.coin}  # first: it needs SpecReason's share
        ways["draft"] = {"score": always}
        for threshold in self.thresholds:
            ways[f"threshold {threshold:g}"] = judged | {"threshold": threshold}
        ways["hierarchical"] = judged | {"gamma": self.cfg.gamma}
        if isinstance(self.prompter.task, Countdown):
            ways["oracle"] = judged | {"score": self.oracle, "threshold": 1.0}
        return ways

    def answer(self, number, problem, score=None, **how):
        """As Pair.answer; in the record every mark of the score has the solver's word beside it."""
        self.problem, self.given = problem, self.prompter.encode(self.prompter.text(problem))
        done, steps, record = super().answer(number, problem, score, **how)
        if score == self.points:
            self.share = record["accepted"] / max(1, record["drafted"])
            text, marks = list(self.given), []
            for step in steps if isinstance(self.prompter.task, Countdown) else []:
                if step.score is not None:
                    cut = len(text) + len(step.drafted) == len(self.given) + self.cfg.max_new_tokens
                    right = None if cut else self.grade(text, step.drafted) > 0  # half a line
                    marks.append([step.score, right])
                text += step.tokens
            record["marks"] = marks or record["marks"]
        return done, steps, record

    def coin(self, base, text, step):
        return 9.0 if base.random.random(dtype=np.float32) < self.share else 0.0

    def oracle(self, base, text, step):
        return float(self.grade(text, step))

    def grade(self, text, step):
        """0 to 9 for a step, by a solver that knows the answer."""
        before = text[len(self.given) :]
        texts = [self.prompter.decode([i for i in t if i not in self.eos]) for t in (before, step)]
        return grade_step(self.prompter.task, self.problem, *texts)


def always(base, text, step) -> float:
    return 9.0


def grade_step(task: Countdown, problem: dict, before: str, step: str) -> int:
    """0 to 9 for the next line of a search, by a solver that knows the answer.

    9: right; 5: right, but tried before; 0: not a try of these numbers, wrongly worked out or
    compared, or a wrong answer. before: the lines above it.

    >>> problem = {"numbers": [2, 3], "target": 6}
    >>> steps = "2+3=5<6\\n", "3-2=1<6\\n", "2*3=5<6\\n"
    >>> [grade_step(Countdown(), problem, "3-2=1<6\\n", step) for step in steps]
    [9, 5, 0]
    """
    if "</think>" in step:
        return 9 if task.score(before + step, problem)["correct"] else 0
    target, line = problem["target"], step.removeprefix("wait")
    attempts = countdown_attempts(tuple(sorted(problem["numbers"])), task.operators, 99)
    if line not in [try_line(value, chain, target) for value, _, chain in attempts]:
        return 0
    known = [old.removeprefix("wait") + "\n" for old in before.split("\n")]
    return 5 if line in known else 9


@torch.inference_mode()
def knows_score(pair: Pair) -> bool:
    """Whether a tiny base was taught <score>: then a text ends after the digit."""
    text = pair.prompter.encode(pair.prompter.text(pair.prompter.task.problem("train", 0, 0)))
    models = pair.base, pair.draft
    base, draft = (Reader(m, pair.size, len(text) + 50, pair.cfg, (0, 0, 0, 0)) for m in models)
    text += write(draft, text, 48, pair.ends) + pair.request + pair.digits[9:]
    return float(base.read(text)[0].softmax(-1)[sorted(pair.eos)].sum()) > 0.5


# --------------------------------------------------------------------- predicted speed-ups


@torch.inference_mode()
def measure(pair: Pair, lengths: tuple[int, ...], repeats: int = 30) -> dict[str, float]:
    """Seconds, medians in turn: a token of base and of draft, a pass of the base over n tokens."""
    cfg, text = pair.cfg, pair.prompter.text(pair.prompter.task.problem("train", pair.cfg.seed, 0))
    half, text = 1 + cfg.max_new_tokens // 2, pair.prompter.encode(text)
    text = (text * (half // len(text) + 1))[:half]
    models = pair.base, pair.draft
    base, draft = (Reader(m, pair.size, len(text) + 1, cfg, (0, 0, 0, 0)) for m in models)

    def passing(n):
        base.forget(len(text) - n)
        base.probs(text, n)

    jobs = {"base": (write, base, text, 1, set()), "draft": (write, draft, text, 1, set())}
    for n in lengths:
        jobs[f"pass {n}"] = (passing, min(n, len(text)))
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, (job, *arguments) in jobs.items():
            began = pair.clock()
            job(*arguments)
            times[name].append(pair.clock() - began)
    return {name: float(np.median(values[1:] or values)) for name, values in times.items()}


def expected_tokens(alphas: list[float]) -> float:
    """Eq. 5 for a round of len(alphas) drafted tokens.

    >>> round(expected_tokens([0.8] * 4), 4), round(expected_tokens([0.9, 0.5, 0.8]), 2)
    (3.3616, 2.71)
    """
    return 1 + sum(math.prod(alphas[: k + 1]) for k in range(len(alphas)))


def decoding_speedup(alphas: list[float], c: float, v: float = 1.0) -> float:
    """Eq. 6 for speculative decoding."""
    return expected_tokens(alphas) / (len(alphas) * c + v)


def step_speedup(s: float, c: float, v: float, a: float) -> float:
    """Eq. 6 for SpecReason."""
    return s / (c * s + v + (1 - a) * s)


def predictions(metrics: dict[str, float], pair: Experiment) -> dict[str, float]:
    """Eq. 6 from single passes, and the share of kept steps above which SpecReason gains."""
    costs, s, gamma = pair.costs, pair.step_tokens, pair.cfg.gamma
    names = "draft", f"pass {s}", f"pass {gamma + 1}"
    c, v, passed = (costs[name] / costs["base"] for name in names)
    alphas = [metrics["eval/alpha/spec_decode"]] * gamma
    return {
        "c": c,
        "v of a step": v,
        "v of a round": passed,
        "step tokens": s,
        "break-even acceptance": c + v / s,
        "predicted specreason": step_speedup(s, c, v, metrics["eval/acceptance/specreason"]),
        "predicted spec_decode": decoding_speedup(alphas, c, passed),
    }


# -------------------------------------------------------------------- what the score knew


def auc(values: list[float], right: list[bool]) -> float:
    """How often a right step has the higher value of a pair, ties half; nan without both kinds.

    >>> auc([1, 5, 5, 9], [False, False, True, True])
    0.875
    """
    good = sorted(v for v, r in zip(values, right, strict=True) if r)
    bad = sorted(v for v, r in zip(values, right, strict=True) if not r)
    wins = sum(bisect_left(bad, v) + bisect_right(bad, v) for v in good) / 2
    return wins / (len(good) * len(bad)) if good and bad else math.nan


def tables(records: list[dict]) -> str:
    """The claims of docs/results.md: the gap's bound, and the score against the solver."""
    metrics = compare(records)
    gap, error = metrics["eval/gap/specreason"], metrics["eval/gap_se/specreason"]
    lines = [
        f"specreason: {100 * gap:+.1f} points, above {100 * (gap - 1.645 * error):+.1f} with 95 %",
        f"seconds of draft, score, base: {split(records, 'specreason')}",
    ]
    decoded = [record["spec_decode"] for record in records if "spec_decode" in record]
    passes = max(1, sum(row["rounds"] for row in decoded))
    per_pass = sum(row["tokens"] for row in decoded) / passes
    lines.append(f"spec_decode: {per_pass:.2f} tokens per pass of the base")
    points, right = marks_of(records)
    lines.append(f"area under the curve of the score: {auc(points, right):.3f}, {len(right)} steps")
    lines.append("   threshold    kept   right of the kept  right kept  wrong kept")
    for threshold in (0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 7, 9):
        kept = [u >= threshold for u in points]
        shares = (
            mean(kept),
            mean(r for r, k in zip(right, kept, strict=True) if k),
            mean(k for r, k in zip(right, kept, strict=True) if r),
            mean(k for r, k in zip(right, kept, strict=True) if not r),
        )
        widths = 8, 20, 12, 12
        cells = [f"{share:{width}.2f}" for share, width in zip(shares, widths, strict=True)]
        lines.append(f"{threshold:12g}" + "".join(cells))
    return "\n".join(lines)


def marks_of(records: list[dict]) -> tuple[list[float], list[bool]]:
    """u of SpecReason's drafted steps, and whether the solver calls them right."""
    marks = [mark for record in records for mark in record["specreason"]["marks"]]
    marks = [(points, right) for points, right in marks if right is not None]
    return [u for u, _ in marks], [r for _, r in marks]


def split(records: list[dict], way: str) -> str:
    rows, names = [record[way] for record in records], ("draft", "score", "base")
    return ", ".join(f"{mean(row[f'seconds_{name}'] for row in rows):.3f}" for name in names)


# ------------------------------------------------------------------------ lines for a judge


def graded_steps(answers: str, path: str, seed: int) -> None:
    """Make lines that teach <score> (sft.py --data) of a draft's countdown answers.

    Each step is a line, with a solver's grade as the completion. What stands before is what a
    perfect judge leaves of the steps before it, from a random one on.
    """
    task, rng, rows = make_task("countdown"), Random(f"graded {seed}"), []

    def read(answer):
        numbers, target = answer["prompt"].removesuffix("<think>").split("=")
        problem = {"numbers": [*map(int, numbers.split(","))], "target": int(target)}
        kept = []
        for step in answer["completion"].splitlines(keepends=True):
            before = "".join(kept[rng.randint(0, len(kept)) :])
            end = "<eos>" if "</answer>" in step else ""
            grade = grade_step(task, problem, before, step)
            asked = f"{answer['prompt']}{before}{step}{end}<score>"
            rows.append({"prompt": asked, "completion": str(grade)})
            if grade > 0:
                kept.append(step)

    read_jsonl(answers, read)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def experiment(cfg: Config) -> int:
    if cfg.grade:
        if not cfg.out:
            raise BadInput("--grade needs --out, the file to write")
        graded_steps(cfg.grade, cfg.out, cfg.seed)
        return 0
    if cfg.tables:
        folders = [Path(name) for name in cfg.tables.split(",")]
        records = [r for f in folders for r in read_json(newest(f) / "records.json")["records"]]
        print(tables(records), flush=True)
        return 0
    if not cfg.out and not cfg.resume:
        cfg.out = f"out/specreason-experiment-{cfg.seed}-{time.strftime('%y%m%d-%H%M%S')}"
    pairs = []

    def make_pair(*parts):
        pairs.append(Experiment(*parts))
        return pairs[0]

    code = solve(cfg, make_pair)
    if code == 0 and int(os.getenv("RANK", 0)) == 0:
        records = read_json(newest(Path(cfg.out or cfg.resume)) / "records.json")["records"]
        costs = {name: round(1000 * s, 2) for name, s in pairs[0].costs.items()}
        print(f"milliseconds: {costs}\n{tables(records)}", flush=True)
        predicted = predictions(compare(records), pairs[0])
        (Path(cfg.out or cfg.resume) / "predictions.json").write_text(json.dumps(predicted))
        for name, value in predicted.items():
            print(f"{name:24}{value:8.3f}", flush=True)
    return code


def newest(folder: Path) -> Path:
    if not checkpoints(folder):
        raise BadInput(f"{folder}: no records there")
    return checkpoints(folder)[-1]


if __name__ == "__main__":
    os._exit(main(experiment, Config))  # as the scripts: threads of gloo may abort sys.exit
