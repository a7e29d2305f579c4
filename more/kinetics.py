"""Kinetics: what thinking costs when memory is counted, and reading less of it
(arXiv:2506.05333; the rule is that of the authors' LiteSys).

Each token that is drawn reads the keys and values of all before it: long answers of small models
read more than they compute. Who reads only the blocks that matter affords more tokens.

    reads  = sum_{t < L_out} min(B, L_in + t)          keys seen; B = inf: dense           (1)
    flops  = N (2 P L_out + 4 H reads)                 N trials, P parameters              (2)
    bytes  = 4 K N reads       keys and values of 2 bytes; dense: the prompt's only once   (3)
    search = sum_{t < L_out} floor((L_in + t) / b)     one key of each block               (4)
             adds 2 H N search flops and 2 K N search bytes
    eFLOPs = flops + I bytes               I: what a device computes while it reads a byte (5)
    kept   = the first `sink` keys, k blocks of b, the last `recent` ones and what is no    (6)
             whole block; all, as long as there are few
    score  = mean over the group of q . mean of the block's keys  = mean of its logits     (7)

H, K: numbers in the queries, in the keys of a token, all layers. By (7) LiteSys' rule needs one
key a block, which (4) pays for. Controls with as many keys: oracle (the blocks of most attention,
found by reading every key), window (the last blocks), random.

Run
    python more/kinetics.py  # two CPU cores, no network, minutes
    python more/kinetics.py --model Qwen2.5-1.5B --task gsm8k --data FILE  # one GPU
    python more/kinetics.py --shapes Qwen3-0.6B,Qwen3-8B,Qwen3-32B --context 200 --new 16384

Expect
    Seeds 0, 1, 2: accuracy 0.706; with 43 % of the bytes (k = 8) 0.709, of as many keys the last
    ones 0.634, random ones 0.627; k = 2: 23 %, 0.600, 0.442, 0.475. 7 CPU minutes.

Differs from LiteSys in: all layers are sparse (there --dense_layers 1); mean keys are made anew
each step: bytes are counted, not saved; no top-k of keys, no strided blocks. Slips of the paper's
cost code are in closed=True alone.

Legend: B rows, T tokens, S keys, W of them kept, n blocks, D head size; H, K heads of tensors.
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
from functools import cache
from itertools import product
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
    open_thinking,
    pass_at_k,
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
    model: str = option("tiny-rl", "one of models/, a folder, a hub name")
    task: str = option("countdown", "gsm8k, math, FILE.py:Class :knob=1")
    data: str = option("", "JSONL file of the problems (gsm8k, math)")
    chat: bool = option(False, "use the model's chat template")
    max_new_tokens: int = option(0, "longest answer, 0: by size")
    temperature: float = option(1.0, "of sampling, 0: greedy")
    eval_problems: int = option(200, "held-out problems", 2)
    eval_samples: int = option(4, "answers to each", 1)
    save_every: int = option(40, "problems between checkpoints", 1)
    seed: int = option(0, "seed of problems and sampling")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "auto: cuda if any")
    out: str = option("", "run folder, default out/SCRIPT-TASK-SEED-TIME")
    resume: str = option("", "run folder to go on with")
    blocks: str = option("", "k of eq. 6, rising, empty: by size")
    block: int = option(0, "keys in a block, 0: by size")
    recent: int = option(0, "last keys that are always read, 0: by size")
    sink: int = option(4, "first keys that are always read")
    dense_layers: int = option(0, "first layers that read all (LiteSys: 1)")
    intensity: float = option(562.5, "I of eq. 5, FLOP a byte (paper: B200)")
    shapes: str = option("", "print costs of these models (config.json) and end")
    context: int = option(200, "L_in, for --shapes", 1)
    new: int = option(16384, "L_out, for --shapes", 1)
    trials: str = option("1,8", "N, for --shapes")
    rows: int = option(0, "that share a reading of the weights, 0: free (paper)")


BY_SIZE = {  # below 10 M parameters, below 1 B, above
    "max_new_tokens": (512, 512, 2048),
    "blocks": ("2,8", "4,16", "16,64"),
    "block": (8, 16, 16),
    "recent": (16, 32, 64),
}
SELECT = "block", "oracle", "window", "random"


# ---- what an answer costs


@dataclass
class Shape:
    """What cost depends on."""

    parameters: float
    queries: int  # H of eq. 2
    keys: int  # K of eq. 3
    layers: int


def reads(context: int, new: int, budget: float = math.inf) -> int:
    """Eq. 1.

    >>> reads(3, 4), reads(3, 4, 5), reads(3, 4, 2)
    (18, 17, 8)
    """
    return int(np.minimum(context + np.arange(new), budget).sum())


def searched(context: int, new: int, block: int) -> int:
    """The sum of eq. 4."""
    return int(((context + np.arange(new)) // block).sum())


def dense_cost(shape: Shape, context, new, trials=1, closed=False) -> tuple[float, float]:
    """Eq. 2 and 3; closed: with an integral for the sum, as the paper's code."""
    given, own = context * new, reads(0, new)
    if closed:
        own = new * new / 2
    flops = 2 * shape.parameters * new + 4 * shape.queries * (given + own)
    return trials * flops, 4 * shape.keys * (given + trials * own)


def sparse_cost(shape: Shape, context, new, budget, trials=1, closed=False) -> tuple[float, float]:
    """Eq. 2 and 3 with a budget, its keys known for nothing.

    closed: the paper's code adds what the first tokens do not read; it is to be subtracted.
    """
    found = reads(context, new, budget)
    if closed:
        found = budget * new + max(0, budget - context) ** 2 / 2
    flops = 2 * shape.parameters * new + 4 * shape.queries * found
    return trials * flops, trials * 4 * shape.keys * found


def block_cost(
    shape: Shape, context, new, budget, block, trials=1, closed=False
) -> tuple[float, float]:
    """Eq. 2 to 4.

    closed: the paper's code divides before it multiplies, lets the trials share the prompt's
    blocks but not its keys, and is wrong for answers that never fill the budget.
    """
    found, one = reads(context, new, budget), searched(context, new, block)
    every = trials * one
    if closed:
        found = budget * new - max(0, budget - context) ** 2 / 2
        one = (2 * context + new) // block * new / 2
        every = (2 * context + trials * new) // block * new / 2
    flops = 2 * shape.parameters * new + shape.queries * (4 * found + 2 * one)
    return trials * flops, shape.keys * (4 * trials * found + 2 * every)


def eflops(cost: tuple, intensity: float) -> float:
    """Eq. 5."""
    return cost[0] + intensity * cost[1]


def read_shape(name: str) -> Shape:
    """From the config.json of a folder or the hub; no weights are read."""
    found = [x / "config.json" for x in (Path(name), MODELS / name) if x.is_dir()]
    if not found:
        from huggingface_hub import hf_hub_download  # slow to import

        with reading(f"--shapes {name}: no folder here, and not on the hub"):
            owner = "Qwen" if name.startswith("Qwen") else "HuggingFaceTB"
            repo = name if "/" in name else f"{owner}/{name}"
            found = [Path(hf_hub_download(repo, "config.json"))]
    with reading(found[0]):
        return shape_of(read_json(found[0]))


def shape_of(config: dict) -> Shape:
    """Its parameters are those that multiply: an embedding only if it is the head, too."""
    with torch.device("meta"):
        model = Model(config)
    count, c = sum(p.numel() for p in model.parameters()), model.config
    if not c.get("tie_word_embeddings"):
        count -= c["vocab_size"] * c["hidden_size"]
    heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
    if heads % groups:
        raise BadInput(f"num_attention_heads {heads}: no multiple of {groups} key heads")
    size = c["head_dim"] * c["num_hidden_layers"]
    return Shape(count, heads * size, groups * size, c["num_hidden_layers"])


def cost_table(cfg: Config) -> str:
    """Of --shapes: N trials dense, with a budget, with blocks; the last by the first."""
    heads = "N TFLOP TB dense:eTFLOP attention budget sparse block block/dense".split()
    lines = [f"{'':20}" + "".join(f"{head:>13}" for head in heads)]
    for name in cfg.shapes.split(","):
        shape = read_shape(name)
        size = (shape.parameters > 1e7) + (shape.parameters > 1e9)
        block, recent = cfg.block or BY_SIZE["block"][size], cfg.recent or BY_SIZE["recent"][size]
        k = rising("blocks", cfg.blocks or BY_SIZE["blocks"][size])[-1]
        budget = cfg.sink + recent + k * block
        for n in rising("trials", cfg.trials):
            asked, products = (shape, cfg.context, cfg.new), n * 2 * shape.parameters * cfg.new
            weights = products / cfg.rows if cfg.rows else 0.0  # bytes, 2 a parameter
            costs = [dense_cost(*asked, n), sparse_cost(*asked, budget, n)]
            costs.append(block_cost(*asked, budget, block, n))
            dense, sparse, some = [eflops((x, y + weights), cfg.intensity) for x, y in costs]
            rest = eflops((products, weights), cfg.intensity)  # what is no attention
            values = [n, costs[0][0] / 1e12, (costs[0][1] + weights) / 1e12, dense / 1e12]
            values += [1 - rest / dense, budget, sparse / 1e12, some / 1e12, some / dense]
            lines.append(f"{name[-20:]:20}" + "".join(f"{value:13.5g}" for value in values))
    return "\n".join(lines)


# ---- which keys are read


@dataclass
class Rule:
    """Eq. 6."""

    select: str
    sink: int
    recent: int
    block: int
    k: int

    @property
    def full(self) -> int:
        """Up to so many keys all are read: LiteSys' threshold, in whole blocks."""
        budget = self.sink + self.recent + self.k * self.block
        return math.ceil(budget / self.block) * self.block

    def count(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys that attention reads of so many, and those that choosing reads."""
        blocks = (lengths - self.sink - self.recent) // self.block
        kept = lengths - (blocks - self.k) * self.block
        search = {"block": blocks, "oracle": lengths}.get(self.select, 0 * lengths)
        sparse = lengths > self.full
        return np.where(sparse, kept, lengths), np.where(sparse, search, 0)


def block_scores(q: Tensor, keys: Tensor, lengths: Tensor, rule: Rule, layer: int) -> Tensor:
    """Scores (B, K, n) of all blocks of keys (B, K, S, D); those of no row's middle, too."""
    B, K, S, D = keys.shape
    n = (S - rule.sink) // rule.block
    middle = slice(rule.sink, rule.sink + n * rule.block)
    number = torch.arange(n, device=q.device).expand(B, K, n)
    q = q.view(B, K, -1, D)  # by group
    if rule.select == "window":
        return number.float()
    if rule.select == "random":
        head = torch.arange(K, device=q.device)[:, None]
        return scrambled(lengths[:, None, None], head + K * layer, number)
    if rule.select == "oracle":
        logits = q @ keys.transpose(2, 3) / D**0.5  # (B, K, G, S)
        unseen = torch.arange(S, device=q.device) >= lengths[:, None, None, None]
        mass = logits.masked_fill(unseen, -math.inf).softmax(-1).mean(2)
        return mass[..., middle].unflatten(-1, (n, rule.block)).sum(-1)
    mean_keys = keys[:, :, middle].unflatten(2, (n, rule.block)).mean(3)  # (B, K, n, D)
    return (q.mean(2, keepdim=True) * mean_keys).sum(-1)  # eq. 7


def scrambled(*numbers: Tensor) -> Tensor:
    """A number in [0, 1) for each tuple: random, and yet the same in every batch."""
    x = 0
    for number in numbers:
        x = (x + number) * 6364136223846793005 + 1442695040888963407  # modulo 2^64
        x = x ^ (x >> 29)
    return (x & (2**24 - 1)).float() / 2**24


def chosen_blocks(scores: Tensor, lengths: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Eq. 6: positions (B, K, W) and which of them count; scores (B, K, n), lengths (B,)."""
    B, K, n = scores.shape
    lengths = lengths[:, None, None]
    blocks = (lengths - rule.sink - rule.recent) // rule.block  # whole ones of the middle
    number = torch.arange(n, device=scores.device)
    scores = scores.masked_fill(number >= blocks, -math.inf)
    best = scores.topk(rule.k, dim=-1).indices
    inside = torch.arange(rule.block, device=scores.device)
    inner = (rule.sink + rule.block * best[..., None] + inside).flatten(2)
    rest = torch.arange(rule.recent + rule.block - 1, device=scores.device)
    last = (rule.sink + rule.block * blocks + rest).expand(B, K, -1)
    first = torch.arange(rule.sink, device=scores.device).expand(B, K, -1)
    positions = torch.cat([first, inner, last], -1)
    everything = torch.arange(positions.shape[-1], device=scores.device)
    positions = torch.where(lengths > rule.full, positions, everything)
    return positions, positions < lengths


def sparse_attention(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, rule: Rule, layer: int = 0
) -> Tensor:
    """Attention (B, H, 1, D) of q over what a rule keeps of keys, values (B, K, S, D)."""
    scores = block_scores(q, keys, lengths, rule, layer)
    positions, counts = chosen_blocks(scores, lengths, rule)
    B, K, S, _ = keys.shape
    row = torch.arange(B, device=q.device)[:, None, None]
    at = row, torch.arange(K, device=q.device)[:, None], positions.clamp(max=S - 1)
    keys, values = keys[at], values[at]  # (B, K, W, D)
    mask = counts.repeat_interleave(q.shape[1] // K, dim=1)[:, :, None]
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def sparsify(model: "Model", rule: Rule | None, dense_layers: int) -> None:
    """From now on the model reads by a rule, or without one everything."""
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.__class__ = SparseAttention  # see the end
        layer.self_attn.rule = rule if i >= dense_layers else None


# ---- the comparison


def rising(flag: str, text: str) -> list[int]:
    """Numbers like 1,2,4."""
    try:
        found = [int(number) for number in text.split(",")]
    except ValueError:
        found = []
    if not found or found[0] < 1 or found != sorted(set(found)):
        raise BadInput(f"--{flag} {text}: rising numbers like 1,2,4 are needed")
    return found


def rules_of(cfg: Config) -> dict[str, Rule | None]:
    """The ways to read by name: blocks, and controls that keep as many keys."""
    rules: dict[str, Rule | None] = {"dense": None}
    for select, k in product(SELECT, rising("blocks", cfg.blocks)):
        rules[f"{select}@{k}"] = Rule(select, cfg.sink, cfg.recent, cfg.block, k)
    return rules


def cost_curve(
    shape: Shape, rule: Rule | None, context: int, new: int, dense_layers: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Flops and bytes (new,) of the first 1, 2 .. tokens, from the keys that a rule reads.

    The first token comes from the prefill, which reads all.
    """
    lengths = context + np.arange(new)
    kept, search = lengths, 0 * lengths
    if rule is not None:
        kept, search = rule.count(lengths)
        kept[0], search[0] = context, 0
    share = dense_layers / shape.layers
    numbers = 4 * (share * lengths + (1 - share) * kept) + 2 * (1 - share) * search
    flops = 2 * shape.parameters + shape.queries * numbers
    return flops.cumsum(), (shape.keys * numbers).cumsum()


def trade(records: list[dict], curves: Callable, caps: list, intensity: float) -> dict[str, tuple]:
    """(eFLOPs, coverage) of way/cap/N: N answers of at most so many tokens, one of them right."""
    points, n = {}, len(next(iter(records[0].values()))["tokens"])
    for way, cap in product(records[0], caps):
        spent, right = [], []
        for x in [record[way] for record in records]:
            tokens = np.array(x["tokens"])  # a lower cap draws the same up to it
            cost = eflops(curves(way, x["prompt"]), intensity)
            spent.append(cost[np.minimum(tokens, cap) - 1].mean())
            right.append(int(np.sum(x["right"], where=tokens <= cap)))
        for size in [2**power for power in range(n.bit_length())]:
            cover = mean(pass_at_k(n, count, size) for count in right)
            points[f"{way}/{cap}/{size}"] = size * mean(spent), cover
    return points


def frontier(points: dict[str, tuple[float, float]]) -> list[str]:
    """The names of points that are better than every cheaper one, by cost.

    >>> frontier({"a": (1, 0.5), "b": (2, 0.5), "c": (2, 0.6), "d": (3, 0.4)})
    ['a', 'c']
    """
    order = sorted((cost, -accuracy, name) for name, (cost, accuracy) in points.items())
    best = np.minimum.accumulate([0.0] + [loss for _, loss, _ in order])
    return [name for (_, loss, name), before in zip(order, best, strict=False) if loss < before]


def compare_reading(cfg: Config, records: list[dict], shape: Shape, rules: dict) -> dict:
    """Accuracy, tokens, bytes of each way to read, and the frontiers."""
    metrics: dict[str, float] = {}

    @cache
    def curves(way, context):
        return cost_curve(shape, rules[way], context, cfg.max_new_tokens, cfg.dense_layers)

    alone = [mean(record["dense"]["right"]) for record in records]
    for way in rules:
        rows = [record[way] for record in records]
        accuracy = [mean(row["right"]) for row in rows]
        gaps = [x - y for x, y in zip(accuracy, alone, strict=True)]
        sizes = [(row["prompt"], tokens) for row in rows for tokens in row["tokens"]]
        read = mean(curves(way, context)[1][tokens - 1] for context, tokens in sizes)
        full = mean(curves("dense", context)[1][tokens - 1] for context, tokens in sizes)
        found = {"accuracy": mean(accuracy), "gap": mean(gaps)}
        found["gap_se"] = np.std(gaps) / len(gaps) ** 0.5
        for name in ("tokens", "finished", "seconds"):
            found[name] = mean(np.mean(row[name]) for row in rows)
        found |= {"kv_bytes": read, "kv_share": read / full}
        metrics |= {f"eval/{name}/{way}": float(value) for name, value in found.items()}
    caps = [math.ceil(cfg.max_new_tokens / 2**power) for power in (3, 2, 1, 0)]
    parts = records[::2], records[1::2] or records
    dev, test = (trade(part, curves, caps, cfg.intensity) for part in parts)
    for ways in ("dense", "block"):  # chosen on half of the problems, measured on the others
        for name in frontier({name: dev[name] for name in dev if name.startswith(ways)}):
            metrics[f"frontier/eflops/{name}"] = test[name][0]
            metrics[f"frontier/coverage/{name}"] = test[name][1]
    return metrics


def solve(cfg: Config, ways: Callable = rules_of) -> int:
    """For some problems after the other, for each way to read: answer. Then compare."""
    if cfg.shapes:
        print(cost_table(cfg))
        return 0
    run = Comparison(cfg)  # see the end
    model = run.load(BY_SIZE)[1]
    rules, shape = ways(cfg), shape_of(model.config)
    task = make_task(cfg.task, cfg.data, natural=not model.is_tiny)
    prompter = Prompter(model, task, cfg.chat)
    problems = list(enumerate(heldout(task, cfg.eval_problems, cfg.seed)))
    cfg.steps = len(problems)  # what run.log counts
    records = run.start(model, None, prompter).get("records", [])
    while len(records) < len(problems):
        some = problems[len(records) : len(records) + cfg.save_every]
        found = [{} for _ in some]
        for way, rule in rules.items():
            sparsify(model, rule, cfg.dense_layers)
            began = time.process_time()
            done = rollout(run, model, prompter, some, cfg.eval_samples, cfg.max_new_tokens, 0)
            seconds = (time.process_time() - began) / len(some)
            for record, group in zip(found, in_groups(done, cfg.eval_samples), strict=True):
                record[way] = row = {"prompt": len(group[0].prompt), "seconds": seconds}
                row["tokens"] = [len(c.tokens) for c in group]
                row["right"] = [int(c.score["correct"]) for c in group]
                row["finished"] = [int(c.finished) for c in group]
        records += found
        run.save(records)
        shown = [f"eval/accuracy/{way}" for way in rules]
        run.log(len(records), compare_reading(cfg, records, shape, rules), shown)
        run.keep_samples(len(records), prompter, done[: cfg.eval_samples], [0.0] * cfg.eval_samples)
        if run.signal:
            break
    return run.report(compare_reading(cfg, records, shape, rules))


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


class SparseAttention(Attention):
    """The shared attention, but a single new token reads what its rule keeps."""

    rule = None

    def forward(self, x, rotary, mask, cache, layer):
        rule, T = self.rule, x.shape[1]
        if rule is None or cache is None or T > 1 or cache.width <= rule.full:
            return super().forward(x, rotary, mask, cache, layer)
        B = len(x)
        q = self.q_norm(self.q_proj(x).view(B, 1, self.H, -1)).transpose(1, 2)  # (B, H, 1, D)
        k = self.k_norm(self.k_proj(x).view(B, 1, self.K, -1)).transpose(1, 2)
        v = self.v_proj(x).view(B, 1, self.K, -1).transpose(1, 2)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        keys, values = cache.append(layer, k, v)  # (B, K, S, D)
        x = sparse_attention(q, keys, values, cache.lengths + 1, rule, layer)
        return self.o_proj(x.transpose(1, 2).reshape(B, 1, -1))


class Comparison(Run):
    """A run that keeps records where others keep weights."""

    def resume(self, model, optimizer):
        with reading(f"checkpoint of {self.folder}"):
            saved = read_json(checkpoints(self.folder)[-1] / "records.json")
            return {"step": len(saved["records"]), **saved}

    def save(self, records):
        """Write step-N, which appears whole or not at all."""
        self.signal = max(self.gather(self.got))
        if self.rank == 0:
            unfinished = self.folder / "records.tmp"
            unfinished.mkdir(exist_ok=True)
            (unfinished / "records.json").write_text(json.dumps({"records": records}))
            unfinished.rename(self.folder / f"step-{len(records):06d}")
            for old in checkpoints(self.folder)[:-1]:
                shutil.rmtree(old)

    def report(self, metrics):
        """Lines for each way to read and each point of a frontier; the exit code."""
        if self.signal:
            return super().report(None, None)
        heads = "accuracy gap gap_se tokens finished kv_bytes kv_share seconds".split()
        heads = [f"eval/{head}" for head in heads]
        for columns in (heads, ["frontier/eflops", "frontier/coverage"]):
            self.say(" " * 20 + "".join(f"{head.partition('/')[2]:>12}" for head in columns))
            for name in [x for x in metrics if x.startswith(columns[0])]:
                way = name[len(columns[0]) :]
                values = "".join(f"{metrics[head + way]:12.4g}" for head in columns)
                self.say(f"{way[1:]:20}{values}")
        return 0


if __name__ == "__main__":
    os._exit(main(solve, Config))  # threads of gloo may abort sys.exit
