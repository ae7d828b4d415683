"""An answer piece by piece: the model writes in a thread of its own, and whoever reads sees the text grow."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from regrad_qdrant.answer.generation import Asking
    from regrad_qdrant.answer.query import Answer
    from regrad_qdrant.model.prompts import Prompt


class AnswerStream:
    """The pieces of one answer, in order, once; `answer` is the whole one when they have ended.

    Args:
        work: answers with a streamer and a stopping criterion, in a thread.
        asking: what of the model's text is the answer to the prompt.
    """

    def __init__(self, work: Callable[[Any, Any], Answer], tokenizer: Any, asking: Asking, prompt: Prompt) -> None:
        from transformers import TextIteratorStreamer

        self.answer: Answer | None = None
        self._ended = False  # all pieces have been read
        self._asking, self._prompt = asking, prompt
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, pieces = self._stop, self._pieces

        def run() -> None:
            try:
                self.answer = work(pieces, lambda ids, _scores, **_: _all(ids, stop.is_set()))
            except BaseException as error:  # the reader gets it
                self._error = error
            finally:
                pieces.on_finalized_text("", stream_end=True)

        self._thread = threading.Thread(target=run, name="regrad-stream", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        if self._ended:
            return
        try:
            text, shown = "", ""
            for piece in self._pieces:
                text += piece
                said = self._asking.said(self._prompt, text)
                if said.startswith(shown) and said != shown:
                    yield said[len(shown) :]
                    shown = said
            self._ended = True
            self._thread.join()
            if self._error is not None:
                raise self._error
            if self.answer is not None and self.answer.text.startswith(shown) and self.answer.text != shown:
                yield self.answer.text[len(shown) :]  # of a question with options, the one that was chosen
        finally:
            self.close()

    def close(self) -> None:
        """Let the model end after its next token; the weights are then φ₀ again."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _all(ids: Any, stop: bool) -> Any:
    """A stopping criterion's verdict for each row."""
    import torch

    return torch.full((len(ids),), stop, dtype=torch.bool, device=ids.device)
