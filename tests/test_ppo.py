"""ppo.py's own functions: the reference's numbers (vectors/ppo_nsr.json), by hand, invariances."""

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TRAINING, FakeRun, eight_answers, lines_of, metrics_of
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


def label(case: dict) -> str:
    names = ("kind", "kl_estimator", "clip", "gamma", "gammas", "lambda")
    return "-".join(str(case[name]) for name in names if name in case)


def one_gae(rewards, values, mask, gamma: float, gae_lambda: float) -> torch.Tensor:
    """`gae` of a single reward type, (B, T)."""
    return ppo.gae(rewards[..., None], values[..., None], mask, tensor([gamma]), gae_lambda)[..., 0]


def test_vectors_are_there():
    counts = {name: len(cases) for name, cases in GAE.items()}
    known = {"masked": 5, "multi_gamma": 4, "verl": 3, "trl_p1": 3, "cleanrl": 2}
    counts["losses"] = len(LOSSES["policy"]), len(LOSSES["value"])
    assert "VECTORS" in os.environ or counts == known | {"losses": (6, 6)}


# -------------------------------------------------------------------------------- advantages, eq. 2


@pytest.mark.parametrize("case", GAE.get("masked", []), ids=label)
def test_gae_and_whitening_equal_the_paper_s_code(case):
    """The inputs hold garbage outside the mask."""
    values, rewards = tensor(case["values"]), tensor(case["rewards"])
    mask = tensor(case["mask"]).bool()
    advantages = one_gae(rewards, values, mask, case["gamma"], case["lambda"])
    assert not advantages[~mask].any()
    for row, n in enumerate(case["lengths"]):
        assert close(advantages[row, :n], case["advantages"][row])
        assert close((advantages + values)[row, :n], case["returns"][row])
        assert close(ppo.whiten(advantages, mask)[row, :n], case["normalized_advantages"][row])


@pytest.mark.parametrize("case", GAE.get("multi_gamma", []), ids=label)
def test_several_discounts_equal_the_paper_s_code(case):
    """With lambda 1 only the sum of the values matters: here the first type has all of it."""
    rewards, mask, shared = tensor(case["rewards"]), tensor(case["mask"]), tensor(case["values"])
    for share in (1.0, 0.3):
        values = torch.stack([share * shared, (1 - share) * shared], -1)
        advantages = ppo.gae(rewards, values, mask, tensor(case["gammas"]), case["lambda"])
        for row, n in enumerate(case["lengths"]):
            assert close(advantages.sum(-1)[row, :n], case["advantages"][row])
            assert close((advantages + values).sum(-1)[row, :n], case["returns"][row])


@pytest.mark.parametrize("case", GAE.get("verl", []), ids=label)
def test_gae_equals_verl_with_a_value_behind_the_end(case):
    """verl keeps the value of the state after the end token: the mask is one longer there."""
    values, rewards = tensor(case["values"]), tensor(case["token_level_rewards"])
    mask = tensor(case["eos_mask"])
    longer = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], 1)
    advantages = one_gae(rewards, values, longer, case["gamma"], case["lambda"])
    assert close((advantages + values * longer), case["returns"])
    assert close(advantages * mask, tensor(case["advantages_before_whiten"]) * mask)
    whitened = ppo.whiten(advantages, mask, correction=1)
    expected = tensor(case["whitened_advantages"]) * mask
    assert close(whitened, expected, 1e-7)  # eps is added there, a floor here


@pytest.mark.parametrize("case", GAE.get("trl_p1", []), ids=label)
def test_gae_equals_trl_with_the_score_behind_the_end(case):
    """TRL puts the score one slot behind the end token, if there is one, and leaves a value."""
    last, values = torch.tensor(case["last_token_index"])[:, None], tensor(case["values"])
    columns = torch.arange(values.shape[1])[None]
    mask, longer = columns <= last, columns <= last + 1
    logprobs = tensor(case["logprobs"]), tensor(case["ref_logprobs"])
    kl = ppo.kl_estimate(*logprobs, case["kl_estimator"]) * mask
    placed = ppo.at_end(tensor(case["scores"]), longer)[..., None]
    rewards = ppo.token_rewards(placed, kl, case["kl_coef"], longer)[..., 0]
    assert close(rewards, case["rewards"])
    advantages = one_gae(rewards, values, longer, case["gamma"], case["lambda"])
    assert close((advantages + values) * longer, tensor(case["returns"]) * longer)
    whitened = ppo.whiten(advantages, mask, correction=1)
    assert close(whitened, tensor(case["whitened_advantages"]) * mask, 1e-7)


@pytest.mark.parametrize("case", GAE.get("cleanrl", []), ids=label)
def test_gae_equals_cleanrl_episode_by_episode(case):
    """One that is cut off, not ended, goes on with one slot whose reward is its value."""
    steps, envs = len(case["rewards"]), len(case["rewards"][0])
    for env in range(envs):
        track = {
            name: [case[name][t][env] for t in range(steps)]
            for name in ("rewards", "values", "advantages", "returns")
        }
        ends = [t for t in range(1, steps) if case["dones"][t][env]] + [steps]
        for start, end in zip([0, *ends], ends, strict=False):
            part = {name: numbers[start:end] for name, numbers in track.items()}
            if end == steps and not case["next_done"][env]:
                part["rewards"].append(case["next_value"][env])
                part["values"].append(case["next_value"][env])
            rewards, values = tensor([part["rewards"]]), tensor([part["values"]])
            got = one_gae(rewards, values, torch.ones_like(values), case["gamma"], case["lambda"])
            assert close(got[0, : end - start], part["advantages"])
            assert close((got + values)[0, : end - start], part["returns"])


def test_normalisation_equals_cleanrl():
    for case in GAE.get("cleanrl", []):
        advantages = tensor(case["advantages"])
        whitened = ppo.whiten(advantages, torch.ones_like(advantages), correction=1)
        assert close(whitened.flatten(), case["normalized_flat"], 1e-7)


def test_gae_by_hand():
    # V = (1, 2), r = (0, 4), gamma 1/2, lambda 1/2: delta_1 = 4 - 2 = 2 = A_1,
    # delta_0 = 0 + 1/2 x 2 - 1 = 0, A_0 = 0 + 1/4 x 2 = 1/2; what stands outside the mask,
    # in between or behind, changes nothing
    rewards, values = tensor([[0.0, 9.0, 4.0, math.nan]]), tensor([[1.0, math.inf, 2.0, math.nan]])
    got = one_gae(rewards, values, torch.tensor([[1, 0, 1, 0]]), 0.5, 0.5)
    assert got.tolist() == [[0.5, 0.0, 2.0, 0.0]]


def test_lambda_1_is_the_reward_to_come_less_the_value():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 3, 7, 2).double()
    mask = torch.ones(3, 7)
    got = ppo.gae(rewards, values, mask, tensor([1.0, 0.9]), 1.0)
    for m, gamma in enumerate((1.0, 0.9)):
        for t in range(7):
            to_come = sum(gamma**k * rewards[:, t + k, m] for k in range(7 - t))
            assert close(got[:, t, m], to_come - values[:, t, m], 1e-12)


def test_whitening():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    advantages = tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]])
    # mean 3, squared distances 4 + 1 + 9 = 14, biased variance 14/3, sample variance 7
    centred, whitened = tensor([[-2, -1, 0], [3, 0, 0]]), ppo.whiten(advantages, mask)
    assert close(whitened, centred / math.sqrt(14 / 3))
    assert close(ppo.whiten(advantages, mask, correction=1), centred / math.sqrt(7))
    equal = torch.full((4, 5), 0.1)  # in float32 their mean need not be 0.1
    assert not ppo.whiten(equal, torch.ones(4, 5)).any()
    assert not ppo.whiten(equal[:1, :1], torch.ones(1, 1)).any()
    order = [1, 0]
    assert close(ppo.whiten(advantages[order], mask[order]), whitened[order], 1e-12)


# ------------------------------------------------------------------------------- losses, eq. 3 to 5


@pytest.mark.parametrize("case", LOSSES.get("policy", []), ids=label)
@pytest.mark.parametrize("name", AGGREGATION)
def test_policy_loss_equals_the_reference(case, name):
    names = ("logprobs", "old_logprobs", "advantages", "mask")
    logprobs, old, advantages, mask = (tensor(case[n]) for n in names)
    logprobs.requires_grad_()
    weights = ppo.token_weights(mask, AGGREGATION[name], int(mask.sum()), len(mask), 9)
    loss, seen = ppo.clipped_policy_loss(logprobs, old, advantages, weights, case["clip"])
    loss.backward()
    assert loss.item() == pytest.approx(case[f"{name}_loss"], abs=1e-10)
    assert close(logprobs.grad, case[f"{name}_grad"], 1e-10)
    share = {n: (value * mask).sum().item() / mask.sum().item() for n, value in seen.items()}
    clipped = share["clip_frac_low"] + share["clip_frac_high"]
    assert clipped == pytest.approx(case["clipfrac"], abs=1e-10)
    k1 = (ppo.kl_estimate(old, logprobs.detach(), "k1") * mask).sum() / mask.sum()
    assert k1.item() == pytest.approx(case["approx_kl_k1_old_new"], abs=1e-10)
    assert share["approx_kl"] >= 0


@pytest.mark.parametrize("case", LOSSES.get("value", []), ids=label)
@pytest.mark.parametrize("name", AGGREGATION)
def test_value_loss_equals_the_reference(case, name):
    names = ("values", "old_values", "returns", "mask")
    values, old, returns, mask = (tensor(case[n]) for n in names)
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
    [
        (1.0, 1.5, 0.0),
        (1.0, 0.5, -0.5),
        (-1.0, 0.5, 0.0),
        (-1.0, 1.5, 1.5),
        (1.0, 1.1, -1.1),
        (-1.0, 3.0, 3.0),
    ],
)
def test_clip_stops_the_gradient_where_it_should(gain, ratio, expected):
    logprobs = tensor([math.log(ratio)]).requires_grad_()
    ppo.clipped_policy_loss(logprobs, tensor([0.0]), tensor([gain]), tensor([1.0]))[0].backward()
    assert logprobs.grad.item() == pytest.approx(expected)


def test_a_value_far_enough_towards_its_return_stops():
    # returns 1, V_old 0, clip 0.2: at V = 0.3 the gradient has stopped, at 0.1 and -0.3 it has not
    values = tensor([[0.3], [0.1], [-0.3]]).requires_grad_()
    ones = torch.ones(3, 1, dtype=torch.float64)
    ppo.clipped_value_loss(values, 0 * ones, ones, ones[:, 0], 0.2).backward()
    assert values.grad[:, 0].tolist() == pytest.approx([0.0, -0.9, -1.3])


def test_log_ratios_are_clamped():
    far = torch.tensor([200.0, -200.0])
    loss, _ = ppo.clipped_policy_loss(far, torch.zeros(2), -torch.ones(2), torch.ones(2))
    assert math.isfinite(loss.item())
    assert ppo.kl_estimate(-far, torch.zeros(2), "k3").isfinite().all()


def test_explained_variance():
    returns = tensor([0.0, 1.0, 2.0])
    assert ppo.explained_variance(returns, returns) == 1
    assert ppo.explained_variance(0 * returns, returns) == 0
    # of -G the error 2 G has four times the variance
    assert ppo.explained_variance(-returns, returns) == pytest.approx(-3)
    assert math.isnan(ppo.explained_variance(returns, torch.ones(3)))


# ----------------------------------------------------------------------------------- rewards, eq. 1


@pytest.mark.parametrize("case", KL.get("estimators", []), ids=range(len(KL.get("estimators", []))))
def test_kl_estimators_equal_the_reference(case):
    args, mask = (tensor(case["logprobs"]), tensor(case["ref_logprobs"])), tensor(case["mask"])
    for kind in ("k1", "k2"):
        assert close(ppo.kl_estimate(*args, kind), case[kind], 1e-10)
    assert close(ppo.kl_estimate(*args, "k1") * mask, case["k1_masked"], 1e-10)
    assert close(ppo.kl_estimate(*args, "k3") * mask, case["k3_masked_unclamped"], 1e-10)
    assert close(ppo.kl_estimate(*args, "k3").clamp(-10, 10), case["k3_clamped_pm10"], 1e-10)


def test_the_reward_of_an_answer_is_at_its_end():
    got = ppo.at_end(tensor([5.0, 7.0]), torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert got.tolist() == [[0.0, 5.0, 0.0], [7.0, 0.0, 0.0]]


@pytest.mark.parametrize("case", KL.get("reward_placement", []), ids=label)
def test_rewards_stand_where_the_reference_puts_them(case):
    reward, kl, mask = tensor(case["reward"]), tensor(case["kl"]), tensor(case["mask"])
    scalar, several = case["kind"] == "scalar", case["kind"] == "multi"
    placed = reward if several else (ppo.at_end(reward, mask) if scalar else reward)[..., None]
    got = ppo.token_rewards(placed, kl, case["kl_coef"], mask, case["reward_clip_range"][1])
    assert close(got if several else got[..., 0], case["expected"], 1e-10)


def test_kl_estimators_agree_on_the_mean():
    """Over all tokens: k1 and k3 have the mean KL, k3 less variance; as a loss k1 pulls nowhere."""
    logits = tensor([0.3, -0.5, 1.0, 0.1]).requires_grad_()
    ref = tensor([0.1, -0.2, 0.9, 0.4]).log_softmax(0)
    logprobs = logits.log_softmax(0)
    probs = logprobs.exp().detach()
    exact = (probs * (logprobs - ref)).sum().item()
    estimates = {kind: ppo.kl_estimate(logprobs, ref, kind) for kind in ("k1", "k2", "k3")}
    means = {kind: (probs * k).sum().item() for kind, k in estimates.items()}
    assert means["k1"] == pytest.approx(exact) and means["k3"] == pytest.approx(exact)
    assert means["k2"] == pytest.approx(exact, rel=0.2)
    spread = {kind: (probs * (k - means[kind]).square()).sum() for kind, k in estimates.items()}
    assert spread["k3"] < spread["k1"] / 10
    gradients = {}
    for kind, k in estimates.items():
        (gradients[kind],) = torch.autograd.grad((probs * k).sum(), logits, retain_graph=True)
    assert gradients["k1"].abs().max() < 1e-12 < 1e-3 < gradients["k2"].abs().max()


def completion(number: int, tokens: list[int], finished=True, correct=False, format=0.0):
    score = {"format": format, "answer": None, "correct": correct, "outcome": float(correct)}
    logprobs = [0.0] * len(tokens)
    return ppo.Completion(number, {}, [46, 47, 3], tokens, logprobs, finished, "", score)


def config(**changes) -> SimpleNamespace:
    chosen = {"max_new_tokens": 32, "micro_batch_tokens": 64, "repetition_n": 2}
    chosen |= {"batch_size": 8, "mini_batches": 1}
    return SimpleNamespace(**(ppo.asdict(ppo.Config()) | chosen | changes))


def test_outcome_rewards():
    right, wrong = completion(0, [5] * 16, True, True, 1.0), completion(0, [5] * 16)
    answers = right, wrong, completion(0, [5] * 32, False)
    # half way to the limit every cosine is at the mean of its two ends
    cases = {"plain": [1.1, 0, 0], "cosine": [1.5, -5, -10], "cosine-trl": [0.75, -0.75, -0.5]}
    for name, expected in cases.items():
        got = [ppo.outcome_reward(c, config(reward=name)) for c in answers]
        assert got == pytest.approx(expected)
    assert ppo.outcome_reward(right, config(format_weight=0.5)) == 1.5


# --------------------------------------------------------------------------------- the whole update


class TwoModules(FakeRun):
    """Notes the gradients of the policy and of the critic apart."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.of = {"policy": [], "critic": []}

    def update(self, module, optimizer, lr: float) -> float:
        norm = super().update(module, optimizer, lr)
        name = "critic" if isinstance(module, ppo.Critic) else "policy"
        self.of[name].append(self.gradients.pop())
        return norm


@pytest.fixture(scope="module")
def model():
    return ppo.load_model(TINY).double()


@pytest.fixture(scope="module")
def batch():
    answers = enumerate(eight_answers())
    return [completion(i // 4, tokens, i != 3, i in (1, 4)) for i, tokens in answers]


def critic_of(model, types: int = 1) -> ppo.Critic:
    critic = ppo.Critic(model, types)
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
    critic = ppo.Critic(model, 1)
    x, metrics = experience_of(model, critic, batch, config())
    assert not x["old_values"].any() and metrics["kl"] == 0
    assert metrics["value_mean"] == metrics["explained_variance"] == 0
    rewards = tensor([c.score["outcome"] for c in batch])[:, None] * x["mask"]
    # gamma = lambda = 1: the reward at every token
    assert close(x["returns"][..., 0], rewards, 1e-12)
    assert close(x["advantages"], ppo.whiten(rewards, x["mask"]), 1e-12)
    share = sum(map(sum, marks_of(batch))) / sum(len(c.tokens) for c in batch)
    assert metrics["repeated_share"] == share > 0


def test_values_are_those_before_the_token(model, batch):
    """Another last token changes no value; another first one changes all but the first."""
    critic = critic_of(model)
    c = batch[1]
    variants = {"same": c.tokens, "last": [*c.tokens[:-1], 45], "first": [45, *c.tokens[1:]]}
    values = {}
    for name, tokens in variants.items():
        x, _ = experience_of(model, critic, [completion(0, tokens)], config())
        values[name] = x["old_values"][0, :, 0]
    assert close(values["same"], values["last"], 1e-12)
    differs = (values["same"] - values["first"]).abs() > 1e-9
    assert not differs[0] and differs[1:].all()


CLIPPED = {"repetition_penalty": 0.1, "kl_coef": 0.1, "value_clip": 0.2, "aggregation": "token"}
SHORTER = {"kl_coef": 0.1, "kl_type": "k3", "gae_lambda": 0.9, "aggregation": "token"}
OPTIONS = [{}, CLIPPED, SHORTER]


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_nothing_depends_on_split_order_or_ranks(model, batch, options):
    """Advantages, whitened over everything, and gradients of policy and critic; float64."""
    critic = critic_of(model, 2 if "repetition_penalty" in options else 1)
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
    critic, cfg, found = critic_of(model), config(), []
    x, metrics = experience_of(model, critic, batch, cfg)

    def gather(value) -> list:
        found.append(value)
        return found

    for rank in range(3):  # the last one sees what all have found
        run = TwoModules(cfg, rank, 3)
        run.gather = gather
        y, other = ppo.make_experience(run, model, critic, None, batch, marks_of(batch))
    assert len(found) == 3 and all((part != 0).any() for part in found)
    assert all(close(x[name].double(), y[name].double(), 1e-12) for name in x)
    assert metrics == pytest.approx(other)


def test_first_update_is_reinforce_and_regression(model, batch):
    """Against plain log-softmax: - sum A log pi / N, and half the mean square of V - G."""
    critic, cfg = critic_of(model), config(aggregation="token")
    x, _ = experience_of(model, critic, batch, cfg)
    got = gradients_of(model, critic, batch, cfg, x)
    num_tokens, policy, value = int(x["mask"].sum()), 0.0, 0.0
    for i, c in enumerate(batch):
        ids, first = torch.tensor([c.prompt + c.tokens]), len(c.prompt) - 1
        logprobs = model.logits(model(ids[:, :-1])).log_softmax(-1)
        logprobs = logprobs.gather(-1, ids[:, 1:, None])[0, first:, 0]
        values = critic.head(critic.trunk(ids[:, :-1]))[0, first:, 0]
        policy = policy - (x["advantages"][i, : len(c.tokens)] * logprobs).sum() / num_tokens
        error = values - x["returns"][i, : len(c.tokens), 0]
        value = value + 0.5 * error.square().sum() / num_tokens
    for kind, module, loss in (("policy", model, policy), ("critic", critic, value)):
        weights = list(module.parameters())
        grads = torch.autograd.grad(loss, weights, materialize_grads=True, allow_unused=True)
        flat = torch.cat([g.flatten() for g in grads])
        assert torch.allclose(got[kind][0], flat, rtol=0, atol=1e-12)


def test_critic_warm_up_leaves_the_policy_alone(model, batch):
    """So does a batch without signal, which trains the critic alone."""
    critic, cfg = critic_of(model), config()
    x, _ = experience_of(model, critic, batch, cfg)
    for lr, advantages in ((0.0, x["advantages"]), (1.0, 0 * x["advantages"])):
        got = gradients_of(model, critic, batch, cfg, x | {"advantages": advantages}, lr=lr)
        assert not got["policy"] and got["critic"][0].abs().max() > 1e-4
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_critic_counts_every_token_the_same(model, batch):
    """However the policy's loss weighs answers: the gradient of eq. 5's mean over all tokens."""
    critic = ppo.Critic(model, 1)  # V = 0: the gradient at its bias is the mean of V - G
    x, _ = experience_of(model, critic, batch, config())
    for aggregation in ("token", "sequence", "constant"):
        cfg = config(aggregation=aggregation)
        got = gradients_of(model, critic, batch, cfg, x)["critic"][0]
        assert close(got[-1], -x["returns"][x["mask"]].mean(), 1e-10) and got[-1].abs() > 0.01


def test_each_learns_from_its_own_loss(model, batch):
    """Twice the advantages: the policy's gradient doubles, the critic's stays; and the reverse."""
    critic = critic_of(model)
    x, _ = experience_of(model, critic, batch, config())
    error = x["returns"] - x["old_values"]  # the critic's gradient is linear in it
    changes = {
        "policy": {"advantages": 2 * x["advantages"]},
        "critic": {"returns": x["old_values"] + 2 * error},
    }
    once = gradients_of(model, critic, batch, config(), x)
    for doubled, change in changes.items():
        got = gradients_of(model, critic, batch, config(), x | change)
        for name in changes:
            factor = 2 if name == doubled else 1
            assert once[name][0].abs().max() > 1e-4
            assert close(got[name][0], factor * once[name][0], 1e-10)


def test_the_critic_is_a_model_of_its_own(model, batch):
    """Other weights of the critic's trunk change values only, those of the policy no value."""
    critic = critic_of(model)
    x, _ = experience_of(model, critic, batch, config())
    policy = ppo.copy.deepcopy(model)
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.1)
        critic.trunk.model.norm.weight.mul_(1.1)
    y, _ = experience_of(model, critic, batch, config())
    z, _ = experience_of(policy, critic, batch, config())
    assert torch.equal(y["old_logprobs"], x["old_logprobs"])
    assert torch.equal(z["old_values"], y["old_values"])
    assert (y["old_values"] - x["old_values"]).abs().max() > 1e-3
    assert (z["old_logprobs"] - y["old_logprobs"]).abs().max() > 1e-3


def test_epochs_and_mini_batches(model, batch):
    """Every answer once an epoch, in its own order; each mini-batch is normalised by itself."""
    critic, cfg = critic_of(model), config(epochs=2, mini_batches=2)
    x, _ = experience_of(model, critic, batch, cfg)
    got = gradients_of(model, critic, batch, cfg, x)
    assert len(got["policy"]) == len(got["critic"]) == 4
    parts = []
    for epoch in range(2):
        order = ppo.np.random.default_rng((cfg.seed, 1, epoch)).permutation(8).tolist()
        parts += [order[:4], order[4:]]
    assert sorted(parts[0] + parts[1]) == sorted(parts[2] + parts[3]) == list(range(8))
    assert parts[:2] != parts[2:]
    # FakeRun takes no step, so all are of the same weights
    for part, gradient in zip(parts, got["policy"], strict=True):
        done, own = [batch[i] for i in part], {name: y[part] for name, y in x.items()}
        alone = gradients_of(model, critic, done, config(), own)
        assert torch.allclose(alone["policy"][0], gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", ["policy", "critic"])
def test_bad_gradients_of_either_end_the_run(model, batch, bad):
    """Five in a row, also where the other module's are good every time."""
    model = ppo.copy.deepcopy(model)
    critic = critic_of(model)
    x, _ = experience_of(model, critic, batch, config())
    run = TwoModules(config(mini_batches=4, epochs=2))
    run.skipped, steps = {}, {"policy": 0, "critic": 0}

    def update(module, optimizer, lr: float) -> float:
        name = "critic" if module is critic else "policy"
        steps[name] += 1
        if name == bad:
            next(module.parameters()).grad[0] = math.nan
        return ppo.Run.update(run, module, optimizer, lr)

    run.update, run.say = update, print
    optimizers = [torch.optim.SGD(module.parameters(), 0.0) for module in (model, critic)]
    with pytest.raises(FloatingPointError):
        ppo.update_policy(run, model, critic, optimizers, batch, x, 1, 1e-9, 1e-9)
    other = "critic" if bad == "policy" else "policy"
    assert steps[bad] == 5 and steps[other] == (5 if bad == "policy" else 4)


def test_the_gradient_has_the_sign_of_the_exact_one():
    """All answers of two tokens out of three, weighted with their probability.

    With the true V, and with any V, eq. 2 to 4 without whitening point where the expected reward
    grows.
    """
    torch.manual_seed(0)
    # logits after nothing, and after each first token
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    reward = torch.randn(3, 3, dtype=torch.float64)
    logprobs = logits.log_softmax(-1)
    answers = [(a, b) for a in range(3) for b in range(3)]
    pairs = [torch.stack([logprobs[0, a], logprobs[1 + a, b]]) for a, b in answers]
    chosen = torch.stack(pairs)  # (9, 2)
    probs = chosen.sum(1).exp()
    expected = sum(p * reward[a, b] for p, (a, b) in zip(probs, answers, strict=True))
    (exact,) = torch.autograd.grad(expected, logits, retain_graph=True)
    mask = torch.ones(9, 2, dtype=torch.bool)
    rewards = ppo.at_end(torch.stack([reward[a, b] for a, b in answers]), mask)
    state_values = (logprobs[1:].exp() * reward).sum(-1).detach()  # of each first token
    start = (logprobs[0].exp() * state_values).sum().detach()
    true = torch.stack([torch.stack([start, state_values[a]]) for a, _ in answers])
    # a function of the state, so no bias
    wrong = torch.stack([tensor([0.7, -1.0 + a]) for a, _ in answers])
    for values, gae_lambda in ((true, 1.0), (true, 0.3), (wrong, 1.0)):
        advantages = one_gae(rewards, values, mask, 1.0, gae_lambda)
        weights = probs.detach()[:, None].expand(9, 2)
        loss, _ = ppo.clipped_policy_loss(chosen, chosen.detach(), advantages, weights)
        (ours,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert close(-ours, exact, 1e-12)


# --------------------------------------------------------------------------------------- whole runs


def test_what_a_run_logs(run, cwd):
    """The critic's warm-up, KL and penalty in the log, the rewards by type in the samples."""
    assert run("ppo", f"--steps 2 --out a --eval_problems 0 {TRAINING['ppo'][1]}").code == 0
    first, second = metrics_of(cwd / "a")
    assert first["lr"] == 0 < first["critic_lr"] and second["lr"] > 0
    assert "grad_norm" not in first and second["grad_norm"] > 0 and second["critic_grad_norm"] > 0
    assert first["kl"] == 0 != second["value_mean"] and second["repeated_share"] > 0
    for row in lines_of(cwd / "a" / "samples.jsonl"):
        assert row["rewards"]["repetition"] <= 0 and -10 <= row["rewards"]["outcome"] <= 2


def test_resume_refuses_another_critic(run, cwd):
    """One value for each reward type: without the penalty there is one less. With it, all goes on."""

    def held() -> dict:
        return {path: path.read_bytes() for path in cwd.rglob("*") if path.is_file()}

    assert run("ppo", "--out a --eval_problems 0 --steps 1").code == 0
    before, again = held(), "--resume a --steps 2 --repetition_penalty"
    done = run("ppo", f"{again} 0", base=False)
    assert done.code == 2 and done.err.startswith("ppo.py: error: --repetition_penalty"), done.err
    assert before == held()
    assert run("ppo", f"{again} 1", base=False).code == 0
    assert [row["step"] for row in metrics_of(cwd / "a")] == [1, 2]


def test_warm_up_of_a_run_leaves_the_weights_as_they_were(run, cwd, small):
    assert run("ppo", "--critic_warmup 2 --out a --eval_problems 0").code == 0
    folders = small, cwd / "a" / "step-000002"
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(after[name], before[name]) for name in before)
    state = torch.load(cwd / "a" / "step-000002" / "trainer.pt", weights_only=True)
    assert not state["optimizer"]["state"] and state["critic"]["head.weight"].any()
    assert all(row["lr"] == 0 < row["critic_lr"] for row in metrics_of(cwd / "a"))


BAD = {
    "--batch_size 12 --group_size 8 --mini_batches 2": "--batch_size 12 .* 8",
    "--batch_size 8 --group_size 4 --mini_batches 3": "--batch_size 8 .* 12",
    "--gamma 1.1": "--gamma",
    "--gae_lambda 2": "--gae_lambda",
    "--critic_lambda 2": "--critic_lambda",
    "--repetition_penalty 1 --repetition_gamma 2": "--repetition_gamma",
    "--kl_type k3": "--kl_type",
    "--reward cosine --format_weight 0.5": "--format_weight",
    "--repetition_gamma 0.9": "--repetition_gamma",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_combinations(flags):
    cfg = ppo.parse_config(ppo.Config, flags.split())
    with pytest.raises(ppo.BadInput, match=BAD[flags]):
        ppo.check_flags(cfg)


GOOD = "--kl_coef 0.1 --kl_type k3", "--group_size 1", ""


@pytest.mark.parametrize("flags", GOOD)
def test_good_combinations(flags):
    ppo.check_flags(ppo.parse_config(ppo.Config, ["--batch_size", "64", *flags.split()]))
