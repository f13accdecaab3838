"""The other side of the llama.cpp check: its own converter and its own library, without onecard.

    python llama_side.py convert JOB.json     Hugging Face folders to GGUF files, by llama.cpp's `conversion` package
    python llama_side.py blocks JOB.json      random numbers in every block type, and what they are worth, by ggml
    python llama_side.py run JOB.json NAME    logits of one family's files, by libllama
    python llama_side.py words JOB.json NAME  the job's `texts` as the tokens of NAME's merged file, by libllama

A job holds `converter` (a folder with `conversion` and `gguf-py`), `tokens`, `out`, and `models`: by name, the folders
`base` and `merged` and the file `adapter`, each None where there is none, and perhaps `settings` that go before
those of the config. Logits go to NAME.npz, failures to NAME.json, blocks to blocks.npz. Where the job has `texts of`,
a number, the merged file is also given texts of so many tokens each, which do not see each other ("merged apart").
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["blocks", "convert", "run", "words"]


def convert(job: dict[str, Any]) -> None:
    """Every folder of the job to an fp32 GGUF file beside it; what the converter says where it cannot."""
    sys.path[:0] = [job["converter"], f"{job['converter']}/gguf-py"]
    import gguf
    import torch
    from conversion import get_model_class

    for name, files in job["models"].items():
        for kind in ("base", "merged"):
            if not files[kind]:
                continue
            folder = Path(files[kind])
            try:
                settings = {**json.loads((folder / "config.json").read_text()), **files.get("settings", {})}
                with torch.inference_mode():
                    wordless = _without_words(get_model_class(settings["architectures"][0]))
                    hparams = settings if files.get("settings") else None
                    model = wordless(folder, gguf.LlamaFileType.ALL_F32, Path(f"{folder}.gguf"), hparams=hparams)
                    if inner := getattr(model, "impl", None):  # a class that hands all of it to another
                        inner.set_vocab = partial(wordless.set_vocab, inner)
                    model.write()
            except (Exception, SystemExit) as error:  # whatever it is, the table tells of it and goes on
                _note(job, name, kind, f"converter: {type(error).__name__}: {error}")


def _without_words(converter: Any) -> type:
    """The converter's class for a model without a tokenizer: token numbers go in, and logits come out."""

    class WithoutWords(converter):  # type: ignore[misc]
        model_arch = converter.model_arch
        no_mtp = True  # tiny models have no draft layers

        def set_vocab(self) -> None:
            self._set_vocab_none()
            self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    return WithoutWords


def blocks(job: dict[str, Any]) -> None:
    """By type: the blocks that ggml makes of random rows ("blocks NAME"), and their values ("values NAME")."""
    sys.path[:0] = [f"{job['converter']}/gguf-py"]
    import gguf

    lib = _library()
    address, count = ctypes.c_void_p, ctypes.c_int64
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, address, address, count, count, count, address]
    numbers = np.random.default_rng(0).standard_normal((16, 512)).astype(np.float32)
    evenly, found = np.ones(512, dtype=np.float32), {}
    for kind, (width, size) in gguf.GGML_QUANT_SIZES.items():
        name = re.sub(r"_k$", "_K", kind.name.lower())
        if width == 1 or kind.name in ("Q8_1", "Q8_K") or not hasattr(lib, f"dequantize_row_{name}"):
            continue  # no blocks, types that ggml has for its own products alone, or one that it lacks
        made, values = np.zeros((16, 512 // width * size), dtype=np.uint8), np.zeros_like(numbers)
        lib.ggml_quantize_init(int(kind))
        lib.ggml_quantize_chunk(int(kind), numbers.ctypes.data, made.ctypes.data, 0, *numbers.shape, evenly.ctypes.data)
        worth = getattr(lib, f"dequantize_row_{name}")
        worth.argtypes = [address, address, count]
        worth(made.ctypes.data, values.ctypes.data, values.size)
        found |= {f"blocks {kind.name}": made, f"values {kind.name}": values}
    np.savez(Path(job["out"]) / "blocks.npz", **found)


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


class _Settings(ctypes.Structure):
    """`llama_model_params` or `llama_context_params`: libllama fills them in, and only a few numbers are changed."""

    _fields_ = [("numbers", ctypes.c_int32 * 128)]


_CONTEXT = {"n_ctx": (0, 512), "n_batch": (1, 2048), "n_threads": (7, 4), "n_threads_batch": (8, 4)}
_CONTEXT |= {"flash_attn_type": (13, -1), "type_k": (26, 1), "type_v": (27, 1)}
"""Places of these numbers in llama.h's `llama_context_params`, and libllama's defaults, which check the places."""


def run(job: dict[str, Any], name: str) -> None:
    """Logits [T, V] of the base, the base with the GGUF LoRA, and the merged model."""
    lib, said = _library(), []
    heard = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
        lambda level, text, data: said.append(text.decode(errors="replace").strip()) if level >= 3 else None
    )
    lib.llama_log_set(heard, None)
    lib.llama_backend_init()
    files, found = job["models"][name], {}
    for kind, folder, adapter in (
        ("base", files["base"], None),
        ("adapter", files["base"], files["adapter"]),
        ("merged", files["merged"], None),
    ):
        if folder and (kind != "adapter" or adapter) and Path(f"{folder}.gguf").is_file():
            said.clear()
            try:
                found[kind] = _logits(lib, f"{folder}.gguf", adapter, [job["tokens"]])
                if kind == "merged" and (size := job.get("texts of")):
                    texts = [job["tokens"][first : first + size] for first in range(0, len(job["tokens"]), size)]
                    found["merged apart"] = _logits(lib, f"{folder}.gguf", None, texts)
            except RuntimeError as error:
                _note(job, name, kind, f"{error}: {' '.join(said)[-300:]}")
    np.savez(Path(job["out"]) / f"{name}.npz", **found)


def words(job: dict[str, Any], name: str) -> None:
    """Ids of each text to NAME.words.json, special tokens by their names, nothing added at the ends."""
    lib = _library()
    lib.llama_backend_init()
    path = f"{job['models'][name]['merged']}.gguf"
    model = _made(lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params()), "model not loaded")
    vocabulary, found = ctypes.c_void_p(lib.llama_model_get_vocab(model)), []
    for text in job["texts"]:
        room = (ctypes.c_int32 * (len(text.encode()) + 8))()
        data = text.encode()
        count = lib.llama_tokenize(
            vocabulary, data, len(data), room, len(room), ctypes.c_bool(False), ctypes.c_bool(True)
        )
        found.append(list(room[:count]))
    (Path(job["out"]) / f"{name}.words.json").write_text(json.dumps(found))


def _library() -> Any:
    """libllama lies inside this package's extension module, which exports its C functions."""
    folder = importlib.util.find_spec("xllamacpp").submodule_search_locations[0]
    lib = ctypes.CDLL(str(next(Path(folder).glob("*.so"))))
    for function in ("llama_model_default_params", "llama_context_default_params"):
        getattr(lib, function).restype = _Settings
    for function in ("llama_model_load_from_file", "llama_init_from_model", "llama_adapter_lora_init"):
        getattr(lib, function).restype = ctypes.c_void_p
    lib.llama_model_get_vocab.restype = ctypes.c_void_p
    lib.llama_batch_init.restype = _Batch
    lib.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    return lib


def _logits(lib: Any, path: str, adapter: str | None, texts: list[list[int]]) -> np.ndarray:
    """[T, V] of all tokens of the texts, one after the other."""
    model = _made(lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params()), "model not loaded")
    result = np.concatenate([_logits_of_one(lib, model, adapter, text) for text in texts])
    lib.llama_model_free(model)
    return result


def _logits_of_one(lib: Any, model: Any, adapter: str | None, tokens: list[int]) -> np.ndarray:
    context = _made(lib.llama_init_from_model(model, _plain_context(lib)), "no context")
    if adapter:
        lora = _made(lib.llama_adapter_lora_init(model, adapter.encode()), "adapter not loaded")
        loras, scales = (ctypes.c_void_p * 1)(lora.value), (ctypes.c_float * 1)(1.0)
        if lib.llama_set_adapters_lora(context, loras, ctypes.c_size_t(1), scales):
            raise RuntimeError("adapter not applied")
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    if lib.llama_decode(context, batch):
        raise RuntimeError("llama_decode failed")
    count = lib.llama_vocab_n_tokens(ctypes.c_void_p(lib.llama_model_get_vocab(model)))
    result = np.ctypeslib.as_array(lib.llama_get_logits(context), (len(tokens), count)).copy()
    lib.llama_free(context)
    return result


def _plain_context(lib: Any) -> _Settings:
    """One thread, no flash attention, keys and values in fp32."""
    settings = lib.llama_context_default_params()
    moved = [field for field, (place, default) in _CONTEXT.items() if settings.numbers[place] != default]
    if moved:
        raise RuntimeError(f"this libllama has {moved[0]} in another place")
    wanted = {"n_ctx": 256, "n_batch": 256, "n_threads": 1, "n_threads_batch": 1}
    for field, value in {**wanted, "flash_attn_type": 0, "type_k": 0, "type_v": 0}.items():
        settings.numbers[_CONTEXT[field][0]] = value
    return settings


def _made(pointer: int | None, what: str) -> ctypes.c_void_p:
    if not pointer:
        raise RuntimeError(what)
    return ctypes.c_void_p(pointer)


def _note(job: dict[str, Any], name: str, kind: str, line: str) -> None:
    path = Path(job["out"]) / f"{name}.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**known, kind: " ".join(line.split())[:300]}))


if __name__ == "__main__":
    read = json.loads(Path(sys.argv[2]).read_text())
    verbs = {"convert": convert, "blocks": blocks, "run": run, "words": words}
    verbs[sys.argv[1]](read, *sys.argv[3:])
