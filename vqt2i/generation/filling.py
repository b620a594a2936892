"""A folder filled with a request's pictures by all processes of a command: what `generate` and `evaluate` do alike."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from vqt2i.generation.output import OutputFolder, PreviewFile, Request, set_aside, write_group
from vqt2i.generation.samples import Sample
from vqt2i.processes import LOADING, Place, Stopped, Tally, from_first
from vqt2i.runtime import counter, say


def fill_folder(
    folder: Callable[[], Path],
    request: Request,
    stream: Callable[..., Iterator[list[Sample]]],
    place: Place,
    *,
    count: int,
    tokens_per_image: int,
    label: str = "drawing",
    preview: bool = False,
    facts_of: Callable[[Sequence[Sample]], dict[str, Any]] | None = None,
    out: Path | None = None,
) -> OutputFolder | None:
    """Draw what is missing of a request, each process its part, and return the folder in the first, None in others.

    Args:
        folder: which it is; asked in the first process only.
        stream: `TextToImage.stream` of the request, which takes `indices`, `on_token` and `on_preview`.
        count: pictures drawn of each prompt, of which the request keeps some.
        facts_of: what a prompt's record is to hold beside the scores of its pictures.
        out: the folder that the user knows, where it is not this one.

    Raises:
        UserError: what `OutputFolder` and `stream` raise, before anything is written.
    """
    outputs: OutputFolder | None = None

    def open_folder() -> tuple[Path, list[int]]:
        nonlocal outputs
        outputs = OutputFolder(folder(), request)
        return outputs.path, outputs.missing

    path, missing = from_first(open_folder, LOADING)
    n_prompts = len(request.prompts)
    on_preview = PreviewFile(path / "preview.png") if preview and outputs else None
    if outputs:
        if on_preview:
            say(f"preview: {on_preview.path}")
        if len(missing) < n_prompts:
            say(f"{path}: {n_prompts - len(missing):,} of {n_prompts:,} prompts are there")
    try:
        groups = stream(  # before anything is written: it may refuse
            indices=missing[place.rank :: place.size], on_preview=on_preview,
            on_token=lambda n_tokens: tally.add(n_tokens),
        )  # fmt: skip
        with (
            counter(label, len(missing) * count, unit="images") as advance,
            Tally(lambda n_tokens: advance(n_tokens / tokens_per_image), str(path)) as tally,
            outputs or nullcontext(),
            on_preview or nullcontext(),
        ):
            for group in groups:
                facts = facts_of(group) if facts_of else None
                tally.look()  # before the last group is there, and with it the end of the first process
                if outputs:
                    outputs.write(group, facts)
                else:
                    set_aside(path, request, group[0].prompt_index, write_group(path, request, group, facts))
            while outputs and outputs.n_done < n_prompts:
                tally.wait()
                outputs.collect()
            if outputs:
                tally.look()  # what others counted before their last groups, which are there by now
    except (KeyboardInterrupt, Stopped):
        if outputs:
            say(f"{outputs.n_drawn:,} of {n_prompts:,} prompts are in {path}; "
                f"the same command with --out {out or path} goes on")  # fmt: skip
        raise
    return outputs
