"""Write docs/results.md from docs/results/*.json, so that no number is typed by hand.

    python docs/results.py             a table with a line for each claim, then every value
    python docs/results.py --check     changes nothing; exit code 1 if the page is out of date

A file is one experiment: the script, its commands (S is the seed), `values` with one number for each seed under a name,
and `claims`, comparisons of these names. A claim is evaluated for each seed and on the means over the seeds; it is held
where the comparison says so, and nowhere else.
"""

import argparse
import ast
import json
import operator
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "results.md"
ORDER = "grpo ppo nsr coconut recurrent_depth budget_forcing specreason sft".split()  # of the page

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
OPERATORS |= {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq}
FUNCTIONS = {"abs": abs, "min": min, "max": max}


def value_of(node: ast.expr, values: dict[str, float]) -> float:
    """An arithmetic expression of numbers, names in `values`, + - * / and abs, min, max. Anything else: ValueError."""
    match node:
        case ast.Constant(value=int() | float() as number) if number is not True and number is not False:
            return number
        case ast.Name(id=name) if name in values:
            return values[name]
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -value_of(inner, values)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](value_of(left, values), value_of(right, values))
        case ast.Call(func=ast.Name(id=name), args=inner, keywords=[]) if name in FUNCTIONS and inner:
            return FUNCTIONS[name](*(value_of(arg, values) for arg in inner))
    raise ValueError(f"{ast.unparse(node)}: numbers, names in values, + - * /, abs, min and max are allowed")


def sides(claim: str) -> list[ast.expr]:
    """What a claim compares: the expressions between its signs."""
    try:
        node = ast.parse(claim, mode="eval").body
    except SyntaxError:
        node = None
    if not isinstance(node, ast.Compare) or any(type(op) not in OPERATORS for op in node.ops):
        raise ValueError(f"{claim!r} is not a comparison with < <= > >= or ==")
    return [node.left, *node.comparators]


def holds(claim: str, values: dict[str, float]) -> bool:
    """Whether the comparison holds.

    >>> holds("after - before >= 0.3", {"before": 0.4, "after": 0.75}), holds("0 < x <= 1 / 2", {"x": 0.75})
    (True, False)
    """
    found, ops = [value_of(side, values) for side in sides(claim)], ast.parse(claim, mode="eval").body.ops
    return all(OPERATORS[type(op)](left, right) for op, left, right in zip(ops, found[:-1], found[1:], strict=True))


def load(path: Path) -> dict:
    """One experiment, checked. Raises ValueError that says what is wrong in which file."""
    about = json.loads(path.read_text(encoding="utf-8"))
    kinds = {"script": str, "claims": list, "commands": list, "seeds": list, "values": dict}
    kinds |= {"machine": str, "versions": dict, "commit": str}
    for name, kind in kinds.items():
        if not isinstance(about.get(name), kind) or not about[name] and name != "claims":
            raise ValueError(f"{path.name}: {name} is {about.get(name)!r}, a {kind.__name__} is needed")
    for name, numbers in about["values"].items():
        good = isinstance(numbers, list) and all(type(number) in (int, float) for number in numbers)
        if not name.isidentifier() or not good or len(numbers) != len(about["seeds"]):
            raise ValueError(f"{path.name}: {name} is {numbers}: one number for each of the seeds {about['seeds']}")
    return about


def of_seed(about: dict, i: int) -> dict[str, float]:
    return {name: numbers[i] for name, numbers in about["values"].items()}


def means(about: dict) -> dict[str, float]:
    return {name: sum(numbers) / len(numbers) for name, numbers in about["values"].items()}


def short(value: float) -> str:
    """
    >>> [short(v) for v in (0.71, 217, 210.380313, 0.999674, -0.0004, 1.0, 14.5)]
    ['0.710', '217', '210.4', '1.000', '0.000', '1.000', '14.5']
    """
    if type(value) is int:
        return str(value)
    return f"{value:.{3 if abs(value) < 10 else 1}f}".replace("-0.000", "0.000")


def measured(claim: str, about: dict) -> str:
    """The sides of a claim that are no constants, seed by seed: "0.372, 0.370, 0.369"."""
    told = []
    for side in sides(claim):
        if any(isinstance(node, ast.Name) and node.id in about["values"] for node in ast.walk(side)):
            told.append(", ".join(short(value_of(side, of_seed(about, i))) for i in range(len(about["seeds"]))))
    return " against ".join(told)


def verdict(claim: str, about: dict) -> str:
    """ "3 of 3", or "2 of 3; mean: no" where seeds differ; "yes" or "no" for a single seed."""
    kept = sum(holds(claim, of_seed(about, i)) for i in range(len(about["seeds"])))
    if len(about["seeds"]) == 1:
        return "yes" if kept else "**no**"
    told = f"{kept} of {len(about['seeds'])}; mean: {'yes' if holds(claim, means(about)) else 'no'}"
    return told if kept == len(about["seeds"]) else f"**{told}**"


def minutes(about: dict) -> str:
    return "not noted" if about.get("minutes") is None else f"{about['minutes']:g}"


def table(experiments: dict[str, dict]) -> str:
    """A line for each claim; the name of its experiment on the first, with a link to its values."""
    lines = ["| experiment | claim | measured | held |", "|---|---|---|---|"]
    for name, about in experiments.items():
        link = f"[{name}](#{name})"
        for claim in about["claims"]:
            cells = link, f"`{claim}`", measured(claim, about), verdict(claim, about)
            lines.append(f"| {' | '.join(cells)} |")
            link = ""
    return "\n".join(lines)


def page(experiments: dict[str, dict]) -> str:
    """docs/results.md: the claims of all experiments, then every value of each."""
    found = "# Results\n\nWritten by `python docs/results.py` from the files in docs/results/: do not edit.\n"
    found += "\nA claim is an inequality, evaluated for each seed and on the mean over the seeds.\n"
    found += f"\n{table(experiments)}\n"
    for name, about in experiments.items():
        versions = ", ".join(f"{key} {value}" for key, value in about["versions"].items())
        found += f"\n## {name}\n\n" + "".join(f"    {command}\n" for command in about["commands"])
        found += f"\n{about['script']}; minutes a seed: {minutes(about)}, {about['machine']}; {versions}; "
        found += f"commit {about['commit']}. {about.get('note', '')}".strip() + "\n"
        heads = [f"seed {seed}" for seed in about["seeds"]] + ["mean"] * (len(about["seeds"]) > 1)
        found += f"\n| value | {' | '.join(heads)} |\n" + "|" + "---|" * (1 + len(heads)) + "\n"
        for value, numbers in about["values"].items():
            row = list(map(short, numbers)) + [short(means(about)[value])] * (len(numbers) > 1)
            found += f"| {value} | {' | '.join(row)} |\n"
    return found


def all_results() -> dict[str, dict]:
    """name -> experiment, in the order of the scripts, then by name."""
    found = {path.stem: load(path) for path in sorted(FOLDER.glob("*.json"))}
    place = {f"{script}.py": i for i, script in enumerate(ORDER)}
    return dict(sorted(found.items(), key=lambda item: (place.get(item[1]["script"], len(ORDER)), item[0])))


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("results.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="say what is out of date, write nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        text = page(all_results())
    except (ValueError, ArithmeticError, OSError) as error:
        print(f"results.py: error: {error}", file=sys.stderr)
        return 2
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    if args.check:
        print("docs/results.md is out of date: run python docs/results.py")
        return 1
    PAGE.write_text(text, encoding="utf-8", newline="\n")
    print("wrote docs/results.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
