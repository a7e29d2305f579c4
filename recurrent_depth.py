"""Recurrent depth: thinking longer in the hidden state, not in more words (arXiv:2502.05171).

A few layers run r times over the same positions, and the embedded input is handed to them again
each time. In training r is random, so at test time it is free: the same weights think for as
long as one likes, token by token.

    e     = P(sqrt(h) E[x])                 prelude                               (1)
    s_0   ~ N(0, 2/5), cut at 3 sigma       fresh at every position               (2)
    s_i   = R(A [s_i-1 ; e])  i = 1 .. r    adapter A, core block R: the loop     (3)
    p     = softmax(E n(C(n(s_r))))         coda C; one norm n; E is the head     (4)
    block : x <- n2(x + Attn(n1(x)))        norms on the sums: a sandwich         (5)
            x <- n4(x + MLP(n3(x)))
    r     ~ 1 + Poisson(tau)                so the mean of r is r_bar + 1         (6)
            log tau ~ N(log r_bar - 1/8, 1/2)
    loss  = cross entropy of p alone        the last k iterations carry           (7)
                                            gradient, the first n = r - k none
    exit  : a token stops thinking when     p_0 is uniform                        (8)
            KL(p_i-1 || p_i) < exit_kl

The state forgets where it began and falls towards a point that e alone decides. So iterations
more never hurt, and a token that seems to have arrived may stop (8). Keys and values are cached
for each iteration; a cache of budget B lets iteration i overwrite those of i - B.

Run
    python recurrent_depth.py                     # word problem of S3, two CPU cores, minutes
    python recurrent_depth.py --recurrence fixed  # the control: always r_bar + 1 iterations
    python recurrent_depth.py --task text --data FILE.txt
    torchrun --standalone --nproc_per_node=8 recurrent_depth.py --task text --data FILE.txt \\
        --tokenizer DIR --prelude 2 --core 4 --coda 2 --hidden_size 1024 --num_heads 16 \\
        --mean_r 32 --backprop 8 --length 1024
    The published 3.5 B: --model tomg-group-umd/huginn-0125 --mean_r 32 --steps 0 and a text.
    docs/experiments/recurrent_depth.py: shared cache, warm start, self-speculation.

Expect
    Seed 0, 3 minutes on one thread of an AMD EPYC: after 1, 2, 4, 8, 64 iterations (5 on
    average in training) 0.70, 0.91, 0.99, 0.99, 0.99 of the held-out labels are right, and
    0.23, 0.53, 0.91, 0.93, 0.93 of the last ones. docs/results.md has more.
    --mean_r 1 (two iterations on average), seeds 0, 1, 2: after 2 iterations 0.82, 0.86, 0.80,
    after 64 0.84, 0.99, 0.83; with --recurrence fixed 0.86, 0.83, 0.71 and 0.76, 0.78, 0.68.

Differs from the paper in: AdamW without its RMS clipping, linear decay at the end of a run.

Legend: B rows, T positions, h hidden size, V vocabulary, H heads, D head size.
"""

import argparse
import copy
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

from rewards import (
    BadInput,
    Completion,
    heldout,
    make_task,
    mean,
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
    model: str = option("scratch", "scratch: a new one; a folder, or a name on the hub")
    prelude: int = option(1, "layers before the loop, of a new model", 1)
    core: int = option(1, "layers in the loop", 1)
    coda: int = option(1, "layers after the loop", 1)
    hidden_size: int = option(64, "width of a new model, a multiple of 2 num_heads", 2)
    num_heads: int = option(4, "attention heads of a new model", 1)
    task: str = option("s3:elements=12", "s3 (label each prefix of a product) or text")
    data: str = option("", "the text to learn; its last tenth is held out")
    tokenizer: str = option("", "folder of a tokenizer.json, else one token a character")
    length: int = option(64, "tokens in a row of text", 2)
    batch_size: int = option(0, "rows per step, 0: by size")
    micro_batch_tokens: int = option(0, "tokens per pass, one r each, 0: by size")
    steps: int = option(2500, "optimizer steps, 0: only evaluate")
    lr: float = option(0.0, "learning rate, 0: by size")
    warmup_steps: int = option(100, "steps of linear warm-up")
    decay: float = option(0.2, "share of the steps in which it falls to 0 (paper: 0)")
    eval_problems: int = option(256, "held-out rows, 0: no evaluation")
    eval_samples: int = option(2, "initial states per held-out row", 1)
    eval_every: int = option(0, "steps between evaluations, 0: one at the end")
    save_every: int = option(500, "steps between checkpoints, 0: one at the end")
    seed: int = option(0, "seed of data, weights, iterations and initial states")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "auto: cuda if any")
    out: str = option("", "run folder, default out/SCRIPT-TASK-SEED-TIME")
    resume: str = option("", "run folder to go on with")
    recurrence: Literal["random", "fixed"] = option("random", "eq. 6, or mean_r + 1")
    mean_r: int = option(4, "r_bar in eq. 6", 1)
    backprop: int = option(4, "k in eq. 7: iterations with gradient", 1)
    test_r: int = option(16, "most iterations of a token in evaluations", 2)
    exit_kl: float = option(1e-5, "threshold in eq. 8 (paper, for language: 5e-4)")


BY_SIZE = {  # below 10 M parameters, below 1 B, above (paper: lr 4e-5)
    "lr": (3e-3, 4e-4, 4e-5),
    "batch_size": (96, 64, 4096),
    "micro_batch_tokens": (8192, 16384, 16384),
}
TEST_R = 1, 2, 4, 8, 16, 32, 64


# ------------------------------------------------------------ the model (eq. 1 to 5)


def rotate_pairs(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding of x (B, T, H, D): neighbours are pairs; turn (T, 1, D/2)."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(pairs) * turn
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Causal; queries and keys alone have a bias, added before the rotation."""

    def __init__(self, c: dict):
        super().__init__()
        size, self.heads = c["n_embd"], c["num_attention_heads"]
        self.Wqkv = Linear(size, 3 * size, bias=False)
        self.proj = Linear(size, size, bias=False)
        self.qk_bias = nn.Parameter(torch.zeros(2, 1, self.heads, size // self.heads))

    def forward(self, x, turn, cache, slot):
        B, T, size = x.shape
        q, k, v = self.Wqkv(x).view(B, T, 3, self.heads, -1).unbind(2)  # (B, T, H, D)
        q_bias, k_bias = self.qk_bias.to(x.dtype)
        q = rotate_pairs(q + q_bias, turn).transpose(1, 2)  # (B, H, T, D)
        k = rotate_pairs(k + k_bias, turn).transpose(1, 2)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(slot, k, v)  # (B, H, S, D), of which S - T are older
        S, mask = k.shape[2], None
        if 1 < T < S:
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S)
        return self.proj(x.transpose(1, 2).reshape(B, T, size))


class Block(nn.Module):
    """Eq. 5: the norms after the sums keep the stream's size however often it runs."""

    def __init__(self, c: dict):
        super().__init__()
        size, inner, eps = c["n_embd"], c["intermediate_size"], c["norm_eps"]
        self.norm_1, self.norm_2 = RMSNorm(size, eps), RMSNorm(size, eps)
        self.norm_3, self.norm_4 = RMSNorm(size, eps), RMSNorm(size, eps)
        self.attn = Attention(c)
        self.mlp = nn.ModuleDict()
        self.mlp.fc = Linear(size, 2 * inner, bias=False)
        self.mlp.proj = Linear(inner, size, bias=False)

    def forward(self, x, *context):
        x = self.norm_2(x + self.attn(self.norm_1(x), *context))
        gate, up = self.mlp.fc(self.norm_3(x)).chunk(2, dim=-1)
        return self.norm_4(x + self.mlp.proj(F.silu(gate) * up))


class Model(nn.Module):
    """Prelude, core and coda, named as in the published huginn-0125."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = c = config
        size = c["n_embd"]
        self.transformer = nn.ModuleDict()
        self.transformer.wte = nn.Embedding(c["vocab_size"], size)
        self.transformer.prelude = self.blocks(c["n_layers_in_prelude"])
        self.transformer.core_block = self.blocks(c["n_layers_in_recurrent_block"])
        self.transformer.adapter = Linear(2 * size, size, bias=False)
        self.transformer.coda = self.blocks(c["n_layers_in_coda"])
        self.transformer.ln_f = RMSNorm(size, c["norm_eps"])
        self.lm_head = Linear(size, c["vocab_size"], bias=False)
        self.tie()
        D = size // c["num_attention_heads"]
        exponents = torch.arange(0, D, 2, device="cpu") / D
        self.frequencies = c["rope_base"] ** -exponents  # (D/2,)
        self.compute_dtype = None  # of products, if not the weights'
        self.checkpointing = False  # of iterations

    def blocks(self, count):
        return nn.ModuleList(Block(self.config) for _ in range(count))

    def tie(self):
        self.lm_head.weight = self.transformer.wte.weight

    def prelude(self, tokens: Tensor, cache: "Cache | None" = None) -> tuple[Tensor, tuple]:
        """e (B, T, h) of eq. 1, and the context of all blocks: rotation and cache."""
        e = self.transformer.wte(tokens)  # (B, T, h)
        e = e * math.sqrt(e.shape[-1])  # not so in the head
        e = e.to(self.compute_dtype or e.dtype)
        start = 0 if cache is None else cache.length
        at = torch.arange(start, start + tokens.shape[1], device=e.device)  # positions (T,)
        angles = at[:, None, None] * self.frequencies.to(e.device)  # (T, 1, D/2)
        context = torch.polar(torch.ones_like(angles), angles), cache
        for slot, block in enumerate(self.transformer.prelude):
            e = block(e, *context, slot)
        return e, context

    def core(self, state: Tensor, e: Tensor, context: tuple, i: int) -> Tensor:
        """The iteration i = 0, 1, ... of eq. 3; no residual goes around the adapter."""
        cache = context[1]
        slot = 0 if cache is None else cache.before + i % cache.budget * cache.loop
        x = self.transformer.adapter(torch.cat([state, e], dim=-1))
        for layer, block in enumerate(self.transformer.core_block):
            x = block(x, *context, slot + layer)
        return x

    def coda(self, state: Tensor, context: tuple) -> Tensor:
        """Hidden states (B, T, h) before the head (eq. 4)."""
        x = self.transformer.ln_f(state)
        first = len(self.transformer.prelude)
        for slot, block in enumerate(self.transformer.coda, first):
            x = block(x, *context, slot)
        return self.transformer.ln_f(x)

    def forward(self, tokens: Tensor, steps: int, state: Tensor, grad_steps: int = 0) -> tuple:
        """Hidden states after `steps` iterations from s_0 = state (B, T, h), and s_r.

        s_r is before the norm, so it may be handed on as s_0. The last grad_steps iterations
        carry gradient (eq. 7); e enters each, so the prelude learns too.
        """
        e, context = self.prelude(tokens)
        for i in range(steps):
            learning = torch.is_grad_enabled() and i >= steps - grad_steps
            inputs = state, e, context, i
            with torch.set_grad_enabled(learning):
                if learning and self.checkpointing:
                    state = checkpoint(self.core, *inputs, use_reentrant=False)
                else:
                    state = self.core(*inputs)
        return self.coda(state, context), state

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V), at least float32."""
        logits = self.lm_head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def initial_state(model: Model, rows: int, length: int, key: tuple[int, ...]) -> Tensor:
    """s_0 of eq. 2, (rows, length, h), by the numbers in `key` and the shape."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    weight, std = model.lm_head.weight, math.sqrt(2 / 5)
    state = torch.empty(rows, length, weight.shape[1], device=weight.device)
    generator = torch.Generator(weight.device).manual_seed(seed)
    nn.init.trunc_normal_(state, 0, std, -3 * std, 3 * std, generator)
    return state.to(model.compute_dtype or weight.dtype)


# ------------------------------------------------------------ the depth (eq. 6)


def draw_steps(mean_r: int, backprop: int, rng: np.random.Generator) -> tuple[int, int]:
    """(n, k): iterations without and with gradient, r = n + k of eq. 6.

    Source: sec. 3.3; its code takes k for r_bar where that is smaller.
    """
    tau = rng.lognormal(math.log(max(mean_r, backprop)) - 1 / 8, 1 / 2)
    return split_steps(1 + int(rng.poisson(tau)), backprop)


def split_steps(r: int, backprop: int) -> tuple[int, int]:
    """(n, k) of eq. 7."""
    return max(r - backprop, 0), min(r, backprop)


# ------------------------------------------------------------ test time (eq. 8)


class Cache:
    """Keys and values: a slot for each layer outside the loop, and in it for each layer and
    iteration modulo `budget`. What lies behind `length` means nothing.
    """

    def __init__(self, model: Model, rows: int, capacity: int, budget: int):
        c, weight = model.config, model.lm_head.weight
        self.budget, self.loop = budget, c["n_layers_in_recurrent_block"]
        self.before = c["n_layers_in_prelude"] + c["n_layers_in_coda"]  # its first slot
        slots, heads = self.before + self.loop * budget, c["num_attention_heads"]
        shape = slots, rows, heads, capacity, c["n_embd"] // heads
        self.keys = weight.new_zeros(shape, dtype=model.compute_dtype or weight.dtype)
        self.values = torch.zeros_like(self.keys)
        self.length, self.thinking = 0, None  # thinking (B,): rows that have not stopped

    def append(self, slot, k, v):
        """Write k, v (B, H, T, D) in rows still thinking; returns the slot."""
        end = self.length + k.shape[2]
        for held, new in ((self.keys, k), (self.values, v)):
            place = held[slot, :, :, self.length : end]
            if slot >= self.before:
                new = torch.where(self.thinking[:, None, None, None], new, place)
            place.copy_(new)
        return self.keys[slot, :, :, :end], self.values[slot, :, :, :end]

    def advance(self, count, taken):
        """Count in `count` positions whose rows took `taken` (B,) iterations.

        Slots that a row never reached get its deepest entry: later tokens may think longer.
        """
        end, rows = self.length + count, torch.arange(len(taken), device=taken.device)
        if int(taken.min()) < self.budget:
            iterations = torch.arange(self.budget, device=taken.device)[:, None]
            deepest = torch.minimum(iterations, taken - 1)[:, None]  # (budget, 1, B)
            layers = torch.arange(self.loop, device=taken.device)[:, None]
            for held in (self.keys, self.values):
                loop = held[self.before :].unflatten(0, (self.budget, self.loop))
                loop = loop[..., self.length : end, :]  # (budget, loop, B, H, count, D)
                loop.copy_(loop[deepest, layers, rows])
        self.length = end


@torch.no_grad()
def recur(
    model: Model, tokens: Tensor, state: Tensor, cache: Cache, steps: int, exit_kl: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, T, V) and states (B, T, h) of T more tokens a row, and their iterations (B,).

    With exit_kl a row stops as soon as eq. 8 holds at its last position; the others go on.
    """
    e, context = model.prelude(tokens, cache)
    B, V = len(tokens), model.config["vocab_size"]
    thinking = torch.ones(B, dtype=torch.bool, device=tokens.device)
    taken = torch.zeros(B, dtype=torch.long, device=tokens.device)
    before = torch.full((B, V), -math.log(V), device=tokens.device)  # log p_0
    for i in range(steps):
        cache.thinking = thinking
        new = model.core(state, e, context, i)
        state = torch.where(thinking[:, None, None], new, state)
        taken += thinking
        if exit_kl:
            hidden = model.coda(state, context)[:, -1]
            now = model.logits(hidden).log_softmax(-1)  # log p_i (B, V)
            thinking = thinking & ((before.exp() * (before - now)).sum(-1) >= exit_kl)
            before = now
            if not thinking.any():
                break
    logits = model.logits(model.coda(state, context))
    cache.advance(tokens.shape[1], taken)
    return logits, state, taken


def stream(
    model: Model, tokens: Tensor, states: Tensor, steps: int, exit_kl: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Rows (B, T) read token by token, each from its s_0 in `states` (B, T, h): logits (B, T, V)
    and iterations (B, T).
    """
    B, T = tokens.shape
    cache, found = Cache(model, B, T, steps), []
    for t in range(T):
        here = slice(t, t + 1)
        logits, _, taken = recur(model, tokens[:, here], states[:, here], cache, steps, exit_kl)
        found.append((logits, taken[:, None]))
    logits, taken = zip(*found, strict=True)
    return torch.cat(logits, dim=1), torch.cat(taken, dim=1)


# ------------------------------------------------------------ training (eq. 7)


def depth_loss(
    model: Model, inputs: Tensor, labels: Tensor, state: Tensor, n: int, k: int, num_labels: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 7 for a micro-batch (B, T) of a step with num_labels labels, -100 being none.

    Also accuracy, a sum like the loss, and state_correlation, of different positions: where it
    nears 1 the states have collapsed, and the loop does nothing (sec. 4.3).
    """
    hidden, state = model(inputs, n + k, state, k)
    logits = model.logits(hidden)  # (B, T, V)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss = loss / num_labels
    with torch.no_grad():
        centred = (state - state.mean(-1, keepdim=True)).float()
        unit = F.normalize(centred, dim=-1)  # (B, T, h)
        B, T, _ = unit.shape
        correlation = (unit.sum(1).square().sum() - B * T) / (B * T * (T - 1))
        accuracy = (logits.argmax(-1) == labels).sum() / num_labels
    return loss, {"accuracy": accuracy, "state_correlation": correlation}


def schedule(step: int, steps: int, warmup: int, decay: float) -> float:
    """Factor of the learning rate: up, constant, linear to 0; steps count from 1.

    >>> [round(schedule(s, 10, 2, 0.4), 2) for s in (1, 2, 6, 7, 8, 9, 10)]
    [0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    left = (steps + 1 - step) / max(1e-9, decay * steps)
    return min(1.0, step / max(1, warmup), left)


def check_flags(cfg: Config) -> None:
    """Refuse what would not work as meant."""
    if cfg.hidden_size % (2 * cfg.num_heads):
        raise BadInput(f"--hidden_size {cfg.hidden_size} is no multiple of 2 --num_heads")
    for name in ("prelude", "core", "coda", "hidden_size", "num_heads", "tokenizer"):
        if cfg.model != "scratch" and getattr(cfg, name) != getattr(Config, name):
            raise BadInput(f"--{name} is for a new model, not for --model {cfg.model}")
    if bool(cfg.data) != (cfg.task == "text") or cfg.tokenizer and not cfg.data:
        raise BadInput("--task text needs --data; --tokenizer is for it alone")
    if cfg.decay > 1:
        raise BadInput(f"--decay {cfg.decay} is a share of the steps, 0 to 1")


def accumulate(run: "Run", model: Model, prompter: "Prompter", step: int) -> dict[str, float]:
    """The gradient of a step, each micro-batch with its r; the metrics over all ranks."""
    cfg, task = run.cfg, prompter.task
    first_row = prompter.row(task.problem("train", cfg.seed, 0))[1]
    T = len(first_row)
    num_labels = cfg.batch_size * sum(label >= 0 for label in first_row)
    size = max(1, cfg.micro_batch_tokens // T)  # rows of a micro-batch, over all ranks
    totals = dict.fromkeys(("loss", "accuracy", "state_correlation", "recurrences"), 0.0)
    for m, first in enumerate(range(0, cfg.batch_size, size)):
        key = cfg.seed, step, m  # n, k are the same on every rank, so that none waits
        n, k = split_steps(cfg.mean_r + 1, cfg.backprop)
        if cfg.recurrence == "random":
            n, k = draw_steps(cfg.mean_r, cfg.backprop, np.random.default_rng(key))
        rows = range(first, min(first + size, cfg.batch_size))
        states = initial_state(model, len(rows), T, key)[run.rank :: run.world]
        drawn = [(step - 1) * cfg.batch_size + i for i in rows[run.rank :: run.world]]
        mine = [task.problem("train", cfg.seed, number) for number in drawn]
        if not mine:
            continue
        inputs, labels = prompter.rows(mine, run.device)
        loss, seen = depth_loss(model, inputs, labels, states, n, k, num_labels)
        loss.backward()
        share = len(mine) / cfg.batch_size
        totals["loss"] += loss.item()
        totals["accuracy"] += seen["accuracy"].item()
        totals["state_correlation"] += seen["state_correlation"].item() * share
        totals["recurrences"] += (n + k) * share
    ranks = run.gather(totals)
    metrics = {name: sum(rank[name] for rank in ranks) for name in totals}
    metrics["tokens"] = cfg.batch_size * T
    return metrics


def train(cfg: Config) -> int:
    """Repeat: draw r (6); loop n times without gradient, k with; descend (7)."""
    check_flags(cfg)
    text, name, folder = "", cfg.model, tempfile.TemporaryDirectory()
    if cfg.data:
        with reading(f"--data {cfg.data}"):
            text = Path(cfg.data).read_text(encoding="utf-8")
    if name == "scratch":
        make_model(Path(folder.name), cfg, text)  # on each rank the same
        cfg.model = folder.name
    run = Run(cfg)
    model, sampler = run.load(BY_SIZE)
    cfg.model = name  # run.json says scratch
    prompter = Prompter(model, cfg, text)
    optimizer = AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    state = run.start(model, optimizer, prompter)
    run.refresh(sampler, model)

    for step in range(state["step"] + 1, cfg.steps + 1):
        began = time.time()
        metrics = accumulate(run, model, prompter, step)
        lr = cfg.lr * schedule(step, cfg.steps, cfg.warmup_steps, cfg.decay)
        metrics["grad_norm"], metrics["lr"] = run.update(model, optimizer, lr), lr
        run.refresh(sampler, model)
        metrics["tokens_per_s"] = metrics["tokens"] / (time.time() - began)
        run.log(step, metrics, ("loss", "accuracy", "recurrences", "tokens_per_s"))
        if run.after_step(step, model, optimizer):
            break  # Ctrl-C
        if cfg.eval_every and step % cfg.eval_every == 0 and step < cfg.steps:
            evaluate(run, sampler, prompter, step)
    return run.report(sampler, prompter)


# ------------------------------------------------------------ evaluation


def scores(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of each row (B,): share of labels right, whether the last is, mean cross entropy."""
    right = (logits.argmax(-1) == labels).double()  # (B, T)
    counted = (labels >= 0).sum(1)
    loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
    return {
        "accuracy": right.sum(1) / counted,
        "last_accuracy": right[:, -1],
        "loss": loss / counted,
    }


@torch.no_grad()
def measure(cfg: Config, model: Model, inputs: Tensor, labels: Tensor, starts: list) -> dict:
    """Numbers for each row: @r after r iterations at once; /full and /exit token by token,
    with test_r iterations or until eq. 8.
    """
    values, ends = defaultdict(list), []

    def note(where, found):
        for name, value in found.items():
            values[name + where] += value.tolist()

    depths = {*TEST_R, cfg.mean_r, cfg.test_r}
    e, context = model.prelude(inputs)
    for state in starts:
        for r in range(1, max(depths) + 1):
            state = model.core(state, e, context, r - 1)
            if r in depths:
                logits = model.logits(model.coda(state, context))
                note(f"@{r}", scores(logits, labels))
            if r == cfg.test_r:
                ends.append(logits.argmax(-1)[:, 1:])
    note("agreement", {"": (ends[0] == ends[-1]).double().mean(1)})  # of two initial states
    for way, exit_kl in (("full", 0.0), ("exit", cfg.exit_kl)):
        logits, taken = stream(model, inputs, starts[0], cfg.test_r, exit_kl)
        note(f"/{way}", scores(logits, labels) | {"iterations": taken.double().mean(1)})
    return values


def evaluate(run: "Run", model: Model, prompter: "Prompter", step: int) -> dict[str, float]:
    """Log and return the means of `measure` over held-out rows."""
    cfg, values = run.cfg, defaultdict(list)
    if not cfg.eval_problems:
        return {}
    problems = heldout(prompter.task, cfg.eval_problems)
    inputs, labels = prompter.rows(problems, run.device)  # (N, T)
    N, T = inputs.shape
    keys = [(cfg.seed, 0, sample) for sample in range(cfg.eval_samples)]
    starts = [initial_state(model, N, T, key) for key in keys]
    at_once = max(1, cfg.micro_batch_tokens // T)
    for rows in torch.arange(N)[run.rank :: run.world].split(at_once):
        if len(rows) == 0:
            continue  # more ranks than rows
        parts = [start[rows] for start in starts]
        found = measure(cfg, model, inputs[rows], labels[rows], parts)
        for name, value in found.items():
            values[name] += value

    ranks = run.gather(values)
    values = {n: sum((rank.get(n, []) for rank in ranks), []) for n in ranks[0]}
    metrics = {name: mean(value) for name, value in values.items()}
    metrics["accuracy"] = metrics[f"accuracy@{cfg.mean_r}"]
    metrics["accuracy_se"] = float(np.std(values[f"accuracy@{cfg.mean_r}"])) / math.sqrt(N)
    metrics = {f"eval/{name}": value for name, value in metrics.items()}
    run.log(step, metrics, ("eval/accuracy@1", "eval/accuracy", "eval/accuracy@64"))
    answered = answer(model, prompter, problems[0], starts[0][:1], cfg.mean_r)
    run.keep_samples(step, prompter, [answered], [0.0])
    return metrics


@torch.no_grad()
def answer(
    model: Model, prompter: "Prompter", problem: dict, state: Tensor, steps: int
) -> Completion:
    """A row for samples.jsonl: its inputs and the likeliest labels."""
    inputs, labels = prompter.rows([problem], state.device)  # (1, T)
    logits = model.logits(model(inputs, steps, state)[0])
    best, tokens = logits.log_softmax(-1)[0, labels[0] >= 0].max(-1)
    ids, tokens = inputs[0].tolist(), tokens.tolist()
    score = {"total": scores(logits, labels)["accuracy"].item()}
    text = prompter.decode(tokens)
    return Completion(0, problem, ids, tokens, best.tolist(), True, text, score)


# ------------------------------------------------------------ data and model folder


class Windows:
    """A text of ids: random windows of its first nine tenths, and to test on those side by
    side in the rest.
    """

    def __init__(self, ids: list[int], length: int):
        self.ids, self.length, self.border = ids, length, len(ids) * 9 // 10
        least = 10 * (length + 2)
        if len(ids) < least:
            raise BadInput(f"{len(ids)} tokens of text; --length {length} needs {least}")

    def problem(self, split: str, seed: int, index: int) -> dict:
        rng = random.Random(f"text {split} {seed} {index}")
        start = rng.randrange(self.border - self.length)
        if split == "test":
            count = (len(self.ids) - self.border - 1) // self.length
            start = self.border + self.length * rng.randrange(count)
        return {"ids": self.ids[start : start + self.length + 1]}

    def key(self, problem: dict) -> str:
        return str(problem["ids"])

    def __str__(self):
        return f"a text of {len(self.ids)} tokens"


class Prompter:
    """Problems to ids: inputs, and the label of every position; -100 is none."""

    def __init__(self, model: Model, cfg: Config, text: str):
        self.tokenizer, size = load_tokenizer(model.folder), model.config["vocab_size"]
        if self.tokenizer.get_vocab_size() > size:
            raise BadInput(f"{model.folder}: more tokens than the model's {size}")
        if cfg.data:
            self.task = Windows(self.encode(text), cfg.length)
        else:
            self.task = make_task(cfg.task)
            if not hasattr(self.task, "products"):  # a label at every position
                raise BadInput(f"--task {cfg.task}: s3 or text is needed")

    def row(self, problem: dict) -> tuple[list[int], list[int]]:
        if "ids" in problem:
            return problem["ids"][:-1], problem["ids"][1:]
        # attention averages: without a start sign it could not tell b from bb or bbb
        inputs = self.encode("^" + problem["elements"])
        return inputs, [-100, *self.encode(self.task.products(problem))]

    def rows(self, problems: list[dict], device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and labels, (B, T) both."""
        rows = torch.tensor([self.row(problem) for problem in problems], device=device)
        return rows[:, 0], rows[:, 1]

    def text(self, problem: dict) -> str:
        return self.decode(self.row(problem)[0])

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    path = Path(folder) / "tokenizer.json"
    with reading(path):
        return Tokenizer.from_buffer(path.read_bytes())


@torch.no_grad()
def initialise(model: Model, seed: int) -> None:
    """Matrices N(0, 2/(5h)) cut at 3 sigma; what writes to the stream is smaller by sqrt(2L), L
    layers unrolled, and the linear half of an MLP's first matrix is too.

    Source: sec. 4.1 (which divides the variance by L) and the code (by 2L).
    """
    c, generator = model.config, torch.Generator().manual_seed(seed)
    loop = c["n_layers_in_recurrent_block"] * c["mean_recurrence"]
    unrolled = c["n_layers_in_prelude"] + loop + c["n_layers_in_coda"]
    std = math.sqrt(2 / (5 * c["n_embd"]))
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            nn.init.trunc_normal_(weight, 0, std, -3 * std, 3 * std, generator)
        if name.endswith(("proj.weight", "fc.weight")):
            first = c["intermediate_size"] if "fc" in name else 0
            weight[first:] /= math.sqrt(2 * unrolled)


def make_model(folder: Path, cfg: Config, text: str) -> None:
    """Write a new model, with --tokenizer or a token for each character."""
    if cfg.tokenizer:
        tokenizer = load_tokenizer(cfg.tokenizer)
    else:
        alphabet = ["<unk>", *(sorted(set(text)) or "^abcdef")]
        ids = {token: i for i, token in enumerate(alphabet)}
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    config = {
        **FIXED,
        "architectures": ["RavenForCausalLM"],
        "vocab_size": tokenizer.get_vocab_size(),
        "n_embd": cfg.hidden_size,
        "intermediate_size": 2 * cfg.hidden_size,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_heads,
        "n_layers_in_prelude": cfg.prelude,
        "n_layers_in_recurrent_block": cfg.core,
        "n_layers_in_coda": cfg.coda,
        "mean_recurrence": cfg.mean_r,
        "mean_backprop_depth": cfg.backprop,
        "norm_eps": 1e-6,
        "rope_base": 50000,
    }
    model = Model(config)
    initialise(model, cfg.seed)
    model.folder = folder
    save_model(model, folder)
    tokenizer.save(str(folder / "tokenizer.json"))


# what this model has, and strict loading does not see
FIXED = {"model_type": "huginn_raven", "tie_embeddings": True, "qk_bias": True, "bias": False}


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> Model:
    """The model in a folder of the published layout, in float32."""
    folder, tensors = Path(folder), {}
    with reading(folder):
        c = read_json(folder / "config.json")
        wanted = FIXED | {"num_key_value_heads": c["num_attention_heads"]}
        odd = {name: c[name] for name in wanted if c.get(name, wanted[name]) != wanted[name]}
        if odd or "model_type" not in c:
            raise BadInput(f"{folder}: {odd or 'no type'}; this script's model has {wanted}")
        for file in sorted(folder.glob("model*.safetensors")):
            tensors |= {name: tensor.float() for name, tensor in load_file(file).items()}
        tensors.pop("freqs_cis", None)  # the published file has the table of rotations
        embed = tensors["transformer.wte.weight"]
        if not torch.equal(tensors.setdefault("lm_head.weight", embed), embed):
            raise BadInput(f"{folder}: lm_head is tied, but not wte")
        with torch.device("meta"):
            model = Model({"norm_eps": 1e-6} | c)
        model.load_state_dict(tensors, assign=True)
        model.tie()
    model.folder = folder
    return model.to(device).requires_grad_()


def save_model(model: Model, folder: str | Path) -> None:
    """A folder of the published layout, with the tokenizer."""
    folder, tensors = Path(folder), model.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config, indent=2))
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # was 0600
    for file in model.folder.glob("tokenizer.json"):
        shutil.copyfile(file, folder / file.name)


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
