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
BATCH = 128  # answers a step
LIMIT = ["--max_new_tokens", "256", "--format_weight", "0"]
EVALUATION = [*LIMIT, "--steps", "0", "--eval_problems", "200", "--eval_samples", "4"]


def run_script(out: Path, script: str, *flags: str) -> list[dict]:
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


def values_of(arm: str, steps: list[dict], after: dict) -> dict[str, float]:
    """What docs/results keeps of an arm; prints what it cost."""
    sampled = sum(row["tokens"] for row in steps)
    trained = sum(row["tokens"] * row["rows_trained"] / BATCH for row in steps)
    print(f"{arm}: {sampled} tokens sampled, about {trained:.0f} trained", flush=True)
    found = {arm: after["eval/accuracy"]} | details(arm, after)
    if arm == "learned":
        found["z_first"] = steps[0]["learned"]
        found["z_last"] = mean(row["learned"] for row in steps[-4:])
        found["train_before"] = mean(row["accuracy"] for row in steps[-8:-4])
        found["train_last"] = mean(row["accuracy"] for row in steps[-4:])
    return found


def details(arm: str, row: dict) -> dict[str, float]:
    names = {"z": "learned", "length": "completion_length", "gave_up": "gave_up"}
    return {f"{arm}_{short}": row[f"eval/{name}"] for short, name in names.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seed", default="0")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", default="rule,learned,both")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    seed, base = ["--seed", args.seed], ["--model", "tiny"]
    sizes = ["--sample", "120", "--eval_problems", "40"]
    rows = run_script(out / "rm", "more/reward_model.py", *base, *seed, *sizes)
    values = {"rm_auc_finished": rows[-2]["eval/auc_finished"]}  # the last is that of a new head
    task = f"more/learned_reward.py:LearnedReward:folder={out / 'rm'}"
    [row] = run_script(out / "before", "grpo.py", *base, *seed, *EVALUATION, "--task", task)
    values |= {"before": row["eval/accuracy"]} | details("before", row)
    for arm in args.arms.split(","):
        spec = ["--task", f"{task},{ARMS[arm]}"]
        flags = [*base, *seed, *LIMIT, "--batch_size", str(BATCH), "--steps", "16"]
        steps = run_script(out / arm, "grpo.py", *flags, *spec, "--eval_problems", "0")
        model = ["--model", str(out / arm / "step-000016")]
        [row] = run_script(out / f"{arm}-after", "grpo.py", *model, *seed, *EVALUATION, *spec)
        values |= values_of(arm, steps, row)
    print(json.dumps({name: round(value, 4) for name, value in values.items()}, indent=2))


if __name__ == "__main__":
    main()
