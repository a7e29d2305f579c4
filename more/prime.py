"""Process reinforcement through implicit rewards: PRIME (arXiv:2502.01456).

A process reward says how good each token was, but nobody labels tokens. A second language model,
the PRM, learns from outcomes alone: its log-ratio to a frozen reference, summed over an answer, has
to foretell whether it is right (2). At one token the ratio (1) is that token's reward. No critic.

    q_i,t = log pi_phi(y_i,t) - log pi_ref(y_i,t)                         (1)
    L_phi = -1/B sum_i [o_i log s_i + (1 - o_i) log(1 - s_i)]             (2)
            s_i = sigma(beta sum_t q_i,t),  o_i the outcome, 0 or 1
    z_i,t = q_i,t / (max_j,u |sum_{v>=u} q_j,v| + 1e-6)   j: of the step  (3)
    u_i,t = K/(K-1) z_i,t - 1/(K-1) sum_j mean_t z_j,t    j: of the group (4)
    R_i,t = sum_{v>=t} gamma_p^(v-t) u_i,v
            + gamma_o^(T_i-1-t) (K o_i - sum_j o_j)/(K-1)                 (5)
    A     = (R - mean R) / std R        over all tokens of the step       (6)
    loss  = 1/N sum_i,t max(-rho A, -clip(rho, 1 - eps, 1 + eps) A)       (7)
            rho = exp(log pi(y_i,t) - log pi_old(y_i,t))

Eq. 5's second line is RLOO, the outcome against the mean of the other K - 1. PRM, policy and
reference start as one model, so that q is 0 in the first step, and PRIME is RLOO there. A step:
sample, verify, drop questions outside the window, score with the PRM of before, descend (2), (7).
Without a window, as here, the PRM alone moves the policy where all K are right or all wrong.

Run
    python more/prime.py  # two CPU cores, no network, minutes
    python more/prime.py --model Qwen2.5-1.5B --task countdown  # one GPU of 80 GB
    torchrun --standalone --nproc_per_node=8 more/prime.py --model Qwen2.5-1.5B --task countdown
    The paper: --group_size 4 --updates 4 --accuracy_low 0.2 --accuracy_high 0.8
    RLOO, outcomes only: --no-process
    55.6 GB of states for Qwen2.5-1.5B, 36 bytes a parameter. RUN_FOLDER/prm is the trained PRM.

Expect
    Seeds 0, 1, 2: held-out accuracy 0.343 -> 0.650, 8.3 minutes, 0.85 GB. With --steps 16
    --batch_size 128 --max_new_tokens 256: 0.312 -> 0.470, 0.280 -> 0.471, 0.320 -> 0.504.

Differs from the paper in: (1) to (6) are its code's (no beta outside (2), eq. 3, means in eq. 4);
nothing is sampled anew for what the window drops; all is scored before the first PRM update.

Legend: B answers, T tokens, P prompts, K (--group_size) answers to a prompt, N tokens of a batch,
C hidden size, V vocabulary, H query heads, K key heads, D head size, S cache positions.
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
from operator import attrgetter
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # rewards.py is one folder up

from rewards import (
    BadInput,
    Completion,
    describe_batch,
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
    model: str = option("tiny", "one of models/, a folder, or a name on the hub")
    task: str = option("countdown", "multiplication, gsm8k, math, FILE.py:Class :knob=1")
    data: str = option("", "JSONL file of the problems (gsm8k, math)")
    chat: bool = option(False, "use the model's chat template")
    group_size: int = option(0, "completions per prompt (K), 0: by size")
    batch_size: int = option(0, "completions per step, 0: by size")
    max_new_tokens: int = option(0, "longest completion, 0: by size")
    temperature: float = option(1.0, "of sampling, also in (7)", 0.01)
    accuracy_low: float = option(0.0, "drop groups of a mean outcome below")
    accuracy_high: float = option(1.0, "drop groups of a mean outcome above")
    micro_batch_tokens: int = option(0, "padded tokens per pass, 0: by size")
    steps: int = option(24, "rollouts, 0: only evaluate")
    updates: int = option(1, "policy updates per rollout, a part each", 1)
    lr: float = option(0.0, "learning rate of the policy, 0: by size")
    warmup_steps: int = option(3, "steps of linear warm-up, of both")
    decay: bool = option(True, "let the learning rates fall linearly to 0")
    process: bool = option(True, "else outcomes only (RLOO)")
    prm: str = option("", "a folder to start the PRM from, else --model")
    prm_lr: float = option(0.0, "learning rate of the PRM, 0: by size")
    prm_beta: float = option(0.05, "beta of eq. 2", 1e-6)
    prm_updates: int = option(4, "PRM updates per rollout, a part each", 1)
    gamma_process: float = option(1.0, "gamma_p of eq. 5")
    gamma_outcome: float = option(1.0, "gamma_o of eq. 5")
    clip_eps: float = option(0.2, "eps of eq. 7")
    eval_problems: int = option(200, "held-out problems, 0: no evaluation")
    eval_samples: int = option(8, "completions per held-out problem", 1)
    eval_every: int = option(0, "steps between evaluations, 0: one at the end")
    save_every: int = option(25, "steps between checkpoints, 0: one at the end")
    seed: int = option(0, "seed of prompts and sampling")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "auto: cuda if any")
    out: str = option("", "run folder, default out/SCRIPT-TASK-SEED-TIME")
    resume: str = option("", "run folder to go on with")


BY_SIZE = {  # below 10 M parameters, below 1 B, above
    "lr": (2e-4, 1e-5, 1e-6),
    "prm_lr": (2e-4, 1e-5, 1e-6),
    "group_size": (16, 8, 8),
    "batch_size": (256, 64, 256),
    "max_new_tokens": (512, 256, 1024),
    "micro_batch_tokens": (2048, 1024, 16384),
}


# ------------------------------------------------------------ algorithm


def implicit_rewards(prm_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """q of eq. 1, (B, T), 0 outside the mask (B, T) of completion tokens."""
    return (prm_logprobs - ref_logprobs).masked_fill(~mask.bool(), 0.0)


def prm_losses(q: Tensor, outcomes: Tensor, beta: float) -> Tensor:
    """Eq. 2 for each answer, (B,), from q (B, T) and outcomes (B,) in [0, 1].

    On logits: the paper's code takes the log of a sigmoid, which is log 0 far from 0.
    """
    return F.binary_cross_entropy_with_logits(beta * q.sum(1), outcomes, reduction="none")


def to_go(rewards: Tensor, gamma: float) -> Tensor:
    """(B, T): from each token on, the discounted sum of rewards (B, T)."""
    returns = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        running = rewards[:, t] + gamma * running
        returns[:, t] = running
    return returns


def bounded(q: Tensor) -> Tensor:
    """z of eq. 3, (B, T): no answer's rewards from any token on sum to more than 1."""
    return q / (to_go(q, 1.0).abs().max() + 1e-6)


def process_returns(z: Tensor, mask: Tensor, group_size: int, gamma: float) -> Tensor:
    """Eq. 4 and the first line of eq. 5, (B, T), 0 outside the mask; rows group by group.

    Not quite leave-one-out: u = z - mean of the other answers' means + (z - own mean)/(K - 1).
    Source: PRIME's code, compute_rloo_returns.
    """
    means = z.sum(1) / mask.sum(1)  # (B,)
    sums = means.view(-1, group_size).sum(1)  # (P,)
    sums = sums.repeat_interleave(group_size)[:, None]  # (B, 1)
    centred = (z * group_size - sums) / (group_size - 1)
    return to_go(centred * mask, gamma) * mask


def outcome_returns(outcomes: Tensor, mask: Tensor, group_size: int, gamma: float) -> Tensor:
    """The second line of eq. 5, (B, T), from outcomes (B,): RLOO (arXiv:2402.14740 sec. 2.2)."""
    groups = outcomes.view(-1, group_size)  # (P, K)
    rloo = (groups * group_size - groups.sum(1, keepdim=True)) / (group_size - 1)
    left = mask.sum(1, keepdim=True) - mask.cumsum(1)  # tokens after this one, T_i - 1 - t
    return rloo.view(-1, 1) * gamma**left * mask


def whiten(advantages: Tensor, mask: Tensor, correction: int = 0) -> Tensor:
    """(B, T) at mean 0, variance 1 over the mask, 0 outside; equal ones exactly 0."""
    where, whitened = mask.bool(), torch.zeros_like(advantages)
    chosen = advantages[where]
    if chosen.max() - chosen.min() > 1e-8:
        # 2502.03373's code has the biased variance, verl and TRL have correction 1
        scale = chosen.var(correction=correction).clamp(min=1e-8).rsqrt()
        whitened[where] = (chosen - chosen.mean()) * scale
    return whitened


def ppo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, num_tokens: int, clip_eps: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 7 over tokens (N,) of `num_tokens`; by token what was clipped, KL(pi_old || pi) (k3)."""
    logratio = (logprobs - old_logprobs).clamp(-20, 20)
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    terms = torch.maximum(-advantages * ratio, -advantages * clipped)
    return terms.sum() / num_tokens, {
        "clip_frac_low": (ratio < 1 - clip_eps) & (advantages < 0),
        "clip_frac_high": (ratio > 1 + clip_eps) & (advantages > 0),
        "approx_kl": (ratio - 1 - logratio).detach(),
    }


def pair_accuracy(q: Tensor, outcomes: Tensor, group_size: int) -> tuple[float, float]:
    """How often the PRM ranks two answers to one prompt as their outcomes do; a tie is half.

    The mean over prompts with different outcomes; over all, the others at 0.5 (PRIME's code).
    """
    scores, outcomes = q.sum(1).view(-1, group_size), outcomes.view(-1, group_size)  # (P, K)
    better = (outcomes[:, :, None] - outcomes[:, None]).clamp(min=0)  # (P, K, K) first is better
    ranked = (scores[:, :, None] - scores[:, None]).sign() / 2 + 0.5
    pairs = better.sum((1, 2))  # (P,)
    told = (ranked * better).sum((1, 2))[pairs > 0] / pairs[pairs > 0]
    everywhere = (float(told.sum()) + 0.5 * (len(pairs) - len(told))) / len(pairs)
    return mean(told.tolist()), everywhere


def in_window(outcomes: list[float], group_size: int, low: float, high: float) -> list[int]:
    """The rows of the groups whose mean outcome is in [low, high]."""
    kept = []
    for i, group in enumerate(in_groups(outcomes, group_size)):
        if low <= mean(group) <= high:
            kept += range(i * group_size, (i + 1) * group_size)
    return kept


# ------------------------------------------------------------- training


def check_flags(cfg: Config) -> None:
    """Refuse what cannot work or would do nothing."""
    if cfg.group_size < 2:
        raise BadInput(f"--group_size {cfg.group_size}: at least 2")
    if cfg.batch_size % cfg.group_size:
        raise BadInput(f"--batch_size {cfg.batch_size} is no multiple of {cfg.group_size}")
    if cfg.accuracy_low > cfg.accuracy_high:
        window = f"--accuracy_low {cfg.accuracy_low} --accuracy_high {cfg.accuracy_high}"
        raise BadInput(f"{window}: the first is larger")
    for name in ("gamma_process", "gamma_outcome"):
        if getattr(cfg, name) > 1:
            raise BadInput(f"--{name} is above 1")
    for name in ("prm", "prm_updates", "prm_beta", "gamma_process"):
        if getattr(cfg, name) != getattr(Config, name) and not cfg.process:
            raise BadInput(f"--{name} does nothing with --no-process")


def load_prm(run: "Run", model: "Model") -> "Model":
    """The model phi of eq. 1: a copy of the policy, or what --prm names."""
    if not run.cfg.prm:
        return copy.deepcopy(model)
    folder, own = resolve_model(run.cfg.prm), model.config["vocab_size"]
    known = read_json(folder / "config.json").get("vocab_size")
    if known != own:
        raise BadInput(f"--prm {run.cfg.prm}: {known} tokens, the policy has {own}")
    prm = load_model(folder, run.device)
    prm.checkpointing, prm.compute_dtype = model.checkpointing, model.compute_dtype
    return prm


def sample_batch(
    run: "Run", sampler: "Model", prompter: "Prompter", step: int, drawn: int
) -> tuple:
    """All completions of a step, those in the window, and the prompts drawn so far."""
    cfg, everything = run.cfg, []
    window = cfg.group_size, cfg.accuracy_low, cfg.accuracy_high
    for _ in range(10):  # until a group is in the window
        numbers = range(drawn, drawn + cfg.batch_size // cfg.group_size)
        drawn = numbers.stop
        problems = [(n, prompter.task.problem("train", cfg.seed, n)) for n in numbers]
        done = rollout(run, sampler, prompter, problems, cfg.group_size, cfg.max_new_tokens, step)
        for c in done:
            c.reward = float(c.score["correct"])
        everything += done
        kept = in_window([c.reward for c in done], *window)
        if kept:
            return everything, [done[i] for i in kept], drawn
    place = f"step {step}: none of {len(everything) // cfg.group_size} groups has an accuracy in"
    raise BadInput(f"{place} {cfg.accuracy_low} to {cfg.accuracy_high}; widen the window")


@torch.no_grad()
def score_batch(
    run: "Run",
    model: "Model",
    prm: "Model | None",
    reference: "Model | None",
    batch: list[Completion],
) -> tuple:
    """Eq. 1 and 3 to 6 on all answers, by token (B, T), and metrics.

    Without PRM its log-probabilities and the reference's are 0, and so is q.
    """
    cfg, K = run.cfg, run.cfg.group_size
    cpu, double = torch.device("cpu"), torch.float64
    mask = pad_rows([[1] * len(c.tokens) for c in batch], cpu, torch.bool)  # (B, T)
    outcomes = torch.tensor([c.reward for c in batch], dtype=double)  # (B,)
    table = torch.zeros(3, *mask.shape, dtype=double)  # of old policy, PRM, reference
    scorers = [(0, model, cfg.temperature)] if cfg.updates > 1 else []
    if prm is not None:
        scorers += [(1, prm, 1.0), (2, reference, 1.0)]
    for rows, tokens, where in training_batches(run, batch, list(range(len(batch)))):
        for i, scorer, temperature in scorers:
            logprobs, _ = completion_logprobs(scorer, tokens, where, temperature)
            logprobs = logprobs[where[:, 1:]].cpu().double()  # (N,)
            table[i, rows] = table[i, rows].masked_scatter(mask[rows], logprobs)
    old_logprobs, prm_logprobs, ref_logprobs = sum(run.gather(table))  # each rank has its rows

    q = implicit_rewards(prm_logprobs, ref_logprobs, mask)
    process = process_returns(bounded(q), mask, K, cfg.gamma_process)
    outcome = outcome_returns(outcomes, mask, K, cfg.gamma_outcome)
    x = {
        "mask": mask,
        "outcomes": outcomes,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "advantages": whiten(process + outcome, mask, correction=1),
    }
    unlike, everywhere = pair_accuracy(q, outcomes, K)
    metrics = {
        "prm_pair_accuracy": unlike,
        "prm_pair_accuracy_all": everywhere,
        "return_std/process": process[mask].std().item(),
        "return_std/outcome": outcome[mask].std().item(),
    }
    return x, metrics if prm is not None else {}


def shuffled_parts(cfg: Config, step: int, rows: int, parts: int) -> list[list[int]]:
    """The rows of a step in random order, cut into `parts`."""
    order = np.random.default_rng((cfg.seed, step)).permutation(rows)
    return in_groups(order.tolist(), math.ceil(rows / parts))


def update_prm(
    run: "Run",
    prm: "Model",
    optimizer: Optimizer,
    batch: list[Completion],
    x: dict[str, Tensor],
    step: int,
    rate: float,
) -> dict[str, float]:
    """`prm_updates` steps down eq. 2, each on its part of the answers."""
    cfg, mask, losses, norms = run.cfg, x["mask"], [], []
    for part in shuffled_parts(cfg, step, len(batch), cfg.prm_updates):
        total = 0.0
        for rows, tokens, where in training_batches(run, batch, part):
            logprobs, _ = completion_logprobs(prm, tokens, where, 1.0)  # (B, T-1)
            trained = where[:, 1:]
            ref_logprobs = x["ref_logprobs"][rows][mask[rows]].to(logprobs)  # (N,)
            ref_logprobs = torch.zeros_like(logprobs).masked_scatter(trained, ref_logprobs)
            q = implicit_rewards(logprobs, ref_logprobs, trained)
            outcomes = x["outcomes"][rows].to(logprobs)
            loss = prm_losses(q, outcomes, cfg.prm_beta).sum() / len(part)
            # run.update clips at norm 1, the paper at 10; to Adam a tenth is the same
            (loss / 10).backward()
            total += loss.item()
        losses.append(sum(run.gather(total)))
        norms.append(10 * run.update(prm, optimizer, rate * cfg.prm_lr))
    return {"prm_loss": mean(losses), "prm_grad_norm": mean(norms)}


def update_policy(
    run: "Run",
    model: "Model",
    optimizer: Optimizer,
    batch: list[Completion],
    x: dict[str, Tensor],
    step: int,
    lr: float,
) -> dict[str, float]:
    """`updates` steps down eq. 7, each on its part of the answers; means over all tokens."""
    cfg, mask, norms, gaps = run.cfg, x["mask"], [], [0.0]
    names = "entropy", "clip_frac_low", "clip_frac_high", "approx_kl", "sampler_gap"
    totals = dict.fromkeys(("loss", "tokens", *names), 0.0)
    signal = bool(x["advantages"].any())
    parts = shuffled_parts(cfg, step, len(batch), cfg.updates) if signal else []
    for part in parts:
        num_tokens = sum(len(batch[i].tokens) for i in part)  # N of eq. 7
        for rows, tokens, where in training_batches(run, batch, part):
            logprobs, entropy = completion_logprobs(model, tokens, where, cfg.temperature)
            logprobs, entropy = logprobs[where[:, 1:]], entropy[where[:, 1:]]  # (N,)
            old_logprobs = logprobs.detach()
            if cfg.updates > 1:
                old_logprobs = x["old_logprobs"][rows][mask[rows]].to(logprobs)
            gains = x["advantages"][rows][mask[rows]].to(logprobs)
            loss, seen = ppo_loss(logprobs, old_logprobs, gains, num_tokens, cfg.clip_eps)
            loss.backward()
            sampled = [p for i in rows for p in batch[i].logprobs]
            gap = (old_logprobs - logprobs.new_tensor(sampled)).abs()
            gaps.append(gap.max().item())
            seen |= {"loss": loss, "entropy": entropy, "sampler_gap": gap}
            seen["tokens"] = torch.ones_like(gap)
            for name, value in seen.items():
                totals[name] += value.sum().item()
        norms.append(run.update(model, optimizer, lr))
    ranks = run.gather(totals)
    totals = {name: sum(rank[name] for rank in ranks) for name in totals}
    metrics = {name: totals[name] / max(totals["tokens"], 1) for name in names}
    metrics["sampler_gap_max"] = max(run.gather(max(gaps)))
    metrics["loss"] = totals["loss"] / max(len(parts), 1)
    metrics["grad_norm"] = mean(norms)
    metrics["rows_trained"] = len(batch) if signal else 0
    metrics["tokens_trained"] = totals["tokens"]
    return metrics


def train(cfg: Config) -> int:
    """Repeat: sample, verify, score by the PRM (1), advantages (6), descend (2) and (7)."""
    run = Run(cfg)
    model, sampler = run.load(BY_SIZE, 14 + 18)  # the PRM's and the reference's
    check_flags(cfg)
    task = make_task(cfg.task, cfg.data, natural=not model.is_tiny)
    prompter = Prompter(model, task, cfg.chat)
    adam = {"betas": (0.9, 0.99), "weight_decay": 0.0, "fused": True}
    optimizer = AdamW(model.parameters(), **adam)
    prm = reference = prm_optimizer = None
    if cfg.process:
        prm = load_prm(run, model)
        prm_optimizer = AdamW(prm.parameters(), **adam)
        reference = copy.deepcopy(sampler).requires_grad_(False)  # the start, also on resume
    state = run.start(model, optimizer, prompter)
    drawn = state.get("drawn", 0)  # prompts so far
    if cfg.process and "prm" in state:
        prm.load_state_dict(state["prm"])
        prm_optimizer.load_state_dict(state["prm_optimizer"])
    run.refresh(sampler, model)

    for step in range(state["step"] + 1, cfg.steps + 1):
        began = time.time()
        everything, batch, drawn = sample_batch(run, sampler, prompter, step, drawn)
        sampled = time.time()
        left = (1 + cfg.steps - step) / cfg.steps if cfg.decay else 1.0
        rate = min(1.0, step / max(1, cfg.warmup_steps), left)
        x, results = score_batch(run, model, prm, reference, batch)
        if cfg.process:
            results |= update_prm(run, prm, prm_optimizer, batch, x, step, rate)
        scored = time.time()
        lr = rate * cfg.lr
        results |= update_policy(run, model, optimizer, batch, x, step, lr)
        run.refresh(sampler, model)

        metrics = describe_batch(everything, cfg.group_size, task) | results
        metrics["lr"], metrics["prompts"] = lr, drawn
        metrics["seconds_sample"] = sampled - began
        metrics["seconds_prm"] = scored - sampled
        metrics["seconds_train"] = time.time() - sampled
        metrics["tokens_per_s"] = metrics["tokens"] / (time.time() - began)
        run.log(step, metrics, ("accuracy", "prm_pair_accuracy", "completion_length", "entropy"))
        advantages = x["advantages"].sum(1) / x["mask"].sum(1)  # (B,)
        run.keep_samples(step, prompter, batch[: 2 * cfg.group_size], advantages.tolist())
        extra = {"drawn": drawn}
        if cfg.process:
            extra["prm"] = prm.state_dict()
            extra["prm_optimizer"] = prm_optimizer.state_dict()
        if run.after_step(step, model, optimizer, **extra):
            break
        if cfg.eval_every and step % cfg.eval_every == 0 and step < cfg.steps:
            evaluate(run, sampler, prompter, step)
    if cfg.process and run.rank == 0:
        save_model(prm, run.folder / "prm")
    return run.report(sampler, prompter)


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


# >>> shared: batch
def training_batches(run: "Run", done: list[Completion], rows: list[int]) -> list[tuple]:
    """This rank's micro-batches: row numbers, tokens (B, T), mask (B, T)."""
    batches = []
    lengths = [len(c.prompt) + len(c.tokens) for c in done]
    mine = sorted(rows, key=lengths.__getitem__, reverse=True)[run.rank :: run.world]
    for batch in micro_batches([lengths[i] for i in mine], run.cfg.micro_batch_tokens):
        chosen = [mine[j] for j in batch]
        tokens = [done[i].prompt + done[i].tokens for i in chosen]
        masks = [[0] * len(done[i].prompt) + [1] * len(done[i].tokens) for i in chosen]
        tokens = pad_rows(tokens, run.device, torch.long)
        batches.append((chosen, tokens, pad_rows(masks, run.device, torch.bool)))
    return batches


# <<< shared: batch


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
