"""Direct preference optimisation: DPO (arXiv:2305.18290), on pairs that a verifier makes of the
model's own answers (VerIPO, 2505.19000).

A pair is two answers to one prompt, y_w better than y_l. How much likelier an answer has become
than under a frozen reference is its reward (4); the loss asks that the better answer's is larger.
So there is no reward model, and nothing is sampled in training. What the reference says of the
pairs is computed once.

    h    = log pi(y_w|x) - log pi_ref(y_w|x) - log pi(y_l|x) + log pi_ref(y_l|x)    (1)
    l    = -(1 - e) log sigma(beta h) - e log sigma(-beta h)                        (2)
           e: share of wrong labels. IPO (2310.12036): l = (h' - 1/(2 beta))^2,
           where h' has means over tokens
    loss = mean over pairs of l - a log pi(y_w|x) / |y_w|                           (3)
    r(y) = beta (log pi(y|x) - log pi_ref(y|x))                                     (4)

Pairs come from a file, or from answers to training problems, by a rule:
    correct  right over wrong
    rate     s_w > s_l + 0.4, s_w > 0.8, s_l > 0, s: share of tests passed          (5)
    veripo   the longest answer that is right, follows from its thought, is not
             repetitive and long enough, over the first that fails in each          (6)

Only h is trained: log pi(y_w) may fall, if log pi(y_l) falls more; a, an SFT term, holds it.

Run
    python more/dpo.py  # two CPU cores, no network, minutes
    python more/dpo.py --model Qwen2.5-1.5B --task countdown  # one GPU
    torchrun --standalone --nproc_per_node=8 more/dpo.py --model Qwen2.5-1.5B --data pairs.jsonl
    Lines of --data: {"prompt", "chosen", "rejected"}, texts, or with --chat lists of messages
    (TRL's conversational form; whole conversations). more/traces.py --pairs makes such files.

Expect
    Seeds 0, 1, 2, 5 CPU minutes each: held-out accuracy 0.345 -> 0.678, 0.331 -> 0.692,
    0.354 -> 0.685, seed 0's mean length 95 -> 214 tokens, from 2560 sampled answers.

Differs from the papers in: a rule judges consistency, no language model; the SFT term is a mean
per answer (LLaMA-Factory), not over all tokens (TRL).

Legend: B pairs of a pass, P pairs, T tokens, C hidden size, V vocabulary, H query heads, K key
heads, D head size, S cache positions.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
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
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # rewards.py is one folder up

from rewards import (
    BadInput,
    Completion,
    describe_evaluation,
    epoch_order,
    fill_template,
    heldout,
    in_groups,
    make_task,
    micro_batches,
    open_thinking,
    prompt,
    read_chat,
    read_json,
    read_jsonl,
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
    task: str = option("countdown", "of sampled pairs and evaluations, countdown:high=20")
    data: str = option("", "JSONL file of pairs, else the model's own answers")
    chat: bool = option(False, "use the model's chat template")
    max_length: int = option(2048, "longer rows of --data are dropped (tokens)", 2)
    sample: int = option(0, "problems to answer, 0: by size")
    attempts: int = option(8, "answers to each", 2)
    pairs: Literal["correct", "rate", "veripo"] = option("correct", "rule for pairs")
    cap: int = option(4, "pairs per problem at most", 1)
    max_new_tokens: int = option(0, "longest completion, 0: by size")
    temperature: float = option(1.0, "of sampling", 0.01)
    batch_size: int = option(0, "pairs per step, 0: by size")
    micro_batch_tokens: int = option(0, "padded tokens per pass, 0: by size")
    steps: int = option(-1, "optimizer steps, 0: only evaluate, -1: by --epochs", -1)
    epochs: int = option(1, "passes over the pairs", 1)
    lr: float = option(0.0, "learning rate, 0: by size")
    warmup_steps: int = option(6, "steps of linear warm-up, then a line to 0")
    eval_problems: int = option(200, "held-out problems, 0: no evaluation")
    eval_samples: int = option(8, "completions per held-out problem", 1)
    eval_every: int = option(0, "steps between evaluations, 0: one at the end")
    save_every: int = option(50, "steps between checkpoints, 0: one at the end")
    seed: int = option(0, "seed of problems, sampling and pairs")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "auto: cuda if any")
    out: str = option("", "run folder, default out/SCRIPT-TASK-SEED-TIME")
    resume: str = option("", "run folder to go on with")
    loss: Literal["sigmoid", "ipo"] = option("sigmoid", "l of eq. 2")
    beta: float = option(0.1, "of eq. 2: the larger, the closer to the reference", 1e-6)
    label_smoothing: float = option(0.0, "e of eq. 2, below 0.5")
    sft_coef: float = option(0.0, "a of eq. 3")
    reference: str = option("", "another model as pi_ref, else the start")


BY_SIZE = {  # below 10 M parameters, below 1 B, above (VerIPO: lr 5e-7, 32 pairs)
    "lr": (1e-4, 5e-6, 5e-7),
    "batch_size": (16, 32, 32),
    "sample": (320, 320, 2048),
    "max_new_tokens": (512, 256, 1024),
    "micro_batch_tokens": (2048, 2048, 16384),
}


# ------------------------------------------------------------ algorithm


def dpo_loss(
    logps: Tensor, ref: Tensor, lengths: Tensor, beta: float, kind: str, e: float, a: float
) -> tuple[Tensor, Tensor]:
    """Eq. 1 to 3 of each pair, (P,), and the implicit rewards of eq. 4, (2, P).

    logps and ref (2, P): nats of the chosen answers, then of the rejected ones, sums over tokens;
    lengths (2, P). Source: arXiv:2305.18290 eq. 7; e as in TRL, a: LLaMA-Factory's pref_ftx.
    """
    ratios = logps - ref  # (2, P)
    if kind == "ipo":
        means = ratios / lengths  # a long answer weighs no more, as in TRL
        losses = (means[0] - means[1] - 1 / (2 * beta)) ** 2
    else:
        h = ratios[0] - ratios[1]
        # logsigmoid stays finite where log(sigmoid) would not
        losses = -(1 - e) * F.logsigmoid(beta * h) - e * F.logsigmoid(-beta * h)
    return losses - a * logps[0] / lengths[0], beta * ratios.detach()


# ---------------------------------------------------------------- pairs
# A rule finds (kind, number of the chosen one, of the rejected one) among a problem's answers.


def correct_pairs(correct: list[bool]) -> list[tuple[str, int, int]]:
    """Every right answer over every wrong one.

    >>> correct_pairs([False, True, False])
    [('correct', 1, 0), ('correct', 1, 2)]
    """
    rows = range(len(correct))
    return [("correct", w, x) for w in rows for x in rows if correct[w] and not correct[x]]


def rate_pairs(rates: list[Fraction]) -> list[tuple[str, int, int]]:
    """Eq. 5, in exact fractions: 0.85 - 0.45 is not 0.4 in floats.

    What passes no test is left out: it may be right and badly packed. The paper's code has >= for
    both bounds on s_w. Source: AceCoder, arXiv:2502.01718 eq. 3.
    """
    margin, least, rows = Fraction(2, 5), Fraction(4, 5), range(len(rates))
    good = [w for w in rows if rates[w] > least]
    return [("rate", w, x) for w in good for x in rows if 0 < rates[x] < rates[w] - margin]


def veripo_labels(thought: str, conclusion: str, answer: str | None, accurate: bool) -> dict:
    """VerIPO's four checks on an answer; repetition: the share of word 3-grams that are not new.

    Source: arXiv:2505.19000 sec. 3; it does not tell its bounds, these are ours.
    """
    words = thought.split()
    grams = list(zip(words, words[1:], words[2:], strict=False))
    repetition = 1 - len(set(grams)) / len(grams) if grams else 0.0
    return {
        "accurate": accurate,
        "consistent": conclusion == answer,
        "repetitive": repetition > 0.3,
        "long_enough": len(words) >= 6,
        "repetition": repetition,
        "n_words": len(words),
    }


CHECKS = {  # kind of pair: the label that is looked at, what it should be
    "accuracy": ("accurate", True),
    "consistency": ("consistent", True),
    "repetition": ("repetitive", False),
    "length": ("long_enough", True),
}


def veripo_pairs(labels: list[dict]) -> list[tuple[str, int, int]]:
    """Eq. 6: the longest answer that passes all checks, over the first that fails each."""
    passing, failing, pairs = set(range(len(labels))), {}, []
    for kind, (name, good) in CHECKS.items():
        failing[kind] = [i for i, label in enumerate(labels) if label[name] != good]
        passing -= set(failing[kind])
    lengths = [label["n_words"] for label in labels]
    longest = max(sorted(passing), key=lengths.__getitem__, default=None)
    for kind, rows in failing.items():
        if passing and rows:
            pairs.append((kind, longest, rows[0]))
    return pairs


def conclusion_of(thought: str) -> str:
    """What a thought ends on: the words after its last "so", else its last line up to a "=".

    >>> conclusion_of("red at 1, red at 4, so 2."), conclusion_of("5+1=6>2\\nwait1*7-5=7-5=2=2\\n")
    ('2', '1*7-5')
    """
    found = re.findall(r"\bso (.*)", thought)
    if found:
        return found[-1].strip().rstrip(".")
    last = thought.strip().rpartition("\n")[2]
    return last.partition("=")[0].removeprefix("wait").strip()


def find_pairs(rule: str, answers: list[dict], cap: int, rng: Random) -> list[tuple]:
    """At most `cap` pairs of different texts that a rule finds among the answers to a problem.

    An answer has "text", "correct", for veripo "answer", for rate "passed" of so many "tests".
    """
    if rule == "correct":
        found = correct_pairs([a["correct"] for a in answers])
    elif rule == "rate":
        found = rate_pairs([Fraction(a["passed"], a["tests"]) for a in answers])
    else:
        labels = []
        for a in answers:
            thought = a["text"].partition("</think>")[0]
            ends_on = conclusion_of(thought)
            labels.append(veripo_labels(thought, ends_on, a["answer"], a["correct"]))
        found = veripo_pairs(labels)
    different = {}
    for kind, w, x in found:
        different.setdefault((answers[w]["text"], answers[x]["text"]), (kind, w, x))
    pairs = [pair for texts, pair in different.items() if texts[0] != texts[1]]
    return rng.sample(pairs, min(cap, len(pairs)))


def text_pair(prompter: "Prompter", ends: list[int], line: dict) -> tuple:
    """A line of --data as ids: prompt, chosen, rejected, both answers with an end token.

    Each is tokenised by itself, so that no token spans two.
    """
    texts = [line.get(name) for name in ("prompt", "chosen", "rejected")]
    if isinstance(texts[1], list) and isinstance(texts[2], list):
        texts = chat_texts(prompter, *texts)
    elif all(isinstance(text, str) for text in texts):
        texts[0] = prompter.start + texts[0]
    else:
        raise BadInput("prompt, chosen and rejected are needed")
    if not (texts[1].strip() and texts[2].strip()):
        raise BadInput("chosen or rejected is empty")
    if texts[1] == texts[2]:
        raise BadInput("chosen and rejected are the same text")
    asked, *answers = [prompter.encode(text) for text in texts]
    for ids in answers:
        if ids[-1] not in ends:  # a chat template has written its own
            ids += ends[:1]
    return asked, *answers


def chat_texts(prompter: "Prompter", asked, *chats: list) -> list[str]:
    """Three texts of two conversations, which may repeat the messages `asked` or follow them."""
    if prompter.style != "chat":
        raise BadInput("a list of messages needs --chat")
    chats = [read_chat({"messages": chat}) for chat in chats]
    if isinstance(asked, list):
        before = read_chat({"messages": asked})
        chats = [chat if chat[: len(before)] == before else before + chat for chat in chats]
    common = 0
    while common < min(map(len, chats)) - 1 and chats[0][common] == chats[1][common]:
        common += 1
    texts = [fill_template(prompter.chat, chats[0][:common], opens_reply=True)]
    for chat in chats:
        if [message["role"] for message in chat[common:]] != ["assistant"]:
            raise BadInput("chosen and rejected may differ in the last reply only")
        whole = fill_template(prompter.chat, chat, opens_reply=False)
        if not whole.startswith(texts[0]):
            raise BadInput("the chat template rewrites earlier turns")
        texts.append(whole[len(texts[0]) :].rstrip())
    return texts


def pair_length(pair: tuple) -> int:
    asked, chosen, rejected = pair
    return len(asked) + max(len(chosen), len(rejected))


def file_pairs(run: "Run", prompter: "Prompter", ends: list[int]) -> list[tuple]:
    """The pairs of --data; the longest are dropped and counted."""
    path, most = run.cfg.data, run.cfg.max_length
    pairs = read_jsonl(path, partial(text_pair, prompter, ends))
    short = [pair for pair in pairs if pair_length(pair) <= most]
    num_long = len(pairs) - len(short)
    counts = f"{path}: {num_long} of {len(pairs)} pairs longer than {most} tokens"
    if not short:
        raise BadInput(f"--data {counts}; none is left")
    run.say(f"{counts} left out")
    return short


def sample_pairs(run: "Run", sampler: "Model", prompter: "Prompter") -> list[tuple]:
    """Pairs of the model's own answers to training problems.

    A right answer that does not end counts as wrong: none learns to go on for ever.
    """
    cfg, found, kinds, num_right = run.cfg, [], Counter(), 0
    for numbers in in_groups(list(range(cfg.sample)), 64):
        problems = [(n, prompter.task.problem("train", cfg.seed, n)) for n in numbers]
        done = rollout(run, sampler, prompter, problems, cfg.attempts, cfg.max_new_tokens, step=1)
        for group in in_groups(done, cfg.attempts):
            answers = [c.score | {"text": c.text} for c in group]
            for c, answer in zip(group, answers, strict=True):
                answer["correct"] = c.score["correct"] and c.finished
                num_right += answer["correct"]
            rng = Random(f"pairs {cfg.seed} {group[0].number}")
            with reading(f"--pairs {cfg.pairs} with --task {cfg.task}"):
                pairs = find_pairs(cfg.pairs, answers, cfg.cap, rng)
            kinds.update(kind for kind, _, _ in pairs)
            found += [(group[w], group[x]) for _, w, x in pairs]
        so_far = f"{num_right} right, pairs {dict(kinds)}"
        run.say(f"{numbers[-1] + 1} of {cfg.sample} problems: {so_far}")
    if not found:
        none = f"none of {cfg.sample} problems gives a pair"
        raise BadInput(f"--pairs {cfg.pairs}: {none}; more --attempts, or another --task")
    shown = [c for pair in found[:16] for c in pair]
    run.keep_samples(0, prompter, shown, [1.0, -1.0] * 16)
    return [(w.prompt, w.tokens, x.tokens) for w, x in found]


# ------------------------------------------------------------- training


def check_flags(cfg: Config, model: "Model") -> None:
    """Refuse what would not work as meant."""
    if cfg.label_smoothing >= 0.5:
        raise BadInput(f"--label_smoothing {cfg.label_smoothing}: below 0.5 is needed")
    if cfg.label_smoothing and cfg.loss == "ipo":
        raise BadInput("--label_smoothing does nothing with --loss ipo")
    if cfg.reference:
        known = read_json(resolve_model(cfg.reference) / "config.json").get("vocab_size")
        own = model.config["vocab_size"]
        if known != own:
            raise BadInput(f"--reference {cfg.reference}: {known} tokens, the policy has {own}")


def pair_batches(run: "Run", pairs: list[tuple]) -> list[tuple]:
    """This rank's micro-batches: numbers (B) of pairs, tokens and mask (2 B, T), chosen first."""
    batches, lengths = [], [2 * pair_length(pair) for pair in pairs]
    order = sorted(range(len(pairs)), key=lengths.__getitem__, reverse=True)
    mine = order[run.rank :: run.world]
    for batch in micro_batches([lengths[i] for i in mine], run.cfg.micro_batch_tokens):
        part = [mine[j] for j in batch]
        answers = [(pairs[i][0], pairs[i][side]) for side in (1, 2) for i in part]
        tokens = [asked + answer for asked, answer in answers]
        masks = [[0] * len(asked) + [1] * len(answer) for asked, answer in answers]
        tokens = pad_rows(tokens, run.device, torch.long)
        batches.append((part, tokens, pad_rows(masks, run.device, torch.bool)))
    return batches


@torch.no_grad()
def reference_logprobs(run: "Run", model: "Model", pairs: list[tuple]) -> Tensor:
    """log pi_ref(y|x) of all pairs, (2, P), on the CPU; `model` unless --reference names one."""
    if run.cfg.reference:
        model = load_model(resolve_model(run.cfg.reference), run.device).to(run.dtype)
    found = torch.zeros(2, len(pairs))
    for part, tokens, mask in pair_batches(run, pairs):
        logprobs, _ = completion_logprobs(model, tokens, mask)  # (2 B, T-1)
        found[:, part] = logprobs.sum(1).view(2, -1).cpu()
    return sum(run.gather(found))  # a pair is 0 on all ranks but one


def update_policy(
    run: "Run", model: "Model", optimizer: Optimizer, batch: list, ref: Tensor, lr: float
) -> dict[str, float]:
    """A step down eq. 3 on a batch of P pairs and their ref (2, P); means over pairs."""
    cfg, totals = run.cfg, Counter()
    for part, tokens, mask in pair_batches(run, batch):
        logprobs, _ = completion_logprobs(model, tokens, mask)  # (2 B, T-1)
        logps = logprobs.sum(1).view(2, -1)  # (2, B): log pi(y|x) of eq. 1
        lengths = mask.sum(1).view(2, -1)
        form = cfg.beta, cfg.loss, cfg.label_smoothing, cfg.sft_coef
        ref_logps = ref[:, part].to(logps)
        losses, rewards = dpo_loss(logps, ref_logps, lengths, *form)  # (B,), (2, B)
        (losses.sum() / len(batch)).backward()  # P: of all passes and ranks
        seen = {
            "loss": losses,
            "pair_accuracy": (rewards[0] > rewards[1]).float(),
            "margin": rewards[0] - rewards[1],
            "tokens": lengths.sum(0),
        }
        for side, name in enumerate(("chosen", "rejected")):
            seen[f"reward/{name}"] = rewards[side]
            seen[f"logp/{name}"] = logps[side]
            seen[f"completion_length/{name}"] = lengths[side]
        totals.update({name: value.sum().item() for name, value in seen.items()})

    ranks = run.gather(totals)
    names = dict.fromkeys(name for rank in ranks for name in rank)
    totals = {name: sum(rank[name] for rank in ranks) for name in names}
    metrics = {name: total / len(batch) for name, total in totals.items()}
    metrics["tokens"] = totals["tokens"]
    metrics["grad_norm"] = run.update(model, optimizer, lr)
    return metrics


def train(cfg: Config) -> int:
    """Once: pairs, and what the reference says of them. Repeat: a batch of pairs, descend (3)."""
    run = Run(cfg)
    model, sampler = run.load(BY_SIZE)
    check_flags(cfg, model)
    task = make_task(cfg.task, natural=not model.is_tiny)
    prompter = Prompter(model, task, cfg.chat)
    pairs = []
    if cfg.data and not cfg.resume:
        pairs = file_pairs(run, prompter, model.eos_ids)
    optimizer = AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    state = run.start(model, optimizer, prompter)
    run.refresh(sampler, model)

    pairs, ref_logps = state.get("pairs", pairs), state.get("reference")  # ref_logps (2, P)
    if cfg.steps and ref_logps is None:
        pairs = pairs or sample_pairs(run, sampler, prompter)
        ref_logps = reference_logprobs(run, sampler, pairs)
        if run.after_step(0, model, optimizer, pairs=pairs, reference=ref_logps):
            return run.report(sampler, prompter)  # Ctrl-C
    if cfg.steps < 0:
        cfg.steps = math.ceil(cfg.epochs * len(pairs) / cfg.batch_size)
    run.say(f"{len(pairs)} pairs, {cfg.steps} steps of {cfg.batch_size}")

    for step in range(state["step"] + 1, cfg.steps + 1):
        began = time.time()
        first = (step - 1) * cfg.batch_size  # pairs follow one another, each epoch in a new order
        places = [divmod(first + i, len(pairs)) for i in range(cfg.batch_size)]
        rows = [epoch_order(len(pairs), cfg.seed, epoch)[place] for epoch, place in places]
        left = (1 + cfg.steps - step) / cfg.steps
        lr = cfg.lr * min(1.0, step / max(1, cfg.warmup_steps), left)
        batch, ref = [pairs[i] for i in rows], ref_logps[:, rows]
        metrics = update_policy(run, model, optimizer, batch, ref, lr)
        run.refresh(sampler, model)
        metrics["lr"], metrics["epoch"] = lr, step * cfg.batch_size / len(pairs)
        metrics["tokens_per_s"] = metrics["tokens"] / (time.time() - began)
        run.log(step, metrics, ("loss", "pair_accuracy", "margin", "tokens_per_s"))
        if run.after_step(step, model, optimizer, pairs=pairs, reference=ref_logps):
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
