"""`TextToImage`: a pipeline folder, loaded; prompts in, ranked pictures out."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vqt2i.checkpoint import read_card
from vqt2i.clip import CLIP, Prior
from vqt2i.config import load_config
from vqt2i.data.images import to_tensor, to_uint8
from vqt2i.errors import PromptError, ResourceError
from vqt2i.generation.captions import (
    BeamConfig,
    DrawConfig,
    ImageCaption,
    caption_images,
    require_reads_images,
    reversed_share_of,
)
from vqt2i.generation.decode import Job, decode_image_ids
from vqt2i.generation.drawing import Asked, Drawing
from vqt2i.generation.edit import Change, Paste, Vary, fit_grid, fix_kept, open_canvas, paste, pixels_of, varied_cells
from vqt2i.generation.engine import Engine, EngineName, PrecisionName
from vqt2i.generation.finish import Finisher
from vqt2i.generation.memory import (
    FINISHED_AT_ONCE,
    ROWS_AT_ONCE,
    decoding_needs,
    gigabytes,
    room_on,
    weight_bytes,
)
from vqt2i.generation.parts import PIPELINE, PipelineConfig, load_parts, pipeline_folders
from vqt2i.generation.prompts import Picture
from vqt2i.generation.reading import Prompt, PromptReader
from vqt2i.generation.rerank import EditScorer, Scorer
from vqt2i.generation.rows import Mixed
from vqt2i.generation.samples import Mix, Preview, Sample
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.generation.upscale import Small, require_upscalable, require_upscaler, upscale_ids
from vqt2i.gpt import GPT, Condition
from vqt2i.runtime import pick_device
from vqt2i.text import TextTokenizer, clean_text
from vqt2i.text.encoder import TextEncoder
from vqt2i.vq import AnyImageTokenizer

Offload = Literal["auto", "never", "always"]


def n_candidates(n: int, rerank: int | None) -> int:
    """How many pictures are drawn for `n` of them: `rerank`, or just `n`.

    Raises:
        PromptError: numbers that make no sense.
    """
    count = n if rerank is None else rerank
    if min(n, count) < 1:
        raise PromptError(f"number of pictures: found {min(n, count)}, expected 1 or more")
    if count < n:
        raise PromptError(f"n is {n}, but only {rerank} candidates are drawn; ask for rerank >= n")
    return count


class TextToImage:
    """The parts and how to sample from them. `clip` and `prior` may be None.

    Attributes:
        memory: bytes that weights and drawing may take of the GPT's device; None is what is free.
        away: those of `vq` and `clip` that are on the CPU and come to that device only while they work.
    """

    def __init__(
        self,
        text: TextTokenizer | None,
        vq: AnyImageTokenizer,
        gpt: GPT,
        clip: CLIP | None,
        config: PipelineConfig,
        engine: Engine | None = None,
        clip_text: TextTokenizer | None = None,
        prior: Prior | None = None,
        encoder: TextEncoder | None = None,
    ) -> None:
        """
        Args:
            engine: None is what `Engine` chooses where the GPT is.
            clip_text: the tokenizer that `clip` reads; None is `text`.
            prior, encoder: stay on the CPU, a prompt is read once.
        """
        self.clip_text, self.prior, self.encoder = clip_text or text, prior, encoder
        self.text, self.vq, self.gpt, self.clip, self.config = text, vq, gpt, clip, config
        self.engine = engine or Engine("auto", "auto", gpt.device)
        self.memory: int | None = None
        self.away: tuple[nn.Module, ...] = ()
        self.gpt_folder: Path | None = None  # where it was loaded from: its card says what it was trained on

    @classmethod
    def load(
        cls,
        folder: Path | str,
        device: str = "auto",
        *,
        engine: EngineName = "auto",
        precision: PrecisionName = "auto",
        memory_gb: float | None = None,
        offload: Offload = "auto",
    ) -> "TextToImage":
        """Load a pipeline folder: `text/`, `vq/`, `gpt/`, `clip/` and `prior/` (both optional) and `pipeline.yaml`.

        Args:
            engine: how the GPT decodes, which changes its speed only; "auto" is what ends a job soonest.
            precision: of the GPT's products; lower ones are faster and draw other pictures. "auto" is fp32 on CPUs.
            memory_gb: the most that weights and drawing may take of the device; None is four fifths of what is free.
            offload: whether image tokenizer and scorer wait on the CPU while the GPT draws. "auto": where a full batch
                would not fit beside them.

        Raises:
            CheckpointError: a part is missing or damaged, or does not belong with the others.
            ConfigError: no engine or precision of this name, or not on this device.
        """
        folders = pipeline_folders(Path(folder))
        config = load_config(PipelineConfig, Path(folder) / PIPELINE)
        placement = {"engine": engine, "precision": precision, "memory_gb": memory_gb, "offload": offload}
        return cls.from_parts(folders, config, device, **placement)

    @classmethod
    def from_parts(
        cls,
        folders: dict[str, Path | None],
        config: PipelineConfig,
        device: str = "auto",
        *,
        engine: EngineName = "auto",
        precision: PrecisionName = "auto",
        memory_gb: float | None = None,
        offload: Offload = "auto",
    ) -> "TextToImage":
        """Load parts from a folder each (see `load_parts`) and check that they belong together; see `load`."""
        parts = load_parts(folders)
        place = pick_device(device)
        pipeline = cls(
            parts.text, parts.vq, parts.gpt, parts.clip, config, Engine(engine, precision, place), parts.clip_text,
            parts.prior, parts.encoder,
        )  # fmt: skip
        pipeline.gpt_folder = folders["gpt"]
        pipeline.place(place, None if memory_gb is None else int(memory_gb * 1e9), offload)
        return pipeline

    def place(self, device: torch.device, memory: int | None = None, offload: Offload = "auto") -> None:
        """Move the parts to `device`, but those that are to wait on the CPU; see `load`. memory: in bytes.

        Raises:
            ResourceError: the GPT itself is more than fits.
        """
        self.memory, weights = memory, weight_bytes(self.gpt, self.vq, self.clip)
        if device.type != "cpu":
            room, needed = room_on(device, 0, memory), weight_bytes(self.gpt)
            if needed > room:
                raise ResourceError(f"the GPT's weights need {gigabytes(needed)}, {gigabytes(room)} are free on "
                                    f"{device}; free some, allow more (--memory), or take another device")  # fmt: skip
            batch = decoding_needs(self.gpt, self.config.sampling, count=1).of(ROWS_AT_ONCE)
            crowded = weights + batch > room
        else:
            crowded = False  # away is where they are
        parts = [part for part in (self.vq, self.clip) if part is not None]
        self.away = tuple(parts) if offload == "always" or (offload == "auto" and crowded) else ()
        for part in (self.gpt, *parts):
            part.to("cpu" if part in self.away else device)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Content hash of each part."""
        parts = {"text": self.encoder or self.text, "vq": self.vq, "gpt": self.gpt, "clip": self.clip,
                 "prior": self.prior}  # fmt: skip
        return {name: part.fingerprint for name, part in parts.items() if part is not None}

    @property
    def reads_images(self) -> bool:
        """Whether the GPT was trained to predict texts from images, by its card where it has one."""
        card = read_card(self.gpt_folder) if self.gpt_folder else {}
        return self.gpt.layout.has_both_orders and reversed_share_of(card) != 0

    @property
    def default_scorer(self) -> Scorer:
        """What ranks candidates where nothing else is said."""
        if not self.reads_images:
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
        negative: str | None = None,
        mix: Mix | None = None,
        seed: int = 0,
        on_token: Callable[[int], None] | None = None,
        on_preview: Callable[[Preview], None] | None = None,
    ) -> list[Sample]:
        """The best `n` pictures of each prompt, prompt by prompt, best first.

        Equal arguments give equal pictures.

        Args:
            prompts: what to draw, in any language; a single string is one prompt. A picture where the GPT reads
                embeddings: variations of it. The name of a class where it reads labels (its number where they have no
                names), "" for none of them or where it reads nothing.
            rerank: candidates drawn per prompt and scored; None draws just `n` and scores nothing.
            scorer: what ranks them; None is "both" where the pipeline has a CLIP, else "caption"; "clip" where the GPT
                reads no text.
            sampling: guidance, temperature and so on; None is the pipeline's own.
            negative: what guidance leads away from; None is the null condition, of no text.
            mix: a second text that the pictures show something of too.
            on_token: called after each decoding step with the number of tokens that were drawn.
            on_preview: called after each decoding step with a `Preview`; it costs something where its images are asked
                for, which need not be at every step.

        Raises:
            PromptError: numbers out of range, a scorer that the pipeline does not have, a prompt of a kind that its GPT
                does not read, or a negative or mixed-in text that could not be read to its end or by nothing.
        """
        groups = self.stream(
            prompts, n_candidates(n, rerank), scorer=scorer, scored=rerank is not None,
            sampling=sampling, negative=negative, mix=mix, seed=seed, on_token=on_token, on_preview=on_preview,
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
        indices: Sequence[int] | None = None,
        scorer: Scorer | None = None,
        scored: bool = True,
        sampling: SamplingConfig | None = None,
        negative: str | None = None,
        mix: Mix | None = None,
        seed: int = 0,
        on_token: Callable[[int], None] | None = None,
        on_preview: Callable[[Preview], None] | None = None,
    ) -> Iterator[list[Sample]]:
        """All `count` pictures of each prompt, as they are drawn: ranked best first if `scored`, else in drawing order.

        Batches are full whatever `count` is, and as large as memory lets them be, up to ROWS_AT_ONCE images; a prompt
        comes as soon as its last picture is there. However many prompts there are, one batch of pictures is held at
        once, or one prompt's. A picture depends on the seed, its prompt's index and its own only, and its scores
        on those of its prompt, so that drawing may go on at any prompt, and in several processes.

        Args:
            indices: of the prompts to draw, in this order; None is all.
            on_token: see `generate`; called with a negative number where a batch is drawn again in smaller ones.

        Raises:
            PromptError: at the call, before anything is drawn, for what `generate` raises it.
            ResourceError: at the call, too little memory for a single image; later, what was free then is gone.
        """
        if count < 1:
            raise PromptError(f"number of pictures: found {count}, expected 1 or more")
        prompts = [prompts] if isinstance(prompts, str | Picture) else prompts
        prompts = [clean_text(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        for prompt in prompts:
            self._reader.require_readable(prompt)
        scorer = scorer or self.default_scorer
        if scorer not in get_args(Scorer):
            raise PromptError(f"scorer: found {scorer!r}, expected one of {', '.join(get_args(Scorer))}")
        if scored and scorer != "clip" and not self.reads_images:
            raise PromptError(f"scorer {scorer!r}: this GPT predicts no text from an image; use the scorer 'clip'")
        if scored and scorer != "caption" and self.clip is None:
            or_else = ", or use the scorer 'caption'" if self.reads_images else " and give it by --clip"
            raise PromptError(f"scorer {scorer!r}: this pipeline has no CLIP; train one with tools/train_clip.py"
                              f"{or_else}")  # fmt: skip
        sampling = sampling or self.config.sampling
        beside = self._beside(negative, mix, sampling)
        asked = Asked(prompts, count, scorer if scored else None, sampling, *beside, mix, seed)
        indices = range(len(prompts)) if indices is None else indices
        return Drawing(self._finisher, asked, self.memory).groups(indices, on_token, on_preview)

    @property
    def _reader(self) -> PromptReader:
        size_px = self.vq.config.image_size_px
        return PromptReader(self.text, self.gpt, self.clip, size_px, self.clip_text, self.prior, self.encoder)

    @property
    def _finisher(self) -> Finisher:
        return Finisher(self.gpt, self.vq, self.clip, self.text, self._reader, self.engine, self.away)

    def _beside(
        self, negative: str | None, mix: Mix | None, sampling: SamplingConfig
    ) -> tuple[Condition | None, Mixed | None]:
        read = self._reader.condition
        for text in filter(None, (negative, mix and mix.text)):
            self._reader.require_readable(clean_text(text))
        led_from = read(self._negative(negative, sampling)) if negative else None
        if mix and not 0 < mix.share < 1:
            raise PromptError(f"share of {mix.text[:40]!r}: found {mix.share:g}, expected more than 0 and less than 1")
        return led_from, Mixed(read(self._whole("mixed-in text", mix.text)), mix.share) if mix else None

    def _negative(self, text: str, sampling: SamplingConfig) -> str:
        """A negative prompt as it is read. Raises PromptError where nothing would read all of it."""
        whole = self._whole("negative prompt", text)
        if not sampling.guided_tokens(self.gpt.layout.image_length):
            start, end = sampling.guidance_interval
            raise PromptError(f"negative prompt {text[:40]!r}: guidance {sampling.guidance:g} from {start:g} to "
                              f"{end:g} of an image acts on no token, so nothing would read it; expected a guidance "
                              "other than 1")  # fmt: skip
        return whole

    def _whole(self, what: str, text: str) -> str:
        """A text that all prompts share, as it is read, which is worth a complaint where it is too long."""
        text, reader = clean_text(text), self._reader
        if n_unread := reader.n_unread(text):
            limit = reader.most_ids
            raise PromptError(f"{what} {text[:40]!r}: {limit + n_unread} ids, the model reads {limit}; expected a "
                              "shorter one")  # fmt: skip
        return text

    def caption(
        self,
        images: Sequence[np.ndarray | Image.Image],
        *,
        n: int = 1,
        how: BeamConfig | DrawConfig | None = None,
        seed: int = 0,
    ) -> list[list[ImageCaption]]:
        """The best `n` texts of each image, best first; several images are read together.

        Args:
            images: uint8 (height, width, 3), or as Pillow has them; cropped and resized as for training.
            how: by a beam search (None: with its defaults), or drawn from `seed`.

        Raises:
            PromptError: a number out of range. DataError: not an image. CheckpointError: the GPT never learned to.
        """
        if self.gpt_folder is not None:
            require_reads_images(self.gpt_folder, read_card(self.gpt_folder))
        with self._finisher.at_work(self.vq):
            return caption_images(self.text, self.vq, self.gpt, images, n=n, how=how or BeamConfig(), seed=seed)

    def with_grid(self, rows: int, columns: int) -> "TextToImage":
        """The same parts for images of so many rows and columns of cells; only what no training has seen is new.

        Raises:
            ConfigError: the GPT's positions have no place for such a grid.
        """
        other = copy.copy(self)
        other.gpt = self.gpt.with_grid(rows, columns * self.vq.config.ids_per_cell)
        return other

    def upscale(
        self,
        pictures: Sequence[Sample | Image.Image | np.ndarray],
        prompts: str | Sequence[str] | None = None,
        *,
        n: int = 1,
        sampling: SamplingConfig | None = None,
        negative: str | None = None,
        seed: int = 0,
        on_progress: Callable[[float], None] | None = None,
    ) -> list[Sample]:
        """`n` pictures of twice the height and width of each, picture by picture, by a GPT for super-resolution.

        Each depends on its picture, prompt and indices, and the seed; not on what is drawn beside it.

        Args:
            pictures: samples are drawn from their own ids, which must be of the same image tokenizer (else give them
                `image_ids` of it), and keep their indices and scores. Images have sides that a cell divides, no smaller
                than what a window is drawn from; uint8 (height, width, 3) or Pillow's.
            prompts: what they show, one for all or one for each; None is a sample's own, and for images the empty one.
            on_progress: called after each step with how much was drawn in it, in pictures.

        Raises:
            DataError: not a picture, or one of other sides.
            PromptError: numbers out of range, another number of prompts than of pictures, a negative prompt that could
                not be read to its end or by nothing, or a GPT that does not upscale.
        """
        require_upscaler(self.gpt)
        n, sampling = n_candidates(n, None), sampling or self.config.sampling
        led_from = tuple(self.text.encode(self._negative(negative, sampling))) if negative else None
        texts = [prompts] * len(pictures) if prompts is None or isinstance(prompts, str) else prompts
        if len(texts) != len(pictures):
            raise PromptError(f"{len(texts)} prompts for {len(pictures)} pictures: expected one for all or for each")
        given = [self._given(picture, at, texts[at]) for at, picture in enumerate(pictures)]
        wanted = [replace(s, image_index=n * s.image_index + i, seed=seed) for s in given for i in range(n)]
        ids = upscale_ids(
            self.engine.gpt(self.gpt), [self._small(sample, led_from) for sample in wanted], sampling, seed,
            ids_per_cell=self.vq.config.ids_per_cell, start=self.engine.start(self.gpt, len(wanted)),
            on_progress=on_progress,
        )  # fmt: skip
        finisher = self._finisher
        with finisher.at_work(self.vq):
            return [
                replace(s, image_HW3=to_uint8(finisher.decode(ids_HW[None], 1))[0], image_ids_HW=ids_HW.numpy())
                for s, ids_HW in zip(wanted, ids, strict=True)
            ]

    def _given(self, picture: Sample | Image.Image | np.ndarray, index: int, prompt: str | None) -> Sample:
        """A picture that is to be drawn larger, with its ids."""
        cell_px, per_cell = self.vq.config.downsample, self.vq.config.ids_per_cell
        if isinstance(picture, Sample):
            rows, columns = picture.image_ids_HW.shape
            require_upscalable(rows * cell_px, columns // per_cell * cell_px, self.gpt, self.vq)
            return picture if prompt is None else replace(picture, prompt=clean_text(prompt))
        image_HW3, prompt = pixels_of(picture), clean_text(prompt or "")
        require_upscalable(*image_HW3.shape[:2], self.gpt, self.vq)
        ids_HW = self.image_ids(image_HW3).numpy()
        return Sample(prompt, index, 0, 0, image_HW3, ids_HW, self._reader.n_unread(prompt))

    def _small(self, sample: Sample, negative: tuple[int, ...] | None) -> Small:
        text = tuple(self.text.encode(sample.prompt))
        ids_HW = torch.from_numpy(sample.image_ids_HW)
        return Small(ids_HW, text, sample.prompt_index, sample.image_index, negative)

    def edit(
        self,
        image: Image.Image | np.ndarray,
        prompt: str,
        change: Change,
        *,
        n: int = 1,
        rerank: int | None = None,
        scorer: EditScorer = "likelihood",
        sampling: SamplingConfig | None = None,
        negative: str | None = None,
        pasted: Paste | None = None,
        seed: int = 0,
        on_token: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        """The best `n` pictures in which what `change` says is drawn anew, best first.

        Args:
            image: a picture of the shape of the model's grid, of any size; uint8 (height, width, 3) or Pillow's.
            prompt: what the whole picture is to show.
            rerank: candidates drawn and scored; None draws just `n` and scores nothing.
            scorer: what ranks them; "all" is the likelihood of the whole picture, CLIP (where there is one) and the
                caption score together.
            pasted: how the given pixels come into the pictures; None leaves the model's own of the size that it draws.

        Raises:
            DataError: not a picture, a mask of another size, or a picture of another shape than the grid.
            PromptError: for what `generate` raises it, and for a change that is not one of this picture.
        """
        count = n_candidates(n, rerank)
        if scorer not in get_args(EditScorer):
            raise PromptError(f"scorer: found {scorer!r}, expected one of {', '.join(get_args(EditScorer))}")
        if rerank and scorer in ("clip", "both") and self.clip is None:
            raise PromptError(f"scorer {scorer!r}: this pipeline has no CLIP; use the scorer 'likelihood' or 'caption'")
        if rerank and scorer in ("caption", "both") and not self.reads_images:
            raise PromptError(f"scorer {scorer!r}: this GPT predicts no text from an image; use the scorer "
                              "'likelihood' or 'clip'")  # fmt: skip
        if pasted and pasted.feather_px < 0:
            raise PromptError(f"feather of {pasted.feather_px} pixels: expected 0 or more")
        if pasted and isinstance(change, Vary):
            raise PromptError("a variation keeps cells here and there and no region of pixels; nothing can be pasted")
        sampling, prompt = sampling or self.config.sampling, clean_text(prompt)
        self._reader.require_readable(prompt)
        led_from, _ = self._beside(negative, None, sampling)
        canvas, condition = open_canvas(image, change), self._reader.condition(prompt)
        kept_ids_HW = self._encode(canvas.image_HW3)
        cells = kept_ids_HW.shape[0], kept_ids_HW.shape[1] // self.vq.config.ids_per_cell
        jobs = []
        for index in range(count):
            varied = isinstance(change, Vary)
            redrawn_YX = varied_cells(change.share, *cells, seed, index) if varied else canvas.redrawn_cells(*cells)
            jobs.append(Job(condition, 0, index, led_from, fixed=fix_kept(kept_ids_HW, redrawn_YX)))
        n_passes: dict[Job, int] = {}
        ids_BHW = decode_image_ids(
            self.engine.gpt(self.gpt), jobs, sampling, seed, start=self.engine.start(self.gpt, count),
            on_token=on_token, on_passes=n_passes.__setitem__,
        )  # fmt: skip
        finisher = self._finisher
        with finisher.at_work(self.vq, self.clip):
            image_B3HW = finisher.decode(ids_BHW, FINISHED_AT_ONCE)
            scores = finisher.score_edits(scorer, image_B3HW, ids_BHW, prompt, self.default_scorer) if rerank else {}
        n_truncated = self._reader.n_unread(prompt)
        samples = [
            Sample(
                prompt, 0, job.image_index, seed, paste(canvas, picture_HW3, pasted) if pasted else picture_HW3.copy(),
                ids_HW.numpy().copy(), n_truncated,
                {name: float(values[job.image_index]) for name, values in scores.items()}, n_passes[job],
            )
            for job, picture_HW3, ids_HW in zip(jobs, to_uint8(image_B3HW), ids_BHW, strict=True)
        ]  # fmt: skip
        return sorted(samples, key=lambda s: -s.scores[scorer])[:n] if rerank else samples

    def _encode(self, image_HW3: np.ndarray) -> Tensor:
        """The ids of a picture of the shape of the GPT's grid, (grid height, grid width) on the CPU."""
        layout, vq = self.gpt.layout.config, self.vq.config
        columns = layout.grid_width // vq.ids_per_cell
        return self.image_ids(fit_grid(image_HW3, layout.grid_height, columns, vq.downsample))

    @torch.inference_mode()
    def image_ids(self, image_HW3: np.ndarray) -> Tensor:
        """The image tokenizer's ids of a picture, (grid height, grid width) on the CPU.

        Raises:
            DataError: its sides are not made of whole cells.
        """
        with self._finisher.at_work(self.vq):
            return self.vq.encode(to_tensor(image_HW3)[None].to(self.gpt.device))[0].cpu()
