"""Budget forcing at test time: s1 (arXiv:2501.19393 sec. 3), with its baselines and its metrics.

A model thinks, writes an end-of-thinking delimiter, and answers. Only that boundary is touched, nothing is trained.
Too long: at M thinking tokens the delimiter and the answer's beginning are appended. Too short: the delimiter the
model wrote is taken away again, "Wait" is appended, and the model goes on, up to n times.

    Control     = 100 mean over runs of [a_min <= a <= a_max]       a = thinking tokens of a run (mean)       (1)
    Scaling     = mean over pairs of runs b > a of (f(b) - f(a)) / (b - a)        f = its accuracy            (2)
    Performance = max f                                                                                       (3)
    f(n) - f(0) = (1 - f(0)) g - f(0) h     g = wrong answers that n Waits repair, h = right ones they flip   (4)

Eq. 2 is printed twice: per 1000 tokens as written, and per doubling (x = log2 a), which is what the paper's table has.
Beside it: the delimiter suppressed without a string, or with a random word; majority vote, the likeliest of k, any
right of k; resampling until a trace is short enough; the length as an instruction (--length_prompt).

Run
    python budget_forcing.py                                    # models/tiny-rl and models/tiny, one thread, minutes
    python budget_forcing.py --model Qwen2.5-1.5B --task countdown     # one GPU
    torchrun --standalone --nproc_per_node=8 budget_forcing.py --model Qwen2.5-1.5B --task countdown
    an s1 model: --think_start "<|im_start|>think" --think_stop "<|im_start|>" --think_end "<|im_start|>answer"

Expect
    4 minutes of CPU time, one thread of an AMD EPYC, mean of seeds 0 to 2, 200 held-out problems. tiny-rl, M = 16 to
    512: accuracy 0.18 -> 0.72; one Wait 0.60, because it stops on hits: there is little to repair, much to flip. tiny,
    which gives up on misses: 0.11 -> 0.37, one Wait 0.49 (no string 0.39, random word 0.30), four 0.31. See README.md.

Differs from the paper in: one budget for all rounds (its README; --budget_mode per_round is its evaluation code),
temperature 1 on the tiny models, and tags in place of "Final Answer:" (--final_prefix).

Legend: B rows, T tokens, P prompts, C hidden size, V vocabulary, H query heads, K key heads, D head size.
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
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from difflib import get_close_matches
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import combinations
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

from rewards import ASSISTANT_PREFIX, BadInput, canonical_expression, heldout, make_task, pass_at_k, prompt


def flag(default, help: str, least: float = 0):
    """A field of Config: its default, its help, and the least number allowed."""
    return field(default=default, metadata={"help": help, "least": least})


@dataclass
class Config:
    model: str = flag("tiny-rl,tiny", "one or several, with commas: tiny-rl, a folder, owner/name, or a short name")
    task: str = flag("countdown", "countdown, multiplication, gsm8k or math, with knobs: countdown:high=20")
    data: str = flag("", "JSONL file of the problems (gsm8k, math)")
    chat: bool = flag(False, "put prompts into the model's chat template")
    max_new_tokens: int = flag(0, "longest completion: thinking and answer, 0 = by model size")
    temperature: float = flag(1.0, "sampling temperature, 0 = greedy")
    eval_problems: int = flag(200, "held-out problems", 1)
    eval_samples: int = flag(4, "completions per problem that vote", 1)
    seed: int = flag(0, "seed of the sampling; the problems stay the same")
    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", "auto is cuda where there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "of the products; weights stay float32")
    timeout: int = flag(10, "minutes after which a rank that hangs ends the run", 1)
    out: str = flag("", "run folder; none = the next free out/budget_forcing-TASK-SEED")
    resume: str = flag("", "run folder to go on with, or auto for the newest")
    check: bool = flag(False, "everything on two problems in a temporary folder, with the memory plan")
    caps: str = flag("", "thinking budgets M, rising, none = by model size")
    waits: str = flag("1,2,4", "numbers n of Waits at the largest budget")
    budget_mode: Literal["global", "per_round"] = flag("global", "M for all rounds together, or anew after each Wait")
    wait_str: str = flag("", "string appended in place of the delimiter, none = by model: wait, Wait")
    word_str: str = flag("", "random word as its control, none = by model: z, Table")
    think_start: str = flag("", "text that opens the thinking, none = as the prompt has it")
    think_end: str = flag("</think>", "text that ends the thinking")
    think_stop: str = flag("", "text at which the model's thinking counts as ended, none = think_end")
    final_prefix: str = flag("<answer>", "text behind think_end where the budget ended the thinking")
    tries: int = flag(16, "samples per problem in rejection sampling", 1)
    length_prompt: bool = flag(False, "also ask for at most M tokens in the prompt, without forcing")

    # what the block `run` asks of scripts that train
    steps, micro_batch_tokens, checkpointing = 0, 0, "off"


BY_SIZE = {  # parameters: below 10 M (made here), below 1 B, above
    "caps": ("16,32,64,128,256,512", "32,64,128,256", "256,512,1024,2048,4096"),
    "max_new_tokens": (544, 320, 4608),
}


# ------------------------------------------------------------------------------------------------- algorithm


@dataclass
class Rules:
    """The limits and strings of one completion."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    eos_ids: list[int]
    max_thinking: int  # M
    max_answer: int
    n_wait: int | None = None
    wait: str = ""  # "" = the delimiter is taken away and nothing appended
    mode: str = "global"  # or per_round, or reject: sample again until at most M tokens, delimiter included
    think_end: str = "</think>"
    think_stop: str = ""
    final_prefix: str = "<answer>"
    answer_stop: tuple[str, ...] = ()
    tries: int = 1

    def __post_init__(self):
        self.stop = self.think_stop or self.think_end
        ids = self.encode(self.stop)
        self.stop_ids = {*self.eos_ids, *(ids if len(ids) == 1 else ())}  # one token: no text to search
        self.stop_text = self.stop if len(ids) > 1 else ""
        self.held_ids = sorted({*self.eos_ids, *ids[:1]})  # never drawn while tokens are missing
        rounds = {"global": self.max_thinking, "per_round": self.max_thinking * ((self.n_wait or 0) + 1)}
        self.most_sampled = rounds.get(self.mode, (self.max_thinking + 1) * self.tries) + self.max_answer
        appended = (self.n_wait or 0) * len(self.encode(self.wait)) + 2 * len(self.boundary("length", "x")) + 8
        self.room = rounds.get(self.mode, self.max_thinking + 1) + self.max_answer + appended  # behind the prompt

    def boundary(self, finish: str, thought: str) -> list[int]:
        """What is appended behind the thinking: after a length stop a new line, and the answer's beginning."""
        if finish == "stop" or not self.think_end:
            return self.encode(self.think_end)
        return self.encode("\n" * (not thought.endswith("\n")) + self.think_end + self.final_prefix)


@dataclass
class Round:
    """One call of the reference's engine: tokens sampled in a row under one limit."""

    max_tokens: int
    min_tokens: int
    emitted: list[int] = field(default_factory=list)
    finish: str = ""


class Row:
    """One completion as a state machine: `take` gets each sampled token and edits `ids`, what the model is to read.

    Tokens that are appended are not sampled. The cache holds ids[:fed]. Source: arXiv:2501.19393 sec. 3.1, and
    simplescaling/s1: lm_eval/models/vllm_causallms.py (per_round, reject) and README.md (global).
    """

    def __init__(self, given: list[int], rules: Rules):
        self.rules, self.ids, self.start, self.fed = rules, list(given), len(given), len(given)
        self.logprobs: list[float] = []  # of ids[start:]; 0 where appended
        self.sampled: list[bool] = []
        self.rounds: list[Round] = []
        self.thinking, self.done, self.forced, self.was_cut = True, False, False, False
        self.waits, self.thought, self.answer_at = 0, "", len(given)
        least = int(rules.mode == "per_round" and rules.n_wait is not None)  # there n = 0 differs from none
        self.begin(rules.max_thinking + (rules.mode == "reject"), least)

    def begin(self, max_tokens: int, min_tokens: int) -> None:
        self.rounds.append(Round(max_tokens, min_tokens))

    @property
    def held(self) -> bool:
        """Whether the next token may not end the round."""
        return len(self.rounds[-1].emitted) < self.rounds[-1].min_tokens

    def take(self, token: int, logprob: float) -> None:
        now = self.rounds[-1]
        now.emitted.append(token)
        self.append([token], [logprob])
        full = len(now.emitted) == now.max_tokens
        if self.thinking:
            found = self.find_stop(token)
            if found or full:
                now.finish = "stop" if found else "length"
                self.end_round(now, *(found or (len(self.ids), "")))
            return
        ended = token in self.rules.eos_ids
        if self.rules.answer_stop and not ended:
            text = self.rules.decode(self.ids[max(self.answer_at, len(self.ids) - 32) :])
            ended = any(word in text for word in self.rules.answer_stop)
        if ended or full:
            now.finish, self.done = "stop" if ended else "length", True

    def find_stop(self, token: int) -> tuple[int, str] | None:
        """Where in `ids` the delimiter begins, and the text that shares a token with it; None while there is none."""
        if token in self.rules.stop_ids:
            return len(self.ids) - 1, ""
        word, least = self.rules.stop_text, max(self.start, len(self.ids) - 32)
        if not word or word not in self.rules.decode(self.ids[least:]):
            return None
        at = next(i for i in range(len(self.ids) - 1, -1, -1) if word in self.rules.decode(self.ids[i:]))
        return at, self.rules.decode(self.ids[at:]).partition(word)[0]

    def end_round(self, now: Round, at: int, shared: str) -> None:
        """Thinking stopped before ids[at]: sample it again, extend it, or go over to the answer."""
        rules, thinking_left = self.rules, self.rules.max_thinking
        if rules.mode == "reject" and len(now.emitted) > rules.max_thinking:
            self.cut(self.start)
            self.done = len(self.rounds) == rules.tries
            return None if self.done else self.begin(now.max_tokens, 0)
        if rules.mode == "global":
            thinking_left -= sum(len(r.emitted) for r in self.rounds)  # delimiters count, Waits do not
        if now.finish == "stop" and self.waits < (rules.n_wait or 0) and thinking_left > 0:
            self.cut(at, shared)
            self.append(rules.encode(rules.wait))
            self.waits += 1
            return self.begin(thinking_left, 1)
        self.thought = rules.decode(self.ids[self.start : at]) + shared
        if rules.mode == "per_round" and len(self.ids) - self.start > rules.max_thinking:  # the text is not cut
            self.was_cut, at, shared = True, min(at, self.start + rules.max_thinking), ""
        self.cut(at, shared)
        self.answer_at, self.thinking, self.forced = len(self.ids), False, now.finish == "length"
        self.append(rules.boundary(now.finish, self.thought))
        self.begin(rules.max_answer, 0)

    def cut(self, at: int, text: str = "") -> None:
        """Forget ids[at:], also in the cache; put back the text of a token that was half the delimiter's."""
        del self.ids[at:], self.logprobs[at - self.start :], self.sampled[at - self.start :]
        self.fed = min(self.fed, at)
        self.append(self.rules.encode(text))

    def append(self, ids: list[int], logprobs: list[float] | None = None) -> None:
        self.ids += ids
        self.logprobs += logprobs or [0.0] * len(ids)
        self.sampled += [logprobs is not None] * len(ids)

    @property
    def thinking_tokens(self) -> int:
        """Tokens sampled for the thinking that was kept, delimiters included."""
        calls = self.rounds[: len(self.rounds) - (not self.thinking)]
        return sum(len(r.emitted) for r in (calls[-1:] if self.rules.mode == "reject" else calls))

    def text(self) -> str:
        ids = self.ids[: len(self.ids) - (self.ids[-1] in self.rules.eos_ids)]
        return self.thought + self.rules.decode(ids[self.answer_at :])


class SomeRows:
    """Some rows of a cache, as a cache: what is appended lands behind their own lengths."""

    def __init__(self, cache: "Cache", rows: list[int], lengths: list[int], width: int):
        device = cache.lengths.device
        self.cache, self.rows, self.width = cache, torch.tensor(rows, device=device)[:, None], width
        self.lengths = torch.tensor(lengths, device=device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values, rows = self.cache.keys[layer], self.cache.values[layer], self.rows
        slots = self.lengths[:, None] + torch.arange(k.shape[2], device=k.device)  # (B, T)
        keys[rows, :, slots], values[rows, :, slots] = k.transpose(1, 2), v.transpose(1, 2)
        return keys[rows[:, 0], :, : self.width], values[rows[:, 0], :, : self.width]


def feed(model: "Model", cache: "Cache", live: list[Row]) -> None:
    """What was appended to a row, all but its last token, goes through the model in one pass with other such rows."""
    late = [i for i, row in enumerate(live) if len(row.ids) - row.fed > 1]
    if late:
        pieces = [live[i].ids[live[i].fed : -1] for i in late]
        longest, fed = max(map(len, pieces)), [live[i].fed for i in late]
        tokens = torch.tensor([p + [0] * (longest - len(p)) for p in pieces], device=cache.lengths.device)
        model(tokens, cache=SomeRows(cache, late, fed, max(fed) + longest))


@torch.inference_mode()
def force_budget(model: "Model", rows: list[Row], uniforms: Tensor, temperature: float = 1.0) -> None:
    """Run every row to its end. uniforms (B, N): the i-th token that a row samples uses its i-th number, whatever was
    appended before; so a larger budget begins as a smaller one. All rows sample one token a step, each in its phase.
    """
    device, live, rules = model.lm_head.weight.device, list(rows), rows[0].rules
    on_cpu, capacity = device.type == "cpu", max(len(row.ids) + row.rules.room for row in rows)
    prompts = list(dict.fromkeys(tuple(row.ids) for row in rows))
    group = torch.tensor([prompts.index(tuple(row.ids)) for row in rows], device=device)
    banned = torch.zeros(model.config["vocab_size"], dtype=torch.bool, device=device)
    banned[rules.held_ids] = True  # (V,)

    with packed(model):
        cache, hidden = prefill(model, [list(p) for p in prompts], capacity)
        cache.select(group)
        s = Decoding(model, cache, uniforms, temperature)
        s.eos = s.eos[:0]  # the rows decide what ends them
        held = torch.tensor([[row.held] for row in live], device=device)  # (B, 1)

        def step() -> None:
            logits = model.logits(model(s.last, cache=cache)[:, 0], temperature or 1.0)
            emit(s, logits.masked_fill(held & banned, -torch.inf))

        advance = step
        for done in range(uniforms.shape[1]):
            if done == 2:  # one step has run eagerly
                advance = capture(step, device)
            if done:
                advance()
            else:
                emit(s, model.logits(hidden, temperature or 1.0)[group].masked_fill(held & banned, -torch.inf))
            drawn, logprobs = s.last[:, 0].tolist(), s.logprobs[s.rows, done].tolist()
            for row, token, logprob in zip(live, drawn, logprobs, strict=True):
                if not row.done:
                    row.take(token, logprob)
            alive = sum(not row.done for row in live)
            if not alive:
                break
            if on_cpu and alive <= 0.75 * len(live):
                s.finished[s.rows] = torch.tensor([row.done for row in live])
                s.drop_finished()
                live = [row for row in live if not row.done]
                held = held[: len(live)]
            feed(model, cache, live)
            s.last.copy_(torch.tensor([row.ids[-1:] for row in live]))
            cache.lengths.copy_(torch.tensor([len(row.ids) - 1 for row in live]))
            cache.width = max(len(row.ids) for row in live) if on_cpu else capacity
            held.copy_(torch.tensor([[row.held] for row in live]))
            for row in live:
                row.fed = len(row.ids)


def budget_metrics(runs: list[dict]) -> dict[str, float]:
    """Eq. 1 to 3 of runs {"a": tokens, "f": accuracy, "a_min", "a_max": limits or None}; scaling in units of f."""
    inside = [(r["a_min"] or 0) <= r["a"] <= (r["a_max"] or math.inf) for r in runs]
    pairs = [sorted(pair) for pair in combinations([(r["a"], r["f"]) for r in runs], 2)]
    rising = [(a, f, b, g) for (a, f), (b, g) in pairs if b > a]
    scaling = sum((g - f) / (b - a) for a, f, b, g in rising) * 1000
    log2 = sum((g - f) / math.log2(b / a) for a, f, b, g in rising)
    found = {"control": sum(inside) / len(runs), "performance": max(r["f"] for r in runs)}
    return found | {"scaling": scaling / max(1, len(pairs)), "scaling_log2": log2 / max(1, len(pairs))}


def vote(answers: list, scores: list[float] | None = None):
    """The answer with the largest sum of scores (none: the most frequent one), the first seen of equals; None does not
    vote.

    >>> vote(["5", "6", "6", "5", None]), vote(["4", "4", "9"], [0.1, 0.1, 0.9])
    ('5', '9')
    """
    sums = Counter()
    for answer, score in zip(answers, scores or [1] * len(answers), strict=True):
        if answer is not None:
            sums[answer] += score
    return max(sums, key=sums.get, default=None)


def best_of_n(answers: list, scores: list[float]):
    """The answer with the highest score, the first of equals; None is passed over."""
    valid = [(answer, score) for answer, score in zip(answers, scores, strict=True) if answer is not None]
    return max(valid, key=lambda pair: pair[1], default=(None, 0))[0]


# ------------------------------------------------------------------------------------------------ evaluation


def numbers(text: str, name: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    good = words and all(word.isdigit() and 0 < int(word) < 10**6 for word in words)
    found = [int(word) for word in words] if good else []
    need(good and found == sorted(set(found)), f"--{name} {text}: rising whole numbers are needed, as 1,2,4")
    return found


def settings(cfg: Config, caps: list[int]) -> list[tuple[str, int, dict]]:
    """(side, value, rules) of every row of the table, for one model. "any", "vote" and "best" use the samples of the
    largest cap: of the first k, is one right, what do most say, which is the likeliest.
    """
    found = [("cap", cap, {"max_thinking": cap}) for cap in caps]
    found += [(side, 2**i, {}) for side in ("vote", "best", "any") for i in range(1, cfg.eval_samples.bit_length())]
    waits = numbers(cfg.waits, "waits")  # the controls run once
    for side, text in (("wait", cfg.wait_str), ("none", ""), ("word", cfg.word_str)):
        counts = waits if side == "wait" else waits[:1]
        found += [(side, n, {"max_thinking": caps[-1], "n_wait": n, "wait": text}) for n in counts]
    found += [("reject", cap, {"max_thinking": cap, "mode": "reject", "tries": cfg.tries}) for cap in caps[1:-1]]
    return found + [("prompt", cap, {"max_thinking": caps[-1]}) for cap in caps if cfg.length_prompt]


def make_prompter(cfg: Config, model: "Model", tokens: int = 0) -> "Prompter":
    """The script's prompts, with `tokens` as an instruction, and --think_start in place of their own <think>."""
    prompter = Prompter(model, make_task(cfg.task, cfg.data, natural=not model.is_tiny), cfg.chat)
    ask, text = getattr(prompter.task, "question", None), prompter.text
    if tokens:
        prompter.task.question = lambda problem: f"{ask(problem)} Think for up to {tokens} tokens."
    if cfg.think_start:
        own = "<think>" if model.is_tiny else ASSISTANT_PREFIX
        prompter.text = lambda problem: text(problem).removesuffix(own) + cfg.think_start
    return prompter


def complete(
    run: "Run", model: "Model", prompter: "Prompter", rules: Rules, problems: list[dict], samples: int
) -> tuple[list[dict], list["Completion"]]:
    """Every problem `samples` times under `rules`: one record per completion on every rank, and rank 0's own."""
    mine = list(enumerate(problems))[run.rank :: run.world]
    encoded = {number: prompter.encode(prompter.text(problem)) for number, problem in mine}
    size = max(1, rows_at_once(model, max(map(len, encoded.values()), default=0) + rules.room) // samples)
    records, done = [], []
    for start in range(0, len(mine), size):
        part = [(n, problem, i) for n, problem in mine[start : start + size] for i in range(samples)]
        rows = [Row(encoded[n], rules) for n, _, _ in part]
        streams = [row_uniforms(run.cfg.seed, 0, n, i, rules.most_sampled) for n, _, i in part]
        force_budget(model, rows, torch.from_numpy(np.stack(streams)), run.cfg.temperature)
        bad = sum(not all(map(math.isfinite, row.logprobs)) for row in rows)
        if bad:
            raise FloatingPointError(f"{bad} of {len(rows)} rows met logits that are not finite")
        for (n, problem, sample), row in zip(part, rows, strict=True):
            text = row.text()
            score = prompter.task.score(text, problem)
            key = canonical_expression(score["answer"] or "") if "numbers" in problem else score["answer"]
            drawn = [p for p, sampled in zip(row.logprobs, row.sampled, strict=True) if sampled]
            records.append(
                {"number": n, "sample": sample, "correct": bool(score["correct"]), "answer": key, "waits": row.waits}
                | {"thinking": row.thinking_tokens, "forced": row.forced, "filled": not row.thinking}
                | {"answered": row.done and row.rounds[-1].finish == "stop" and not row.thinking}
                | {"sampled": sum(len(r.emitted) for r in row.rounds), "score": math.exp(mean(drawn or [-math.inf]))}
            )
            finished = records[-1]["answered"]
            done.append(Completion(n, problem, encoded[n], row.ids[row.start :], row.logprobs, finished, text, score))
    every = [record for part in run.gather(records) for record in part]
    return sorted(every, key=lambda r: (r["number"], r["sample"])), done


def pooled(side: str, k: int, natural: list[dict], samples: int) -> list[dict]:
    """The first k samples of each problem as one record: what they vote, or the likeliest, or whether one is right."""
    records = []
    for i in range(0, len(natural), samples):
        some = natural[i : i + k]
        answers, scores = [r["answer"] for r in some], [r["score"] for r in some]
        chosen = vote(answers) if side == "vote" else best_of_n(answers, scores)
        right = {r["answer"] for r in some if r["correct"]}
        sums = {name: sum(r[name] for r in some) for name in ("thinking", "sampled", "waits")}
        correct = bool(right) if side == "any" else chosen in right
        records.append(some[0] | sums | {"correct": correct, "answered": chosen is not None})
    return records


def outcome(records: list[dict], natural: list[dict]) -> dict[str, float]:
    """Means over the records, and eq. 4 against the same problems and random numbers at the largest cap."""
    error = float(np.std([r["correct"] for r in records], ddof=len(records) > 1)) / math.sqrt(len(records))
    found = {"accuracy": mean(r["correct"] for r in records), "accuracy_se": error}
    found["thinking_tokens"] = mean(r["thinking"] for r in records if r["filled"])
    found |= {name: mean(r[name] for r in records) for name in ("sampled", "waits", "forced", "answered", "filled")}
    if natural:
        change = [int(r["correct"]) - int(n["correct"]) for r, n in zip(records, natural, strict=True)]
        found |= {"gain": mean(change), "gain_se": float(np.std(change)) / math.sqrt(len(change))}
        wrong = [r["correct"] for r, n in zip(records, natural, strict=True) if not n["correct"]]
        right = [not r["correct"] for r, n in zip(records, natural, strict=True) if n["correct"]]
        found |= {"repaired": mean(wrong), "flipped": mean(right)}
    return found


def save_answers(run: "Run", step: int, setting: list, records: list[dict]) -> None:
    """step-N/records.json, from which --resume goes on; it appears whole or not at all."""
    if run.rank == 0:
        folder = run.folder / f"step-{step:06d}"
        shutil.rmtree(folder.with_suffix(".tmp"), ignore_errors=True)
        folder.with_suffix(".tmp").mkdir()
        write_atomically(folder.with_suffix(".tmp") / "records.json", json.dumps({"of": setting, "records": records}))
        folder.with_suffix(".tmp").rename(folder)


def saved_records(run: "Run", plan: list[list]) -> list[list[dict]]:
    """The records that a resumed run has, in order; what the logs hold beyond them is dropped."""
    found = []
    for setting in plan:
        path = run.folder / f"step-{len(found) + 1:06d}" / "records.json"
        try:
            saved = read_json(path)
            of, records = saved["of"], saved["records"]
        except (ValueError, KeyError):
            break
        need(of == setting, f"--resume {run.folder}: {path} is of {of}, not of {setting}")
        found.append(records)
    if run.rank == 0:
        for stale in checkpoints(run.folder)[len(found) :]:
            shutil.rmtree(stale)
        for log in (run.metrics, run.samples):
            cut_log(log, len(found))
    return found


def report(run: "Run", name: str, rows: list[tuple[str, int, dict]]) -> None:
    """The table of one model, then eq. 1 to 3 of each side that has several runs."""
    columns = "thinking_tokens sampled accuracy accuracy_se gain gain_se repaired flipped waits forced filled".split()
    run.say(f"\n{name}\n{'':14}" + "".join(f"{column.removeprefix('thinking_'):>12}" for column in columns))
    for side, value, found in rows:
        cells = (f"{found[c]:.{1 if c in columns[:2] else 3}f}" if c in found else "" for c in columns)
        run.say(f"{side:8}{value:6}" + "".join(f"{cell:>12}" for cell in cells))
    for side in dict.fromkeys(side for side, _, _ in rows):
        limited = side in ("cap", "reject", "prompt")
        of_side = [(value * limited, found) for s, value, found in rows if s == side and found["filled"]]
        points = [(limit, found["thinking_tokens"], 100 * found["accuracy"]) for limit, found in of_side]
        runs = [{"a": a, "f": f, "a_min": None, "a_max": limit} for limit, a, f in points]
        if len(runs) > 1:
            m = budget_metrics(runs)
            control = f"Control {100 * m['control']:.0f} %, " * limited
            scaling = f"Scaling {m['scaling']:+.1f} points per 1000 tokens, {m['scaling_log2']:+.1f} per doubling"
            run.say(f"{side:8}{control}{scaling}, Performance {m['performance']:.1f} %")


def solve(cfg: Config) -> int:
    """Algorithm: for each model and each setting, think under its budget, answer, and count."""
    run, names = Run(cfg), [name for name in cfg.model.split(",") if name]
    need(names, f"--model {cfg.model}: a model is needed")
    model, sampler = run.load(names[0])
    chosen, first = run.choose(model, BY_SIZE), model
    caps = numbers(cfg.caps, "caps")
    room = f"--max_new_tokens {cfg.max_new_tokens} leaves no room for an answer behind --caps {cfg.caps}"
    need(cfg.max_new_tokens > caps[-1], f"{room}; try {caps[-1] + 32}")
    for text, tiny, real in (("wait_str", "wait", "Wait"), ("word_str", "z", "Table")):
        if not getattr(cfg, text):
            chosen[text] = tiny if model.is_tiny else real
            setattr(cfg, text, chosen[text])
    need(not (cfg.length_prompt and model.is_tiny), f"--length_prompt: {names[0]} was taught no words for a length")
    prompter = make_prompter(cfg, model)
    plan = [[name, side, value, rules] for name in names for side, value, rules in settings(cfg, caps)]
    cfg.steps = len(plan)
    run.open(model, prompter, chosen, f"{cfg.eval_problems} problems, {len(plan)} settings of {len(names)} model(s)")
    saved, problems, table = saved_records(run, plan) if cfg.resume else [], [], {name: [] for name in names}
    loaded, natural = names[0], []

    for step, (name, side, value, options) in enumerate(plan, 1):
        if name != loaded and step > len(saved):
            (model, sampler), loaded = run.load(name), name
            need(model.is_tiny == first.is_tiny, f"--model {cfg.model}: models with one kind of prompt are needed")
            prompter = make_prompter(cfg, model)
        whole = side == "cap" and value == caps[-1]  # what all that follows is compared with
        samples, began, done = cfg.eval_samples if whole else 1, time.time(), []
        natural = natural if side != "cap" else []
        if step <= len(saved):
            records = saved[step - 1]
        elif not options:
            records = pooled(side, value, natural, cfg.eval_samples)
        else:
            problems = problems or heldout(prompter.task, cfg.eval_problems)
            asked = make_prompter(cfg, model, value) if side == "prompt" else prompter
            strings = {"think_end": cfg.think_end, "think_stop": cfg.think_stop, "final_prefix": cfg.final_prefix}
            limits = {"max_answer": cfg.max_new_tokens - caps[-1], "mode": cfg.budget_mode}
            texts = prompter.encode, prompter.decode, model.eos_ids
            rules = Rules(*texts, **(limits | strings | options), answer_stop=prompter.stop)
            records, done = complete(run, sampler, asked, rules, problems, samples)
        shown = records[::samples]
        if side == "cap":  # the limit held, in every row
            assert all(r["thinking"] <= value for r in shown), max(r["thinking"] for r in shown)
        found = outcome(shown, natural[:: cfg.eval_samples])
        table[name].append((side, value, found))
        natural = records if whole else natural
        if step > len(saved):
            tag = f"{Path(name).name}/{side}"
            metrics = {f"{key.removesuffix('_se')}/{tag}" + "_se" * key.endswith("_se"): v for key, v in found.items()}
            per_s = sum(r["sampled"] for r in records) / max(1e-9, time.time() - began) if done else math.nan
            run.log(step, metrics | {"tokens_per_s": per_s}, show=(f"thinking_tokens/{tag}", f"accuracy/{tag}"))
            run.keep_samples(step, prompter, done[:2], [0.0] * len(done[:2]))
            if done and side in ("cap", "wait"):
                run.say(f"{name} {side} {value}: {prompter.line(done[0])}")
            save_answers(run, step, [name, side, value, options], records)
        run.signal = max(run.gather(run.signal))
        if run.signal and step < len(plan):
            return run.interrupted(step)
    run.bar.close()
    for name, rows in table.items():
        report(run, name, rows)
    files = f"log     {run.metrics}, {run.samples}\nreport  python docs/report.py {run.folder}"
    run.say("check passed" if cfg.check else f"\ntime    {time.process_time():.0f} s of CPU time\n{files}")
    return 0


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
    sys.exit(record(main)(solve, Config))
