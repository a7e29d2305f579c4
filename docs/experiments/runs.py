"""What the experiments that run scripts as processes share: arguments, runs, claims.

A folder --out that holds a finished part is gone on with.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from docs.results import holds

ROOT = Path(__file__).resolve().parent.parent.parent
FINISHED = "go on: ", "holds records"  # what scripts say in the end


def parser_of(doc: str) -> argparse.ArgumentParser:
    """--seed and --out; its help is the experiment's docstring."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Path, list[str]]:
    """The arguments, the folder, which is there then, and the flags of the seed."""
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    return args, args.out.resolve(), ["--seed", str(args.seed)]


def run_script(out: Path, script: str, *flags: str) -> list[dict]:
    """A script as a process, unless its run is there; the lines of its metrics.jsonl."""
    log = out.with_suffix(".log")
    said = log.read_text() if log.exists() else ""
    if not any(words in said for words in FINISHED):
        began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        with log.open("w") as file:
            command = [sys.executable, str(ROOT / script), *flags, "--out", str(out)]
            subprocess.run(command, cwd=ROOT, stdout=file, check=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began
        print(f"{out.name}: {used:.0f} CPU seconds", flush=True)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def evaluations(rows: list[dict]) -> list[dict]:
    """Those of a run by step: the start first, though a script looks at it last."""
    by_step = {row["step"]: row for row in rows if "eval/accuracy" in row}
    return [by_step[step] for step in sorted(by_step)]


def write_traces(path: Path, *flags: str) -> list[dict]:
    """The lines that more/traces.py makes, unless they are there."""
    if not path.exists():
        command = [sys.executable, str(ROOT / "more/traces.py"), *flags, "--out", str(path)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_jsonl(path: Path, lines: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def last_checkpoint(run: Path) -> Path:
    return max(run.glob("step-*"))


def show_claims(values: dict[str, float], claims: list[str]) -> None:
    """Every value, as docs/results keeps it, and which claims hold."""
    print(json.dumps({name: round(value, 4) for name, value in values.items()}, indent=2))
    for claim in claims:
        print(f"{'held' if holds(claim, values) else 'NOT held':9}{claim}")
