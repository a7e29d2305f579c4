"""Negative sample reinforcement: PSR, NSR and W-REINFORCE
(arXiv:2506.01347).

Learning from a verifier does two things at once: right answers become
likelier, wrong ones less likely. Split the loss into these halves,
train on one alone, and measure pass@k up to a large k. Who only
reinforces (PSR) sharpens what is already likely; who only punishes
(NSR) gives the mass back to all other tokens, in proportion.

    L_PSR = -E_x sum_{y right} pi(y|x)       L_NSR = E_x sum_{y wrong} pi(y|x)                   (1)
    L     = lambda L_PSR + L_NSR             lambda: 0.1 W-REINFORCE, 1 REINFORCE, 0 NSR         (2)
    A_i   = lambda (PSR: 1) if answer i is right, -1 (PSR: 0) if it is wrong;                    (3)
            answers with A = 0 are cut
    rho   = exp(log pi(y_i,t) - log pi_old(y_i,t))                                               (4)
    l_i,t = -min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i)   objective ratio: the authors' code  (5)
    l_i,t = -A_i pi(y_i,t)                       objective probability: the paper's eq. 6        (6)
    loss  = sum_i,t w_i,t l_i,t                  of each mini-batch of kept answers              (7)
            w = 1/K        kept      K tokens in the mini-batch, all of them kept (the code)
            w = U/N        token     N tokens in all B answers of the rollout, kept or cut;
                                     U = --updates
            w = U/(B n_i)  sequence  n_i tokens in answer i (the paper's eq. 6)
            w = U/B        sample    tokens summed: with (5) and U = 1 the gradient of (1) and (2)
                                     as they stand

The halves are closer than they look: sum_y pi(y|x) = 1, so L_NSR = 1 +
L_PSR, and all four modes share the direction of their expected gradient
(tests/test_nsr.py enumerates it). What tells them apart is what an
expectation hides: which samples are pushed, with what normaliser, how
far beyond pi_old, how often. As (3) cuts before the mini-batches are
made, NSR takes fewer steps the better the model gets; so compare at
equal rollouts and at equal optimizer_steps. After token y, logit v
moves along A (1[v=y] - pi_v) by (5); (6) has a factor pi_y more and
leaves rare tokens alone.

Run
    python nsr.py                                        # two CPU cores, no network, minutes
    python nsr.py --model Qwen2.5-1.5B --task countdown  # one GPU
    torchrun --standalone --nproc_per_node=8 nsr.py --model Qwen2.5-1.5B --task countdown
    The paper's figure, on the same prompts, problems and random numbers, beside GRPO as the paper
    ran it:
    for m in psr nsr w-reinforce reinforce; do python nsr.py --mode $m --out out/$m; done
    python grpo.py --task countdown:pool=32 --max_new_tokens 48 --steps 40 --updates 4 --lr 1e-4 \
        --no-decay --aggregation token --kl_coef 0.001 --format_weight 0 --eval_problems 100 \
        --eval_samples 256 --out out/grpo
    python docs/report.py out/psr out/nsr out/w-reinforce out/reinforce out/grpo \
        --html out/passk.html
    At equal optimizer_steps: --save_every 1 --keep 0, then
    --steps 0 --model out/psr/step-000032

Expect
    W-REINFORCE, 40 rollouts over 32 problems: about a minute and a
    half, as long again for the evaluation. Held-out pass@1 and pass@64,
    means of seeds 0 to 2: base 0.187, 0.987; PSR 0.286, 0.827; NSR
    0.256, 0.906; W-REINFORCE 0.268, 0.880; REINFORCE 0.278, 0.833; GRPO
    0.265, 0.824. All gain at k = 1 and lose at large k, NSR the least.
    Where most are right at first they are hardly apart: pass@64 of PSR
    0.923, of NSR 0.933, base 0.963
    (docs/experiments/coverage.py).

Differs from the paper in: no entropy bonus (1e-4 there, 0.001 in its
code); 256 answers of at most 48 tokens per rollout, in groups of 16,
instead of 8192 in groups of 8; no answer dropped to divide by the
number of ranks.

Legend: B answers (rows), T tokens, P prompts, G group size, C hidden
size, V vocabulary, H query heads, K key heads (in eq. 7: kept tokens),
D head size, S cache positions.
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
    task: str = option("countdown:pool=32", "multiplication, gsm8k, math, FILE.py:Class :knob=1")
    data: str = option("", "JSONL file of the problems (gsm8k, math)")
    chat: bool = option(False, "use the model's chat template")
    group_size: int = option(16, "completions per prompt", 2)
    batch_size: int = option(0, "completions per step, 0: by size")
    max_new_tokens: int = option(0, "longest completion, 0: by size")
    temperature: float = option(1.0, "of sampling, also in the loss", 0.01)
    micro_batch_tokens: int = option(0, "padded tokens per pass, 0: by size")
    steps: int = option(40, "rollouts, 0: only evaluate")
    updates: int = option(4, "optimizer steps per rollout if no answer is cut (U in eq. 7)", 1)
    lr: float = option(0.0, "learning rate, 0: by size")
    warmup_steps: int = option(3, "steps of linear warm-up")
    decay: bool = option(False, "let the learning rate fall linearly to 0")
    eval_problems: int = option(100, "held-out problems, 0: no evaluation")
    eval_samples: int = option(256, "completions per held-out problem, the largest k of pass@k", 1)
    eval_every: int = option(0, "steps between evaluations, 0: one at the end")
    save_every: int = option(25, "steps between checkpoints, 0: one at the end")
    keep: int = option(2, "newest checkpoints that stay, 0: all")
    seed: int = option(0, "seed of prompts and sampling")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "auto: cuda if any")
    out: str = option("", "run folder, default out/SCRIPT-TASK-SEED-TIME")
    resume: str = option("", "run folder to go on with")
    mode: Literal["psr", "nsr", "w-reinforce", "reinforce"] = option("w-reinforce", "A of eq. 3")
    positive_weight: float = option(0.1, "lambda of eq. 2, with --mode w-reinforce")
    normaliser: Literal["kept", "token", "sequence", "sample"] = option("kept", "w of eq. 7")
    objective: Literal["ratio", "probability"] = option("ratio", "eq. 5 (code) or eq. 6 (paper)")
    clip_eps: float = option(0.2, "eps in eq. 5")


BY_SIZE = {  # below 10 M parameters, below 1 B, above (the paper: lr 1e-6)
    "lr": (1e-4, 5e-6, 1e-6),
    "batch_size": (256, 64, 512),
    "max_new_tokens": (48, 256, 1024),
    "micro_batch_tokens": (2048, 1024, 16384),
}


# ------------------------------------------------------------ algorithm


def signed_advantages(correct: Tensor, mode: str, positive_weight: float = 0.1) -> Tensor:
    """A of eq. 3, (B,) float64, from correct (B,), 1 or True for right answers.

    No mean or spread of a group enters. Source: arXiv:2506.01347 sec. 2 and 5, and
    compute_psr_nsr_outcome_advantage in the authors' code.

    >>> signed_advantages(torch.tensor([True, False]), "w-reinforce").tolist()
    [0.1, -1.0]
    """
    right = {"psr": 1.0, "nsr": 0.0, "w-reinforce": positive_weight, "reinforce": 1.0}[mode]
    wrong = 0.0 if mode == "psr" else -1.0
    advantages = torch.full_like(correct, wrong, dtype=torch.float64)
    return advantages.masked_fill(correct.bool(), right)


def normaliser_weights(
    mask: Tensor, normaliser: str, num_kept: float, num_tokens: float, num_rows: float
) -> Tensor:
    """w of eq. 7, (B, T); mask (B, T) is 1 on trained tokens, then K, N/U and B/U."""
    if normaliser == "kept":
        return mask / num_kept
    if normaliser == "token":
        return mask / num_tokens
    if normaliser == "sequence":
        return mask / (mask.sum(1, keepdim=True).clamp(min=1) * num_rows)
    return mask / num_rows


def signed_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_eps: float = 0.2,
    objective: str = "ratio",
) -> tuple:
    """Eq. 4 to 7: the loss and, per token (B, T), what was clipped.

    All arguments (B, T) but advantages (B,). Log-ratios are clamped to +-20.
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    gain = advantages[:, None]
    if objective == "probability":  # no pi_old in it: nothing to clip
        return -(logprobs.exp() * gain * weights).sum(), {}
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    terms = -torch.minimum(ratio * gain, clipped * gain)  # the pessimistic one
    seen = {
        "clip_frac_low": (ratio < 1 - clip_eps) & (gain < 0),
        "clip_frac_high": (ratio > 1 + clip_eps) & (gain > 0),
    }
    return (terms * weights).sum(), seen


# ------------------------------------------------------------- training


def check_flags(cfg: Config) -> None:
    """Refuse what would not work."""
    unit = cfg.group_size * cfg.updates
    if cfg.batch_size % unit:
        raise BadInput(f"--batch_size {cfg.batch_size} is not divisible by {unit}")
    if cfg.positive_weight != Config.positive_weight and cfg.mode != "w-reinforce":
        raise BadInput("--positive_weight needs --mode w-reinforce")
    clips = cfg.objective == "ratio" and cfg.updates > 1
    if cfg.clip_eps != Config.clip_eps and not clips:
        raise BadInput("--clip_eps needs --objective ratio, --updates")


def sample_batch(
    run: "Run", sampler: "Model", prompter: "Prompter", step: int, drawn: int
) -> tuple:
    """A step's completions, rewarded with 1 or -1, and the prompts drawn so far."""
    cfg = run.cfg
    numbers = range(drawn, drawn + cfg.batch_size // cfg.group_size)
    problems = [(n, prompter.task.problem("train", cfg.seed, n)) for n in numbers]
    batch = rollout(run, sampler, prompter, problems, cfg.group_size, cfg.max_new_tokens, step)
    for c in batch:
        c.reward = 1.0 if c.score["correct"] else -1.0
    return batch, numbers.stop


def update_policy(
    run: "Run",
    model: "Model",
    optimizer: Optimizer,
    batch: list[Completion],
    advantages: list[float],
    lr: float,
) -> dict[str, float]:
    """Steps down eq. 7, one for each mini-batch of kept answers; means over tokens.

    Answers are cut before the mini-batches are made, as in the authors' code: half the answers,
    half the steps. The last mini-batch may be smaller, and weighs less by its size, as it does
    there. Without kept answers there is no step.
    """
    cfg, T = run.cfg, run.cfg.temperature
    names = "clip_frac_low", "clip_frac_high", "sampler_gap"
    totals, gaps, norms = dict.fromkeys(("loss", "tokens", *names), 0.0), [0.0], []
    kept = [i for i in range(len(batch)) if advantages[i] != 0]
    size = cfg.batch_size // cfg.updates  # of a full mini-batch, B/U of eq. 7
    parts = in_groups(kept, size)
    work = [training_batches(run, batch, part) for part in parts]

    old = {}
    if len(parts) > 1:  # pi_old of eq. 4, noted before the first update moves pi
        with torch.no_grad():
            for rows, tokens, mask in sum(work, []):
                old[rows[0]], _ = completion_logprobs(model, tokens, mask, T)

    num_tokens = sum(len(c.tokens) for c in batch) / cfg.updates  # N/U of eq. 7
    for part, micro in zip(parts, work, strict=True):
        num_kept = size * mean(len(batch[i].tokens) for i in part)  # K of eq. 7, if it were full
        for rows, tokens, mask in micro:
            logprobs, _ = completion_logprobs(model, tokens, mask, T)  # (B, T-1)
            old_logprobs = old.get(rows[0], logprobs.detach())
            trained = mask[:, 1:].to(logprobs.dtype)
            gains = logprobs.new_tensor([advantages[i] for i in rows])  # (B,)
            weights = normaliser_weights(trained, cfg.normaliser, num_kept, num_tokens, size)
            loss, seen = signed_loss(
                logprobs, old_logprobs, gains, weights, cfg.clip_eps, cfg.objective
            )
            loss.backward()
            sampled = [[0.0] * (len(batch[i].prompt) - 1) + batch[i].logprobs for i in rows]
            gap = (old_logprobs - pad_rows(sampled, run.device, logprobs.dtype)).abs() * trained
            gaps.append(gap.max().item())
            totals["loss"] += loss.item()
            seen |= {"tokens": trained, "sampler_gap": gap}
            for name, value in seen.items():
                totals[name] += (value * trained).sum().item()
        norms.append(run.update(model, optimizer, lr))

    ranks = run.gather(totals)
    totals = {name: sum(rank[name] for rank in ranks) for name in totals}
    metrics = {name: totals[name] / max(totals["tokens"], 1) for name in names}
    metrics["sampler_gap_max"] = max(run.gather(max(gaps)))
    metrics["loss"], metrics["grad_norm"] = totals["loss"], mean(norms)
    metrics["rows_trained"] = len(kept)
    metrics["updates"] = len(norms)
    return metrics


def train(cfg: Config) -> int:
    """Repeat: sample answers to each question, sign and cut them (3), descend (7)."""
    run = Run(cfg)
    model, sampler = run.load(BY_SIZE)
    check_flags(cfg)
    task = make_task(cfg.task, cfg.data, natural=not model.is_tiny)
    prompter = Prompter(model, task, cfg.chat)
    adam = {"betas": (0.9, 0.99), "weight_decay": 0.0, "fused": True}
    optimizer = AdamW(model.parameters(), **adam)
    state = run.start(model, optimizer, prompter)
    drawn = state.get("drawn", 0)  # prompts so far
    optimizer_steps = state.get("optimizer_steps", 0)
    run.refresh(sampler, model)

    for step in range(state["step"] + 1, cfg.steps + 1):
        began = time.time()
        batch, drawn = sample_batch(run, sampler, prompter, step, drawn)
        sampled = time.time()
        correct = torch.tensor([c.score["correct"] for c in batch])  # (B,)
        advantages = signed_advantages(correct, cfg.mode, cfg.positive_weight).tolist()
        left = (1 + cfg.steps - step) / cfg.steps if cfg.decay else 1.0
        lr = cfg.lr * min(1.0, step / max(1, cfg.warmup_steps), left)
        results = update_policy(run, model, optimizer, batch, advantages, lr)
        run.refresh(sampler, model)

        metrics = describe_batch(batch, cfg.group_size, task) | results
        metrics["lr"], metrics["prompts"] = lr, drawn
        optimizer_steps += metrics.pop("updates")
        metrics["optimizer_steps"] = optimizer_steps
        metrics["entropy"] = -mean(p for c in batch for p in c.logprobs)  # of cut ones, too
        metrics["seconds_sample"] = sampled - began
        metrics["seconds_train"] = time.time() - sampled
        metrics["tokens_per_s"] = metrics["tokens"] / (time.time() - began)
        run.log(step, metrics, ("accuracy", "completion_length", "entropy", "rows_trained"))
        run.keep_samples(step, prompter, batch[: 2 * cfg.group_size], advantages)
        extra = {"drawn": drawn, "optimizer_steps": optimizer_steps}
        if run.after_step(step, model, optimizer, keep=cfg.keep, **extra):
            break  # Ctrl-C
        if cfg.eval_every and step % cfg.eval_every == 0 and step < cfg.steps:
            evaluate(run, sampler, prompter, step)
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
