"""more/prime.py: equations by the reference's numbers, gradients; for ranks, resume: test_scripts."""

import copy

import pytest
import torch
from conftest import FakeRun, close, eight_answers, float64
from test_vectors import cases

from more import prime
from rewards import Completion

RIGHT = (1, 4, 6)  # of the eight answers, in two groups of four


@cases("ppo_nsr", "prime", "cases")
def test_eq1_to_eq6_equal_the_paper_s_code(case):
    prm, ref, mask = (float64(case[n]) for n in ("prm_logprobs", "ref_logprobs", "mask"))
    outcomes, K = float64(case["acc"]), case["n_samples"]
    q = prime.implicit_rewards(prm, ref, mask)
    assert close(q, case["token_scores_q"])
    assert close(prime.prm_losses(q, outcomes, case["beta"]).mean(), case["ce_loss"])
    _, everywhere = prime.pair_accuracy(q, outcomes, K)
    assert everywhere == pytest.approx(case["prm_pair_accuracy"])
    z = prime.bounded(q)
    assert close(z, case["batch_normed_scores"])
    returns = prime.process_returns(z, mask, K, case["reward_model_gamma"])
    returns = returns + prime.outcome_returns(outcomes, mask, K, case["verifier_gamma"])
    whitened = prime.whiten(returns, mask, correction=1)
    assert close(returns, float64(case["returns"]) * mask)
    # 1e-8 bounds the variance, is not added
    assert close(whitened, float64(case["whitened_advantages"]) * mask, 1e-7)


def test_eq2_far_away_and_its_gradient():
    """Finite where a sigmoid is 0 or 1; by hand at log 3; the gradient is beta (s - o)."""
    q = float64([[1e4, 0], [-1e4, 0], [2.0, -2.0]]).requires_grad_()
    losses = prime.prm_losses(q, float64([0, 1, 1]), 1.0)
    losses.sum().backward()
    assert close(losses, [1e4, 1e4, float64(2.0).log()])
    assert close(q.grad, [[1, 1], [-1, -1], [-0.5, -0.5]])
    [loss] = prime.prm_losses(float64([[2.0]]) * float64(3.0).log(), float64([0.0]), 0.5)
    assert loss.item() == pytest.approx(float64(4.0).log().item())


def ragged():
    """q, outcomes, mask of eight answers of 1 to 5 tokens; the first has one."""
    lengths = torch.tensor([1, 5, 3, 4, 2, 5, 1, 4])
    mask = (torch.arange(5) < lengths[:, None]).double()
    q = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).double() * mask
    return q, float64([i in RIGHT for i in range(8)]), mask


def returns_of(q, outcomes, mask, gamma=1.0):
    process = prime.process_returns(prime.bounded(q), mask, 4, gamma)
    return process + prime.outcome_returns(outcomes, mask, 4, gamma)


def test_padding_changes_nothing():
    q, outcomes, mask = ragged()
    more = torch.zeros(8, 3, dtype=torch.float64)
    wide = returns_of(torch.cat([q, more], 1), outcomes, torch.cat([mask, more], 1), 0.9)
    assert torch.equal(wide, torch.cat([returns_of(q, outcomes, mask, 0.9), more], 1))


def test_eq3_to_eq5_by_hand():
    """K = 2, one answer of two tokens, one of one; discounts 1/2 (process) and 1/4 (outcome)."""
    q, mask = float64([[3.0, 1.0], [-2.0, 0.0]]), float64([[1, 1], [1, 0]])
    z = prime.bounded(q)
    assert close(z, [[0.75, 0.25], [-0.5, 0.0]], 1e-6)
    # sum of means 0.5 - 0.5 = 0; u = 2 z
    assert close(prime.process_returns(z, mask, 2, 0.5), [[1.75, 0.5], [-1.0, 0.0]], 1e-6)
    got = prime.outcome_returns(float64([1, 0]), mask, 2, 0.25)
    assert torch.equal(got, float64([[0.25, 1.0], [-1.0, 0.0]]))


def test_equal_outcomes_and_groups():
    """RLOO is exactly 0 without a difference; z of one group does not enter another's u."""
    q, _, mask = ragged()
    for outcome in (torch.zeros_like(mask[:, 0]), torch.ones_like(mask[:, 0])):
        assert not prime.outcome_returns(outcome, mask, 4, 1.0).any()
    z = prime.bounded(q)
    changed = torch.cat([z[:4], 0.3 * z[4:]])
    first, other = (prime.process_returns(x, mask, 4, 1.0) for x in (z, changed))
    assert torch.equal(first[:4], other[:4]) and not torch.equal(first[4:], other[4:])


def test_pair_accuracy_counts_groups_with_a_difference():
    """Ranked rightly 1 of 2, a tie half; all right: no part, or 0.5."""
    q = float64([[3.0], [1.0], [2.0], [2.0], [0.0], [9.0]])
    outcomes = float64([1, 1, 0, 0, 1, 1])
    assert prime.pair_accuracy(q[:3], outcomes[:3], 3) == (0.5, 0.5)
    assert prime.pair_accuracy(q[[0, 1, 3, 5]], float64([1, 0, 1, 1]), 2) == (1.0, 0.75)
    assert prime.pair_accuracy(q[2:4], float64([1, 0]), 2) == (0.5, 0.5)
    unlike, everywhere = prime.pair_accuracy(q[4:], outcomes[4:], 2)
    assert unlike != unlike and everywhere == 0.5


def test_window_is_inclusive():
    for window, rows in {(0.5, 1): [2, 3, 4, 5], (0, 0.5): [0, 1, 2, 3], (0.2, 0.8): [2, 3]}.items():
        assert prime.in_window([0.0, 0.0, 1.0, 0.0, 1.0, 1.0], 2, *window) == rows


def test_eq7_by_hand():
    """Ratios 1.5 and 0.5: clipped where it helps, not where it hurts."""
    old, ratio = torch.zeros(4), torch.tensor([1.5, 1.5, 0.5, 0.5])
    logprobs = ratio.log().requires_grad_()
    loss, seen = prime.ppo_loss(logprobs, old, torch.tensor([1.0, -1.0, 1.0, -1.0]), 8, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx((-1.2 + 1.5 - 0.5 + 0.8) / 8)
    assert close(logprobs.grad, [0.0, 1.5 / 8, -0.5 / 8, 0.0], 1e-6)
    assert seen["clip_frac_high"].tolist() == [True, False, False, False]
    assert seen["clip_frac_low"].tolist() == [False, False, False, True]


@pytest.fixture(scope="module")
def model(small):
    return prime.load_model(small).double()


@pytest.fixture(scope="module")
def prm(model):
    """Another model: the policy with a head of other scale."""
    other = copy.deepcopy(model)
    other.model.norm.weight.data.mul_(1.5)
    return other


def completion(i: int, tokens: list[int]) -> Completion:
    zeros, right = [0.0] * len(tokens), float(i in RIGHT)
    return Completion(i // 4, {}, [46, 47, 3], tokens, zeros, True, "", {}, right)


DONE = [completion(i, tokens) for i, tokens in enumerate(eight_answers())]


def fake(rank: int = 0, world: int = 1, **changes) -> FakeRun:
    changes = {"group_size": 4, "micro_batch_tokens": 64, "prm_updates": 2} | changes
    return FakeRun(prime.Config(**changes), rank, world)


def test_phi_as_reference_is_rloo_to_the_last_bit(model):
    x, metrics = prime.score_batch(fake(), model, copy.deepcopy(model), model, DONE)
    rloo, none = prime.score_batch(fake(), model, None, None, DONE)
    assert torch.equal(x["advantages"], rloo["advantages"]) and x["advantages"].any()
    assert metrics["prm_pair_accuracy"] == 0.5 and metrics["return_std/process"] == 0
    assert none == {}


def plain_logps(model, c: Completion) -> torch.Tensor:
    ids = torch.tensor([c.prompt + c.tokens])
    logprobs = model.logits(model(ids[:, :-1])).log_softmax(-1)
    return logprobs.gather(-1, ids[:, 1:, None])[0, len(c.prompt) - 1 :, 0]


def gradient_of(loss: torch.Tensor, model) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in found])


def test_gradients_are_those_of_eq2_and_eq7_and_stay_apart(model, prm):
    """Against autograd, a row at a time; whatever the passes and ranks; of one model only."""
    x, _ = prime.score_batch(fake(), model, prm, model, DONE)
    sums = torch.stack([(plain_logps(prm, c) - plain_logps(model, c).detach()).sum() for c in DONE])
    outcomes = float64([c.reward for c in DONE])
    parts = prime.shuffled_parts(fake().cfg, 3, 8, 2)
    assert sorted(sum(parts, [])) == list(range(8)) and len(parts[0]) == 4
    losses = [prime.prm_losses(sums[p, None], outcomes[p], 0.05).mean() for p in parts]
    expected = [gradient_of(loss, prm) for loss in losses]
    for limit in (1, 10**6):
        run = fake(micro_batch_tokens=limit)
        found = prime.update_prm(run, prm, None, DONE, x, 3, 1.0)
        for gradient, right in zip(run.gradients, expected, strict=True):
            assert right.abs().max() > 1e-4 and close(10 * gradient, right, 1e-10)
        assert found["prm_grad_norm"] == 10
    assert all(weight.grad is None for weight in model.parameters())

    gains, tokens = x["advantages"], sum(len(c.tokens) for c in DONE)
    logps = [plain_logps(model, c) * gains[i, : len(c.tokens)] for i, c in enumerate(DONE)]
    expected = gradient_of(-sum(logp.sum() for logp in logps) / tokens, model)
    whole, ranks = fake(), [fake(rank, 3, micro_batch_tokens=1) for rank in range(3)]
    for run in (whole, *ranks):
        prime.update_policy(run, model, None, DONE, x, 3, 1.0)
    assert expected.abs().max() > 1e-3 and close(whole.gradients[0], expected, 1e-10)
    assert close(sum(run.gradients[0] for run in ranks), expected, 1e-10)
    assert all(weight.grad is None for weight in prm.parameters())


def test_no_group_in_the_window_ends_the_run(run, cwd):
    done = run("more.prime", "--accuracy_low 1 --eval_problems 0 --task countdown --out a")
    words = "step 1: none of 20 groups has an accuracy in 1.0 to 1.0; widen the window"
    assert done.code == 2 and words in done.err


def test_the_prm_is_left_as_a_model_folder(run, cwd):
    assert run("more.prime", "--eval_problems 0 --out a --prm_lr 0.01").code == 0
    saved, policy = (prime.load_model(cwd / "a" / name) for name in ("prm", "step-000002"))
    state = torch.load(cwd / "a" / "step-000002" / "trainer.pt", weights_only=True)
    assert torch.equal(saved.model.norm.weight, state["prm"]["model.norm.weight"])
    assert not torch.equal(saved.model.norm.weight, policy.model.norm.weight)
