"""tokenizer.py - byte-level BPE, from the vocabulary and merges inside a GGUF file.

Text -> special tokens are cut out -> pre-tokenizer (regex) splits into words -> the bytes of a word are
written as printable characters (GPT-2's table) -> the merge of lowest rank is applied until none is left.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from functools import lru_cache

import regex

# "smollm": every digit stands alone, then GPT-2's splitting
_DIGITS = regex.compile(r"\p{N}|[^\p{N}]+")
_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

_TYPE_CONTROL = 3


def _byte_table() -> dict[int, str]:
    """GPT-2: printable bytes stand for themselves, the others for characters from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {b: chr(b) for b in printable}
    others = [b for b in range(256) if b not in table]
    table.update({b: chr(0x100 + i) for i, b in enumerate(others)})
    return table


_CHAR_OF_BYTE = _byte_table()
_BYTE_OF_CHAR = {c: b for b, c in _CHAR_OF_BYTE.items()}


class Tokenizer:
    """tokens: text of each id; types: GGUF token types; merges: "left right", best first."""

    def __init__(self, tokens: Sequence[str], types: Sequence[int], merges: Iterable[str]) -> None:
        self._tokens = tokens
        self._id_of = {text: i for i, text in enumerate(tokens)}
        self._rank = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
        self._special = {t for t, kind in zip(tokens, types, strict=True) if kind == _TYPE_CONTROL}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split_special = regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")")
        self._bpe = lru_cache(maxsize=65536)(self._bpe_uncached)

    def encode(self, text: str, allow_special: bool = True) -> list[int]:
        """Token ids. allow_special=False: text such as "<|im_end|>" is only text."""
        parts = self._split_special.split(text) if allow_special else [text]
        ids: list[int] = []
        for part in parts:
            if allow_special and part in self._special:
                ids.append(self._id_of[part])
                continue
            for run in _DIGITS.findall(part):
                for word in _WORDS.findall(run):
                    ids += self._bpe(word)
        return ids

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text; nothing for control tokens."""
        text = self._tokens[token]
        return b"" if text in self._special else bytes(_BYTE_OF_CHAR[c] for c in text)

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")

    def id_of(self, text: str) -> int:
        return self._id_of[text]

    def _bpe_uncached(self, word: str) -> tuple[int, ...]:
        parts = [_CHAR_OF_BYTE[b] for b in word.encode("utf-8")]
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:], strict=False))
            best = min(pairs, key=lambda pair: self._rank.get(pair, len(self._rank)))
            if best not in self._rank:
                break
            merged: list[str] = []
            i = 0
            while i < len(parts):
                if tuple(parts[i : i + 2]) == best:
                    merged.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            parts = merged
        return tuple(self._id_of[part] for part in parts)


class TextStream:
    """Tokens in, text out as soon as its characters are complete (a token may end inside one)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def chat_prompt(user: str, system: str) -> str:
    """SmolLM2's chat template (ChatML), for one question."""
    return (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    )
