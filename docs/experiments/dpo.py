"""What more/dpo.py is measured against: the same pairs learnt in other ways, and GRPO.

models/tiny answers training problems; right answers over wrong ones are the pairs. All arms start
from models/tiny again, and the first four train on as many tokens:

    dpo         more/dpo.py, a = 0 in its eq. 3
    dpo_sft     the same with a = 1
    sft         sft.py on the chosen answers alone
    flipped     more/dpo.py with chosen and rejected exchanged, a control: it must get worse
    grpo        grpo.py, which samples anew in each step

Printed for each arm: accuracy and length on held-out problems, the same random numbers for all;
on pairs of held-out problems, which none is trained on, the share whose better answer has the
larger implicit reward, and by how many nats an answer log pi has moved, there and on pairs that are
learnt; CPU seconds with those of sampling the pairs, tokens sampled and trained.

    python docs/experiments/dpo.py --seed 0

Answers that ran into the limit are in no pair: a file's text would give them an end.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from more import dpo  # noqa: E402
from rewards import heldout, in_groups, make_task, mean  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems", type=int, default=240, help="training problems to answer")
    parser.add_argument("--cap", type=int, default=2, help="pairs per problem at most")
    parser.add_argument("--dpo_lr", type=float, default=3e-4)
    parser.add_argument("--sft_lr", type=float, default=5e-4)
    parser.add_argument("--grpo_lr", type=float, default=4e-4)
    parser.add_argument("--grpo_steps", type=int, default=6)
    parser.add_argument("--sft_coef", type=float, default=1.0, help="a of dpo_sft")
    parser.add_argument("--eval_problems", type=int, default=200)
    parser.add_argument("--eval_samples", type=int, default=4)
    parser.add_argument("--out", default="", help="folder of all runs")
    args = parser.parse_args()
    args.out = Path(args.out or f"out/dpo-arms-{args.seed}-{time.strftime('%y%m%d-%H%M%S')}")
    return args


def child_seconds() -> float:
    """CPU seconds of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_script(script: str, flags: str, out: Path) -> dict:
    """Run a script of this repository without evaluations: its last checkpoint and its costs."""
    flags = f"--eval_problems 0 --save_every 0 {flags} --out {out}"
    began = child_seconds()
    with open(f"{out}.log", "w") as log:
        command = [sys.executable, ROOT / script, *flags.split()]
        subprocess.run(command, check=True, stdout=log, stderr=log)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    return {
        "folder": max(out.glob("step-*")),
        "seconds": child_seconds() - began,
        "tokens": sum(line["tokens"] for line in lines),
    }


def make_pairs(run, model, prompter, problems: list, cap: int) -> tuple[list, int]:
    """Right over wrong answers to each (number, problem), and how many tokens were sampled."""
    cfg, pairs = run.cfg, []
    limit = cfg.max_new_tokens
    done = []
    for part in in_groups(problems, 64):
        done += dpo.rollout(run, model, prompter, part, cfg.attempts, limit, step=1)
    for group in in_groups(done, cfg.attempts):
        ended = [c for c in group if c.finished]
        answers = [{"text": c.text, "correct": c.score["correct"]} for c in ended]
        rng = Random(f"pairs {cfg.seed} {group[0].number}")
        found = dpo.find_pairs("correct", answers, cap, rng)
        pairs += [(ended[w], ended[x]) for _, w, x in found]
    return pairs, sum(len(c.tokens) for c in done)


def write_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_files(folder: Path, prompter, pairs: list) -> dict[str, Path]:
    """The pairs, the same exchanged, and the chosen answers alone, as JSONL."""
    straight, flipped, chosen = [], [], []
    for better, worse in pairs:
        asked = prompter.text(better.problem)
        straight.append({"prompt": asked, "chosen": better.text, "rejected": worse.text})
        flipped.append({"prompt": asked, "chosen": worse.text, "rejected": better.text})
        chosen.append({"prompt": asked, "completion": better.text})
    return {
        "straight": write_lines(folder / "pairs.jsonl", straight),
        "flipped": write_lines(folder / "flipped.jsonl", flipped),
        "chosen": write_lines(folder / "chosen.jsonl", chosen),
    }


def train_arms(args, files: dict[str, Path], pairs: list) -> dict[str, dict]:
    """All arms from models/tiny; sft takes as many steps as make dpo's tokens."""
    seed, out = f"--seed {args.seed}", args.out
    arms, flags = {}, {}
    for name in ("straight", "flipped"):
        flags[name] = f"--data {files[name]} --lr {args.dpo_lr} {seed}"
    held = f"{flags['straight']} --sft_coef {args.sft_coef}"
    arms["dpo"] = run_script("more/dpo.py", flags["straight"], out / "dpo")
    arms["dpo_sft"] = run_script("more/dpo.py", held, out / "dpo_sft")
    arms["flipped"] = run_script("more/dpo.py", flags["flipped"], out / "flipped")
    a_step = 32 * mean(len(better.tokens) for better, _ in pairs)
    steps = round(arms["dpo"]["tokens"] / a_step)
    sft = f"--model tiny --data {files['chosen']} --lr {args.sft_lr} --warmup_steps 6"
    sft += f" --batch_size 32 --steps {steps} {seed}"
    arms["sft"] = run_script("sft.py", sft, out / "sft")
    grpo = f"--lr {args.grpo_lr} --steps {args.grpo_steps} {seed}"
    arms["grpo"] = run_script("grpo.py", grpo, out / "grpo")
    return arms


class Judge:
    """Held-out problems, pairs of such, some that are learnt, what the start says of both."""

    def __init__(self, run, start, prompter, unseen: list, learnt: list):
        self.run, self.prompter, self.refs = run, prompter, []
        self.sets = [as_ids(unseen), as_ids(learnt)]
        for pairs in self.sets:
            self.refs.append(dpo.reference_logprobs(run, start, pairs))  # (2, P)

    def __call__(self, folder: Path) -> dict[str, float]:
        model = dpo.load_model(folder, self.run.device)
        found = dpo.evaluate(self.run, model, self.prompter, 0)
        moved = []
        for pairs, ref in zip(self.sets, self.refs, strict=True):
            moved.append(dpo.reference_logprobs(self.run, model, pairs) - ref)
        unseen, learnt = moved  # (2, P), nats an answer
        return {
            "accuracy": found["eval/accuracy"],
            "se": found["eval/accuracy_se"],
            "length": found["eval/completion_length"],
            "gave_up": found["eval/gave_up"],
            "pair_accuracy": (unseen[0] > unseen[1]).float().mean().item(),
            "logp_chosen": unseen[0].mean().item(),
            "logp_rejected": unseen[1].mean().item(),
            "logp_chosen_learnt": learnt[0].mean().item(),
            "logp_rejected_learnt": learnt[1].mean().item(),
        }


def as_ids(pairs: list) -> list[tuple]:
    return [(better.prompt, better.tokens, worse.tokens) for better, worse in pairs]


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True)
    torch.set_num_threads(1)
    counts = {"eval_problems": args.eval_problems, "eval_samples": args.eval_samples}
    run = dpo.Run(dpo.Config(seed=args.seed, **counts))
    run.folder = args.out
    start, _ = run.load(dpo.BY_SIZE)
    task = make_task(run.cfg.task)
    prompter = dpo.Prompter(start, task, chat=False)

    began = time.process_time()
    problems = [(n, task.problem("train", args.seed, n)) for n in range(args.problems)]
    pairs, sampled = make_pairs(run, start, prompter, problems, args.cap)
    seconds = time.process_time() - began
    problems = list(enumerate(heldout(task, args.eval_problems // 2)))
    unseen, _ = make_pairs(run, start, prompter, problems, 4)
    judge = Judge(run, start, prompter, unseen, pairs[:200])
    lengths = [mean(len(c.tokens) for c in side) for side in zip(*pairs, strict=True)]
    print(f"{len(pairs)} pairs to learn, {len(unseen)} held out")
    print(f"{sampled} tokens sampled in {seconds:.0f} s")
    print(f"mean length: chosen {lengths[0]:.0f}, rejected {lengths[1]:.0f}", flush=True)

    arms = train_arms(args, write_files(args.out, prompter, pairs), pairs)
    rows = {"start": judge(start.folder)}
    for name, arm in arms.items():
        rows[name] = judge(arm["folder"])
        cost = {"seconds": seconds + arm["seconds"], "sampled": sampled, "trained": arm["tokens"]}
        if name == "grpo":  # its answers are its own; those without advantage are not trained
            cost |= {"seconds": arm["seconds"], "sampled": arm["tokens"]}
        rows[name] |= cost
    (args.out / "arms.json").write_text(json.dumps(rows, indent=2))
    for name, row in rows.items():
        cells = ", ".join(f"{key} {value:.4g}" for key, value in row.items())
        print(f"{name:8} {cells}", flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)
