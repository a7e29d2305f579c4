"""How fast grpo.py is on this machine, against transformers' `generate` and the arithmetic.

    python tests/bench.py                # models/tiny, and the folder in SMOLLM2 if it is set
    python tests/bench.py --only sampler --rows 1,64 --new 64 --json speed.json
    python tests/bench.py --quick        # seconds, to see that everything runs

Times are medians of alternating runs (A, B, A, B, ...) in one process, after a warm-up; both sides
use float32 and the same threads (OMP_NUM_THREADS), and no end token stops a row except in `step`.

bound   seconds: sum over the matrix products of a phase of 2 M N K / (best rate of a product of
        that shape, by MKL or oneDNN). M = live rows only, no padding; the head only where its
        logits are needed; backward = 2 x forward. A rate is the best of 20 repetitions over 0.2 s
        or more; M is rounded up to a power of two, at most 1024. Attention counts at the rate of
        1024^3. A decode step of one row: bytes of the weights / copy bandwidth (read + write).
share   bound / seconds: the share of the roofline.
ratio   seconds of `generate` / ours, for as many tokens.
same    share of equal tokens of the two greedy runs: both sides do the same work.
step    one training step of grpo.py on countdown: the advantages are -1, 1, -1, 1, ..., so that
        every row is trained, and the learning rate is 0, so that every round samples the same.
"""

import argparse
import json
import os
import platform
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the scripts' main does
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import grpo  # noqa: E402
from rewards import make_task  # noqa: E402

FULL = {"rounds": 3, "repetitions": 20, "least": 0.2, "cap": 1024, "cube": 1024, "copied": 2**28}
FULL |= {"rows": (1, 8, 64), "new": (64, 256), "group": 8, "limit": 128}
QUICK = {"rounds": 1, "repetitions": 2, "least": 0.0, "cap": 64, "cube": 256, "copied": 2**22}
QUICK |= {"rows": (1, 4), "new": (4,), "group": 2, "limit": 8}


# ----------------------------------------------------------------------------- counting the work


class Pass(NamedTuple):
    """One run of tokens through the model."""

    tokens: int  # without padding
    head: int  # positions whose logits are needed
    pairs: int  # of a query and a key that it may see
    times: int = 1  # 3 with the backward pass


def products(c: dict) -> list[tuple[int, int]]:
    """(K, N) of the products with a weight in one layer."""
    size, inner = c["hidden_size"], c["intermediate_size"]
    q, kv = (c[f"num_{name}_heads"] * c["head_dim"] for name in ("attention", "key_value"))
    attention = [(size, q), (size, kv), (size, kv), (q, size)]
    return [*attention, (size, inner), (size, inner), (inner, size)]


def weight_bytes(c: dict) -> int:
    """Of the matrices that a decode step multiplies with, in float32."""
    layer = sum(k * n for k, n in products(c))
    return 4 * (c["num_hidden_layers"] * layer + c["hidden_size"] * c["vocab_size"])


def triangle(n: int) -> int:
    """Pairs of a query and a key in n causal positions."""
    return n * (n + 1) // 2


def sampling_passes(prompts: list[int], lengths: list[int]) -> list[Pass]:
    """Passes that sample rows of these lengths, as many for each prompt (by its length)."""
    group = len(lengths) // len(prompts)
    first = [n for n in prompts for _ in range(group)]
    passes = [Pass(sum(prompts), len(prompts), sum(map(triangle, prompts)))]
    for t in range(1, max(lengths)):  # the first token comes out of the prefill
        keys = [start + t for start, n in zip(first, lengths, strict=True) if n > t]
        passes.append(Pass(len(keys), len(keys), sum(keys)))
    return passes


def training_passes(run: "grpo.Run", done: list) -> list[Pass]:
    """Forward and backward over completions, one pass per micro-batch of grpo.py."""
    passes = []
    for rows, _, _ in grpo.training_batches(run, done, list(range(len(done)))):
        inputs = [len(done[i].prompt) + len(done[i].tokens) - 1 for i in rows]
        trained = sum(len(done[i].tokens) for i in rows)
        passes.append(Pass(sum(inputs), trained, sum(map(triangle, inputs)), times=3))
    return passes


# ----------------------------------------------------------------------------------- the machine


def alternate(works: list[Callable], rounds: int) -> list[float]:
    """Median seconds of each work, run in turn (A, B, A, B, ...)."""
    seconds = [[] for _ in works]
    for i in range(rounds * len(works)):
        began = time.perf_counter()
        works[i % len(works)]()
        seconds[i % len(works)].append(time.perf_counter() - began)
    return [median(times) for times in seconds]


class Machine:
    """Rates of this machine, measured when they are first asked for, and bounds by them."""

    def __init__(self, sizes: dict):
        self.sizes, self.rates = sizes, {}
        self.flop_rate = self.measure(*[sizes["cube"]] * 3)
        source = torch.ones(sizes["copied"] // 4)
        target = torch.zeros_like(source)
        copying = self.best(partial(target.copy_, source))
        self.bandwidth = 2 * sizes["copied"] / copying  # bytes per second

    def best(self, work: Callable) -> float:
        """Seconds of the fastest repetition."""
        work()
        times = []
        while len(times) < self.sizes["repetitions"] or sum(times) < self.sizes["least"]:
            times += alternate([work], 1)
        return min(times)

    def measure(self, m: int, k: int, n: int) -> float:
        x, weight, out = torch.randn(m, k), torch.randn(n, k), torch.empty(m, n)
        seconds = self.best(partial(torch.mm, x, weight.t(), out=out))
        if torch.backends.mkldnn.is_available():  # oneDNN, on weights laid out beforehand
            packed, ops = torch.ops.mkldnn._reorder_linear_weight(weight), torch.ops.mkldnn
            work = partial(ops._linear_pointwise, x, packed, None, "none", [], "")
            seconds = min(seconds, self.best(work))
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
            attention = 4 * products(c)[0][1] * p.pairs / self.flop_rate  # scores, weighted sum
            seconds += p.times * (c["num_hidden_layers"] * (layer + attention) + head)
        return seconds

    def sampling_bound(self, c: dict, passes: list[Pass]) -> float:
        """By the matrix products; decode steps of one row by the bytes of the weights."""
        wide = passes[:1] + [p for p in passes[1:] if p.tokens > 1]
        narrow = len(passes) - len(wide)
        return self.gemm_bound(c, wide) + narrow * weight_bytes(c) / self.bandwidth


def peak_gb() -> float:
    """Most resident memory of this process so far (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# ---------------------------------------------------------------------------------- the sections


class Bench:
    """One model under test, the machine, and the rows of the table."""

    def __init__(self, folder: str, sizes: dict, machine: Machine, results: list):
        self.sizes, self.machine, self.results = sizes, machine, results
        cfg = grpo.Config(model=folder, device="cpu", group_size=sizes["group"])
        cfg.max_new_tokens, cfg.batch_size = sizes["limit"], sizes["rows"][-1]
        self.run = grpo.Run(cfg)
        for number in (signal.SIGINT, signal.SIGTERM):  # which end a measurement at once
            signal.signal(number, signal.SIG_DFL)
        self.model, _ = self.run.load(grpo.BY_SIZE)
        task = make_task("countdown", "", natural=not self.model.is_tiny)
        self.prompter = grpo.Prompter(self.model, task, chat=False)

    def bound(self, prompts: list[list[int]], lengths: list[int]) -> float:
        """Of sampling."""
        passes = sampling_passes([len(prompt) for prompt in prompts], lengths)
        return self.machine.sampling_bound(self.model.config, passes)

    def row(self, section: str, case: str, seconds: float, bound: float, **values: float) -> None:
        """Keep a row of the table, and print it."""
        values = {"seconds": seconds, "bound": bound, "share": bound / seconds} | values
        shown = "".join(f"{name:>11} {value:<9.4g}" for name, value in values.items())
        print(f"{section:8} {case:32}{shown}", flush=True)
        about = {"section": section, "model": self.run.cfg.model, "case": case}
        self.results.append(about | values)


def measure_step(b: Bench) -> None:
    """One step of grpo.py, sampling (with scoring) and training, and its peak memory."""
    run, cfg, seconds, peaks = b.run, b.run.cfg, [], []
    limit = cfg.max_new_tokens
    optimizer = torch.optim.AdamW(b.model.parameters(), lr=0.0, weight_decay=0.0)
    advantages = [float(2 * (i % 2) - 1) for i in range(cfg.batch_size)]
    for _ in range(b.sizes["rounds"] + 1):  # the first allocates, and does not count
        began = time.perf_counter()
        _, done, _ = grpo.sample_batch(run, b.model, b.prompter, 1, 0, limit)
        sampled = time.perf_counter()
        peaks.append(peak_gb())
        grpo.update_policy(run, b.model, None, optimizer, done, advantages, 0.0, limit)
        seconds.append((sampled - began, time.perf_counter() - sampled))
    sample, train = (median(times) for times in zip(*seconds[1:], strict=True))
    lengths = [len(c.tokens) for c in done]
    bound = b.bound([c.prompt for c in done[:: cfg.group_size]], lengths)
    case = f"{cfg.batch_size} x {sum(lengths) / len(lengths):.0f} tokens"
    b.row("step", f"sample: {case}", sample, bound, GB=peaks[0])
    bound = b.machine.gemm_bound(b.model.config, training_passes(run, done))
    b.row("step", f"train: {case}", train, bound, GB=peak_gb())


def make_generate(folder: str) -> Callable:
    """transformers' own: f(prompts, group, new, temperature) -> tokens (B, new), no end."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    theirs.generation_config.eos_token_id = None

    def generate(prompts, group: int, new: int, temperature: float) -> torch.Tensor:
        longest = max(map(len, prompts))
        rows = [p for p in prompts for _ in range(group)]
        seen = [[0] * (longest - len(p)) + [1] * len(p) for p in rows]
        rows = [[0] * (longest - len(p)) + p for p in rows]  # padded on the left
        how = {"do_sample": False}
        if temperature:
            how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        how |= {"max_new_tokens": new, "pad_token_id": 0}
        tokens = theirs.generate(torch.tensor(rows), attention_mask=torch.tensor(seen), **how)
        assert tokens.shape == (len(rows), longest + new), tokens.shape
        return tokens[:, longest:]

    return generate


def measure_sampler(b: Bench) -> None:
    """grpo.generate against transformers' generate."""
    theirs, b.model.eos_ids = make_generate(b.run.cfg.model), []
    for rows in b.sizes["rows"]:
        group = min(rows, b.sizes["group"])
        problems = [b.prompter.task.problem("train", 0, i) for i in range(rows // group)]
        prompts = [b.prompter.encode(b.prompter.text(problem)) for problem in problems]
        for new in b.sizes["new"]:
            for temperature in (0.0, 1.0):
                numbers = [grpo.row_uniforms(0, 1, 0, i, new) for i in range(rows)]
                uniforms = torch.from_numpy(np.stack(numbers))
                ours = partial(grpo.generate, b.model, prompts, uniforms, temperature)
                other = partial(theirs, prompts, group, new, temperature)
                found = ours().tokens == other()  # and a warm-up
                seconds, their_seconds = alternate([ours, other], b.sizes["rounds"])
                values = {"tokens/s": rows * new / seconds, "ratio": their_seconds / seconds}
                if not temperature:
                    values["same"] = found.float().mean().item()
                case = f"{rows} rows x {new}, T = {temperature:g}"
                b.row("sampler", case, seconds, b.bound(prompts, [new] * rows), **values)


SECTIONS = {"step": measure_step, "sampler": measure_sampler}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default=str(ROOT / "models" / "tiny"), help="folder of a model")
    parser.add_argument("--only", default="", choices=SECTIONS, help="one section (default: all)")
    parser.add_argument("--rows", default="", help="batch sizes of `sampler` (default: 1,8,64)")
    parser.add_argument("--new", default="", help="new tokens of `sampler` (default: 64,256)")
    parser.add_argument("--quick", action="store_true", help="few repetitions and small sizes")
    parser.add_argument("--json", default="", help="file for everything that was measured")
    flags = parser.parse_args(argv)
    sizes = dict(QUICK if flags.quick else FULL)
    for name in ("rows", "new"):
        if getattr(flags, name):
            sizes[name] = tuple(map(int, getattr(flags, name).split(",")))
    machine, results = Machine(sizes), []
    about = {"torch": torch.__version__, "platform": platform.platform()}
    about |= {"FLOP/s": machine.flop_rate, "bytes/s": machine.bandwidth}
    print(about | {"threads": torch.get_num_threads()})
    for folder in filter(None, (flags.model, os.environ.get("SMOLLM2"))):
        print(f"\n{folder}")
        for name in [flags.only] if flags.only else SECTIONS:
            # afresh: a step leaves an optimizer behind
            SECTIONS[name](Bench(folder, sizes, machine, results))
    if flags.json:
        found = json.dumps({"machine": about, "sizes": sizes, "rows": results}, indent=1)
        Path(flags.json).write_text(found, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
