"""grpo.py's own functions: the reference's numbers (vectors/grpo.json), invariances, sampling."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import FakeRun, eight_answers, vectors

import grpo

VECTORS = vectors("grpo")
NAMES = {"grpo": "sequence", "dapo": "token", "dr_grpo": "constant"}  # TRL's names and ours
LOSSES = [(c, r) for c in VECTORS["grpo_loss"] for r in c["results"] if r["loss_type"] in NAMES]


def exact(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def padded(rows: list[list[float]]) -> torch.Tensor:
    return grpo.pad_rows(rows, torch.device("cpu"), torch.float64)


def close(ours, expected, tolerance=1e-9) -> bool:
    return torch.allclose(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", VECTORS["grpo_advantages"], ids=lambda c: c["id"])
def test_eq1_advantages_equal_the_reference(case):
    rewards, size = exact(case["rewards"]).flatten(), len(case["rewards"][0])
    for scale, name in ("group", "group"), ("batch", "batch"), ("none", "none_dr_grpo"):
        assert close(grpo.group_advantages(rewards, size, scale), exact(case[f"trl_{name}"])), name
    ours = grpo.group_advantages(rewards, size, "group", eps=1e-8)
    assert close(ours, exact(case["sample_std_eps1e-8 (oat grpo, tiny-grpo)"]))


def test_eq1_is_exactly_0_for_equal_rewards_and_eq2_is_clamped():
    rewards = torch.full((8,), 0.1)  # their std need not be 0, and eps 1e-8 would magnify it
    assert grpo.group_advantages(rewards, 8, "group", eps=1e-8).tolist() == [0.0] * 8
    far = torch.tensor([[200.0]])
    assert grpo.policy_loss(far, 0 * far, -torch.ones(1), torch.ones(1, 1))[0].isfinite()


@pytest.mark.parametrize("case, result", LOSSES, ids=lambda x: x.get("id") or x["loss_type"])
def test_eq2_to_eq4_loss_and_gradient_equal_the_reference(case, result):
    lengths, masked = case["lengths"], set(case["masked_out_rows"])
    logprobs = padded(case["logps"]).requires_grad_()
    old = padded(case["old_logps"]) if case["old_logps"] else logprobs.detach()
    mask = padded([[float(i not in masked)] * n for i, n in enumerate(lengths)])
    advantages = exact(case["advantages"])
    counts = int(mask.sum()), len(lengths), case["max_completion_length"]
    loss, clip = 0.0, (case["eps_low"], case["eps_high"], result["beta"])
    for rows in torch.arange(len(lengths)).split(2)[::-1]:
        ref = padded(case["ref_logps"])[rows] if result["beta"] else None
        weights = grpo.token_weights(mask[rows], NAMES[result["loss_type"]], *counts)
        args = logprobs[rows], old[rows], advantages[rows], weights, *clip, ref
        loss = loss + grpo.policy_loss(*args)[0]
    loss.backward()
    assert loss.item() == pytest.approx(result["loss"], abs=1e-9)
    if "dloss_dlogp" in result:  # one case has only its loss
        assert close(logprobs.grad, padded(result["dloss_dlogp"]), 1.1e-9)


def completion(number: int, tokens: list[int], finished: bool = True) -> grpo.Completion:
    score, logprobs = {"correct": False, "format": 0.0}, [0.0] * len(tokens)
    return grpo.Completion(number, {}, [46, 47, 3], tokens, logprobs, finished, "", score)


def gradients_of(model, batch, kind=FakeRun, rank=0, world=1, **changes):
    """Of the optimizer steps of a rollout (answers, advantages); FakeRun takes none."""
    done, advantages = batch
    changes = {"batch_size": len(done), "micro_batch_tokens": 64} | changes
    run = kind(grpo.Config(**changes), rank, world)
    grpo.update_policy(run, model, None, None, done, advantages, 1.0, 32)
    return run.gradients


@pytest.fixture(scope="module")
def model(small):
    return grpo.load_model(small).double()


@pytest.fixture(scope="module")
def batch():
    """Eight answers, the fourth truncated, and their advantages."""
    done = [completion(i // 4, tokens, i != 3) for i, tokens in enumerate(eight_answers())]
    rewards = exact([0, 1, 0, 1, 1, 0, 0, 0.5])
    return done, grpo.group_advantages(rewards, 4, "none").tolist()


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_gradient_does_not_depend_on_split_order_or_ranks(model, batch, aggregation):
    options = {"aggregation": aggregation, "mask_truncated": True}
    [whole] = gradients_of(model, batch, micro_batch_tokens=10**6, **options)
    mixed = [[x[i] for i in (5, 2, 7, 0, 3, 6, 1, 4)] for x in batch]
    [shuffled] = gradients_of(model, mixed, micro_batch_tokens=1, **options)
    ranks = [gradients_of(model, batch, rank=rank, world=3, **options)[0] for rank in range(3)]
    assert close(whole, shuffled, 1e-12) and close(whole, sum(ranks), 1e-12)


def plain_logprobs(model, c):
    ids = torch.tensor([c.prompt + c.tokens])
    logprobs = model.logits(model(ids[:, :-1])).log_softmax(-1)
    return logprobs.gather(-1, ids[:, 1:, None])[0, len(c.prompt) - 1 :, 0]


def test_eq2_to_eq4_each_update_is_of_its_part(model, batch):
    """Against the policy that sampled, noted before the first; a masked row counts nowhere."""

    class Moving(FakeRun):
        def update(self, module, optimizer, lr):
            module.model.norm.weight.data *= 3
            return super().update(module, optimizer, lr)

    moved, second = copy.deepcopy(model), copy.deepcopy(model)
    second.model.norm.weight.data *= 3
    options = {"updates": 2, "aggregation": "token", "mask_truncated": True}
    found = gradients_of(moved, batch, Moving, **options)
    for ours, policy, part in zip(found, (model, second), (slice(4), slice(4, 8)), strict=True):
        kept = [(c, a) for c, a in zip(*(x[part] for x in batch), strict=True) if c.finished]
        loss, num_tokens = 0.0, sum(len(c.tokens) for c, _ in kept)
        for c, a in kept:
            ratio = (plain_logprobs(policy, c) - plain_logprobs(model, c).detach()).exp()
            loss -= torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum() / num_tokens
        expected = torch.autograd.grad(loss, list(policy.parameters()))
        assert close(ours, torch.cat([x.flatten() for x in expected]), 1e-12)
    assert gradients_of(model, (batch[0], [0.0] * 8)) == []  # no signal, no step


def test_reward_of_adds_the_optional_terms_and_limit_at_follows_the_schedule():
    limits = [grpo.limit_at(step, "8:2,16:5", 4) for step in (1, 2, 4, 5, 9)]
    assert limits == [4, 8, 8, 16, 16] and grpo.limit_at(7, "", 4) == 4
    c = completion(0, [1] * 90)
    c.score, c.text = {"correct": True, "format": 1.0}, "one two </think> 二百三十四"
    cfg = grpo.Config(format_weight=0.3)
    for word, own in ((1.0, {}), (-2.0, {"reward": -2.0})):  # a task's own, for the verdict
        c.score |= own
        assert grpo.reward_of(c, cfg, 100) == pytest.approx(word + 0.3)
    cfg.overlong_cache, cfg.language_weight = 20, 1.0  # half of the cache used, thinks in English
    assert grpo.reward_of(c, cfg, 100) == pytest.approx(-2.0 + 0.3 - 0.5 + 1.0)


def test_dapo_eq11_dynamic_sampling_fills_the_batch_with_mixed_groups(monkeypatch):
    """Groups 0, 2, 3 and 5 are mixed; three are drawn at a time."""

    def fake_rollout(run, sampler, prompter, problems, size, limit, step):
        done = [completion(n, [1]) for n, _ in problems for _ in range(size)]
        for i, c in enumerate(done):
            c.score["correct"] = bool((i if c.number in (0, 2, 3, 5) else c.number) % 2)
        return done

    monkeypatch.setattr(grpo, "rollout", fake_rollout)
    prompter = SimpleNamespace(task=SimpleNamespace(problem=lambda split, seed, n: {}))
    for draws, first, numbers, last in [
        (5, 0, [0, 0, 2, 2, 3, 3], 6),
        (1, 3, [3, 3, 5, 5], 9),  # the cap comes first: what was found is trained on
        (0, 4, [4, 4, 5, 5, 6, 6], 7),  # off: every group, one draw
    ]:
        run = FakeRun(grpo.Config(batch_size=6, group_size=2, dynamic_sampling=draws))
        _, batch, drawn = grpo.sample_batch(run, None, prompter, 1, first, 8)
        assert ([c.number for c in batch], drawn) == (numbers, last)
