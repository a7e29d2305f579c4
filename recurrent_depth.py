"""Recurrent depth: a model that thinks longer in its hidden state instead of writing more (arXiv:2502.05171).

A few layers run r times over the same positions, and the embedded input is handed to them again each time. In
training r is random, so at test time it is free: the same weights think for as long as one likes, token by token.

    e     = P(sqrt(h) E[x])                      prelude                                                      (1)
    s_0   ~ N(0, 2/5), cut at 3 sigma            a fresh one at every position, at test time too              (2)
    s_i   = R(A [s_i-1 ; e])    i = 1 .. r       adapter A, core block R: the loop                            (3)
    p     = softmax(E n(C(n(s_r))))              coda C; twice the same norm n; E is also the head            (4)
    block : x <- n2(x + Attn(n1(x))),  x <- n4(x + MLP(n3(x)))        norms on the sums, a sandwich           (5)
    r     ~ 1 + Poisson(tau),  log tau ~ N(log r_bar - 1/8, 1/2)      so the mean of r is r_bar + 1           (6)
    loss  = cross entropy of p alone; the first n = r - k iterations carry no gradient, the last k do         (7)
    exit  : a token stops thinking when KL(p_i-1 || p_i) < exit_kl; p_0 is uniform                            (8)

The state forgets where it began and falls towards a point that e alone decides, so a few iterations more never hurt,
and one that seems to have arrived may stop (8). Keys and values are cached for each iteration; iteration i may
overwrite those of i - B (--cache_budget B), and a token may start from the last one's state instead of (2).

Run
    python recurrent_depth.py                                          # word problem of S3, two CPU cores, minutes
    python recurrent_depth.py --recurrence fixed                       # the control: always r_bar + 1 iterations
    python recurrent_depth.py --task text --data FILE.txt              # next character of a text of yours
    torchrun --standalone --nproc_per_node=8 recurrent_depth.py --task text --data FILE.txt --tokenizer DIR \\
        --prelude 2 --core 4 --coda 2 --hidden_size 1024 --num_heads 16 --mean_r 32 --backprop 8 --length 1024
    python recurrent_depth.py --model huginn --mean_r 32 --task text --data FILE.txt --steps 0     # the published 3.5 B

Expect
    Seed 0, 3 minutes on one thread of an AMD EPYC: held-out labels right after 1, 2, 4, 8, 64 iterations: 0.70, 0.91,
    0.99, 0.99, 0.99 (5 iterations on average in training), the last label 0.23, 0.53, 0.91, 0.93, 0.93.
    README.md has more.

Differs from the paper in: AdamW without its RMS clipping, linear decay at the end of a run.

Legend: B rows, T positions, h hidden size, V vocabulary, H heads, D head size.
"""

import argparse
import copy
import json
import math
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from rewards import BadInput, Windows, heldout, make_task


def flag(default, help: str, least: float = 0):
    """A field of Config: its default, its help, and the least number allowed."""
    return field(default=default, metadata={"help": help, "least": least})


@dataclass
class Config:
    model: str = flag("scratch", "scratch (a new model), huginn (the published one), a folder, or owner/name")
    prelude: int = flag(1, "layers before the loop, of a model from scratch", 1)
    core: int = flag(1, "layers in the loop", 1)
    coda: int = flag(1, "layers after the loop", 1)
    hidden_size: int = flag(64, "width of a model from scratch, a multiple of twice --num_heads", 2)
    num_heads: int = flag(4, "attention heads of a model from scratch", 1)
    task: str = flag("s3:elements=12", "s3 (label every prefix of a product) or text (next token, needs --data)")
    data: str = flag("", "text file to learn; its last tenth is held out")
    tokenizer: str = flag("", "folder with a tokenizer.json for the text, none = one token a character")
    length: int = flag(64, "tokens in a row of text", 2)
    max_new_tokens: int = flag(32, "tokens to generate at most when speculation is measured, within a row", 1)
    batch_size: int = flag(0, "rows per step over all ranks, 0 = by model size")
    micro_batch_tokens: int = flag(0, "tokens per forward pass over all ranks, one draw of r each, 0 = by model size")
    steps: int = flag(2500, "optimizer steps, 0 = only evaluate")
    lr: float = flag(0.0, "learning rate, 0 = by model size")
    warmup_steps: int = flag(100, "steps of linear warm-up")
    decay: float = flag(0.2, "share of the steps, at the end, in which the learning rate falls to 0 (the paper: 0)")
    eval_problems: int = flag(256, "held-out rows per evaluation, 0 = no evaluation")
    eval_samples: int = flag(2, "initial states per held-out row; two of them show path independence", 1)
    eval_every: int = flag(0, "steps between evaluations, 0 = before and after only")
    save_every: int = flag(500, "steps between checkpoints, 0 = at the end only")
    seed: int = flag(0, "seed of data, weights, iterations and initial states")
    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", "auto is cuda where there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "of the products; weights stay float32")
    checkpointing: Literal["auto", "on", "off"] = flag("auto", "recompute iterations going backward; auto: from 1 B on")
    timeout: int = flag(10, "minutes after which a rank that hangs ends the run", 1)
    out: str = flag("", "run folder; none = the next free out/recurrent_depth-TASK-SEED")
    resume: str = flag("", "run folder to go on with, or auto for the newest")
    check: bool = flag(False, "one step of everything in a temporary folder, with the memory plan")
    recurrence: Literal["random", "fixed"] = flag("random", "r of eq. 6, or always mean_r + 1")
    mean_r: int = flag(4, "r_bar in eq. 6", 1)
    backprop: int = flag(4, "k in eq. 7: iterations with gradient", 1)
    test_r: int = flag(16, "most iterations per token in the measurements at test time", 2)
    exit_kl: float = flag(1e-5, "threshold of eq. 8 (the paper, for language: 5e-4)")
    cache_budget: int = flag(1, "B: iterations that a shared cache keeps apart (the paper: 4 of 32)", 1)
    draft_r: int = flag(2, "iterations per drafted token in self-speculative decoding", 1)
    lookahead: int = flag(4, "drafted tokens per verification", 1)


BY_SIZE = {  # parameters: below 10 M, below 1 B, above (the paper: lr 4e-5, 4096 rows of 4096 tokens)
    "lr": (3e-3, 4e-4, 4e-5),
    "batch_size": (96, 64, 4096),
    "micro_batch_tokens": (8192, 16384, 16384),
}
TEST_R = (1, 2, 4, 8, 16, 32, 64)


# ------------------------------------------------------------------------------------------------- the model


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary position embedding of x (B, T, H, D) by unit complex numbers turn (T, 1, D/2): neighbours are pairs."""
    pairs = torch.view_as_complex(x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Causal multi-head attention; the only biases are those of queries and keys, added before the rotation."""

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.Wqkv, self.proj = Linear(size, 3 * size, bias=False), Linear(size, size, bias=False)
        self.qk_bias = nn.Parameter(torch.zeros(2, 1, heads, size // heads))

    def forward(self, x: Tensor, turn: Tensor, cache: "Cache | None", slot: int) -> Tensor:
        B, T, h = x.shape
        bias = self.qk_bias.to(x.dtype)
        q, k, v = self.Wqkv(x).view(B, T, 3, *bias.shape[2:]).unbind(2)  # (B, T, H, D)
        q, k, v = (y.transpose(1, 2) for y in (rotate(q + bias[0], turn), rotate(k + bias[1], turn), v))
        if cache is not None:
            k, v = cache.append(slot, k, v)  # (B, H, S, D), S - T positions before these
        S = k.shape[2]
        mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T) if 1 < T < S else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S)
        return self.proj(y.transpose(1, 2).reshape(B, T, h))


class Block(nn.Module):
    """Eq. 5. After every sum a norm, so that the stream keeps its size however often the block runs."""

    def __init__(self, c: dict):
        super().__init__()
        size, inner = c["n_embd"], c["intermediate_size"]
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = (RMSNorm(size, c["norm_eps"]) for _ in range(4))
        self.attn = Attention(size, c["num_attention_heads"])
        self.mlp = nn.ModuleDict({"fc": Linear(size, 2 * inner, bias=False), "proj": Linear(inner, size, bias=False)})

    def forward(self, x: Tensor, turn: Tensor, cache: "Cache | None", slot: int) -> Tensor:
        x = self.norm_2(x + self.attn(self.norm_1(x), turn, cache, slot))
        gate, up = self.mlp["fc"](self.norm_3(x)).chunk(2, dim=-1)
        return self.norm_4(x + self.mlp["proj"](F.silu(gate) * up))


class Cache:
    """Keys and values of `rows` rows, one slot per layer of prelude and coda, and for the core one per layer and
    iteration modulo `budget`. What lies behind `length` means nothing, so lowering it forgets the last tokens.
    """

    def __init__(self, model: "Model", rows: int, capacity: int, budget: int):
        weight, c = model.lm_head.weight, model.config
        self.budget, self.loop = budget, c["n_layers_in_recurrent_block"]
        self.before = c["n_layers_in_prelude"] + c["n_layers_in_coda"]  # slots outside the loop
        shape = (self.before + self.loop * budget, rows, c["num_attention_heads"], capacity, model.head_dim)
        self.keys = torch.zeros(shape, device=weight.device, dtype=model.compute_dtype or weight.dtype)
        self.values, self.length, self.thinking = torch.zeros_like(self.keys), 0, None

    def append(self, slot: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, H, T, D) behind `length`, but not those of rows that stopped thinking; all of the slot."""
        end = self.length + k.shape[2]
        for kept, new in ((self.keys, k), (self.values, v)):
            place = kept[slot, :, :, self.length : end]
            if self.thinking is not None and slot >= self.before:
                new = torch.where(self.thinking[:, None, None, None], new, place)
            place.copy_(new)
        return self.keys[slot, :, :, :end], self.values[slot, :, :, :end]

    def advance(self, count: int, steps: Tensor) -> None:
        """Count in `count` new positions whose rows took `steps` (B,) iterations. Slots that a row never reached get
        its deepest entry: later tokens with more iterations read that one (the paper's lookup of the latest).
        """
        end, device = self.length + count, steps.device
        if int(steps.min()) < self.budget:
            deepest = torch.minimum(torch.arange(self.budget, device=device)[:, None], steps - 1)  # (budget, B)
            layers, rows = torch.arange(self.loop, device=device), torch.arange(len(steps), device=device)
            for kept in (self.keys, self.values):
                loop = kept[self.before :].unflatten(0, (self.budget, self.loop))[..., self.length : end, :]
                loop.copy_(loop[deepest[:, None], layers[:, None], rows])  # (budget, loop, B, H, count, D)
        self.length = end


class Model(nn.Module):
    """Prelude, core and coda (eq. 1 to 4), modules and settings named as in the published model huginn-0125."""

    def __init__(self, config: dict):
        super().__init__()
        self.config, size, heads = dict(config), config["n_embd"], config["num_attention_heads"]
        counts = [config[f"n_layers_in_{part}"] for part in ("prelude", "recurrent_block", "coda")]
        prelude, core, coda = (nn.ModuleList(Block(config) for _ in range(count)) for count in counts)
        parts = {"wte": nn.Embedding(config["vocab_size"], size), "prelude": prelude, "core_block": core}
        parts |= {"adapter": Linear(2 * size, size, bias=False), "coda": coda}
        self.transformer = nn.ModuleDict(parts | {"ln_f": RMSNorm(size, config["norm_eps"])})
        self.lm_head = Linear(size, config["vocab_size"], bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        self.head_dim = size // heads
        self.compute_dtype = None  # of the products; None: that of the weights
        self.checkpointing = False  # recompute each iteration in the backward pass instead of storing it
        unrolled = counts[0] + counts[1] * config["mean_recurrence"] + counts[2]  # L, for `initialise` and memory
        self.config |= {"hidden_size": size, "num_hidden_layers": unrolled, "num_key_value_heads": heads}

    def prelude(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, tuple]:
        """e (B, T, h) of eq. 1, and what the other parts need besides their input: rotation and cache."""
        size = self.config["n_embd"]
        e = self.transformer["wte"](tokens) * math.sqrt(size)  # the lookup alone is scaled, not the head
        e = e.to(self.compute_dtype or e.dtype)
        positions = torch.arange(tokens.shape[1], device=e.device) + (cache.length if cache else 0)
        exponents = torch.arange(0, self.head_dim, 2, device=e.device) / self.head_dim
        angles = positions[:, None, None] * self.config["rope_base"] ** -exponents  # (T, 1, D/2)
        context = torch.polar(torch.ones_like(angles), angles), cache
        for slot, block in enumerate(self.transformer["prelude"]):
            e = block(e, *context, slot)
        return e, context

    def core(self, state: Tensor, e: Tensor, context: tuple, i: int) -> Tensor:
        """One iteration, the i-th from 0 (eq. 3). No residual goes around the adapter; the state stands first."""
        first = 0 if context[1] is None else context[1].before + i % context[1].budget * context[1].loop
        x = self.transformer["adapter"](torch.cat([state, e], dim=-1))
        for layer, block in enumerate(self.transformer["core_block"]):
            x = block(x, *context, first + layer)
        return x

    def coda(self, state: Tensor, context: tuple) -> Tensor:
        """Hidden states (B, T, h) before the head (eq. 4)."""
        x = self.transformer["ln_f"](state)
        for slot, block in enumerate(self.transformer["coda"], len(self.transformer["prelude"])):
            x = block(x, *context, slot)
        return self.transformer["ln_f"](x)

    def forward(self, tokens: Tensor, steps: int, state: Tensor, grad_steps: int = 0) -> tuple[Tensor, Tensor]:
        """Hidden states after `steps` iterations from s_0 = state (B, T, h), and s_r, which may be handed on as a
        further s_0. The last grad_steps iterations carry gradient (eq. 7). Training, and whole rows at test time.
        """
        e, context = self.prelude(tokens)
        for i in range(steps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= steps - grad_steps):
                if self.checkpointing and torch.is_grad_enabled():
                    state = checkpoint(self.core, state, e, context, i, use_reentrant=False)
                else:
                    state = self.core(state, e, context, i)
        return self.coda(state, context), state

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V), at least float32."""
        logits = self.lm_head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


# ------------------------------------------------------------------------------------------------- algorithm


def draw_steps(mean_r: int, backprop: int, rng: np.random.Generator) -> tuple[int, int]:
    """(n, k): iterations without and with gradient (eq. 6, 7). Source: sec. 3.3; the code takes k where r_bar < k."""
    tau = rng.lognormal(math.log(max(mean_r, backprop)) - 1 / 8, 1 / 2)
    r = 1 + int(rng.poisson(tau))
    return max(r - backprop, 0), min(r, backprop)


def initial_state(model: Model, rows: int, length: int, key: tuple[int, ...]) -> Tensor:
    """s_0 of eq. 2, (rows, length, h): a function of the numbers in `key` and of the shape."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    weight, std = model.lm_head.weight, math.sqrt(2 / 5)
    state = torch.empty(rows, length, weight.shape[1], device=weight.device)
    generator = torch.Generator(weight.device).manual_seed(seed)
    nn.init.trunc_normal_(state, std=std, a=-3 * std, b=3 * std, generator=generator)
    return state.to(model.compute_dtype or weight.dtype)


@torch.no_grad()
def initialise(model: Model, seed: int) -> None:
    """Every matrix N(0, 2/(5h)) cut at 3 sigma; what writes to the stream is smaller by sqrt(2L), L layers unrolled.

    The linear half of an MLP's first matrix counts among these. Source: sec. 4.1 (which divides the variance by L) and
    the code (by 2L).
    """
    c, generator = model.config, torch.Generator().manual_seed(seed)
    std, smaller = math.sqrt(2 / (5 * c["n_embd"])), math.sqrt(2 * c["num_hidden_layers"])
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)
        if name.endswith(("proj.weight", "fc.weight")):
            weight[c["intermediate_size"] if "fc" in name else 0 :] /= smaller


def depth_loss(
    model: Model, inputs: Tensor, labels: Tensor, state: Tensor, n: int, k: int, num_labels: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 7 for one micro-batch (B, T) of a step with num_labels labels; -100 stands for none.

    Beside it its accuracy, a sum like the loss, and state_correlation: the mean correlation of the states of different
    positions in a row. Towards 1 they collapse, and the loop does nothing (sec. 4.3).
    """
    hidden, state = model(inputs, n + k, state, k)
    logits = model.logits(hidden)  # (B, T, V)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_labels
    with torch.no_grad():
        unit = F.normalize((state - state.mean(-1, keepdim=True)).float(), dim=-1)  # (B, T, h)
        B, T, _ = unit.shape
        correlation = (unit.sum(1).square().sum() - B * T) / (B * T * (T - 1))
        accuracy = (logits.argmax(-1) == labels).sum() / num_labels
    return loss, {"loss": loss.detach(), "accuracy": accuracy, "state_correlation": correlation}


@torch.no_grad()
def think(
    model: Model, tokens: Tensor, state: Tensor, cache: Cache, steps: int, exit_kl: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, T, V) and states (B, T, h) of T more tokens of each row, and the iterations (B,) that they took.

    With exit_kl a row stops as soon as eq. 8 holds at its last position, and nothing is computed once all have.
    """
    e, context = model.prelude(tokens, cache)
    thinking = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    taken, V = thinking * 0, model.config["vocab_size"]
    before = torch.full((len(tokens), V), -math.log(V), device=tokens.device)  # log p_0
    for i in range(steps):
        cache.thinking = thinking if exit_kl else None  # a slot keeps the entry of a row that has stopped
        state = torch.where(thinking[:, None, None], model.core(state, e, context, i), state)
        taken = taken + thinking
        if exit_kl:
            logits = model.logits(model.coda(state, context))
            now = logits[:, -1].log_softmax(-1)  # (B, V)
            thinking = thinking & ((before.exp() * (before - now)).sum(-1) >= exit_kl)
            before = now
            if not thinking.any():
                break
    logits = logits if exit_kl else model.logits(model.coda(state, context))
    cache.thinking = None
    cache.advance(tokens.shape[1], taken)
    return logits, state, taken


@torch.no_grad()
def at_depths(model: Model, tokens: Tensor, state: Tensor, depths: set[int]) -> Iterator[tuple[int, Tensor]]:
    """(r, logits (B, T, V)) after each number of iterations in `depths`, in one run of the loop from s_0 = state."""
    e, context = model.prelude(tokens)
    for r in range(1, max(depths) + 1):
        state = model.core(state, e, context, r - 1)
        if r in depths:
            yield r, model.logits(model.coda(state, context))


def stream(
    model: Model, tokens: Tensor, states: Tensor, steps: int, exit_kl: float = 0.0, budget: int = 0, warm: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows (B, T) read token by token: logits (B, T, V) and iterations (B, T). budget: of the cache, 0 = all of them.
    warm: each token starts from the last one's final state instead of its own s_0 in `states` (B, T, h).
    """
    cache, found = Cache(model, len(tokens), tokens.shape[1], min(budget or steps, steps)), []
    state = states[:, :1]
    for t in range(tokens.shape[1]):
        state = state if warm else states[:, t : t + 1]
        logits, state, taken = think(model, tokens[:, t : t + 1], state, cache, steps, exit_kl)
        found.append((logits, taken[:, None]))
    return tuple(torch.cat(parts, dim=1) for parts in zip(*found, strict=True))


def speculate(
    model: Model, prompt: Tensor, states: Tensor, steps: int, draft_steps: int = 1, lookahead: int = 0
) -> tuple[list[int], int, int]:
    """Greedy continuation of prompt (1, P) to one token more than `states` (1, S, h) has positions: the new tokens, the
    iterations run one after the other, and the passes with all `steps`.

    The model drafts for itself: `lookahead` tokens of draft_steps iterations each, then one pass of all iterations
    over all of them; the drafts before the first wrong one stay, and so does that pass's own token behind them. So the
    tokens are those of lookahead 0, which is plain decoding.
    """
    cache, total = Cache(model, 1, states.shape[1], steps), states.shape[1]
    drafts, new, iterations, passes = prompt[0].tolist(), [], 0, 0  # the prompt is the first thing to be verified
    given, start = len(drafts), 0

    def run(tokens: list[int], count: int) -> list[int]:
        at = cache.length
        tensor = torch.tensor([tokens], device=states.device)
        return think(model, tensor, states[:, at : at + len(tokens)], cache, count)[0][0].argmax(-1).tolist()

    while True:
        choices = run(drafts, steps)  # what the full model says behind each of them
        passes, iterations = passes + 1, iterations + steps
        right = given - 1  # drafts[:given] are certain
        while right + 1 < len(drafts) and drafts[right + 1] == choices[right]:
            right += 1
        new += [*drafts[given : right + 1], choices[right]]
        cache.length = start = start + right + 1
        if start == total:
            return new, iterations, passes
        drafts, given = new[-1:], 1
        for _ in range(min(lookahead, total - start - 1)):
            drafts += run(drafts[-1:], draft_steps)
            iterations += draft_steps
        cache.length = start


# -------------------------------------------------------------------------------------------------- training


def check_flags(cfg: Config) -> None:
    """Refuse combinations that cannot work, before anything is loaded."""
    width = f"--hidden_size {cfg.hidden_size} is no multiple of {2 * cfg.num_heads}"
    need(cfg.hidden_size % (2 * cfg.num_heads) == 0, f"{width}: {cfg.num_heads} heads of an even size are needed")
    shape = ("prelude", "core", "coda", "hidden_size", "num_heads", "tokenizer")
    given = [f"--{name} {getattr(cfg, name)}" for name in shape if getattr(cfg, name) != getattr(Config, name)]
    need(cfg.model == "scratch" or not given, f"{', '.join(given)}: for --model scratch only, not for {cfg.model}")
    file = f"--task {cfg.task} with --data {cfg.data or 'none'}: text needs a file, another task takes none"
    need(bool(cfg.data) == (cfg.task == "text") >= bool(cfg.tokenizer), file)
    need(cfg.decay <= 1, f"--decay {cfg.decay} is a share of the steps: 0 to 1")


def schedule(step: int, steps: int, warmup: int, decay: float) -> float:
    """Factor of the learning rate: linear warm-up, constant, linear to 0 behind the last step; steps count from 1.

    >>> [round(schedule(s, 10, 2, 0.4), 2) for s in (1, 2, 6, 7, 8, 9, 10)]
    [0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    return min(1.0, step / max(1, warmup), (steps + 1 - step) / max(1e-9, decay * steps))


def scores(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Per row (B,): share of right labels, whether the last one is, mean cross entropy; logits (B, T, V)."""
    right, counted = (logits.argmax(-1) == labels).double(), (labels >= 0).sum(1)  # (B, T), (B,)
    loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1) / counted
    return {"accuracy": right.sum(1) / counted, "last_accuracy": right[:, -1], "loss": loss}


@torch.no_grad()
def evaluate(run: "Run", model: Model, prompter: "Prompter", step: int) -> dict[str, float]:
    """Log and return the scores of held-out rows: @r after r iterations of whole rows (without @r: mean_r); /way with
    at most test_r a token, read token by token or continued (greedy, speculative), and what that costs a token.
    """
    cfg, c, values = run.cfg, model.config, defaultdict(list)  # a number for each held-out row
    if not cfg.eval_problems:
        return {}
    problems, exits, shared = heldout(prompter.task, cfg.eval_problems), {"exit_kl": cfg.exit_kl}, cfg.cache_budget
    ways = {"full": {}, "exit": exits, "warm": exits | {"warm": True}, "shared": {"budget": shared}}
    ways["both"] = ways["exit"] | ways["shared"]
    inputs, labels = prompter.rows(problems, run.device)  # (N, T)
    N, T = inputs.shape
    starts = [initial_state(model, N, T, (cfg.seed, 0, sample)) for sample in range(cfg.eval_samples)]
    mine = torch.arange(N)[run.rank :: run.world]
    for rows in mine.split(rows_at_once(model, T)):
        ends = []
        for start in starts:
            for r, logits in at_depths(model, inputs[rows], start[rows], {*TEST_R, cfg.mean_r, cfg.test_r}):
                ends += [logits.argmax(-1)[:, 1:]] if r == cfg.test_r else []
                for name, value in scores(logits, labels[rows]).items():
                    values[f"{name}@{r}"] += value.tolist()
        values["agreement"] += (ends[0] == ends[-1]).double().mean(1).tolist()  # of two initial states
        for way, options in ways.items():
            logits, taken = stream(model, inputs[rows], starts[0][rows], cfg.test_r, **options)
            for name, value in (scores(logits, labels[rows]) | {"iterations": taken.double().mean(1)}).items():
                values[f"{name}/{way}"] += value.tolist()
    P, total = T // 2, min(T, T // 2 + cfg.max_new_tokens)  # prompt, and prompt with continuation
    for n in mine[mine < 32].tolist():  # one by one, as one user would
        written = []
        for way, lookahead in (("greedy", 0), ("speculative", cfg.lookahead)):
            began, row = time.perf_counter(), (inputs[n : n + 1, :P], starts[0][n : n + 1, : total - 1])
            tokens, iterations, passes = speculate(model, *row, cfg.test_r, cfg.draft_r, lookahead)
            spent = {"seconds": time.perf_counter() - began, "iterations": iterations, "passes": passes}
            for name, value in spent.items():
                values[f"{name}/{way}"].append(value / len(tokens))
            written.append(tokens)
        values["same"].append(written[0] == written[1])
    everyone = run.gather(values)
    metrics = {name: mean(value for rank in everyone for value in rank.get(name, ())) for name in everyone[0]}
    spread = np.std([value for rank in everyone for value in rank.get(f"accuracy@{cfg.mean_r}", ())])
    metrics |= {"accuracy": metrics[f"accuracy@{cfg.mean_r}"], "accuracy_se": float(spread) / math.sqrt(N)}
    for way in ways:
        kept = min(ways[way].get("budget", cfg.test_r), cfg.test_r) * c["n_layers_in_recurrent_block"]
        metrics[f"cache/{way}"] = 2 * c["n_embd"] * (c["n_layers_in_prelude"] + kept + c["n_layers_in_coda"])
    metrics = {f"eval/{name}": value for name, value in metrics.items()}
    run.log(step, metrics, show=("eval/accuracy@1", "eval/accuracy", "eval/accuracy@64", "eval/agreement"))
    run.keep_samples(step, prompter, [sample(model, prompter, problems[0], starts[0][:1], cfg.mean_r)], [0.0])
    return metrics


def sample(model: Model, prompter: "Prompter", problem: dict, state: Tensor, steps: int) -> "Completion":
    """A row for samples.jsonl: its inputs and, as the completion, the likeliest labels."""
    inputs, labels = prompter.rows([problem], state.device)  # (1, T)
    logits, shown = model.logits(model(inputs, steps, state)[0]), labels[0] >= 0
    best, chosen = logits.log_softmax(-1)[0, shown].max(-1)
    row = {"prompt": inputs[0].tolist(), "tokens": chosen.tolist(), "logprobs": best.tolist()}
    score = {"total": scores(logits, labels)["accuracy"].item()}
    return Completion(number=0, problem=problem, finished=True, score=score, **row)


def train(cfg: Config) -> int:
    """Algorithm: repeat { draw r (6); loop n times without and k times with gradient; descend the loss (7) }."""
    check_flags(cfg)
    run = Run(cfg)
    text = read_text(cfg.data) if cfg.data else ""
    if cfg.model == "scratch":
        scratch = tempfile.TemporaryDirectory()
        make_model(Path(scratch.name), cfg, sorted(set(text)) or list("^abcdef"))
    model, sampler = run.load(scratch.name if cfg.model == "scratch" else cfg.model)
    chosen = run.choose(model, BY_SIZE)
    prompter = Prompter(model, cfg, text)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    labels = prompter.row(prompter.task.problem("train", cfg.seed, 0))[1]
    T, num_labels = len(labels), cfg.batch_size * sum(label >= 0 for label in labels)
    size = max(1, cfg.micro_batch_tokens // T)  # rows of a micro-batch, over all ranks
    firsts = range(0, cfg.batch_size, size)
    run.open(model, prompter, chosen, f"{cfg.batch_size} rows of {T} tokens per step, {len(firsts)} draw(s) of r")
    start = run.resume(model, optimizer)["step"] if cfg.resume else 0
    run.refresh(sampler, model)

    for step in range(start + 1, cfg.steps + 1):
        began, totals = time.time(), dict.fromkeys(("loss", "accuracy", "state_correlation", "recurrences"), 0.0)
        for m, first in enumerate(firsts):
            numbers = [(step - 1) * cfg.batch_size + i for i in range(first, min(first + size, cfg.batch_size))]
            n, k = max(cfg.mean_r + 1 - cfg.backprop, 0), min(cfg.mean_r + 1, cfg.backprop)
            if cfg.recurrence == "random":  # the same on every rank, so that none waits
                n, k = draw_steps(cfg.mean_r, cfg.backprop, np.random.default_rng((cfg.seed, step, m)))
            states = initial_state(model, len(numbers), T, (cfg.seed, step, m))[run.rank :: run.world]
            mine = [prompter.task.problem("train", cfg.seed, number) for number in numbers[run.rank :: run.world]]
            if mine:
                loss, seen = depth_loss(model, *prompter.rows(mine, run.device), states, n, k, num_labels)
                loss.backward()
                for name, value in (seen | {"recurrences": n + k}).items():
                    share = 1 if name in ("loss", "accuracy") else len(mine) / cfg.batch_size  # sums; means
                    totals[name] += float(value) * share
        lr = cfg.lr * schedule(step, cfg.steps, cfg.warmup_steps, cfg.decay)
        norm = run.update(model, optimizer, lr)
        run.refresh(sampler, model)

        everyone = run.gather(totals)
        metrics = {name: sum(rank[name] for rank in everyone) for name in totals}
        metrics |= {"grad_norm": norm, "lr": lr, "tokens": cfg.batch_size * T}
        metrics["tokens_per_s"] = metrics["tokens"] / (time.time() - began)
        run.log(step, metrics, show=("loss", "accuracy", "recurrences", "tokens_per_s"))
        if run.after_step(step, model, optimizer):
            return run.interrupted(step)
        if cfg.eval_every and step % cfg.eval_every == 0 and step < cfg.steps:
            evaluate(run, sampler, prompter, step)
    return run.finish(sampler, prompter)


# -------------------------------------------------------------------------------------- data and model folder


class Prompter:
    """Problems to ids: the inputs of a row and the label of every position that has one; -100 stands for none."""

    style = "a label at every position"

    def __init__(self, model: Model, cfg: Config, text: str):
        self.tokenizer, size = load_tokenizer(model.folder), model.config["vocab_size"]
        fits = self.tokenizer.get_vocab_size() <= size
        need(fits, f"{model.folder}: its tokenizer has more than the model's {size} ids")
        self.task = Windows(self.encode(text), cfg.length) if cfg.data else make_task(cfg.task)
        good = cfg.data or hasattr(self.task, "products")
        need(good, f"--task {cfg.task}: s3 or text is needed here, a label at every position")

    def row(self, problem: dict) -> tuple[list[int], list[int]]:
        if "ids" in problem:
            return problem["ids"][:-1], problem["ids"][1:]
        # attention averages: without a start sign it could not tell b from bb or bbb
        return self.encode("^" + problem["elements"]), [-100, *self.encode(self.task.products(problem))]

    def rows(self, problems: list[dict], device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and labels, (B, T) both."""
        return tuple(torch.tensor([self.row(problem) for problem in problems], device=device).unbind(1))

    def text(self, problem: dict) -> str:
        return self.decode(self.row(problem)[0])

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--data {path} cannot be read ({error}); a text file in UTF-8 is needed") from None


def make_model(folder: Path, cfg: Config, alphabet: list[str]) -> None:
    """Write a new model with seeded random weights into `folder`, with --tokenizer or one token for each character."""
    tokenizer = Tokenizer(models.WordLevel({x: i for i, x in enumerate(["<unk>", *alphabet])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer = load_tokenizer(cfg.tokenizer) if cfg.tokenizer else tokenizer
    config = {"architectures": ["RavenForCausalLM"], "vocab_size": tokenizer.get_vocab_size(), "rope_base": 50000}
    config |= {"n_embd": cfg.hidden_size, "intermediate_size": 2 * cfg.hidden_size, "norm_eps": 1e-6}
    config |= {"num_attention_heads": cfg.num_heads, "num_key_value_heads": cfg.num_heads}
    config |= {"n_layers_in_prelude": cfg.prelude, "n_layers_in_recurrent_block": cfg.core}
    config |= {"n_layers_in_coda": cfg.coda, "mean_recurrence": cfg.mean_r, "mean_backprop_depth": cfg.backprop}
    model = Model(config | FIXED)
    initialise(model, cfg.seed)
    model.folder = folder
    save_model(model, folder)
    tokenizer.save(str(folder / "tokenizer.json"))


Completion = SimpleNamespace  # as the block below names a line of samples.jsonl
FIXED = {"model_type": "huginn_raven", "tie_embeddings": True, "qk_bias": True, "bias": False}
EMBED = "transformer.wte.weight"
SHORT_NAMES = {"huginn": "tomg-group-umd/huginn-0125"}


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> Model:
    """The model in a folder of the published layout, weights widened to float32. Raises BadInput for another
    architecture, and for any tensor that is missing, extra or of another shape.
    """
    c = {"norm_eps": 1e-6} | read_json((folder := Path(folder)) / "config.json")
    for name, value in (FIXED | {"num_key_value_heads": c.get("num_attention_heads")}).items():
        own = f"this script has a model of its own and needs {value}; --model scratch makes one"
        need(c.get(name, value if name != "model_type" else None) == value, f"{folder}: {name} {c.get(name)}: {own}")
    names = "n_embd intermediate_size vocab_size num_attention_heads rope_base mean_recurrence n_layers_in_prelude"
    for name in f"{names} n_layers_in_recurrent_block n_layers_in_coda".split():
        span, value = range(1001) if "_layers_" in name else range(1, 10**7), c.get(name)
        what = f"{folder}/config.json: {name} {value}: a whole number from {span[0]} to {span[-1]} is needed"
        need(type(value) is int and value in span, what)
    with torch.device("meta"):
        model = Model(c)
    tensors, wanted = read_tensors(folder), model.state_dict()
    tensors.pop("freqs_cis", None)  # the published file has the table of rotations, and perhaps the head twice
    if (embed := tensors.get(EMBED)) is not None:
        same = torch.equal(tensors.setdefault("lm_head.weight", embed), embed)
        need(same, f"{folder}: lm_head and {EMBED} must be equal")
    wrong = [f"{n} is missing" for n in wanted if n not in tensors]
    wrong += [f"{n} is unknown" for n in tensors if n not in wanted]
    shapes = [(n, tuple(tensors[n].shape), tuple(wanted[n].shape)) for n in wanted if n in tensors]
    wrong += [f"{name} has shape {found}, not {right}" for name, found, right in shapes if found != right]
    need(not wrong, f"{folder}: {len(wrong)} tensors do not match config.json (first: {(wrong or [0])[0]})")
    model.load_state_dict({n: t.to(device, torch.float32) for n, t in tensors.items()}, assign=True)
    model.lm_head.weight = model.transformer["wte"].weight
    model.folder = folder
    return model.requires_grad_()


def save_model(model: Model, folder: str | Path) -> None:
    """A folder of the published layout; the tokenizer comes along."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {n: v for n, v in model.config.items() if n not in ("hidden_size", "num_hidden_layers")}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tensors = {n: t.detach().cpu().contiguous() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # it came with mode 0600
    if (model.folder / "tokenizer.json").is_file() and model.folder.resolve() != folder.resolve():
        shutil.copyfile(model.folder / "tokenizer.json", folder / "tokenizer.json")


# ------------------------------------------- below: the machine, the same text in every script that has it


# >>> shared: layers (same text in every script that has it; see tests/test_shared_blocks.py)
class Product(torch.autograd.Function):
    """x (..., K) times weight (N, K), by oneDNN: in float32 on a CPU F.linear takes MKL, which is slower."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        to_x = torch.ops.mkldnn._linear_pointwise(grad, weight.t(), None, "none", [], "")
        return to_x, grad.flatten(0, -2).t() @ x.flatten(0, -2)


class Linear(nn.Linear):
    """nn.Linear in the dtype of its input: float32 weights for the optimizer, bfloat16 products on a GPU."""

    packed: Tensor | None = None  # the weight in oneDNN's layout, see `packed`

    def by_onednn(self, dtype: torch.dtype) -> bool:
        large, on_cpu = self.weight.numel() >= 2**16, self.weight.device.type == "cpu"
        return large and on_cpu and dtype == self.weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.by_onednn(x.dtype):
            out = Product.apply(x, self.weight)
            return out if bias is None else out + bias
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


# <<< shared: layers


# >>> shared: files (same text in every script that has it; see tests/test_shared_blocks.py)
def need(good: object, message: str) -> None:
    """Unless `good`, complain in one line about what the user gave."""
    if not good:
        raise BadInput(message)


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def as_list(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        need(isinstance(found, dict), "not a JSON object")
        return found
    except (OSError, ValueError, RecursionError) as error:
        has = "settings" if path.name == "run.json" else "config.json, *.safetensors, tokenizer.json"
        raise BadInput(f"{path} cannot be read ({error}); such a folder has {has}") from None


def resolve_model(name: str) -> Path:
    """The folder of a model: "tiny" and others made here, a folder, a short name, or owner/name from the hub."""
    for folder in (Path(name).expanduser(), Path(__file__).parent / "models" / name):
        if folder.is_dir():
            return folder
    repo, known = SHORT_NAMES.get(name, name), ", ".join(SHORT_NAMES)
    is_repo = repo.count("/") == 1 and not name.startswith((".", "/", "~"))
    need(is_repo, f"no such folder: {name} (hub names look like owner/name; short names: {known})")
    try:
        return Path(snapshot_download(repo, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except (OSError, ValueError) as error:  # the hub's own errors are among them
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = "is not in the local cache and huggingface.co cannot be reached. On a machine with network: "
        why += f"hf download {repo} --local-dir DIR, then --model DIR"
        if status in (401, 403, 404):
            why = f"cannot be had: huggingface.co answers {status}. Check the name, or log in: hf auth login"
        raise BadInput(f"{repo} {why}") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that its index names."""
    index, tensors = folder / "model.safetensors.index.json", {}
    names = read_json(index).get("weight_map") if index.is_file() else {"": "model.safetensors"}
    good = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    need(good, f"{index}: weight_map must name the file of each tensor; download it again")
    for path in (folder / Path(name).name for name in sorted(set(names.values()))):  # never outside the folder
        need(path.is_file(), f"no {path.name} in {folder}; weights are read from safetensors files only")
        with path.open("rb") as file:
            lfs = file.read(23) == b"version https://git-lfs"
        pointer = f'is {path.stat().st_size} bytes and starts with "version https://git-lfs": a Git LFS pointer'
        need(not lfs, f"{path.name} {pointer}. Run: git lfs pull")
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise BadInput(f"{path} is damaged ({error}); download or save it again") from None
    return tensors


def load_tokenizer(folder: str | Path) -> Tokenizer:
    path = Path(folder) / "tokenizer.json"
    try:
        return Tokenizer.from_buffer(path.read_bytes())  # from_file would raise a bare Exception
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({first_line(error)}); download or save it again") from None


# <<< shared: files


# >>> shared: run (same text in every script that has it; see tests/test_shared_blocks.py)
class Run:
    """What surrounds the algorithm: ranks, device, folder, log, checkpoints, interruption."""

    def __init__(self, cfg):
        self.cfg, self.started, self.signal, self.skipped = cfg, time.time(), 0, 0
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        name = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        here = name == "cpu" or getattr(torch, name).is_available()
        need(here, f"--device {name}: there is none here; leave the flag out")
        self.device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
        if name == "cuda":
            torch.cuda.set_device(self.device)
        wide = name != "cuda" or not torch.cuda.is_bf16_supported()
        self.dtype = getattr(torch, cfg.dtype if cfg.dtype != "auto" else "float32" if wide else "bfloat16")
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=timedelta(minutes=cfg.timeout))
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.on_signal)
        if cfg.check:  # the whole way once, as small as it goes
            cfg.steps, cfg.eval_problems, cfg.eval_samples = 1, min(cfg.eval_problems, 2), min(cfg.eval_samples, 2)

    def on_signal(self, number: int, frame) -> None:
        if self.signal:  # the second one: leave at once
            os._exit(128 + number)
        self.signal = number
        if self.rank == 0:  # no print: the signal may have come in the middle of one
            os.write(1, b"stopping after this step; once more leaves at once\n")

    def gather(self, value) -> list:
        """The values of all ranks, in rank order, on every rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def on_rank_0(self, function: Callable):
        """Its result on rank 0, or its BadInput, on every rank; the others wait."""
        try:
            result = function() if self.rank == 0 else None
        except BadInput as error:
            result = error
        result = self.gather(result)[0]
        if isinstance(result, BadInput):
            raise result
        return result

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write("\n".join(map(escaped, text.split("\n"))))
            sys.stdout.flush()

    def load(self, name: str) -> tuple[Model, Model]:
        """The model to train, and the one to sample from: the same, or a copy in bfloat16 (see `refresh`)."""
        self.on_rank_0(lambda: resolve_model(name))  # one downloads, then all find it in the cache
        model = load_model(resolve_model(name), self.device)
        large = num_parameters(model) >= 1e9
        model.checkpointing = large if self.cfg.checkpointing == "auto" else self.cfg.checkpointing == "on"
        model.compute_dtype = self.dtype
        wide = self.dtype == torch.float32
        return model, model if wide else copy.deepcopy(model).to(self.dtype).requires_grad_(False)

    def refresh(self, to: Model, model: Model) -> None:
        """Copy the trained weights into the sampling copy, in place, so that captured graphs stay valid."""
        if to is not model:
            with torch.no_grad():
                torch._foreach_copy_(list(to.parameters()), list(model.parameters()))

    def choose(self, model: Model, by_size: dict[str, tuple]) -> dict:
        """Set the flags whose 0 means "by model size": for under 10 M parameters, under 1 B, and above."""
        column = (num_parameters(model) >= 10e6) + (num_parameters(model) >= 1e9)
        chosen = {name: values[column] for name, values in by_size.items() if not getattr(self.cfg, name)}
        for name, value in chosen.items():
            setattr(self.cfg, name, value)
        return chosen

    def open(self, model: Model, prompter: Prompter, chosen: dict, batch: str) -> None:
        """Make the run folder, or take the one to resume; write run.json; say what is about to happen."""
        cfg = self.cfg
        example = prompter.text(prompter.task.problem("train", cfg.seed, 0))
        if cfg.eval_problems:
            heldout(prompter.task, cfg.eval_problems)  # complains before anything is written
        self.folder = self.on_rank_0(self.find_folder)
        self.metrics, self.samples = self.folder / "metrics.jsonl", self.folder / "samples.jsonl"
        if self.rank == 0 and not cfg.check:  # also when resuming: flags may have changed
            about = {"script": Path(__file__).name, "command": " ".join(sys.argv), "config": asdict(cfg)}
            if cfg.resume:  # the first start chose
                chosen |= read_json(self.folder / "run.json").get("chosen", {})
            about |= {"chosen": chosen, "device": str(self.device), "dtype": str(self.dtype), "ranks": self.world}
            about["versions"] = {name: version(name) for name in ("torch", "tokenizers", "numpy")}
            write_atomically(self.folder / "run.json", json.dumps(about, indent=2))
            if not cfg.resume:
                shutil.copyfile(__file__, self.folder / Path(__file__).name)
        why = "as asked" if cfg.device != "auto" else "found" if self.device.type != "cpu" else "no CUDA device"
        capacity = len(prompter.encode(example)) + cfg.max_new_tokens
        plan = memory_plan(model, rows_at_once(model, capacity), capacity, cfg.micro_batch_tokens, self.dtype)
        self.say(
            f"device {self.device} ({why}), products in {self.dtype}, {self.world} rank(s)\n"
            f"model  {cfg.model}: {num_parameters(model) / 1e6:.2f} M parameters from {model.folder}\n"
            f"task   {cfg.task}, style {prompter.style}: {escaped(example)}\n"
            f"batch  {batch}\nchosen by model size: {chosen or 'nothing'}\n"
            f"memory {plan} GB\nfolder {self.folder}"
        )
        self.bar = tqdm(total=cfg.steps, disable=None if self.rank == 0 else True, unit="step")

    def find_folder(self) -> Path:
        if self.cfg.resume:
            need(checkpoints(Path(self.cfg.resume)), f"--resume {self.cfg.resume}: no checkpoint there; start again")
        if self.cfg.check or self.cfg.resume:
            return Path(self.cfg.out if self.cfg.check else self.cfg.resume)
        default = f"out/{Path(__file__).stem}-{self.cfg.task.partition(':')[0]}-{self.cfg.seed}"
        folder, number = Path(self.cfg.out or default), 2
        at = "".join(f" at step {int(p.name[5:])}" for p in checkpoints(folder)[-1:])
        ways = f"Continue: --resume {folder}   New folder: --out {folder}-2"
        need(not self.cfg.out or not (folder / "run.json").exists(), f"{folder} holds a run{at}. {ways}")
        while not self.cfg.out and folder.exists():
            folder, number = Path(f"{default}-{number}"), number + 1
        try:
            folder.mkdir(parents=True, exist_ok=bool(self.cfg.out))
        except OSError as error:
            raise BadInput(f"--out {folder} cannot be made ({error.strerror}); name another folder") from None
        return folder

    def log(self, step: int, metrics: dict[str, float], show: tuple[str, ...] = ()) -> None:
        """Append a line to metrics.jsonl; move the bar, or print a plain line where there is no terminal."""
        if self.rank == 0:
            line = {"step": step, "seconds": round(time.time() - self.started, 2)}
            line |= {name: round(value, 6) for name, value in metrics.items() if math.isfinite(value)}
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            shown = {name: f"{line[name]:.4g}" for name in show if name in line}
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(step - self.bar.n)
            if self.bar.disable:
                self.say(f"step {step}/{self.cfg.steps} {shown} {line['seconds']:.0f} s".replace("'", ""))

    def keep_samples(self, step: int, prompter: Prompter, done: list[Completion], advantages: list) -> None:
        """Append completions, token by token, to samples.jsonl, up to 20 MB in a run."""
        if self.rank or self.samples.exists() and self.samples.stat().st_size > 20e6:
            return
        with self.samples.open("a", encoding="utf-8") as file:
            for c, advantage in zip(done, advantages, strict=True):
                line = {"step": step, "group": c.number, "problem": c.problem, "prompt": prompter.decode(c.prompt)}
                line |= {"tokens": c.tokens, "pieces": [prompter.decode([i]) for i in c.tokens]}
                line |= {"mask": [1] * len(c.tokens), "logprobs": [round(p, 4) for p in c.logprobs]}
                line |= {"rewards": c.score, "advantage": round(advantage, 4), "truncated": not c.finished}
                file.write(json.dumps(line) + "\n")

    def update(self, model: Model, optimizer: torch.optim.Optimizer, lr: float, clip: float = 1.0) -> float:
        """Sum the gradients over the ranks, clip, step; their norm before clipping. Where that is not finite, it is
        so on all ranks: the step is skipped, and five in a row stop the run.
        """
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            if self.world > 1:
                dist.all_reduce(weight.grad)
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), clip))
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if not self.skipped:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        else:
            count = f"{self.skipped} in a row, 5 stop the run"
            self.say(f"note: gradient not finite; update skipped on all ranks ({count})")
        optimizer.zero_grad(set_to_none=True)
        if self.skipped == 5:
            stop = FloatingPointError("five gradients in a row were not finite: lower --lr, look at samples.jsonl")
            raise stop if self.rank == 0 else SystemExit(1)  # all ranks stop, one says why
        return norm

    def after_step(self, step: int, model: Model, optimizer: torch.optim.Optimizer, **extra) -> bool:
        """Save where it is due; True on all ranks at once as soon as one of them got Ctrl-C or SIGTERM."""
        self.signal = max(self.gather(self.signal))
        due = self.cfg.save_every and step % self.cfg.save_every == 0
        if self.signal or due or step == self.cfg.steps:
            self.save(step, model, optimizer, **extra)
        return self.signal > 0 and step < self.cfg.steps

    def save(self, step: int, model: Model, optimizer: torch.optim.Optimizer, keep: int = 2, **extra) -> None:
        """Write step-N, a Hugging Face folder with trainer.pt; it appears whole or not at all, then old ones go."""
        folder = self.folder / f"step-{step:06d}"
        if self.rank == 0:
            unfinished = folder.with_suffix(".tmp")
            for stale in self.folder.glob("step-*.tmp"):
                shutil.rmtree(stale)
            state = {"step": step, "world": self.world, "optimizer": optimizer.state_dict(), **extra}
            try:
                save_model(model, unfinished)
                torch.save(state, unfinished / "trainer.pt")
            except (OSError, RuntimeError, SafetensorError) as error:  # a full disk
                raise OSError(f"{folder} cannot be written ({first_line(error)}); the one before is whole") from None
            if folder.exists():
                shutil.rmtree(folder)
            unfinished.rename(folder)
            for old in checkpoints(self.folder)[:-keep]:
                shutil.rmtree(old)
        self.gather(0)  # all wait for the disk

    def resume(self, model: Model, optimizer: torch.optim.Optimizer) -> dict:
        """Load the newest whole checkpoint into model and optimizer; returns what else `save` wrote, "step" among
        it. What the logs hold beyond that step is dropped.
        """
        for folder in reversed(checkpoints(Path(self.cfg.resume))):
            try:
                saved = load_model(folder, self.device)
                state = torch.load(folder / "trainer.pt", map_location=self.device, weights_only=True)
                self.refresh(model, saved)
                optimizer.load_state_dict(state["optimizer"])
                step, world = state["step"], state["world"]
            except (ValueError, OSError, RuntimeError, EOFError, LookupError, TypeError, pickle.PickleError) as error:
                self.say(f"note: {folder} cannot be read ({first_line(error)}); taking the one before")
                continue
            if world != self.world:
                self.say(f"note: a run of {world} rank(s) goes on with {self.world}")
            for log in (self.metrics, self.samples) if self.rank == 0 else ():
                cut_log(log, step)
            self.say(f"resumed from {folder}")
            return state
        raise BadInput(f"--resume {self.cfg.resume}: no checkpoint there can be read; start again without --resume")

    def interrupted(self, step: int) -> int:
        """Say how to go on; the exit code."""
        self.bar.close()
        name, script = signal.Signals(self.signal).name.replace("SIGINT", "Ctrl-C"), Path(__file__).name
        saved = f"saved {self.folder}/step-{step:06d}. Continue: python {script} --resume {self.folder}"
        self.say(f"{script}: stopped by {name} after step {step}; {saved}")
        return 128 + self.signal

    def finish(self, model: Model, prompter: Prompter) -> int:
        """Evaluate what came out and what it started from, print both, and where everything lies; the exit code."""
        self.signal = -1  # all is saved: from here on Ctrl-C leaves at once
        after, script = evaluate(self, model, prompter, self.cfg.steps), Path(__file__).name
        before = after
        if self.cfg.steps:  # --steps 0 only evaluates
            start = load_model(model.folder, self.device).to(model.lm_head.weight.dtype)
            start.compute_dtype = model.compute_dtype
            before = evaluate(self, start, prompter, 0)
        self.bar.close()
        if self.cfg.check:
            self.say("check passed")
            return 0
        for name, value in after.items():
            if not name.endswith("_se"):
                errors = [f" +- {m[name + '_se']:.3f}" if name + "_se" in m else "" for m in (before, after)]
                self.say(f"{name:28}{before[name]:8.3f}{errors[0]} -> {value:8.3f}{errors[1]}")
        logs = ", ".join(str(log) for log in (self.metrics, self.samples) if log.exists())
        self.say(
            f"model   {(checkpoints(self.folder) or [model.folder])[-1]}\nlog     {logs}\n"
            f"go on   python {script} --resume {self.folder} --steps {2 * self.cfg.steps}\n"
            f"report  python docs/report.py {self.folder}"
        )
        return 0


def mean(values) -> float:
    """The mean; nan of nothing."""
    values = list(values)
    return float(sum(values)) / len(values) if values else math.nan


def escaped(text: str) -> str:
    """Text on one line, control characters written out, so that no sample can steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def rows_at_once(model: Model, capacity: int) -> int:
    """How many rows of `capacity` tokens to sample together: at most 256, with a cache of at most 1 GB (GPU: 20)."""
    heads, layers = model.config["num_key_value_heads"], model.config["num_hidden_layers"]
    per_row = 2 * layers * heads * model.head_dim * capacity * (model.compute_dtype or torch.float32).itemsize
    return max(1, min(256, int((1e9 if model.lm_head.weight.device.type == "cpu" else 20e9) / per_row)))


def num_parameters(model: Model) -> int:
    return sum(p.numel() for p in model.parameters())


def checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.name[5:].isdigit())


def write_atomically(path: Path, text: str) -> None:
    path.with_name(path.name + ".tmp").write_text(text, encoding="utf-8")
    path.with_name(path.name + ".tmp").replace(path)


def cut_log(log: Path, step: int) -> None:
    """Drop the lines of a log beyond a step, and a last one that is not whole."""
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    try:
        kept = "".join(line + "\n" for line in text.split("\n")[:-1] if json.loads(line)["step"] <= step)
    except (LookupError, RecursionError, TypeError, ValueError) as error:
        raise BadInput(f"{log} has a line without a step ({first_line(error)}); take it out") from None
    if kept != text:
        write_atomically(log, kept)


def logits_at_once(model: Model) -> int:
    """How many logits to hold in memory; on a CPU 32 MB of them, which the allocator gives to the next ones."""
    return 2**23 if model.lm_head.weight.device.type == "cpu" else 2**26


def memory_plan(model: Model, rows: int, capacity: int, micro_tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """GB of each large thing in a run: weights and optimizer in float32, the rest in `dtype`, logits in float32."""
    c, weights, size, layers = model.config, num_parameters(model), dtype.itemsize, model.config["num_hidden_layers"]
    inside = 14 * c["hidden_size"] + 4 * c["intermediate_size"]  # what one layer stores per token for its backward
    kept = layers * c["hidden_size"] + inside if model.checkpointing else layers * inside
    plan = {"weights, gradients, Adam": 16 * weights} if micro_tokens else {"weights": 4 * weights}
    plan["sampling copy"] = 0 if size == 4 else size * weights
    plan["KV cache"] = 2 * layers * rows * c["num_key_value_heads"] * capacity * model.head_dim * size
    plan["activations"] = micro_tokens * kept * size
    plan["logits"] = 12 * min(logits_at_once(model), micro_tokens * c["vocab_size"])
    return {name: round(count / 1e9, 3) for name, count in plan.items()} | {"all": round(sum(plan.values()) / 1e9, 2)}


def main(train: Callable, config: type, argv: list[str] | None = None) -> int:
    """Run a script; the exit code: 0 done, 1 runtime fault, 2 bad usage or input, 130 Ctrl-C, 143 SIGTERM."""

    def fail(message: str, code: int) -> int:
        where = "" if os.environ.get("RANK", "0") == "0" else f"rank {os.environ['RANK']}: "
        if code == 1 or os.environ.get("LOCAL_RANK", "0") == "0":  # a fault may be one rank's, bad input one machine's
            print(f"{Path(__file__).name}: error: {where}{escaped(message)}", file=sys.stderr)
        return code

    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: fresh memory costs a tenth of the page faults
    try:
        cfg = parse_config(config, argv)
        with tempfile.TemporaryDirectory() as temporary:
            cfg.out = temporary if cfg.check else cfg.out
            return train(cfg)
    except BadInput as error:
        return fail(str(error), 2)
    except (FloatingPointError, OSError) as error:
        whole = "; the last checkpoint is whole, --resume goes on from it" if getattr(error, "errno", None) else ""
        return fail(f"{error}{whole}", 1)
    except (RuntimeError, MemoryError) as error:
        what = first_line(error)
        if any(words in what for words in ("closed by peer", "reset by peer", "imed out", "timeout")):
            return fail(f"another rank ended or hangs ({what}); --resume goes on from the last checkpoint", 1)
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise
        return fail(f"out of memory ({what}); try half of --micro_batch_tokens; --check prints a plan", 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# <<< shared: run


# >>> shared: config (same text in every script that has it; see tests/test_shared_blocks.py)
def parse_config(config: type, argv: list[str] | None = None):
    """The command line as an instance of the dataclass `config`, one flag per field. --resume brings the settings of
    that run, which flags given beside it override. Raises BadInput for anything it does not understand.
    """
    script, flags = Path(__file__).name, {f.name: f for f in fields(config)}
    argv = sys.argv[1:] if argv is None else argv

    def complain(message: str) -> None:
        raise BadInput(f"{message}; python {script} --help lists all flags")

    runs = [line.partition("#")[0].rstrip() for line in __doc__.splitlines() if line.startswith("    python ")]
    epilog = "\n".join(["examples:", *runs[:2], f"short model names: {', '.join(SHORT_NAMES)}"])
    parser = argparse.ArgumentParser(script, description=__doc__, epilog=epilog, allow_abbrev=False)
    parser.error, parser.formatter_class = complain, argparse.RawDescriptionHelpFormatter
    for name, f in flags.items():
        text = f"{f.metadata['help']} (default: {f.default if f.default != '' else 'none'})".replace("%", "%%")
        kind = {"type": type(f.default), "choices": get_args(f.type) or None}
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else kind
        parser.add_argument(f"--{name}", default=f.default, help=text, **kind)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        words = {f.metadata["help"].split(",")[0].replace(" ", "_"): name for name, f in flags.items()}
        words |= {name: name for name in flags}
        close = get_close_matches(unknown[0].lstrip("-").split("=")[0], words, n=1)
        hint = f"did you mean --{words[close[0]]}?" if close else "see --help"
        raise BadInput(f"unknown flag {unknown[0]}; {hint}")
    if given.resume:
        runs = Path("out").glob(f"{Path(script).stem}-*/run.json")
        newest = max(runs, key=lambda path: path.stat().st_mtime, default=Path("auto/run.json"))
        folder = newest.parent if given.resume == "auto" else Path(given.resume)
        need((folder / "run.json").is_file(), f"--resume {folder}: no run.json there; name the folder of a run")
        need(not given.out, f"--resume {folder} goes on in that folder; leave --out {given.out} out")
        run = read_json(folder / "run.json")
        other, saved = run.get("script", script), run.get("config")
        need(other == script, f"--resume {folder} is a run of {other}, not of {script}")
        saved = {n: v for n, v in saved.items() if n in flags} if isinstance(saved, dict) else {}
        need(saved, f"--resume {folder}: run.json there holds no settings")
        words = [f"--{'no-' * (v is False)}{n}" + f"={v}" * (type(v) is not bool) for n, v in saved.items()]
        parser.error = lambda message: complain(f"{folder / 'run.json'}: {message}")  # the flags are good by now
        given = parser.parse_args([*words, *argv])
        given.resume, given.out = str(folder), ""
        names = [n for n in ("model", "task", "seed", "group_size") if n in saved]
        differ = [f"--{n} {saved[n]} there, {getattr(given, n)} here" for n in names if getattr(given, n) != saved[n]]
        need(not differ, f"--resume {folder} is another run ({'; '.join(differ)}); leave out what differs")
    for name, f in flags.items():
        value, least = getattr(given, name), f.metadata["least"]
        good = not isinstance(value, (int, float)) or least <= value < math.inf
        need(good, f"--{name} {value}: a number of at least {least} is needed")
    return config(**vars(given))


# <<< shared: config


if __name__ == "__main__":
    sys.exit(record(main)(train, Config))
