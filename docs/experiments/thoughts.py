"""Coconut (arXiv:2412.06769) on affine chains: two thoughts for a step, and the controls.

One layer of width 128 in every arm, so that one pass cannot compose three operations:

    coconut      two thoughts for each step
    one_thought  one thought for each step: a thought then stands a place further than the last
                 one, the operation that it needs two places, so no stage can use what the last
                 one learnt; with two thoughts the distance stays
    pause        a learnt token for a thought
    no_cot       the answer at once
    cot          all steps in words

    python docs/experiments/thoughts.py --seed 0 --out out/thoughts-0

Claims, written before the runs of seeds 0, 1, 2, are in CLAIMS; names as in
docs/results/coconut.json. 0.225 of the held-out answers are 0, the most frequent one.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from docs.experiments.runs import parse, parser_of, run_script, show_claims  # noqa: E402

CLAIMS = [
    "coconut >= 0.95",
    "cot >= 0.97",
    "no_cot <= 0.35",
    "abs(coconut - cot) <= 0.03",
    "coconut - pause >= 0.25",
    "coconut - one_thought >= 0.10",
    "coconut_tokens <= 0.4 * cot_tokens",
]
ARMS = {
    "cot": "--mode cot --steps 1000",
    "coconut": "",
    "no_cot": "--mode no_cot",
    "pause": "--mode pause",
    "one_thought": "--c 1",
}
STAGES = "in_words", "step_1", "step_2", "step_3"  # what is thought at the end of a stage


def main() -> None:
    args, out, seed = parse(parser_of(__doc__))
    values = {}
    for arm, flags in ARMS.items():
        rows = run_script(out / arm, "coconut.py", *flags.split(), *seed)
        found = [row for row in rows if "eval/accuracy" in row and row["step"] > 0]
        found.sort(key=lambda row: row["step"])
        values[arm] = found[-1]["eval/accuracy"]
        values[f"{arm}_tokens"] = found[-1]["eval/generated_tokens"]
        for stage, row in zip(STAGES, found, strict=False):
            if arm in ("coconut", "one_thought"):
                values[f"{arm}_{stage}_at"] = row["step"]
                values[f"{arm}_{stage}"] = row["eval/accuracy"]
    show_claims(values, CLAIMS)


if __name__ == "__main__":
    main()
