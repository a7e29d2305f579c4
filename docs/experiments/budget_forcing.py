"""The baselines of s1 (arXiv:2501.19393), on the problems and random numbers of budget_forcing.py.

To the script's budgets (cap) and Waits (wait) this tool adds more lines of the same table:

    vote, best, any K   of the first K of --eval_samples answers under the largest budget: what most
                        say, what the likeliest says, whether one is right
    none, word N        the delimiter suppressed N times, with nothing or a random word appended
    reject M            thinking sampled again until it has at most M tokens, --tries times at most
    prompt M            the question asks for at most M tokens (--length_prompt), nothing is forced

    python docs/experiments/budget_forcing.py --seed 0
    python docs/experiments/budget_forcing.py --seed 0 --model tiny-rl

Both in four minutes on one thread; docs/results.md has three seeds of each.
"""

import math
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this folder has a file of that name
import budget_forcing as bf  # noqa: E402
from rewards import (  # noqa: E402
    BadInput,
    evaluate,
    expression_tokens,
    heldout,
    in_groups,
    make_task,
    parse_expression,
    to_postfix,
)


@dataclass
class Config(bf.Config):
    eval_samples: int = bf.option(4, "answers per problem that vote", 1)
    word_str: str = bf.option("", "random word in place of Wait, none: z or Table by size")
    tries: int = bf.option(16, "samples per problem in rejection sampling", 1)
    length_prompt: bool = bf.option(False, "also ask for at most M tokens, without forcing")


BY_SIZE = bf.BY_SIZE | {"word_str": ("z", "Table", "Table")}


def settings(cfg: Config) -> list[tuple]:
    """(side, value, limits) of every row of the table; no limits where answers are reused."""
    plan = bf.settings(cfg)
    caps = [(side, cap, limits) for side, cap, limits in plan if side == "cap"]
    waits = [(side, n, limits) for side, n, limits in plan if side == "wait"]
    powers = [2**i for i in range(1, cfg.eval_samples.bit_length())]
    pools = [(side, k, {}) for side in ("vote", "best", "any") for k in powers]
    _, n, limits = waits[0]  # the controls run once
    controls = [("none", n, limits | {"wait": ""}), ("word", n, limits | {"wait": cfg.word_str})]
    tries = [("reject", cap, limits | {"tries": cfg.tries}) for _, cap, limits in caps[1:-1]]
    prompts = [("prompt", cap, caps[-1][2]) for _, cap, _ in caps if cfg.length_prompt]
    return caps + pools + waits + controls + tries + prompts


# ----------------------------------------------------- one answer out of several


def vote(answers: list, scores: list[float] | None = None):
    """The answer with the largest sum of scores (none: the most frequent), the first of equals.

    >>> vote(["5", "6", "6", "5", None]), vote(["4", "4", "9"], [0.1, 0.1, 0.9])
    ('5', '9')
    """
    sums = Counter()
    for answer, score in zip(answers, scores or [1] * len(answers), strict=True):
        if answer is not None:
            sums[answer] += score
    return max(sums, key=sums.get, default=None)


def best_of_n(answers: list, scores: list[float]):
    """The answer with the highest score, the first of equals; None is passed over."""
    best, highest = None, -math.inf
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None and score > highest:
            best, highest = answer, score
    return best


def pooled(side: str, k: int, natural: list[dict], samples: int) -> list[dict]:
    """The first k answers to each problem as one record."""
    records = []
    for group in in_groups(natural, samples):
        some = group[:k]
        answers, right = [r["answer"] for r in some], {r["answer"] for r in some if r["correct"]}
        chosen = vote(answers)
        if side != "vote":
            chosen = best_of_n(answers, [r["score"] for r in some])
        record = some[0] | {"correct": chosen in right, "answered": chosen is not None}
        if side == "any":
            record["correct"] = len(right) > 0
        for name in ("thinking", "sampled", "waits"):
            record[name] = sum(r[name] for r in some)
        records.append(record)
    return records


def canonical_expression(text: str) -> str | None:
    """A key that expressions share which differ only in order and grouping of sums and products.

    None for what `parse_expression` refuses. On countdown a vote over spellings would mean nothing:
    each answer has many.

    >>> canonical_expression("(7+2)-5") == canonical_expression("7-(5-2)")
    True
    >>> canonical_expression("7-(5-2)*1") == canonical_expression("7 + 1*(2-5)")
    False
    """

    def parts(kind: str, node: tuple, sign: int) -> list[tuple]:
        """The terms of a sum, or the factors of a product, each with its sign or exponent."""
        return [(sign * s, n) for s, n in node[1]] if node[0] == kind else [(sign, node)]

    def joined(kind: str, sign: int):
        def join(a: tuple, b: tuple) -> tuple:
            return kind, sorted(parts(kind, a, 1) + parts(kind, b, sign), key=repr)

        return join

    def negated(a: tuple) -> tuple:
        return "+", sorted(parts("+", a, -1), key=repr)

    def itself(a: tuple) -> tuple:
        return a

    def numeral(token: str) -> tuple:
        return "n", token

    operations = {"+": joined("+", 1), "-": joined("+", -1), "pos": itself, "neg": negated}
    operations |= {"*": joined("*", 1), "/": joined("*", -1)}
    try:
        parse_expression(text)
    except ValueError:
        return None
    return repr(evaluate(to_postfix(expression_tokens(text)), operations, numeral))


# --------------------------------------------------------------- other sampling


class Rejected(bf.Row):
    """Thinking that is sampled again from the start while it is longer than M, delimiter included.

    Source: simplescaling/s1: lm_eval/models/vllm_causallms.py, which samples at most M + 1 tokens.
    """

    def __init__(self, prompt, rules):
        super().__init__(prompt, rules)
        self.rounds[0].max_tokens += 1

    def end_round(self, at, shared):
        limit, now = self.rules.max_thinking, self.rounds[-1]
        if len(now.emitted) <= limit:
            return super().end_round(at, shared)
        self.cut(self.start)
        self.done = len(self.rounds) == self.rules.tries
        if not self.done:
            self.rounds.append(bf.Round(now.max_tokens, 0))

    def record(self):
        if self.thinking:  # given up
            last = {"thinking": len(self.rounds[-1].emitted), "filled": False, "answered": False}
            return super().record() | last | {"score": 0.0}
        return super().record() | {"thinking": len(self.rounds[-2].emitted)}


class Asking:
    """A task whose question asks for a length (the paper's token-conditional control)."""

    def __init__(self, task, tokens):
        self.task, self.tokens, self.score = task, tokens, task.score

    def question(self, problem):
        return f"{self.task.question(problem)} Think for up to {self.tokens} tokens."


def complete(run, model, prompter, side: str, value: int, limits: dict, asked: list) -> tuple:
    """Records and completions of one setting."""
    cfg, limits, kind = run.cfg, dict(limits), bf.Row
    if side == "prompt":
        prompter = bf.Prompter(model, Asking(prompter.task, value), cfg.chat)
    tries = limits.pop("tries", 0)
    rules = bf.make_rules(cfg, prompter, model, **limits)
    if side == "reject":
        kind, rules.tries = Rejected, tries
        rules.room += tries * (rules.max_thinking + 1)  # random numbers of all tries
    records, done = bf.complete(run, model, prompter, rules, asked, kind)
    for record in records:
        if "numbers" in asked[0][2]:  # countdown
            record["answer"] = canonical_expression(record["answer"] or "")
    return records, done


def solve(cfg: Config) -> int:
    """As the script's, with more settings, and several answers under the largest budget."""
    run = bf.Answers(cfg)
    model, sampler = run.load(BY_SIZE)
    if cfg.length_prompt and model.is_tiny:
        raise BadInput(f"--length_prompt: {cfg.model} was taught no words for a length")
    run.plan = plan = settings(cfg)
    cfg.steps = len(plan)
    task = make_task(cfg.task, cfg.data, natural=not model.is_tiny)
    prompter = bf.Prompter(model, task, cfg.chat)
    state = run.start(model, None, prompter)
    problems = list(enumerate(heldout(task, cfg.eval_problems)))
    largest, natural, table = bf.numbers(cfg.caps, "caps")[-1], [], []

    for step, (side, value, limits) in enumerate(plan, 1):
        setting, began, done = [cfg.model, side, value, limits], time.time(), []
        whole = side == "cap" and value == largest  # what all that follows is compared with
        samples = cfg.eval_samples if whole else 1
        if step <= state["step"]:
            records = state["records"][step - 1]
        elif not limits:
            records = pooled(side, value, natural, cfg.eval_samples)
        else:
            asked = [(n, i, problem) for n, problem in problems for i in range(samples)]
            records, done = complete(run, sampler, prompter, side, value, limits, asked)
        found = bf.outcome(records[::samples], natural[:: cfg.eval_samples])
        table.append((side, value, found))
        if whole:
            natural = records
        if step > state["step"]:
            metrics = bf.named(found, cfg.model, side)
            if done:
                seconds = time.time() - began
                metrics["tokens_per_s"] = sum(r["sampled"] for r in records) / seconds
            run.log(step, metrics, list(metrics)[:2])
            run.keep_samples(step, prompter, done[:2], [0.0, 0.0])
            if run.after_step(step, setting, records):
                return run.report(sampler, prompter)  # Ctrl-C
    run.say(f"{bf.table_of(table)}\n{run.folder} holds records and samples")
    return 0


if __name__ == "__main__":
    bf.__doc__ = __doc__  # what --help shows
    os._exit(bf.main(solve, Config))  # as the scripts: threads of gloo may abort sys.exit
