"""A SentencePiece model as the text tokenizer. Any model loads; ours have byte fallback, so nothing is unencodable."""

from pathlib import Path

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from vqt2i.errors import CheckpointError
from vqt2i.files import sha256_of_parts


def clean_text(text: str) -> str:
    """The text as it is read: SentencePiece stops at a NUL, and lone surrogates cannot be written as UTF-8."""
    return text.replace("\0", " ").encode("utf-8", "replace").decode("utf-8")


class TextTokenizer:
    """Text to ids and back.

    Attributes:
        n_ids: size of the vocabulary; ids are in [0, n_ids).
        fingerprint: content hash of the model file.
    """

    def __init__(self, model: bytes, name: str) -> None:
        self.model = model
        self.fingerprint = sha256_of_parts(model)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise CheckpointError(f"{name}: not a SentencePiece model; expected a .model file "
                                  "as tools/train_tokenizer.py writes it") from None  # fmt: skip
        self.n_ids = self._processor.GetPieceSize()

    @classmethod
    def load(cls, path: Path) -> "TextTokenizer":
        """Load a `.model` file, or the only one in a folder.

        Raises:
            CheckpointError: no such file, not one `.model` in the folder, or not a SentencePiece model.
        """
        path = Path(path)
        if path.is_dir():
            models = sorted(path.glob("*.model"))
            if len(models) != 1:
                raise CheckpointError(f"{path}: expected one .model file in it, found {len(models)}")
            path = models[0]
        try:
            return cls(path.read_bytes(), str(path))
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}; expected a SentencePiece .model file") from None

    @property
    def files(self) -> dict[str, bytes]:
        """What a folder needs to hold for it to be loaded from there."""
        return {"text.model": self.model}

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin or end marks. The empty text gives no ids."""
        return self._processor.EncodeAsIds(clean_text(text))

    def sample(self, text: str, dropout: float, seed: int) -> list[int]:
        """Ids of a text as `encode`, but each merge is left out with this probability, drawn from the seed.

        BPE-dropout (Provilkov et al. 2020, arXiv 1910.13267), by SentencePiece's sampling; for BPE models only.
        """
        assert self.is_bpe
        sentencepiece.set_random_generator_seed(seed)
        return self._processor.EncodeAsIds(clean_text(text), enable_sampling=True, alpha=dropout, nbest_size=-1)

    @property
    def is_bpe(self) -> bool:
        """Whether the ids come from merges, and not from the likeliest split (unigram)."""
        return ModelProto.FromString(self.model).trainer_spec.model_type == TrainerSpec.BPE

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        return self._processor.DecodeIds([int(i) for i in ids])
