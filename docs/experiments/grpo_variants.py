"""What Dr. GRPO, DAPO and DeepScaleR change, on countdown, 128 answers a step.

    python docs/experiments/grpo_variants.py --seed 0 --out out/variants-0

Each paper where its effect has room; all arms are grpo.py.

    Dr. GRPO (arXiv:2503.20783): neither the std in the advantage nor lengths in the loss (dr); GRPO
        (long) punishes a token of a long wrong answer less. From models/tiny, 16 steps
    DAPO (2503.14476), 32 problems over and over, 48 tokens, 8 updates a rollout, so that entropy
        falls, groups run out of signal and eq. 3 clips: low (both clips 0.2), high (0.28 above),
        dynamic (high, and up to three more batches for groups with signal)
    DeepScaleR, from models/tiny, as many sampled tokens each: answers of at most 512 tokens (long),
        128 (short), 128 and then 512 (staged); all are evaluated at 512

Claims, written before the runs of seeds 0, 1, 2 (names as in docs/results/grpo_variants.json), are in
CLAIMS. Lengths by outcome, entropy, clipping and signal (trained rows, of those of a step) are
means over the last 8 steps of training.
"""

import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from docs.experiments.runs import evaluations, parse, parser_of, run_script, show_claims  # noqa: E402

COMMON = "--batch_size 128 --eval_problems 200 --eval_samples 4 --save_every 0"
POOL = "--task countdown:pool=32 --max_new_tokens 48 --steps 24 --updates 8 --no-decay --lr 1e-4"
POOL += " --aggregation token --format_weight 0"
ARMS = {
    "low": POOL,
    "high": f"{POOL} --clip_high 0.28",
    "dynamic": f"{POOL} --clip_high 0.28 --dynamic_sampling 3",
    "long": "--steps 16",
    "dr": "--steps 16 --advantage none --aggregation constant",
    "short": "--length_schedule 128:0 --steps 28",
    "staged": "--length_schedule 128:0,512:14 --steps 21",
}
CLAIMS = [
    "dr_wrong_length <= 0.9 * long_wrong_length",
    "dr >= long - 0.03",
    "high_entropy > low_entropy",
    "dynamic_signal >= high_signal + 0.10",
    "dynamic >= high - 0.02",
    "staged >= short + 0.03",
    "staged >= long",
]
TRAINED = {"wrong_length": "completion_length/wrong", "right_length": "completion_length/correct"}
TRAINED |= {"entropy": "entropy", "clip_high": "clip_frac_high", "clip_low": "clip_frac_low"}
HELD_OUT = {"length": "completion_length", "clipped": "clipped_ratio", "pass_at_4": "pass@4"}


def values_of(arm: str, rows: list[dict]) -> dict[str, float]:
    """What docs/results keeps of a run, from its metrics.jsonl."""
    steps = [row for row in rows if "reward" in row]
    before, after = evaluations(rows)
    values = {f"{arm}_before": before["eval/accuracy"], arm: after["eval/accuracy"]}
    for name, metric in HELD_OUT.items():
        values[f"{arm}_{name}"] = after[f"eval/{metric}"]
    for name, metric in TRAINED.items():
        values[f"{arm}_{name}"] = mean(row[metric] for row in steps[-8:])
    values[f"{arm}_signal"] = mean(row["rows_trained"] / 128 for row in steps[-8:])
    values[f"{arm}_tokens"] = sum(row["tokens"] for row in steps)
    return values


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    args, out, seed = parse(parser)
    values = {}
    for arm in args.arms:
        flags = [*COMMON.split(), *ARMS[arm].split(), *seed]
        values |= values_of(arm, run_script(out / arm, "grpo.py", *flags))
    show_claims(values, CLAIMS if args.arms == list(ARMS) else [])


if __name__ == "__main__":
    main()
