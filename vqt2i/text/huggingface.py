"""The tokenizer of a CLIP from `transformers`: a `tokenizer.json`, with the methods of `TextTokenizer` that we call."""

from pathlib import Path

from vqt2i.errors import CheckpointError, ConfigError
from vqt2i.files import sha256_of_parts
from vqt2i.text.tokenizer import TextTokenizer, clean_text

FILE = "tokenizer.json"
START, END = "<|startoftext|>", "<|endoftext|>"


class HuggingFaceTokenizer:
    """Text to ids and back, without the marks at its ends, which the scorer adds.

    Attributes:
        n_ids, fingerprint: as of `TextTokenizer`.
        start, end: ids of the marks.
    """

    is_bpe = False  # for BPE-dropout, which is SentencePiece's here

    def __init__(self, content: bytes, name: str) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ConfigError(f"{name}: needs `transformers`; pip install 'vqt2i[clip]'") from None
        self.content, self.fingerprint = content, sha256_of_parts(content)
        try:
            self._tokenizer = Tokenizer.from_buffer(content)
        except ValueError as error:
            raise CheckpointError(f"{name}: not a tokenizer of `tokenizers` ({error})") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.n_ids = self._tokenizer.get_vocab_size()
        self.start, self.end = map(self._tokenizer.token_to_id, (START, END))
        if self.start is None or self.end is None:
            raise CheckpointError(f"{name}: has no {START} and {END}; expected the tokenizer of a CLIP")

    @property
    def files(self) -> dict[str, bytes]:
        """As `TextTokenizer.files`."""
        return {FILE: self.content}

    def encode(self, text: str) -> list[int]:
        """Ids of a text. The empty text gives none."""
        return self._tokenizer.encode(clean_text(text), add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        return self._tokenizer.decode([int(i) for i in ids])


def load_tokenizer(path: Path) -> TextTokenizer | HuggingFaceTokenizer:
    """The tokenizer in a file or folder: a `tokenizer.json`, else a SentencePiece `.model`.

    Raises:
        CheckpointError: as `TextTokenizer.load`, or a damaged file.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if file.name == FILE and file.is_file():
        return HuggingFaceTokenizer(file.read_bytes(), str(file))
    return TextTokenizer.load(path)
