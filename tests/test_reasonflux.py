"""more/reasonflux.py: retrieval, rewards, pairs, losses; its runs: test_scripts.py. Its task."""

import json
from math import log
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, FakeRun, close, eight_answers, float64, lines_of
from safetensors.torch import load_file

from more import reasonflux as rf
from more import tasks
from rewards import heldout, make_task, split_of


def entry(name: str, about: str) -> list[dict]:
    """A template of the released form."""
    told = {"description": about, "application_scenario": "x", "reason_flow": ["Look.", "Do."]}
    return [{"template_name": name, "template_type": "t", "knowledge_tag": [about[:3]], **told}]


LIBRARY = {
    "algebra": {"roots": entry("Vieta", "sum of roots"), "powers": entry("Logs", "take logs")},
    "geometry": {"circles": entry("Chord", "power of a point")},
}


@pytest.fixture
def library(cwd) -> list[dict]:
    (cwd / "library.json").write_text(json.dumps(LIBRARY))
    return rf.read_library("library.json")


def test_library_is_read_in_order_with_what_each_reader_gets(library):
    assert library[0]["guide"] == "Method: Vieta. sum of roots\n- Look.\n- Do."
    assert library[2]["about"] == "geometry circles Chord pow power of a point x"
    own, signs = rf.read_library("more/templates.json"), "add subtract multiply divide".split()
    names = [f"{a}, then {b}" + " again" * (a == b) for a in signs for b in signs]
    assert [t["name"].lower() for t in own] == names  # in the order of the letters


def test_eq6_by_hand(library):
    """From chapter to section to template, by tf-idf of words that the library has."""
    vectors = float64([[0, 0, 1], [1, 0, 0], [0.8, 0.6, 0]])
    # Logs itself, but nearer to geometry, 0.8, than to algebra's mean, 0.71
    assert rf.match(float64([1, 0, 0]), library, vectors) == 2
    assert rf.match(float64([0.9, 0, 0.5]), library, vectors) == 1  # 0.99; then 0.9 over 0.5
    assert rf.match(float64([0.5, 0, 0.9]), library, vectors) == 0
    assert rf.match(float64([0, 0, 0]), library, vectors) == 0  # the first of equals
    vectors = rf.tfidf(["a b", "a", "A c"], ["a, b b z", "zz"])
    weights = float64([0.0, 1.0, 2 * (log(2) + 1)])  # log(4/4) + 1; log(4/2) + 1, twice
    assert close(vectors[0].sort().values, weights / weights.norm(), 1e-6) and not vectors[1].any()


def test_a_name_is_exact_else_the_nearest_and_counted(library):
    said, asked = [], rf.Asked(None, library, tiny=False)
    run = SimpleNamespace(say=said.append)
    texts = ["Chord\nmore", " Logs", "take the logs", "the power of points, circles", "Chord"]
    places, named = rf.find_templates(run, asked, texts)
    assert places == [2, 1, 1, 2, 2] and named == [True, True, False, False, True]
    assert said == ['navigator named "take the logs": no such template; nearest "Logs"; 2 plans']
    assert rf.find_templates(run, rf.Asked(None, library, tiny=True), ["B", "C"])[0] == [1, 2]


def test_eq2_eq3_are_exact_with_a_stub_solver():
    """Its first answer is right if the plan divides the target, its second if that is not 6."""
    seen = []

    def solve(problems):
        seen.extend((p["target"], p["plan"]) for p in problems)
        right = [[p["target"] % p["plan"] == 0, p["target"] != 6] for p in problems]
        return [[SimpleNamespace(score={"correct": x}) for x in pair] for pair in right]

    x_sim = [[{"target": 6}, {"target": 5}, {"target": 4}], [{"target": 6}]]
    rewards, first = rf.plan_rewards(solve, [2, 4], x_sim)
    assert rewards == [pytest.approx((1 + 0 + 0 + 1 + 1 + 1) / 6), 0.0]
    assert [c.score["correct"] for c in first] == [True, False, False, False]
    assert seen == [(6, 2), (5, 2), (4, 2), (6, 4)]
    assert rf.plan_pairs([0.5, 0.25, 0.75, 0.5], 0.25) == [(2, 1)]  # 0.25 is not more
    assert rf.plan_pairs([0.5, 0.25, 0.75], 0.1) == [(0, 1), (2, 0), (2, 1)]


def test_x_sim_is_of_the_numbers_split_and_pattern_of_the_problem():
    task, count = make_task("patterns"), 0
    for problem in heldout(task, 40):
        like = rf.similar(task, problem, 4)
        assert like[0] == problem and len(like) <= 4 and like == rf.similar(task, problem, 4)
        assert set.intersection(*[set(task.reaching(x)) for x in like])
        assert {split_of(task.key(x)) for x in like} == {"test"}
        count += len(like) - 1
    assert count and rf.similar(object(), problem, 4) == [problem]


def test_navigator_and_solver_see_the_same_problem(library):
    problem, task = {"numbers": [7, 1, 5], "target": 2}, make_task("patterns")
    asked, guided = rf.Asked(task, library, tiny=True), problem | {"plan": 1}
    assert asked.compact(problem) == "7,1,5=2" and "Vieta" not in asked.question(problem)
    assert asked.compact(guided) == "7,1,5=2B<think>" == task.compact(problem | {"template": 1})
    assert asked.question(guided).endswith("Method: Logs. take logs\n- Look.\n- Do.")
    right = "</think><answer>7-1*5</answer>"
    assert asked.score(right, guided)["correct"] and not asked.score(right, problem)["correct"]


def test_eq4_eq5_by_hand():
    """h = 2 log 3, beta 1/2: -log sigma(log 3) = -log 3/4."""
    logps, lengths = float64([[log(3)], [-log(3)]]), float64([[2], [5]])
    loss, margin = rf.preference_loss(logps, 0 * logps, lengths, 0.5, 0.1)
    assert loss.item() == pytest.approx(-log(0.75) - 0.1 * log(3) / 2)
    assert margin.item() == pytest.approx(log(3))
    assert rf.preference_loss(logps, logps, lengths, 3.0, 0.0)[0].item() == pytest.approx(log(2))


ANSWERS = eight_answers()
PAIRS = [([46, 47, 3, 50][: 1 + i], ANSWERS[2 * i], ANSWERS[2 * i + 1]) for i in range(4)]
REF = float64([[-9, -30, -5, -70], [-80, -150, -60, -20]])


def test_gradients_are_those_of_eq1_and_eq5_whatever_the_split_and_the_ranks(small):
    """Against autograd, a row at a time: only answers are learnt, pads change nothing."""
    model = rf.load_model(small).double()

    def gradient():
        found = torch.cat([weight.grad.flatten() for weight in model.parameters()])
        model.zero_grad()
        return found

    logps = torch.zeros(2, 4, dtype=torch.float64)
    for i, (asked, *answers) in enumerate(PAIRS):
        for side, answer in enumerate(answers):
            ids = torch.tensor([asked + answer])
            logprobs = model.logits(model(ids[:, :-1])).log_softmax(-1)
            logps[side, i] = logprobs.gather(-1, ids[:, 1:, None])[0, len(asked) - 1 :].sum()
    lengths = float64([[len(pair[side]) for pair in PAIRS] for side in (1, 2)])
    loss = rf.preference_loss(logps, REF, lengths, 0.1, 0.5)[0].mean()
    loss.backward(retain_graph=True)
    preference = gradient()
    (-logps[0].sum() / lengths[0].sum()).backward()
    structure = gradient()
    for world, limit in ((1, 10**6), (1, 1), (3, 64)):
        cfg = rf.Config(micro_batch_tokens=limit, beta=0.1, sft_coef=0.5)
        runs = [FakeRun(cfg, rank, world) for rank in range(world)]
        found = sum(rf.learn_pairs(run, model, PAIRS, REF)["loss"] for run in runs)
        assert close(gradient(), preference, 1e-10) and found == pytest.approx(loss.item())
        for run in runs:
            rf.learn_structure(run, model, [pair[:2] for pair in PAIRS])
        assert close(gradient(), structure, 1e-10)
    assert close(sum(rf.plan_logprobs(run, model.float(), PAIRS) for run in runs), logps, 1e-3)


def test_eq1_rows_tell_a_templates_scope_and_others_any_name(small, library):
    model, cfg = rf.load_model(small), rf.Config(batch_size=80)
    planner = rf.Prompter(model, rf.Asked(make_task("patterns"), library, tiny=True), False)
    rows = rf.structure_rows(cfg, planner, [1], 2)
    texts = [[planner.decode(ids) for ids in row] for row in rows]
    told = {"A (sum):": "sum of roots", "B (tak):": "take logs", "C (pow):": "power of a point"}
    assert dict(texts[::8]) == {asked: f" {answer} x<eos>" for asked, answer in told.items()}
    others = [answer for asked, answer in texts if asked[-1].isdigit()]
    assert set(others) == {"A<eos>", "B<eos>", "C<eos>"} and len(others) == 70


def test_pairs_are_of_named_plans_and_the_solver_stays_as_it_was(run, cwd, monkeypatch):
    solvers, real = [], rf.solve_guided

    def solve_guided(run, solver, *args):
        solvers.append(solver)
        return real(run, solver, *args)

    def score(self, text, problem, **options):
        return {"format": 0.0, "answer": None, "correct": len(text) % 2 == 0, "total": 0.0}

    monkeypatch.setattr(tasks.Countdown, "score", score)
    monkeypatch.setattr(rf, "solve_guided", solve_guided)
    done = run("more.reasonflux", "--out a --lr 0.01")
    assert done.code == 0 and len({*map(id, solvers)}) == 1, done.err
    on_disk = load_file(ROOT / "models" / "tiny-solver" / "model.safetensors")
    for name, weight in solvers[0].named_parameters():
        assert torch.equal(weight, on_disk[name].float()) and not weight.requires_grad
    assert (rows := lines_of(cwd / "a" / "samples.jsonl"))
    for better, worse in zip(rows[::2], rows[1::2], strict=True):
        assert better["advantage"] > worse["advantage"] + 0.1 - 1e-4  # R, four decimals
        assert better["group"] == worse["group"]
        assert len({better["pieces"][0], worse["pieces"][0]} & set(rf.LETTERS[:16])) == 2


def test_traces_try_the_pattern_named_and_nothing_else():
    task, right = make_task("patterns:guided=0.8"), 0
    for i in range(300):
        problem = task.problem("train", 0, i)
        place, text = problem["template"], task.trace(problem, None)
        lines = text.partition("</think>")[0].splitlines()
        for line in lines:
            done = [step for step, _ in tasks.operations(line.partition("=")[0])]
            signs = [step.lstrip("0123456789")[0] for step in done]
            assert signs == ["+-*/"[place // 4], "+-*/"[place % 4]]
        scored = task.score(text, problem)["correct"]
        right += scored
        assert scored == (place in task.reaching(problem))
        assert scored or len(lines) == len(task.attempts(problem, place))
    assert 0.7 < right / 300 < 0.9
