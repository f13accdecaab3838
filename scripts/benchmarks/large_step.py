"""One training step of a model that is larger than the memory allowed: anonymous memory, bytes read, time, limits.

    python scripts/benchmarks/large_step.py CHECKPOINT [--r 4] [--tokens 512] [--out FILE.json]

CHECKPOINT is an int8 folder, e.g. of scripts/make_qwen3_30b_shape.py. LoRA is on every expert, router and attention
linear, AdamW in fp32, gradient checkpointing on; every expert stack is streamed from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoTokenizer

from toolkit.adapters import adapter_coverage, attach_lora
from toolkit.architecture import describe
from toolkit.offload.attach import load_streamed, stream_of
from toolkit.recipe import TrainingSection
from toolkit.training import RunContext, train_adapter

TOKENIZER = Path(__file__).parents[2] / "recipes" / "quickstart" / "nano-qwen3moe-2m"


class Watch:
    """The most anonymous memory that this process has had, looked at every 20 ms."""

    def __init__(self) -> None:
        self.most = 0
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while True:
            self.most = max(self.most, anonymous())
            time.sleep(0.02)


def anonymous() -> int:
    """Bytes of RssAnon."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def disk_read() -> int:
    """Bytes that this process has had fetched from storage."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["read_bytes"])


def disk_rate(folder: Path, most: int = 4 << 30) -> float:
    """Bytes a second of a cold sequential read of some shards, two threads in turns of 8 MiB, into used memory."""
    drop_cache(folder)
    buffers = [memoryview(bytearray(b"\1" * (8 << 20))) for _ in range(2)]
    paths = sorted(folder.glob("*.safetensors"), key=lambda path: -path.stat().st_size)[: max(1, most // (600 << 20))]
    done = [0, 0]

    def read(number: int) -> None:
        for path in paths:
            with path.open("rb", buffering=0) as file:
                for start in range(number * (8 << 20), path.stat().st_size, 16 << 20):
                    file.seek(start)
                    done[number] += file.readinto(buffers[number]) or 0

    threads = [threading.Thread(target=read, args=(number,)) for number in range(2)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = sum(done) / (time.perf_counter() - start)
    drop_cache(folder)
    return rate


def drop_cache(folder: Path) -> None:
    """Ask the kernel to forget the files' pages."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def arithmetic_rate() -> float:
    """Floating-point operations a second of fp32 products as an expert has them, on all threads."""
    x, weight = torch.randn(256, 2048), torch.randn(2048, 1536)
    out = torch.empty(256, 1536)
    torch.mm(x, weight, out=out)
    start, count = time.perf_counter(), 40
    for _ in range(count):
        torch.mm(x, weight, out=out)
    return count * 2 * x.numel() * weight.shape[1] / (time.perf_counter() - start)


def step(folder: Path, rank: int, tokens: int) -> dict[str, Any]:
    """Load, attach, train one step; everything counted."""
    watch, start = Watch(), time.perf_counter()
    layers = [layer.name for layer in describe_folder(folder)]
    model, coverage = load_streamed(str(folder), dict.fromkeys(layers, "disk"))
    loaded = time.perf_counter() - start
    torch.manual_seed(0)
    adapted = attach_lora(model, r=rank, lora_alpha=2 * rank)
    count = adapter_coverage(adapted)
    stream = stream_of(adapted)
    assert stream is not None
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    arguments = TrainingSection(max_steps=1, max_length=tokens, packing=False, use_cpu=True).model_dump()
    del arguments["output_dir"]
    work, read = Path(os.environ.get("TMPDIR", "/tmp")) / f"large-step-{os.getpid()}", disk_read()
    work.mkdir(parents=True)
    cpu, before = time.process_time(), anonymous()
    result = train_adapter(
        adapted,
        AutoTokenizer.from_pretrained(TOKENIZER),
        Dataset.from_dict({"input_ids": ids, "labels": ids}),
        None,
        RunContext(
            folder=work / "checkpoints",
            metrics=work / "metrics.jsonl",
            arguments={**arguments, "report_to": [], "save_strategy": "no"},
            device="cpu",
            dtype="float32",
            train_router=True,
            console=Console(),
            probes=False,
        ),
    )
    logged = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return {
        "layers": len(layers),
        "expert_bytes": coverage.expert_bytes,
        "model_bytes": coverage.model_bytes,
        "r": rank,
        "tokens": tokens,
        "adapter_parameters": count.parameters,
        "expert_stacks_adapted": [count.stacks, count.stacks_all],
        "routers_adapted": [count.routers, count.routers_all],
        "loss": result.loss,
        "grad_norm": next(entry["grad_norm"] for entry in logged if "grad_norm" in entry),
        "load_seconds": loaded,
        "step_seconds": result.seconds,
        "processor_seconds": time.process_time() - cpu,
        "streamed_bytes": stream.traffic.bytes,
        "streamed_layers": stream.traffic.layers,
        "waited_seconds": stream.traffic.waited,
        "disk_bytes": disk_read() - read,
        "anonymous_before_step": before,
        "anonymous_peak": watch.most,
        "peak_rss_with_mapped_files": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": torch.get_num_threads(),
    }


def describe_folder(folder: Path) -> Any:
    """Its MoE layers, from the config alone."""
    from toolkit.checkpoint.config import skeleton

    return describe(skeleton(str(folder))).layers


def frozen_operations(layers: int, tokens: int, shape: Any) -> float:
    """Operations of the frozen products in a step: forward, computed again, and the input's gradient."""
    attention = shape.hidden_size * shape.head_dim * (2 * shape.num_attention_heads + 2 * shape.num_key_value_heads)
    experts = shape.num_experts_per_tok * 3 * shape.hidden_size * shape.moe_intermediate_size
    head = shape.vocab_size * shape.hidden_size
    return 2.0 * tokens * (3 * layers * (attention + experts) + 3 * head)


def main() -> None:
    """Measure the limits and the step, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--r", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    from transformers import AutoConfig

    rates = {"disk_bytes_per_second": disk_rate(given.checkpoint), "flops_per_second": arithmetic_rate()}
    found = {**rates, **step(given.checkpoint, given.r, given.tokens)}
    operations = frozen_operations(found["layers"], given.tokens, AutoConfig.from_pretrained(given.checkpoint))
    found |= {
        "frozen_operations": operations,
        "disk_limit_seconds": found["streamed_bytes"] / found["disk_bytes_per_second"],
        "arithmetic_limit_seconds": operations / found["flops_per_second"],
        "anonymous_peak_gib": found["anonymous_peak"] / 2**30,
    }
    text = json.dumps(found, indent=2)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
