"""What a run of coconut.py reached at the end of each stage, and what its thoughts say.

    python docs/experiments/coconut.py out/coconut-s3-0-260101-120000

The second table is the probe of arXiv:2412.06769 sec. 5: a thought is put through the head, as if a
token were drawn there. A column is the result of step 1, 2, ..: its mean probability among all
results, and the share of problems where it comes first.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # 0: this file has the same name
import coconut  # noqa: E402


@torch.no_grad()
def probe(model, prompter, problems: list[dict]) -> Tensor:
    """(2, thoughts, steps): the mean probability of each step's result, and how often it is first.

    Needs problems of equally many steps "...=result", a result of one token.
    """
    results = []
    for problem in problems:
        texts = [step.rpartition("=")[2] for step in prompter.task.steps(problem)]
        results.append([prompter.encode(text)[0] for text in texts])
    choices = sorted({token for row in results for token in row})
    device = model.lm_head.weight.device
    prompts = [prompter.encode(prompter.text(problem)) for problem in problems]
    tokens = coconut.pad_rows(prompts, device, torch.long)
    places = tokens[:, 1:] == model.config["latent_token_id"]
    thoughts = model(tokens)[:, :-1][places]  # a thought is the state before its place
    probs = model.logits(thoughts)[:, choices].softmax(-1)
    probs = probs.view(len(problems), -1, len(choices))  # (B, thoughts, results)
    truth = [[choices.index(token) for token in row] for row in results]
    truth = F.one_hot(torch.tensor(truth, device=device), len(choices)).float()
    first = F.one_hot(probs.argmax(-1), len(choices)).float()
    shares = [torch.einsum("bnr,bsr->ns", part, truth) / len(problems) for part in (probs, first)]
    return torch.stack(shares)


def stage_table(folder: Path) -> list[str]:
    """A line for each evaluation after a training step."""
    lines = []
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(text)
        if "eval/stage" in row and row["step"]:
            names = "stage", "thoughts", "accuracy", "generated_tokens"
            numbers = ", ".join(f"{name} {row['eval/' + name]:.3g}" for name in names)
            lines.append(f"step {row['step']}: {numbers}")
    return lines


def thought_table(folder: Path) -> list[str]:
    """The probe of the newest checkpoint, a line for each thought; none where there are none."""
    cfg = coconut.Config(**json.loads((folder / "run.json").read_text())["config"])
    newest = coconut.checkpoints(folder)[-1]
    model = coconut.load_model(newest)
    prompter = coconut.ThoughtPrompter(model, coconut.make_task(cfg.task, cfg.data), cfg)
    prompter.stage = torch.load(newest / "trainer.pt", "cpu", weights_only=True)["stage"]
    sentences = getattr(prompter.task, "MARKER", "")
    if model.config["latent_token_id"] is None or not prompter.stage or sentences:
        return ["no thoughts whose results are one token each"]
    problems = coconut.heldout(prompter.task, cfg.eval_problems or 200)
    lines = []
    for number, row in enumerate(probe(model, prompter, problems).unbind(1), 1):
        cells = [f"{p:.3f} ({share:.3f})" for p, share in row.T.tolist()]
        lines.append(f"thought {number}  {'  '.join(cells)}")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="run folder of coconut.py")
    folder = parser.parse_args(argv).folder
    for table in (stage_table, thought_table):
        print("\n".join(table(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
