"""Every case of the vector files, whose numbers come from running the reference implementations.

The folder is tests/vectors, or the one that the environment variable VECTORS names: any file of the same name
and schema is read; missing files and sections are skipped. Levels: `must` and `recommended` have to agree, a
deviation from `recommended` needs its reason in DEVIATIONS; `optional` and `either` only must not crash.
"""

import json
import os
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rewards  # noqa: E402
from more import tasks  # noqa: E402

FOLDER = Path(os.environ.get("VECTORS") or Path(__file__).parent / "vectors")
DEVIATIONS = {}  # id of a `recommended` case: why ours differs

# Which test reads a section. A section that stands neither here nor in NOT_IMPLEMENTED is a failure.
READ = {
    "grpo": {
        "countdown": "test_countdown",
        "math": "test_math",
        "gsm8k": "test_gsm8k",
        "multiply": "test_multiply",
        "pass_at_k": "test_pass_at_k",
        "pass_at_k_dataset": "test_pass_at_k_dataset",
        "solvable": "test_solvable",
        "reflection_keywords": "test_reflection_keywords",
        "language_consistency": "test_language_consistency",
        "soft_overlong": "test_soft_overlong",
        "grpo_advantages": "tests/test_grpo.py",
        "grpo_loss": "tests/test_grpo.py",
    },
    "ppo_nsr": {
        "cosine_reward": "test_cosine_reward",
        "repetition_penalty": "test_repetition_dense",
        "gae": "tests/test_ppo.py",
        "ppo_losses": "tests/test_ppo.py",
        "kl": "tests/test_ppo.py",
        "pass_at_k": "test_ppo_pass_at_k, test_ppo_pass_at_k_dataset",
        "nsr_psr_wreinforce": "tests/test_nsr.py",
    },
    "sft_data": {
        "generalpoints": "test_generalpoints, test_generalpoints_extraction, test_generalpoints_episodes",
        "knights_knaves": "test_knights_knaves",
        "navigation": "test_navigation",
        **dict.fromkeys(("loss_normalisation", "lr_schedule"), "tests/test_sft.py"),
        "selection": "tests/test_traces.py",
    },
    "latent": {
        "coconut": "tests/test_coconut.py",
        "prosqa_graphs": "tests/test_tasks.py",
        "recurrent_depth": "tests/test_recurrent_depth.py",
    },
    "test_time": {
        "budget_forcing": "tests/test_budget_forcing.py",
        "budget_forcing_readme": "tests/test_budget_forcing.py",
        "rejection_sampling": "tests/test_budget_forcing.py",
        "metrics": "tests/test_budget_forcing.py",
        "voting": "tests/test_budget_forcing.py",
        "specreason": "tests/test_specreason.py",
        "speculative_decoding": "tests/test_specreason.py",
    },
}
NOT_IMPLEMENTED = {
    "ppo_nsr": {
        "nsr_psr_wreinforce.entropy_bonus_ascent": "no entropy bonus in nsr.py",
        "nsr_psr_wreinforce.unlikelihood_descent": "the paper's comparison in appendix B, which it does not train on",
        "kl.adaptive_controller": "all papers here keep the coefficient fixed",
        "classic_reward": "no script uses it: the paper trains with cosine_reward",
        "prime": "not planned now",
        "repetition_penalty.sparse": "the share of repeated n-grams of words: no script uses it",
        "repetition_penalty.dense with only_start": "an option of the reference that no script uses",
    },
    "sft_data": {
        **dict.fromkeys(("countdown", "multiplication"), "counts and traces of another grammar"),
        "packing": "sft.py pads rows sorted by length instead",
        **dict.fromkeys(("acecoder", "dpo", "veripo_toy", "toy_code"), "not planned now"),
    },
    "test_time": {"kinetics": "not planned now"},
}
# of a file without a "sections" object
NOT_SECTIONS = ("source", "readme", "format", "half", "notes", "weights_file", "tolerance", "title", "conventions")
COUNTS = Counter()  # (file, "compared" or "only run")


def sections(file: str) -> dict:
    path = FOLDER / f"{file}.json"
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content.get("sections", {k: v for k, v in content.items() if k not in NOT_SECTIONS})


def cases(file: str, section: str, *keys: str, keep=lambda case: True):
    """A parametrize mark with the cases of a section (of one of its lists), none if it is missing."""
    found = sections(file).get(section, {})
    for key in keys:
        found = found.get(key, {})
    found = [found] if found and isinstance(found, dict) else list(filter(keep, found))
    names = [str(case.get("id", i)) for i, case in enumerate(found)]
    return pytest.mark.parametrize("case", found, ids=names)


def check(file: str, case: dict, got, expected) -> None:
    """Compare by the level of the case; an expectation of None allows everything."""
    free = expected is None or case.get("level") in ("either", "optional") or case.get("id") in DEVIATIONS
    COUNTS[file, "only run" if free else "compared"] += 1
    assert free or got == expected, f"{case.get('why') or case.get('note') or ''}: {case}"


def near(file: str, case: dict, got, expected, tolerance: float = 1e-12) -> None:
    COUNTS[file, "compared"] += 1
    assert got == pytest.approx(expected, rel=tolerance, abs=tolerance), case


@cases("grpo", "countdown")
def test_countdown(case):
    end = case["end_token"] or ""
    result = rewards.score_countdown(case["response"], case["numbers"], case["target"], eos=end)
    check("grpo", case, result["correct"], case["expected"]["correct"])
    check("grpo", case, bool(result["format"]), case["expected"]["strict_format"])


@cases("grpo", "math")
def test_math(case):
    check("grpo", case, rewards.math_equal(case["gold"], case["pred"]), case["equal"])


@cases("grpo", "gsm8k")
def test_gsm8k(case):
    check("grpo", case, rewards.score_gsm8k(case["response"], case["gold"])["correct"], case["expected"])


@cases("grpo", "multiply")
def test_multiply(case):
    result = rewards.score_multiplication(case["response"], case["a"], case["b"])
    check("grpo", case, result["correct"], case["expected"])


@cases("grpo", "pass_at_k")
def test_pass_at_k(case):
    if case["pass_at_k"] is None:
        with pytest.raises(ValueError):
            rewards.pass_at_k(case["n"], case["c"], case["k"])
        COUNTS["grpo", "compared"] += 1
    else:
        near("grpo", case, rewards.pass_at_k(case["n"], case["c"], case["k"]), case["pass_at_k"])


def check_dataset(file: str, case: dict, expected: dict[str, float]) -> None:
    counts = case["correct_counts"]
    for k, value in expected.items():
        mean = sum(rewards.pass_at_k(case["n"], c, int(k)) for c in counts) / len(counts)
        near(file, case, mean, value)


@cases("grpo", "pass_at_k_dataset")
def test_pass_at_k_dataset(case):
    check_dataset("grpo", case, case["mean_pass_at_k"])


@cases("grpo", "solvable")
def test_solvable(case):
    solution = tasks.solve_countdown(case["numbers"], case["target"])
    check("grpo", case, solution is not None, case["solvable"])
    if solution is not None:
        value, numerals = rewards.parse_expression(solution)
        assert value == Fraction(case["target"]) and Counter(numerals) == Counter(case["numbers"])


@cases("grpo", "reflection_keywords")
def test_reflection_keywords(case):
    count = rewards.reflection_count(case["text"])
    check("grpo", case, count, case["oat_zero_count"])
    check("grpo", case, count > 0, case["oat_zero_has"])


@cases("grpo", "language_consistency")
def test_language_consistency(case):
    share = rewards.language_consistency(case["text"], case["target"])
    check("grpo", case, case["min"] <= share <= case["max"], True)


@cases("grpo", "soft_overlong")
def test_soft_overlong(case):
    near("grpo", case, rewards.soft_overlong(case["length"], case["max_len"], case["cache"]), case["reward"])


@cases("ppo_nsr", "cosine_reward", "cases")
def test_cosine_reward(case):
    values = {name: case[name] for name in ("length", "correct", "r0c", "rLc", "r0w", "rLw")}
    values |= {"r_exceed": case["re"] or 0.0, "max_length": case["Lmax"]}  # the reference reads None as 0
    near("ppo_nsr", case, rewards.cosine_reward(**values, margin=16), case["expected"])
    near("ppo_nsr", case, rewards.cosine_reward(**values), case["expected_margin0"])


@cases("ppo_nsr", "repetition_penalty", "dense", keep=lambda case: not case["only_start"])
def test_repetition_dense(case):
    got = rewards.repetition_penalty(case["tokens"][: case["gen_length"]], case["N"], case["P"])
    near("ppo_nsr", case, got + [0.0] * (case["num_actions"] - len(got)), case["expected"])


@cases("ppo_nsr", "pass_at_k", "cases")
def test_ppo_pass_at_k(case):
    near("ppo_nsr", case, rewards.pass_at_k(case["n"], case["c"], case["k"]), case["expected"])


@cases("ppo_nsr", "pass_at_k", "datasets")
def test_ppo_pass_at_k_dataset(case):
    check_dataset("ppo_nsr", case, case["pass_at_k"])


@cases("sft_data", "generalpoints", "cases")
def test_generalpoints(case):
    task = tasks.GeneralPoints(rule=int(case["rule"].removeprefix("face")))
    numbers = [tasks.RANKS[c] if task.rule == 13 else min(10, tasks.RANKS[c]) for c in case["cards"]]
    assert numbers == case["numbers"]
    problem = {"kind": "solve", "rule": task.rule, "cards": case["cards"], "numbers": numbers, "failed": []}
    parts = task.score(f"</think><answer>{case['formula']}</answer>", problem | {"target": case["target"]})
    case = case | {"level": "either" if "spaces" in case.get("choice", "") else "must"}  # ours strips them
    got = {"verdict": parts["verdict"], "reward": parts["points"], "correct": parts["correct"]}
    check("sft_data", case, got, case["expect"])


@cases("sft_data", "generalpoints", "extraction")
def test_generalpoints_extraction(case):
    check("sft_data", case, str(tasks.points_formula(case["output"])), case["reference_formula"])


@cases("sft_data", "generalpoints", "episodes")
def test_generalpoints_episodes(case):
    """The attempts as outputs that earn just these points; the verifier stops after five."""
    task, outputs = tasks.GeneralPoints(), {5: "3*10-6*1", -1: "3*10+6*1", -2: "3*10-6", -3: "3*(10"}
    problem = {"kind": "solve", "rule": 10, "cards": ["A", "3", "K", "6"], "numbers": [1, 3, 10, 6]}
    problem |= {"target": 24, "failed": []}
    parts = []
    for points in case["attempt_rewards"]:
        text = f"</think><answer>{outputs[points]}</answer>"
        parts.append(task.score(text, problem))
        if parts[-1]["correct"]:
            break
        problem = task.revise(problem, text)
    checked = sum(part["verdict"] != "limit" for part in parts)
    total = sum(part["points"] for part in parts)
    got = (parts[-1]["correct"], len(parts), checked, total)
    names = ("success", "generated", "checked", "return_undiscounted")
    check("sft_data", case, got, tuple(case[name] for name in names))


@cases("sft_data", "knights_knaves")
def test_knights_knaves(case):
    task, problem = tasks.KnightsAndKnaves(), {"statements": case["statements"], "names": case["people"]}
    solutions = [[bool(role) for role in roles] for roles in tasks.solve_knights(case["statements"])]
    check("sft_data", case, solutions, case["solutions"])
    check("sft_data", case, task.puzzle(problem), case["text"])
    thought, roles = task.search(case["statements"])
    end = tasks.letters_of(roles) or "none"
    check("sft_data", case, f"{thought}={end}".replace("\n", ""), case["compact_trace"])
    if case["well_posed"]:
        for answer in (case["answer"], end):
            check("sft_data", case, task.score(f"</think><answer>{answer}</answer>", problem)["correct"], True)


@cases("sft_data", "navigation")
def test_navigation(case):
    for space in ("absolute", "relative"):
        word = tasks.turn_word(case["previous_heading"], case["new_heading"], space)
        check("sft_data", case, f"turn_direction({word})", case[f"{space}_action"])


@pytest.mark.parametrize("file", READ)
def test_every_section_is_known(file):
    unread = set(sections(file)) - set(READ[file]) - set(NOT_IMPLEMENTED.get(file, {}))
    assert not unread, f"{file}.json has sections that no test reads: {sorted(unread)}"
    named = {name for tests in READ[file].values() for name in tests.split(", ") if name.startswith("test_")}
    assert named <= set(globals()), f"tests that do not exist: {sorted(named - set(globals()))}"


def test_print_counts(capsys):  # the last one: pytest keeps the order of the file
    with capsys.disabled():
        for file in READ:
            present = sections(file)
            skipped = [name for name in NOT_IMPLEMENTED.get(file, {}) if name.partition(".")[0] in present]
            run, free = COUNTS[file, "compared"], COUNTS[file, "only run"]
            print(f"\n{file}.json: {run} values compared, {free} only run; not implemented: {skipped or 'none'}")
