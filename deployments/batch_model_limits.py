"""What a model takes, read before it is loaded: for the check of the input."""

from magicdec.deployments.batch_bodies import MAX_CHOICES, BodyCheck
from magicdec.deployments.embedded_model import resolve_model
from magicdec.deployments.prompts import PromptBuilder
from magicdec.deployments.settings import ServeSettings
from magicdec.model_loader import load_tokenizer, read_model_facts


def body_check_of(settings: ServeSettings) -> BodyCheck:
    """The context is what the model declares or the setting; a small KV pool may hold less, which
    the engine says when it has been loaded. Raises ModelNotFoundError, UnsupportedModel."""
    path = resolve_model(settings.model.path)
    facts = read_model_facts(path)
    declared = facts.max_position_embeddings
    max_model_len = min(settings.model.max_model_len or declared, declared)
    speculation = settings.engine_config().speculation

    def load_builder() -> PromptBuilder:
        return PromptBuilder(
            load_tokenizer(path),
            max_model_len=max_model_len,
            vocab_size=facts.vocab_size,
            max_choices=MAX_CHOICES,
            speculation=speculation,
        )

    return BodyCheck(load_builder, max_model_len=max_model_len, speculation=speculation)
