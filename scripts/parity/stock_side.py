"""The other side of the parity check: runs where only torch, transformers and peft are installed, without onecard.

    python stock_side.py JOB.json

Loads a base in fp32 with stock transformers, puts adapters on it with stock PEFT, and writes logits (safetensors),
held-out loss and every missing or unexpected key (report.json) into the job's `out` folder for `stock_peft.py`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

__all__ = ["adapter_keys", "logits", "loss", "make_adapter", "run", "run_many"]

# Present here, they would mean that this is not a stock environment.
STRANGERS = ("toolkit", "trl", "bitsandbytes", "datasets")


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job; returns the report and writes `logits.safetensors` to `job["out"]`.

    A job holds `base` and `revision`; `weights`, the dequantised state dict to put in its place; `adapter`; `prompts`
    and `rows` (token ids; ids with labels); `made`, where to save an adapter of its own making; and `out`.
    """
    out = Path(job["out"])
    original = load_base(job)
    model, keys = with_adapter(original, job["adapter"])
    report: dict[str, Any] = {"keys": keys, "loss": loss(model, job["rows"]), "versions": versions()}
    report["strangers"] = [name for name in STRANGERS if importlib.util.find_spec(name)]
    replaced = load_base(job)
    put_weights(replaced, load_file(job["weights"]))
    model, _ = with_adapter(replaced, job["adapter"])
    found = {"theirs": logits(model, job["prompts"])}
    with model.disable_adapter():
        found["plain"] = logits(model, job["prompts"])
    make_adapter(model, job["made"])
    found["made"] = logits(model, job["prompts"])
    save_file({f"{kind}.{i}": t for kind, ts in found.items() for i, t in enumerate(ts)}, out / "logits.safetensors")
    (out / "report.json").write_text(json.dumps(report, indent=2))
    return report


def load_base(job: dict[str, Any]) -> PreTrainedModel:
    """The unquantised base in fp32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        job["base"], revision=job["revision"], dtype=torch.float32, attn_implementation="sdpa"
    )
    return model


def put_weights(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> None:
    """Replace all weights by `state`, which must name every parameter (tied ones may be left out)."""
    result = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    lost = [name for name in result.missing_keys if name not in tied]
    if lost or result.unexpected_keys:
        raise SystemExit(f"the dequantised weights do not fit the stock model: {(lost + result.unexpected_keys)[:3]}")
    model.tie_weights()


def with_adapter(model: PreTrainedModel, folder: str) -> tuple[peft.PeftModel, dict[str, list[str]]]:
    """Stock PEFT's model, and the adapter keys that only the model or only the file has."""
    loaded = peft.PeftModel.from_pretrained(model, folder).eval()
    wanted, given = adapter_keys(loaded), set(load_file(Path(folder) / "adapter_model.safetensors"))
    keys = {"missing": wanted - given, "unexpected": given - wanted, "matched": wanted & given}
    return loaded, {kind: sorted(names) for kind, names in keys.items()}


def adapter_keys(model: peft.PeftModel) -> set[str]:
    """The names under which PEFT would save this model's adapter."""
    return set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))


def make_adapter(model: peft.PeftModel, folder: str) -> None:
    """Fill the adapter with seeded numbers, B non-zero everywhere, and let stock PEFT save it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(folder, save_embedding_layers=False)


@torch.no_grad()
def logits(model: torch.nn.Module, prompts: list[list[int]]) -> list[torch.Tensor]:
    """One [T, V] fp32 tensor per prompt."""
    return [model(torch.tensor([ids])).logits[0].float().contiguous() for ids in prompts]


@torch.no_grad()
def loss(model: torch.nn.Module, rows: list[dict[str, list[int]]]) -> float:
    """Mean negative log-likelihood in nats over all trained tokens of `rows` (`input_ids`, `labels` with -100)."""
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor(row["labels"][1:])
        scores = model(torch.tensor([row["input_ids"]])).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(scores, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / max(count, 1)


def versions() -> dict[str, str]:
    """What this side runs on."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}


def run_many(job: dict[str, Any]) -> None:
    """Logits [T, V] of each of `job["models"]`, a base and an adapter or None, on the first of `job["prompts"]`."""
    found, strange = {}, {"missing": 0, "unexpected": 0}
    for name, (base, adapter) in job["models"].items():
        model = _any_class(base)
        if adapter:
            model, keys = with_adapter(model, adapter)
            strange = {kind: strange[kind] + len(keys[kind]) for kind in strange}
        found[name] = logits(model, job["prompts"])[0]
    save_file(found, Path(job["out"]) / "logits.safetensors")
    (Path(job["out"]) / "report.json").write_text(json.dumps({**strange, "versions": versions()}))


def _any_class(folder: str) -> PreTrainedModel:
    """By the class that the config names, since not every family has a class for text alone."""
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
    model: PreTrainedModel = cls.from_pretrained(folder, dtype=torch.float32).eval()
    return model


if __name__ == "__main__":
    read = json.loads(Path(sys.argv[1]).read_text())
    run_many(read) if "models" in read else run(read)
