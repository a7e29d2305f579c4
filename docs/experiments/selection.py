"""Which lines to learn from: s1 (arXiv:2501.19393), LIMO (2502.03387), LiteCoT (2505.19716).

The pool is an answer of each of four writers to the same problems: models/tiny, which often gives
up, tiny-draft, tiny-rl, which searches on, and the task's own search: a third of the lines ends on
a wrong answer. The student gives up too early and solves one problem in ten. For s1 easy is what
tiny-draft solves in two attempts; LIMO's window is what the student solves in 1 to 3 of 32 (nobody
weaker is there for its other filter). Each rule chooses 160 lines, and the student learns them for
as many tokens.

    random, longest, s1, limo   what a rule takes
    right                       one right line each of 160 problems, which no rule looks at
    shortest                    the shortest right line each of the same problems

    python docs/experiments/selection.py --seed 0 --out out/selection-0

CLAIMS were written before the runs of seeds 0, 1, 2. A folder --out that holds a finished part is
gone on with. Printed for each choice: its lines, how many are right, their mean length, and what
the student makes of them; the length of its answers, and how often it gives up.
"""

import os
import sys
from collections import Counter
from pathlib import Path
from random import Random
from statistics import mean

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from docs.experiments.runs import (  # noqa: E402
    evaluations,
    last_checkpoint,
    parse,
    parser_of,
    run_script,
    show_claims,
    write_jsonl,
    write_traces,
)
from more.traces import length_of, select  # noqa: E402
from rewards import make_task  # noqa: E402

CLAIMS = [
    "right - student >= 0.05",
    "s1 - random >= 0.05",
    "s1 >= longest",
    "limo - random >= 0.05",
    "longest - random >= 0.05",
    "shortest >= right - 0.02",
    "shortest_length / right_length <= 0.7",
]
TASK = "countdown"
COUNTDOWN = make_task(TASK)
TOKENIZER = str(ROOT / "models/tiny/tokenizer.json")
PROBLEMS, ATTEMPTS, SIZE = 200, 32, 160
TOKENS = 250_000  # that every arm trains on
STUDENT = "--model tiny-draft --task countdown:give_up=0.9 --lr 2e-3 --steps 150"
LEARN = "--warmup_steps 10 --micro_batch_tokens 4096 --save_every 0"
LEARN += " --max_new_tokens 256 --eval_problems 200 --eval_samples 4"


def make_pool(out: Path, student: str, seed: str) -> list[dict]:
    """The lines of all writers, with what is known of their problems."""
    ask = ["--task", TASK, "--seed", seed, "--max_new_tokens", "256"]

    def answers(name: str, model: str, attempts: int) -> list[dict]:
        flags = [*ask, "--sample", str(PROBLEMS), "--attempts", str(attempts), "--keep", "all"]
        return write_traces(out / f"{name}.jsonl", *flags, "--model", model)

    solved = {x["prompt"]: x["solved"] for x in answers("tried", student, ATTEMPTS)}
    weak = {x["prompt"] for x in answers("weak", "tiny-draft", 2) if x["correct"]}
    written = {name: answers(name, name, 1) for name in ("tiny", "tiny-rl", "tiny-draft")}
    written["own"] = write_traces(out / "own.jsonl", *ask[:4], "--traces", str(PROBLEMS))
    tokenizer, pool = Tokenizer.from_file(TOKENIZER), []
    for writer, lines in written.items():
        for line in lines:
            known = judged(line) | {"writer": writer, "attempts": ATTEMPTS}
            known["weak"] = line["prompt"] in weak
            known["solved"] = solved.get(line["prompt"], 0)
            known["length"] = len(tokenizer.encode(known["completion"]).ids) + 1
            pool.append(known)
    return pool


def judged(line: dict) -> dict:
    """The line with what the verifier says of it; its domain are the operators of its answer."""
    numbers, target = line["prompt"].removesuffix("<think>").split("=")
    problem = {"numbers": [int(n) for n in numbers.split(",")], "target": int(target)}
    found = COUNTDOWN.score(line["completion"], problem)
    operators = "".join(sorted(set("+-*/") & set(found["answer"] or "")))
    known = {"correct": found["correct"], "format": found["format"], "domain": operators}
    return {"prompt": line["prompt"], "completion": line["completion"]} | known


def right_ones(pool: list[dict], rng: Random) -> dict[str, list[dict]]:
    """Of the right lines to SIZE problems any, and the shortest (2505.19716)."""
    by_prompt = {}
    for line in pool:
        if line["correct"]:
            by_prompt.setdefault(line["prompt"], []).append(line)
    asked = rng.sample(sorted(by_prompt), min(SIZE, len(by_prompt)))
    return {
        "right": [rng.choice(by_prompt[prompt]) for prompt in asked],
        "shortest": [min(by_prompt[prompt], key=length_of) for prompt in asked],
    }


def main() -> None:
    args, out, seed = parse(parser_of(__doc__))
    values = {}

    def learn(name: str, flags: str) -> None:
        rows = run_script(out / name, "sft.py", *flags.split(), *LEARN.split(), *seed)
        after = evaluations(rows)[-1]
        values[name] = after["eval/accuracy"]
        values[f"{name}_length"] = after["eval/completion_length"]
        values[f"{name}_gave_up"] = after["eval/gave_up"]

    learn("student", STUDENT)
    student = str(last_checkpoint(out / "student"))
    pool = make_pool(out, student, args.seed)
    choices = {}
    for rule in ("random", "longest", "s1", "limo"):
        lines = [line | {"weak": line["weak"] and rule == "s1"} for line in pool]
        choices[rule] = select(lines, rule, SIZE, Random(f"select {args.seed}"))
    choices |= right_ones(pool, Random(f"right {args.seed}"))
    for name, lines in choices.items():
        data = out / f"chosen-{name}.jsonl"
        write_jsonl(data, lines)
        length = mean(line["length"] for line in lines)
        values[f"{name}_lines"] = len(lines)
        values[f"{name}_right"] = mean(line["correct"] for line in lines)
        values[f"{name}_chosen_length"] = length
        steps = round(TOKENS / (32 * length))
        learn(name, f"--model {student} --data {data} --lr 2e-3 --steps {steps}")
        print(name, dict(Counter(line["writer"] for line in lines)), flush=True)
    show_claims(values, CLAIMS)


if __name__ == "__main__":
    main()
    os._exit(0)
