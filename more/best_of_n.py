"""Test-time compute: draw many answers and choose one, or search for it step by step
(arXiv:2408.03314, 2502.06703; the code's models are Hugging Face's search-and-learn).

Of n answers the commonest may be right where a single one is not; a verifier that scores answers
points at one, weighs the votes or, scoring steps, prunes what goes wrong.

    r_n  = last, min, prod or mean of the scores of the steps of answer n                  (1)
    best = argmax_n r_n                                          the first of equals       (2)
    vote = argmax_a sum_{n: a_n = a} w_n     w = 1: majority; w = r, positive: weighted    (3)
    beam: n rows; each round each writes a step; the n/m with the highest r stay; those    (4)
          that ended leave with their answer, each of the others goes on m times
    dvts: n/m trees of m rows, each a beam of its own: diverse, as no tree wins them all   (5)
    optimal: for each bin of difficulty the way that is best on other problems, within     (6)
          a budget of tokens

Tokens are counted as drawn, of pruned rows too. Likelihood needs no verifier.
Bounds: rule, the verdict (pass@n), and shuffled, another answer's likelihood.

Run
    python more/best_of_n.py  # two CPU cores, no network, minutes
    python more/best_of_n.py --verifier out/rm/step-000046  # by more/reward_model.py
    python more/best_of_n.py --search both --score model --verifier FOLDER
    python more/best_of_n.py --model Qwen2.5-1.5B --task gsm8k --data FILE  # one GPU

Expect
    Seeds 0, 1, 2: one answer 0.622; of 16 the
    commonest 0.948, weighted by likelihood 0.972,
    the likeliest 0.853, a random one 0.593.
    0.7 CPU seconds a problem.

Differs from the papers in: n/m rows stay whether they ended or not, so that a search ends
(search-and-learn fills the places of those that ended); what did not end has no vote.

Legend: B rows, P prompts, T tokens, V vocabulary, C hidden size; the others as in grpo.py.
"""

import argparse
import copy
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from operator import attrgetter, itemgetter
from pathlib import Path
from random import Random
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # rewards.py is one folder up

from rewards import (
    BadInput,
    Completion,
    describe_evaluation,
    fill_template,
    heldout,
    in_groups,
    make_task,
    mean,
    micro_batches,
    open_thinking,
    plain_number,
    prompt,
    read_json,
    reading,
    resolve_model,
    trim_log,
)


def option(default, help: str, least: float = 0):
    """A setting: its default, its help, the least number allowed."""
    return field(default=default, metadata={"help": help, "least": least})


@dataclass
class Config:
    model: str = option("tiny-rl", "one of models/, a folder, a hub name")
    task: str = option("countdown", "gsm8k, math, FILE.py:Class :knob=1")
    data: str = option("", "JSONL file of the problems (gsm8k, math)")
    chat: bool = option(False, "use the model's chat template")
    max_new_tokens: int = option(0, "longest answer, 0: by size")
    max_step_tokens: int = option(0, "longest step of a search, 0: by size")
    temperature: float = option(0.0, "of sampling, 0: by size")
    eval_problems: int = option(200, "held-out problems", 2)
    N: int = option(16, "answers to each, rows of a search", 2)
    probe: int = option(8, "more answers, to tell how hard it is", 1)
    save_every: int = option(40, "problems between checkpoints", 1)
    seed: int = option(0, "seed of problems and sampling")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "auto: cuda if any")
    out: str = option("", "run folder, default out/SCRIPT-TASK-SEED-TIME")
    resume: str = option("", "run folder to go on with")
    search: Literal["none", "beam", "dvts", "both"] = option("none", "eq. 4, 5")
    width: int = option(4, "m of eq. 4 and 5", 1)
    score: Literal["likelihood", "model", "random"] = option("likelihood", "r of a search")
    reduce: Literal["last", "min", "prod", "mean"] = option("last", "eq. 1, of --verifier")
    verifier: str = option("", "checkpoint of reward_model.py")


BY_SIZE = {  # below 10 M parameters, below 1 B, above
    "max_new_tokens": (320, 512, 2048),
    "max_step_tokens": (48, 256, 512),
    "temperature": (1.0, 0.8, 0.8),
}
BINS = {"easy": 0.5, "medium": 0.1, "hard": 0.0}  # least share of right answers
WAYS = {  # the score that picks an answer (eq. 2), or is its vote (eq. 3)
    "majority": "one",
    "vote_likelihood": "likelihood",
    "vote_model": "model",
    "vote_shuffled": "shuffled",
    "best_likelihood": "likelihood",  # exp(mean log p) of a token
    "best_sum": "sum",  # log p of all: long ones have less
    "best_shortest": "shortest",
    "best_model": "model",
    "best_shuffled": "shuffled",
    "best_rule": "rule",
}
BOUNDS = "best_rule", "best_shuffled", "vote_shuffled"


# ---- choosing among answers


def reduce_scores(scores: list[float], how: str) -> float:
    """Eq. 1: one number for the scores of an answer's steps."""
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"scores {scores}")  # NaN would win or lose unseen
    last = itemgetter(-1)
    return {"last": last, "min": min, "prod": math.prod, "mean": mean}[how](scores)


def best(scores: list[float]) -> int:
    """Eq. 2: the number of the highest score, the first of equals."""
    return scores.index(max(scores))


def vote(answers: list[str | None], weights: list[float]) -> str | None:
    """Eq. 3: the answer with the most weight, the first seen of equals; None is none.

    >>> vote(["7", "8", None, "7"], [0.2, 0.5, 9.0, 0.2])
    '8'
    """
    sums: dict[str, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            sums[answer] = sums.get(answer, 0.0) + weight
    return max(sums, key=sums.__getitem__, default=None)


def canonical(answer: str | None) -> str | None:
    """Equal texts of equal answers: a number's value, or no spaces.

    >>> canonical("$1,080.50"), canonical("2 * (3 + 4)")
    ('2161/2', '2*(3+4)')
    """
    if answer is None:
        return None
    value = plain_number(answer)
    return "".join(answer.split()) if value is None else str(value)


def is_right(answers: list[dict], way: str) -> float:
    """1 if the answer that a way of WAYS takes is right, else 0."""
    scores = [answer["score"][WAYS[way]] for answer in answers]
    texts, number = [answer["answer"] for answer in answers], best(scores)
    if not way.startswith("best"):
        found = vote(texts, scores)
        number = texts.index(found)  # None: nobody votes, and the first is no answer
    return answers[number]["score"]["rule"]


# ---- the verifier


class Verifier:
    """Scores of answers, whole or not: likelihood, or a reward model's."""

    def __init__(self, run: "Run", model: "Model", prompter: "Prompter"):
        self.cfg, self.prompter, self.model, self.closed = run.cfg, prompter, None, {}
        line, size = "\n" if model.is_tiny else "\n\n", model.config["vocab_size"]
        self.delimiters = [i for i in range(size) if line in prompter.decode([i])]
        if not run.cfg.verifier:
            return
        folder = resolve_model(run.cfg.verifier)
        self.model = load_model(folder, run.device).to(run.dtype)
        if self.model.tokenizer.get_vocab() != model.tokenizer.get_vocab():
            raise BadInput(f"--verifier {folder} has another tokenizer")
        path = folder / "value_head.safetensors"  # by reward_model.py
        with reading(path):
            tensors, about = load_file(path), read_json(path.with_suffix(".json"))
            self.head = nn.Linear(self.model.config["hidden_size"], 1).to(run.device)
            tensors = {name.removeprefix("summary."): x for name, x in tensors.items()}
            self.head.load_state_dict(tensors)
        if about["kind"] == "process":  # learnt without an end token
            self.closed = dict.fromkeys(model.eos_ids, prompter.encode(line)[-1])
        if run.cfg.reduce != "last" and not self.closed:
            raise BadInput(f"--reduce {run.cfg.reduce}: {folder} does not score steps")

    @torch.inference_mode()
    def rate(self, rows: list[tuple[list[int], list[int]]]) -> list[float]:
        """r of each (prompt, tokens) by the reward model, 0 to 1."""
        scores, device = [0.0] * len(rows), self.head.weight.device
        texts = [x + [self.closed.get(i, i) for i in y] for x, y in rows]
        for batch in micro_batches(list(map(len, texts)), 4096):
            hidden = self.model(pad_rows([texts[i] for i in batch], device, torch.long))
            for k, i in enumerate(batch):  # hidden: (B, T, C)
                text, last = texts[i], len(texts[i]) - 1
                ends = [at for at in range(len(rows[i][0]), last) if text[at] in self.delimiters]
                ends = [*ends, last] if self.closed else [last]
                steps = self.head(hidden[k, ends].float())[:, 0].sigmoid()
                scores[i] = reduce_scores(steps.tolist(), self.cfg.reduce)
        return scores

    def scores(self, group: list[Completion]) -> list[dict[str, float]]:
        """Every score of the answers to a problem."""
        found = []
        for c in group:
            score = {"one": 1.0, "likelihood": math.exp(mean(c.logprobs)), "sum": sum(c.logprobs)}
            found.append(score | {"shortest": -len(c.tokens), "rule": float(c.score["correct"])})
        order = Random(f"{self.cfg.seed} {group[0].number}").sample(found, len(found))
        for score, other in zip(found, order, strict=True):
            score["shuffled"] = other["likelihood"]
        if self.model:
            rated = self.rate([(c.prompt, c.tokens) for c in group])
            for score, r in zip(found, rated, strict=True):
                score["model"] = r
        return found

    def rate_steps(self, rows: list[Completion]) -> list[float]:
        """r of the rows of a search by --score, from what they have written so far."""
        if self.cfg.score == "model":
            return self.rate([(row.prompt, row.tokens) for row in rows])
        if self.cfg.score == "random":
            return [Random(f"{self.cfg.seed} {row.number} {row.tokens}").random() for row in rows]
        return [math.exp(mean(row.logprobs)) for row in rows]


# ---- search


def write_steps(s: "Decoding", delimiters: Tensor, longest: int, began: Tensor) -> None:
    """Each live row writes a step: from `began` (B,) tokens to a delimiter, end or limit.

    A row that waits runs along; what it drew is taken back, to be drawn again. The last
    column of tokens is for that.
    """
    limit = s.tokens.shape[1] - 1
    while True:
        stepped = (s.last == delimiters).any(-1) & (s.count > began)
        waits = s.finished[s.rows] | stepped | (s.count >= limit) | (s.count >= began + longest)
        if waits.all():
            return
        last, finished = s.last.clone(), s.finished.clone()
        s.cache.width = int(s.cache.lengths.max()) + 1
        s.step()
        s.count[waits] -= 1
        s.cache.lengths[waits] -= 1
        s.last[waits] = last[waits]
        s.finished[s.rows[waits]] = finished[s.rows[waits]]


def survivors(scores: list[float], trees: list[int], places: list[int]) -> list[int]:
    """Eq. 4, 5: the best rows of each tree, as many as it has places."""
    kept = []
    for tree in dict.fromkeys(trees):
        rows = [i for i, other in enumerate(trees) if other == tree]
        rows.sort(key=scores.__getitem__, reverse=True)  # stable: the first of equals
        kept += rows[: places[tree]]
    return sorted(kept)


def go_on(s: "Decoding", kept: list[int], size: int, width: int) -> None:
    """Copy each kept row, with its cache, to m places of its tree: its own and free ones.

    A place has its random numbers: copies go different ways.
    """
    slots = s.rows.tolist()
    pairs, taken = [(slots[i], i) for i in kept], {slots[i] for i in kept}
    for i in kept:
        first = slots[i] // size * size
        free = [slot for slot in range(first, first + size) if slot not in taken]
        pairs += [(slot, i) for slot in free[: width - 1]]
        taken.update(free[: width - 1])
    pairs = torch.tensor(sorted(pairs), dtype=torch.long, device=s.rows.device)
    places, rows = pairs.view(-1, 2).T
    s.tokens[places], s.logprobs[places] = s.tokens[s.rows[rows]], s.logprobs[s.rows[rows]]
    s.finished[places] = False
    s.rows, s.last, s.count = places, s.last[rows], s.count[rows]
    s.cache.select(rows)


def read_rows(s: "Decoding", asked: list[tuple], prompter: "Prompter", n: int) -> list[Completion]:
    """What the live rows have written; asked: (number, problem, prompt)."""
    rows = []
    for slot, count in zip(s.rows.tolist(), s.count.tolist(), strict=True):
        tokens, finished = s.tokens[slot, :count].tolist(), bool(s.finished[slot])
        text = prompter.decode(tokens[:-1] if finished else tokens)
        finished |= any(word in text for word in prompter.stops)
        logprobs = s.logprobs[slot, :count].tolist()
        rows.append(Completion(*asked[slot // n], tokens, logprobs, finished, text, {}))
    return rows


@torch.inference_mode()
def search(model: "Model", verifier: Verifier, problems: list[tuple], method: str) -> list[dict]:
    """Eq. 4 or 5 for some (number, problem); what came of each."""
    cfg, prompter, limit = verifier.cfg, verifier.prompter, verifier.cfg.max_new_tokens
    size = cfg.N if method == "beam" else cfg.width  # rows of a tree
    asked = [(i, problem, prompter.encode(prompter.text(problem))) for i, problem in problems]
    pairs = [(i, slot) for i, _ in problems for slot in range(cfg.N)]
    u = np.stack([row_uniforms(cfg.seed, 0, *pair, limit + 1) for pair in pairs])
    s = Decoding(model, [ids for *_, ids in asked], torch.tensor(u), cfg.temperature)
    s.count = s.count.repeat(len(pairs))  # of each row
    delimiters = torch.tensor(verifier.delimiters, device=s.rows.device)
    places, began = [size // cfg.width] * (len(pairs) // size), torch.zeros_like(s.count)
    ended, drawn = [[] for _ in problems], [0] * len(problems)
    while len(s.rows):
        write_steps(s, delimiters, cfg.max_step_tokens, began)
        slots, rows = s.rows.tolist(), read_rows(s, asked, prompter, cfg.N)
        for slot, new in zip(slots, (s.count - began).tolist(), strict=True):
            drawn[slot // cfg.N] += new  # of rows that are pruned, too
        scores = verifier.rate_steps(rows)
        kept = survivors(scores, [slot // size for slot in slots], places)
        over = [row.finished or len(row.tokens) >= limit for row in rows]
        for i, row in enumerate(rows):
            if over[i]:
                ended[slots[i] // cfg.N].append((row, scores[i]))
            if over[i] and i in kept:
                places[slots[i] // size] -= 1  # so that a search ends
        go_on(s, [i for i in kept if not over[i]], size, cfg.width)
        began = s.count.clone()
    return [describe_search(prompter.task, *x) for x in zip(ended, drawn, strict=True)]


def describe_search(task, ended: list[tuple], drawn: int) -> dict:
    """The best of (row, score) and a weighted vote, of those that ended."""
    rows = []
    for row, r in ended:
        if not row.finished:
            continue
        score = task.score(row.text, row.problem)
        scores = {"likelihood": r, "rule": float(score["correct"])}
        rows.append({"answer": canonical(score["answer"]), "score": scores})
    record = {"tokens": drawn, "answers": len(rows)}
    for name in ("best", "vote"):
        record[name] = is_right(rows, f"{name}_likelihood") if rows else 0.0
    return record


# ---- the comparison


def keep_answers(verifier: Verifier, group: list[Completion]) -> list[dict]:
    """The records of answers; what did not end has no vote."""
    rows = []
    for c, score in zip(group, verifier.scores(group), strict=True):
        answer = canonical(c.score["answer"]) if c.finished else None
        row = {"tokens": len(c.tokens), "finished": c.finished}
        rows.append(row | {"answer": answer, "score": score})
    return rows


def outcomes(record: dict, n: int) -> dict[str, tuple[float, float]]:
    """Of each way on a problem, {way@N: (accuracy, tokens)}, N = 1, 2, 4 .. n.

    There are n/N sets of N answers, and each counts.
    """
    answers, found = record["answers"], {}
    spent = mean(answer["tokens"] for answer in answers)
    for way in [way for way, name in WAYS.items() if name in answers[0]["score"]]:
        for size in [2**power for power in range(n.bit_length())]:
            groups = in_groups(answers, size)[: n // size]
            found[f"{way}@{size}"] = mean(is_right(x, way) for x in groups), size * spent
    for method in [name for name in ("beam", "dvts") if name in record]:
        for name in ("best", "vote"):
            spent = record[method]["tokens"]
            found[f"{method}_{name}@{n}"] = record[method][name], spent
    return found


def optimal(dev: list[tuple], test: list[tuple], budget: float) -> tuple[float, float]:
    """Eq. 6: accuracy on `test`, (bin, outcomes) each, of the best way of each bin of `dev`.

    And of the one way that is best in all of `dev`, which has to be beaten.
    """
    ways = [way for way in dev[0][1] if not way.startswith(BOUNDS)]
    ways = [way for way in ways if mean(row[way][1] for _, row in dev) <= budget]

    def best_way(bins):
        rows = [row for name, row in dev if name in bins]
        return ways[best([mean(row[way][0] for row in rows) for way in ways])]

    single = best_way(BINS)
    plan = {name: best_way([name]) for name in {name for name, _ in dev}}
    each = mean(row[plan.get(name, single)][0] for name, row in test)
    return each, mean(row[single][0] for _, row in test)


def compare_ways(records: list[dict], n: int) -> dict[str, float]:
    """Accuracy and tokens of each way, in all and in each bin; eq. 6."""
    rows = []
    for record in records:  # a bin is told by answers drawn for this alone
        name = next(name for name, least in BINS.items() if record["share"] >= least)
        rows.append((name, outcomes(record, n)))
    metrics = {f"eval/problems/{name}": sum(x == name for x, _ in rows) for name in BINS}
    for way in rows[0][1]:
        metrics[f"eval/accuracy/{way}"] = mean(row[way][0] for _, row in rows)
        metrics[f"eval/tokens/{way}"] = mean(row[way][1] for _, row in rows)
        for name in BINS:
            some = [row[way][0] for found, row in rows if found == name]
            metrics[f"eval/accuracy/{way}/{name}"] = mean(some)
    for size in [2**power for power in range(n.bit_length())]:
        if len(rows) > 1:  # half of them decide for the others
            budget = mean(row[f"majority@{size}"][1] for _, row in rows[::2])
            both = optimal(rows[::2], rows[1::2], budget)
            metrics[f"eval/optimal@{size}"], metrics[f"eval/single@{size}"] = both
    for part in records[0]["seconds"]:
        metrics[f"eval/seconds/{part}"] = mean(record["seconds"][part] for record in records)
    return metrics


def check_flags(cfg: Config) -> None:
    if cfg.N % cfg.width and cfg.search != "none":
        raise BadInput(f"--N {cfg.N} is no multiple of --width {cfg.width}")
    if not cfg.verifier and (cfg.score == "model" or cfg.reduce != "last"):
        raise BadInput("--score model and --reduce need --verifier FOLDER")


def solve(cfg: Config, kind: type = Verifier) -> int:
    """Some problems after the other: sample, score, search. Then compare."""
    check_flags(cfg)
    run = Selection(cfg)  # see the end
    model = run.load(BY_SIZE)[1]
    task = make_task(cfg.task, cfg.data, natural=not model.is_tiny)
    prompter = Prompter(model, task, cfg.chat)
    verifier = kind(run, model, prompter)
    problems = list(enumerate(heldout(task, cfg.eval_problems, cfg.seed)))
    methods = [name for name in ("beam", "dvts") if cfg.search in (name, "both")]
    cfg.steps, size = len(problems), cfg.N + cfg.probe  # steps: what run.log counts
    records = run.start(model, None, prompter).get("records", [])
    while len(records) < len(problems):
        some = problems[len(records) : len(records) + cfg.save_every]
        clock = [time.process_time()]
        done = rollout(run, model, prompter, some, size, cfg.max_new_tokens, 0)
        clock.append(time.process_time())
        groups, found = in_groups(done, size), []
        for group in groups:
            share = mean(c.score["correct"] for c in group[cfg.N :])
            found.append({"share": share, "answers": keep_answers(verifier, group[: cfg.N])})
        clock.append(time.process_time())
        for method in methods:
            ways = run.spread(model, verifier, some, method)
            for record, outcome in zip(found, ways, strict=True):
                record[method] = outcome
            clock.append(time.process_time())
        spent = [(b - a) / len(found) for a, b in zip(clock, clock[1:], strict=False)]
        for record in found:
            record["seconds"] = dict(zip(["sample", "score", *methods], spent, strict=True))
        records += found
        run.save(records)
        shown = [f"eval/accuracy/{way}@{cfg.N}" for way in ("majority", "best_rule")]
        run.log(len(records), compare_ways(records, cfg.N), shown)
        run.keep_samples(len(records), prompter, groups[0], [0.0] * size)
        if run.signal:
            break
    return run.report(compare_ways(records, cfg.N))


# ---- below: the machine, the same text in every script (tests/test_shared_blocks.py)


# >>> shared: layers
class Linear(nn.Linear):
    """In the input's dtype: float32 weights for Adam, bfloat16 products on a GPU."""

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        sampling = x.is_cpu and x.dtype == torch.float32 and not torch.is_grad_enabled()
        if sampling and weight.numel() >= 2**16 and torch.backends.mkldnn.is_available():
            # up to 3 times as fast as F.linear
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return F.linear(x, weight, bias)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


# <<< shared: layers


# >>> shared: model
class Cache:
    """Keys and values, written after each row's length and seen up to it."""

    def __init__(self, model, rows, capacity):
        c, weight = model.config, model.lm_head.weight
        shape = rows, c["num_key_value_heads"], capacity, c["head_dim"]
        zeros = weight.new_zeros(shape, dtype=model.compute_dtype)
        self.keys = [zeros.clone() for _ in model.model.layers]
        self.values = [zeros.clone() for _ in model.model.layers]
        self.lengths = weight.new_zeros(rows, dtype=torch.long)
        self.width = capacity  # what attention reads

    def append(self, layer, k, v):
        """Write k, v (B, K, T, D); returns all of the layer, (B, K, S, D)."""
        rows = torch.arange(len(k), device=k.device)[:, None]
        slots = self.lengths[:, None] + torch.arange(k.shape[2], device=k.device)  # (B, T)
        keys, values = self.keys[layer], self.values[layer]
        keys[rows, :, slots] = k.transpose(1, 2)
        values[rows, :, slots] = v.transpose(1, 2)
        return keys[:, :, : self.width], values[:, :, : self.width]

    def select(self, rows):
        """Keep these rows, in this order, repeats allowed."""
        for held in (self.keys, self.values):
            for i, old in enumerate(held):  # never two whole caches
                if len(rows) > len(old):
                    held[i] = old.new_zeros(len(rows), *old.shape[1:])
                held[i] = held[i][: len(rows)]
                held[i][:, :, : self.width] = old[rows, :, : self.width]
        self.lengths = self.lengths[rows]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, H, T, D) by cos, sin (B, 1, T, D/2); arXiv:2104.09864."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        C, D, eps = c["hidden_size"], c["head_dim"], c["rms_norm_eps"]
        kind = c["model_type"]
        self.H, self.K = c["num_attention_heads"], c["num_key_value_heads"]
        self.q_proj = Linear(C, self.H * D, bias=kind == "qwen2")
        self.k_proj = Linear(C, self.K * D, bias=kind == "qwen2")
        self.v_proj = Linear(C, self.K * D, bias=kind == "qwen2")
        self.o_proj = Linear(self.H * D, C, bias=False)
        self.q_norm = RMSNorm(D, eps) if kind == "qwen3" else nn.Identity()
        self.k_norm = RMSNorm(D, eps) if kind == "qwen3" else nn.Identity()

    def forward(self, x, rotary, mask, cache, layer):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.H, -1)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, self.K, -1)).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.K, -1).transpose(1, 2)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, K, S, D)
        causal = mask is None  # whole rows, padded on the right
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
        return self.o_proj(x.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, size, inner):
        super().__init__()
        self.gate_proj = Linear(size, inner, bias=False)
        self.up_proj = Linear(size, inner, bias=False)
        self.down_proj = Linear(inner, size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        size, eps = c["hidden_size"], c["rms_norm_eps"]
        self.input_layernorm = RMSNorm(size, eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = MLP(size, c["intermediate_size"])

    def forward(self, x, *context):
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """The decoder of Llama, Qwen2, Qwen3 and SmolLM2, with Hugging Face's names."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = c = {"rms_norm_eps": 1e-6} | config
        c["num_key_value_heads"] = c.get("num_key_value_heads") or c["num_attention_heads"]
        c["head_dim"] = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        c["rope_theta"] = c.get("rope_theta") or c["rope_parameters"]["rope_theta"]
        self.model = nn.ModuleDict()
        self.model.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.model.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.model.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.lm_head = Linear(c["hidden_size"], c["vocab_size"], bias=False)
        self.tie()
        self.compute_dtype = None  # of products, if not the weights'
        self.checkpointing = False
        self.register_buffer("vocab_bias", None, persistent=False)  # (V,): -inf if never drawn
        self.eos_ids, self.tokenizer, self.is_tiny = [], None, False  # see read_special_ids

    def tie(self):
        if self.config.get("tie_word_embeddings"):
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, inputs: Tensor, cache: Cache | None = None) -> Tensor:
        """Hidden states (B, T, C) after the final norm, of tokens (B, T) or embeddings (B, T, C).

        With a cache they continue each row, whose length grows by T.
        """
        x = inputs if inputs.is_floating_point() else self.model.embed_tokens(inputs)
        x = x.to(self.compute_dtype or x.dtype)
        mask = None
        at = torch.arange(x.shape[1], device=x.device)[None]  # positions (1, T)
        if cache is not None:
            at = at + cache.lengths[:, None]  # (B, T)
            mask = torch.arange(cache.width, device=x.device) <= at[:, None, :, None]
        D = self.config["head_dim"]
        exponents = torch.arange(0, D, 2, device=x.device) / D
        angles = at[:, None, :, None] * self.config["rope_theta"] ** -exponents  # (B, 1, T, D/2)
        context = (angles.cos().to(x.dtype), angles.sin().to(x.dtype)), mask, cache
        again = self.checkpointing and torch.is_grad_enabled()
        for i, layer in enumerate(self.model.layers):
            inputs = x, *context, i
            x = checkpoint(layer, *inputs, use_reentrant=False) if again else layer(*inputs)
        if cache is not None:
            cache.lengths += x.shape[1]
        return self.model.norm(x)

    def logits(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """Logits (..., V) over the temperature: at least float32, -inf if never drawn."""
        logits = self.lm_head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        return logits if self.vocab_bias is None else logits + self.vocab_bias


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> Model:
    """The model in a Hugging Face folder, in float32."""
    folder, tensors = Path(folder), {}
    with reading(folder):
        c = read_json(folder / "config.json")
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
        rope = rope.get("rope_type", rope.get("type", "default"))
        kind, act, window = c["model_type"], c.get("hidden_act"), c.get("use_sliding_window")
        known = kind in ("llama", "qwen2", "qwen3") and act in ("silu", None)
        if not known or rope != "default" or window:  # unseen by strict loading
            raise BadInput(f"{folder}: no {kind} with {act}, rope {rope}, window {window}")
        for file in sorted(folder.glob("model*.safetensors")):
            tensors |= {n: x.float() for n, x in load_file(file).items() if "rotary" not in n}
        if c.get("tie_word_embeddings"):
            embed = tensors["model.embed_tokens.weight"]
            if not torch.equal(tensors.setdefault("lm_head.weight", embed), embed):
                raise BadInput(f"{folder}: lm_head is tied, but differs on disk")
        with torch.device("meta"):
            model = Model(c)
        model.load_state_dict(tensors, assign=True)
        model.tie()
        model.folder = folder
        read_special_ids(model)
    return model.to(device).requires_grad_()


def read_special_ids(model: Model) -> None:
    """Set tokenizer, eos_ids (each ends a text), vocab_bias (-inf for what is never drawn)."""
    c, folder = model.config, model.folder
    paths = folder / "generation_config.json", folder / "tokenizer_config.json"
    generation, names = [read_json(path) if path.exists() else {} for path in paths]
    ends = [c.get("eos_token_id"), generation.get("eos_token_id")]
    banned = list(generation.get("suppress_tokens") or [])
    if (folder / "tokenizer.json").exists():
        model.tokenizer = Tokenizer.from_buffer((folder / "tokenizer.json").read_bytes())
        end = names.get("eos_token") or ""
        ends.append(model.tokenizer.token_to_id(end if isinstance(end, str) else end["content"]))
        known = max(model.tokenizer.get_vocab().values()) + 1
        banned += range(known, c["vocab_size"])  # padding
        model.is_tiny = model.tokenizer.token_to_id("<latent>") is not None
    for end in ends:
        model.eos_ids += end if isinstance(end, list) else [end]
    model.eos_ids = sorted(set(model.eos_ids) - {None})
    if banned:
        model.vocab_bias = torch.zeros(c["vocab_size"])
        model.vocab_bias[banned] = -torch.inf


def save_model(model: Model, folder: str | Path) -> None:
    """A folder that AutoModelForCausalLM opens, with the tokenizer."""
    folder, tensors = Path(folder), model.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    rope = {"rope_type": "default", "rope_theta": model.config["rope_theta"]}
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    c = {**model.config, "rope_parameters": rope, "dtype": dtype, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(c, indent=2))
    if c.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # was 0600
    for pattern in ("generation_config.json", "tokenizer*.json", "*.jinja"):
        for file in model.folder.glob(pattern):
            shutil.copyfile(file, folder / file.name)


# <<< shared: model


# >>> shared: sampler
LOOK_EVERY = 8  # steps between two looks at the flags, which wait for a GPU


def row_uniforms(seed: int, step: int, prompt: int, sample: int, count: int) -> np.ndarray:
    """The random numbers (count,) of a completion, whatever its batch and rank."""
    return np.random.default_rng((seed, step, prompt, sample)).random(count, np.float32)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens (B, 1): the first whose cumulated probability exceeds the row's number.

    probs (B, V), uniforms (B, 1) in [0, 1). A token of probability 0 is never drawn.
    """
    cdf = probs.cumsum(-1)
    tokens = torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True)
    return tokens.clamp(max=probs.shape[-1] - 1)


def pad_rows(rows: list[list], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Lists of numbers as one tensor (B, T), padded on the right with 0."""
    longest = max(map(len, rows))
    padded = [row + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(padded, dtype=dtype).to(device)


class Decoding:
    """B / P answers to each of P prompts, by uniforms (B, N); temperature 0 is greedy."""

    def __init__(self, model, prompts, uniforms, temperature):
        (B, N), P = uniforms.shape, len(prompts)
        device = model.lm_head.weight.device
        self.model, self.temperature = model, temperature
        self.uniforms = uniforms.to(device)
        with device:
            self.logprobs = torch.zeros(B, N)
            self.tokens = torch.zeros(B, N, dtype=torch.long)
            self.lengths = torch.zeros(B, dtype=torch.long)  # with the end token
            self.finished = torch.zeros(B, dtype=torch.bool)  # ended by itself
            self.rows = torch.arange(B)  # still in the batch
            self.last = torch.zeros(B, 1, dtype=torch.long)  # their newest tokens
            self.count = torch.zeros(1, dtype=torch.long)  # of tokens drawn
            self.eos = torch.tensor(model.eos_ids, dtype=torch.long)
            prompt = torch.arange(P)
            ends = torch.tensor([len(ids) for ids in prompts])
        ids = pad_rows(prompts, device, torch.long)  # (P, T): each prompt runs once
        self.cache = Cache(model, P, ids.shape[1] + N)
        self.cache.width = ids.shape[1]
        hidden = model(ids, self.cache)[prompt, ends - 1]  # (P, C)
        self.cache.lengths.copy_(ends)  # the padding is forgotten
        group = prompt.repeat_interleave(B // P)
        self.cache.select(group)
        self.emit(model.logits(hidden, temperature or 1.0)[group])

    def emit(self, logits):
        """Draw a token per row by logits (B, V): fixed shapes, nothing read back."""
        probs = logits.softmax(-1)
        token = probs.argmax(-1, keepdim=True)  # (B, 1)
        if self.temperature:
            token = draw(probs, self.uniforms[self.rows, self.count][:, None].to(probs))
        self.last.copy_(token)
        self.tokens[self.rows, self.count] = token[:, 0]
        self.logprobs[self.rows, self.count] = probs.gather(1, token)[:, 0].log().float()
        self.lengths[self.rows] += ~self.finished[self.rows]
        self.finished[self.rows] |= (token == self.eos).any(-1)
        self.count += 1

    def step(self):
        hidden = self.model(self.last, self.cache)[:, 0]
        self.emit(self.model.logits(hidden, self.temperature or 1.0))


@torch.inference_mode()
def generate(model: Model, prompts, uniforms, temperature=1.0, stop=None) -> Decoding:
    """Decode until each row has ended or has N tokens; stop is Prompter.stop.

    On a CPU finished rows leave the batch; on CUDA the step is recorded, so shapes stay.
    """
    s = Decoding(model, prompts, uniforms, temperature)
    step, on_cpu = s.step, s.tokens.is_cpu
    N = uniforms.shape[1]
    if not on_cpu:
        s.cache.width += N
    for done in range(1, N):
        look = done % LOOK_EVERY == 0
        if stop and look:
            stop(s, done - LOOK_EVERY)
        if look or on_cpu:
            alive = (~s.finished[s.rows]).nonzero()[:, 0]
            if len(alive) == 0:
                break
            if on_cpu and len(alive) <= 0.75 * len(s.rows):
                s.rows, s.last = s.rows[alive], s.last[alive]
                s.cache.select(alive)
        if on_cpu:
            s.cache.width += 1
        if s.tokens.is_cuda and done == 2:  # after an eager one
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                s.step()
            step = graph.replay
        step()
    if stop:
        stop(s, (int(s.count) - 1) // LOOK_EVERY * LOOK_EVERY)
    s.cache = None
    return s


# <<< shared: sampler


# >>> shared: rollout
class Prompter:
    """Problems to prompts: compact for models/, plain text, or the chat template."""

    def __init__(self, model: Model, task, chat: bool):
        self.task, self.tokenizer = task, model.tokenizer
        if self.tokenizer is None:
            raise BadInput(f"{model.folder}: no tokenizer.json")
        self.style = "compact" if model.is_tiny else "text"
        self.stops = () if chat or model.is_tiny else ("</answer>", "\nUser:")
        ends, vocab = {word[-1] for word in self.stops}, self.tokenizer.get_vocab()
        self.endings = {i for token, i in vocab.items() if ends & set(token)}
        self.start = "" if chat else self.decode(self.tokenizer.encode("").ids[:1])  # BOS
        if chat:
            from transformers import AutoTokenizer  # slow
            self.style = "chat"
            with reading(model.folder):
                self.chat = AutoTokenizer.from_pretrained(model.folder, trust_remote_code=False)

    def text(self, problem):
        asked = prompt(self.task, problem, self.style)
        if self.style != "chat":
            return self.start + asked
        return open_thinking(fill_template(self.chat, asked, opens_reply=True))

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def stop(self, s, seen):
        """Finish rows in which a stop string ends after `seen` tokens."""
        start, lengths = max(0, seen - 31), s.lengths.tolist()
        for i, ids in enumerate(s.tokens[:, start : seen + LOOK_EVERY].tolist()):
            for end in range(seen + 1, lengths[i] + 1):
                if ids[end - 1 - start] in self.endings:
                    text = self.decode(ids[: end - start])
                    if any(word in text for word in self.stops):
                        s.lengths[i], s.finished[i] = end, True
                        break


def rollout(
    run: "Run", model: Model, prompter: Prompter, problems: list, size: int, limit: int, step: int
) -> list[Completion]:
    """Sample and score `size` answers of at most `limit` tokens to each (number, problem).

    A rank samples its share, then all hold everything, group by group.
    """
    done, stop = [], prompter.stop if prompter.stops else None
    mine = [(n, p, prompter.encode(prompter.text(p))) for n, p in problems[run.rank :: run.world]]
    longest = max((len(ids) for _, _, ids in mine), default=0)
    for part in in_groups(mine, rows_at_once(model, longest + limit) // size or 1):
        rows = [(*asked, sample) for asked in part for sample in range(size)]
        u = [row_uniforms(run.cfg.seed, step, n, sample, limit) for n, _, _, sample in rows]
        prompts = [ids for _, _, ids in part]
        s = generate(model, prompts, torch.tensor(np.stack(u)), run.cfg.temperature, stop)
        if not s.logprobs.isfinite().all():
            raise FloatingPointError("logits are not finite: lower --lr")
        sampled = s.lengths.tolist(), s.finished.tolist(), s.tokens.tolist(), s.logprobs.tolist()
        for (n, p, ids, _), length, finished, tokens, logprobs in zip(rows, *sampled, strict=True):
            tokens, logprobs = tokens[:length], logprobs[:length]
            text = prompter.decode(tokens[:-1] if tokens[-1] in model.eos_ids else tokens)
            score = prompter.task.score(text, p)
            done.append(Completion(n, p, ids, tokens, logprobs, finished, text, score))
    return sorted(sum(run.gather(done), []), key=attrgetter("number"))


def rows_at_once(model: Model, capacity: int) -> int:
    """Rows of `capacity` tokens whose cache fits 1 GB, on a GPU half of what is free."""
    row = 2 * sum(keys.nbytes for keys in Cache(model, 1, capacity).keys)
    if not model.lm_head.weight.is_cuda:
        return min(256, int(1e9 / row))
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] // 2 // row


def evaluate(run: "Run", model: Model, prompter: Prompter, step: int) -> dict[str, float]:
    """Held-out accuracy, always with row_uniforms of step 0."""
    cfg, task = run.cfg, prompter.task
    if not cfg.eval_problems:
        return {}
    problems = list(enumerate(heldout(task, cfg.eval_problems)))
    done = rollout(run, model, prompter, problems, cfg.eval_samples, cfg.max_new_tokens, 0)
    metrics = describe_evaluation(done, cfg.eval_samples, task)
    run.log(step, metrics, ("eval/accuracy", "eval/completion_length"))
    return metrics


# <<< shared: rollout


# >>> shared: run
class Run:
    """Around the algorithm: ranks, device, folder, logs, checkpoints, signals."""

    def __init__(self, cfg):
        self.cfg, self.started = cfg, time.time()
        self.got, self.signal, self.skipped = 0, 0, {}
        self.rank = int(os.getenv("RANK", 0))
        self.world = int(os.getenv("WORLD_SIZE", 1))
        name = cfg.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        self.device, self.dtype = torch.device(name), torch.float32
        with reading(f"--device {name}"):
            if name == "cuda":
                torch.cuda.set_device(int(os.getenv("LOCAL_RANK", 0)))
                self.dtype = torch.bfloat16
                torch._dynamo.config.suppress_errors = True  # no compiler: eager
            torch.empty(1, device=name)
        if self.world > 1:
            if self.rank == 0:
                resolve_model(cfg.model)  # downloads; the others wait
            dist.init_process_group("nccl" if name == "cuda" else "gloo")
        signal.signal(signal.SIGINT, self.on_signal)
        signal.signal(signal.SIGTERM, self.on_signal)

    def on_signal(self, number, frame):
        self.got = number
        signal.signal(number, signal.SIG_DFL)  # a second ends it
        os.write(1, b"stopping after this step; again: at once\n")

    def gather(self, value):
        """The values of all ranks, on every rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def load(self, by_size, added=14):
        """The models to train and to sample from; training adds `added` bytes a parameter."""
        model = load_model(resolve_model(self.cfg.model), self.device)
        size = sum(p.numel() for p in model.parameters())
        model.checkpointing, model.compute_dtype = size > 1e9, self.dtype
        for name, values in by_size.items():
            value = values[(size > 1e7) + (size > 1e9)]
            if name == "micro_batch_tokens" and self.device.type == "cuda":
                # bytes that a token leaves for backward
                kept = 2.5 * sum(sum(w.shape) for w in model.parameters() if w.ndim == 2)
                fits = int((0.7 * torch.cuda.mem_get_info()[0] - added * size) / kept)
                model.checkpointing = fits < 4096
                value = values[2] if model.checkpointing else min(fits, values[2])
            setattr(self.cfg, name, getattr(self.cfg, name) or value)
        if self.dtype == torch.float32:
            return model, model
        return model, copy.deepcopy(model).to(self.dtype).requires_grad_(False)

    @torch.no_grad()
    def refresh(self, to, model):
        """Copy the weights in place."""
        torch._foreach_copy_(list(to.parameters()), list(model.parameters()))

    def start(self, model, optimizer, prompter):
        """Make or resume the run folder; the state."""
        cfg, script, state = self.cfg, Path(__file__), {"step": 0}
        example = prompter.text(prompter.task.problem("train", cfg.seed, 0))
        heldout(prompter.task, cfg.eval_problems)  # complains
        name = f"out/{script.stem}-{type(prompter.task).__name__}-{cfg.seed}-"
        name = cfg.resume or cfg.out or name + time.strftime("%y%m%d-%H%M%S")
        if not cfg.resume and (Path(name) / "run.json").exists():
            raise BadInput(f"--out {name} is a run: --resume it")
        self.folder = Path(self.gather(name)[0])
        if cfg.resume:
            state = self.resume(model, optimizer)
            for log in self.folder.glob("*.jsonl"):
                if self.rank == 0:
                    trim_log(log, state["step"])
        about = {"script": script.name, "config": asdict(cfg), "torch": torch.__version__}
        about |= {"device": f"{self.world} {self.device}", "checkpointing": model.checkpointing}
        if self.rank == 0:
            with reading(f"--out {self.folder}"):
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "run.json").write_text(json.dumps(about, indent=2))
                shutil.copy(script, self.folder)
        self.say(f"settings {about}\nfirst prompt {example!r}\nfolder {self.folder}")
        return state

    def resume(self, model, optimizer):
        """Load the newest checkpoint; returns its state."""
        with reading(f"checkpoint of {self.folder}"):
            folder = checkpoints(self.folder)[-1]
            self.refresh(model, load_model(folder, self.device))
            state = torch.load(folder / "trainer.pt", self.device, weights_only=True)
            optimizer.load_state_dict(state["optimizer"])
        return state

    def log(self, step, metrics, show=()):
        """A line in metrics.jsonl, and in short on the screen."""
        line = {"step": step, "seconds": time.time() - self.started, **metrics}
        line = {name: round(x, 6) for name, x in line.items() if math.isfinite(x)}
        shown = ", ".join(f"{name} {line[name]:.4g}" for name in show if name in line)
        self.say(f"step {step}/{self.cfg.steps}: {shown}, {line['seconds']:.0f} s")
        if self.rank == 0:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    def keep_samples(self, step, prompter, done, advantages):
        """Write completions to samples.jsonl."""
        if self.rank == 0 and done:
            with (self.folder / "samples.jsonl").open("a") as file:
                for c, advantage in zip(done, advantages, strict=False):
                    file.write(json.dumps(c.line(step, advantage, prompter.decode)) + "\n")

    def update(self, model, optimizer, lr):
        """Sum the gradients over ranks, clip their norm at 1, step; the norm."""
        for weight in model.parameters():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            if self.world > 1:  # DDP averages, and needs equally many passes
                dist.all_reduce(weight.grad)
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        self.skipped[optimizer] = 0 if math.isfinite(norm) else self.skipped.get(optimizer, 0) + 1
        if self.skipped[optimizer] == 5:
            raise FloatingPointError("five bad gradients in a row")
        if self.skipped[optimizer]:
            self.say("bad gradient: no update")
        else:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def after_step(self, step, model, optimizer, keep=2, **state):
        """Save where it is due; True on all ranks if one got Ctrl-C or SIGTERM."""
        self.signal = max(self.gather(self.got))
        due = self.cfg.save_every and step % self.cfg.save_every == 0
        if self.rank == 0 and (self.signal or due or step == self.cfg.steps):
            folder = self.folder / f"step-{step:06d}"  # appears whole or not at all
            unfinished = folder.with_suffix(".tmp")
            shutil.rmtree(unfinished, ignore_errors=True)
            save_model(model, unfinished)
            state |= {"step": step, "optimizer": optimizer.state_dict()}
            torch.save(state, unfinished / "trainer.pt")
            unfinished.rename(folder)
            for old in checkpoints(self.folder)[:-keep]:
                shutil.rmtree(old)
        self.gather(0)  # all wait for the disk
        return self.signal > 0

    def report(self, model, prompter):
        """Evaluate after and before, print both; the exit code."""
        go_on = f"go on: python {sys.argv[0]} --resume {self.folder}"
        if self.signal:
            self.say(f"stopped and saved; {go_on}")
            return 128 + self.signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        after = before = evaluate(self, model, prompter, self.cfg.steps)
        if self.cfg.steps:
            start = load_model(model.folder, self.device).to(model.lm_head.weight.dtype)
            start.compute_dtype = model.compute_dtype
            before = evaluate(self, start, prompter, 0)
        for name, value in after.items():
            self.say(f"{name:28}{before[name]:8.3f} -> {value:8.3f}")
        self.say(f"{go_on} --steps {2 * self.cfg.steps}")
        return 0


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-" + 6 * "[0-9]"))


# <<< shared: run


# >>> shared: config
def parse_config(config: type, argv: list[str] | None = None):
    """The command line as a `config`; --resume starts from the settings of a run."""
    parser = argparse.ArgumentParser(Path(__file__).name, argparse.SUPPRESS, __doc__)
    parser.formatter_class, parser.allow_abbrev = argparse.RawDescriptionHelpFormatter, False
    for f in fields(config):
        kind = {"type": type(f.default), "choices": get_args(f.type) or None}
        if isinstance(f.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        text = f"{f.metadata['help']} (default: {f.default})"
        parser.add_argument(f"--{f.name}", default=f.default, help=text, **kind)
    cfg = parser.parse_args(argv)
    if cfg.resume:
        folder, out = cfg.resume, cfg.out
        with reading(f"--resume {folder}"):
            saved = read_json(Path(folder) / "run.json")["config"]
            same = {name: saved[name] for name in ("model", "task", "seed")}
            parser.set_defaults(**saved)
        cfg = parser.parse_args(argv)
        if out or saved.keys() != asdict(config()).keys() or not same.items() <= vars(cfg).items():
            raise BadInput(f"--resume {folder} is a run with {same}")
    for f in fields(config):
        value, least = getattr(cfg, f.name), f.metadata["least"]
        if isinstance(value, (int, float)) and not least <= value < math.inf:
            raise BadInput(f"--{f.name} {value}: at least {least} is needed")
    return config(**vars(cfg))


def main(train: Callable, config: type, argv: list[str] | None = None) -> int:
    """The exit code: 0 done, 1 fault, 2 bad input, 130 Ctrl-C, 143 SIGTERM."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages
    try:
        return train(parse_config(config, argv))
    except (BadInput, FloatingPointError, OSError) as error:
        code, message = 2 if isinstance(error, BadInput) else 1, error
    except torch.OutOfMemoryError:
        code, message = 1, "out of memory; halve --micro_batch_tokens"
    if int(os.getenv("LOCAL_RANK", 0)) == 0:
        print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    return code


# <<< shared: config


class Selection(Run):
    """A run that keeps records where others keep weights."""

    def resume(self, model, optimizer):
        with reading(f"checkpoint of {self.folder}"):
            saved = read_json(checkpoints(self.folder)[-1] / "records.json")
            return {"step": len(saved["records"]), **saved}

    def save(self, records):
        """Write step-N, which appears whole or not at all."""
        self.signal = max(self.gather(self.got))
        if self.rank == 0:
            unfinished = self.folder / "records.tmp"
            unfinished.mkdir(exist_ok=True)
            (unfinished / "records.json").write_text(json.dumps({"records": records}))
            unfinished.rename(self.folder / f"step-{len(records):06d}")
            for old in checkpoints(self.folder)[:-1]:
                shutil.rmtree(old)

    def spread(self, model, verifier, problems, method):
        """Search, each rank for its share of the problems; outcomes in order."""
        cfg, found = self.cfg, {}
        at_once = rows_at_once(model, 256 + cfg.max_new_tokens) // cfg.N or 1
        for part in in_groups(problems[self.rank :: self.world], at_once):
            outcomes = search(model, verifier, part, method)
            found |= {n: outcome for (n, _), outcome in zip(part, outcomes, strict=True)}
        ranks = self.gather(found)
        return [ranks[i % self.world][n] for i, (n, _) in enumerate(problems)]

    def report(self, metrics):
        """Print tokens and accuracy of each way; the exit code."""
        if self.signal:
            return super().report(None, None)
        heads = "".join(f"{head:>8}" for head in ("tokens", "all", *BINS))
        self.say(f"{self.folder}\n{'':20}{heads}")
        for key, spent in metrics.items():
            if key.startswith("eval/tokens/"):
                way = key.removeprefix("eval/tokens/")
                bins = [metrics[f"eval/accuracy/{way}/{name}"] for name in BINS]
                values = [metrics[f"eval/accuracy/{way}"], *bins]
                self.say(f"{way:20}{spent:8.0f}" + "".join(f"{value:8.3f}" for value in values))
            elif not key.startswith("eval/accuracy/"):
                self.say(f"{key:28}{metrics[key]:8.3f}")
        return 0


if __name__ == "__main__":
    os._exit(main(solve, Config))  # threads of gloo may abort sys.exit
