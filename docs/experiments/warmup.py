"""Warm-up on Knights & Knaves before RL on 64 problems (arXiv:2505.13718).

    python docs/experiments/warmup.py --seed 0 --out out/warmup-0

The paper warms a base up on long thoughts about toy puzzles, then trains with RL on at most 100
problems of another domain, whose words the base knows. Here:

    base      3 layers of width 128 from random weights. Three rows of four are the words: what
              statements with any connective are worth in a given world. One is a puzzle answered
              at once
    check     + warm-up: searches, in puzzles of 2 and 3 people with claims, not, and, or alone
    answers   + warm-up: the answers to such puzzles alone
    shuffled  + warm-up: the searches of check, their lines in random order
    target    puzzles of 3 people where each statement is an if .. then or an if and only if, which
              no search has shown. GRPO on 64 of them, from each of the four

13 rows of 16 of a warm-up are such puzzles, three are words again: else the connectives that the
puzzles lack are forgotten (0.08 on the target in place of 0.23, seed 100). All warm-ups have equal
steps and equal tokens, prompts included. Claims (accuracy on the target after RL, start_ before it,
knights_ on held-out puzzles like those of the warm-up), written before the runs of seeds 0, 1, 2,
are in CLAIMS; the first two are the gate: where they fail, the others say nothing.
"""

import sys
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from docs.experiments.runs import (  # noqa: E402
    evaluations,
    parse,
    parser_of,
    run_script,
    show_claims,
    write_jsonl,
)
from more.tasks import KnightsAndKnaves  # noqa: E402
from more.traces import perturbed, shortened  # noqa: E402
from sft import tiny_tokenizer  # noqa: E402

KNIGHTS = "knights:check=1,min_people=3"
TOYS = f"{KNIGHTS},kinds=claim/not/and/or"
TARGET = f"{KNIGHTS},kinds=implies/iff"
CUT = {"answers": "none", "short": "short"}  # what is left of a search
ARMS = "base", "check", "answers", "shuffled"
CLAIMS = [
    "knights_check >= 0.6",
    "0.05 <= start_check <= 0.6",
    "check >= base + 0.06",
    "answers <= base + 0.01",
    "shuffled <= base + 0.01",
    "check >= shuffled + 0.06",
]
BASE = {"steps": 800, "rows": 16}
WARM = {"steps": 320, "rows": 13, "replay": 3}
LIMIT = ["--max_new_tokens", "240"]  # the longest of 3000 searches has 224
EVALUATION = [*LIMIT, "--eval_samples", "4", "--eval_problems"]
RL = "--batch_size 128 --format_weight 0 --lr 4e-4 --steps 20"


def puzzle(task: KnightsAndKnaves, seed: int, index: int) -> dict:
    problem = task.problem("train", seed, index)
    return {"prompt": task.compact(problem), "completion": task.trace(problem, Random(index))}


def words(task: KnightsAndKnaves, seed: int, index: int) -> dict:
    """What each statement is worth in three random worlds: no search and no answer."""
    rng, lines = Random(f"words {seed} {index}"), []
    problem = task.problem("train", seed, index)
    for _ in range(3):
        roles = [int(rng.random() < 0.8) for _ in problem["statements"]]
        lines.append(task.checked(problem["statements"], roles, stop=False) + "\n")
    return {"prompt": task.compact(problem).removesuffix("<think>"), "completion": "".join(lines)}


def base_lines(seed: int) -> list[dict]:
    task, lines = KnightsAndKnaves(check=True), []
    for i in range(BASE["steps"] * BASE["rows"]):
        line = puzzle(task, seed, i)
        at_once = line | {"completion": shortened(line["completion"], "none")}
        lines.append(words(task, seed, i) if i % 4 else at_once)
    return lines


def warm_lines(seed: int, arm: str, count: int, replay: int) -> list[dict]:
    """Puzzles with claims, not, and, or, the same ones in all arms, and the base's words again.

    Without the latter the connectives that no puzzle has are forgotten within 250 steps.
    """
    task = KnightsAndKnaves(check=True, kinds="claim/not/and/or")
    lines = [words(KnightsAndKnaves(check=True), seed + 2000, i) for i in range(replay)]
    for i in range(count):
        line = puzzle(task, seed + 1000, i)
        completion = line["completion"]
        if arm in CUT:
            completion = shortened(completion, CUT[arm])
        elif arm == "shuffled":
            completion = perturbed(completion, "shuffle:1", Random(f"shuffle {seed} {i}"))
        lines.append(line | {"completion": completion})
    return lines


def num_tokens(lines: list[dict], arm: str) -> int:
    """With end tokens; prompts count too, but not where short is measured against check."""
    tokenizer, _ = tiny_tokenizer()
    texts = [line["completion"] for line in lines]
    if arm != "short":
        texts += [line["prompt"] for line in lines]
    return len(lines) + sum(len(row.ids) for row in tokenizer.encode_batch(texts))


def learn(out: Path, name: str, lines: list[dict], steps: int, *flags: str) -> list[dict]:
    """SFT on the lines, each once; the lines of its metrics.jsonl."""
    data = out / f"{name}.jsonl"
    write_jsonl(data, lines)
    rows = ["--batch_size", str(len(lines) // steps), "--steps", str(steps)]
    rest = ["--warmup_steps", "20", "--task", TOYS, *flags]
    return run_script(out / name, "sft.py", "--data", str(data), *rows, *rest)


def warm_up(out: Path, seed: int, arm: str) -> list[dict]:
    """The base, if it is not there, and a warm-up from it; held-out puzzles of three people."""
    given = ["--num_layers", "3", "--eval_problems", "0", "--seed", str(seed)]
    learn(out, "base", base_lines(seed), BASE["steps"], *given)
    steps, count = WARM["steps"], WARM["steps"] * WARM["rows"]
    tokens = [num_tokens(warm_lines(seed, kind, 1000, 0), arm) for kind in ("check", arm)]
    lines = warm_lines(seed, arm, round(count * tokens[0] / tokens[1]), steps * WARM["replay"])
    given = ["--model", folder_of(out / "base"), *EVALUATION, "100", "--seed", str(seed)]
    if arm in ("check", "short"):  # docs/experiments/long_short.py looks at three sizes
        given += ["--eval_every", str(steps // 4), "--save_every", str(steps // 2)]
    return learn(out, arm, lines, steps, *given)


def accuracies(rows: list[dict]) -> list[float]:
    """By step: the first is that of the start."""
    return [row["eval/accuracy"] for row in evaluations(rows)]


def folder_of(run: Path, number: int = -1) -> str:
    return str(sorted(run.glob("step-*"))[number])


def main() -> None:
    args, out, seed = parse(parser_of(__doc__))
    values = {}
    for arm in ARMS[1:]:
        rows = warm_up(out, args.seed, arm)
        [values["knights_base"], *_, values[f"knights_{arm}"]] = accuracies(rows)
    for arm in ARMS:
        flags = ["--model", folder_of(out / arm), "--task", f"{TARGET},pool=64", *RL.split()]
        rows = run_script(out / f"rl-{arm}", "grpo.py", *flags, *EVALUATION, "200", *seed)
        [values[f"start_{arm}"], *_, values[arm]] = accuracies(rows)
    show_claims(values, CLAIMS)


if __name__ == "__main__":
    main()
