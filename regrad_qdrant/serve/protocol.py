"""OpenAI's protocol: what requests and answers look like, and the field `regrad` that both may have."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from regrad_qdrant.answer.running import Sampling

if TYPE_CHECKING:
    from regrad_qdrant.bank.documents import Hit
    from regrad_qdrant.serve.job import Outcome

URL_FIELDS = ("url", "source_url", "link", "metadata.url", "meta.url", "metadata.source")  # of payloads, first found


class Retrieval(BaseModel):
    """The field `regrad` of a request: how its documents are searched, and how it is answered."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    top_k: int = Field(default=3, ge=1, le=100, description="How many documents to retrieve.")
    passages: bool | None = Field(
        default=None, description="Whether the documents' texts stand in the prompt too, whatever the model's id says."
    )
    filter: dict[str, Any] | None = Field(default=None, description="Qdrant's filter, as JSON.")
    using: str | list[str] | None = Field(
        default=None, description="The vector to search; several make a hybrid search."
    )
    grounded: bool | Literal["auto"] | None = Field(
        default=None, description="Whether the answer is a span of the texts, whatever the model's id says."
    )
    type: Literal["open", "yesno", "choice"] = "open"
    choices: list[str] = Field(default_factory=list, max_length=26)
    style: Literal["short", "sentence"] = "short"
    sources: bool = Field(default=False, description="Whether a list of the documents ends the answer's text.")


class Part(BaseModel):
    type: str = "text"
    text: str = ""


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]  # the last two are read over
    content: str | list[Part] | None = ""

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content if part.type == "text")
        return self.content or ""


class StreamOptions(BaseModel):
    include_usage: bool = False


class Generation(BaseModel):
    """What chat and plain completions have in common. Other fields of OpenAI's are read over."""

    model: str = "regrad"
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=100_000)
    temperature: float | None = Field(default=None, ge=0, le=2, description="0, the default, is greedy.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    n: Literal[1] | None = 1
    regrad: Retrieval = Retrieval()

    @property
    def sampling(self) -> Sampling:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        top_p = 1.0 if self.top_p is None else self.top_p
        return Sampling(self.temperature or 0.0, top_p, self.seed, tuple(stop for stop in stops if stop))

    @property
    def length(self) -> int | None:
        """Tokens of the answer, at most."""
        return self.max_tokens

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Generation):
    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=100_000)

    @property
    def length(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def _one_text(prompt: Any) -> Any:
    """A prompt, or the one of a list."""
    if not isinstance(prompt, list):
        return prompt
    if len(prompt) == 1 and isinstance(prompt[0], str):
        return prompt[0]
    raise PydanticCustomError("one_text", "one text is answered a request, neither several nor token ids")


class CompletionRequest(Generation):
    prompt: Annotated[str, BeforeValidator(_one_text)]


class SearchRequest(BaseModel):
    query: str = Field(min_length=1)
    regrad: Retrieval = Retrieval()


class Shape:
    """How an answer is written: as a chat's message or as a completion's text, whole or in chunks."""

    def __init__(self, request_id: str, model: str, *, chat: bool) -> None:
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{request_id}"
        self.model, self.chat = model, chat
        self.created = int(time.time())

    def whole(self, outcome: Outcome, text: str) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": outcome.answer.finish, "logprobs": None}
        if self.chat:
            message = {"role": "assistant", "content": text, "refusal": None, "annotations": citations(outcome)}
            choice["message"] = message
        else:
            choice["text"] = text
        name = "chat.completion" if self.chat else "text_completion"
        return self._framed(name, [choice]) | {"usage": usage(outcome), "regrad": told(outcome)}

    def chunk(self, text: str, *, first: bool = False) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": None, "logprobs": None}
        if self.chat:
            choice["delta"] = ({"role": "assistant"} if first else {}) | {"content": text}
        else:
            choice["text"] = text
        return self._framed(self._chunk_name, [choice])

    def last(self, outcome: Outcome) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": outcome.answer.finish, "logprobs": None}
        choice |= {"delta": {"annotations": citations(outcome)}} if self.chat else {"text": ""}
        return self._framed(self._chunk_name, [choice]) | {"regrad": told(outcome)}

    def usage(self, outcome: Outcome) -> dict[str, Any]:
        return self._framed(self._chunk_name, []) | {"usage": usage(outcome)}

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _framed(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model, "choices": choices}


def event(value: dict[str, Any] | str) -> str:
    """One event of a stream."""
    return f"data: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n\n"


def usage(outcome: Outcome) -> dict[str, int]:
    prompt, said = outcome.answer.prompt_tokens, outcome.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}


def told(outcome: Outcome) -> dict[str, Any]:
    """The field `regrad` of an answer: what it came from, and the seconds of each part."""
    answer = outcome.answer
    return {
        "mode": answer.mode,
        "documents": [document(hit) | {"weight": answer.weights.get(hit.id)} for hit in answer.hits],
        "source": asdict(answer.source) if answer.source else None,
        "notes": list(answer.notes),
        "seconds": outcome.seconds,
    }


def document(hit: Hit) -> dict[str, Any]:
    found: dict[str, Any] = {"id": hit.document_id, "point": hit.id, "score": hit.score, "text": hit.text}
    return found | {"url": url_of(hit)}


def url_of(hit: Hit) -> str | None:
    """Where a payload says that its document can be read."""
    for field in URL_FIELDS:
        value: Any = hit.payload
        for name in field.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, str) and value.startswith(("http://", "https://")):
            return value
    return None


def citations(outcome: Outcome) -> list[dict[str, Any]]:
    """The documents that have a URL, cited for the whole answer."""
    end = len(outcome.answer.text)
    return [
        {
            "type": "url_citation",
            "url_citation": {"start_index": 0, "end_index": end, "url": url, "title": str(hit.document_id)},
        }
        for hit in outcome.answer.hits
        if (url := url_of(hit)) is not None
    ]


def listed(hits: Sequence[Hit]) -> str:
    """The documents as a list in Markdown, for clients that show the text alone."""
    if not hits:
        return ""
    lines = [f"{i}. [{hit.document_id}]({url})" if (url := url_of(hit)) else f"{i}. {hit.document_id}"
             for i, hit in enumerate(hits, 1)]  # fmt: skip
    return "\n\nSources:\n" + "\n".join(lines)
