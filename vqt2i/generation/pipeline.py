"""`TextToImage`: a pipeline folder, loaded; prompts in, ranked pictures out."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vqt2i.checkpoint import load_model, require_same
from vqt2i.clip import CLIP, CLIPConfig
from vqt2i.config import Config, load_config
from vqt2i.data.images import GREY, png_bytes, to_tensor, to_uint8
from vqt2i.errors import CheckpointError, PromptError
from vqt2i.generation.decode import Job, Start, decode_image_ids
from vqt2i.generation.edit import Change, Paste, Vary, fit_grid, fix_kept, open_canvas, paste, varied_cells
from vqt2i.generation.engine import Engine, EngineName, PrecisionName
from vqt2i.generation.rerank import EditScorer, Scorer, caption_scores, clip_scores, combine, likelihood_scores
from vqt2i.generation.rows import Mixed, TextIds
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import GPT, GPTConfig
from vqt2i.runtime import pick_device
from vqt2i.text import TextTokenizer, clean_text
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig

PARTS = ("text", "vq", "gpt", "clip")
PIPELINE = "pipeline.yaml"
ROWS_AT_ONCE = 64  # images decoded or scored together: bounds the memory, changes no result


class PipelineConfig(Config):
    """`pipeline.yaml`: sampling defaults and prompts that show what the pipeline can do."""

    sampling: SamplingConfig = SamplingConfig()
    example_prompts: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture with what made it; notebooks show it as a picture.

    image_HW3: uint8 RGB. image_ids_HW: its codes. scores: by scorer, higher is better; empty if nothing was scored.
    n_truncated: prompt ids that the model could not read. n_passes: of the GPT that it took, its prompt's included.
    """

    prompt: str
    prompt_index: int
    image_index: int
    seed: int
    image_HW3: np.ndarray = field(repr=False)
    image_ids_HW: np.ndarray = field(repr=False)
    n_truncated: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    n_passes: int = 0

    @property
    def image(self) -> Image.Image:
        """The picture as Pillow has it: `sample.image.save("red.png")`."""
        return Image.fromarray(self.image_HW3)

    def _repr_png_(self) -> bytes:
        return png_bytes(self.image)


class Mix(NamedTuple):
    """Another text that each prompt is mixed with, and its share in (0, 1).

    The prompt's logits become (1 - share) · its own + share · the text's, and its scores likewise.
    """

    text: str
    share: float


class Preview(NamedTuple):
    """The images that are being drawn, as far as their tokens are.

    jobs: which images, by prompt index and image index. images: decodes what there is of them when it is called; uint8
    (images, height, width, 3), what is not drawn yet in GREY.
    """

    jobs: Sequence[Job]
    images: Callable[[], np.ndarray]


def n_candidates(n: int, rerank: int | None) -> int:
    """How many pictures are drawn for `n` of them: `rerank`, or just `n`.

    Raises:
        PromptError: numbers that make no sense.
    """
    if n < 1:
        raise PromptError(f"number of pictures: found {n}, expected 1 or more")
    if rerank is not None and 1 <= rerank < n:
        raise PromptError(f"n is {n}, but only {rerank} candidates are drawn; ask for rerank >= n")
    return n if rerank is None else rerank


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
        self,
        text: TextTokenizer,
        vq: ImageTokenizer,
        gpt: GPT,
        clip: CLIP | None,
        config: PipelineConfig,
        engine: EngineName = "auto",
        precision: PrecisionName = "auto",
    ) -> None:
        self.text, self.vq, self.gpt, self.clip, self.config = text, vq, gpt, clip, config
        self.engine = Engine(engine, precision, gpt.device)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        device: str = "auto",
        engine: EngineName = "auto",
        precision: PrecisionName = "auto",
    ) -> "TextToImage":
        """Load a pipeline folder: `text/`, `vq/`, `gpt/`, `clip/` (optional) and `pipeline.yaml`.

        Args:
            engine: how the GPT decodes, which changes its speed only; "auto" is what ends a job soonest.
            precision: of the GPT's products; lower ones are faster and draw other pictures. "auto" is fp32 on CPUs.

        Raises:
            CheckpointError: a part is missing or damaged, or does not belong with the others.
            ConfigError: no engine or precision of this name, or not on this device.
        """
        folders = pipeline_folders(Path(folder))
        config = load_config(PipelineConfig, Path(folder) / PIPELINE)
        return cls.from_parts(folders, config, device, engine, precision)

    @classmethod
    def from_parts(
        cls,
        folders: dict[str, Path | None],
        config: PipelineConfig,
        device: str = "auto",
        engine: EngineName = "auto",
        precision: PrecisionName = "auto",
    ) -> "TextToImage":
        """Load parts from a folder each (None for no `clip`) and check that they belong together."""
        text = TextTokenizer.load(folders["text"])
        vq = load_model(folders["vq"], ImageTokenizerConfig, ImageTokenizer)
        gpt = load_model(folders["gpt"], GPTConfig, GPT)
        hint = "use the parts it was trained with"
        trained = gpt.config
        require_same(
            "text tokenizer", folders["gpt"], found=text.fingerprint, expected=trained.text_tokenizer, hint=hint
        )
        require_same(
            "image tokenizer", folders["gpt"], found=vq.fingerprint, expected=trained.image_tokenizer, hint=hint
        )
        clip = None
        if folders["clip"] is not None:
            clip = load_model(folders["clip"], CLIPConfig, CLIP)
            require_same(
                "text tokenizer",
                folders["clip"],
                found=text.fingerprint,
                expected=clip.config.text_tokenizer,
                hint=hint,
            )
        place = pick_device(device)
        return cls(text, vq.to(place), gpt.to(place), clip.to(place) if clip else None, config, engine, precision)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Content hash of each part."""
        parts = {"text": self.text, "vq": self.vq, "gpt": self.gpt, "clip": self.clip}
        return {name: part.fingerprint for name, part in parts.items() if part is not None}

    @property
    def default_scorer(self) -> Scorer:
        """What ranks candidates where nothing else is said."""
        return "both" if self.clip else "caption"

    def generate(
        self,
        prompts: str | Sequence[str],
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
            prompts: what to draw, in any language; a single string is one prompt.
            rerank: candidates drawn per prompt and scored; None draws just `n` and scores nothing.
            scorer: what ranks them; None is "both" where the pipeline has a CLIP, else "caption".
            sampling: guidance, temperature and so on; None is the pipeline's own.
            negative: what guidance leads away from; None is the null condition, of no text.
            mix: a second text that the pictures show something of too.
            on_token: called after each decoding step with the number of tokens that were drawn.
            on_preview: called after each decoding step with a `Preview`; it costs something where its images are asked
                for, which need not be at every step.

        Raises:
            PromptError: numbers out of range, a scorer that the pipeline does not have, or a negative or mixed-in text
                that could not be read to its end or by nothing.
        """
        groups = self.stream(
            prompts, n_candidates(n, rerank), scorer=scorer, scored=rerank is not None,
            sampling=sampling, negative=negative, mix=mix, seed=seed, on_token=on_token, on_preview=on_preview,
        )  # fmt: skip
        return [sample for group in groups for sample in group[:n]]

    def candidates(self, prompts: str | Sequence[str], count: int, **options: Any) -> list[list[Sample]]:
        """What `stream` yields, as a list."""
        return list(self.stream(prompts, count, **options))

    def stream(
        self,
        prompts: str | Sequence[str],
        count: int,
        *,
        first: int = 0,
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
        if scored and scorer != "caption" and self.clip is None:
            raise PromptError(f"scorer {scorer!r}: this pipeline has no CLIP; train one with tools/train_clip.py, "
                              "or use the scorer 'caption'")  # fmt: skip
        sampling = sampling or self.config.sampling
        negative_ids, mixed = self._beside(negative, mix, sampling)
        prompts = [clean_text(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        at_once = max(1, ROWS_AT_ONCE // count)
        # the parts lie alike whatever the first is: in another batch a score may differ in its last bit
        starts = range(first - first % at_once, len(prompts), at_once) if first < len(prompts) else ()
        parts = (range(start, min(start + at_once, len(prompts))) for start in starts)
        draw = partial(
            self._draw, prompts, count=count, scorer=scorer if scored else None,
            start=self.engine.start(self.gpt, count * max(0, len(prompts) - (first - first % at_once))),
            sampling=sampling, negative_ids=negative_ids, mixed=mixed, seed=seed, on_token=on_token,
            on_preview=on_preview,
        )  # fmt: skip
        return (group for indices in parts for group in draw(indices) if group[0].prompt_index >= first)

    def _beside(self, negative: str | None, mix: Mix | None, sampling: SamplingConfig) -> tuple[TextIds, Mixed | None]:
        negative_ids = self._whole("negative prompt", negative or "")
        if negative_ids and not sampling.guided_tokens(self.gpt.layout.image_length):
            start, end = sampling.guidance_interval
            raise PromptError(f"negative prompt {negative[:40]!r}: guidance {sampling.guidance:g} from {start:g} to "
                              f"{end:g} of an image acts on no token, so nothing would read it; expected a guidance "
                              "other than 1")  # fmt: skip
        if mix and not 0 < mix.share < 1:
            raise PromptError(f"share of {mix.text[:40]!r}: found {mix.share:g}, expected more than 0 and less than 1")
        return negative_ids, Mixed(self._whole("mixed-in text", mix.text), mix.share) if mix else None

    def _whole(self, what: str, text: str) -> TextIds:
        """The ids of a text that all prompts share, which is worth a complaint where it is too long."""
        ids, limit = tuple(self.text.encode(clean_text(text))), self.gpt.layout.config.text_length
        if len(ids) > limit:
            raise PromptError(f"{what} {text[:40]!r}: {len(ids)} ids, the model reads {limit}; expected a shorter one")
        return ids

    def _draw(
        self,
        prompts: Sequence[str],
        indices: Sequence[int],
        *,
        count: int,
        scorer: Scorer | None,
        start: Start,
        sampling: SamplingConfig,
        negative_ids: TextIds,
        mixed: Mixed | None,
        seed: int,
        on_token: Callable[[int], None] | None,
        on_preview: Callable[[Preview], None] | None,
    ) -> list[list[Sample]]:
        """The candidates of the prompts of these indices, all drawn together."""
        texts = {p: tuple(self.text.encode(prompts[p])) for p in indices}
        jobs = [Job(text, p, i, negative_ids, mixed) for p, text in texts.items() for i in range(count)]
        n_passes: dict[Job, int] = {}

        def on_partial(part: Sequence[Job], ids_BI: Callable[[], Tensor]) -> None:
            on_preview(Preview(part, lambda: self._decode_part(ids_BI())))

        ids_BHW = decode_image_ids(
            self.engine.gpt(self.gpt), jobs, sampling, seed, start=start, on_token=on_token,
            on_partial=on_partial if on_preview else None, on_passes=n_passes.__setitem__,
        )  # fmt: skip
        image_B3HW = self._decode(ids_BHW)
        scores = self._score(scorer, image_B3HW, ids_BHW, [job.text_ids for job in jobs]) if scorer else {}
        if scores and mixed:
            other = self._score(scorer, image_B3HW, ids_BHW, [mixed.text_ids] * len(jobs))
            scores = {name: torch.lerp(scores[name], other[name], mixed.share) for name in scores}
        pictures = to_uint8(image_B3HW)
        limit = self.gpt.layout.config.text_length
        groups = []
        for at in range(0, len(jobs), count):
            rows = slice(at, at + count)
            ranking = {name: values[rows] for name, values in scores.items()}
            if len(ranking) > 1:
                ranking["both"] = combine(ranking)
            # copies: a view would keep the pictures of the whole part for as long as one of them is kept
            group = [
                Sample(
                    prompts[job.prompt_index], job.prompt_index, job.image_index, seed, pictures[row].copy(),
                    ids_BHW[row].numpy().copy(), max(0, len(job.text_ids) - limit),
                    {name: float(values[job.image_index]) for name, values in ranking.items()}, n_passes[job],
                )
                for row, job in enumerate(jobs[rows], at)
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
        missing = (np.arange(rows * columns) >= n_drawn).reshape(rows, image_BHW3.shape[2] // cell_px, -1)
        missing_HW = missing.any(-1)  # a cell of several ids is there with the last of them
        image_BHW3[:, missing_HW.repeat(cell_px, 0).repeat(cell_px, 1)] = GREY
        return image_BHW3

    def _score(
        self,
        scorer: Scorer,
        image_B3HW: Tensor,
        ids_BHW: Tensor,
        texts: list[tuple[int, ...]],
    ) -> dict[str, Tensor]:
        scores: dict[str, list[Tensor]] = {}
        for start in range(0, len(texts), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            if scorer in ("clip", "both"):
                size, image = self.clip.config.image_size_px, image_B3HW[rows]
                if image.shape[-2:] != (size, size):
                    image = F.interpolate(image, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
                clip = self.engine.clip(self.clip)
                scores.setdefault("clip", []).append(clip_scores(clip, image, texts[rows]))
            if scorer in ("caption", "both"):
                gpt = self.engine.gpt(self.gpt)
                scores.setdefault("caption", []).append(caption_scores(gpt, ids_BHW[rows], texts[rows]))
        return {name: torch.cat(parts) for name, parts in scores.items()}

    def with_grid(self, rows: int, columns: int) -> "TextToImage":
        """The same parts for images of so many rows and columns of cells; only what no training has seen is new.

        Raises:
            ConfigError: the GPT's positions have no place for such a grid.
        """
        other = copy.copy(self)
        other.gpt = self.gpt.with_grid(rows, columns * self.vq.config.quantizer.ids_per_cell)
        return other

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
        if count < 1:
            raise PromptError(f"number of pictures: found {count}, expected 1 or more")
        if scorer not in get_args(EditScorer):
            raise PromptError(f"scorer: found {scorer!r}, expected one of {', '.join(get_args(EditScorer))}")
        if rerank and scorer in ("clip", "both") and self.clip is None:
            raise PromptError(f"scorer {scorer!r}: this pipeline has no CLIP; use the scorer 'likelihood' or 'caption'")
        if pasted and pasted.feather_px < 0:
            raise PromptError(f"feather of {pasted.feather_px} pixels: expected 0 or more")
        if pasted and isinstance(change, Vary):
            raise PromptError("a variation keeps cells here and there and no region of pixels; nothing can be pasted")
        sampling, prompt = sampling or self.config.sampling, clean_text(prompt)
        negative_ids, _ = self._beside(negative, None, sampling)
        canvas, text_ids = open_canvas(image, change), tuple(self.text.encode(prompt))
        kept_ids_HW = self._encode(canvas.image_HW3)
        cells = kept_ids_HW.shape[0], kept_ids_HW.shape[1] // self.vq.config.quantizer.ids_per_cell
        jobs = []
        for index in range(count):
            varied = isinstance(change, Vary)
            redrawn_YX = varied_cells(change.share, *cells, seed, index) if varied else canvas.redrawn_cells(*cells)
            jobs.append(Job(text_ids, 0, index, negative_ids, fixed=fix_kept(kept_ids_HW, redrawn_YX)))
        n_passes: dict[Job, int] = {}
        ids_BHW = decode_image_ids(
            self.engine.gpt(self.gpt), jobs, sampling, seed, start=self.engine.start(self.gpt, count),
            on_token=on_token, on_passes=n_passes.__setitem__,
        )  # fmt: skip
        image_B3HW = self._decode(ids_BHW)
        scores = self._score_edits(scorer, image_B3HW, ids_BHW, text_ids) if rerank else {}
        n_truncated = max(0, len(text_ids) - self.gpt.layout.config.text_length)
        samples = [
            Sample(
                prompt, 0, job.image_index, seed, paste(canvas, picture_HW3, pasted) if pasted else picture_HW3.copy(),
                ids_HW.numpy().copy(), n_truncated,
                {name: float(values[job.image_index]) for name, values in scores.items()}, n_passes[job],
            )
            for job, picture_HW3, ids_HW in zip(jobs, to_uint8(image_B3HW), ids_BHW, strict=True)
        ]  # fmt: skip
        return sorted(samples, key=lambda s: -s.scores[scorer])[:n] if rerank else samples

    @torch.inference_mode()
    def _encode(self, image_HW3: np.ndarray) -> Tensor:
        """The ids of a picture of the shape of the GPT's grid, (grid height, grid width) on the CPU."""
        layout, vq = self.gpt.layout.config, self.vq.config
        fitted_HW3 = fit_grid(
            image_HW3, layout.grid_height, layout.grid_width // vq.quantizer.ids_per_cell, vq.downsample
        )
        device = next(self.vq.parameters()).device
        return self.vq.encode(to_tensor(fitted_HW3)[None].to(device))[0].cpu()

    def _score_edits(
        self, scorer: EditScorer, image_B3HW: Tensor, ids_BHW: Tensor, text_ids: TextIds
    ) -> dict[str, Tensor]:
        scores, texts = {}, [text_ids] * len(ids_BHW)
        if scorer in ("likelihood", "all"):
            gpt, parts = self.engine.gpt(self.gpt), ids_BHW.split(ROWS_AT_ONCE)
            scores["likelihood"] = torch.cat([likelihood_scores(gpt, part, texts[: len(part)]) for part in parts])
        if scorer != "likelihood":
            scores |= self._score(self.default_scorer if scorer == "all" else scorer, image_B3HW, ids_BHW, texts)
        if len(scores) > 1:
            scores[scorer] = combine(scores)
        return scores
