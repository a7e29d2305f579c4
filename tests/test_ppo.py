"""ppo.py's own functions: the reference's numbers (tests/vectors/ppo_nsr.json), cases by hand, invariances, resume."""

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FakeRun, eight_answers, lines_of, metrics_of
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo  # noqa: E402

FOLDER = Path(os.environ.get("VECTORS") or Path(__file__).parent / "vectors")
PATH = FOLDER / "ppo_nsr.json"
VECTORS = json.loads(PATH.read_text(encoding="utf-8"))["sections"] if PATH.is_file() else {}
GAE = {name: part["cases"] for name, part in VECTORS.get("gae", {}).items() if name != "source"}
LOSSES, KL = VECTORS.get("ppo_losses", {}), VECTORS.get("kl", {})
TINY = Path(ppo.__file__).parent / "models" / "tiny"
AGGREGATION = {"seq_mean": "sequence", "token_mean": "token"}  # the reference's names and ours


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(got: torch.Tensor, expected, tolerance: float = 1e-9) -> bool:
    expected = expected if isinstance(expected, torch.Tensor) else tensor(expected)
    return torch.allclose(got.detach(), expected, rtol=0, atol=tolerance)


def one_gae(rewards, values, mask, gamma: float, gae_lambda: float) -> torch.Tensor:
    """`gae` of a single reward type, (B, T)."""
    return ppo.gae(rewards[..., None], values[..., None], mask, tensor([gamma]), gae_lambda)[..., 0]


def test_vectors_are_there():
    counts = {name: len(cases) for name, cases in GAE.items()}
    known = {"masked": 5, "multi_gamma": 4, "verl": 3, "trl_p1": 3, "cleanrl": 2}
    assert "VECTORS" in os.environ or counts == known and len(LOSSES["policy"]) == len(LOSSES["value"]) == 6


# ------------------------------------------------------------------------------------------- advantages, eq. 2


@pytest.mark.parametrize("case", GAE.get("masked", []), ids=lambda c: f"{c['gamma']}-{c['lambda']}")
def test_gae_and_whitening_equal_the_paper_s_code(case):
    """The inputs hold garbage outside the mask."""
    values, rewards, mask = tensor(case["values"]), tensor(case["rewards"]), tensor(case["mask"]).bool()
    advantages = one_gae(rewards, values, mask, case["gamma"], case["lambda"])
    assert not advantages[~mask].any()
    for row, n in enumerate(case["lengths"]):
        assert close(advantages[row, :n], case["advantages"][row])
        assert close((advantages + values)[row, :n], case["returns"][row])
        assert close(ppo.whiten(advantages, mask)[row, :n], case["normalized_advantages"][row])


@pytest.mark.parametrize("case", GAE.get("multi_gamma", []), ids=lambda c: str(c["gammas"]))
def test_several_discounts_equal_the_paper_s_code(case):
    """With lambda 1 only the sum of the values matters: here the first type has all of it."""
    rewards, mask, shared = tensor(case["rewards"]), tensor(case["mask"]), tensor(case["values"])
    for share in (1.0, 0.3):
        values = torch.stack([share * shared, (1 - share) * shared], -1)
        advantages = ppo.gae(rewards, values, mask, tensor(case["gammas"]), case["lambda"])
        for row, n in enumerate(case["lengths"]):
            assert close(advantages.sum(-1)[row, :n], case["advantages"][row])
            assert close((advantages + values).sum(-1)[row, :n], case["returns"][row])


@pytest.mark.parametrize("case", GAE.get("verl", []), ids=lambda c: f"{c['gamma']}-{c['lambda']}")
def test_gae_equals_verl_with_a_value_behind_the_end(case):
    """verl keeps the value of the state after the end token: the mask is one longer there."""
    values, rewards, mask = tensor(case["values"]), tensor(case["token_level_rewards"]), tensor(case["eos_mask"])
    longer = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], 1)
    advantages = one_gae(rewards, values, longer, case["gamma"], case["lambda"])
    assert close((advantages + values * longer), case["returns"])
    assert close(advantages * mask, tensor(case["advantages_before_whiten"]) * mask)
    whitened = ppo.whiten(advantages, mask, correction=1)
    assert close(whitened, tensor(case["whitened_advantages"]) * mask, 1e-7)  # eps is added there, a floor here


@pytest.mark.parametrize("case", GAE.get("trl_p1", []), ids=lambda c: f"{c['kl_estimator']}-{c['gamma']}")
def test_gae_equals_trl_with_the_score_behind_the_end(case):
    """TRL puts the score one slot behind the end token, if there is one, and leaves a value there."""
    last, values = torch.tensor(case["last_token_index"])[:, None], tensor(case["values"])
    columns = torch.arange(values.shape[1])[None]
    mask, longer = columns <= last, columns <= last + 1
    kl = ppo.kl_estimate(tensor(case["logprobs"]), tensor(case["ref_logprobs"]), case["kl_estimator"]) * mask
    placed = ppo.at_end(tensor(case["scores"]), longer)[..., None]
    rewards = ppo.token_rewards(placed, kl, case["kl_coef"], longer)[..., 0]
    assert close(rewards, case["rewards"])
    advantages = one_gae(rewards, values, longer, case["gamma"], case["lambda"])
    assert close((advantages + values) * longer, tensor(case["returns"]) * longer)
    assert close(ppo.whiten(advantages, mask, correction=1), tensor(case["whitened_advantages"]) * mask, 1e-7)


@pytest.mark.parametrize("case", GAE.get("cleanrl", []), ids=lambda c: f"{c['gamma']}-{c['lambda']}")
def test_gae_equals_cleanrl_episode_by_episode(case):
    """An episode that is cut off instead of ended goes on with one slot whose reward is its value."""
    steps, envs = len(case["rewards"]), len(case["rewards"][0])
    for env in range(envs):
        ends = [t for t in range(1, steps) if case["dones"][t][env]] + [steps]
        for start, end in zip([0, *ends], ends, strict=False):
            rewards, values = ([case[name][t][env] for t in range(start, end)] for name in ("rewards", "values"))
            if end == steps and not case["next_done"][env]:
                rewards, values = rewards + [case["next_value"][env]], values + [case["next_value"][env]]
            rewards, values = tensor([rewards]), tensor([values])
            got = one_gae(rewards, values, torch.ones_like(values), case["gamma"], case["lambda"])
            expected = [[case[name][t][env] for t in range(start, end)] for name in ("advantages", "returns")]
            assert close(got[0, : end - start], expected[0]) and close((got + values)[0, : end - start], expected[1])


def test_normalisation_equals_cleanrl():
    for case in GAE.get("cleanrl", []):
        advantages = tensor(case["advantages"])
        whitened = ppo.whiten(advantages, torch.ones_like(advantages), correction=1)
        assert close(whitened.flatten(), case["normalized_flat"], 1e-7)


def test_gae_by_hand():
    # V = (1, 2), r = (0, 4), gamma 1/2, lambda 1/2: delta_1 = 4 - 2 = 2, delta_0 = 0 + 1/2 x 2 - 1 = 0,
    # A_1 = 2, A_0 = 0 + 1/4 x 2 = 1/2; what stands outside the mask, in between or behind, changes nothing
    rewards, values = tensor([[0.0, 9.0, 4.0, math.nan]]), tensor([[1.0, math.inf, 2.0, math.nan]])
    got = one_gae(rewards, values, torch.tensor([[1, 0, 1, 0]]), 0.5, 0.5)
    assert got.tolist() == [[0.5, 0.0, 2.0, 0.0]]


def test_lambda_1_is_the_reward_to_come_less_the_value():
    torch.manual_seed(0)
    rewards, values, mask = torch.randn(3, 7, 2).double(), torch.randn(3, 7, 2).double(), torch.ones(3, 7)
    got = ppo.gae(rewards, values, mask, tensor([1.0, 0.9]), 1.0)
    for m, gamma in enumerate((1.0, 0.9)):
        for t in range(7):
            to_come = sum(gamma**k * rewards[:, t + k, m] for k in range(7 - t))
            assert close(got[:, t, m], to_come - values[:, t, m], 1e-12)


def test_whitening():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    advantages = tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]])
    # mean 3, squared distances 4 + 1 + 9 = 14, biased variance 14/3, sample variance 7
    assert close(ppo.whiten(advantages, mask), tensor([[-2, -1, 0], [3, 0, 0]]) / math.sqrt(14 / 3))
    assert close(ppo.whiten(advantages, mask, correction=1), tensor([[-2, -1, 0], [3, 0, 0]]) / math.sqrt(7))
    equal = torch.full((4, 5), 0.1)  # in float32 their mean need not be 0.1
    assert not ppo.whiten(equal, torch.ones(4, 5)).any() and not ppo.whiten(equal[:1, :1], torch.ones(1, 1)).any()
    order = torch.randperm(2)
    assert close(ppo.whiten(advantages[order], mask[order]), ppo.whiten(advantages, mask)[order], 1e-12)


# --------------------------------------------------------------------------------------------- losses, eq. 3 to 5


@pytest.mark.parametrize("case", LOSSES.get("policy", []), ids=lambda c: str(c["clip"]))
@pytest.mark.parametrize("name", AGGREGATION)
def test_policy_loss_equals_the_reference(case, name):
    logprobs, old, advantages, mask = (tensor(case[n]) for n in ("logprobs", "old_logprobs", "advantages", "mask"))
    logprobs.requires_grad_()
    weights = ppo.token_weights(mask, AGGREGATION[name], int(mask.sum()), len(mask), 9)
    loss, seen = ppo.clipped_policy_loss(logprobs, old, advantages, weights, case["clip"])
    loss.backward()
    assert loss.item() == pytest.approx(case[f"{name}_loss"], abs=1e-10)
    assert close(logprobs.grad, case[f"{name}_grad"], 1e-10)
    share = {n: (value * mask).sum().item() / mask.sum().item() for n, value in seen.items()}
    assert share["clip_frac_low"] + share["clip_frac_high"] == pytest.approx(case["clipfrac"], abs=1e-10)
    k1 = (ppo.kl_estimate(old, logprobs.detach(), "k1") * mask).sum() / mask.sum()
    assert k1.item() == pytest.approx(case["approx_kl_k1_old_new"], abs=1e-10) and share["approx_kl"] >= 0


@pytest.mark.parametrize("case", LOSSES.get("value", []), ids=lambda c: str(c["clip"]))
@pytest.mark.parametrize("name", AGGREGATION)
def test_value_loss_equals_the_reference(case, name):
    values, old, returns, mask = (tensor(case[n]) for n in ("values", "old_values", "returns", "mask"))
    values.requires_grad_()
    weights = ppo.token_weights(mask, AGGREGATION[name], int(mask.sum()), len(mask), 9)
    args = old[..., None], returns[..., None], weights
    loss = ppo.clipped_value_loss(values[..., None], *args, case["clip"])
    loss.backward()
    assert loss.item() == pytest.approx(case[f"{name}_loss"], abs=1e-10)
    assert close(values.grad, case[f"{name}_grad"], 1e-10)
    if name == "seq_mean":
        plain = ppo.clipped_value_loss(values[..., None], *args, 0.0).item()
        assert plain == pytest.approx(case["unclipped_seq_mean_loss"], abs=1e-10)


@pytest.mark.parametrize(
    "gain, ratio, expected",
    [(1.0, 1.5, 0.0), (1.0, 0.5, -0.5), (-1.0, 0.5, 0.0), (-1.0, 1.5, 1.5), (1.0, 1.1, -1.1), (-1.0, 3.0, 3.0)],
)
def test_clip_stops_the_gradient_where_it_should(gain, ratio, expected):
    logprobs = tensor([math.log(ratio)]).requires_grad_()
    ppo.clipped_policy_loss(logprobs, tensor([0.0]), tensor([gain]), tensor([1.0]))[0].backward()
    assert logprobs.grad.item() == pytest.approx(expected)


def test_a_value_far_enough_towards_its_return_stops():
    # returns 1, V_old 0, clip 0.2: at V = 0.3 the gradient has stopped, at V = 0.1 and V = -0.3 it has not
    values = tensor([[0.3], [0.1], [-0.3]]).requires_grad_()
    ones = torch.ones(3, 1, dtype=torch.float64)
    ppo.clipped_value_loss(values, 0 * ones, ones, ones[:, 0], 0.2).backward()
    assert values.grad[:, 0].tolist() == pytest.approx([0.0, -0.9, -1.3])


def test_log_ratios_are_clamped():
    far = torch.tensor([200.0, -200.0])
    loss, _ = ppo.clipped_policy_loss(far, torch.zeros(2), -torch.ones(2), torch.ones(2))
    assert math.isfinite(loss.item()) and ppo.kl_estimate(-far, torch.zeros(2), "k3").isfinite().all()


def test_explained_variance():
    returns = tensor([0.0, 1.0, 2.0])
    assert ppo.explained_variance(returns, returns) == 1 and ppo.explained_variance(0 * returns, returns) == 0
    assert ppo.explained_variance(-returns, returns) == pytest.approx(-3)  # the error 2 G has four times the variance
    assert math.isnan(ppo.explained_variance(returns, torch.ones(3)))


# ------------------------------------------------------------------------------------------------ rewards, eq. 1


@pytest.mark.parametrize("case", KL.get("estimators", []), ids=range(len(KL.get("estimators", []))))
def test_kl_estimators_equal_the_reference(case):
    args, mask = (tensor(case["logprobs"]), tensor(case["ref_logprobs"])), tensor(case["mask"])
    for kind in ("k1", "k2"):
        assert close(ppo.kl_estimate(*args, kind), case[kind], 1e-10)
    assert close(ppo.kl_estimate(*args, "k1") * mask, case["k1_masked"], 1e-10)
    assert close(ppo.kl_estimate(*args, "k3") * mask, case["k3_masked_unclamped"], 1e-10)
    assert close(ppo.kl_estimate(*args, "k3").clamp(-10, 10), case["k3_clamped_pm10"], 1e-10)


@pytest.mark.parametrize("case", KL.get("reward_placement", []), ids=lambda c: c["kind"])
def test_rewards_stand_where_the_reference_puts_them(case):
    reward, kl, mask = tensor(case["reward"]), tensor(case["kl"]), tensor(case["mask"])
    scalar, several = case["kind"] == "scalar", case["kind"] == "multi"
    placed = reward if several else (ppo.at_end(reward, mask) if scalar else reward)[..., None]
    got = ppo.token_rewards(placed, kl, case["kl_coef"], mask, case["reward_clip_range"][1])
    assert close(got if several else got[..., 0], case["expected"], 1e-10)


def test_kl_estimators_agree_on_the_mean():
    """Over all tokens: k1 and k3 have the mean KL, k3 with less variance; as a loss k1 pulls nowhere."""
    logits, ref = tensor([0.3, -0.5, 1.0, 0.1]).requires_grad_(), tensor([0.1, -0.2, 0.9, 0.4]).log_softmax(0)
    logprobs = logits.log_softmax(0)
    probs = logprobs.exp().detach()
    exact = (probs * (logprobs - ref)).sum().item()
    estimates = {kind: ppo.kl_estimate(logprobs, ref, kind) for kind in ("k1", "k2", "k3")}
    means = {kind: (probs * k).sum().item() for kind, k in estimates.items()}
    assert means["k1"] == pytest.approx(exact) and means["k3"] == pytest.approx(exact)
    assert means["k2"] == pytest.approx(exact, rel=0.2)
    spread = {kind: (probs * (k - means[kind]).square()).sum().item() for kind, k in estimates.items()}
    assert spread["k3"] < spread["k1"] / 10
    gradients = {}
    for kind, k in estimates.items():
        (gradients[kind],) = torch.autograd.grad((probs * k).sum(), logits, retain_graph=True)
    assert gradients["k1"].abs().max() < 1e-12 < 1e-3 < gradients["k2"].abs().max()


def completion(number: int, tokens: list[int], finished: bool = True, correct: bool = False) -> ppo.Completion:
    score = {"format": 0.0, "answer": None, "correct": correct, "total": float(correct), "outcome": float(correct)}
    return ppo.Completion(number, {}, [46, 47, 3], tokens, [0.0] * len(tokens), finished, "", score)


def config(**changes) -> SimpleNamespace:
    chosen = {"critic": "shared", "max_new_tokens": 32, "micro_batch_tokens": 64, "repetition_n": 2}
    return SimpleNamespace(**(ppo.asdict(ppo.Config()) | chosen | {"batch_size": 8, "mini_batches": 1} | changes))


def test_outcome_rewards():
    right, wrong, cut = completion(0, [5] * 16, True, True), completion(0, [5] * 16), completion(0, [5] * 32, False)
    assert [ppo.outcome_reward(c, config()) for c in (right, wrong, cut)] == [1, 0, 0]
    assert [ppo.outcome_reward(c, config(exceed_reward=-2.0)) for c in (right, wrong, cut)] == [1, 0, -2]
    # half way to the limit every cosine is at the mean of its two ends
    for name, expected in {
        "cosine": [1.5, -5, -10],
        "cosine-A": [5, 0, -10],
        "cosine-B": [5.5, -5, -10],
        "cosine-C": [9.5, -5, -10],
        "cosine-trl": [0.75, -0.75, -0.5],
    }.items():
        got = [ppo.outcome_reward(c, config(reward=name)) for c in (right, wrong, cut)]
        assert got == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------- the whole update


class TwoModules(FakeRun):
    """Notes the gradients of the policy and of the critic apart."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.of = {"policy": [], "critic": []}

    def update(self, module, optimizer, lr: float) -> float:
        norm = super().update(module, optimizer, lr)
        self.of["critic" if isinstance(module, ppo.Critic) else "policy"].append(self.gradients.pop())
        return norm


@pytest.fixture(scope="module")
def model():
    return ppo.load_model(TINY).double()


@pytest.fixture(scope="module")
def batch():
    return [completion(i // 4, tokens, i != 3, i in (1, 4)) for i, tokens in enumerate(eight_answers())]


def critic_of(model, separate: bool, types: int = 1) -> ppo.Critic:
    critic = ppo.Critic(model, types, separate)
    torch.manual_seed(0)
    torch.nn.init.normal_(critic.head.weight, std=0.1)
    return critic


def marks_of(done) -> list:
    return [ppo.repetition_penalty([t % 7 for t in c.tokens], 2, 1.0) for c in done]


def experience_of(model, critic, done, cfg, reference=None):
    return ppo.make_experience(TwoModules(cfg), model, critic, reference, done, marks_of(done))


def gradients_of(model, critic, done, cfg, x, rank=0, world=1, lr=1.0) -> dict:
    run = TwoModules(cfg, rank, world)
    ppo.update_policy(run, model, critic, (None, None), done, dict(x), 1, lr, 1.0)
    return run.of


def test_a_new_critic_says_0_and_the_first_advantages_are_the_returns(model, batch):
    cfg = config()
    for separate in (False, True):
        critic = ppo.Critic(model, 1, separate)
        x, metrics = experience_of(model, critic, batch, cfg)
        assert not x["old_values"].any() and metrics["value_mean"] == metrics["explained_variance"] == 0
        assert metrics["kl"] == 0
        rewards = tensor([c.score["outcome"] for c in batch])[:, None] * x["mask"]
        assert close(x["returns"][..., 0], rewards, 1e-12)  # gamma = lambda = 1: the reward at every token
        assert close(x["advantages"], ppo.whiten(rewards, x["mask"]), 1e-12)
        assert (critic.trunk is not None) == separate
    assert metrics["repeated_share"] == sum(map(sum, marks_of(batch))) / sum(len(c.tokens) for c in batch) > 0


def test_values_are_those_before_the_token(model, batch):
    """Another last token changes no value; another first one changes all but the first."""
    critic = critic_of(model, True)
    c = batch[1]
    values = {}
    for name, tokens in {"same": c.tokens, "last": [*c.tokens[:-1], 45], "first": [45, *c.tokens[1:]]}.items():
        values[name] = experience_of(model, critic, [completion(0, tokens)], config())[0]["old_values"][0, :, 0]
    assert close(values["same"], values["last"], 1e-12)
    differs = (values["same"] - values["first"]).abs() > 1e-9
    assert not differs[0] and differs[1:].all()


OPTIONS = [
    {"critic": "shared", "repetition_penalty": 0.0},
    {"critic": "separate", "repetition_penalty": 0.1, "aggregation": "token", "kl_coef": 0.1, "value_clip": 0.2},
    {"critic": "shared", "kl_coef": 0.1, "kl_in": "loss", "kl_type": "k3", "gae_lambda": 0.9, "aggregation": "token"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_nothing_depends_on_split_order_or_ranks(model, batch, options):
    """Advantages, whitened over everything, and gradients of policy and critic; float64."""
    critic = critic_of(model, options["critic"] == "separate", 1 + (options.get("repetition_penalty", 0) > 0))
    reference = ppo.copy.deepcopy(model) if options.get("kl_coef") else None
    if reference is not None:
        with torch.no_grad():
            reference.lm_head.weight.mul_(1.1)
    whole, single = (config(micro_batch_tokens=n, **options) for n in (10**6, 1))
    x, metrics = experience_of(model, critic, batch, whole, reference)
    y, other = experience_of(model, critic, batch, single, reference)
    assert all(close(x[name].double(), y[name].double(), 1e-12) for name in x)
    assert metrics == pytest.approx(other) and (metrics["kl"] != 0) == (reference is not None)
    assert x["advantages"][x["mask"]].mean().abs() < 1e-12
    assert x["advantages"][x["mask"]].var(correction=0) == pytest.approx(1)
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    z, _ = experience_of(model, critic, [batch[i] for i in order], whole, reference)
    assert all(close(x[name][order].double(), z[name].double(), 1e-12) for name in x)
    expected = gradients_of(model, critic, batch, whole, x)
    split = gradients_of(model, critic, batch, single, x)
    shuffled = gradients_of(model, critic, [batch[i] for i in order], single, z)
    ranks = [gradients_of(model, critic, batch, single, x, rank, 3) for rank in range(3)]
    for kind in ("policy", "critic"):
        [one] = expected[kind]
        assert one.abs().max() > 1e-4
        for other in (split[kind][0], shuffled[kind][0], sum(r[kind][0] for r in ranks)):
            assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_experience_of_several_ranks_is_that_of_one(model, batch):
    """Each rank computes its rows; what the others found comes through gather."""
    critic, cfg = critic_of(model, False), config()
    x, metrics = experience_of(model, critic, batch, cfg)
    shares = []
    for rank in range(3):
        run = TwoModules(cfg, rank, 3)
        run.gather = lambda value: shares.append(value) or ([value] if len(shares) < 3 else shares)
        try:
            y, other = ppo.make_experience(run, model, critic, None, batch, marks_of(batch))
        except KeyError:
            assert rank < 2  # the rows of the ranks that come later are missing
    assert all(close(x[name].double(), y[name].double(), 1e-12) for name in x) and metrics == pytest.approx(other)


def test_first_update_is_reinforce_and_regression(model, batch):
    """Against plain log-softmax: - sum A log pi / N, and half the mean squared distance of V to its returns."""
    critic, cfg = critic_of(model, True), config(critic="separate", aggregation="token")
    x, _ = experience_of(model, critic, batch, cfg)
    got = gradients_of(model, critic, batch, cfg, x)
    num_tokens, policy, value = int(x["mask"].sum()), 0.0, 0.0
    for i, c in enumerate(batch):
        ids, first = torch.tensor([c.prompt + c.tokens]), len(c.prompt) - 1
        logprobs = model.logits(model(ids[:, :-1])).log_softmax(-1).gather(-1, ids[:, 1:, None])[0, first:, 0]
        values = critic.head(critic.trunk(ids[:, :-1]))[0, first:, 0]
        policy = policy - (x["advantages"][i, : len(c.tokens)] * logprobs).sum() / num_tokens
        value = value + 0.5 * (values - x["returns"][i, : len(c.tokens), 0]).square().sum() / num_tokens
    for kind, module, loss in (("policy", model, policy), ("critic", critic, value)):
        grads = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, module.parameters(), strict=True)]
        assert torch.allclose(got[kind][0], torch.cat([g.flatten() for g in flat]), rtol=0, atol=1e-12)


def test_critic_warm_up_leaves_the_policy_alone(model, batch):
    """Not even through a shared trunk; and a batch without signal trains the critic alone."""
    for separate in (False, True):
        critic, cfg = critic_of(model, separate), config(critic="separate" if separate else "shared")
        x, _ = experience_of(model, critic, batch, cfg)
        for lr, advantages in ((0.0, x["advantages"]), (1.0, 0 * x["advantages"])):
            got = gradients_of(model, critic, batch, cfg, x | {"advantages": advantages}, lr=lr)
            assert not got["policy"] and got["critic"][0].abs().max() > 1e-4
            assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_critic_counts_every_token_the_same(model, batch):
    """However the policy's loss weighs answers: the gradient of the mean of eq. 5 over all tokens."""
    critic = ppo.Critic(model, 1, False)  # V = 0: the gradient at its bias is the mean of V - G
    x, _ = experience_of(model, critic, batch, config())
    for aggregation in ("token", "sequence", "constant"):
        got = gradients_of(model, critic, batch, config(aggregation=aggregation, value_coef=1.0), x)["critic"][0]
        assert close(got[-1], -x["returns"][x["mask"]].mean(), 1e-10) and got[-1].abs() > 0.01


def test_a_shared_trunk_learns_from_both_losses(model, batch):
    critic = critic_of(model, False)
    x, _ = experience_of(model, critic, batch, config())
    none, some = (gradients_of(model, critic, batch, config(value_coef=c), x)["policy"][0] for c in (0.0, 0.1))
    twice = gradients_of(model, critic, batch, config(value_coef=0.2), x)["policy"][0]
    assert (some - none).abs().max() > 1e-4 and close(twice - none, 2 * (some - none), 1e-10)


def test_epochs_and_mini_batches(model, batch):
    """Every answer once an epoch, in an order of its own; each mini-batch is normalised by itself."""
    critic, cfg = critic_of(model, False), config(epochs=2, mini_batches=2)
    x, _ = experience_of(model, critic, batch, cfg)
    got = gradients_of(model, critic, batch, cfg, x)
    assert len(got["policy"]) == len(got["critic"]) == 4
    parts = []
    for epoch in range(2):
        order = ppo.np.random.default_rng((cfg.seed, 1, epoch)).permutation(8).tolist()
        parts += [order[:4], order[4:]]
    assert sorted(parts[0] + parts[1]) == sorted(parts[2] + parts[3]) == list(range(8)) and parts[:2] != parts[2:]
    for part, gradient in zip(
        parts, got["policy"], strict=True
    ):  # FakeRun takes no step, so all are of the same weights
        alone = gradients_of(model, critic, [batch[i] for i in part], config(), {n: y[part] for n, y in x.items()})
        assert torch.allclose(alone["policy"][0], gradient, rtol=0, atol=1e-12)


def test_bad_gradients_of_either_count_towards_the_five(model, batch):
    """The policy's are bad each time, the critic's never: the counter that stops the run has to see it."""
    critic, cfg = critic_of(model, False), config(mini_batches=4)
    x, _ = experience_of(model, critic, batch, cfg)
    run = TwoModules(cfg)

    def update(module, optimizer, lr):
        run.skipped = 0 if isinstance(module, ppo.Critic) else run.skipped + 1
        module.zero_grad()
        return 1.0

    run.update = update
    ppo.update_policy(run, model, critic, (None, None), batch, x, 1, 1.0, 1.0)
    assert run.skipped == 4


def test_the_gradient_has_the_sign_of_the_exact_one():
    """All answers of two tokens out of three, weighted with their probability: with the true V, and with any V, eq. 2
    to 4 (no whitening) point where the expected reward grows.
    """
    torch.manual_seed(0)
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)  # after nothing, and after each first token
    reward = torch.randn(3, 3, dtype=torch.float64)
    logprobs = logits.log_softmax(-1)
    answers = [(a, b) for a in range(3) for b in range(3)]
    chosen = torch.stack([torch.stack([logprobs[0, a], logprobs[1 + a, b]]) for a, b in answers])  # (9, 2)
    probs = chosen.sum(1).exp()
    (exact,) = torch.autograd.grad(
        sum(p * reward[a, b] for p, (a, b) in zip(probs, answers, strict=True)), logits, retain_graph=True
    )
    mask = torch.ones(9, 2, dtype=torch.bool)
    rewards = ppo.at_end(torch.stack([reward[a, b] for a, b in answers]), mask)
    state_values = (logprobs[1:].exp() * reward).sum(-1).detach()  # of each first token
    start = (logprobs[0].exp() * state_values).sum().detach()
    true = torch.stack([torch.stack([start, state_values[a]]) for a, _ in answers])
    wrong = torch.stack([tensor([0.7, -1.0 + a]) for a, _ in answers])  # a function of the state, so no bias
    for values, gae_lambda in ((true, 1.0), (true, 0.3), (wrong, 1.0)):
        advantages = one_gae(rewards, values, mask, 1.0, gae_lambda)
        loss, _ = ppo.clipped_policy_loss(chosen, chosen.detach(), advantages, probs.detach()[:, None].expand(9, 2))
        (ours,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert close(-ours, exact, 1e-12)


# ------------------------------------------------------------------------------------------------- whole runs

HARD = "--critic separate --epochs 2 --lr 0.01 --kl_coef 0.1 --value_clip 0.5 --gae_lambda 0.9 --critic_warmup 1"


@pytest.mark.parametrize("flags", ["", HARD], ids=["shared", "hard"])
def test_resumed_run_equals_the_unbroken_one(run, cwd, flags):
    assert run("ppo", f"--steps 3 --save_every 2 --out whole --eval_problems 0 {flags}").code == 0
    assert run("ppo", f"--out halves --eval_problems 0 {flags}").code == 0
    done = run("ppo", "--resume halves --steps 3", model=None, base=False)
    assert done.code == 0 and "resumed from halves/step-000002" in done.out
    rows = metrics_of(cwd / "whole")
    assert rows == metrics_of(cwd / "halves") and [row["step"] for row in rows] == [1, 2, 3]
    assert ("grad_norm" in rows[0]) == (not flags) and rows[2]["grad_norm"] > 0 and rows[2]["critic_grad_norm"] > 0
    assert rows[2]["value_mean"] != 0 and (rows[2]["kl"] != 0) == bool(flags) and rows[2]["repeated_share"] > 0
    folders = [cwd / name / "step-000003" for name in ("whole", "halves")]
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = (torch.load(folder / "trainer.pt", weights_only=True) for folder in folders)
    assert all(torch.equal(first["critic"][name], second["critic"][name]) for name in second["critic"])
    for name in ("optimizer", "critic_optimizer"):
        for i, state in first[name]["state"].items():
            assert all(torch.equal(value, second[name]["state"][i][key]) for key, value in state.items())
    samples = [(cwd / name / "samples.jsonl").read_bytes() for name in ("whole", "halves")]
    assert samples[0] == samples[1]
    row = lines_of(cwd / "whole" / "samples.jsonl")[0]
    assert row["rewards"]["repetition"] < 0 and -10 <= row["rewards"]["outcome"] <= 0


def test_resume_refuses_another_critic(run, cwd):
    assert run("ppo", "--out a --eval_problems 0 --steps 1").code == 0
    before = {path: path.read_bytes() for path in cwd.rglob("*") if path.is_file()}
    for flags in ("--critic shared", "--repetition_penalty 0"):
        done = run("ppo", f"--resume a --steps 2 {flags}", model=None, base=False)
        assert done.code == 2 and done.err.startswith("ppo.py: error: --resume a: its critic is another"), done.err
    assert before == {path: path.read_bytes() for path in cwd.rglob("*") if path.is_file()}


def test_warm_up_of_a_run_leaves_the_weights_as_they_were(run, cwd, small):
    assert run("ppo", "--critic_warmup 2 --out a --eval_problems 0").code == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (small, cwd / "a" / "step-000002"))
    assert all(torch.equal(after[name], before[name]) for name in before)
    state = torch.load(cwd / "a" / "step-000002" / "trainer.pt", weights_only=True)
    assert not state["optimizer"]["state"] and state["critic"]["head.weight"].any()
    assert all(row["lr"] == 0 < row["critic_lr"] for row in metrics_of(cwd / "a"))


def test_ranks_give_the_same_gradient(run_ranks, cwd):
    gradients = {}
    for world in (1, 2):
        codes, gradients[world] = run_ranks(
            "ppo", world, f"--out {world} --eval_problems 0 --steps 1 {HARD} --critic_warmup 0"
        )
        assert codes == [0] * world
    assert len(gradients[1]) == len(gradients[2]) == 8  # 2 epochs x 2 mini-batches, critic and policy
    for one, other in zip(gradients[1], gradients[2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    for one, other in zip(metrics_of(cwd / "1"), metrics_of(cwd / "2"), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=2e-6)
