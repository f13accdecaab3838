#!/usr/bin/env python3
"""Train the model under recipes/quickstart/nano-qwen3moe-2m: a Qwen3-MoE of 2 M parameters, from scratch, on a CPU.

A random model of this size is easy to build and useless: its experts are alike and its router means nothing, so no
mix-up of experts ever shows. This one is trained until both matter, on two kinds of English (novels and dictionary
glosses), and the script ends by measuring what is lost when every router points one expert too far.

The input, on Debian or Ubuntu (Austen's novels are in the public domain; WordNet has a permissive licence of its own):

    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb wordnet
    apt-get install --no-install-recommends r-cran-janeaustenr
    Rscript -e 'writeLines(janeaustenr::austen_books()$text, "austen.txt")'

    python scripts/make_nano_moe.py nano --austen austen.txt --wordnet wordnet/usr/share/wordnet

Any other UTF-8 text with blank lines between its paragraphs does in place of Austen.
"""

from __future__ import annotations

import argparse
import gzip
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

__all__ = [
    "balance",
    "build_model",
    "glosses",
    "held_out_loss",
    "least_used",
    "main",
    "pack",
    "paragraphs",
    "roll_routers",
    "train_tokenizer",
]

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# The generation block marks what an assistant says, so that masks come from the template itself.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 2048
SEQUENCE = 128
ROWS_OF_EACH = 8
PEAK_RATE = 3e-3
TOP_K = 2
BALANCE = 0.01


def paragraphs(file: Path) -> list[str]:
    """The paragraphs of a text (plain or .gz), each on one line."""
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    blocks = raw.decode("utf-8").split("\n\n")
    return [text for block in blocks if (text := " ".join(block.split()))]


def glosses(folder: Path) -> list[str]:
    """WordNet's entries, `word (part of speech): gloss`, shuffled, six to a text."""
    entries = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="ascii").splitlines():
            if not line.startswith(" ") and " | " in line:
                head, gloss = line.rstrip().split(" | ", 1)
                entries.append(f"{head.split()[4].replace('_', ' ')} ({part}): {gloss}")
    random.Random(1).shuffle(entries)
    return ["\n".join(entries[i : i + 6]) for i in range(0, len(entries), 6)]


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2048 tokens: no text is unknown to it, and the embeddings stay small."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=TURN_END, pad_token=END_OF_TEXT
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """The texts one after another, an end-of-text after each, as token ids (N, 128)."""
    ids = [i for row in tokenizer([text + END_OF_TEXT for text in texts]).input_ids for i in row]
    rows = len(ids) // SEQUENCE
    return torch.tensor(ids[: rows * SEQUENCE]).view(rows, SEQUENCE)


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """The untrained model: 4 layers, 8 experts, top-2, every layer sparse, 2.04 M parameters."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
    }
    config = Qwen3MoeConfig(
        **sizes,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3MoeForCausalLM(config)


def train(model: Qwen3MoeForCausalLM, texts: list[torch.Tensor], steps: int) -> None:
    """AdamW for `steps` steps over rows drawn from each of `texts`, the load-balancing loss included."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (0.05 + 0.95 * (1 - step / steps))
    )
    started, total, every = time.monotonic(), 0.0, max(1, steps // 20)
    model.train()
    for step in range(1, steps + 1):
        batch = torch.cat([rows[torch.randint(len(rows), (ROWS_OF_EACH,))] for rows in texts])
        out = model(input_ids=batch, labels=batch, output_router_logits=True, use_cache=False)
        loss = out.loss + BALANCE * balance(out.router_logits)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total += loss.item()
        if step % every == 0:
            print(f"step {step} of {steps}: loss {total / every:.3f}, {time.monotonic() - started:.0f} s", flush=True)
            total = 0.0


def balance(router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Load-balancing loss of each layer (T, E) by itself, averaged; 2 (the top-k) where all experts are used alike.

    The model's own loss looks at all layers as one, so that an expert that is idle in one layer and busy in another
    counts as balanced: trained with it alone, this model leaves some experts without any tokens.
    """
    losses = [load_balancing_loss_func((layer,), num_experts=layer.shape[1], top_k=TOP_K) for layer in router_logits]
    return torch.stack([loss for loss in losses if isinstance(loss, torch.Tensor)]).mean()


def least_used(model: Qwen3MoeForCausalLM, rows: Iterable[torch.Tensor]) -> float:
    """The share of tokens (of rows of token ids (N, 128)) that the least used expert of any layer sees."""
    with torch.no_grad():
        ids = torch.cat([part[:32] for part in rows])
        layers = model(input_ids=ids, output_router_logits=True, use_cache=False).router_logits
    shares = [layer.topk(TOP_K).indices.flatten().bincount(minlength=layer.shape[1]) / len(layer) for layer in layers]
    return float(torch.stack(shares).min())


@torch.no_grad()
def held_out_loss(model: Qwen3MoeForCausalLM, rows: torch.Tensor) -> float:
    """Mean negative log-likelihood in nats a token over the first 32 rows of token ids (N, 128)."""
    model.train(False)
    return float(model(input_ids=rows[:32], labels=rows[:32], output_router_logits=False, use_cache=False).loss)


def roll_routers(model: Qwen3MoeForCausalLM, by: int) -> None:
    """Send each token to the expert `by` places further on than its router means."""
    for layer in model.model.layers:
        layer.mlp.gate.weight.data = layer.mlp.gate.weight.data.roll(by, 0)


def _report(model: Qwen3MoeForCausalLM, held_out: dict[str, torch.Tensor], when: str) -> None:
    losses = ", ".join(f"{name} {held_out_loss(model, rows):.3f}" for name, rows in held_out.items())
    print(f"held-out loss {when}: {losses}", flush=True)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--austen", type=Path, required=True, help="a text, UTF-8, plain or .gz")
    parser.add_argument(
        "--wordnet", type=Path, required=True, help="folder with data.noun, data.verb, data.adj, data.adv"
    )
    parser.add_argument("--steps", type=int, default=3500, help="optimizer steps of 2,048 tokens (3500)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def _make(out: Path, sources: dict[str, list[str]], steps: int) -> None:
    tokenizer = train_tokenizer(text for texts in sources.values() for text in texts)
    # The first twentieth of each source is never trained on.
    held_out = {name: pack(tokenizer, texts[: len(texts) // 20]) for name, texts in sources.items()}
    rows = [pack(tokenizer, texts[len(texts) // 20 :]) for texts in sources.values()]
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters; {sum(map(len, rows)) * SEQUENCE:,} tokens of text")
    _report(model, held_out, "before")
    train(model, rows, steps)
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    # What is measured is what was written, read back.
    saved = Qwen3MoeForCausalLM.from_pretrained(out, dtype=torch.float32)
    _report(saved, held_out, "after")
    print(f"the least used expert of any layer sees {least_used(saved, held_out.values()):.1%} of the tokens")
    roll_routers(saved, 1)
    _report(saved, held_out, "with every router one expert off")
    print(f"written: {out}")


def main(arguments: list[str] | None = None) -> int:
    """Train and write the model; 0 done, 2 where the input is missing or the output folder is there."""
    given = _arguments(arguments)
    if given.out.exists():
        print(f"{given.out}: already exists; name a new folder", file=sys.stderr)
        return 2
    try:
        sources = {"austen": paragraphs(given.austen), "wordnet": glosses(given.wordnet)}
    except OSError as error:
        print(f"{error.filename}: {error.strerror}; see --help for where the input comes from", file=sys.stderr)
        return 2
    torch.manual_seed(given.seed)
    _make(given.out, sources, given.steps)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
