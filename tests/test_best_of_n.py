"""more/best_of_n.py: the reference's votes, searches whose rows are plain samples, counted tokens."""

import math
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, lines_of
from test_readme import load
from test_vectors import cases

import rewards
from more import best_of_n as bn
from more import reward_model as rm

WHOLE = "--task countdown --max_new_tokens 60"


@cases("test_time", "voting")
def test_eq1_to_eq3_equal_the_reference(case):
    answers, steps = case["input"]["answers"], case["input"]["step_scores"]
    valid = [None if answer == "[invalid]" else answer for answer in answers]
    ones, expected = [1.0] * len(answers), case["expected"]
    last = [bn.reduce_scores(scores, "last") for scores in steps]
    assert bn.best(last) == expected["hf_best_of_n_index_argmax_last"]
    assert bn.vote(answers, ones) == expected["hf_majority"] == expected["s1_majority"]
    assert bn.vote(valid, ones) == expected["tts_majority_vote"]
    for how in ("last", "min", "prod"):
        r = [bn.reduce_scores(scores, how) for scores in steps]
        assert bn.vote(answers, r) == expected[f"hf_weighted_best_of_n_{how}"]
        assert answers[bn.best(r)] == expected[f"hf_best_of_n_{how}"]
    for how, name in (("min", "min"), ("last", "last"), ("mean", "avg")):
        r = [bn.reduce_scores(scores, how) for scores in steps]
        assert bn.vote(valid, r) == expected[f"tts_prm_{name}_vote"]


def test_votes_by_hand():
    assert bn.vote([None, None], [1.0, 1.0]) is None
    assert bn.vote(["a", "b", "b"], [0.3, 0.1, 0.2]) == "b"  # 0.1 + 0.2 > 0.3 in floats
    for order in permutations([("7", 0.9), ("8", 0.5), ("8", 0.6), ("9", 1.0)]):
        assert bn.vote(*zip(*order, strict=True)) == "8"
    with pytest.raises(ValueError, match="nan"):
        bn.reduce_scores([0.5, math.nan], "min")
    assert bn.reduce_scores([0.5, 0.25, 0.5], "mean") == pytest.approx(1.25 / 3)


def record(*rows, share=1.0) -> dict:
    """A record of answers (text, right, likelihood, tokens)."""
    answers = []
    for text, right, likelihood, tokens in rows:
        score = {"one": 1.0, "likelihood": likelihood, "rule": float(right)}
        score |= {"sum": 0.0, "shortest": -tokens, "shuffled": likelihood}
        answers.append({"tokens": tokens, "finished": text is not None, "answer": text, "score": score})
    return {"share": share, "answers": answers, "seconds": {}}


FOUR = [("a", 0, 0.9, 10), ("b", 1, 0.5, 20), ("b", 1, 0.6, 30), (None, 0, 0.7, 40)]


def test_outcomes_by_hand():
    """Sets of N: ab, b-, and all; N answers cost N/4 of 100 tokens."""
    found = bn.outcomes(record(*FOUR), 4)
    names = "majority", "vote_likelihood", "best_likelihood", "best_shortest", "best_rule"
    assert [found[f"{name}@1"][0] for name in names] == [0.5] * 5
    assert [found[f"{name}@2"][0] for name in names] == [0.5, 0.5, 0.0, 0.5, 1.0]
    assert [found[f"{name}@4"][0] for name in names] == [1.0, 1.0, 0.0, 0.0, 1.0]
    assert [found[f"majority@{n}"][1] for n in (1, 2, 4)] == [25, 50, 100]
    assert "best_model@4" not in found


def test_nobody_votes():
    cut = [(None, 0, 0.5, 9)] * 2
    assert bn.outcomes(record(*cut), 2)["majority@2"] == (0.0, 18)


def test_eq6_by_hand():
    """A plan by bin beats any single way; what costs too much and bounds are not chosen."""
    names = "majority@2", "best_sum@2", "best_rule@2", "majority@4"
    easy = dict(zip(names, [(1, 20), (0, 20), (1, 20), (1, 40)], strict=True))
    hard = dict(zip(names, [(0, 20), (1, 20), (1, 20), (1, 40)], strict=True))
    dev = [("easy", easy), ("easy", easy), ("hard", hard)]
    assert bn.optimal(dev, dev, 20) == (1.0, 2 / 3)
    assert bn.optimal(dev, dev, 40) == (1.0, 1.0)
    assert bn.optimal(dev[:1], dev[2:], 20) == (0.0, 0.0)  # a bin that nobody has seen


def test_the_bins_come_from_answers_of_their_own():
    records = [record(*FOUR, share=share) for share in (0.5, 0.4999, 0.1, 0.0)]
    metrics = bn.compare_ways(records, 4)
    assert [metrics[f"eval/problems/{name}"] for name in bn.BINS] == [1, 2, 1]
    assert metrics["eval/accuracy/majority@4/hard"] == 1.0


def test_eq4_and_eq5_survivors():
    scores, trees = [0.1, 0.9, 0.9, 0.5, 0.2, 0.3], [0, 0, 0, 0, 1, 1]
    assert bn.survivors(scores, trees, [2, 1]) == [1, 2, 5]
    assert bn.survivors(scores, trees, [1, 0]) == [1]  # the first of equals


@pytest.fixture
def made(tmp_path):
    """Makes model, verifier and three problems, by flags, of models/tiny-rl."""

    def made(flags: str = "", model: str = "tiny-rl", double: bool = True):
        cfg = bn.parse_config(bn.Config, f"{WHOLE} --model {model} {flags}".split())
        run = SimpleNamespace(cfg=cfg, device=torch.device("cpu"), dtype=torch.float32)
        run.rank, run.world, run.gather = 0, 1, lambda value: [value]
        loaded = bn.Run.load(run, bn.BY_SIZE)[1]
        if double:  # so that no draw depends on the batch
            loaded.double()
            loaded.compute_dtype = torch.float64
        prompter = bn.Prompter(loaded, rewards.make_task(cfg.task), False)
        verifier = bn.Verifier(run, loaded, prompter)
        problems = [(n, prompter.task.problem("train", 9, n)) for n in range(3)]
        return run, loaded, verifier, problems

    return made


@pytest.fixture
def ended(monkeypatch):
    """What the searches of a test hand to describe_search: lists of (row, score)."""
    kept, describe = [], bn.describe_search

    def spy(task, rows, drawn):
        kept.append(rows)
        return describe(task, rows, drawn)

    monkeypatch.setattr(bn, "describe_search", spy)
    return kept


@pytest.mark.parametrize("method", ["beam", "dvts"])
def test_width_1_is_independent_samples(made, ended, method):
    """Step by step, waiting for each other, the rows write what the shared sampler writes."""
    run, model, verifier, problems = made("--N 4 --width 1")
    found = bn.search(model, verifier, problems, method)
    done = bn.rollout(run, model, verifier.prompter, problems, 4, 60, 0)
    for p, group in enumerate(rewards.in_groups(done, 4)):
        rows = sorted(row.tokens for row, _ in ended[p])
        assert rows == sorted(c.tokens for c in group)
        assert found[p]["tokens"] == sum(len(c.tokens) for c in group)
        assert found[p]["answers"] == sum(c.finished for c in group)
        likely = sorted(score for _, score in ended[p])
        expected = sorted(math.exp(rewards.mean(c.logprobs)) for c in group)
        assert likely == pytest.approx(expected, abs=1e-6)


def test_dvts_of_one_tree_is_a_beam(made):
    _, model, verifier, problems = made("--N 4 --width 4 --score random")
    beam, dvts = (bn.search(model, verifier, problems, name) for name in ("beam", "dvts"))
    assert beam == dvts


def test_copies_go_on_from_their_own_cache(made, ended, monkeypatch):
    """Likelihoods are those of one plain pass; every draw counts, also of pruned rows."""
    _, model, verifier, problems = made("--N 4 --width 2")
    go_on, rounds, began, drawn = bn.go_on, [], [0] * 12, []

    def spy(s, kept, size, width):
        drawn.append(sum(s.count.tolist()) - sum(began))
        before = [s.tokens[slot, :n].tolist() for slot, n in zip(s.rows, s.count, strict=True)]
        rounds.append((len(before), len(kept)))
        go_on(s, kept, size, width)
        began[:] = s.count.tolist()
        after = [s.tokens[slot, :n].tolist() for slot, n in zip(s.rows, s.count, strict=True)]
        assert len(set(s.rows.tolist())) == len(after) == 2 * len(kept)
        assert {tuple(text) for text in after} == {tuple(before[i]) for i in kept}

    monkeypatch.setattr(bn, "go_on", spy)
    found = bn.search(model, verifier, problems, "beam")
    assert rounds[0][0] == 12 and sum(kept for _, kept in rounds) > 0
    assert sum(outcome["tokens"] for outcome in found) == sum(drawn)
    for rows in ended:
        for row, score in rows:
            text = torch.tensor([row.prompt + row.tokens])
            logits = model.logits(model(text[:, :-1])[0, -len(row.tokens) :])
            logprobs = logits.log_softmax(-1)[range(len(row.tokens)), row.tokens]
            assert score == pytest.approx(float(logprobs.detach().mean().exp()), rel=1e-5)


@pytest.mark.parametrize("kind, reduce", [("pair", "last"), ("process", "last"), ("process", "min")])
def test_scores_are_the_reward_models(made, tmp_path, kind, reduce):
    model = rm.load_model(ROOT / "models" / "tiny-draft")
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 1)
    rm.save_model(model, tmp_path)
    rm.save_head(head, tmp_path, {"kind": kind})
    _, _, verifier, problems = made(f"--verifier {tmp_path} --reduce {reduce}", double=False)
    encode, text = verifier.prompter.encode, "1+2=3<9\n3+4=7<9\n"
    row = encode(verifier.prompter.text(problems[0][1])), encode(text)
    whole = [row[0] + row[1][: n + 1] for n, i in enumerate(row[1]) if "\n" in verifier.prompter.decode([i])]
    steps = [1 / (1 + math.exp(-r)) for r in rm.score_rows(model, head, whole)]
    assert len(steps) == 2
    expected = steps[-1] if reduce == "last" else min(steps)
    whole = row[0], row[1][:-1] + model.eos_ids[:1]  # the last step of an answer ends with a text
    assert verifier.rate([row, row]) == pytest.approx([expected] * 2, abs=1e-5)
    assert kind != "process" or verifier.rate([whole]) == pytest.approx([expected], abs=1e-5)


def test_rule_is_pass_at_n_and_the_search_is_read(run, cwd):
    """A run of the experiment: the ceiling is pass@N, and its scores are those of the texts."""
    tool = load(ROOT / "docs" / "experiments" / "best_of_n.py")
    flags = "--model tiny-rl --eval_problems 4 --N 4 --probe 1 --max_new_tokens 90 --out a"
    cfg = bn.parse_config(bn.Config, flags.split())
    assert bn.solve(cfg, tool.SearchReader) == 0
    last = lines_of(cwd / "a" / "metrics.jsonl")[-1]
    records = rewards.read_json(cwd / "a" / "step-000004" / "records.json")["records"]
    right = [[x["score"]["rule"] for x in record["answers"]] for record in records]
    assert last["eval/accuracy/best_rule@4"] == rewards.mean(max(row) for row in right)
    assert last["eval/accuracy/majority@1"] == rewards.mean(x for row in right for x in row)
    for record_ in records:
        for x in record_["answers"]:
            assert (x["score"]["fsf"] == -1.0) == (x["score"]["claim"] == 0.0)
