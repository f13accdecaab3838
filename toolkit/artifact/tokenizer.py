"""The tokenizer of an artifact and what ends an answer: written without traces of this machine, put into exports.

`save_pretrained` writes where the tokenizer was loaded from and the last batch's padding, and puts a second chat
template into a folder of its own, which an artifact does not have. What counts is that it reads back as the same. A run
may end its turns with a token that its base never stops at, and then every program goes on writing: transformers and
vLLM read generation_config.json, converters and older servers config.json; PEFT saves neither.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from toolkit.artifact.manifest import GENERATION_CONFIG, TOKENIZER_FILES, read_json, write_json
from toolkit.artifact.privacy import portable
from toolkit.errors import ModelError, first_line

__all__ = [
    "declare_stops",
    "put_stops",
    "put_tokenizer",
    "read_stops",
    "require_same_tokenizer",
    "same_tokens",
    "token_text",
    "token_texts",
    "write_generation_config",
    "write_tokenizer",
]

# What transformers writes into tokenizer_config.json about where and how the tokenizer was loaded here.
_LOADING_KEYS = frozenset({"auto_map", "cache_dir", "is_local", "local_files_only", "name_or_path", "use_auth_token"})
_CONFIG = "tokenizer_config.json"
_PROCESSOR = "processor_config.json"
_TEMPLATES = ("chat_template.json", "additional_chat_templates")
"""Where else a checkpoint keeps templates; programs that look there first would take the base's."""

_PROBES = (
    "Hello, world!  Two spaces,\n\n\ttabs and 12345.67 numbers; it's (un)tokenised_text.",
    "naïve café – “quotes” … 你好，世界 こんにちは مرحبا 🙂👩‍👩‍👧 e\u0301",
    "def f(x):\n    return {'a': [x ** 2, None]}  # <b>&amp;</b> \\path\\to",
    "",
    " ",
)
"""Texts that tokenizers part on: spaces, digits, scripts, joined emoji, code."""

_MODEL_CONFIG = "config.json"
_EOS = "eos_token_id"
_FROM_CONFIG = ("bos_token_id", "pad_token_id", "decoder_start_token_id")


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, base: Path | None = None) -> None:
    """Write the files of `TOKENIZER_FILES` that this tokenizer needs; equal tokenizers give equal bytes.

    Args:
        base: the base's folder; what its own configuration says is kept word for word.

    Raises:
        ModelError: the tokenizer writes no tokenizer.json.
    """
    clean: Any = copy.deepcopy(tokenizer)
    backend = getattr(clean, "backend_tokenizer", None)
    if backend is not None:
        # The last batch's padding and truncation stick to the tokenizer and would be saved with it.
        backend.no_padding()
        backend.no_truncation()
    with tempfile.TemporaryDirectory() as scratch:
        # Several templates go into the configuration: their other place is a folder.
        clean.save_pretrained(scratch, save_jinja_files=not isinstance(clean.chat_template, dict))
        saved = {path.name: path for path in Path(scratch).iterdir() if path.name in TOKENIZER_FILES}
        if "tokenizer.json" not in saved:
            raise ModelError(f"{type(tokenizer).__name__}: writes no tokenizer.json: use a base with a fast tokenizer")
        for name, path in saved.items():
            shutil.copyfile(path, folder / name)
    theirs = read_json(base / _CONFIG) if base else {}
    config = read_json(folder / _CONFIG)
    kept = {k: v for k, v in config.items() if k not in _LOADING_KEYS and not k.endswith("_file")}
    # A chat template is text that a program runs; what is found in it is refused, never changed.
    said = {k: v for k, v in kept.items() if k == "chat_template" or (k in theirs and theirs[k] == v)}
    write_json(folder / _CONFIG, {**portable(kept), **said})


def put_tokenizer(artifact: Path, folder: Path) -> None:
    """Put an artifact's tokenizer and chat template into an export, in place of the base's, and compare.

    Raises:
        ModelError: what lies there now loads as another tokenizer.
    """
    if not (artifact / "tokenizer.json").is_file():
        return
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
        if (artifact / name).is_file():
            shutil.copyfile(artifact / name, folder / name)
    for name in _TEMPLATES:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink(missing_ok=True)
    processor = read_json(folder / _PROCESSOR)
    if processor.pop("chat_template", None) is not None:
        write_json(folder / _PROCESSOR, processor)
    require_same_tokenizer(_load(artifact), folder)


def require_same_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise `ModelError` unless the tokenizer in `folder` gives the same ids, special tokens and chat template."""
    found = _load(folder)
    if what := next((name for name, of in _COMPARED.items() if of(found) != of(tokenizer)), None):
        raise ModelError(
            f"{folder}: the tokenizer, written and read again, has other {what}: use a base whose tokenizer.json holds "
            "its whole tokenizer"
        )


def same_tokens(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether `other` has all of the tokenizer's words and cuts awkward texts alike; it may have more words."""
    words, theirs = tokenizer.get_vocab(), other.get_vocab()
    return all(theirs.get(word) == number for word, number in words.items()) and _ids(tokenizer) == _ids(other)


def token_text(folder: Path, ids: list[int]) -> list[str]:
    """The texts of tokens by their ids, from the tokenizer in a folder; ids without a text are left out."""
    tokenizer = _load(folder)
    return [text for one in ids if (text := tokenizer.decode([one], skip_special_tokens=False))]


def token_texts(folder: Path, ids: list[int]) -> list[str | None]:
    """What the tokenizer in a folder has under each id, None where it has nothing."""
    tokenizer = _load(folder)
    return [tokenizer.convert_ids_to_tokens(one) for one in ids]


def _load(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}: its tokenizer does not load: {first_line(error)}") from None


def _ids(tokenizer: Any) -> list[list[int]]:
    probes = [*_PROBES, *tokenizer.all_special_tokens, " ".join(map(str, tokenizer.all_special_tokens))]
    with_special = [tokenizer(text, verbose=False)["input_ids"] for text in probes]
    return [*with_special, *(tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in probes)]


def _template(tokenizer: Any) -> Any:
    """Jinja reads every end of line as the same one."""
    found = tokenizer.chat_template
    plain = found if isinstance(found, dict) else {"default": found}
    return {name: text and re.sub(r"\r\n?", "\n", text) for name, text in plain.items()}


_COMPARED = {
    "words": lambda tokenizer: tokenizer.get_vocab(),
    "special tokens": lambda tokenizer: tokenizer.special_tokens_map,
    "ids": _ids,
    "chat templates": _template,
}


def write_generation_config(folder: Path, stops: Iterable[int], base: Path | None = None) -> None:
    """Write generation_config.json: the base's own, or what its config.json says, with `stops` as its end tokens.

    Args:
        stops: token ids, the base's own among them; nothing is written where there are none.
    """
    ids = sorted(set(stops))
    if not ids:
        return
    own = read_json(base / GENERATION_CONFIG) if base else {}
    if base and not own:
        config = read_json(base / _MODEL_CONFIG)
        told = {**config.get("text_config", {}), **config}
        own = {key: told[key] for key in _FROM_CONFIG if isinstance(told.get(key), int)}
    # What was derived from a model's configuration would be derived again, without these ends.
    own.pop("_from_model_config", None)
    write_json(folder / GENERATION_CONFIG, {**own, _EOS: ids})


def read_stops(folder: Path) -> list[int]:
    """The end tokens of a folder's generation_config.json, sorted; none where it has no such file."""
    return sorted(_ends(read_json(folder / GENERATION_CONFIG)))


def put_stops(artifact: Path, folder: Path) -> None:
    """Put an artifact's generation_config.json into an export, in place of the base's, and read it back.

    Raises:
        ModelError: transformers reads other end tokens there.
    """
    stops = read_stops(artifact)
    if not stops:
        return
    (folder / GENERATION_CONFIG).write_bytes((artifact / GENERATION_CONFIG).read_bytes())
    found = GenerationConfig.from_pretrained(folder).eos_token_id
    if found != stops:
        raise ModelError(f"{folder / GENERATION_CONFIG}: ends at {found}, the adapter at {stops}: not exported")


def declare_stops(checkpoint: Path, stops: Iterable[int], base: Path) -> None:
    """Say in a checkpoint's config.json what ends an answer, where `stops` are more than the base says in its files.

    A family whose configuration takes one number keeps the base's; generation_config.json has them all either way.
    """
    path, ids = checkpoint / _MODEL_CONFIG, sorted(set(stops))
    known = _ends(read_json(base / GENERATION_CONFIG)) | set().union(
        *map(_ends, _sections(read_json(base / _MODEL_CONFIG)))
    )
    if not path.is_file() or set(ids) <= known:
        return
    before = path.read_bytes()
    config = json.loads(before)
    for section in [one for one in _sections(config) if _EOS in one] or [config]:
        section[_EOS] = ids if len(ids) > 1 else ids[0]
    write_json(path, config)
    try:
        AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError):
        path.write_bytes(before)


def _sections(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configuration, and the part of the text model in a multimodal one."""
    yield config
    if isinstance(config.get("text_config"), dict):
        yield config["text_config"]


def _ends(config: Mapping[str, Any]) -> set[int]:
    found = config.get(_EOS)
    return set(found) if isinstance(found, list) else {found} if isinstance(found, int) else set()
