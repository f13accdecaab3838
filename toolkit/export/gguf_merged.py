"""A whole model with the adapter in it as one GGUF file, for llama.cpp, Ollama and what is built on them.

llama.cpp's converter is on no registry as a library, and its quantiser is a program. Here the header is written first,
with the `gguf` library, and read back by our own reader with the config of the base: every parameter must have its
tensors, before any weight is read. Then parameters are merged one after the other, and each lands at its place.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.artifact.manifest import TEMPLATE, read_manifest
from toolkit.artifact.tokenizer import read_stops
from toolkit.checkpoint.files import gguf_at
from toolkit.checkpoint.formats.gguf import GgufCheckpoint, read_gguf
from toolkit.checkpoint.formats.gguf_config import config_of
from toolkit.checkpoint.formats.gguf_file import GgufFile, Stored, library, open_gguf, read_header
from toolkit.checkpoint.formats.gguf_metadata import add_metadata, config_differences, metadata_of
from toolkit.checkpoint.formats.gguf_tensors import GgufNames, InFile
from toolkit.checkpoint.weights import PackedSlice
from toolkit.errors import ModelError, RecipeError
from toolkit.export.gguf_types import ROUNDS_BY, FewBits, as_bytes, few_bits, kind_of, row_bytes
from toolkit.export.gguf_words import add_words, require_same_words
from toolkit.export.job import ROUNDED, Job, Made
from toolkit.export.llama_quantize import K_QUANTS, fell_back, quantise, require_space
from toolkit.export.merge import left_beside, merged_parameters
from toolkit.export.merge_base import require_same_weights
from toolkit.families import GGUF_NAMES, GGUF_NEEDS_CONFIG, GGUF_READ, GGUF_WITH_EXPERTS, GGUF_WRITTEN
from toolkit.quant.source import SourceWeights

__all__ = ["GGUF_FILE", "merge_into_gguf"]

GGUF_FILE = "model.gguf"
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


@dataclass(frozen=True)
class _Layout:
    """The tensors to write: shapes and types by name; and those of the base's file that go along as they are."""

    architecture: str
    names: GgufNames
    shapes: Mapping[str, tuple[int, ...]]
    kinds: Mapping[str, str]
    copied: Mapping[str, Stored]


def merge_into_gguf(job: Job) -> Made:
    """Write `model.gguf` into the job's folder, read it back and compare it; measure it where there are texts.

    Raises:
        RecipeError: neither a type nor a file of the base is given, or nothing here can write that type.
        ModelError: the architecture or the tokenizer cannot be written faithfully, the base's file is of other weights,
            or what was written does not read back.
    """
    by_llama_cpp = job.quant is not None and job.quant.lower() in K_QUANTS
    wanted = None if job.quant is None else few_bits("bf16" if by_llama_cpp else job.quant)
    path = job.folder / ("floats.gguf" if by_llama_cpp else GGUF_FILE)
    with tempfile.TemporaryDirectory() as scratch:
        there = _seen(job, Path(scratch))
        if wanted is None and there is None:
            raise RecipeError("--format gguf-merged: give the type of its weights with --quant, such as q8_0 or bf16")
        file = None if there is None else read_gguf(there).file
        layout = _layout(job, file, wanted, is_whole=by_llama_cpp)
        _write_header(job, layout, file, wanted, path)
        require_space(path, job.quant if by_llama_cpp else None)
        read = Path(scratch) / "written"
        read.mkdir()
        job.skeleton.config.save_pretrained(read)
        (read / GGUF_FILE).symlink_to((job.folder / path.name).absolute())
        found = read_gguf(read / GGUF_FILE)
        if file is None:
            _require_same_config(job, found.file)
        if layout.architecture in GGUF_NEEDS_CONFIG:
            job.skeleton.config.save_pretrained(job.folder)
        worst = _write_tensors(job, layout, file, found)
        _require_read_by_gguf(path, found.file)
        left_out, stored = _left_out(job) if file is None else (), dict(Counter(layout.kinds.values()))
        why = "no file of the base is given" if file is None else "what the base's file has for drafts is as it was"
        head = left_beside(job.artifact, why)
        made = Made(ROUNDED, worst, 1.0, left_out=left_out, stored=stored, head=head)
        if by_llama_cpp:
            made = _quantised(job, path, made)
            (read / GGUF_FILE).unlink()
            (read / GGUF_FILE).symlink_to((job.folder / GGUF_FILE).absolute())
        return replace(made, survival=job.measured(read))


def _quantised(job: Job, floats: Path, made: Made) -> Made:
    """A K-quant in the place of a file in bf16, which goes."""
    assert job.quant is not None
    path = job.folder / GGUF_FILE
    worst = quantise(floats, path, job.quant, job.llama_quantize)
    names = fell_back(floats, path)
    stored = dict(Counter(tensor.kind for tensor in read_header(path).tensors.values()))
    floats.unlink()
    told = f"{ROUNDED}; llama.cpp's blocks, in root mean squares"
    return replace(made, compared=told, difference=max(worst, made.difference), stored=stored, fell_back=names)


def _seen(job: Job, scratch: Path) -> Path | None:
    """The base's GGUF file, if there is one, where it is read with the config of the checkpoint that is merged into.

    Raises:
        ModelError: it is of other weights than that.
    """
    beside = job.base_gguf or gguf_at(job.source)
    if beside is None or beside == job.base:
        return beside
    folder = scratch / beside.name
    folder.mkdir()
    job.skeleton.config.save_pretrained(folder)
    for part in open_gguf(beside).files:
        (folder / part.name).symlink_to(part.absolute())
    require_same_weights(job.base, folder, job.adapter, job.skeleton, "correct --base-gguf")
    return folder


def _layout(job: Job, file: GgufFile | None, wanted: FewBits | None, *, is_whole: bool) -> _Layout:
    """Over a file of the base, or of today's names."""
    if file is not None:
        return _layout_over(job, file, wanted, is_whole=is_whole)
    architecture = _written_architecture(job)
    names = GgufNames(job.skeleton, architecture, str(job.base))
    shapes = {part.name: tuple(part.value.shape) for _, parts in names.every() for part in parts}
    assert wanted is not None
    kinds = {name: kind_of(name, shape, wanted) for name, shape in shapes.items()}
    return _Layout(architecture, names, shapes, kinds, {})


def _layout_over(job: Job, file: GgufFile, wanted: FewBits | None, *, is_whole: bool) -> _Layout:
    """What the adapter changes is written, and the rest goes along, unless its original is to be of another type.

    `is_whole`: every parameter is written, also one that is known in blocks alone.
    """
    where, architecture = str(job.base_gguf or job.base), str(file.metadata["general.architecture"])
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    names = GgufNames(job.skeleton, architecture, where, shapes)
    placed = {name: [part.name for part in parts] for name, parts in names.every()}
    changed = {factors.parameter for factors in job.adapter}
    is_all = is_whole or (wanted is not None and gguf_at(job.base) is None)
    written = {key for name, keys in placed.items() if is_all or name in changed for key in keys}
    kinds = {name: tensor.kind for name, tensor in file.tensors.items()}
    for name in written:
        kinds[name] = kinds[name] if wanted is None else kind_of(name, shapes[name], wanted)
        if kinds[name] not in ROUNDS_BY:
            raise ModelError(
                f"{where}: {name} is {kinds[name]}, which the gguf library reads and cannot write: give another type "
                "with --quant, such as q8_0"
            )
    copied = {name: tensor for name, tensor in file.tensors.items() if name not in written}
    return _Layout(architecture, names, shapes, kinds, copied)


def _written_architecture(job: Job) -> str:
    """llama.cpp's architecture of this family, where files of it are written without one to start from."""
    model_type = str(job.skeleton.config.get_text_config().model_type)
    name = model_type.removesuffix("_text")
    called = GGUF_NAMES.get(name, name).replace("_", "").replace("-", "")
    for architecture in GGUF_READ:
        if architecture.replace("_", "").replace("-", "") == called or GGUF_WITH_EXPERTS.get(architecture) == name:
            if architecture in GGUF_WRITTEN:
                return architecture
            raise ModelError(
                f"gguf-merged: what a {architecture} file says beside its weights is not written here: give a GGUF "
                "file of the base with --base-gguf"
            )
    raise ModelError(f"gguf-merged: {model_type} is no architecture that is known in GGUF files: export as merged")


def _write_header(job: Job, layout: _Layout, file: GgufFile | None, wanted: FewBits | None, path: Path) -> None:
    """The file with all but its weights, as long as it will be."""
    gguf = library()
    writer = gguf.GGUFWriter(str(path), layout.architecture)
    if file is not None:
        _keep_metadata(writer, file.files[0], job)
        require_same_words(job.artifact, file)
    else:
        writer.add_type("model")
        writer.add_name(f"{read_manifest(job.artifact)['base']['name']} with an adapter")
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        config = job.skeleton.config.get_text_config()
        add_metadata(writer, layout.architecture, metadata_of(config, layout.architecture, layout.shapes))
        add_words(writer, job.artifact, config.vocab_size, layout.architecture)
    if wanted is not None:
        writer.add_file_type(wanted.number)
    _add_template(writer, job.artifact)
    for name, shape in layout.shapes.items():
        size = int(np.prod(shape[:-1])) * row_bytes(layout.kinds[name], shape[-1])
        kind = gguf.GGMLQuantizationType[layout.kinds[name]]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    padded = sum(
        gguf.GGUFWriter.ggml_pad(info.nbytes, writer.data_alignment)
        for tensors in writer.tensors
        for info in tensors.values()
    )
    with path.open("r+b") as opened:
        opened.truncate(gguf.GGUFWriter.ggml_pad(path.stat().st_size, writer.data_alignment) + padded)


_OWN = ("general.architecture", "general.alignment")
"""Keys that the writer has values of its own for."""


def _keep_metadata(writer: Any, path: Path, job: Job) -> None:
    """Everything that the base's file says, but how it was split, and its chat template where the adapter has one."""
    gguf = library()
    has_template = (job.artifact / TEMPLATE).is_file()
    told_anew = {*_OWN, *(["general.file_type"] if job.quant else [])}
    for key, held in gguf.GGUFReader(str(path)).fields.items():
        is_template = key.startswith("tokenizer.chat_template")
        if key.startswith(("GGUF.", "split.")) or key in told_anew or (is_template and has_template):
            continue
        kind = held.types[0]
        inner = held.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, held.contents(), kind, sub_type=inner)


def _add_template(writer: Any, artifact: Path) -> None:
    """The trained chat template, and the first end of an answer that is not the tokenizer's own."""
    if (artifact / TEMPLATE).is_file():
        writer.add_chat_template((artifact / TEMPLATE).read_text(encoding="utf-8"))
    ends = {key: held.value for pairs in writer.kv_data for key, held in pairs.items() if key.endswith(_ENDS)}
    others = [number for number in read_stops(artifact) if number not in ends.values()]
    if others and not any(key.endswith(_ENDS[1]) for key in ends):
        writer.add_eot_token_id(others[0])


def _require_same_config(job: Job, file: GgufFile) -> None:
    config = job.skeleton.config.get_text_config()
    for field, (wanted, found) in config_differences(config, config_of(file, config.model_type)).items():
        raise ModelError(
            f"gguf-merged: {field} is {str(wanted)[:80]} in this model, and a GGUF file of its architecture means "
            f"{str(found)[:80]}: llama.cpp would compute something else: export as merged"
        )


def _write_tensors(job: Job, layout: _Layout, base: GgufFile | None, found: GgufCheckpoint) -> float:
    """Write every parameter at its place and read it back; how far off the worst is, in what its type allows."""
    worst, there = 0.0, found.file
    with there.files[0].open("r+b") as opened:
        for name in layout.copied:
            assert base is not None
            opened.seek(there.tensors[name].offset)
            opened.write(base.slice(name)[...].contiguous().view(torch.uint8).numpy().data)
        for name, value in merged_parameters(SourceWeights(str(job.base)), job.adapter):
            if name not in layout.names.wanted:
                continue
            parts = [part for part in layout.names.tensors(name, value) if part.name not in layout.copied]
            for part in parts:
                _write(opened, part, there.tensors[part.name])
            opened.flush()
            if parts:
                worst = max(worst, _off(found, name, value, [there.tensors[part.name].kind for part in parts]))
    return worst


def _write(opened: Any, part: InFile, stored: Stored) -> None:
    """One tensor's rows, or those of it that a parameter has."""
    opened.seek(stored.offset + part.row * row_bytes(stored.kind, stored.shape[-1]))
    stack = part.value if part.value.dim() > 2 else part.value[None]
    for matrix in stack:  # one expert at a time: in blocks it is made of fp32 copies
        values = matrix if matrix.dim() > 1 else matrix[None]
        for some in as_bytes(values.float(), stored.kind):
            opened.write(some.data)


def _off(there: GgufCheckpoint, name: str, wanted: Tensor, kinds: Sequence[str]) -> float:
    """Of one parameter, read through our own reader, which puts everything back into its order."""
    file = there.file
    fresh = GgufFile(file.files, file.metadata, file.tensors)  # mapped anew, since the file was written meanwhile
    found = PackedSlice(there.weights[name], replace(there, file=fresh).slices)[...].read()
    largest = float(wanted.abs().max()) + (1.0 if wanted.dim() == 1 else 0.0)  # a norm may be stored with one added
    allowed = max(ROUNDS_BY[kind] for kind in kinds) * max(largest, 1e-30)
    off = float(found.sub_(wanted).abs_().max()) / allowed
    return off if off == off else float("inf")


def _require_read_by_gguf(path: Path, ours: GgufFile) -> None:
    """The library's own reader must find the same tensors at the same places."""
    theirs = {
        tensor.name: (tensor.tensor_type.name, tuple(map(int, reversed(tensor.shape))), int(tensor.data_offset))
        for tensor in library().GGUFReader(str(path)).tensors
    }
    if theirs != {name: (held.kind, held.shape, held.offset) for name, held in ours.tensors.items()}:
        raise ModelError(f"{path.name}: the gguf library reads other tensors than were written: not exported")


def _left_out(job: Job) -> tuple[str, ...]:
    """What a checkpoint has beside the model's parameters, such as layers for drafts."""
    if gguf_at(job.base):
        return ()
    beside, others = SourceWeights(str(job.base)).unused()
    return (*(key for keys in beside.values() for key in keys), *others)
