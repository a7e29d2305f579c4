"""A step of `python grpo.py` against the same job by TRL's GRPOTrainer, in turn.

    pip install trl datasets        # these alone are not in requirements.txt
    python docs/experiments/trl_grpo.py --steps 4 --rounds 2

Both sides: models/tiny in float32, 16 prompts x 16 answers of at most 512 tokens at temperature 1,
the same problems and verifier, one update, learning rate 2e-4 after 3 steps of warm-up, clip 0.2, no
KL term. Their random numbers differ. Printed: the median of the steps but the first of each run,
and the mean length.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from rewards import MODELS, make_task  # noqa: E402


def train_with_trl(steps: int, folder: str) -> None:
    """The job by TRL; writes seconds and mean length of each step to steps.json."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    task, lengths, ends = make_task("countdown", natural=False), [], [time.time()]
    problems = [task.problem("train", 0, n) for n in range(16 * steps)]
    rows = [{"prompt": task.compact(p), "number": n} for n, p in enumerate(problems)]

    def reward(completions, completion_ids, number, **columns):
        lengths.append(mean(len(ids) for ids in completion_ids))
        scores = [task.score(c, problems[n]) for c, n in zip(completions, number, strict=True)]
        return [score["correct"] + 0.1 * score["format"] for score in scores]

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **options):
            ends.append(time.time())

    settings = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=64,
        gradient_accumulation_steps=4,
        num_generations=16,
        max_completion_length=512,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        loss_type="grpo",
        learning_rate=2e-4,
        warmup_steps=3,
        max_grad_norm=1.0,
        max_steps=steps,
        shuffle_dataset=False,
        save_strategy="no",
        report_to="none",
        seed=0,
    )
    trainer = GRPOTrainer(
        model=str(MODELS / "tiny"),
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Clock()],
    )
    ends[0] = time.time()
    trainer.train()
    took = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    with open(os.path.join(folder, "steps.json"), "w") as file:
        json.dump({"seconds": took, "length": mean(lengths)}, file)


def run(side: str, steps: int) -> tuple[float, float]:
    """Median seconds of a step but the first, and the mean length, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [__file__, "--side", folder, "--steps", str(steps)]
        if side == "grpo":
            flags = f"--steps {steps} --eval_problems 0 --save_every 0 --no-decay"
            command = [ROOT / "grpo.py", *flags.split(), "--out", f"{folder}/out"]
        subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.DEVNULL)
        if side == "trl":
            found = json.loads(Path(folder, "steps.json").read_text())
            return median(found["seconds"][1:]), found["length"]
        lines = [json.loads(line) for line in Path(folder, "out", "metrics.jsonl").open()]
    seconds = [line["seconds_sample"] + line["seconds_train"] for line in lines[1:]]
    return median(seconds), mean(line["completion_length"] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)  # the folder of TRL's process
    args = parser.parse_args()
    if args.side:
        train_with_trl(args.steps, args.side)
        return
    for _ in range(args.rounds):
        for side in ("grpo", "trl"):
            seconds, length = run(side, args.steps)
            print(f"{side:5} {seconds:6.2f} s a step, mean length {length:.0f}", flush=True)


if __name__ == "__main__":
    main()
