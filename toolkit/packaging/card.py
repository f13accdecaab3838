"""The model card: what the Hub shows of an adapter, written from the run's own figures.

PEFT writes a template of "[More Information Needed]"; a reader wants base against adapted, what was trained, and code
that loads it. huggingface_hub writes and validates the metadata block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from toolkit.evaluate import draft_table
from toolkit.packaging.base import BaseIdentity

__all__ = ["model_card"]


def model_card(
    *,
    base: BaseIdentity,
    adapter_config: Mapping[str, Any],
    results: Mapping[str, Any],
    coverage: Mapping[str, Any],
    versions: Mapping[str, str],
    license: str | None = None,
) -> str:
    """The README.md of an artifact: metadata block and Markdown.

    `results` is `{"base": {metric: number}, "adapted": {metric: number}, "examples": number}`, all optional. `coverage`
    maps what was covered to `{"done": n, "total": n}`, `[done, total]`, a plain value, or a mapping of such. `license`
    is a Hub licence id.
    """
    name = f"{base.name.rpartition('/')[2]} adapter"
    parts = [
        f"---\n{_metadata(name, base, results, license)}\n---",
        f"# {name}\n\nA LoRA adapter for the Mixture-of-Experts model {_origin(base)}, trained with onecard on a base "
        "held in 8 bit and saved in PEFT's own layout.",
        _results_section(results),
        _drafts_section(results),
        f"## Load\n\n```python\n{_loading_code(base)}```",
        _adapter_section(adapter_config, coverage),
        _limits_section(base, versions),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(name: str, base: BaseIdentity, results: Mapping[str, Any], license: str | None) -> str:
    evaluated = _eval_results(results)
    data = ModelCardData(
        # The Hub refuses a card whose base_model is no repository, so a local folder's name stays out.
        base_model=base.name if base.revision else None,
        library_name="peft",
        pipeline_tag="text-generation",
        license=license,
        tags=["lora", "moe", "onecard"],
        model_name=name if evaluated else None,
        eval_results=evaluated or None,
    )
    return data.to_yaml()


def _eval_results(results: Mapping[str, Any]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name="Held-out examples of the training data",
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in sorted(_metrics(results, "adapted").items())
        if value is not None
    ]


def _metrics(results: Mapping[str, Any], side: str) -> Mapping[str, Any]:
    values = results.get(side)
    return values if isinstance(values, Mapping) else {}


def _origin(base: BaseIdentity) -> str:
    if base.revision:
        return f"[{base.name}](https://huggingface.co/{base.name}) at revision `{base.revision}`"
    return f"`{base.name}`"


def _results_section(results: Mapping[str, Any]) -> str:
    before, after = _metrics(results, "base"), _metrics(results, "adapted")
    names = sorted({*before, *after})
    if not names:
        return ""
    rows = [f"| {name} | {_figure(before.get(name))} | {_figure(after.get(name))} |" for name in names]
    examples = f" On {results['examples']} examples." if isinstance(results.get("examples"), int) else ""
    table = "\n".join(["| metric | base | adapted |", "|---|---:|---:|", *rows])
    return f"## Results\n\nHeld-out examples, never trained on; the base in the same 8 bits.{examples}\n\n{table}"


def _drafts_section(results: Mapping[str, Any]) -> str:
    columns, rows = draft_table(results.get("mtp") or {})
    if not rows:
        return ""
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return (
        "## Drafts\n\n`mtp_head.safetensors` holds a multi-token-prediction head: it guesses the next tokens, and the "
        "model checks them in one pass, so that the text stays the same. *base* is the checkpoint's own head before "
        "training, *stale* the same beside this adapter, *trained* the head in this folder. Speeds are those of the "
        "machine that trained.\n\n" + "\n".join(lines)
    )


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "n/a"


def _loading_code(base: BaseIdentity) -> str:
    revision = f', revision="{base.revision}"' if base.revision else ""
    comment = "" if base.revision else "  # your folder with this model"
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = "{base.name}"{comment}\n'
        'adapter = "."  # this folder, or its repository on the Hub\n'
        f'model = AutoModelForCausalLM.from_pretrained(base{revision}, dtype="auto")\n'
        "model = PeftModel.from_pretrained(model, adapter)\n"
        "tokenizer = AutoTokenizer.from_pretrained(adapter)\n\n"
        'messages = [{"role": "user", "content": "Hello!"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
        ")\n"
        "output = model.generate(**inputs, max_new_tokens=64)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))\n'
    )


def _adapter_section(config: Mapping[str, Any], coverage: Mapping[str, Any]) -> str:
    targets = config.get("target_modules") or []
    targets = [targets] if isinstance(targets, str) else [*targets]
    names = ", ".join(f"`{name}`" for name in [*(config.get("target_parameters") or []), *targets])
    rows = [f"| rank, alpha | {config['r']}, {config['lora_alpha']:g} |", f"| targets | {names} |"]
    rows += [f"| {name} | {value} |" for name, value in _coverage_rows(coverage)]
    return "\n".join(["## What was trained", "", "| | |", "|---|---|", *rows])


def _coverage_rows(coverage: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in sorted(coverage.items()):
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, Mapping) and {"done", "total"} <= set(value):
            rows.append((name, f"{value['done']} of {value['total']}"))
        elif isinstance(value, Mapping):
            rows += _coverage_rows(value, f"{name} ")
        elif isinstance(value, (list, tuple)):
            rows.append((name, " of ".join(str(item) for item in value)))
        else:
            rows.append((name, str(value)))
    return rows


def _limits_section(base: BaseIdentity, versions: Mapping[str, str]) -> str:
    made = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return (
        "## Limits\n\n"
        "- Needs PEFT 0.19 or newer: older versions read the expert tensors in another order.\n"
        f"- Belongs to these base weights (SHA-256 `{base.weights_sha256}`); on others it loads and answers worse.\n"
        "- It was trained on an 8-bit base; an unquantised base gives slightly different numbers.\n"
        "- It inherits the limits and the licence of its base and learned from one data set only.\n"
        f"- Made with {made}. `manifest.json` holds the resolved recipe and a hash of every file; `onecard verify` "
        "checks them."
    )
