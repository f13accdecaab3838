"""What a message carries and no rendering shows is told: once a data set, for the turns that it concerns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl

from toolkit.data.forms import UnreadKey, unread_keys
from toolkit.data.template import ChatTemplate

PUBLISHED = Path(trl.__file__).parent / "chat_templates"
UNREAD = ": neither trained nor read by the chat template"
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def asked(**more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "q", **more}, {"role": "assistant", "content": "a"}]


def called(**more: Any) -> list[dict[str, Any]]:
    result = {"role": "tool", "content": "sunny", **more}
    return [*asked()[:1], {"role": "assistant", "content": "", "tool_calls": [CALL]}, result, asked()[1]]


def told(build: Any, conversations: list[Any], **options: Any) -> dict[str, int]:
    notices = build([{"messages": each} for each in conversations], **options).report.notices
    return {text: count for text, count in notices.items() if "message key" in text}


@pytest.mark.parametrize(
    ("template", "unread"),
    [
        (PLAIN, "'name'"),
        # The names of tools are not those of people.
        (PLAIN + "{% for tool in tools or [] %}{{ tool.name }}{% endfor %}", "'name' of user turns"),
        (PLAIN.replace("{{ m.role }}", "{{ m.name if m.role == 'tool' else m.role }}"), "'name' of user turns"),
        (PLAIN.replace("{{ m.role }}", "{{ m['name'] | default(m.role) }}"), None),
        (PLAIN.replace("{{ m.content }}", "{{ m.content }}{{ m.values() | join if m.role == 'user' }}"), None),
    ],
    ids=("nowhere", "of tools", "of results", "read", "by no name"),
)
def test_a_name_that_changes_nothing_is_told(build: Any, template: str, unread: str | None) -> None:
    found = told(build, [asked(name="Jo"), asked(), asked(name="Al")], chat_template=template)
    assert found == ({f"message key {unread}{UNREAD}": 2} if unread else {})


@pytest.mark.parametrize(("name", "reads"), [("qwen3", False), ("glm4moe", False), ("gemma4_v4", True)])
def test_published_templates_read_the_name_of_a_result_or_not(tokenizer: Any, name: str, reads: bool) -> None:
    template = ChatTemplate(tokenizer, (PUBLISHED / f"{name}.jinja").read_text())
    found = list(unread_keys(template.try_render, called(name="weather", tool_call_id="other")))
    assert (UnreadKey("tool", "name") not in found) is reads


def test_every_key_counts_and_an_empty_one_says_nothing(build: Any) -> None:
    rows = [asked(name="", note=[]), asked(name="Jo", note="n", train=True), asked(note="m")]
    assert told(build, rows, chat_template=PLAIN) == {
        f"message key 'name'{UNREAD}": 1,
        f"message key 'note'{UNREAD}": 2,
    }


def test_ids_of_results_are_told_like_any_key(build: Any) -> None:
    template = PLAIN.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls or '' }}")
    assert told(build, [called(tool_call_id="abcdefghi")], chat_template=template) == {
        f"message key 'tool_call_id'{UNREAD}": 1
    }


def test_a_switch_counts_as_read_though_it_is_off(tokenizer: Any) -> None:
    template = ChatTemplate(tokenizer, PLAIN.replace("{{ m.content }}", "{{ '!' if m.loud }}{{ m.content }}"))
    assert not list(unread_keys(template.try_render, asked(loud=False)))
    assert list(unread_keys(template.try_render, asked(quiet=False))) == [UnreadKey("user", "quiet")]


def test_a_template_that_insists_on_a_key_reads_it(tokenizer: Any) -> None:
    insists = "{% for m in messages %}{% if m.role == 'user' and m.name is not defined %}{{ raise_exception('x') }}"
    template = ChatTemplate(tokenizer, f"{insists}{{% endif %}}{{{{ m.content }}}}{{% endfor %}}")
    assert not list(unread_keys(template.try_render, asked(name="Jo")))
