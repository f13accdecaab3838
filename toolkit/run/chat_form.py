"""How a run's model is asked: what was recorded when the run began, and what its checkpoint says ends an answer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from toolkit.artifact import read_manifest
from toolkit.data import ChatForm, Dialogue
from toolkit.durable import write_text
from toolkit.plan import Plan
from toolkit.run_folder import RunFolder

__all__ = ["declared_stops", "dialogue", "record_form", "recorded_form", "stop_as_trained"]


def declared_stops(plan: Plan) -> list[int]:
    """Token ids at which the checkpoint's own generation stops."""
    place = {"revision": plan.recipe.model.revision}
    try:
        ends = GenerationConfig.from_pretrained(plan.model, **place).eos_token_id
    except (OSError, ValueError):  # many checkpoints have none
        ends = None
    if ends is None:
        config: Any = AutoConfig.from_pretrained(plan.model, trust_remote_code=False, **place)
        ends = getattr(config.get_text_config(), "eos_token_id", None)
    return [int(end) for end in (ends if isinstance(ends, list) else [ends]) if end is not None]


def record_form(run: RunFolder, form: ChatForm) -> None:
    """Write down how the run's model is asked, unless that was done when the run began."""
    if not run.chat.is_file():
        write_text(run.chat, json.dumps(form.to_dict(), indent=2))


def recorded_form(folder: Path, artifact: Path | None = None) -> ChatForm | None:
    """What a run folder, or else its artifact, says of how its model is asked."""
    run = RunFolder(folder)
    if run.chat.is_file():
        return ChatForm.from_dict(json.loads(run.chat.read_text(encoding="utf-8")))
    if artifact is None:
        return None
    return ChatForm.from_dict(read_manifest(artifact).get("chat") or {})


def dialogue(tokenizer: PreTrainedTokenizerBase, plan: Plan, artifact: Path) -> Dialogue:
    """Prompts and answers as in the run that `artifact` came from, under the plan's template options."""
    recorded = recorded_form(artifact.parent, artifact) or ChatForm()
    data = plan.recipe.data
    stops = sorted({*recorded.stop_token_ids, *declared_stops(plan)})
    form = replace(
        recorded,
        stop_token_ids=tuple(stops),
        chat_template_kwargs=data.chat_template_kwargs,
        system_prompt=data.system_prompt,
    )
    return Dialogue(tokenizer, form)


def stop_as_trained(model: PreTrainedModel, form: ChatForm) -> None:
    """Let every generation of `model` end at the tokens that ended answers in training."""
    config: Any = model.generation_config
    config.eos_token_id = list(form.stop_token_ids)
