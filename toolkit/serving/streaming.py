"""Answers that go out word by word, read as whole answers are.

transformers' server reads a stream by a description of the model's family or its tokenizer; here the chat template
says what stands around thoughts, text and calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from toolkit.data import Dialogue
from toolkit.data.answers import Answer, AnswerStream

if TYPE_CHECKING:
    from transformers.cli.serving.utils import GenerationState

__all__ = ["StreamParser", "reading_state"]

Event = Mapping[str, Any]


class StreamParser:
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


def reading_state(dialogue: Dialogue) -> GenerationState:
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
                response_parser = StreamParser(dialogue.stream(inputs["input_ids"][0].tolist()))
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
