"""From a prompt to pictures, by part: the first image, and what scoring adds to the drawing of candidates."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from vqt2i.errors import ConfigError
from vqt2i.generation.decode import Job, decode_image_ids
from vqt2i.generation.engine import Engine
from vqt2i.generation.pipeline import TextToImage
from vqt2i.generation.rerank import caption_scores, clip_scores
from vqt2i.gpt import GPT, GPTConfig, SequenceLayout
from vqt2i.gpt.sequence import Sequences
from vqt2i.text import TextBatch
from vqt2i.training.compare import time_in_turns
from vqt2i.training.decoding.contestants import DecodingPrecision, made_or_said, our_drawing, random_gpt
from vqt2i.training.decoding.records import Parts
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig


def picture_parts(
    config: GPTConfig, vq_config: ImageTokenizerConfig, precisions: Sequence[DecodingPrecision],
    engines: Sequence[str], *,
    counts: Sequence[int], n_rounds: int, device: torch.device,
) -> Iterator[list[Parts]]:  # fmt: skip
    """Time the parts of guided candidates of one text: the text read, all tokens drawn (reading included), images
    decoded in fp32, captions scored. Weights are random.

    Raises:
        ConfigError: the grids of the two differ.
    """
    layout = config.layout
    theirs, own = ((c.grid_height, c.grid_width) for c in (vq_config, layout))
    if theirs != own:
        raise ConfigError(f"the image tokenizer has a grid of {theirs[0]} x {theirs[1]} ids, the GPT one of "
                          f"{own[0]} x {own[1]}; give --tokenizer FILE of its grid")  # fmt: skip
    with device:
        vq = ImageTokenizer(vq_config).eval()
        text = TextBatch(torch.zeros(1, layout.text_length, dtype=torch.long), torch.full((1,), layout.text_length))
    prefix = SequenceLayout(layout).text_prefix(text)
    gpt = random_gpt(config, device)
    for precision in precisions:
        for name in engines:
            engine = Engine(name, precision, device)
            if made_or_said(f"{name} in {precision}", partial(engine.gpt, gpt)) is None:
                continue
            for n_images in counts:
                seconds = _time(_jobs(engine, gpt, vq, prefix, n_images), n_rounds, device)
                yield [Parts(contestant=name, precision=precision, n_images=n_images, seconds=seconds)]


def _jobs(engine: Engine, gpt: GPT, vq: ImageTokenizer, prefix: Sequences, n_images: int) -> dict[str, Callable]:
    layout = gpt.layout.config
    n_ids = min(vq.config.vocab_size, layout.n_image_ids)
    codes_BHW = torch.randint(n_ids, (n_images, layout.grid_height, layout.grid_width), device=gpt.device)
    texts = [(0,) * layout.text_length] * n_images
    return {
        "text read": lambda: engine.gpt(gpt).prefill(prefix),
        "tokens": our_drawing(engine, gpt, n_images, guided=True),
        "images decoded": lambda: vq.decode(codes_BHW),
        "captions scored": lambda: caption_scores(engine.gpt(gpt), codes_BHW, texts),
    }


@torch.inference_mode()
def _time(jobs: dict[str, Callable], n_rounds: int, device: torch.device) -> dict[str, list[float]]:
    return {part: timing.seconds for part, timing in time_in_turns(jobs, n_rounds, device).items()}


def rerank_parts(pipeline: TextToImage, *, n_images: int, n_rounds: int) -> Iterator[list[Parts]]:
    """Time candidates of one prompt drawn and decoded, unscored and scored, and the parts of both.

    The prompt is the first example of the pipeline.
    """
    prompt = (pipeline.config.example_prompts or ("",))[0]
    text = tuple(pipeline.text.encode(prompt))
    candidates, sampling = [Job(text, 0, i) for i in range(n_images)], pipeline.config.sampling
    engine, gpt, device, texts = pipeline.engine, pipeline.gpt, pipeline.gpt.device, [text] * n_images

    def draw() -> torch.Tensor:
        return decode_image_ids(gpt, candidates, sampling, seed=0, start=engine.start(gpt, n_images))

    ids_BHW = draw()
    jobs = {
        "unscored": lambda: pipeline.candidates(prompt, n_images, scored=False),
        "scored": lambda: pipeline.candidates(prompt, n_images),
        "tokens": draw,
        "images decoded": lambda: pipeline.vq.decode(ids_BHW.to(device)),
        "captions scored": lambda: caption_scores(engine.gpt(gpt), ids_BHW, texts),
    }
    if pipeline.clip is not None:
        size = pipeline.clip.config.image_size_px
        images_B3HW = torch.rand(n_images, 3, size, size) * 2 - 1
        read = [pipeline.clip_text.encode(prompt)] * n_images
        jobs["scored by CLIP"] = lambda: clip_scores(engine.clip(pipeline.clip), images_B3HW, read)
    seconds = _time(jobs, n_rounds, device)
    yield [Parts(contestant="pipeline", precision=engine.precision, n_images=n_images, seconds=seconds)]
