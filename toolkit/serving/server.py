"""The adapted int8 model behind transformers' own OpenAI-compatible server.

`transformers serve` loads what it serves by name, in 16 bit, and knows no adapter folder. Its parts take a model
manager, and ours hands out the one model that is loaded already. It reads a stream by a description of the model's
family or its tokenizer; here the chat template says what stands around thoughts, text and calls.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import BatchEncoding, PreTrainedTokenizerBase

from toolkit.data import Dialogue, InvalidRow, check_messages, check_tools
from toolkit.data.answers import Answer, AnswerStream
from toolkit.errors import RecipeError

if TYPE_CHECKING:
    from fastapi import FastAPI
    from transformers.cli.serving.utils import GenerationState

__all__ = ["build_app", "require_server", "serve"]

Event = Mapping[str, Any]

_SERVER_OPTIONS = {"add_generation_prompt", "return_tensors", "return_dict", "tokenize"}
_ANY_TEXT = {
    "defaults": {"role": "assistant"},
    "start_anchor_pattern": r"\Z",
    "fields": {"content": {"content": "text"}},
}
"""A description of answers that says nothing of them: without one, the server would not ask for them to be read."""
_NEEDED = ("fastapi", "uvicorn", "openai")


class _StreamParser:
    """An answer's stream in the form of transformers' `ResponseParser`, as far as its server uses that."""

    def __init__(self, stream: AnswerStream) -> None:
        self._stream = stream
        self.initial_events: list[Event] = []

    def feed(self, text: str) -> list[Event]:
        """What these words add, as events."""
        return list(_events(self._stream.feed(text)))

    def finalize(self) -> tuple[Event, list[Event]]:
        """Nothing, and what the end adds."""
        return {}, list(_events(self._stream.end()))


def _reading_state(dialogue: Dialogue) -> GenerationState:
    """What generates for the server, with chat streams read by `dialogue`."""
    from transformers.cli.serving.utils import GenerateManager, GenerationState

    class Reading(GenerateManager):  # type: ignore[misc]
        """Streams are read by the chat template wherever they are read at all."""

        def generate_streaming(
            self,
            model: Any,
            processor: Any,
            inputs: Any,
            gen_config: Any,
            request_id: str,
            response_parser: Any = None,
        ) -> Any:
            """As its base class, with another parser."""
            if response_parser is not None:
                response_parser = _StreamParser(dialogue.stream(inputs["input_ids"][0].tolist()))
            return super().generate_streaming(
                model, processor, inputs, gen_config, request_id=request_id, response_parser=response_parser
            )

    class State(GenerationState):  # type: ignore[misc]
        """Generates with the one model there is."""

        def __init__(self) -> None:
            super().__init__()
            self._reading = Reading()

        def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
            """The same for every request."""
            return self._reading

    return State()


def _events(more: Answer) -> Iterator[Event]:
    for field, text in (("reasoning_content", more.thought), ("content", more.text)):
        if text:
            yield {"type": "region_chunk", "field": field, "text": text}
    for call in more.calls:
        yield {"type": "region_close", "field": "tool_calls", "value": {"type": "function", "function": dict(call)}}


def require_server() -> None:
    """Raise `RecipeError` where transformers' server lacks a package."""
    if missing := [name for name in _NEEDED if not find_spec(name)]:
        raise RecipeError(f'serve: {", ".join(missing)} not installed; pip install "onecard[serve]"')


def build_app(model: PeftModel, tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, name: str) -> FastAPI:
    """transformers' application with this model as its only one, under `name` (no `@` or `:`), asked by `dialogue`."""
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler

    # PEFT puts its layers into the base model in place, so this is the adapted one.
    adapted = model.eval().get_base_model()
    adapted.config.use_cache = True

    processor = _asked_as_trained(tokenizer, dialogue)

    class OneModel(ModelManager):  # type: ignore[misc]
        """Loads nothing."""

        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            return adapted

        def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
            return processor

        def get_gen_models(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
            """What `/v1/models` lists; transformers would list the Hub's cache."""
            return [{"id": name, "object": "model", "owned_by": "onecard", "created": 0}]

    manager, state = OneModel(force_model=name), _reading_state(dialogue)
    app: FastAPI = build_server(
        manager,
        ChatCompletionHandler(manager, state),
        completion_handler=CompletionHandler(manager, state),
        response_handler=ResponseHandler(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(model_manager=manager, generation_state=state),
        generation_state=state,
    )
    return app


def _asked_as_trained(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue) -> PreTrainedTokenizerBase:
    """A tokenizer whose conversations become prompts as they did in training: same options, date and form.

    It reads answers as `generate` does; transformers' server would read them by the family of the model.
    """

    from fastapi import HTTPException

    class AsTrained(type(tokenizer)):  # type: ignore[misc]
        """The tokenizer, but for two methods."""

        def apply_chat_template(self, conversation: Any, tools: Any = None, **options: Any) -> BatchEncoding:
            """The prompt's tokens, [T], or [1, T] as a tensor; `options` are the request's own for the template."""
            kept = {key: value for key, value in options.items() if key in dialogue.options - _SERVER_OPTIONS}
            try:
                dialogue.require_meant(options)
                ids = dialogue.prompt_ids(check_messages(conversation), check_tools(tools), kept)
            except InvalidRow as problem:
                raise HTTPException(status_code=400, detail=problem.detail) from None
            mask = [1] * len(ids)
            if options.get("return_tensors") is None:
                return BatchEncoding({"input_ids": ids, "attention_mask": mask})
            return BatchEncoding({"input_ids": [ids], "attention_mask": [mask]}, tensor_type=options["return_tensors"])

        def parse_response(self, response: Any, schema: Any = None, *, prefix: str = "", **_: Any) -> dict[str, Any]:
            """The parts of an answer's tokens, [T], written after the text `prefix`, by transformers' names."""
            prompt = self.encode(prefix, add_special_tokens=False)
            answer = dialogue.read(torch.as_tensor(response).tolist(), prompt)
            return {"content": "", "reasoning_content": answer.thought or None, **answer.message()}

    result: Any = copy.copy(tokenizer)
    result.__class__ = AsTrained
    result.response_template = _ANY_TEXT
    asked: PreTrainedTokenizerBase = result
    return asked


def serve(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, name: str, *, host: str, port: int
) -> None:
    """Answer requests until interrupted."""
    import uvicorn

    uvicorn.run(build_app(model, tokenizer, dialogue, name), host=host, port=port, log_level="warning")
