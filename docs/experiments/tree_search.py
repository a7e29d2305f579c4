"""Search step by step against votes, where a vote alone cannot win (arXiv:2408.03314, 2502.06703).

The policy, 2 layers of width 64, writes chains of eight operations modulo 7, a step a line, and is
stopped while it still has facts wrong: it gets those wrong again and again, and then so does the
commonest answer. Reward models of steps (more/reward_model.py --kind process) start from it and
learn from its answers to training problems, where a rule labels each line: right after the line
before it, or not.

    clean     the rule's labels: the main one
    noisy     20 % of them flipped
    shuffled  scores of the main one, dealt out anew among the rows of a problem: the control
    rule      the rule itself on held-out problems: the ceiling

Had the clean one an AUC of 0.98 on the lines of seed 100, it would be a solver in disguise, and the
noisy one the main one; it had 0.86. All arms at the sampled tokens of 4, 8 and 16 answers, those of
pruned rows too: majority, best of N and weighted vote by a reward model, beam and DVTS
(more/best_of_n.py), width 4. Bins come from 32 other answers to each problem. optimal: eq. 6 of
more/best_of_n.py among all ways of the main one and ways to reduce its scores, chosen on every other
problem and measured on the rest; single: the one way that is best on all of the former.

    python docs/experiments/tree_search.py --models out/tree --make    # once
    python docs/experiments/tree_search.py --models out/tree --seed 0

Claims, written down before the runs of seeds 0, 1, 2, are in CLAIMS; _hard: on the medium and hard
problems, at most half of whose answers are right. The policy, how long the reward models learn and
that the least score of a row's lines counts were settled on seed 100.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import stdev
from string import ascii_lowercase

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from docs.experiments.dpo import write_lines  # noqa: E402
from docs.results import holds  # noqa: E402
from more import best_of_n as bn  # noqa: E402
from more.reward_model import auc_within  # noqa: E402
from more.tasks import AffineChain  # noqa: E402
from rewards import Completion, heldout, in_groups, make_task, mean, micro_batches  # noqa: E402

TASK = "docs/experiments/tree_search.py:Lettered:length=8,modulus=7"
SIZES = 4, 8, 16
REDUCE = "last", "min", "prod", "mean"
MAIN = "clean"
OTHERS = "last", "prod", "mean"
SEARCHED = "min"  # a line's label says nothing of those before it
PROBE = 32  # more answers, for the bins
FLIPPED = 0.2
ENOUGH = 3.5  # nats of a trace: where the policy is stopped
LEARNT = "--epochs 30 --batch_size 32 --lr 2e-3"  # of the reward models

CLAIMS = [  # behind: 100 problems of seed 100, prod instead of min
    "beam_clean_8_hard >= majority_8_hard + 0.05",  # 0.603, 0.302
    "beam_shuffled_8 <= majority_8",  # 0.440, 0.545
    "abs(beam_clean_8_easy - majority_8_easy) <= 0.03",  # 0.784, 0.959: no
    "optimal_8 >= single_8 - 0.01",
    "optimal_16 >= single_16 - 0.01",
    "beam_noisy_8 - best_noisy_8 <= beam_clean_8 - best_clean_8",  # -0.08, 0.08
]


@dataclass
class Lettered(AffineChain):
    """Affine chains with a letter for each place, so that two layers find it again.

    >>> task, problem = Lettered(), {"start": 6, "operations": ["*6", "+1"]}
    >>> task.compact(problem), task.lines(problem)
    ('s6a*6b+1', ['', 's6', 'a*6=1', 'b+1=2', '2'])
    """

    def compact(self, problem: dict) -> str:
        parts = zip(ascii_lowercase, problem["operations"], strict=False)
        operations = "".join(letter + operation for letter, operation in parts)
        return f"s{problem['start']}{operations}"

    def lines(self, problem: dict) -> list[str]:
        """What a right answer consists of: a value is not repeated before its operation."""
        lines = ["", f"s{problem['start']}"]
        for letter, step in zip(ascii_lowercase, self.steps(problem), strict=False):
            lines.append(letter + step[1:])
        return [*lines, self.answer(problem)]

    def trace(self, problem: dict, rng: Random) -> str:
        return "\n".join(self.lines(problem))


# ---- the policy and its reward models


def train_policy(out: Path, seed: int) -> Path:
    """sft.py, interrupted where a trace has a loss of ENOUGH; its checkpoint.

    The traces of a step were not seen before, so this is the loss of held-out ones.
    """
    flags = f"--task {TASK} --num_layers 2 --hidden_size 64 --steps 3000 --eval_problems 0"
    command = [sys.executable, ROOT / "sft.py", *flags.split(), "--seed", str(seed)]
    path = out / "policy"
    if path.exists():
        return max(path.glob("step-*"))
    with (out / "policy.log").open("w") as log:
        process = subprocess.Popen([*command, "--out", path], stdout=log, cwd=ROOT)
        while process.poll() is None:
            time.sleep(1)
            recent = losses_of(path / "metrics.jsonl")[-20:]
            if len(recent) == 20 and mean(recent) <= ENOUGH:
                process.send_signal(signal.SIGINT)
                process.wait()
    return max(path.glob("step-*"))


def losses_of(path: Path) -> list[float]:
    """The loss of a trace in each step so far."""
    lines = path.read_text().splitlines() if path.exists() else []
    lines = [json.loads(line) for line in lines if line.endswith("}")]
    return [line["loss"] * line["tokens"] / 32 for line in lines]  # 32 traces a step


def label_lines(task, problem: dict, text: str) -> tuple[list[str], list[bool]]:
    """The lines of an answer, and for each whether it is right after the line before it.

    >>> problem = {"start": 6, "operations": ["*6", "+1"]}
    >>> label_lines(Lettered(), problem, "\\ns6\\na*6=3\\nb+1=4\\n4")
    (['', 's6', 'a*6=3', 'b+1=4', '4'], [True, True, False, True, True])
    """
    lines, labels, value = text.removesuffix("\n").split("\n"), [], ""
    operations = dict(zip(ascii_lowercase, problem["operations"], strict=False))
    for i, line in enumerate(lines):
        expected = ""
        if i == 1:
            expected = f"s{problem['start']}"
        elif 1 < i < 2 + len(operations) and value.isdigit():
            letter = ascii_lowercase[i - 2]
            chain = {"start": int(value), "operations": [operations[letter]]}
            expected = letter + task.steps(chain)[0].removeprefix(value)
        elif i == 2 + len(operations):
            expected = value
        labels.append(line == expected and i < 3 + len(operations))
        value = line[-1:]
    return lines, labels


def write_examples(cfg: bn.Config, prompter, done: list[Completion], out: Path) -> dict[str, Path]:
    """Labelled answers as two files for more/reward_model.py."""
    rng, clean, noisy = Random(cfg.seed), [], []
    for c in done:
        lines, labels = label_lines(prompter.task, c.problem, c.text)
        example = {"prompt": prompter.text(c.problem), "completions": lines}
        flipped = [label != (rng.random() < FLIPPED) for label in labels]
        clean.append(example | {"labels": labels})
        noisy.append(example | {"labels": flipped})
    return {
        "clean": write_lines(out / "clean.jsonl", clean),
        "noisy": write_lines(out / "noisy.jsonl", noisy),
    }


# ---- the arms


class StepVerifier(bn.Verifier):
    """Scores of rows as one of the arms gives them."""

    def __init__(self, run, model, prompter, arm: str):
        super().__init__(run, model, prompter)
        self.arm, self.read = arm, 0  # tokens read

    @torch.inference_mode()
    def rate_lines(self, rows: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        """r of each line of (prompt, tokens); the last may end with the answer."""
        scores: list[list[float]] = [[] for _ in rows]
        texts = [asked + [self.closed.get(i, i) for i in tokens] for asked, tokens in rows]
        self.read += sum(map(len, texts))
        for batch in micro_batches(list(map(len, texts)), 4096):
            padded = bn.pad_rows([texts[i] for i in batch], self.head.weight.device, torch.long)
            r = self.head(self.model(padded).float())[..., 0].sigmoid()  # (B, T)
            for k, i in enumerate(batch):
                first, last = len(rows[i][0]), len(texts[i]) - 1
                line = self.delimiters
                at = [t for t in range(first, last + 1) if texts[i][t] in line or t == last]
                scores[i] = r[k, at].tolist()
        return scores

    def rate(self, rows: list[tuple[list[int], list[int]]]) -> list[float]:
        return [bn.reduce_scores(scores, SEARCHED) for scores in self.rate_lines(rows)]

    def rate_steps(self, rows: list[Completion]) -> list[float]:
        if self.arm == "rule":
            task = self.prompter.task
            return [float(all(label_lines(task, row.problem, row.text)[1])) for row in rows]
        scores = super().rate_steps(rows)
        if self.arm == "shuffled":
            scores = deal_anew(scores, [row.number for row in rows], self.cfg.seed)
        return scores


def deal_anew(scores: list[float], numbers: list[int], seed: int) -> list[float]:
    """Each problem's scores in another order."""
    dealt = list(scores)
    for number in dict.fromkeys(numbers):
        places = [i for i, other in enumerate(numbers) if other == number]
        rng = Random(f"{seed} {number} {[scores[i] for i in places]}")
        for place, other in zip(places, rng.sample(places, len(places)), strict=True):
            dealt[place] = scores[other]
    return dealt


def step_aucs(task, done: list[Completion], scores: list[list[float]]) -> list[float]:
    """AUC within a problem of each line but the empty one: right after the line before, or not."""
    found = []
    for step in range(1, 11):
        groups = {}
        for c, r in zip(done, scores, strict=True):
            labels = label_lines(task, c.problem, c.text)[1]
            if step < min(len(r), len(labels)):
                group = groups.setdefault(c.number, ([], []))
                group[0].append(r[step])
                group[1].append(labels[step])
        found.append(auc_within(list(groups.values())))
    return found


# ---- the comparison


def sample(run, model, prompter, problems: list, size: int, step: int) -> list[Completion]:
    """`size` answers to each; another `step` has other random numbers."""
    return bn.rollout(run, model, prompter, problems, size, run.cfg.max_new_tokens, step)


def start(cfg: bn.Config) -> tuple:
    """A run, its model and its prompter."""
    cfg.max_new_tokens, cfg.max_step_tokens = 80, 16  # a trace has 55 tokens, a line 6
    run = bn.Selection(cfg)
    model = run.load(bn.BY_SIZE)[1]
    return run, model, bn.Prompter(model, make_task(TASK), False)


def make_models(out: Path, seed: int) -> None:
    """The policy, and the two reward models of steps: of 4 answers to 500 training problems."""
    out.mkdir(parents=True, exist_ok=True)
    policy = train_policy(out, seed)
    run, model, prompter = start(bn.Config(model=str(policy), task=TASK, seed=seed))
    training = [(n, prompter.task.problem("train", 1000 + seed, n)) for n in range(500)]
    done = sample(run, model, prompter, training, 4, 2)
    for arm, path in write_examples(run.cfg, prompter, done, out).items():
        flags = f"--kind process --model {policy} --data {path} --seed {seed} {LEARNT}"
        command = [sys.executable, ROOT / "more" / "reward_model.py", *flags.split()]
        with (out / f"{arm}.log").open("w") as log:
            subprocess.run([*command, "--out", out / arm], stdout=log, check=True)


def load_verifiers(run, model, prompter, models: Path) -> dict[str, StepVerifier]:
    """By arm; the main reward model is once more the shuffled one, and rule needs none."""
    found = {}
    for arm in ("clean", "noisy", "shuffled", "rule"):
        folder = models / (arm if arm in ("clean", "noisy") else MAIN)
        run.cfg.verifier = str(max(folder.glob("step-*")))
        found[arm] = StepVerifier(run, model, prompter, arm)
    return found


def keep_records(run, model, prompter, verifiers: dict, problems: list) -> tuple[list, dict]:
    """Records as those of more/best_of_n.py, and how good the reward models are."""
    done = sample(run, model, prompter, problems, max(SIZES), 0)
    probe = sample(run, model, prompter, problems, PROBE, 1)
    rows, values, size = [], {}, max(SIZES)
    for c in done:
        score = {"one": 1.0, "likelihood": math.exp(mean(c.logprobs))}
        score["rule"] = float(c.score["correct"])
        answer = bn.canonical(c.score["answer"]) if c.finished else None
        rows.append({"tokens": len(c.tokens), "finished": c.finished, "answer": answer})
        rows[-1]["score"] = score
    for arm in ("clean", "noisy"):
        lines = verifiers[arm].rate_lines([(c.prompt, c.tokens) for c in done])
        for row, scores in zip(rows, lines, strict=True):
            for how in REDUCE:
                row["score"][f"{arm}_{how}"] = bn.reduce_scores(scores, how)
        aucs = [auc for auc in step_aucs(prompter.task, done, lines) if math.isfinite(auc)]
        values |= {f"auc_{arm}_step_{step}": auc for step, auc in enumerate(aucs, 1)}
        values[f"auc_{arm}_steps"] = mean(aucs)
    records = []
    for answers, others in zip(in_groups(rows, size), in_groups(probe, PROBE), strict=True):
        share = mean(c.score["correct"] for c in others)
        records.append({"share": share, "answers": answers})
    for name in ("likelihood", f"clean_{SEARCHED}", f"noisy_{SEARCHED}"):
        groups = []
        for record in records:
            scores = [answer["score"] for answer in record["answers"]]
            groups.append(([x[name] for x in scores], [x["rule"] > 0 for x in scores]))
        values[f"auc_{name.removesuffix('_last')}"] = auc_within(groups)
    return records, values


def search_all(run, model, verifiers: dict, problems: list) -> tuple[list[dict], dict]:
    """Of each problem, {METHOD_ARM@N: (accuracy, tokens)}; and tokens read by the main one."""
    cfg, found, values = run.cfg, [{} for _ in problems], {}
    cfg.score = "model"
    for arm, verifier in verifiers.items():
        for method in ("beam", "dvts") if arm == MAIN else ("beam",):
            for cfg.N in SIZES:
                began = verifier.read
                outcomes = run.spread(model, verifier, problems, method)
                for row, outcome in zip(found, outcomes, strict=True):
                    row[f"{method}_{arm}@{cfg.N}"] = outcome["best"], outcome["tokens"]
                values[f"read_{method}_{arm}_{cfg.N}"] = (verifier.read - began) / len(problems)
    return found, values


def values_of(rows: list[tuple[str, dict]]) -> dict[str, float]:
    """Accuracies of (bin, outcomes) of each problem: in all, and by bin."""
    values = {f"problems_{name}": float(sum(x == name for x, _ in rows)) for name in bn.BINS}
    bins = {"": list(bn.BINS), "_easy": ["easy"], "_hard": ["medium", "hard"]}
    for end, names in bins.items():
        some = [row for name, row in rows if name in names]
        for size in SIZES:
            for key in [key for key in some[0] if key.endswith(f"@{size}")]:
                way = key.partition("@")[0].removesuffix(f"_{SEARCHED}")
                if not way.endswith(OTHERS):
                    values[f"{way}_{size}{end}"] = mean(row[key][0] for row in some)
            gaps = [row[f"beam_{MAIN}@{size}"][0] - row[f"majority@{size}"][0] for row in some]
            values[f"gap_se_{size}{end}"] = stdev(gaps) / math.sqrt(len(gaps))
        values[f"mean{end}"] = mean(row["majority@1"][0] for row in some)
    ways = "majority", f"best_{MAIN}", f"vote_{MAIN}", f"beam_{MAIN}", f"dvts_{MAIN}"
    allowed = []
    for name, row in rows:
        allowed.append((name, {key: x for key, x in row.items() if key.startswith(ways)}))
    for size in SIZES:
        spent = {way: mean(row[f"{way}@{size}"][1] for _, row in rows) for way in ways[3:]}
        spent["majority"] = mean(row[f"majority@{size}"][1] for _, row in rows)
        values |= {f"tokens_{way}_{size}": tokens for way, tokens in spent.items()}
        budget = 1.02 * spent["majority"]  # a search's own rows vary a little
        both = bn.optimal(allowed[::2], allowed[1::2], budget)
        values[f"optimal_{size}"], values[f"single_{size}"] = both
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, required=True, help="folder of policy and judges")
    text = "make these with this seed, and nothing else"
    parser.add_argument("--make", type=int, nargs="?", const=100, help=text)
    parser.add_argument("--seed", type=int, default=0, help="of problems and answers")
    parser.add_argument("--problems", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.make is not None:
        return make_models(args.models, args.make)
    began, policy = time.process_time(), max((args.models / "policy").glob("step-*"))
    cfg = bn.Config(model=str(policy), task=TASK, seed=args.seed, eval_problems=args.problems)
    run, model, prompter = start(cfg)
    problems = list(enumerate(heldout(prompter.task, args.problems, args.seed)))
    verifiers = load_verifiers(run, model, prompter, args.models)
    records, values = keep_records(run, model, prompter, verifiers, problems)
    print({name: round(value, 3) for name, value in values.items()}, flush=True)
    found, read = search_all(run, model, verifiers, problems)
    rows = []
    for record, row in zip(records, found, strict=True):
        name = next(name for name, least in bn.BINS.items() if record["share"] >= least)
        rows.append((name, bn.outcomes(record, max(SIZES)) | row))
    (args.models / f"rows-{args.seed}.json").write_text(json.dumps(rows))
    values |= values_of(rows) | read
    values["seconds"] = time.process_time() - began
    (args.models / f"values-{args.seed}.json").write_text(json.dumps(values, indent=2))
    for name, value in values.items():
        print(f"{name:28}{value:9.3f}")
    for claim in CLAIMS:
        print(f"{'held' if holds(claim, values) else 'NOT held':9}{claim}")


for choice in ("best", "vote"):
    for scorer in ("clean", "noisy"):
        for reduced in REDUCE:
            bn.WAYS[f"{choice}_{scorer}_{reduced}"] = f"{scorer}_{reduced}"

if __name__ == "__main__":
    main()
    os._exit(0)
