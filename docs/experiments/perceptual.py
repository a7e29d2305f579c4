"""Longer thoughts about pictures (LongPerceptualThoughts, arXiv:2504.15362), in a tiny world.

A picture is 16 codes (more/pictures.py); its record, what is where, writes the question and the
verdict. The base has learnt to name a record and to guess at once. Then, as in the paper:

    1  questions with four options about training pictures
    2  the base's short thoughts, three a question at temperature 0.7: right (O) or wrong (X)
    3  a reasoner who sees the record goes on after the thought: wait, row by row, the answer;
       O->O and X->O. One that sees another picture's record ends where that leads: X->X, O->X

Arms, from the base, with equally many trained tokens:

    direct    the right option, no thought
    short     right short thoughts
    expanded  as many X->O as O and O->O; of an X->O only what comes after the X is learnt
    swapped   the same, with the rows of another picture before the right answer
    dpo       expanded, then pairs: X->O over X->X or over X; O over O->X

A rule stands for the language models that write questions and expansions, so none of these can
betray the record in other words, and nothing is to be filtered. All rows of a picture are as long,
so the draw by length (2^-rank) has nothing to choose.

    python docs/experiments/perceptual.py --seed 0 --out out/perceptual-0

Claims, written before the runs of seeds 0, 1, 2 (names as in docs/results/perceptual.json), are in
CLAIMS. corrected: the first guess is wrong and the answer right.
"""

import argparse
import json
import sys
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from docs.experiments.learned_reward import run_script  # noqa: E402
from docs.results import holds  # noqa: E402
from more import dpo  # noqa: E402
from rewards import make_task, mean  # noqa: E402

CLAIMS = [
    "expanded >= short + 0.04",
    "dpo_corrected >= expanded_corrected + 0.05",
    "swapped <= short + 0.01",
]
TASK = "more/tasks.py:Scene"
QUESTIONS, THOUGHTS = 3000, 3
BASE_STEPS, TOKENS, BATCH = 1500, 1_000_000, 32  # of the base; trained by each arm
ARMS = "direct", "short", "expanded", "swapped"
DPO = "--lr 1e-4 --sft_coef 1 --beta 0.2 --eval_problems 0"  # as the released settings
EVALUATION = "--max_new_tokens 96 --eval_problems 200 --eval_samples 4"


def short_thoughts(base: Path, seed: int) -> list:
    """Stages 1 and 2: THOUGHTS completions of the base to each of QUESTIONS training problems."""
    cfg = dpo.Config(model=str(base), task=TASK, seed=seed, temperature=0.7, device="cpu")
    run, task, model = dpo.Run(cfg), make_task(TASK), dpo.load_model(base)
    prompter = dpo.Prompter(model, task, False)
    problems = [(i, task.problem("train", seed, i)) for i in range(QUESTIONS)]
    return dpo.rollout(run, model, prompter, problems, THOUGHTS, 16, 1)


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
        bad_is_wrong = not task.score(bad, problem)["correct"]
        if c.score["correct"]:
            files["short"].append({"prompt": asked, "completion": c.text})
            for name, expansion in {"right": good, "right_swapped": swapped}.items():
                longer = rng.choice([c.text, thought + expansion])
                files[name].append({"prompt": asked, "completion": longer})
            pair = {"chosen": c.text, "rejected": thought + bad}
        else:  # the wrong thought is given, not learnt
            given = {"prompt": asked + thought}
            files["put_right"].append(given | {"completion": good})
            files["put_right_swapped"].append(given | {"completion": swapped})
            pair = {"chosen": thought + good, "rejected": rng.choice([c.text, thought + bad])}
        if bad_is_wrong:
            files["pairs"].append({"prompt": asked, **pair})
    few = min(len(files["right"]), len(files["put_right"]))
    for arm, end in {"expanded": "", "swapped": "_swapped"}.items():
        halves = [rng.sample(files[name + end], few) for name in ("right", "put_right")]
        files[arm] = sum(halves, [])
    for name in (*ARMS, "pairs"):
        text = "".join(json.dumps(line) + "\n" for line in files[name])
        out.joinpath(f"{name}.jsonl").write_text(text)
    return {"right_thoughts": len(files["short"]) / len(done), "pairs": len(files["pairs"])}


def steps_for(path: Path, base: Path) -> int:
    """How many steps of BATCH lines train TOKENS tokens."""
    encode = dpo.load_model(base).tokenizer.encode
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    length = mean(len(encode(line["completion"]).ids) + 1 for line in lines)
    return round(TOKENS / BATCH / length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    out, seed = args.out.resolve(), ["--seed", str(args.seed)]
    teach = f"--task {TASK}:basics=0.4 --lr 3e-3 --warmup_steps 10 --eval_problems 0"
    steps = ["--steps", str(BASE_STEPS)]
    run_script(out / "start", "sft.py", "--model", "tiny-draft", *teach.split(), *steps, *seed)
    base = out / "start" / f"step-{BASE_STEPS:06d}"
    values = write_data(out, short_thoughts(base, args.seed), args.seed)
    folders = {"base": base}
    for arm in ARMS:
        path, size = out / f"{arm}.jsonl", ["--batch_size", str(BATCH)]
        count = steps_for(path, base)
        flags = [*"--lr 3e-3 --warmup_steps 10 --eval_problems 0 --save_every 0".split(), *size]
        flags += ["--model", str(base), "--data", str(path), "--steps", str(count), *seed]
        run_script(out / arm, "sft.py", *flags)
        folders[arm] = out / arm / f"step-{count:06d}"
    flags = [*DPO.split(), "--model", str(folders["expanded"]), "--data", str(out / "pairs.jsonl")]
    rows = run_script(out / "dpo", "more/dpo.py", *flags, *seed)
    folders["dpo"] = sorted((out / "dpo").glob("step-*"))[-1]
    values["pair_accuracy"] = rows[-1]["pair_accuracy"]
    for arm, folder in folders.items():
        flags = ["--model", str(folder), "--task", TASK, "--steps", "0", *EVALUATION.split()]
        [row] = run_script(out / f"{arm}-after", "sft.py", *flags, *seed)
        values[arm] = row["eval/accuracy"]
        for name in ("first_right", "waits", "corrected", "completion_length"):
            values[f"{arm}_{name}"] = row[f"eval/{name}"]
    print(json.dumps({name: round(value, 4) for name, value in values.items()}, indent=2))
    for claim in CLAIMS:
        print(f"{'held' if holds(claim, values) else 'NOT held':9}{claim}")


if __name__ == "__main__":
    main()
