"""The conversations that every chat template is asked to render: one row each, with the options that go with it.

Their words are unlike each other, so that what a template drops can be seen by its absence. Call ids have nine letters
and digits, the one form that every published template takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["CASES", "Case"]

Message = dict[str, Any]
STOP = "@STOP@"


@dataclass(frozen=True)
class Case:
    """One row, and the arguments of `build_batches` that it is read with."""

    name: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    train_on: str = "all"
    thoughts: str = "keep"

    def with_stop(self, stop: str) -> Case:
        """The case with `STOP` in its contents as the token that ends generation."""
        filled = [
            {**turn, "content": turn["content"].replace(STOP, stop)} if STOP in str(turn.get("content")) else turn
            for turn in self.messages
        ]
        return replace(self, messages=filled)

    @property
    def row(self) -> dict[str, Any]:
        """The row as it stands in the file."""
        return {"messages": self.messages} | ({"tools": self.tools} if self.tools else {})


def _turn(role: str, content: Any, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def _tool(name: str, about: str, **properties: str) -> dict[str, Any]:
    kinds = {key: {"type": kind, "description": f"the {key}"} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": kinds, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


def _call(name: str, arguments: Any, call_id: str = "aB3dE6gH9") -> Message:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _result(name: str, content: str, call_id: str = "aB3dE6gH9") -> Message:
    return {"role": "tool", "tool_call_id": call_id, "name": name, "content": content}


TOOLS = [
    _tool("get_weather", "Tells the forecast.", city="string"),
    _tool("find_trains", "Lists departures.", station="string", limit="integer"),
]
ASKED = _turn("user", "How warm is Lisbon now?")
RESULT = _result("get_weather", '{"celsius": 21}')
TOLD = _turn("assistant", "Mild there: twenty-one degrees.")


def _weather(**turn: Any) -> list[Message]:
    called = {"role": "assistant", **turn, "tool_calls": [_call("get_weather", {"city": "Lisbon"})]}
    return [ASKED, called, RESULT, TOLD]


def _thought(content: str, thought: str | None) -> Message:
    return _turn("assistant", content, **({} if thought is None else {"reasoning_content": thought}))


PLAIN = [_turn("user", "Name a river of France."), _turn("assistant", "The Loire is one.")]
THREE = [
    *PLAIN,
    *(_turn("user", "Another, please?"), _turn("assistant", "Garonne, further south.")),
    *(_turn("user", "And its mouth?"), _turn("assistant", "It reaches the Gironde estuary.")),
]
THOUGHTS = [
    *(_turn("user", "Is ninety-one prime?"), _thought("No, it is composite.", "Seven times thirteen gives it.")),
    *(_turn("user", "What about ninety-seven?"), _thought("Yes, indeed prime.", "Nothing below ten divides.")),
]
NESTED = {"station": "Évora", "limit": 3, "filters": {"direct": True, "via": None, "lines": ["red", "blue"]}}
AGENT = [
    _turn("system", "You plan journeys briefly."),
    *_weather(content=""),
    _turn("user", "Trains from Faro tonight?"),
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [_call("find_trains", {"station": "Faro", "limit": 2}, "k1L2m3N4o")],
    },
    _result("find_trains", "18:05 and 20:40", "k1L2m3N4o"),
    _turn("assistant", "Two depart: choose the earlier."),
]
OPEN = {"enable_thinking": True, "thinking": True}
SHUT = {"enable_thinking": False, "thinking": False}

CASES = (
    Case("plain", PLAIN),
    Case("system", [_turn("system", "Answer like a sailor."), *PLAIN]),
    Case("turns", THREE),
    Case("last turn", THREE, train_on="last"),
    Case(
        "white space",
        [
            *(_turn("user", "Indent it."), _turn("assistant", "  indented by two")),
            *(_turn("user", "Break after it."), _turn("assistant", "broken line \n")),
            *(_turn("user", "Break before it."), _turn("assistant", "\n\nlate start")),
        ],
    ),
    Case("tag-like", [_turn("user", "In bold?"), _turn("assistant", "<b>strong</b> words < weak > ones")]),
    Case("unicode", [_turn("user", "日本語で？ 🙂"), _turn("assistant", "はい、もちろん👩‍👩‍👧 — naïve e\u0301 ﬁn")]),
    Case("thought", [_turn("user", "Six times seven?"), _thought("Forty-two.", "Multiply: six sevens.")]),
    Case(
        "inline thought",
        [
            _turn("user", "Six times seven?"),
            _turn("assistant", "<think>\nMultiply: six sevens.\n</think>\n\nForty-two."),
        ],
    ),
    Case("thoughts", THOUGHTS),
    Case("thought, then none", [*THOUGHTS, _turn("user", "Sure?"), _thought("Quite certain.", "")]),
    Case("thoughts left out", THOUGHTS, thoughts="drop"),
    Case("opened thought", PLAIN, kwargs=OPEN),
    Case("opened and thought", THOUGHTS[:2], kwargs=OPEN),
    Case("shut thought", THREE[:4], kwargs=SHUT),
    Case("call", _weather(content=""), TOOLS),
    Case("call with words", _weather(content="Let me look outside."), TOOLS),
    Case("call and thought", _weather(content="", reasoning_content="Weather needs the instrument."), TOOLS),
    Case(
        "parallel calls",
        [
            _turn("user", "Lisbon and Oslo?"),
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    _call("get_weather", {"city": "Lisbon"}, "p1P2p3P4p"),
                    _call("get_weather", {"city": "Oslo"}, "q1Q2q3Q4q"),
                ],
            },
            _result("get_weather", "sunny", "p1P2p3P4p"),
            _result("get_weather", "snowing", "q1Q2q3Q4q"),
            _turn("assistant", "Bright southwards, white northwards."),
        ],
        TOOLS,
    ),
    Case("call, content null", _weather(content=None), TOOLS),
    Case("call, no content", _weather(), TOOLS),
    Case(
        "arguments as text",
        [
            ASKED,
            _turn("assistant", "", tool_calls=[_call("get_weather", '{"city": "Lisbon"}')]),
            RESULT,
            TOLD,
        ],
        TOOLS,
    ),
    Case(
        "nested arguments",
        [
            _turn("user", "Anything direct?"),
            _turn("assistant", "", tool_calls=[_call("find_trains", NESTED)]),
            _result("find_trains", "nothing"),
            _turn("assistant", "Sadly not today."),
        ],
        TOOLS,
    ),
    Case("agent", AGENT, TOOLS),
    Case("system again", [*PLAIN, _turn("system", "Whisper from here."), *THREE[2:4]]),
    Case("turn not trained", [*THREE[:3], {**THREE[3], "train": False}, *THREE[4:]]),
    Case(
        "text parts",
        [
            _turn("user", [{"type": "text", "text": "Name a river of France."}]),
            _turn("assistant", [{"type": "text", "text": "The Loire is one."}]),
        ],
    ),
    Case("same words", [_turn("user", "Again?"), _turn("assistant", "Yes.")] * 3),
    Case("tight thought", [_turn("user", "Six?"), _turn("assistant", "<think>Half a dozen.</think>Twice three.")]),
    Case("tag in an answer", [_turn("user", "And then?"), _turn("assistant", "Close it by </think> as usual.")]),
    Case("answer ends in a stop", [PLAIN[0], _turn("assistant", f"The Loire is one.{STOP}")]),
    Case("stop within an answer", [PLAIN[0], _turn("assistant", f"The Loire{STOP} is one.")]),
    Case("two answers", [*PLAIN, _turn("assistant", "Garonne, further south.")]),
    Case("answer first", [_turn("assistant", "Welcome aboard!"), *PLAIN]),
    Case(
        "call without arguments",
        [
            _turn("user", "What time?"),
            _turn("assistant", "", tool_calls=[_call("get_time", {})]),
            _result("get_time", "noon"),
            _turn("assistant", "Midday exactly."),
        ],
        [{"type": "function", "function": {"name": "get_time", "description": "Tells the hour.", "parameters": {}}}],
    ),
    Case("developer", [_turn("developer", "Answer like a pirate."), *PLAIN]),
)
