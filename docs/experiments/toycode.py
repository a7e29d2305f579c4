"""AceCoder (arXiv:2502.01718) on ToyCode: pairs by pass rates, a reward model, best of 16.

    python docs/experiments/toycode.py --seed 0 --out out/toycode-0
    python docs/experiments/toycode.py --seed 1 --policy out/toycode-0/policy --out out/toycode-1

sft.py makes a policy of 4 layers from nothing, which answers 300 training problems 16 times. Its
programs are run on the hidden tests, and pairs of eq. 6 (more/reward_model.py) train a reward model
of the policy, 100 steps of 10 pairs. It picks one of 16 answers to each of 150 unseen problems.
Controls: every difference of pass rates is a pair; the strict pairs with labels at random; no model,
but the first program that passes most of the shown tests. Also printed: checks_true, the share of
the checks in the thoughts that state the program's value and the right mark; mark_true, the share of
answers whose last mark says whether it passes the shown tests. Claims, written before the runs:

    pair_share >= 0.15                   of the training problems give a pair; else nothing is claimed
    best_of_16 - mean >= 0.10            all hidden tests pass
    best_of_16 - greedy >= 0.03
    best_of_16 >= all_pairs - 0.01
    abs(shuffled - mean) <= 2 * se       se: standard error over problems of shuffled
"""

import argparse
import copy
import json
import re
import sys
import time
from pathlib import Path
from random import Random

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from docs.experiments.runs import run_script  # noqa: E402
from more import reward_model as rm  # noqa: E402
from more.tasks import run_toy  # noqa: E402
from rewards import epoch_order, heldout, in_groups, make_task, mean, pass_at_k  # noqa: E402

TRAINING, UNSEEN, ANSWERS, LIMIT = 300, 150, 16, 160
STEPS, PAIRS = 100, 10  # of a reward model


def pairs_of(cfg, groups: list, rule: str) -> list:
    """Examples by the shares of hidden tests passed; of no end as if nothing passed."""
    examples = []
    for group in groups:
        answers = []
        for c in group:
            rate = c.score.get("passed", 0) / c.score.get("tests", 1)
            answers.append((c.prompt + c.tokens, rate * c.finished, c.finished))
        examples += rm.group_examples(cfg, str(group[0].number), answers, rule)
    return rm.balanced(examples, Random(cfg.seed))


def shuffled_labels(examples: list, seed: int) -> list:
    """The same pairs, the better one drawn by lot."""
    rng, found = Random(f"labels {seed}"), []
    for example in examples:
        other = copy.copy(example)
        other.rows = rng.sample(example.rows, 2)
        found.append(other)
    return found


def train_scorer(run, policy: Path, examples: list) -> tuple:
    """Model and head after STEPS of PAIRS pairs: the loop of more/reward_model.py."""
    cfg, model = run.cfg, rm.load_model(policy)
    head = rm.first_head(model, cfg.seed)
    trained = torch.nn.ModuleList([model.model, head])
    optimizer = torch.optim.AdamW(trained.parameters(), weight_decay=0.01, fused=True)
    order = []
    for epoch in range(1 + STEPS * PAIRS // len(examples)):
        order += epoch_order(len(examples), cfg.seed, epoch)
    for step in range(1, STEPS + 1):
        batch = [examples[i] for i in order[(step - 1) * PAIRS : step * PAIRS]]
        rm.judge_examples(run, model, head, batch, learn=True)
        lr = cfg.lr * min(1.0, step / cfg.warmup_steps, (1 + STEPS - step) / STEPS)
        run.update(trained, optimizer, lr)
    return model, head


def picked(groups: list, scores: list[float]) -> list[bool]:
    """Whether the answer with the highest score of each group is right."""
    found = []
    for group, r in zip(groups, in_groups(scores, ANSWERS), strict=True):
        found.append(group[rm.best_of(r)].score["correct"])
    return found


def aucs(groups: list, scores: list[float]) -> float:
    """AUC within problems, of the answers that ended."""
    found = []
    for group, r in zip(groups, in_groups(scores, ANSWERS), strict=True):
        which = [i for i, c in enumerate(group) if c.finished]
        found.append(([r[i] for i in which], [group[i].score["correct"] for i in which]))
    return rm.auc_within(found)


def stated_checks(thought: str, shown: list) -> list[bool]:
    """Of each check `;x:...=value+`, whether program and shown pair say the same.

    >>> stated_checks("f(x)=(x+1);3:(3+1)=4+;-2:(-2+1)=1-", [[[3], 4], [[-2], 5]])
    [True, False]
    """
    found, wanted = [], {x: y for [x], y in shown}
    for line in thought.split("\n"):
        program, *checks = line.split(";")
        for check in checks:
            parts = re.fullmatch(r"(-?[0-9]+):.*=(-?[0-9]+|e)([+-])", check)
            if parts is None:
                found.append(False)
                continue
            x, value, mark = int(parts[1]), parts[2], parts[3]
            status, output = run_toy(program, [x])
            same = value == (str(output) if status == "ok" else "e")
            passes = status == "ok" and output == wanted.get(x)
            found.append(same and passes == (mark == "+"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000, help="of sft.py")
    parser.add_argument("--policy", type=Path, help="run of sft.py, else one is made")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.policy or args.out.resolve() / "policy"
    if not args.policy:
        flags = f"--task toycode --num_layers 4 --steps {args.steps} --eval_problems 0"
        run_script(out, "sft.py", *flags.split(), "--seed", str(args.seed))
    policy = out / f"step-{args.steps:06d}"
    cfg = rm.Config(model=str(policy), task="toycode", seed=args.seed, lr=3e-4, device="cpu")
    cfg.micro_batch_tokens = 2048
    run, task = rm.Run(cfg), make_task("toycode")
    model = rm.load_model(policy)
    prompter = rm.Prompter(model, task, False)

    def answers(split_problems: list, size: int, step: int) -> list:
        done = rm.rollout(run, model, prompter, split_problems, size, LIMIT, step)
        print(f"{sum(len(c.tokens) for c in done)} tokens sampled", flush=True)
        return in_groups(done, size)

    problems = [(i, task.problem("train", args.seed, i)) for i in range(TRAINING)]
    learnt = answers(problems, ANSWERS, 1)
    unseen = list(enumerate(heldout(task, UNSEEN)))
    groups = answers(unseen, ANSWERS, 0)
    run.cfg.temperature = 0.0
    greedy = [group[0].score["correct"] for group in answers(unseen, 1, 0)]
    done = sum(groups, [])
    right = [sum(c.score["correct"] for c in group) for group in groups]
    shown = [c.score.get("shown", 0) for c in done]
    true_checks = []
    for c in done:
        true_checks += stated_checks(c.text.partition("</think>")[0], c.problem["shown"])
    strict = pairs_of(cfg, learnt, "strict")
    everything = pairs_of(cfg, learnt, "any")
    values = {
        "mean": mean(c.score["correct"] for c in done),
        "pass_rate": mean(c.score.get("passed", 0) / c.score.get("tests", 1) for c in done),
        "greedy": mean(greedy),
        "checks_true": mean(true_checks),
        "mark_true": mean(task.describe(c.text, c.problem)["mark_true"] for c in done),
        "oracle": mean(pass_at_k(ANSWERS, count, ANSWERS) for count in right),
        "most_shown": mean(picked(groups, shown)),
        "pair_share": len({e.prompt for e in strict}) / TRAINING,
        "pairs": len(strict),
        "pairs_all": len(everything),
    }
    print(values, flush=True)
    arms = {"best_of_16": strict, "all_pairs": everything}
    arms["shuffled"] = shuffled_labels(strict, args.seed)
    for name, examples in arms.items():
        began = time.process_time()
        scorer = train_scorer(run, policy, examples)
        scores = rm.score_rows(*scorer, [c.prompt + c.tokens for c in done])
        chosen = picked(groups, scores)
        values |= {name: mean(chosen), f"{name}_auc": aucs(groups, scores)}
        print(f"{name}: {time.process_time() - began:.0f} CPU seconds", flush=True)
    values["se"] = (values["shuffled"] * (1 - values["shuffled"]) / UNSEEN) ** 0.5
    print(json.dumps({name: round(value, 4) for name, value in values.items()}, indent=2))


if __name__ == "__main__":
    main()
