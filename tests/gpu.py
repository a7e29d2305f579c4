"""How fast grpo.py and sft.py are on one GPU, in about five minutes, with the checks that need one.

    python tests/gpu.py                  # a random model of Qwen2.5-1.5B's shape, made on the spot
    python tests/gpu.py --model DIR      # another: a step of sft.py is timed, too
    python tests/gpu.py --model DIR --device cpu    # the same with the sizes of a laptop
    python tests/gpu.py --device cpu --quick    # a small shape, to see that everything runs

A random model shows time, not learning: no answer ends, and every answer is trained.

checks    the captured step draws the eager step's tokens; log-probabilities of the sampler against
          the trainer's; logits in float32 against transformers'. The exit code is 1 if one fails.
sampler   generate() of grpo.py, prompts of 150 tokens in groups, medians of alternating runs with
          transformers' `generate`; bytes: weights and cache that a step reads; look: share of the
          time that looking for stop strings takes.
step      a step of `python grpo.py --task countdown` with that script's own choices; useful: 6
          FLOPs a parameter and padded token, whatever is computed twice.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo  # noqa: E402
import sft  # noqa: E402
from rewards import make_task, micro_batches  # noqa: E402

QWEN = {"model_type": "qwen2", "hidden_act": "silu", "hidden_size": 1536, "rms_norm_eps": 1e-6}
QWEN |= {"intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
QWEN |= {"num_key_value_heads": 2, "vocab_size": 151936, "rope_theta": 1e6}
QWEN |= {"tie_word_embeddings": True, "architectures": ["Qwen2ForCausalLM"], "eos_token_id": None}
SMALL = QWEN | {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "vocab_size": 600}
FULL = {"shape": QWEN, "rows": (1, 64, 512), "new": 128, "prompt": 150, "group": 16, "rounds": 3}
LAPTOP = FULL | {"rows": (1, 64), "new": 64, "prompt": 140, "group": 8}
QUICK = {"shape": SMALL, "rows": (1, 4), "new": 20, "prompt": 9, "group": 2, "rounds": 1}


# ------------------------------------------------------------------------------------ the model


def make_folder(folder: Path, shape: dict) -> None:
    """A random model of the shape in bfloat16, and a tokenizer of as many words."""
    with torch.device("meta"):
        model = grpo.Model(shape)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie()
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data.normal_(0, 0.02) if weight.ndim == 2 else weight.data.fill_(weight.ndim)
    model.folder = folder
    grpo.save_model(model, folder)
    words = [chr(i) for i in range(32, 127)] + ["\n"]
    words += [f"w{i}" for i in range(shape["vocab_size"] - len(words))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))


def load(script, folder: Path, device: str, flags: str = "") -> tuple:
    """The script's Run and its models, with what it chooses for this card."""
    run = script.Run(script.parse_config(script.Config, f"--device {device} {flags}".split()))
    run.cfg.model = str(folder)
    return run, *run.load(script.BY_SIZE)


def size_of(model: grpo.Model) -> int:
    return sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------------------------- timing


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work, device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def alternate(works: dict, rounds: int, device: torch.device) -> dict:
    """Median seconds of each work, run in turn, after a warm-up."""
    for work in works.values():
        work()
    times = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return {name: median(found) for name, found in times.items()}


def peak(device: torch.device) -> float:
    """The most memory in use since the last call, in GB."""
    if device.type != "cuda":
        return math.nan
    most = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return most


# ------------------------------------------------------------------------------------- checks


def make_prompts(model: grpo.Model, count: int, length: int) -> list[list[int]]:
    generator, vocab = torch.Generator().manual_seed(0), model.config["vocab_size"]
    return torch.randint(1, vocab, (count, length), generator=generator).tolist()


@torch.inference_mode()
def eager(model: grpo.Model, prompts: list, uniforms: torch.Tensor) -> grpo.Decoding:
    """What generate does, without a graph, for rows that do not end."""
    s = grpo.Decoding(model, prompts, uniforms, 1.0)
    s.cache.width += uniforms.shape[1]
    for _ in range(uniforms.shape[1] - 1):
        s.step()
    return s


def equal_tokens(model: grpo.Model, prompts: list, rows: int, new: int) -> float:
    """Share of tokens that the captured step draws like the eager one."""
    uniforms = torch.rand(rows, new, generator=torch.Generator().manual_seed(0))
    model.eos_ids, ends = [], model.eos_ids
    found = grpo.generate(model, prompts, uniforms).tokens, eager(model, prompts, uniforms).tokens
    model.eos_ids = ends
    return (found[0] == found[1]).float().mean().item()


def sampler_gap(model: grpo.Model, sampler: grpo.Model, prompts: list, new: int) -> tuple:
    """Mean and largest difference of the log-probabilities of sampler and trainer."""
    uniforms = torch.rand(len(prompts), new, generator=torch.Generator().manual_seed(1))
    s = grpo.generate(sampler, prompts, uniforms)
    rows = [p + s.tokens[i].tolist() for i, p in enumerate(prompts)]
    mask = [[0] * len(p) + [1] * int(s.lengths[i]) for i, p in enumerate(prompts)]
    device = s.tokens.device
    tokens, mask = grpo.pad_rows(rows, device, torch.long), grpo.pad_rows(mask, device, torch.bool)
    with torch.no_grad():
        ours, _ = grpo.completion_logprobs(model, tokens[:, : mask.shape[1]], mask)
    drawn = torch.arange(new, device=device) < s.lengths[:, None]
    gap = (ours[mask[:, 1:]] - s.logprobs[drawn]).abs()
    return gap.mean().item(), gap.max().item()


@torch.no_grad()
def logits_gap(folder: Path, prompts: list, device: torch.device) -> float:
    """Largest difference of the logits from transformers', both in float32."""
    ids = torch.tensor(prompts, device=device)
    ours = grpo.load_model(folder, device)
    ours.vocab_bias = None
    found = ours.logits(ours(ids))
    del ours
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    return (found - theirs.to(device)(ids).logits).abs().max().item()


# ------------------------------------------------------------------------------------- tables


def bytes_read(model: grpo.Model, rows: int, capacity: int) -> int:
    """By a decode step: the weights once and the whole cache."""
    cache = grpo.Cache(model, 1, capacity)
    each = model.lm_head.weight.element_size()
    return each * size_of(model) + rows * 2 * sum(keys.nbytes for keys in cache.keys)


def sampler_row(run, sampler, theirs, rows: int, sizes: dict) -> dict:
    """Tokens a second of generate and of transformers, in turn, and shares of a step."""
    device, new, group = run.device, sizes["new"], min(rows, sizes["group"])
    prompts = make_prompts(sampler, rows // group, sizes["prompt"])
    uniforms = torch.rand(rows, new, generator=torch.Generator().manual_seed(2))
    prompter = grpo.Prompter(sampler, make_task("countdown", natural=True), False)
    ids = torch.tensor(prompts, device=device).repeat_interleave(group, 0)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": True}
    options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    ends, sampler.eos_ids = sampler.eos_ids, []
    works = {
        "ours": partial(grpo.generate, sampler, prompts, uniforms),
        "with looks": partial(grpo.generate, sampler, prompts, uniforms, stop=prompter.stop),
    }
    if theirs is not None:
        works["generate"] = partial(theirs.generate, ids, **options)
    took = alternate(works, sizes["rounds"], device)
    sampler.eos_ids = ends
    step = took["ours"] / new
    row = {"rows": rows, "tokens/s": rows / step, "ms a step": 1e3 * step}
    row["GB/s"] = bytes_read(sampler, rows, sizes["prompt"] + new) / step / 1e9
    row["look %"] = 100 * (took["with looks"] / took["ours"] - 1)
    if theirs is not None:
        row["x generate"] = took["generate"] / took["ours"]
    return row


def step_table(run, model, sampler, limit: int) -> dict:
    """A step of grpo.py: every answer is sampled to its limit or end, and trained."""
    cfg, device = run.cfg, run.device
    prompter = grpo.Prompter(model, make_task("countdown", natural=not model.is_tiny), False)
    optimizer = grpo.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    numbers = range(cfg.batch_size // cfg.group_size)
    problems = [(n, prompter.task.problem("train", 0, n)) for n in numbers]
    peak(device)
    result = {}
    for step in (1, 2):  # the first compiles and allocates
        began = time.perf_counter()
        done = grpo.rollout(run, sampler, prompter, problems, cfg.group_size, limit, step)
        result["sampling s"] = time.perf_counter() - began
        result["sampling GB"] = peak(device)
        gains = [1.0 - 2 * (i % 2) for i in range(len(done))]
        update = partial(grpo.update_policy, run, model, None, optimizer, done, gains, 0.0, limit)
        result["training s"] = seconds(update, device)
        result["training GB"] = peak(device)
        if step == 1:
            result["first s"] = time.perf_counter() - began
    lengths = [len(c.prompt) + len(c.tokens) for c in done]
    batches = micro_batches(lengths, cfg.micro_batch_tokens)
    padded = sum(len(batch) * lengths[batch[0]] for batch in batches)
    result["tokens"] = sum(len(c.tokens) for c in done)
    result["sampled tokens/s"] = result["tokens"] / result["sampling s"]
    result["useful TFLOP/s"] = 6 * size_of(model) * padded / result["training s"] / 1e12
    return result


def sft_step(folder: Path, device: str, steps: int = 12) -> float:
    """Median seconds of a step of sft.py's defaults, the first four left out."""
    flags = f"--model {folder} --device {device} --steps {steps} --eval_problems 0"
    with tempfile.TemporaryDirectory() as out:
        code = sft.main(sft.train, sft.Config, [*flags.split(), "--out", out])
        lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    if code:
        raise SystemExit(code)
    ends = [json.loads(line)["seconds"] for line in lines]
    return median(b - a for a, b in zip(ends[3:], ends[4:], strict=False))


def show(rows: list[dict]) -> None:
    """A table with the names of the first row above it."""
    print(" | ".join(f"{name:>16}" for name in rows[0]))
    for row in rows:
        print(" | ".join(f"{value:16.4g}" for value in row.values()))


def measure(folder: Path, device: str, sizes: dict, flags: str) -> bool:
    """Print everything; whether the checks hold."""
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    if device == "cuda":
        print(torch.cuda.get_device_name(), *torch.cuda.mem_get_info(), "bytes free, in all")
    run, model, sampler = load(grpo, folder, device, flags)
    cfg, where = run.cfg, run.device
    print(f"{size_of(model)} parameters, micro_batch_tokens {cfg.micro_batch_tokens}", end=", ")
    print(f"checkpointing {model.checkpointing}, {cfg.batch_size} x {cfg.max_new_tokens} tokens")

    prompts = make_prompts(sampler, 2, sizes["prompt"])
    equal = equal_tokens(sampler, prompts, 2 * sizes["group"], sizes["new"])
    mean_gap, largest_gap = sampler_gap(model, sampler, prompts, sizes["new"])
    logits = logits_gap(folder, prompts, where)
    print(f"captured = eager: {equal:.4f} of the tokens (1)")
    print(f"sampler - trainer: {mean_gap:.4f} on average (0.05), {largest_gap:.3f} at most")
    print(f"logits - transformers': {logits:.2e} at most, float32 (1e-3)")

    print("\nsampler")
    kind = transformers.AutoModelForCausalLM
    theirs = kind.from_pretrained(folder, torch_dtype=run.dtype).to(where)
    show([sampler_row(run, sampler, theirs, rows, sizes) for rows in sizes["rows"]])
    del theirs
    print("\nstep of grpo.py")
    table = step_table(run, model, sampler, cfg.max_new_tokens)
    for name, value in table.items():
        print(f"{name:>18} {value:12.4g}")
    return equal == 1 and mean_gap < 0.05 and logits < 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = __doc__
    parser.add_argument("--model", help="a folder, else a random model of Qwen2.5-1.5B's shape")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    args = parser.parse_args()
    sizes, flags = FULL, ""
    if args.device == "cpu":
        sizes, flags = LAPTOP, "--batch_size 64 --group_size 8 --max_new_tokens 120"
    if args.quick:
        sizes, flags = QUICK, "--batch_size 4 --group_size 2 --max_new_tokens 12"
    with tempfile.TemporaryDirectory() as made:
        folder = Path(args.model or made)
        if not args.model:
            make_folder(folder, sizes["shape"])
        held = measure(folder, args.device, sizes, flags)
        if args.model:
            print(f"\nstep of sft.py: {sft_step(folder, args.device):.3f} s")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
