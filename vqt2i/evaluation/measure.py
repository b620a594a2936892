"""Everything that can be measured of a pipeline, as far as it is asked for, into a folder.

    result.json            each measure with its protocol (`result.py`)
    report.html            the same for people (`page.py`)
    samples/               pictures of the prompts, with every candidate's scores and values (`generation.output`)
    sweep/SETTINGS/        the same for each setting of a sweep
    reconstructions.png    pictures above what the image tokenizer makes of them

Pictures are drawn first, by all processes of the command; the first one measures them.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveInt

from vqt2i.config import Config, build_config
from vqt2i.data.images import fit_square, png_bytes, to_tensor
from vqt2i.data.shards import DataSet
from vqt2i.errors import ConfigError, DataError, PromptError, UserError
from vqt2i.evaluation.alignment import RETRIEVED_OF, Candidates, Examiner, alignment_rows, mean_rows
from vqt2i.evaluation.captions import CaptionProtocol, measure_captions, require_scenes
from vqt2i.evaluation.features import LEAST, Extractor, Features, estimate_distances
from vqt2i.evaluation.judge import Judge
from vqt2i.evaluation.memorisation import Nearest, memorisation_rows, nearest_of
from vqt2i.evaluation.page import NEAREST, PAGE, RECONSTRUCTIONS, SAMPLES, first_drawn, shown_of, write_page
from vqt2i.evaluation.prompts import KINDS, Asked, caption_prompts, drawn_prompts, listed_prompts
from vqt2i.evaluation.reconstruction import AT_ONCE, batches_of, measure_reconstruction
from vqt2i.evaluation.result import (
    RESULT,
    Measured,
    Result,
    Row,
    Where,
    differences,
    read_result,
    write_result,
)
from vqt2i.evaluation.statistics import Estimate
from vqt2i.evaluation.style import STYLE_KINDS, StyleProtocol, measure_style, n_pictures, require_style
from vqt2i.evaluation.upscaling import measure_upscaling, require_large
from vqt2i.files import require_free, sha256_of_file, sha256_of_parts, write_atomic
from vqt2i.generation import BeamConfig, Sample, SamplingConfig, TextToImage
from vqt2i.generation.filling import fill_folder
from vqt2i.generation.output import Request, read_records
from vqt2i.generation.prompts import read_prompts
from vqt2i.generation.rerank import Scorer, caption_scores, clip_scores
from vqt2i.origin import describe_origin
from vqt2i.processes import LOADING, Place, from_first
from vqt2i.runtime import counter, progress, say
from vqt2i.text import clean_text
from vqt2i.vq.lpips import LPIPS, PerceptualConfig

MeasureName = Literal[
    "reconstruction", "fidelity", "alignment", "sweep", "captions", "upscaling", "style", "memorisation"
]
MEASURES: tuple[MeasureName, ...] = get_args(MeasureName)
CAPTIONS = 1000  # prompts from captions at most, where no number is given
OF_EACH_KIND = 100  # drawn prompts, or scenes
SWEEP = {"guidance": (1.0, 2.0, 3.0, 4.0), "temperature": (0.5, 0.7, 1.0)}
COST_CANDIDATES = 16


class EvaluationConfig(Config):
    """What is to be measured, and how.

    prompts: "drawn" from the shapes, "captions" of the data set, or the path of a file. kinds: of those drawn, or of
        scenes to caption; None is all prompts, and scenes of one object. n_prompts: of each kind, or of all; None is
        what suits the source. candidates: of each prompt, ranked by `scorer`. n_images: of `split`, at most.
    inception, lpips: weight files (of LPIPS, VGG16's and its own); without Inception distances are a CLIP's.
    sweep: values of sampling settings, by name, each drawn with each.
    """

    measures: tuple[MeasureName, ...] = Field(min_length=1)
    prompts: str = "drawn"
    kinds: tuple[str, ...] | None = None
    n_prompts: PositiveInt | None = None
    candidates: PositiveInt = 16
    scorer: Scorer | None = None
    sampling: SamplingConfig
    seed: NonNegativeInt = 0
    split: str = "val"
    n_images: PositiveInt = 5000
    inception: Path | None = None
    lpips: tuple[Path, Path] | None = None
    sweep: dict[str, tuple[float, ...]] = Field(default_factory=lambda: dict(SWEEP))


class Drawn(NamedTuple):
    """A folder of pictures to measure, and how they are drawn. where: the settings of a sweep."""

    folder: Path
    sampling: SamplingConfig
    candidates: int
    where: Where


class Evaluation:
    """A pipeline with what it is measured by.

    Attributes:
        asked: the prompts; none where nothing is drawn.
        draws: the folders of pictures that are asked for.
    """

    def __init__(
        self,
        pipeline: TextToImage,
        config: EvaluationConfig,
        judge: Judge,
        data: DataSet | None,
        place: Place,
        out: Path,
    ) -> None:
        """data: None where no measure needs one.

        Raises:
            UserError: something that is asked for cannot be measured; nothing was drawn or written yet.
        """
        self.pipeline, self.config, self.judge, self.data = pipeline, config, judge, data
        self.place, self.out = place, out
        self.size_px = pipeline.vq.config.image_size_px
        if "captions" in config.measures:
            require_scenes(pipeline, self._captions)
        drawn_by = [m for m in ("alignment", "fidelity", "memorisation", "sweep") if m in config.measures]
        self._require_data(drawn_by)
        if drawn_by and pipeline.gpt.layout.is_upscaling:
            raise PromptError(f"{drawn_by[0]}: this GPT draws pictures from ones of half their size; measure upscaling")
        if "upscaling" in config.measures:
            require_large(pipeline, self.data.split(config.split), config.n_images)
        if "style" in config.measures:
            require_style(pipeline, self.data.split("train"))
        self.asked = self._read_prompts() if drawn_by else []
        self.scorer = config.scorer or pipeline.default_scorer
        self.extractor = self._open_extractor()
        self.lpips = _open_lpips(config.lpips, pipeline) if "reconstruction" in config.measures else None
        self.draws = self._plan_draws()
        self.examiner = Examiner(self.asked, judge, self.size_px, config.seed)
        if drawn_by and judge.clip is None and judge.gpt is None and not self.examiner.oracle:
            raise PromptError(f"{drawn_by[0]}: this model has no scorer and reads no text, and its prompts are not of "
                              "the shapes; give --judge MODEL")  # fmt: skip

    def _require_data(self, drawn_by: list[str]) -> None:
        config = self.config
        asks = [m for m in ("reconstruction", "fidelity", "upscaling", "style", "memorisation") if m in config.measures]
        asks += ["prompts from captions"] if drawn_by and config.prompts == "captions" else []
        if asks and self.data is None:
            raise DataError(f"{asks[0]}: needs a data set; give its folder behind the model")
        if "memorisation" in config.measures:
            self.data.split("train")  # or it is told here that there is none
        compares = {"reconstruction", "fidelity"} & set(config.measures)  # by distances between sets of pictures
        if compares and (n := min(config.n_images, len(self.data.split(config.split)))) < LEAST:
            raise DataError(f"{self.data.folder}: {n} images of split {config.split!r} are to be compared with; "
                            f"expected {LEAST} or more")  # fmt: skip

    def _read_prompts(self) -> list[Asked]:
        config, n = self.config, self.config.n_prompts
        if config.prompts == "drawn":
            asked = drawn_prompts(config.kinds or KINDS, n or OF_EACH_KIND, config.seed)
        elif config.prompts == "captions":
            asked = caption_prompts(self.data.split(config.split), n or CAPTIONS)
        else:
            asked = listed_prompts(read_prompts(Path(config.prompts))[:n])
        if "fidelity" in config.measures and len(asked) < LEAST:
            raise PromptError(f"fidelity: pictures of {len(asked)} prompts, expected {LEAST} or more")
        return [prompt._replace(text=clean_text(prompt.text)) for prompt in asked]

    def _open_extractor(self) -> Extractor | None:
        config = self.config
        if config.inception is not None:
            return Extractor.inception(config.inception, self.place.device)
        if self.judge.clip is not None:
            return Extractor.clip_tower(self.judge.clip)
        if "fidelity" in config.measures:
            raise ConfigError("fidelity: nothing to compare pictures by, for this model has no scorer; give "
                              "--inception PATH or --judge MODEL")  # fmt: skip
        return None

    def _plan_draws(self) -> list[Drawn]:
        config, draws = self.config, []
        if {"alignment", "fidelity", "memorisation"} & set(config.measures):
            draws.append(Drawn(self.out / SAMPLES, config.sampling, config.candidates, {}))
        if "sweep" in config.measures:
            for values in product(*config.sweep.values()):
                where = dict(zip(config.sweep, values, strict=True))
                sampling = build_config(SamplingConfig, config.sampling.model_dump() | where, "sweep")
                name = "-".join(f"{key}-{value:g}" for key, value in where.items())
                draws.append(Drawn(self.out / "sweep" / name, sampling, 1, where))
        return draws

    # --- drawing, by all processes ---

    def draw(self, drawn: Drawn) -> None:
        """Draw what is missing in a folder, and examine every picture."""
        texts, seed, scored = [prompt.text for prompt in self.asked], self.config.seed, drawn.candidates > 1
        settings = {
            **drawn.sampling.model_dump(), "candidates": drawn.candidates, "scorer": self.scorer if scored else None,
            "seed": seed, "precision": self.pipeline.engine.precision,
            "judge": ", ".join(f"{part} {name[:8]}" for part, name in self.judge.fingerprints.items()),
        }  # fmt: skip
        stream = partial(
            self.pipeline.stream, texts, drawn.candidates, scorer=self.scorer if scored else None, scored=scored,
            sampling=drawn.sampling, seed=seed,
        )  # fmt: skip
        label = ", ".join(f"{key} {value:g}" for key, value in drawn.where.items())
        fill_folder(
            lambda: drawn.folder, Request(texts, drawn.candidates, settings, self.pipeline.fingerprints), stream,
            self.place, count=drawn.candidates, tokens_per_image=self.pipeline.gpt.layout.image_length,
            label=f"drawing ({label})" if label else "drawing", facts_of=self._values, out=self.out,
        )  # fmt: skip

    def _values(self, group: Sequence[Sample]) -> dict[str, Any]:
        images = np.stack([sample.image_HW3 for sample in group])
        return {"values": self.examiner.examine(group[0].prompt_index, images)}

    # --- measuring, by the first process ---

    def protocol(self, measure: MeasureName) -> dict[str, Any]:
        """All that a measure depends on but for the model, as plain JSON values."""
        config, drawing = self.config, self._drawing_protocol()
        judge = {"judge": self.judge.fingerprints, "retrieved_of": RETRIEVED_OF}
        protocol = {
            "reconstruction": lambda: {
                "image_size_px": self.size_px, **self._compared_protocol(),
                "lpips": config.lpips and [sha256_of_file(path) for path in config.lpips],
            },
            "fidelity": lambda: drawing | self._compared_protocol(),
            "alignment": lambda: drawing | judge,
            "sweep": lambda: drawing | judge | {"candidates": 1, "ranked_by": None, "sweep": config.sweep}
            | (self._compared_protocol() if self.data and self.extractor else {}),
            "captions": lambda: {**asdict(self._captions), "how": self._captions.how.model_dump()},
            "upscaling": lambda: {
                **self._compared_protocol(), "sampling": config.sampling.model_dump(), "seed": config.seed,
                "image_size_px": 2 * self.size_px, "precision": self.pipeline.engine.precision,
            },
            "memorisation": lambda: drawing | {
                "data": {
                    "fingerprint": self.data.fingerprint, "trained on": "train", "held out": self._held_out,
                    "at most held out": config.n_images,
                },
                "resize": self._resize,
            },
            "style": lambda: {
                **asdict(self._style), "sampling": config.sampling.model_dump(), "pictures": self.data.fingerprint,
                "precision": self.pipeline.engine.precision,
            },
        }[measure]()  # fmt: skip
        return json.loads(json.dumps(protocol))

    def _drawing_protocol(self) -> dict[str, Any]:
        config = self.config
        source = config.prompts if config.prompts in ("drawn", "captions") else "file"
        return {
            "prompts": {
                "source": source, "n": len(self.asked),
                "fingerprint": sha256_of_parts(*(prompt.text for prompt in self.asked)),
            },
            "sampling": config.sampling.model_dump(), "candidates": config.candidates,
            "ranked_by": self.scorer if config.candidates > 1 else None, "seed": config.seed,
            "image_size_px": self.size_px, "precision": self.pipeline.engine.precision,
        }  # fmt: skip

    def _compared_protocol(self) -> dict[str, Any]:
        split = self.config.split
        return {
            "data": {
                "fingerprint": self.data.fingerprint, "split": split,
                "n": min(self.config.n_images, len(self.data.split(split))),
                "resize": self._resize,
            },
            "features": self.extractor and self.extractor.protocol,
        }  # fmt: skip

    def rows(self, measure: MeasureName) -> list[Row]:
        """Measure; the pictures are drawn."""
        return getattr(self, f"_measure_{measure}")()

    def _measure_reconstruction(self) -> list[Row]:
        n = self.protocol("reconstruction")["data"]["n"]
        with counter("reconstructing", n, unit="images") as on_images:
            found = measure_reconstruction(self.pipeline.vq, self._images(), self.extractor, self.lpips, on_images)
        strip = np.concatenate([np.concatenate(list(found.images), 1), np.concatenate(list(found.reconstructions), 1)])
        write_atomic(self.out / RECONSTRUCTIONS, png_bytes(Image.fromarray(strip)))
        return found.rows

    def _measure_fidelity(self) -> list[Row]:
        drawn = self.draws[0]
        records = read_records(drawn.folder)
        chosen = {("random", 1): [first_drawn(record) for record in records]}
        if drawn.candidates > 1:
            best = [record["candidates"][0]["file"] for record in records]
            chosen[self.scorer, drawn.candidates] = best
        rows = []
        for (ranking, k), files in chosen.items():
            where = {"chosen by": ranking, "of": k}
            rows += [Row(name, *found, where) for name, found in self._distances(drawn.folder, files).items()]
        return rows

    def _measure_alignment(self) -> list[Row]:
        drawn = self.draws[0]
        rows = alignment_rows(Candidates.from_records(self.asked, read_records(drawn.folder)))
        return rows + (self._costs() if drawn.candidates > 1 else [])

    def _measure_sweep(self) -> list[Row]:
        rows = []
        for drawn in (drawn for drawn in self.draws if drawn.where):
            records = read_records(drawn.folder)
            rows += mean_rows(Candidates.from_records(self.asked, records), drawn.where)
            if self.data and self.extractor and len(self.asked) >= LEAST:
                distances = self._distances(drawn.folder, [first_drawn(record) for record in records])
                rows += [Row(name, *found, drawn.where) for name, found in distances.items()]
        return rows

    def _measure_captions(self) -> list[Row]:
        n = len(self._captions.kinds) * self._captions.n_scenes
        with counter("captioning and judging", n, unit="pictures") as on_image:
            return measure_captions(self.pipeline, self._captions, on_image)

    def _measure_upscaling(self) -> list[Row]:
        config = self.config
        pairs = require_large(self.pipeline, self.data.split(config.split), config.n_images)
        with counter("drawing", len(pairs), unit="pictures") as on_progress:
            return measure_upscaling(self.pipeline, pairs, config.sampling, config.seed, on_progress)

    def _measure_style(self) -> list[Row]:
        total = n_pictures(self._style) * self.pipeline.gpt.layout.image_length
        with counter("drawing and judging", total, unit="tokens") as on_token:
            return measure_style(self.pipeline, self._style, self.data.split("train"), on_token)

    def _measure_memorisation(self) -> list[Row]:
        trained, drawn = self.data.split("train"), self.draws[0]
        records = read_records(drawn.folder)
        nearest = self._nearest(_pictures(drawn.folder, [record["candidates"][0]["file"] for record in records]))
        for index in shown_of(records):
            image_HW3 = fit_square(trained[int(nearest.index_N[index])].image_HW3, self.size_px)
            write_atomic(self.out / NEAREST / f"{index:06d}.png", png_bytes(Image.fromarray(image_HW3)))
        held_out = self._held_out and self._nearest(
            batches_of(self.data.split(self._held_out), self.config.n_images, self.size_px)
        )
        return memorisation_rows([prompt.text for prompt in self.asked], nearest, trained, held_out)

    def _nearest(self, images: Iterator[np.ndarray]) -> Nearest:
        trained = self.data.split("train")
        batches, n_batches = batches_of(trained, len(trained), self.size_px), -(-len(trained) // AT_ONCE)
        searched = progress(batches, "training pictures", total=n_batches, unit="batches")
        return nearest_of(np.concatenate(list(images)), searched)

    @property
    def _held_out(self) -> str | None:
        """The split whose pictures the model has not seen, if there is one."""
        name = "val" if self.config.split == "train" else self.config.split
        return name if name in self.data.spec.splits else None

    @property
    def _resize(self) -> str:
        return f"centre square, Lanczos to {self.size_px} px"

    @property
    def _style(self) -> StyleProtocol:
        config = self.config
        n_prompts = config.n_prompts or OF_EACH_KIND
        return StyleProtocol(config.kinds or STYLE_KINDS, n_prompts, config.candidates, config.seed, config.sampling)

    @property
    def _captions(self) -> CaptionProtocol:
        config = self.config
        kinds = config.kinds or ("single_seen", "single_unseen")
        return CaptionProtocol(kinds, config.n_prompts or OF_EACH_KIND, config.seed, BeamConfig())

    def _costs(self) -> list[Row]:
        """Seconds of one candidate of the first prompt: of drawing it, and of each score that ranks it."""
        pipeline, text, n = self.pipeline, self.asked[0].text, min(COST_CANDIDATES, self.config.candidates)
        steps: dict[str, Callable[[], Any]] = {"drawing": lambda: pipeline.candidates(
            [text], n, scored=False, sampling=self.config.sampling, seed=self.config.seed
        )}  # fmt: skip
        (group,) = steps["drawing"]()
        image_B3HW = to_tensor(np.stack([sample.image_HW3 for sample in group]))
        ids_BHW = torch.from_numpy(np.stack([sample.image_ids_HW for sample in group]))
        if pipeline.clip is not None:
            read = [pipeline.clip_text.encode(text)] * n
            steps["clip"] = lambda: clip_scores(pipeline.engine.clip(pipeline.clip), image_B3HW, read)
        if pipeline.reads_images:
            said = [pipeline.text.encode(text)] * n
            steps["caption"] = lambda: caption_scores(pipeline.engine.gpt(pipeline.gpt), ids_BHW, said)
        seconds = {name: min(_seconds(step) for _ in range(2)) / n for name, step in steps.items()}
        return [Row("seconds", value, None, None, n, {"step": name}) for name, value in seconds.items()]

    def _distances(self, folder: Path, files: Sequence[str]) -> dict[str, Estimate]:
        drawn = Features.joined([self.extractor(batch) for batch in _pictures(folder, files)])
        return estimate_distances(drawn, self._real, self.extractor.prefix)

    @cached_property
    def _real(self) -> Features:
        n_batches = -(-min(self.config.n_images, len(self.data.split(self.config.split))) // AT_ONCE)
        batches = progress(self._images(), "features of the data set", total=n_batches, unit="batches")
        return Features.joined([self.extractor(batch) for batch in batches])

    def _images(self) -> Iterator[np.ndarray]:
        return batches_of(self.data.split(self.config.split), self.config.n_images, self.size_px)


def evaluate(evaluation: Evaluation, name: str) -> Result | None:
    """Draw, measure and write what is asked for; returns the result in the first process, None in others.

    What stands in the folder already is kept: pictures of an equal request, and measures of equal protocols.

    Args:
        name: what the model is called.

    Raises:
        UserError: the folder holds something else, or results of another model.
    """
    out, pipeline = evaluation.out, evaluation.pipeline
    result = from_first(lambda: _open_folder(out, name, pipeline.fingerprints), LOADING)
    for drawn in evaluation.draws:
        evaluation.draw(drawn)
    if evaluation.place.rank:
        return None
    for measure in evaluation.config.measures:
        protocol, start = evaluation.protocol(measure), time.monotonic()
        if measure in result.measures and result.measures[measure].protocol == protocol:
            say(f"{measure}: is there")
            continue
        rows = evaluation.rows(measure)
        seconds = round(time.monotonic() - start, 1)
        measured = Measured(protocol=protocol, rows=tuple(rows), seconds=seconds, origin=describe_origin())
        result = result.with_measure(measure, measured)
        write_result(out, result)
    write_atomic(out / PAGE, write_page(result, out))
    return result


def _open_folder(out: Path, name: str, fingerprints: dict[str, str]) -> Result:
    if not (out / RESULT).is_file():
        require_free(out)
        result = Result(model=name, fingerprints=fingerprints)
        write_result(out, result)
        return result
    result = read_result(out)
    if other := differences(result.fingerprints, fingerprints):
        raise UserError(f"{out}: holds results of another model ({'; '.join(other)}); give another --out")
    return result


def _open_lpips(files: tuple[Path, Path] | None, pipeline: TextToImage) -> LPIPS | None:
    if files is None:
        return None
    return LPIPS(PerceptualConfig(vgg16_weights=files[0], lpips_weights=files[1])).to(pipeline.gpt.device)


def _pictures(folder: Path, files: Sequence[str]) -> Iterator[np.ndarray]:
    for start in range(0, len(files), AT_ONCE):
        images = []
        for name in files[start : start + AT_ONCE]:
            with Image.open(folder / name) as image:
                images.append(np.array(image))
        yield np.stack(images)


def _seconds(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
