"""SFT memorises, RL generalises (arXiv:2501.17161): routes in words, and hands of cards as pictures.

The paper trains under one rule and tests under another that the start knows, too. So the start
learns both, then SFT (500 problems over and over, right answers) and GRPO (the verdict alone) see
one:

    navigation  turns in compass words; tested in relative words. Its start learns routes of up to
                three legs in either space by halves
    cards       GeneralPoints, the hand a picture in codes (more/pictures.py): black suits, J, Q, K
                count 10; tested with red suits, and with 11, 12, 13 and a face card on every hand

    python docs/experiments/generalise.py --world navigation --seed 0 --out out/navigation-0

Claims, written before the runs of seeds 0, 1, 2 (names as in docs/results/data_navigation.json and
docs/results/data_cards.json), are in CLAIMS; the first say whether the start can show anything.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from docs.experiments.runs import last_checkpoint, parse, parser_of, run_script, show_claims  # noqa: E402

TASKS = {
    "navigation": "more/tasks.py:Navigation:grain=90",
    "cards": "more/tasks.py:GeneralPoints:images=1,suits=black",
}
STARTS = {  # one after the other: model, knobs that replace those of the task, flags
    "navigation": [("tiny", "grain=90,other=0.5,basics=0.3", "--lr 1e-3 --steps 600")],
    "cards": [
        ("tiny-draft", "images=1,rule=13,basics=0.5", "--lr 3e-3 --steps 800"),
        ("", "images=1,suits=black,basics=0.5", "--lr 1e-3 --steps 100"),
    ],
}
OTHERS = {
    "navigation": {"relative": "grain=90,space=relative"},
    "cards": {"red": "images=1,suits=red", "rule13": "images=1,suits=black,rule=13,faces=1"},
}
ARMS = {
    "rl": "--batch_size 256 --group_size 8 --format_weight 0 --steps 32",
    "sft": "--lr 1e-3 --warmup_steps 10 --steps 150",
    "sft_long": "--lr 1e-3 --warmup_steps 10 --steps 400",
}
CLAIMS = {
    "navigation": [
        "start >= 0.30",
        "start_relative >= 0.10",
        "rl_relative >= sft_long_relative + 0.10",
        "min(rl, sft_long) >= start",
    ],
    "cards": [
        "start >= 0.10",
        "rl_red >= sft_long_red + 0.05",
        "rl_rule13 >= sft_long_rule13 + 0.08",
        "min(rl, sft_long) >= start",
    ],
}
EVALUATION = "--steps 0 --max_new_tokens 160 --eval_problems 200 --eval_samples 4"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--world", choices=list(TASKS), default="navigation")
    args, out, seed = parse(parser)
    task = TASKS[args.world]
    kind = task.rpartition(":")[0]
    common = [*seed, "--max_new_tokens", "160", "--eval_problems", "0"]
    values = {}

    def train(name: str, script: str, model: str, task: str, flags: str) -> str:
        given = ["--model", model, "--task", task, *flags.split(), *common]
        run_script(out / name, script, *given)
        return str(last_checkpoint(out / name))

    def evaluate(name: str, folder: str) -> None:
        for end, knobs in {"": task.rpartition(":")[2], **OTHERS[args.world]}.items():
            where = f"{name}_{end}".rstrip("_")
            flags = ["--model", folder, "--task", f"{kind}:{knobs}", *EVALUATION.split()]
            [row] = run_script(out / f"{where}-after", "sft.py", *flags, *seed)
            values[where] = row["eval/accuracy"]
            if "eval/right_turns" in row:
                values[f"{where}_turns"] = row["eval/right_turns"]

    start = ""
    for i, (model, knobs, flags) in enumerate(STARTS[args.world]):
        start = train(f"start{i}", "sft.py", model or start, f"{kind}:{knobs}", flags)
    evaluate("start", start)
    for arm, flags in ARMS.items():
        script, pool = ("grpo.py", "") if arm == "rl" else ("sft.py", ",pool=500")
        evaluate(arm, train(arm, script, start, task + pool, flags))
    show_claims(values, CLAIMS[args.world])


if __name__ == "__main__":
    main()
