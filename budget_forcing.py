"""Budget forcing at test time: s1 (arXiv:2501.19393 sec. 3), and the metrics it is judged by.

A model thinks, writes an end-of-thinking delimiter, and answers. Only that boundary is
touched; nothing is trained. Too long: after M thinking tokens the delimiter and the answer's
beginning are appended. Too short: the delimiter that the model wrote is taken away, "Wait" is
appended, and the model goes on, up to n times.

    Control     = mean over runs of [a_min <= a <= a_max]     a: mean thinking tokens  (1)
    Scaling     = mean over pairs of runs, b > a,
                  of (f(b) - f(a)) / (b - a)                  f: accuracy              (2)
    Performance = max f                                                                (3)
    f(n) - f(0) = (1 - f(0)) g - f(0) h                                                (4)
                  g: wrong answers that n Waits repair
                  h: right ones that they flip

Eq. 2 is printed per 1000 tokens, as written, and per doubling (x = log2 a), the unit of the
paper's table. Eq. 4 is ours: against the same problems and random numbers without a Wait.

Run
    python budget_forcing.py                                        # one thread, minutes
    python budget_forcing.py --model Qwen2.5-1.5B --task countdown  # one GPU
    torchrun --standalone --nproc_per_node=8 budget_forcing.py --model Qwen2.5-1.5B
    An s1 model: --chat --think_start "<|im_start|>think" --think_stop "<|im_start|>"
        --think_end "<|im_start|>answer" --final_prefix "Final Answer:"
    The paper's baselines: docs/experiments/budget_forcing.py

Expect
    80 s of CPU time, 0.7 GB. Means of seeds 0 to 2, 200 held-out problems:
    M = 16 to 512: accuracy 0.11 -> 0.37; one Wait 0.49, two 0.51, four 0.31.
    models/tiny gives up on misses, so a Wait has something to repair.
    --model tiny-rl stops on hits: 0.18 -> 0.72, one Wait 0.60.
    docs/experiments/early_answers.py: one that answers too early, 0, 1, 8 Waits 0.20, 0.30, 0.42.

Differs from the paper in: one budget for all rounds (as in its README; --budget_mode
per_round is its evaluation code), temperature 1, tags in place of "Final Answer:"
(--final_prefix).

Legend: B answers (rows), T tokens, P prompts, C hidden size, V vocabulary, H query heads,
K key heads, D head size, S cache positions.
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
from itertools import combinations
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rewards import (
    ASSISTANT_PREFIX,
    BadInput,
    Completion,
    describe_evaluation,
    fill_template,
    heldout,
    in_groups,
    make_task,
    mean,
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
    model: str = option("tiny", "one of models/, a folder, or a name on the hub")
    task: str = option("countdown", "multiplication, gsm8k, math, FILE.py:Class :knob=1")
    data: str = option("", "JSONL file of the problems (gsm8k, math)")
    chat: bool = option(False, "use the model's chat template")
    max_new_tokens: int = option(0, "longest completion, thinking and answer, 0: by size")
    temperature: float = option(1.0, "of sampling, 0: greedy")
    eval_problems: int = option(200, "held-out problems", 1)
    seed: int = option(0, "seed of the sampling; the problems stay")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "auto: cuda if any")
    out: str = option("", "run folder, default out/SCRIPT-TASK-SEED-TIME")
    resume: str = option("", "run folder to go on with")
    caps: str = option("", "thinking budgets M, rising, none: by size")
    waits: str = option("1,2,4", "numbers n of Waits at the largest budget")
    budget_mode: Literal["global", "per_round"] = option("global", "M for all rounds or each")
    wait_str: str = option("", "in place of the delimiter, none: wait or Wait by size")
    think_start: str = option("", "opens the thinking, none: as the prompt has it")
    think_end: str = option("</think>", "ends the thinking")
    think_stop: str = option("", "what counts as the model's end of it, none: think_end")
    final_prefix: str = option("<answer>", "comes after think_end where the budget ended it")
    steps = 0  # no flag: the number of settings


BY_SIZE = {  # below 10 M parameters (made here), below 1 B, above
    "caps": ("16,32,64,128,256,512", "32,64,128,256", "256,512,1024,2048,4096"),
    "max_new_tokens": (544, 320, 4608),
    "wait_str": ("wait", "Wait", "Wait"),
}


# ------------------------------------------------------------ algorithm


@dataclass
class Rules:
    """The limits and strings of a setting."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    eos_ids: list[int]
    answer_stops: tuple[str, ...]
    max_thinking: int  # M
    max_answer: int
    n_wait: int | None = None
    wait: str = ""  # "": the delimiter is taken away and nothing appended
    budget_mode: str = "global"
    think_end: str = "</think>"
    think_stop: str = ""
    final_prefix: str = "<answer>"

    def __post_init__(self):
        stop = self.think_stop or self.think_end
        ids = self.encode(stop)
        self.stop_ids = set(self.eos_ids)  # an end of text also ends the thinking
        self.stop_texts = [stop] if len(ids) > 1 else []
        if len(ids) == 1:  # no text to search for
            self.stop_ids.add(ids[0])
        self.held_ids = sorted({*self.eos_ids, *ids[:1]})  # while tokens are missing
        rounds = 1 + (self.n_wait or 0) if self.budget_mode == "per_round" else 1
        appended = (self.n_wait or 0) * len(self.encode(self.wait))
        appended += 2 * len(self.boundary("length", "x")) + 8
        self.room = self.max_thinking * rounds + self.max_answer + appended  # after the prompt

    def boundary(self, finish: str, thought: str) -> list[int]:
        """What follows the thinking: after a forced end also the answer's beginning."""
        if finish == "stop" or not self.think_end:
            return self.encode(self.think_end)
        newline = "" if thought.endswith("\n") else "\n"
        return self.encode(newline + self.think_end + self.final_prefix)


@dataclass
class Round:
    """Tokens drawn in a row under one limit: one call of the reference's engine."""

    max_tokens: int
    min_tokens: int
    emitted: list[int] = field(default_factory=list)
    finish: str = ""  # "stop" or "length"


class Row:
    """One completion as a state machine: `take` gets each token drawn and edits `ids`.

    The model is to read `ids` and has read `ids[:fed]`. Sources: sec. 3.1; simplescaling/s1,
    README.md (global) and lm_eval/models/vllm_causallms.py (per_round).
    """

    def __init__(self, prompt: list[int], rules: Rules):
        self.rules, self.ids = rules, list(prompt)
        self.start = self.fed = self.answer_at = len(prompt)
        self.logprobs: list[float | None] = []  # of ids[start:], None where appended
        self.rounds: list[Round] = []  # the thinking's, then the answer's
        self.thinking, self.done = True, False
        self.waits, self.forced, self.thought = 0, False, ""
        # the evaluation code asks for one token even before the first Wait
        least = int(rules.budget_mode == "per_round" and rules.n_wait is not None)
        self.rounds.append(Round(rules.max_thinking, least))

    @property
    def num_drawn(self) -> int:
        return sum(len(r.emitted) for r in self.rounds)

    def take(self, token: int, logprob: float) -> None:
        now = self.rounds[-1]
        now.emitted.append(token)
        self.append([token], logprob)
        found = self.find_stop(token)
        if found is None and len(now.emitted) < now.max_tokens:
            return
        now.finish = "stop" if found else "length"
        if self.thinking:
            at, shared = found or (len(self.ids), "")
            self.end_round(at, shared)
        else:
            self.done = True

    def find_stop(self, token: int) -> tuple | None:
        """Where in `ids` the round's end begins, and what text shares a token with it."""
        ids, words = self.rules.eos_ids, self.rules.answer_stops
        if self.thinking:
            ids, words = self.rules.stop_ids, self.rules.stop_texts
        if token in ids:
            return len(self.ids) - 1, ""
        window = max(self.answer_at, len(self.ids) - 32)
        for word in words:
            if word in self.rules.decode(self.ids[window:]):
                at = len(self.ids) - 1
                while word not in self.rules.decode(self.ids[at:]):
                    at -= 1
                return at, self.rules.decode(self.ids[at:]).partition(word)[0]
        return None

    def end_round(self, at: int, shared: str) -> None:
        """The thinking stopped before ids[at]: extend it, or go over to the answer."""
        rules, finish, left = self.rules, self.rounds[-1].finish, self.rules.max_thinking
        if rules.budget_mode == "global":
            left -= self.num_drawn
        if finish == "stop" and self.waits < (rules.n_wait or 0) and left > 0:
            self.cut(at, shared)
            self.append(rules.encode(rules.wait))
            self.waits += 1
            self.rounds.append(Round(left, 1))  # a delimiter right after Wait would undo it
            return
        self.thought = rules.decode(self.ids[self.start : at]) + shared
        if rules.budget_mode == "per_round" and len(self.ids) - self.start > rules.max_thinking:
            # the evaluation code shows all of it, but the answer sees M tokens
            at, shared = min(at, self.start + rules.max_thinking), ""
        self.cut(at, shared)
        self.answer_at, self.thinking, self.forced = len(self.ids), False, finish == "length"
        self.append(rules.boundary(finish, self.thought))
        self.rounds.append(Round(rules.max_answer, 0))

    def cut(self, at: int, shared: str = "") -> None:
        """Forget ids[at:]; put back the text of a token that was half the delimiter's."""
        del self.ids[at:], self.logprobs[at - self.start :]
        self.fed = min(self.fed, at)
        self.append(self.rules.encode(shared))

    def append(self, ids: list[int], logprob: float | None = None) -> None:
        self.ids += ids
        self.logprobs += [logprob] * len(ids)

    def text(self) -> str:
        end = -1 if self.ids[-1] in self.rules.eos_ids else None
        return self.thought + self.rules.decode(self.ids[self.answer_at : end])

    def record(self) -> dict:
        drawn = [p for p in self.logprobs if p is not None]
        return {
            "waits": self.waits,
            "thinking": sum(len(r.emitted) for r in self.rounds[:-1]),  # without Waits
            "forced": self.forced,
            "filled": True,  # a baseline may give up instead
            "answered": self.rounds[-1].finish == "stop",
            "sampled": self.num_drawn,
            "score": math.exp(mean(drawn)),
        }


@torch.inference_mode()
def force_budget(model: "Model", rows: list[Row], uniforms: Tensor, temperature: float) -> None:
    """Run every row to its end, by uniforms (B, rules.room).

    All rows read one token a step, each at its own place: drawn, or appended. The i-th draw of
    a row uses its i-th number, so that a larger budget begins as a smaller one.
    """
    s = Decoding(model, [row.ids for row in rows], uniforms, temperature)
    s.count = s.count.repeat(len(rows))  # of each row
    held = torch.zeros_like(s.last, dtype=torch.bool)  # (B, 1): may not end its round
    banned = torch.zeros(model.config["vocab_size"], dtype=torch.bool, device=held.device)
    banned[rows[0].rules.held_ids] = True

    def step():
        hidden = model(s.last, s.cache)[:, 0]
        logits = model.logits(hidden, temperature or 1.0)
        s.emit(logits.masked_fill(held & banned, -torch.inf))  # (B, V)

    advance, live, steps = step, rows, 0
    if not held.is_cpu:
        s.cache.width += uniforms.shape[1]
    while not all(row.done for row in live):
        alive = [i for i, row in enumerate(live) if not row.done]
        if held.is_cpu and len(alive) <= 0.75 * len(live):
            live, held, s.count = [live[i] for i in alive], held[alive], s.count[alive]
            s.rows, s.last = s.rows[alive], s.last[alive]
            s.cache.select(torch.tensor(alive))
        for row in live:  # at the start, and after a bare cut, the last token once more
            row.fed = min(row.fed, len(row.ids) - 1)
        s.last.copy_(torch.tensor([row.ids[row.fed : row.fed + 1] for row in live]))
        s.cache.lengths.copy_(torch.tensor([row.fed for row in live]))
        s.count.copy_(torch.tensor([row.num_drawn for row in live]))
        now = [row.rounds[-1] for row in live]
        held.copy_(torch.tensor([[len(r.emitted) < r.min_tokens] for r in now]))
        if held.is_cpu:
            s.cache.width = max(row.fed for row in live) + 1
        if held.is_cuda and steps == 1:  # after an eager one
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            advance = graph.replay
        advance()
        steps += 1
        logprobs = s.logprobs[s.rows, s.count - 1].tolist()
        for row, (token,), logprob in zip(live, s.last.tolist(), logprobs, strict=True):
            row.fed += 1
            if row.fed == len(row.ids) and not row.done:  # else the draw comes too early
                row.take(token, logprob)


def budget_metrics(runs: list[dict]) -> dict[str, float]:
    """Eq. 1 to 3 of runs {"a": tokens, "f": accuracy, "a_min", "a_max": limits or None}."""
    inside = [(r["a_min"] or 0) <= r["a"] <= (r["a_max"] or math.inf) for r in runs]
    linear, log2 = [], []
    for one, other in combinations(sorted(runs, key=itemgetter("a", "f")), 2):
        longer = other["a"] > one["a"]  # else 0, but the pair counts
        gain = other["f"] - one["f"]
        linear.append(1000 * gain / (other["a"] - one["a"]) if longer else 0.0)
        log2.append(gain / math.log2(other["a"] / one["a"]) if longer else 0.0)
    return {
        "control": mean(inside),
        "performance": max(r["f"] for r in runs),
        "scaling": mean(linear or [0.0]),  # per 1000 tokens
        "scaling_log2": mean(log2 or [0.0]),  # per doubling
    }


# ----------------------------------------------------------- evaluation


def numbers(text: str, name: str) -> list[int]:
    """Rising whole numbers, as 1,2,4."""
    with reading(f"--{name} {text}"):
        found = [int(word) for word in text.split(",")]
    if found != sorted(set(found)) or found[0] < 1:
        raise BadInput(f"--{name} {text}: rising whole numbers are needed, as 1,2,4")
    return found


def settings(cfg: Config) -> list[tuple]:
    """(side, value, limits) of every row of the table."""
    caps, waits = numbers(cfg.caps, "caps"), numbers(cfg.waits, "waits")
    if cfg.max_new_tokens <= caps[-1]:
        raise BadInput(f"--max_new_tokens {cfg.max_new_tokens}: no answer fits after {caps[-1]}")
    plan = [("cap", cap, {"max_thinking": cap}) for cap in caps]
    for n in waits:
        plan.append(("wait", n, {"max_thinking": caps[-1], "n_wait": n, "wait": cfg.wait_str}))
    return plan


def make_rules(cfg: Config, prompter: "Prompter", model: "Model", **limits) -> Rules:
    for name in ("think_end", "think_stop", "final_prefix", "budget_mode"):
        limits[name] = getattr(cfg, name)
    limits["max_answer"] = cfg.max_new_tokens - numbers(cfg.caps, "caps")[-1]
    return Rules(prompter.encode, prompter.decode, model.eos_ids, prompter.stops, **limits)


def complete(
    run: "Run", model: "Model", prompter: "Prompter", rules: Rules, asked: list, kind: type = Row
) -> tuple:
    """Records and completions of every (number, sample, problem), on all ranks."""
    records, done = [], []
    mine = asked[run.rank :: run.world]
    mine = [(n, sample, p, prompt_ids(run.cfg, prompter, p)) for n, sample, p in mine]
    longest = max((len(ids) for _, _, _, ids in mine), default=0)
    for part in in_groups(mine, rows_at_once(model, longest + rules.room) or 1):
        rows = [kind(ids, rules) for _, _, _, ids in part]
        u = [row_uniforms(run.cfg.seed, 0, n, sample, rules.room) for n, sample, _, _ in part]
        force_budget(model, rows, torch.tensor(np.stack(u)), run.cfg.temperature)
        for (n, sample, p, ids), row in zip(part, rows, strict=True):
            logprobs = [0.0 if x is None else x for x in row.logprobs]
            if not all(map(math.isfinite, logprobs)):
                raise FloatingPointError("logits are not finite")
            text, tokens, record = row.text(), row.ids[row.start :], row.record()
            score = prompter.task.score(text, p)
            about = {"number": n, "sample": sample, "correct": bool(score["correct"])}
            records.append(about | {"answer": score["answer"]} | record)
            done.append(Completion(n, p, ids, tokens, logprobs, record["answered"], text, score))
    records = sorted(sum(run.gather(records), []), key=itemgetter("number", "sample"))
    return records, sorted(sum(run.gather(done), []), key=attrgetter("number"))


def prompt_ids(cfg: Config, prompter: "Prompter", problem: dict) -> list[int]:
    """The prompt; --think_start stands in place of the task's own <think>."""
    text = prompter.text(problem)
    if cfg.think_start:
        text = text.rstrip().removesuffix(ASSISTANT_PREFIX).removesuffix("<think>")
        text += cfg.think_start
    return prompter.encode(text)


def outcome(records: list[dict], natural: list[dict]) -> dict[str, float]:
    """Means over the records, and eq. 4 against the same problems without a Wait."""
    correct, n = [r["correct"] for r in records], len(records)
    found = {"thinking_tokens": mean(r["thinking"] for r in records if r["filled"])}
    found["accuracy"], found["accuracy_se"] = mean(correct), np.std(correct) / max(1, n - 1) ** 0.5
    for name in ("sampled", "waits", "forced", "answered", "filled"):
        found[name] = mean(r[name] for r in records)
    if natural:
        pairs = list(zip(correct, [r["correct"] for r in natural], strict=True))
        change = [after - before for after, before in pairs]
        found["gain"], found["gain_se"] = mean(change), np.std(change) / n**0.5
        found["repaired"] = mean(after for after, before in pairs if not before)
        found["flipped"] = mean(not after for after, before in pairs if before)
    return found


LIMITED = "cap", "reject", "prompt"  # whose value is a_max; the last two are baselines


def table_of(rows: list[tuple]) -> str:
    """A line for each (side, value, found), then eq. 1 to 3 of the sides with several."""
    columns = "thinking_tokens accuracy accuracy_se gain repaired flipped forced".split()
    lines = [" " * 13 + "   tokens accuracy       se     gain repaired  flipped   forced"]
    for side, value, found in rows:
        cells = [f"{found[name]:9.3f}" if name in found else " " * 9 for name in columns]
        lines.append(f"{side:8}{value:5}{''.join(cells)}")
    for side in dict.fromkeys(side for side, _, _ in rows):
        runs = []
        for value, found in [row[1:] for row in rows if row[0] == side and row[2]["filled"]]:
            point = {"a": found["thinking_tokens"], "f": 100 * found["accuracy"], "a_min": None}
            runs.append(point | {"a_max": value if side in LIMITED else None})
        if len(runs) > 1:
            parts = [f"{name} {x:.4g}" for name, x in budget_metrics(runs).items()]
            lines.append(f"{side:8}{', '.join(parts)}")
    return "\n".join(lines)


def named(found: dict[str, float], model: str, side: str) -> dict[str, float]:
    """The same numbers as NAME/MODEL/SIDE, a standard error with _se at its end."""
    metrics = {}
    for name, value in found.items():
        name, error, _ = name.partition("_se")
        metrics[f"{name}/{Path(model).name}/{side}{error}"] = value
    return metrics


def solve(cfg: Config) -> int:
    """For every budget, then every number of Waits at the largest: think, answer, count."""
    run = Answers(cfg)
    model, sampler = run.load(BY_SIZE)
    run.plan = plan = settings(cfg)
    cfg.steps = len(plan)
    task = make_task(cfg.task, cfg.data, natural=not model.is_tiny)
    prompter = Prompter(model, task, cfg.chat)
    state = run.start(model, None, prompter)
    asked = [(n, 0, problem) for n, problem in enumerate(heldout(task, cfg.eval_problems))]
    natural, table = [], []

    for step, (side, value, limits) in enumerate(plan, 1):
        setting, began = [cfg.model, side, value, limits], time.time()
        if step <= state["step"]:
            records, done = state["records"][step - 1], []
        else:
            rules = make_rules(cfg, prompter, model, **limits)
            records, done = complete(run, sampler, prompter, rules, asked)
        found = outcome(records, natural if side == "wait" else [])
        table.append((side, value, found))
        if side == "cap":
            natural = records  # in the end those of the largest budget
        if done:
            per_s = sum(record["sampled"] for record in records) / (time.time() - began)
            metrics = named(found, cfg.model, side) | {"tokens_per_s": per_s}
            run.log(step, metrics, list(metrics)[:2])
            run.keep_samples(step, prompter, done[:2], [0.0, 0.0])
            if run.after_step(step, setting, records):
                return run.report(sampler, prompter)  # Ctrl-C
    run.say(f"{table_of(table)}\n{run.folder} holds records and samples")
    return 0


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


# ---- on top of the machine


class Answers(Run):
    """A run that trains nothing: a step is a setting of `plan`, its checkpoint the records."""

    def resume(self, model, optimizer):
        """The records of the settings that are done, if they are of this plan."""
        found = []
        for folder, row in zip(checkpoints(self.folder), self.plan, strict=False):
            saved, setting = read_json(folder / "records.json"), [self.cfg.model, *row]
            if saved.get("of") != setting:
                raise BadInput(f"{folder} is of {saved.get('of')}, not of {setting}")
            found.append(saved["records"])
        return {"step": len(found), "records": found}

    def after_step(self, step, setting, records):
        """Save the records; True on all ranks once one got Ctrl-C or SIGTERM."""
        self.signal = max(self.gather(self.got))
        if self.rank == 0:
            folder = self.folder / f"step-{step:06d}"  # appears whole or not at all
            unfinished = folder.with_suffix(".tmp")
            unfinished.mkdir(exist_ok=True)
            text = json.dumps({"of": setting, "records": records})
            (unfinished / "records.json").write_text(text)
            unfinished.rename(folder)
        self.gather(0)  # all wait for the disk
        return self.signal > 0


if __name__ == "__main__":
    os._exit(main(solve, Config))  # threads of gloo may abort sys.exit
