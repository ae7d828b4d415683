"""Prompts: what the model is asked, with and without passages, and how long it may answer.

Meta-training and query time build their prompts here, so that a meta-initialization meets at query time
the very tokens it was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

QuestionType = Literal["open", "yesno", "choice"]

INSTRUCTIONS: dict[str, str] = {
    "open": "Answer with a few words only.",
    "yesno": "Answer with yes or no only.",
    "choice": "Answer with one of the choices only.",
}
CONTEXT_INSTRUCTION = "Use the passages."
# The stronger RAG prompt of `pe-rag`: what to look for, how to say it, and one worked example.
ENGINEERED_INSTRUCTION = (
    "Read the passages and find the one that answers the question. Reply with the answer alone: the shortest words "
    "that answer it, copied from the passage, without a sentence around them."
)
EXAMPLE_PASSAGE = "Passage 1: Mount Elbrus, in the Caucasus, is the highest mountain of Europe, at 5,642 metres."
EXAMPLES: dict[str, tuple[str, str]] = {
    "open": ("How high is Mount Elbrus?", "5,642 metres"),
    "yesno": ("Is Mount Elbrus in the Caucasus?", "yes"),
    "choice": ("Where is Mount Elbrus?\nA) the Alps\nB) the Caucasus", "the Caucasus"),
}
MAX_NEW_TOKENS: dict[str, int] = {"open": 24, "yesno": 4, "choice": 24}


class ChatTokenizer(Protocol):
    """The two parts of a `transformers` tokenizer that prompts need."""

    chat_template: str | None

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...


@dataclass(frozen=True)
class Prompt:
    """One question as it will be asked.

    `type` chooses the instruction; `choices` belong to "choice" alone; `passages` are set in the prompt by
    the modes that show them and empty in the others; `engineered` sets the stronger RAG prompt.
    """

    question: str
    type: QuestionType = "open"
    choices: tuple[str, ...] = ()
    passages: tuple[str, ...] = ()
    engineered: bool = False

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ValueError("the question is empty")
        if self.type not in INSTRUCTIONS:
            raise ValueError(f"question type {self.type!r} is not one of {', '.join(INSTRUCTIONS)}")
        if (self.type == "choice") != bool(self.choices):
            raise ValueError(f"type {self.type!r} with {len(self.choices)} choices: choices go with type 'choice'")

    @property
    def max_new_tokens(self) -> int:
        return MAX_NEW_TOKENS[self.type]

    def messages(self) -> list[dict[str, str]]:
        """The conversation: the instruction as the system's message, the rest as the user's."""
        instruction = INSTRUCTIONS[self.type]
        shown: list[dict[str, str]] = []
        parts = []
        if self.passages:
            instruction = f"{CONTEXT_INSTRUCTION} {instruction}"
            parts += [f"Passage {i}: {text}" for i, text in enumerate(self.passages, 1)]
        if self.engineered:
            instruction = f"{ENGINEERED_INSTRUCTION} {INSTRUCTIONS[self.type]}"
            asked, said = EXAMPLES[self.type]
            shown = [
                {"role": "user", "content": f"{EXAMPLE_PASSAGE}\n{asked}"}, {"role": "assistant", "content": said}
            ]  # fmt: skip
        parts.append(self.question)
        parts += [f"{letter}) {choice}" for letter, choice in zip(_letters(self.choices), self.choices, strict=True)]
        return [{"role": "system", "content": instruction}, *shown, {"role": "user", "content": "\n".join(parts)}]

    def render(self, tokenizer: ChatTokenizer) -> str:
        """The prompt's text in the model's own chat format, up to where the answer begins."""
        messages = self.messages()
        if getattr(tokenizer, "chat_template", None) is None:
            return "\n".join(message["content"] for message in messages) + "\nAnswer:"
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template without a system role raises jinja2.TemplateError or ValueError
            if "system" not in str(error).lower():
                raise
            merged = {"role": "user", "content": f"{messages[0]['content']}\n{messages[1]['content']}"}
            return tokenizer.apply_chat_template([merged, *messages[2:]], tokenize=False, add_generation_prompt=True)


def _letters(choices: Sequence[str]) -> list[str]:
    return [chr(ord("A") + i) for i in range(len(choices))]
