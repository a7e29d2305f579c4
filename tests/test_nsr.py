"""nsr.py's own functions: the reference's numbers (vectors/ppo_nsr.json), the identity, updates."""

import copy

import pytest
import torch
from conftest import FakeRun, eight_answers, vectors

import nsr

SECTION = vectors("ppo_nsr").get("nsr_psr_wreinforce", {})
MODES = {"psr": "psr", "nsr": "nsr", "w-reinforce": "w_reinforce", "reinforce": "reinforce"}
losses = pytest.mark.parametrize("case", SECTION.get("losses", []))


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-12) -> bool:
    return torch.allclose(a, b, rtol=0, atol=tolerance)


@losses
@pytest.mark.parametrize("mode", ["psr", "nsr", "w-reinforce"])
def test_eq3_to_eq7_loss_and_gradient_equal_the_reference(case, mode):
    """Cut, signed, clipped and averaged over the kept tokens as the authors' code does it."""
    expected, mask = case[MODES[mode]], float64(case["mask"])
    advantages = nsr.signed_advantages(torch.tensor(case["correct"]), mode, case["lambda"])
    kept = [i for i, a in enumerate(advantages.tolist()) if a]
    assert kept == expected["kept_rows"]
    logprobs, old = float64(case["logprobs"]).requires_grad_(), float64(case["old_logprobs"])
    num_kept = mask[kept].sum().item()
    weights = nsr.normaliser_weights(mask[kept], "kept", num_kept, mask.sum().item(), len(mask))
    loss, seen = nsr.signed_loss(logprobs[kept], old[kept], advantages[kept], weights, case["clip"])
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-10)
    assert same(logprobs.grad, float64(expected["grad_logprobs_full_batch"]), 1e-10)
    clipped = sum((value * mask[kept]).sum().item() for value in seen.values()) / num_kept
    assert clipped == pytest.approx(expected["clipfrac"], abs=1e-10)


@losses
def test_eq2_with_one_normaliser_equals_the_reference(case):
    """Divided by the tokens of all answers, kept or cut, the halves add up."""
    logprobs, old, mask = (float64(case[name]) for name in ("logprobs", "old_logprobs", "mask"))
    weights = nsr.normaliser_weights(mask, "token", 0, mask.sum().item(), len(mask))
    for mode, name in MODES.items():
        advantages = nsr.signed_advantages(torch.tensor(case["correct"]), mode, case["lambda"])
        loss, _ = nsr.signed_loss(logprobs, old, advantages, weights, case["clip"])
        assert loss.item() == pytest.approx(case["constant_normaliser"][name], abs=1e-10)


@pytest.mark.parametrize("case", SECTION.get("logit_gradients", []))
def test_eq5_and_eq6_direction_on_the_logits_equals_the_reference(case):
    for objective, name in (("ratio", "ratio_or_logprob"), ("probability", "paper_eq6")):
        logits = float64(case["logits"]).requires_grad_()
        logprob = logits.log_softmax(-1)[None, None, case["sampled"]]
        args = logprob, logprob.detach(), float64([case["R"]]), float64([[1.0]])
        nsr.signed_loss(*args, objective=objective)[0].backward()
        assert same(-logits.grad, float64(case[f"descent_direction_{name}"]), 1e-10)


def test_eq4_is_clamped_and_eq7_has_these_weights():
    far = torch.tensor([[200.0]])
    assert nsr.signed_loss(far, 0 * far, -torch.ones(1), torch.ones(1, 1))[0].isfinite()
    mask = float64([[1, 1, 1, 0], [1, 0, 0, 0]])  # of a rollout of 10 tokens and 5 answers
    expected = {"token": [0.1, 0.1], "sequence": [1 / 15, 1 / 5], "sample": [0.2, 0.2]}
    for name, values in expected.items():
        weights = nsr.normaliser_weights(mask, name, 4, 10, 5)
        assert same(weights, mask * float64(values)[:, None]), name


# answers of at most two tokens: the end is 0, and alone it stands here twice
FIRST, SECOND = torch.tensor([[0, 1, 2, 1, 1, 2, 2], [0, 0, 0, 1, 2, 1, 2]])


def expected_gradient(mode: str, normaliser: str, objective: str = "ratio") -> torch.Tensor:
    """The exact mean of the gradient of eq. 7 over all answers of a table of logits."""
    torch.manual_seed(0)
    table = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)  # after (), (1), (2)
    logprobs = table.log_softmax(-1)
    logprobs = torch.stack([logprobs[0, FIRST], logprobs[FIRST, SECOND]], 1)  # (7, 2)
    mask = torch.stack([FIRST >= 0, FIRST > 0], 1).double()
    p = (logprobs * mask).sum(1, keepdim=True).exp().detach()  # each as often as it is drawn
    advantages = nsr.signed_advantages(torch.tensor([0, 1, 0, 0, 1, 1, 0]), mode)
    weights = p * nsr.normaliser_weights(mask, normaliser, 0, 1, 1)
    args = logprobs, logprobs.detach(), advantages, weights
    nsr.signed_loss(*args, objective=objective)[0].backward()
    return table.grad


def test_eq1_both_halves_have_the_same_expected_gradient():
    """sum_y pi(y|x) = 1: the modes differ in size alone, as long as tokens are summed by (5)."""
    found = {mode: expected_gradient(mode, "sample") for mode in MODES}
    assert found["psr"].abs().max() > 0.01
    for mode, factor in (("nsr", 1), ("w-reinforce", 1.1), ("reinforce", 2)):
        assert same(found[mode], factor * found["psr"])
    for objective in ("ratio", "probability"):  # means within answers, eq. 6
        a, b = (expected_gradient(mode, "sequence", objective) for mode in ("psr", "nsr"))
        assert not same(a, b, 0.01)


def completion(number: int, tokens: list[int], correct: bool) -> nsr.Completion:
    zeros = [0.0] * len(tokens)
    return nsr.Completion(number, {}, [46, 47, 3], tokens, zeros, True, "", {"correct": correct})


def updates(model, done, mode, rank=0, world=1, kind=FakeRun, **changes):
    """The gradients of the optimizer steps of a rollout, and its metrics."""
    changes = {"batch_size": len(done), "updates": 1, "micro_batch_tokens": 64} | changes
    run = kind(nsr.Config(**changes), rank, world)
    advantages = nsr.signed_advantages(torch.tensor([c.score["correct"] for c in done]), mode)
    metrics = nsr.update_policy(run, model, None, done, advantages.tolist(), 1.0)
    return run.gradients, metrics


@pytest.fixture(scope="module")
def model(small):
    return nsr.load_model(small).double()


@pytest.fixture(scope="module")
def batch():
    return [completion(i // 4, c, i in (1, 3, 4)) for i, c in enumerate(eight_answers())]


@pytest.mark.parametrize("normaliser", ["kept", "token", "sequence", "sample"])
def test_gradient_does_not_depend_on_split_or_ranks(model, batch, normaliser):
    options = {"normaliser": normaliser, "updates": 2}
    whole, _ = updates(model, batch, "nsr", micro_batch_tokens=10**6, **options)
    options |= {"micro_batch_tokens": 1}
    ranks = [updates(model, batch, "nsr", rank, 3, **options)[0] for rank in range(3)]
    assert len(whole) == 2 and whole[0].abs().max() > 1e-4
    for step in range(2):
        assert same(whole[step], sum(r[step] for r in ranks))


def test_eq2_modes_add_up_where_the_normaliser_is_the_same(model, batch):
    options = {"normaliser": "sequence", "objective": "probability"}
    right, wrong, weighted, both = (updates(model, batch, m, **options)[0][0] for m in MODES)
    assert same(right + wrong, both) and same(0.1 * right + wrong, weighted)


def test_kept_answers_make_the_steps(model, batch):
    """3 right and 5 wrong, mini-batches of 2: the last of an odd number is half as heavy."""
    found = {mode: updates(model, batch, mode, updates=4) for mode in MODES}
    counts = [(len(steps), m["updates"], m["rows_trained"]) for steps, m in found.values()]
    assert counts == [(2, 2, 3), (3, 3, 5), (4, 4, 8), (4, 4, 8)]
    [alone], _ = updates(model, [batch[4]], "psr")  # the third right answer, by itself
    assert same(found["psr"][0][1], alone / 2)


@pytest.mark.parametrize("right, mode", [(False, "psr"), (True, "nsr")])
def test_an_empty_side_makes_no_step_and_no_nan(model, batch, right, mode):
    done = [completion(c.number, c.tokens, right) for c in batch]
    steps, metrics = updates(model, done, mode, updates=4)
    assert steps == [] and metrics["rows_trained"] == metrics["updates"] == metrics["loss"] == 0
    assert all(x == x for name, x in metrics.items() if name != "grad_norm")  # not logged
    [step], metrics = updates(model, done, "w-reinforce")  # one side is enough for it
    assert step.isfinite().all() and metrics["loss"] == pytest.approx(-0.1 if right else 1.0)


def test_eq4_pi_old_is_noted_before_the_first_update(model, batch):
    """With one update it is pi: no clip, the REINFORCE gradient; later what pi was at the start."""

    class MovingRun(FakeRun):
        def update(self, module, optimizer, lr):
            module.model.norm.weight.data *= 3
            return super().update(module, optimizer, lr)

    options = {"normaliser": "token", "mode": "reinforce"}
    [one], _ = updates(model, batch, **options)
    (first, second), before = updates(model, batch, **options, updates=2)
    assert same(first + second, 2 * one)
    _, after = updates(copy.deepcopy(model), batch, **options, updates=2, kind=MovingRun)
    assert before["clip_frac_low"] == before["clip_frac_high"] == 0
    assert after["clip_frac_low"] + after["clip_frac_high"] > 0.05
    assert after["sampler_gap"] == pytest.approx(before["sampler_gap"], abs=1e-12)  # of pi_old
