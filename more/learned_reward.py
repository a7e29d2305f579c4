"""A reward model as the reward: the task it was trained on, scored by it (AceCoder's RL, and more).

    python more/reward_model.py --model tiny --out out/rm
    python grpo.py --format_weight 0 --task more/learned_reward.py:LearnedReward:folder=out/rm

    reward = rule_weight * correct + weight * z,   z = (r - mean) / sd    (1)

r is the score of prompt and answer, mean and sd are those of answers that the reward model learnt
from (its value_head.json). So `weight` has a meaning, and 0 is an answer of the usual quality.
z is at most -1 without an end. A task sees texts: an answer has ended if </answer> is its end.

Problems, verdicts and all accuracies stay those of the inner task. The prompt that is scored is
written as the reward model's were, and tokens are its own: any policy that is asked in the same
style will do. `learned` in metrics.jsonl is z. Each answer is scored by itself, once a process.

Source: arXiv:2502.01718 sec. 4 (reward model and rule as the reward of RL); the scale is ours.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # rewards.py is one folder up

from more.reward_model import Prompter, checkpoints, load_head, load_model, score_rows
from rewards import BadInput, make_task, read_json


@dataclass
class LearnedReward:
    """The task of a reward model's run, rewarded by eq. 1."""

    folder: str = ""  # of the run, or one of its checkpoints
    weight: float = 1.0
    rule_weight: float = 0.0
    task: str = ""  # of the problems, if not the one that the reward model was trained on
    data: str = ""  # their file

    def __post_init__(self):
        if not self.folder:
            raise BadInput("LearnedReward needs folder=FOLDER, made by more/reward_model.py")
        folder = (checkpoints(Path(self.folder)) or [Path(self.folder)])[-1]
        self.model = load_model(folder).requires_grad_(False)
        self.head, about = load_head(folder, self.model.config["hidden_size"])
        if torch.cuda.is_available():
            self.model.cuda().to(torch.bfloat16)
            self.head.cuda()
        learnt = self.learnt_from(folder)
        self.inner = make_task(learnt, self.data, natural=not self.model.is_tiny)
        self.prompter = Prompter(self.model, self.inner, about.get("style") == "chat")
        self.check(folder, about)
        self.mean, self.std = about["mean"], about["std"]
        self.key = self.inner.key
        asking = "compact" if self.prompter.style == "compact" else "question"
        setattr(self, asking, getattr(self.inner, asking))  # the other style is not asked
        self.learned = functools.lru_cache(2**14)(self.standard_score)  # for `describe`

    def learnt_from(self, folder: Path) -> str:
        """The spec of the inner task."""
        run = folder.parent / "run.json"
        cfg = read_json(run)["config"] if run.exists() else {"task": "", "data": ""}
        self.from_file = bool(cfg["data"])
        if self.task:
            return self.task
        if not cfg["task"] or self.from_file:
            raise BadInput(f"{folder}: the task of its problems is not known; give task=NAME")
        return cfg["task"]

    def check(self, folder: Path, about: dict) -> None:
        """Refuse scores without a scale, of steps, or of prompts that would be written anew."""
        if about.get("kind") not in ("pair", "outcome") or not about.get("std", 0) > 0:
            raise BadInput(f"{folder}: value_head.json has no scale of whole answers: {about}")
        if about["style"] != self.prompter.style:
            raise BadInput(f"{folder}: learnt from {about['style']}, is {self.prompter.style}")
        asked = self.prompter.text(self.inner.problem("train", 0, 0))
        if self.prompter.decode(self.prompter.encode(asked)).strip() != asked.strip():
            raise BadInput(f"{folder}: its vocabulary cannot write the prompt {asked!r}")

    def standard_score(self, asked: str, text: str) -> float:
        """z of eq. 1, read where the reward model learnt to: at the end token, if there is one."""
        row = self.prompter.encode(asked) + self.prompter.encode(text)
        ended = text.rstrip().endswith("</answer>")
        if ended and (self.from_file or not self.prompter.stops):  # else </answer> was the end
            row += self.model.eos_ids[:1]
        z = (score_rows(self.model, self.head, [row])[0] - self.mean) / self.std
        return z if ended else min(z, -1.0)

    def problem(self, split: str, seed: int, index: int) -> dict:
        return self.inner.problem(split, seed, index)

    def score(self, text: str, problem: dict, **kw) -> dict:
        parts = self.inner.score(text, problem, **kw)
        z = self.learned(self.prompter.text(problem), text)
        reward = self.rule_weight * parts["correct"] + self.weight * z
        return parts | {"learned": z, "reward": reward}

    def describe(self, text: str, problem: dict) -> dict:
        seen = {}
        if hasattr(self.inner, "describe"):
            seen = self.inner.describe(text, problem)
        return seen | {"learned": self.learned(self.prompter.text(problem), text)}
