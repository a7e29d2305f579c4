"""Long against short thoughts (arXiv:2502.03373 sec. 3), on Knights & Knaves.

    python docs/experiments/long_short.py --seed 0 --out out/warmup-0

From the base of docs/experiments/warmup.py (with the same --out nothing is learnt twice), on puzzles
of 2 and 3 people with claims, not, and, or:

    long     its arm check: the whole search, a line for each world up to the one that passes
    short    the last line alone: the world that passes, which must be guessed, and its checks

Both learn the same number of completion tokens (so short sees about two and a half times as many
puzzles), and are looked at after a quarter, a half and all of them. Then GRPO on a stream of puzzles
of 3 people, from both after all of them. Claims, written before the runs of seeds 0, 1, 2, are in CLAIMS.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from docs.experiments.runs import parse, parser_of, run_script, show_claims  # noqa: E402
from docs.experiments.warmup import EVALUATION, TOYS, accuracies, folder_of, warm_up  # noqa: E402

RUNS = {"long": "check", "short": "short"}
CLAIMS = [
    "long >= short + 0.08",
    "short - short_half <= 0.04",
    "long_rl - long_before >= short_rl - short_before + 0.03",
]
RL = "--batch_size 256 --format_weight 0 --lr 2e-4 --steps 16"


def main() -> None:
    args, out, seed = parse(parser_of(__doc__))
    values = {}
    for name, arm in RUNS.items():
        rows = warm_up(out, args.seed, arm)
        values["start"], quarter, half, _, whole = accuracies(rows)
        values |= {f"{name}_quarter": quarter, f"{name}_half": half, name: whole}
        values[f"{name}_tokens"] = float(sum(row.get("tokens", 0) for row in rows))
        flags = ["--model", folder_of(out / arm), "--task", TOYS, *EVALUATION, "200"]
        flags += ["--seed", str(args.seed), *RL.split()]
        rows = run_script(out / f"grpo-{arm}", "grpo.py", *flags)
        for row in rows:
            if "eval/accuracy" in row:
                when = "rl" if row["step"] else "before"
                values[f"{name}_{when}"] = row["eval/accuracy"]
                values[f"{name}_{when}_clipped"] = row["eval/clipped_ratio"]
    show_claims(values, CLAIMS)


if __name__ == "__main__":
    main()
