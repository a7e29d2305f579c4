"""Bad input, to every script: one line that says what is wrong, an exit code, and no file made or lost.

Each row is run in this process through main(argv). A message is the whole line; "..." in it stands for words of a
library or the system, {given} for the folder of bad things that `make_given` writes.
"""

# ruff: noqa: E501  (a row of a table is one line)

import ast
import importlib
import json
import os
import pickle
import re
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import EVERY, FAULTS, ROOT, fault, finish, loop_of, says, start
from safetensors.torch import load_file, save_file

from rewards import TASKS

NORM = "model.norm.weight"
SHARDS = "model.safetensors.index.json"
PAYLOAD = "import pathlib\npathlib.Path({path!r}).write_text('code of a model folder was run')\n"


def edit_json(path: Path, **changes) -> None:
    """Change settings of a JSON file; None takes one out."""
    settings = (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}) | changes
    path.write_text(json.dumps({n: v for n, v in settings.items() if v is not None}), encoding="utf-8")


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# copies of a good model folder, with one setting of config.json changed
CONFIGS = {
    "gemma": {"model_type": "gemma3"},
    "gelu": {"hidden_act": "gelu_new"},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5.0}},
    "rope-list": {"rope_parameters": [1], "rope_theta": None},
    "rope-text": {"rope_theta": "ten", "rope_parameters": None},
    "no-rope": {"rope_parameters": None, "rope_theta": None},
    "sliding": {"use_sliding_window": True},
    "size-text": {"hidden_size": "32"},
    "size-negative": {"hidden_size": -32},
    "no-heads": {"num_attention_heads": 0},
    "three-heads": {"num_attention_heads": 3, "head_dim": None},
    "three-keys": {"num_key_value_heads": 3},
    "odd-head": {"head_dim": 7},
    "layers": {"num_hidden_layers": 10**9},
    "eps-text": {"rms_norm_eps": "small"},
    "eos-text": {"eos_token_id": "end"},
    "eos-far": {"eos_token_id": 10**6},
    "tied": {"tie_word_embeddings": True},
}
# files of a model folder, by their content
FILES = {
    "lfs/model.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "broken-config/config.json": "{",
    "list-config/config.json": "[]",
    "deep-config/config.json": "[" * 100_000,
    "latin-config/config.json": b'{"a": "\xe9"}',
    "broken-tokenizer/tokenizer.json": '{"version": "1.0"',
    "other-tokenizer/tokenizer.json": "{}",
    "number-tokenizer-config/tokenizer_config.json": '{"eos_token": 5}',
    "dict-tokenizer-config/tokenizer_config.json": '{"eos_token": {}}',
    "broken-generation/generation_config.json": "[",
    "far-generation/generation_config.json": '{"suppress_tokens": [1000000]}',
    "text-generation/generation_config.json": '{"suppress_tokens": "all"}',
    f"broken-index/{SHARDS}": "{",
    f"list-index/{SHARDS}": '{"weight_map": ["a.safetensors"]}',
    f"number-index/{SHARDS}": '{"weight_map": {"a": 5}}',
    f"outside-index/{SHARDS}": '{"weight_map": {"a": "../good/other.safetensors"}}',
    f"absolute-index/{SHARDS}": '{"weight_map": {"a": "/etc/passwd"}}',
    "broken-template/chat_template.jinja": "{% for %}",
    "raising-template/chat_template.jinja": "{{ raise_exception('only in pairs') }}",
}
DATA = {
    "empty.jsonl": "",
    "good.jsonl": '{"question": "q", "answer": "#### 1"}\n' * 40,
    "no-json.jsonl": '{"question": "q", "answer": "#### 1"}\nhello\n',
    "no-answer.jsonl": '{"question": "q", "answer": "#### 1"}\n{"question": "q"}\n',
    "many.jsonl": '{"question": "q", "answer": "#### many"}\n',
    "latin.jsonl": b'{"question": "\xe9", "answer": "1"}\n',
    "deep.jsonl": "[" * 100_000 + "\n",
    "pairs.jsonl": '{"prompt": "1+1=", "completion": "2"}\n' * 4,
    "no-completion.jsonl": '{"prompt": "1+1=", "completion": "2"}\n{"prompt": "1+1="}\n',
    "cut.jsonl": '{"prompt": "1+1=", "completion": "2"}\n{"prompt": "1+1=", "comp\n',
    "number.jsonl": '{"prompt": "1+1=", "completion": "2"}\n{"prompt": "1+1=", "completion": 2}\n',
    "list.jsonl": '{"prompt": "1+1=", "completion": "2"}\n[1]\n',
    "messages.jsonl": '{"messages": [{"role": "user", "content": "x"}]}\n',
    "nothing-to-learn.jsonl": '{"prompt": "", "completion": ""}\n',
    "short.txt": "to be or not to be, that is the question. " * 20,
    "control.jsonl": '{"question": "q", "answer": "\\u001b[31m\\u202eX"}\n',
}
RUNS = {  # settings in run.json that no script has written
    "broken": "{",
    "list": "[]",
    "no-config": "{}",
    "list-config": '{"config": ["lr"]}',
    "text": '{"config": {"timeout": "fast"}}',
    "null": '{"config": {"timeout": null}}',
    "tpu": '{"config": {"device": "tpu"}}',
    "other": '{"script": "other.py", "config": {"seed": 0}}',
}


def make_given(folder: Path, small: Path) -> Path:
    """Fill `folder` with things that users give by mistake, or others on purpose, and a few good ones."""

    def model(name: str) -> Path:
        return folder / name if (folder / name).exists() else Path(shutil.copytree(small, folder / name))

    model("good")
    (folder / "good" / "other.safetensors").write_bytes((small / "model.safetensors").read_bytes())
    for name, changes in CONFIGS.items():
        edit_json(model(name) / "config.json", **changes)
    for name, content in FILES.items():
        path = model(Path(name).parent.name) / Path(name).name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (model("cut") / "model.safetensors").write_bytes((small / "model.safetensors").read_bytes()[:5000])
    (model("empty-weights") / "model.safetensors").write_bytes(b"")
    (model("no-weights") / "model.safetensors").rename(model("no-weights") / "pytorch_model.bin")
    (model("no-tokenizer") / "tokenizer.json").unlink()
    (model("no-tokenizer-config") / "tokenizer_config.json").unlink()
    edit_tensors(model("no-tensor"), lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    edit_tensors(model("extra-tensor"), lambda tensors: tensors.update({"\x1b[2J": tensors[NORM] * 1}))
    edit_tensors(model("shape"), lambda tensors: tensors.update({NORM: tensors[NORM][:9]}))
    for name in ("plain", "broken-template", "raising-template", "code"):  # prompts in words
        path = model(name) / "tokenizer.json"
        path.write_text(path.read_text(encoding="utf-8").replace("<latent>", "<other>"), encoding="utf-8")
    own_code(model("code"), folder)
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    for name, content in DATA.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for script in EVERY:
        module = importlib.import_module(script)
        config = asdict(module.parse_config(module.Config, EVERY[script].split()))
        config |= {} if script == "recurrent_depth" else {"model": str(small)}
        (folder / f"{script}-run").mkdir()
        about = {"script": f"{script}.py", "config": config}
        (folder / f"{script}-run" / "run.json").write_text(json.dumps(about), encoding="utf-8")
    for name, content in RUNS.items():
        (folder / f"{name}-run").mkdir()
        (folder / f"{name}-run" / "run.json").write_text(content, encoding="utf-8")
    return folder


def own_code(folder: Path, outside: Path) -> None:
    """Make a model folder bring Python code of its own, for model, tokenizer and config."""
    auto = {"AutoTokenizer": ["tokenizer.Own", "tokenizer.Own"], "AutoConfig": "configuration.Own"}
    auto |= {"AutoModelForCausalLM": "modeling.Own"}
    edit_json(folder / "config.json", auto_map=auto)
    edit_json(folder / "tokenizer_config.json", auto_map=auto, tokenizer_class="Own")
    for name in ("tokenizer", "configuration", "modeling", "__init__", "setup", "sitecustomize"):
        path = str(outside / "written-by-the-model")
        (folder / f"{name}.py").write_text(PAYLOAD.format(path=path) + "class Own: ...\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------- the table of bad input
# flags: message. Of what lies in the shared blocks every script is asked, of the rest its own.

FOLDER = "no such folder: {} (hub names look like owner/name; short names: {{names}})"
OFFLINE = (
    "{repo} is not in the local cache and huggingface.co cannot be reached. On a machine with network: "
    "hf download {repo} --local-dir DIR, then --model DIR"
)
UNREACHABLE = OFFLINE.format(repo="Qwen/Qwen2.5-1.5B")
HAS = "; such a folder has config.json, *.safetensors, tokenizer.json"
KNOBS = "min_numbers=int, max_numbers=int, low=int, high=int, min_target=int, max_target=int, operators=str, "
KNOBS += "give_up=float, worded=float, consistency=float, pool=int"
EVERY_SCRIPT = {
    "--epochs_max 8": "unknown flag --epochs_max; ...",
    "--no-timeout": "unknown flag --no-timeout; ...",
    "--timeouts 3": "unknown flag --timeouts; did you mean --timeout?",
    "--timeouts=3": "unknown flag --timeouts=3; did you mean --timeout?",
    "--seed 0 hello": "unknown flag hello; see --help",
    "--seed": "argument --seed: expected one argument{help}",
    "--seed 2.5": "argument --seed: invalid int value: '2.5'{help}",
    "--seed nan": "argument --seed: invalid int value: 'nan'{help}",
    "--seed -1": "--seed -1: a number of at least 0 is needed",
    "--timeout 0": "--timeout 0: a number of at least 1 is needed",
    "--eval_problems x": "argument --eval_problems: invalid int value: 'x'{help}",
    "--check=3": "argument --check/--no-check: ignored explicit argument '3'{help}",
    "--dtype float16": "argument --dtype: invalid choice: 'float16' (choose from ...auto..., ...float32..., ...bfloat16...){help}",
    "--device tpu": "argument --device: invalid choice: 'tpu' (choose from ...auto..., ...cpu..., ...cuda..., ...mps...){help}",
    "--device cuda": "--device cuda: there is none here; leave the flag out",
    "--device mps": "--device mps: there is none here; leave the flag out",
    "--model ./qwen": FOLDER.format("./qwen"),
    "--model /no/where": FOLDER.format("/no/where"),
    "--model ~/no-where": FOLDER.format("~/no-where"),
    "--model qwen": FOLDER.format("qwen"),
    "--model a/b/c": FOLDER.format("a/b/c"),
    "--model {given}/file": FOLDER.format("{given}/file"),
    "--model owner/name": OFFLINE.format(repo="owner/name"),
    "--model {given}/empty": "{given}/empty/config.json cannot be read (...)" + HAS,
    "--model {given}/broken-config": "{given}/broken-config/config.json cannot be read (...)" + HAS,
    "--model {given}/list-config": "{given}/list-config/config.json cannot be read (not a JSON object)" + HAS,
    "--model {given}/deep-config": "{given}/deep-config/config.json cannot be read (...)" + HAS,
    "--model {given}/latin-config": "{given}/latin-config/config.json cannot be read (...)" + HAS,
    "--task sudoku": "unknown task 'sudoku'; choose one of {tasks}",
    "--task countdown:hard=1": f"task countdown does not understand 'hard=1'; its knobs are {KNOBS}",
    "--task countdown:high=x": f"task countdown does not understand 'high=x'; its knobs are {KNOBS}",
    "--task countdown:give_up=nan": f"task countdown does not understand 'give_up=nan'; its knobs are {KNOBS}",
    "--task countdown:pool=-1": "task countdown with pool=-1: a number of problems is needed, or 0 for all of them",
    "--task navigation:max_steps=1000000000": "Navigation(...): 1 <= min_legs <= max_legs <= 20, max_steps 1 to 100, grain 1 to 180 are allowed",
    "--task countdown:min_numbers=9": "countdown takes 2 to 6 numbers, not 9 to 3",
    "--task s3:elements=1": "s3 takes 2 to 100 elements, not 1",
    "--out": "argument --out: expected one argument{help}",
    "--out {given}/file": "--out {given}/file cannot be made (...); name another folder",
    "--out {given}/file/x": "--out {given}/file/x cannot be made (...); name another folder",
    "--out {given}/{script}-run": "{given}/{script}-run holds a run. Continue: --resume {given}/{script}-run   "
    "New folder: --out {given}/{script}-run-2",
    "--resume nothing": "--resume nothing: no run.json there; name the folder of a run",
    "--resume auto": "--resume auto: no run.json there; name the folder of a run",
    "--resume {given}/plain": "--resume {given}/plain: no run.json there; name the folder of a run",
    "--resume {given}/broken-run": "{given}/broken-run/run.json cannot be read (...); such a folder has settings",
    "--resume {given}/list-run": "{given}/list-run/run.json cannot be read (not a JSON object); such a folder has settings",
    "--resume {given}/no-config-run": "--resume {given}/no-config-run: run.json there holds no settings",
    "--resume {given}/list-config-run": "--resume {given}/list-config-run: run.json there holds no settings",
    "--resume {given}/text-run": "{given}/text-run/run.json: argument --timeout: invalid int value: 'fast'{help}",
    "--resume {given}/null-run": "{given}/null-run/run.json: argument --timeout: invalid int value: 'None'{help}",
    "--resume {given}/tpu-run": "{given}/tpu-run/run.json: argument --device: invalid choice: 'tpu' (choose from ...){help}",
    "--resume {given}/other-run": "--resume {given}/other-run is a run of other.py, not of {script}.py",
    "--resume {given}/{script}-run": "--resume {given}/{script}-run: no checkpoint there; start again",
    "--resume {given}/{script}-run --out b": "--resume {given}/{script}-run goes on in that folder; leave --out b out",
    "--resume {given}/{script}-run --seed 3": "--resume {given}/{script}-run is another run (--seed 0 there, 3 here); "
    "leave out what differs",
}
TRAINING = {
    "--learning_rate 3": "unknown flag --learning_rate; did you mean --lr?",
    "--batchsize 8": "unknown flag --batchsize; did you mean --batch_size?",
    "--batch 8": "unknown flag --batch; did you mean --batch_size?",
    "--lr": "argument --lr: expected one argument{help}",
    "--lr fast": "argument --lr: invalid float value: 'fast'{help}",
    "--lr nan": "--lr nan: a number of at least 0 is needed",
    "--lr inf": "--lr inf: a number of at least 0 is needed",
    "--lr -0.001": "--lr -0.001: a number of at least 0 is needed",
    "--steps 2.5": "argument --steps: invalid int value: '2.5'{help}",
    "--steps -1": "--steps -1: a number of at least 0 is needed",
    "--batch_size -8": "--batch_size -8: a number of at least 0 is needed",
    "--eval_samples 0": "--eval_samples 0: a number of at least 1 is needed",
    "--save_every -1": "--save_every -1: a number of at least 0 is needed",
}


def config(name: str, what: str) -> tuple[str, str]:
    return f"--model {{given}}/{name}", f"{{given}}/{name}/config.json: {what} is not supported"


def tensors(name: str, count: int, what: str) -> tuple[str, str]:
    return f"--model {{given}}/{name}", f"{{given}}/{name}: {count} tensors do not match config.json (first: {what})"


QKV = "model.layers.0.self_attn.k_proj.weight has shape (32, 32), not"
DECODER = {  # the scripts with the shared model
    "--model Qwen2.5-1.5B": UNREACHABLE,
    "--model Qwen/Qwen2.5-1.5B": UNREACHABLE,
    **dict(
        [
            config("gemma", "model_type gemma3 (supported: llama, qwen2, qwen3)"),
            config("gelu", "hidden_act gelu_new (supported: silu)"),
            config("yarn", "rope type yarn (supported: default)"),
            config("rope-list", "rope type [1] (supported: default)"),
            config("rope-text", "rope_theta ten"),
            config("no-rope", "rope_theta None"),
            config("sliding", "use_sliding_window"),
            config("size-text", "hidden_size 32"),
            config("size-negative", "hidden_size -32"),
            config("no-heads", "num_attention_heads 0"),
            config("layers", "num_hidden_layers 1000000000"),
            config("eps-text", "rms_norm_eps small"),
            tensors("three-heads", 8, f"{QKV} (10, 32)"),
            tensors("three-keys", 4, f"{QKV} (96, 32)"),
            tensors("odd-head", 8, f"{QKV} (7, 32)"),
            tensors("no-tensor", 1, "model.layers.1.mlp.up_proj.weight is missing"),
            tensors("extra-tensor", 1, "\\x1b[2J is unknown"),
            tensors("shape", 1, "model.norm.weight has shape (9,), not (32,)"),
        ]
    ),
    "--model {given}/eos-text": "{given}/eos-text: ['end'] in its config files is no token, of which there are 230",
    "--model {given}/eos-far": "{given}/eos-far: [1000000] in its config files is no token, of which there are 230",
    "--model {given}/number-tokenizer-config": "{given}/number-tokenizer-config: ['eos_token 5'] in its config files is "
    "no token, of which there are 230",
    "--model {given}/far-generation": "{given}/far-generation: [1000000] in its config files is no token, of which "
    "there are 230",
    "--model {given}/text-generation": "{given}/text-generation: ['all'] in its config files is no token, of which "
    "there are 230",
    "--model {given}/broken-generation": "{given}/broken-generation/generation_config.json cannot be read (...)" + HAS,
    "--model {given}/lfs": 'model.safetensors is 63 bytes and starts with "version https://git-lfs": a Git LFS pointer. '
    "Run: git lfs pull",
    "--model {given}/cut": "{given}/cut/model.safetensors is damaged (...); download or save it again",
    "--model {given}/empty-weights": "{given}/empty-weights/model.safetensors is damaged (...); download or save it again",
    "--model {given}/no-weights": "no model.safetensors in {given}/no-weights; weights are read from safetensors files "
    "only",
    "--model {given}/broken-index": "{given}/broken-index/model.safetensors.index.json cannot be read (...)" + HAS,
    "--model {given}/list-index": "{given}/list-index/model.safetensors.index.json: weight_map must name the file of "
    "each tensor; download it again",
    "--model {given}/number-index": "{given}/number-index/model.safetensors.index.json: weight_map must name the file "
    "of each tensor; download it again",
    "--model {given}/outside-index": "no other.safetensors in {given}/outside-index; weights are read from safetensors "
    "files only",
    "--model {given}/absolute-index": "no passwd in {given}/absolute-index; weights are read from safetensors files only",
    "--model {given}/no-tokenizer": "{given}/no-tokenizer/tokenizer.json cannot be read (...); download or save it again",
    "--model {given}/broken-tokenizer": "{given}/broken-tokenizer/tokenizer.json cannot be read (...); download or save "
    "it again",
    "--model {given}/other-tokenizer": "{given}/other-tokenizer/tokenizer.json cannot be read (...); download or save "
    "it again",
    "--model {given}/no-tokenizer-config": "{given}/no-tokenizer-config/tokenizer_config.json cannot be read (...)"
    + HAS,
    "--max_new_tokens -1": "--max_new_tokens -1: a number of at least 0 is needed",
    "--max_new_tokens 1e3": "argument --max_new_tokens: invalid int value: '1e3'{help}",
}
CHAT = {  # those that take --chat and put a task's question into a prompt
    "--temperature nan": "--temperature nan: a number of at least ... is needed",
    "--temperature=-1": "--temperature -1.0: a number of at least ... is needed",
    "--chat": "--chat: {small}: it has no chat template; leave --chat out",
    "--model {given}/plain --chat": "--chat: {given}/plain: it has no chat template; leave --chat out",
    "--model {given}/broken-template --chat": "--chat: {given}/broken-template: ...; leave --chat out",
    "--model {given}/raising-template --chat": "--chat: {given}/raising-template: only in pairs; leave --chat out",
    "--model {given}/code --chat": "--chat: {given}/code: ...contains custom code...; leave --chat out",
}
PROBLEMS = {  # those whose problems come from a task or a file of questions
    "--task gsm8k": "gsm8k and math read a file: give --data FILE.jsonl, or gsm8k:data=FILE.jsonl, with fields question, "
    "answer",
    "--task countdown:high=1,min_target=90": "no solvable countdown problem found for Countdown(...); widen the ranges",
    "--task multiplication:max_digits=1 --eval_problems 20": "only 9 distinct held-out problems of Multiplication(...); "
    "ask for fewer than 20",
    "--data {given}/good.jsonl": "task countdown makes its own problems and reads no data file; drop '{given}/good.jsonl'",
    "--task gsm8k --data {given}/good.jsonl": "GSM8K has no compact prompt: give a pre-trained --model",
}
for name, message in {
    "none": "cannot read the data file {path}: ...",
    "empty": "{path} is empty; it must hold one JSON object per line",
    "no-json": "{path}, line 2: ...: 'hello'",
    "no-answer": '{path}, line 2: field "answer" is missing or empty: ...',
    "many": "{path}, line 1: gsm8k: the gold answer 'many' is not a number; leave this row out: ...",
    "latin": "cannot read the data file {path}: ...",
    "deep": "{path}, line 1: ...",
}.items():
    path = f"{{given}}/{name}.jsonl"
    PROBLEMS[f"--model {{given}}/plain --task gsm8k --data {path}"] = message.format(path=path)
OWN = {
    "grpo": {
        "--batch_size 12 --group_size 8": "--batch_size 12 is not divisible by --group_size 8; try 8 or 16",
        "--batch_size 4 --group_size 8": "--batch_size 4 is not divisible by --group_size 8; try 8",
        "--batch_size 16 --group_size 8 --updates 3": "--batch_size 16 is not divisible by --group_size 8 x --updates 3; "
        "try 24",
        "--group_size 1": "--group_size 1: a number of at least 2 is needed",
        "--temperature 0": "--temperature 0.0: a number of at least 0.01 is needed",
        "--ref_every 2": "--ref_every 2 needs --kl_coef: without it there is no reference",
        "--max_new_tokens 50 --overlong_cache 51": "--overlong_cache 51: at most --max_new_tokens 50 is possible",
        "--length_schedule soon": "--length_schedule soon: value:step,value:step is needed",
        "--length_schedule 64": "--length_schedule 64: value:step,value:step is needed",
        "--length_schedule 64:0:1": "--length_schedule 64:0:1: value:step,value:step is needed",
        "--length_schedule=-5:0": "--length_schedule -5:0: value:step,value:step is needed",
        "--length_schedule 0:0": "--length_schedule 0:0: value:step,value:step is needed",
        "--resume {given}/grpo-run --group_size 8 --task multiplication": "--resume {given}/grpo-run is another run (--task "
        "countdown there, multiplication here; --group_size 4 there, 8 here); leave out what differs",
    },
    "nsr": {
        "--mode both": "argument --mode: invalid choice: 'both' (choose from ...){help}",
        "--batch_size 12 --updates 2": "--batch_size 12 is not divisible by --group_size 4 x --updates 2; try 8 or 16",
        "--positive_weight 0.5 --mode psr": "--positive_weight 0.5 does nothing with --mode psr; leave it out",
        "--clip_eps 0.3": "--clip_eps 0.3 needs --objective ratio and --updates 2 or more: else nothing is clipped; leave "
        "it out",
        "--kl_coef 0.1": "unknown flag --kl_coef; see --help",
    },
    "ppo": {
        "--batch_size 12 --group_size 8": "--batch_size 12 is not divisible by --group_size 8 and --mini_batches 2; try 8 "
        "or 16",
        "--batch_size 8 --mini_batches 3": "--batch_size 8 is not divisible by --group_size 4 and --mini_batches 3; try 12",
        "--gamma 1.1": "--gamma 1.1: a number from 0 to 1 is needed",
        "--gae_lambda 2": "--gae_lambda 2.0: a number from 0 to 1 is needed",
        "--critic none": "argument --critic: invalid choice: 'none' (choose from ...){help}",
        "--critic separate --value_coef 0.5": "--value_coef 0.5 does nothing without --critic shared",
        "--kl_type k3": "--kl_type k3 does nothing without --kl_coef",
        "--kl_in loss": "--kl_in loss does nothing without --kl_coef",
        "--kl_coef 0.1 --kl_in loss": "--kl_in loss with --kl_type k1 has a gradient of mean 0; try --kl_type k3, or "
        "--kl_in reward",
        "--exceed_reward=-1": "--exceed_reward -1.0 does nothing without --reward plain",
        "--format_weight 0.5": "--format_weight 0.5 does nothing without --reward plain",
        "--repetition_penalty 0 --repetition_gamma 0.9": "--repetition_gamma 0.9 does nothing without --repetition_penalty",
        "--repetition_penalty -1": "--repetition_penalty -1.0: a number of at least 0 is needed",
        "--reward cosine-D": "argument --reward: invalid choice: 'cosine-D' (choose from ...){help}",
        "--epochs 0": "--epochs 0: a number of at least 1 is needed",
        "--updates 2": "unknown flag --updates; ...",
        "--resume {given}/ppo-run --critic shared": "--resume {given}/ppo-run: its critic is another; leave what changes "
        "it out",
    },
    "sft": {
        "--model tiny --num_layers 3": "--num_layers and --hidden_size are for scratch, not tiny",
        "--max_length 1": "--max_length 1: a number of at least 2 is needed",
        "--hidden_size 16": "--hidden_size 16: a number of at least 32 is needed",
        "--model scratch --hidden_size 40": "--hidden_size 40 is no multiple of 32, the size of a head",
        "--task multiplication": "--task multiplication makes no traces: give --data FILE.jsonl",
        "--data {given}": "cannot read the data file {given}: ...",
        "--data {given}/none.jsonl": "cannot read the data file {given}/none.jsonl: ...",
        "--data {given}/empty.jsonl": "{given}/empty.jsonl is empty; it must hold one JSON object per line",
        "--data {given}/no-completion.jsonl": "{given}/no-completion.jsonl, line 2: prompt and completion, or messages, are "
        "needed: ...",
        "--data {given}/cut.jsonl": "{given}/cut.jsonl, line 2: ...",
        "--data {given}/number.jsonl": "{given}/number.jsonl, line 2: prompt and completion, or messages, are needed: ...",
        "--data {given}/list.jsonl": "{given}/list.jsonl, line 2: prompt and completion, or messages, are needed: '[1]'",
        "--data {given}/latin.jsonl": "cannot read the data file {given}/latin.jsonl: ...",
        "--data {given}/deep.jsonl": "{given}/deep.jsonl, line 1: ...",
        "--data {given}/messages.jsonl": "{given}/messages.jsonl, line 1: examples with messages need --chat: ...",
        "--data {given}/messages.jsonl --select random:2": "{given}/messages.jsonl, line 1: examples with messages need "
        "--chat: ...",
        "--data {given}/pairs.jsonl --cot none": "{given}/pairs.jsonl, line 1: --cot, --perturb and --loss_on thought, "
        "answer need a completion with </think>: ...",
        "--data {given}/pairs.jsonl --select limo:2": "--data {given}/pairs.jsonl: no example passes --select limo:2 and "
        "--decontaminate 0",
        "--data {given}/pairs.jsonl --select s1": "--select s1: one of s1, limo, random, longest, a colon and a number of "
        "lines are needed",
        "--data {given}/pairs.jsonl --select s1:2 --weak {given}/none.jsonl": "cannot read the data file {given}/none.jsonl: "
        "...",
        "--data {given}/pairs.jsonl --select s1:2 --weak {given}/pairs.jsonl": "{given}/pairs.jsonl, line 1: "
        "KeyError('correct'): ...",
        "--data {given}/nothing-to-learn.jsonl": "--data {given}/nothing-to-learn.jsonl: no example has at most --max_length "
        "... tokens and something to learn",
        "--data {given}/pairs.jsonl --max_length 3": "--data {given}/pairs.jsonl: no example has at most --max_length 3 "
        "tokens and something to learn",
        "--select random:2": "--select and --decontaminate choose lines: give --data",
        "--decontaminate 8": "--select and --decontaminate choose lines: give --data",
        "--weak a.jsonl": "--weak a.jsonl does nothing without --select s1 or limo",
        "--perturb shuffle": "--perturb shuffle: one of shuffle, delete, insert, digits, answer, a colon and a share from 0 "
        "to 1 are needed",
        "--perturb shuffle:2": "--perturb shuffle:2: one of shuffle, delete, insert, digits, answer, a colon and a share from "
        "0 to 1 are needed",
        "--keep all": "--keep all --cap 0 needs --sample",
        "--cap 2": "--keep correct --cap 2 needs --sample",
        "--keep best": "argument --keep: invalid choice: 'best' (choose from ...){help}",
        "--sample 4 --data {given}/pairs.jsonl": "--sample asks the task: leave out --data and --resume",
        "--resume {given}/sft-run --model scratch": "--resume {given}/sft-run is another run (--model {small} there, scratch "
        "here); leave out what differs",
    },
    "coconut": {
        "--mode latent": "argument --mode: invalid choice: 'latent' (choose from ...){help}",
        "--hidden_size 32": "--num_layers and --hidden_size are for scratch, not {small}",
        "--model scratch --hidden_size 40": "--hidden_size 40 is no multiple of 16, the size of a head",
        "--task countdown": "--task countdown has no steps to replace: take affine, s3, prosqa, or give --data",
        "--task affine:modulus=11": "AffineChain(length=3, modulus=11): length 1 to 50 and modulus 3 to 10 are allowed, so "
        "that a value is one digit",
        "--data {given}/none.json": "cannot read the data file {given}/none.json: ...",
        "--data {given}/empty.jsonl": "{given}/empty.jsonl is empty; it must hold problems with question, steps and answer",
        "--data {given}/good.jsonl": '{given}/good.jsonl, line 1: "steps" must be a list of texts: ...',
        "--data {given}/deep.jsonl": "{given}/deep.jsonl, line 1: ...",
        "--gate 1.5": "--gate 1.5, --uniform_prob 0.2: at most 1",
        "--c 0": "--c 0: a number of at least 1 is needed",
        "--c 2 --mode cot": "--c 2 does nothing with --mode cot; leave it out",
        "--gate 0.5": "--gate 0.5 does nothing with --mode no_curriculum; leave it out",
        "--mode no_thoughts --c 2": "--c 2 does nothing with --mode no_thoughts; leave it out",
        "--mode coconut --epochs_per_stage 3": "--epochs_per_stage 3 needs --data",
        "--group_size 4": "unknown flag --group_size; ...",
    },
    "recurrent_depth": {
        "--model tiny": "...tiny: model_type llama: this script has a model of its own and needs huginn_raven; --model "
        "scratch makes one",
        "--model Qwen2.5-1.5B": FOLDER.format("Qwen2.5-1.5B"),
        "--model elsewhere --core 2": "--core 2: for --model scratch only, not for elsewhere",
        "--hidden_size 20 --num_heads 4": "--hidden_size 20 is no multiple of 8: 4 heads of an even size are needed",
        "--task countdown": "--task countdown: s3 or text is needed here, a label at every position",
        "--task text": "--task text with --data none: text needs a file, another task takes none",
        "--data {given}/short.txt": "--task s3:elements=10 with --data {given}/short.txt: text needs a file, another task "
        "takes none",
        "--task text --data {given}/none.txt": "--data {given}/none.txt cannot be read (...); a text file in UTF-8 is needed",
        "--task text --data {given}/latin.jsonl": "--data {given}/latin.jsonl cannot be read (...); a text file in UTF-8 is "
        "needed",
        "--task text --data {given}/short.txt --length 400": "a text of 840 tokens: 400 at a time need at least 4020",
        "--tokenizer there": "...: text needs a file, another task takes none",
        "--task text --data {given}/short.txt --tokenizer {given}/empty": "{given}/empty/tokenizer.json cannot be read (...); "
        "download or save it again",
        "--mean_r 0": "--mean_r 0: a number of at least 1 is needed",
        "--decay 2": "--decay 2.0 is a share of the steps: 0 to 1",
        "--mean_recurrence 4": "unknown flag --mean_recurrence; ...",
        "--eval_problems 300 --task s3:elements=2": "only ... distinct held-out problems of S3(elements=2); ask for fewer "
        "than 300",
    },
    "budget_forcing": {
        "--caps 8,4": "--caps 8,4: rising whole numbers are needed, as 1,2,4",
        "--caps 0,4": "--caps 0,4: rising whole numbers are needed, as 1,2,4",
        "--waits a": "--waits a: rising whole numbers are needed, as 1,2,4",
        "--max_new_tokens 12": "--max_new_tokens 12 leaves no room for an answer behind --caps 4,8,12; try 44",
        "--length_prompt": "--length_prompt: {small} was taught no words for a length",
        "--model ,": "--model ,: a model is needed",
        "--budget_mode both": "argument --budget_mode: invalid choice: 'both' (choose from ...global..., ...per_round...){help}",
        "--cap 3": "unknown flag --cap; did you mean --caps?",
    },
    "specreason": {
        "--model tiny-rl --score digit": "--score digit: tiny-rl was not taught <score>; take --model tiny-judge or --score "
        "likelihood",
        "--model SmolLM9": FOLDER.format("SmolLM9"),
        "--draft {given}/plain": "--draft {given}/plain has another tokenizer than --model {small}",
        "--draft none": FOLDER.format("none"),
        "--thresholds 1;2": "--thresholds 1;2: 1,3,5 is the form",
        "--gamma 0": "--gamma 0: a number of at least 1 is needed",
        "--top_p 0": "--top_p 0.0: a number of at least 0.01 is needed",
        "--treshold 3": "unknown flag --treshold; did you mean --threshold?",
    },
}
TRAINED = [script for script in EVERY if script not in ("budget_forcing", "specreason")]
PROMPTED = [script for script in EVERY if script not in ("recurrent_depth", "coconut")]
ROWS = [(script, flags, message) for script in EVERY for flags, message in EVERY_SCRIPT.items()]
ROWS += [(script, flags, message) for script in TRAINED for flags, message in TRAINING.items()]
ROWS += [(s, flags, message) for s in EVERY if s != "recurrent_depth" for flags, message in DECODER.items()]
ROWS += [(script, flags, message) for script in PROMPTED for flags, message in CHAT.items()]
ROWS += [(s, flags, message) for s in PROMPTED if s != "sft" for flags, message in PROBLEMS.items()]
ROWS += [(script, flags, message) for script, rows in OWN.items() for flags, message in rows.items()]
SECONDS = {"--chat": 10.0}  # imports transformers; the others have three of CPU time


def command(script: str, flags: str, small: Path) -> list[str]:
    """The arguments of a row: those of the smallest run, then its own."""
    if script == "recurrent_depth":  # the sizes are for a model from scratch
        own = any(flag in flags for flag in ("--model", "--hidden_size", "--resume"))
        return [*("--steps 1".split() if own else EVERY[script].split()), *flags.split()]
    model = re.search("--model (/.*?/(plain|code|.*-template))", flags)  # a draft must have the same tokenizer
    more = ["--draft", model[1]] if model and script == "specreason" and "--draft" not in flags else []
    return [*EVERY[script].split(), "--model", str(small), *flags.split(), *more]


def pattern(message: str) -> str:
    """A regular expression of a message, in which ... is any text on one line."""
    return ".*".join(map(re.escape, message.split("...")))


def state(folder: Path) -> dict:
    """What can be made, lost or changed: every path with its size and time."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture(scope="session")
def given(small, tmp_path_factory):
    return make_given(tmp_path_factory.mktemp("given"), small)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))  # whatever this machine has
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def words(script: str, given: Path, small: Path) -> dict[str, str]:
    """What the braces of flags and messages stand for."""
    help = f"; python {script}.py --help lists all flags"
    names = ", ".join(importlib.import_module(script).SHORT_NAMES)
    return {"script": script, "given": given, "small": small, "help": help, "names": names, "tasks": ", ".join(TASKS)}


def complaint(script: str, done: SimpleNamespace, message: str) -> str:
    """What is wrong with a refusal, which is exit code 2 and this one line, alone; nothing: ""."""
    good = re.fullmatch(pattern(f"{script}.py: error: {message}") + "\n", done.err) and done.code == 2
    return "" if good else f"exit code {done.code}, said {done.err!r}, not {message!r}"


@pytest.mark.parametrize("script", EVERY)
def test_bad_input(script, cwd, small, given, offline, capfd):
    """All rows of a script."""
    module, fill, wrong = importlib.import_module(script), words(script, given, small), []
    before = state(given)
    for _, flags, message in (row for row in ROWS if row[0] == script):
        device = flags.removeprefix("--device ")
        if device in ("cuda", "mps") and getattr(torch, device).is_available():
            continue
        started = time.process_time()
        try:
            code = module.main(loop_of(module), module.Config, command(script, flags.format(**fill), small))
        except Exception as error:
            code = repr(error)
        seconds, (_, err) = time.process_time() - started, capfd.readouterr()
        found = [complaint(script, SimpleNamespace(code=code, err=err), message.format(**fill))]
        most = next((s for word, s in SECONDS.items() if word in flags), 3.0)
        found += [f"took {seconds:.1f} s"] * (seconds > most)
        found += ["a file was made"] * any(cwd.iterdir())
        wrong += [f"{script}.py {flags}: {what}" for what in found if what]
    assert not wrong, "\n" + "\n".join(wrong)
    assert state(given) == before, "a file was made, lost or changed"


def as_processes(rows: list[tuple[str, str]], cwd: Path, given: Path, small: Path) -> None:
    messages = {(script, flags): message for script, flags, message in ROWS}
    for script, flags in rows:
        fill = words(script, given, small)
        done = finish(start(script, " ".join(command(script, flags.format(**fill), small)), cwd))
        assert not complaint(script, done, messages[script, flags].format(**fill)) and done.out == ""
    assert not any(cwd.iterdir())


def test_bad_input_as_a_process(cwd, given, small):
    """The exit code and the one line are the same outside."""
    rows = [("grpo", "--batch_size 12 --group_size 8"), ("budget_forcing", "--caps 8,4")]
    as_processes([*rows, ("sft", "--data {given}/cut.jsonl")], cwd, given, small)


@pytest.mark.slow
def test_bad_input_as_processes(cwd, given, small):
    rows = [("grpo", "--model {given}/lfs"), ("ppo", "--gamma 1.1"), ("nsr", "--mode both"), ("coconut", "--c 0")]
    rows += [("recurrent_depth", "--decay 2"), ("specreason", "--gamma 0"), ("sft", "--model {given}/extra-tensor")]
    as_processes([*rows, ("grpo", "--resume {given}/tpu-run"), ("grpo", "--lr nan")], cwd, given, small)


# --------------------------------------------------------------------------------------------------- security


def keywords(call: ast.Call) -> dict:
    return {k.arg: getattr(k.value, "value", None) for k in call.keywords}


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), ROOT / "docs" / "report.py"], ids=lambda path: path.name)
def test_no_source_runs_what_it_reads(path):
    """No eval or exec, no pickle but torch.load(weights_only=True), no shell, no code of a model folder."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [(ast.unparse(node.func), keywords(node)) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for name, given in calls:
        last = name.rpartition(".")[2]
        assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), name
        assert not name.startswith(("pickle.", "marshal.", "shelve.", "yaml.")), name
        assert not given.get("shell") and not given.get("trust_remote_code")
        assert name != "torch.load" or given.get("weights_only") is True
        assert last != "from_pretrained" or given.get("trust_remote_code") is False, name
        assert last not in ("sympify", "parse_expr", "unsafe_load"), name


class Pickled:
    """What makes a folder as soon as it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


PICKLES = {"pickle": lambda value, path: path.write_bytes(pickle.dumps(value)), "torch.save": torch.save}


@fault("code in a checkpoint's pickle", "not run: `cannot be read`, `taking the one before`", 0)
@pytest.mark.parametrize("form", PICKLES)
def test_pickled_code_in_a_checkpoint(run, cwd, form, happens):
    assert run("grpo", "--out a --steps 2 --save_every 1 --eval_problems 0").code == 0
    PICKLES[form](
        {"step": 2, "world": 1, "optimizer": Pickled(cwd / "written")}, cwd / "a" / "step-000002" / "trainer.pt"
    )
    done = run("grpo", "--resume a", model=None, base=False)
    assert done.code == 0 and not (cwd / "written").exists()
    says(happens, done.out)


@fault("code in a model folder (tokenizer.py, auto_map)", "not run; --chat, which would need it, is refused", 0)
def test_code_in_a_model_folder(run, cwd, given, code):
    done = run("grpo", "--out a --steps 1 --eval_problems 0", model=given / "code")
    assert done.code == code and not (given / "written-by-the-model").exists(), done.err


def controls(text: str) -> set[str]:
    return {c for c in text if not c.isprintable() and c not in "\n"}


@fault("control characters in problems, samples, names and errors", "written out on the terminal", "")
def test_nothing_steers_the_terminal(run, cwd, given, monkeypatch, capfd):
    evil = "\x1b[2J\x1b]0;x\x07\u202e\x9b31m\r\x00"
    row = {"question": f"How many{evil}?", "answer": "#### 1"}
    (cwd / "data.jsonl").write_text((json.dumps(row) + "\n" + json.dumps(row | {"question": evil + "2"}) + "\n") * 30)
    monkeypatch.setattr(
        importlib.import_module("rewards"), "split_of", lambda key: "test" if key.endswith("2") else "train"
    )
    flags = "--task gsm8k --data data.jsonl --out a --steps 1 --eval_problems 1"
    done = run("grpo", flags, model=given / "plain")
    assert done.code == 0 and not controls(done.out + done.err) and "\\x1b[2J" in done.out
    kept = (cwd / "a" / "samples.jsonl").read_text(encoding="utf-8")
    assert evil in json.loads(kept.splitlines()[0])["problem"]["question"]  # as it was, in the file
    done = run("grpo", f"--model \x1b[2J/{evil}".replace("\r", ""))
    assert done.code == 2 and not controls(done.err)


@fault("HTML in problems, samples, settings and names", "shown as text by docs/report.py", "")
def test_report_escapes(run, cwd, monkeypatch):
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'\x1b[2J\u202e</pre></style>"
    assert run("grpo", "--out a").code == 0
    for name in ("samples.jsonl", "metrics.jsonl"):
        lines = [json.loads(line) for line in (cwd / "a" / name).read_text(encoding="utf-8").splitlines()]
        for line in lines:
            line[evil] = line.get("loss", 0.5)
            if "pieces" in line:
                line |= {
                    "prompt": evil,
                    "problem": {evil: evil},
                    "rewards": line["rewards"] | {"answer": evil, evil: 1.0},
                }
                line["pieces"] = [evil] * len(line["pieces"])
        (cwd / "a" / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    edit_json(
        cwd / "a" / "run.json", command=evil, script=evil, device=evil, chosen={evil: evil}, versions={evil: evil}
    )
    settings = json.loads((cwd / "a" / "run.json").read_text())["config"] | {"model": evil, "task": evil, evil: evil}
    edit_json(cwd / "a" / "run.json", config=settings)
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    importlib.import_module("report").main(["a"])
    page = (cwd / "a" / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert" in page and not controls(page)
    for tag in ("<script>alert", "<img src", "</pre></style>"):
        assert tag not in page, page[page.index(tag) - 200 : page.index(tag)]


# ------------------------------------------------------------------------------------------- docs/faults.md

HEAD = """# Faults and what happens

Made by `python tests/test_faults.py --write` from the tables of the tests, and compared with them by a test.

Exit codes: 0 done, perhaps with a notice; 1 a fault while running; 2 bad usage or bad input; 130 after Ctrl-C, 143 after
SIGTERM. Every message is one line on stderr without a traceback, from rank 0 alone unless a fault is one rank's own.
"""


def names_of(scripts: list[str]) -> str:
    """Scripts in few words: all, all but one or two, or their names."""
    others = [script for script in EVERY if script not in scripts]
    if len(others) < 3:
        return "all" + (f" but {', '.join(others)}" if others else "")
    return ", ".join(scripts)


def cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\x1b", "\\x1b")


def document() -> str:
    """docs/faults.md: first what happens while a run is under way, then bad input."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if "@fault(" in path.read_text(encoding="utf-8"):
            importlib.import_module(path.stem)
    lines = [HEAD, "## While a run is under way\n", "| fault | what happens | exit code | test |", "|---|---|---|---|"]
    for row in sorted(FAULTS, key=lambda row: (row["test"].split("::")[0], row["what"])):
        lines.append("| " + " | ".join(map(cell, (row["what"], row["happens"], row["code"], row["test"]))) + " |")
    lines += [
        "\n## Bad input\n",
        "Exit code 2, nothing made or lost, less than three seconds of CPU time: test_faults.py::test_bad_input.",
    ]
    lines += [
        "`...` stands for words of a library, {given} for a folder of bad things that the test makes (CONFIGS, FILES, DATA and"
    ]
    lines += [
        "RUNS there), {small} for a good model, {names}, {tasks} and {help} for lists and a hint that end a message.\n"
    ]
    lines += ["| scripts | flags | message |", "|---|---|---|"]
    scripts: dict[tuple[str, str], list[str]] = {}
    for script, flags, message in ROWS:
        scripts.setdefault((flags, message), []).append(script)
    for (flags, message), asked in scripts.items():
        lines.append(f"| {names_of(asked)} | `{cell(flags)}` | {cell(message)} |")
    return "\n".join(lines) + "\n"


def test_document_is_up_to_date():
    written = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    assert written == document(), "python tests/test_faults.py --write"


if __name__ == "__main__":
    sys.modules["test_faults"] = sys.modules["__main__"]
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_faults.py --write")
    (ROOT / "docs" / "faults.md").write_text(document(), encoding="utf-8")
