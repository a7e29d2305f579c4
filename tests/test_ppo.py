"""ppo.py's own functions: the reference's numbers (vectors/ppo_nsr.json), invariances, its runs."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TRAINING, FakeRun, eight_answers, lines_of, metrics_of, vectors

import ppo

SECTIONS = vectors("ppo_nsr")
GAE, LOSSES, KL = (SECTIONS.get(name, {}) for name in ("gae", "ppo_losses", "kl"))
RETURNS = [case for name in ("masked", "multi_gamma") if GAE for case in GAE[name]["cases"]]
AGGREGATION = {"seq_mean": "sequence", "token_mean": "token"}  # the reference's names and ours


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(got: torch.Tensor, expected, tolerance: float = 1e-9) -> bool:
    expected = expected if isinstance(expected, torch.Tensor) else tensor(expected)
    return torch.allclose(got.detach().double(), expected.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", RETURNS)
def test_eq2_gae_and_whitening_equal_the_paper_s_code(case):
    """One discount or two, garbage outside the mask. Two types share the reference's value."""
    rewards, values, mask = (tensor(case[name]) for name in ("rewards", "values", "mask"))
    # a column in front that is outside the mask
    rewards, values = (torch.cat([x[:, :1] + 9, x], 1) for x in (rewards, values))
    mask = torch.cat([0 * mask[:, :1], mask], 1)
    gammas, shares = [case.get("gamma")], [1.0]
    if "gammas" in case:
        gammas, shares = case["gammas"], [0.3, 0.7]
    rewards, values = rewards.view(*mask.shape, -1), values[..., None] * tensor(shares)
    found = ppo.gae(rewards, values, mask, tensor(gammas), case["lambda"])
    advantages, returns = found.sum(-1), (found + values).sum(-1)
    whitened = ppo.whiten(advantages, mask)
    assert not advantages[mask == 0].any() and not whitened[mask == 0].any()
    for row, n in enumerate(case["lengths"]):
        here = slice(1, n + 1)
        assert close(advantages[row, here], case["advantages"][row])
        assert close(returns[row, here], case["returns"][row])
        if "gamma" in case:
            assert close(whitened[row, here], case["normalized_advantages"][row])


def test_whitening_of_equal_advantages_is_0():
    equal = torch.full((4, 5), 0.1)  # in float32 their mean need not be 0.1
    assert not ppo.whiten(equal, torch.ones(4, 5)).any()
    assert not ppo.whiten(equal[:1, :1], torch.ones(1, 1)).any()


def losses(name: str):
    """Cases of "policy" or "value", each with both aggregations."""
    pairs = [(case, how) for case in LOSSES.get(name, []) for how in AGGREGATION]
    return pytest.mark.parametrize("case, how", pairs)


def weights_of(case: dict, how: str) -> torch.Tensor:
    """w of eq. 4"""
    mask = tensor(case["mask"])
    return ppo.token_weights(mask, AGGREGATION[how], int(mask.sum()), len(mask), 9)


@losses("policy")
def test_eq3_and_eq4_policy_loss_and_gradient_equal_the_reference(case, how):
    names = "logprobs", "old_logprobs", "advantages", "mask"
    logprobs, old, advantages, mask = (tensor(case[name]) for name in names)
    args = logprobs.requires_grad_(), old, advantages, weights_of(case, how), case["clip"]
    loss, seen = ppo.clipped_policy_loss(*args)
    loss.backward()
    assert loss.item() == pytest.approx(case[f"{how}_loss"], abs=1e-10)
    assert close(logprobs.grad, case[f"{how}_grad"], 1e-10)
    clipped = (seen["clip_frac_low"] | seen["clip_frac_high"]) * mask
    assert clipped.sum() / mask.sum() == pytest.approx(case["clipfrac"], abs=1e-10)


@losses("value")
def test_eq5_value_loss_and_gradient_equal_the_reference(case, how):
    names = "values", "old_values", "returns"
    values, old, returns = (tensor(case[name])[..., None] for name in names)
    args = values.requires_grad_(), old, returns, weights_of(case, how), case["clip"]
    loss = ppo.clipped_value_loss(*args)
    loss.backward()
    assert loss.item() == pytest.approx(case[f"{how}_loss"], abs=1e-10)
    assert close(values.grad[..., 0], case[f"{how}_grad"], 1e-10)


def test_log_ratios_are_clamped():
    far = torch.tensor([200.0, -200.0])
    loss, _ = ppo.clipped_policy_loss(far, torch.zeros(2), -torch.ones(2), torch.ones(2))
    assert math.isfinite(loss.item())
    assert ppo.kl_estimate(-far, torch.zeros(2), "k3").isfinite().all()


def test_explained_variance():
    returns = tensor([0.0, 1.0, 2.0])
    assert ppo.explained_variance(returns, returns) == 1
    assert ppo.explained_variance(0 * returns, returns) == 0
    assert ppo.explained_variance(-returns, returns) == pytest.approx(-3)  # error 2 G
    assert math.isnan(ppo.explained_variance(returns, torch.ones(3)))


@pytest.mark.parametrize("case", KL.get("estimators", []))
def test_eq1_kl_estimators_equal_the_reference(case):
    args, mask = (tensor(case["logprobs"]), tensor(case["ref_logprobs"])), tensor(case["mask"])
    for kind in ("k1", "k2"):
        assert close(ppo.kl_estimate(*args, kind), case[kind], 1e-10)
    assert close(ppo.kl_estimate(*args, "k3") * mask, case["k3_masked_unclamped"], 1e-10)


@pytest.mark.parametrize("case", KL.get("reward_placement", []))
def test_eq1_rewards_stand_where_the_reference_puts_them(case):
    reward, kl, mask = tensor(case["reward"]), tensor(case["kl"]), tensor(case["mask"])
    expected = tensor(case["expected"])
    if case["kind"] == "scalar":
        reward = ppo.at_end(reward, mask)
    if case["kind"] != "multi":
        reward, expected = reward[..., None], expected[..., None]
    got = ppo.token_rewards(reward, kl, case["kl_coef"], mask, case["reward_clip_range"][1])
    assert close(got, expected, 1e-10)


def completion(number: int, tokens: list[int], finished=True, correct=False, format=0.0):
    score, zeros = {"format": format, "correct": correct, "outcome": correct}, [0.0] * len(tokens)
    return ppo.Completion(number, {}, [46, 47, 3], tokens, zeros, finished, "", score)


def config(**changes) -> SimpleNamespace:
    chosen = {"max_new_tokens": 32, "micro_batch_tokens": 64, "batch_size": 8, "mini_batches": 1}
    return SimpleNamespace(**(ppo.asdict(ppo.Config()) | chosen | changes))


def test_eq1_outcome_rewards():
    right, wrong = completion(0, [5] * 16, True, True, 1.0), completion(0, [5] * 16)
    answers = right, wrong, completion(0, [5] * 32, False)
    # half way to the limit every cosine is at the mean of its two ends
    cases = {"plain": [1.1, 0, 0], "cosine": [1.5, -5, -10], "cosine-trl": [0.75, -0.75, -0.5]}
    for name, expected in cases.items():
        got = [ppo.outcome_reward(c, config(reward=name)) for c in answers]
        assert got == pytest.approx(expected)
    assert ppo.outcome_reward(right, config(format_weight=0.5)) == 1.5
    assert ppo.outcome_reward(completion(0, []), config(reward="cosine-trl")) == -1


@pytest.fixture(scope="module")
def model(small):
    return ppo.load_model(small).double()


@pytest.fixture(scope="module")
def batch():
    return [completion(i // 4, c, i != 3, i in (1, 4)) for i, c in enumerate(eight_answers())]


def critic_of(model, types: int = 1) -> ppo.Critic:
    critic = ppo.Critic(model, types)
    torch.manual_seed(0)
    torch.nn.init.normal_(critic.head.weight, std=0.1)
    return critic


def marks_of(done) -> list:
    return [ppo.repetition_penalty([t % 7 for t in c.tokens], 2, 1.0) for c in done]


def experience_of(model, critic, done, cfg, reference=None):
    return ppo.make_experience(FakeRun(cfg), model, critic, reference, done, marks_of(done))


def gradients_of(model, critic, done, cfg, x, rank=0, world=1, lr=1.0) -> dict:
    """Of the policy and of the critic, a list each."""
    run, size = FakeRun(cfg, rank, world), sum(p.numel() for p in model.parameters())
    ppo.update_policy(run, model, critic, (None, None), done, dict(x), 1, lr, 1.0)
    policy = [gradient for gradient in run.gradients if len(gradient) == size]
    return {"policy": policy, "critic": [g for g in run.gradients if len(g) > size]}


def test_a_new_critic_says_0(model, batch):
    x, metrics = experience_of(model, ppo.Critic(model, 1), batch, config())
    assert not x["old_values"].any() and metrics["explained_variance"] == metrics["kl"] == 0
    share = sum(map(sum, marks_of(batch))) / sum(len(c.tokens) for c in batch)
    assert metrics["repeated_share"] == share > 0


def test_eq1_and_eq2_with_a_discount_for_each_reward_type(model, batch):
    """And a lambda for the critic; the KL is shared out; values and pi_old are of now."""
    reference, critic, c = copy.deepcopy(model), critic_of(model, 2), batch[1]
    with torch.no_grad():
        reference.lm_head.weight.mul_(3)
    options = {"gamma": 0.95, "repetition_gamma": 0.8, "gae_lambda": 0.9, "critic_lambda": 0.7}
    options |= {"repetition_penalty": 0.1, "kl_coef": 0.1, "kl_type": "k2"}
    x, metrics = experience_of(model, critic, [c], config(**options), reference)
    ids = torch.tensor([c.prompt + c.tokens])
    where = torch.tensor([[0] * 3 + [1] * len(c.tokens)])
    ref_logprobs, _ = ppo.completion_logprobs(reference, ids, where)
    kl = ppo.kl_estimate(x["old_logprobs"], ref_logprobs[:, 2:], "k2")
    outcome = ppo.at_end(tensor([1.0]), x["mask"])
    rewards = torch.stack([outcome, -0.1 * tensor(marks_of([c]))], -1) - 0.05 * kl[..., None]
    args = rewards, x["old_values"], x["mask"], tensor([0.95, 0.8])
    assert close(x["returns"], ppo.gae(*args, 0.7) + x["old_values"], 1e-10)
    assert close(x["advantages"], ppo.whiten(ppo.gae(*args, 0.9).sum(-1), x["mask"]), 1e-10)
    assert metrics["kl"] == pytest.approx(kl.mean().item()) and metrics["kl"] > 0


def test_nothing_depends_on_split_order_or_ranks(model, batch):
    """Experience, and gradients of policy and critic; float64."""
    critic = critic_of(model, 2)
    options = {"repetition_penalty": 0.1, "value_clip": 0.2, "aggregation": "token"}
    whole, single = (config(micro_batch_tokens=n, **options) for n in (10**6, 1))
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    mixed = [batch[i] for i in order]
    x, metrics = experience_of(model, critic, batch, whole)
    y, other = experience_of(model, critic, mixed, single)
    assert all(close(x[name][order], y[name], 1e-12) for name in x)
    assert metrics == pytest.approx(other)
    expected = gradients_of(model, critic, batch, whole, x)
    shuffled = gradients_of(model, critic, mixed, single, y)
    ranks = [gradients_of(model, critic, batch, config(**options), x, i, 3) for i in range(3)]
    for kind in ("policy", "critic"):
        [one] = expected[kind]
        assert one.abs().max() > 1e-4
        assert close(one, shuffled[kind][0], 1e-12)
        assert close(one, sum(rank[kind][0] for rank in ranks), 1e-12)


def test_eq4_first_update_is_reinforce_and_regression(model, batch):
    """Against plain log-softmax: - sum w A log pi; half the mean square of V - G, over tokens."""
    critic, cfg = critic_of(model), config(aggregation="constant")
    x, _ = experience_of(model, critic, batch, cfg)
    got = gradients_of(model, critic, batch, cfg, x)
    num_tokens, policy, value = sum(len(c.tokens) for c in batch), 0.0, 0.0
    for i, c in enumerate(batch):
        n, ids, first = len(c.tokens), torch.tensor([c.prompt + c.tokens]), len(c.prompt) - 1
        logprobs = model.logits(model(ids[:, :-1])).log_softmax(-1)
        logprobs = logprobs.gather(-1, ids[:, 1:, None])[0, first:, 0]
        values = critic.head(critic.trunk(ids[:, :-1]))[0, first:, 0]
        policy = policy - (x["advantages"][i, :n] * logprobs).sum() / (8 * 32)
        value = value + 0.5 * (values - x["returns"][i, :n, 0]).square().sum() / num_tokens
    for kind, module, loss in (("policy", model, policy), ("critic", critic, value)):
        weights = list(module.parameters())
        grads = torch.autograd.grad(loss, weights, materialize_grads=True, allow_unused=True)
        assert close(got[kind][0], torch.cat([g.flatten() for g in grads]), 1e-12)


def test_critic_warm_up_leaves_the_policy_alone(model, batch):
    """So does a batch without signal, which trains the critic alone."""
    critic, cfg = critic_of(model), config()
    x, _ = experience_of(model, critic, batch, cfg)
    for lr, advantages in ((0.0, x["advantages"]), (1.0, 0 * x["advantages"])):
        got = gradients_of(model, critic, batch, cfg, x | {"advantages": advantages}, lr=lr)
        assert not got["policy"] and got["critic"][0].abs().max() > 1e-4
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_epochs_and_mini_batches(model, batch):
    """Every answer once an epoch, in its own order; each mini-batch is normalised by itself."""
    critic, cfg = critic_of(model), config(epochs=2, mini_batches=2)
    x, _ = experience_of(model, critic, batch, cfg)
    got = gradients_of(model, critic, batch, cfg, x)
    orders = [np.random.default_rng((0, 1, epoch)).permutation(8).tolist() for epoch in range(2)]
    assert orders[0] != orders[1]
    # FakeRun takes no step, so all are of the same weights
    for i, part in enumerate([order[k : k + 4] for order in orders for k in (0, 4)]):
        done, own = [batch[j] for j in part], {name: y[part] for name, y in x.items()}
        alone = gradients_of(model, critic, done, config(), own)
        for kind in ("policy", "critic"):
            assert close(alone[kind][0], got[kind][i], 1e-12)


@pytest.mark.parametrize("bad, steps", [("policy", (5, 5)), ("critic", (4, 5))])
def test_bad_gradients_of_either_end_the_run(model, batch, bad, steps):
    """Five in a row, also where the other module's are good every time."""
    model, seen = copy.deepcopy(model), []
    critic = critic_of(model)
    x, _ = experience_of(model, critic, batch, config())
    run = FakeRun(config(mini_batches=4, epochs=2))

    def update(module, optimizer, lr: float) -> float:
        seen.append("critic" if module is critic else "policy")
        if seen[-1] == bad:
            next(module.parameters()).grad[0] = math.nan
        return ppo.Run.update(run, module, optimizer, lr)

    run.update, run.skipped, run.say = update, {}, print
    optimizers = [torch.optim.SGD(module.parameters(), 0.0) for module in (model, critic)]
    with pytest.raises(FloatingPointError):
        ppo.update_policy(run, model, critic, optimizers, batch, x, 1, 1e-9, 1e-9)
    assert (seen.count("policy"), seen.count("critic")) == steps


def test_a_run_with_a_critic_s_warm_up(run, cwd):
    """It trains the critic alone; rewards stand by type in the samples."""
    flags = f"--save_every 1 --out a --eval_problems 0 {TRAINING['ppo'][1]}"
    assert run("ppo", flags).code == 0
    first, second = metrics_of(cwd / "a")
    assert first["lr"] == 0 < first["critic_lr"] and second["lr"] > 0
    assert "grad_norm" not in first and second["grad_norm"] > 0 and second["critic_grad_norm"] > 0
    for row in lines_of(cwd / "a" / "samples.jsonl"):
        assert row["rewards"]["repetition"] <= 0 and -10 <= row["rewards"]["outcome"] <= 2
    state = torch.load(cwd / "a" / "step-000001" / "trainer.pt", weights_only=True)
    assert not state["optimizer"]["state"] and state["critic"]["head.weight"].any()


def test_resume_refuses_another_critic(run, cwd):
    """One value for each reward type: without the penalty there is one less."""
    assert run("ppo", "--out a --eval_problems 0 --steps 1").code == 0
    done = run("ppo", "--resume a --steps 2 --repetition_penalty 0", base=False)
    assert done.code == 2 and done.err.startswith("ppo.py: error: --repetition_penalty"), done.err


# the first flag is the one that is refused
BAD = [
    "--gamma 1.1",
    "--gae_lambda 2",
    "--critic_lambda 2",
    "--repetition_gamma 2 --repetition_penalty 1",
    "--repetition_gamma 0.9",
    "--format_weight 0.5 --reward cosine",
    "--batch_size 8 --group_size 4 --mini_batches 3",
]


@pytest.mark.parametrize("flags", BAD)
def test_bad_combinations(flags):
    with pytest.raises(ppo.BadInput, match=flags.split()[0]):
        ppo.check_flags(ppo.parse_config(ppo.Config, flags.split()))
