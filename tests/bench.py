"""How fast grpo.py is on this machine, against transformers' `generate` and against what the arithmetic alone needs.

    python tests/bench.py                                       # models/tiny; with SMOLLM2 set, SmolLM2-135M too
    python tests/bench.py --smollm2 DIR --only rates,sampler --rows 64 --new 64 --json speed.json
    python tests/bench.py --quick                               # seconds, to see that everything runs

Sections: rates, step, sampler, ragged, prefill, scaling, overhead, and the targets, met or missed. It never fails on
a time. Times are medians of alternating runs (A, B, A, B, ...) in one process, after a warm-up; both sides use float32
and the same threads (OMP_NUM_THREADS), and no end token stops a row except in `step` and `ragged`.

bound     sum over the matrix products of a phase of 2 M N K / (best rate of a product of that shape): M = live rows
          only, no padding; the head only where its logits are needed; backward = 2 x forward; nothing is computed
          twice. A rate is the best of 20 repetitions over 0.2 s or more, the output allocated; M is rounded up to a
          power of two, at most 1024. The two products of attention count at the rate of 1024^3, out of their reach.
          A batch of one: bytes of the weights / copy bandwidth (read + write) for each decode step.
share     bound / seconds: the share of the roofline.
2PT       2 x parameters x tokens / (rate of 1024^3), three times that for training: the rule of thumb.
GB bound  bytes of the weights once per pass (training: three times, and 28 per parameter for Adam) and of the keys and
          values read by the decode steps, over the copy bandwidth.
overhead  Python's share of a decode step: one step's calls into torch are recorded with their arguments
          (TorchFunctionMode) and called again in a bare loop; the share is 1 - replay / step. "(profiled)" is
          1 - (self CPU time of all operators) / (time of the steps), both under the profiler, which stretches the
          gaps between operators; an upper bound, as what calls into torch cost by themselves counts as Python.
same      share of equal tokens of the two greedy runs: both sides do the same work.
cost x    seconds, and work x: FLOP, as multiples of the first case of the axis; cost below work is better than linear.
step      one training step of grpo.py on countdown: the rewards are replaced by 0, 1, 0, 1, ..., so that every row is
          trained, and the learning rate is 0, so that every round samples the same completions.
"""

import argparse
import gc
import json
import os
import platform
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the scripts' main does
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import grpo  # noqa: E402
from rewards import make_task  # noqa: E402

FULL = {"rounds": 3, "repetitions": 20, "least": 0.2, "cap": 1024, "cube": 1024, "copied": 2**28}
FULL |= {"rows": (1, 8, 64), "new": (64, 256), "prompts": 8, "group": 8, "limit": 128, "step_rows": 256}
FULL |= {"grow_rows": (4, 8, 16, 32), "grow_new": (32, 64, 128, 256), "grow_group": (1, 4, 16), "widths": (1, 2, 4)}
QUICK = FULL | {"rounds": 1, "repetitions": 2, "least": 0.0, "cap": 64, "cube": 256, "copied": 2**22}
QUICK |= {"rows": (1, 4), "new": (4,), "prompts": 2, "group": 2, "limit": 8, "step_rows": 8}
QUICK |= {"grow_rows": (1, 2), "grow_new": (2, 4), "grow_group": (1, 2), "widths": (1, 2)}


# ------------------------------------------------------------------------------------------------ counting the work


class Pass(NamedTuple):
    """One run of tokens through the model."""

    tokens: int  # without padding
    head: int  # positions whose logits are needed
    pairs: int  # of a query and a key that it may see
    read: int = 0  # positions read from a cache
    times: int = 1  # 3 with the backward pass


def products(c: dict) -> list[tuple[int, int]]:
    """(K, N) of the products with a weight in one layer."""
    size, inner = c["hidden_size"], c["intermediate_size"]
    d = c.get("head_dim") or size // c["num_attention_heads"]
    q, kv = c["num_attention_heads"] * d, c.get("num_key_value_heads", c["num_attention_heads"]) * d
    return [(size, q), (size, kv), (size, kv), (q, size), (size, inner), (size, inner), (inner, size)]


def attention_flops(c: dict, pairs: int) -> int:
    """Scores and weighted sum, in all layers."""
    return 4 * c["num_hidden_layers"] * products(c)[0][1] * pairs


def flops(c: dict, passes: list[Pass]) -> int:
    layer, head = 2 * sum(k * n for k, n in products(c)), 2 * c["hidden_size"] * c["vocab_size"]
    each = [(p, c["num_hidden_layers"] * layer * p.tokens + head * p.head) for p in passes]
    return sum(p.times * (count + attention_flops(c, p.pairs)) for p, count in each)


def weight_bytes(c: dict) -> int:
    """Of the matrices that a decode step multiplies with, in float32."""
    return 4 * (c["num_hidden_layers"] * sum(k * n for k, n in products(c)) + c["hidden_size"] * c["vocab_size"])


def moved_bytes(c: dict, passes: list[Pass]) -> int:
    per_position = 2 * 4 * c["num_hidden_layers"] * products(c)[1][1]  # a key and a value
    return sum(p.times * weight_bytes(c) + p.read * per_position for p in passes)


def triangle(n: int) -> int:
    """Pairs of a query and a key in n causal positions."""
    return n * (n + 1) // 2


def sampling_passes(prompts: list[int], lengths: list[int]) -> list[Pass]:
    """Passes that sample rows of these lengths, as many per prompt (length of each) as there are rows for it."""
    group, first = len(lengths) // len(prompts), [n for n in prompts for _ in range(len(lengths) // len(prompts))]
    assert group * len(prompts) == len(lengths), (prompts, lengths)
    passes = [Pass(sum(prompts), len(prompts), sum(map(triangle, prompts)))]
    for t in range(1, max(lengths)):  # the first token comes out of the prefill
        keys = [start + t for start, length in zip(first, lengths, strict=True) if length > t]
        passes.append(Pass(len(keys), len(keys), sum(keys), read=sum(keys)))
    return passes


def training_passes(run: "grpo.Run", done: list) -> list[Pass]:
    """Forward and backward over completions, one pass per micro-batch of grpo.py, each prompt in it once."""
    passes = []
    for part, _, _ in grpo.training_batches(run, done, list(range(len(done)))):
        rows = [(len(done[i].prompt) - 1, len(done[i].tokens)) for i in part]
        prompts = {done[i].number: len(done[i].prompt) - 1 for i in part}.values()
        pairs = sum(map(triangle, prompts)) + sum(n * p + triangle(n) for p, n in rows)
        tokens = sum(n for _, n in rows)
        passes.append(Pass(sum(prompts) + tokens, tokens, pairs, times=3))
    return passes


# ----------------------------------------------------------------------------------------------------- the machine


def now() -> float:
    return time.perf_counter()


def alternate(works: list[Callable], rounds: int) -> list[float]:
    """Median seconds of each work, run in turn (A, B, A, B, ...)."""
    seconds = [[] for _ in works]
    for _ in range(rounds):
        for work, times in zip(works, seconds, strict=True):
            began = now()
            work()
            times.append(now() - began)
    return [median(times) for times in seconds]


class Machine:
    """Rates of this machine, measured when they are first asked for, and the bounds that follow from them."""

    def __init__(self, sizes: dict):
        self.sizes, self.rates = sizes, {}
        self.flop_rate = self.measure(*[sizes["cube"]] * 3)
        source = torch.ones(sizes["copied"] // 4)
        target = torch.zeros_like(source)
        self.bandwidth = 2 * sizes["copied"] / self.best(lambda: target.copy_(source))  # bytes per second

    def best(self, work: Callable) -> float:
        """Seconds of the fastest repetition."""
        work()
        times, began = [], now()
        while len(times) < self.sizes["repetitions"] or now() - began < self.sizes["least"]:
            times += alternate([work], 1)
        return min(times)

    def measure(self, m: int, k: int, n: int) -> float:
        x, weight, out = torch.randn(m, k), torch.randn(n, k), torch.empty(m, n)
        seconds = self.best(lambda: torch.mm(x, weight.t(), out=out))
        if torch.backends.mkldnn.is_available():  # oneDNN, on weights laid out beforehand
            packed, ops = torch.ops.mkldnn._reorder_linear_weight(weight), torch.ops.mkldnn
            seconds = min(seconds, self.best(lambda: ops._linear_pointwise(x, packed, None, "none", [], "")))
        return 2 * m * n * k / seconds

    def rate(self, m: int, k: int, n: int) -> float:
        """FLOP/s of (m, k) x (k, n), the weight stored as (n, k) as in a layer."""
        shape = min(1 << (m - 1).bit_length(), self.sizes["cap"]), k, n
        if shape not in self.rates:
            self.rates[shape] = self.measure(*shape)
        return self.rates[shape]

    def gemm_bound(self, c: dict, passes: list[Pass]) -> float:
        """Seconds that the matrix products of these passes need."""
        seconds, size, vocab = 0.0, c["hidden_size"], c["vocab_size"]
        for p in passes:
            layer = sum(2 * p.tokens * k * n / self.rate(p.tokens, k, n) for k, n in products(c))
            head = 2 * p.head * size * vocab / self.rate(p.head, size, vocab)
            attention = attention_flops(c, p.pairs) / self.flop_rate
            seconds += p.times * (c["num_hidden_layers"] * layer + head + attention)
        return seconds

    def sampling_bound(self, c: dict, passes: list[Pass]) -> float:
        """By the matrix products; decode steps of one row by the bytes of the weights."""
        narrow = [p for p in passes[1:] if p.tokens == 1]
        wide = passes[:1] + [p for p in passes[1:] if p.tokens > 1]
        return self.gemm_bound(c, wide) + len(narrow) * weight_bytes(c) / self.bandwidth

    def rule_of_thumb(self, parameters: int, passes: list[Pass]) -> float:
        return 2 * parameters * sum(p.tokens * p.times for p in passes) / self.flop_rate


def reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pass  # not Linux: the peak of the whole process has to do


def peak_gb() -> float:
    """Most resident memory since `reset_peak`, GB: everything, Python and torch included."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e9
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / 1e9


# ------------------------------------------------------------------------------------------------------ the sections


class Bench:
    """One model under test, the machine, and the rows of the table."""

    def __init__(self, folder: str, sizes: dict, machine: Machine, results: list, targets: list):
        self.folder, self.sizes, self.machine = folder, sizes, machine
        self.results, self.targets, self.section = results, targets, ""
        settings = grpo.Config(model=folder, device="cpu", dtype="float32", max_new_tokens=sizes["limit"])
        settings.group_size, settings.batch_size = sizes["group"], sizes["prompts"] * sizes["group"]
        handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
        self.run = grpo.Run(settings)
        for number, handler in handlers:  # Ctrl-C ends a measurement at once
            signal.signal(number, handler)
        self.model, _ = self.run.load(folder)
        self.run.choose(self.model, grpo.BY_SIZE)
        self.parameters, self.config = grpo.num_parameters(self.model), self.model.config
        self.real = self.parameters > 100e6  # the targets are SmolLM2-135M's
        self.prompter = grpo.Prompter(self.model, make_task("countdown", "", natural=not self.model.is_tiny), False)
        self.eos_ids, self.model.eos_ids = self.model.eos_ids, []

    def prompts(self, count: int) -> list[list[int]]:
        problems = [self.prompter.task.problem("train", 0, i) for i in range(count)]
        return [self.prompter.encode(self.prompter.text(problem)) for problem in problems]

    def row(self, case: str, **values: float | None) -> None:
        """Keep a row of the table, and print it; shares in percent, None where nothing can be said."""
        last = next((r for r in reversed(self.results) if r["model"] == self.folder), {})
        row = {"section": self.section, "model": self.folder, "case": case} | values
        if list(last) != list(row) or last["section"] != self.section:
            print(f"\n{self.section}, {self.folder}\n{'':42}" + "".join(f"{name:>13}" for name in values))
        shown = ["-" if v is None else f"{v:.1%}" if "share" in name else f"{v:.4g}" for name, v in values.items()]
        print(f"{case:42}" + "".join(f"{text:>13}" for text in shown), flush=True)
        self.results.append(row)

    def target(self, what: str, value: float, least: float | None = None, most: float | None = None) -> None:
        met = value >= least if most is None else value <= most
        self.targets.append({"target": what, "measured": value, "least": least, "most": most, "met": met})


def uniforms_of(rows: int, group: int, new: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([grpo.row_uniforms(0, 1, i // group, i % group, new) for i in range(rows)]))


def show_rates(b: Bench) -> None:
    """The rate of every layer shape at M = rows; the bounds measure further M when they need them."""
    shapes = dict.fromkeys([*products(b.config), (b.config["hidden_size"], b.config["vocab_size"])])
    many = b.sizes["prompts"] * b.sizes["group"]
    for m in sorted({*b.sizes["rows"], many, b.sizes["cap"]}):
        for k, n in shapes:
            rate = b.machine.rate(m, k, n)
            b.row(f"({m}, {k}) x ({k}, {n})", **{"GFLOP/s": rate / 1e9, "of 1024^3": rate / b.machine.flop_rate})


def measure_step(b: Bench) -> None:
    """One step of grpo.py split into sample, score and train, and its peak memory."""
    run, model, prompter, cfg, seconds = b.run, b.model, b.prompter, b.run.cfg, []
    model.eos_ids = b.eos_ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
    rewards = torch.arange(cfg.batch_size, dtype=torch.float64) % 2
    advantages = grpo.group_advantages(rewards, cfg.group_size).tolist()
    sampling_peak = training_peak = 0.0
    for _ in range(b.sizes["rounds"] + 1):  # the first allocates, and does not count
        reset_peak()
        began = now()
        _, done, _ = grpo.sample_batch(run, model, prompter, 1, 0, cfg.max_new_tokens)
        sampled, sampling_peak = now(), max(sampling_peak, peak_gb())
        reset_peak()
        grpo.update_policy(run, model, None, optimizer, done, advantages, 0.0, cfg.max_new_tokens)
        trained = now()
        training_peak = max(training_peak, peak_gb())
        scoring = alternate([lambda done=done: [prompter.task.score(c.text, c.problem) for c in done]], 1)[0]  # again
        seconds.append((sampled - began - scoring, scoring, trained - sampled))
    sample, score, train = (median(times) for times in zip(*seconds[1:], strict=True))
    prompts, lengths = [len(c.prompt) for c in done], [len(c.tokens) for c in done]
    sampling = sampling_passes(prompts[:: cfg.group_size], lengths)
    training = training_passes(run, done)
    bounds = b.machine.sampling_bound(b.config, sampling), b.machine.gemm_bound(b.config, training)
    parts = [("sample", sample, bounds[0], sampling, 0), ("score", score, 0.0, [], 0)]
    parts += [("train", train, bounds[1], training, 28 * b.parameters)]
    parts += [("all", sample + score + train, sum(bounds), sampling + training, 28 * b.parameters)]
    case = f"{cfg.batch_size // cfg.group_size} x {cfg.group_size}, {sum(lengths) / len(lengths):.0f} tokens each"
    for name, took, bound, passes, extra in parts:
        moved = moved_bytes(b.config, passes) + extra
        counts = {"GFLOP": flops(b.config, passes) / 1e9, "GB": moved / 1e9, "GB bound": moved / b.machine.bandwidth}
        thumb = b.machine.rule_of_thumb(b.parameters, passes)
        b.row(f"{name}: {case}", seconds=took, bound=bound, share=bound / took, **{"2PT": thumb}, **counts)
    gb = max(sampling_peak, training_peak)
    plan = grpo.memory_plan(model, cfg.batch_size, cfg.max_new_tokens + max(prompts), cfg.micro_batch_tokens, run.dtype)
    plans = {"weights GB": 4e-9 * b.parameters, "plan GB": plan["all"]}
    b.row(f"memory: {case}", **{"sampling GB": sampling_peak, "training GB": training_peak}, **plans)
    if b.real:
        scaled = (sample + score + train) * b.machine.flop_rate / 200e9
        b.target(f"grpo step ({case}), seconds at 200 GFLOP/s", scaled, most=70)
        b.target("train phase, share of the GEMM bound", bounds[1] / train, least=0.6)
        b.target("peak memory of the step, GB", gb, most=4.5)


def make_generate(b: Bench) -> Callable:
    """transformers' own: f(prompts, group, new, temperature) -> completions (B, new); its default cache, no end."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(b.folder).float().eval()
    theirs.generation_config.eos_token_id = None

    def generate(prompts: list[list[int]], group: int, new: int, temperature: float) -> torch.Tensor:
        longest = max(map(len, prompts))
        rows = [[0] * (longest - len(p)) + p for p in prompts for _ in range(group)]  # padded on the left
        seen = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts for _ in range(group)]
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        how = how or {"do_sample": False}
        limits = {"max_new_tokens": new, "pad_token_id": 0}
        tokens = theirs.generate(torch.tensor(rows), attention_mask=torch.tensor(seen), **limits, **how)
        assert tokens.shape == (len(rows), longest + new), tokens.shape
        return tokens[:, longest:]

    return generate


def measure_sampler(b: Bench) -> None:
    """grpo.generate against transformers' generate."""
    theirs, found = make_generate(b), {}
    for rows in b.sizes["rows"]:
        for new in b.sizes["new"]:
            group = min(rows, b.sizes["group"])
            prompts, uniforms = b.prompts(rows // group), uniforms_of(rows, group, new)
            passes = sampling_passes([len(p) for p in prompts], [new] * rows)
            bound, thumb = b.machine.sampling_bound(b.config, passes), b.machine.rule_of_thumb(b.parameters, passes)
            for temperature in (0.0, 1.0):

                def our_run(count, prompts=prompts, uniforms=uniforms, temperature=temperature):
                    s = grpo.generate(b.model, prompts, uniforms[:, :count], temperature)
                    found["ours"] = s.tokens

                def their_run(count, prompts=prompts, group=group, temperature=temperature):
                    found["theirs"] = theirs(prompts, group, count, temperature)

                for run in (our_run, their_run):  # warm-up
                    run(min(new, 3))
                works = [lambda run=run, new=new: run(new) for run in (our_run, their_run)]
                ours, other = alternate(works, b.sizes["rounds"])
                same = (found["ours"] == found["theirs"]).float().mean().item() if not temperature else None
                case = f"{rows} rows x {new} tokens, T = {temperature:g}"
                speeds = {"tokens/s": rows * new / ours, "generate": rows * new / other, "ratio": other / ours}
                shares = {"share": bound / ours, "2PT": thumb, "same": same}
                b.row(case, seconds=ours, **speeds, bound=bound, **shares)
                if b.real and new == 64 and rows in (1, 64):
                    b.target(f"{case}: times generate", other / ours, least=2.5 if rows == 1 else 3)
                if b.real and new == rows == 64:
                    b.target(f"{case}: share of the GEMM bound", bound / ours, least=0.6)


def measure_ragged(b: Bench) -> None:
    """Half of the rows end after a quarter of the length, against the sum of lengths; the prefill is taken off.

    Made through the random numbers alone: the end token, last in the vocabulary, gets nearly all probability, but 0
    draws the first token of all that can be drawn, whatever the logits.
    """
    rows, group, new, last = b.sizes["rows"][-1], b.sizes["group"], b.sizes["new"][0], b.config["vocab_size"] - 1
    prompts, bias, before = b.prompts(rows // group), torch.zeros(last + 1), b.model.vocab_bias
    bias[last] = 30.0
    b.model.eos_ids, b.model.vocab_bias = [last], bias
    lengths = [max(2, new // 4) if row % 2 else new for row in range(rows)]
    even, ragged = torch.zeros(rows, new), torch.zeros(rows, new)
    for row, length in enumerate(lengths):
        ragged[row, length - 1] = 0.5
    sampled = grpo.generate(b.model, prompts, ragged)
    assert sampled.lengths.tolist() == lengths, (sampled.lengths.tolist(), lengths)
    works = [lambda u=u: grpo.generate(b.model, prompts, u) for u in (even, ragged, even[:, :1])]
    seconds = alternate(works, b.sizes["rounds"])
    b.model.eos_ids, b.model.vocab_bias = [], before
    costs = []
    for name, took, counts in (("even", seconds[0], [new] * rows), ("half ends early", seconds[1], lengths)):
        decode, tokens = took - seconds[2], sum(counts) - rows  # one token each comes from the prefill
        bound = b.machine.sampling_bound(b.config, sampling_passes([len(p) for p in prompts], counts)[1:])
        costs.append(decode / tokens)
        sound = decode > 0 and costs[0] > 0  # a busy machine, a handful of tokens
        shares = {"share": bound / decode if sound else None, "cost/token x": costs[-1] / costs[0] if sound else None}
        b.row(f"{name}: {rows} rows, up to {new} tokens", seconds=took, decode=decode, tokens=tokens, **shares)
    if b.real and sound:
        b.target(f"ragged lengths, {rows} rows: times the sum of lengths", costs[1] / costs[0], most=1.2)


def measure_prefill(b: Bench) -> None:
    """The first token of every row: each prompt run once for its group, or once for each of its rows."""
    count, group = b.sizes["prompts"], b.sizes["group"]
    shared, uniforms = b.prompts(count), uniforms_of(count * group, group, 1)
    repeated = [prompt for prompt in shared for _ in range(group)]
    works = [lambda p=p: grpo.generate(b.model, p, uniforms) for p in (shared, repeated)]
    works[1]()
    seconds = alternate(works, b.sizes["rounds"])
    for name, prompts, took in zip(("shared", "not shared"), (shared, repeated), seconds, strict=True):
        passes = sampling_passes([len(p) for p in prompts], [1] * len(repeated))
        bound, thumb = b.machine.gemm_bound(b.config, passes), b.machine.rule_of_thumb(b.parameters, passes)
        values = {"seconds": took, "times": took / seconds[0], "bound": bound, "share": bound / took, "2PT": thumb}
        b.row(f"{name}: {len(prompts)} x {len(prompts[0])} tokens", **values)


def growing(b: Bench) -> Iterator[tuple[str, list[tuple]]]:
    """Axes of growth and their cases: (name, model, rows, group, new)."""
    s, group = b.sizes, b.sizes["grow_rows"][0]
    rows, new, most = s["grow_rows"][1], s["grow_new"][1], s["grow_rows"][-1]
    yield "rows", [(f"{n} rows", b.model, n, group, new) for n in s["grow_rows"]]
    yield "length", [(f"{n} new tokens", b.model, rows, group, n) for n in s["grow_new"]]
    yield "group size", [(f"groups of {n}", b.model, most, n, new) for n in s["grow_group"]]
    if not b.real:  # random weights: what they are does not change the time
        sizes = []
        for factor in s["widths"]:
            c, names = b.config, ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
            model = grpo.Model(c | {"head_dim": b.model.head_dim} | {name: factor * c[name] for name in names})
            sizes.append((f"width {model.config['hidden_size']}", model, most, group, new))
        yield "model size", sizes


def made_up(prompts: list[list[int]], group: int, new: int) -> list[SimpleNamespace]:
    """Completions of `new` tokens."""
    rows = [(number, prompt) for number, prompt in enumerate(prompts) for _ in range(group)]
    return [SimpleNamespace(number=number, prompt=prompt, tokens=[3] * new) for number, prompt in rows]


def train_on(b: Bench, model: "grpo.Model", prompts: list[list[int]], group: int, new: int) -> None:
    """Forward and backward over completions of `new` tokens, in micro-batches; no optimizer step."""
    done = made_up(prompts, group, new)
    for _, tokens, mask in grpo.training_batches(b.run, done, list(range(len(done)))):
        grpo.completion_logprobs(model, tokens, mask)[0].sum().backward()
    model.zero_grad(set_to_none=True)


def measure_scaling(b: Bench) -> None:
    """Cost and work (FLOP) of sampling and training, against the first case of each axis."""
    for axis, cases in growing(b):
        works, counts = [], []
        for name, model, rows, group, new in cases:
            prompts, uniforms = b.prompts(rows // group), uniforms_of(rows, group, new)
            works.append(lambda m=model, p=prompts, u=uniforms: grpo.generate(m, p, u))
            works.append(lambda m=model, p=prompts, g=group, n=new: train_on(b, m, p, g, n))
            sampling = sampling_passes([len(p) for p in prompts], [new] * rows)
            training = training_passes(b.run, made_up(prompts, group, new))
            bounds = b.machine.sampling_bound(model.config, sampling), b.machine.gemm_bound(model.config, training)
            counts.append((name, [flops(model.config, passes) for passes in (sampling, training)], bounds))
        for work in works[:2]:
            work()
        seconds = alternate(works, b.sizes["rounds"])
        for i, (name, work, bounds) in enumerate(counts):
            values = {}
            for part, phase in enumerate(("sample", "train")):
                took = seconds[2 * i + part]
                values |= {phase: took, f"{phase[0]} cost x": took / seconds[part]}
                values[f"{phase[0]} work x"] = work[part] / counts[0][1][part]
                values[f"{phase[0]} share"] = bounds[part] / took
            b.row(f"{axis}: {name}", **values)


class Recorder(TorchFunctionMode):
    """Notes every call into torch."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def measure_overhead(b: Bench) -> None:
    """Python's share of a decode step of models/tiny."""
    if b.real:
        return
    rows, group, rounds, profiled = b.sizes["step_rows"], b.sizes["group"], 8 * b.sizes["rounds"], 8
    prompts, steps = b.prompts(rows // group), 2 * rounds + profiled + 8
    cache, _ = grpo.prefill(b.model, prompts, max(map(len, prompts)) + steps)
    cache.select(torch.arange(len(prompts)).repeat_interleave(group))
    cache.width = max(map(len, prompts)) + steps  # so that all steps cost the same
    s, recorder = grpo.Decoding(b.model, cache, uniforms_of(rows, group, steps)), Recorder()

    def step() -> None:
        grpo.decode_step(b.model, s)

    def replay() -> None:
        for function, args, kwargs in recorder.calls:
            function(*args, **kwargs)

    step()
    with recorder:
        step()
    replay()
    took, replayed = alternate([step, replay], rounds)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        began = now()
        for _ in range(profiled):
            step()
        wall = now() - began
    inside = sum(event.self_cpu_time_total for event in profile.key_averages()) / 1e6
    bound = b.machine.gemm_bound(b.config, [Pass(rows, rows, rows * cache.width)])
    shares = {"Python share": 1 - replayed / took, "(profiled)": 1 - inside / wall, "share": bound / took}
    times = {"step ms": 1e3 * took, "replay ms": 1e3 * replayed, "bound ms": 1e3 * bound}
    b.row(f"decode step, {rows} rows, {cache.width} keys", **times, **shares, calls=len(recorder.calls))
    b.target(f"{b.folder}, {rows} rows: Python in a decode step", 1 - replayed / took, most=0.25)


SECTIONS = {"rates": show_rates, "step": measure_step, "sampler": measure_sampler, "ragged": measure_ragged}
SECTIONS |= {"prefill": measure_prefill, "scaling": measure_scaling, "overhead": measure_overhead}


def main(argv: list[str] | None = None) -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("bench.py", description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--model", default=str(ROOT / "models" / "tiny"), help="folder of a model (models/tiny)")
    parser.add_argument("--smollm2", default=os.environ.get("SMOLLM2", ""), help="folder of a second, real model")
    parser.add_argument("--only", default="", help=f"sections: {','.join(SECTIONS)}")
    parser.add_argument("--rounds", type=int, help=f"alternating rounds ({FULL['rounds']})")
    parser.add_argument("--rows", help="batch sizes of `sampler` (1,8,64)")
    parser.add_argument("--new", help="new tokens of `sampler` (64,256)")
    parser.add_argument("--quick", action="store_true", help="few repetitions and small sizes")
    parser.add_argument("--json", help="file for everything that was measured")
    given = parser.parse_args(argv)
    names = given.only.split(",") if given.only else list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"--only {unknown[0]}: one of {', '.join(SECTIONS)} is needed")
    sizes = dict(QUICK if given.quick else FULL)
    sizes["rounds"] = given.rounds or sizes["rounds"]
    for name in ("rows", "new"):
        if getattr(given, name):
            sizes[name] = tuple(int(text) for text in getattr(given, name).split(","))
    machine, results, targets = Machine(sizes), [], []
    about = {"threads": torch.get_num_threads(), "torch": torch.__version__, "platform": platform.platform()}
    about |= {f"{sizes['cube']}^3 GFLOP/s": machine.flop_rate / 1e9, "copy GB/s": machine.bandwidth / 1e9}
    for name, value in about.items():
        print(f"{name:22}{round(value, 2) if isinstance(value, float) else value}")
    for folder in filter(None, (given.model, given.smollm2)):
        for name in (name for name in SECTIONS if name in names):
            b = Bench(folder, sizes, machine, results, targets)  # afresh: a step leaves an optimizer behind
            b.section = name
            SECTIONS[name](b)
            del b
            gc.collect()
    print("\ntargets, for two cores" + (" (sizes are those of --quick)" if given.quick else ""))
    for t in targets:
        limit = f"at least {t['least']:g}" if t["most"] is None else f"at most {t['most']:g}"
        print(f"{t['target']:70}{t['measured']:9.3g}   {limit:15}{'met' if t['met'] else 'missed'}")
    if not targets:
        print("none of them was measured; most need --smollm2 DIR or SMOLLM2")
    if given.json:
        rates = [{"shape": shape, "GFLOP/s": rate / 1e9} for shape, rate in sorted(machine.rates.items())]
        found = {"machine": about, "sizes": sizes, "rates": rates, "rows": results, "targets": targets}
        Path(given.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
