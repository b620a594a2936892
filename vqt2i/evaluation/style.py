"""How far a model has learned the style of a few pictures (`vqt2i.data.shapes.style`), judged by the shapes oracle.

Every prompt is asked for in the style and without it, and is of objects that none of the pictures shows: a model that
knows the pictures by heart is found out, and so is one that draws everything in the style.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vqt2i.data.shapes import LANGUAGES, SIZES_PX, Facts, at_the_beach, check, without_beach
from vqt2i.data.shards import Split
from vqt2i.errors import DataError
from vqt2i.evaluation.prompts import Asked, drawn_prompts
from vqt2i.evaluation.result import Row
from vqt2i.evaluation.statistics import bootstrap_mean
from vqt2i.generation import SamplingConfig, TextToImage

STYLE_KINDS = ("single_seen", "single_unseen", "two_seen", "two_unseen")
_SPARE = 10  # times as many prompts are drawn, for most may be of objects in the pictures


@dataclass(frozen=True)
class StyleProtocol:
    """What was asked for. kinds: of drawn prompts, `n_prompts` of each."""

    kinds: tuple[str, ...]
    n_prompts: int
    candidates: int
    seed: int
    sampling: SamplingConfig


def measure_style(
    pipeline: TextToImage, protocol: StyleProtocol, pictures: Split, on_token: Callable[[int], None] | None = None
) -> list[Row]:
    """Shares of drawn pictures, by kind of prompt and whether it has the style's words.

    The rows: in_style; right, the objects and their relation are as the prompt says and nothing else is there; wanted,
    both right and in the style if that was asked for, and else right and not in it. Of all candidates, and what was
    wanted of the best by caption score too, where the model has one.

    Args:
        pictures: those that taught the style, as `make_dataset shapes --style` makes them.

    Raises:
        PromptError: an unknown kind, or too few prompts; and what `require_style` raises.
    """
    known = require_style(pipeline, pictures)
    asked, ranked = style_prompts(protocol, known), pipeline.gpt.layout.has_both_orders
    rows = []
    for in_words, words in ((True, "style"), (False, "plain")):
        texts = [at_the_beach(prompt.text, prompt.language) if in_words else prompt.text for prompt in asked]
        groups = pipeline.candidates(
            texts, protocol.candidates, scorer="caption" if ranked else None, scored=ranked,
            sampling=protocol.sampling, seed=protocol.seed, on_token=on_token,
        )  # fmt: skip
        judged_PK2 = np.array([
            [judge(sample.image_HW3, prompt.facts) for sample in group]
            for prompt, group in zip(asked, groups, strict=True)
        ])  # fmt: skip
        in_style_PK, right_PK = judged_PK2[..., 0], judged_PK2[..., 1]
        wanted_PK = right_PK & (in_style_PK == in_words)
        for kind in protocol.kinds:
            of_kind = [prompt.kind == kind for prompt in asked]
            where = {"prompts": kind, "words": words, "chosen by": "random", "of": 1}
            for name, value_PK in (("in_style", in_style_PK), ("right", right_PK), ("wanted", wanted_PK)):
                rows.append(Row(name, *bootstrap_mean(value_PK[of_kind].mean(1)), where))
            if ranked and protocol.candidates > 1:
                best = where | {"chosen by": "caption", "of": protocol.candidates}
                rows.append(Row("wanted", *bootstrap_mean(wanted_PK[of_kind, 0].astype(float)), best))
    return rows


def style_prompts(protocol: StyleProtocol, known: set[tuple[str, str]]) -> list[Asked]:
    """The first prompts of each kind that ask for no known object and no background, half of them Chinese."""
    prompts: list[Asked] = []
    for kind in protocol.kinds:
        drawn = drawn_prompts([kind], _SPARE * protocol.n_prompts, protocol.seed)
        suited = [
            p for p in drawn
            if not p.facts.background and not any((o.colour, o.shape) in known for o in p.facts.objects)
        ]  # fmt: skip
        for i, language in enumerate(LANGUAGES):
            share = protocol.n_prompts // len(LANGUAGES) + (i < protocol.n_prompts % len(LANGUAGES))
            prompts += [prompt for prompt in suited if prompt.language == language][:share]
    return prompts


def require_style(pipeline: TextToImage, pictures: Split) -> set[tuple[str, str]]:
    """Colour and shape of every object that pictures of a style show.

    Raises:
        DataError: they do not say, or the oracle cannot read what the model draws.
    """
    size_px = pipeline.vq.config.image_size_px
    if size_px not in SIZES_PX:
        raise DataError(f"shapes: are drawn with {', '.join(map(str, SIZES_PX))} px, the model draws {size_px} px")
    stated = [pictures[index].meta.get("facts") for index in range(len(pictures))]
    try:
        return {(thing.colour, thing.shape) for value in stated for thing in Facts.from_json(value).objects}
    except (TypeError, KeyError):
        raise DataError("style: the data set does not say what its pictures show; expected one that make_dataset "
                        "shapes --style beach has made") from None  # fmt: skip


def judge(image_HW3: np.ndarray, facts: Facts) -> tuple[bool, bool]:
    """Whether a picture is in the style, and whether what it shows is as stated."""
    plain_HW3 = without_beach(image_HW3)
    return plain_HW3 is not None, check(image_HW3 if plain_HW3 is None else plain_HW3, facts).right


def n_pictures(protocol: StyleProtocol) -> int:
    """At most so many are drawn."""
    return 2 * len(protocol.kinds) * protocol.n_prompts * protocol.candidates
