"""Sentences as rows of whole numbers.

Shape letters: N sentences, T tokens of a row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PAD, END, UNKNOWN = 0, 1, 2
SPECIAL = ("<pad>", "<end>", "<unknown>")
_TOKEN = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*|[^\sa-z0-9]")


def tokens(sentence: str) -> list[str]:
    """Return the words and signs of a sentence, in small letters."""
    return _TOKEN.findall(sentence.lower())


def vocabulary(sentences: Iterable[str], more_than: int) -> tuple[str, ...]:
    """Return the special tokens, then the words seen more than so many times: the most frequent first, then by letters.

    Examples:
        >>> from mixdist.data.words import vocabulary
        >>> vocabulary(["A dog runs.", "a cat", "A dog!"], more_than=1)
        ('<pad>', '<end>', '<unknown>', 'a', 'dog')
    """
    counts = Counter(word for sentence in sentences for word in tokens(sentence))
    kept = [word for word, count in counts.items() if count > more_than]
    return (*SPECIAL, *sorted(kept, key=lambda word: (-counts[word], word)))


def encode(sentences: Sequence[str], words: Sequence[str], length: int) -> Tensor:
    """Return sentences as places in ``words``, int64 (N, T): cut to T - 1 tokens, an end, then padding, which is 0."""
    place = {word: number for number, word in enumerate(words)}
    found = torch.full((len(sentences), length), PAD)
    for row, sentence in enumerate(sentences):
        codes = [place.get(word, UNKNOWN) for word in tokens(sentence)][: length - 1]
        found[row, : len(codes) + 1] = torch.tensor([*codes, END])
    return found


def decode(codes: Iterable[int], words: Sequence[str]) -> str:
    """Return the sentence of a row, up to its end; padding inside is left out.

    Examples:
        >>> from mixdist.data.words import decode
        >>> decode([3, 4, 1, 3, 0], ("<pad>", "<end>", "<unknown>", "a", "dog"))
        'a dog'
    """
    told = []
    for code in codes:
        if code == END:
            break
        if code != PAD:
            told.append(words[code] if code < len(words) else str(code))
    return " ".join(told)
