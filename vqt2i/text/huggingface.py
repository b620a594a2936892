"""The tokenizer of published CLIPs: a `tokenizer.json`, with the methods of `TextTokenizer` that we call."""

import gzip
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from vqt2i.errors import CheckpointError, ConfigError
from vqt2i.files import sha256_of_parts
from vqt2i.text.tokenizer import TextTokenizer, clean_text
from vqt2i.text.youtokentome import YouTokenToMe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"
VOCABULARY, MERGES = "vocab.json", "merges.txt"
OPENAI = "bpe_simple_vocab_16e6.txt.gz"
FORMS = f"{FILE}, {VOCABULARY} with {MERGES}, or {OPENAI}"
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
N_BYTES = 256
N_OPENAI_IDS = 49408  # of which the merges are what bytes, bytes that end a word and the marks leave
# words as CLIP's tokenizer takes them apart (Radford et al. 2021, github.com/openai/CLIP)
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class HuggingFaceTokenizer:
    """Text to ids and back, without the marks at its ends, which the scorer adds.

    Attributes:
        n_ids, fingerprint: as of `TextTokenizer`.
        start, end: ids of a scorer's marks; None for the tokenizer of no scorer, which puts marks of its own around a
            text if it has any.
    """

    is_bpe = False  # for BPE-dropout, which is SentencePiece's here

    def __init__(self, content: bytes, name: str) -> None:
        tokenizer_class = _library(name)
        self.content, self.fingerprint = content, sha256_of_parts(content)
        try:
            self._tokenizer = tokenizer_class.from_buffer(content)
        except ValueError as error:
            raise CheckpointError(f"{name}: not a tokenizer of `tokenizers` ({error})") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.n_ids = self._tokenizer.get_vocab_size()
        self.start, self.end = map(self._tokenizer.token_to_id, (START, END))

    @property
    def files(self) -> dict[str, bytes]:
        """As `TextTokenizer.files`."""
        return {FILE: self.content}

    def id_of(self, token: str) -> int | None:
        """The id of a token, if there is such a one."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of a text. The empty text gives none."""
        return self._tokenizer.encode(clean_text(text), add_special_tokens=self.start is None).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        return self._tokenizer.decode([int(i) for i in ids]).replace(WORD_END, " ").strip()


def load_tokenizer(path: Path) -> TextTokenizer | HuggingFaceTokenizer | YouTokenToMe:
    """The tokenizer in a file or folder: a `tokenizer.json`, else a `.model`, SentencePiece's or youtokentome's.

    Raises:
        CheckpointError: as `TextTokenizer.load`, or a damaged file.
    """
    path = Path(path)
    own = load_own_tokenizer(path.parent if path.name == FILE else path)
    return own or YouTokenToMe.find(path) or TextTokenizer.load(path)


def holds_tokenizer(folder: Path) -> bool:
    """Whether `load_tokenizer` finds one in a folder."""
    return (folder / FILE).is_file() or len(list(folder.glob("*.model"))) == 1


def load_own_tokenizer(folder: Path) -> HuggingFaceTokenizer | None:
    """The tokenizer in a scorer's folder, for one that does not read the ids of the others; None where there is none.

    Raises:
        CheckpointError: a damaged file. ConfigError: the library `tokenizers` is missing.
    """
    file = folder / FILE
    return HuggingFaceTokenizer(file.read_bytes(), str(file)) if file.is_file() else None


def find_clip_tokenizer(path: Path) -> HuggingFaceTokenizer | None:
    """The tokenizer in a file or folder, in any form that CLIP's is published in; None where a folder has none.

    It reads texts as that of `transformers` does; OpenAI's and open_clip's first mend a text by `ftfy` (curly quotes
    become straight ones, say) and read HTML entities.

    Raises:
        CheckpointError: a file in another form, or a damaged one. ConfigError: the library `tokenizers` is missing.
    """
    files = [path / name for name in (FILE, MERGES, OPENAI)] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        if path.is_dir():
            return None
        raise CheckpointError(f"{path}: no such file; expected CLIP's tokenizer as {FORMS}")
    _library(str(file))
    try:
        if file.suffix == ".json" and file.name != VOCABULARY:
            content = file.read_bytes()
        elif file.suffix == ".gz":
            lines = gzip.decompress(file.read_bytes()).decode().splitlines()
            content = _built(_merges(lines[1 : N_OPENAI_IDS - 2 * N_BYTES - 1]), None)
        else:
            vocabulary = json.loads((file.parent / VOCABULARY).read_text(encoding="utf-8"))
            content = _built(_merges((file.parent / MERGES).read_text(encoding="utf-8").splitlines()), vocabulary)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise CheckpointError(f"{file}: {error}; expected CLIP's tokenizer as {FORMS}") from None
    tokenizer = HuggingFaceTokenizer(content, str(file))
    if tokenizer.start is None or tokenizer.end is None:
        raise CheckpointError(f"{file}: has no {START} and {END}; expected the tokenizer of a CLIP")
    return tokenizer


def find_character_tokenizer(folder: Path, *, special: str, unknown: str = "[UNK]") -> HuggingFaceTokenizer:
    """The tokenizer in a folder with one `*vocab.json` and one `*merges.txt`, as the CharBPETokenizer of `tokenizers`:
    lower case, merges of characters, words that end in `</w>`.

    Args:
        special: a token that gets the next free id if it has none.

    Raises:
        CheckpointError: not one file of each, or a damaged one. ConfigError: the library `tokenizers` is missing.
    """
    _library(str(folder))
    from tokenizers.implementations import CharBPETokenizer

    files = [sorted(folder.glob(name)) for name in ("*vocab.json", "*merges.txt")]
    if [len(found) for found in files] != [1, 1]:
        raise CheckpointError(f"{folder}: expected a tokenizer as one *vocab.json and one *merges.txt")
    (vocabulary_file,), (merges_file,) = files
    try:
        vocabulary = json.loads(vocabulary_file.read_text(encoding="utf-8"))
        merges = _merges(merges_file.read_text(encoding="utf-8").splitlines())
        _require_known(merges, vocabulary)
        built = CharBPETokenizer(vocabulary, merges, unk_token=unknown, suffix=WORD_END, lowercase=True)
    except Exception as error:  # the library has none of its own
        raise CheckpointError(f"{folder}: not the tokenizer of a model ({error})") from None
    built.add_special_tokens([special])
    return HuggingFaceTokenizer(built.to_str().encode(), str(folder))


def _library(name: str) -> "type[Tokenizer]":
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigError(f"{name}: needs the library `tokenizers`; pip install 'vqt2i[clip]'") from None
    return Tokenizer


def _merges(lines: list[str]) -> list[tuple[str, str]]:
    pairs = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"merges of {next(len(pair) for pair in pairs if len(pair) != 2)} parts")
    return pairs


def _require_known(merges: list[tuple[str, str]], vocabulary: dict[str, int]) -> None:
    """Raises ValueError for a merge of words that are not there, of which the library dies."""
    for pair in merges:
        if unknown := [word for word in (*pair, "".join(pair)) if word not in vocabulary]:
            raise ValueError(f"merges {' and '.join(pair)}, but {unknown[0]} is not in the vocabulary")


def _built(merges: list[tuple[str, str]], vocabulary: dict[str, int] | None) -> bytes:
    """A `tokenizer.json` of merges; without a vocabulary, ids are in CLIP's order."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if vocabulary is None:
        letters = _byte_letters()
        words = [*letters, *(letter + WORD_END for letter in letters), *map("".join, merges), START, END]
        vocabulary = {word: i for i, word in enumerate(words)}
    if START not in vocabulary or END not in vocabulary:
        raise ValueError(f"no {START} and {END} in the vocabulary")  # they would be added to it
    _require_known(merges, vocabulary)
    try:
        bpe = models.BPE(vocabulary, merges, unk_token=END, continuing_subword_prefix="", end_of_word_suffix=WORD_END)
    except Exception as error:  # the library has none of its own
        raise ValueError(str(error)) from None
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in (START, END)])
    return tokenizer.to_str().encode()


def _byte_letters() -> list[str]:
    """A letter for every byte, as byte-level BPE writes them (Radford et al. 2019, GPT-2), in CLIP's order.

    Printable ones stand for themselves and come first; the others are the letters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(N_BYTES + i) for i in range(N_BYTES - len(printable))]
