"""The other side of `format_table.py`: loads quantised checkpoints with stock transformers and writes their logits.

    python format_stock_side.py JOB.json

Runs in the environment of a package that knows the format, without onecard. A job holds `tokens` (ids), `seconds`,
`out` and `models`, {name: folder}. Each model is loaded in a process of its own, forked once transformers is there, so
that nothing that one leaves behind changes the next. OUT/NAME.safetensors holds `logits`, OUT/NAME.txt an error. What
fp32 cannot be asked of is loaded in the files' own type.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

__all__ = ["main"]

MULTIPLIED_OUT: dict[str, tuple[str, dict[str, Any]]] = {
    "compressed-tensors": ("CompressedTensorsConfig", {"run_compressed": False}),
    "fp8": ("FineGrainedFP8Config", {"dequantize": True}),
    "mxfp4": ("Mxfp4Config", {"dequantize": True}),
    "gptq": ("GPTQConfig", {"bits": 4, "backend": "torch"}),
}
"""By `quant_method`: the class and the arguments that ask for plain weights, or for code that needs no compiler."""


def main(job: dict[str, Any]) -> None:
    """Every model of the job, one after the other."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    for name, folder in job["models"].items():
        out = Path(job["out"]) / name
        child = os.fork()
        if child == 0:
            signal.alarm(job["seconds"])
            status = 0
            try:
                _load(Path(folder), job["tokens"], out.with_name(f"{name}.safetensors"))
            except BaseException as error:
                out.with_name(f"{name}.txt").write_text(" ".join(f"{type(error).__name__}: {error}".split()))
                status = 1
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status < 0:
            why = f"no answer in {job['seconds']} s" if -status == signal.SIGALRM else f"ended by signal {-status}"
            out.with_name(f"{name}.txt").write_text(why)


@torch.no_grad()
def _load(folder: Path, tokens: list[int], out: Path) -> None:
    """On the CPU; logits [T, V]."""
    declared = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    how: dict[str, Any] = {}
    if (wanted := MULTIPLIED_OUT.get(str(declared.get("quant_method")))) is not None:
        how["quantization_config"] = getattr(transformers, wanted[0])(**wanted[1])
    try:
        logits = _logits(folder, tokens, dtype=torch.float32, **how)
    except Exception as in_fp32:
        try:
            logits = _logits(folder, tokens, dtype="auto", **how)
        except Exception:
            raise in_fp32 from None
    save_file({"logits": logits}, out)


def _logits(folder: Path, tokens: list[int], **how: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    logits: torch.Tensor = model(torch.tensor([tokens])).logits[0].float().contiguous()
    return logits


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
