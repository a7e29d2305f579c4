"""GRPO on countdown with the verifier, with reward models of the base's answers, and with both.

    python docs/experiments/learned_reward.py --seed 0 --out out/learned-0

Runs more/reward_model.py on models/tiny twice, on answers to 120 problems and, weak, to 20. Then
grpo.py for 16 steps of 128 answers with each reward of more/learned_reward.py, the same problems and
random numbers: rule (weight 0), learned (rule_weight 0), both, and weak, which is learned with the
weak model. Claims, written before the runs:

    rule - learned >= 0.03                       held-out accuracy
    z_last - z_first >= 1                        arm learned, training: step 1, mean of steps 13 to 16
    train_last - train_before <= 0.02            its accuracy: steps 13 to 16, steps 9 to 12
    rule - weak >= 0.03                          and the same of arm weak, by its own model:
    weak_z_last - weak_z_first >= 0.2            (0.29 on seed 100, where 20 was settled)
    weak_train_last - weak_train_before <= 0.02

The last two of three are over-optimisation: the score rises on and accuracy does not. Printed for
each arm: CPU seconds, sampled tokens, and about how many were trained (rows with signal).
A folder --out that holds a finished part is gone on with.
"""

import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from docs.experiments.runs import parse, parser_of, run_script, show_claims  # noqa: E402

ARMS = {  # the reward model, and what its score is worth beside the rule
    "rule": ("rm", "weight=0,rule_weight=1"),
    "learned": ("rm", "weight=1"),
    "both": ("rm", "weight=1,rule_weight=1"),
    "weak": ("weak-rm", "weight=1"),
}
PROBLEMS = {"rm": 120, "weak-rm": 20}  # that a reward model learnt from
BATCH = 128  # answers a step
LIMIT = ["--max_new_tokens", "256", "--format_weight", "0"]
EVALUATION = [*LIMIT, "--steps", "0", "--eval_problems", "200", "--eval_samples", "4"]


def values_of(arm: str, steps: list[dict], after: dict) -> dict[str, float]:
    """What docs/results keeps of an arm; prints what it cost."""
    sampled = sum(row["tokens"] for row in steps)
    trained = sum(row["tokens"] * row["rows_trained"] / BATCH for row in steps)
    print(f"{arm}: {sampled} tokens sampled, about {trained:.0f} trained", flush=True)
    found = {arm: after["eval/accuracy"]} | details(arm, after)
    if arm in ("learned", "weak"):
        of = "weak_" if arm == "weak" else ""
        found[f"{of}z_first"] = steps[0]["learned"]
        found[f"{of}z_last"] = mean(row["learned"] for row in steps[-4:])
        found[f"{of}train_before"] = mean(row["accuracy"] for row in steps[-8:-4])
        found[f"{of}train_last"] = mean(row["accuracy"] for row in steps[-4:])
    return found


def details(arm: str, row: dict) -> dict[str, float]:
    names = {"z": "learned", "length": "completion_length", "gave_up": "gave_up"}
    return {f"{arm}_{short}": row[f"eval/{name}"] for short, name in names.items()}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--arms", default="rule,learned,both,weak")
    args, out, seed = parse(parser)
    base = ["--model", "tiny"]
    values, tasks = {}, {}
    for model, problems in PROBLEMS.items():
        sizes = ["--sample", str(problems), "--eval_problems", "40"]
        rows = run_script(out / model, "more/reward_model.py", *base, *seed, *sizes)
        name = f"{model.replace('-', '_')}_auc_finished"
        values[name] = rows[-2]["eval/auc_finished"]  # the last is that of a new head
        tasks[model] = f"more/learned_reward.py:LearnedReward:folder={out / model}"
    flags = [*base, *seed, *EVALUATION, "--task", tasks["rm"]]
    [row] = run_script(out / "before", "grpo.py", *flags)
    values |= {"before": row["eval/accuracy"]} | details("before", row)
    for arm in args.arms.split(","):
        model, weights = ARMS[arm]
        spec = ["--task", f"{tasks[model]},{weights}"]
        flags = [*base, *seed, *LIMIT, "--batch_size", str(BATCH), "--steps", "16"]
        steps = run_script(out / arm, "grpo.py", *flags, *spec, "--eval_problems", "0")
        trained = ["--model", str(out / arm / "step-000016")]
        [row] = run_script(out / f"{arm}-after", "grpo.py", *trained, *seed, *EVALUATION, *spec)
        values |= values_of(arm, steps, row)
        if arm == "weak":  # the start by the weak model, on the same problems
            [row] = run_script(out / "before-weak", "grpo.py", *base, *seed, *EVALUATION, *spec)
            values["before_weak_z"] = row["eval/learned"]
    show_claims(values, [])


if __name__ == "__main__":
    main()
