"""`TextToImage`: a pipeline folder, loaded; prompts in, ranked pictures out.

B batch, E width of a scorer's embeddings
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqt2i.checkpoint import load_model, require_same
from vqt2i.clip import CLIP
from vqt2i.clip.huggingface import load_scorer
from vqt2i.config import Config, load_config
from vqt2i.data.images import png_bytes, to_uint8
from vqt2i.errors import CheckpointError, PromptError
from vqt2i.generation.decode import Job, decode_image_ids
from vqt2i.generation.prompts import Picture
from vqt2i.generation.reading import Prompt, PromptReader, reads_embeddings
from vqt2i.generation.rerank import Scorer, caption_scores, clip_scores, combine
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import GPT, GPTConfig
from vqt2i.runtime import pick_device
from vqt2i.text import TextTokenizer, clean_text, load_tokenizer
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig

PARTS = ("text", "vq", "gpt", "clip")
PIPELINE = "pipeline.yaml"
ROWS_AT_ONCE = 64  # images decoded or scored together: bounds the memory, changes no result
GREY = 128


class PipelineConfig(Config):
    """`pipeline.yaml`: sampling defaults and prompts that show what the pipeline can do."""

    sampling: SamplingConfig = SamplingConfig()
    example_prompts: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture with what made it; notebooks show it as a picture.

    image_HW3: uint8 RGB. image_ids_HW: its codes. scores: by scorer, higher is better; empty if nothing was scored.
    n_truncated: prompt ids that the model could not read.
    """

    prompt: str
    prompt_index: int
    image_index: int
    seed: int
    image_HW3: np.ndarray = field(repr=False)
    image_ids_HW: np.ndarray = field(repr=False)
    n_truncated: int = 0
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def image(self) -> Image.Image:
        """The picture as Pillow has it: `sample.image.save("red.png")`."""
        return Image.fromarray(self.image_HW3)

    def _repr_png_(self) -> bytes:
        return png_bytes(self.image)


class Preview(NamedTuple):
    """The images that are being drawn, as far as their tokens are.

    jobs: which images, by prompt index and image index. images: decodes what there is of them when it is called; uint8
    (images, height, width, 3), what is not drawn yet in GREY.
    """

    jobs: Sequence[Job]
    images: Callable[[], np.ndarray]


def pipeline_folders(folder: Path) -> dict[str, Path | None]:
    """The folder of each part of a pipeline folder; None for a scorer that it does not have.

    Raises:
        CheckpointError: `folder` is no pipeline folder.
    """
    if not (folder / PIPELINE).is_file():
        raise CheckpointError(f"{folder}: no {PIPELINE} in it; expected a pipeline folder with {', '.join(PARTS)}")
    return {part: folder / part if part != "clip" or (folder / part).is_dir() else None for part in PARTS}


class TextToImage:
    """The four parts and how to sample from them. `clip` may be None."""

    def __init__(
        self, text: TextTokenizer, vq: ImageTokenizer, gpt: GPT, clip: CLIP | None, config: PipelineConfig
    ) -> None:
        self.text, self.vq, self.gpt, self.clip, self.config = text, vq, gpt, clip, config

    @classmethod
    def load(cls, folder: Path | str, device: str = "auto") -> "TextToImage":
        """Load a pipeline folder: `text/`, `vq/`, `gpt/`, `clip/` (optional) and `pipeline.yaml`.

        Raises:
            CheckpointError: a part is missing or damaged, or does not belong with the others.
        """
        folders = pipeline_folders(Path(folder))
        return cls.from_parts(folders, load_config(PipelineConfig, Path(folder) / PIPELINE), device)

    @classmethod
    def from_parts(cls, folders: dict[str, Path | None], config: PipelineConfig, device: str = "auto") -> "TextToImage":
        """Load parts from a folder each (None for no `clip`) and check that they belong together."""
        text = load_tokenizer(folders["text"])
        vq = load_model(folders["vq"], ImageTokenizerConfig, ImageTokenizer)
        gpt = load_model(folders["gpt"], GPTConfig, GPT)
        hint = "use the parts it was trained with"
        trained = gpt.config
        if trained.text_tokenizer is not None:
            require_same(
                "text tokenizer", folders["gpt"], found=text.fingerprint, expected=trained.text_tokenizer, hint=hint
            )
        require_same(
            "image tokenizer", folders["gpt"], found=vq.fingerprint, expected=trained.image_tokenizer, hint=hint
        )
        clip = None
        if folders["clip"] is not None:
            clip = load_scorer(folders["clip"])
            require_same(
                "text tokenizer",
                folders["clip"],
                found=text.fingerprint,
                expected=clip.config.text_tokenizer,
                hint=hint,
            )
        if reads_embeddings(gpt):
            encoder = trained.condition.encoder
            if clip is None:
                raise CheckpointError(f"{folders['gpt']}: reads embeddings of the scorer {encoder[:8]}, found none; "
                                      "put that one beside it")  # fmt: skip
            require_same("scorer", folders["gpt"], found=clip.fingerprint, expected=encoder, hint=hint)
        place = pick_device(device)
        return cls(text, vq.to(place), gpt.to(place), clip.to(place) if clip else None, config)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Content hash of each part."""
        parts = {"text": self.text, "vq": self.vq, "gpt": self.gpt, "clip": self.clip}
        return {name: part.fingerprint for name, part in parts.items() if part is not None}

    @property
    def default_scorer(self) -> Scorer:
        """What ranks candidates where nothing else is said."""
        if not self.gpt.layout.reads_text:
            return "clip"
        return "both" if self.clip else "caption"

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        n: int = 1,
        rerank: int | None = None,
        scorer: Scorer | None = None,
        sampling: SamplingConfig | None = None,
        seed: int = 0,
        on_token: Callable[[int], None] | None = None,
        on_preview: Callable[[Preview], None] | None = None,
    ) -> list[Sample]:
        """The best `n` pictures of each prompt, prompt by prompt, best first.

        Equal arguments give equal pictures.

        Args:
            prompts: what to draw, in any language; a single string is one prompt. A picture where the GPT reads
                embeddings: variations of it. The number of a class where it reads labels, "" where it reads nothing.
            rerank: candidates drawn per prompt and scored; None draws just `n` and scores nothing.
            scorer: what ranks them; None is "both" where the pipeline has a CLIP, else "caption"; "clip" where the GPT
                reads no text.
            sampling: guidance, temperature and so on; None is the pipeline's own.
            on_token: called after each decoding step with the number of images that got a token.
            on_preview: called after each decoding step with a `Preview`; it costs something where its images are asked
                for, which need not be at every step.

        Raises:
            PromptError: numbers out of range, a scorer that the pipeline does not have, or a prompt of a kind that its
                GPT does not read.
        """
        if n < 1:
            raise PromptError(f"number of pictures: found {n}, expected 1 or more")
        if rerank is not None and 1 <= rerank < n:
            raise PromptError(f"n is {n}, but only {rerank} candidates are drawn; ask for rerank >= n")
        groups = self.stream(
            prompts, n if rerank is None else rerank, scorer=scorer, scored=rerank is not None,
            sampling=sampling, seed=seed, on_token=on_token, on_preview=on_preview,
        )  # fmt: skip
        return [sample for group in groups for sample in group[:n]]

    def candidates(self, prompts: Prompt | Sequence[Prompt], count: int, **options: Any) -> list[list[Sample]]:
        """What `stream` yields, as a list."""
        return list(self.stream(prompts, count, **options))

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        count: int,
        *,
        first: int = 0,
        scorer: Scorer | None = None,
        scored: bool = True,
        sampling: SamplingConfig | None = None,
        seed: int = 0,
        on_token: Callable[[int], None] | None = None,
        on_preview: Callable[[Preview], None] | None = None,
    ) -> Iterator[list[Sample]]:
        """All `count` pictures of each prompt, as they are drawn: ranked best first if `scored`, else in drawing order.

        Holds max(`count`, ROWS_AT_ONCE) pictures at once, however many prompts there are. A picture depends on the
        seed, its prompt's index and its own only, so that drawing may go on at any prompt.

        Args:
            first: index of the prompt to begin with.

        Raises:
            PromptError: at the call, before anything is drawn, for what `generate` raises it.
        """
        if count < 1:
            raise PromptError(f"number of pictures: found {count}, expected 1 or more")
        scorer = scorer or self.default_scorer
        if scorer not in get_args(Scorer):
            raise PromptError(f"scorer: found {scorer!r}, expected one of {', '.join(get_args(Scorer))}")
        if scored and scorer != "clip" and not self.gpt.layout.reads_text:
            raise PromptError(f"scorer {scorer!r}: this GPT reads no text; use the scorer 'clip'")
        if scored and scorer != "caption" and self.clip is None:
            raise PromptError(f"scorer {scorer!r}: this pipeline has no CLIP; train one with tools/train_clip.py, "
                              "or use the scorer 'caption'")  # fmt: skip
        prompts = [prompts] if isinstance(prompts, str | Picture) else prompts
        prompts = [clean_text(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        for prompt in prompts:
            self._reader.require_readable(prompt)
        at_once = max(1, ROWS_AT_ONCE // count)
        # the parts lie alike whatever the first is: in another batch a score may differ in its last bit
        starts = range(first - first % at_once, len(prompts), at_once) if first < len(prompts) else ()
        parts = (range(start, min(start + at_once, len(prompts))) for start in starts)
        draw = partial(
            self._draw, prompts, count=count, scorer=scorer if scored else None,
            sampling=sampling or self.config.sampling, seed=seed, on_token=on_token, on_preview=on_preview,
        )  # fmt: skip
        return (group for indices in parts for group in draw(indices) if group[0].prompt_index >= first)

    @property
    def _reader(self) -> PromptReader:
        return PromptReader(self.text, self.gpt, self.clip, self.vq.config.image_size_px)

    def _draw(
        self,
        prompts: Sequence[Prompt],
        indices: Sequence[int],
        *,
        count: int,
        scorer: Scorer | None,
        sampling: SamplingConfig,
        seed: int,
        on_token: Callable[[int], None] | None,
        on_preview: Callable[[Preview], None] | None,
    ) -> list[list[Sample]]:
        """The candidates of the prompts of these indices, all drawn together."""
        reader, asked = self._reader, [prompts[p] for p in indices]
        asked_BE = reader.embed(asked) if reads_embeddings(self.gpt) or scorer in ("clip", "both") else None
        conditions = zip(indices, reader.conditions(asked, asked_BE), strict=True)
        jobs = [Job(condition, p, i) for p, condition in conditions for i in range(count)]

        def on_partial(part: Sequence[Job], ids_BI: Callable[[], Tensor]) -> None:
            on_preview(Preview(part, lambda: self._decode_part(ids_BI())))

        ids_BHW = decode_image_ids(
            self.gpt, jobs, sampling, seed, on_token=on_token, on_partial=on_partial if on_preview else None
        )
        image_B3HW = self._decode(ids_BHW)
        if asked_BE is not None:
            asked_BE = asked_BE.repeat_interleave(count, dim=0)
        scores = self._score(scorer, image_B3HW, ids_BHW, jobs, asked_BE) if scorer else {}
        pictures = to_uint8(image_B3HW)
        groups = []
        for start in range(0, len(jobs), count):
            rows = slice(start, start + count)
            ranking = {name: values[rows] for name, values in scores.items()}
            if len(ranking) > 1:
                ranking["both"] = combine(ranking)
            # copies: a view would keep the pictures of the whole part for as long as one of them is kept
            prompt = asked[start // count]
            name, n_truncated = prompt if isinstance(prompt, str) else prompt.name, reader.n_unread(prompt)
            group = [
                Sample(
                    name, job.prompt_index, job.image_index, seed, pictures[row].copy(), ids_BHW[row].numpy().copy(),
                    n_truncated,
                    {name: float(values[job.image_index]) for name, values in ranking.items()},
                )
                for row, job in enumerate(jobs[rows], start)
            ]  # fmt: skip
            groups.append(sorted(group, key=lambda s: -s.scores[scorer]) if scorer else group)
        return groups

    @torch.inference_mode()
    def _decode(self, ids_BHW: Tensor) -> Tensor:
        device = next(self.vq.parameters()).device
        return torch.cat([self.vq.decode(part.to(device)).float().cpu() for part in ids_BHW.split(ROWS_AT_ONCE)])

    def _decode_part(self, ids_BI: Tensor) -> np.ndarray:
        """Pictures (B, height, width, 3) of the first ids of each image; grey where there are none yet."""
        layout, n_drawn = self.gpt.layout.config, ids_BI.shape[1]
        rows, columns = layout.grid_height, layout.grid_width
        # the rest is painted over, but the decoder mixes it into its neighbours: the last id is like them
        rest_BI = ids_BI[:, -1:].expand(-1, rows * columns - n_drawn)
        ids_BHW = torch.cat((ids_BI, rest_BI), dim=1).reshape(-1, rows, columns)
        image_BHW3 = to_uint8(self._decode(ids_BHW))
        cell_px = image_BHW3.shape[1] // rows
        missing_HW = (np.arange(rows * columns) >= n_drawn).reshape(rows, columns)
        image_BHW3[:, missing_HW.repeat(cell_px, 0).repeat(cell_px, 1)] = GREY
        return image_BHW3

    def _score(
        self,
        scorer: Scorer,
        image_B3HW: Tensor,
        ids_BHW: Tensor,
        jobs: Sequence[Job],
        asked_BE: Tensor | None,
    ) -> dict[str, Tensor]:
        scores: dict[str, list[Tensor]] = {}
        for start in range(0, len(jobs), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            if scorer in ("clip", "both"):
                scores.setdefault("clip", []).append(clip_scores(self.clip, image_B3HW[rows], asked_BE[rows]))
            if scorer in ("caption", "both"):
                texts = [job.condition for job in jobs[rows]]
                scores.setdefault("caption", []).append(caption_scores(self.gpt, ids_BHW[rows], texts))
        return {name: torch.cat(parts) for name, parts in scores.items()}
