"""Text tokenizers of the library youtokentome (github.com/VKCOM/YouTokenToMe): byte pair encoding
(Sennrich et al. 2016, arXiv 1508.07909) of words that begin with ▁. Compared with the library: docs/checkpoints.md.

A `.model` is text: how many characters and merges; on each line a code point and its id; on each line two ids and what
they become; the ids of the marks for unknown, padding, begin and end.
"""

import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from vqt2i.errors import CheckpointError
from vqt2i.files import sha256_of_parts
from vqt2i.text.tokenizer import clean_text

SPACE = "\u2581"
BETWEEN_WORDS = re.compile(f"[ \t\n\v\f\r{SPACE}]+")  # other spaces of Unicode are characters there


class YouTokenToMe:
    """Text to ids and back, with the methods of `TextTokenizer` that we call. Ids have the marks of begin and end.

    Attributes:
        n_ids, fingerprint: as of `TextTokenizer`.
    """

    is_bpe = False  # for BPE-dropout, which is SentencePiece's here
    start = end = None

    def __init__(self, content: bytes, name: str) -> None:
        self.content, self.fingerprint = content, sha256_of_parts(content)
        try:
            first, *lines = content.decode("ascii").splitlines()
            n_characters, n_merges = map(int, first.split())
            rows = [tuple(map(int, line.split())) for line in lines if line.strip()]
            self._ids = {chr(point): i for point, i in rows[:n_characters]}
            merges = rows[n_characters : n_characters + n_merges]
            # the earlier a merge, the sooner it is done
            self._merges = {(a, b): (rank, c) for rank, (a, b, c) in enumerate(merges)}
            ((self.unknown, _, self.begin, self.finish),) = rows[n_characters + n_merges :]
        except (UnicodeDecodeError, ValueError, OverflowError):
            raise CheckpointError(f"{name}: not a model of youtokentome, or a damaged one") from None
        self._texts = {i: character for character, i in self._ids.items()}
        for a, b, c in merges:
            if a not in self._texts or b not in self._texts:
                raise CheckpointError(f"{name}: merges the ids {a} and {b}, which nothing makes; it is damaged")
            self._texts[c] = self._texts[a] + self._texts[b]
        self.n_ids = max(*self._texts, self.unknown, self.begin, self.finish) + 1

    @classmethod
    def find(cls, path: Path) -> "YouTokenToMe | None":
        """That of a file, or of the only `.model` in a folder; None where it is something else."""
        models = sorted(path.glob("*.model")) if path.is_dir() else [path]
        if len(models) != 1 or not models[0].is_file():
            return None
        content = models[0].read_bytes()
        return cls(content, str(models[0])) if content[:1].isdigit() else None  # others begin with a tag

    @property
    def files(self) -> dict[str, bytes]:
        """As `TextTokenizer.files`."""
        return {"text.model": self.content}

    def encode(self, text: str) -> list[int]:
        """Ids of a text in lower case, as ruDALL-E reads it, between its marks. The empty text has no ids."""
        words = [word for word in BETWEEN_WORDS.split(clean_text(text).lower()) if word]
        if not words:
            return []
        return [self.begin, *(i for word in words for i in self._encode_word(word)), self.finish]

    def decode(self, ids: Iterable[Any]) -> str:
        """Text of ids; marks are left out."""
        return "".join(self._texts.get(int(i), "") for i in ids).replace(SPACE, " ").strip()

    def _encode_word(self, word: str) -> list[int]:
        ids: list[int] = []
        for character in SPACE + word:
            i = self._ids.get(character, self.unknown)
            if i != self.unknown or ids[-1:] != [i]:  # a run of unknown characters is one id
                ids.append(i)
        while True:
            found = [(*self._merges[pair], at) for at, pair in enumerate(pairwise(ids))
                     if pair in self._merges]  # fmt: skip
            if not found:
                return ids
            _, merged, at = min(found, key=lambda merge: (merge[0], merge[2]))
            ids[at : at + 2] = [merged]
