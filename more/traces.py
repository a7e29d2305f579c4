"""Data is the method: what papers do between a model's answers and the next fine-tuning.

JSONL in, JSONL out: a line is {"prompt", "completion"} and what is known of it, and `sft.py --data`
learns such a file. Lines come from one of three places, are edited, and then chosen:

    --sample N        N training problems, answered by --model and verified; what is right is kept
                      (DeepSeek-R1's third stage, arXiv:2501.12948 sec. 2.3.3)
    --traces N        the task's own traces, as sft.py learns them without --data
    --data FILE       lines from before
    --cot             cuts thoughts (2502.03373 sec. 3)
    --perturb         damages them (2502.07374 sec. 4)
    --decontaminate   drops what shares words with held-out problems (s1, 2501.19393 sec. 2.1)
    --select          s1's algorithm 1, LIMO's score (2502.03387 sec. 3), the longest, or any
    --pairs           makes {"prompt", "chosen", "rejected"} for more/dpo.py of answers to a prompt

Run
    python more/traces.py --model tiny-rl --sample 2000 --cap 2 --out out/right.jsonl
    python more/traces.py --traces 3200 --perturb shuffle:0.67 --out out/shuffled.jsonl
    python more/traces.py --data out/right.jsonl --select s1:64 --out out/chosen.jsonl
    python sft.py --model tiny-draft --data out/chosen.jsonl --lr 5e-4
    python more/traces.py --sample 320 --attempts 8 --keep all --pairs correct --cap 4 \
        --out out/pairs.jsonl
    python more/dpo.py --data out/pairs.jsonl
    docs/sft_experiments.md has the papers' experiments. torchrun shares --sample among ranks.

Differs from the papers in: no model judges; what s1 and LIMO ask weaker models (is it hard?) is
read from files that --sample wrote with these (--weak).
"""

import argparse
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path
from random import Random

import torch.distributed as dist

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # rewards.py is one folder up

from more.dpo import find_pairs
from rewards import (
    BadInput,
    Completion,
    extract_answer,
    heldout,
    in_groups,
    make_task,
    mean,
    read_jsonl,
    reading,
)
from sft import Prompter, Run, rollout, trace_example

BY_SIZE = {"max_new_tokens": (512, 512, 1024)}  # as sft.py's
LIMO_WORDS = ("check", "verify"), ("perhaps", "might"), ("therefore", "since")
DAMAGE = "shuffle", "delete", "insert", "digits", "answer"
RULES = "random", "longest", "s1", "limo"
COT = "long", "short", "none"
PAIRS = "correct", "rate", "veripo"


# ------------------------------------------------------------- where lines come from


def keep_right(group: list[Completion], keep: str, cap: int) -> list[Completion]:
    """Of the answers to one problem those to imitate, at most `cap` if that is not 0.

    They are finished, different, and unless keep is "all" right, in the strict layout and in one
    notation (arXiv:2501.12948 sec. 2.3.3). shortest: by length, from the shortest on if all were
    right, else from further on: hard problems keep long thoughts (LiteCoT's idea, 2505.19716).
    """
    chosen, num_right = {}, 0
    for c in group:
        score = c.score
        right = score["correct"] and score["format"] == 1 and not score.get("mixed")
        num_right += right
        if c.finished and (right or keep == "all"):
            chosen[c.text] = c
    chosen = list(chosen.values())
    if keep == "shortest":
        chosen.sort(key=num_tokens)
        if cap:
            wrong = 1 - num_right / len(group)
            chosen = chosen[round(wrong * max(0, len(chosen) - cap)) :]
    return chosen[: cap or None]


def num_tokens(c: Completion) -> int:
    return len(c.tokens)


def line_of(c: Completion, prompter: Prompter, solved: int, attempts: int) -> dict:
    """What is written of an answer; for s1, its domain is the set of operators it uses."""
    operators = set("+-*/") & set(c.score["answer"] or "")
    tests = {name: c.score[name] for name in ("passed", "tests") if name in c.score}
    return tests | {
        "prompt": prompter.text(c.problem),
        "completion": c.text,
        "solved": solved,
        "attempts": attempts,
        "correct": c.score["correct"],
        "format": c.score["format"],
        "domain": "".join(sorted(operators)),
    }


def sample_lines(run: Run, model, prompter: Prompter) -> list[dict]:
    """Answers to the first --sample training problems; after Ctrl-C, what there is until then."""
    cfg, lines = run.cfg, []
    for numbers in in_groups(list(range(cfg.sample)), 64):
        problems = [(n, prompter.task.problem("train", cfg.seed, n)) for n in numbers]
        done = rollout(run, model, prompter, problems, cfg.attempts, cfg.max_new_tokens, step=1)
        for group in in_groups(done, cfg.attempts):
            solved = sum(c.score["correct"] for c in group)
            for c in keep_right(group, cfg.keep, 0 if cfg.pairs else cfg.cap):
                lines.append(line_of(c, prompter, solved, cfg.attempts))
        accuracy, length = mean(c.score["correct"] for c in done), mean(map(num_tokens, done))
        seen = f"accuracy {accuracy:.3f}, completion_length {length:.0f}, kept {len(lines)}"
        run.say(f"{numbers[-1] + 1} of {cfg.sample} problems: {seen}")
        run.signal = max(run.gather(run.got))
        if run.signal:
            break
    return lines


def read_line(line: dict) -> dict:
    for name in ("prompt", "completion"):
        if not isinstance(line.get(name), str):
            raise BadInput("prompt and completion are needed")
    return line


# ------------------------------------------------------------------- what is edited
# A thought, line by line, </think>, an answer.


def shortened(trace: str, cot: str) -> str:
    """A trace with all of its thought (long), the thought's last line (short), or none of it.

    >>> shortened("2+3=5>1\\n3-2=1=1\\n</think><answer>3-2</answer>", "short")
    '3-2=1=1\\n</think><answer>3-2</answer>'
    """
    thought, tag, answer = trace.partition("</think>")
    if cot == "short":
        thought = "".join(thought.splitlines(keepends=True)[-1:])
    if cot == "none":
        thought = ""
    return thought + tag + answer


def perturbed(trace: str, rule: str, rng: Random, other: str = "") -> str:
    """A trace damaged by a rule such as shuffle:0.67; arXiv:2502.07374 sec. 4.

    That share of the thought's lines changes places (shuffle), goes (delete) or gets a line of
    `other` in front (insert). With that probability each digit of the thought is drawn anew
    (digits), or the answer is wrong: every digit one more, + and - exchanged (answer). The paper
    also removes keywords.
    """
    kind, _, number = rule.partition(":")
    if kind not in DAMAGE or not re.fullmatch(r"0?\.[0-9]+|1", number):
        kinds = ", ".join(DAMAGE)
        raise BadInput(f"--perturb {rule}: one of {kinds}, a colon and a share from 0 to 1")
    share = float(number)
    thought, tag, answer = trace.partition("</think>")
    lines = thought.splitlines(keepends=True)
    foreign = other.partition("</think>")[0].splitlines(keepends=True)
    places = sorted(rng.sample(range(len(lines)), round(share * len(lines))))

    def redraw(digit):
        return rng.choice("0123456789") if rng.random() < share else digit[0]

    if kind == "shuffle":
        mixed = rng.sample([lines[i] for i in places], len(places))
        for place, line in zip(places, mixed, strict=True):
            lines[place] = line
    elif kind == "delete":
        lines = [line for i, line in enumerate(lines) if i not in places]
    elif kind == "insert" and foreign:
        for place in reversed(places):
            lines.insert(place, rng.choice(foreign))
    elif kind == "digits":
        lines = [re.sub("[0-9]", redraw, line) for line in lines]
    elif kind == "answer" and rng.random() < share:
        answer = answer.translate(str.maketrans("0123456789+-", "1234567890-+"))
    return "".join(lines) + tag + answer


def edit(lines: list[dict], cot: str, rule: str, seed: int) -> list[dict]:
    """The lines with their thoughts cut and damaged; what is inserted comes from the next line."""
    edited = []
    for i, line in enumerate(lines):
        if "</think>" not in line["completion"]:
            raise BadInput(f"line {i + 1}: --cot and --perturb need a completion with </think>")
        completion = shortened(line["completion"], cot)
        if rule:
            other = lines[(i + 1) % len(lines)]["completion"]
            completion = perturbed(completion, rule, Random(f"perturb {seed} {i}"), other)
        edited.append(line | {"completion": completion})
    return edited


# ------------------------------------------------------------------- what is chosen


def decontaminated(lines: list[dict], texts: list[str], n: int = 8) -> list[dict]:
    """The lines whose prompt shares no n words in a row with a held-out text.

    What most of these texts share is a template and does not count; a text of fewer words counts
    as a whole. Source: arXiv:2501.19393 sec. 2.1.
    """

    def grams(text):
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}

    counts = Counter(gram for text in texts for gram in grams(text))
    known = {gram for gram, count in counts.items() if count <= max(1, len(texts) / 2)}
    return [line for line in lines if not known & grams(line["prompt"])]


def s1_select(items: list[dict], size: int, rng: Random, tau: int = 5600) -> list[dict]:
    """Quality, difficulty, diversity: s1's algorithm 1 (arXiv:2501.19393).

    Of the items in a clean "format" that no weaker model solved ("weak"), first those from the
    hardest sources. Then a "domain" at random, and a trace of it, each half as likely as the next
    longer one; and so on. An item has "length" and may have "correct", "source" and "domain".
    The paper's notebook draws the last 300 by other weights.
    """

    def is_hardest(item):
        sources = ("aime", "gpqa", "math") if item["length"] > tau else ("aime", "gpqa")
        return bool(item.get("correct")) and item.get("source") in sources

    hard = [item for item in items if item.get("format", 1) and not item.get("weak")]
    chosen = [item for item in hard if is_hardest(item)]
    rest = [item for item in hard if not is_hardest(item)]
    domains = {}
    for item in sorted(rest, key=length_of, reverse=True):
        domains.setdefault(item.get("domain", ""), []).append(item)
    while len(chosen) < size and any(domains.values()):
        left = sorted(name for name, traces in domains.items() if traces)
        traces = domains[rng.choice(left)]
        weights = [2.0**-rank for rank in range(len(traces))]  # the longest is rank 0
        [rank] = rng.choices(range(len(traces)), weights)
        chosen.append(traces.pop(rank))
    return chosen[:size]


def length_of(item: dict) -> int:
    return item["length"]


def limo_scores(items: list[dict]) -> list[float]:
    """LIMO's rule score of each "completion" of some "length" (arXiv:2502.03387 sec. 3).

    .30 length + .20 verification + .25 tentative + .25 connective words, the counts over the
    length, each feature over its largest value. How LIMO scales is not published, nor all words.
    """
    features = []
    for item in items:
        text, length = item["completion"].lower(), item["length"]
        counts = [sum(map(text.count, words)) for words in LIMO_WORDS]
        features.append([length, *(count / length for count in counts)])
    most = [max(column) or 1 for column in zip(*features, strict=True)]
    weights = 0.3, 0.2, 0.25, 0.25
    scores = []
    for row in features:
        scores.append(sum(w * x / m for w, x, m in zip(weights, row, most, strict=True)))
    return scores


def limo_select(items: list[dict], size: int) -> list[dict]:
    """The best traces by `limo_scores`, one a prompt, of prompts that are hard and not too hard.

    No weaker model solved them ("weak"), their own model 1 to 3 of 32 times ("solved" of
    "attempts").
    """
    window = []
    for item in items:
        if not item.get("weak") and 0 < 32 * item.get("solved", 0) <= 3 * item["attempts"]:
            window.append(item)
    scores, best = limo_scores(window), {}
    for i in sorted(range(len(window)), key=scores.__getitem__, reverse=True):
        best.setdefault(window[i]["prompt"], window[i])
    return list(best.values())[:size]


def select(items: list[dict], rule: str, size: int, rng: Random) -> list[dict]:
    """`size` of the items, or all that pass."""
    if rule == "random":
        return rng.sample(items, min(size, len(items)))
    if rule == "longest":
        return sorted(items, key=length_of, reverse=True)[:size]
    if rule == "s1":
        return s1_select(items, size, rng)
    return limo_select(items, size)


def solved_prompt(line: dict) -> str | None:
    return line["prompt"] if line["correct"] else None


def choose(lines: list[dict], prompter: Prompter, cfg: argparse.Namespace) -> list[dict]:
    """The lines that --select takes: none that sft.py would find too long."""
    easy = Counter()
    for path in filter(None, cfg.weak.split(",")):
        easy.update(read_jsonl(path, solved_prompt))
    items = []
    for line in lines:
        length = len(prompter.encode(line["completion"])) + 1  # with the end token
        if len(prompter.encode(line["prompt"])) + length <= cfg.max_length:
            known = {"length": length, "weak": easy[line["prompt"]], "line": line}
            items.append(line | known)
    rule, _, size = cfg.select.partition(":")
    chosen = select(items, rule, int(size), Random(f"select {cfg.seed}"))
    return [item["line"] for item in chosen]


def pair_lines(lines: list[dict], rule: str, cap: int, seed: int) -> list[dict]:
    """Of the answers to each prompt the pairs of a rule, at most `cap` if not 0.

    A line has "completion" and "correct", for the rule rate "passed" of so many "tests".
    """
    groups, found = {}, []
    for line in lines:
        text = line["completion"]
        answer = line | {"text": text, "answer": extract_answer(text)}
        groups.setdefault(line["prompt"], []).append(answer)
    for prompt, answers in groups.items():
        rng = Random(f"pairs {seed} {prompt}")
        with reading(f"--pairs {rule}"):
            pairs = find_pairs(rule, answers, cap or len(answers) ** 2, rng)
        for kind, w, x in pairs:
            texts = {"chosen": answers[w]["text"], "rejected": answers[x]["text"]}
            found.append({"prompt": prompt, **texts, "kind": kind})
    return found


# --------------------------------------------------------------------- command line


def write_traces(cfg: argparse.Namespace) -> int:
    """Get lines, edit them, choose among them, write them; the exit code."""
    check_flags(cfg)
    run = Run(cfg)
    _, model = run.load(BY_SIZE)
    task = make_task(cfg.task, natural=not model.is_tiny)
    prompter = Prompter(model, task, cfg.chat)
    if cfg.sample:
        lines = sample_lines(run, model, prompter)
    elif cfg.traces:
        if not hasattr(task, "trace"):
            raise BadInput(f"--task {cfg.task} makes no traces")
        lines = [trace_example(prompter, cfg.seed, i) for i in range(cfg.traces)]
    else:
        lines = read_jsonl(cfg.data, read_line)

    num_lines = len(lines)
    if cfg.cot != "long" or cfg.perturb:
        lines = edit(lines, cfg.cot, cfg.perturb, cfg.seed)
    if cfg.decontaminate:
        texts = [prompter.text(problem) for problem in heldout(task, cfg.heldout)]
        lines = decontaminated(lines, texts, cfg.decontaminate)
    if cfg.select:
        lines = choose(lines, prompter, cfg)
    if cfg.pairs:
        lines = pair_lines(lines, cfg.pairs, cfg.cap, cfg.seed)
    if not lines and not run.signal:
        raise BadInput(f"of {num_lines} lines none is left")
    if run.rank == 0:
        write_whole(Path(cfg.out), lines)
    run.say(f"wrote {len(lines)} of {num_lines} lines to {cfg.out}")
    return 128 + run.signal if run.signal else 0


def write_whole(path: Path, lines: list[dict]) -> None:
    """The file appears whole or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    with reading(f"--out {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines))
        unfinished.replace(path)


def check_flags(cfg: argparse.Namespace) -> None:
    """Refuse what would not work as meant."""
    if Path(cfg.out).exists():
        raise BadInput(f"--out {cfg.out} is there already")
    if not cfg.sample and (cfg.keep != "correct" or cfg.cap and not cfg.pairs):
        raise BadInput("--keep and --cap need --sample")
    if cfg.pairs and cfg.sample and cfg.keep != "all":
        raise BadInput("--pairs needs --keep all: what is right alone makes no pairs")
    if cfg.perturb:
        perturbed("", cfg.perturb, Random(0))  # complains
    if cfg.select and not re.fullmatch(f"({'|'.join(RULES)}):[1-9][0-9]*", cfg.select):
        rules = ", ".join(RULES)
        raise BadInput(f"--select {cfg.select}: one of {rules}, a colon and a number of lines")
    if cfg.weak and cfg.select.partition(":")[0] not in ("s1", "limo"):
        raise BadInput("--weak needs --select s1 or limo")
    least = {"attempts": 1, "heldout": 1, "max_length": 2}
    for name, value in vars(cfg).items():
        if isinstance(value, (int, float)) and not least.get(name, 0) <= value < math.inf:
            raise BadInput(f"--{name} {value} is below {least.get(name, 0)}, or no number")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("traces.py", argparse.SUPPRESS, __doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    def add(name, default, help, to=parser, **more):
        kind = more or {"type": type(default)}
        note = f" (default: {default})" if default else ""
        to.add_argument(name, default=default, help=help + note, **kind)

    source = parser.add_mutually_exclusive_group(required=True)
    add("--sample", 0, "lines: answers of --model to so many problems", source)
    add("--traces", 0, "lines: so many traces of the task", source)
    add("--data", "", "lines: a JSONL file of {prompt, completion}", source)
    add("--model", "tiny", "who answers, and whose tokens are counted")
    add("--task", "countdown", "task, countdown:high=20")
    add("--chat", False, "use the model's chat template", action="store_true")
    add("--attempts", 4, "answers to each problem of --sample")
    add("--max_new_tokens", 0, "longest answer, 0: by size")
    add("--temperature", 1.0, "of sampling, 0: greedy")
    add("--keep", "correct", "of --sample", choices=["correct", "all", "shortest"])
    add("--cap", 0, "lines or pairs to keep per problem, 0: all that differ")
    add("--cot", "long", "all of each thought, its last line, or nothing", choices=COT)
    add("--perturb", "", "shuffle:0.67; delete, insert, digits: a share of the thought; answer")
    add("--decontaminate", 0, "words in a row of a held-out prompt that drop a line (s1: 8)")
    add("--heldout", 200, "held-out problems to look at for that")
    add("--select", "", "random:N, longest:N, s1:N or limo:N")
    add("--weak", "", "for s1 and limo: files a,b of what weaker models answered")
    parser.add_argument("--pairs", default="", choices=PAIRS, help="rule that makes pairs of lines")
    add("--max_length", 2048, "tokens; longer lines are not selected")
    add("--seed", 0, "seed of problems, sampling, damage and choice")
    add("--device", "auto", "auto: cuda if any", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--out", required=True, help="JSONL file to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 done, 1 fault, 2 bad input, 130 Ctrl-C, 143 SIGTERM."""
    cfg = make_parser().parse_args(argv)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages, as in the scripts
    try:
        return write_traces(cfg)
    except (BadInput, FloatingPointError, OSError) as error:
        code, message = 2 if isinstance(error, BadInput) else 1, error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if int(os.getenv("LOCAL_RANK", 0)) == 0:
        print(f"traces.py: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    os._exit(main())  # as the scripts: threads of gloo may abort sys.exit
