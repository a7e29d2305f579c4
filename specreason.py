"""SpecReason: a small model writes the reasoning step by step, a large one judges every step
(arXiv:2504.07891). And speculative decoding, the same token by token and exact (arXiv:2211.17192).

A step of thinking need not be worded as the base model would word it, it only has to be good. So
the draft model writes a step, the base reads it in one pass, which costs little more than writing
one token, and gives it 0 to 9 points; below the threshold the base writes the step itself.

    step = draft(text), kept if u(text, step) >= threshold, else step = base(text)         (1)
    u = sum_d d p(d) / sum_d p(d)   the expected digit after a request for one             (2)
    u = 10 F(min_t -e_t)    e_t = max(0, -log p(x_t) - H_t): by how much token t           (3)
        surprises the base more than expected (H_t: its entropy); F: the distribution of
        min_t -e_t over the base's own steps; u < 1 is as bad as the worst tenth of them
    x ~ q of the draft, kept with probability min(1, p(x) / q(x)), p of the base; the      (4)
        first one refused is drawn again, from max(0, p - q) / (1 - alpha);
        alpha = sum_x min(p(x), q(x))

(4) is exact: x is proposed and kept with probability q(x) min(1, p(x) / q(x)) = min(p, q), in all
alpha; with probability 1 - alpha it is drawn again, which adds max(0, p - q). The sum is p(x),
whatever q is: a bad draft costs time, never quality. (1) has no such guarantee.

Run
    python specreason.py  # two CPU cores, no network, minutes
    python specreason.py --model Qwen2.5-1.5B --task countdown  # one GPU, draft Qwen2.5-0.5B
    torchrun --standalone --nproc_per_node=8 specreason.py --model Qwen2.5-1.5B --task countdown
    The paper: --score digit --threshold 7 --temperature 0.6 --top_p 0.95

Expect
    Seeds 0 to 2, 510 problems: accuracy of base 0.73, of SpecReason 0.68 (-4.5 +- 2.3 points),
    1.10, 1.34 and 1.12 times as fast; speculative decoding 1.45, 1.58, 1.97 (of 40).
    A base of 14 layers, searches that end (docs/experiments/deep_base.py): accuracy 0.938 and
    0.937 (-0.1 +- 0.8 points), 1.77, 1.77 and 1.85 times as fast.

Differs from the paper in: (3), as a tiny base cannot read a request for a digit; a step keeps its
delimiter; no answer exceeds --max_new_tokens. Controls: docs/experiments/specreason.py.

Legend: T tokens, V vocabulary, B rows, P prompts, C hidden size, D head size, H and K heads.
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
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from operator import attrgetter
from pathlib import Path
from statistics import stdev
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
    model: str = option("tiny-rl", "base: one of models/, a folder, or a name on the hub")
    draft: str = option("", "same tokenizer, default: the smallest of its family")
    task: str = option("countdown", "multiplication, gsm8k, math, FILE.py:Class :knob=1")
    data: str = option("", "JSONL file of the problems (gsm8k, math)")
    chat: bool = option(False, "use the model's chat template")
    max_new_tokens: int = option(0, "longest answer (paper: 8192), 0: by size")
    max_step_tokens: int = option(0, "longest step (paper: 512), 0: by size")
    temperature: float = option(1.0, "of both models (paper: 0.6), 0: greedy")
    top_p: float = option(1.0, "nucleus of both models (paper: 0.95)", 0.01)
    eval_problems: int = option(170, "held-out problems", 1)
    save_every: int = option(50, "problems between checkpoints", 1)
    seed: int = option(0, "seed of problems and sampling")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "auto: cuda if any")
    out: str = option("", "run folder, default out/SCRIPT-TASK-SEED-TIME")
    resume: str = option("", "run folder to go on with")
    score: Literal["likelihood", "digit"] = option("likelihood", "u of eq. 3, or of eq. 2")
    method: Literal["average", "greedy"] = option("average", "the digit: expected or likeliest")
    threshold: float = option(0.3, "least u of a kept step (paper, for a digit: 7)")
    first_n: int = option(0, "first steps that the base writes unasked")
    gamma: int = option(4, "tokens drafted per pass of the base in eq. 4", 1)


# parameters of the base: below 10 M, below 1 B, above
BY_SIZE = {"max_new_tokens": (512, 512, 2048), "max_step_tokens": (48, 128, 512)}
DRAFTS = {
    "tiny": "tiny-draft",
    "Qwen2.5": "Qwen2.5-0.5B",
    "Qwen3": "Qwen3-0.6B-Base",
    "SmolLM2": "SmolLM2-135M-Instruct",
}
REQUEST = "\nUser: Rate only the last step from 0 (wrong) to 9 (right), by facts and logic."
REQUEST += "\nAssistant: The quality score is: "


# ---- token by token


def distribution(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Probabilities (..., V) of the next token: p and q of eq. 4 alike."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        ordered = ordered / ordered.sum(-1, keepdim=True)
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    return probs


def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """min(1, p/q) of eq. 4, elementwise; nan where the draft never draws."""
    return torch.where(q > 0, (p / q).clamp(max=1), torch.nan)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(0, p - q), normalised, (V,); p itself if q is p."""
    rest = (p - q).clamp(min=0)
    return rest / rest.sum() if rest.sum() > 0 else p


def verify(p: Tensor, q: Tensor, drafted: Tensor, uniforms: Tensor) -> tuple:
    """Eq. 4: how many of n drafted tokens (n,) stay, and the distribution of the next one (V,).

    p (n+1, V), q (n, V), uniforms (n,) in [0, 1). Source: arXiv:2211.17192 alg. 1.
    """
    n = len(drafted)
    places = torch.arange(n, device=p.device), drafted
    accepted = uniforms < acceptance(p[places], q[places])
    kept = int(accepted.long().cumprod(0).sum())  # up to the first refusal
    return kept, p[n] if kept == n else residual(p[kept], q[kept])


class Reader:
    """A model, its cache with the first `known` tokens of a text, its own random numbers."""

    def __init__(self, model, size, capacity, cfg, stream):
        self.model, self.size, self.cfg = model, size, cfg
        self.cache, self.known = Cache(model, 1, capacity), 0
        self.random = np.random.default_rng(stream)

    def read(self, text, count=1):
        """Logits (count, V) after each of the last `count` tokens; runs what is not known."""
        start = min(self.known, len(text) - count)
        self.cache.lengths.fill_(start)  # where to write
        self.cache.width = self.known = len(text)  # what attention sees
        tokens = torch.tensor([text[start:]], device=self.cache.lengths.device)
        hidden = self.model(tokens, self.cache)[0, -count:]  # (count, C)
        return self.model.logits(hidden)[:, : self.size]

    def probs(self, text, count=1):  # (count, V)
        return distribution(self.read(text, count), self.cfg.temperature, self.cfg.top_p)

    def uniforms(self, like, count):
        return like.new_tensor(self.random.random(count, np.float32))

    def draw(self, probs):
        return int(draw(probs[None], self.uniforms(probs, 1)[None]))

    def forget(self, length):
        """The text goes on differently after this many tokens."""
        self.known = min(self.known, length)


def write(reader: Reader, text: list[int], limit: int, ends: set[int]) -> list[int]:
    """Continue the text up to one of `ends` or `limit` tokens."""
    step: list[int] = []
    while len(step) < limit and not (step and step[-1] in ends):
        step.append(reader.draw(reader.probs(text + step)[0]))
    return step


def write_speculatively(
    base: Reader, draft: Reader, text: list, limit: int, ends: set, gamma: int, rounds: list
) -> list[int]:
    """As write(base, ...), and as likely, by eq. 4; rounds gets (tokens drafted, kept)."""
    step: list[int] = []
    while len(step) < limit and not (step and step[-1] in ends):
        so_far, drafted, q = text + step, [], []
        while len(drafted) < gamma and not (drafted and drafted[-1] in ends):
            q.append(draft.probs(so_far + drafted)[0])
            drafted.append(draft.draw(q[-1]))
        p = base.probs(so_far + drafted, len(drafted) + 1)  # all in one pass
        proposed = torch.tensor(drafted, device=p.device)
        kept, after = verify(p, torch.stack(q), proposed, base.uniforms(p, len(drafted)))
        rounds.append((len(drafted), kept))
        step += drafted[:kept]
        if not (step and step[-1] in ends):
            step.append(base.draw(after))
        step = step[:limit]
        for reader in (base, draft):
            reader.forget(min(len(so_far) + kept, len(text) + limit))
    return step


# ---- step by step


@dataclass
class Step:
    tokens: list
    writer: str  # "draft" or "base"
    score: float | None = None  # u of the draft's step; None: not asked
    drafted: list | None = None  # the draft's step, kept or not


def reason(
    prompt: list,
    write_draft: Callable,
    write_base: Callable,
    score: Callable,
    finished: Callable,
    settle: Callable,
    threshold: float,
    first_n: int = 0,
    token_budget: int = 8192,
    drop: tuple = (),
) -> tuple:
    """Eq. 1: the steps, and why they ended ("budget" or "finished").

    settle(length) cuts both caches to what is kept; finished(steps) looks at the last step. Tokens
    in `drop` leave a step that does not finish. Source: the paper's spec_reason.py.
    """
    text, steps, kept, why = list(prompt), [], 0, ""
    while not why:
        step = Step([], "base")
        if len(steps) >= first_n:
            step.drafted = write_draft(text)
            step.score = score(text, step.drafted)
            if step.score >= threshold:
                step.tokens, step.writer = step.drafted, "draft"
        settle(len(text) + len(step.tokens))  # of a refused step nothing stays
        if step.writer == "base":
            step.tokens = write_base(text)
        steps.append(step)
        kept += len(step.tokens)  # what is refused is not counted
        if kept >= token_budget:
            why = "budget"
        elif finished(steps):
            why = "finished"
        dropped = [i for i, token in enumerate(step.tokens) if token in drop]
        if dropped and not why and step.score is not None:
            settle(len(text) + dropped[0])
            step.tokens = [token for token in step.tokens if token not in drop]
        text += step.tokens
    return steps, why


def read_digit(logprobs: Tensor, digits: list[int], method: str) -> float:
    """Eq. 2 from log-probabilities (V,) and the ids of 0 to 9, as the paper's spec_reason.py:
    of the ten likeliest tokens, or greedy of the likeliest; 0 if there is no digit.
    """
    top = logprobs.topk(min(10, len(logprobs)))
    likeliest, tops = top.indices.tolist(), top.values.exp().tolist()
    if method == "greedy":
        return float(digits.index(likeliest[0])) if likeliest[0] in digits else 0.0
    probs = {digits.index(i): p for i, p in zip(likeliest, tops, strict=True) if i in digits}
    mass = sum(probs.values())
    return sum(digit * p for digit, p in probs.items()) / mass if mass else 0.0


def least_agreement(logits: Tensor, step: list[int]) -> float:
    """min_t -e_t of eq. 3 from logits (T, V); 0: nothing surprises more than expected."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs[range(len(step)), step]
    entropy = torch.special.entr(logprobs.exp()).sum(-1)
    return float((chosen + entropy).clamp(max=0).min())


# ---- the comparison


def load_draft(run: "Run", base: "Model") -> "Model":
    """--draft, or the smallest model of the base's family."""
    cfg = run.cfg
    cfg.draft = cfg.draft or next((DRAFTS[name] for name in DRAFTS if name in cfg.model), "")
    if not cfg.draft:
        raise BadInput(f"--model {cfg.model}: name its --draft")
    draft = load_model(resolve_model(cfg.draft), run.device).to(run.dtype).requires_grad_(False)
    if draft.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise BadInput(f"--draft {cfg.draft} has another tokenizer than --model {cfg.model}")
    return draft


class Pair:
    """Base and draft, which answer one problem after the other."""

    def __init__(self, cfg, base, draft, prompter):
        self.cfg, self.base, self.draft, self.prompter = cfg, base, draft, prompter
        self.size = min(base.config["vocab_size"], draft.config["vocab_size"])
        self.eos = set(base.eos_ids + draft.eos_ids)
        line = "\n" if base.is_tiny else "\n\n"  # what ends a step
        self.ends = self.eos | {i for i in range(self.size) if line in prompter.decode([i])}
        self.marks = prompter.stops or [prompter.decode([i]) for i in self.eos]  # of an answer
        self.drop = tuple({prompter.tokenizer.token_to_id("</think>")} - {None})
        self.digits = [prompter.encode(str(digit))[-1] for digit in range(10)]
        self.request = [] if base.is_tiny else prompter.encode(REQUEST)
        self.own_steps = []  # F of eq. 3: min_t -e_t of the base's steps, sorted
        self.clock = time.perf_counter

    def ways(self, number):  # name: arguments of answer
        cfg = self.cfg
        judged = {"score": self.points, "threshold": cfg.threshold, "first_n": cfg.first_n}
        return {"base": {}, "spec_decode": {"gamma": cfg.gamma}, "specreason": judged}

    def answer(self, number, problem, score=None, threshold=0.0, first_n=0, gamma=0):
        """An answer, its steps, its record. No score: the base writes all; gamma: by eq. 4."""
        cfg, given = self.cfg, self.prompter.encode(self.prompter.text(problem))
        end = len(given) + cfg.max_new_tokens
        capacity = end + gamma + len(self.request)
        base = Reader(self.base, self.size, capacity, cfg, (cfg.seed, 0, number, 0))
        draft = Reader(self.draft, self.size, capacity, cfg, (cfg.seed, 1, number, 0))
        spent, rounds = {"draft": 0.0, "score": 0.0, "base": 0.0}, []

        def timed(part, function, *arguments):
            began = self.clock()
            result = function(*arguments)
            spent[part] += self.clock() - began
            return result

        def limits(text):
            return min(cfg.max_step_tokens, end - len(text)), self.ends

        def write_draft(text):
            return timed("draft", write, draft, text, *limits(text))

        def write_base(text):
            if gamma:
                arguments = *limits(text), gamma, rounds
                return timed("base", write_speculatively, base, draft, text, *arguments)
            return timed("base", write, base, text, *limits(text))

        def settle(length):
            base.forget(length)
            draft.forget(length)

        unasked = first_n if score else cfg.max_new_tokens  # all steps
        judge = partial(timed, "score", score, base)
        parts = write_draft, write_base, judge, self.finished, settle
        began = self.clock()
        steps, why = reason(given, *parts, threshold, unasked, cfg.max_new_tokens, self.drop)
        seconds = self.clock() - began
        tokens = [token for step in steps for token in step.tokens]
        text = self.prompter.decode([token for token in tokens if token not in self.eos])
        found = self.prompter.task.score(text, problem)
        done = Completion(number, problem, given, tokens, [], why == "finished", text, found)
        spent = {"seconds": seconds} | {f"seconds_{part}": spent[part] for part in spent}
        return done, steps, spent | count(done, steps, rounds)

    def finished(self, steps):
        """An answer, an end token, or a step repeated (tiny models go on)."""
        text = self.prompter.decode(steps[-1].tokens)
        again = len(steps) > 2 and steps[-1].tokens == steps[-2].tokens
        return (again and not self.base.is_tiny) or any(mark in text for mark in self.marks)

    def points(self, base, text, step):  # u, by eq. 2 or 3
        if self.cfg.score == "digit":
            logits = base.read(text + step + self.request)[0]
            base.forget(len(text) + len(step))  # the request
            return read_digit(logits.log_softmax(-1), self.digits, self.cfg.method)
        logits = base.read(text + step, len(step) + 1)[:-1]  # (T, V)
        below = bisect_right(self.own_steps, least_agreement(logits, step))
        return min(9.0, 10 * below / len(self.own_steps))

    def reread(self, done):  # the base's logits (T, V)
        text = torch.tensor([done.prompt + done.tokens], device=self.base.lm_head.weight.device)
        hidden = self.base(text[:, :-1])[0, -len(done.tokens) :]  # (T, C)
        return self.base.logits(hidden)[:, : self.size]

    def calibrate(self):
        """F of eq. 3, from the base's own steps on training problems."""
        for number in range(24):
            problem = self.prompter.task.problem("train", self.cfg.seed, number)
            done, steps, _ = self.answer(number, problem)
            parts = self.reread(done).split([len(step.tokens) for step in steps])
            for logits, step in zip(parts, steps, strict=True):
                self.own_steps.append(least_agreement(logits, step.tokens))
        self.own_steps.sort()


def count(done: Completion, steps: list[Step], rounds: list) -> dict:
    """What came of drafted steps (eq. 1) and of drafted tokens (eq. 4)."""
    judged = [step for step in steps if step.score is not None]
    refused = [step for step in judged if step.writer == "base"]
    return {
        "accuracy": float(done.score["correct"]),
        "tokens": len(done.tokens),
        "clipped_ratio": float(not done.finished),
        "drafted": len(judged),
        "accepted": len(judged) - len(refused),
        "discarded": sum(len(step.drafted) for step in refused),
        "marks": [[step.score, None] for step in judged],
        "rounds": len(rounds),
        "passed": sum(kept for _, kept in rounds),
        "tested": sum(min(n, kept + 1) for n, kept in rounds),  # up to the refusal
    }


def compare(records: list[dict]) -> dict[str, float]:
    """Means of each way to answer; gap and speed-up against the base, problem by problem."""
    metrics: dict[str, float] = {}
    for way in dict.fromkeys(name for record in records for name in record):
        answered = [record for record in records if way in record]
        rows = [record[way] for record in answered]
        alone = [record["base"] for record in answered]
        pairs = zip(rows, alone, strict=True)
        gaps = [row["accuracy"] - base["accuracy"] for row, base in pairs]
        m = {}
        for name in rows[0]:
            if name != "marks":
                m[name] = mean(row[name] for row in rows)
        variance = m["accuracy"] * (1 - m["accuracy"])
        m["accuracy_se"] = math.sqrt(variance / len(rows))
        m["gap"], m["gap_se"] = mean(gaps), 0.0
        if len(gaps) > 1:
            m["gap_se"] = stdev(gaps) / math.sqrt(len(gaps))
        m["speedup"] = mean(row["seconds"] for row in alone) / m["seconds"]
        m["acceptance"] = m["accepted"] / (m["drafted"] or 1)
        m["alpha"] = m["passed"] / (m["tested"] or 1)
        for name, value in m.items():
            metrics[f"eval/{name}/{way}"] = value
    return metrics


def solve(cfg: Config, kind: type = Pair) -> int:
    """For each problem, for each way: answer it, count and time. Then compare."""
    run = Records(cfg)  # see the end
    base = run.load(BY_SIZE)[1]
    draft = load_draft(run, base)
    task = make_task(cfg.task, cfg.data, natural=not base.is_tiny)
    pair = kind(cfg, base, draft, Prompter(base, task, cfg.chat))
    if cfg.score == "digit" and not pair.request:
        raise BadInput(f"--score digit: {cfg.model} cannot read the request for one")
    problems = heldout(task, cfg.eval_problems, cfg.seed)  # another seed, other problems
    cfg.steps = len(problems)  # what run.log counts
    records = run.start(base, None, pair.prompter).get("records", [])
    with torch.inference_mode():
        if cfg.score == "likelihood":
            pair.calibrate()
        while len(records) < len(problems):
            number, record = len(records) + run.rank, {}
            if number < len(problems):
                for name, way in pair.ways(number).items():
                    done, steps, record[name] = pair.answer(number, problems[number], **way)
            records += [record for record in run.gather(record) if record]
            if run.save(records) and run.rank == 0:
                run.log(len(records), compare(records), ("eval/speedup/specreason",))
                logprobs = pair.reread(done).log_softmax(-1).clamp(min=-100)
                done.logprobs = logprobs[range(len(done.tokens)), done.tokens].tolist()
                run.keep_samples(len(records), pair.prompter, [done], [0.0])
            if run.signal:
                break
    return run.report(compare(records))


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


# ---- records


class Records(Run):
    """A run that keeps its records where others keep weights."""

    def resume(self, model, optimizer):
        with reading(f"checkpoint of {self.folder}"):
            saved = read_json(checkpoints(self.folder)[-1] / "records.json")
            return {"step": len(saved["records"]), **saved}

    def save(self, records):
        """Write step-N if it is due or a rank got a signal; if so, the logs follow."""
        self.signal, step = max(self.gather(self.got)), len(records)
        due = step % self.cfg.save_every < self.world or step == self.cfg.steps or self.signal > 0
        if due and self.rank == 0:
            unfinished = self.folder / "records.tmp"  # step-N appears whole or not at all
            unfinished.mkdir(exist_ok=True)
            (unfinished / "records.json").write_text(json.dumps({"records": records}))
            unfinished.rename(self.folder / f"step-{step:06d}")
            for old in checkpoints(self.folder)[:-1]:
                shutil.rmtree(old)
        return due

    def report(self, metrics):
        """Print a line for each way to answer; the exit code."""
        if self.signal:
            return super().report(None, None)
        heads = "accuracy accuracy_se gap gap_se tokens acceptance alpha seconds speedup".split()
        self.say(f"{self.folder}\n" + "".join(f"{head:>12}" for head in ["", *heads]))
        for way in [name.split("/")[2] for name in metrics if name.startswith("eval/speedup/")]:
            values = [f"{metrics[f'eval/{head}/{way}']:12.3f}" for head in heads]
            self.say(f"{way:12}" + "".join(values))
        return 0


if __name__ == "__main__":
    os._exit(main(solve, Config))  # threads of gloo may abort sys.exit
