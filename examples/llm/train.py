"""Train the small Llama-architecture model of `make demo-llm` on text that ships with Python.

    python examples/llm/train.py --minutes 60

The text is the docstrings of the standard library and the licences beside it. The script writes a Hugging Face folder
(config.json, model.safetensors in bf16, tokenizer.json) and `heldout.txt`, text that was not trained on: the model's
perplexity there is the yardstick of quantization.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

END = "<|end|>"
FOLDER = Path(__file__).parent / "pydoc-5m"


def docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text.strip() for text in texts if text and len(text) > 60]


def documents() -> list[str]:
    """Docstrings of the standard library and its licences, without duplicates, in a fixed random order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [p for p in sorted(library.rglob("*.py")) if "site-packages" not in p.parts]
    texts = [text for path in sources for text in docstrings(path)]
    texts += [p.read_text(errors="ignore") for p in sorted(library.rglob("LICENSE*")) if p.suffix in ("", ".txt")]
    unique = list(dict.fromkeys(texts))
    random.Random(0).shuffle(unique)
    return unique


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    end = tokenizer.token_to_id(END)
    return torch.tensor([i for e in tokenizer.encode_batch(texts) for i in [end, *e.ids]])


def batch_of(tokens: torch.Tensor, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(tokens) - length, (rows,), generator=generator)
    return torch.stack([tokens[s : s + length] for s in starts])


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor, length: int) -> float:
    windows = tokens[: len(tokens) // length * length].reshape(-1, length)
    losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in windows]
    return math.exp(sum(losses) / len(losses))


def fit(model: LlamaForCausalLM, tokens: torch.Tensor, heldout: torch.Tensor, args: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    start, step = time.monotonic(), 0
    while (spent := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        rate = args.learning_rate * min(1.0, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * spent)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        window = batch_of(tokens, args.rows, args.length, generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=window, labels=window).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            minutes = (time.monotonic() - start) / 60
            print(f"step {step}  {minutes:.1f} min  loss {loss.item():.3f}", flush=True)
        step += 1
    print(f"{step} steps, held-out perplexity {perplexity(model, heldout, args.length):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    texts = documents()
    split = len(texts) - len(texts) // 50
    tokenizer = train_tokenizer(texts[:split], 4096)
    tokens, heldout = token_stream(tokenizer, texts[:split]), token_stream(tokenizer, texts[split:])
    print(f"{len(texts)} texts, {len(tokens)} tokens, {len(heldout)} held out", flush=True)
    end = tokenizer.token_to_id(END)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=256, intermediate_size=704, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=end, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    fit(model, tokens, heldout, args)

    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save(str(args.out / "tokenizer.json"))
    (args.out / "tokenizer_config.json").write_text(json.dumps({"bos_token": END, "eos_token": END}, indent=2) + "\n")
    (args.out / "heldout.txt").write_text(f"\n{END}\n".join(texts[split:]))


if __name__ == "__main__":
    main()
