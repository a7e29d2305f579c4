"""Reward models of pairs (AceCoder, arXiv:2502.01718), outcomes (2110.14168), steps (2305.20050).

A number, read from the hidden state of the last token of an answer or step, learns what a verifier
says of training answers, and then ranks answers that nobody can verify.

    r    = w . h + b       h: after the final norm, at the last token before padding (1)
    l    = -log sigma(r_w - r_l - m) + c (r_w + r_l)^2     better and worse answer   (2)
    l    = BCE(sigma(r), o)      o: right or not, or the share of tests passed       (3)
    l    = BCE(sigma(r_t), o_t)  at the end of each labelled step t                  (4)
    loss = mean of l over the pairs, answers or steps of the batch                   (5)
    pair if s_w > s_l + 0.4, s_w > 0.8, s_l > 0;  s: share of tests passed           (6)
    AUC  = P(r(right) > r(wrong)) of answers to one problem; ties count half         (7)

c keeps scores around 0. Without a file, right answers to training problems are paired with wrong
ones. That cut answers are wrong is soon learnt, so at least half of the losers ended.

Run
    python more/reward_model.py                                   # CPU, minutes
    python more/reward_model.py --model Qwen2.5-1.5B --data FILE  # one GPU
    Lines of FILE, texts or (--chat) messages, by --kind:
    pair     {"prompt", "chosen", "rejected"[, "margin"]}
    outcome  {"prompt", "completion", "label"}
    process  {"prompt", "completions": [steps], "labels": [true, false or null]}
    pair or outcome: AceCode's {"question", "inferences": [{"completion", "pass_rate"}]}
    The last checkpoint, a model with value_head.safetensors, is the reward model.

Expect
    Seeds 0, 1, 2, 5 minutes of one core each: AUC where both ended 0.82, 0.82, 0.80;
    best of 16 0.900, 0.930, 0.885; mean 0.636, 0.625, 0.634; vote 0.975, 0.950, 0.955.

Differs from the papers in: no dropout; pairs count alike, not questions (AceCoder eq. 2).
Legend: B rows, T tokens, E scored tokens, N pairs, answers or steps; the others as in grpo.py.
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
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, field, fields
from fractions import Fraction
from functools import partial
from itertools import chain, permutations
from operator import attrgetter, ge, gt
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
    mean,
    micro_batches,
    open_thinking,
    prompt,
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
    model: str = option("tiny-rl", "one of models/, a folder, a hub name")
    task: str = option("countdown", "of sampled answers")
    data: str = option("", "JSONL file, else sampled answers")
    chat: bool = option(False, "use the model's chat template")
    max_length: int = option(2048, "longest row of --data, in tokens", 2)
    heldout_share: float = option(0.05, "of the prompts of --data, to evaluate")
    sample: int = option(0, "training problems to answer, 0: by size")
    attempts: int = option(8, "answers to each", 2)
    cap: int = option(4, "pairs per prompt, of losers that end or not", 1)
    max_new_tokens: int = option(0, "longest completion, 0: by size")
    temperature: float = option(1.0, "of sampling", 0.01)
    batch_size: int = option(0, "examples per step, 0: by size")
    micro_batch_tokens: int = option(0, "padded tokens per pass, 0: by size")
    steps: int = option(-1, "0: only evaluate, -1: by --epochs", -1)
    epochs: int = option(1, "passes over the examples", 1)
    lr: float = option(0.0, "learning rate, 0: by size")
    warmup_steps: int = option(6, "steps of linear warm-up")
    eval_problems: int = option(200, "held-out problems, without --data")
    eval_samples: int = option(16, "answers to each (N)", 1)
    save_every: int = option(50, "steps between checkpoints, or 0")
    seed: int = option(0, "seed of head, sampling and order")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "auto: cuda if any")
    out: str = option("", "run folder, default out/SCRIPT-TASK-SEED-TIME")
    resume: str = option("", "run folder to go on with")
    kind: Literal["pair", "outcome", "process"] = option("pair", "eq. 2, 3 or 4")
    pair_rule: Literal["strict", "inclusive", "any"] = option("strict", "eq. 6")
    centre: float = option(0.01, "c of eq. 2")


BY_SIZE = {  # below 10 M parameters, below 1 B, above
    "lr": (3e-4, 2e-5, 1e-5),
    "batch_size": (10, 32, 64),
    "sample": (240, 240, 2048),
    "max_new_tokens": (320, 256, 1024),
    "micro_batch_tokens": (2048, 2048, 16384),
}


# ------------------------------------------------------------ algorithm


def step_hidden(model: "Model", rows: list[list[int]], ends: list[list[int]]) -> Tensor:
    """h of eq. 1, (E, C), at the tokens `ends` of B rows of ids."""
    hidden = model(pad_rows(rows, model.lm_head.weight.device, torch.long))  # (B, T, C)
    chosen = torch.cat([hidden[i, at] for i, at in enumerate(ends)])
    return chosen.to(torch.promote_types(chosen.dtype, torch.float32))


def last_hidden(model: "Model", rows: list[list[int]]) -> Tensor:
    """h of eq. 1, (B, C): found by length, as padding may have an end's id."""
    return step_hidden(model, rows, [[len(row) - 1] for row in rows])


def pair_loss(r_w: Tensor, r_l: Tensor, margin=0.0, centre=0.0) -> Tensor:
    """Eq. 2 (AceCoder's; margin and centre: TRL's) of each pair, (N,)."""
    # logsigmoid is finite where log(sigmoid) is not
    return -F.logsigmoid(r_w - r_l - margin) + centre * (r_w + r_l) ** 2


def outcome_loss(r: Tensor, labels: Tensor) -> Tensor:
    """Eq. 3 of each answer, (N,); labels (N,) in [0, 1]."""
    return F.binary_cross_entropy_with_logits(r, labels, reduction="none")


def process_loss(r: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Eq. 4 of each step, any shape; 0 where the mask is 0."""
    return outcome_loss(r, labels.clamp(0, 1)) * mask


def margin_pairs(rates: list[Fraction], rule: str) -> list[tuple[int, int]]:
    """Eq. 6: pairs of answers (better, worse) by their shares of tests passed.

    strict: the paper; inclusive: its code (>=); any: no margins. Who passes none
    may be badly packed. Exact: in floats 0.85 - 0.45 is below 0.4.
    """
    over, found = gt if rule == "strict" else ge, []
    for w, x in permutations(range(len(rates)), 2):
        gap = rates[w] - rates[x]
        clear = over(gap, Fraction(2, 5)) and over(rates[w], Fraction(4, 5))
        if (clear and rates[x] > 0) or (rule == "any" and gap > 0):
            found.append((w, x))
    return found


def auc_within(groups: list[tuple[list[float], list[bool]]]) -> float:
    """Mean of eq. 7 over problems (scores, verdicts) with right and wrong answers.

    >>> auc_within([([2.0, 1.0, 1.0], [True, True, False]), ([0.0], [True])])
    0.75
    """
    found = []
    for scores, right in groups:
        answers = list(zip(scores, right, strict=True))
        good = [r for r, is_right in answers if is_right]
        bad = [r for r, is_right in answers if not is_right]
        if good and bad:
            found.append(mean((x > y) + (x == y) / 2 for x in good for y in bad))
    return mean(found)


def best_of(scores: list[float]) -> int:
    """The number of the highest score, the first of equals."""
    return max(range(len(scores)), key=scores.__getitem__)


def majority(answers: list[str | None]) -> int:
    """The number of the first of the commonest answers; None is none."""
    votes = Counter(answer for answer in answers if answer is not None)
    return answers.index(votes.most_common(1)[0][0]) if votes else 0


def save_head(head: nn.Linear, folder: Path, about: dict) -> None:
    """Write the head beside its model, and what its user has to know."""
    path = folder / "value_head.safetensors"
    tensors = {f"summary.{name}": tensor for name, tensor in head.state_dict().items()}
    save_file(tensors, path)
    path.with_suffix(".json").write_text(json.dumps(about, indent=2))
    path.chmod(path.with_suffix(".json").stat().st_mode)  # was 0600


def load_head(folder: Path, width: int) -> tuple[nn.Linear, dict]:
    """The head in a folder, for a width, and its value_head.json."""
    path, head = folder / "value_head.safetensors", nn.Linear(width, 1)
    if not path.exists():
        raise BadInput(f"{folder}: no {path.name}; reward_model.py makes it")
    with reading(path):
        tensors = load_file(path)
        name = "summary" if "summary.weight" in tensors else "score"  # OpenRLHF's
        weight = tensors[f"{name}.weight"].float()
        bias = tensors.get(f"{name}.bias", torch.zeros(1)).float()
    if weight.shape != (1, width):  # nobody would notice a second number
        raise BadInput(f"{path}: weight {tuple(weight.shape)}, not (1, {width})")
    head.weight.data, head.bias.data = weight, bias
    about = path.with_suffix(".json")
    return head, read_json(about) if about.exists() else {}


def first_head(model: "Model", seed: int) -> nn.Linear:
    """The head of --model if it has one, else a new one as TRL's."""
    width = model.config["hidden_size"]
    if (model.folder / "value_head.safetensors").exists():
        return load_head(model.folder, width)[0]
    head, generator = nn.Linear(width, 1), torch.Generator().manual_seed(seed)
    nn.init.normal_(head.weight, std=(width + 1) ** -0.5, generator=generator)
    nn.init.zeros_(head.bias)
    return head


@torch.no_grad()
def score_rows(
    model: "Model", head: nn.Linear, rows: list[list[int]], max_tokens: int = 4096
) -> list[float]:
    """r of each row of ids, at its last token."""
    scores = [0.0] * len(rows)
    for batch in micro_batches([len(row) for row in rows], max_tokens):
        found = head(last_hidden(model, [rows[i] for i in batch]))[:, 0].tolist()
        for i, r in zip(batch, found, strict=True):
            scores[i] = r
    return scores


# -------------------------------------------------------------- examples


@dataclass
class Example:
    """A pair, the better first, or one row: ids of prompt and answer."""

    prompt: str
    rows: list[list[int]]
    labels: list[float]  # [m], [o], or o of each step, -1 without label
    ends: list[list[int]] = field(default_factory=list)  # of steps, else of rows
    ended: bool = True  # the worse row, by itself


def group_examples(
    cfg: Config, asked: str, answers: list[tuple], rule: str, margin=0.0
) -> list[Example]:
    """Of answers (row, rate, ended) to a prompt: each, or pairs."""
    if cfg.kind == "outcome":
        return [Example(asked, [row], [float(rate)]) for row, rate, _ in answers]
    rows, rates, ended = zip(*answers, strict=True)
    exact = [Fraction(rate).limit_denominator(1000) for rate in rates]
    pairs = [(w, x) for w, x in margin_pairs(exact, rule) if rows[w] != rows[x]]
    rng, examples = Random(f"{cfg.seed} {asked}"), []
    for side in (True, False):
        some = [(rows[w], rows[x]) for w, x in pairs if ended[x] == side]
        for pair in rng.sample(some, min(cfg.cap, len(some))):
            examples.append(Example(asked, [*pair], [margin], ended=side))
    return examples


def balanced(examples: list[Example], rng: Random) -> list[Example]:
    """Of pairs whose loser was cut at most as many as of others."""
    cut = [e for e in examples if not e.ended]
    ended = [e for e in examples if e.ended]
    return ended + rng.sample(cut, min(len(cut), len(ended)))


def sample_examples(run: "Run", sampler: "Model", prompter: "Prompter") -> list[Example]:
    """From answers to training problems; without an end they are wrong."""
    cfg, examples = run.cfg, []
    for numbers in in_groups(list(range(cfg.sample)), 64):
        problems = [(n, prompter.task.problem("train", cfg.seed, n)) for n in numbers]
        done = rollout(run, sampler, prompter, problems, cfg.attempts, cfg.max_new_tokens, 1)
        for group in in_groups(done, cfg.attempts):
            rule = cfg.pair_rule if "tests" in group[0].score else "any"
            answers = []
            for c in group:
                rate = c.score.get("passed", c.score["correct"]) / c.score.get("tests", 1)
                answers.append((c.prompt + c.tokens, rate * c.finished, c.finished))
            examples += group_examples(cfg, str(group[0].number), answers, rule)
        run.say(f"{numbers[-1] + 1} problems: {len(examples)} examples")
    examples = balanced(examples, Random(cfg.seed))
    if not examples:
        raise BadInput(f"--sample {cfg.sample}: no pair whose loser ended")
    return examples


def prompt_and_answer(prompter: "Prompter", asked: str | list, answer: str | list) -> tuple:
    """Both as texts; with --chat also from lists of messages."""
    if prompter.style != "chat":
        return prompter.start + asked, answer
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    before = fill_template(prompter.chat, asked, opens_reply=True)
    whole = fill_template(prompter.chat, asked + answer, opens_reply=False)
    if not whole.startswith(before):
        raise BadInput("the chat template rewrites earlier turns")
    return before, whole[len(before) :].rstrip()  # up to the end token


def line_examples(prompter: "Prompter", cfg: Config, ends: list, line: dict) -> list[Example]:
    """A line of --data; a whole answer is scored at its end token."""
    if cfg.kind == "process":
        return [step_example(prompter, line)]
    asked, rule, margin = line.get("prompt"), "any", float(line.get("margin", 0))
    if "inferences" in line:
        asked, rule = line["question"], cfg.pair_rule
        texts = [(x["completion"], x["pass_rate"]) for x in line["inferences"]]
    elif cfg.kind == "pair":
        texts = [(line["chosen"], 1), (line["rejected"], 0)]
    else:
        texts = [(line["completion"], line["label"])]
    answers = []
    for text, rate in texts:
        if margin < 0 or not 0 <= rate <= 1:
            raise BadInput(f"label {rate}: 0 to 1; margin {margin}: 0 or more")
        before, after = map(prompter.encode, prompt_and_answer(prompter, asked, text))
        if not after or after[-1] not in ends:
            after = after + ends[:1]
        answers.append((before + after, rate, True))
    return group_examples(cfg, str(asked), answers, rule, margin)


def step_example(prompter: "Prompter", line: dict) -> Example:
    """Steps are scored at their ends, never merged or doubled."""
    steps, labels = line["completions"], line["labels"]
    if len(steps) != len(labels):
        raise BadInput(f"{len(labels)} labels, {len(steps)} completions")
    separator = "\n" if prompter.style == "compact" else "\n\n"
    before, _ = prompt_and_answer(prompter, line["prompt"], "".join(steps))
    row, ends = prompter.encode(before), []
    for step in steps:
        for text in (step.removesuffix(separator), separator):
            row = row + prompter.encode(text)
        ends.append(len(row) - 1)
    labels = [-1.0 if label is None else float(label) for label in labels]
    return Example(str(line["prompt"]), [row], labels, [ends])


def file_examples(run: "Run", prompter: "Prompter", ends: list[int]) -> tuple[list, list]:
    """Examples to learn and, of other prompts, to hold out."""
    cfg, learnt, held = run.cfg, [], []
    lines = read_jsonl(cfg.data, partial(line_examples, prompter, cfg, ends))
    for example in chain(*lines):
        longest = max(map(len, example.rows))
        if longest <= cfg.max_length and max(example.labels, default=-1) >= 0:
            draw = Random(f"heldout {cfg.seed} {example.prompt}").random()
            (held if draw < cfg.heldout_share else learnt).append(example)
    counts = f"{len(lines)} lines, {len(learnt)} to learn, {len(held)} held out"
    if not learnt:
        raise BadInput(f"--data {cfg.data}: {counts}")
    run.say(f"{cfg.data}: {counts}")
    return learnt, held


# ------------------------------------------------------------- training


def judge(kind: str, r: Tensor, labels: Tensor, centre: float) -> dict[str, Tensor]:
    """Loss and more, each (N,), from scores (E,) and labels (N,)."""
    if kind == "pair":
        r_w, r_l = r.view(-1, 2).T
        seen = {"loss": pair_loss(r_w, r_l, labels, centre), "reward/chosen": r_w}
        return seen | {"reward/rejected": r_l, "pair_accuracy": (r_w > r_l).float()}
    mask = (labels >= 0).to(r.dtype)
    losses = outcome_loss(r, labels) if kind == "outcome" else process_loss(r, labels, mask)
    right = (r > 0) == (labels > 0.5)
    return {"loss": losses, "label_accuracy": right * mask, "reward": r * mask}


def judge_examples(
    run: "Run", model: "Model", head: nn.Linear, examples: list[Example], learn: bool
) -> dict[str, float]:
    """Means of `judge` over the examples; to learn, go back from eq. 5."""
    cfg, totals = run.cfg, Counter()
    count = sum(label >= 0 for e in examples for label in e.labels)  # N
    mine = examples[run.rank :: run.world]
    sizes = [len(e.rows) * max(map(len, e.rows)) for e in mine]
    for numbers in micro_batches(sizes, cfg.micro_batch_tokens):
        rows, ends, labels = [], [], []
        for i in numbers:
            rows += mine[i].rows
            ends += mine[i].ends or [[len(row) - 1] for row in mine[i].rows]
            labels += mine[i].labels
        with torch.set_grad_enabled(learn):
            r = head(step_hidden(model, rows, ends))[:, 0]  # (E,)
            seen = judge(cfg.kind, r, r.new_tensor(labels), cfg.centre)
        if learn:
            (seen["loss"].sum() / count).backward()
        totals.update({name: value.sum().item() / count for name, value in seen.items()})
    ranks = run.gather(totals)
    return {name: sum(rank[name] for rank in ranks) for name in max(ranks, key=len)}


def describe_ranking(done: list[Completion], scores: list[float], size: int) -> dict:
    """Eq. 7, and best of N beside a vote; an oracle has pass@N."""
    best, common, every, ended = [], [], [], []
    for group, r in zip(in_groups(done, size), in_groups(scores, size), strict=True):
        right = [c.score["correct"] for c in group]
        best.append(right[best_of(r)])
        common.append(right[majority([c.score["answer"] for c in group])])
        every.append((r, right))
        which = [i for i, c in enumerate(group) if c.finished]
        ended.append(([r[i] for i in which], [right[i] for i in which]))
    metrics = {"eval/best_of_n": mean(best), "eval/majority": mean(common)}
    return metrics | {"eval/auc": auc_within(every), "eval/auc_finished": auc_within(ended)}


def evaluate_head(
    run: "Run", task, model: "Model", head: nn.Linear, held: list, done: list, step: int
) -> dict:
    """Metrics of held-out examples, or of answers to held-out problems."""
    if not held and not done:
        return {}
    rows = [row for e in held for row in e.rows]
    rows += [c.prompt + c.tokens for c in done]
    r = score_rows(model, head, rows)
    if held:
        found = judge_examples(run, model, head, held, learn=False)
        metrics = {f"eval/{name}": value for name, value in found.items()}
    else:
        metrics = describe_evaluation(done, run.cfg.eval_samples, task)
        metrics |= describe_ranking(done, r, run.cfg.eval_samples)
    both = torch.tensor([r, [len(row) for row in rows]])
    metrics["eval/length_correlation"] = torch.corrcoef(both)[0, 1].item()
    run.log(step, metrics, ("eval/loss", "eval/auc_finished", "eval/best_of_n"))
    return metrics


def report(run: "Run", prompter: "Prompter", trained: tuple, examples: list, held: list) -> int:
    """Evaluate after and before, save the head; the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    cfg, task, done, (model, head) = run.cfg, prompter.task, [], trained
    start = load_model(model.folder, run.device).to(run.dtype)
    start.compute_dtype = run.dtype
    if cfg.eval_problems and not cfg.data:
        problems = list(enumerate(heldout(task, cfg.eval_problems)))
        done = rollout(run, start, prompter, problems, cfg.eval_samples, cfg.max_new_tokens, 0)
    after = before = evaluate_head(run, task, model, head, held, done, cfg.steps)
    if cfg.steps:
        first = first_head(start, cfg.seed).to(run.device)
        before = evaluate_head(run, task, start, first, held, done, 0)
        rows = [row for e in examples[:256] for row in e.rows]
        scores = torch.tensor(score_rows(model, head, rows))
        about = {"kind": cfg.kind, "style": prompter.style}
        about |= {"mean": scores.mean().item(), "std": scores.std().item()}
        if run.rank == 0:
            save_head(head, checkpoints(run.folder)[-1], about)
    for name, value in after.items():
        run.say(f"{name:28}{before[name]:8.3f} -> {value:8.3f}")
    run.say(f"go on: python {sys.argv[0]} --resume {run.folder} --epochs {cfg.epochs + 1}")
    return 0


def train(cfg: Config) -> int:
    """Once: read or sample examples. Repeat: score a batch, descend (5)."""
    if cfg.kind == "process" and not cfg.data:
        raise BadInput("--kind process needs --data")
    run = Run(cfg)
    model, sampler = run.load(BY_SIZE)
    task = make_task(cfg.task, natural=not model.is_tiny)
    prompter = Prompter(model, task, cfg.chat)
    head = first_head(model, cfg.seed).to(run.device)
    examples, held, extra = [], [], {}
    if cfg.data:
        examples, held = file_examples(run, prompter, model.eos_ids)
    trained = nn.ModuleList([model.model, head])  # not lm_head
    optimizer = AdamW(trained.parameters(), weight_decay=0.01, fused=True)
    state = run.start(model, optimizer, prompter)
    if "head" in state:
        head.load_state_dict(state["head"])
    if not cfg.data and cfg.steps:
        examples = [Example(*parts) for parts in state.get("examples", [])]
        examples = examples or sample_examples(run, sampler, prompter)
        extra["examples"] = [list(astuple(example)) for example in examples]
    size = cfg.batch_size
    if cfg.steps < 0:
        cfg.steps = math.ceil(cfg.epochs * len(examples) / size)
    run.say(f"{len(examples)} examples, {cfg.steps} steps of {size}")
    order = []
    for epoch in range(1 + cfg.steps * size // max(1, len(examples))):
        order += epoch_order(len(examples), cfg.seed, epoch)

    for step in range(state["step"] + 1, cfg.steps + 1):
        began = time.time()
        batch = [examples[i] for i in order[(step - 1) * size : step * size]]
        left = (1 + cfg.steps - step) / cfg.steps
        lr = cfg.lr * min(1.0, step / max(1, cfg.warmup_steps), left)
        metrics = judge_examples(run, model, head, batch, learn=True)
        metrics["grad_norm"] = run.update(trained, optimizer, lr)
        metrics["lr"], metrics["epoch"] = lr, step * size / len(examples)
        metrics["tokens"] = sum(len(row) for e in batch for row in e.rows)
        metrics["tokens_per_s"] = metrics["tokens"] / (time.time() - began)
        run.log(step, metrics, ("loss", "pair_accuracy", "label_accuracy", "tokens_per_s"))
        if run.after_step(step, model, optimizer, head=head.state_dict(), **extra):
            return run.report(sampler, prompter)  # Ctrl-C
    return report(run, prompter, (model, head), examples, held)


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


if __name__ == "__main__":
    os._exit(main(train, Config))  # threads of gloo may abort sys.exit
