"""Twenty facts in a long text, and one question for each: what a draft must have kept to answer.

The question repeats the fact's own words and stops before its value, so that even a small model
answers by copying: of five wordings this is the one that SmolLM2-135M answered best without a
draft. The questions of one context share all of it, so the prefix cache holds it once.
"""

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tests.benchmarks.acceptance_tasks import Window, window_ids

NUM_FACTS = 20
CODE_DIGITS = 6
FIRST_NAMES = (
    "Adela Bertram Cosima Dorian Elspeth Felix Greta Hector Imogen Jasper Katrin Leopold Mirela "
    "Norbert Odette Pascal Quentin Rosalind Silvan Tabitha Ulric Viola Wendel Xenia Yorick Zelda"
)
LAST_NAMES = (
    "Abernathy Blackwood Carmody Delacroix Eastman Fairbanks Galloway Hargrove Ingram Jessop "
    "Kingsley Lockhart Merriman Norwood Oakley Pemberton Quimby Ravenhill Stanhope Thackeray "
    "Underhill Vance Whitlock Yardley Zimmer Ashdown"
)
ITEMS = (
    "telephone ledger passport locker library medal ticket policy parcel safe warrant licence "
    "telegram serial lottery permit docket voucher badge freight"
)


@dataclass(frozen=True, slots=True)
class Fact:
    name: str
    item: str
    code: str

    @property
    def sentence(self) -> str:
        return f"{self.question} {self.code}.\n\n"

    @property
    def question(self) -> str:
        return f"\n\n{self.name}, {self.item} number"


@dataclass(frozen=True, slots=True)
class NeedleContext:
    """The text with its facts, and a question for each: prompt i is token_ids + questions[i]."""

    name: str
    token_ids: tuple[int, ...]
    facts: tuple[Fact, ...]
    questions: tuple[tuple[int, ...], ...]

    def prompt(self, i: int) -> tuple[int, ...]:
        return self.token_ids + self.questions[i]


def make_facts(seed: int) -> list[Fact]:
    """Facts that share no first name, no last name, no item and no code."""
    generator = random.Random(seed)
    firsts = generator.sample(FIRST_NAMES.split(), NUM_FACTS)
    lasts = generator.sample(LAST_NAMES.split(), NUM_FACTS)
    codes = generator.sample(range(10 ** (CODE_DIGITS - 1), 10**CODE_DIGITS), NUM_FACTS)
    parts = zip(firsts, lasts, ITEMS.split(), codes, strict=True)
    return [Fact(f"{first} {last}", item, str(code)) for first, last, item, code in parts]


def build_context(
    window: Window, text: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int, name: str
) -> NeedleContext:
    """A prompt of at most num_tokens tokens, question included, with facts at even depths.

    A fact goes after the next line end, or where the text has none soon, between two tokens.
    """

    def encode(piece: str) -> list[int]:
        ids: list[int] = tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids

    facts = make_facts(window.seed)
    sentences = [encode(fact.sentence) for fact in facts]
    questions = tuple(tuple(encode(fact.question)) for fact in facts)
    room = num_tokens - sum(map(len, sentences)) - max(map(len, questions))
    ids = window_ids(tokenizer, text, window.offset, room)
    spacing = room / NUM_FACTS
    context: list[int] = []
    start = 0
    for i, sentence in enumerate(sentences):
        wanted = int((i + 0.5) * spacing)
        latest = int((i + 1) * spacing)
        stop = next(
            (j for j in range(wanted, latest) if "\n" in tokenizer.decode([ids[j - 1]])), wanted
        )
        context += ids[start:stop] + sentence
        start = stop
    context += ids[start:]
    return NeedleContext(name, tuple(context), tuple(facts), questions)


def answer_length(code: str, answer: list[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens of the answer up to the code's last digit; None when it does not give the code."""
    for length in range(1, len(answer) + 1):
        if code in tokenizer.decode(answer[:length]):
            return length
    return None
