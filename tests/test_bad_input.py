"""Bad input, to every script: one line that says what is wrong, exit code 2, no file made or lost.

A row of the tables is the flags and words that the line must hold: the path, the flag or the value
that is wrong. {given} is the folder that `given` fills with what users give by mistake, or others
on purpose; {small} is a good model. A row is run in this process, through main(argv).
"""

import ast
import importlib
import io
import json
import os
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, lines_of, model_of
from safetensors.torch import load_file, save_file

# ------------------------------------------------------------------------------------- the table

RUN = "--resume {given}/{script}-run"
ALL = {  # for every script that has the flag
    "--batch 8": "--batch",  # no abbreviations
    "--device tpu": "'tpu'",
    "--seed -1": "--seed -1",
    "--lr nan": "--lr nan",
    "--model owner/name": "owner/name",
    "--task sudoku": "sudoku",
    "--task gsm8k": "gsm8k",
    "--out {given}/file": "--out {given}/file",
    "--out {given}/{script}-run": "{given}/{script}-run ... --resume",
    "--resume {given}/other-run": "{given}/other-run",
    RUN + " --seed 3": "'seed': 0",
}
SHARED = {  # what lies in the shared blocks and rewards.py: for grpo
    "--device cuda": "--device cuda",
    "--model {given}/empty": "{given}/empty/config.json",
    "--chat": "--chat: ... template",
    "--model {given}/raising-template --chat": "--chat: ... only in pairs",
    "--model {given}/code --chat": "{given}/code",
    "--task countdown:hard=1": "hard=1",
    "--task countdown:high=1,min_target=90": "min_target=90",
    "--task multiplication:max_digits=1 --eval_problems 20": "20",
    "--task gsm8k --data {given}/good.jsonl": "--model",  # no prompt for the tiny vocabulary
    "--model {given}/plain --task gsm8k --data {given}/cut.jsonl": "{given}/cut.jsonl, line 3:",
    "--resume nothing": "nothing/run.json",
    "--resume {given}/broken-run": "{given}/broken-run/run.json",
    RUN: "{given}/{script}-run: ",  # no checkpoint
    RUN + " --out b": "{given}/{script}-run",
    RUN + " --model tiny": "'model': '{small}'",
}
OWN = {
    "grpo": {
        "--group_size 1": "--group_size 1",
        "--batch_size 16 --group_size 8 --updates 3": "24",
        "--ref_every 2": "--kl_coef",
        "--length_schedule 64": "--length_schedule",
        "--length_schedule=-5:0": "--length_schedule",
    },
    "nsr": {
        "--batch_size 12 --updates 2": "--batch_size 12",
        "--positive_weight 0.5 --mode psr": "--positive_weight",
        "--clip_eps 0.3": "--clip_eps",
    },
    "ppo": {"--batch_size 9": "--batch_size 9", "--kl_type k3": "--kl_type"},
    "sft": {
        "--model scratch --hidden_size 48": "--hidden_size 48 is no multiple of 32",
        "--model tiny --num_layers 2": "--num_layers and --hidden_size are not for --model tiny",
        "--task multiplication": "--task multiplication makes no traces: give --data",
    },
    "coconut": {
        "--hidden_size 64": "--hidden_size are not for --model {small}",
        "--gate 2 --mode coconut": "--gate 2",
        "--epochs_per_stage 1 --mode coconut": "--epochs_per_stage needs --data",
        "--mode cot --c 2": "--c does nothing with --mode cot",
        "--task countdown": "--task countdown has no steps",
    },
    "recurrent_depth": {
        "--hidden_size 20 --num_heads 4": "--hidden_size 20",
        "--task text": "--data",
        "--tokenizer x": "--tokenizer",
        "--task text --data {given}/short.txt": "--length 64",
        "--task countdown": "countdown",
        "--model tiny --hidden_size 64 --num_heads 4": "llama",
        "--decay 1.5": "--decay",
    },
    "budget_forcing": {
        "--caps 8,4": "--caps 8,4: rising",
        "--waits 1,,2": "--waits 1,,2: ",
        "--max_new_tokens 12": "--max_new_tokens 12: no answer fits after 12",
    },
    "specreason": {
        "--draft tiny --score digit": "cannot read",
        "--draft=": "name its --draft",
        "--draft {given}/plain": "--draft {given}/plain has another tokenizer",
    },
}

# ---------------------------------------------------------------------------------- model folders


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
YARN = {"rope_type": "yarn", "rope_theta": 5.0}
LINEAR = {"rope_parameters": None, "rope_theta": 5.0, "rope_scaling": {"type": "linear"}}
MODELS = {  # what is done to a copy of a good folder; what is said, beside its path
    "broken-config": (file("config.json", '{"model_type": "llama",'), "line 1"),
    "deep-config": (file("config.json", "[" * 100_000), ""),
    "gemma": (config(model_type="gemma3"), "gemma3"),
    "gelu": (config(hidden_act="gelu_new"), "gelu_new"),
    "yarn": (config(rope_parameters=YARN), "yarn"),
    "linear": (config(**LINEAR), "linear"),
    "no-rope": (config(rope_parameters=None, rope_theta=None), ""),
    "window": (config(use_sliding_window=True), "window"),
    "size-text": (config(hidden_size="32"), ""),
    "biases": (config(model_type="qwen2"), "q_proj.bias"),
    "untied": (config(tie_word_embeddings=False), HEAD),
    "no-tensor": (tensors(lambda found: found.pop(NORM)), NORM),
    "no-embedding": (tensors(lambda found: found.update({HEAD: found.pop(EMBED)})), EMBED),
    "extra": (tensors(lambda found: found.update(odd=found[NORM] * 1)), "odd"),
    "shape": (tensors(lambda found: found.update({NORM: found[NORM][:9]})), NORM),
    "tied": (tensors(lambda found: found.update({HEAD: found[EMBED] + 1})), "tied"),
    "lfs": (file("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), ""),
    "cut": (lambda folder: os.truncate(folder / "model.safetensors", 5000), ""),
    "no-tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "broken-tokenizer": (file("tokenizer.json", '{"version": "1.0"'), ""),
    "far-id": (file("generation_config.json", '{"suppress_tokens": [1000000]}'), "1000000"),
}


def own_code(folder: Path) -> None:
    """Code of its own, for model, tokenizer and config, that makes a file beside the folder."""
    auto = {"AutoTokenizer": ["tokenizer.Own", "tokenizer.Own"], "AutoConfig": "configuration.Own"}
    config(auto_map=auto | {"AutoModelForCausalLM": "modeling.Own"})(folder)
    kind = {"auto_map": auto, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    code = f"open({str(folder.parent / 'written')!r}, 'w')\nclass Own: ...\n"
    for name in ("tokenizer", "configuration", "modeling", "__init__", "sitecustomize"):
        (folder / f"{name}.py").write_text(code)


@pytest.fixture(scope="session")
def given(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")

    for name, (damage, _) in MODELS.items():
        damage(Path(shutil.copytree(small, folder / name)))
    words = (small / "tokenizer.json").read_text(encoding="utf-8").replace("<latent>", "<other>")
    for name in ("plain", "raising-template", "code"):  # a real tokenizer knows no <latent>
        file("tokenizer.json", words)(Path(shutil.copytree(small, folder / name)))
    raising = "{{ raise_exception('only in pairs') }}"
    (folder / "raising-template" / "chat_template.jinja").write_text(raising)
    own_code(folder / "code")
    (folder / "empty").mkdir()
    row = '{"question": "q", "answer": "#### 1"}\n'
    data = {"file": "", "good.jsonl": row * 40, "cut.jsonl": row * 2 + row[:20]}
    data["short.txt"] = "to be or not to be"
    for name, content in data.items():
        (folder / name).write_text(content)
    runs = {"broken": "{"}
    runs["other"] = '{"config": {"seed": 0, "model": "tiny", "task": "countdown", "mu": 1}}'
    for script in SMALL:
        module = importlib.import_module(script)
        flags = f"{SMALL[script]} --model {model_of(script, small)}".split()
        settings = asdict(module.parse_config(module.Config, flags))
        runs[script] = json.dumps({"config": settings})
    for name, content in runs.items():
        (folder / f"{name}-run").mkdir()
        (folder / f"{name}-run" / "run.json").write_text(content)
    return folder


# -------------------------------------------------------------------------------------- the test


def rows_of(script: str) -> dict[str, str]:
    module = importlib.import_module(script)
    flags = {f"--{f.name}" for f in fields(module.Config)} | {"--batch"}
    if script == "recurrent_depth":
        flags.remove("--model")  # another model, whose folders its own test has
    rows = {row: words for row, words in ALL.items() if row.split()[0] in flags}
    if script == "grpo":
        rows |= SHARED
        for name, (_, words) in MODELS.items():
            rows[f"--model {{given}}/{name}"] = f"{{given}}/{name} ... {words}"
    return rows | OWN[script]


def state(folder: Path) -> dict:
    """What can be made, lost or changed: every path with its size and time."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def check_refusal(script: str, done, words: str) -> None:
    assert done.code == 2 and done.err.startswith(f"{script}.py: error: "), (done.code, done.err)
    assert done.err.count("\n") == 1 and len(done.err) < 600, done.err
    for part in words.split(" ... "):
        assert part in done.err, f"{part!r} was not said: {done.err}"


ROWS = [(script, *row) for script in SMALL for row in rows_of(script).items()]


@pytest.mark.parametrize("script, flags, words", ROWS)
def test_bad_input(run, cwd, small, given, tmp_path, monkeypatch, script, flags, words):
    if flags == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    names, before = {"given": given, "script": script, "small": small}, state(given)
    done = run(script, flags.format(**names), base="--resume" not in flags)
    check_refusal(script, done, words.format(**names))
    assert state(given) == before and not list(cwd.iterdir()), "a file was made, lost or changed"


# ----------------------------------------------------------------------------- what a run left


class Pickled:
    """Makes a file as soon as it is unpickled."""

    def __reduce__(self):
        return open, ("written", "w")


def saved(what) -> bytes:
    buffer = io.BytesIO()
    torch.save(what, buffer)
    return buffer.getvalue()


BROKEN = [
    ("grpo", "step-000002/trainer.pt", saved({"step": 2, "optimizer": Pickled()})),
    ("grpo", "step-000002/trainer.pt", saved({"step": 2})[:300]),
    ("grpo", "step-000002/trainer.pt", saved([1, 2])),
    ("grpo", "metrics.jsonl", b'{}\n{"step": 1}\n'),  # with lines after it: no kill leaves that
    ("budget_forcing", "metrics.jsonl", b'{}\n{"step": 1}\n'),
    ("budget_forcing", "step-000005/records.json", b'{"records": 3}'),
    ("specreason", "step-000002/records.json", b""),
    ("specreason", "step-000002/records.json", b"[1]"),
]


@pytest.mark.parametrize("script, name, content", BROKEN)
def test_a_broken_run_folder_is_refused(run, cwd, script, name, content):
    """Nothing in it is run, and nothing is lost."""
    assert run(script, "--out a" + " --eval_problems 0" * (script == "grpo")).code == 0
    assert (cwd / "a" / name).exists()
    (cwd / "a" / name).write_bytes(content)
    before = state(cwd)
    check_refusal(script, run(script, "--resume a", base=False), "a")
    assert state(cwd) == before


def test_records_of_another_setting_are_refused(run, cwd):
    """And the run still knows its own."""
    assert run("budget_forcing", "--out a").code == 0
    before, done = state(cwd), run("budget_forcing", "--resume a --caps 4,9,12", base=False)
    check_refusal("budget_forcing", done, "is of")
    assert state(cwd) == before
    assert run("budget_forcing", "--resume a", base=False).code == 0


# -------------------------------------------------------------------------------------- security


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), ROOT / "docs" / "report.py"], ids=str)
def test_no_source_runs_what_it_reads(path):
    """No eval, no pickle but torch.load(weights_only=True), no shell, no code of a model folder."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call):
            name = ast.unparse(call.func)
            options = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
            last = name.rpartition(".")[2]
            assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen")
            assert not name.startswith(("pickle.", "marshal.", "shelve.", "yaml."))
            assert last not in ("sympify", "parse_expr", "unsafe_load")
            assert not options.get("shell") and not options.get("trust_remote_code")
            assert name != "torch.load" or options.get("weights_only") is True
            assert last != "from_pretrained" or options.get("trust_remote_code") is False


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
