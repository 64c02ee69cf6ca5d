"""A prompt's token ids: long texts off the event loop, what prompts share from a cache. No model knowledge.

Chats begin with the same system prompt and repeat their history at each turn. A tokenizer splits a text at its special
tokens before it looks at anything else, so what stands between two of them (a turn of a chat) has the same ids in every
prompt, and is tokenized once.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import re
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from dynamo_frontend.spelling import Spelling
from dynamo_frontend.vocabularies import AnyTokenizer

#: Texts longer than this leave the event loop to others; a thread costs as much as this many characters.
LONG_CHARS = 6_000
#: Prompt tokens that decoding an answer begins behind.
_TAIL = 8
#: The cache holds pieces of this many characters in all.
MAX_CACHED_CHARS = 16 * 1024 * 1024

_pool = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1), thread_name_prefix="tokenize")


class PromptTokenizer:
    """Tokenizes prompts of one model.

    Attributes:
        base: the tokenizer itself, without truncation and padding.
        spelling: what its tokens say one by one.
        max_token_chars: no token is longer than this.
        special: the ids of its special tokens, by what they say.
        on_look_up: told how many pieces of a prompt were in the cache, and how many weren't.
    """

    def __init__(self, tokenizer: AnyTokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.base = tokenizer
        self.spelling = Spelling(tokenizer)
        self.max_token_chars = max(map(len, tokenizer.get_vocab()), default=0)
        decoder = tokenizer.get_added_tokens_decoder()
        added = [token for token in decoder.values() if not token.normalized]
        # longest first: of several tokens that begin at one place, the longest counts
        contents = sorted((re.escape(token.content) for token in added), key=len, reverse=True)
        self._added = re.compile("|".join(contents) or r"(?!)")
        self._borders = {
            token.content for token in added if not (token.lstrip or token.rstrip or token.single_word)
        }  # the others look at what is around them
        self.special = {token.content: number for number, token in decoder.items() if token.special}
        self.on_look_up: Callable[[int, int], None] = lambda num_hits, num_misses: None
        self._cache: dict[str, array[int]] = {}
        self._num_cached_chars = 0

    def seed(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> list[int]:
        """What the text of an answer is decoded behind: some tokenizers spell a token by what is before it.

        The end of the prompt; but not one that ends in a broken character, or in what looks like one: a decoder would
        wait for the rest of it, and then give it with the answer.
        """
        tail = list(token_ids[-_TAIL:])
        if tail and self.base.decode(tail, skip_special_tokens=skip_special_tokens).endswith("\ufffd"):
            return self.plain_seed
        return tail

    @functools.cached_property
    def plain_seed(self) -> list[int]:
        """A seed that says nothing of the prompt."""
        return self.base.encode("a", add_special_tokens=False).ids

    def kept(self, marks: Sequence[str]) -> dict[int, str]:
        """The special tokens among marks, or with one in them, by id: what reads answers must see them."""
        return {number: said for said, number in self.special.items() if any(mark in said for mark in marks)}

    async def encode(self, text: str) -> list[int]:
        """Token ids of a text, without the tokens that a tokenizer adds around a whole one."""
        pieces = self._split(text)
        found = {piece: ids for piece in pieces if (ids := self._recall(piece)) is not None}
        missing = list(dict.fromkeys(piece for piece in pieces if piece not in found))
        self.on_look_up(len(found), len(missing))
        for piece, ids in zip(missing, await self._encode(missing, add_special_tokens=False), strict=True):
            found[piece] = array("I", ids)
            self._keep(piece, found[piece])
        all_ids: list[int] = []
        for piece in pieces:
            all_ids += found[piece]
        return all_ids

    async def encode_whole(self, text: str) -> list[int]:
        """Token ids of a text, with the tokens that the tokenizer adds (a BOS, say)."""
        return (await self.encode_all([text]))[0]

    async def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode_whole`, for several texts at once."""
        return await self._encode(texts, add_special_tokens=True)

    async def _encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        def work() -> list[list[int]]:
            # unlike `encode`, this lets go of the interpreter's lock
            encoded = self.base.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            return [one.ids for one in encoded]

        if not texts:
            return []
        if sum(map(len, texts)) <= LONG_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(_pool, work)

    def _split(self, text: str) -> list[str]:
        """The text, cut before each token that is a border: a piece keeps its border, and so its place in a text."""
        starts = [match.start() for match in self._added.finditer(text) if match[0] in self._borders]
        bounds = [0, *(start for start in starts if start), len(text)]
        return [text[begin:end] for begin, end in itertools.pairwise(bounds)]

    def _recall(self, piece: str) -> array[int] | None:
        ids = self._cache.pop(piece, None)
        if ids is not None:
            self._cache[piece] = ids  # what is used last goes last
        return ids

    def _keep(self, piece: str, ids: array[int]) -> None:
        if piece in self._cache or len(piece) > MAX_CACHED_CHARS // 8:
            return
        self._cache[piece] = ids
        self._num_cached_chars += len(piece)
        while self._num_cached_chars > MAX_CACHED_CHARS:
            oldest = next(iter(self._cache))
            del self._cache[oldest]
            self._num_cached_chars -= len(oldest)
