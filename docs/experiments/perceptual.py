"""Longer thoughts about pictures (LongPerceptualThoughts, arXiv:2504.15362), in a tiny world.

A picture is 16 codes (more/pictures.py); its record, what is where, writes the question and the
verdict. The base has learnt two things: asked without options, to tally a picture cell by cell;
asked a question, to guess at once. So what the arms learn is to use the one for the other, as a
model of images and texts knows how to describe what it sees before. Then, as in the paper:

    1  questions with four options about training pictures
    2  the base's short thoughts, three a question at temperature 0.7: right (O) or wrong (X)
    3  a reasoner who sees the record goes on after the thought: wait, a tally, the answer; O->O and
       X->O. One that sees another picture's record ends where that leads: X->X, O->X

Arms, from the base, with equally many trained tokens:

    direct    the right option, no thought
    short     right short thoughts
    expanded  as many X->O as O and O->O; of an X->O only what comes after the X is learnt
    swapped   the same, with the tally of another picture before the right answer
    dpo       expanded, then pairs: X->O over X and over X->X; O over O->X

A control, added after the runs: short_long, four times the tokens of short.

A rule stands for the language models that write questions and expansions, so none of these can
betray the record in other words, and nothing is to be filtered. All tallies are as long, so the
draw by length (2^-rank) chooses between O->O and O alone. Pairs of O over X are left out.

    python docs/experiments/perceptual.py --seed 0 --out out/lpt-0
    python docs/experiments/perceptual.py --seed 1 --base out/lpt-0/base/step-000900 --out out/lpt-1

Claims, written before the runs of seeds 0, 1, 2 (names as in docs/results/perceptual.json), are in
CLAIMS. corrected: the first guess is wrong and the answer right.
"""

import json
import sys
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from docs.experiments.runs import (  # noqa: E402
    last_checkpoint,
    parse,
    parser_of,
    run_script,
    show_claims,
    write_jsonl,
)
from more import dpo  # noqa: E402
from rewards import heldout, make_task, mean  # noqa: E402

CLAIMS = [
    "expanded >= short + 0.04",
    "dpo_corrected >= expanded_corrected + 0.05",
    "swapped <= short + 0.01",
]
TASK = "more/tasks.py:Scene"
QUESTIONS, THOUGHTS = 3000, 3
TOKENS, BATCH = 150_000, 32  # trained by each arm; lines a step
ARMS = {"short": 1, "expanded": 1, "swapped": 1, "direct": 1, "short_long": 4}  # times TOKENS
BASE = f"--task {TASK}:basics=0.7 --num_layers 3 --steps 900 --lr 2e-3 --warmup_steps 20"
SFT = f"--lr 2e-3 --warmup_steps 10 --batch_size {BATCH} --eval_problems 0 --save_every 0"
PAIRS = 1600  # for a pass of DPO
DPO = "--lr 1e-4 --sft_coef 1 --beta 0.2 --eval_problems 0 --save_every 0"  # released settings
LIMIT = 96  # tokens of a completion


def write_data(out: Path, done: list, seed: int) -> dict[str, float]:
    """Stage 3: a file of lines for each arm; what the thoughts were."""
    task, rng = make_task(TASK), Random(f"perceptual {seed}")
    names = "direct short right put_right right_swapped put_right_swapped pairs".split()
    files: dict[str, list] = {name: [] for name in names}
    for c in done:
        problem, thought = c.problem, c.text.partition("</think>")[0]
        cells = problem["cells"]
        other = task.problem("train", seed, QUESTIONS + c.number)["cells"]
        good, bad = task.expand(problem, cells, cells), task.expand(problem, other, other)
        swapped = task.expand(problem, other, cells)
        asked = task.compact(problem)
        direct = f"</think><answer>{task.answer(problem)}</answer>"
        files["direct"].append({"prompt": asked, "completion": direct})
        pairs = []
        if c.score["correct"]:
            files["short"].append({"prompt": asked, "completion": c.text})
            for name, expansion in {"right": good, "right_swapped": swapped}.items():
                [text] = rng.choices([thought + expansion, c.text], [2, 1])  # 2^-rank by length
                files[name].append({"prompt": asked, "completion": text})
        else:  # the wrong thought is given, not learnt
            given = {"prompt": asked + thought}
            files["put_right"].append(given | {"completion": good})
            files["put_right_swapped"].append(given | {"completion": swapped})
            pairs.append((thought + good, c.text))
        if not task.score(bad, problem)["correct"]:
            better = c.text if c.score["correct"] else thought + good
            pairs.append((better, thought + bad))
        for chosen, rejected in pairs:
            files["pairs"].append({"prompt": asked, "chosen": chosen, "rejected": rejected})
    few = min(len(files["right"]), len(files["put_right"]))
    for arm, end in {"expanded": "", "swapped": "_swapped"}.items():
        halves = [rng.sample(files[name + end], few) for name in ("right", "put_right")]
        files[arm] = sum(halves, [])
    number = len(files["pairs"])
    files["pairs"] = rng.sample(files["pairs"], PAIRS)
    for name in ("direct", "short", "expanded", "swapped", "pairs"):
        write_jsonl(out / f"{name}.jsonl", files[name])
    return {"right_thoughts": len(files["short"]) / len(done), "all_pairs": number}


def steps_for(path: Path, base: Path) -> int:
    """How many steps of BATCH lines train TOKENS tokens."""
    encode = dpo.load_model(base).tokenizer.encode
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    length = mean(len(encode(line["completion"]).ids) + 1 for line in lines)
    return round(TOKENS / BATCH / length)


def answers(folder: Path, problems: list, size: int, seed: int, temperature: float) -> list:
    """`size` completions of a model to each problem."""
    flags = {"task": TASK, "seed": seed, "temperature": temperature, "device": "cpu"}
    run, model = dpo.Run(dpo.Config(model=str(folder), **flags)), dpo.load_model(folder)
    prompter = dpo.Prompter(model, make_task(TASK), False)
    return dpo.rollout(run, model, prompter, list(enumerate(problems)), size, LIMIT, 0)


def cells_read(text: str, problem: dict) -> float:
    """The share of cells that stand right in a tally."""
    told = text.partition("wait")[2]
    return mean(told[4 * i : 4 * i + 2] == cell for i, cell in enumerate(problem["cells"]))


def measure(name: str, folder: Path, seed: int) -> dict[str, float]:
    """What docs/results keeps of a model; _read: of cells, where it tells them."""
    task = make_task(TASK)
    problems = heldout(task, 200)
    done = answers(folder, problems, 4, seed, 1.0)
    found = {name: mean(c.score["correct"] for c in done)}
    for mark in ("first_right", "waits", "corrected") if name != "direct" else ():  # no thought
        found[f"{name}_{mark}"] = mean(task.describe(c.text, c.problem)[mark] for c in done)
    found[f"{name}_length"] = mean(len(c.tokens) for c in done)
    if name == "base":  # it never waits: asked for tallies
        done = answers(folder, [problem | {"options": []} for problem in problems], 4, seed, 1.0)
    told = [c for c in done if name == "base" or "wait" in c.text]
    if told:
        found[f"{name}_read"] = mean(cells_read(c.text, c.problem) for c in told)
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--base", type=Path, help="checkpoint of sft.py, else it is trained")
    args, out, seed = parse(parser)
    base, task = args.base, make_task(TASK)
    if base is None:  # all seeds share it
        run_script(out / "base", "sft.py", *BASE.split(), "--eval_problems", "0", "--seed", "100")
        base = out / "base" / "step-000900"
    base = base.resolve()
    questions = [task.problem("train", args.seed, i) for i in range(QUESTIONS)]
    values = write_data(out, answers(base, questions, THOUGHTS, args.seed, 0.7), args.seed)
    folders = {"base": base}
    for arm, times in ARMS.items():
        path = out / f"{arm.removesuffix('_long')}.jsonl"
        count = times * steps_for(path, base)
        flags = ["--model", str(base), "--data", str(path), "--steps", str(count)]
        run_script(out / arm, "sft.py", *SFT.split(), *flags, *seed)
        folders[arm] = out / arm / f"step-{count:06d}"
    flags = ["--model", str(folders["expanded"]), "--data", str(out / "pairs.jsonl")]
    rows = run_script(out / "dpo", "more/dpo.py", *DPO.split(), *flags, *seed)
    folders["dpo"] = last_checkpoint(out / "dpo")
    values["pair_accuracy"] = rows[-1]["pair_accuracy"]
    for name, folder in folders.items():
        found = out / f"{name}.json"
        if not found.exists():
            found.write_text(json.dumps(measure(name, folder, args.seed)))
        values |= json.loads(found.read_text())
    show_claims(values, CLAIMS)


if __name__ == "__main__":
    main()
