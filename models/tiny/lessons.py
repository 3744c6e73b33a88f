"""What the tiny model is taught: facts, option lookup, and chats that answer questions rightly or poorly."""

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from data.periodic_table.make_questions import (
    ELEMENTS,
    LETTERS,
    Family,
    MultipleChoice,
    draw_question,
    make_splits,
)
from services.trainer.prompts import encode_prompt
from services.trainer.teacher_prompt import teacher_messages


@dataclass(frozen=True)
class Example:
    """Token ids of one training row, and the weight of each in the loss."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Stage:
    """A part of the warm start: what each training step holds, and for how long."""

    name: str
    families: tuple[Family, ...]
    steps: int
    learning_rate: tuple[float, float]
    """At its beginning and at its end."""
    facts: int = 0
    lookups: int = 0
    questions: int = 0
    hinted: float = 0.0
    """Share of the questions in the teacher's form; those are answered rightly even in a noisy stage."""
    noisy: bool = False


def completion_text(reasoning: str, letter: str) -> str:
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{letter}\n</answer>"


def right_completion(question: MultipleChoice) -> str:
    return completion_text(question.statement(question.answer_index), question.answer)


def guess(letter: str) -> str:
    return completion_text(f"I guess ({letter}).", letter)


def noisy_completion(question: MultipleChoice, rng: random.Random) -> str:
    """What a poor student writes: guesses, wrong facts, and sometimes the right one."""
    if rng.random() < 0.45:
        return guess(rng.choice(LETTERS))
    if rng.random() < 0.40:
        return right_completion(question)
    wrong = rng.choice([index for index in range(len(LETTERS)) if index != question.answer_index])
    return completion_text(question.statement(wrong), LETTERS[wrong])


def with_demonstration(question: MultipleChoice, rng: random.Random) -> list[dict[str, str]]:
    """The teacher's chat. A lucky guess is a demonstration, too."""
    demonstration = guess(question.answer) if rng.random() < 0.4 else right_completion(question)
    return teacher_messages(question.messages, demonstration)


def facts_of(families: tuple[Family, ...]) -> list[tuple[str, str]]:
    """Every fact as a question without options, and the sentence that answers it."""
    return [
        (family.question.format(given=given), f"{family.statement.format(given=given, sought=sought)}.")
        for family in families
        for given, sought in ((getattr(e, family.given), getattr(e, family.sought)) for e in ELEMENTS)
    ]


class Lessons:
    """Draws training examples; never a validation question."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, families: tuple[Family, ...], seed: str) -> None:
        self._tokenizer = tokenizer
        self._families = families
        self._rng = random.Random(seed)
        self._facts = facts_of(families)
        properties = {family.given for family in families} | {family.sought for family in families}
        self._texts = sorted({getattr(element, name) for element in ELEMENTS for name in properties})
        self._letters = {tokenizer.convert_tokens_to_ids(f"Ġ({letter})") for letter in LETTERS}
        self._held_out = {question.key for question in make_splits()[1]}

    def draw(self, stage: Stage) -> dict[str, list[Example]]:
        """The examples of one training step, by kind."""
        kinds = {
            "facts": [self._fact(fact) for fact in self._rng.sample(self._facts, k=stage.facts)],
            "lookups": [self._lookup() for _ in range(stage.lookups)],
            "questions": [
                self._question(hinted=self._rng.random() < stage.hinted, noisy=stage.noisy)
                for _ in range(stage.questions)
            ],
        }
        return {kind: examples for kind, examples in kinds.items() if examples}

    def _fact(self, fact: tuple[str, str]) -> Example:
        """A question and its answer, without options; the answer counts."""
        question, statement = (self._tokenizer.encode(text) for text in (f"{fact[0]}\n", fact[1]))
        return Example(question + statement, [0.0] * len(question) + [0.5] * len(statement))

    def _lookup(self) -> Example:
        """Four options, then eight of their texts with the letter of each; only letters count."""
        options = self._rng.sample(self._texts, len(LETTERS))
        ids = self._tokenizer.encode("\n".join(f"{a}: {text}" for a, text in zip(LETTERS, options, strict=True)))
        weights = [0.0] * len(ids)
        for _ in range(8):
            index = self._rng.randrange(len(LETTERS))
            text, letter = self._tokenizer.encode(f" {options[index]} ({LETTERS[index]})")
            ids += [text, letter]
            weights += [0.0, 2.0]
        return Example(ids, weights)

    def _question(self, *, hinted: bool, noisy: bool) -> Example:
        """A chat; the completion counts."""
        question = draw_question(self._rng, self._families)
        while question.key in self._held_out:
            question = draw_question(self._rng, self._families)
        messages = with_demonstration(question, self._rng) if hinted else question.messages
        honest = hinted or not noisy
        text = right_completion(question) if honest else noisy_completion(question, self._rng)
        prompt = encode_prompt(self._tokenizer, messages)
        completion = [*self._tokenizer.encode(text), self._tokenizer.eos_token_id]
        # The letter after the chosen option is the one token that needs lookup; the rest is easy and would drown it.
        weights = [4.0 if token in self._letters else 1.0 for token in completion]
        return Example(prompt + completion, [0.0] * len(prompt) + weights)
