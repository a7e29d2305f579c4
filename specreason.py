"""SpecReason: a small model writes the reasoning step by step, a large one judges every step (arXiv:2504.07891), and
speculative decoding, which does the same token by token and exactly (arXiv:2211.17192), alone and inside it.

A step of thinking need not be worded as the base model would word it, it only has to be good. So the draft model
writes a step, the base reads it in one pass and gives it 0 to 9 points; below the threshold the base writes it itself.

    step  = draft(text),  u = score_base(text, step);   keep it if u >= threshold, else step = base(text)      (1)
    u     = sum_d d p(d) / sum_d p(d)      the expected digit behind a request for one                         (2)
    u     = 10 F(min_t -e_t),  e_t = max(0, -log p(x_t) - H_t),  F that of the base's own steps                (3)
    token : keep x ~ q with probability min(1, p(x) / q(x)), at the first refusal draw from max(0, p - q)      (4)
    tokens per pass of the base = 1 + sum_k prod_i<=k alpha_i,   alpha = sum_x min(p(x), q(x))                 (5)
    speed-up: of (4) eq. 5 / (gamma c + v),   of (1) s / (c s + v + (1 - a) s)                                 (6)

c is the draft's cost of a token and v that of a pass over what was drafted, in tokens of the base; s tokens make a
step, a is the share accepted. (4) leaves the base's distribution as it is, to the last bit of arithmetic; (1) does not.

Run
    python specreason.py                                            # one CPU core, no network, minutes
    python specreason.py --model Qwen2.5-1.5B --task countdown      # one GPU; the draft is Qwen2.5-0.5B
    torchrun --standalone --nproc_per_node=8 specreason.py --model Qwen2.5-1.5B --score digit --threshold 7

Expect
    One busy thread of an AMD EPYC, seeds 0 to 2, 510 problems: accuracy of base 0.73, SpecReason 0.68 (-4.5 +- 2.3
    points), draft 0.42; SpecReason is 1.10, 1.34 and 1.12 times as fast as the base (eq. 6: 1.28, 1.40, 1.26),
    speculative decoding 1.45, 1.58 and 1.97 times (eq. 6: 1.68, 1.66, 1.58). README.md has controls and deeper bases.

Differs from the paper in: a tiny base is taught the digit (`graded_steps`); (3), which needs no teaching; a step keeps
its delimiter; one text serves both models, so it is cut by tokens, and nothing is tokenised twice.

Legend: T tokens, V vocabulary, C hidden size, P prompts, B rows, H query heads, K key heads, D head size.
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
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from difflib import get_close_matches
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from random import Random
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

from rewards import ASSISTANT_PREFIX, BadInput, heldout, make_task, pass_at_k, prompt, read_jsonl


def flag(default, help: str, least: float = 0):
    """A field of Config: its default, its help, and the least number allowed."""
    return field(default=default, metadata={"help": help, "least": least})


@dataclass
class Config:
    model: str = flag("tiny-rl", "base model: tiny-rl (made here), a folder, owner/name, or a short name")
    draft: str = flag("", "draft model with the same tokenizer, none = the smallest of the base's family")
    idle_layers: int = flag(0, "layers added to the base that change its time and not one word: a deeper base")
    task: str = flag("countdown", "countdown, multiplication, gsm8k or math, with knobs: countdown:high=20")
    data: str = flag("", "JSONL file of the problems (gsm8k, math)")
    chat: bool = flag(False, "put prompts into the model's chat template")
    max_new_tokens: int = flag(0, "kept tokens after which no step begins (paper: 8192), 0 = by model size")
    max_step_tokens: int = flag(0, "longest step (paper: 512), 0 = by model size")
    delimiter: str = flag("", "text that ends a step, none = a line (tiny) or an empty line")
    temperature: float = flag(1.0, "of both models (paper: 0.6), 0 = greedy")
    top_p: float = flag(1.0, "nucleus of both models (paper: 0.95)", 0.01)
    eval_problems: int = flag(170, "held-out problems for the base and --threshold", 1)
    sweep_problems: int = flag(20, "of these, how many for all other ways too", 1)
    save_every: int = flag(50, "problems between two looks at the log and records that --resume goes on from", 1)
    seed: int = flag(0, "seed of the held-out problems and of the sampling")
    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", "auto is cuda where there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "of the products")
    timeout: int = flag(10, "minutes after which a rank that hangs ends the run", 1)
    out: str = flag("", "run folder; none = the next free out/specreason-TASK-SEED")
    resume: str = flag("", "run folder to go on with, or auto for the newest")
    check: bool = flag(False, "two problems in every way, in a temporary folder, with the memory plan")
    score: Literal["likelihood", "digit"] = flag("likelihood", "u of eq. 3, or the digit of eq. 2")
    method: Literal["average", "greedy"] = flag("average", "reading of the digit in eq. 2")
    threshold: float = flag(0.3, "a step with fewer points is written again by the base (paper, for a digit: 7)")
    thresholds: str = flag("0.1,1,5", "thresholds of the sweep")
    first_n: int = flag(0, "steps at the beginning that the base writes unasked")
    gamma: int = flag(4, "drafted tokens per pass of the base in eq. 4", 1)

    checkpointing, micro_batch_tokens, eval_samples = "off", 0, 1  # what the machine below asks for in training


BY_SIZE = {  # parameters of the base: below 10 M (made here), below 1 B, above
    "max_new_tokens": (512, 512, 2048),
    "max_step_tokens": (48, 128, 512),
}
PARTS = "draft", "score", "base"
SHOWN = tuple(f"eval/{name}" for name in ("accuracy/base", "accuracy/specreason", "acceptance/specreason"))
DRAFTS = {"Qwen2.5": "Qwen2.5-0.5B", "Qwen3": "Qwen3-0.6B-Base", "SmolLM2": "SmolLM2-135M-Instruct"}
DIGIT_PROMPT = "\nUser: Rate only the last step above from 0 (wrong) to 9 (right), for correct facts and valid logic."
DIGIT_PROMPT += "\nAssistant: The quality score is: "  # for models that read; the tiny tokenizer has a token <score>


# ------------------------------------------------------------------------------------- algorithm: token by token


def distribution(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Probabilities (..., V) that a token is drawn from; both p and q of eq. 4. Temperature 0 is one-hot."""
    if not temperature:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    probs = (logits if temperature == 1 else logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, ordered / ordered.sum(-1, keepdim=True))
    return probs


def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """min(1, p/q) of eq. 4, elementwise; nan where the draft never draws."""
    return torch.where(q > 0, (p / q).clamp(max=1), torch.nan)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(0, p - q), normalised, (V,): what to draw from after a refusal; p itself where the two are the same."""
    rest = (p - q).clamp(min=0)
    return rest / rest.sum() if rest.sum() > 0 else p


def verify(p: Tensor, q: Tensor, drafted: Tensor, uniforms: Tensor) -> tuple[int, Tensor]:
    """Eq. 4: how many drafted tokens stay, and the distribution (V,) of the token behind them.

    p (n+1, V), q (n, V), drafted (n,), uniforms (n,) in [0, 1). Source: arXiv:2211.17192 algorithm 1.
    """
    n = len(drafted)
    places = torch.arange(n, device=p.device), drafted
    kept = int((uniforms < acceptance(p[places], q[places])).long().cumprod(0).sum())
    return kept, p[n] if kept == n else residual(p[kept], q[kept])


def expected_tokens(alphas: list[float]) -> float:
    """Eq. 5 for a round of len(alphas) drafted tokens.

    >>> round(expected_tokens([0.8] * 4), 4), round(expected_tokens([0.9, 0.5, 0.8]), 2)
    (3.3616, 2.71)
    """
    return 1 + sum(math.prod(alphas[: k + 1]) for k in range(len(alphas)))


def decoding_speedup(alphas: list[float], c: float, v: float = 1.0) -> float:
    """Eq. 6 for speculative decoding."""
    return expected_tokens(alphas) / (len(alphas) * c + v)


class Reader:
    """A model with its cache, which holds a prefix of the text, and its own stream of random numbers."""

    def __init__(self, model: "Model", capacity: int, size: int, cfg: Config, stream: tuple[int, ...]):
        self.model, self.size, self.cfg, self.known = model, size, cfg, 0
        self.cache = Cache(model, 1, capacity)
        self.uniforms = iter(partial(np.random.default_rng(stream).random, dtype=np.float32), None)  # row_uniforms

    def read(self, text: list[int], count: int = 1) -> Tensor:
        """Logits (count, V) behind each of the last `count` tokens; reads in one pass what it does not know yet."""
        start = min(self.known, len(text) - count)
        self.cache.lengths.fill_(start)
        self.cache.width, self.known = len(text), len(text)
        tokens = torch.tensor([text[start:]], device=self.cache.lengths.device)
        return self.model.logits(self.model(tokens, cache=self.cache)[0, -count:])[:, : self.size]

    def probs(self, text: list[int], count: int = 1) -> Tensor:
        return distribution(self.read(text, count), self.cfg.temperature, self.cfg.top_p)

    def draw(self, probs: Tensor) -> int:
        """One token from probs (V,), by this reader's next random number."""
        return int(draw(probs[None], torch.tensor([[next(self.uniforms)]], dtype=probs.dtype, device=probs.device)))

    def forget(self, length: int) -> None:
        """What was read beyond this many tokens is not part of the text."""
        self.known = min(self.known, length)


def write(reader: Reader, text: list[int], limit: int, ends: set[int]) -> list[int]:
    """Continue the text, token by token, up to one of `ends` or `limit` tokens."""
    step: list[int] = []
    while len(step) < limit and not (step and step[-1] in ends):
        step.append(reader.draw(reader.probs(text + step)[0]))
    return step


def write_speculatively(
    base: Reader, draft: Reader, text: list[int], limit: int, ends: set[int], gamma: int, rounds: list[tuple[int, int]],
) -> list[int]:  # fmt: skip
    """As write(base, ...), with the same distribution, but the draft proposes (eq. 4); rounds gets (drafted, kept)."""
    step: list[int] = []
    while len(step) < limit and not (step and step[-1] in ends):
        so_far, drafted, q = text + step, [], []
        while len(drafted) < gamma and not (drafted and drafted[-1] in ends):  # nothing behind an end
            q.append(draft.probs(so_far + drafted)[0])
            drafted.append(draft.draw(q[-1]))
        p = base.probs(so_far + drafted, len(drafted) + 1)
        uniforms = torch.tensor([next(base.uniforms) for _ in drafted], dtype=p.dtype, device=p.device)
        kept, behind = verify(p, torch.stack(q), torch.tensor(drafted, device=p.device), uniforms)
        rounds.append((len(drafted), kept))
        for reader in (base, draft):
            reader.forget(len(so_far) + kept)
        step += drafted[:kept]
        if not (step and step[-1] in ends):
            step.append(base.draw(behind))
    return step[:limit]


# --------------------------------------------------------------------------------------- algorithm: step by step


@dataclass
class Step:
    tokens: list
    writer: str
    score: float | None = None  # of the draft's step, kept or not; None if the base was not asked
    drafted: list | None = None  # the draft's step


def reason(
    prompt: list, write_draft: Callable, write_base: Callable, score: Callable, finished: Callable, settle: Callable,
    threshold: float, first_n: int = 0, token_budget: int = 8192, drop: tuple = (),
) -> tuple[list[Step], str]:  # fmt: skip
    """Eq. 1: the steps, and why they ended ("budget" or "finished"). Source: arXiv:2504.07891 sec. 4.1 and its code.

    write_x(text) and score(text, step) see the text so far; settle(length) cuts both caches to what is kept;
    finished(steps) looks at the last kept step. Tokens in `drop` (a closing tag without an answer) leave a kept step.
    """
    text, steps, kept, why = list(prompt), [], 0, ""
    while not why:
        step = Step([], "base")
        if len(steps) >= first_n:
            step.drafted = write_draft(text)
            step.score = score(text, step.drafted)
            if step.score >= threshold:
                step.tokens, step.writer = step.drafted, "draft"
        settle(len(text) + len(step.tokens))  # of a refused step nothing stays
        if step.writer == "base":
            step.tokens = write_base(text)
        kept += len(step.tokens)
        steps.append(step)
        why = "budget" if kept >= token_budget else "finished" if finished(steps) else ""
        if not why and step.score is not None and not set(drop).isdisjoint(step.tokens):
            settle(len(text) + next(i for i, token in enumerate(step.tokens) if token in drop))
            step.tokens = [token for token in step.tokens if token not in drop]
        text += step.tokens
    return steps, why


def read_digit(logprobs: Tensor, digits: list[int], method: str) -> float:
    """Eq. 2 from log-probabilities (V,), digits the ids of 0 to 9: among the ten likeliest tokens the expected digit,
    or (greedy) the likeliest token if it is a digit. 0 if there is none. Source: spec_reason.py of the paper.
    """
    top = logprobs.topk(min(10, len(logprobs)))
    if method == "greedy":
        first = int(top.indices[0])
        return float(digits.index(first)) if first in digits else 0.0
    found = [(digits.index(i), math.exp(p)) for p, i in zip(*map(Tensor.tolist, top), strict=True) if i in digits]
    mass = sum(p for _, p in found)
    return sum(d * p for d, p in found) / mass if mass else 0.0


def least_agreement(logits: Tensor, step: list[int]) -> float:
    """min_t -e_t of eq. 3 from logits (T, V): 0 where the base was never surer of something else than it is unsure."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(step, device=logits.device)[:, None])[:, 0]
    entropy = torch.special.entr(logprobs.exp()).sum(-1)
    return float((chosen + entropy).clamp(max=0).min())


def auc(values: list[float], right: list[bool]) -> float:
    """How often a right step has the higher value of a pair, ties half; nan without both kinds.

    >>> auc([1, 5, 5, 9], [False, False, True, True])
    0.875
    """
    good, bad = (sorted(v for v, r in zip(values, right, strict=True) if r == kind) for kind in (True, False))
    wins = sum(bisect_left(bad, v) + bisect_right(bad, v) for v in good) / 2
    return wins / (len(good) * len(bad)) if good and bad else math.nan


# ------------------------------------------------------------------------------------------------- the comparison


def share_vocabulary(base: "Model", draft: "Model") -> int:
    """Mask in both models what one of them cannot or must not draw; the number of ids that they have in common."""
    size = min(m.config["vocab_size"] for m in (base, draft))
    biases = [m.vocab_bias[:size] for m in (base, draft) if m.vocab_bias is not None]
    common = sum(biases) if biases else torch.zeros(size, device=base.lm_head.weight.device)
    for m in (base, draft):
        m.vocab_bias = F.pad(common, (0, m.config["vocab_size"] - size), value=-torch.inf)
    return size


def deepen(model: "Model", count: int) -> None:
    """Add layers whose outputs are zero: the same function at the cost of a deeper model, to see what that gains."""
    for _ in range(count):
        layer = copy.deepcopy(model.model["layers"][0])
        nn.init.zeros_(layer.self_attn["o_proj"].weight), nn.init.zeros_(layer.mlp["down_proj"].weight)
        model.model["layers"].append(layer)
    model.config["num_hidden_layers"] += count


def graded_steps(answers: str, path: str, seed: int) -> None:
    """Make lines that teach <score> (sft.py --data) of a draft's countdown answers (sft.py --sample --keep all).

    Each step is a line, with a solver's grade as the completion. What stands before is what a perfect judge leaves
    of the steps before it, from a random one on. models/README.md has the commands.
    """
    task, rng, rows = make_task("countdown"), Random(f"graded {seed}"), []

    def read(answer: dict) -> None:
        numbers, target = answer["prompt"].removesuffix("<think>").split("=")
        problem, kept = {"numbers": [*map(int, numbers.split(","))], "target": int(target)}, []
        for step in answer["completion"].splitlines(keepends=True):
            before, end = "".join(kept[rng.randint(0, len(kept)) :]), "<eos>" * ("</answer>" in step)
            grade = task.grade_step(problem, before, step)
            rows.append({"prompt": f"{answer['prompt']}{before}{step}{end}<score>", "completion": str(grade)})
            kept += [step] * (grade > 0)

    read_jsonl(answers, read)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def choose_draft(cfg: Config, base: "Model") -> str:
    """--draft, or tiny-draft for a tiny base, or the smallest model of the base's family."""
    family = next((name for name in DRAFTS if name in cfg.model), "")
    need(cfg.draft or base.is_tiny or family, f"--model {cfg.model}: name its draft with --draft (no default for it)")
    return cfg.draft or ("tiny-draft" if base.is_tiny else DRAFTS[family])


def ways(cfg: Config, task) -> dict[str, dict]:
    """What is compared: name -> settings of `solve_one`."""
    main = {"threshold": cfg.threshold, "first_n": cfg.first_n, "score": cfg.score}
    numbers = [t for t in cfg.thresholds.split(",") if t]
    need(all(t.replace(".", "", 1).isdecimal() for t in numbers), f"--thresholds {cfg.thresholds}: 1,3,5 is the form")
    all_ways = {"base": {}, "specreason": main, "draft": {}, "spec_decode": {"gamma": cfg.gamma}}
    all_ways |= {f"threshold {t:g}": main | {"threshold": t} for t in map(float, numbers) if t != cfg.threshold}
    all_ways |= {"coin": main | {"score": "coin"}, "hierarchical": main | {"gamma": cfg.gamma}}
    return all_ways | ({"oracle": main | {"score": "oracle", "threshold": 1.0}} if hasattr(task, "grade_step") else {})


class Contest:
    """Base and draft on one problem after the other, each problem solved in every way."""

    def __init__(self, cfg: Config, base: "Model", draft: "Model", prompter: "Prompter"):
        self.cfg, self.models, self.prompter = cfg, (base, draft), prompter
        self.size = share_vocabulary(base, draft)
        on_cpu = base.lm_head.weight.device.type == "cpu"  # CPU seconds where they are those of one thread
        self.clock = time.process_time if on_cpu and torch.get_num_threads() == 1 else time.perf_counter
        delimiter = cfg.delimiter or ("\n" if base.is_tiny else "\n\n")
        self.eos = set(base.eos_ids + draft.eos_ids)
        self.ends = self.eos | {i for i in range(self.size) if delimiter in prompter.decode([i])}
        self.marks = prompter.stop or tuple(prompter.decode([i]) for i in self.eos)
        self.drop = tuple(i for i in [prompter.tokenizer.token_to_id("</think>")] if i is not None)
        self.digits = [prompter.encode(str(d))[-1] for d in range(10)]
        self.suffix = prompter.encode("<score>" if base.is_tiny else DIGIT_PROMPT)
        self.quantiles: list[float] = []

    @torch.inference_mode()
    def knows_score(self) -> bool:
        """Whether a tiny base was taught <score> (models/README.md): then a text ends behind the digit."""
        text = self.prompter.encode(self.prompter.text(self.prompter.task.problem("train", self.cfg.seed, 0)))
        base, draft = (Reader(m, len(text) + 50, self.size, self.cfg, (0, 0, 0, 0)) for m in self.models)
        text += write(draft, text, 48, self.ends) + self.suffix + self.digits[9:]  # a whole step, as in training
        return float(base.read(text)[0].softmax(-1)[sorted(self.eos)].sum()) > 0.5

    def finished(self, steps: list[Step]) -> bool:
        """An answer or an end token, or (but for the tiny models, which do that and go on) the same step twice."""
        text = self.prompter.decode(steps[-1].tokens)
        same = len(steps) > 2 and steps[-1].tokens == steps[-2].tokens and not self.models[0].is_tiny
        return same or any(mark in text for mark in self.marks)

    def calibrate(self, numbers: range) -> None:
        """F of eq. 3, from the base's own steps on training problems."""
        for number in numbers:
            self.solve_one(number, self.prompter.task.problem("train", self.cfg.seed, number), "base", {})
            a = self.answer
            logits = self.readers[0].read(a.prompt + a.tokens, len(a.tokens) + 1)[:-1]
            parts = logits.split([len(step.tokens) for step in self.steps])
            self.quantiles += [least_agreement(part, s.tokens) for part, s in zip(parts, self.steps, strict=True)]
        self.quantiles.sort()

    def points(self, kind: str, rate: float, text: list[int], step: list[int]) -> float:
        """The draft's step as the base (or a control) marks it."""
        base = self.readers[0]
        if kind == "coin":  # as many steps as the score itself lets pass in this problem
            return 9.0 * (next(base.uniforms) < rate)
        if kind == "oracle":
            return self.grade(text, step)
        if kind == "digit":
            logits = base.read(text + step + self.suffix)[0]
            base.forget(len(text) + len(step))
            return read_digit(logits.log_softmax(-1), self.digits, self.cfg.method)
        own = least_agreement(base.read(text + step, len(step) + 1)[:-1], step)
        return min(9.0, 10 * bisect_right(self.quantiles, own) / len(self.quantiles))  # 1: as its worst tenth

    def grade(self, text: list[int], step: list[int]) -> int:
        """What a solver says of the step; no score but the oracle's may ask it."""
        texts = (self.prompter.decode([i for i in t if i not in self.eos]) for t in (text[len(self.given) :], step))
        return self.prompter.task.grade_step(self.problem, *texts)

    def solve_one(self, number: int, problem: dict, way: str, settings: dict, rate: float = 0.5) -> dict:
        """One answer, and what it cost. The random numbers belong to (seed, model, problem), whatever the way."""
        cfg, given, spent = self.cfg, self.prompter.encode(self.prompter.text(problem)), Counter()
        self.problem, self.given = problem, given
        capacity = len(given) + cfg.max_new_tokens + cfg.max_step_tokens + cfg.gamma + len(self.suffix) + 1
        open_one = partial(Reader, capacity=capacity, size=self.size, cfg=cfg)
        base, draft = self.readers = [open_one(m, stream=(cfg.seed, i, number, 0)) for i, m in enumerate(self.models)]
        rounds: list[tuple[int, int]] = []

        def timed(name: str, function: Callable, *more) -> Callable:
            def call(*args):
                began = self.clock()
                result = function(*args, *more)
                spent.update({f"seconds_{name}": self.clock() - began, f"calls_{name}": 1})
                return result

            return call

        limits = cfg.max_step_tokens, self.ends
        writer = partial(write, draft if way == "draft" else base)
        if "gamma" in settings:
            writer = partial(write_speculatively, base, draft, gamma=settings["gamma"], rounds=rounds)
        score = timed("score", partial(self.points, settings.get("score", ""), rate))
        began = self.clock()
        steps, why = reason(
            given, timed("draft", partial(write, draft), *limits), timed("base", writer, *limits), score, self.finished,
            lambda length: (base.forget(length), draft.forget(length)), settings.get("threshold", 0.0),
            settings.get("first_n", 0) if "score" in settings else 10**9, cfg.max_new_tokens, self.drop,
        )  # fmt: skip
        seconds = self.clock() - began
        tokens, judged = [t for step in steps for t in step.tokens], [step for step in steps if step.score is not None]
        text = self.prompter.decode([token for token in tokens if token not in self.eos])
        found = self.prompter.task.score(text, problem)
        row = {"accuracy": found["correct"], "seconds": seconds, "tokens": len(tokens), "drafted": len(judged)}
        row["accepted"] = sum(step.writer == "draft" for step in judged)
        row["discarded"] = sum(len(step.drafted) for step in judged if step.writer == "base")
        row |= {f"{what}_{part}": spent[f"{what}_{part}"] for what in ("seconds", "calls") for part in PARTS}
        row |= {"clipped_ratio": why == "budget", "rounds": len(rounds), "passed": sum(kept for _, kept in rounds)}
        row["tested"] = sum(min(n, kept + 1) for n, kept in rounds)  # those behind a refusal are not
        self.answer = Completion(number, problem, given, tokens, [], why == "finished", text, found)
        self.steps, self.rounds = steps, rounds
        marks, text = [], list(given)
        for step in steps if way == "specreason" and hasattr(self.prompter.task, "grade_step") else ():
            if step.score is not None:  # answer and time are settled: now a solver may say how good the marks were
                marks.append([step.score, self.grade(text, step.drafted) > 0])
            text += step.tokens
        return {name: float(value) for name, value in row.items()} | {"marks": marks}

    def sample(self) -> "Completion":
        """The last answer for samples.jsonl, with the base's log-probability of every token, whoever wrote it."""
        c = self.answer
        logprobs = self.readers[0].read(c.prompt + c.tokens, len(c.tokens) + 1)[:-1].log_softmax(-1)
        chosen = logprobs.gather(-1, torch.tensor(c.tokens, device=logprobs.device)[:, None])[:, 0]
        c.logprobs = chosen.clamp(min=-100).tolist()
        return c

    def costs(self, lengths: tuple[int, ...], repeats: int = 30) -> dict[str, float]:
        """Seconds (medians, in turn): a token of base and of draft, and a pass of the base over so many tokens."""
        text = self.prompter.encode(self.prompter.text(self.prompter.task.problem("train", self.cfg.seed, 0)))
        text = (text * (self.cfg.max_new_tokens // 2 // len(text) + 1))[: self.cfg.max_new_tokens // 2]
        base, draft = (Reader(m, len(text) + 1, self.size, self.cfg, (0, 0, 0, 0)) for m in self.models)
        jobs = {"base": lambda: write(base, text, 1, set()), "draft": lambda: write(draft, text, 1, set())}
        jobs |= {f"pass {n}": lambda n=n: (base.forget(len(text) - n), base.probs(text, n)) for n in lengths}
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(repeats):
            for name, job in jobs.items():
                began = self.clock()
                job()
                times[name].append(self.clock() - began)
        return {name: float(np.median(values[1:] or values)) for name, values in times.items()}


def compare(records: list[dict], costs: dict[str, float], step: int, gamma: int) -> dict[str, float]:
    """Means per way over the problems that it solved; gaps and ratios of seconds are to the base on the same ones."""
    found: dict[str, float] = {}
    for way in dict.fromkeys(name for r in records for name in r):
        rows, beside = zip(*((r[way], r["base"]) for r in records if way in r), strict=True)
        m = {key: mean(row[key] for row in rows) for key in rows[0] if key != "marks"}
        gaps = [row["accuracy"] - b["accuracy"] for row, b in zip(rows, beside, strict=True)]
        m |= {"problems": len(rows), "gap": mean(gaps), "speedup": mean(b["seconds"] for b in beside) / m["seconds"]}
        m["gap_se"] = float(np.std(gaps, ddof=len(gaps) > 1)) / math.sqrt(len(gaps))
        m["accuracy_se"] = math.sqrt(m["accuracy"] * (1 - m["accuracy"]) / len(rows))
        m |= {"acceptance": m["accepted"] / (m["drafted"] or 1), "alpha": m["passed"] / (m["tested"] or 1)}
        m["tokens_per_pass"] = 0.0 if m["drafted"] else m["tokens"] / (m["rounds"] or math.inf)
        found |= {f"eval/{key}/{way}": value for key, value in m.items()}
    return found | predictions(found, costs, step, gamma) | {"eval/auc": calibration(records)[0]}


def calibration(records: list[dict]) -> tuple[float, str]:
    """How good SpecReason's marks were: area under the curve, and of the steps with so many points the share right."""
    given = [mark for r in records for mark in r["specreason"]["marks"]]
    bins = {digit: [right for points, right in given if round(points) == digit] for digit in range(10)}
    shares = ", ".join(f"{digit}: {mean(right):.2f} of {len(right)}" for digit, right in bins.items() if right)
    return auc([points for points, _ in given], [right for _, right in given]), shares


def predictions(m: dict[str, float], costs: dict[str, float], step: int, gamma: int) -> dict[str, float]:
    """Eq. 6 from single passes: what the two methods should gain, and the acceptance above which (1) gains at all."""
    c, v, passed = (costs[name] / costs["base"] for name in ("draft", f"pass {step}", f"pass {gamma + 1}"))
    a, alphas = m["eval/acceptance/specreason"], [m["eval/alpha/spec_decode"]] * gamma
    found = {"c": c, "v/specreason": v, "v/spec_decode": passed, "break_even": c + v / step, "step_tokens": step}
    found["predicted/specreason"] = step / (c * step + v + (1 - a) * step)
    found["predicted/spec_decode"] = decoding_speedup(alphas, c, passed)
    return {f"eval/{name}": value for name, value in found.items()}


def save_records(run: "Run", records: list[dict], costs: dict) -> None:
    """The folder step-N that --resume goes on from: written where the last one is, then renamed."""
    if run.rank == 0:
        folder = [run.folder / "records.tmp", *checkpoints(run.folder)][-1]
        folder.mkdir(exist_ok=True)
        write_atomically(folder / "records.json", json.dumps({"records": records, "costs": costs}))
        folder.rename(run.folder / f"step-{len(records):06d}")
    run.gather(0)


def solve(cfg: Config) -> int:
    """Algorithm: for each problem, for each way: answer it, count and time; then compare."""
    run = Run(cfg)
    cfg.sweep_problems, cfg.steps = min(cfg.sweep_problems, cfg.eval_problems), cfg.eval_problems
    _, base = run.load(cfg.model)
    deepen(base, cfg.idle_layers)
    cfg.draft = choose_draft(cfg, base)
    _, draft = run.load(cfg.draft)
    vocabularies = [load_tokenizer(m.folder).get_vocab() for m in (base, draft)]
    need(vocabularies[0] == vocabularies[1], f"--draft {cfg.draft} has another tokenizer than --model {cfg.model}")
    chosen = run.choose(base, BY_SIZE) | {"draft": cfg.draft}
    prompter = Prompter(base, make_task(cfg.task, cfg.data, natural=not base.is_tiny), cfg.chat)
    names, contest = ways(cfg, prompter.task), Contest(cfg, base, draft, prompter)
    ready = cfg.score != "digit" or not base.is_tiny or contest.knows_score()
    need(ready, f"--score digit: {cfg.model} was not taught <score>; take --model tiny-judge or --score likelihood")
    asked = f"{cfg.eval_problems} problems one by one, {cfg.sweep_problems} of them in {len(names)} ways"
    run.open(base, prompter, chosen, asked)
    step = cfg.max_step_tokens // 3 if base.is_tiny else cfg.max_step_tokens // 4
    with packed(base), packed(draft), torch.inference_mode():
        costs = run.on_rank_0(lambda: contest.costs((step, cfg.gamma + 1)))
        records: list[dict] = []
        if cfg.resume:
            saved = read_json(checkpoints(run.folder)[-1] / "records.json")
            records, costs = saved["records"], saved["costs"]
        ms, c = {name: round(1000 * s, 2) for name, s in costs.items()}, costs["draft"] / costs["base"]
        run.say(f"cost   ms: {ms}; a token of {cfg.draft} costs {c:.2f} of one of {cfg.model}")
        if cfg.score == "likelihood":
            contest.calibrate(range(2 if cfg.check else 24))
        problems = heldout(prompter.task, cfg.eval_problems, cfg.seed)  # other seeds, other problems
        while len(records) < len(problems):
            number, mine = len(records) + run.rank, {}
            for way, settings in names.items() if number < len(problems) else ():
                if number < cfg.sweep_problems or way in ("base", "specreason"):
                    main = mine.get("specreason", {"accepted": 0.0, "drafted": 0.0})
                    rate = main["accepted"] / max(1.0, main["drafted"])
                    mine[way] = contest.solve_one(number, problems[number], way, settings, rate)
            rows, signals = zip(*run.gather((mine, run.signal)), strict=True)
            due = (len(records) + len(rows)) // cfg.save_every > len(records) // cfg.save_every
            records += [row for row in rows if row]
            run.signal = max(signals)
            if due or run.signal or len(records) == len(problems):
                save_records(run, records, costs)
                run.log(len(records), compare(records, costs, step, cfg.gamma), show=SHOWN)
                if mine:
                    contest.solve_one(number, problems[number], "specreason", names["specreason"])
                    run.keep_samples(len(records), prompter, [contest.sample()], [0.0])
                    run.say(prompter.line(contest.answer, writers="".join(s.writer[0] for s in contest.steps)))
            if run.signal and len(records) < len(problems):
                return run.interrupted(len(records))
    return conclude(run, compare(records, costs, step, cfg.gamma), calibration(records)[1])


def conclude(run: "Run", metrics: dict[str, float], shares: str) -> int:
    """Print a line a way, the claims and where everything lies; the exit code."""
    run.bar.close()
    m = {name.removeprefix("eval/"): value for name, value in metrics.items()}
    heads = "problems accuracy gap gap_se clipped_ratio tokens discarded acceptance speedup seconds".split()
    heads += [f"{what}_{part}" for what, parts in (("seconds", PARTS), ("calls", PARTS[::2])) for part in parts]
    lines = [" " * 14 + "".join(f"{head.replace('seconds_', 's ').replace('calls_', 'n ')[:9]:>10}" for head in heads)]
    for way in (name.removeprefix("tokens/") for name in m if name.startswith("tokens/")):
        lines.append(f"{way:14}" + "".join(f"{m[f'{head}/{way}']:10.3f}" for head in heads))
    low = m["gap/specreason"] - 1.645 * m["gap_se/specreason"]
    lines += [
        "seconds per problem; gap: accuracy minus the base's on the same problems",
        f"specreason: {100 * m['gap/specreason']:+.1f} points, above {100 * low:+.1f} with 95 % (claim: -2); speed-up "
        f"{m['speedup/specreason']:.2f}, eq. 6 says {m['predicted/specreason']:.2f}; "
        f"no gain below an acceptance of {m['break_even']:.2f}",
        f"points of {run.cfg.score}: area under the curve {m['auc']:.3f}; share of right steps by points: {shares}",
        f"speculative decoding: alpha {m['alpha/spec_decode']:.3f}, {m['tokens_per_pass/spec_decode']:.2f} tokens per "
        f"pass, speed-up {m['speedup/spec_decode']:.2f}, eq. 6 says {m['predicted/spec_decode']:.2f}",
        f"log     {run.metrics}, {run.samples}\nreport  python docs/report.py {run.folder}",
    ]
    run.say("\n".join(lines))
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
