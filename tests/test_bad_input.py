"""Bad input, to every script: one line that says what is wrong, exit code 2, no file made or lost.

A row of the table is the flags and words that the line must hold: the path, the flag or the value
that is wrong. {given} is the folder that `make_given` fills with what users give by mistake, or
others on purpose; {small} is a good model. A row is run in this process, through main(argv).
grpo has every row of the shared blocks, the other scripts have some of each kind and their own.
"""

import ast
import importlib
import json
import pickle
import shutil
import time
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, finish, lines_of, start
from safetensors.torch import load_file, save_file

NORM, HEAD, EMBED = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"


def edit_json(path: Path, **changes) -> None:
    """Change settings of a JSON file; None takes one out."""
    settings = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {name: value for name, value in settings.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# copies of a good model folder with other settings in config.json
CONFIGS = {
    "gemma": {"model_type": "gemma3"},
    "gelu": {"hidden_act": "gelu_new"},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5.0}},
    "yarn4": {"rope_parameters": None, "rope_theta": 5.0, "rope_scaling": {"type": "yarn"}},
    "no-rope": {"rope_parameters": None, "rope_theta": None},
    "sliding": {"use_sliding_window": True},
    "size-text": {"hidden_size": "32"},
    "wider": {"intermediate_size": 100},
    "untied": {"tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2"},  # which has biases
}
# files of a model folder, by their content
FILES = {
    "lfs/model.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "broken-config/config.json": '{"model_type": "llama",',
    "deep-config/config.json": "[" * 100_000,
    "broken-tokenizer/tokenizer.json": '{"version": "1.0"',
    "broken-generation/generation_config.json": "[",
    "far-generation/generation_config.json": '{"suppress_tokens": [1000000]}',
    "broken-template/chat_template.jinja": "{% for %}",
    "raising-template/chat_template.jinja": "{{ raise_exception('only in pairs') }}",
}
GOOD_ROW = '{"question": "q", "answer": "#### 1"}\n'
DATA = {
    "empty.jsonl": "",
    "good.jsonl": GOOD_ROW * 40,
    "no-json.jsonl": GOOD_ROW + "hello\n",
    "cut.jsonl": GOOD_ROW * 2 + GOOD_ROW[:20],
    "no-answer.jsonl": GOOD_ROW + '{"question": "q"}\n',
    "list.jsonl": GOOD_ROW + "\n[1]\n",
    "short.txt": "to be or not to be",
}


def make_given(folder: Path, small: Path) -> Path:
    def model(name: str) -> Path:
        path = folder / name
        return path if path.exists() else Path(shutil.copytree(small, path))

    for name, changes in CONFIGS.items():
        edit_json(model(name) / "config.json", **changes)
    for name, content in FILES.items():
        path = model(Path(name).parent.name) / Path(name).name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, content in DATA.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    weights = (small / "model.safetensors").read_bytes()
    (model("cut") / "model.safetensors").write_bytes(weights[:5000])
    (model("no-weights") / "model.safetensors").rename(model("no-weights") / "pytorch_model.bin")
    (model("no-tokenizer") / "tokenizer.json").unlink()
    edit_tensors(model("no-tensor"), lambda tensors: tensors.pop(NORM))
    edit_tensors(model("extra-tensor"), lambda tensors: tensors.update(odd=tensors[NORM] * 1))
    edit_tensors(model("shape"), lambda tensors: tensors.update({NORM: tensors[NORM][:9]}))
    edit_tensors(model("tied"), lambda tensors: tensors.update({HEAD: tensors[EMBED] + 1}))
    for name in ("plain", "broken-template", "raising-template", "code"):  # prompts in words
        path = model(name) / "tokenizer.json"
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("<latent>", "<other>"), encoding="utf-8")
    own_code(model("code"), folder)
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    for script in SMALL:
        module, run = importlib.import_module(script), folder / f"{script}-run"
        config = asdict(module.parse_config(module.Config, SMALL[script].split()))
        run.mkdir()
        config["model"] = "scratch" if script == "recurrent_depth" else str(small)
        about = {"script": f"{script}.py", "config": config}
        (run / "run.json").write_text(json.dumps(about), encoding="utf-8")
    about["config"] = {"seed": 0, "model": str(small), "task": "countdown", "mu": 1}
    for name, content in (("other", json.dumps(about)), ("broken", "{"), ("no-config", "{}")):
        (folder / f"{name}-run").mkdir()
        (folder / f"{name}-run" / "run.json").write_text(content, encoding="utf-8")
    return folder


def own_code(folder: Path, outside: Path) -> None:
    """Make a model folder bring Python code of its own, for model, tokenizer and config."""
    auto = {"AutoTokenizer": ["tokenizer.Own", "tokenizer.Own"], "AutoConfig": "configuration.Own"}
    edit_json(folder / "config.json", auto_map=auto | {"AutoModelForCausalLM": "modeling.Own"})
    edit_json(folder / "tokenizer_config.json", auto_map=auto, tokenizer_class="Own")
    code = f"open({str(outside / 'written-by-the-model')!r}, 'w')\nclass Own: ...\n"
    for name in ("tokenizer", "configuration", "modeling", "__init__", "sitecustomize"):
        (folder / f"{name}.py").write_text(code, encoding="utf-8")


# ------------------------------------------------------------------------------------- the table

GSM = "--model {given}/plain --task gsm8k"
RUN = "--resume {given}/{script}-run"
SHARED = {
    # flags
    "--learning_rate 3": "--learning_rate",
    "--batch 8": "--batch",  # no abbreviations
    "--seed 0 hello": "hello",
    "--seed 2.5": "'2.5'",
    "--device tpu": "'tpu'",
    "--device cuda": "--device cuda",
    "--device mps": "--device mps",
    # numbers
    "--seed -1": "--seed -1",
    "--steps -1": "--steps -1",
    "--lr nan": "--lr nan",
    "--temperature 0": "--temperature 0",
    "--group_size 0": "--group_size 0",
    "--batch_size 9": "--batch_size 9",
    # models: no folder, no hub
    "--model ./qwen": "./qwen",
    "--model {given}/file": "{given}/file",
    "--model owner/name": "owner/name",
    "--model Qwen2.5-1.5B": "Qwen2.5-1.5B",
    # models: config.json
    "--model {given}/empty": "{given}/empty/config.json",
    "--model {given}/broken-config": "{given}/broken-config/config.json: ... line 1",
    "--model {given}/deep-config": "{given}/deep-config/config.json",
    "--model {given}/gemma": "{given}/gemma: ... gemma3",
    "--model {given}/gelu": "{given}/gelu: ... gelu_new",
    "--model {given}/yarn": "{given}/yarn: ... yarn",
    "--model {given}/yarn4": "{given}/yarn4: ... yarn",
    "--model {given}/no-rope": "{given}/no-rope: ... rope_parameters",
    "--model {given}/sliding": "{given}/sliding: ... window",
    "--model {given}/size-text": "{given}/size-text",
    # models: weights
    "--model {given}/wider": "{given}/wider: ... gate_proj",
    "--model {given}/qwen2": "{given}/qwen2: ... q_proj.bias",
    "--model {given}/no-tensor": "{given}/no-tensor: ... model.norm.weight",
    "--model {given}/extra-tensor": "{given}/extra-tensor: ... odd",
    "--model {given}/shape": "{given}/shape: ... model.norm.weight",
    "--model {given}/tied": "{given}/tied: ... tied",
    "--model {given}/untied": "{given}/untied: ... lm_head",
    "--model {given}/lfs": "{given}/lfs",
    "--model {given}/cut": "{given}/cut",
    "--model {given}/no-weights": "{given}/no-weights",
    # models: tokenizer, special tokens, template
    "--model {given}/no-tokenizer": "{given}/no-tokenizer",
    "--model {given}/broken-tokenizer": "{given}/broken-tokenizer",
    "--model {given}/broken-generation": "{given}/broken-generation/generation_config.json",
    "--model {given}/far-generation": "{given}/far-generation: ... 1000000",
    "--chat": "--chat: ... template",
    "--model {given}/broken-template --chat": "--chat",
    "--model {given}/raising-template --chat": "--chat: ... only in pairs",
    "--model {given}/code --chat": "{given}/code",
    # tasks and data
    "--task sudoku": "sudoku",
    "--task countdown:hard=1": "hard=1",
    "--task countdown:min_numbers=9": "9",
    "--task countdown:high=1,min_target=90": "min_target=90",
    "--task multiplication:max_digits=1 --eval_problems 20": "20",
    "--task gsm8k": "--data",
    "--data {given}/good.jsonl": "{given}/good.jsonl",
    "--task gsm8k --data {given}/good.jsonl": "--model",  # no prompt for the tiny vocabulary
    GSM + " --data {given}/none.jsonl": "{given}/none.jsonl",
    GSM + " --data {given}/empty.jsonl": "{given}/empty.jsonl",
    GSM + " --data {given}/no-json.jsonl": "{given}/no-json.jsonl, line 2: ... hello",
    GSM + " --data {given}/cut.jsonl": "{given}/cut.jsonl, line 3:",
    GSM + " --data {given}/no-answer.jsonl": "{given}/no-answer.jsonl, line 2: ... answer",
    GSM + " --data {given}/list.jsonl": "{given}/list.jsonl, line 3:",
    # folders of runs
    "--out {given}/file": "--out {given}/file",
    "--out {given}/{script}-run": "{given}/{script}-run ... --resume",
    "--resume nothing": "nothing/run.json",
    "--resume {given}/plain": "{given}/plain/run.json",
    "--resume {given}/broken-run": "{given}/broken-run/run.json",
    "--resume {given}/no-config-run": "{given}/no-config-run: ... config",
    "--resume {given}/other-run": "{given}/other-run",
    RUN: "{given}/{script}-run: ",  # no checkpoint
    RUN + " --out b": "{given}/{script}-run",
    RUN + " --seed 3": "'seed': 0",
    RUN + " --model tiny": "'model': '{small}'",
    RUN + " --task multiplication": "'task': 'countdown",
}
# of these, what others than grpo meet: some of each kind
SOME = (
    "--learning_rate 3|--batch 8|--device tpu|--device mps|--seed -1|--steps -1|--lr nan|"
    "--temperature 0|--group_size 0|--batch_size 9|--model owner/name|--model {given}/empty|"
    "--model {given}/broken-config|--model {given}/no-tensor|--model {given}/broken-tokenizer|"
    "--model {given}/far-generation|--chat|--task sudoku|--task countdown:hard=1|--task gsm8k|"
    "--out {given}/file|--out {given}/{script}-run|--resume nothing|--resume {given}/other-run"
).split("|")
SOME += [RUN, RUN + " --out b", RUN + " --seed 3"]
OWN = {
    "grpo": {
        "--group_size 1": "--group_size 1",
        "--batch_size 12 --group_size 8": "--batch_size 12",
        "--batch_size 16 --group_size 8 --updates 3": "24",
        "--ref_every 2": "--kl_coef",
        "--length_schedule 64": "--length_schedule",
        "--length_schedule=-5:0": "--length_schedule",
        "--length_schedule 64:0,0:9": "--length_schedule",
        "--advantage all": "'all'",
    },
    "nsr": {
        "--mode both": "'both'",
        "--batch_size 12 --updates 2": "--batch_size 12",
        "--positive_weight 0.5 --mode psr": "--positive_weight",
        "--clip_eps 0.3": "--clip_eps",
    },
    "ppo": {"--reward none": "'none'", "--kl_type k3": "--kl_type"},
    "sft": {
        "--model scratch --hidden_size 48": "--hidden_size 48 is no multiple of 32",
        "--model tiny --num_layers 2": "--num_layers and --hidden_size are not for --model tiny",
        "--task gsm8k": "gsm8k and math read a file",
        "--task multiplication": "--task multiplication makes no traces: give --data",
        "--data {given}/none.jsonl": "{given}/none.jsonl",
        "--data {given}/no-json.jsonl": "{given}/no-json.jsonl, line 1",
        "--loss_on words": "'words'",
    },
    "coconut": {
        "--hidden_size 64": "--hidden_size are not for --model {small}",
        "--gate 2 --mode coconut": "--gate 2",
        "--epochs_per_stage 1 --mode coconut": "--epochs_per_stage needs --data",
        "--uniform_prob 0.5": "--uniform_prob does nothing with --mode no_curriculum",
        "--mode cot --c 2": "--c does nothing with --mode cot",
        "--c 0": "--c 0",
        "--task countdown": "--task countdown has no steps",
        "--task gsm8k": "gsm8k",
        "--data {given}/none.jsonl": "{given}/none.jsonl",
        "--data {given}/cut.jsonl": "{given}/cut.jsonl",
    },
    "recurrent_depth": {
        "--hidden_size 20 --num_heads 4": "--hidden_size 20",
        "--task text": "--data",
        "--task gsm8k": "gsm8k",
        "--data x.txt": "--data",
        "--tokenizer x": "--tokenizer",
        "--task text --data x.txt": "x.txt",
        "--task text --data {given}/short.txt": "--length 64",
        "--task text --data {given}/short.txt --tokenizer x": "x/tokenizer.json",
        "--task countdown": "countdown",
        "--model tiny --core 2": "--core",
        "--model tiny --hidden_size 64 --num_heads 4": "llama",
        "--decay 1.5": "--decay",
    },
    "budget_forcing": {
        "--caps 8,4": "--caps 8,4: rising",
        "--caps 0,4": "--caps 0,4: rising",
        "--caps 4,x": "--caps 4,x: ",
        "--waits 1,,2": "--waits 1,,2: ",
        "--max_new_tokens 12": "--max_new_tokens 12: no answer fits after 12",
        "--eval_problems 0": "--eval_problems 0",
    },
    "specreason": {
        "--draft tiny --score digit": "cannot read",
        "--draft=": "name its --draft",
        "--draft {given}/plain": "--draft {given}/plain has another tokenizer",
        "--draft nowhere/x": "nowhere/x",
        "--top_p 0": "--top_p 0",
        "--gamma 0": "--gamma 0",
    },
}


def rows_of(script: str) -> dict[str, str]:
    """The rows of the table for a script: as far as it has their flags."""
    module = importlib.import_module(script)
    flags = {f"--{f.name}" for f in fields(module.Config)} | {"--learning_rate", "--batch"}
    if "--group_size" not in flags:
        flags -= {"--temperature", "--batch_size"}  # which may be 0, and odd
    if not hasattr(module, "read_special_ids"):  # another model, whose folders its own test has
        flags -= {"--model"}
    some = SHARED if script == "grpo" else {row: SHARED[row] for row in SOME}
    if script == "budget_forcing":
        some.pop(RUN)  # without records it begins
    return {row: x for row, x in some.items() if row.split()[0] in flags} | OWN[script]


ROWS = [(script, *row) for script in SMALL for row in rows_of(script).items()]


@pytest.fixture(scope="session")
def given(small, tmp_path_factory):
    return make_given(tmp_path_factory.mktemp("given"), small)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def state(folder: Path) -> dict:
    """What can be made, lost or changed: every path with its size and time."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def check_refusal(script: str, done: SimpleNamespace, words: str) -> None:
    assert done.code == 2 and done.err.startswith(f"{script}.py: error: "), (done.code, done.err)
    assert done.err.count("\n") == 1 and len(done.err) < 600, done.err
    place = 0
    for part in words.split(" ... "):
        assert part in done.err[place:], f"{part!r} was not said: {done.err}"
        place = done.err.index(part, place) + len(part)


@pytest.mark.parametrize("script, flags, words", ROWS)
def test_bad_input(run, cwd, small, given, offline, script, flags, words):
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if "--device" in flags and there.get(flags.split()[1]):
        pytest.skip("there is one")
    fill, before, began = locals(), state(given), time.process_time()
    done = run(script, flags.format(**fill), base="--resume" not in flags)
    assert "--chat" in flags or time.process_time() - began < 3, "this took too long"
    check_refusal(script, done, words.format(**fill))
    assert state(given) == before and not list(cwd.iterdir()), "a file was made, lost or changed"


def test_bad_input_as_a_process(cwd):
    """The exit code and the one line are the same outside."""
    done = finish(start("grpo", "--resume nothing", cwd))
    check_refusal("grpo", done, "nothing/run.json")
    assert done.out == "" and not list(cwd.iterdir())


# -------------------------------------------------------------------------------------- security


def keywords(call: ast.Call) -> dict:
    return {k.arg: getattr(k.value, "value", None) for k in call.keywords}


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), ROOT / "docs" / "report.py"], ids=str)
def test_no_source_runs_what_it_reads(path):
    """No eval, no pickle but torch.load(weights_only=True), no shell, no code of a model folder."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    for call in [node for node in nodes if isinstance(node, ast.Call)]:
        name, options = ast.unparse(call.func), keywords(call)
        assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), name
        assert not name.startswith(("pickle.", "marshal.", "shelve.", "yaml.")), name
        assert not options.get("shell") and not options.get("trust_remote_code")
        assert name != "torch.load" or options.get("weights_only") is True
        last = name.rpartition(".")[2]
        assert last != "from_pretrained" or options.get("trust_remote_code") is False, name
        assert last not in ("sympify", "parse_expr", "unsafe_load"), name


class Pickled:
    """Makes a file as soon as it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("case", ["code", "plain pickle", "empty", "cut", "another"])
def test_a_broken_checkpoint_is_refused(run, cwd, case):
    """Nothing in it is run, and nothing is lost."""
    assert run("grpo", "--out a --eval_problems 0").code == 0
    path, harm = cwd / "a/step-000002/trainer.pt", {"step": 2, "optimizer": Pickled(cwd / "new")}
    if case in ("code", "another"):
        torch.save(harm if case == "code" else [1, 2], path)
    if case == "plain pickle":
        path.write_bytes(pickle.dumps(harm))
    if case in ("empty", "cut"):
        path.write_bytes(path.read_bytes()[: 0 if case == "empty" else 5000])
    refuses_to_go_on(run, cwd, "grpo", "")


@pytest.mark.parametrize("script", ["grpo", "budget_forcing", "specreason"])
def test_a_broken_log_is_refused(run, cwd, script):
    """A line that is none, with others after it: no kill leaves that."""
    assert run(script, "--out a").code == 0
    log = cwd / "a" / "metrics.jsonl"
    log.write_text("{}\n" + log.read_text(encoding="utf-8"), encoding="utf-8")
    refuses_to_go_on(run, cwd, script, "a/metrics.jsonl")


@pytest.mark.parametrize("script", ["budget_forcing", "specreason"])
def test_broken_records_are_refused(run, cwd, script):
    assert run(script, "--out a").code == 0
    path = sorted((cwd / "a").glob("step-*/records.json"))[-1]
    for content in ("", "[1]", '{"records": 3}'):
        path.write_text(content, encoding="utf-8")
        refuses_to_go_on(run, cwd, script, "")


def test_records_of_another_setting_are_refused(run, cwd):
    """And the run still knows its own."""
    assert run("budget_forcing", "--out a").code == 0
    refuses_to_go_on(run, cwd, "budget_forcing", "a/step-000002 is of", "--caps 4,9,12")
    assert run("budget_forcing", "--resume a", base=False).code == 0


def refuses_to_go_on(run, cwd: Path, script: str, words: str, flags: str = "") -> None:
    before = state(cwd)
    check_refusal(script, run(script, f"--resume a {flags}", base=False), words)
    assert state(cwd) == before


def test_code_in_a_model_folder_is_not_run(run, given):
    done = run("grpo", "--out a --steps 1 --eval_problems 0", model=given / "code")
    assert done.code == 0 and not (given / "written-by-the-model").exists(), done.err


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
