"""Group relative policy optimisation, R1-Zero style: GRPO (arXiv:2402.03300) as in DeepSeek-R1-Zero
(arXiv:2501.12948), with the terms of Dr. GRPO (2503.20783), DAPO (2503.14476) and DeepScaleR as options.

Sample G answers to each question, let a rule say which are right, and make the tokens of better-than-average
answers likelier. The group's mean is the baseline, so there is no critic; the verifier is the only teacher.

    A_i   = (r_i - mean(r)) / (std(r) + 1e-4)      over the G answers of a question, the same at every token   (1)
    rho   = exp(log pi(o_i,t) - log pi_old(o_i,t))                                                             (2)
    l_i,t = -min(rho A_i, clip(rho, 1 - eps_low, 1 + eps_high) A_i) + beta (exp(d) - d - 1)                    (3)
            d = log pi_ref(o_i,t) - log pi(o_i,t)
    loss  = sum_i,t w_i,t l_i,t                                                                                (4)
            w = 1/N        token     every token of the step counts the same (DAPO)   N tokens and B answers in
            w = 1/(B n_i)  sequence  every answer counts the same (GRPO)              the step, n_i tokens in
            w = 1/(B L)    constant  no length enters (Dr. GRPO)                      answer i, L the limit on n_i

With one update per rollout, the default, pi_old is pi: rho is 1, nothing is clipped, and (3) is REINFORCE with
the group's baseline. The loss is then about 0 and says nothing; look at the reward.

Run
    python grpo.py                                              # two CPU cores, no network, minutes
    python grpo.py --model Qwen2.5-1.5B --task countdown        # one GPU
    torchrun --standalone --nproc_per_node=8 grpo.py --model Qwen2.5-1.5B --task countdown
    Dr. GRPO: --advantage none --aggregation constant
    DAPO:     --aggregation token --clip_high 0.28 --updates 4 --dynamic_sampling 3 --mask_truncated --overlong_cache 64

Expect
    Seed 0, two cores of an Intel Xeon, 8 minutes: held-out accuracy 0.343 -> 0.715, mean length 97 -> 217 tokens, share
    that gives up 0.58 -> 0.03 (most of it in the first ten steps). docs/results.md has the other seeds.

Differs from the papers in: no KL term and one update per rollout by default (as DAPO and TinyZero's GRPO do).

Legend: B answers (rows), T tokens, P prompts, G group size, C hidden size, V vocabulary, H query heads,
K key heads, D head size.
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
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from difflib import get_close_matches
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from rewards import (
    ASSISTANT_PREFIX,
    BadInput,
    heldout,
    language_consistency,
    make_task,
    pass_at_k,
    prompt,
    reflection_count,
    soft_overlong,
)


def flag(default, help: str, least: float = 0):
    """A field of Config: its default, its help, and the least number allowed."""
    return field(default=default, metadata={"help": help, "least": least})


@dataclass
class Config:
    model: str = flag("tiny", "tiny (made here), a folder, owner/name, or a short name")
    task: str = flag("countdown", "countdown, multiplication, gsm8k or math, with knobs: countdown:high=20")
    data: str = flag("", "JSONL file of the problems (gsm8k, math)")
    chat: bool = flag(False, "put prompts into the model's chat template")
    group_size: int = flag(16, "completions per prompt (G in eq. 1)", 2)
    batch_size: int = flag(0, "completions per step over all ranks, 0 = by model size")
    max_new_tokens: int = flag(0, "longest completion (L in eq. 4), 0 = by model size")
    length_schedule: str = flag("", "longest completion from a step on: 8192:0,16384:1040 (DeepScaleR)")
    temperature: float = flag(1.0, "sampling temperature, also in the loss", 0.01)
    dynamic_sampling: int = flag(0, "draw up to this many more batches for groups with signal (DAPO), 0 = off")
    micro_batch_tokens: int = flag(0, "padded tokens per forward pass, 0 = by model size")
    steps: int = flag(32, "rollouts, 0 = only evaluate")
    updates: int = flag(1, "optimizer steps per rollout, each on its own part of the batch", 1)
    lr: float = flag(0.0, "learning rate, 0 = by model size")
    warmup_steps: int = flag(3, "steps of linear warm-up")
    decay: bool = flag(True, "let the learning rate fall linearly after the warm-up, to 0 behind the last step")
    eval_problems: int = flag(200, "held-out problems per evaluation, 0 = no evaluation")
    eval_samples: int = flag(16, "completions per held-out problem", 1)
    eval_every: int = flag(0, "steps between evaluations, 0 = at the end only")
    save_every: int = flag(25, "steps between checkpoints, 0 = at the end only")
    seed: int = flag(0, "seed of prompts and sampling")
    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", "auto is cuda where there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "of the products; weights stay float32")
    checkpointing: Literal["auto", "on", "off"] = flag("auto", "recompute layers going backward; auto: from 1 B on")
    timeout: int = flag(10, "minutes after which a rank that hangs ends the run", 1)
    out: str = flag("", "run folder; none = the next free out/grpo-TASK-SEED")
    resume: str = flag("", "run folder to go on with, or auto for the newest")
    check: bool = flag(False, "one step of everything in a temporary folder, with the memory plan")
    advantage: Literal["group", "batch", "none"] = flag("group", "what eq. 1 divides by: std of group or batch")
    aggregation: Literal["token", "sequence", "constant"] = flag("sequence", "weights of eq. 4")
    clip_low: float = flag(0.2, "eps_low in eq. 3")
    clip_high: float = flag(0.2, "eps_high in eq. 3 (DAPO: 0.28)")
    kl_coef: float = flag(0.0, "beta in eq. 3, 0 = off and no reference model")
    ref_every: int = flag(0, "steps after which the reference becomes the policy (R1: 400), 0 = never")
    mask_truncated: bool = flag(False, "leave answers that hit the limit out of the loss (DAPO)")
    overlong_cache: int = flag(0, "soft punishment over the last so many tokens (DAPO eq. 13), 0 = off")
    format_weight: float = flag(0.1, "reward for the layout alone")
    language_weight: float = flag(0.0, "weight of the language-consistency reward (R1), 0 = off")


BY_SIZE = {  # parameters: below 10 M (made here), below 1 B, above (TinyZero, nano-aha-moment, DAPO: lr 1e-6)
    "lr": (2e-4, 1e-5, 1e-6),
    "batch_size": (256, 64, 512),
    "max_new_tokens": (512, 256, 1024),
    "micro_batch_tokens": (2048, 1024, 16384),
}


# ------------------------------------------------------------------------------------------------- algorithm


def group_advantages(rewards: Tensor, group_size: int, scale: str = "group", eps: float = 1e-4) -> Tensor:
    """Rewards against the mean of their group, over its standard deviation (eq. 1).

    rewards (B,), groups of `group_size` contiguous; returns (B,). scale: "group", "batch" (the std of all rewards)
    or "none" (Dr. GRPO); the std is the sample's, as in TRL. A group with equal rewards gets exactly 0: the spread
    is tested, since the std of equal floats may be noise. Source: arXiv:2402.03300 sec. 4.1.2, arXiv:2503.20783.
    """
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not make groups of {group_size}")
    groups = rewards.view(-1, group_size)  # (P, G)
    advantages = groups - groups.mean(1, keepdim=True)
    if scale != "none":
        advantages = advantages / ((groups.std(1, keepdim=True) if scale == "group" else rewards.std()) + eps)
    equal = groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True) <= 1e-8
    return advantages.masked_fill(equal, 0.0).flatten()


def token_weights(mask: Tensor, aggregation: str, num_tokens: int, num_rows: int, max_length: int) -> Tensor:
    """w of eq. 4, (B, T). mask (B, T) is 1 on trained tokens; num_tokens and num_rows count the whole step."""
    if aggregation == "token":
        return mask / num_tokens
    if aggregation == "sequence":
        return mask / (mask.sum(1, keepdim=True).clamp(min=1) * num_rows)
    return mask / (num_rows * max_length)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor,
    clip_low: float = 0.2, clip_high: float = 0.2, kl_coef: float = 0.0, ref_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Eq. 2 to 4: the loss and, per token (B, T), what was clipped from below and above, and the KL estimate.

    All arguments (B, T) but advantages (B,). Log-ratios are clamped to +-20 before exp.
    """
    ratio, gain = (logprobs - old_logprobs).clamp(-20, 20).exp(), advantages[:, None]
    terms = -torch.minimum(ratio * gain, ratio.clamp(1 - clip_low, 1 + clip_high) * gain)  # pessimistic
    seen = {
        "clip_frac_low": (ratio < 1 - clip_low) & (gain < 0),
        "clip_frac_high": (ratio > 1 + clip_high) & (gain > 0),
    }
    if kl_coef:
        d = (ref_logprobs - logprobs).clamp(-20, 20)
        seen["kl"] = d.exp() - d - 1  # k3: unbiased for KL(pi || pi_ref), never negative
        terms = terms + kl_coef * seen["kl"]
    return (terms * weights).sum(), {name: value.detach() for name, value in seen.items()}


def limit_at(step: int, schedule: str, default: int) -> int:
    """The longest completion at a step.

    >>> limit_at(1039, "8192:0,16384:1040", 0), limit_at(1040, "8192:0,16384:1040", 0), limit_at(5, "", 320)
    (8192, 16384, 320)
    """
    for value, start in (map(int, stage.split(":")) for stage in schedule.split(",") if stage):
        default = value if step >= start else default
    return default


def reward_of(c: "Completion", cfg: Config, limit: int) -> float:
    """The verifier's total (correct + format_weight x format) and the optional terms."""
    reward = c.score["total"] + (soft_overlong(len(c.tokens), limit, cfg.overlong_cache) if cfg.overlong_cache else 0)
    if cfg.language_weight:  # of the thinking; added, as R1 does
        reward += cfg.language_weight * language_consistency(c.text.partition("</think>")[0])
    return reward


# -------------------------------------------------------------------------------------------------- training


def check_flags(cfg: Config) -> None:
    """Refuse combinations that cannot work, before anything is loaded."""
    unit = cfg.group_size * cfg.updates
    if cfg.batch_size % unit:
        near = [n for n in (cfg.batch_size // unit * unit, (cfg.batch_size // unit + 1) * unit) if n]
        what = f"--group_size {cfg.group_size}" + (f" x --updates {cfg.updates}" if cfg.updates > 1 else "")
        raise BadInput(f"--batch_size {cfg.batch_size} is not divisible by {what}; try {' or '.join(map(str, near))}")
    if cfg.ref_every and not cfg.kl_coef:
        raise BadInput(f"--ref_every {cfg.ref_every} needs --kl_coef: without it there is no reference")
    try:
        # the value of each stage, asked for by itself and long after its start
        values = [limit_at(10**9, stage, 0) for stage in cfg.length_schedule.split(",") if stage]
    except ValueError:
        values = [0]
    need(min(values, default=1) > 0, f"--length_schedule {cfg.length_schedule}: value:step,value:step is needed")


def sample_batch(run: "Run", sampler: "Model", prompter: "Prompter", step: int, drawn: int, limit: int) -> tuple:
    """The completions of a step, all of them and those to train on, and the prompts drawn so far.

    Each rank samples its share of the prompts, then every rank holds everything. Dynamic sampling draws on until
    the batch is full of groups in which some answers are right and some are wrong (DAPO eq. 11).
    """
    cfg, every, kept = run.cfg, [], []
    for _ in range(1 + cfg.dynamic_sampling):
        numbers = range(drawn, drawn + cfg.batch_size // cfg.group_size)
        mine = [(n, prompter.task.problem("train", cfg.seed, n)) for n in numbers][run.rank :: run.world]
        options = {"temperature": cfg.temperature, "format_weight": cfg.format_weight}
        parts = run.gather(rollout(sampler, prompter, mine, cfg.group_size, limit, (cfg.seed, step), **options))
        done = sorted((c for part in parts for c in part), key=lambda c: c.number)  # groups stay contiguous
        for c in done:
            c.reward = reward_of(c, cfg, limit)
        for group in in_groups(done, cfg.group_size):
            if not cfg.dynamic_sampling or 0 < sum(c.score["correct"] for c in group) < cfg.group_size:
                kept += group
        every, drawn = every + done, numbers.stop
        if len(kept) >= cfg.batch_size:
            break
    return every, kept[: cfg.batch_size], drawn


def update_policy(
    run: "Run", model: "Model", reference: "Model | None", optimizer: torch.optim.Optimizer,
    done: list["Completion"], advantages: list[float], lr: float, limit: int,
) -> dict[str, float]:  # fmt: skip
    """`updates` steps down eq. 4, each on its part of the groups; means over the computed tokens of all ranks.

    Rows that cannot change the gradient (advantage 0 and no KL term, or masked) are not computed, but count in w.
    """
    cfg, norms, old = run.cfg, [], {}
    sums = ("loss", "tokens", "entropy", "clip_frac_low", "clip_frac_high", "kl", "sampler_gap")
    totals, gap_max = dict.fromkeys(sums, 0.0), 0.0
    counted = [not cfg.mask_truncated or c.finished for c in done]
    signal = [ok and (a != 0 or cfg.kl_coef > 0) for ok, a in zip(counted, advantages, strict=True)]
    parts = in_groups(list(range(len(done))), cfg.batch_size // cfg.updates)
    longest_first = [sorted((i for i in part if signal[i]), key=lambda i: -len(done[i].tokens)) for part in parts]
    mine = [rows[run.rank :: run.world] for rows in longest_first]
    if cfg.updates > 1:  # pi_old of eq. 2, noted before the first update moves pi
        with torch.no_grad():
            for rows, tokens, mask in training_batches(run, done, [i for share in mine for i in share]):
                old |= zip(rows, completion_logprobs(model, tokens, mask, cfg.temperature)[0].tolist(), strict=True)
    for part, rows_of_all, rows_of_mine in zip(parts, longest_first, mine, strict=True):
        num_tokens = sum(len(done[i].tokens) for i in part if counted[i])  # N of eq. 4
        for rows, tokens, mask in training_batches(run, done, rows_of_mine):
            logprobs, entropy = completion_logprobs(model, tokens, mask, cfg.temperature)  # (B, T-1)
            old_logprobs, ref_logprobs, trained = logprobs.detach(), None, mask[:, 1:].to(logprobs.dtype)
            if old:
                old_logprobs = pad_rows([old[i][: trained.shape[1]] for i in rows], run.device, logprobs.dtype)
            if reference is not None:
                with torch.no_grad():
                    ref_logprobs, _ = completion_logprobs(reference, tokens, mask, cfg.temperature)
            gains = torch.tensor([advantages[i] for i in rows], dtype=logprobs.dtype, device=run.device)  # (B,)
            weights = token_weights(trained, cfg.aggregation, num_tokens, len(part), limit)
            clip = cfg.clip_low, cfg.clip_high
            loss, seen = policy_loss(logprobs, old_logprobs, gains, weights, *clip, cfg.kl_coef, ref_logprobs)
            loss.backward()
            totals["loss"] += loss.item()
            sampled = [[0.0] * (len(done[i].prompt) - 1) + done[i].logprobs for i in rows]
            gap = (old_logprobs - pad_rows(sampled, run.device, logprobs.dtype)).abs() * trained
            gap_max = max(gap_max, gap.max().item())
            for name, value in (seen | {"entropy": entropy, "tokens": trained, "sampler_gap": gap}).items():
                totals[name] += (value * trained).sum().item()
        if rows_of_all:  # without signal on any rank no step is taken: Adam would move on its momentum alone
            norms.append(run.update(model, optimizer, lr))
    totals = {name: sum(rank[name] for rank in run.gather(totals)) for name in totals}
    loss, tokens = totals.pop("loss"), max(totals.pop("tokens"), 1.0)
    means = {name: total / tokens for name, total in totals.items()}
    means["sampler_gap_max"] = max(run.gather(gap_max))
    return means | {"loss": loss, "grad_norm": mean(norms), "rows_trained": sum(signal)}


def train(cfg: Config) -> int:
    """Algorithm: repeat { sample G answers to each question, reward them, advantages (1), descend (4) }."""
    check_flags(cfg)
    run = Run(cfg)
    model, sampler = run.load(cfg.model)  # one and the same, or on a GPU a bfloat16 copy to sample from
    chosen = run.choose(model, BY_SIZE)
    if "batch_size" in chosen:  # fit it to the groups
        unit = cfg.group_size * cfg.updates
        chosen["batch_size"] = cfg.batch_size = max(1, cfg.batch_size // unit) * unit
    most = f"--overlong_cache {cfg.overlong_cache}: at most --max_new_tokens {cfg.max_new_tokens} is possible"
    need(cfg.overlong_cache <= cfg.max_new_tokens, most)
    prompter = Prompter(model, make_task(cfg.task, cfg.data, natural=not model.is_tiny), cfg.chat)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    reference = copy.deepcopy(sampler).requires_grad_(False) if cfg.kl_coef else None
    prompts = cfg.batch_size // cfg.group_size
    run.open(model, prompter, chosen, f"{prompts} prompts x {cfg.group_size} completions = {cfg.batch_size} per step")
    state = run.resume(model, optimizer) if cfg.resume else {"step": 0, "drawn": 0}
    drawn = state["drawn"]
    if "reference" in state:
        reference.load_state_dict(state["reference"])
    run.refresh(sampler, model)

    for step in range(state["step"] + 1, cfg.steps + 1):
        began = time.time()
        limit = limit_at(step, cfg.length_schedule, cfg.max_new_tokens)
        every, batch, drawn = sample_batch(run, sampler, prompter, step, drawn, limit)
        sampled = time.time()
        rewards = torch.tensor([c.reward for c in batch], dtype=torch.float64)  # (B,)
        advantages = group_advantages(rewards, cfg.group_size, cfg.advantage).tolist() if batch else []
        left = (1 + cfg.steps - step) / cfg.steps if cfg.decay else 1.0  # linear decay
        lr = cfg.lr * min(1.0, step / max(1, cfg.warmup_steps), left)
        metrics = describe_batch(every, cfg.group_size, prompter)
        metrics |= update_policy(run, model, reference, optimizer, batch, advantages, lr, limit)
        run.refresh(sampler, model)
        if reference is not None and cfg.ref_every and step % cfg.ref_every == 0:
            run.refresh(reference, model)

        seconds = {"seconds_sample": sampled - began, "seconds_train": time.time() - sampled}
        metrics |= {"lr": lr, "prompts": drawn, "tokens_per_s": metrics["tokens"] / sum(seconds.values()), **seconds}
        run.log(step, metrics, show=("reward", "accuracy", "completion_length", "entropy", "tokens_per_s"))
        run.keep_samples(step, prompter, batch[: 2 * cfg.group_size], advantages[: 2 * cfg.group_size])
        if step % 10 == 1 and batch:
            run.say(prompter.line(batch[0], advantage=round(advantages[0], 2)))
        extra = {"reference": reference.state_dict()} if cfg.ref_every else {}
        if run.after_step(step, model, optimizer, drawn=drawn, **extra):
            return run.interrupted(step)
        if cfg.eval_every and step % cfg.eval_every == 0 and step < cfg.steps:
            evaluate(run, sampler, prompter, step)
    return run.finish(sampler, prompter)


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


# >>> shared: model (same text in every script that has it; see tests/test_shared_blocks.py)
QKV_BIAS = {"llama": False, "qwen2": True, "qwen3": False}  # the model types that this decoder reads
QWEN = "Qwen2.5-0.5B Qwen2.5-1.5B Qwen2.5-3B Qwen2.5-7B Qwen3-0.6B-Base Qwen3-1.7B-Base".split()
SMOL = "SmolLM2-135M-Instruct SmolLM2-360M-Instruct SmolLM2-1.7B-Instruct".split()
SHORT_NAMES = {name: f"Qwen/{name}" for name in QWEN} | {name: f"HuggingFaceTB/{name}" for name in SMOL}


class Cache:
    """Keys and values of up to `capacity` positions for each of `rows` rows, allocated once, written in place.

    `lengths` (rows,) counts the positions in use, row by row: what is appended lands behind them and what lies
    behind them is never seen, so lowering a length cuts that row. `width` bounds what attention reads.
    """

    def __init__(self, model: "Model", rows: int, capacity: int):
        weight, c = model.lm_head.weight, model.config
        shape = (c["num_hidden_layers"], rows, c["num_key_value_heads"], capacity, model.head_dim)
        self.keys = torch.zeros(shape, device=weight.device, dtype=model.compute_dtype or weight.dtype)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=weight.device)
        self.width = capacity

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, K, T, D) behind each row's length; this layer's keys and values, (B, K, width, D)."""
        if layer == 0:  # the same slots in every layer
            self.rows = torch.arange(len(k), device=k.device)[:, None]
            self.slots = self.lengths[:, None] + torch.arange(k.shape[2], device=k.device)  # (B, T)
        self.keys[layer][self.rows, :, self.slots] = k.transpose(1, 2)
        self.values[layer][self.rows, :, self.slots] = v.transpose(1, 2)
        return self.keys[layer, :, :, : self.width], self.values[layer, :, :, : self.width]

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order, repeats allowed; fewer rows stay in the memory that is there."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            grown = len(rows) > old.shape[1]
            new = old.new_zeros(len(old), len(rows), *old.shape[2:]) if grown else old[:, : len(rows)]
            for to, of in zip(new, old, strict=True):  # layer by layer: a second cache is never in memory
                to[:, :, : self.width] = of[rows, :, : self.width]
            setattr(self, name, new)
        self.lengths = self.lengths[rows]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (B, H, T, D); cos, sin (B, 1, T, D/2). Source: arXiv:2104.09864."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Layer(nn.Module):
    def __init__(self, c: dict, head_dim: int):
        super().__init__()
        size, inner, eps, kind = c["hidden_size"], c["intermediate_size"], c["rms_norm_eps"], c["model_type"]
        self.heads, self.kv_heads, self.head_dim = c["num_attention_heads"], c["num_key_value_heads"], head_dim
        widths = {"q_proj": self.heads, "k_proj": self.kv_heads, "v_proj": self.kv_heads}
        parts = {name: Linear(size, n * head_dim, bias=QKV_BIAS[kind]) for name, n in widths.items()}
        parts["o_proj"] = Linear(self.heads * head_dim, size, bias=False)
        for name in ("q_norm", "k_norm"):
            parts[name] = RMSNorm(head_dim, eps) if kind == "qwen3" else nn.Identity()
        self.self_attn = nn.ModuleDict(parts)
        gates = {name: Linear(size, inner, bias=False) for name in ("gate_proj", "up_proj")}
        self.mlp = nn.ModuleDict(gates | {"down_proj": Linear(inner, size, bias=False)})
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(size, eps), RMSNorm(size, eps)

    def attend(self, x: Tensor, rotary: tuple, cache: Cache | None, layer: int, mask: Tensor | None) -> Tensor:
        """Grouped-query attention of x (B, T, C)."""
        (B, T, _), a = x.shape, self.self_attn
        q = rotate(a["q_norm"](a["q_proj"](x).view(B, T, self.heads, -1)).transpose(1, 2), *rotary)
        k = rotate(a["k_norm"](a["k_proj"](x).view(B, T, self.kv_heads, -1)).transpose(1, 2), *rotary)
        v = a["v_proj"](x).view(B, T, self.kv_heads, -1).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if mask is None:  # a whole batch, padded on the right: plain causal attention
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:  # heads that share a key stand as further queries of it, so that no key is ever repeated
            q = q.reshape(B, self.kv_heads, -1, self.head_dim)  # (B, K, G*T, D)
            mask = mask if T == 1 else mask.repeat(1, 1, self.heads // self.kv_heads, 1)  # (B, 1, G*T, S)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(B, self.heads, T, -1)
        return a["o_proj"](out.transpose(1, 2).reshape(B, T, -1))

    def forward(self, x: Tensor, *context) -> Tensor:
        x = x + self.attend(self.input_layernorm(x), *context)
        h = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h))


class Model(nn.Module):
    """The decoder of Llama, Qwen2, Qwen3 and SmolLM2, with Hugging Face's names for modules and settings.

    hidden = model(tokens (B, T) or embeddings (B, T, C)), after the final norm; logits = model.logits(hidden).
    """

    sharing = True  # in training, of prompts that rows have in common: see `trained_hidden`

    def __init__(self, config: dict):
        super().__init__()
        self.config = c = {"num_key_value_heads": config["num_attention_heads"], "rms_norm_eps": 1e-6} | config
        self.head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        self.rope_theta = c.get("rope_theta") or c["rope_parameters"]["rope_theta"]
        layers = nn.ModuleList(Layer(c, self.head_dim) for _ in range(c["num_hidden_layers"]))
        embed, norm = nn.Embedding(c["vocab_size"], c["hidden_size"]), RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.model = nn.ModuleDict({"embed_tokens": embed, "layers": layers, "norm": norm})
        self.lm_head = Linear(c["hidden_size"], c["vocab_size"], bias=False)
        if c.get("tie_word_embeddings"):
            self.lm_head.weight = embed.weight
        self.compute_dtype = None  # of the products; None: that of the weights
        self.checkpointing = False  # recompute each layer in the backward pass instead of storing it
        self.register_buffer("vocab_bias", None, persistent=False)  # (V,): -inf for ids never sampled, else 0
        self.eos_ids: list[int] = []
        self.is_tiny = False  # has the tokenizer of the tiny models made here

    def forward(
        self, inputs: Tensor, positions: Tensor | None = None, cache: Cache | None = None, mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Hidden states (B, T, C) after the final norm. With a cache the T inputs continue each row behind its
        own length, and the lengths grow by T. mask (B, 1, T, S) is True where a key may be seen.
        """
        x = inputs if inputs.is_floating_point() else self.model["embed_tokens"](inputs)
        x = x.to(self.compute_dtype or x.dtype)
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]  # (1, T)
            positions = positions if cache is None else positions + cache.lengths[:, None]  # (B, T)
        if cache is not None and mask is None:
            mask = torch.arange(cache.width, device=x.device) <= positions[:, None, :, None]  # (B, 1, T, S)
        exponents = torch.arange(0, self.head_dim, 2, device=x.device) / self.head_dim
        angles = positions[:, None, :, None] * self.rope_theta**-exponents  # (B, 1, T, D/2)
        rotary = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i, layer in enumerate(self.model["layers"]):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, cache, i, mask, use_reentrant=False)
            else:
                x = layer(x, rotary, cache, i, mask)
        if cache is not None:
            cache.lengths += x.shape[1]
        return self.model["norm"](x)

    def logits(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """Logits (..., V) for sampling and training: at least float32, over T, ids never sampled at -inf."""
        logits = self.lm_head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits if temperature == 1 else logits / temperature
        return logits if self.vocab_bias is None else logits + self.vocab_bias


def check_config(c: dict, folder: Path) -> None:
    """Refuse, in one line, a config.json that this decoder cannot honour."""
    rope, kind, act = c.get("rope_parameters") or c.get("rope_scaling") or {}, c.get("model_type"), c.get("hidden_act")
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    rope_type, bias = rope.get("rope_type") or rope.get("type") or "default", c.get("attention_bias")
    theta, eps = c.get("rope_theta") or rope.get("rope_theta"), c.get("rms_norm_eps", 1e-6)
    checks = {
        f"model_type {kind} (supported: {', '.join(QKV_BIAS)})": str(kind) in QKV_BIAS,
        f"hidden_act {act} (supported: silu)": act in ("silu", None),
        f"rope type {rope_type} (supported: default)": rope_type == "default",
        f"rope_theta {theta}": isinstance(theta, (int, float)) and theta > 0,
        f"rms_norm_eps {eps}": isinstance(eps, float),
        "attention_bias or mlp_bias": not c.get("mlp_bias") and (kind == "qwen2" or not bias),
        "use_sliding_window": not c.get("use_sliding_window"),
    }
    sizes = {"hidden_size": 10**5, "num_hidden_layers": 1000, "num_attention_heads": 1000, "intermediate_size": 10**6}
    sizes |= {"vocab_size": 10**7, "num_key_value_heads": 1000, "head_dim": 1000}
    for name, most in sizes.items():
        value = c.get(name, 1 if name == "num_key_value_heads" else None) or (name == "head_dim") * 1
        checks[f"{name} {value}"] = type(value) is int and 0 < value <= most
    for what, good in checks.items():
        need(good, f"{folder}/config.json: {what} is not supported")


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> Model:
    """The model in a Hugging Face folder, weights widened to float32. Raises BadInput for any tensor that is missing,
    extra or of another shape. eos_ids gets every id that ends a text, vocab_bias -inf where none may be drawn.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    check_config(config, folder)
    with torch.device("meta"):
        model = Model(config)
    tensors, wanted = read_tensors(folder), model.state_dict()
    if config.get("tie_word_embeddings"):  # one weight, stored once; a second copy must be the same
        head, embed = tensors.pop("lm_head.weight", None), tensors.get("model.embed_tokens.weight")
        same = head is None or embed is None or torch.equal(head, embed)
        need(same, f"{folder}: tie_word_embeddings is true, but lm_head differs from embed_tokens on disk")
        del wanted["lm_head.weight"]
    wrong = [f"{n} is missing" for n in wanted if n not in tensors]
    wrong += [f"{n} is unknown" for n in tensors if n not in wanted]
    shapes = [(n, tuple(t.shape), tuple(wanted[n].shape)) for n, t in tensors.items() if n in wanted]
    wrong += [f"{name} has shape {found}, not {right}" for name, found, right in shapes if found != right]
    need(not wrong, f"{folder}: {len(wrong)} tensors do not match config.json (first: {(wrong or [0])[0]})")
    tensors = {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    if config.get("tie_word_embeddings"):
        model.lm_head.weight = model.model["embed_tokens"].weight
    model.folder = folder
    read_special_ids(model)
    return model.requires_grad_()


def read_special_ids(model: Model) -> None:
    """Fill eos_ids from config, generation config and tokenizer, and vocab_bias from what must not be drawn."""
    folder, size = model.folder, model.config["vocab_size"]
    generation = read_json(path) if (path := folder / "generation_config.json").is_file() else {}
    banned = as_list(generation.get("suppress_tokens"))
    ends = [model.config.get("eos_token_id"), generation.get("eos_token_id")]
    if (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder)
        top = max(tokenizer.get_vocab().values(), default=-1)
        need(top < size, f"{folder}: the tokenizer has ids up to {top}, the model only {size} embeddings")
        banned = [*banned, *range(top + 1, size)]  # a vocabulary padded to a round size
        end = read_json(folder / "tokenizer_config.json").get("eos_token") or ""
        end = end.get("content", "") if isinstance(end, dict) else end
        ends.append(tokenizer.token_to_id(end) if isinstance(end, str) else f"eos_token {end}")
        model.is_tiny = tokenizer.token_to_id("<latent>") is not None
    ids = [i for end in ends for i in as_list(end)]
    bad = [i for i in ids + banned if type(i) is not int or not 0 <= i < size]
    need(not bad, f"{folder}: {bad[:1]} in its config files is no token, of which there are {size}")
    model.eos_ids = sorted(set(ids))
    if banned:
        model.vocab_bias = torch.zeros(size, device=model.lm_head.weight.device)
        model.vocab_bias[banned] = -torch.inf


def save_model(model: Model, folder: str | Path) -> None:
    """A folder that AutoModelForCausalLM opens with the same logits; the tokenizer's files come along."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rope = {"rope_theta": model.rope_theta, "rope_type": "default"}
    config = model.config | {"rope_theta": model.rope_theta, "rope_parameters": rope}
    config["dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    if config.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # it came with mode 0600
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (model.folder / name).is_file() and model.folder.resolve() != folder.resolve():
            shutil.copyfile(model.folder / name, folder / name)


# <<< shared: model


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


# >>> shared: sampler (same text in every script that has it; see tests/test_shared_blocks.py)
CHECK_EVERY = 8  # decode steps between two looks at the stop flags where a look synchronises with the device


def row_uniforms(seed: int, step: int, prompt: int, sample: int, count: int) -> np.ndarray:
    """The random numbers of one completion, (count,) float32 in [0, 1): a function of these four and nothing else,
    so that a completion depends neither on the batch and its other rows nor on the rank.
    """
    return np.random.default_rng((seed, step, prompt, sample)).random(count, np.float32)


def draw(probs: Tensor, uniforms: Tensor, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """One token per row, by the inverse CDF: the first whose cumulated probability exceeds the row's number.

    probs (B, V), uniforms (B, 1) in [0, 1); returns (B, 1). A token of probability 0 is never drawn. top_k keeps
    the likeliest k (0: all), top_p the fewest likeliest that hold p of the mass.
    """
    if top_p < 1 or top_k:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)  # (B, V)
        drop = torch.zeros_like(ordered, dtype=torch.bool)
        if top_p < 1:
            before = ordered.cumsum(-1) - ordered  # the mass before this token
            drop |= (before >= top_p) & (before > 0)
        if top_k:
            drop[:, top_k:] = True
        probs = probs.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), 0.0)
    cdf = probs.cumsum(-1)
    return torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True).clamp(max=probs.shape[-1] - 1)


@contextmanager
def packed(model: Model):
    """Within it, large float32 layers on a CPU multiply with a copy of their weights in oneDNN's own layout: for few
    rows two to three times as fast as MKL, which F.linear would take. No gradients; the weights must not change.
    """
    linear = [m for m in model.modules() if isinstance(m, Linear) and m.packed is None]
    large = [m for m in linear if m.by_onednn(model.compute_dtype or m.weight.dtype)]
    for layer in large:
        layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
    try:
        yield
    finally:
        for layer in large:
            layer.packed = None


class Decoding:
    """A batch being sampled: tensors that are allocated before the first step and only written in place.

    What lies behind a row's length means nothing; a row that is not finished was cut off. logprobs are those of the
    sampled tokens at the sampling temperature, before top-p and top-k. `rows` are the rows still in the batch.
    """

    def __init__(
        self, model: Model, cache: Cache, uniforms: Tensor,
        temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_tokens: int = 0,
    ):  # fmt: skip
        (B, N), device = uniforms.shape, cache.lengths.device
        self.temperature, self.top_p, self.top_k, self.min_tokens = temperature, top_p, top_k, min_tokens
        self.cache = cache
        self.uniforms = uniforms.to(device, torch.promote_types(cache.keys.dtype, torch.float32))  # (B, N) in [0, 1)
        self.tokens = torch.zeros(B, N, dtype=torch.long, device=device)
        self.logprobs = torch.zeros_like(self.uniforms)  # (B, N)
        self.lengths = torch.zeros(B, dtype=torch.long, device=device)  # tokens sampled, the end token included
        self.finished = torch.zeros(B, dtype=torch.bool, device=device)  # ended by an end token or a stop string
        self.rows = torch.arange(B, device=device)
        self.last = torch.zeros(B, 1, dtype=torch.long, device=device)  # the newest token of each row in the batch
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.eos = torch.tensor(model.eos_ids, dtype=torch.long, device=device)

    def drop_finished(self) -> None:
        """Rows that finished leave the batch (shapes change: not for captured steps)."""
        alive = (~self.finished[self.rows]).nonzero()[:, 0]
        self.rows, self.last = self.rows[alive], self.last[alive]
        self.cache.select(alive)


def prefill(model: Model, prompts: list[list[int]], capacity: int) -> tuple[Cache, Tensor]:
    """Run the prompts, padded on the right: a cache of `capacity` positions, and the last hidden states (P, C)."""
    device, longest = model.lm_head.weight.device, max(map(len, prompts))
    tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)  # (P, T)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    cache = Cache(model, len(prompts), capacity)
    cache.width = longest
    hidden = model(tokens, cache=cache)
    cache.lengths.copy_(lengths)  # the padding is forgotten
    return cache, hidden[torch.arange(len(prompts), device=device), lengths - 1]


def emit(s: Decoding, logits: Tensor) -> None:
    """Draw the next token of every row from logits (B, V) and note it: fixed shapes, nothing read back."""
    if s.min_tokens:  # before that, no end token
        logits = logits.index_fill(-1, s.eos, -torch.inf).where(s.step < s.min_tokens, logits)
    probs = logits.softmax(-1)
    if s.temperature:
        token = draw(probs, s.uniforms[s.rows, s.step][:, None], s.top_p, s.top_k)  # (B, 1)
    else:
        token = logits.argmax(-1, keepdim=True)
    logprob = probs.gather(1, token).log()  # (B, 1)
    s.last.copy_(token)
    s.tokens[s.rows, s.step] = token[:, 0]
    s.logprobs[s.rows, s.step] = logprob[:, 0].to(s.logprobs.dtype)
    s.lengths[s.rows] += ~s.finished[s.rows]
    s.finished[s.rows] |= (token == s.eos).any(-1)
    s.step += 1


def decode_step(model: Model, s: Decoding) -> None:
    """One more token for every row of the batch."""
    emit(s, model.logits(model(s.last, cache=s.cache)[:, 0], s.temperature or 1.0))


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """On a GPU, the step recorded once as a CUDA graph and replayed from then on; elsewhere the step itself."""
    if device.type != "cuda":
        return step
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        note_once(f"note: CUDA graph capture failed ({first_line(error)}); decoding eagerly")
        return step
    return graph.replay


@lru_cache
def note_once(text: str) -> None:
    print(text, flush=True)


def cut_at_stop(s: Decoding, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
    """Finish the rows whose text holds a stop string since the last look; the tokens up to its last character stay."""
    seen = (int(s.step) - 1) // CHECK_EVERY * CHECK_EVERY
    for row in (s.lengths > seen).nonzero()[:, 0].tolist():
        ids = s.tokens[row, : s.lengths[row]].tolist()
        for end in range(seen + 1, len(ids) + 1):
            text = tokenizer.decode(ids[max(0, end - 32) : end], skip_special_tokens=False)
            if any(word in text for word in stop):
                s.lengths[row], s.finished[row] = end, True
                break


@torch.inference_mode()
def generate(
    model: Model, prompts: list[list[int]], uniforms: Tensor, temperature: float = 1.0, top_p: float = 1.0,
    top_k: int = 0, min_tokens: int = 0, stop: tuple[str, ...] = (), tokenizer: Tokenizer | None = None,
) -> Decoding:  # fmt: skip
    """Continue each of P prompts B / P times by at most N tokens, with uniforms (B, N), rows of a prompt together;
    temperature 0 is greedy. Returns tokens (B, N), lengths (B,), finished (B,), logprobs (B, N) on the CPU.

    Each prompt runs through the model once, and its group shares the cache. On the CPU finished rows leave the
    batch; elsewhere the step keeps its shapes, and the stop flags are read every CHECK_EVERY tokens.
    """
    (rows, steps), longest = uniforms.shape, max(map(len, prompts))
    device = model.lm_head.weight.device
    on_cpu = device.type == "cpu"
    with packed(model):
        cache, hidden = prefill(model, prompts, longest + steps)
        group = torch.arange(len(prompts), device=device).repeat_interleave(rows // len(prompts))
        cache.select(group)
        s = Decoding(model, cache, uniforms, temperature, top_p, top_k, min_tokens)
        advance = partial(decode_step, model, s)
        for done in range(steps):
            if stop and done and done % CHECK_EVERY == 0:
                cut_at_stop(s, tokenizer, stop)
            if on_cpu or done % CHECK_EVERY == 0:
                alive = len(s.rows) - int(s.finished[s.rows].sum())
                if not alive:
                    break
                if on_cpu and alive <= 0.75 * len(s.rows):
                    s.drop_finished()
            s.cache.width = longest + done if on_cpu else longest + steps
            if done == 2:  # one step has run eagerly and warmed up what a capture may not do
                advance = capture(advance, device)
            if done:
                advance()
            else:
                emit(s, model.logits(hidden, temperature or 1.0)[group])
        if stop and steps:
            cut_at_stop(s, tokenizer, stop)
    s.tokens, s.lengths, s.finished, s.logprobs = (t.cpu() for t in (s.tokens, s.lengths, s.finished, s.logprobs))
    return s


# <<< shared: sampler


# >>> shared: logprobs (same text in every script that has it; see tests/test_shared_blocks.py)
def pad_rows(rows: list[list], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Lists of numbers as one tensor (B, T), padded on the right with 0."""
    longest = max(map(len, rows))
    return torch.tensor([list(row) + [0] * (longest - len(row)) for row in rows], dtype=dtype).to(device)


def micro_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Row numbers, longest first, cut so that no batch padded to its longest row exceeds max_tokens (one row may).

    >>> micro_batches([3, 9, 4, 8], 18)
    [[1, 3], [2, 0]]
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > max_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def head_logprobs(model: Model, hidden: Tensor, chosen: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(N,) log-probability of `chosen` and (N,) entropy, from hidden states (N, C)."""
    logits = model.logits(hidden, temperature)  # (N, V)
    logprobs = logits.gather(-1, chosen[:, None])[:, 0] - logits.logsumexp(-1)
    with torch.no_grad():
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    return logprobs, entropy


def chosen_logprobs(
    model: Model, hidden: Tensor, chosen: Tensor, temperature: float = 1.0, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """(N,) log-probabilities of `chosen` and (N,) entropies, from hidden states (N, C).

    At most `chunk` logits (0: `logits_at_once`) are computed at a time, and again in the backward pass, so that
    (tokens x vocabulary) never lies in memory as a whole.
    """
    size = max(1, (chunk or logits_at_once(model)) // model.config["vocab_size"])
    if len(chosen) <= size:
        return head_logprobs(model, hidden, chosen, temperature)
    pieces = zip(hidden.split(size), chosen.split(size), strict=True)
    parts = [checkpoint(head_logprobs, model, h, c, temperature, use_reentrant=False) for h, c in pieces]
    logprobs, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    return logprobs, entropy


@dataclass
class SharedPrompts:
    """Keys and values of prompts, with their gradients, by layer. With `rows`, the prompt of each row, the row's own
    stand behind those of its prompt.
    """

    kept: dict[int, tuple[Tensor, Tensor]]
    rows: Tensor | None = None
    lengths: int = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.rows is None:
            self.kept[layer] = k, v
            return k, v
        keys, values = (kept.index_select(0, self.rows) for kept in self.kept[layer])
        return torch.cat([keys, k], 2), torch.cat([values, v], 2)


def trained_hidden(model: Model, tokens: Tensor, mask: Tensor) -> Tensor:
    """Hidden states (N, C) from which the N tokens of the mask (B, T) are predicted, row after row.

    Where that saves a quarter of the work, what rows have in common before their first trained token runs through the
    model once, and serves all of them.
    """
    where, inputs = mask[:, 1:].bool(), tokens[:, :-1]
    (B, T), places = inputs.shape, torch.arange(inputs.shape[1], device=tokens.device)
    first = where.int().argmax(1)[:, None]  # (B, 1) inputs in front of the first from which a token is predicted
    prompts, rows = inputs.where(places < first, -1).unique(dim=0, return_inverse=True)  # (P, T), (B,)
    width = int(first.max())
    if not model.sharing or 4 * (B - len(prompts)) * width < B * T:
        return model(inputs)[where]
    kept, place = {}, places[:width]
    causal = (place <= place[:, None])[None, None]
    model(prompts[:, :width].clamp(min=0), place[None], SharedPrompts(kept), causal)
    positions = first + places[: T - int(first.min())]  # (B, S)
    inside, at = positions < T, positions.clamp(max=T - 1)
    own = (positions[:, None, :] <= positions[:, :, None])[:, None]  # (B, 1, S, S)
    seen = (place < first)[:, None, None].expand(-1, -1, own.shape[2], -1)  # (B, 1, S, width)
    hidden = model(inputs.gather(1, at), positions, SharedPrompts(kept, rows), torch.cat([seen, own], 3))
    return hidden[where.gather(1, at) & inside]


def completion_logprobs(
    model: Model, tokens: Tensor, mask: Tensor, temperature: float = 1.0, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens[:, 1:] and entropies of their distributions, both (B, T-1), 0 where mask is 0.

    mask (B, T) is 1 on trained tokens; only they go through the head.
    """
    where = mask[:, 1:].bool()
    parts = chosen_logprobs(model, trained_hidden(model, tokens, mask), tokens[:, 1:][where], temperature, chunk)
    empty = torch.zeros(where.shape, dtype=parts[0].dtype, device=tokens.device)
    logprobs, entropy = (empty.masked_scatter(where, part) for part in parts)
    return logprobs, entropy


# <<< shared: logprobs


# >>> shared: rollout (same text in every script that has it; see tests/test_shared_blocks.py)
@dataclass
class Completion:
    """One sampled answer and what the verifier says of it."""

    number: int  # of its prompt
    problem: dict
    prompt: list[int]
    tokens: list[int]  # with the end token
    logprobs: list[float]
    finished: bool  # ended by itself; else truncated
    text: str
    score: dict  # {"format", "answer", "correct", "total"}
    reward: float = 0.0  # what the script makes of the score


class Prompter:
    """Problems to prompt ids: compact for the tiny tokenizer, else plain text, or the model's chat template."""

    def __init__(self, model: Model, task, chat: bool):
        self.task, self.tokenizer, self.end = task, load_tokenizer(model.folder), model.eos_ids[:1]
        self.style = "chat" if chat else "compact" if model.is_tiny else "text"
        self.stop = ("</answer>", "\nUser:") if self.style == "text" else ()
        self.folder, self.template = model.folder, None

    def text(self, problem: dict) -> str:
        asked = prompt(self.task, problem, self.style)
        return self.fill(asked, True) + ASSISTANT_PREFIX if self.style == "chat" else asked

    def fill(self, messages: list[dict], reply: bool) -> str:
        """The chat template's text of these messages; reply opens the assistant's turn."""
        from jinja2 import TemplateError  # slow to import, and only the chat template needs them
        from transformers import AutoTokenizer

        try:  # without a word here transformers would ask whether to run the Python code of a folder
            self.template = self.template or AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            need(self.template.chat_template, "it has no chat template")
            return self.template.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
        except (TemplateError, OSError, TypeError, ValueError) as error:
            raise BadInput(f"--chat: {self.folder}: {first_line(error)}; leave --chat out") from None

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def describe(self, c: Completion) -> dict[str, float]:
        """What the task has to say of a completion besides its score."""
        return self.task.describe(c.text, c.problem) if hasattr(self.task, "describe") else {}

    def line(self, c: Completion, **more) -> str:
        """One completion as a line for the log, escaped."""
        parts = {name: c.score[name] for name in ("answer", "format", "correct")}
        parts |= {"length": len(c.tokens), "truncated": not c.finished, **more}
        return f"{escaped(self.text(c.problem))}|{escaped(c.text)}| {parts}"


def rollout(
    model: Model, prompter: Prompter, numbered: list[tuple[int, dict]], group_size: int, max_new_tokens: int,
    stream: tuple[int, int], temperature: float, **score_options,
) -> list[Completion]:  # fmt: skip
    """Sample `group_size` completions of each (number, problem) and score them; groups are contiguous.

    stream is (seed, step): with the numbers of prompt and completion it names the random numbers that are used.
    """
    done, encoded = [], [prompter.encode(prompter.text(p)) for _, p in numbered]
    per_batch = max(1, rows_at_once(model, max(map(len, encoded), default=0) + max_new_tokens) // group_size)
    for start in range(0, len(numbered), per_batch):
        part = [(n, p) for n, p in numbered[start : start + per_batch] for _ in range(group_size)]
        prompts = encoded[start : start + per_batch]
        numbers = [row_uniforms(*stream, n, i % group_size, max_new_tokens) for i, (n, _) in enumerate(part)]
        uniforms = torch.from_numpy(np.stack(numbers))
        s = generate(model, prompts, uniforms, temperature, stop=prompter.stop, tokenizer=prompter.tokenizer)
        bad = int((~s.logprobs.isfinite()).any(1).sum())
        if bad:
            raise FloatingPointError(f"step {stream[1]}: {bad} of {len(part)} rows met logits that are not finite")
        for row, (number, problem) in enumerate(part):
            tokens, logprobs = (t[row, : s.lengths[row]].tolist() for t in (s.tokens, s.logprobs))
            text = prompter.decode(tokens[:-1] if tokens and tokens[-1] in model.eos_ids else tokens)
            score = prompter.task.score(text, problem, **score_options)
            given, finished = prompts[row // group_size], bool(s.finished[row])
            done.append(Completion(number, problem, given, tokens, logprobs, finished, text, score))
    return done


def evaluate(run: "Run", model: Model, prompter: Prompter, step: int) -> dict[str, float]:
    """Log and return the held-out accuracy over eval_problems x eval_samples completions. The random numbers are
    those of stream 0 every time, so two evaluations are paired. `_se` is the standard error over problems.
    """
    cfg, k = run.cfg, run.cfg.eval_samples
    if not cfg.eval_problems:
        return {}
    problems = list(enumerate(heldout(prompter.task, cfg.eval_problems)))[run.rank :: run.world]
    mine = rollout(model, prompter, problems, k, cfg.max_new_tokens, (cfg.seed, 0), cfg.temperature)
    done = [c for part in run.gather(mine) for c in part]
    counts = [sum(c.score["correct"] for c in done[i : i + k]) for i in range(0, len(done), k)]  # right, per problem
    error = float(np.std(counts, ddof=len(counts) > 1)) / k / math.sqrt(len(counts))
    metrics = {"accuracy": sum(counts) / len(done), "accuracy_se": error}
    metrics |= {f"pass@{2**i}": mean(pass_at_k(k, c, 2**i) for c in counts) for i in range(k.bit_length())}
    metrics |= {"format": mean(c.score["format"] for c in done), "clipped_ratio": mean(not c.finished for c in done)}
    metrics["completion_length"] = mean(len(c.tokens) for c in done)
    metrics["entropy"] = -mean(p for c in done for p in c.logprobs)  # of the sampling distribution, nats a token
    details = [prompter.describe(c) for c in done]
    metrics |= {name: mean(d[name] for d in details) for name in details[0]}
    if "gave_up" in metrics:
        stayed = [c.score["correct"] for c, d in zip(done, details, strict=True) if not d["gave_up"]]
        metrics["accuracy_not_given_up"] = mean(stayed)
    metrics = {f"eval/{name}": value for name, value in metrics.items()}
    run.log(step, metrics, show=("eval/accuracy", "eval/completion_length"))
    return metrics


# <<< shared: rollout


# >>> shared: batch (same text in every script that has it; see tests/test_shared_blocks.py)
def in_groups(values: list, size: int) -> list[list]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def describe_batch(done: list[Completion], group_size: int, prompter: Prompter) -> dict[str, float]:
    """What was sampled, in numbers: rewards, lengths overall and by outcome, groups without signal, reflection."""
    metrics = {"reward": mean(c.reward for c in done), "reward_std": float(np.std([c.reward for c in done], ddof=1))}
    metrics |= {"reward/format": mean(c.score["format"] for c in done)}
    metrics |= {"accuracy": mean(c.score["correct"] for c in done)}
    metrics |= {"tokens": sum(len(c.tokens) for c in done), "clipped_ratio": mean(not c.finished for c in done)}
    metrics["completion_length"] = metrics["tokens"] / len(done)
    for name, outcome in (("correct", True), ("wrong", False)):
        some = [c for c in done if c.score["correct"] == outcome]
        metrics[f"completion_length/{name}"] = mean(len(c.tokens) for c in some)
        metrics[f"reflections/{name}"] = mean(reflection_count(c.text) for c in some)
    groups = in_groups(done, group_size)
    metrics["frac_reward_zero_std"] = mean(len({round(c.reward, 8) for c in group}) == 1 for group in groups)
    metrics["frac_all_right"] = mean(all(c.score["correct"] for c in group) for group in groups)
    metrics["frac_all_wrong"] = mean(not any(c.score["correct"] for c in group) for group in groups)
    details = [prompter.describe(c) for c in done]
    return metrics | {name: mean(d[name] for d in details) for name in details[0]}


def training_batches(run: "Run", done: list[Completion], rows: list[int]):
    """(row numbers, tokens (B, T), mask (B, T)) of every micro-batch; the mask is True on sampled tokens. Longest rows
    come first, or one prompt after the other where sharing the prompts saves more than the padding costs.
    """
    limit, prompt = run.cfg.micro_batch_tokens, {i: len(done[i].prompt) for i in rows}

    def cut(part: list[int], shared: int = 0) -> list[list[int]]:
        lengths = [prompt[i] + len(done[i].tokens) - shared for i in part]
        return [[part[j] for j in batch] for batch in micro_batches(lengths, limit - shared)]

    def padded(batch: list[int], shared: int = 0) -> int:
        return shared + len(batch) * (max(prompt[i] + len(done[i].tokens) for i in batch) - shared)

    groups = [[i for i in rows if done[i].number == n] for n in dict.fromkeys(done[i].number for i in rows)]
    by_prompt = [(batch, prompt[group[0]]) for group in groups for batch in cut(group, prompt[group[0]])]
    by_length = [(batch, 0) for batch in cut(rows)]
    for chosen, _ in min(by_length, by_prompt, key=lambda plan: sum(padded(*part) for part in plan)):
        tokens = pad_rows([done[i].prompt + done[i].tokens for i in chosen], run.device, torch.long)
        masks = [[False] * len(done[i].prompt) + [True] * len(done[i].tokens) for i in chosen]
        yield chosen, tokens, pad_rows(masks, run.device, torch.bool)


# <<< shared: batch


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
