"""GRPO on countdown with the verifier, with a reward model of the base's answers, and with both.

    python docs/experiments/learned_reward.py --seed 0 --out out/learned-0

Runs more/reward_model.py on models/tiny, then grpo.py for 16 steps of 128 answers with each reward
of more/learned_reward.py, the same problems and random numbers: rule (weight 0), learned (rule_weight
0), both. Claims, written before the runs:

    rule - learned >= 0.03                       held-out accuracy
    z_last - z_first >= 1                        arm learned, training: step 1, mean of steps 13 to 16
    train_last - train_before <= 0.02            its accuracy: steps 13 to 16, steps 9 to 12

The last two together are over-optimisation: the score rises on and accuracy does not. Printed for
each arm: CPU seconds, sampled tokens, and about how many were trained (rows with signal).
A folder --out that holds a finished part is gone on with.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent.parent
ARMS = {"rule": "weight=0,rule_weight=1", "learned": "weight=1", "both": "weight=1,rule_weight=1"}
SAMPLING = ["--batch_size", "128", "--max_new_tokens", "256", "--eval_samples", "8"]


def run(out: Path, script: str, *flags: str) -> list[dict]:
    """A script as a process, unless its run is there; the lines of its metrics.jsonl."""
    log = out.with_suffix(".log")
    if not log.exists() or "go on: " not in log.read_text():
        began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        with log.open("w") as file:
            command = [sys.executable, str(ROOT / script), *flags, "--out", str(out)]
            subprocess.run(command, cwd=ROOT, stdout=file, check=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began
        print(f"{out.name}: {used:.0f} CPU seconds", flush=True)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def evaluations(rows: list[dict]) -> tuple[dict, dict]:
    """Before and after: the last two evaluations of a run, which come in the other order."""
    after, before = [row for row in rows if "eval/accuracy" in row][-2:]
    return before, after


def values_of(arm: str, rows: list[dict]) -> dict[str, float]:
    """What docs/results keeps of an arm; prints what it cost."""
    steps = [row for row in rows if "rows_trained" in row]
    before, after = evaluations(rows)
    sampled = sum(row["tokens"] for row in steps)
    trained = sum(row["tokens"] * row["rows_trained"] / 128 for row in steps)
    print(f"{arm}: {sampled} tokens sampled, about {trained:.0f} trained", flush=True)
    found = {
        arm: after["eval/accuracy"],
        f"{arm}_z": after["eval/learned"],
        f"{arm}_length": after["eval/completion_length"],
        f"{arm}_clipped": after["eval/clipped_ratio"],
        f"{arm}_gave_up": after["eval/gave_up"],
    }
    if arm == "learned":
        found |= {"before": before["eval/accuracy"], "before_z": before["eval/learned"]}
        found |= {"before_length": before["eval/completion_length"]}
        found["z_first"] = steps[0]["learned"]
        found["z_last"] = mean(row["learned"] for row in steps[-4:])
        found["train_before"] = mean(row["accuracy"] for row in steps[-8:-4])
        found["train_last"] = mean(row["accuracy"] for row in steps[-4:])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seed", default="0")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", default="16")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    same = ["--model", "tiny", "--seed", args.seed]
    rows = run(out / "rm", "more/reward_model.py", *same, "--eval_problems", "50")
    before, after = evaluations(rows)
    values = {"rm_auc_finished": after["eval/auc_finished"]}
    task = f"more/learned_reward.py:LearnedReward:folder={out / 'rm'}"
    for arm, weights in ARMS.items():
        flags = [*same, *SAMPLING, "--steps", args.steps, "--format_weight", "0"]
        rows = run(out / arm, "grpo.py", *flags, "--task", f"{task},{weights}")
        values |= values_of(arm, rows)
    print(json.dumps({name: round(value, 4) for name, value in values.items()}, indent=2))


if __name__ == "__main__":
    main()
