"""The adapted int8 model behind transformers' own OpenAI-compatible server.

`transformers serve` loads what it serves by name, in 16 bit, and knows no adapter folder. Its parts take a model
manager, and ours hands out the one model that is loaded already.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from toolkit.errors import RecipeError

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["build_app", "require_server", "serve"]

_NEEDED = ("fastapi", "uvicorn", "openai")


def require_server() -> None:
    """Raise `RecipeError` where transformers' server lacks a package."""
    if missing := [name for name in _NEEDED if not find_spec(name)]:
        raise RecipeError(f'serve: {", ".join(missing)} not installed; pip install "onecard[serve]"')


def build_app(model: PeftModel, tokenizer: PreTrainedTokenizerBase, name: str) -> FastAPI:
    """transformers' application with this model as its only one, under `name` (no `@` or `:`)."""
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState

    # PEFT puts its layers into the base model in place, so this is the adapted one.
    adapted = model.eval().get_base_model()
    adapted.config.use_cache = True

    class OneModel(ModelManager):  # type: ignore[misc]
        """Loads nothing."""

        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            return adapted

        def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
            return tokenizer

        def get_gen_models(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
            """What `/v1/models` lists; transformers would list the Hub's cache."""
            return [{"id": name, "object": "model", "owned_by": "onecard", "created": 0}]

    manager, state = OneModel(force_model=name), GenerationState()
    app: FastAPI = build_server(
        manager,
        ChatCompletionHandler(manager, state),
        completion_handler=CompletionHandler(manager, state),
        response_handler=ResponseHandler(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(model_manager=manager, generation_state=state),
        generation_state=state,
    )
    return app


def serve(model: PeftModel, tokenizer: PreTrainedTokenizerBase, name: str, *, host: str, port: int) -> None:
    """Answer requests until interrupted."""
    import uvicorn

    uvicorn.run(build_app(model, tokenizer, name), host=host, port=port, log_level="warning")
