"""A conversation in the terminal: tokens as they come, base beside adapted, adapters switched while it goes on.

`transformers chat` talks to a server that knows neither our int8 experts nor adapters. rich draws two answers in two
columns; what it lacks is the plain form for pipes and logs, one answer after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers.generation.streamers import BaseStreamer

from toolkit.adapters import add_adapter
from toolkit.data import Answer, Dialogue
from toolkit.errors import OnecardError, RecipeError
from toolkit.evaluate import sampling
from toolkit.mtp.decode import Speculator

__all__ = ["BASE", "Conversation", "Screen", "Tell", "talk"]

Tell = Callable[[str], None]
_NARROWEST = 60
_UNSEEN = {code: f"\\x{code:02x}" for code in (*range(32), 127) if chr(code) not in "\n\t"}
"""Control characters are written out: a model must not reach the terminal."""

BASE = "base"
"""The name under which the base model, without any adapter, is switched to."""

_OWN = "default"
"""PEFT's name of the artifact's own adapter, the one that its head drafts for."""
_HELP = "/adapter [NAME|FOLDER], /compare [on|off], /mtp [on|off], /reset, /help, /quit"

_LEADS = {
    ("", "thought"): "[thought] ",
    ("thought", "text"): "\n[answer] ",
    ("thought", "calls"): "\n[answer] ",
    ("text", "calls"): "\n",
}
"""What is told between two parts of an answer."""


@dataclass(frozen=True)
class Screen:
    """Takes words of the model, pieces of an answer, in `tell`, and whole lines of ours in `say`.

    `console` is where columns are drawn, if it is a terminal that is wide enough.
    """

    tell: Tell
    say: Tell
    console: Console | None = None

    @property
    def has_columns(self) -> bool:
        """Whether two answers stand side by side."""
        return self.console is not None and self.console.is_terminal and self.console.width >= _NARROWEST

    def words(self, text: str) -> None:
        """Show a piece of an answer."""
        self.tell(text.translate(_UNSEEN) if self.console is not None and self.console.is_terminal else text)

    @contextmanager
    def both(self, left: str, right: str) -> Iterator[tuple[Tell, Tell]]:
        """What takes the words of each of two speakers, the left one's first."""
        if self.console is None or not self.has_columns:
            yield self._labelled(f"{left}: "), self._labelled(f"\n{right}: ")
            self.words("\n")
            return
        columns = Table(left, right, expand=True, box=None, padding=(0, 1))
        texts = Text(), Text(style="bold")
        columns.add_row(*texts)
        # The whole answer stays on the screen once it is finished; while it grows, its end is what counts least.
        with Live(columns, console=self.console, refresh_per_second=12) as live:

            def into(text: Text) -> Tell:
                def told(piece: str) -> None:
                    text.append(piece.translate(_UNSEEN))
                    live.refresh()

                return told

            yield into(texts[0]), into(texts[1])

    def _labelled(self, label: str) -> Tell:
        """`words`, with a label before the first of them."""
        waiting = [label]

        def told(text: str) -> None:
            self.words("".join(waiting) + text)
            waiting.clear()

        return told


class _AnswerStreamer(BaseStreamer):  # type: ignore[misc]
    """Hands an answer on as it comes, its thought apart; what may become a mark or a call waits."""

    def __init__(self, dialogue: Dialogue, prompt_ids: Sequence[int], tell: Tell, *, skip_prompt: bool) -> None:
        self._decode, self._stream, self._tell = dialogue.tokens.decode, dialogue.stream(prompt_ids), tell
        self._skips = skip_prompt
        self._ids: list[int] = []
        self._read = 0
        self._told = ""

    def put(self, value: torch.Tensor) -> None:
        """transformers' seam: new tokens, the prompt's first."""
        if self._skips:
            self._skips = False
            return
        self._ids += value.flatten().tolist()
        # Half of a character is shown as U+FFFD until its other half has come.
        self._feed(self._decode(self._ids).rstrip("\ufffd"))

    def end(self) -> None:
        """transformers' seam: nothing more comes."""
        self._feed(self._decode(self._ids))
        self._show(self._stream.end())

    def _feed(self, text: str) -> None:
        self._show(self._stream.feed(text[self._read :]))
        self._read = len(text)

    def _show(self, more: Answer) -> None:
        calls = Answer("", calls=more.calls).judged
        for part, words in (("thought", more.thought), ("text", more.text), ("calls", calls)):
            if words:
                self._tell(_LEADS.get((self._told, part), "") + words)
                self._told = part


@dataclass
class Conversation:
    """What was said so far, with whom.

    `adapter` is the name of the one that speaks, `compare` whether the base answers first, and `drafting` whether the
    artifact's own adapter answers with drafts, by what `make_drafts` makes at the first need.
    """

    model: PeftModel
    dialogue: Dialogue
    max_new_tokens: int = 256
    temperature: float = 0.0
    make_drafts: Callable[[], Speculator] | None = None
    drafting: bool = False
    compare: bool = False
    adapter: str = _OWN
    messages: list[dict[str, Any]] = field(default_factory=list)
    _drafts: Speculator | None = None

    @property
    def names(self) -> list[str]:
        """All that can be switched to."""
        return [BASE, *self.model.peft_config]

    def say(self, text: str, tell: Tell) -> str:
        """The answer to `text`, told piece by piece; both become part of the conversation."""
        self.messages.append({"role": "user", "content": text})
        reply = self._answer(self.adapter, tell)
        self.messages.append(reply.message())
        return reply.judged

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
                raise RecipeError(f"{name}: no adapter of that name or folder; known: {', '.join(self.names)}")
            # A dot would divide PEFT's names of parameters.
            name = Path(name).resolve().name.replace(".", "-")
            if name not in self.names:
                add_adapter(self.model, folder, name)
        self.adapter = name

    def draft(self, on: bool) -> None:
        """Answer with drafts from now on, or without.

        Raises:
            RecipeError: there is nothing to draft with.
        """
        if on and self.make_drafts is None:
            raise RecipeError("this conversation has nothing to draft with")
        self.drafting = on

    def drafted(self) -> str:
        """In words, whether there are drafts and what they have brought."""
        if self._drafts is None or not self._drafts.counts.passes:
            return "drafts on" if self.drafting else "drafts off"
        counts = self._drafts.counts
        ended = ", switched off: they cost more time than they save here" if counts.switched_off else ""
        return f"drafts {'on' if self.drafting else 'off'}: {counts.tokens_per_pass:.2f} tokens/pass so far{ended}"

    def reset(self) -> None:
        """Forget what was said."""
        self.messages.clear()

    @torch.no_grad()
    def _answer(self, adapter: str, tell: Tell) -> Answer:
        if adapter == BASE:
            with self.model.disable_adapter():
                return self._generate(tell)
        self.model.set_adapter(adapter)
        if self.drafting and adapter == _OWN:
            return self._generate_with_drafts(tell)
        return self._generate(tell)

    def _generate_with_drafts(self, tell: Tell) -> Answer:
        if self._drafts is None:
            assert self.make_drafts is not None
            self._drafts = self.make_drafts()
        prompt = self._prompt()
        teller = _AnswerStreamer(self.dialogue, prompt, tell, skip_prompt=False)
        (written,) = self._drafts.generate([prompt], told=lambda new: teller.put(torch.tensor(new)))
        teller.end()
        return self.dialogue.read(written, prompt)

    def _prompt(self) -> list[int]:
        return self.dialogue.prompt_ids(self.messages)

    def _generate(self, tell: Tell) -> Answer:
        self.model.eval()
        prompt = self._prompt()
        ids = torch.tensor([prompt], device=self.model.device)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.dialogue.tokens.eos,
            streamer=_AnswerStreamer(self.dialogue, prompt, tell, skip_prompt=True),
            **sampling(self.temperature),
        )
        return self.dialogue.read(output[0, ids.shape[1] :].tolist(), prompt)


def talk(conversation: Conversation, lines: Iterable[str], screen: Screen) -> None:
    """Answer `lines` until one is empty or `/quit`."""
    for line in lines:
        command, _, argument = line.partition(" ")
        if command in ("", "/quit"):
            return
        if command.startswith("/"):
            screen.say(_run_command(conversation, command, argument.strip()))
        elif conversation.compare:
            with screen.both(BASE, conversation.adapter) as (base, own):
                conversation.say_to_both(line, base, own)
        else:
            conversation.say(line, screen.words)
            screen.words("\n")


def _run_command(conversation: Conversation, command: str, argument: str) -> str:
    """Do what a line that starts with a slash says, and what to tell of it."""
    try:
        match command:
            case "/reset":
                conversation.reset()
                return "forgotten"
            case "/adapter":
                if argument:
                    conversation.switch(argument)
                return f"using {conversation.adapter}; choices: {', '.join(conversation.names)}"
            case "/compare":
                conversation.compare = _switched(command, argument, conversation.compare)
                return "the base answers first" if conversation.compare else f"{conversation.adapter} answers alone"
            case "/mtp":
                conversation.draft(_switched(command, argument, conversation.drafting))
                return conversation.drafted()
            case "/help":
                return _HELP
    except OnecardError as error:
        return str(error)
    return f"{command}: no such command; known: {_HELP}"


def _switched(command: str, argument: str, now: bool) -> bool:
    """`on`, `off`, or as it is where nothing is said."""
    if argument not in ("", "on", "off"):
        raise RecipeError(f"{command} {argument}: say on or off")
    return {"on": True, "off": False}.get(argument, now)
