"""Group relative policy optimisation, R1-Zero style: GRPO (arXiv:2402.03300), DeepSeek-R1-Zero (arXiv:2501.12948),
with the terms of Dr. GRPO (arXiv:2503.20783), DAPO (arXiv:2503.14476) and DeepScaleR as options.

Sample G answers to each question, let a rule say which are right, and make the tokens of better-than-average answers
likelier: the group's mean is the baseline, so there is no critic, and the verifier is the only teacher.

    A_i   = (r_i - mean(r)) / (std(r) + 1e-4)           over the G answers of one question; the same at every token  (1)
    rho   = exp(log pi(o_i,t) - log pi_old(o_i,t))                                                                 (2)
    l_i,t = -min(rho A_i, clip(rho, 1 - eps_low, 1 + eps_high) A_i) + beta (exp(d) - d - 1),  d = log pi_ref - log pi (3)
    loss  = sum_i,t w_i,t l_i,t                                                                                    (4)
            w = 1/N        token     every token of the step the same (DAPO)      N tokens, B answers in the step,
            w = 1/(B n_i)  sequence  every answer the same (GRPO)                 n_i tokens in answer i,
            w = 1/(B L)    constant  no length enters (Dr. GRPO)                  L the limit on n_i

With one update per rollout, the default, pi_old is pi: rho is 1, nothing is clipped, and (3) is REINFORCE with the
group's baseline. The loss is then near 0 and says nothing; look at the reward.

Run
    python grpo.py                                              # two CPU cores, no network, minutes
    python grpo.py --model Qwen2.5-1.5B --task countdown        # one GPU
    torchrun --standalone --nproc_per_node=8 grpo.py --model Qwen2.5-1.5B --task countdown
    Dr. GRPO: --advantage none --aggregation constant     DAPO: --clip_high 0.28 --updates 4 --dynamic_sampling 3
                                                                --overlong_cache 64 --mask_truncated

Expect
    @EXPECT@

Legend: B answers (rows), T tokens, N trained tokens, G group size, C hidden size, V vocabulary.
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
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
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
    length_schedule: str = flag(
        "", "longest completion from a step on, as 8192:0,16384:1040 (DeepScaleR), none = off"
    )
    temperature: float = flag(1.0, "sampling temperature, also in the loss", 0.01)
    dynamic_sampling: int = flag(
        0, "draw up to this many further batches for groups with signal (DAPO), 0 = off"
    )
    micro_batch_tokens: int = flag(0, "padded tokens per forward pass, 0 = by model size")
    steps: int = flag(50, "rollouts")
    updates: int = flag(1, "optimizer steps per rollout, each on its own part of the batch", 1)
    lr: float = flag(0.0, "learning rate, 0 = by model size")
    warmup_steps: int = flag(5, "steps of linear warm-up; constant afterwards")
    eval_problems: int = flag(200, "held-out problems per evaluation, 0 = no evaluation")
    eval_samples: int = flag(16, "completions per held-out problem", 1)
    eval_every: int = flag(0, "steps between evaluations, 0 = before and after only")
    save_every: int = flag(25, "steps between checkpoints, 0 = at the end only")
    seed: int = flag(0, "seed of prompts and sampling")
    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", "auto is cuda where there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "of the products; weights stay float32")
    timeout: int = flag(10, "minutes after which a rank that hangs ends the run", 1)
    out: str = flag("", "run folder, none = the next free out/grpo-TASK-SEED")
    resume: str = flag("", "run folder to go on with, or auto for the newest")
    check: bool = flag(False, "one step of everything in a temporary folder, with the memory plan")
    advantage: Literal["group", "batch", "none"] = flag(
        "group", "what eq. 1 divides by: std of group, of batch, nothing"
    )
    aggregation: Literal["token", "sequence", "constant"] = flag("token", "weights of eq. 4")
    clip_low: float = flag(0.2, "eps_low in eq. 3")
    clip_high: float = flag(0.2, "eps_high in eq. 3 (DAPO: 0.28)")
    kl_coef: float = flag(0.0, "beta in eq. 3, 0 = off and no reference model")
    ref_every: int = flag(0, "steps after which the reference becomes the policy (R1: 400), 0 = never")
    mask_truncated: bool = flag(False, "leave answers that hit the limit out of the loss (DAPO)")
    overlong_cache: int = flag(0, "soft punishment over the last so many tokens (DAPO eq. 13), 0 = off")
    format_weight: float = flag(0.1, "reward for the layout alone")
    language_weight: float = flag(0.0, "weight of the language-consistency reward (R1), 0 = off")


BY_SIZE = {  # parameters: below 10 M (made here), below 1 B, above (TinyZero, nano-aha, DAPO: 1e-6)
    "lr": (5e-4, 1e-5, 1e-6),
    "batch_size": (256, 64, 512),
    "max_new_tokens": (320, 256, 1024),
    "micro_batch_tokens": (8192, 4096, 16384),
}


# ---------------------------------------------------------------------------------------------------------- algorithm


def group_advantages(rewards: Tensor, group_size: int, scale: str = "group", eps: float = 1e-4) -> Tensor:
    """Rewards against the mean of their group, over its standard deviation (eq. 1).

    rewards (B,), groups of `group_size` contiguous. scale: "group", "batch" (std of all rewards) or "none" (Dr. GRPO).
    The std is the sample's, as in TRL. A group whose rewards are equal gets exactly 0: their spread is tested, since
    the std of equal floats may be noise. Source: arXiv:2402.03300 sec. 4.1.2, arXiv:2503.20783.
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
    """w of eq. 4, (B, T): mask (B, T) is 1 on trained tokens; num_tokens, num_rows count the whole step, not this part."""
    if aggregation == "token":
        return mask / num_tokens
    if aggregation == "sequence":
        return mask / (mask.sum(1, keepdim=True).clamp(min=1) * num_rows)
    return mask / (num_rows * max_length)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 2 to 4: the loss, and per token (B, T) what was clipped below and above, and the KL estimate.

    logprobs, old_logprobs, ref_logprobs, weights (B, T); advantages (B,). Log-ratios are clamped to +-20 before exp.
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    gain = advantages[:, None]
    terms = -torch.minimum(ratio * gain, ratio.clamp(1 - clip_low, 1 + clip_high) * gain)  # pessimistic
    seen = {
        "clip_frac_low": (ratio < 1 - clip_low) & (gain < 0),
        "clip_frac_high": (ratio > 1 + clip_high) & (gain > 0),
    }
    if kl_coef:
        d = (ref_logprobs - logprobs).clamp(-20, 20)
        seen["kl"] = d.exp() - d - 1  # k3: unbiased for KL(pi || ref), never negative
        terms = terms + kl_coef * seen["kl"]
    return (terms * weights).sum(), {name: value.detach() for name, value in seen.items()}


def limit_at(step: int, schedule: str, default: int) -> int:
    """The length limit in force at a step.

    >>> limit_at(1039, "8192:0,16384:1040", 0), limit_at(1040, "8192:0,16384:1040", 0), limit_at(5, "", 320)
    (8192, 16384, 320)
    """
    for value, start in (map(int, stage.split(":")) for stage in schedule.split(",") if stage):
        default = value if step >= start else default
    return default


def rewards_of(completions: list["Completion"], cfg: Config, limit: int) -> list[float]:
    """Verifier's total (correct + format_weight x format), plus the optional terms."""
    rewards = []
    for c in completions:
        reward = c.score["total"]
        if cfg.overlong_cache:
            reward += soft_overlong(len(c.tokens), limit, cfg.overlong_cache)
        if cfg.language_weight:
            reward += cfg.language_weight * language_consistency(c.text.partition("</think>")[0])
        rewards.append(reward)
    return rewards


# ---------------------------------------------------------------------------------------------------------- training


def check_flags(cfg: Config) -> None:
    """Refuse combinations that cannot work, before anything is loaded."""
    size, per_update = cfg.batch_size, cfg.group_size * cfg.updates
    if size % per_update:
        near = [n for n in (size // per_update * per_update, (size // per_update + 1) * per_update) if n]
        what = f"--group_size {cfg.group_size}" + (f" x --updates {cfg.updates}" if cfg.updates > 1 else "")
        raise BadInput(f"--batch_size {size} is not divisible by {what}; try {' or '.join(map(str, near))}")
    if cfg.ref_every and not cfg.kl_coef:
        raise BadInput(f"--ref_every {cfg.ref_every} without --kl_coef: there is no reference to renew")
    try:
        limit_at(0, cfg.length_schedule, 0)
    except ValueError:
        raise BadInput(f"--length_schedule {cfg.length_schedule}: give value:step,value:step,...") from None


def sample_batch(run: "Run", sampler: "Model", prompter: "Prompter", step: int, drawn: int, limit: int):
    """The groups of one step: (all completions, those to train on, prompts drawn so far), the same on every rank.

    Each rank samples its share of the prompts, then all ranks hold everything. Dynamic sampling (DAPO eq. 11) draws
    on until the batch is full of groups in which some answers are right and some wrong.
    """
    cfg, every, kept = run.cfg, [], []
    num_prompts = cfg.batch_size // cfg.group_size
    for _ in range(1 + cfg.dynamic_sampling):
        numbers = range(drawn, drawn + num_prompts)
        drawn += num_prompts
        numbered = [(n, prompter.task.problem("train", cfg.seed, n)) for n in numbers][run.rank :: run.world]
        options = {"temperature": cfg.temperature, "format_weight": cfg.format_weight}
        mine = rollout(sampler, prompter, numbered, cfg.group_size, limit, (cfg.seed, step), **options)
        drawn_now = sorted(
            (c for part in run.gather(mine) for c in part), key=lambda c: c.number
        )  # groups contiguous
        every += drawn_now
        for i in range(0, len(drawn_now), cfg.group_size):
            group = drawn_now[i : i + cfg.group_size]
            if not cfg.dynamic_sampling or 0 < sum(c.score["correct"] for c in group) < cfg.group_size:
                kept += group
        if len(kept) >= cfg.batch_size:
            break
    return every, kept[: cfg.batch_size], drawn


def describe_batch(completions: list["Completion"], cfg: Config, prompter: "Prompter") -> dict[str, float]:
    """What was sampled, in numbers: rewards, lengths overall and by outcome, groups without signal, reflection."""
    right = [c for c in completions if c.score["correct"]]
    wrong = [c for c in completions if not c.score["correct"]]
    groups = [completions[i : i + cfg.group_size] for i in range(0, len(completions), cfg.group_size)]
    hits = [sum(c.score["correct"] for c in group) for group in groups]
    details = [prompter.describe(c) for c in completions]
    return {
        "accuracy": mean(c.score["correct"] for c in completions),
        "reward/format": mean(c.score["format"] for c in completions),
        "completion_length": mean(len(c.tokens) for c in completions),
        "completion_length/correct": mean(len(c.tokens) for c in right),
        "completion_length/wrong": mean(len(c.tokens) for c in wrong),
        "clipped_ratio": mean(not c.finished for c in completions),
        "frac_all_right": mean(n == cfg.group_size for n in hits),
        "frac_all_wrong": mean(n == 0 for n in hits),
        "reflections/correct": mean(reflection_count(c.text) for c in right),
        "reflections/wrong": mean(reflection_count(c.text) for c in wrong),
        **{name: mean(d[name] for d in details) for name in details[0]},
    }


def train(cfg: Config) -> int:
    """Algorithm: repeat { sample G answers to each question; reward; advantages (1); descend (4) }."""
    check_flags(cfg)
    run = Run(cfg)
    model, sampler = run.load(cfg.model)
    chosen = run.choose(model, BY_SIZE)
    check_flags(cfg)
    prompter = Prompter(model, make_task(cfg.task, cfg.data, natural=not model.is_tiny), cfg.chat)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.0)
    reference = copy.deepcopy(sampler).requires_grad_(False) if cfg.kl_coef else None
    num_prompts = cfg.batch_size // cfg.group_size
    run.open(
        model,
        prompter,
        chosen,
        f"{num_prompts} prompts x {cfg.group_size} completions = {cfg.batch_size} per step",
    )
    start, state = run.resume(model, optimizer) if cfg.resume else (0, {"drawn": 0})
    drawn = state["drawn"]
    if reference is not None and "reference" in state:
        reference.load_state_dict(state["reference"])
    run.refresh(sampler, model)
    before = evaluate(run, sampler, prompter, 0) if start == 0 else {}

    for step in range(start + 1, cfg.steps + 1):
        began = time.time()
        limit = limit_at(step, cfg.length_schedule, cfg.max_new_tokens)
        every, batch, drawn = sample_batch(run, sampler, prompter, step, drawn, limit)
        sampled = time.time()
        metrics = describe_batch(every, cfg, prompter)

        rewards = torch.tensor(rewards_of(batch, cfg, limit), dtype=torch.float64)  # (B,)
        advantages = group_advantages(rewards, cfg.group_size, cfg.advantage).tolist() if batch else []
        counted = [not cfg.mask_truncated or c.finished for c in batch]  # rows in the loss
        signal = [ok and (a != 0 or cfg.kl_coef > 0) for ok, a in zip(counted, advantages, strict=True)]
        scored = time.time()

        totals = dict.fromkeys(
            ("loss", "entropy", "kl", "clip_frac_low", "clip_frac_high", "logprob_gap", "seen"), 0.0
        )
        part_size, norms = len(batch) // cfg.updates, []
        parts = [range(i, i + part_size) for i in range(0, len(batch), part_size or 1)]
        shares = [
            sorted((i for i in part if signal[i]), key=lambda i: -len(batch[i].tokens)) for part in parts
        ]
        mine = [share[run.rank :: run.world] for share in shares]  # my rows of each update, longest first
        old = {}
        if cfg.updates > 1:  # pi_old of eq. 2 must be kept before the first update moves pi
            with torch.no_grad():
                for rows, tokens, mask in training_batches(run, batch, [i for part in mine for i in part]):
                    logprobs, _ = completion_logprobs(model, tokens, mask, cfg.temperature)
                    old |= zip(rows, logprobs.tolist(), strict=True)
        for part, share, my_rows in zip(parts, shares, mine, strict=True):
            if not share:  # no signal on any rank: no step, or Adam would move on its momentum alone
                continue
            num_tokens = sum(len(batch[i].tokens) for i in part if counted[i])
            for rows, tokens, mask in training_batches(run, batch, my_rows):
                logprobs, entropies = completion_logprobs(model, tokens, mask, cfg.temperature)  # (b, T-1)
                old_logprobs = logprobs.detach()  # on policy
                if old:
                    old_logprobs = pad_rows(
                        [old[i][: tokens.shape[1] - 1] for i in rows], run.device, logprobs.dtype
                    )
                ref_logprobs = None
                if reference is not None:
                    with torch.no_grad():
                        ref_logprobs, _ = completion_logprobs(reference, tokens, mask, cfg.temperature)
                gains = torch.tensor(
                    [advantages[i] for i in rows], dtype=logprobs.dtype, device=run.device
                )  # (b,)
                trained = mask[:, 1:].to(logprobs.dtype)
                weights = token_weights(trained, cfg.aggregation, num_tokens, len(part), limit)
                loss, seen = policy_loss(
                    logprobs,
                    old_logprobs,
                    gains,
                    weights,
                    cfg.clip_low,
                    cfg.clip_high,
                    cfg.kl_coef,
                    ref_logprobs,
                )
                loss.backward()
                sampler_logprobs = torch.zeros_like(logprobs)
                sampler_logprobs[mask[:, 1:]] = torch.tensor(
                    [p for i in rows for p in batch[i].logprobs], device=run.device
                )
                seen |= {
                    "entropy": entropies,
                    "seen": trained,
                    "logprob_gap": (logprobs.detach() - sampler_logprobs).abs(),
                }
                for name, value in seen.items():
                    totals[name] += (value * trained).sum().item()
                totals["loss"] += loss.item()
            lr = cfg.lr * min(1.0, step / max(1, cfg.warmup_steps))
            norms.append(run.update(model, optimizer, lr))
        run.refresh(sampler, model)
        if reference is not None and cfg.ref_every and step % cfg.ref_every == 0:
            run.refresh(reference, model)
        trained = time.time()

        names = sorted(totals)
        totals = dict(zip(names, run.sum(*(totals[name] for name in names)), strict=True))
        seen, totals = totals.pop("seen"), totals | ({} if reference is not None else {"kl": math.nan})
        metrics |= {name: value if name == "loss" else value / max(seen, 1) for name, value in totals.items()}
        metrics |= {
            "reward": mean(rewards.tolist()),
            "reward_std": float(rewards.std()) if len(batch) > 1 else 0.0,
        }
        zero = [max(group) - min(group) <= 1e-8 for group in rewards.view(-1, cfg.group_size).tolist()]
        metrics |= {"frac_reward_zero_std": mean(zero), "rows_trained": sum(signal), "prompts_drawn": drawn}
        metrics |= {"grad_norm": mean(norms), "lr": lr, "tokens": sum(len(c.tokens) for c in every)}
        metrics |= {
            "seconds_sample": sampled - began,
            "seconds_score": scored - sampled,
            "seconds_train": trained - scored,
        }
        metrics["tokens_per_s"] = metrics["tokens"] / (time.time() - began)
        run.log(step, metrics, show=("reward", "accuracy", "completion_length", "entropy", "tokens_per_s"))
        run.keep_samples(step, prompter, batch[: 2 * cfg.group_size], advantages)
        if step % 10 == 1 and batch:
            run.say(prompter.sample(batch[0], advantages[0]))
        extra = {"drawn": drawn} | ({"reference": reference.state_dict()} if cfg.ref_every else {})
        if run.after_step(step, model, optimizer, **extra):
            return run.interrupted(step)
        if cfg.eval_every and step % cfg.eval_every == 0 and step < cfg.steps:
            evaluate(run, sampler, prompter, step)
    return run.finish(before, evaluate(run, sampler, prompter, cfg.steps))


def training_batches(run: "Run", batch: list["Completion"], rows: list[int]):
    """(row numbers, tokens (b, T), mask (b, T)) of each micro-batch; the mask is True on sampled tokens."""
    sequences = [batch[i].prompt + batch[i].tokens for i in rows]
    for part in micro_batches([len(s) for s in sequences], run.cfg.micro_batch_tokens):
        chosen = [rows[j] for j in part]
        masks = [[False] * len(batch[i].prompt) + [True] * len(batch[i].tokens) for i in chosen]
        yield (
            chosen,
            pad_rows([sequences[j] for j in part], run.device, torch.long),
            pad_rows(masks, run.device, torch.bool),
        )


# --------------------------------------------------- below: the machine, the same text in every script that has it


# >>> shared: model (same text in every script that has it; see tests/test_shared_blocks.py)
QKV_BIAS = {"llama": False, "qwen2": True, "qwen3": False}  # the model types that this decoder reads
SHORT_NAMES = {name: f"Qwen/{name}" for name in ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B")}
SHORT_NAMES |= {name: f"Qwen/{name}" for name in ("Qwen3-0.6B-Base", "Qwen3-1.7B-Base")}
SHORT_NAMES |= {name: f"HuggingFaceTB/{name}" for name in ("SmolLM2-135M-Instruct", "SmolLM2-360M-Instruct")}


class Linear(nn.Linear):
    """nn.Linear in the dtype of its input: float32 weights for the optimizer, bfloat16 products on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Cache:
    """Keys and values of up to `capacity` positions for each of `rows` rows, allocated once, written in place.

    `lengths` (rows,) counts the positions in use, row by row: what is appended lands behind them, what lies behind
    them is never seen, so lowering a length cuts that row. `width` bounds what attention reads.
    """

    def __init__(self, model: "Model", rows: int, capacity: int):
        c, weight = model.config, model.lm_head.weight
        shape = (c["num_hidden_layers"], rows, c["num_key_value_heads"], capacity, model.head_dim)
        self.keys = torch.zeros(shape, device=weight.device, dtype=model.compute_dtype or weight.dtype)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=weight.device)
        self.width = capacity

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, K, T, D) behind each row's length; all keys and values of this layer, (B, K, width, D)."""
        rows = torch.arange(len(k), device=k.device)[:, None]
        slots = self.lengths[:, None] + torch.arange(k.shape[2], device=k.device)  # (B, T)
        self.keys[layer][rows, :, slots] = k.transpose(1, 2)
        self.values[layer][rows, :, slots] = v.transpose(1, 2)
        return self.keys[layer, :, :, : self.width], self.values[layer, :, :, : self.width]

    def select(self, rows: Tensor) -> None:
        """Keep these rows (an index, repeats allowed), in this order."""
        self.keys, self.values, self.lengths = self.keys[:, rows], self.values[:, rows], self.lengths[rows]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (B, H, T, D); cos, sin (B, 1, T, D/2). Source: arXiv:2104.09864."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, c: dict, head_dim: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            c["num_attention_heads"],
            c["num_key_value_heads"],
            head_dim,
        )
        bias, size = QKV_BIAS[c["model_type"]], c["hidden_size"]
        self.q_proj = Linear(size, self.heads * head_dim, bias=bias)
        self.k_proj = Linear(size, self.kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(size, self.kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(self.heads * head_dim, size, bias=False)
        qk_norm = c["model_type"] == "qwen3"
        self.q_norm = RMSNorm(head_dim, c["rms_norm_eps"]) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, c["rms_norm_eps"]) if qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, rotary: tuple, cache: Cache | None, layer: int, mask: Tensor | None
    ) -> Tensor:
        B, T, _ = x.shape
        q = rotate(self.q_norm(self.q_proj(x).view(B, T, self.heads, -1)).transpose(1, 2), *rotary)
        k = rotate(self.k_norm(self.k_proj(x).view(B, T, self.kv_heads, -1)).transpose(1, 2), *rotary)
        v = self.v_proj(x).view(B, T, self.kv_heads, -1).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if mask is None:  # a whole right-padded batch: plain causal attention
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:  # heads that share a key stand as further queries of it, so that no key is ever repeated
            q = q.reshape(B, self.kv_heads, -1, self.head_dim)  # (B, K, G*T, D)
            if T > 1:
                mask = mask.repeat(1, 1, self.heads // self.kv_heads, 1)  # (B, 1, G*T, S)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(B, self.heads, T, -1)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.gate_proj = Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.up_proj = Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.down_proj = Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: dict, head_dim: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(c, head_dim), MLP(c)
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])

    def forward(
        self, x: Tensor, rotary: tuple, cache: Cache | None, layer: int, mask: Tensor | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache, layer, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """The decoder of Llama, Qwen2, Qwen3 and SmolLM2, with Hugging Face's names for modules and settings.

    hidden = model(tokens (B, T) or embeddings (B, T, C)), after the final norm; logits = model.logits(hidden).
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = c = config
        self.head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        self.rope_theta = c.get("rope_theta") or (c.get("rope_parameters") or {}).get("rope_theta")
        embed = nn.Embedding(c["vocab_size"], c["hidden_size"])
        layers = nn.ModuleList(Layer(c, self.head_dim) for _ in range(c["num_hidden_layers"]))
        norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.model = nn.ModuleDict({"embed_tokens": embed, "layers": layers, "norm": norm})
        self.lm_head = Linear(c["hidden_size"], c["vocab_size"], bias=False)
        if c.get("tie_word_embeddings"):
            self.lm_head.weight = embed.weight
        self.compute_dtype = None  # None: the dtype of the weights
        self.checkpointing = False  # recompute each layer in the backward pass instead of storing it
        self.register_buffer(
            "vocab_bias", None, persistent=False
        )  # (V,): -inf for ids never to be sampled, else 0
        self.eos_ids: list[int] = []
        self.is_tiny = False  # has the tokenizer of the tiny models made here

    def forward(
        self,
        inputs: Tensor,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) after the final norm. With a cache the T inputs continue each row behind its
        own length, and the lengths grow by T. mask (B, 1, T, S) is True where a key may be seen.
        """
        x = inputs if inputs.is_floating_point() else self.model["embed_tokens"](inputs)
        x = x.to(self.compute_dtype or x.dtype)
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]  # (1, T)
            if cache is not None:
                positions = positions + cache.lengths[:, None]  # (B, T)
        if cache is not None and mask is None:
            mask = (
                torch.arange(cache.width, device=x.device) <= positions[:, None, :, None]
            )  # (B, 1, T, width)
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
        """The logits (..., V) that sampling and training share: at least float32, over T, ids never sampled at -inf."""
        logits = self.lm_head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        return logits if self.vocab_bias is None else logits + self.vocab_bias


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(
            f"no {path.name} in {path.parent}; a model folder holds config.json and *.safetensors"
        ) from None
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON ({error})") from None


def resolve_model(name: str) -> Path:
    """The folder of a model: "tiny", ... (made here), a folder, a short name, or owner/name from the hub's cache."""
    here = Path(__file__).parent / "models" / name
    if Path(name).is_dir() or here.is_dir():
        return Path(name) if Path(name).is_dir() else here
    repo = SHORT_NAMES.get(name, name)
    if name.startswith((".", "/", "~")) or repo.count("/") != 1:
        raise BadInput(
            f"no such folder: {name} (hub names look like owner/name; short names: {', '.join(SHORT_NAMES)})"
        )
    patterns = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        if getattr(getattr(error, "response", None), "status_code", 0) in (401, 403, 404):
            raise BadInput(
                f"{repo}: the hub says {error.response.status_code}; is the name right, or login needed?"
            ) from None
        raise BadInput(
            f"{repo} is not in the local cache and huggingface.co cannot be reached. On a machine with network: "
            f"hf download {repo} --local-dir DIR, then --model DIR"
        ) from None


def check_config(c: dict, folder: Path) -> dict:
    """The settings of config.json, or one line about the first that this decoder cannot honour."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    wrong = {
        f"model_type {c.get('model_type')} (supported: {', '.join(QKV_BIAS)})": c.get("model_type")
        not in QKV_BIAS,
        f"hidden_act {c.get('hidden_act')} (supported: silu)": c.get("hidden_act", "silu") != "silu",
        f"rope type {rope.get('rope_type') or rope.get('type')} (supported: default)": (
            (rope.get("rope_type") or rope.get("type") or "default") != "default"
        ),
        "no rope_theta": not (c.get("rope_theta") or rope.get("rope_theta")),
        "attention_bias": c.get("attention_bias") and not QKV_BIAS.get(c.get("model_type")),
        "mlp_bias": c.get("mlp_bias"),
        "sliding-window attention": c.get("use_sliding_window"),
    }
    for what, is_wrong in wrong.items():
        if is_wrong:
            raise BadInput(f"{folder}/config.json: {what} is not supported")
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    ):
        if not isinstance(c.get(name), int):
            raise BadInput(f"{folder}/config.json: {name} is {c.get(name)}; a whole number is needed")
    return {"num_key_value_heads": c["num_attention_heads"], "rms_norm_eps": 1e-6} | c


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    tensors = {}
    for path in (folder / Path(name).name for name in names):
        if not path.is_file():
            raise BadInput(f"no {path.name} in {folder}; weights are read from safetensors files only")
        if (
            path.read_bytes()[:40].startswith(b"version https://git-lfs")
            if path.stat().st_size < 1000
            else False
        ):
            raise BadInput(
                f'{path.name} is {path.stat().st_size} bytes and starts with "version https://git-lfs": a Git LFS '
                "pointer. Run: git lfs pull"
            )
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise BadInput(f"{path} is damaged ({error}); download or save it again") from None
    return tensors


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> Model:
    """The model in a Hugging Face folder, its weights widened to float32; any tensor missing, extra or of another
    shape is an error. model.eos_ids holds every id that ends a text, model.vocab_bias is -inf where an id is never to be sampled.
    """
    folder = Path(folder)
    config = check_config(read_json(folder / "config.json"), folder)
    with torch.device("meta"):
        model = Model(config)
    tensors, wanted = read_tensors(folder), model.state_dict()
    if config.get("tie_word_embeddings"):
        head = tensors.pop("lm_head.weight", None)
        del wanted["lm_head.weight"]
        if head is not None and not torch.equal(head, tensors["model.embed_tokens.weight"]):
            raise BadInput(
                f"{folder}: tie_word_embeddings is true, but lm_head differs from embed_tokens on disk"
            )
    for what, names in (
        ("missing from", [n for n in wanted if n not in tensors]),
        ("unknown in", [n for n in tensors if n not in wanted]),
        ("of another shape in", [n for n in wanted if n in tensors and tensors[n].shape != wanted[n].shape]),
    ):
        if names:
            raise BadInput(
                f"{len(names)} tensors {what} {folder} (first: {names[0]}); the file does not match config.json"
            )
    tensors = {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    if config.get("tie_word_embeddings"):
        model.lm_head.weight = model.model["embed_tokens"].weight
    model.folder = folder
    read_special_ids(model)
    return model.requires_grad_()


def read_special_ids(model: Model) -> None:
    """Fill model.eos_ids (all that config, generation_config and tokenizer name) and model.vocab_bias."""
    folder, eos = model.folder, []
    size, generation = model.config["vocab_size"], {}
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder / "generation_config.json")
    for ids in (model.config.get("eos_token_id"), generation.get("eos_token_id")):
        eos += ids if isinstance(ids, list) else [] if ids is None else [ids]
    banned = list(generation.get("suppress_tokens") or [])
    if (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder)
        if tokenizer.get_vocab_size() > size:
            raise BadInput(
                f"{folder}: the tokenizer has {tokenizer.get_vocab_size()} tokens, the model only {size}"
            )
        banned += range(max(tokenizer.get_vocab().values()) + 1, size)
        token = read_json(folder / "tokenizer_config.json").get("eos_token")
        eos.append(tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token or ""))
        model.is_tiny = tokenizer.token_to_id("<latent>") is not None
    model.eos_ids = sorted({i for i in eos if i is not None})
    if banned:
        model.vocab_bias = torch.zeros(size, device=model.lm_head.weight.device)
        model.vocab_bias[banned] = -torch.inf


def load_tokenizer(folder: str | Path) -> Tokenizer:
    return Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))


def save_model(model: Model, folder: str | Path) -> None:
    """A folder that AutoModelForCausalLM opens with the same logits; the tokenizer's files come along."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rope = {
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_theta": model.rope_theta, "rope_type": "default"},
    }
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    config = model.config | rope | {"torch_dtype": dtype, "dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    if config.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    (folder / "model.safetensors").chmod(0o666 & ~umask)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (model.folder / name).is_file() and model.folder.resolve() != folder.resolve():
            shutil.copyfile(model.folder / name, folder / name)


# <<< shared: model


# >>> shared: sampler (same text in every script that has it; see tests/test_shared_blocks.py)
CHECK_EVERY = (
    8  # decode steps between two looks at the stop flags where a look costs a device synchronisation
)


@dataclass
class Sampled:
    """What `generate` returns, on the CPU; row r continues prompt r // group_size. Entries behind a length mean nothing."""

    tokens: Tensor  # (B, N) ids, the end-of-text token included
    lengths: Tensor  # (B,) tokens sampled
    finished: Tensor  # (B,) ended by an end-of-text token or a stop string; else cut off at max_new_tokens
    logprobs: (
        Tensor  # (B, N) float32, of the sampled tokens at the sampling temperature, before top-p and top-k
    )


class Decoding:
    """The tensors of one running batch, allocated before the first step and changed in place only."""

    def __init__(self, cache: Cache, uniforms: Tensor, eos_ids: list[int]):
        rows, steps = uniforms.shape
        self.cache, self.uniforms = cache, uniforms  # (B, N), one number in [0, 1) per token
        self.tokens = torch.zeros_like(uniforms, dtype=torch.long)  # (B, N)
        self.logprobs = torch.zeros_like(uniforms)  # (B, N)
        self.lengths = torch.zeros_like(cache.lengths)  # (B,)
        self.live = torch.ones_like(cache.lengths, dtype=torch.bool)  # (B,)
        self.last = torch.zeros_like(cache.lengths)[:, None]  # (B, 1), the newest token of each row
        self.rows = torch.arange(rows, device=uniforms.device)  # (B,), their numbers in the whole batch
        self.step = torch.zeros(1, dtype=torch.long, device=uniforms.device)
        self.eos = torch.tensor(eos_ids, dtype=torch.long, device=uniforms.device)

    def select(self, rows: Tensor) -> None:
        for name in ("uniforms", "tokens", "logprobs", "lengths", "live", "last", "rows"):
            setattr(self, name, getattr(self, name)[rows])
        self.cache.select(rows)


def row_uniforms(seed: int, step: int, prompt: int, sample: int, count: int) -> np.ndarray:
    """The random numbers of one completion: a function of these four and nothing else, so that a completion does
    not depend on the batch, the rank or the other rows. (count,) float32 in [0, 1).
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, step, prompt, sample)))).random(
        count, np.float32
    )


def truncate(probs: Tensor, top_p: float, top_k: int) -> Tensor:
    """Zero all but the top_k likeliest tokens (0: all), and all but the fewest likeliest that hold top_p of the mass."""
    ordered, order = probs.sort(-1, descending=True, stable=True)  # (B, V)
    before = ordered.cumsum(-1) - ordered  # mass of the likelier tokens
    drop = before >= top_p if top_p < 1 else torch.zeros_like(before, dtype=torch.bool)
    if top_k:
        drop[..., top_k:] = True
    return probs.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), 0.0)


def draw(logits: Tensor, uniforms: Tensor, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """One token per row by the inverse CDF: the first whose cumulated probability exceeds the row's number.

    logits (B, V), uniforms (B, 1) in [0, 1); returns (B, 1). A token of probability 0 is never drawn.
    """
    probs = logits.softmax(-1)
    if top_p < 1 or top_k:
        probs = truncate(probs, top_p, top_k)
    cdf = probs.cumsum(-1)
    return torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)


def prefill(model: "Model", prompts: list[list[int]], capacity: int) -> tuple[Cache, Tensor]:
    """Run the prompts, padded on the right; a cache with room for `capacity` positions, and the last hidden states (P, C)."""
    device, longest = model.lm_head.weight.device, max(map(len, prompts))
    tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)  # (P, T)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    cache = Cache(model, len(prompts), capacity)
    cache.width = longest
    hidden = model(tokens, cache=cache)
    cache.lengths.copy_(lengths)  # the padding is forgotten
    return cache, hidden[torch.arange(len(prompts), device=device), lengths - 1]


def emit(s: Decoding, logits: Tensor, temperature: float, top_p: float, top_k: int, min_tokens: int) -> None:
    """Draw the next token of every row from logits (B, V) and note it: fixed shapes, nothing read back."""
    if min_tokens:  # before that, no end-of-text token
        logits = logits.index_fill(-1, s.eos, -torch.inf).where(s.step < min_tokens, logits)
    uniforms = s.uniforms.index_select(1, s.step)  # (B, 1)
    token = draw(logits, uniforms, top_p, top_k) if temperature else logits.argmax(-1, keepdim=True)  # (B, 1)
    logprob = logits.gather(1, token) - logits.logsumexp(-1, keepdim=True)  # (B, 1)
    s.tokens.index_copy_(1, s.step, token)
    s.logprobs.index_copy_(1, s.step, logprob)
    s.last.copy_(token)
    s.lengths += s.live
    s.live &= (token != s.eos).all(-1)
    s.step += 1


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """On a GPU, the step recorded once as a CUDA graph and replayed from then on; elsewhere the step itself."""
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        print(
            f"note: CUDA graph capture failed ({str(error).splitlines()[0]}); decoding goes on eagerly",
            flush=True,
        )
        return step
    return graph.replay


def cut_at_stop(s: Decoding, done: int, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
    """End the rows whose text now holds a stop string; the tokens up to its last character stay."""
    for row in s.live.nonzero()[:, 0].tolist():
        ids = s.tokens[row, :done].tolist()
        for end in range(max(1, done - CHECK_EVERY + 1), done + 1):
            text = tokenizer.decode(ids[max(0, end - 32) : end], skip_special_tokens=False)
            if any(word in text for word in stop):
                s.lengths[row], s.live[row] = end, False
                break


@torch.inference_mode()
def generate(
    model: "Model",
    prompts: list[list[int]],
    uniforms: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_tokens: int = 0,
    stop: tuple[str, ...] = (),
    tokenizer: Tokenizer | None = None,
) -> Sampled:
    """Continue each prompt len(uniforms) // len(prompts) times, by at most uniforms.shape[1] tokens; temperature 0 is greedy.

    Each prompt runs through the model once, and its group shares the cache. On the CPU finished rows leave the
    batch; elsewhere the step keeps its shapes, and the stop flags are read every CHECK_EVERY tokens.
    """
    device, (rows, steps) = model.lm_head.weight.device, uniforms.shape
    result = Sampled(
        torch.zeros(rows, steps, dtype=torch.long),
        torch.zeros(rows, dtype=torch.long),
        torch.zeros(rows, dtype=torch.bool),
        torch.zeros(rows, steps),
    )
    if not rows or not steps:
        return result
    on_cpu, longest = device.type == "cpu", max(map(len, prompts))
    cache, hidden = prefill(model, prompts, longest + steps)
    copies = torch.arange(len(prompts), device=device).repeat_interleave(rows // len(prompts))
    cache.select(copies)
    logits = model.logits(hidden, temperature or 1.0)[copies]
    s = Decoding(cache, uniforms.to(device, logits.dtype), model.eos_ids)

    def note(to: Sampled) -> None:
        index = s.rows.cpu()
        to.tokens[index], to.logprobs[index] = s.tokens.cpu(), s.logprobs.float().cpu()
        to.lengths[index], to.finished[index] = s.lengths.cpu(), ~s.live.cpu()

    def step() -> None:
        hidden = model(s.last, cache=s.cache)  # (B, 1, C)
        emit(s, model.logits(hidden[:, 0], temperature or 1.0), temperature, top_p, top_k, min_tokens)

    emit(s, logits, temperature, top_p, top_k, min_tokens)
    advance = step
    for done in range(1, steps):
        if stop and done % CHECK_EVERY == 0:
            cut_at_stop(s, done, tokenizer, stop)
        if on_cpu or done % CHECK_EVERY == 0:
            live = int(s.live.sum())
            if not live:
                break
            if on_cpu and live <= 0.75 * len(s.live):
                note(result)
                s.select(s.live.nonzero()[:, 0])
        s.cache.width = longest + done if on_cpu else longest + steps
        if done == 2:  # the first step ran eagerly and warmed up what a capture may not do
            advance = capture(step, device)
        advance()
    else:
        if stop:
            cut_at_stop(s, steps, tokenizer, stop)
    note(result)
    return result


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
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def head_logprobs(
    model: "Model", hidden: Tensor, chosen: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(N,) log-probability of `chosen` and (N,) entropy, from hidden states (N, C)."""
    logits = model.logits(hidden, temperature)  # (N, V)
    logprobs = logits.gather(-1, chosen[:, None])[:, 0] - logits.logsumexp(-1)
    with torch.no_grad():
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    return logprobs, entropy


def completion_logprobs(
    model: "Model", tokens: Tensor, mask: Tensor, temperature: float = 1.0, chunk: int = 2**26
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens[:, 1:] and entropies of their distributions, both (B, T-1), 0 where mask is 0.

    Only trained positions go through the head, at most `chunk` logits at a time; they are computed again in the
    backward pass, so that (tokens x vocabulary) never lies in memory as a whole. mask (B, T) is 1 on trained tokens.
    """
    where = mask[:, 1:].bool()
    hidden, chosen = model(tokens[:, :-1])[where], tokens[:, 1:][where]  # (N, C), (N,)
    size = max(1, chunk // model.config["vocab_size"])
    if len(chosen) <= size:
        parts = [head_logprobs(model, hidden, chosen, temperature)]
    else:
        pieces = zip(hidden.split(size), chosen.split(size), strict=True)
        parts = [checkpoint(head_logprobs, model, h, c, temperature, use_reentrant=False) for h, c in pieces]
    logprobs, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    empty = torch.zeros(where.shape, dtype=logprobs.dtype, device=tokens.device)
    return empty.masked_scatter(where, logprobs), empty.masked_scatter(where, entropy)


# <<< shared: logprobs


# >>> shared: rollout (same text in every script that has it; see tests/test_shared_blocks.py)
@dataclass
class Completion:
    """One sampled answer and what the verifier says of it."""

    number: int  # of its prompt
    problem: dict
    prompt: list[int]
    tokens: list[int]  # with the end-of-text token
    logprobs: list[float]
    finished: bool  # ended by itself; else truncated
    text: str
    score: dict  # {"format", "answer", "correct", "total"}


class Prompter:
    """Problems to prompt ids: compact for the tiny tokenizer, else plain text, or the model's chat template."""

    def __init__(self, model: "Model", task, chat: bool):
        self.task, self.tokenizer, self.end = task, load_tokenizer(model.folder), model.eos_ids[:1]
        self.style = "compact" if model.is_tiny else "chat" if chat else "text"
        self.stop = ("</answer>", "\nUser:") if self.style == "text" else ()
        self.template = None
        if chat:
            from transformers import AutoTokenizer  # slow to import, and only a chat template needs it

            self.template = AutoTokenizer.from_pretrained(model.folder)
            if not self.template.chat_template:
                raise BadInput(f"--chat: {model.folder} has no chat template; leave --chat out")

    def text(self, problem: dict) -> str:
        asked = prompt(self.task, problem, self.style)
        return self.fill(asked, True) + ASSISTANT_PREFIX if self.style == "chat" else asked

    def fill(self, messages: list[dict], reply: bool) -> str:
        """The chat template's text of these messages; reply opens the assistant's turn."""
        return self.template.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)

    def chat_parts(self, messages: list[dict]) -> list[tuple[str, int]]:
        """A chat as (text, learnt) pieces: each assistant turn with its end token is learnt, nothing else."""
        if self.template is None:
            raise BadInput("examples with messages need --chat and a model with a chat template")
        parts, text = [], ""
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                for upto, learnt in (
                    (self.fill(messages[:i], True), 0),
                    (self.fill(messages[: i + 1], False), 1),
                ):
                    if not upto.startswith(text):
                        raise ValueError("the chat template rewrites earlier turns")
                    parts, text = parts + [(upto[len(text) :], learnt)], upto
        return parts

    def ids(self, problem: dict) -> list[int]:
        return self.encode(self.text(problem))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def describe(self, c: Completion) -> dict[str, float]:
        """What the task has to say of a completion besides its score."""
        return self.task.describe(c.text, c.problem) if hasattr(self.task, "describe") else {}

    def sample(self, c: Completion, advantage: float | None = None) -> str:
        """One completion as a line for the log, escaped."""
        parts = {"answer": c.score["answer"], "format": c.score["format"], "correct": c.score["correct"]}
        parts |= {"length": len(c.tokens), "truncated": not c.finished} | (
            {} if advantage is None else {"advantage": advantage}
        )
        return f"{shown(self.text(c.problem))}|{shown(c.text)}| {parts}"


def rollout(
    model: "Model",
    prompter: Prompter,
    numbered: list[tuple[int, dict]],
    group_size: int,
    max_new_tokens: int,
    stream: tuple[int, int],
    temperature: float,
    max_rows: int = 512,
    **score_options,
) -> list[Completion]:
    """Sample `group_size` completions of each (number, problem) and score them; groups are contiguous.

    stream is (seed, step): with a prompt's number and a completion's it names the random numbers of a completion.
    """
    completions = []
    per_batch = max(1, max_rows // group_size)
    for i in range(0, len(numbered), per_batch):
        part = numbered[i : i + per_batch]
        prompts = [prompter.ids(problem) for _, problem in part]
        seeds = [(*stream, number, k) for number, _ in part for k in range(group_size)]
        uniforms = torch.from_numpy(np.stack([row_uniforms(*s, max_new_tokens) for s in seeds]))
        out = generate(
            model, prompts, uniforms, temperature, stop=prompter.stop, tokenizer=prompter.tokenizer
        )
        for row, length in enumerate(out.lengths.tolist()):
            number, problem = part[row // group_size]
            ids = out.tokens[row, :length].tolist()
            text = prompter.decode(ids[:-1] if ids and ids[-1] in model.eos_ids else ids)
            logprobs, finished = out.logprobs[row, :length].tolist(), bool(out.finished[row])
            score = prompter.task.score(text, problem, **score_options)
            given = prompts[row // group_size]
            completions.append(Completion(number, problem, given, ids, logprobs, finished, text, score))
    return completions


def evaluate(run: "Run", model: "Model", prompter: Prompter, step: int) -> dict[str, float]:
    """Log and return the held-out accuracy over eval_problems x eval_samples completions. The random numbers are
    those of stream 0 every time, so two evaluations are paired. `_se` is the standard error over problems.
    """
    cfg, k = run.cfg, run.cfg.eval_samples
    if not cfg.eval_problems:
        return {}
    problems = list(enumerate(heldout(prompter.task, cfg.eval_problems)))[run.rank :: run.world]
    mine = rollout(model, prompter, problems, k, cfg.max_new_tokens, (cfg.seed, 0), cfg.temperature)
    done = [c for part in run.gather(mine) for c in part]
    counts = [
        sum(c.score["correct"] for c in done[i : i + k]) for i in range(0, len(done), k)
    ]  # right, per problem
    error = float(np.std(counts, ddof=len(counts) > 1)) / k / math.sqrt(len(counts))
    metrics = {"accuracy": sum(counts) / len(done), "accuracy_se": error}
    metrics |= {f"pass@{2**i}": mean(pass_at_k(k, c, 2**i) for c in counts) for i in range(k.bit_length())}
    metrics |= {
        "format": mean(c.score["format"] for c in done),
        "clipped_ratio": mean(not c.finished for c in done),
    }
    metrics["completion_length"] = mean(len(c.tokens) for c in done)
    details = [prompter.describe(c) for c in done]
    metrics |= {name: mean(d[name] for d in details) for name in details[0]}
    if "gave_up" in details[0]:
        stayed = [c.score["correct"] for c, d in zip(done, details, strict=True) if not d["gave_up"]]
        metrics["accuracy_not_given_up"] = mean(stayed)
    metrics = {f"eval/{name}": value for name, value in metrics.items()}
    run.log(step, metrics, show=("eval/accuracy",))
    run.say(
        f"step {step}: held-out accuracy {metrics['eval/accuracy']:.3f} +- {error:.3f}; {prompter.sample(done[0])}"
    )
    return metrics


def mean(values) -> float:
    """The mean; nan of nothing."""
    values = list(values)
    return float(sum(values)) / len(values) if values else math.nan


# <<< shared: rollout


# >>> shared: run (same text in every script that has it; see tests/test_shared_blocks.py)
class Run:
    """Everything around the algorithm: ranks, device, folder, log, checkpoints, interruption."""

    def __init__(self, cfg):
        self.cfg, self.started, self.signal, self.skipped = cfg, time.time(), 0, 0
        if cfg.check:  # the whole way once, as small as it goes
            cfg.steps, cfg.eval_problems, cfg.eval_samples = (
                1,
                min(cfg.eval_problems, 2),
                min(cfg.eval_samples, 2),
            )
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        name = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
        if name == "cuda":
            torch.cuda.set_device(self.device)
        good = name == "cuda" and torch.cuda.is_bf16_supported()
        self.dtype = {"auto": torch.bfloat16 if good else torch.float32}.get(cfg.dtype) or getattr(
            torch, cfg.dtype
        )
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group(
                "nccl" if name == "cuda" else "gloo", timeout=timedelta(minutes=cfg.timeout), device_id=None
            )
        for number in (signal.SIGINT, signal.SIGTERM):
            if threading.current_thread() is threading.main_thread():
                signal.signal(number, self.on_signal)

    # -- ranks

    def on_signal(self, number: int, frame) -> None:
        if self.signal:  # the second one: leave at once
            os._exit(128 + number)
        self.signal = number

    def on_rank_0(self, function: Callable):
        """Call it on rank 0 only and return its result, or raise its BadInput, on every rank."""
        box = [None, None]
        if self.rank == 0:
            try:
                box[0] = function()
            except BadInput as error:
                box[1] = str(error)
        if self.world > 1:
            dist.broadcast_object_list(box, device=self.device)
        if box[1] is not None:
            raise BadInput(box[1])
        return box[0]

    def gather(self, value) -> list:
        """The values of all ranks, in rank order, on every rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def sum(self, *values: float) -> list[float]:
        """Sums over all ranks, in float64."""
        return [sum(column) for column in zip(*self.gather(values), strict=True)]

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()

    # -- model and optimizer

    def load(self, name: str) -> tuple["Model", "Model"]:
        """The model to train, and the one to sample from: the same, or on a GPU a bfloat16 copy (see `refresh`)."""
        folder = self.on_rank_0(lambda: resolve_model(name))
        model = load_model(folder, self.device)
        model.compute_dtype = self.dtype
        model.checkpointing = sum(p.numel() for p in model.parameters()) > 100e6
        sampler = model
        if self.dtype != torch.float32:
            sampler = copy.deepcopy(model).to(self.dtype).requires_grad_(False)
        return model, sampler

    def refresh(self, sampler: "Model", model: "Model") -> None:
        """Copy the trained weights into the sampling copy, in place, so that captured graphs stay valid."""
        if sampler is not model:
            with torch.no_grad():
                for to, weight in zip(sampler.parameters(), model.parameters(), strict=True):
                    to.copy_(weight)

    def update(self, model: "Model", optimizer: torch.optim.Optimizer, lr: float, clip: float = 1.0) -> float:
        """Sum the gradients over the ranks, clip, step; the gradient's norm before clipping. A norm that is not
        finite is so on all ranks: the step is skipped, and five in a row stop the run.
        """
        for p in model.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if self.world > 1:
                dist.all_reduce(p.grad)
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), clip))
        if math.isfinite(norm):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        optimizer.zero_grad(set_to_none=True)
        if self.skipped:
            self.say(
                f"note: gradient not finite; update skipped on all ranks ({self.skipped} in a row, 5 stop the run)"
            )
        if self.skipped == 5:
            raise RuntimeError(
                "the gradient was not finite five times in a row; lower --lr or look at the samples"
            )
        return norm

    # -- folder and log

    def choose(self, model: "Model", by_size: dict[str, tuple]) -> dict:
        """Set the flags that are 0 = "by model size": one value for less than 10 M parameters, 1 B, and above."""
        parameters = sum(p.numel() for p in model.parameters())
        column = (parameters >= 10e6) + (parameters >= 1e9)
        chosen = {name: values[column] for name, values in by_size.items() if not getattr(self.cfg, name)}
        for name, value in chosen.items():
            setattr(self.cfg, name, value)
        return chosen

    def open(self, model: "Model", prompter: "Prompter", chosen: dict, batch: str) -> None:
        """Make the run folder, or take the one that --resume names; write run.json; say what is about to happen."""
        cfg, parameters = self.cfg, sum(p.numel() for p in model.parameters())
        self.folder = self.on_rank_0(self.find_folder)
        self.metrics, self.samples = self.folder / "metrics.jsonl", self.folder / "samples.jsonl"
        if self.rank == 0 and not cfg.resume:
            about = {"script": Path(__file__).name, "command": " ".join(sys.argv), "config": asdict(cfg)}
            about |= {
                "chosen": chosen,
                "device": str(self.device),
                "dtype": str(self.dtype),
                "ranks": self.world,
            }
            about["versions"] = {name: version(name) for name in ("torch", "tokenizers", "numpy")}
            write_atomically(self.folder / "run.json", json.dumps(about, indent=2))
            shutil.copyfile(__file__, self.folder / Path(__file__).name)
        why = (
            "as asked" if cfg.device != "auto" else "found" if self.device.type != "cpu" else "no CUDA device"
        )
        plan = memory_plan(
            model, cfg.batch_size // self.world, cfg.max_new_tokens, cfg.micro_batch_tokens, self.dtype
        )
        example = prompter.text(prompter.task.problem("train", cfg.seed, 0))
        self.say(
            f"device {self.device} ({why}), products in {str(self.dtype).removeprefix('torch.')}, {self.world} rank(s)\n"
            f"model  {cfg.model}: {parameters / 1e6:.2f} M parameters from {model.folder}\n"
            f"task   {cfg.task}: {shown(example)}\n"
            f"batch  {batch}\n"
            f"chosen by model size: {chosen or 'nothing'}\n"
            f"memory in GB: {plan}\n"
            f"folder {self.folder}"
        )
        self.bar = tqdm(total=cfg.steps, disable=None if self.rank == 0 else True, unit="step")

    def find_folder(self) -> Path:
        cfg = self.cfg
        if cfg.resume or cfg.check:
            return Path(cfg.resume or tempfile.mkdtemp())
        name = f"out/{Path(__file__).stem}-{cfg.task.partition(':')[0]}-{cfg.seed}"
        folder = Path(cfg.out or name)
        if (folder / "run.json").exists() and cfg.out:
            steps = [int(p.name[5:]) for p in checkpoints(folder)]
            at = f"at step {steps[-1]}" if steps else "without a checkpoint"
            raise BadInput(
                f"{folder} holds a run {at}. Continue: --resume {folder}   New folder: --out {folder}-2"
            )
        number = 2
        while not cfg.out and folder.exists():
            folder, number = Path(f"{name}-{number}"), number + 1
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(
                f"--out {folder}: cannot be made ({error.strerror}); name another folder"
            ) from None
        return folder

    def log(self, step: int, metrics: dict[str, float], show: tuple[str, ...] = ()) -> None:
        """Append one line to metrics.jsonl; move the bar, or print a plain line where there is no terminal."""
        if self.rank:
            return
        line = {"step": step, "seconds": round(time.time() - self.started, 2)}
        line |= {k: round(v, 6) if isinstance(v, float) else v for k, v in metrics.items()}
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = {name: f"{metrics[name]:.4g}" for name in show if name in metrics}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and shown:
            print(
                f"step {step}/{self.cfg.steps} " + " ".join(f"{k} {v}" for k, v in shown.items()), flush=True
            )

    def keep_samples(
        self, step: int, prompter: "Prompter", done: list["Completion"], advantages: list[float]
    ) -> None:
        """Append these completions, token by token, to samples.jsonl, up to 20 MB in a run."""
        if self.rank or self.samples.exists() and self.samples.stat().st_size > 20e6:
            return
        with self.samples.open("a", encoding="utf-8") as file:
            for c, advantage in zip(done, advantages, strict=False):
                line = {
                    "step": step,
                    "group": c.number,
                    "problem": c.problem,
                    "prompt": prompter.decode(c.prompt),
                }
                line |= {"tokens": c.tokens, "pieces": [prompter.decode([i]) for i in c.tokens]}
                line |= {"logprobs": [round(p, 4) for p in c.logprobs], "mask": [1] * len(c.tokens)}
                line |= {"rewards": c.score, "advantage": round(advantage, 4), "truncated": not c.finished}
                file.write(json.dumps(line) + "\n")

    # -- checkpoints

    def save(
        self, step: int, model: "Model", optimizer: torch.optim.Optimizer, keep: int = 2, **extra
    ) -> None:
        """Write step-N: a Hugging Face folder and trainer.pt; it appears whole or not at all, then old ones go."""
        folder = self.folder / f"step-{step:06d}"
        if self.rank == 0 and not folder.exists():
            unfinished = folder.with_suffix(".tmp")
            shutil.rmtree(unfinished, ignore_errors=True)
            save_model(model, unfinished)
            state = {"step": step, "world": self.world, "optimizer": optimizer.state_dict(), **extra}
            torch.save(state, unfinished / "trainer.pt")
            unfinished.rename(folder)
            for old in checkpoints(self.folder)[:-keep]:
                shutil.rmtree(old)
        if self.world > 1:
            dist.barrier()

    def resume(self, model: "Model", optimizer: torch.optim.Optimizer) -> tuple[int, dict]:
        """Load the newest checkpoint that is whole into model and optimizer; its step and what `save` got besides.
        What the log holds beyond that step is dropped.
        """
        for folder in reversed(checkpoints(Path(self.cfg.resume))):
            try:
                saved = load_model(folder, self.device)
                state = torch.load(folder / "trainer.pt", map_location=self.device, weights_only=True)
            except (BadInput, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                self.say(
                    f"note: {folder} cannot be read ({str(error).splitlines()[0]}); taking the one before"
                )
                continue
            with torch.no_grad():
                for to, weight in zip(model.parameters(), saved.parameters(), strict=True):
                    to.copy_(weight)
            optimizer.load_state_dict(state["optimizer"])
            if state["world"] != self.world:
                self.say(f"note: resuming on {self.world} ranks a run of {state['world']}")
            if self.rank == 0:
                for log in (self.metrics, self.samples):
                    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
                    whole = [
                        line
                        for line in lines
                        if line.endswith("}") and json.loads(line)["step"] <= state["step"]
                    ]
                    write_atomically(log, "".join(line + "\n" for line in whole))
            self.say(f"resumed {folder}")
            return state["step"], state
        raise BadInput(
            f"--resume {self.cfg.resume}: no checkpoint there can be read; start again without --resume"
        )

    def after_step(self, step: int, model: "Model", optimizer: torch.optim.Optimizer, **extra) -> bool:
        """Save where it is due; True on all ranks at once as soon as one of them got Ctrl-C or SIGTERM."""
        self.signal = max(self.gather(self.signal))
        due = self.cfg.save_every and step % self.cfg.save_every == 0
        if self.signal or due or step == self.cfg.steps:
            self.save(step, model, optimizer, **extra)
        return self.signal > 0 and step < self.cfg.steps

    def interrupted(self, step: int) -> int:
        name = "Ctrl-C" if self.signal == signal.SIGINT else "SIGTERM"
        again = f"python {Path(__file__).name} --resume {self.folder}"
        self.bar.close()
        self.say(
            f"stopped by {name} after step {step}; saved {checkpoints(self.folder)[-1]}. Continue: {again}"
        )
        return 128 + self.signal

    def finish(self, before: dict[str, float], after: dict[str, float]) -> int:
        """The table of what changed, and where everything lies."""
        self.bar.close()
        if self.cfg.check:
            self.say("check passed")
            if self.rank == 0:
                shutil.rmtree(self.folder)
            return 0
        for name in after:
            if f"{name}_se" in after or not name.endswith("_se"):
                error = f" +- {after[name + '_se']:.3f}" if name + "_se" in after else ""
                self.say(f"{name:32}{before.get(name, math.nan):9.3f} -> {after[name]:.3f}{error}")
        self.say(f"checkpoint {checkpoints(self.folder)[-1]}\nlog        {self.metrics}, {self.samples}")
        self.say(
            f"more steps python {Path(__file__).name} --resume {self.folder} --steps {2 * self.cfg.steps}"
        )
        self.say(f"report     python docs/report.py {self.folder}")
        return 0


def shown(text: str) -> str:
    """Text on one line, control characters escaped, so that no sample can steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.name[5:].isdigit())


def write_atomically(path: Path, text: str) -> None:
    path.with_name(path.name + ".tmp").write_text(text, encoding="utf-8")
    path.with_name(path.name + ".tmp").replace(path)


def memory_plan(
    model: "Model", rows: int, capacity: int, micro_tokens: int, dtype: torch.dtype
) -> dict[str, float]:
    """Bytes / 1e9 of each large thing in a run: what --check prints and what out-of-memory messages quote."""
    c, size = model.config, dtype.itemsize
    weights = sum(p.numel() for p in model.parameters())
    kept = c["hidden_size"] * (2 if model.checkpointing else 14) + c["intermediate_size"] * (
        0 if model.checkpointing else 4
    )
    plan = {"weights": 4 * weights, "gradients": 4 * weights, "adam": 8 * weights}
    plan["sampling copy"] = 0 if dtype == torch.float32 else size * weights
    plan["kv cache"] = (
        2 * c["num_hidden_layers"] * rows * c["num_key_value_heads"] * capacity * model.head_dim * size
    )
    plan["activations"] = micro_tokens * c["num_hidden_layers"] * kept * size
    plan["logits"] = 3 * 4 * min(2**26, micro_tokens * c["vocab_size"])
    return {name: round(bytes / 1e9, 3) for name, bytes in plan.items()} | {
        "all": round(sum(plan.values()) / 1e9, 2)
    }


def main(train: Callable, config: type, argv: list[str] | None = None) -> int:
    """Run a script; the exit code: 0 done, 1 runtime fault, 2 bad usage or input, 130 Ctrl-C, 143 SIGTERM."""
    say = print if os.environ.get("RANK", "0") == "0" else (lambda *_, **__: None)
    script = Path(__file__).name
    try:
        return train(parse_config(config, argv)) or 0
    except BadInput as error:
        say(f"{script}: error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        say(f"{script}: error: out of memory: {str(error).splitlines()[0]}; try a lower --micro_batch_tokens or "
            "--batch_size (--check prints the memory plan)", file=sys.stderr)  # fmt: skip
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# <<< shared: run


# >>> shared: config (same text in every script that has it; see tests/test_shared_blocks.py)
def parse_config(config: type, argv: list[str] | None = None):
    """The command line as an instance of the dataclass `config`, one flag per field. With --resume the settings of
    that run stand, unless a flag is given again. Raises BadInput for anything it does not understand.
    """
    script = Path(__file__).name

    def complain(message: str) -> None:
        raise BadInput(f"{message} (all flags: python {script} --help)")

    examples = f"examples:\n  python {script}\n  python {script} --model Qwen2.5-1.5B --task countdown\n"
    examples += f"short model names: {', '.join(SHORT_NAMES)}"
    parser = argparse.ArgumentParser(
        prog=script,
        description=__doc__,
        epilog=examples,
        allow_abbrev=False,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.error = complain
    for f in fields(config):
        text = f"{f.metadata['help']} (default: {f.default if f.default != '' else 'none'})".replace(
            "%", "%%"
        )
        if isinstance(f.default, bool):
            parser.add_argument(
                f"--{f.name}", action=argparse.BooleanOptionalAction, default=f.default, help=text
            )
        else:
            kind = {"type": type(f.default), "choices": get_args(f.type) or None, "metavar": f.name.upper()}
            parser.add_argument(f"--{f.name}", default=f.default, help=text, **kind)
    given, unknown = parser.parse_known_args(argv)
    if given.resume:
        saved = read_run(given, Path(script).stem)
        parser.set_defaults(**{**saved, "resume": given.resume, "out": ""})
        given = parser.parse_args([a for a in (sys.argv[1:] if argv is None else argv) if a not in unknown])
        changed = [
            n for n in ("model", "task", "seed", "group_size") if getattr(given, n, 0) != saved.get(n, 0)
        ]
        if changed:
            differences = "; ".join(f"--{n} {saved.get(n)} there, {getattr(given, n)} here" for n in changed)
            raise BadInput(f"--resume {given.resume}: another run ({differences}); leave these flags out")
    if unknown:
        names = {f.name: f.name for f in fields(config)}
        names |= {f.metadata["help"].partition(",")[0].replace(" ", "_"): f.name for f in fields(config)}
        close = get_close_matches(unknown[0].lstrip("-").partition("=")[0], names, n=1)
        raise BadInput(
            f"unknown flag {unknown[0]}; " + (f"did you mean --{names[close[0]]}?" if close else "see --help")
        )
    for f in fields(config):
        value, least = getattr(given, f.name), f.metadata["least"]
        if isinstance(value, (int, float)) and not least <= value < math.inf:
            raise BadInput(f"--{f.name} {value} must be at least {least}")
    return config(**vars(given))


def read_run(given, stem: str) -> dict:
    """The settings in run.json of the folder that --resume names; "auto" is the newest default folder."""
    if given.resume == "auto":
        runs = sorted(Path("out").glob(f"{stem}-*/run.json"), key=lambda p: p.stat().st_mtime)
        given.resume = str(runs[-1].parent) if runs else "auto"
    if not (Path(given.resume) / "run.json").is_file():
        raise BadInput(f"--resume {given.resume}: no run there (run.json is missing)")
    return read_json(Path(given.resume) / "run.json")["config"]


# <<< shared: config


if __name__ == "__main__":
    sys.exit(record(main)(train, Config))
