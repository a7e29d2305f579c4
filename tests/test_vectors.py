"""Verifiers, shaped rewards and tasks on numbers that the reference implementations gave.

Cases of level `must` or `recommended` have to agree; `optional` and `either` may not crash.
"""

import pytest
from conftest import vectors

import rewards
from more import tasks


def cases(file: str, section: str, *keys: str, keep=lambda case: True):
    """A parametrize mark with the cases of a section (of one of its lists)."""
    found = vectors(file)[section]
    for key in keys:
        found = found[key]
    found = [found] if isinstance(found, dict) else list(filter(keep, found))
    names = [str(case.get("id", i)) for i, case in enumerate(found)]
    return pytest.mark.parametrize("case", found, ids=names)


def check(file: str, case: dict, got, expected) -> None:
    """Compare by the level of the case; an expectation of None allows everything."""
    free = expected is None or case.get("level") in ("either", "optional")
    assert free or got == expected, (file, case)


def near(file: str, case: dict, got, expected, tolerance: float = 1e-12) -> None:
    assert got == pytest.approx(expected, rel=tolerance, abs=tolerance), (file, case)


@cases("grpo", "countdown")
def test_countdown(case):
    end = case["end_token"] or ""
    result = rewards.score_countdown(case["response"], case["numbers"], case["target"], eos=end)
    check("grpo", case, result["correct"], case["expected"]["correct"])
    check("grpo", case, bool(result["format"]), case["expected"]["strict_format"])


VERDICTS = {  # section: our word on a case, the expected one
    "math": lambda c: (rewards.math_equal(c["gold"], c["pred"]), c["equal"]),
    "gsm8k": lambda c: (rewards.score_gsm8k(c["response"], c["gold"])["correct"], c["expected"]),
    "multiply": lambda c: (
        tasks.score_multiplication(c["response"], c["a"], c["b"])["correct"],
        c["expected"],
    ),
    "reflection_keywords": lambda c: (rewards.reflection_count(c["text"]), c["oat_zero_count"]),
}


@pytest.mark.parametrize("section", VERDICTS)
def test_verdicts(section):
    for case in vectors("grpo")[section]:
        check("grpo", case, *VERDICTS[section](case))


@cases("grpo", "pass_at_k", keep=lambda case: case["pass_at_k"] is not None)
def test_codex_eq1_pass_at_k(case):
    near("grpo", case, rewards.pass_at_k(case["n"], case["c"], case["k"]), case["pass_at_k"])


@cases("grpo", "language_consistency")
def test_language_consistency(case):
    share = rewards.language_consistency(case["text"], case["target"])
    check("grpo", case, case["min"] <= share <= case["max"], True)


@cases("grpo", "soft_overlong")
def test_dapo_eq13_soft_overlong(case):
    got = rewards.soft_overlong(case["length"], case["max_len"], case["cache"])
    near("grpo", case, got, case["reward"])


@cases("ppo_nsr", "cosine_reward", "cases")
def test_sec42_cosine_reward(case):
    values = {name: case[name] for name in ("length", "correct", "r0c", "rLc", "r0w", "rLw")}
    values |= {"r_exceed": case["re"] or 0.0, "max_length": case["Lmax"]}  # None is 0 there
    near("ppo_nsr", case, rewards.cosine_reward(**values, margin=16), case["expected"])
    near("ppo_nsr", case, rewards.cosine_reward(**values), case["expected_margin0"])


@cases("ppo_nsr", "repetition_penalty", "dense", keep=lambda case: not case["only_start"])
def test_algorithm1_repetition_penalty(case):
    got = rewards.repetition_penalty(case["tokens"][: case["gen_length"]], case["N"], case["P"])
    near("ppo_nsr", case, got + [0.0] * (case["num_actions"] - len(got)), case["expected"])


@cases("grpo", "solvable")
def test_solvable(case):
    solution = tasks.solve_countdown(case["numbers"], case["target"])
    check("grpo", case, solution is not None, case["solvable"])
    if solution is not None:
        value, numerals = rewards.parse_expression(solution)
        assert value == case["target"] and sorted(numerals) == sorted(case["numbers"])


@cases("sft_data", "generalpoints", "cases")
def test_generalpoints(case):
    task = tasks.GeneralPoints(rule=int(case["rule"].removeprefix("face")))
    numbers = [min(task.rule, tasks.RANKS[card]) for card in case["cards"]]
    assert numbers == case["numbers"]
    problem = {"kind": "solve", "failed": [], "numbers": numbers, "target": case["target"]}
    parts = task.score(f"</think><answer>{case['formula']}</answer>", problem)
    if "spaces" in case.get("choice", ""):  # ours strips them
        case |= {"level": "either"}
    got = {"verdict": parts["verdict"], "reward": parts["points"], "correct": parts["correct"]}
    check("sft_data", case, got, case["expect"])


@cases("sft_data", "generalpoints", "extraction")
def test_generalpoints_extraction(case):
    check("sft_data", case, str(tasks.points_formula(case["output"])), case["reference_formula"])


@cases("sft_data", "generalpoints", "episodes")
def test_generalpoints_episodes(case):
    """The attempts as outputs that earn just these points; the verifier stops after five."""
    outputs = {5: "3*10-6*1", -1: "3*10+6*1", -2: "3*10-6", -3: "3*(10"}
    task, parts = tasks.GeneralPoints(), []
    problem = {"kind": "solve", "failed": [], "target": 24, "numbers": [1, 3, 10, 6]}
    for text in (f"</think><answer>{outputs[x]}</answer>" for x in case["attempt_rewards"]):
        if not parts or not parts[-1]["correct"]:
            parts.append(task.score(text, problem))
            problem = task.revise(problem, text)
    checked = sum(part["verdict"] != "limit" for part in parts)
    got = [parts[-1]["correct"], len(parts), checked, sum(part["points"] for part in parts)]
    names = ("success", "generated", "checked", "return_undiscounted")
    check("sft_data", case, got, [case[name] for name in names])


@cases("sft_data", "knights_knaves")
def test_knights_knaves(case):
    task, statements = tasks.KnightsAndKnaves(), case["statements"]
    problem = {"statements": statements, "names": case["people"]}
    check("sft_data", case, list(map(list, tasks.solve_knights(statements))), case["solutions"])
    check("sft_data", case, task.puzzle(problem), case["text"])
    thought, roles = task.search(statements)
    end = tasks.letters_of(roles) or "none"
    check("sft_data", case, f"{thought}={end}".replace("\n", ""), case["compact_trace"])
    for answer in (case["answer"], end) if case["well_posed"] else ():
        check("sft_data", case, task.score(f"<answer>{answer}</answer>", problem)["correct"], True)


@cases("sft_data", "navigation")
def test_navigation(case):
    for space in ("absolute", "relative"):
        word = tasks.turn_word(case["previous_heading"], case["new_heading"], space)
        check("sft_data", case, f"turn_direction({word})", case[f"{space}_action"])


@cases("sft_data", "toy_code", "run")
def test_toy_programs(case):
    check("sft_data", case, list(tasks.run_toy(case["program"], case["args"])), case["result"])


@cases("sft_data", "toy_code", "problem")
def test_toy_code(case):
    """Shares of tests passed, of programs as answers."""
    problem, found = {"shown": [], "tests": case["tests"]}, []
    for program in case["candidates"]:
        parts = tasks.ToyCode().score(f"</think><answer>{program}</answer>", problem)
        found.append([parts["passed"], parts["tests"]])
    check("sft_data", case, found, case["passed_total"])
