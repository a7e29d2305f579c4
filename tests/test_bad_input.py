"""Bad input, to every script: one line that says what is wrong, exit code 2, no file made or lost.

A row of the tables is the flags and words that the line must hold: the path, the flag or the value
that is wrong. {given} is the folder that `given` fills with what users give by mistake, or others
on purpose; {small} is a good model. A row is run in this process, through main(argv).
"""

import importlib
import json
import os
import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, file_of, lines_of, model_of
from safetensors.torch import load_file, save_file

RUN = "--resume {given}/{script}-run"
ALL = {  # for every script that has the flag
    "--batch 8": "--batch",  # no abbreviations
    "--device tpu": "'tpu'",
    "--seed -1": "--seed -1",
    "--lr nan": "--lr nan",
    "--model owner/name": "owner/name",
    "--task sudoku": "sudoku",
    "--out {given}/{script}-run": "{given}/{script}-run ... --resume",
    "--resume {given}/other-run": "{given}/other-run",
    RUN + " --seed 3": "'seed': 0",
}
SHARED = {  # what lies in the shared blocks and rewards.py: for grpo
    "--out {given}/file": "--out {given}/file",
    "--task gsm8k": "gsm8k",
    "--model {given}/code --chat": "{given}/code",
    "--task countdown:high=1,min_target=90": "min_target=90",
    "--task gsm8k --data {given}/good.jsonl": "--model",  # no prompt for the tiny vocabulary
    "--model {given}/plain --task gsm8k --data {given}/cut.jsonl": "{given}/cut.jsonl, line 3:",
    "--resume nothing": "nothing/run.json",
    "--resume {given}/broken-run": "{given}/broken-run/run.json",
    RUN: "{given}/{script}-run: ",  # no checkpoint
    RUN + " --model tiny": "'model': '{small}'",
}
OWN = {  # for the script before the flags
    "grpo --group_size 1": "--group_size 1",
    "grpo --batch_size 16 --group_size 8 --updates 3": "24",
    "grpo --ref_every 2": "--kl_coef",
    "nsr --batch_size 12 --updates 2": "--batch_size 12",
    "nsr --positive_weight 0.5 --mode psr": "--positive_weight",
    "ppo --kl_type k3": "--kl_type",
    "sft --model scratch --hidden_size 48": "--hidden_size 48 is no multiple of 32",
    "sft --task prosqa": "--task prosqa makes no traces: give --data",
    "sft --task scene --loss_on all": "--loss_on all: the codes of a picture cannot be learnt",
    "coconut --hidden_size 64": "--hidden_size are not for --model {small}",
    "coconut --gate 2 --mode coconut": "--gate 2",
    "coconut --epochs_per_stage 1 --mode coconut": "--epochs_per_stage needs --data",
    "coconut --task countdown": "--task countdown has no steps",
    "recurrent_depth --hidden_size 20 --num_heads 4": "--hidden_size 20",
    "recurrent_depth --task text --data {given}/short.txt": "--length 64",
    "recurrent_depth --decay 1.5": "--decay",
    "budget_forcing --caps 8,4": "--caps 8,4: rising",
    "budget_forcing --waits 1,,2": "--waits 1,,2: ",
    "budget_forcing --max_new_tokens 12": "--max_new_tokens 12: no answer fits after 12",
    "specreason --draft=": "name its --draft",
    "more.best_of_n --N 10 --width 4": "--N 10 is no multiple of --width 4",
    "more.best_of_n --score model": "--verifier FOLDER",
    "more.best_of_n --reduce min": "--verifier FOLDER",
    "more.best_of_n --verifier {given}/plain": "{given}/plain has another tokenizer",
    "more.best_of_n --verifier {small}": "{small}/value_head.safetensors",
    "more.kinetics --blocks 4,2": "--blocks 4,2: rising",
    "more.kinetics --shapes owner/name": "--shapes owner/name",
    "more.kinetics --shapes tiny --trials 0": "--trials 0: rising",
    "specreason --draft {given}/plain": "--draft {given}/plain has another tokenizer",
    "more.dpo --label_smoothing 0.5": "--label_smoothing 0.5: below 0.5",
    "more.dpo --label_smoothing 0.1 --loss ipo": "--label_smoothing does nothing with --loss ipo",
    "more.dpo --reference {given}/other-size": "9 tokens, the policy has 230",
    "more.dpo --data {given}/pairs.jsonl --max_length 3": "1 of 1 pairs longer than 3",
    "more.r_capsule --k 0": "--k 0 with --recon 1: nothing to reconstruct from",
    "more.r_capsule --bottleneck 32": "--bottleneck 32: smaller than the model's width 32 is needed",
    "more.r_capsule --recon 0 --mode plan": "--recon does nothing with --mode plan",
    "more.r_capsule --task affine": "--task affine has no plan: resolve, or --data",
    "more.prime --group_size 1": "--group_size 1: at least 2",
    "more.prime --batch_size 12 --group_size 8": "--batch_size 12 is no multiple of 8",
    "more.prime --accuracy_low 0.8 --accuracy_high 0.2": "the first is larger",
    "more.prime --prm_beta 0": "--prm_beta 0",
    "more.prime --no-process --prm_updates 2": "--prm_updates does nothing with --no-process",
    "more.prime --gamma_process 2": "--gamma_process is above 1",
    "more.prime --prm {given}/other-size": "9 tokens, the policy has 230",
    "more.reasonflux --x_sim 0": "X_sim of 0 problems",
    "more.reasonflux --delta 1": "--delta 1.0: below 1",
    "more.reasonflux --library {given}/cut.jsonl": "{given}/cut.jsonl",
    "more.reasonflux --library models/tiny/config.json": '" holds no list of templates',
    "more.reasonflux --task patterns:guided=0.8": "its prompts name a template",
    "more.reasonflux --task gsm8k": "gsm8k",
    "more.reasonflux --solver owner/name": "owner/name",
    "more.reasonflux --sft_steps 0": "--sft_steps 0",
}


def file(name: str, content: str):
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def config(**changes):
    def damage(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(settings))

    return damage


def tensors(change):
    def damage(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


NORM, HEAD, EMBED = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
MODELS = {  # what is done to a copy of a good folder; what is said, beside its path
    "broken-config": (file("config.json", '{"model_type": "llama",'), "line 1"),
    "gemma": (config(model_type="gemma3"), "gemma3"),
    "yarn": (config(rope_parameters={"rope_type": "yarn", "rope_theta": 5.0}), "yarn"),
    "window": (config(use_sliding_window=True), "window"),
    "biases": (config(model_type="qwen2"), "q_proj.bias"),
    "untied": (config(tie_word_embeddings=False), HEAD),
    "no-tensor": (tensors(lambda found: found.pop(NORM)), NORM),
    "extra": (tensors(lambda found: found.update(odd=found[NORM] * 1)), "odd"),
    "shape": (tensors(lambda found: found.update({NORM: found[NORM][:9]})), NORM),
    "tied": (tensors(lambda found: found.update({HEAD: found[EMBED] + 1})), "tied"),
    "cut": (lambda folder: os.truncate(folder / "model.safetensors", 5000), ""),
    "no-tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "other-size": (config(vocab_size=9), "embed_tokens"),
    "far-id": (file("generation_config.json", '{"suppress_tokens": [1000000]}'), "1000000"),
}


def own_code(folder: Path) -> None:
    """Code of its own, for model, tokenizer and config, that makes a file beside the folder."""
    auto = {"AutoTokenizer": ["own.Own", "own.Own"], "AutoConfig": "own.Own"}
    config(auto_map=auto | {"AutoModelForCausalLM": "own.Own"})(folder)
    kind = {"auto_map": auto, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    (folder / "own.py").write_text(f"open({str(folder.parent / 'written')!r}, 'w')\n")


@pytest.fixture(scope="session")
def given(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    for name, (damage, _) in MODELS.items():
        damage(Path(shutil.copytree(small, folder / name)))
    words = (small / "tokenizer.json").read_text(encoding="utf-8").replace("<latent>", "<other>")
    for name in ("plain", "code"):  # a real tokenizer knows no <latent>
        file("tokenizer.json", words)(Path(shutil.copytree(small, folder / name)))
    own_code(folder / "code")
    row = '{"question": "q", "answer": "#### 1"}\n'
    data = {"file": "", "good.jsonl": row * 40, "cut.jsonl": row * 2 + row[:20]}
    data["pairs.jsonl"] = '{"prompt": "1=", "chosen": "1", "rejected": "2"}'
    data |= {"short.txt": "to be or not to be", "broken-run/run.json": "{"}
    other = {"seed": 0, "model": "tiny", "task": "countdown", "mu": 1}
    data["other-run/run.json"] = json.dumps({"config": other})
    for script in SMALL:
        module = importlib.import_module(script)
        flags = f"{SMALL[script]} --model {model_of(script, small)}".split()
        settings = asdict(module.parse_config(module.Config, flags))
        data[f"{script}-run/run.json"] = json.dumps({"config": settings})
    for name, content in data.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    return folder


def rows_of(script: str) -> dict[str, str]:
    flags = {f.name for f in fields(importlib.import_module(script).Config)} | {"batch"}
    if script == "recurrent_depth":
        flags.remove("model")  # another model, whose folders its own test has
    rows = {row: words for row, words in ALL.items() if row.split()[0][2:] in flags}
    if script == "grpo":
        models = {f"{{given}}/{name}": words for name, (_, words) in MODELS.items()}
        rows |= SHARED | {f"--model {name}": f"{name} ... {models[name]}" for name in models}
    own = {row.partition(" "): words for row, words in OWN.items()}
    return rows | {flags: words for (name, _, flags), words in own.items() if name == script}


def state(folder: Path) -> dict:
    """What can be made, lost or changed: every path with its size and time."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def check_refusal(script: str, done, words: str) -> None:
    assert done.code == 2 and done.err.startswith(f"{file_of(script).name}: error: "), (done.code, done.err)
    assert done.err.count("\n") == 1 and len(done.err) < 600, done.err
    for part in words.split(" ... "):
        assert part in done.err, f"{part!r} was not said: {done.err}"


ROWS = [(script, *row) for script in SMALL for row in rows_of(script).items()]


@pytest.mark.parametrize("script, flags, words", ROWS)
def test_bad_input(run, cwd, small, given, tmp_path, monkeypatch, script, flags, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    names, before = {"given": given, "script": script, "small": small}, state(given)
    done = run(script, flags.format(**names), base="--resume" not in flags)
    check_refusal(script, done, words.format(**names))
    assert state(given) == before and not list(cwd.iterdir()), "a file was made, lost or changed"


BROKEN = [
    ("grpo", "step-000002/trainer.pt", b"PK"),
    ("grpo", "metrics.jsonl", b'{}\n{"step": 1}\n'),  # with lines after it: no kill leaves that
    ("budget_forcing", "step-000005/records.json", b'{"records": 3}'),
    ("specreason", "step-000002/records.json", b""),
    ("more.best_of_n", "step-000002/records.json", b"[]"),
]


@pytest.mark.parametrize("script, name, content", BROKEN)
def test_a_broken_run_folder_is_refused(run, cwd, script, name, content):
    """Nothing in it is run, and nothing is lost."""
    assert run(script, "--out a" + " --eval_problems 0" * (script == "grpo")).code == 0
    (cwd / "a" / name).write_bytes(content)
    before = state(cwd)
    check_refusal(script, run(script, "--resume a", base=False), "a")
    assert state(cwd) == before


FORBIDDEN = r"(?<![.\w])(eval|exec|compile|__import__)\(|os\.(system|popen)|(pickle|yaml|marshal)\."
FORBIDDEN += (
    r"|shell=True|remote_code=True|sympify|parse_expr\(|torch\.load\((?![^)]*weights_only=True)"
)


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), ROOT / "docs" / "report.py"], ids=str)
def test_no_source_runs_what_it_reads(path):
    assert not re.search(FORBIDDEN, path.read_text(encoding="utf-8"))


def test_code_in_a_model_folder_is_not_run(run, given):
    done = run("grpo", "--out a --steps 1 --eval_problems 0", model=given / "code")
    assert done.code == 0 and not (given / "written").exists(), done.err


def test_nothing_in_a_problem_steers_the_terminal(run, cwd, given):
    """It is as it was in the log, and written out where it is printed."""
    evil = "\x1b[2J\x1b]0;x\x07\u202e\x9b31m\r\x00"
    rows = [{"question": f"{i}{evil}?", "answer": "#### 1"} for i in range(40)]
    (cwd / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--task gsm8k --data data.jsonl --out a --steps 1 --eval_problems 1"
    done = run("grpo", flags, model=given / "plain")
    said = done.out + done.err
    assert done.code == 0 and "\\x1b[2J" in said and all(c.isprintable() or c == "\n" for c in said)
    assert evil in lines_of(cwd / "a" / "samples.jsonl")[0]["problem"]["question"]
