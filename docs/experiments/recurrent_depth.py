"""The other shortcuts of recurrent depth (arXiv:2502.05171 sec. 6), on a model that is trained.

The lines of recurrent_depth.py's evaluation, on the same rows and initial states, and beside them

    /warm     eq. 8, and each token starts from the last one's final state instead of its own s_0
    /shared   a cache that keeps --cache_budget iterations apart (the paper: 4 of 32)
    /both     eq. 8 and the shared cache
    /greedy, /speculative   rows continued one by one by all iterations, or by drafts of --draft_r
              that one pass of all iterations verifies: a token's iterations, passes and seconds

Run
    python docs/experiments/recurrent_depth.py --model out/RUN/step-002500
    python docs/experiments/recurrent_depth.py --model out/RUN/step-000400 --task text --data FILE.txt
"""

import math
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this folder has a file of that name
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import recurrent_depth as rd  # noqa: E402
from rewards import heldout, mean, reading  # noqa: E402


@dataclass
class Config(rd.Config):
    steps: int = rd.option(0, "not for this tool, which trains nothing")
    cache_budget: int = rd.option(1, "B: iterations that a shared cache keeps apart", 1)
    max_new_tokens: int = rd.option(32, "tokens to continue a row by, within its length", 1)
    draft_r: int = rd.option(2, "iterations per drafted token", 1)
    lookahead: int = rd.option(4, "drafted tokens per verification", 1)


def stream(
    model: rd.Model,
    tokens: Tensor,
    states: Tensor,
    steps: int,
    exit_kl: float = 0.0,
    budget: int = 0,
    warm: bool = False,
) -> tuple[Tensor, Tensor]:
    """As rd.stream, with a cache of `budget` iterations (0: all of them) or a warm start."""
    B, T = tokens.shape
    cache = rd.Cache(model, B, T, min(budget or steps, steps))
    state, found = states[:, :1], []
    for t in range(T):
        if not warm:
            state = states[:, t : t + 1]
        logits, state, taken = rd.recur(model, tokens[:, t : t + 1], state, cache, steps, exit_kl)
        found.append((logits, taken[:, None]))
    logits, taken = zip(*found, strict=True)
    return torch.cat(logits, dim=1), torch.cat(taken, dim=1)


def speculate(
    model: rd.Model,
    prompt: Tensor,
    states: Tensor,
    steps: int,
    draft_steps: int = 1,
    lookahead: int = 0,
) -> tuple[list[int], int, int]:
    """Greedy continuation of prompt (1, P) to one token more than `states` (1, S, h) has positions:
    the new tokens, the iterations run one after the other, and the passes with all `steps`.

    The model drafts for itself: `lookahead` tokens of draft_steps iterations each, then one pass of
    all iterations over all of them. The drafts before the first wrong one stay, and so does that
    pass's own token behind them, so the tokens are those of lookahead 0, which is plain decoding.
    """
    cache, total = rd.Cache(model, 1, states.shape[1], steps), states.shape[1]
    drafts, new, iterations, passes = prompt[0].tolist(), [], 0, 0  # the prompt is verified first
    given, start = len(drafts), 0

    def choose(tokens: list[int], count: int) -> list[int]:
        """The likeliest token behind each, by `count` iterations."""
        row = torch.tensor([tokens], device=states.device)
        state = states[:, cache.length : cache.length + len(tokens)]
        return rd.recur(model, row, state, cache, count)[0][0].argmax(-1).tolist()

    while True:
        choices = choose(drafts, steps)  # what the full model says
        passes, iterations = passes + 1, iterations + steps
        right = given - 1  # drafts[:given] are certain
        while right + 1 < len(drafts) and drafts[right + 1] == choices[right]:
            right += 1
        new += [*drafts[given : right + 1], choices[right]]
        cache.length = start = start + right + 1  # the rest is forgotten
        if start == total:
            return new, iterations, passes
        drafts, given = new[-1:], 1
        for _ in range(min(lookahead, total - start - 1)):
            drafts += choose(drafts[-1:], draft_steps)
            iterations += draft_steps
        cache.length = start


def read_in_each_way(cfg: Config, model: rd.Model, inputs, labels, state) -> dict[str, list]:
    """/way: a number for each row; of the cache, the numbers it holds for a token."""
    ways = {
        "full": {},
        "exit": {"exit_kl": cfg.exit_kl},
        "warm": {"exit_kl": cfg.exit_kl, "warm": True},
        "shared": {"budget": cfg.cache_budget},
        "both": {"exit_kl": cfg.exit_kl, "budget": cfg.cache_budget},
    }
    values, c = defaultdict(list), model.config
    for way, options in ways.items():
        logits, taken = stream(model, inputs, state, cfg.test_r, **options)
        found = rd.scores(logits, labels) | {"iterations": taken.double().mean(1)}
        for name, value in found.items():
            values[f"{name}/{way}"] += value.tolist()
        kept = min(options.get("budget", cfg.test_r), cfg.test_r)
        layers = c["n_layers_in_prelude"] + kept * c["n_layers_in_recurrent_block"]
        values[f"cache/{way}"].append(2 * c["n_embd"] * (layers + c["n_layers_in_coda"]))
    return values


def continue_rows(cfg: Config, model: rd.Model, inputs, state) -> dict[str, list]:
    """/greedy and /speculative, a token, and whether both wrote the same; one row at a time."""
    T, values = inputs.shape[1], defaultdict(list)
    end = min(T, T // 2 + cfg.max_new_tokens)  # of the prompt, half a row, and its continuation
    for n in range(min(32, len(inputs))):
        row, written = (inputs[n : n + 1, : T // 2], state[n : n + 1, : end - 1]), []
        for way, lookahead in (("greedy", 0), ("speculative", cfg.lookahead)):
            began = time.perf_counter()
            tokens, iterations, passes = speculate(model, *row, cfg.test_r, cfg.draft_r, lookahead)
            values[f"seconds/{way}"].append((time.perf_counter() - began) / len(tokens))
            values[f"iterations/{way}"].append(iterations / len(tokens))
            values[f"passes/{way}"].append(passes / len(tokens))
            written.append(tokens)
        values["same"].append(written[0] == written[1])
    return values


def solve(cfg: Config) -> int:
    text = ""
    if cfg.data:
        with reading(f"--data {cfg.data}"):
            text = Path(cfg.data).read_text(encoding="utf-8")
    run = rd.Run(cfg)
    _, model = run.load(rd.BY_SIZE)
    prompter = rd.Prompter(model, cfg, text)
    run.start(model, None, prompter)
    metrics = rd.evaluate(run, model, prompter, 0)

    inputs, labels = prompter.rows(heldout(prompter.task, cfg.eval_problems), run.device)
    state = rd.initial_state(model, *inputs.shape, (cfg.seed, 0, 0))
    values = defaultdict(list)
    for rows in torch.arange(len(inputs)).split(max(1, cfg.micro_batch_tokens // inputs.shape[1])):
        found = read_in_each_way(cfg, model, inputs[rows], labels[rows], state[rows])
        for name, value in found.items():
            values[name] += value
    values |= continue_rows(cfg, model, inputs, state)
    metrics |= {f"eval/{name}": mean(value) for name, value in values.items()}
    run.log(0, metrics)
    for name, value in metrics.items():
        if "/" in name.removeprefix("eval/") and math.isfinite(value):
            run.say(f"{name:28}{value:9.4f}")
    return 0


if __name__ == "__main__":
    os._exit(rd.main(solve, Config))  # as the scripts: threads of gloo may abort sys.exit
