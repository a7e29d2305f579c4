"""Do capsules carry the plan, and does the model use them? The arms of more/r_capsule.py.

    python docs/experiments/r_capsule.py --seeds 0,1,2 --out capsules.jsonl

Arms, each a new model, the same problems in the same order, the same number of updates:
    answer     --mode answer: the answer alone
    steps      --mode steps: values and answer
    plan       --mode plan: the plan in words before them
    capsule    the method
    recon_0    --recon 0: nothing has to be read in the capsules (lambda of eq. 2)
    pause      K learnt constants in place of the capsules
    wide       --bottleneck C - 1: hardly a bottleneck

Claims, written before the run of seeds 0, 1, 2 (knobs were settled on seed 100):
    capsule >= plan - 0.02                     at equal updates
    capsule_length <= 0.7 * plan_length        tokens that are written
    capsule_plan_exact >= 0.95                 the decoder of eq. 2, whole plans of held-out problems
    recon_0_probe <= capsule_plan_exact - 0.20 a decoder trained afterwards, on frozen capsules
    capsule - pause >= 0.05
    capsule - capsule_swapped >= 0.20          else the capsules are not used, and the first is empty

intact, swapped: a held-out problem is answered through its own capsules, or those of another one
whose plan is as long and not the same; _longest: of the longest plans alone. probe: a fresh decoder
with tables of its own, trained on the frozen capsules of PROBE_PROBLEMS training problems; on those
of the arm capsule it has to be as good as the decoder of eq. 2, else it is too weak to say anything.
One line of JSON an arm is printed, and added to --out.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)  # this folder has a file of the same name
from more import r_capsule  # noqa: E402
from rewards import heldout, in_groups, make_task, mean, read_json  # noqa: E402

FLAGS = {
    "answer": "--mode answer",
    "steps": "--mode steps",
    "plan": "--mode plan",
    "capsule": "",
    "recon_0": "--recon 0",
    "pause": "--mode steps",
    "wide": f"--bottleneck {r_capsule.Config.hidden_size - 1}",
}
PROBE_PROBLEMS, PROBE_STEPS, PROBE_ROWS = 8192, 1500, 64
original = r_capsule.CapsulePrompter


class PausePrompter(original):
    """In the slots stand tokens like others, each with an embedding that is learnt."""

    def __init__(self, model, task, cfg):
        super().__init__(model, task, cfg)
        constants = "".join(f"<reserved_{k}>" for k in range(cfg.k))
        self.slots = f"<bot>{constants}<eot>"


class Given(nn.Module):
    """In place of W_p of eq. 1: the capsules (B, K, d) of others, one after the other."""

    def __init__(self, capsules: Tensor):
        super().__init__()
        self.left = list(capsules.unbind(1))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.left.pop(0)


def last_of(folder: Path) -> tuple:
    """(config, model, decoder or None, prompter) of a run's last checkpoint."""
    cfg = r_capsule.Config(**read_json(folder / "run.json")["config"])
    newest, decoder = r_capsule.checkpoints(folder)[-1], None
    model = r_capsule.load_model(newest)
    state = torch.load(newest / "trainer.pt", "cpu", weights_only=True)
    if "decoder" in state:
        decoder = r_capsule.PlanDecoder(model.config, cfg.bottleneck, cfg.seed)
        decoder.load_state_dict(state["decoder"])
    return cfg, model, decoder, original(model, make_task(cfg.task, cfg.data), cfg)


@torch.no_grad()
def find_capsules(model, prompter, problems: list[dict]) -> Tensor:
    """The capsules (B, K, d) of problems."""
    found, cpu = [], torch.device("cpu")
    for part in in_groups(problems, 64):
        prompts = [prompter.encode(prompter.text(problem)) for problem in part]
        tokens = r_capsule.pad_rows(prompts, cpu, torch.long)
        found.append(r_capsule.capsule_forward(model, tokens)[1])
    return torch.cat(found)


def plan_rows(prompter, problems: list[dict]) -> tuple[Tensor, Tensor]:
    """Tokens of plans with their ends and the mask, (B, P)."""
    cpu = torch.device("cpu")
    rows = [prompter.encode(prompter.task.plan(problem)) + prompter.end for problem in problems]
    inside = [[1] * len(row) for row in rows]
    return r_capsule.pad_rows(rows, cpu, torch.long), r_capsule.pad_rows(inside, cpu, torch.bool)


def plan_logits(decoder, tables, capsules: Tensor, plans: Tensor) -> Tensor:
    """(B, P, V) of a decoder with the embeddings and the head of `tables`."""
    embedding, head = tables
    return head(decoder(capsules, embedding(plans[:, :-1])))


@torch.no_grad()
def exact(decoder, tables, capsules: Tensor, plans: Tensor, mask: Tensor) -> float:
    """Share of plans that greedy decoding writes to the last token.

    It does just where each token is the likeliest after the right ones before it.
    """
    right = plan_logits(decoder, tables, capsules, plans).argmax(-1) == plans
    return (right | ~mask).all(1).float().mean().item()


def probe(model, d: int, capsules: Tensor, plans: Tensor, mask: Tensor, seed: int) -> tuple:
    """A fresh decoder and tables, trained on frozen capsules (N, K, d)."""
    torch.manual_seed(seed)
    V, C = model.lm_head.weight.shape
    decoder = r_capsule.PlanDecoder(model.config, d, seed)
    tables = nn.Embedding(V, C), nn.Linear(C, V, bias=False)
    parts = nn.ModuleList([decoder, *tables])
    optimizer = torch.optim.AdamW(parts.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    size = capsules.std().clamp(min=1e-6)  # what a fresh decoder expects are numbers of size 1
    decoder.widen.weight.data /= size
    order = np.random.default_rng(seed)
    for step in range(1, PROBE_STEPS + 1):
        rows = torch.from_numpy(order.integers(0, len(capsules), PROBE_ROWS))
        logits = plan_logits(decoder, tables, capsules[rows], plans[rows])
        loss = nn.functional.cross_entropy(logits[mask[rows]], plans[rows][mask[rows]])
        loss.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = r_capsule.learning_rate(step, PROBE_STEPS, 3e-3, 50)
        optimizer.step()
        optimizer.zero_grad()
    return decoder, tables


def swap(prompter, problems: list[dict]) -> list[int]:
    """For each problem another one whose plan is as long, and is another."""
    plans = [prompter.task.plan(problem) for problem in problems]
    donors = []
    for i, plan in enumerate(plans):
        turned = [*range(i + 1, len(plans)), *range(i)]
        like = [j for j in turned if len(plans[j]) == len(plan) and plans[j] != plan]
        donors.append(like[0])
    return donors


def accuracies(cfg, model, prompter, problems: list[dict], capsules: Tensor) -> list[float]:
    """Of each problem's answers through capsules (B, K, d), by the random numbers of evaluations."""
    project, scores = model.capsule.project, []
    for part in in_groups(list(enumerate(problems)), 64):
        numbers = [n for n, _ in part]
        model.capsule.project = Given(capsules[numbers])
        pairs = itertools.product(numbers, range(cfg.eval_samples))
        limit = cfg.max_new_tokens
        u = [r_capsule.row_uniforms(cfg.seed, 0, n, sample, limit) for n, sample in pairs]
        prompts = [prompter.encode(prompter.text(problem)) for _, problem in part]
        s = r_capsule.generate(model, prompts, torch.tensor(np.stack(u)), cfg.temperature)
        for row, (tokens, length) in enumerate(zip(s.tokens.tolist(), s.lengths.tolist(), strict=True)):
            ids = [token for token in tokens[:length] if token not in model.eos_ids]
            problem = part[row // cfg.eval_samples][1]
            scores.append(prompter.task.score(prompter.decode(ids), problem)["correct"])
    model.capsule.project = project
    return [mean(group) for group in in_groups(scores, cfg.eval_samples)]


def look_inside(folder: Path) -> dict[str, float]:
    """What is read in the capsules of a run, and what they do."""
    cfg, model, decoder, prompter = last_of(folder)
    problems = heldout(prompter.task, cfg.eval_problems)
    held, tables = find_capsules(model, prompter, problems), (model.model.embed_tokens, model.logits)
    wanted, found = plan_rows(prompter, problems), {}
    if decoder is not None:
        found["plan_exact"] = exact(decoder, tables, held, *wanted)
    learnt = [prompter.task.problem("train", cfg.seed, i) for i in range(PROBE_PROBLEMS)]
    frozen = find_capsules(model, prompter, learnt)
    probed = probe(model, cfg.bottleneck, frozen, *plan_rows(prompter, learnt), cfg.seed)
    found["probe"] = exact(*probed, held, *wanted)
    lengths = wanted[1].sum(1)
    longest = (lengths == lengths.max()).tolist()
    for name, given in (("intact", held), ("swapped", held[swap(prompter, problems)])):
        scores = accuracies(cfg, model, prompter, problems, given)
        found[name] = mean(scores)
        found[f"{name}_longest"] = mean(itertools.compress(scores, longest))
    return found


def run_arm(name: str, seed: int, flags: str, folder: Path) -> dict[str, float]:
    """Train an arm; its evaluation, what it cost, and what is in its capsules."""
    argv = f"{FLAGS[name]} {flags} --seed {seed} --save_every 0 --out {folder}".split()
    r_capsule.CapsulePrompter = PausePrompter if name == "pause" else original
    began = time.process_time()
    code = r_capsule.main(r_capsule.train, r_capsule.Config, argv)
    r_capsule.CapsulePrompter = original
    if code:
        raise SystemExit(code)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    last = [line for line in lines if "eval/accuracy" in line][-2]  # the start is after it
    found = {
        "cpu_seconds": time.process_time() - began,
        "trained_tokens": sum(line.get("tokens", 0) for line in lines),
        "accuracy": last["eval/accuracy"],
        "length": last["eval/completion_length"],
    }
    if name in ("capsule", "recon_0", "wide"):
        found |= look_inside(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join(FLAGS))
    parser.add_argument("--flags", default="", help="more flags of more/r_capsule.py, in one word")
    parser.add_argument("--out", type=Path, help="JSONL file that the lines are added to")
    args = parser.parse_args()
    seeds, arms = args.seeds.split(","), args.arms.split(",")
    for seed, name in itertools.product(map(int, seeds), arms):
        with tempfile.TemporaryDirectory() as folder:
            found = run_arm(name, seed, args.flags, Path(folder) / "run")
        line = json.dumps({"arm": name, "seed": seed, "flags": args.flags} | found)
        print(line, flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
