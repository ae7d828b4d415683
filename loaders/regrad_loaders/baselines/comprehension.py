"""Raw texts as reading comprehension (Cheng et al. 2023, "Adapting large language models via reading comprehension"):
each text is followed by tasks that rules find in it, so that a model trained on them keeps answering questions.

The rules are theirs, in short: a title makes a summary; connectives make inference, causes and paraphrases; rare words
make a sentence to be written; a text cut in two makes one to be completed. No language model is needed. They mix
general instructions in, which is not done here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from regrad_qdrant.bank.corpus import Passage

MOST = 4  # tasks of one text

_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"[A-Za-z][\w’'-]{4,}")
# What joins two statements of one sentence, and the tasks that it makes of them: {0} and {1} are the statements.
_JOINED: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    (
        re.compile(r"^(.{20,}?),? because (?:of )?(.{8,}?)\.?$"),
        ("What is the reason for this? {0}.\nAnswer: {1}.", "Why is it so that {0}?\nAnswer: because of {1}."),
    ),
    (
        re.compile(r"^(.{20,}?)[,;.]? (?:[Tt]herefore|[Tt]hus|[Hh]ence|[Aa]s a result|[Cc]onsequently),? (.{8,}?)\.?$"),
        ("What follows from this? {0}.\nAnswer: {1}.", "{0}. Does it follow that {1}?\nAnswer: yes."),
    ),
    (
        re.compile(r"^(.{20,}?)[,;.]? (?:[Hh]owever|but|although|whereas|while),? (.{8,}?)\.?$"),
        ("What is different, compared with this? {0}.\nAnswer: {1}.",),
    ),
    (
        re.compile(r"^(.{20,}?)[,;.]? (?:[Ii]n other words|that is|namely|i\.e\.),? (.{8,}?)\.?$"),
        ("Say this in other words: {0}.\nAnswer: {1}.",),
    ),
)
_TITLED = (
    "What is a title for this text?\nAnswer: {0}.",
    "In short, what is this text about?\nAnswer: {0}.",
    "What is the topic of the text above?\nAnswer: {0}.",
)
_WRITTEN = (
    "Write a sentence about {0} with the words {1}.\nAnswer: {2}",
    "With these words, what does the text say of {0}: {1}?\nAnswer: {2}",
)
_COMPLETED = ("How does the text go on after this? {0}\nAnswer: {1}", "Complete the text: {0}\nAnswer: {1}")


def comprehension_text(passage: Passage, seed: int = 0) -> str:
    """A passage's text with at most `MOST` tasks below it; of one seed always the same."""
    rng = random.Random(f"{seed}-{passage.id}")
    text = passage.text.strip()
    sentences = [sentence for sentence in _SENTENCE.split(text) if len(sentence.split()) > 4]
    tasks = [*_titled(passage, rng), *_joined(sentences, rng), *_completed(sentences, rng)]
    tasks += _written(passage, sentences, rng)
    chosen = tasks if len(tasks) <= MOST else rng.sample(tasks, MOST)
    return "\n\n".join([text, *chosen])


def _titled(passage: Passage, rng: random.Random) -> list[str]:
    return [rng.choice(_TITLED).format(title)] if (title := _title(passage)) else []


def _joined(sentences: Sequence[str], rng: random.Random) -> list[str]:
    tasks = []
    for sentence in sentences:
        for pattern, forms in _JOINED:
            if found := pattern.match(sentence):
                tasks.append(rng.choice(forms).format(found[1].strip(), found[2].strip()))
                break
    return tasks


def _completed(sentences: Sequence[str], rng: random.Random) -> list[str]:
    if len(sentences) < 2:
        return []
    at = rng.randrange(1, len(sentences))
    return [rng.choice(_COMPLETED).format(sentences[at - 1], sentences[at])]


def _written(passage: Passage, sentences: Sequence[str], rng: random.Random) -> list[str]:
    """A sentence to be written from its rarest words: the longest, for want of a corpus to count them in."""
    tasks = []
    for sentence in sentences:
        words = list(dict.fromkeys(_WORD.findall(sentence)))
        if len(words) >= 3:
            rare = sorted(sorted(words, key=lambda word: -len(word))[:3], key=sentence.find)
            about = _title(passage) or "the subject"
            tasks.append(rng.choice(_WRITTEN).format(about, ", ".join(rare), sentence))
    return tasks


def _title(passage: Passage) -> str:
    return str(passage.payload.get("title") or "")
