"""What a model takes, read from its folder before it is loaded: for the check of the input.

Plain JSON, without transformers, which takes half a gigabyte: most rows need no more to be known.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magicdec.deployments.batch_bodies import MAX_CHOICES, BodyCheck, PromptLimits
from magicdec.deployments.embedded_model import resolve_model
from magicdec.deployments.settings import ServeSettings

if TYPE_CHECKING:
    from magicdec.deployments.prompts import PromptBuilder


def body_check_of(settings: ServeSettings) -> BodyCheck:
    """The context is what the model declares or the setting; a small KV pool may hold less, which
    the engine says when it has been loaded. Raises ModelNotFoundError, UnsupportedModel."""
    path = resolve_model(settings.model.path)
    folder = Path(path) if Path(path).is_dir() else _downloaded(path)
    declared = _declared_context(folder)
    wanted = settings.model.max_model_len or declared
    limits = PromptLimits(min(wanted, declared), _template_bytes(folder))
    speculation = settings.engine_config().speculation

    def load_builder() -> "PromptBuilder":
        from magicdec.deployments.prompts import PromptBuilder
        from magicdec.model_loader import load_tokenizer, read_model_facts

        return PromptBuilder(
            load_tokenizer(path),
            max_model_len=limits.max_model_len,
            vocab_size=read_model_facts(path).vocab_size,
            max_choices=MAX_CHOICES,
            speculation=speculation,
        )

    return BodyCheck(load_builder, limits, speculation)


def _downloaded(hub_id: str) -> Path:
    from magicdec.model_loader import resolve_checkpoint

    return resolve_checkpoint(hub_id)


def _declared_context(folder: Path) -> int:
    config = _json(folder / "config.json")
    text = config.get("text_config", config)
    declared = text.get("max_position_embeddings")
    if isinstance(declared, int):
        return declared
    from magicdec.model_loader import read_model_facts  # some classes have it as a default

    return read_model_facts(str(folder)).max_position_embeddings


def _template_bytes(folder: Path) -> int | None:
    """Of the longest chat template; None: there is none."""
    templates: list[str] = []
    file = folder / "chat_template.jinja"
    if file.is_file():
        templates.append(file.read_text(encoding="utf-8"))
    named = _json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(named, str):
        templates.append(named)
    elif isinstance(named, list):
        templates += [str(entry["template"]) for entry in named]
    return max((len(template.encode()) for template in templates), default=None)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document
