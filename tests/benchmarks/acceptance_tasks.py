"""The prompts of the acceptance benchmark: windows of corpus documents, by committed offsets.

A corpus is a file of JSON lines {"source", "text"}, plain or zstandard; none of its text is kept
here. The same list, corpus and tokenizer give the same token ids.
"""

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard
from transformers import PreTrainedTokenizerBase

PROMPT_LIST = Path(__file__).with_name("acceptance_prompts.json")
CONTINUATIONS = ("novel", "code", "technical")
TASKS = (*CONTINUATIONS, "summary")
_CHARS_A_TOKEN = 12  # at most, over a long window of any of the documents
_SUMMARY_REQUEST = "Summarize the text above in a few paragraphs."


@dataclass(frozen=True, slots=True)
class Window:
    """Where one prompt's text begins. `offset` counts characters of the document."""

    task: str
    source: str
    offset: int
    seed: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """One stream of the benchmark; `name` is unique in its task."""

    task: str
    name: str
    token_ids: tuple[int, ...]
    seed: int


def read_windows(path: Path = PROMPT_LIST) -> list[Window]:
    return [Window(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def read_corpus(path: Path, sources: Iterable[str]) -> dict[str, str]:
    """The named documents. Raises KeyError naming the first that the file does not hold."""
    wanted = set(sources)
    texts: dict[str, str] = {}
    with path.open("rb") as raw:
        packed = path.suffix == ".zst"
        stream: Any = zstandard.ZstdDecompressor().stream_reader(raw) if packed else raw
        for line in io.TextIOWrapper(stream, encoding="utf-8"):
            document = json.loads(line)
            if document["source"] in wanted:
                texts[document["source"]] = document["text"]
    for source in sorted(wanted - texts.keys()):
        raise KeyError(f"{path.name} holds no document named {source!r}")
    return texts


def window_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, offset: int, num_tokens: int
) -> list[int]:
    """The first num_tokens tokens after offset. Raises ValueError where the document ends."""
    piece = text[offset : offset + num_tokens * _CHARS_A_TOKEN]
    ids: list[int] = tokenizer(piece, add_special_tokens=False)["input_ids"][:num_tokens]
    if len(ids) < num_tokens:
        raise ValueError(
            f"the document ends {len(ids)} tokens after offset {offset}: {num_tokens} are needed"
        )
    return ids


def build_prompt(
    window: Window, text: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int, name: str
) -> Prompt:
    """Exactly num_tokens tokens: the window, or for a summary the chat around a shorter one."""
    if window.task != "summary":
        ids = window_ids(tokenizer, text, window.offset, num_tokens)
        return Prompt(window.task, name, tuple(ids), window.seed)
    before, after = _chat_frame(tokenizer, _SUMMARY_REQUEST)
    room = num_tokens - len(before) - len(after)
    ids = [*before, *window_ids(tokenizer, text, window.offset, room), *after]
    return Prompt(window.task, name, tuple(ids), window.seed)


def build_prompts(
    tasks: Iterable[str],
    windows: list[Window],
    corpus: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
) -> dict[str, list[Prompt]]:
    """Task name -> its prompts, in the list's order."""
    prompts: dict[str, list[Prompt]] = {task: [] for task in tasks}
    for window in windows:
        if window.task in prompts:
            text = corpus[window.source]
            name = f"{window.task}-{len(prompts[window.task])}"
            prompt = build_prompt(window, text, tokenizer, num_tokens, name)
            prompts[window.task].append(prompt)
    return prompts


def _chat_frame(tokenizer: PreTrainedTokenizerBase, request: str) -> tuple[list[int], list[int]]:
    """The chat template's tokens before and after a document that a request follows."""
    mark = "\u241f"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{mark}\n\n{request}"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    before, after = str(rendered).split(mark)
    encoded = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
    first, last = (list(ids) for ids in encoded)
    return first, last
