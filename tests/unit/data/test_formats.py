"""The five shapes of rows: detected or declared, renamed, and what they become."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from toolkit.errors import DataError


def text_of(batches: Any, tokenizer: Any, index: int = 0) -> str:
    return str(tokenizer.decode(batches.train[index]["input_ids"]))


CHAT_TEXT = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>"
SHAPED = [
    ("messages", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
    ("sharegpt", {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
    (
        "prompt-completion",
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    ),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}),
    ("alpaca", {"instruction": "q", "output": "a"}),
]


@pytest.mark.parametrize(("format", "row"), SHAPED)
def test_chat_shapes_become_the_same_text_and_mask(
    format: str, row: Any, build: Any, tokenizer: Any, trained: Any
) -> None:
    batches = build([row])
    assert batches.report.format == format
    assert text_of(batches, tokenizer) == CHAT_TEXT
    assert trained(batches) == ["a<|im_end|>"]
    assert build([row], format=format).train[0] == batches.train[0]


def test_alpaca_input_and_system(build: Any, tokenizer: Any) -> None:
    row = {"instruction": "Add.", "input": "1 1", "output": "2", "system": "Be brief."}
    text = text_of(build([row]), tokenizer)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd.\n\n1 1<|im_end|>")


def test_a_system_prompt_is_put_before_conversations_without_one(build: Any, tokenizer: Any) -> None:
    row = SHAPED[0][1]
    own = {"messages": [{"role": "system", "content": "Mine."}, *row["messages"]]}
    batches = build([row, own], system_prompt="Yours.")
    assert "system\nYours." in text_of(batches, tokenizer)
    assert "Yours." not in text_of(batches, tokenizer, 1)
    with pytest.raises(DataError, match="plain text has no system turn"):
        build([{"text": "x"}], system_prompt="Yours.")


def test_only_the_completion_of_a_conversation_is_trained(build: Any, trained: Any) -> None:
    prompt = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "old"},
        {"role": "user", "content": "2"},
    ]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "new"}]}
    assert trained(build([row])) == ["new<|im_end|>"]
    assert trained(build([row], system_prompt="S.")) == ["new<|im_end|>"]
    assert trained(build([row], completion_only_loss=False))[0].startswith("<|im_start|>user")
    with pytest.raises(DataError, match="no assistant turn in the completion"):
        build([{"prompt": prompt, "completion": [{"role": "user", "content": "x"}]}])


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("Q: ü?\nA:", " yes", " yes<|im_end|>"),
        ("Capital of France is the ", "city", "city<|im_end|>"),
        ("🎉", "👍🏽", "👍🏽<|im_end|>"),
        ("", "alone", "alone<|im_end|>"),
        ("a", " b<|im_end|>", " b<|im_end|>"),
    ],
)
def test_completions_follow_what_inference_is_fed_and_end_once(
    prompt: str, completion: str, expected: str, build: Any, trained: Any, tokenizer: Any
) -> None:
    batches = build([{"prompt": prompt, "completion": completion}])
    fed, said = tokenizer(prompt)["input_ids"], tokenizer(completion.removesuffix("<|im_end|>"))["input_ids"]
    assert batches.train[0]["input_ids"] == [*fed, *said, tokenizer.eos_token_id]
    assert trained(batches) == [expected]
    assert trained(build([{"prompt": prompt, "completion": completion}], completion_only_loss=False))[0].endswith(
        expected
    )


def test_text_is_trained_whole_and_ends(build: Any, trained: Any) -> None:
    assert trained(build([{"text": "once upon"}])) == ["once upon<|im_end|>"]


def test_the_first_token_of_plain_text_is_not_doubled(build: Any, tokenizer_with: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tok = tokenizer_with()
    bos = (tok.bos_token, tok.bos_token_id)
    tok.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    for text in ("once", "<|endoftext|>once"):
        ids = build([{"text": text}], tok=tok).train[0]["input_ids"]
        assert ids.count(tok.bos_token_id) == 1 == ids.index(ids[0]) + 1
    row = {"prompt": "<|endoftext|>a", "completion": " b"}
    one = build([row], tok=tok).train[0]
    assert [label != -100 for label in one["labels"]].index(True) == len(one["labels"]) - len(tok(" b")["input_ids"])
    chat = build([SHAPED[0][1]], tok=tok).train[0]["input_ids"]
    assert tok.bos_token_id not in chat


def test_columns_are_renamed(build: Any, trained: Any) -> None:
    row = {"question": "q", "answer": " a"}
    batches = build([row], columns={"prompt": "question", "completion": "answer"})
    assert trained(batches) == [" a<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"question": "q", "answer": "a"}, {}, r"its columns \(answer, question\) fit no format; accepted: messages"),
        (
            {"prompt": "q"},
            {},
            r"its columns \(prompt\) fit no format; such rows are for training.method: grpo; accepted: messages",
        ),
        ({"message": []}, {}, r"; is 'message' meant to be 'messages'\?"),
        (
            {"prompts": "q", "completion": "a"},
            {"format": "prompt-completion"},
            r"no column 'prompt'; did you mean prompts",
        ),
        ({"question": "q"}, {"columns": {"prompt": "questoin"}}, r"no column 'questoin'; did you mean question"),
        ({"question": "q"}, {"columns": {"promt": "question"}}, r"promt: not a column of ours; did you mean prompt"),
        ({"text": 3}, {}, r":1: text is a int; text is expected"),
        ({"text": " "}, {}, r":1: text is empty"),
        ({"prompt": "a", "completion": " "}, {}, r":1: completion is empty"),
        ({"prompt": "a", "completion": [1]}, {}, r":1: prompt and completion must both"),
        ({"conversations": [{"from": "hooman", "value": "q"}]}, {}, r"unknown speaker 'hooman'; did you mean human"),
        ({"instruction": "q", "output": ""}, {}, r":1: turn 2 .* is empty"),
    ],
)
def test_what_does_not_fit_is_refused(row: Any, options: Any, message: str, build: Any) -> None:
    with pytest.raises(DataError, match=message) as error:
        build([row], **options)
    assert len(str(error.value).splitlines()) == 1


def test_turns_after_the_last_answer_are_left_out_and_counted(build: Any, tokenizer: Any) -> None:
    turns = [*SHAPED[0][1]["messages"], {"role": "user", "content": "thanks"}]
    batches = build([{"messages": turns}])
    assert text_of(batches, tokenizer) == CHAT_TEXT
    assert batches.report.notices == {"turns after the last answer were left out": 1}


def test_messages_and_tools_as_json_text_are_read(build: Any, tokenizer: Any) -> None:
    import json

    row = {"messages": json.dumps(SHAPED[0][1]["messages"]), "tools": ""}
    assert text_of(build([row]), tokenizer) == CHAT_TEXT


def test_what_a_template_is_given_anyway_is_no_option(build: Any) -> None:
    row = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}
    for name in ("messages", "add_generation_prompt"):
        with pytest.raises(DataError, match=f"data.chat_template_kwargs: {name} cannot be set here"):
            build([row], chat_template_kwargs={name: False})


THINKS = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{{ '' if enable_thinking else '' }}{{ reasoning_style }}{% endif %}{% set namespaced = namespace(a=1) %}"""
ASKED = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]


@pytest.mark.parametrize("name", ["enable_thinkin", "enable-thinking", "Enable_Thinking", "enablethinking"])
def test_a_misspelt_option_is_refused(build: Any, name: str) -> None:
    said = f"chat_template_kwargs: {name}: the chat template reads no such option; did you mean enable_thinking?"
    rows = [{"messages": ASKED}]
    with pytest.raises(DataError, match=f"^data.{re.escape(said)}$"):
        build(rows, chat_template=THINKS, chat_template_kwargs={name: False})
    given = [*rows, {"messages": ASKED, "chat_template_kwargs": {name: False}}]
    with pytest.raises(DataError, match=rf"^\S+:2: {re.escape(said)} \(the only unusable row"):
        build(given, chat_template=THINKS)
    kept = build(given, chat_template=THINKS, on_invalid="drop")
    assert kept.report.splits["train"].drops == {"bad chat_template_kwargs": 1}


@pytest.mark.parametrize(
    ("options", "near"),
    [
        ({"thinking": False}, "; did you mean enable_thinking?"),
        ({"colour": "red"}, ""),
        ({"namespac": 1}, ""),  # Jinja's own functions and what is always given are no options
        ({"add_generation_promp": 1}, ""),
        ({"enable_thinkin": False, "enable_thinking": False}, "; did you mean enable_thinking?"),
    ],
)
def test_another_option_that_is_not_read_is_told(build: Any, options: dict[str, Any], near: str) -> None:
    name = next(iter(options))
    said = f"data.chat_template_kwargs: {name}: the chat template reads no such option{near}"
    for rows, more in (
        ([{"messages": ASKED}], {"chat_template_kwargs": options}),
        ([{"messages": ASKED, "chat_template_kwargs": options}], {}),
    ):
        assert build(rows, chat_template=THINKS, **more).report.notices == {said: 1}


def test_an_option_of_the_template_for_tools_alone_is_read(build: Any, tokenizer: Any) -> None:
    both = copy.copy(tokenizer)
    both.chat_template = {"default": THINKS.replace("enable_thinking", "other"), "tool_use": THINKS}
    assert not build([{"messages": ASKED}], tok=both, chat_template_kwargs={"enable_thinking": True}).report.notices


def test_plain_prompts_beside_conversations_are_told(build: Any) -> None:
    said = "plain prompts among conversations: inference uses the chat template"
    turns = [[{"role": "user", "content": "Hi."}], [{"role": "assistant", "content": "Hello."}]]
    chat, text = ({"prompt": one, "completion": two} for one, two in (turns, ("Hi: ", "Hello.")))
    assert build([chat, text]).report.notices.get(said) == 1
    assert said not in build([chat]).report.notices
    assert said not in build([text]).report.notices
