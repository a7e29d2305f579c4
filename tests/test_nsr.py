"""nsr.py's own functions: the reference's numbers (vectors/ppo_nsr.json), updates."""

import copy

import pytest
import torch
from conftest import FakeRun, Moving, close, completion, eight_answers, float64, vectors

import nsr

SECTION = vectors("ppo_nsr")["nsr_psr_wreinforce"]
MODES = {"psr": "psr", "nsr": "nsr", "w-reinforce": "w_reinforce", "reinforce": "reinforce"}
losses = pytest.mark.parametrize("case", SECTION["losses"])


@losses
@pytest.mark.parametrize("mode", ["psr", "nsr", "w-reinforce"])
def test_eq3_to_eq7_loss_and_gradient_equal_the_reference(case, mode):
    expected, mask = case[MODES[mode]], float64(case["mask"])
    advantages = nsr.signed_advantages(torch.tensor(case["correct"]), mode, case["lambda"])
    kept = [i for i, a in enumerate(advantages.tolist()) if a]
    assert kept == expected["kept_rows"]
    logprobs, old = float64(case["logprobs"]).requires_grad_(), float64(case["old_logprobs"])
    weights = nsr.normaliser_weights(mask[kept], "kept", mask[kept].sum().item(), 0, 0)
    loss, _ = nsr.signed_loss(logprobs[kept], old[kept], advantages[kept], weights, case["clip"])
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-10)
    assert close(logprobs.grad, expected["grad_logprobs_full_batch"], 1e-10)


@losses
def test_eq2_with_one_normaliser_equals_the_reference(case):
    logprobs, old, mask = (float64(case[name]) for name in ("logprobs", "old_logprobs", "mask"))
    weights = nsr.normaliser_weights(mask, "token", 0, mask.sum().item(), len(mask))
    for mode, name in MODES.items():
        advantages = nsr.signed_advantages(torch.tensor(case["correct"]), mode, case["lambda"])
        loss, _ = nsr.signed_loss(logprobs, old, advantages, weights, case["clip"])
        assert loss.item() == pytest.approx(case["constant_normaliser"][name], abs=1e-10)


@pytest.mark.parametrize("case", SECTION["logit_gradients"])
def test_eq5_and_eq6_direction_on_the_logits_equals_the_reference(case):
    for objective, name in (("ratio", "ratio_or_logprob"), ("probability", "paper_eq6")):
        logits = float64(case["logits"]).requires_grad_()
        logprob = logits.log_softmax(-1)[None, None, case["sampled"]]
        args = logprob, logprob.detach(), float64([case["R"]]), float64([[1.0]])
        nsr.signed_loss(*args, objective=objective)[0].backward()
        assert close(-logits.grad, case[f"descent_direction_{name}"], 1e-10)


def test_eq4_is_clamped_and_eq7_has_these_weights():
    far = torch.tensor([[200.0]])
    assert nsr.signed_loss(far, 0 * far, -torch.ones(1), torch.ones(1, 1))[0].isfinite()
    mask = float64([[1, 1, 1, 0], [1, 0, 0, 0]])  # of a rollout of 10 tokens and 5 answers
    expected = {"token": [0.1, 0.1], "sequence": [1 / 15, 1 / 5], "sample": [0.2, 0.2]}
    for name, values in expected.items():
        weights = nsr.normaliser_weights(mask, name, 4, 10, 5)
        assert close(weights, mask * float64(values)[:, None], 1e-12), name


def updates(model, done, mode, rank=0, world=1, kind=FakeRun, **changes):
    """The gradients of the optimizer steps of a rollout, and its metrics."""
    changes = {"batch_size": len(done), "updates": 1, "micro_batch_tokens": 1} | changes
    run = kind(nsr.Config(**changes), rank, world)
    advantages = nsr.signed_advantages(torch.tensor([c.score["correct"] for c in done]), mode)
    metrics = nsr.update_policy(run, model, None, done, advantages.tolist(), 1.0)
    return run.gradients, metrics


@pytest.fixture(scope="module")
def batch():
    return [completion(i // 4, c, correct=i in (1, 3, 4)) for i, c in enumerate(eight_answers())]


@pytest.mark.parametrize("normaliser", ["kept", "token", "sequence", "sample"])
def test_gradient_does_not_depend_on_split_or_ranks(model, batch, normaliser):
    options = {"normaliser": normaliser, "updates": 2}
    whole, _ = updates(model, batch, "nsr", micro_batch_tokens=10**6, **options)
    ranks = [updates(model, batch, "nsr", rank, 3, **options)[0] for rank in range(3)]
    assert len(whole) == 2 and close(torch.stack(whole), sum(map(torch.stack, ranks)), 1e-12)


def test_kept_answers_make_the_steps(model, batch):
    """3 right and 5 wrong, mini-batches of 2: the last of an odd number is half as heavy."""
    found = {mode: updates(model, batch, mode, updates=4) for mode in MODES}
    counts = [(len(steps), m["updates"], m["rows_trained"]) for steps, m in found.values()]
    assert counts == [(2, 2, 3), (3, 3, 5), (4, 4, 8), (4, 4, 8)]
    [alone], _ = updates(model, [batch[4]], "psr")  # the third right answer, by itself
    assert close(found["psr"][0][1], alone / 2, 1e-12)


@pytest.mark.parametrize("right, mode", [(False, "psr"), (True, "nsr")])
def test_an_empty_side_makes_no_step_and_no_nan(model, batch, right, mode):
    done = [completion(c.number, c.tokens, correct=right) for c in batch]
    steps, metrics = updates(model, done, mode, updates=4)
    assert steps == [] and metrics["rows_trained"] == metrics["updates"] == metrics["loss"] == 0
    [step], metrics = updates(model, done, "w-reinforce")  # one side is enough for it
    assert step.isfinite().all() and metrics["loss"] == pytest.approx(-0.1 if right else 1.0)


@pytest.mark.parametrize("objective", ["ratio", "probability"])
def test_eq4_to_eq7_each_update_is_of_its_part(model, batch, objective):
    """Against pi_old, noted before the first."""
    moved, second = copy.deepcopy(model), copy.deepcopy(model)
    second.model.norm.weight.data *= 3
    options = {"normaliser": "token", "objective": objective, "updates": 2}
    found, _ = updates(moved, batch, "reinforce", kind=Moving, **options)
    for ours, policy, part in zip(found, (model, second), (batch[:4], batch[4:]), strict=True):
        ids = nsr.pad_rows([c.prompt + c.tokens for c in part], torch.device("cpu"), torch.long)
        mask = nsr.pad_rows([[0] * 3 + [1] * len(c.tokens) for c in part], ids.device, torch.long)
        new, old = (nsr.completion_logprobs(m, ids, mask, 1.0)[0] for m in (policy, model))
        gains = float64([2 * c.score["correct"] - 1 for c in part])
        weights = mask[:, 1:].double() / sum(len(c.tokens) / 2 for c in batch)
        loss, _ = nsr.signed_loss(new, old.detach(), gains, weights, objective=objective)
        expected = torch.autograd.grad(loss, list(policy.parameters()))
        assert close(ours, torch.cat([x.flatten() for x in expected]), 1e-12)
