"""nsr.py's own functions: the reference's numbers (tests/vectors/ppo_nsr.json), an enumerable toy, empty sides."""

import copy
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FakeRun, eight_answers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import nsr  # noqa: E402

FOLDER = Path(os.environ.get("VECTORS") or Path(__file__).parent / "vectors")
FILE = FOLDER / "ppo_nsr.json"
VECTORS = json.loads(FILE.read_text(encoding="utf-8"))["sections"] if FILE.is_file() else {}
SECTION = VECTORS.get("nsr_psr_wreinforce", {})
TINY = Path(nsr.__file__).parent / "models" / "tiny"
MODES = ["psr", "nsr", "w-reinforce", "reinforce"]
KEYS = {"psr": "psr", "nsr": "nsr", "w-reinforce": "w_reinforce"}  # ours and the file's names


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --------------------------------------------------------------------------------------- the reference's numbers


@pytest.mark.parametrize("case", SECTION.get("losses", []))
@pytest.mark.parametrize("mode", KEYS)
def test_loss_and_gradient_equal_the_reference(case, mode):
    """Cut, signed, clipped and averaged over the kept tokens as the authors' code does it, to 1e-10 in float64."""
    expected, mask = case[KEYS[mode]], float64(case["mask"])
    advantages = nsr.signed_advantages(torch.tensor(case["correct"]), mode, case["lambda"])
    kept = [i for i, a in enumerate(advantages.tolist()) if a]
    assert kept == expected["kept_rows"]
    assert torch.equal(advantages[kept, None] * mask[kept], float64(expected["advantages"]))
    logprobs, old = float64(case["logprobs"]).requires_grad_(), float64(case["old_logprobs"])
    num_kept = mask[kept].sum().item()
    weights = nsr.normaliser_weights(mask[kept], "kept", num_kept, mask.sum().item(), len(mask))
    loss, seen = nsr.signed_loss(logprobs[kept], old[kept], advantages[kept], weights, case["clip"])
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-10)
    torch.testing.assert_close(logprobs.grad, float64(expected["grad_logprobs_full_batch"]), rtol=0, atol=1e-10)
    clipped = sum((value * mask[kept]).sum().item() for value in seen.values()) / num_kept
    assert clipped == pytest.approx(expected["clipfrac"], abs=1e-10)


@pytest.mark.parametrize("case", SECTION.get("losses", []))
def test_one_normaliser_for_all_modes_equals_the_reference(case):
    """Divided by the tokens of all answers, kept or cut, the halves add up: eq. 2 holds number by number."""
    logprobs, old, mask = (float64(case[name]) for name in ("logprobs", "old_logprobs", "mask"))
    weights, loss = nsr.normaliser_weights(mask, "token", 0, mask.sum().item(), len(mask)), {}
    for mode in MODES:
        advantages = nsr.signed_advantages(torch.tensor(case["correct"]), mode, case["lambda"])
        loss[mode] = nsr.signed_loss(logprobs, old, advantages, weights, case["clip"])[0].item()
        assert loss[mode] == pytest.approx(case["constant_normaliser"][KEYS.get(mode, mode)], abs=1e-10)
    assert loss["w-reinforce"] == pytest.approx(case["lambda"] * loss["psr"] + loss["nsr"], abs=1e-12)
    assert loss["reinforce"] == pytest.approx(loss["psr"] + loss["nsr"], abs=1e-12)


@pytest.mark.parametrize("case", SECTION.get("logit_gradients", []))
def test_direction_on_the_logits_equals_the_reference(case):
    """Eq. 5 and eq. 6 for a single token: the second is the first times its probability."""
    names = {"ratio": "descent_direction_ratio_or_logprob", "probability": "descent_direction_paper_eq6"}
    for objective, name in names.items():
        step = -gradient(case["logits"], case["sampled"], case["R"], objective)
        torch.testing.assert_close(step, float64(case[name]), rtol=0, atol=1e-10)
        torch.testing.assert_close(
            step, -gradient(case["logits"], case["sampled"], case["R"], "ratio")
            * (case["probs"][case["sampled"]] if objective == "probability" else 1), rtol=0, atol=1e-12,
        )  # fmt: skip


def test_vectors_are_there():
    assert "VECTORS" in os.environ or len(SECTION["losses"]) == len(SECTION["logit_gradients"]) == 4


# -------------------------------------------------------------------------------------------- what the modes do


def gradient(logits: list[float], token: int, advantage: float, objective: str = "ratio") -> torch.Tensor:
    """d loss / d logits after one sampled token, as in the first update of a rollout."""
    logits, one = float64(logits).requires_grad_(), float64([[1.0]])
    logprob = logits.log_softmax(-1)[None, None, token]
    nsr.signed_loss(logprob, logprob.detach(), float64([advantage]), one, objective=objective)[0].backward()
    return logits.grad


@pytest.mark.parametrize("objective", ["ratio", "probability"])
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_sign_on_the_logits(mode, right, objective):
    """A right token rises and all others sink; a wrong one sinks, and the others rise as they are likely already."""
    advantage = nsr.signed_advantages(torch.tensor([right]), mode).item()
    step, p = -gradient([0.5, -1.0, 2.0, 0.0], 1, advantage, objective), float64([0.5, -1.0, 2.0, 0.0]).softmax(-1)
    if mode == ("nsr" if right else "psr"):
        assert step.tolist() == [0.0] * 4
        return
    others, sign = [0, 2, 3], 1 if right else -1
    assert step[1] * sign > 0 and (step[others] * sign < 0).all()
    torch.testing.assert_close(step[others] / step[others].sum(), p[others] / p[others].sum())
    if mode == "w-reinforce" and right:
        torch.testing.assert_close(10 * step, -gradient([0.5, -1.0, 2.0, 0.0], 1, 1.0, objective))


def test_advantages():
    correct = torch.tensor([1, 0, 1])
    found = {mode: nsr.signed_advantages(correct, mode, 0.3).tolist() for mode in MODES}
    assert found == {"psr": [1, 0, 1], "nsr": [0, -1, 0], "w-reinforce": [0.3, -1, 0.3], "reinforce": [1, -1, 1]}
    assert nsr.signed_advantages(correct, "w-reinforce", 0.0).tolist() == found["nsr"]
    assert nsr.signed_advantages(correct, "w-reinforce", 1.0).tolist() == found["reinforce"]


def test_weights_by_hand():
    mask = float64([[1, 1, 1, 0], [1, 0, 0, 0]])  # 4 kept tokens, in a rollout of 10 tokens and 5 answers
    expected = {"kept": [0.25, 0.25], "token": [0.1, 0.1], "sequence": [1 / 15, 1 / 5], "sample": [0.2, 0.2]}
    for name, values in expected.items():
        weights = nsr.normaliser_weights(mask, name, 4, 10, 5)
        assert weights[:, 0].tolist() == pytest.approx(values) and weights[0, 3] == weights[1, 1] == 0, name


# ------------------------------------------------------------------------ the identity, on an enumerable toy

ANSWERS = [y + e for n in range(3) for y in itertools.product((1, 2), repeat=n) for e in ((0,),) if n < 2]
ANSWERS += list(itertools.product((1, 2), repeat=2))  # tokens 1 and 2, end 0, at most two tokens: 1 + 2 + 4 answers


def expected_gradient(mode: str, normaliser: str, objective: str = "ratio") -> torch.Tensor:
    """The exact mean of the gradient of eq. 7 over all answers of a table of logits, one row per prefix."""
    torch.manual_seed(0)
    table = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)  # prefixes (), (1), (2); tokens 0, 1, 2
    rows = [[table.log_softmax(-1)[(0, *y)[t], y[t]] for t in range(len(y))] for y in ANSWERS]
    zero = torch.zeros((), dtype=torch.float64)
    logprobs = torch.stack([torch.stack((row + [zero])[:2]) for row in rows])  # (7, 2)
    mask = float64([[1.0, float(len(y) == 2)] for y in ANSWERS])
    p = (logprobs * mask).sum(1).exp().detach()
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    correct = torch.tensor([0, 1, 0, 0, 1, 1, 0])
    weights = p[:, None] * nsr.normaliser_weights(mask, normaliser, 0, 1, 1)  # each answer as often as it is drawn
    advantages = nsr.signed_advantages(correct, mode)
    nsr.signed_loss(logprobs, logprobs.detach(), advantages, weights, objective=objective)[0].backward()
    return table.grad


def test_both_halves_have_the_same_expected_gradient():
    """sum_y pi(y|x) = 1, so L_NSR = 1 + L_PSR: what differs between the modes is not in the expectation."""
    assert len(ANSWERS) == 7
    found = {mode: expected_gradient(mode, "sample") for mode in MODES}
    assert found["psr"].abs().max() > 0.01
    for mode, factor in (("nsr", 1), ("w-reinforce", 1.1), ("reinforce", 2)):
        torch.testing.assert_close(found[mode], factor * found["psr"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("normaliser, objective", [("sequence", "ratio"), ("sequence", "probability")])
def test_the_identity_ends_with_the_sum_over_tokens(normaliser, objective):
    """Means within answers of different lengths, and the probabilities of eq. 6, do break it."""
    a, b = (expected_gradient(mode, normaliser, objective) for mode in ("psr", "nsr"))
    assert (a - b).abs().max() > 0.01


def test_the_rarer_side_is_less_noisy():
    """The spread of the two estimates is what the identity leaves: the fewer answers of a side, the quieter it is.

    Of equally likely answers, that is; a confident one has a small gradient, and P(right) alone does not decide.
    """
    for num_right, quieter in ((1, "psr"), (3, "nsr")):
        spread = {}
        for mode in ("psr", "nsr"):
            advantages = nsr.signed_advantages(torch.arange(4) < num_right, mode).tolist()
            steps = torch.stack([gradient([0.0] * 4, v, a) for v, a in enumerate(advantages)])
            spread[mode] = steps.var(0).sum().item()
        assert min(spread, key=spread.get) == quieter


# ------------------------------------------------------------------------------- update_policy on the tiny model


def completion(number: int, tokens: list[int], correct: bool) -> nsr.Completion:
    return nsr.Completion(number, {}, [46, 47, 3], tokens, [0.0] * len(tokens), True, "", {"correct": correct})


class MovingRun(FakeRun):
    """Descends for real, where FakeRun only notes the gradient."""

    def update(self, module, optimizer, lr):
        with torch.no_grad():
            for weight in module.parameters():
                weight -= lr * weight.grad
        return super().update(module, optimizer, lr)


def updates(model, done, mode, rank=0, world=1, kind=FakeRun, **changes):
    """The gradients of the optimizer steps of a rollout, and its metrics. No step is taken between them."""
    settings = {"batch_size": len(done), "updates": 1, "micro_batch_tokens": 64, "mode": mode} | changes
    run = kind(SimpleNamespace(**(nsr.asdict(nsr.Config()) | settings)), rank, world)
    advantages = nsr.signed_advantages(torch.tensor([c.score["correct"] for c in done]), mode).tolist()
    metrics = nsr.update_policy(run, model, None, done, advantages, 1.0)
    return run.gradients, metrics


@pytest.fixture(scope="module")
def model():
    return nsr.load_model(TINY).double()


@pytest.fixture(scope="module")
def batch():
    rights = [0, 1, 0, 1, 1, 0, 0, 0]
    return [completion(i // 4, tokens, bool(rights[i])) for i, tokens in enumerate(eight_answers())]


@pytest.mark.parametrize("normaliser", ["kept", "token", "sequence", "sample"])
@pytest.mark.parametrize("mode", ["nsr", "w-reinforce"])
def test_gradient_does_not_depend_on_split_or_ranks(model, batch, mode, normaliser):
    options = {"normaliser": normaliser, "updates": 2}
    whole, _ = updates(model, batch, mode, micro_batch_tokens=10**6, **options)
    single, _ = updates(model, batch, mode, micro_batch_tokens=1, **options)
    ranks = [updates(model, batch, mode, rank, 3, **options)[0] for rank in range(3)]
    assert len(whole) == 2 and whole[0].abs().max() > 1e-4
    for step in range(2):
        assert torch.allclose(whole[step], single[step], rtol=0, atol=1e-12)
        assert torch.allclose(whole[step], sum(r[step] for r in ranks), rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", ["ratio", "probability"])
def test_modes_add_up_where_the_normaliser_is_the_same(model, batch, objective):
    for normaliser in ("token", "sequence", "sample"):
        options = {"normaliser": normaliser, "objective": objective}
        [psr], [nsr_], [both], [weighted] = (updates(model, batch, mode, **options)[0] for mode in
                                             ("psr", "nsr", "reinforce", "w-reinforce"))  # fmt: skip
        assert torch.allclose(psr + nsr_, both, rtol=0, atol=1e-12)
        assert torch.allclose(0.1 * psr + nsr_, weighted, rtol=0, atol=1e-12)


def test_kept_answers_make_the_steps(model, batch):
    """3 right and 5 wrong of 8, mini-batches of 2: 2, 3 and 4 steps, the last of an odd number half as heavy."""
    found = {mode: updates(model, batch, mode, updates=4) for mode in MODES}
    count = {mode: (len(steps), m["updates"], m["rows_trained"]) for mode, (steps, m) in found.items()}
    assert count == {"psr": (2, 2, 3), "nsr": (3, 3, 5), "w-reinforce": (4, 4, 8), "reinforce": (4, 4, 8)}
    [alone], _ = updates(model, [batch[4]], "psr")  # the third right answer, in a mini-batch of its own
    assert torch.allclose(found["psr"][0][1], alone / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode, right", [("psr", False), ("nsr", True)])
@pytest.mark.parametrize("count", [1, 4])
def test_an_empty_side_makes_no_step_and_no_nan(model, batch, mode, right, count):
    done = [completion(c.number, c.tokens, right) for c in batch]
    steps, metrics = updates(model, done, mode, updates=count)
    assert steps == [] and metrics["rows_trained"] == metrics["updates"] == metrics["loss"] == 0
    assert all(value == value for name, value in metrics.items() if name != "grad_norm")  # which the log leaves out


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("mode", ["w-reinforce", "reinforce"])
def test_one_side_is_enough_for_the_others(model, batch, mode, right):
    done = [completion(c.number, c.tokens, right) for c in batch]
    [step], metrics = updates(model, done, mode)
    assert step.isfinite().all() and metrics["rows_trained"] == 8
    assert metrics["loss"] == pytest.approx(1.0 if not right else -0.1 if mode == "w-reinforce" else -1.0)


def test_clipping_waits_for_the_second_update(model, batch):
    """With one update, or before the first step of several, pi_old is pi: no clip, and the REINFORCE gradient."""
    [one], metrics = updates(model, batch, "reinforce", normaliser="token")
    assert metrics["clip_frac_low"] == metrics["clip_frac_high"] == 0
    first, second = updates(model, batch, "reinforce", normaliser="token", updates=2)[0]
    assert torch.allclose(first + second, 2 * one, rtol=0, atol=1e-12)


def test_pi_old_is_noted_before_the_first_update(model, batch):
    """Eq. 4 compares with the policy at the start of the rollout, also after a step away from it."""
    _, before = updates(model, batch, "reinforce", updates=2)
    _, after = updates(copy.deepcopy(model), batch, "reinforce", kind=MovingRun, updates=2)
    assert before["clip_frac_low"] == before["clip_frac_high"] == 0
    assert after["clip_frac_low"] + after["clip_frac_high"] > 0.05
    assert after["sampler_gap"] == pytest.approx(before["sampler_gap"], abs=1e-12)  # of pi_old


def test_a_bandit_is_unlearnt_and_learnt():
    """NSR on a table of logits empties the wrong actions and keeps both right ones; PSR may forget one of them."""
    shares = {}
    for mode in ("nsr", "psr"):
        torch.manual_seed(0)
        logits = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.2)
        for _ in range(60):
            actions = torch.distributions.Categorical(logits=logits).sample((16,))
            advantages = nsr.signed_advantages(actions < 2, mode)
            logprobs = logits.log_softmax(-1)[actions][:, None]
            weights = nsr.normaliser_weights(torch.ones_like(logprobs), "token", 16, 16, 16)
            optimizer.zero_grad()
            nsr.signed_loss(logprobs, logprobs.detach(), advantages, weights)[0].backward()
            optimizer.step()
        p = logits.softmax(-1)
        assert p[:2].sum() > 0.95, mode
        shares[mode] = (p[:2].min() / p[:2].sum()).item()
    assert shares["nsr"] > shares["psr"]


# ---------------------------------------------------------------------------------------------------- the flags


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--batch_size 96 --group_size 16 --updates 4", "--batch_size 96 .* 64"),
        ("--positive_weight 0.5 --mode nsr", "--positive_weight .*--mode w-reinforce"),
        ("--clip_eps 0.3 --updates 1", "--clip_eps .*--updates"),
        ("--clip_eps 0.3 --objective probability", "--clip_eps .*--objective ratio"),
    ],
)
def test_bad_combinations(flags, named):
    with pytest.raises(nsr.BadInput, match=named):
        nsr.check_flags(nsr.parse_config(nsr.Config, flags.split()))


GOOD = "", "--positive_weight 0.5", "--positive_weight 0", "--updates 1", "--clip_eps 0.3", "--batch_size 128"


@pytest.mark.parametrize("flags", GOOD)
def test_good_combinations(flags):
    nsr.check_flags(nsr.parse_config(nsr.Config, flags.split()))
