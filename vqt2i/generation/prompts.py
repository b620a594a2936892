"""A file of prompts, read."""

from pathlib import Path

from vqt2i.errors import PromptError

HEADER = "Prompt"


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
