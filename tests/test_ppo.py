"""ppo.py's own functions: the reference's numbers (vectors/ppo_nsr.json), invariances, its runs."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TRAINING, FakeRun, close, completion, eight_answers, float64, metrics_of
from test_vectors import cases, vectors

import ppo

SECTIONS = vectors("ppo_nsr")
GAE = SECTIONS["gae"]["masked"]["cases"] + SECTIONS["gae"]["multi_gamma"]["cases"]
LOSSES = {"policy": "logprobs old_logprobs advantages", "value": "values old_values returns"}
AGGREGATION = {"seq_mean": "sequence", "token_mean": "token"}  # the reference's names and ours


@pytest.mark.parametrize("case", GAE)
def test_eq2_gae_and_whitening_equal_the_paper_s_code(case):
    """One discount or two, garbage outside the mask. Two types share the reference's value."""
    rewards, values, mask = (float64(case[name]) for name in ("rewards", "values", "mask"))
    gammas = case.get("gammas") or [case["gamma"]]
    shares = float64([0.3, 0.7] if "gammas" in case else [1.0])
    rewards, values = rewards.view(*mask.shape, -1), values[..., None] * shares
    found = ppo.gae(rewards, values, mask, float64(gammas), case["lambda"])
    advantages, returns = found.sum(-1), (found + values).sum(-1)
    whitened = ppo.whiten(advantages, mask)
    assert not advantages[mask == 0].any() and not whitened[mask == 0].any()
    for row, n in enumerate(case["lengths"]):
        assert close(advantages[row, :n], case["advantages"][row])
        assert close(returns[row, :n], case["returns"][row])
        if "gamma" in case:
            assert close(whitened[row, :n], case["normalized_advantages"][row])


@pytest.mark.parametrize("how", AGGREGATION)
@pytest.mark.parametrize("kind, case", [(k, c) for k in LOSSES for c in SECTIONS["ppo_losses"][k]])
def test_eq3_to_eq5_losses_and_gradients_equal_the_reference(kind, case, how):
    x, old, other, mask = (float64(case[name]) for name in (*LOSSES[kind].split(), "mask"))
    weights = ppo.token_weights(mask, AGGREGATION[how], int(mask.sum()), len(mask), 9)
    x.requires_grad_()
    if kind == "policy":
        loss, seen = ppo.clipped_policy_loss(x, old, other, weights, case["clip"])
        clipped = (seen["clip_frac_low"] | seen["clip_frac_high"]) * mask
        assert clipped.sum() / mask.sum() == pytest.approx(case["clipfrac"], abs=1e-10)
    else:
        columns = (y[..., None] for y in (x, old, other))
        loss = ppo.clipped_value_loss(*columns, weights, case["clip"])
    loss.backward()
    assert loss.item() == pytest.approx(case[f"{how}_loss"], abs=1e-10)
    assert close(x.grad, case[f"{how}_grad"], 1e-10)


@cases("ppo_nsr", "kl", "estimators")
def test_eq1_kl_estimators_equal_the_reference(case):
    args, mask = (float64(case["logprobs"]), float64(case["ref_logprobs"])), float64(case["mask"])
    for kind in ("k1", "k2"):
        assert close(ppo.kl_estimate(*args, kind), case[kind], 1e-10)
    assert close(ppo.kl_estimate(*args, "k3") * mask, case["k3_masked_unclamped"], 1e-10)


@cases("ppo_nsr", "kl", "reward_placement")
def test_eq1_rewards_stand_where_the_reference_puts_them(case):
    reward, kl, mask = float64(case["reward"]), float64(case["kl"]), float64(case["mask"])
    if case["kind"] == "scalar":
        reward = ppo.at_end(reward, mask)
    reward, expected = (x.view(*mask.shape, -1) for x in (reward, float64(case["expected"])))
    got = ppo.token_rewards(reward, kl, case["kl_coef"], mask, case["reward_clip_range"][1])
    assert close(got, expected, 1e-10)


def config(**changes) -> SimpleNamespace:
    chosen = {"max_new_tokens": 32, "micro_batch_tokens": 64, "batch_size": 8, "mini_batches": 1}
    return SimpleNamespace(**(ppo.asdict(ppo.Config()) | chosen | changes))


def test_eq1_outcome_rewards():
    """Half way to the limit every cosine is at the mean of its two ends."""
    half, right = [5] * 16, (True, 1.0, 1.0)
    answers = completion(0, half, *right), completion(0, half), completion(0, [5] * 32, False)
    cases = {"plain": [1.1, 0, 0], "cosine": [1.5, -5, -10], "cosine-trl": [0.75, -0.75, -0.5]}
    for name, expected in cases.items():
        got = [ppo.outcome_reward(c, config(reward=name)) for c in answers]
        assert got == pytest.approx(expected)


DONE = [completion(i // 4, c, i != 3, i in (1, 4)) for i, c in enumerate(eight_answers())]


@pytest.fixture(scope="module")
def critic(model):
    critic = ppo.Critic(model, 2)
    torch.nn.init.normal_(critic.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return critic


def marks_of(done) -> list:
    return [ppo.repetition_penalty([t % 7 for t in c.tokens], 2, 1.0) for c in done]


def experience_of(model, critic, done, cfg, reference=None):
    return ppo.make_experience(FakeRun(cfg), model, critic, reference, done, marks_of(done))


def gradients_of(model, critic, done, cfg, x, rank=0, world=1) -> dict:
    """Of the policy and of the critic, a list each."""
    run, size = FakeRun(cfg, rank, world), sum(p.numel() for p in model.parameters())
    ppo.update_policy(run, model, critic, (None, None), done, dict(x), 1, 1.0, 1.0)
    policy = [gradient for gradient in run.gradients if len(gradient) == size]
    return {"policy": policy, "critic": [g for g in run.gradients if len(g) > size]}


def test_eq1_and_eq2_with_a_discount_for_each_reward_type(model, critic):
    """And a lambda for the critic; the KL is shared out; values and pi_old are of now."""
    reference, c = copy.deepcopy(model), DONE[1]
    reference.lm_head.weight.data.mul_(3)
    options = {"gamma": 0.95, "repetition_gamma": 0.8, "gae_lambda": 0.9, "critic_lambda": 0.7}
    options |= {"repetition_penalty": 0.1, "kl_coef": 0.1, "kl_type": "k2"}
    x, _ = experience_of(model, critic, [c], config(**options), reference)
    rows = c.prompt + c.tokens, [0] * 3 + [1] * len(c.tokens)
    ref_logprobs, _ = ppo.completion_logprobs(reference, *torch.tensor(rows)[:, None])
    kl = ppo.kl_estimate(x["old_logprobs"], ref_logprobs[:, 2:], "k2")
    outcome = ppo.at_end(float64([1.0]), x["mask"])
    rewards = torch.stack([outcome, -0.1 * float64(marks_of([c]))], -1) - 0.05 * kl[..., None]
    args = rewards, x["old_values"], x["mask"], float64([0.95, 0.8])
    assert close(x["returns"], ppo.gae(*args, 0.7) + x["old_values"], 1e-10)
    assert close(x["advantages"], ppo.whiten(ppo.gae(*args, 0.9).sum(-1), x["mask"]), 1e-10)


def test_nothing_depends_on_split_or_ranks(model, critic):
    """Experience, and gradients of policy and critic; float64."""
    options = {"repetition_penalty": 0.1, "value_clip": 0.2, "aggregation": "token"}
    whole, single = (config(micro_batch_tokens=n, **options) for n in (10**6, 1))
    x, metrics = experience_of(model, critic, DONE, whole)
    y, other = experience_of(model, critic, DONE, single)
    assert all(close(x[name], y[name], 1e-12) for name in x) and metrics == pytest.approx(other)
    ranks = [gradients_of(model, critic, DONE, single, x, i, 3) for i in range(3)]
    for kind, [one] in gradients_of(model, critic, DONE, whole, x).items():
        assert close(one, sum(rank[kind][0] for rank in ranks), 1e-12)


def test_eq4_first_update_is_reinforce_and_regression(model, critic):
    """Against plain log-softmax: - sum w A log pi; half the mean square of V - G, over tokens."""
    cfg = config(aggregation="constant")
    x, _ = experience_of(model, critic, DONE, cfg)
    got = gradients_of(model, critic, DONE, cfg, x)
    num_tokens, policy, value = sum(len(c.tokens) for c in DONE), 0.0, 0.0
    for i, c in enumerate(DONE):
        n, ids, first = len(c.tokens), torch.tensor([c.prompt + c.tokens]), len(c.prompt) - 1
        logprobs = model.logits(model(ids[:, :-1])).log_softmax(-1)
        logprobs = logprobs.gather(-1, ids[:, 1:, None])[0, first:, 0]
        values = critic.head(critic.trunk(ids[:, :-1]))[0, first:]
        policy = policy - (x["advantages"][i, :n] * logprobs).sum() / (8 * 32)
        value = value + 0.5 * (values - x["returns"][i, :n]).square().sum() / num_tokens
    for kind, module, loss in (("policy", model, policy), ("critic", critic, value)):
        weights = list(module.parameters())
        grads = torch.autograd.grad(loss, weights, materialize_grads=True, allow_unused=True)
        assert close(got[kind][0], torch.cat([g.flatten() for g in grads]), 1e-12)
    # without a signal the critic learns alone; the mean of 0.1 need not be 0.1
    assert not ppo.whiten(torch.full((4, 5), 0.1), torch.ones(4, 5)).any()
    got = gradients_of(model, critic, DONE, cfg, x | {"advantages": 0 * x["advantages"]})
    assert not got["policy"] and got["critic"][0].abs().max() > 1e-4


def test_each_mini_batch_is_normalised_by_itself(model, critic):
    """Every answer once an epoch, in its own order. FakeRun takes no step."""
    x, _ = experience_of(model, critic, DONE, config())
    got = gradients_of(model, critic, DONE, config(epochs=2, mini_batches=2), x)
    for i in range(4):
        part = np.random.default_rng((0, 1, i // 2)).permutation(8)[i % 2 * 4 :][:4]
        own = {name: y[part] for name, y in x.items()}
        alone = gradients_of(model, critic, [DONE[j] for j in part], config(), own)
        assert all(close(alone[kind][0], got[kind][i], 1e-12) for kind in alone)


def test_a_critic_s_warm_up_trains_it_alone(run, cwd):
    assert run("ppo", f"--out a --eval_problems 0 {TRAINING['ppo'][1]}").code == 0
    first, second = metrics_of(cwd / "a")
    assert first["lr"] == 0 < first["critic_lr"] and second["lr"] > 0
    assert "grad_norm" not in first and second["grad_norm"] > 0 and second["critic_grad_norm"] > 0
