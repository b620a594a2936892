"""Prompts from files: one on each line, or a picture."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vqt2i.data.decode import RefusedError, decode_image
from vqt2i.errors import PromptError
from vqt2i.files import sha256_of_parts

HEADER = "Prompt"


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture in place of a prompt: what is drawn are variations of it. image_HW3: uint8 RGB, cropped to a square."""

    image_HW3: np.ndarray
    name: str

    @classmethod
    def read(cls, path: Path) -> "Picture":
        """The picture in an image file; its name tells its content too.

        Raises:
            PromptError: no such file, or no image in it.
        """
        try:
            content = path.read_bytes()
            return cls(decode_image(content).image_HW3, f"{path.name} ({sha256_of_parts(content)[:8]})")
        except OSError as error:
            raise PromptError(f"{path}: cannot be read ({error.strerror}); expected an image file") from error
        except RefusedError as error:
            told = ", ".join(filter(None, (error.reason, error.detail)))
            raise PromptError(f"{path}: {told}; expected an image file") from error


def prompt_name(prompt: "str | Picture") -> str:
    """What stands for a prompt in records and labels."""
    return prompt if isinstance(prompt, str) else prompt.name


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 file, one on each line that is not blank.

    Of a table (a name that ends in .tsv, or a first line whose first column is called `Prompt`, as in PartiPrompts)
    the first column is taken as it stands, without the header.

    Raises:
        PromptError: no such file, not text, or no prompt in it.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror}); expected a file with a prompt on each line"
                          ) from error  # fmt: skip
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: byte {error.start:,} is not UTF-8; expected a text file with a prompt on each line"
                          ) from error  # fmt: skip
    if "\0" in text:
        raise PromptError(f"{path}: not text (it has zero bytes); expected UTF-8 with a prompt on each line")
    # not str.splitlines: a prompt may hold other separators that Unicode counts as line ends
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    headed = lines[0].split("\t")[0].strip() == HEADER and "\t" in lines[0]
    if headed or path.suffix.lower() == ".tsv":
        lines = [line.split("\t")[0] for line in lines]
        if lines[0].strip() == HEADER:
            del lines[0]
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise PromptError(f"{path}: no prompt in it; expected one on each line")
    return prompts
