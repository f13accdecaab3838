"""The model card: what the Hub shows of an adapter, written from the run's own figures.

PEFT writes a template of "[More Information Needed]"; a reader wants base against adapted, what was trained on what,
and code that loads it. huggingface_hub writes and validates the metadata block. Equal facts give equal text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from ruamel.yaml import YAML

from toolkit.artifact.manifest import PICTURES
from toolkit.artifact.usage import form_of, loading_section
from toolkit.checkpoint.identity import BaseIdentity
from toolkit.data.sources import looks_local

__all__ = ["model_card"]

_NOT_PUBLISHED = "a data set that is not published"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_TASK = "text-generation"


def model_card(
    *,
    base: BaseIdentity,
    adapter_config: Mapping[str, Any],
    results: Mapping[str, Any],
    coverage: Mapping[str, Any],
    versions: Mapping[str, str],
    recipe: Mapping[str, Any] | None = None,
    combined: Collection[Mapping[str, Any]] = (),
    pictures: Collection[str] = (),
    license: str | None = None,
    chat: Mapping[str, Any] | None = None,
    has_template: bool = False,
    new_tokens: Mapping[str, Any] | None = None,
) -> str:
    """The README.md of an artifact: metadata block and Markdown.

    `results` is `{"base": {metric: number}, "adapted": {metric: number}, "examples": number, "training": …, "mtp": …}`,
    all optional. `coverage` maps what was covered to `{"done": n, "total": n}`, `[done, total]`, a plain value, or a
    mapping of such. `recipe` is the resolved recipe without secrets and local paths. `combined` are the adapters that
    this one is the weighted sum of. `pictures` are files beside the card. `license` is a Hub licence id. `chat` is how
    the conversations were written, as `write_artifact` takes it; `has_template` says that chat_template.jinja is there.
    `new_tokens` are those that were added, as `read_manifest` gives them.
    """
    name = f"{base.name.rpartition('/')[2]} adapter"
    recipe = recipe or {}
    parts = [
        f"---\n{_metadata(name, base, results, recipe, license)}\n---",
        f"# {name}\n\nA LoRA adapter for the Mixture-of-Experts model {_origin(base)}, trained with onecard on "
        f"{_held(recipe)} and saved in PEFT's own layout.",
        _combined_section(combined),
        _training_section(adapter_config, coverage, results, recipe, chat or {}),
        _tokens_section(new_tokens or {}),
        _results_section(results, recipe),
        _pictures_section(pictures),
        _drafting_section(results),
        loading_section(base, adapter_config, chat or {}, has_template=has_template, new_tokens=new_tokens),
        _recipe_section(recipe),
        _limits_section(base, versions, recipe),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(
    name: str, base: BaseIdentity, results: Mapping[str, Any], recipe: Mapping[str, Any], license: str | None
) -> str:
    datasets = [name for name in _hub_datasets(recipe) if name]
    evaluated = _eval_results(results, datasets[0] if len(datasets) == 1 else None)
    relation: dict[str, Any] = {"base_model_relation": "adapter"} if base.revision else {}
    data = ModelCardData(
        # The Hub refuses a card whose base_model is no repository, so a local folder's name stays out.
        base_model=base.name if base.revision else None,
        library_name="peft",
        pipeline_tag=_TASK,
        license=license,
        datasets=datasets or None,
        tags=["lora", "moe", "onecard", "peft"],
        model_name=name if evaluated else None,
        eval_results=evaluated or None,
        **relation,
    )
    return data.to_yaml()


def _hub_datasets(recipe: Mapping[str, Any]) -> list[str | None]:
    """Of each data set trained on its name on the Hub, None where it is a file of the user's."""
    train = (recipe.get("data") or {}).get("train")
    sets = train if isinstance(train, list) else [train]
    names = [each.get("path") if isinstance(each, Mapping) else each for each in sets]
    return list(dict.fromkeys(name if _is_on_hub(name) else None for name in names))


def _is_on_hub(name: Any) -> bool:
    return isinstance(name, str) and bool(_HUB_NAME.fullmatch(name)) and not looks_local(name)


def _eval_results(results: Mapping[str, Any], dataset: str | None) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=_TASK,
            task_name="Answers to held-out examples",
            dataset_type=dataset or "held-out",
            dataset_name=dataset or "Held-out examples of the training data",
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=value,
        )
        for metric, value in sorted(_mapping(results, "adapted").items())
        if value is not None
    ]


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def _origin(base: BaseIdentity) -> str:
    if base.revision:
        return f"[{base.name}](https://huggingface.co/{base.name}) at revision `{base.revision}`"
    return f"`{base.name}`"


def _combined_section(combined: Collection[Mapping[str, Any]]) -> str:
    if not combined:
        return ""
    rows = [f"| {one['weight']:g} | `{one['name']}` | `{one['weights_sha256']}` |" for one in combined]
    head = "## A combination\n\nThe weighted sum of these adapters; its own figures were not measured. "
    head += "Tokenizer, chat template and recipe are those of the first; an answer ends where any of them ends one."
    return "\n".join([head, "", "| weight | adapter | SHA-256 of its weights |", "|---:|---|---|", *rows])


def _training_section(
    config: Mapping[str, Any],
    coverage: Mapping[str, Any],
    results: Mapping[str, Any],
    recipe: Mapping[str, Any],
    chat: Mapping[str, Any],
) -> str:
    targets = config.get("target_modules") or []
    targets = [targets] if isinstance(targets, str) else [*targets]
    names = ", ".join(f"`{name}`" for name in [*(config.get("target_parameters") or []), *targets])
    rows = [f"| data | {_data(recipe, results)} |"] if recipe.get("data") else []
    rows += [f"| method | {method} |"] if (method := _method(recipe)) else []
    rows += [f"| form | {form} |"] if (form := form_of(chat)) else []
    rows += ["| kind | weight-decomposed (DoRA) |"] if config.get("use_dora") else []
    rows += [f"| rank, alpha | {config['r']}, {config['lora_alpha']:g} |"]
    rows += [
        f"| {label} | {', '.join(f'`{name}` {value:g}' for name, value in sorted(config[key].items()))} |"
        for key, label in (("rank_pattern", "other ranks"), ("alpha_pattern", "other alphas"))
        if config.get(key)
    ]
    rows += [f"| targets | {names} |"]
    rows += [f"| {name} | {value} |" for name, value in _coverage_rows(coverage)]
    trained = _mapping(results, "training")
    rows += [f"| {name} | {_figure(trained[name])} |" for name in ("steps", "tokens", "loss") if name in trained]
    return "\n".join(["## What was trained, on what", "", "| | |", "|---|---|", *rows])


def _tokens_section(new_tokens: Mapping[str, Any]) -> str:
    """Tokens that the adapter brings, and what a base without rows for them asks of whoever loads it."""
    ids = new_tokens.get("ids") or {}
    if not ids:
        return ""
    shown = ", ".join(f"`` {text} `` ({number})".replace("|", "\\|") for text, number in list(ids.items())[:20])
    shown += f" and {len(ids) - 20} more" if len(ids) > 20 else ""
    told = (
        "## Tokens with trained rows\n\n"
        + f"{shown}: in the tokenizer beside this card; their rows of embedding and head are trained."
    )
    if rows := new_tokens.get("rows"):
        told += (
            f" The base has too few rows: call `model.resize_token_embeddings({rows})` before the adapter is loaded."
        )
    return told


_OF_REWARDS = {"grpo": "group relative policy optimisation", "rloo": "REINFORCE leave-one-out"}
_METHODS = {
    "dpo": "direct preference optimisation on pairs of answers",
    "kto": "Kahneman-Tversky optimisation on good and bad answers",
    "orpo": "odds-ratio preference optimisation on pairs of answers",
    "simpo": "simple preference optimisation on pairs of answers",
}


def _method(recipe: Mapping[str, Any]) -> str:
    """How preferences or rewards were learnt from; nothing where single answers were."""
    method = _mapping(recipe, "training").get("method", "sft")
    if method in _OF_REWARDS:
        return f"{_OF_REWARDS[method]}, rewards {' + '.join(map(_reward, _mapping(recipe, 'rewards')['functions']))}"
    if method not in _METHODS:
        return ""
    options = _mapping(recipe, method)
    loss = options.get("loss_type", [])
    losses = " + ".join([loss] if isinstance(loss, str) else loss)
    return f"{_METHODS[method]}, {f'loss {losses}, ' if losses else ''}beta {options['beta']:g}"


def _reward(function: Mapping[str, Any]) -> str:
    """A reward with its weight, by its short name: where its file lies is nobody else's business."""
    name = function.get("name") or str(function["function"]).rpartition(":")[2]
    return name if function["weight"] == 1.0 else f"{function['weight']:g} {name}"


def _data(recipe: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    names = _hub_datasets(recipe)
    told = [f"[{name}](https://huggingface.co/datasets/{name})" for name in names if name]
    what = ", ".join(told + ([_NOT_PUBLISHED] if None in names else []))
    count = _mapping(results, "training").get("examples")
    return f"{count} examples of {what}" if count else what


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


def _held(recipe: Mapping[str, Any]) -> str:
    return "a base held in 8 bit" if _is_8bit(recipe) else "an unquantised base"


def _is_8bit(recipe: Mapping[str, Any]) -> bool:
    """Whether anything of the base was; a recipe that does not say has the defaults."""
    stored = _mapping(recipe, "quantization")
    return any(stored.get(part, "int8") != "none" for part in ("experts", "linears"))


def _results_section(results: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    before, after = _mapping(results, "base"), _mapping(results, "adapted")
    names = sorted({*before, *after})
    if not names:
        return ""
    rows = [f"| {name} | {_figure(before.get(name))} | {_figure(after.get(name))} |" for name in names]
    examples = f" On {results['examples']} examples." if isinstance(results.get("examples"), int) else ""
    table = "\n".join(["| metric | base | adapted |", "|---|---:|---:|", *rows])
    same = "in the same 8 bits" if _is_8bit(recipe) else "as it is"
    return f"## Results\n\nHeld-out examples, never trained on; the base {same}.{examples}\n\n{table}"


def _pictures_section(pictures: Collection[str]) -> str:
    return "\n\n".join(f"![{PICTURES[name]}]({name})" for name in sorted(pictures))


def _drafting_section(results: Mapping[str, Any]) -> str:
    """How many drafts of the multi-token-prediction head the model accepts; before training, too, where it is known."""
    mtp = _mapping(results, "mtp")
    kinds = [(kind, _mapping(mtp, kind)) for kind in sorted(mtp) if "tau" in _mapping(mtp, kind)]
    if not kinds:
        return ""
    depths = sorted({depth for _, found in kinds for depth in _mapping(found, "acceptance")}, key=str)
    rows = [
        f"| {kind} | {_figure(found['tau'])} | "
        + " | ".join(_figure(_mapping(found, "acceptance").get(depth)) for depth in depths)
        + " |"
        for kind, found in kinds
    ]
    head = f"| head | tokens a forward | {' | '.join(f'accepted at depth {depth}' for depth in depths)} |"
    return "\n".join(
        [
            "## Multi-token prediction",
            "",
            "`mtp_head.safetensors` drafts the next tokens, and the model checks them: its answers stay the same.",
            "",
            head,
            "|---|" + "---:|" * (1 + len(depths)),
            *rows,
        ]
    )


def _figure(value: Any) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.4g}" if isinstance(value, float) else "n/a"


def _recipe_section(recipe: Mapping[str, Any]) -> str:
    if not recipe:
        return ""
    text = io.StringIO()
    writer = YAML()
    writer.default_flow_style = False
    writer.width = 10_000
    writer.dump({name: section for name, section in recipe.items() if section}, text)
    return f"## The recipe\n\nWithout secrets and paths of the machine it ran on.\n\n```yaml\n{text.getvalue()}```"


def _limits_section(base: BaseIdentity, versions: Mapping[str, str], recipe: Mapping[str, Any]) -> str:
    rounded = "- It was trained on an 8-bit base; an unquantised base gives slightly different numbers.\n"
    original = _mapping(recipe, "model").get("merge_base")
    merged = f"- A merge starts from `{original}`, the original in 16 bit of this base.\n" if original else ""
    made = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return (
        "## Limits\n\n"
        "- Needs PEFT 0.19 or newer: older versions read the expert tensors in another order.\n"
        f"- Belongs to these base weights (SHA-256 `{base.weights_sha256}`); on others it loads and answers worse.\n"
        f"{rounded if _is_8bit(recipe) else ''}"
        f"{merged}"
        "- It inherits the limits and the licence of its base and learned from one data set only.\n"
        f"- Made with {made}. `manifest.json` holds the resolved recipe and a hash of every file; `onecard verify` "
        "checks them."
    )
