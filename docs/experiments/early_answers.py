"""Wait where a model answers too early and looks again at what it found (s1, arXiv:2501.19393).

models/tiny has never seen a Wait behind a hit, so there a second one does harm. Here it learns,
from countdown's own searches, two habits of the models that s1 forces: to answer before the
search is over, and to write a found solution once more when it goes on thinking.

    miss   ends the search with probability 0.5, and its wrong expression is the answer; else wait,
           in half of the cases, and the next try
    hit    is followed by wait and the same line, up to four times, each with probability 0.5

Then budget_forcing.py with 1, 2, 4 and 8 Waits, against votes of as many tokens.

    python docs/experiments/early_answers.py --seed 0 --out out/early-0

Claims, written before the runs of seeds 0, 1, 2 (names as in docs/results/early_answers.json), are in
CLAIMS: n Waits against none (cap 512), against votes of n answers, which take as many tokens, and
one Wait against the delimiter suppressed with nothing (none) or a random word (word) in its place.
"""

import sys
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from docs.experiments.runs import parse, parser_of, run_script, show_claims, write_jsonl  # noqa: E402
from rewards import make_task  # noqa: E402

CLAIMS = [
    "wait_1 - cap_512 >= 0.03",
    "min(wait_2 - wait_1, wait_4 - wait_2, wait_8 - wait_4) > 0",
    "wait_4 - cap_512 >= 0.10",
    "wait_4 >= vote_4",
    "wait_8 >= vote_8",
    "wait_1 > max(none_1, word_1)",
]
LINES, STEPS = 9600, 300
WAITS = "1,2,4,8"
SETTINGS = {
    "cap": (16, 32, 64, 128, 256, 512),
    "vote": (2, 4, 8),
    "wait": (1, 2, 4, 8),
    "none": (1,),
    "word": (1,),
}


def early(task, problem: dict, rng: Random) -> str:
    """A search that often ends on a miss, or looks again at a hit."""
    thought, _, answer = task.trace(problem, rng).partition("</think>")
    lines, kept = thought.replace("wait", "").splitlines(keepends=True), []
    for line in lines[:-1]:
        kept.append(("wait" if kept and rng.random() < 0.5 else "") + line)
        if rng.random() < 0.5:
            tried = line.partition("=")[0]
            return f"{''.join(kept)}</think><answer>{tried}</answer>"
    kept.append(("wait" if kept and rng.random() < 0.5 else "") + lines[-1])
    for _ in range(4):
        if rng.random() < 0.5:
            break
        kept.append(f"wait{lines[-1]}")
    return f"{''.join(kept)}</think>{answer}"


def main() -> None:
    args, out, seed = parse(parser_of(__doc__))
    task, path = make_task("countdown:give_up=0"), out / "early.jsonl"
    lines = []
    for i in range(LINES):
        problem = task.problem("train", args.seed, i)
        completion = early(task, problem, Random(f"early {args.seed} {i}"))
        lines.append({"prompt": task.compact(problem), "completion": completion})
    write_jsonl(path, lines)
    flags = f"--model tiny --lr 1e-3 --warmup_steps 10 --steps {STEPS} --eval_problems 0"
    run_script(out / "learnt", "sft.py", *flags.split(), "--data", str(path), *seed)
    folder = out / "learnt" / f"step-{STEPS:06d}"
    flags = ["--model", str(folder), "--waits", WAITS, "--eval_samples", "8", "--tries", "1", *seed]
    rows = run_script(out / "forced", "docs/experiments/budget_forcing.py", *flags)
    values = {}
    for side, numbers in SETTINGS.items():
        where = f"{folder.name}/{side}"
        found = [row for row in rows if f"accuracy/{where}" in row]
        for number, row in zip(numbers, found, strict=True):
            values[f"{side}_{number}"] = row[f"accuracy/{where}"]
            values[f"{side}_{number}_tokens"] = row[f"sampled/{where}"]
            for name in ("repaired", "flipped") if side == "wait" else ():
                values[f"{side}_{number}_{name}"] = row[f"{name}/{where}"]
    show_claims(values, CLAIMS)


if __name__ == "__main__":
    main()
