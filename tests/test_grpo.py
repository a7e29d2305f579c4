"""grpo.py's own functions: the reference's numbers (tests/vectors/grpo.json), cases worked out by hand, invariances."""

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FakeRun, eight_answers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo  # noqa: E402

FOLDER = Path(os.environ.get("VECTORS") or Path(__file__).parent / "vectors")
VECTORS = json.loads((FOLDER / "grpo.json").read_text(encoding="utf-8")) if (FOLDER / "grpo.json").is_file() else {}
AGGREGATION = {"grpo": "sequence", "dapo": "token", "dr_grpo": "constant"}  # TRL's names and ours
LOSSES = [(c, r) for c in VECTORS.get("grpo_loss", []) for r in c["results"] if r["loss_type"] in AGGREGATION]
TINY = Path(grpo.__file__).parent / "models" / "tiny"


def padded(rows: list[list[float]]) -> torch.Tensor:
    return grpo.pad_rows(rows, torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("case", VECTORS.get("grpo_advantages", []), ids=lambda c: c["id"])
def test_advantages_equal_the_reference(case):
    rewards, size = torch.tensor(case["rewards"], dtype=torch.float64), len(case["rewards"][0])
    for scale, name in (("group", "trl_group"), ("batch", "trl_batch"), ("none", "trl_none_dr_grpo")):
        ours = grpo.group_advantages(rewards.flatten(), size, scale)
        assert torch.allclose(ours, torch.tensor(case[name], dtype=torch.float64), rtol=0, atol=1e-9), name
    name = "sample_std_eps1e-8 (oat grpo, tiny-grpo)"
    ours = grpo.group_advantages(rewards.flatten(), size, "group", eps=1e-8)
    assert torch.allclose(ours, torch.tensor(case[name], dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("case, result", LOSSES, ids=lambda x: x.get("id") or f"{x['loss_type']}-{x['beta']}")
@pytest.mark.parametrize("split", [0, 2], ids=["whole", "micro-batches"])
def test_loss_and_gradient_equal_the_reference(case, result, split):
    """The whole batch, and the sum over micro-batches of two rows in reversed order, each to 1e-9 in float64."""
    lengths, masked = case["lengths"], set(case["masked_out_rows"])
    logprobs = padded(case["logps"]).requires_grad_()
    old = padded(case["old_logps"]) if case["old_logps"] else logprobs.detach()
    ref = padded(case["ref_logps"]) if result["beta"] else None
    mask = padded([[float(i not in masked)] * n for i, n in enumerate(lengths)])
    scale = case["scale_rewards"]
    rewards = torch.tensor(case["rewards"], dtype=torch.float64).flatten()
    advantages = grpo.group_advantages(rewards, case["group_size"], scale)
    assert torch.allclose(advantages, torch.tensor(case["advantages"], dtype=torch.float64), rtol=0, atol=1e-9)
    rows, loss, seen = list(range(len(lengths))), 0.0, []
    for part in [rows] if not split else [rows[i : i + split] for i in range(0, len(rows), split)][::-1]:
        weights = grpo.token_weights(
            mask[part], AGGREGATION[result["loss_type"]], int(mask.sum()), len(rows), case["max_completion_length"]
        )
        part_loss, part_seen = grpo.policy_loss(
            logprobs[part], old[part], advantages[part], weights, case["eps_low"], case["eps_high"],
            result["beta"], None if ref is None else ref[part],
        )  # fmt: skip
        loss, seen = (loss + part_loss, [*seen, {k: (v * mask[part]).sum().item() for k, v in part_seen.items()}])
    loss.backward()
    assert loss.item() == pytest.approx(result["loss"], abs=1e-9)
    if "dloss_dlogp" in result:  # one case has only its loss
        assert torch.allclose(logprobs.grad, padded(result["dloss_dlogp"]), rtol=0, atol=1.1e-9)
    totals = {name: sum(s[name] for s in seen) / mask.sum().item() for name in seen[0]}
    assert totals["clip_frac_low"] == pytest.approx(result["clip_low_frac"], abs=1e-6)
    assert totals["clip_frac_high"] == pytest.approx(result["clip_high_frac"], abs=1e-6)
    if result["beta"]:
        assert totals["kl"] == pytest.approx(result["kl_token_mean"], abs=1e-6)


def test_vectors_are_there():
    assert "VECTORS" in os.environ or len(LOSSES) >= 40


def test_equal_rewards_give_exactly_zero():
    rewards = torch.full((8,), 0.1)  # in float32 their std need not be 0, and eps 1e-8 would make that an advantage
    assert grpo.group_advantages(rewards, 8, "group", eps=1e-8).tolist() == [0.0] * 8


def test_advantages_by_hand():
    # group (0, 0, 0, 1): mean 1/4, sample variance 3 * 1/16 + 9/16 over 3 = 1/4, std 1/2; Dr. GRPO only centres
    rewards = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    assert grpo.group_advantages(rewards, 4, "none").tolist() == [-0.25, -0.25, -0.25, 0.75]
    assert grpo.group_advantages(rewards, 4).tolist() == pytest.approx([-0.25 / 0.5001] * 3 + [0.75 / 0.5001])
    with pytest.raises(ValueError, match="6 rewards"):
        grpo.group_advantages(torch.zeros(6), 4)


def test_weights_by_hand():
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert grpo.token_weights(mask, "token", 3, 2, 10).flatten().tolist() == pytest.approx(
        [1 / 3, 1 / 3, 0, 1 / 3, 0, 0]
    )
    assert grpo.token_weights(mask, "sequence", 3, 2, 10).flatten().tolist() == [0.25, 0.25, 0, 0.5, 0, 0]
    assert grpo.token_weights(mask, "constant", 3, 2, 10).flatten().tolist() == pytest.approx(
        [0.05, 0.05, 0, 0.05, 0, 0]
    )
    empty = torch.zeros(1, 3)  # a row that is masked out gives 0, not nan
    assert grpo.token_weights(empty, "sequence", 3, 2, 10).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "gain, ratio, expected",
    [(1.0, 1.5, 0.0), (1.0, 0.5, -0.5), (-1.0, 0.5, 0.0), (-1.0, 1.5, 1.5), (1.0, 1.1, -1.1), (-1.0, 3.0, 3.0)],
)
def test_clip_stops_the_gradient_where_it_should(gain, ratio, expected):
    """d loss / d logprob = -ratio x gain inside the range, 0 where the update has already gone far enough."""
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    grpo.policy_loss(logprobs, zero, torch.tensor([gain], dtype=torch.float64), one)[0].backward()
    assert logprobs.grad.item() == pytest.approx(expected)


def test_kl_pulls_towards_the_reference():
    """A token likelier under the reference must become likelier: a negative gradient, and the other way round."""
    for ref, sign in ((-0.5, -1), (-3.0, 1)):
        logprobs = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
        args = (logprobs, logprobs.detach(), torch.zeros(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
        loss, _ = grpo.policy_loss(*args, kl_coef=0.1, ref_logprobs=torch.tensor([[ref]], dtype=torch.float64))
        loss.backward()
        assert loss > 0 and logprobs.grad.item() * sign > 0


def test_log_ratios_are_clamped():
    far = torch.tensor([[200.0]], requires_grad=True)
    loss, _ = grpo.policy_loss(far, torch.zeros(1, 1), -torch.ones(1), torch.ones(1, 1))
    assert math.isfinite(loss.item())


def completion(model, number: int, tokens: list[int], finished: bool = True) -> grpo.Completion:
    return grpo.Completion(number, {}, [46, 47, 3], tokens, [0.0] * len(tokens), finished, "", {"correct": False})


def gradient_of(model, done, advantages, rank=0, world=1, **changes):
    cfg = SimpleNamespace(
        **(grpo.asdict(grpo.Config()) | {"batch_size": len(done), "micro_batch_tokens": 64} | changes)
    )
    run = FakeRun(cfg, rank, world)
    grpo.update_policy(run, model, None, None, done, advantages, 1.0, 32)
    return run.gradients


@pytest.fixture(scope="module")
def model():
    return grpo.load_model(TINY).double()


@pytest.fixture(scope="module")
def batch(model):
    done = [completion(model, i // 4, tokens, i != 3) for i, tokens in enumerate(eight_answers())]
    advantages = grpo.group_advantages(torch.tensor([0, 1, 0, 1, 1, 0, 0, 0.5], dtype=torch.float64), 4).tolist()
    return done, advantages


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("mask_truncated", [False, True])
def test_gradient_does_not_depend_on_split_order_or_ranks(model, batch, aggregation, mask_truncated):
    done, advantages = batch
    options = {"aggregation": aggregation, "mask_truncated": mask_truncated}
    [whole] = gradient_of(model, done, advantages, micro_batch_tokens=10**6, **options)
    [single] = gradient_of(model, done, advantages, micro_batch_tokens=1, **options)
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    [shuffled] = gradient_of(model, [done[i] for i in order], [advantages[i] for i in order], **options)
    ranks = sum(gradient_of(model, done, advantages, rank, 3, **options)[0] for rank in range(3))
    assert whole.abs().max() > 1e-4
    for other in (single, shuffled, ranks):
        assert torch.allclose(whole, other, rtol=0, atol=1e-12)


def test_on_policy_gradient_is_reinforce(model, batch):
    """One update per rollout: - sum_i A_i sum_t grad log pi / N, by autograd on plain log-softmax."""
    done, advantages = batch
    [ours] = gradient_of(model, done, advantages, aggregation="token")
    model.zero_grad()
    num_tokens, loss = sum(len(c.tokens) for c in done), 0.0
    for c, advantage in zip(done, advantages, strict=True):
        ids = torch.tensor([c.prompt + c.tokens])
        logprobs = model.logits(model(ids[:, :-1])).log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
        loss = loss - advantage * logprobs[len(c.prompt) - 1 :].sum() / num_tokens
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    assert torch.allclose(ours, expected, rtol=0, atol=1e-12)


def test_without_signal_there_is_no_step(model, batch):
    assert gradient_of(model, batch[0], [0.0] * 8) == []


def test_several_updates_are_each_normalised_over_their_part(model, batch):
    done, advantages = batch
    first, second = gradient_of(model, done, advantages, updates=2)
    [alone] = gradient_of(model, done[:4], advantages[:4])
    assert torch.allclose(first, alone, rtol=0, atol=1e-12)
    [alone] = gradient_of(model, done[4:], advantages[4:])
    assert torch.allclose(second, alone, rtol=0, atol=1e-12)


def test_a_bandit_is_learnt():
    """Reward 1 if the first token is X: three dozen steps of eq. 1 to 4 on a bare table of logits find it."""
    torch.manual_seed(0)
    logits = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(36):
        actions = torch.distributions.Categorical(logits=logits).sample((16,))
        advantages = grpo.group_advantages((actions == 5).double(), 16)
        logprobs = logits.log_softmax(-1)[actions][:, None]
        weights = grpo.token_weights(torch.ones_like(logprobs), "token", 16, 16, 1)
        optimizer.zero_grad()
        grpo.policy_loss(logprobs, logprobs.detach(), advantages, weights)[0].backward()
        optimizer.step()
    assert logits.softmax(-1)[5] > 0.95


def test_reward_of_adds_the_optional_terms():
    c = completion(None, 0, [1] * 90)
    c.score, c.text = {"total": 1.1}, "one two"
    cfg = SimpleNamespace(overlong_cache=20, language_weight=0.5)
    assert grpo.reward_of(c, cfg, 100) == pytest.approx(1.1 - 0.5 + 0.5)  # half of the cache used, all words English
    assert grpo.reward_of(c, SimpleNamespace(overlong_cache=0, language_weight=0.0), 100) == 1.1


def test_dynamic_sampling_fills_the_batch_with_mixed_groups(monkeypatch):
    """Prompts 0, 1, 2, ...; every third group is mixed: a batch of 3 groups needs 9 prompts, drawn 3 at a time."""

    def fake_rollout(sampler, prompter, numbered, group_size, *rest, **options):
        found = []
        for n, _ in numbered:
            rights = [True, False] if n % 3 == 0 else [n % 3 == 1] * 2
            for right in rights:
                found.append(completion(None, n, [1]))
                found[-1].score = {"correct": right, "total": float(right)}
        return found

    monkeypatch.setattr(grpo, "rollout", fake_rollout)
    cfg = SimpleNamespace(**(grpo.asdict(grpo.Config()) | {"batch_size": 6, "group_size": 2, "dynamic_sampling": 5}))
    task = SimpleNamespace(problem=lambda split, seed, n: {})
    run = SimpleNamespace(cfg=cfg, rank=0, world=1, gather=lambda v: [v])
    every, kept, drawn = grpo.sample_batch(run, None, SimpleNamespace(task=task), 1, 0, 8)
    assert [c.number for c in kept] == [0, 0, 3, 3, 6, 6] and drawn == 9 and len(every) == 18
    cfg.dynamic_sampling = 1  # the cap is reached first: what was found is trained on
    _, kept, drawn = grpo.sample_batch(run, None, SimpleNamespace(task=task), 1, 0, 8)
    assert [c.number for c in kept] == [0, 0, 3, 3] and drawn == 6
