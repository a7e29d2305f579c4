"""more/reward_model.py: equations against the reference and by hand, examples, heads, runs."""

import doctest
import json
import shutil
from fractions import Fraction
from math import log
from random import Random
from types import SimpleNamespace

import conftest
import pytest
import torch
from conftest import FakeRun, eight_answers, float64, lines_of, metrics_of, nothing
from safetensors.torch import load_file, save_file
from test_vectors import cases

from more import reward_model as rm
from rewards import BadInput, Completion, make_task

RULES = "strict paper_rule_strict", "inclusive repo_rule_inclusive_exact", "any no_margin"
ROWS = [[46, 47, 3] + answer for answer in eight_answers()]
PLACES = [([1.0, -1.0, 0.0][i % 3 :], [[2, 3, 2][i % 3 :]]) for i in range(8)]
EXAMPLES = {
    "pair": [rm.Example("", ROWS[i : i + 2], [0.3 * i]) for i in range(0, 8, 2)],
    "outcome": [rm.Example("", [ROWS[i]], [i % 3 / 2]) for i in range(8)],
    "process": [rm.Example("", [ROWS[i]], *PLACES[i]) for i in range(8)],
}
FILE = "--data lines.jsonl --kind pair --heldout_share 0.4"
NAME, SMALL = "more.reward_model", "--steps 4 --batch_size 4 --max_new_tokens 12 --lr 0.01 "
SMALL += "--warmup_steps 10 --eval_problems 2 --eval_samples 2"


def equal(first, second, tolerance=1e-12) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=tolerance)


@pytest.fixture
def scorer(small):
    """A random model of width 32 and a new head."""
    model = rm.load_model(small).double()
    return model, rm.first_head(model, 0).double()


@cases("sft_data", "acecoder")
@pytest.mark.parametrize("rule", RULES)
def test_eq2_eq6_pairs_losses_accuracy_best_of_n_equal_the_reference(case, rule):
    """Through what trains: from pass rates, as fractions and as floats, to the mean over pairs."""
    rule, name = rule.split()
    expected, scores = case[name], case["rm_scores"]
    pairs = rm.margin_pairs([Fraction(*share) for share in case["passed_total"]], rule)
    assert [list(pair) for pair in pairs] == expected["pairs"]
    answers = [([i], rate, True) for i, rate in enumerate(case["pass_rate"])]
    found = rm.group_examples(rm.Config(cap=99), "q", answers, rule)
    assert sorted((e.rows[0][0], e.rows[1][0]) for e in found) == sorted(pairs)
    seen = rm.judge("pair", float64([scores[i] for pair in pairs for i in pair]), 0.0, 0.0)
    assert seen["loss"].sum().item() == pytest.approx(expected["bt_sum"])
    right = len(pairs) * (expected["pair_accuracy"] or 0)
    assert seen["pair_accuracy"].sum().item() == pytest.approx(right)
    assert rm.best_of(scores) == case["best_of_n"]["rm_pick"]


def test_eq2_eq3_eq4_by_hand():
    """Margin, centre: r_w - r_l - m = log 3, sigma 3/4, (r_w + r_l)^2 = 4. It stays finite."""
    r_w, r_l = float64([1.5 + log(3) / 2]), float64([0.5 - log(3) / 2])
    equal(rm.pair_loss(r_w, r_l, 1.0, 0.01), float64([-log(0.75) + 0.04]))
    equal(rm.pair_loss(float64([-1e4]), float64([1e4])), float64([2e4]))
    r, labels = float64([log(3), -log(3), 0, 9]), float64([1, 0.5, 0, -1])  # sigma: 3/4, 1/4, 1/2
    expected = float64([-log(0.75), -(log(0.25) + log(0.75)) / 2, -log(0.5), 0])
    equal(rm.process_loss(r, labels, float64([1, 1, 1, 0])), expected)
    equal(rm.outcome_loss(r[:3], labels[:3]), expected[:3])


def test_eq7_best_of_n_votes_and_losers_that_ended():
    assert doctest.testmod(rm).failed == 0
    assert rm.best_of([1, 3, 3]) == 1 and rm.majority([None, None, "b", "a", "a"]) == 3
    score = [{"answer": "abab"[i], "correct": i == 0} for i in range(4)]
    done = [SimpleNamespace(finished=i != 2, score=score[i]) for i in range(4)]
    assert [*rm.describe_ranking(done, [1, 0, 5, 7], 4).values()] == [0, 1, 1 / 3, 0.5]
    examples = [rm.Example("", [], [], ended=i < 5) for i in range(14)]
    found = [e.ended for e in rm.balanced(examples, Random(0))]
    assert (len(found), sum(found)) == (10, 5)


def test_eq1_is_read_at_the_last_token_whatever_the_padding(scorer):
    """Ids 0 (padding) and 1 (the end) at a row's end count; a batch is as its rows alone."""
    model, head = scorer
    rows = [ROWS[0] + [1], ROWS[1] + [0, 0], ROWS[2], [5]]
    hidden = [model(torch.tensor([row]))[0] for row in rows]
    equal(rm.last_hidden(model, rows), torch.stack([h[-1] for h in hidden]))
    scores = [(h[-1] @ head.weight[0] + head.bias).item() for h in hidden]
    assert rm.score_rows(model, head, rows, 40) == pytest.approx(scores, abs=1e-12)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_eq5_gradient_is_one_whatever_the_micro_batches_and_ranks(scorer, kind):
    (model, head), examples, losses = scorer, EXAMPLES[kind], []
    both = torch.nn.ModuleList([model.model, head])

    def gradient(examples, limit=64, rank=0, world=1):
        run = FakeRun(rm.Config(kind=kind, micro_batch_tokens=limit), rank, world)
        metrics = rm.judge_examples(run, model, head, examples, learn=True)
        run.update(both, None, 1.0)
        return run.gradients[0], metrics["loss"]

    for e in examples:  # a row at a time
        r = [head(model(torch.tensor([row])))[0, :, 0] for row in e.rows]
        ends = e.ends or [[-1]] * len(r)
        r = torch.cat([r[i][ends[i]] for i in range(len(r))])
        losses.append(rm.judge(kind, r, float64(e.labels), 0.01)["loss"])
    mean = torch.cat(losses).sum() / sum(label >= 0 for e in examples for label in e.labels)
    expected = torch.autograd.grad(mean, list(both.parameters()))
    whole, loss = gradient(examples, 10**6)
    ranks = sum(gradient(examples, rank=rank, world=3)[0] for rank in range(3))
    assert whole.abs().max() > 1e-3 and loss == pytest.approx(mean.item())
    for found in (whole, ranks, gradient(examples[::-1], 1)[0]):
        equal(found, torch.cat([g.flatten() for g in expected]))


def test_a_head_of_another_shape_is_refused(tmp_path):
    for name, shape in (("summary.weight", (2, 32)), ("w", (1, 32))):
        save_file({name: torch.ones(shape)}, tmp_path / "value_head.safetensors")
        with pytest.raises(BadInput, match="value_head.safetensors"):
            rm.load_head(tmp_path, 32)


def test_sampled_answers_are_labelled(monkeypatch, scorer):
    """Right; right without an end, which counts as wrong; wrong."""
    prompter, run = rm.Prompter(scorer[0], make_task("countdown"), False), FakeRun(rm.Config())
    run.cfg.sample, run.cfg.attempts, run.say = 1, 3, nothing
    scores = [{"correct": i < 2} for i in range(3)]
    done = [Completion(0, {}, [7], [i], [], i != 1, "", scores[i]) for i in range(3)]
    monkeypatch.setattr(rm, "rollout", lambda *args: done)
    pairs, run.cfg.kind = rm.sample_examples(run, None, prompter), "outcome"
    assert sorted(e.rows for e in pairs) == [[[7, 0], [7, 1]], [[7, 0], [7, 2]]]
    found = [(e.rows, e.labels) for e in rm.sample_examples(run, None, prompter)]
    assert found == [([[7, 0]], [1.0]), ([[7, 1]], [0.0]), ([[7, 2]], [0.0])]
    scores[0] |= {"passed": 9, "tests": 10}  # code: by eq. 6
    scores[2] |= {"passed": 4, "tests": 10}
    run.cfg.kind = "pair"
    assert [e.rows for e in rm.sample_examples(run, None, prompter)] == [[[7, 0], [7, 2]]]


def test_lines_of_a_file(small, tmp_path):
    """TRL's three forms, AceCode's, messages: one end token each, separators once."""
    folder = shutil.copytree(small, tmp_path / "chat")
    turns = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<eos>\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(turns)

    def read(kind: str, line: dict, chat: bool = False) -> list[tuple]:
        prompter = rm.Prompter(rm.load_model(folder), make_task("countdown"), chat)
        found = rm.line_examples(prompter, rm.Config(kind=kind), [1], line)
        return [([prompter.decode(row) for row in e.rows], e.labels, e.ends) for e in found]

    rates = [("1", 1.0), ("2<eos>", 0.5), ("3", 0.0)]
    code = {"question": "q", "inferences": [{"completion": c, "pass_rate": p} for c, p in rates]}
    pair = {"prompt": "q", "chosen": "1", "rejected": "2<eos>"}
    steps = {"prompt": "q", "completions": ["1+1\n", "2"], "labels": [True, None]}
    assert read("pair", pair | {"margin": 0.5}) == [(["q1<eos>", "q2<eos>"], [0.5], [])]
    assert read("pair", code) == [(["q1<eos>", "q2<eos>"], [0.0], [])]  # eq. 6
    assert [labels for _, labels, _ in read("outcome", code)] == [[1.0], [0.5], [0.0]]
    assert read("process", steps) == [(["q1+1\n2\n"], [1.0, -1.0], [[4, 6]])]
    asked, reply = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "1"}]
    talk = {"prompt": asked, "chosen": reply, "rejected": "2"}
    assert read("pair", talk, chat=True)[0][0] == ["u:q<eos>\na:1<eos>", "u:q<eos>\na:2<eos>"]
    for kind, line in ("pair", pair | {"margin": -1}), ("process", steps | {"labels": [True]}):
        with pytest.raises(BadInput):
            read(kind, line)


def test_a_run_goes_on_as_the_unbroken_one(run, cwd, small):
    """Nine pairs of three prompts, one held out; what it leaves is what it evaluated."""
    pairs = [{"prompt": f"{i % 3}=", "chosen": "1" * (i + 1), "rejected": "2"} for i in range(9)]
    (cwd / "lines.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    for name, more in (("whole", ""), ("parts", "--steps 2")):
        flags = f"--model {small} {SMALL} {FILE} {more} --out {name}"
        assert run(NAME, flags, base=False).code == 0
    assert run(NAME, "--resume parts --steps 4", base=False).code == 0
    whole, parts = cwd / "whole/step-000004", cwd / "parts/step-000004"
    for file in ("model.safetensors", "value_head.safetensors"):
        equal(load_file(whole / file), load_file(parts / file), 0)
    run(NAME, f"--model {whole} {SMALL} {FILE} --steps 0 --out again", base=False)
    rows = lines_of(cwd / "again/metrics.jsonl") + lines_of(cwd / "whole/metrics.jsonl")[-2:]
    again, after, before = ([row[x] for x in row if x[:5] == "eval/"] for row in rows)
    assert again == after != before
    bad = {"--sample 2": "no pair whose loser ended", f"{FILE} --max_length 3": "lines, 0 to learn"}
    for flags, words in bad.items():
        done = run(NAME, f"--model {small} {SMALL} {flags}", base=False)
        assert done.code == 2 and words in done.err, (flags, done.err)


def test_ranks_are_as_one(run_ranks, cwd, monkeypatch):
    """No step is taken; five ranks are more than a batch."""
    monkeypatch.setitem(conftest.SMALL, NAME, f"{SMALL} --kind outcome --sample 3 --attempts 2")
    found = {world: run_ranks(NAME, world, f"--out {world}") for world in (1, 2, 5)}
    for world, (codes, gradients) in found.items():
        assert codes == [0] * world
        equal(gradients, found[1][1], 1e-6)
        for one, other in zip(metrics_of(cwd / "1"), metrics_of(cwd / str(world)), strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=2e-6)
