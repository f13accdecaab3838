"""A GGUF file as a source checkpoint: its config, and every parameter of the model as raw parts and a pure function.

transformers 5.23 reads some MoE files wrong without a word (random experts, a dense model), and others not at all.
Here a file is read when each parameter has its tensors and each tensor its parameter, or it is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from toolkit.architecture import on_meta
from toolkit.checkpoint.config import WRONG_CONFIG, in_one_line
from toolkit.checkpoint.formats.gguf_config import config_of, is_named, model_types
from toolkit.checkpoint.formats.gguf_file import GgufFile, Slice, open_gguf
from toolkit.checkpoint.formats.gguf_names import parameters
from toolkit.checkpoint.formats.packed import Packed
from toolkit.errors import ModelError
from toolkit.families import GGUF_NEEDS_CONFIG, GGUF_READ

__all__ = ["GgufCheckpoint", "read_gguf"]


@dataclass(frozen=True)
class GgufCheckpoint:
    """A file, or the parts of one, that holds a whole model.

    Args:
        file: its headers. architecture: llama.cpp's name.
        config: of transformers. config_from: "config.json" or "metadata".
        weights: every parameter by the model's own name, tied ones left out.
        plain: of these, the floating-point tensors stored just as they are, with their names in the file.
        left_out: tensors that belong to no parameter: draft layers, and what follows from the config.
    """

    file: GgufFile
    architecture: str
    config: PretrainedConfig
    config_from: str
    weights: Mapping[str, Packed]
    plain: Mapping[str, str]
    left_out: tuple[str, ...]

    @property
    def stored(self) -> Mapping[str, int]:
        """How many tensors are of which type, by ggml's names."""
        return dict(Counter(tensor.kind for tensor in self.file.tensors.values()).most_common())

    @property
    def slices(self) -> Mapping[str, Slice]:
        """Every raw tensor by its name in the file, mapped and unread until it is indexed."""
        return {key: self.file.slice(key) for key in self.file.tensors}


def read_gguf(path: str | Path) -> GgufCheckpoint:
    """Open the model at `path`: a .gguf file, any part of a split one, or a folder with one such model.

    No weight is read. A config.json beside the file is believed; without one the config is made of the file's metadata.

    Raises:
        ModelError: a damaged or hostile file, a part that is missing, an architecture that transformers or the `gguf`
            library does not know, no MoE, or a file and a config that do not have each other's parameters.
        RecipeError: the `gguf` library is not installed.
    """
    file = open_gguf(Path(path))
    where, architecture = file.files[0], file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture.isprintable():
        raise ModelError(f"{where}: it does not say its architecture, so it holds no model; download it again")
    if architecture not in GGUF_READ:
        raise ModelError(
            f"{where}: GGUF files of architecture {architecture[:80]} are not read; give the original checkpoint, or a "
            f"file of one of these: {', '.join(sorted(GGUF_READ))}"
        )
    refused: list[ModelError] = []
    is_beside = (where.parent / "config.json").is_file()
    for config in _configs(file, architecture, refused, is_beside=is_beside):
        try:
            weights, plain = parameters(file, model := _skeleton(where, config))
        except ModelError as error:
            refused.append(error)
            continue
        model.config.architectures = model.config.architectures or [type(model).__name__]
        used = {part.key for weight in weights.values() for part in weight.parts.values()}
        return GgufCheckpoint(
            file,
            architecture,
            model.config,
            "config.json" if is_beside else "metadata",
            MappingProxyType(weights),
            MappingProxyType(plain),
            tuple(sorted(file.tensors.keys() - used)),
        )
    raise refused[0]


def _configs(
    file: GgufFile, architecture: str, refused: list[ModelError], *, is_beside: bool
) -> Iterator[PretrainedConfig]:
    """Configs that the file may be of, likeliest first; what speaks against one goes into `refused`."""
    where = file.files[0]
    if is_beside:
        config = _beside(where)
        if not is_named(str(config.get_text_config().model_type), architecture):
            raise ModelError(
                f"{where}: its architecture is {architecture[:80]}, and the config.json beside it is of a "
                f"{config.model_type}; give each model a folder of its own"
            )
        yield config
        if (text := config.get_text_config()) is not config:
            yield text
        return
    if architecture in GGUF_NEEDS_CONFIG:
        raise ModelError(
            f"{where}: a {architecture} file does not say all of its config; put its config.json beside it"
        )
    for model_type in model_types(architecture):
        try:
            yield config_of(file, model_type)
        except ModelError as error:
            refused.append(error)


def _beside(where: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(where.parent, trust_remote_code=False)
    except (OSError, *WRONG_CONFIG) as error:
        raise ModelError(f"{where.parent / 'config.json'}: {in_one_line(error)}") from None


def _skeleton(where: Path, config: PretrainedConfig) -> PreTrainedModel:
    try:
        return on_meta(config)
    except WRONG_CONFIG as error:
        raise ModelError(f"{where}: no {config.model_type} can be built of its config: {in_one_line(error)}") from None
