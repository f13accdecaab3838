"""A conversation in the terminal: tokens as they come, base beside adapted, adapters switched while it goes on.

`transformers chat` talks to a server that knows neither our int8 experts nor adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TextStreamer

from toolkit.adapters import add_adapter
from toolkit.errors import OnecardError, RecipeError
from toolkit.evaluate import encode_chat, sampling

__all__ = ["BASE", "Conversation", "talk"]

BASE = "base"
"""The name under which the base model, without any adapter, is switched to."""

Tell = Callable[[str], None]


class _Teller(TextStreamer):  # type: ignore[misc]
    """Hands whole words of an answer on as they come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tell: Tell) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._tell = tell

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """TextStreamer's own seam."""
        if text:
            self._tell(text)


@dataclass
class Conversation:
    """What was said so far, with whom. `adapter` is the name of the one that speaks; `names` maps names to folders."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    write: Callable[[list[int]], tuple[str, dict[str, Any]]] | None = None
    """Writes the artifact's own answers instead, such as with drafts; they come in one piece."""
    adapter: str = "default"
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """All that can be switched to."""
        return [BASE, *self.model.peft_config]

    def say(self, text: str, tell: Tell) -> str:
        """The answer to `text`, told piece by piece; both become part of the conversation."""
        self.messages.append({"role": "user", "content": text})
        reply = self._answer(self.adapter, tell)
        self.messages.append({"role": "assistant", "content": reply})
        return reply

    def say_to_both(self, text: str, tell_base: Tell, tell: Tell) -> str:
        """As `say`, after the base has answered the same; its answer is not part of the conversation."""
        self.messages.append({"role": "user", "content": text})
        self._answer(BASE, tell_base)
        self.messages.pop()
        return self.say(text, tell)

    def switch(self, name: str) -> None:
        """Let another adapter speak: one of `names`, or a folder, which is loaded under its own name.

        Raises:
            ModelError: the folder is no adapter of this model. RecipeError: there is no such adapter.
        """
        if name not in self.names:
            folder = (
                Path(name) / "adapter" if (Path(name) / "adapter" / "adapter_config.json").is_file() else Path(name)
            )
            if not folder.is_dir():
                raise RecipeError(f"{name}: no adapter of that name or folder; there are {', '.join(self.names)}")
            # A dot would divide PEFT's names of parameters.
            name = Path(name).resolve().name.replace(".", "-")
            if name not in self.names:
                add_adapter(self.model, folder, name)
        self.adapter = name

    def reset(self) -> None:
        """Forget what was said."""
        self.messages.clear()

    @torch.no_grad()
    def _answer(self, adapter: str, tell: Tell) -> str:
        if adapter == BASE:
            with self.model.disable_adapter():
                return self._generate(tell)
        self.model.set_adapter(adapter)
        if self.write is None or adapter != "default":
            return self._generate(tell)
        reply, _ = self.write(self._prompt())
        tell(reply)
        return reply

    def _prompt(self) -> list[int]:
        return encode_chat(self.tokenizer, self.messages, self.system_prompt)

    def _generate(self, tell: Tell) -> str:
        self.model.eval()
        ids = torch.tensor([self._prompt()], device=self.model.device)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.tokenizer.eos_token_id,
            streamer=_Teller(self.tokenizer, tell),
            **sampling(self.temperature),
        )
        return str(self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def talk(
    conversation: Conversation, lines: Iterable[str], tell: Tell, say: Callable[[str], None], *, compare: bool
) -> None:
    """Answer `lines` until one is empty or `/quit`.

    Args:
        tell: takes the model's words. say: takes whole lines of ours. compare: the base answers first, too.
    """
    for line in lines:
        command, _, argument = line.partition(" ")
        if command in ("", "/quit"):
            return
        if command.startswith("/"):
            say(_obey(conversation, command, argument.strip()))
        elif compare:
            tell("base: ")
            conversation.say_to_both(line, tell, _once_labelled(f"\n{conversation.adapter}: ", tell))
            tell("\n")
        else:
            conversation.say(line, tell)
            tell("\n")


def _obey(conversation: Conversation, command: str, argument: str) -> str:
    """Do what a line that starts with a slash says, and what to tell of it."""
    try:
        if command == "/reset":
            conversation.reset()
            return "forgotten"
        if command == "/adapter":
            if argument:
                conversation.switch(argument)
            return f"{conversation.adapter} speaks; there are {', '.join(conversation.names)}"
    except OnecardError as error:
        return str(error)
    return f"{command}: no such command; there are /adapter [NAME|FOLDER], /reset, /quit"


def _once_labelled(label: str, tell: Tell) -> Tell:
    """`tell`, with a label before its first words."""
    waiting = [label]

    def told(text: str) -> None:
        tell("".join(waiting) + text)
        waiting.clear()

    return told
