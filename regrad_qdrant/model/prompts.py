"""Prompts: what the model is asked, with and without passages, and how long it may answer.

Meta-training and query time build their prompts here, so that a meta-initialization meets at query time
the very tokens it was trained on. How a question is put is data, a `PromptFormat`, and belongs to the initialization.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from regrad_qdrant.errors import DataError

QuestionType = Literal["open", "yesno", "choice"]
QUESTION_TYPES: tuple[QuestionType, ...] = get_args(QuestionType)
Style = Literal["short", "sentence"]
STYLES: tuple[Style, ...] = get_args(Style)

INSTRUCTIONS: dict[str, str] = {
    "open": "Answer with a few words only.",
    "yesno": "Answer with yes or no only.",
    "choice": "Answer with one of the choices only.",
    "sentence": "Answer in one sentence.",  # an open question, in that style
}
WITH_PASSAGES = {kind: f"Use the passages. {instruction}" for kind, instruction in INSTRUCTIONS.items()}
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
MAX_NEW_TOKENS: dict[str, int] = {"open": 24, "yesno": 4, "choice": 24, "sentence": 48}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "system": INSTRUCTIONS, "system_with_passages": WITH_PASSAGES, "max_new_tokens": MAX_NEW_TOKENS,
}  # fmt: skip


_CONTROL: weakref.WeakKeyDictionary[Any, re.Pattern[str] | None] = weakref.WeakKeyDictionary()  # of tokenizers
_THOUGHTS = re.compile(r"<think>.*?(</think>|$)", re.DOTALL)


class ChatTokenizer(Protocol):
    """The two parts of a `transformers` tokenizer that prompts need."""

    chat_template: str | None

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool, **options: Any
    ) -> str: ...


@dataclass(frozen=True)
class Prompt:
    """One question as it will be asked.

    `type` chooses the instruction; `choices` belong to "choice" alone; `passages` are set in the prompt by
    the modes that show them and empty in the others; `engineered` sets the stronger RAG prompt; `max_new_tokens` bounds
    the answer, instead of the format's own length; `style` is how long the answer to an open question is; `system`
    stands in place of the format's instruction; `turns` are the conversation before, (role, text) each.
    """

    question: str
    type: QuestionType = "open"
    choices: tuple[str, ...] = ()
    passages: tuple[str, ...] = ()
    engineered: bool = False
    max_new_tokens: int | None = None
    style: Style = "short"
    system: str | None = None
    turns: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise DataError("the question is empty")
        if self.type not in QUESTION_TYPES:
            raise DataError(f"question type {self.type!r} is not one of {', '.join(QUESTION_TYPES)}")
        if self.style not in STYLES:
            raise DataError(f"the style {self.style!r} is not one of {', '.join(STYLES)}")
        if (self.type == "choice") != bool(self.choices):
            raise DataError(
                f"type {self.type!r} with {len(self.choices)} choices: choices go with type 'choice', and it with them "
                "(--choice TEXT, choices=[…])"
            )
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise DataError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")
        if strange := [role for role, _ in self.turns if role not in ("user", "assistant")]:
            raise DataError(f"a turn is the user's or the assistant's, found {strange[0]!r}")

    @property
    def instruction(self) -> str:
        """Which of a format's instructions and lengths it gets."""
        return "sentence" if self.type == "open" and self.style == "sentence" else self.type

    @property
    def options(self) -> tuple[str, ...]:
        """The answers that are possible, where not everything is."""
        return {"open": (), "yesno": ("yes", "no"), "choice": self.choices}[self.type]

    @property
    def spellings(self) -> tuple[tuple[str, str], ...]:
        """Every way to say an option, with the option: yes and no begin in either case, for models differ in it."""
        if self.type == "yesno":
            return tuple((said, option) for option in self.options for said in (option, option.capitalize()))
        return tuple((option, option) for option in self.options)

    def render(self, tokenizer: ChatTokenizer, format: PromptFormat | None = None) -> str:
        """The prompt's text in the model's own chat format, up to where the answer begins."""
        return (format or PromptFormat()).render(self, tokenizer)


@dataclass(frozen=True)
class PromptFormat:
    """How questions are put: texts with fields in braces, by question type where instructions differ, and for open
    questions that are answered with a sentence.

    `user` has `{question}` and `{choices}`, `user_with_passages` also `{passages}`; a passage `{number}` and `{text}`,
    a choice `{letter}` and `{text}`; `plain`, for models without a chat template, `{system}` and `{user}`. An empty
    `system` is left out. Of what differs by type, the types that are left out have the default's.
    """

    system: Mapping[str, str] = field(default_factory=lambda: dict(INSTRUCTIONS))
    system_with_passages: Mapping[str, str] = field(default_factory=lambda: dict(WITH_PASSAGES))
    user: str = "{question}{choices}"
    user_with_passages: str = "{passages}\n{question}{choices}"
    passage: str = "Passage {number}: {text}"
    between_passages: str = "\n"
    choice: str = "\n{letter}) {text}"
    answer: str = ""  # what the assistant's turn begins with
    end: str | None = None  # what ends an answer in training and at query time; None: the tokenizer's end of turn
    plain: str = "{system}\n{user}\nAnswer:"
    chat_template: bool = True  # whether the tokenizer's own is used, where it has one
    template_options: Mapping[str, Any] = field(default_factory=lambda: {"enable_thinking": False})
    max_new_tokens: Mapping[str, int] = field(default_factory=lambda: dict(MAX_NEW_TOKENS))
    first_line: bool = True  # whether an answer ends with its line

    def __post_init__(self) -> None:
        for name in _DEFAULTS:
            value, default = getattr(self, name), _DEFAULTS[name]
            if not isinstance(value, Mapping) or not set(value) <= set(default):
                raise DataError(f"the prompt's {name} has values for {', '.join(sorted(default))}; found {value!r}")
            object.__setattr__(self, name, default | dict(value))
        for name, fields in _FIELDS.items():
            try:
                getattr(self, name).format(**dict.fromkeys(fields, ""))
            except (AttributeError, IndexError, KeyError, ValueError) as error:
                raise DataError(
                    f"the prompt's {name} is a text with the fields {', '.join(fields)} in braces ({{{{ for a brace "
                    f"itself); found {getattr(self, name)!r}: {error!r}"
                ) from error

    @classmethod
    def load(cls, path: Path) -> PromptFormat:
        """Read a JSON object of the fields that differ from the default.

        Raises:
            DataError: for a file that can't be read, or a field that is none.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"can't read the prompt {path}: {error}") from error
        return cls.of(values)

    @classmethod
    def of(cls, values: Any) -> PromptFormat:
        """The format of such an object."""
        default = asdict(cls())
        if not isinstance(values, Mapping) or (unknown := sorted(set(values) - set(default))):
            what = unknown if isinstance(values, Mapping) else type(values).__name__
            raise DataError(f"a prompt is an object with some of {', '.join(default)}; found {what}")
        return cls(**values)

    def differences(self) -> dict[str, Any]:
        """The fields that differ from the default, as `of` takes them."""
        default = asdict(PromptFormat())
        return {name: value for name, value in asdict(self).items() if value != default[name]}

    def system_message(self, kind: str, *, shows: bool, engineered: bool) -> str:
        """The instruction for a type of question, or `sentence`: without passages, with them, or to find in them."""
        if engineered:
            return f"{ENGINEERED_INSTRUCTION} {self.system[kind]}"
        return (self.system_with_passages if shows else self.system)[kind]

    def messages(self, prompt: Prompt) -> list[dict[str, str]]:
        """The conversation: the instruction as the system's message, the rest as the user's."""
        shown: list[dict[str, str]] = []
        system = self.system_message(prompt.instruction, shows=bool(prompt.passages), engineered=prompt.engineered)
        if prompt.engineered:
            asked, said = EXAMPLES[prompt.type]
            shown = [
                {"role": "user", "content": f"{EXAMPLE_PASSAGE}\n{asked}"}, {"role": "assistant", "content": said}
            ]  # fmt: skip
        system = system if prompt.system is None else prompt.system
        shown += [{"role": role, "content": text} for role, text in prompt.turns]
        choices = [self.choice.format(letter=chr(ord("A") + i), text=choice) for i, choice in enumerate(prompt.choices)]
        parts = {"question": prompt.question, "choices": "".join(choices)}
        if prompt.passages:
            passages = [self.passage.format(number=i, text=text) for i, text in enumerate(prompt.passages, 1)]
            parts["passages"] = self.between_passages.join(passages)
        user = (self.user_with_passages if prompt.passages else self.user).format(**parts)
        before = [{"role": "system", "content": system}] if system else []
        return [*before, *shown, {"role": "user", "content": user}]

    def render(self, prompt: Prompt, tokenizer: ChatTokenizer) -> str:
        """The prompt's text in the model's own chat format, up to where the answer begins."""
        messages = self.messages(_in_letters(prompt, tokenizer))
        if not self.chat_template or getattr(tokenizer, "chat_template", None) is None:
            system = messages[0]["content"] if messages[0]["role"] == "system" else ""
            user = "\n".join(message["content"] for message in messages if message["role"] != "system")
            text = self.plain.format(system=system, user=user)
            return _beginning(tokenizer) + (text if system else text.removeprefix("\n")) + self.answer

        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, **self.template_options}

        def templated(conversation: list[dict[str, str]]) -> str:
            return tokenizer.apply_chat_template(conversation, **options)

        try:
            text = templated(messages)
        except Exception as error:  # a template without a system role raises jinja2.TemplateError or ValueError
            if messages[0]["role"] != "system":
                raise
            merged = {"role": "user", "content": f"{messages[0]['content']}\n{messages[1]['content']}"}
            try:
                text = templated([merged, *messages[2:]])
            except Exception:  # then it was not the system's message: what the template said first stands
                raise error from None
        return text + self.answer

    def target(self, tokenizer: Any, answer: str, most: int | None) -> list[int]:
        """The token ids that training wants after the prompt: so many of the answer at most (None: all) and its end."""
        ids: list[int] = tokenizer(answer, add_special_tokens=False).input_ids[:most]
        return [*ids, *self.end_ids(tokenizer)]

    def end_ids(self, tokenizer: Any) -> list[int]:
        """The tokens of what ends an answer."""
        if self.end is None:
            return [tokenizer.eos_token_id]
        ids: list[int] = tokenizer(self.end, add_special_tokens=False).input_ids
        return ids

    def said(self, text: str, *, first_line: bool | None = None) -> str:
        """The answer in what the model said: without its thoughts, up to its end; `first_line` instead of its own."""
        text = _THOUGHTS.sub("", text).strip()
        if self.end:
            text = text.split(self.end)[0].strip()
        line = self.first_line if first_line is None else first_line
        return text.split("\n")[0].strip() if line else text

    def is_over(self, text: str, *, first_line: bool | None = None) -> bool:
        """Whether `said` of this text will stay as it is, whatever comes."""
        text = _THOUGHTS.sub("", text).lstrip()
        line = self.first_line if first_line is None else first_line
        return (line and "\n" in text) or bool(self.end and text and self.end in text)


def _in_letters(prompt: Prompt, tokenizer: Any) -> Prompt:
    """The same prompt, in whose question, choices, passages and turns no text stands for a control token: what says
    `<|im_end|>` would end the user's turn, and begin whichever it likes. A space sets such texts apart."""
    control = _control_tokens(tokenizer)
    if control is None:
        return prompt

    def letters(text: str) -> str:
        return control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    return replace(
        prompt,
        question=letters(prompt.question),
        choices=tuple(map(letters, prompt.choices)),
        passages=tuple(map(letters, prompt.passages)),
        turns=tuple((role, letters(text)) for role, text in prompt.turns),
    )


def _control_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Finds the texts of a tokenizer's special tokens."""
    if tokenizer not in _CONTROL:
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        said = sorted({str(token.content) for token in added if token.special and len(token.content) > 1})
        _CONTROL[tokenizer] = re.compile("|".join(map(re.escape, said))) if said else None
    return _CONTROL[tokenizer]


def _beginning(tokenizer: Any) -> str:
    """What a tokenizer of a model without a chat template sets before a text: its BOS, as Gemma needs it, or nothing.
    Chat templates have theirs in them."""
    bos, first = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "bos_token_id", None)
    if bos is None or first is None:
        return ""
    return str(bos) if tokenizer("a").input_ids[:1] == [first] else ""


PromptFunction = Callable[[Prompt], str]  # a prompt's text of one's own
_FIELDS = {
    "user": ("question", "choices"),
    "user_with_passages": ("passages", "question", "choices"),
    "passage": ("number", "text"),
    "choice": ("letter", "text"),
    "plain": ("system", "user"),
}
