"""more/dpo.py: equations against the references' numbers, rules by hand, pairs, gradients.

That a run goes on as the unbroken one and ranks give the gradient of one, test_scripts.py shows.
"""

import copy
import json
import os
from fractions import Fraction
from math import log
from random import Random

import pytest
import torch
from conftest import FakeRun, eight_answers, lines_of, vectors

from more import dpo
from rewards import BadInput, Completion, make_task

VECTORS = vectors("sft_data")
SEQUENCES = VECTORS.get("dpo", {}).get("sequence_level", [])
TOKENS = VECTORS.get("dpo", {}).get("token_level_with_nll", [])
VERIPO, CODE = VECTORS.get("veripo_toy", []), VECTORS.get("acecoder", [])


def exact(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(ours, expected, tolerance=1e-9) -> bool:
    return torch.allclose(ours, expected, rtol=tolerance, atol=tolerance)


def test_vectors_are_there():
    assert "VECTORS" in os.environ or (len(SEQUENCES), len(TOKENS), len(VERIPO)) == (4, 2, 2)


# ---------------------------------------------------------------------------- equations


@pytest.mark.parametrize("case", SEQUENCES, ids=lambda case: case["id"])
def test_eq1_eq2_eq4_loss_gradient_and_rewards_equal_the_reference(case):
    """Also in two parts, and with chosen and rejected exchanged for e and 1 - e."""
    logps = exact(case["policy_chosen"], case["policy_rejected"]).requires_grad_()
    ref, beta = exact(case["ref_chosen"], case["ref_rejected"]), case["beta"]
    e, ones = case["label_smoothing"], torch.ones_like(ref)
    losses, rewards = dpo.dpo_loss(logps, ref, ones, beta, "sigmoid", e, 0.0)
    losses.mean().backward()
    expected = exact(case["reward_chosen"], case["reward_rejected"])
    assert close(losses, exact(*case["loss_per_pair"])) and close(rewards, expected)
    assert losses.mean().item() == pytest.approx(case["loss"])
    assert close(logps.grad, exact(case["grad_policy_chosen"], case["grad_policy_rejected"]))
    assert (rewards[0] > rewards[1]).double().mean().item() == pytest.approx(case["accuracy"])
    assert not rewards.requires_grad
    flipped, _ = dpo.dpo_loss(logps.flip(0), ref.flip(0), ones, beta, "sigmoid", 1 - e, 0.0)
    assert close(flipped, losses)
    parts = [dpo.dpo_loss(logps[:, i], ref[:, i], ones[:, i], beta, "sigmoid", e, 0.0)[0]
             for i in torch.arange(ref.shape[1]).split(1)]  # fmt: skip
    assert close(torch.cat(parts), losses)


@pytest.mark.parametrize("case", TOKENS, ids=lambda case: case["id"])
def test_eq3_sft_term_is_the_mean_over_an_answers_tokens(case):
    def sums(who: str) -> torch.Tensor:
        sides = "chosen", "rejected"
        return torch.stack([(exact(*case[f"{who}_{side}"]) * mask(side)).sum(1) for side in sides])

    def mask(side: str) -> torch.Tensor:
        return exact(*case[f"policy_{side}_mask"])

    logps, lengths = sums("policy"), torch.stack([mask("chosen").sum(1), mask("rejected").sum(1)])
    assert close(logps, exact(case["sum_policy_chosen"], case["sum_policy_rejected"]))
    form = logps, sums("ref"), lengths, case["beta"], "sigmoid", 0.0
    assert close(dpo.dpo_loss(*form, 0.0)[0], exact(*case["dpo_per_pair"]))
    whole = dpo.dpo_loss(*form, case["nll_weight"])[0].mean().item()
    assert whole == pytest.approx(case["dpo_plus_nll_mean"])


def test_eq2_by_hand():
    """At the start log 2; h = 2 log 3 with beta 1/2: sigma = 3/4; IPO by means; far away, finite."""
    two = torch.full((2, 1), 2.0)
    assert dpo.dpo_loss(two, two, two, 0.1, "sigmoid", 0.3, 0.0)[0].item() == pytest.approx(log(2))
    logps, zero = torch.tensor([[log(3)], [-log(3)]]), torch.zeros(2, 1)
    [loss], rewards = dpo.dpo_loss(logps, zero, two, 0.5, "sigmoid", 0.1, 0.0)
    assert loss.item() == pytest.approx(-0.9 * log(0.75) - 0.1 * log(0.25))
    assert rewards.flatten().tolist() == pytest.approx([log(3) / 2, -log(3) / 2])
    logps, lengths = torch.tensor([[-4.0], [-30.0]]), torch.tensor([[2], [10]])
    [loss], _ = dpo.dpo_loss(logps, zero, lengths, 0.25, "ipo", 0.0, 0.5)
    assert loss.item() == pytest.approx((-2 + 3 - 2) ** 2 + 0.5 * 2)  # h' - 1 / (2 beta); SFT
    for far in (-1e5, 1e5):
        logps = torch.tensor([[far], [0.0]], requires_grad=True)
        dpo.dpo_loss(logps, zero, two, 1.0, "sigmoid", 0.1, 0.0)[0].sum().backward()
        assert logps.grad.isfinite().all() and logps.grad.abs().max() > 0


# -------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("case", VERIPO, ids=lambda case: case["id"])
def test_eq6_veripo_equals_the_reference(case):
    labels = []
    for r in case["rollouts"]:
        right = r["answer"] == r["gold"]
        labels.append(dpo.veripo_labels(r["think"], r["think_conclusion"], r["answer"], right))
    assert labels == [pytest.approx(label) for label in case["labels"]]
    expected = [(pair["kind"], pair["chosen"], pair["rejected"]) for pair in case["pairs"]]
    assert dpo.veripo_pairs(labels) == expected


@pytest.mark.parametrize("case", CODE, ids=lambda case: case["id"])
def test_eq5_rates_equal_the_reference(case):
    rates = [Fraction(passed, total) for passed, total in case["passed_total"]]
    pairs = [[w, x] for _, w, x in dpo.rate_pairs(rates)]
    assert pairs == case["paper_rule_strict"]["pairs"]


def test_pairs_are_capped_and_their_texts_differ():
    """Rights 0, 1 and 4; the first two texts are one, and so are those of 1 and of the wrong 5."""
    texts, rights = ["a", "a", "b", "c", "d", "a"], [True, True, False, False, True, False]
    answers = [{"text": t, "correct": r} for t, r in zip(texts, rights, strict=True)]
    found = dpo.find_pairs("correct", answers, 99, Random(0))
    named = {(texts[w], texts[x]) for _, w, x in found}
    assert named == {(w, x) for w in "ad" for x in "bca" if w != x} and len(found) == 5
    assert len(dpo.find_pairs("correct", answers, 2, Random(0))) == 2
    assert dpo.find_pairs("correct", answers[:2], 9, Random(0)) == []
    code = [{"text": str(n), "correct": False, "passed": n, "tests": 10} for n in (9, 4, 0)]
    assert dpo.find_pairs("rate", code, 9, Random(0)) == [("rate", 0, 1)]
    thought = "1+2=3>2\n2-1=1<2\n2/1=2=2\n1*1=1<2\n2*1=2=2\n{}*1=2=2\n</think>"
    answers = [{"text": thought.format(n), "answer": "2*1", "correct": True} for n in (2, 3)]
    assert dpo.find_pairs("veripo", answers, 9, Random(0)) == [("consistency", 0, 1)]


def test_what_does_not_end_is_not_chosen(small, monkeypatch):
    """Of a group: right, right without an end, wrong. Tokens as they were sampled."""
    model, task = dpo.load_model(small), make_task("countdown")

    def rollout(run, sampler, prompter, problems, size, limit, step):
        done = []
        for (n, p), i in ((asked, i) for asked in problems for i in range(3)):
            score = {"correct": i < 2, "answer": ""}
            done.append(Completion(n, p, [7], [50 + i, 1], [], i != 1, f"text {i}", score))
        return done

    class Sampling(FakeRun):
        def say(self, text): ...

        def keep_samples(self, step, prompter, done, signs):
            self.kept = [(c.text, sign) for c, sign in zip(done, signs, strict=False)]

    monkeypatch.setattr(dpo, "rollout", rollout)
    run = Sampling(dpo.Config(sample=65, attempts=3))
    pairs = dpo.sample_pairs(run, model, dpo.Prompter(model, task, False))
    assert len(pairs) == 130 and len(run.kept) == 32
    assert sorted(pairs[:2]) == [([7], [50, 1], [51, 1]), ([7], [50, 1], [52, 1])]
    assert set(run.kept) == {("text 0", 1.0), ("text 1", -1.0), ("text 2", -1.0)}


# ------------------------------------------------------------------------- lines of a file


@pytest.fixture
def prompter(small, tmp_path):
    """With a chat template that writes an end token and a newline after each turn."""
    folder = tmp_path / "chat"
    folder.mkdir()
    for file in small.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    turn = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<eos>\n{% endfor %}"
    template = turn + "{% if add_generation_prompt %}a:{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    return dpo.Prompter(dpo.load_model(folder), make_task("countdown"), True)


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def test_lines_of_both_forms(prompter):
    """An end token once; a conversation as TRL has it, and whole ones, are the same pair."""
    line = {"prompt": "1+1=", "chosen": "2", "rejected": "3<eos>", "score": 1}
    texts = [prompter.decode(ids) for ids in dpo.text_pair(prompter, [1], line)]
    assert texts == ["1+1=", "2<eos>", "3<eos>"]
    asked, right, wrong = turn("user", "1+1"), turn("assistant", "2"), turn("assistant", "3")
    trl = {"prompt": [asked], "chosen": [right], "rejected": [wrong]}
    whole = {"prompt": "1+1", "chosen": [asked, right], "rejected": [asked, wrong]}
    both = {"prompt": [asked], "chosen": [asked, right], "rejected": [asked, wrong]}
    for line in (trl, whole, both):
        texts = [prompter.decode(ids) for ids in dpo.text_pair(prompter, [1], line)]
        assert texts == ["u:1+1<eos>\na:", "2<eos>", "3<eos>"]
    bad = {"chosen and rejected are the same": {"prompt": "a", "chosen": "b", "rejected": "b"}}
    bad["is empty"] = {"prompt": "a", "chosen": " ", "rejected": "b"}
    bad["are needed"] = {"prompt": "a", "chosen": "b"}
    bad["last reply"] = trl | {"rejected": [turn("user", "x"), wrong]}
    bad["the same text"] = trl | {"rejected": [right]}
    for words, line in bad.items():
        with pytest.raises(BadInput, match=words):
            dpo.text_pair(prompter, [1], line)
    prompter.style = "text"
    with pytest.raises(BadInput, match="needs --chat"):
        dpo.text_pair(prompter, [1], trl)


# ----------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def model(small):
    return dpo.load_model(small).double()


@pytest.fixture(scope="module")
def pairs():
    """Four, whose prompts and answers have unequal lengths."""
    answers = eight_answers()
    return [([46, 47, 3 + i][: 1 + i], answers[2 * i], answers[2 * i + 1]) for i in range(4)]


FORM = {"sft_coef": 0.5, "label_smoothing": 0.1, "batch_size": 4}
REF = exact([-9.0, -30.0, -5.0, -70.0], [-80.0, -150.0, -60.0, -20.0])


def update(model, pairs, ref=REF, rank=0, world=1, **changes):
    """(gradient, metrics) of a step in which nothing moves."""
    run = FakeRun(dpo.Config(**FORM | {"micro_batch_tokens": 64} | changes), rank, world)
    metrics = dpo.update_policy(run, model, None, pairs, ref, 1.0)
    return run.gradients[0], metrics


def log_prob(model, asked: list[int], answer: list[int]) -> torch.Tensor:
    """log pi(answer | asked), the whole row through the head."""
    ids = torch.tensor([asked + answer])
    logprobs = model.logits(model(ids[:, :-1])).log_softmax(-1)
    return logprobs.gather(-1, ids[:, 1:, None])[0, len(asked) - 1 :, 0].sum()


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_gradient_is_that_of_eq3_whatever_the_split_and_the_ranks(model, pairs, kind):
    """Against autograd through one row at a time: only answers are masked in, pads change nothing."""
    logps = torch.stack([torch.stack([log_prob(model, p[0], p[side]) for p in pairs])
                         for side in (1, 2)])  # fmt: skip
    lengths = torch.tensor([[len(p[side]) for p in pairs] for side in (1, 2)])
    loss = dpo.dpo_loss(logps, REF, lengths, 0.1, kind, 0.1, 0.5)[0].mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = torch.cat([gradient.flatten() for gradient in gradients])
    assert expected.abs().max() > 1e-2
    whole, metrics = update(model, pairs, loss=kind, micro_batch_tokens=10**6)
    assert close(whole, expected, 1e-10) and metrics["loss"] == pytest.approx(loss.item())
    small, _ = update(model, pairs, loss=kind, micro_batch_tokens=1)
    order = [2, 0, 3, 1]
    mixed, _ = update(model, [pairs[i] for i in order], REF[:, order], loss=kind)
    ranks = [update(model, pairs, loss=kind, rank=rank, world=3)[0] for rank in range(3)]
    assert close(small, whole, 1e-12) and close(mixed, whole, 1e-12)
    assert close(sum(ranks), whole, 1e-12)
    if kind == "sigmoid":
        margins = 0.1 * ((logps - REF)[0] - (logps - REF)[1])
        assert metrics["margin"] == pytest.approx(margins.mean().item())
        assert metrics["pair_accuracy"] == (margins > 0).double().mean().item()
        assert 0 < metrics["pair_accuracy"] < 1
        assert metrics["logp/rejected"] == pytest.approx(logps[1].mean().item())
        assert metrics["completion_length/chosen"] == lengths[0].double().mean().item()
        assert metrics["tokens"] == lengths.sum().item()


def test_reference_is_computed_once_and_equals_the_live_one(model, small, pairs):
    """At the start the loss is log 2 and no reward differs from 0; --reference is another model."""
    start = copy.deepcopy(model).float()
    run = FakeRun(dpo.Config(micro_batch_tokens=64))
    ref = dpo.reference_logprobs(run, start, pairs)
    live = [[log_prob(model, p[0], p[side]).item() for p in pairs] for side in (1, 2)]
    assert ref.shape == (2, 4) and close(ref.double(), exact(*live), 1e-5)
    assert not ref.requires_grad
    _, metrics = update(model, pairs, ref, sft_coef=0.0)
    assert metrics["loss"] == pytest.approx(log(2), abs=1e-5)
    assert abs(metrics["reward/chosen"]) + abs(metrics["reward/rejected"]) < 1e-5
    shares = [FakeRun(run.cfg, rank, 3) for rank in range(3)]
    assert close(sum(dpo.reference_logprobs(share, start, pairs) for share in shares), ref, 1e-6)
    run.cfg.reference, run.dtype = "tiny", torch.float32
    other = dpo.reference_logprobs(run, start, pairs)
    tiny = dpo.load_model(dpo.resolve_model("tiny"))
    assert other[1, 2].item() == pytest.approx(log_prob(tiny, *pairs[2][::2]).item(), rel=1e-4)


def test_a_file_of_pairs(run, cwd):
    """Read once: an epoch of every pair that is not too long; goes on after the file is gone."""
    lines = [{"prompt": f"{i}=", "chosen": "1" * (i + 1), "rejected": "2"} for i in range(9)]
    (cwd / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = "--data pairs.jsonl --max_length 11 --steps -1 --batch_size 3 --out a --eval_problems 0"
    done = run("more.dpo", flags + " --lr 0.01 --warmup_steps 1")
    assert done.code == 0 and "1 of 9 pairs longer than 11 tokens" in done.out, done.err
    rows = [row for row in lines_of(cwd / "a" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]  # 8 pairs
    assert sum(row["completion_length/chosen"] for row in rows[:2]) <= (4 + 5 + 6 + 7 + 8 + 9) / 3
    assert rows[-1]["epoch"] == pytest.approx(9 / 8)
    (cwd / "pairs.jsonl").unlink()
    assert run("more.dpo", "--resume a --steps 4", base=False).code == 0
    kept = torch.load(cwd / "a" / "step-000004" / "trainer.pt", weights_only=True)
    assert len(kept["pairs"]) == 8 and kept["reference"].shape == (2, 8)


def test_no_pair_is_bad_input(run):
    done = run("more.dpo", "--task countdown --sample 3 --eval_problems 0")
    assert done.code == 2 and "--pairs correct: none of 3 problems gives a pair" in done.err
    done = run("more.dpo", "--pairs rate --sample 3 --eval_problems 0")
    assert done.code == 2 and "--pairs rate" in done.err and "'passed'" in done.err
