"""What reading less costs and saves, which model is worth its memory, and a real model's text.

    python docs/experiments/kinetics.py --seed 0                        # reading
    python docs/experiments/kinetics.py --seed 0 --part models --eval_samples 16 --eval_problems 100
    python docs/experiments/kinetics.py --seed 0 --part text --model FOLDER --data FILE
    python docs/experiments/kinetics.py --resume out/A                  # reading, only the table
    python docs/experiments/kinetics.py --part models --runs out/B      # models, only the table

reading: a run of more/kinetics.py, same records, same random numbers. `single` is one answer, cut
at a cap; `many` also the best of 2 and 4 by the verifier (coverage); both are chosen on every other
problem as the cheapest that reach 0.60 (0.75), dense or by blocks, and measured on the rest. The
caps are 64, 128, 256, 512; `_fine`, added after the runs of the three seeds, has every multiple of
32, because among four the dense answer overshoots 0.60 and pays for it.

models: tiny-draft (0.09 M parameters) against tiny-rl and tiny (0.92 M), caps from 64 to 512
tokens, 1 to 16 answers, coverage. The smaller model is chosen up to `until` by FLOPs (I = 0) and by
eFLOPs (I = 562.5); the paper says that counting bytes makes the larger ones take over earlier.
`larger` is the least coverage at which a larger one of the two stands on the frontier of all three
(added after the runs, as `until` turned out to be the ceiling of tiny-draft).
`knowing` is the mean over problems of the best coverage of any setting within the cost of one
whole answer of tiny-rl: picked with knowledge of the answers, an upper bound, `plain` the setting
that the other problems choose.

text: the loss of the reference solutions of GSM8K, in nats a token, that a model has when it reads
four solved problems and the question densely, then the solution token by token in each way. It
measures what a way to read loses where a small model would solve too few problems to count them.

Claims, written down before the runs of seeds 0, 1, 2, are in CLAIMS; seed 100 settled the knobs.
"""

import json
import sys
import time
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
import torch

from docs.results import holds
from more import kinetics
from more.kinetics import (
    Cache,
    checkpoints,
    compare_reading,
    cost_curve,
    frontier,
    load_model,
    main,
    option,
    pad_rows,
    rules_of,
    shape_of,
    solve,
    sparsify,
    trade,
)
from rewards import BadInput, in_groups, mean, read_json, resolve_model

CLAIMS = {
    "reading": [
        "block_8 >= dense - 0.03",
        "block_8 >= oracle_8 - 0.05",
        "window_8 <= block_8 - 0.05",
        "random_8 <= window_8",
        "block_2 >= window_2 + 0.10",
        "block_2 >= random_2 + 0.10",
        "bytes_block_8 <= 0.50 * bytes_dense",
        "bytes_block_2 <= 0.30 * bytes_dense",
        "cost_single_block <= 0.5 * cost_single_dense",
        "cost_many_block <= cost_many_dense",
    ],
    "models": ["until_bytes <= until_flops"],
    "text": [
        "loss_block_8 <= loss_dense + 0.05",
        "loss_window_4 >= loss_block_4 + 0.05",
        "loss_random_8 >= loss_block_8 + 0.10",
    ],
}
LEVELS = {"single": 0.60, "many": 0.75}
MODELS = "tiny-draft", "tiny-rl", "tiny"


@dataclass
class Config(kinetics.Config):
    part: Literal["reading", "models", "text"] = option("reading", "what is measured")
    runs: str = option("", "--out of an earlier --part models, whose table is made again")


def curves_of(cfg: Config, shapes: dict, rules: dict):
    @cache
    def curves(way: str, context: int) -> tuple:
        rule = rules.get(way)
        return cost_curve(shapes[way], rule, context, cfg.max_new_tokens, cfg.dense_layers)

    return curves


def caps_of(cfg: Config) -> list[int]:
    return [cfg.max_new_tokens // 2**power for power in (3, 2, 1, 0)]


def reading(cfg: Config) -> dict[str, float]:
    """The values of docs/results/kinetics.json of a seed."""
    records = run_of(cfg, cfg.model, rules_of)
    rules = rules_of(cfg)
    shape = shape_of(load_model(resolve_model(cfg.model)).config)
    metrics, values = compare_reading(cfg, records, shape, rules), {}
    names = {"accuracy": "", "gap_se": "gap_se_", "tokens": "tokens_", "kv_bytes": "bytes_"}
    names |= {"kv_share": "share_", "seconds": "seconds_", "finished": "finished_"}
    for way in rules:
        for name, before in names.items():
            values[before + way.replace("@", "_")] = metrics[f"eval/{name}/{way}"]
    curves = curves_of(cfg, dict.fromkeys(rules, shape), rules)
    fine = range(32, cfg.max_new_tokens + 1, 32)
    for grid, caps in (("", caps_of(cfg)), ("_fine", fine)):
        parts = [trade(records[i::2], curves, caps, cfg.intensity) for i in (0, 1)]
        for (level, least), way in product(LEVELS.items(), ("dense", "block")):
            some = {name: parts[0][name] for name in parts[0] if name.startswith(way)}
            if level == "single":
                some = {name: point for name, point in some.items() if name.endswith("/1")}
            chosen = [name for name in frontier(some) if some[name][1] >= least]
            if not chosen:
                raise BadInput(f"no setting of {way} reaches {least}")
            print(f"{level}{grid} {way}: {chosen[0]}")
            cost, coverage = parts[1][chosen[0]]
            values |= {f"cost_{level}{grid}_{way}": cost, f"coverage_{level}{grid}_{way}": coverage}
    return values


def run_of(cfg: Config, model: str, ways) -> list[dict]:
    """The records of a run, a new one or that of --resume."""
    cfg.model = model
    if not cfg.resume:
        cfg.out = cfg.out or f"out/kinetics-{model}-{cfg.seed}-{time.strftime('%y%m%d-%H%M%S')}"
    code = solve(cfg, ways)
    if code:
        sys.exit(code)
    return read_json(checkpoints(Path(cfg.resume or cfg.out))[-1] / "records.json")["records"]


def only_dense(cfg: Config) -> dict:
    return {"dense": None}


def models(cfg: Config) -> dict[str, float]:
    """Frontiers over models, with memory and without."""
    records, shapes, values, out = [], {}, {}, cfg.out
    for model in MODELS:
        cfg.out = f"{out}/{model}" if out else ""
        shapes[model] = shape_of(load_model(resolve_model(model)).config)
        if cfg.runs:
            cfg.max_new_tokens = read_json(Path(cfg.runs, model, "run.json"))["config"]["max_new_tokens"]
            found = read_json(checkpoints(Path(cfg.runs, model))[-1] / "records.json")["records"]
        else:
            found = run_of(cfg, model, only_dense)
        records = records or [{} for _ in found]
        for record, other in zip(records, found, strict=True):
            record[model] = other["dense"]
        name = model.replace("-", "_")
        values[name] = mean(mean(record[model]["right"]) for record in records)
        values[f"tokens_{name}"] = mean(mean(record[model]["tokens"]) for record in records)
        values[f"seconds_{name}"] = mean(record[model]["seconds"] for record in records)
    curves = curves_of(cfg, shapes, {})
    for name, intensity in (("flops", 0.0), ("bytes", cfg.intensity)):
        dev, test = (trade(records[i::2], curves, caps_of(cfg), intensity) for i in (0, 1))
        pair = {key: point for key, point in dev.items() if not key.startswith("tiny/")}
        values[f"until_{name}"] = max(
            (test[key][1] for key in frontier(pair) if key.startswith("tiny-draft")), default=0.0
        )
        values[f"larger_{name}"] = min(
            test[key][1] for key in frontier(dev) if not key.startswith("tiny-draft")
        )
        print(f"{name}: " + " ".join(f"{key}={test[key][1]:.3f}" for key in frontier(dev)))
        budget = dev[f"tiny-rl/{cfg.max_new_tokens}/1"][0]
        chosen = [key for key in frontier(dev) if dev[key][0] <= budget][-1]
        values[f"plain_{name}"] = test[chosen][1]
        values[f"knowing_{name}"] = mean(
            best_within(trade([record], curves, caps_of(cfg), intensity), budget)
            for record in records[1::2]
        )
    return values


def best_within(points: dict, budget: float) -> float:
    return max((coverage for cost, coverage in points.values() if cost <= budget), default=0.0)


def solved_text(row: dict) -> str:
    return f"Question: {row['question']}\nAnswer:"


@torch.inference_mode()
def text(cfg: Config) -> dict[str, float]:
    """Loss of reference solutions, read token by token."""
    model = load_model(resolve_model(cfg.model), "cpu").requires_grad_(False)
    cfg.blocks, cfg.block, cfg.recent = cfg.blocks or "4,8", cfg.block or 16, cfg.recent or 16
    lines = [json.loads(line) for line in Path(cfg.data).read_text().splitlines()]
    order = np.random.default_rng(cfg.seed).permutation(len(lines))[: 4 + cfg.eval_problems]
    shown, asked = [lines[i] for i in order[:4]], [lines[i] for i in order[4:]]
    before = "".join(f"{solved_text(row)} {row['answer']}\n\n" for row in shown)
    encode, totals, counts, values = model.tokenizer.encode, {}, 0, {}
    rules = rules_of(cfg)
    for some in in_groups(asked, 8):
        prompts = [encode(before + solved_text(row)).ids for row in some]
        answers = [encode(" " + row["answer"]).ids[: cfg.max_new_tokens or 128] for row in some]
        counts += sum(map(len, answers))
        for way, losses in read_answers(model, prompts, answers, rules, cfg.dense_layers).items():
            totals[way] = totals.get(way, 0.0) + losses
        print(f"{counts} tokens", {way: round(x / counts, 4) for way, x in totals.items()}, flush=True)
    for way, rule in rules.items():
        name = way.replace("@", "_")
        values[f"loss_{name}"] = totals[way] / counts
        seen = mean(map(len, prompts)) + 64
        kept = rule.count(np.array([seen]))[0][0] if rule else seen
        values[f"kept_{name}"] = float(kept / seen)  # share of the keys, half-way
    return values


def read_answers(model, prompts: list, answers: list, rules: dict, dense_layers: int) -> dict:
    """Sum of the losses of the answers' tokens by way; the prompts are read once, densely."""
    ends = torch.tensor([len(ids) for ids in prompts])
    tokens, given = (pad_rows(rows, ends.device, torch.long) for rows in (answers, prompts))
    lengths = torch.tensor([len(ids) for ids in answers])
    store = Cache(model, len(prompts), given.shape[1] + tokens.shape[1])
    store.width = given.shape[1]
    sparsify(model, None, 0)
    first = model(given, store)[range(len(prompts)), ends - 1]
    found = {}
    for way, rule in rules.items():
        sparsify(model, rule, dense_layers)
        store.lengths.copy_(ends)  # what was written behind is forgotten
        total, hidden = 0.0, first
        for t in range(tokens.shape[1]):
            logprobs = model.logits(hidden).log_softmax(-1)
            losses = -logprobs.gather(1, tokens[:, t : t + 1])[:, 0]
            total += float(losses[t < lengths].sum())
            store.width = int(ends.max()) + t + 1
            hidden = model(tokens[:, t : t + 1], store)[:, 0]
        found[way] = total
    return found


def measure_part(cfg: Config) -> int:
    """The values of a part, and what became of its claims."""
    if cfg.part == "text" and not cfg.data:
        raise BadInput("--part text: give --data, GSM8K's lines")
    values = {"reading": reading, "models": models, "text": text}[cfg.part](cfg)
    for name, value in values.items():
        print(f"{name:28}{value:14.6g}")
    for claim in CLAIMS[cfg.part]:
        print(f"{'held' if holds(claim, values) else 'NOT held':9}{claim}")
    return 0


if __name__ == "__main__":
    sys.exit(main(measure_part, Config))
