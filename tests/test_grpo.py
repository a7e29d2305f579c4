"""grpo.py's own functions: the reference's numbers, cases worked out by hand, invariances."""

import copy
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
FILE = FOLDER / "grpo.json"
VECTORS = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
NAMES = {"grpo": "sequence", "dapo": "token", "dr_grpo": "constant"}  # TRL's names and ours
LOSSES = [(c, r) for c in VECTORS.get("grpo_loss", []) for r in c["results"]]
LOSSES = [(c, r) for c, r in LOSSES if r["loss_type"] in NAMES]
TINY = Path(grpo.__file__).parent / "models" / "tiny"


def exact(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def padded(rows: list[list[float]]) -> torch.Tensor:
    return grpo.pad_rows(rows, torch.device("cpu"), torch.float64)


def close(ours, expected, tolerance=1e-9) -> bool:
    return torch.allclose(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", VECTORS.get("grpo_advantages", []), ids=lambda c: c["id"])
def test_advantages_equal_the_reference(case):
    rewards, size = exact(case["rewards"]).flatten(), len(case["rewards"][0])
    names = {"group": "trl_group", "batch": "trl_batch", "none": "trl_none_dr_grpo"}
    for scale, name in names.items():
        assert close(grpo.group_advantages(rewards, size, scale), exact(case[name])), name
    ours = grpo.group_advantages(rewards, size, "group", eps=1e-8)
    assert close(ours, exact(case["sample_std_eps1e-8 (oat grpo, tiny-grpo)"]))


@pytest.mark.parametrize("case, result", LOSSES, ids=lambda x: x.get("id") or x["loss_type"])
@pytest.mark.parametrize("split", [0, 2], ids=["whole", "micro-batches"])
def test_loss_and_gradient_equal_the_reference(case, result, split):
    """The batch, and the sum over micro-batches of two rows, turned round, to 1e-9 in float64."""
    lengths, masked = case["lengths"], set(case["masked_out_rows"])
    logprobs = padded(case["logps"]).requires_grad_()
    old = padded(case["old_logps"]) if case["old_logps"] else logprobs.detach()
    ref = padded(case["ref_logps"]) if result["beta"] else None
    mask = padded([[float(i not in masked)] * n for i, n in enumerate(lengths)])
    rewards, limit = exact(case["rewards"]).flatten(), case["max_completion_length"]
    advantages = grpo.group_advantages(rewards, case["group_size"], case["scale_rewards"])
    assert close(advantages, exact(case["advantages"]))
    rows, loss, totals = list(range(len(lengths))), 0.0, {}
    counts = NAMES[result["loss_type"]], int(mask.sum()), len(rows), limit
    options = {
        "clip_low": case["eps_low"],
        "clip_high": case["eps_high"],
        "kl_coef": result["beta"],
    }
    parts = [rows[i : i + split] for i in range(0, len(rows), split)][::-1] if split else [rows]
    for part in parts:
        options["ref_logprobs"] = None if ref is None else ref[part]
        weights = grpo.token_weights(mask[part], *counts)
        part_loss, seen = grpo.policy_loss(
            logprobs[part], old[part], advantages[part], weights, **options
        )
        loss = loss + part_loss
        for name, value in seen.items():
            totals[name] = totals.get(name, 0.0) + (value * mask[part]).sum().item() / counts[1]
    loss.backward()
    assert loss.item() == pytest.approx(result["loss"], abs=1e-9)
    if "dloss_dlogp" in result:  # one case has only its loss
        assert close(logprobs.grad, padded(result["dloss_dlogp"]), 1.1e-9)
    assert totals["clip_frac_low"] == pytest.approx(result["clip_low_frac"], abs=1e-6)
    assert totals["clip_frac_high"] == pytest.approx(result["clip_high_frac"], abs=1e-6)
    if result["beta"]:
        assert totals["kl"] == pytest.approx(result["kl_token_mean"], abs=1e-6)


def test_vectors_are_there():
    assert "VECTORS" in os.environ or len(LOSSES) >= 40


def test_equal_rewards_give_exactly_zero():
    rewards = torch.full((8,), 0.1)  # their std need not be 0, and eps 1e-8 would magnify it
    assert grpo.group_advantages(rewards, 8, "group", eps=1e-8).tolist() == [0.0] * 8


def test_advantages_by_hand():
    # (0, 0, 0, 1): mean 1/4, sample variance (3/16 + 9/16) / 3 = 1/4, std 1/2
    rewards = exact([0.0, 0.0, 0.0, 1.0])
    assert grpo.group_advantages(rewards, 4, "none").tolist() == [-0.25, -0.25, -0.25, 0.75]
    expected = [-0.25 / 0.5001] * 3 + [0.75 / 0.5001]
    assert grpo.group_advantages(rewards, 4).tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="6 rewards"):
        grpo.group_advantages(torch.zeros(6), 4)


def test_weights_by_hand():
    mask = exact([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    expected = {
        "token": [1 / 3, 1 / 3, 0, 1 / 3, 0, 0],
        "sequence": [0.25, 0.25, 0, 0.5, 0, 0],
        "constant": [0.05, 0.05, 0, 0.05, 0, 0],
    }
    for aggregation, weights in expected.items():
        ours = grpo.token_weights(mask, aggregation, 3, 2, 10)
        assert ours.flatten().tolist() == pytest.approx(weights), aggregation
    empty = torch.zeros(1, 3)  # a row that is masked out gives 0, not nan
    assert grpo.token_weights(empty, "sequence", 3, 2, 10).tolist() == [[0.0, 0.0, 0.0]]


CLIPPED = [(1.0, 1.5, 0.0), (1.0, 0.5, -0.5), (-1.0, 0.5, 0.0)]
CLIPPED += [(-1.0, 1.5, 1.5), (1.0, 1.1, -1.1), (-1.0, 3.0, 3.0)]


@pytest.mark.parametrize("gain, ratio, expected", CLIPPED)
def test_clip_stops_the_gradient_where_it_should(gain, ratio, expected):
    """d loss / d logprob = -ratio x gain, 0 where the update has already gone far enough."""
    logprobs = exact([[math.log(ratio)]]).requires_grad_()
    grpo.policy_loss(logprobs, exact([[0.0]]), exact([gain]), exact([[1.0]]))[0].backward()
    assert logprobs.grad.item() == pytest.approx(expected)


@pytest.mark.parametrize("ref, sign", [(-0.5, -1), (-3.0, 1)])
def test_kl_pulls_towards_the_reference(ref, sign):
    """A token likelier under the reference must become likelier, and the other way round."""
    logprobs = exact([[-1.0]]).requires_grad_()
    args = logprobs, logprobs.detach(), exact([0.0]), exact([[1.0]])
    loss, _ = grpo.policy_loss(*args, kl_coef=0.1, ref_logprobs=exact([[ref]]))
    loss.backward()
    assert loss > 0 and logprobs.grad.item() * sign > 0


def test_log_ratios_are_clamped():
    far = torch.tensor([[200.0]], requires_grad=True)
    loss, _ = grpo.policy_loss(far, torch.zeros(1, 1), -torch.ones(1), torch.ones(1, 1))
    assert math.isfinite(loss.item())


def test_limit_follows_the_schedule():
    limits = [grpo.limit_at(step, "8:2,16:5", 4) for step in (1, 2, 4, 5, 9)]
    assert limits == [4, 8, 8, 16, 16] and grpo.limit_at(7, "", 4) == 4


def completion(number: int, tokens: list[int], finished: bool = True) -> grpo.Completion:
    score, logprobs = {"correct": False, "format": 0.0}, [0.0] * len(tokens)
    return grpo.Completion(number, {}, [46, 47, 3], tokens, logprobs, finished, "", score)


def settings(**changes) -> SimpleNamespace:
    return SimpleNamespace(**(grpo.asdict(grpo.Config()) | changes))


def gradient_of(model, done, advantages, rank=0, world=1, **changes):
    cfg = settings(**{"batch_size": len(done), "micro_batch_tokens": 64} | changes)
    run = FakeRun(cfg, rank, world)
    grpo.update_policy(run, model, None, None, done, advantages, 1.0, 32)
    return run.gradients


@pytest.fixture(scope="module")
def model():
    return grpo.load_model(TINY).double()


@pytest.fixture(scope="module")
def batch():
    """Eight answers, the fourth truncated, and their advantages."""
    done = [completion(i // 4, tokens, i != 3) for i, tokens in enumerate(eight_answers())]
    rewards = exact([0, 1, 0, 1, 1, 0, 0, 0.5])
    return done, grpo.group_advantages(rewards, 4, "none").tolist()


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("mask_truncated", [False, True])
def test_gradient_does_not_depend_on_split_order_or_ranks(
    model, batch, aggregation, mask_truncated
):
    done, advantages = batch
    options = {"aggregation": aggregation, "mask_truncated": mask_truncated}
    [whole] = gradient_of(model, done, advantages, micro_batch_tokens=10**6, **options)
    [single] = gradient_of(model, done, advantages, micro_batch_tokens=1, **options)
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    [shuffled] = gradient_of(
        model, [done[i] for i in order], [advantages[i] for i in order], **options
    )
    ranks = sum(gradient_of(model, done, advantages, rank, 3, **options)[0] for rank in range(3))
    assert whole.abs().max() > 1e-4
    for other in (single, shuffled, ranks):
        assert close(whole, other, 1e-12)


def plain_logprobs(model, c):
    """(n,) log-probabilities of an answer's tokens by plain log-softmax."""
    ids = torch.tensor([c.prompt + c.tokens])
    logprobs = model.logits(model(ids[:, :-1])).log_softmax(-1)
    return logprobs.gather(-1, ids[:, 1:, None])[0, len(c.prompt) - 1 :, 0]


def gradient_by_autograd(model, loss):
    model.zero_grad()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return gradient


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_on_policy_gradient_is_reinforce(model, batch, mask_truncated):
    """One update per rollout: - sum_i A_i sum_t grad log pi / N, a masked row counts nowhere."""
    done, advantages = batch
    options = {"aggregation": "token", "mask_truncated": mask_truncated}
    [ours] = gradient_of(model, done, advantages, **options)
    counted = [i for i in range(8) if done[i].finished or not mask_truncated]
    num_tokens = sum(len(done[i].tokens) for i in counted)
    sums = [advantages[i] * plain_logprobs(model, done[i]).sum() for i in counted]
    assert close(ours, gradient_by_autograd(model, -sum(sums) / num_tokens), 1e-12)


def test_second_update_is_measured_against_the_policy_that_sampled(model, batch):
    """pi_old of eq. 2 is noted before the first update moves the weights."""
    done, advantages = batch
    moved, second = copy.deepcopy(model), copy.deepcopy(model)
    second.model.norm.weight.data *= 0.97

    class Moving(FakeRun):
        def update(self, module, optimizer, lr):
            module.model.norm.weight.data *= 0.97
            return super().update(module, optimizer, lr)

    run = Moving(settings(batch_size=8, micro_batch_tokens=64, updates=2, aggregation="token"))
    grpo.update_policy(run, moved, None, None, done, advantages, 1.0, 32)
    loss, num_tokens, ratios = 0.0, sum(len(c.tokens) for c in done[4:]), []
    for c, advantage in zip(done[4:], advantages[4:], strict=True):
        logprobs, old = plain_logprobs(second, c), plain_logprobs(model, c).detach()
        ratios += (logprobs - old).exp().tolist()
        weights = exact([[1 / num_tokens] * len(old)])
        loss = loss + grpo.policy_loss(logprobs[None], old[None], exact([advantage]), weights)[0]
    assert min(ratios) < 1.2 < max(ratios)  # some are clipped
    assert close(run.gradients[1], gradient_by_autograd(second, loss), 1e-12)


def test_without_signal_there_is_no_step(model, batch):
    assert gradient_of(model, batch[0], [0.0] * 8) == []


def test_several_updates_are_each_normalised_over_their_part(model, batch):
    done, advantages = batch
    first, second = gradient_of(model, done, advantages, updates=2)
    [alone] = gradient_of(model, done[:4], advantages[:4])
    assert close(first, alone, 1e-12)
    [alone] = gradient_of(model, done[4:], advantages[4:])
    assert close(second, alone, 1e-12)


def test_a_bandit_is_learnt():
    """Three dozen steps of eq. 1 to 4 on a bare table of logits find the token with reward."""
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
    c = completion(0, [1] * 90)
    c.score, c.text = {"correct": True, "format": 1.0}, "one two </think> 234"
    cfg = settings(format_weight=0.3)
    assert grpo.reward_of(c, cfg, 100) == pytest.approx(1.3)
    cfg.overlong_cache, cfg.language_weight = 20, 0.5  # half of the cache used, all words English
    assert grpo.reward_of(c, cfg, 100) == pytest.approx(1.3 - 0.5 + 0.5)


def test_dynamic_sampling_fills_the_batch_with_mixed_groups(monkeypatch):
    """Every third group is mixed: a batch of 3 groups needs 9 prompts, drawn 3 at a time."""

    def fake_rollout(run, sampler, prompter, problems, size, limit, step):
        found = []
        for n, _ in problems:
            for right in [True, False] if n % 3 == 0 else [n % 3 == 1] * size:
                found.append(completion(n, [1]))
                found[-1].score = {"correct": right, "format": 0.0}
        return found

    monkeypatch.setattr(grpo, "rollout", fake_rollout)
    run = FakeRun(settings(batch_size=6, group_size=2, dynamic_sampling=5))
    prompter = SimpleNamespace(task=SimpleNamespace(problem=lambda split, seed, n: {}))
    everything, batch, drawn = grpo.sample_batch(run, None, prompter, 1, 0, 8)
    assert [c.number for c in batch] == [0, 0, 3, 3, 6, 6]
    assert drawn == 9 and len(everything) == 18
    assert [c.reward for c in batch] == [1.0, 0.0] * 3
    run.cfg.dynamic_sampling = 1  # the cap is reached first: what was found is trained on
    _, batch, drawn = grpo.sample_batch(run, None, prompter, 1, 0, 8)
    assert [c.number for c in batch] == [0, 0, 3, 3] and drawn == 6
    run.cfg.dynamic_sampling = 0  # off: every group, one draw
    _, batch, drawn = grpo.sample_batch(run, None, prompter, 1, 4, 8)
    assert [c.number for c in batch] == [4, 4, 5, 5, 6, 6] and drawn == 7
