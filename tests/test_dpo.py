"""more/dpo.py: the references' numbers, pairs, gradients; its runs: test_scripts.py."""

import json
import shutil
from fractions import Fraction
from math import log
from random import Random

import pytest
import torch
from conftest import FakeRun, close, eight_answers, float64, lines_of, nothing
from test_vectors import cases

from more import dpo
from rewards import BadInput, Completion, make_task


@cases("sft_data", "dpo", "sequence_level")
def test_eq1_eq2_eq4_loss_gradient_and_rewards_equal_the_reference(case):
    logps = float64([case["policy_chosen"], case["policy_rejected"]]).requires_grad_()
    ref = float64([case["ref_chosen"], case["ref_rejected"]])
    ones, beta, e = torch.ones_like(ref), case["beta"], case["label_smoothing"]
    losses, rewards = dpo.dpo_loss(logps, ref, ones, beta, "sigmoid", e, 0.0)
    losses.mean().backward()
    assert close(losses, case["loss_per_pair"])
    assert losses.mean().item() == pytest.approx(case["loss"]) and not rewards.requires_grad
    assert close(rewards, [case["reward_chosen"], case["reward_rejected"]])
    assert close(logps.grad, [case["grad_policy_chosen"], case["grad_policy_rejected"]])


@cases("sft_data", "dpo", "token_level_with_nll")
def test_eq3_sft_term_is_the_mean_over_an_answers_tokens(case):
    rows = torch.zeros(3, 2, len(case["dpo_per_pair"]), dtype=torch.float64)
    for i, side in enumerate(("chosen", "rejected")):
        mask = float64(case[f"policy_{side}_mask"])
        for j, values in enumerate((case[f"policy_{side}"], case[f"ref_{side}"], 1.0)):
            rows[j, i] = (float64(values) * mask).sum(1)
    losses, _ = dpo.dpo_loss(*rows, case["beta"], "sigmoid", 0.0, 0.0)
    whole, _ = dpo.dpo_loss(*rows, case["beta"], "sigmoid", 0.0, case["nll_weight"])
    assert close(losses, case["dpo_per_pair"])
    assert whole.mean().item() == pytest.approx(case["dpo_plus_nll_mean"])


def test_eq2_by_hand():
    """h = 2 log 3, beta 1/2: sigma = 3/4; IPO by means; far away, finite."""
    two, zero = torch.full((2, 1), 2.0), torch.zeros(2, 1)
    logps = torch.tensor([[log(3)], [-log(3)]])
    [loss], rewards = dpo.dpo_loss(logps, zero, two, 0.5, "sigmoid", 0.1, 0.0)
    assert loss.item() == pytest.approx(-0.9 * log(0.75) - 0.1 * log(0.25))
    assert rewards.flatten().tolist() == pytest.approx([log(3) / 2, -log(3) / 2])
    logps, lengths = torch.tensor([[-4.0], [-30.0]]), torch.tensor([[2], [10]])
    [loss], _ = dpo.dpo_loss(logps, zero, lengths, 0.25, "ipo", 0.0, 0.5)
    assert loss.item() == pytest.approx((-2 + 3 - 2) ** 2 + 0.5 * 2)  # h' - 1 / (2 beta); SFT
    logps = torch.tensor([[-1e5, 1e5], [0.0, 0.0]], requires_grad=True)
    dpo.dpo_loss(logps, 0 * logps, 1 + 0 * logps, 1.0, "sigmoid", 0.1, 0.0)[0].sum().backward()
    assert close(logps.grad, [[-0.9, 0.1], [0.9, -0.1]], 1e-6)


@cases("sft_data", "acecoder")
def test_eq5_rates_equal_the_reference(case):
    pairs = dpo.rate_pairs([Fraction(*share) for share in case["passed_total"]])
    assert [[w, x] for _, w, x in pairs] == case["paper_rule_strict"]["pairs"]


@cases("sft_data", "veripo_toy")
def test_eq6_veripo_equals_the_reference(case):
    parts = [(r["think"], r["think_conclusion"], r["answer"], r["gold"]) for r in case["rollouts"]]
    labels = [dpo.veripo_labels(*rest, answer, answer == gold) for *rest, answer, gold in parts]
    assert labels == [pytest.approx(label) for label in case["labels"]]
    expected = [(pair["kind"], pair["chosen"], pair["rejected"]) for pair in case["pairs"]]
    assert dpo.veripo_pairs(labels) == expected


def test_pairs_are_capped_and_their_texts_differ():
    """Rights 0, 1 and 4; the first two have one text, and the wrong 5 has it, too."""
    texts, rights = "aabcda", [True, True, False, False, True, False]
    answers = [{"text": t, "correct": r} for t, r in zip(texts, rights, strict=True)]
    found = dpo.find_pairs("correct", answers, 99, Random(0))
    named = {texts[w] + texts[x] for _, w, x in found}
    assert named == {"ab", "ac", "db", "dc", "da"} and len(found) == 5
    assert len(dpo.find_pairs("correct", answers, 2, Random(0))) == 2
    thought = "1+2=3>2\n2-1=1<2\n2/1=2=2\n1*1=1<2\n2*1=2=2\n{}*1=2=2\n</think>"
    answers = [{"text": thought.format(n), "answer": "2*1", "correct": True} for n in (2, 3)]
    assert dpo.find_pairs("veripo", answers, 9, Random(0)) == [("consistency", 0, 1)]


def test_what_does_not_end_is_not_chosen(small, monkeypatch):
    """Of a group: right, right without an end, wrong. Tokens are those that were sampled."""

    def rollout(run, sampler, prompter, problems, size, limit, step):
        answers = [(n, i, {"correct": i < 2}) for n, _ in problems for i in range(3)]
        return [Completion(n, {}, [7], [50 + i], [], i != 1, f"{i}", s) for n, i, s in answers]

    monkeypatch.setattr(dpo, "rollout", rollout)
    model, run = dpo.load_model(small), FakeRun(dpo.Config(sample=65, attempts=3))
    run.say = run.keep_samples = nothing
    pairs = dpo.sample_pairs(run, model, dpo.Prompter(model, make_task("countdown"), False))
    assert sorted(pairs) == [([7], [50], [51])] * 65 + [([7], [50], [52])] * 65


def test_lines_of_both_forms(small, tmp_path):
    """One end token, also of a template; TRL's form and whole conversations are one pair."""
    folder = shutil.copytree(small, tmp_path / "chat")
    turn = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<eos>\n{% endfor %}"
    opened = "{% if add_generation_prompt %}a:{% endif %}"
    (folder / "chat_template.jinja").write_text(turn + opened)
    prompter = dpo.Prompter(dpo.load_model(folder), make_task("countdown"), True)

    def texts(prompt, chosen="2", rejected="3<eos>"):
        line = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "score": 1}
        return [prompter.decode(ids) for ids in dpo.text_pair(prompter, [1], line)]

    assert texts("1+1=") == ["1+1=", "2<eos>", "3<eos>"]
    asked = {"role": "user", "content": "1"}
    right, wrong = ({"role": "assistant", "content": x} for x in "23")
    whole = [asked, right], [asked, wrong]
    for line in (([asked], [right], [wrong]), ("1", *whole), ([asked], *whole)):
        assert texts(*line) == ["u:1<eos>\na:", "2<eos>", "3<eos>"]
    bad = {"the same": ("a", "b", "b"), "is empty": ("a", " ", "b"), "are needed": ("a", None)}
    bad |= {"last reply": ([asked], [right], [right, asked, wrong]), "needs --chat": ("1", *whole)}
    for words, line in bad.items():
        prompter.style = "text" if "--chat" in words else "chat"
        with pytest.raises(BadInput, match=words):
            texts(*line)


ANSWERS = eight_answers()
PAIRS = [([46, 47, 3, 50][: 1 + i], ANSWERS[2 * i], ANSWERS[2 * i + 1]) for i in range(4)]
REF = float64([[-9, -30, -5, -70], [-80, -150, -60, -20]])
LENGTHS = torch.tensor([[len(pair[side]) for pair in PAIRS] for side in (1, 2)])


def gradient(model, pairs=PAIRS, ref=REF, rank=0, world=1, limit=64, **changes):
    """Of a step in which nothing moves, and its metrics."""
    changes = {"sft_coef": 0.5, "label_smoothing": 0.1, "micro_batch_tokens": limit} | changes
    run = FakeRun(dpo.Config(**changes), rank, world)
    metrics = dpo.update_policy(run, model, None, pairs, ref, 1.0)
    return run.gradients[0], metrics


def plain_logps(model) -> torch.Tensor:
    """log pi(y|x) of PAIRS, (2, 4), a row at a time."""
    found = []
    for asked, answer in [(pair[0], pair[side]) for side in (1, 2) for pair in PAIRS]:
        ids = torch.tensor([asked + answer])
        logprobs = model.logits(model(ids[:, :-1])).log_softmax(-1)
        found.append(logprobs.gather(-1, ids[:, 1:, None])[0, len(asked) - 1 :].sum())
    return torch.stack(found).view(2, 4)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_gradient_is_that_of_eq3_whatever_the_split_and_the_ranks(small, kind):
    """Against autograd: only answers are masked in, pads change nothing."""
    model = dpo.load_model(small).double()
    logps = plain_logps(model)
    loss = dpo.dpo_loss(logps, REF, LENGTHS, 0.1, kind, 0.1, 0.5)[0].mean()
    loss.backward()
    expected = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    model.zero_grad()
    whole, metrics = gradient(model, loss=kind, limit=10**6)
    mixed, _ = gradient(model, PAIRS[::-1], REF.flip(1), loss=kind, limit=1)
    ranks = [gradient(model, loss=kind, rank=rank, world=3)[0] for rank in range(3)]
    assert expected.abs().max() > 1e-2 and close(whole, expected, 1e-10)
    assert close(mixed, whole, 1e-12) and close(sum(ranks), whole, 1e-12)
    right = (logps - REF)[0] > (logps - REF)[1]
    assert metrics["loss"] == pytest.approx(loss.item())
    assert 0 < metrics["pair_accuracy"] == right.double().mean().item() < 1


def test_reference_is_computed_once_and_equals_the_live_one(small):
    """So the first loss is log 2; ranks share the work; --reference is another model."""
    model, run = dpo.load_model(small), FakeRun(dpo.Config(micro_batch_tokens=64))
    ref = dpo.reference_logprobs(run, model, PAIRS)
    assert close(ref, plain_logps(model), 1e-3) and not ref.requires_grad
    _, metrics = gradient(model, ref=ref, sft_coef=0.0)
    assert metrics["loss"] == pytest.approx(log(2), abs=1e-5)
    shares = [FakeRun(run.cfg, rank, 3) for rank in range(3)]
    assert close(sum(dpo.reference_logprobs(share, model, PAIRS) for share in shares), ref, 1e-6)
    run.cfg.reference, run.dtype = "tiny", torch.float32
    tiny = dpo.load_model(dpo.resolve_model("tiny"))
    assert close(dpo.reference_logprobs(run, model, PAIRS), plain_logps(tiny), 1e-4)


def test_a_file_of_pairs(run, cwd):
    """An epoch of every pair that is not too long; it goes on after the file is gone."""
    lines = [{"prompt": f"{i}=", "chosen": "1" * (i + 1), "rejected": "2"} for i in range(9)]
    (cwd / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = "--data pairs.jsonl --max_length 11 --steps -1 --batch_size 3 --out a --eval_problems 0"
    done = run("more.dpo", flags)
    assert done.code == 0 and "1 of 9 pairs longer than 11 tokens" in done.out, done.err
    epochs = [row["epoch"] for row in lines_of(cwd / "a" / "metrics.jsonl") if "loss" in row]
    assert epochs == [3 / 8, 6 / 8, 9 / 8]
    (cwd / "pairs.jsonl").unlink()
    assert run("more.dpo", "--resume a --steps 4", base=False).code == 0


def test_no_pair_is_bad_input(run):
    for flags, words in ("--task countdown", "problems gives a pair"), ("--pairs rate", "'passed'"):
        done = run("more.dpo", f"{flags} --sample 3")
        assert done.code == 2 and words in done.err
