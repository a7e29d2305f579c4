"""Recurrent depth (arXiv:2502.05171) trained with few iterations, then given many.

With five iterations in training both a random and a fixed depth have arrived at a point that more
iterations do not leave. Two are too few to arrive: what do more do then?

    random  1 + Poisson iterations, two on average (eq. 6)
    fixed   always two

    python docs/experiments/shallow.py --seed 0 --out out/shallow-0

Claims, written before the runs of seeds 0, 1, 2, are in CLAIMS: X_r is the share of right labels
after r iterations, X_last_r that of right last labels; names as in docs/results/shallow.json.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from docs.experiments.runs import evaluations, parse, parser_of, run_script, show_claims  # noqa: E402

CLAIMS = [
    "fixed_2 - fixed_64 >= 0.05",
    "random_64 - random_2 >= -0.02",
    "(fixed_2 - fixed_64) - (random_2 - random_64) >= 0.05",
    "random_64 - fixed_64 >= 0.03",
    "random_1 - fixed_1 >= 0.15",
]
TEST_R = 1, 2, 4, 8, 16, 32, 64


def main() -> None:
    args, out, seed = parse(parser_of(__doc__))
    values = {}
    for arm in ("random", "fixed"):
        flags = f"--mean_r 1 --recurrence {arm}"
        rows = run_script(out / arm, "recurrent_depth.py", *flags.split(), *seed)
        for r in TEST_R:
            values[f"{arm}_{r}"] = evaluations(rows)[-1][f"eval/accuracy@{r}"]
            values[f"{arm}_last_{r}"] = evaluations(rows)[-1][f"eval/last_accuracy@{r}"]
    show_claims(values, CLAIMS)


if __name__ == "__main__":
    main()
