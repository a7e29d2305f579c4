"""Hierarchical reasoning by thought templates: ReasonFlux (arXiv:2502.06772).

A library holds templates, ways to solve a kind of problem, by chapter and section. A model,
the navigator, names one for a problem; another, the solver, works by it and is never trained.
The navigator learns to prefer plans by which the solver gets more right.

    loss = -1/N sum log pi(description, scope | name, tags)  N: their tokens  (1)
    R(T) = how often the solver, given T, is right on X_sim: x and its like (2)
    pair = T+, T- sampled for one x with R(T+) > R(T-) + delta                (3)
    h    = log pi(T+) - log pi_ref(T+) - log pi(T-) + log pi_ref(T-)          (4)
    loss = mean over pairs of -log sigma(beta h) - a log pi(T+) / |T+|        (5)
           pi_ref: the navigator after (1); a holds log pi(T+), which DPO lets fall

A name that the library lacks stands for the nearest template by tf-idf: of the nearest
section of the nearest chapter (6). By default a template is a pattern of two operators, a
letter from A (++) to P (//) in the prompt, 7,1,5=2J<think>.

Run
    python more/reasonflux.py  # two CPU cores, no network, minutes
    python more/reasonflux.py --model Qwen2.5-1.5B  # one GPU of 80 GB
    torchrun --standalone --nproc_per_node=8 more/reasonflux.py --model Qwen2.5-1.5B
    models/README.md: how models/tiny-solver was made. A real model is its own solver, or
    --solver FOLDER: 20 bytes a parameter, 30.9 GB for Qwen2.5-1.5B.

Expect
    Seeds 0, 1, 2, 3.2 CPU minutes each: held-out accuracy by the navigator's plans
    0.119 -> 0.259, 0.122 -> 0.255, 0.122 -> 0.259; after (1) 0.146, 0.136, 0.120.

Differs from the paper in: a plan is one template, whose steps the navigator does not rewrite;
beside (1) it learns to answer a problem with some name; the term with a.

Legend: B rows of a pass, S answers a row, P pairs, T tokens, N templates, D size of a vector,
C hidden size, V vocabulary, H query heads, K key heads, S cache positions.
"""

import argparse
import copy
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from operator import attrgetter
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
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # rewards.py is one folder up

from rewards import (
    MODELS,
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
    model: str = option("tiny", "navigator: one of models/, a folder, a hub name")
    solver: str = option("", "frozen; else tiny-solver, or the model")
    library: str = option("more/templates.json", "chapter -> section -> templates")
    task: str = option("patterns", "countdown with patterns; gsm8k, FILE.py:Class")
    data: str = option("", "JSONL file of the problems (gsm8k, math)")
    chat: bool = option(False, "use the models' chat templates")
    sample: int = option(0, "problems to plan for, 0: by size")
    attempts: int = option(4, "plans sampled for each", 2)
    x_sim: int = option(4, "problems in X_sim at most")
    solver_samples: int = option(1, "answers to each problem of X_sim", 1)
    delta: float = option(0.1, "of eq. 3")
    max_plan_tokens: int = option(0, "longest plan, 0: by size")
    max_new_tokens: int = option(0, "longest answer, 0: by size")
    temperature: float = option(1.0, "of sampling", 0.01)
    batch_size: int = option(0, "pairs or rows per step, 0: by size")
    micro_batch_tokens: int = option(0, "padded tokens per pass, 0: by size")
    sft_steps: int = option(100, "steps down eq. 1", 1)
    steps: int = option(400, "steps with those down eq. 5, 0: only evaluate")
    sft_lr: float = option(0.0, "learning rate of eq. 1, 0: by size")
    lr: float = option(0.0, "learning rate of eq. 5, 0: by size")
    warmup_steps: int = option(6, "linear warm-up of both, then a line to 0")
    beta: float = option(0.1, "of eq. 5: how close to pi_ref", 1e-6)
    sft_coef: float = option(0.05, "a of eq. 5; the paper: 0")
    eval_problems: int = option(200, "held-out problems, 0: no evaluation")
    eval_samples: int = option(4, "plans for each", 1)
    eval_every: int = option(0, "steps between evaluations, 0: after (1) and (5)")
    save_every: int = option(50, "steps between checkpoints, 0: one at the end")
    seed: int = option(0, "seed of problems and sampling")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "auto: cuda if any")
    out: str = option("", "run folder, default out/SCRIPT-TASK-SEED-TIME")
    resume: str = option("", "run folder to go on with")


BY_SIZE = {  # below 10 M parameters, below 1 B, above (paper: sft_lr 2e-5)
    "sft_lr": (2e-3, 2e-5, 2e-5),
    "lr": (1e-3, 5e-6, 5e-7),
    "batch_size": (64, 32, 32),
    "sample": (3072, 320, 2048),
    "max_plan_tokens": (1, 32, 32),
    "max_new_tokens": (128, 256, 1024),
    "micro_batch_tokens": (2048, 2048, 16384),
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # what tiny models call templates


# ------------------------------------------------------------ algorithm


def read_template(chapter: str, section: str, entry: dict) -> dict:
    """What is read of a template in the paper's form."""
    name, tags = entry["template_name"], ", ".join(entry["knowledge_tag"])
    scope = f"{entry['description']} {entry['application_scenario']}"
    steps = [f"- {step}" for step in entry["reason_flow"]]
    return {
        "chapter": chapter,
        "section": section,
        "name": name,
        "tags": tags,
        "scope": scope,
        "guide": "\n".join([f"Method: {name}. {entry['description']}", *steps]),
        "about": f"{chapter} {section} {name} {tags} {scope}",
    }


def read_library(path: str) -> list[dict]:
    """The templates of a JSON file, chapter -> section -> list, in its order."""
    library = []
    file = max(Path(path), MODELS.parent / path, key=Path.is_file)  # from any folder
    for chapter, sections in read_json(file).items():
        with reading(f'library {path}: chapter "{chapter}" holds no list of templates'):
            for section, listed in sections.items():
                library += [read_template(chapter, section, entry) for entry in listed]
    if not library:
        raise BadInput(f"library {path}: no templates")
    return library


def tfidf(library: list[str], texts: list[str]) -> Tensor:
    """Unit vectors (N, D) of texts, a place for each word of the library.

    Its count times log((1 + L) / (1 + n)) + 1, if n of L templates have it.
    """
    split = [re.findall(r"\w+", text.lower()) for text in library + texts]
    counts = Counter(word for row in split[: len(library)] for word in set(row))
    vectors = torch.zeros(len(texts), len(counts))
    for vector, row in zip(vectors, split[len(library) :], strict=True):
        for i, (word, n) in enumerate(counts.items()):
            vector[i] = row.count(word) * (math.log((1 + len(library)) / (1 + n)) + 1)
    return F.normalize(vectors, dim=1)


def match(query: Tensor, library: list[dict], vectors: Tensor) -> int:
    """Eq. 6: the place of the template nearest to a query (D,).

    vectors (N, D) of the templates; a chapter or section is the mean of its own.
    """
    rows = list(range(len(library)))
    for level in ("chapter", "section", "name"):
        groups, nearness = {}, {}
        for i in rows:
            groups.setdefault(library[i][level], []).append(i)
        for name, members in groups.items():
            centre = F.normalize(vectors[members].mean(0), dim=0)
            nearness[name] = float(query @ centre)
        rows = groups[max(nearness, key=nearness.get)]
    return rows[0]


class Asked:
    """The navigator's task, and, of a problem with a "plan", the solver's."""

    def __init__(self, task, library, tiny):
        self.task, self.library = task, library
        self.names = [template["name"] for template in library]
        if tiny:
            self.names = list(LETTERS[: len(library)])

    def compact(self, problem):
        asked = self.task.compact(problem).removesuffix("<think>")
        if "plan" in problem:
            asked += LETTERS[problem["plan"]] + "<think>"
        return asked

    def question(self, problem):
        told = "Do not solve it: name a method for it."
        if "plan" in problem:
            told = self.library[problem["plan"]]["guide"]
        return f"{self.task.question(problem)}\n{told}"

    def score(self, text, problem):
        if "plan" in problem:
            return self.task.score(text, problem)
        return {"format": 0.0, "answer": text, "correct": False, "total": 0.0}


def find_templates(run: "Run", asked: Asked, texts: list[str]) -> tuple[list, list]:
    """The place of each plan's template or the nearest; was it named?"""
    places = {name: i for i, name in enumerate(asked.names)}
    lines = [text.strip().partition("\n")[0] for text in texts]
    named = [line in places for line in lines]
    unknown = sorted(set(lines) - places.keys())
    if unknown:
        known = [template["about"] for template in asked.library]
        vectors = tfidf(known, known)
        for line, query in zip(unknown, tfidf(known, unknown), strict=True):
            places[line] = match(query, asked.library, vectors)
        one, count = unknown[0], named.count(False)
        nearest = f'nearest "{asked.names[places[one]]}"'
        run.say(f'navigator named "{one}": no such template; {nearest}; {count} plans')
    return [places[line] for line in lines], named


def similar(task, problem: dict, count: int) -> list[dict]:
    """X_sim of eq. 2, x first; x alone if the task has no such method."""
    if not hasattr(task, "similar"):
        return [problem]
    return [problem, *task.similar(problem, count - 1)]


def plan_rewards(solve: Callable, plans: list[int], x_sim: list[list[dict]]) -> tuple:
    """R of eq. 2 of each plan by its X_sim; the answers to the problems.

    solve: problems with a "plan" -> for each the solver's answers.
    """
    asked = []
    for plan, problems in zip(plans, x_sim, strict=True):
        asked += [problem | {"plan": plan} for problem in problems]
    answers = iter(solve(asked))
    rewards, first = [], []
    for like in x_sim:
        groups = [next(answers) for _ in like]
        rewards.append(mean(c.score["correct"] for group in groups for c in group))
        first += groups[0]
    return rewards, first


def plan_pairs(rewards: list[float], delta: float) -> list[tuple[int, int]]:
    """Eq. 3: (better, worse) plans of a problem.

    >>> plan_pairs([0.5, 0.0, 0.55], 0.1)
    [(0, 1), (2, 1)]
    """
    rows = range(len(rewards))
    return [(w, x) for w in rows for x in rows if rewards[w] > rewards[x] + delta]


def preference_loss(
    logps: Tensor, ref: Tensor, lengths: Tensor, beta: float, a: float
) -> tuple[Tensor, Tensor]:
    """Eq. 5 of each pair, and the margin beta h, both (P,).

    logps and ref (2, P): nats of better, then of worse plans; lengths (2, P).
    """
    ratios = logps - ref
    margins = beta * (ratios[0] - ratios[1])  # eq. 4
    return -F.logsigmoid(margins) - a * logps[0] / lengths[0], margins.detach()


def check_flags(cfg: Config, model: "Model", asked: Asked) -> None:
    """Refuse what would not work as meant."""
    if cfg.x_sim < 1:
        raise BadInput("--x_sim 0: X_sim of 0 problems")
    if cfg.delta >= 1:
        raise BadInput(f"--delta {cfg.delta}: below 1 is needed")
    if model.is_tiny and len(asked.library) > len(LETTERS):
        raise BadInput(f"--library {cfg.library}: over {len(LETTERS)} templates")
    if "template" in asked.task.problem("train", cfg.seed, 0):
        raise BadInput(f"--task {cfg.task}: its prompts name a template")


def structure_rows(cfg: Config, planner: "Prompter", end: list, step: int) -> list:
    """Rows (prompt, answer): one in eight of eq. 1, else a problem, some name."""
    asked, rows = planner.task, []
    for i in range((step - 1) * cfg.batch_size, step * cfg.batch_size):
        place = Random(f"structure {cfg.seed} {i}").randrange(len(asked.names))
        answer = asked.names[place]
        text = planner.text(asked.task.problem("train", cfg.seed, i))
        if i % 8 == 0:
            template = asked.library[place]
            text = f"{planner.start}{answer} ({template['tags']}):"
            answer = f" {template['scope']}"
        rows.append((planner.encode(text), planner.encode(answer) + end))
    return rows


def sample_plans(run: "Run", sampler: "Model", planner: "Prompter", solve: Callable) -> list:
    """Pairs (prompt, better, worse) of plans that name a template, as tokens."""
    cfg, task, found = run.cfg, planner.task.task, []
    for part in in_groups(list(range(cfg.sample)), 64):
        problems = [(n, task.problem("train", cfg.seed, n)) for n in part]
        limit = cfg.max_plan_tokens
        done = rollout(run, sampler, planner, problems, cfg.attempts, limit, 1)
        places, named = find_templates(run, planner.task, [c.text for c in done])
        plans = {}
        for c, place, is_name in zip(done, places, named, strict=True):
            if is_name:
                plans.setdefault((c.number, place), c)  # tried out once
        x_sim = [similar(task, c.problem, cfg.x_sim) for c in plans.values()]
        try_out = partial(solve, cfg.solver_samples, 1 + part[-1])
        rewards, _ = plan_rewards(try_out, [place for _, place in plans], x_sim)
        for c, reward in zip(plans.values(), rewards, strict=True):
            c.reward = reward
        for number in part:
            mine = [c for c in plans.values() if c.number == number]
            for better, worse in plan_pairs([c.reward for c in mine], cfg.delta):
                found.append((mine[better], mine[worse]))
        so_far = f"{len(found)} pairs; mean R of the last plans {mean(rewards):.3f}"
        run.say(f"{part[-1] + 1} of {cfg.sample} problems: {so_far}")
    if not found:
        raise BadInput(f"--delta {cfg.delta}: no pair of {cfg.sample} problems")
    shown = [c for pair in found[:16] for c in pair]
    run.keep_samples(cfg.sft_steps, planner, shown, [c.reward for c in shown])
    return [(better.prompt, better.tokens, worse.tokens) for better, worse in found]


def solve_guided(
    run: "Run", solver: "Model", prompter: "Prompter", samples: int, step: int, asked: list
) -> list[list[Completion]]:
    """The frozen solver's answers to each problem, by its "plan"."""
    problems, limit = list(enumerate(asked)), run.cfg.max_new_tokens
    done = rollout(run, solver, prompter, problems, samples, limit, step)
    return in_groups(done, samples)


def answer_logps(run: "Run", model: "Model", rows: list[tuple]) -> Iterator[tuple]:
    """By micro-batch of rows (prompt, S answers): numbers, log pi, lengths."""
    sides = range(1, len(rows[0]))
    lengths = [len(sides) * (len(row[0]) + max(map(len, row[1:]))) for row in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__, reverse=True)
    mine = order[run.rank :: run.world]
    for batch in micro_batches([lengths[i] for i in mine], run.cfg.micro_batch_tokens):
        part = [mine[j] for j in batch]
        answers = [(rows[i][0], rows[i][side]) for side in sides for i in part]
        tokens = [asked + answer for asked, answer in answers]
        masks = [[0] * len(asked) + [1] * len(answer) for asked, answer in answers]
        tokens = pad_rows(tokens, run.device, torch.long)  # (S B, T)
        masks = pad_rows(masks, run.device, torch.bool)
        logprobs, _ = completion_logprobs(model, tokens, masks)  # (S B, T-1)
        shape = len(sides), len(part)  # (S, B)
        yield part, logprobs.sum(1).view(shape), masks.sum(1).view(shape)


def learn_structure(run: "Run", model: "Model", rows: list[tuple]) -> dict:
    """Go back from eq. 1 on rows (prompt, answer); metrics."""
    num_tokens, loss = sum(len(answer) for _, answer in rows), 0.0
    for _, logps, _ in answer_logps(run, model, rows):
        part_loss = -logps.sum() / num_tokens  # N: of all passes and ranks
        part_loss.backward()
        loss += part_loss.item()
    return {"loss": sum(run.gather(loss)), "tokens": num_tokens}


@torch.no_grad()
def plan_logprobs(run: "Run", model: "Model", pairs: list[tuple]) -> Tensor:
    """log pi(T|x) of all pairs, (2, P), on the CPU."""
    found = torch.zeros(2, len(pairs))
    for part, logps, _ in answer_logps(run, model, pairs):
        found[:, part] = logps.cpu()
    return sum(run.gather(found))  # a pair is 0 on all ranks but one


def learn_pairs(run: "Run", model: "Model", batch: list, ref: Tensor) -> dict:
    """Go back from eq. 5 on P pairs and ref (2, P); means over pairs."""
    names = "loss", "pair_accuracy", "margin", "logp/chosen", "logp/rejected"
    cfg, totals = run.cfg, torch.zeros(len(names))
    for part, logps, lengths in answer_logps(run, model, batch):
        form = lengths, cfg.beta, cfg.sft_coef
        losses, margins = preference_loss(logps, ref[:, part].to(logps), *form)
        (losses.sum() / len(batch)).backward()  # P: of all passes and ranks
        seen = torch.stack([losses, (margins > 0).float(), margins, *logps])
        totals += seen.detach().sum(1).cpu()
    totals = sum(run.gather(totals)) / len(batch)
    metrics = dict(zip(names, totals.tolist(), strict=True))
    metrics["tokens"] = sum(len(w) + len(x) for _, w, x in batch)
    return metrics


def evaluate_plans(run: "Run", planner: "Prompter", solve: Callable, model, step: int) -> dict:
    """Plans for held-out problems: the solver's accuracy by them, and R."""
    cfg, task = run.cfg, planner.task.task
    if not cfg.eval_problems:
        return {}
    problems = list(enumerate(heldout(task, cfg.eval_problems)))
    limit = cfg.max_plan_tokens
    done = rollout(run, model, planner, problems, cfg.eval_samples, limit, 0)
    plans, named = find_templates(run, planner.task, [c.text for c in done])
    x_sim = [similar(task, c.problem, cfg.x_sim) for c in done]
    rewards, answers = plan_rewards(partial(solve, 1, 0), plans, x_sim)
    metrics = describe_evaluation(answers, cfg.eval_samples, task)
    metrics["eval/plan_reward"] = mean(rewards)
    metrics["eval/named"] = mean(named)
    metrics["eval/plan_entropy"] = -mean(sum(c.logprobs) for c in done)  # nats
    run.log(step, metrics, ("eval/accuracy", "eval/plan_reward", "eval/named"))
    return metrics


def finish(run: "Run", sampler: "Model", evaluate_now: Callable) -> int:
    """Evaluate after and before, print both; the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    after = before = evaluate_now(sampler, run.cfg.steps)
    if run.cfg.steps:
        start = load_model(sampler.folder, run.device).to(run.dtype)
        before = evaluate_now(start, 0)
    for name, value in after.items():
        run.say(f"{name:28}{before[name]:8.3f} -> {value:8.3f}")
    run.say(f"go on: python {sys.argv[0]} --resume {run.folder} --steps {2 * run.cfg.steps}")
    return 0


def rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a line to 0."""
    return peak * min(1.0, step / max(1, warmup), (1 + steps - step) / steps)


def train(cfg: Config) -> int:
    """Learn the library (1). Plan, try out (2), pair (3). Descend (5)."""
    run = Run(cfg)
    model, sampler = run.load(BY_SIZE, added=16)  # 2 more than dpo.py: the solver
    task = make_task(cfg.task, cfg.data, natural=not model.is_tiny)
    asked = Asked(task, read_library(cfg.library), model.is_tiny)
    check_flags(cfg, model, asked)
    planner = Prompter(model, asked, cfg.chat)
    cfg.solver = cfg.solver or ("tiny-solver" if model.is_tiny else cfg.model)
    solver = load_model(resolve_model(cfg.solver), run.device).to(run.dtype)
    solver.requires_grad_(False)  # frozen
    guided = Prompter(solver, asked, cfg.chat and not solver.is_tiny)
    run.say(f"solver's prompt {guided.text(task.problem('train', 0, 0) | {'plan': 0})!r}")
    solve = partial(solve_guided, run, solver, guided)
    evaluate_now = partial(evaluate_plans, run, planner, solve)
    optimizer = AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    state = run.start(model, optimizer, Prompter(model, task, cfg.chat))
    run.refresh(sampler, model)
    pairs, ref = state.get("pairs", []), state.get("reference")  # ref (2, P)

    for step in range(state["step"] + 1, cfg.steps + 1):
        began = time.time()
        dpo_step = step - cfg.sft_steps
        if dpo_step <= 0:
            lr = rate(step, cfg.sft_steps, cfg.sft_lr, cfg.warmup_steps)
            rows = structure_rows(cfg, planner, model.eos_ids[:1], step)
            metrics = learn_structure(run, model, rows)
        else:
            lr = rate(dpo_step, cfg.steps - cfg.sft_steps, cfg.lr, cfg.warmup_steps)
            rng = Random(f"batch {cfg.seed} {step}")
            rows = rng.choices(range(len(pairs)), k=cfg.batch_size)
            metrics = learn_pairs(run, model, [pairs[i] for i in rows], ref[:, rows])
        metrics["grad_norm"] = run.update(model, optimizer, lr)
        run.refresh(sampler, model)
        metrics["lr"] = lr
        metrics["tokens_per_s"] = metrics["tokens"] / (time.time() - began)
        run.log(step, metrics, ("loss", "pair_accuracy", "margin", "tokens_per_s"))
        due = cfg.eval_every and step % cfg.eval_every == 0
        if (due or dpo_step == 0) and step < cfg.steps:
            evaluate_now(sampler, step)
        if dpo_step == 0:  # now the navigator is pi_ref
            pairs = sample_plans(run, sampler, planner, solve)
            ref = plan_logprobs(run, sampler, pairs)
            optimizer.state.clear()  # moments of another loss
        if run.after_step(step, model, optimizer, pairs=pairs, reference=ref):
            return run.report(sampler, planner)  # Ctrl-C
    return finish(run, sampler, evaluate_now)


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


# >>> shared: logprobs
def head_logprobs(model: Model, hidden: Tensor, chosen: Tensor, temperature: float) -> tuple:
    """(N,) log-probability of `chosen` and (N,) entropy, from hidden states (N, C)."""
    logits = model.logits(hidden, temperature)  # (N, V)
    logprobs = logits.gather(-1, chosen[:, None])[:, 0] - logits.logsumexp(-1)
    with torch.no_grad():
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    return logprobs, entropy


def chosen_logprobs(model: Model, hidden: Tensor, chosen: Tensor, temperature: float) -> tuple:
    """The same, some positions at a time, computed again going backward."""
    head, logits = head_logprobs, 2**23
    if hidden.is_cuda:  # fused; a tenth of the card
        head = torch.compile(head_logprobs, dynamic=True)
        logits = torch.cuda.mem_get_info()[1] // 160
    size = max(1, logits // model.config["vocab_size"])
    if len(chosen) <= size:
        return head(model, hidden, chosen, temperature)
    parts = []
    for h, ids in zip(hidden.split(size), chosen.split(size), strict=True):
        parts.append(checkpoint(head, model, h, ids, temperature, use_reentrant=False))
    logprobs, entropy = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def completion_logprobs(model: Model, tokens: Tensor, mask: Tensor, temperature=1.0) -> tuple:
    """Log-probabilities of tokens[:, 1:] and entropies, (B, T-1), 0 where mask (B, T) is 0."""
    where = mask[:, 1:].bool()  # only these go through the head
    hidden = model(tokens[:, :-1])[where]  # (N, C)
    parts = chosen_logprobs(model, hidden, tokens[:, 1:][where], temperature)
    zeros = parts[0].new_zeros(where.shape)
    return zeros.masked_scatter(where, parts[0]), zeros.masked_scatter(where, parts[1])


# <<< shared: logprobs


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


if __name__ == "__main__":
    os._exit(main(train, Config))  # threads of gloo may abort sys.exit
