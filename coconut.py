"""Coconut, a chain of continuous thought: reasoning in hidden states (arXiv:2412.06769).

Between <bot> and <eot> the model writes no token: its last hidden state is its next input, and
gradients flow through the whole chain. A curriculum: first it learns to write its steps; then
each stage trades the first step left for c thoughts; the last drops the rest.

    input_t = h_(t-1)  if position t holds a thought, else embedding(x_t)       (1)
              h after the final norm; the first thought is the state at <bot>
    stage k:  question <bot> [c k thoughts] <eot> step_(k+1), .., answer, end   (2)
    loss    = -(1/N) sum_i sum_t mask_i,t log p(x_i,t | inputs_i,<t)            (3)
              mask 1 from step_(k+1) on, N: its sum over i, t

Run
    python coconut.py              # chains of + and * modulo 7, two CPU cores, minutes
    python coconut.py --model Qwen2.5-1.5B --data gsm_train.txt --c 2 --max_stage 3 \\
        --gate 0 --epochs_per_stage 3 --steps 45000 --uniform_prob 0  # one GPU
    torchrun --standalone --nproc_per_node=8 coconut.py ...
    Controls: --mode cot            all steps in words
              --mode no_cot         the answer alone
              --mode no_thoughts    stages without thoughts
              --mode pause          a learnt token for a thought, so one pass
              --mode no_curriculum  the last stage from the start
    python docs/experiments/coconut.py FOLDER   # what the thoughts of a run say

Expect
    Seeds 0, 1, 2, eight CPU minutes each: held-out accuracy 0.97, 0.97, 0.99 with four thoughts
    and the answer alone (5 tokens); 1.00 in words (25 tokens, --mode cot --steps 1000). Pauses
    come to 0.94, 0.98, 0.94, so most of it is the curriculum's, as in the paper's own controls.
    At once (no_cot): 0.37, 0.30, 0.86, where 0.33 is what even or odd alone gives.

Differs from the paper in: a stage ends once learnt; a batch is of one stage; gradients are
clipped; AdamW keeps its state, beta2 is 0.95.

Legend: B rows, T tokens, P prompts, C hidden size, V vocabulary, H query heads, K key heads,
D head size, S cache positions, n thoughts.
"""

import argparse
import copy
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
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
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

from rewards import (
    BadInput,
    Completion,
    describe_evaluation,
    fill_template,
    heldout,
    in_groups,
    make_task,
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
    model: str = option("scratch", "scratch: a new one; a folder, a hub name")
    num_layers: int = option(2, "layers of a new model", 1)
    hidden_size: int = option(128, "width of a new model: heads of 16", 16)
    task: str = option("s3", "s3:elements=6, affine, prosqa")
    data: str = option("", "ProsQA or ProntoQA JSON, GSM8K-Aug lines, JSONL")
    max_new_tokens: int = option(0, "longest completion, 0: by size")
    temperature: float = option(0.0, "of evaluations, 0: greedy")
    batch_size: int = option(0, "rows per step, 0: by size")
    micro_batch_tokens: int = option(0, "padded tokens per pass, 0: by size")
    steps: int = option(6000, "optimizer steps, 0: only evaluate")
    lr: float = option(0.0, "learning rate, constant, 0: by size")
    weight_decay: float = option(0.01, "AdamW's")
    eval_problems: int = option(200, "held-out problems, 0: no evaluation")
    eval_samples: int = option(1, "completions per held-out problem", 1)
    eval_every: int = option(0, "steps between evaluations, 0: as stages end")
    save_every: int = option(500, "steps between checkpoints, 0: at the end")
    seed: int = option(0, "seed of data, new weights and sampling")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "auto: cuda if any")
    out: str = option("", "run folder, default out/SCRIPT-TASK-SEED-TIME")
    resume: str = option("", "run folder to go on with")
    mode: Literal["coconut", "cot", "no_cot", "no_thoughts", "pause", "no_curriculum"] = option(
        "coconut", "the method or a control"
    )
    c: int = option(1, "thoughts per step replaced", 1)
    max_stage: int = option(0, "reasoning steps replaced, 0: at most 6")
    pad_latent_to_max: bool = option(True, "short problems think as long")
    gate: float = option(0.97, "share of rows right to go on, 0: off")
    stage_steps: int = option(1200, "updates in a stage but the last, 0: any")
    epochs_per_stage: int = option(0, "with --data, instead of --stage_steps")
    uniform_prob: float = option(0.2, "share of batches of a random stage")


BY_SIZE = {  # below 10 M parameters, below 1 B, above (paper: 1e-4, 128 rows)
    "lr": (1e-3, 1e-4, 2e-5),
    "batch_size": (64, 128, 128),
    "max_new_tokens": (48, 128, 128),
    "micro_batch_tokens": (8192, 4096, 4096),
}
TINY_MARKERS = "<bot>", "<latent>", "<eot>"  # of models/; a <latent> is a thought's place
MARKERS = "<|start-latent|>", "<|latent|>", "<|end-latent|>"  # added to others
MARKED = "coconut", "pause", "no_curriculum"  # modes with markers
CURRICULUM = "coconut", "no_thoughts", "pause"  # modes that go from stage to stage
GATE_STEPS = 20  # a stage is learnt when the mean of so many steps reaches --gate


# -------------------------------------------- thinking in hidden states


class GradCache:
    """As the machine's Cache, but never overwritten: gradients need every state of it."""

    def __init__(self, model, rows, width):
        c, weight = model.config, model.lm_head.weight
        shape = rows, c["num_key_value_heads"], width, c["head_dim"]
        empty = weight.new_zeros(shape, dtype=model.compute_dtype)  # (B, K, S, D)
        self.keys = [empty] * c["num_hidden_layers"]
        self.values = [empty] * c["num_hidden_layers"]
        self.lengths = weight.new_zeros(rows, dtype=torch.long)  # read so far, a row
        self.width = width  # what attention sees, S

    def append(self, layer, k, v):
        """Write k, v (B, K, T, D); returns all of the layer, (B, K, S, D)."""
        slots = self.lengths[:, None] + torch.arange(k.shape[2], device=k.device)  # (B, T)
        slots = slots[:, None, :, None].expand_as(k)
        self.keys[layer] = self.keys[layer].scatter(2, slots, k)
        self.values[layer] = self.values[layer].scatter(2, slots, v)
        return self.keys[layer], self.values[layer]


def think(self: "Model", inputs: Tensor, cache=None) -> Tensor:
    """Model.forward of this script (set at its end): hidden states (B, T, C) by eq. 1.

    A row's places are contiguous; where they start and how many differ between rows.
    The row with most, n, sets n + 1 passes: up to the last <bot>, one column n - 1
    times, the rest. one_pass: Model.forward below, kept at the end. Source: sec. 3.
    """
    place = self.config.get("latent_token_id")
    embedded = inputs.is_floating_point()
    single = inputs.shape[1] == 1  # decoding: to look would wait for a GPU
    if place is None or embedded or single or not (inputs == place).any():
        return one_pass(self, inputs, cache)
    (B, T), device = inputs.shape, inputs.device
    rows, columns = torch.arange(B, device=device), torch.arange(T, device=device)
    places = inputs == place  # (B, T)
    counts = places.sum(1)  # (B,) thoughts
    first = places.int().argmax(1)  # (B,) column of the first
    first = first.where(counts > 0, first.max())  # without: read as far as others
    n, prefix = int(counts.max()), int(first.max())
    inputs = self.model.embed_tokens(inputs)  # (B, T, C)
    if cache is None:
        cache = GradCache(self, B, T)

    states = [one_pass(self, inputs[:, :prefix], cache)]  # up to <bot>
    cache.lengths.copy_(first)  # rows with an earlier <bot> forget the rest
    thoughts = [states[0][rows, first - 1]]  # (B, C), the states at <bot>
    for i in range(1, n):  # the state at thought i is the next one
        states.append(one_pass(self, thoughts[-1][:, None], cache))  # (B, 1, C)
        cache.lengths -= (i > counts).long()  # rows without thought i forget it
        thoughts.append(states[-1][:, 0])

    number = columns - first[:, None]  # (B, T): 0 at the first place
    filled = torch.stack(thoughts, 1)[rows[:, None], number.clamp(0, n - 1)]
    inputs = torch.where(places[..., None], filled, inputs)  # eq. 1
    # The last pass begins where the slowest row stands; others read some columns twice.
    start = int((first + counts.clamp(max=n - 1)).min())
    cache.lengths.fill_(start)
    rest = one_pass(self, inputs[:, start:], cache)  # (B, T - start, C)
    held = torch.where(number < 0, columns, prefix + number)  # where states has them
    known = torch.cat(states, 1)[rows[:, None], held[:, :start]]
    return torch.cat([known, rest], 1)


# ------------------------------------------------------- the curriculum


def stage_plan(
    mode: str, stage: int, num_steps: int, c: int, max_stage: int, pad=True, prompting=False
) -> tuple[int, int]:
    """(steps left out, thoughts put in) of a problem with num_steps steps (eq. 2).

    Stage max_stage + 1 leaves out all steps, without further thoughts. Without `pad` a short
    problem gets fewer thoughts in the last stage, and in all prompts: as the paper's code.

    >>> [stage_plan("coconut", stage, 5, 2, 3) for stage in range(5)]
    [(0, 0), (1, 2), (2, 4), (3, 6), (5, 6)]
    """
    if mode == "cot":
        return 0, 0
    if mode == "no_cot":
        return num_steps, 0
    skipped = stage if stage <= max_stage else num_steps
    replaced = min(stage, max_stage)
    if not pad and (prompting or stage > max_stage):
        replaced = min(replaced, num_steps)
    if mode == "no_thoughts":
        replaced = 0
    return skipped, c * replaced


def layout(
    question: list, steps: list, answer: list, markers: tuple | None, skipped: int, thoughts: int
) -> tuple[list, list]:
    """A row of eq. 2, (ids, mask): learnt is what follows the question and <eot>.

    >>> layout([5], [[6], [7]], [8], (1, 2, 3), 1, 2)
    ([5, 1, 2, 2, 3, 7, 8], [0, 0, 0, 0, 0, 1, 1])
    """
    given = list(question)
    if markers:
        bot, place, eot = markers
        given += [bot] + [place] * thoughts + [eot]
    learnt = sum(steps[skipped:], []) + answer
    return given + learnt, [0] * len(given) + [1] * len(learnt)


class ThoughtPrompter:
    """Prompts and rows of a stage (eq. 2), in place of the machine's Prompter."""

    def __init__(self, model, task, cfg):
        plain = Prompter(model, task, chat=False)
        self.encode = lru_cache(2**16)(plain.encode)  # a few equations, over and over
        self.decode, self.stops = plain.decode, ()
        self.task, self.cfg = task, cfg
        self.stage = cfg.max_stage + 1 if cfg.mode in ("no_cot", "no_curriculum") else 0
        self.ask = task.question
        if model.is_tiny and hasattr(task, "compact"):
            self.ask = task.compact
        self.names = TINY_MARKERS if model.is_tiny else MARKERS
        self.markers = tuple(plain.tokenizer.token_to_id(name) for name in self.names)
        self.end = model.eos_ids[:1]
        task.describe = self.describe  # for evaluations

    def plan(self, problem, stage, prompting=False):
        cfg, num_steps = self.cfg, len(self.task.steps(problem))
        limits = cfg.c, cfg.max_stage, cfg.pad_latent_to_max
        return stage_plan(cfg.mode, stage, num_steps, *limits, prompting)

    def text(self, problem):
        """The prompt in the present stage."""
        text = self.ask(problem) + "\n"
        if self.cfg.mode in MARKED:
            _, thoughts = self.plan(problem, self.stage, prompting=True)
            bot, place, eot = self.names
            text += bot + place * thoughts + eot
        return text

    def row(self, problem, stage):
        """What is learnt of a problem in a stage, (ids, mask)."""
        question = self.encode(self.ask(problem) + "\n")
        steps = [self.encode(step + "\n") for step in self.task.steps(problem)]
        answer = getattr(self.task, "MARKER", "") + self.task.answer(problem)  # "### ", or nothing
        markers = self.markers if self.cfg.mode in MARKED else None
        plan = self.plan(problem, stage)
        return layout(question, steps, self.encode(answer) + self.end, markers, *plan)

    def describe(self, text, problem):
        """What evaluations log besides; a pause is no thought."""
        _, thoughts = self.plan(problem, self.stage, prompting=True)
        if self.cfg.mode == "pause":
            thoughts = 0
        return {"stage": self.stage, "thoughts": thoughts}


def log_tokens(self: "Run", step: int, metrics: dict, show=()) -> None:
    """Run.log of this script: as in the paper, thoughts count as generated tokens."""
    if "eval/thoughts" in metrics:
        ends = 1 - metrics["eval/clipped_ratio"]  # end tokens do not
        tokens = metrics["eval/thoughts"] + metrics["eval/completion_length"] - ends
        metrics["eval/generated_tokens"] = tokens
    plain_log(self, step, metrics, show)


def next_stage(
    stage: int, recent: list[float], steps_in_stage: int, gate: float, stage_steps: int
) -> int:
    """The next, if `recent` (shares of rows right) averages `gate` or time is up.

    >>> next_stage(1, [0.98] * 20, steps_in_stage=30, gate=0.97, stage_steps=900)
    2
    """
    enough = gate > 0 and len(recent) == GATE_STEPS
    learnt = enough and sum(recent) / GATE_STEPS >= gate
    timed_out = stage_steps > 0 and steps_in_stage >= stage_steps
    return stage + 1 if learnt or timed_out else stage


# ------------------------------------------------------------- training


def make_scratch(cfg: Config, folder: Path) -> None:
    """Write a new Llama, with the tokenizer of models/tiny, into `folder`."""
    tiny = resolve_model("tiny")
    size, heads = cfg.hidden_size, cfg.hidden_size // 16
    config = read_json(tiny / "config.json") | {
        "hidden_size": size,
        "intermediate_size": 2 * size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": 16,
        "tie_word_embeddings": False,
    }
    model = Model(config)
    torch.manual_seed(cfg.seed)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:  # embeddings as large as states: thoughts look like tokens
            nn.init.normal_(weight, std=1.0 if "embed" in name else size**-0.5)
    head = model.model.embed_tokens.weight.detach() * size**-0.5  # logits of size 1
    model.lm_head.weight.data = head
    model.folder = tiny
    save_model(model, folder)


def add_markers(source: Path, folder: Path, mode: str) -> None:
    """Copy a model into `folder`, with markers; new ones start like "<<" (paper's code)."""
    model = load_model(source)
    tokenizer, names = model.tokenizer, TINY_MARKERS if model.is_tiny else MARKERS
    with reading(f"{source}: tokenizer"):
        missing = [name for name in names if tokenizer.token_to_id(name) is None]
        like = tokenizer.encode("<<", add_special_tokens=False).ids[0]
    tokenizer.add_special_tokens(missing)
    new = [tokenizer.token_to_id(name) for name in missing]
    size = max([model.config["vocab_size"]] + [i + 1 for i in new])  # spare rows first
    rows = [like if i in new else i for i in range(size)]
    for table in (model.model.embed_tokens, model.lm_head):  # if tied, the first is saved
        table.weight = nn.Parameter(table.weight.detach()[rows])
    model.config |= {"vocab_size": size, "latent_token_id": None}
    if mode in ("coconut", "no_curriculum"):  # else no place, or a pause: a token like others
        model.config["latent_token_id"] = tokenizer.token_to_id(names[1])
    save_model(model, folder)
    tokenizer.save(str(folder / "tokenizer.json"))


def check_flags(cfg: Config) -> None:
    """Refuse flags that would be ignored."""
    sizes = cfg.num_layers, cfg.hidden_size
    if sizes != (Config.num_layers, Config.hidden_size) and cfg.model != "scratch":
        raise BadInput(f"--num_layers and --hidden_size are not for --model {cfg.model}")
    if max(cfg.gate, cfg.uniform_prob) > 1:
        raise BadInput(f"--gate {cfg.gate}, --uniform_prob {cfg.uniform_prob}: at most 1")
    if cfg.epochs_per_stage and not cfg.data:
        raise BadInput("--epochs_per_stage needs --data")
    staged = ["gate", "stage_steps", "epochs_per_stage", "uniform_prob"]
    useless = {"cot": ["c", "max_stage", *staged], "no_thoughts": ["c"]}
    useless |= {"no_cot": useless["cot"], "no_curriculum": staged}
    for name in useless.get(cfg.mode, []):
        if getattr(cfg, name) != getattr(Config, name) and not cfg.resume:
            raise BadInput(f"--{name} does nothing with --mode {cfg.mode}")


def set_by_task(cfg: Config):
    """The task; fills in what its numbers of steps and problems say."""
    if cfg.data and cfg.task == Config.task:
        cfg.task = "chains"
    task = make_task(cfg.task, cfg.data)
    if not hasattr(task, "steps"):
        raise BadInput(f"--task {cfg.task} has no steps: affine, s3, prosqa, --data")
    if not cfg.max_stage:
        problems = [task.problem("train", cfg.seed, i) for i in range(100)]
        cfg.max_stage = min(6, max(len(task.steps(problem)) for problem in problems))
    if cfg.epochs_per_stage:
        num_rows = cfg.epochs_per_stage * len(task.streams["train"])
        cfg.stage_steps = math.ceil(num_rows / cfg.batch_size)
    return task


def descend(run: "Run", model: "Model", optimizer: AdamW, rows: list) -> dict:
    """One step down eq. 3, on all rows (ids, mask)."""
    cfg = run.cfg
    num_tokens = sum(sum(mask) for _, mask in rows)  # N of eq. 3
    mine = rows[run.rank :: run.world]
    loss = entropy = right = 0.0
    for batch in micro_batches([len(ids) for ids, _ in mine], cfg.micro_batch_tokens):
        tokens = pad_rows([mine[i][0] for i in batch], run.device, torch.long)  # (B, T)
        mask = pad_rows([mine[i][1] for i in batch], run.device, torch.bool)
        logprobs, entropies = completion_logprobs(model, tokens, mask)  # (B, T-1)
        part = -logprobs.sum() / num_tokens  # eq. 3
        part.backward()
        loss += part.item()
        entropy += entropies.sum().item() / num_tokens
        sure = logprobs > math.log(0.5)  # greedy writes these; 0 if masked
        right += sure.all(1).sum().item() / len(rows)
    norm = run.update(model, optimizer, cfg.lr)
    return {
        "loss": sum(run.gather(loss)),
        "entropy": sum(run.gather(entropy)),
        "rows_right": sum(run.gather(right)),
        "grad_norm": norm,
        "lr": cfg.lr,
        "tokens": num_tokens,
    }


def start_run(cfg: Config, folder: Path) -> tuple["Run", "Model", "Model"]:
    """The run, the model to train, the one to sample from, made in `folder`."""
    name = cfg.model
    if name == "scratch":
        make_scratch(cfg, folder / "new")  # on each rank the same
        cfg.model = str(folder / "new")
    run = Run(cfg)
    if run.rank == 0:
        add_markers(resolve_model(cfg.model), folder / "marked", cfg.mode)
    cfg.model = run.gather(str(folder / "marked"))[0]  # once it is there
    model, sampler = run.load(BY_SIZE)
    model.checkpointing = False  # recomputing, append would use later lengths
    cfg.model = name  # as given, for run.json
    return run, model, sampler


def train(cfg: Config) -> int:
    """Repeat: write rows of the stage, descend eq. 3, go on once it is learnt."""
    check_flags(cfg)
    temporary = tempfile.TemporaryDirectory()
    run, model, sampler = start_run(cfg, Path(temporary.name))
    task = set_by_task(cfg)
    prompter, last = ThoughtPrompter(model, task, cfg), cfg.max_stage + 1
    decay = cfg.weight_decay
    optimizer = AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=decay, fused=True)
    state = {"stage": prompter.stage, "since": 0, "recent": []}
    state |= run.start(model, optimizer, prompter)
    stage, since, recent = state["stage"], state["since"], state["recent"]
    prompter.stage = stage
    run.refresh(sampler, model)

    for step in range(state["step"] + 1, cfg.steps + 1):
        began, drawn = time.time(), stage
        rng = Random(f"mix {cfg.seed} {step}")  # the same on every rank
        if cfg.mode in CURRICULUM and rng.random() < cfg.uniform_prob:
            drawn = rng.randint(0, last)
        numbers = range((step - 1) * cfg.batch_size, step * cfg.batch_size)
        rows = [prompter.row(task.problem("train", cfg.seed, i), drawn) for i in numbers]
        metrics = descend(run, model, optimizer, rows)
        run.refresh(sampler, model)
        metrics["stage"] = drawn
        metrics["tokens_per_s"] = metrics["tokens"] / (time.time() - began)
        run.log(step, metrics, ("loss", "rows_right", "stage", "tokens_per_s"))
        if step % 100 == 1 and cfg.eval_problems:
            two = list(enumerate(heldout(task, min(2, cfg.eval_problems))))
            done = rollout(run, sampler, prompter, two, 1, cfg.max_new_tokens, 0)
            run.keep_samples(step, prompter, done, [0.0] * len(done))

        if drawn == stage:
            recent = [*recent, metrics["rows_right"]][-GATE_STEPS:]
        if cfg.mode in CURRICULUM and stage < last:
            following = next_stage(stage, recent, step - since, cfg.gate, cfg.stage_steps)
            if following > stage:
                run.say(f"stage {stage} of {last} ends")
                evaluate(run, sampler, prompter, step)  # with the thoughts of this stage
                stage, since, recent = following, step, []
                prompter.stage = stage
        if run.after_step(step, model, optimizer, stage=stage, since=since, recent=recent):
            break  # Ctrl-C
        if cfg.eval_every and step % cfg.eval_every == 0 and step < cfg.steps:
            evaluate(run, sampler, prompter, step)
    code = run.report(sampler, prompter)
    run.gather(0)  # the other ranks may still load the start from rank 0's folder
    return code


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


one_pass, Model.forward = Model.forward, think
plain_log, Run.log = Run.log, log_tokens


if __name__ == "__main__":
    os._exit(main(train, Config))  # threads of gloo may abort sys.exit
