"""Does PRIME's process reward say more than the outcome? Arms of equal rollouts, and its lines.

    python docs/experiments/prime.py --seeds 0,1,2 --out prime.jsonl

Arms, 16 steps of 8 problems x 16 answers of at most 256 tokens, from models/tiny;
200 held-out problems x 4 samples:
    prime     more/prime.py
    rloo      --no-process: outcomes only
    shuffled  each answer has the z (eq. 3) of another answer of its group, cut or filled up with
              zeros: the same numbers without what they say about this answer
    offline   (--arms) the PRM is not updated any more after half of the steps

Claims, written before the run of seeds 0, 1, 2 (nothing was tuned on them):
    after - before >= 0.08              prime learns
    pair_accuracy >= 0.70               mean over the last 5 steps, groups with right and wrong
    abs(after - rloo_after) <= 0.05     a tie at equal rollouts: such answers are short
    after - shuffled_after >= 0.03      what a token's reward says of its answer counts
    line_auc >= 0.60                    it finds wrong lines, the one direct test of "process"
    cpu_seconds <= 1.7 * rloo_cpu_seconds
and before those of arm offline, on these seeds:
    after - offline_after >= 0.03       a PRM that is left behind by its policy is worth less
    pair_accuracy >= offline_pair_accuracy

Line AUC: on answers of the trained policy to held-out problems, whether the sum of q over a line of
the search is lower where docs/experiments/specreason.py's `grade_step` calls the line wrong, in
pairs of a wrong and a right line of one answer. logp is the same for the reference's
log-probability, which needs no PRM. One line of JSON an arm is printed, and added to --out.
"""

import argparse
import importlib.util
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)  # this folder has a specreason.py, too
from more import prime  # noqa: E402
from rewards import in_groups, make_task, mean, micro_batches  # noqa: E402

SETTING = "--steps 16 --batch_size 128 --max_new_tokens 256 --eval_problems 200 --eval_samples 4"
LINE_ANSWERS = 400  # of the last evaluation, 4 to a problem
original = {name: getattr(prime, name) for name in ("bounded", "update_prm", "evaluate", "rollout")}


def shuffled(q: torch.Tensor, mask: torch.Tensor, group_size: int, seed: int) -> torch.Tensor:
    """z of eq. 3, each row with that of another row of its group, on its own mask (B, T)."""
    random, rows = np.random.default_rng(seed), []
    for group in in_groups(list(range(len(q))), group_size):
        turn = int(random.integers(1, group_size))  # a rotation: no row keeps its own
        rows += group[turn:] + group[:turn]
    return original["bounded"](q)[rows] * mask


def load_grade_step():
    """`grade_step` of docs/experiments/specreason.py."""
    path = ROOT / "docs" / "experiments" / "specreason.py"
    spec = importlib.util.spec_from_file_location("specreason_experiment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.grade_step


class Arm:
    """One arm: patches more/prime.py, runs it, notes CPU seconds and what was sampled last."""

    before: dict = {}  # the start's evaluation by seed: the same for all arms

    def __init__(self, name: str, seed: int, flags: list[str], folder: Path):
        self.name, self.seed, self.folder = name, seed, folder
        self.argv = [*SETTING.split(), "--seed", str(seed), "--out", str(folder), *flags]
        if name == "rloo":
            self.argv.append("--no-process")
        self.evaluation_seconds, self.answers, self.done = 0.0, [], []

    def evaluate(self, run, model, prompter, step):
        began = time.process_time()
        if step == 0:
            if self.seed not in Arm.before:
                Arm.before[self.seed] = original["evaluate"](run, model, prompter, step)
            result = Arm.before[self.seed]
        else:
            result = original["evaluate"](run, model, prompter, step)
            self.answers = self.done
        self.evaluation_seconds += time.process_time() - began
        return result

    def rollout(self, *args):
        self.done = original["rollout"](*args)
        return self.done

    def process_returns(self, z, mask, group_size, gamma):
        """Of the shuffled arm: called with q, which `bounded` has left as it is."""
        self.calls += 1
        z = shuffled(z, mask, group_size, 1000 * self.seed + self.calls)
        return self.true_returns(z, mask, group_size, gamma)

    def update_prm(self, run, prm, optimizer, batch, x, step, lr):
        if step > run.cfg.steps // 2:
            return {}
        return original["update_prm"](run, prm, optimizer, batch, x, step, lr)

    def run(self) -> dict[str, float]:
        prime.evaluate, prime.rollout = self.evaluate, self.rollout
        returns = self.true_returns = prime.process_returns
        self.calls = 0
        if self.name == "shuffled":
            prime.bounded, prime.process_returns = unchanged, self.process_returns
        if self.name == "offline":
            prime.update_prm = self.update_prm
        began = time.process_time()
        code = prime.main(prime.train, prime.Config, self.argv)
        seconds = time.process_time() - began - self.evaluation_seconds
        prime.process_returns = returns
        for name, function in original.items():
            setattr(prime, name, function)
        if code:
            raise SystemExit(code)
        return self.results() | {"cpu_seconds": seconds}

    def results(self) -> dict[str, float]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if "tokens" in row]
        after = [row for row in map(json.loads, lines) if "eval/accuracy" in row][0]
        last = [row["prm_pair_accuracy"] for row in rows[-5:] if "prm_pair_accuracy" in row]
        start = Arm.before[self.seed]
        return {
            "before": start["eval/accuracy"],
            "after": after["eval/accuracy"],
            "length": after["eval/completion_length"],
            "gives_up": after["eval/gave_up"],
            "pair_accuracy": mean(last),
            "return_std_process": mean(row.get("return_std/process", 0.0) for row in rows[-5:]),
            "return_std_outcome": mean(row.get("return_std/outcome", 0.0) for row in rows[-5:]),
            "sampled_tokens": sum(row["tokens"] for row in rows),
            "trained_tokens": sum(row["tokens_trained"] for row in rows),
        }


def unchanged(q: torch.Tensor) -> torch.Tensor:
    return q


@torch.no_grad()
def token_logprobs(model, answers: list) -> list[list[float]]:
    """log pi(y_t) of every token of every answer, by a model."""
    found: list = [None] * len(answers)
    lengths = [len(c.prompt) + len(c.tokens) for c in answers]
    for rows in micro_batches(lengths, 8192):
        cpu = torch.device("cpu")
        tokens = [answers[i].prompt + answers[i].tokens for i in rows]
        masks = [[0] * len(answers[i].prompt) + [1] * len(answers[i].tokens) for i in rows]
        tokens = prime.pad_rows(tokens, cpu, torch.long)
        masks = prime.pad_rows(masks, cpu, torch.bool)
        logprobs, _ = prime.completion_logprobs(model, tokens, masks)
        for i, values, where in zip(rows, logprobs, masks[:, 1:], strict=True):
            found[i] = values[where].tolist()
    return found


def search_lines(prompter, c) -> list[tuple[int, int, str]]:
    """(start, end, text) in tokens of the whole lines before </think>."""
    lines, start = [], 0
    for end in range(1, len(c.tokens) + 1):
        text = prompter.decode(c.tokens[start:end])
        if "</think>" in text:
            break
        if text.endswith("\n"):
            lines.append((start, end, text))
            start = end
    return lines


def auc(pairs: list[tuple[float, float]]) -> float:
    """Share of (wrong, right) pairs in which the wrong one is lower; a tie is half."""
    return mean(0.5 * (wrong == right) + (wrong < right) for wrong, right in pairs)


def line_auc(folder: Path, answers: list) -> dict[str, float]:
    """The AUCs of the docstring, over all answers and over the wrong ones."""
    start = prime.resolve_model("tiny")
    prm, reference = prime.load_model(folder / "prm"), prime.load_model(start)
    task = make_task("countdown", natural=False)
    prompter = prime.Prompter(reference, task, False)
    logp = token_logprobs(reference, answers)
    scores = token_logprobs(prm, answers)
    pairs = {"q": [], "logp": [], "q_wrong": []}
    grade_step, graded, bad = load_grade_step(), 0, 0
    for c, log_ref, log_prm in zip(answers, logp, scores, strict=True):
        lines, before = {True: [], False: []}, ""
        for first, end, text in search_lines(prompter, c):
            right = grade_step(task, c.problem, before, text) > 0
            ref = sum(log_ref[first:end])
            lines[right].append((sum(log_prm[first:end]) - ref, ref))
            before += text
        graded += len(lines[True]) + len(lines[False])
        bad += len(lines[False])
        for wrong in lines[False]:
            for right in lines[True]:
                pairs["q"].append((wrong[0], right[0]))
                pairs["logp"].append((wrong[1], right[1]))
                if not c.score["correct"]:
                    pairs["q_wrong"].append((wrong[0], right[0]))
    return {
        "line_auc": auc(pairs["q"]),
        "line_auc_wrong_answers": auc(pairs["q_wrong"]),
        "line_auc_logp": auc(pairs["logp"]),
        "lines": graded,
        "wrong_lines": bad,
        "line_pairs": len(pairs["q"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default="prime,rloo,shuffled")
    parser.add_argument("--flags", default="", help="more flags of more/prime.py, in one word")
    parser.add_argument("--out", type=Path, help="JSONL file that the lines are added to")
    args = parser.parse_args()
    seeds, arms = args.seeds.split(","), args.arms.split(",")
    for seed, name in itertools.product(map(int, seeds), arms):
        with tempfile.TemporaryDirectory() as folder:
            arm = Arm(name, seed, args.flags.split(), Path(folder) / "run")
            result = {"arm": name, "seed": seed, "flags": args.flags} | arm.run()
            if name != "rloo":
                result |= line_auc(arm.folder, arm.answers[:LINE_ANSWERS])
        line = json.dumps(result)
        print(line, flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
