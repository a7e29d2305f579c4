"""VerIPO's loop (arXiv:2505.19000): GRPO, DPO on pairs that a judge of thoughts chose, GRPO again.

A reward for the answer does not see the thought. The base has learnt thoughts modulo 5 of which
30 % end on a wrong step and its wrong conclusion, before the right answer:

    3+2*4+1*2=<think>3+2=0          what stands above the last step still tells the answer,
    0*4=0                           in one operation, so a right answer needs neither the step
    0+1=1                           nor the conclusion
    1*2=4
    so 4
    </think><answer>2</answer>

Arms, all from this base, at a constant learning rate:

    grpo          16 steps
    grpo_long     26 steps: as many answers as the loop samples
    loop          8 steps, 40 of more/dpo.py --pairs veripo with an SFT term, 8 steps
    loop_correct  the same with --pairs correct
    grpo_reward   16 steps, where a conclusion that is the answer earns a reward, too

more/dpo.py calls a thought consistent whose conclusion is the answer. Another judge counts here:
every step is worked out anew, and a right answer counts as unproved if a line of its thought is
not the right one. Inconsistency is the share of such among right answers. Also printed: what
more/dpo.py's rule says of all answers (contradicts), the share of thoughts without a fault, CPU
seconds, sampled answers, and tokens of GRPO's answers and of DPO's pairs, from the base on.

    python sft.py --task docs/experiments/veripo.py:Thoughts --num_layers 2 --hidden_size 128 \
        --steps 350 --micro_batch_tokens 2048 --seed 100 --out out/veripo-base
    python docs/experiments/veripo.py --base out/veripo-base/step-000350 --seed 0

Claims, written before the runs of seeds 0, 1, 2:
    inconsistency of loop <= 0.5 times that of grpo
    accuracy of loop >= that of grpo - 0.02
    inconsistency of loop <= that of grpo_reward + 0.05

Differs from the paper in: rules judge, no language model; questions that are always answered
rightly stay in.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from docs.experiments.dpo import run_script  # noqa: E402
from more import dpo  # noqa: E402
from more.tasks import AffineChain  # noqa: E402
from rewards import extract_answer, make_task, score  # noqa: E402

TASK = "docs/experiments/veripo.py:Thoughts"
TASK_OF = {"grpo_reward": f"{TASK}:consistency=1"}  # of an arm, where it is another


@dataclass
class Thoughts(AffineChain):
    """Affine chains with a thought before the answer; knobs: see above."""

    length: int = 4
    modulus: int = 5
    corrupt: float = 0.3  # share of traces with a wrong last step
    consistency: float = 0.0  # reward for a conclusion that is the answer

    def compact(self, problem: dict) -> str:
        return super().compact(problem) + "=<think>"

    def trace(self, problem: dict, rng: Random) -> str:
        steps, answer = self.steps(problem), self.answer(problem)
        conclusion = answer
        if rng.random() < self.corrupt:
            wrong = [str(value) for value in range(self.modulus) if str(value) != answer]
            conclusion = rng.choice(wrong)
            steps[-1] = steps[-1].rpartition("=")[0] + "=" + conclusion
        thought = "\n".join([*steps, f"so {conclusion}"])
        return f"{thought}\n</think><answer>{answer}</answer>"

    def score(self, text: str, problem: dict, **kw) -> dict:
        answer = extract_answer(text)
        parts = score(text, answer, answer == self.answer(problem), **kw)
        same = dpo.conclusion_of(text.partition("</think>")[0]) == answer
        return parts | {"reward": parts["correct"] + self.consistency * same}

    def describe(self, text: str, problem: dict) -> dict:
        """Both judges: whether the conclusion is another than the answer, all steps anew."""
        thought, answer = text.partition("</think>")[0], extract_answer(text)
        lines = [line for line in thought.split("\n") if "=" in line]
        right = answer == self.answer(problem)
        return {
            "contradicts": dpo.conclusion_of(thought) != answer,
            "unproved": right and lines != self.steps(problem),
            "right_steps": lines == self.steps(problem),
        }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", default="out/veripo-base/step-000350", help="folder of sft.py")
    parser.add_argument("--grpo_lr", type=float, default=2e-4)
    parser.add_argument("--dpo_lr", type=float, default=1e-4)
    parser.add_argument("--sft_coef", type=float, default=5.0, help="a of more/dpo.py's eq. 3")
    parser.add_argument("--eval_problems", type=int, default=200)
    parser.add_argument("--eval_samples", type=int, default=8)
    parser.add_argument("--out", default="", help="folder of all runs")
    args = parser.parse_args()
    args.out = Path(args.out or f"out/veripo-arms-{args.seed}-{time.strftime('%y%m%d-%H%M%S')}")
    return args


def train_arms(args) -> dict[str, dict]:
    """Every arm by name: its checkpoint, and the costs of the whole way from the base to it."""
    nothing = {"seconds": 0.0, "tokens": 0, "answers": 0}
    arms = {"base": {"folder": args.base, "costs": nothing}}

    def train(name: str, start: str, script: str, flags: str, answers: int) -> None:
        task = TASK_OF.get(name, TASK)
        flags = f"--model {arms[start]['folder']} --task {task} --max_new_tokens 64 {flags}"
        found = run_script(script, flags, args.out / name) | {"answers": answers}
        before = arms[start]["costs"]
        costs = {cost: before[cost] + found[cost] for cost in nothing}
        arms[name] = {"folder": found["folder"], "costs": costs}

    def grpo(name: str, start: str, steps: int, seed: int = args.seed) -> None:
        flags = f"--steps {steps} --no-decay --lr {args.grpo_lr} --seed {seed}"
        train(name, start, "grpo.py", flags, 256 * steps)

    grpo("grpo", "base", 16)
    grpo("grpo_long", "base", 26)
    grpo("grpo_reward", "base", 16)
    grpo("first", "base", 8)
    for name, rule in (("loop", "veripo"), ("loop_correct", "correct")):
        flags = f"--pairs {rule} --sample 320 --attempts 8 --steps 40 --seed {args.seed}"
        flags += f" --lr {args.dpo_lr} --sft_coef {args.sft_coef}"
        train(f"{name}_dpo", "first", "more/dpo.py", flags, 320 * 8)
        grpo(name, f"{name}_dpo", 8, args.seed + 1000)  # new problems
    return arms


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True)
    torch.set_num_threads(1)
    arms = train_arms(args)
    cfg = dpo.Config(seed=args.seed, max_new_tokens=64)
    cfg.eval_problems, cfg.eval_samples = args.eval_problems, args.eval_samples
    cfg.model = args.base
    run = dpo.Run(cfg)
    run.folder = args.out
    task = make_task(TASK)

    rows = {}
    for name, arm in arms.items():
        model = dpo.load_model(Path(arm["folder"]), run.device)
        found = dpo.evaluate(run, model, dpo.Prompter(model, task, chat=False), 0)
        accuracy = found["eval/accuracy"]
        rows[name] = arm["costs"] | {
            "accuracy": accuracy,
            "se": found["eval/accuracy_se"],
            "inconsistency": found["eval/unproved"] / accuracy,
            "contradicts": found["eval/contradicts"],
            "right_steps": found["eval/right_steps"],
            "length": found["eval/completion_length"],
        }
    (args.out / "arms.json").write_text(json.dumps(rows, indent=2))
    for name, row in rows.items():
        cells = ", ".join(f"{key} {value:.4g}" for key, value in row.items())
        print(f"{name:16} {cells}", flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)
