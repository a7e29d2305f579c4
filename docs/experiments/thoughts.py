"""Coconut (arXiv:2412.06769) on products of S3, and its controls, with as many updates.

Two layers of width 128 in every arm: too few to multiply five elements in one pass.

    coconut  a thought for each of the four steps, then the answer
    pause    a learnt token for a thought
    no_cot   the answer at once
    cot      all steps in words (1000 steps)

    python docs/experiments/thoughts.py --seed 0 --out out/thoughts-0

4000 updates; the default of coconut.py, 6000, is `coconut.py --resume out/thoughts-0/ARM --steps
6000` from there.

Claims, written before the runs of seeds 0, 1, 2, are in CLAIMS; names as in
docs/results/coconut.json. Whoever knows signs alone, even or odd, is right in 0.333.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from docs.experiments.runs import evaluations, parse, parser_of, run_script, show_claims  # noqa: E402

CLAIMS = [
    "coconut >= 0.90",
    "cot >= 0.97",
    "no_cot <= 0.40",
    "coconut - no_cot >= 0.40",
    "coconut - pause >= 0.05",
    "coconut_tokens <= 0.25 * cot_tokens",
]
ARMS = {
    "coconut": "--steps 4000",
    "cot": "--mode cot --steps 1000",
    "no_cot": "--mode no_cot --steps 4000",
    "pause": "--mode pause --steps 4000",
}
STAGES = "in_words", "step_1", "step_2", "step_3"  # what is thought at the end of a stage


def main() -> None:
    args, out, seed = parse(parser_of(__doc__))
    values = {}
    for arm, flags in ARMS.items():
        rows = run_script(out / arm, "coconut.py", *flags.split(), *seed)
        found = evaluations(rows)[1:]  # the ends of stages, and the last update
        values[arm] = found[-1]["eval/accuracy"]
        values[f"{arm}_tokens"] = found[-1]["eval/generated_tokens"]
        for stage, row in zip(STAGES, found, strict=False):
            if arm in ("coconut", "pause"):
                values[f"{arm}_{stage}_at"] = row["step"]
                values[f"{arm}_{stage}"] = row["eval/accuracy"]
    show_claims(values, CLAIMS)


if __name__ == "__main__":
    main()
