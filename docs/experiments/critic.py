"""How much of an answer's reward its beginning tells, and how much of that a critic learns.

The explained variance of ppo.py is 1 - var(G - V) / var(G) over the tokens of fresh answers. The
best V is E[G | what is written], and how well it does needs no critic: write on from a token, drawn
among all of a batch, K more times. Two answers that share a beginning share nothing else, so

    ceiling = cov(G, G') / var(G)

over these tokens; also of the thought alone (behind </think> the outcome is written down), and of
the prompt alone, from answers to the same problem.

    python docs/experiments/critic.py --model tiny --seed 0

With --epochs a critic like that of ppo.py, beside a policy that stays, learns the returns of all
answers in so many passes, 32 updates each; 32 problems that it has not seen give its explained
variance after every pass.

    python docs/experiments/critic.py --model tiny --seed 0 --places 0 --problems 160 --epochs 8

One JSON line. ceiling_se: jackknife over eighths of the problems.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import ppo  # noqa: E402
from rewards import Completion, in_groups, make_task, mean  # noqa: E402

GROUP, HELD_OUT = 16, 32  # answers to a problem; problems that the critic is judged by


def reward_of(cfg: ppo.Config, score: dict) -> float:
    """ppo.py's plain reward."""
    return score["correct"] + cfg.format_weight * score["format"]


def continuations(
    run: ppo.Run,
    model: ppo.Model,
    prompter: ppo.Prompter,
    problems: dict[int, dict],
    done: list[Completion],
    places: list[tuple],
    again: int,
) -> np.ndarray:
    """Rewards (M, 1 + K) of an answer and of K others that begin with its first t tokens.

    places: M of (number of the answer, t). Those with much written run together, because a part
    runs until the one with the most room is done.
    """
    cfg, found = run.cfg, np.zeros((len(places), 1 + again))
    order = sorted(range(len(places)), key=[-t for _, t in places].__getitem__)
    for part in in_groups(order, 256 // again):
        prefixes = [done[i].prompt + done[i].tokens[:t] for i, t in map(places.__getitem__, part)]
        limit = cfg.max_new_tokens - min(places[m][1] for m in part)
        u = [ppo.row_uniforms(cfg.seed, 2, m, k, limit) for m in part for k in range(again)]
        s = ppo.generate(model, prefixes, torch.tensor(np.stack(u)), cfg.temperature)
        sampled = s.lengths.tolist(), s.finished.tolist(), s.tokens.tolist()
        for row, (length, finished, tokens) in enumerate(zip(*sampled, strict=True)):
            m = part[row // again]
            i, t = places[m]
            room = cfg.max_new_tokens - t  # this answer's, not that of the part
            ended = finished and length <= room
            tokens = done[i].tokens[:t] + tokens[: min(length, room)]
            text = prompter.decode(tokens[:-1] if ended else tokens)
            score = prompter.task.score(text, problems[done[i].number])
            found[m, 0] = done[i].reward
            found[m, 1 + row % again] = reward_of(cfg, score)
    return found


def ceiling(rewards: np.ndarray) -> float:
    """cov(G, G') / var(G) from rewards (M, 1 + K), over all pairs of a row.

    >>> ceiling(np.array([[1.0, 1.0], [0.0, 0.0]])), ceiling(np.array([[1.0, 0.0], [0.0, 1.0]]))
    (1.0, -1.0)
    """
    centred = rewards - rewards.mean()
    count = rewards.shape[1]
    pairs = centred.sum(1) ** 2 - (centred**2).sum(1)
    return float(pairs.mean() / (count * (count - 1)) / (centred**2).mean())


def ceilings(
    done: list[Completion], places: list[tuple], rewards: np.ndarray, end: int
) -> dict[str, float]:
    """The ceiling of all places, of those before `end` (the token </think>), of the prompt."""
    closed = np.array([end in done[i].tokens[:t] for i, t in places])
    numbers = np.array([done[i].number for i, _ in places])
    folds = np.array([ceiling(rewards[numbers % 8 != fold]) for fold in range(8)])
    groups = [[c.reward for c in group] for group in in_groups(done, GROUP)]
    return {
        "ceiling": ceiling(rewards),
        "ceiling_se": float(np.sqrt(7 / 8 * np.sum((folds - folds.mean()) ** 2))),
        "ceiling_thought": ceiling(rewards[~closed]),
        "ceiling_prompt": ceiling(np.array(groups)),
        "behind_thought": float(closed.mean()),
    }


def learn(run: ppo.Run, model: ppo.Model, done: list[Completion], epochs: int, lr: float) -> dict:
    """Explained variance on the last problems after each pass over the others (ppo.py, eq. 5)."""
    critic = ppo.Critic(model, 1)
    optimizer = torch.optim.AdamW(critic.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    cut, found = len(done) - HELD_OUT * GROUP, {}

    def values_of(rows: list[int]):
        for chosen, tokens, mask in ppo.training_batches(run, done, rows):
            where = mask[:, 1:]
            returns = torch.tensor([done[i].reward for i in chosen])[:, None].expand(where.shape)
            yield critic.head(critic.trunk(tokens[:, :-1])[where])[:, 0], returns[where]

    for epoch in range(epochs):
        order = np.random.default_rng((run.cfg.seed, epoch)).permutation(cut).tolist()
        for update, part in enumerate(in_groups(order, cut // 32)):
            num_tokens = sum(len(done[i].tokens) for i in part)
            for values, returns in values_of(part):
                (0.5 * (values - returns).square().sum() / num_tokens).backward()
            left = 1 - (epoch + update / 32) / epochs
            run.update(critic, optimizer, lr * min(left, (32 * epoch + update + 1) / 12))
        with torch.no_grad():
            held_out = list(values_of(list(range(cut, len(done)))))
        values, returns = (torch.cat(some) for some in zip(*held_out, strict=True))
        found[f"epoch_{epoch + 1}"] = ppo.explained_variance(values, returns)
        print(f"epoch {epoch + 1}: {found[f'epoch_{epoch + 1}']:.3f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--task", default="countdown")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--places", type=int, default=2048, help="tokens to write on from")
    parser.add_argument("--again", type=int, default=3, help="times (K)")
    parser.add_argument("--epochs", type=int, default=0, help="passes of a critic")
    parser.add_argument("--critic_lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    cfg = ppo.Config(args.model, args.task, max_new_tokens=args.max_new_tokens, seed=args.seed)
    run = ppo.Run(cfg)
    model, _ = run.load(ppo.BY_SIZE)
    task = make_task(cfg.task)
    prompter = ppo.Prompter(model, task, False)
    problems = {n: task.problem("train", cfg.seed, n) for n in range(args.problems)}
    done = ppo.rollout(run, model, prompter, list(problems.items()), GROUP, cfg.max_new_tokens, 1)
    for c in done:
        c.reward = reward_of(cfg, c.score)
    values = {"accuracy": mean(c.score["correct"] for c in done)}
    values["length"] = mean(len(c.tokens) for c in done)
    if args.places:
        tokens = [(i, t) for i, c in enumerate(done) for t in range(len(c.tokens))]
        rng = np.random.default_rng(cfg.seed)
        places = [tokens[j] for j in rng.choice(len(tokens), args.places, replace=False)]
        shared = run, model, prompter, problems, done, places, args.again
        rewards = continuations(*shared)
        (end,) = prompter.encode("</think>")
        values |= ceilings(done, places, rewards, end)
    if args.epochs:
        values |= learn(run, model, done, args.epochs, args.critic_lr)
    print(json.dumps({name: round(value, 4) for name, value in values.items()}))


if __name__ == "__main__":
    main()
    os._exit(0)  # as the scripts: threads of gloo may abort sys.exit
