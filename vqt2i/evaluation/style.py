"""How far a model has learned the style of a few pictures (`vqt2i.data.shapes.style`), measured without a model.

Every prompt is asked for in the style and without it, and is of objects that none of the pictures has: a model that
has learned the pictures by heart, or the style in everything, is found out.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vqt2i.data.shapes import LANGUAGES, Caption, Facts, at_the_beach, check, draw_prompts, without_beach
from vqt2i.data.shards import Split
from vqt2i.errors import DataError
from vqt2i.evaluation.oracle import OracleProtocol, share_of_language
from vqt2i.generation import TextToImage

Asked = Literal["style", "plain"]


@dataclass(frozen=True)
class StyleAccuracy:
    """Shares of all pictures, in [0, 1]. right: the objects and their relation are as the prompt says, and nothing else
    is there. wanted: right, and in the style exactly where the prompt asks for it; standard_error: of this one.
    """

    in_style: float
    right: float
    wanted: float
    standard_error: float


def measure_style(
    pipeline: TextToImage, protocol: OracleProtocol, pictures: Split, on_token: Any = None
) -> dict[str, dict[Asked, StyleAccuracy]]:
    """Accuracy by kind of prompt, asked for in either way; half of the prompts are English, half Chinese.

    pictures: those that the style was learned from, as `make_dataset shapes --style` makes them.

    Raises:
        DataError: the pictures do not say what is in them. PromptError: an unknown kind.
    """
    known = objects_in(pictures)
    results = {}
    for kind in protocol.kinds:
        prompts = [
            (prompt, language)
            for i, language in enumerate(LANGUAGES)
            for prompt in _new_prompts(kind, share_of_language(protocol.n_prompts, i), protocol.seed, language, known)
        ]
        results[kind] = {}
        for asked in ("style", "plain"):
            texts = [at_the_beach(p.text, language) if asked == "style" else p.text for p, language in prompts]
            groups = pipeline.candidates(
                texts, protocol.n_candidates, sampling=protocol.sampling, seed=protocol.seed, on_token=on_token
            )
            judged_NK2 = np.array([
                [_judge(sample.image_HW3, prompt.facts) for sample in group]
                for (prompt, _), group in zip(prompts, groups, strict=True)
            ])  # fmt: skip
            in_style_NK, right_NK = judged_NK2[..., 0], judged_NK2[..., 1]
            wanted_N = ((in_style_NK == (asked == "style")) & right_NK).mean(1)
            error = float(np.std(wanted_N) / len(wanted_N) ** 0.5)
            results[kind][asked] = StyleAccuracy(
                float(in_style_NK.mean()), float(right_NK.mean()), float(wanted_N.mean()), error
            )
    return results


def objects_in(pictures: Split) -> set[tuple[str, str]]:
    """Colour and shape of every object that pictures of a style show.

    Raises:
        DataError: they do not say.
    """
    stated = [pictures[index].meta.get("facts") for index in range(len(pictures))]
    try:
        facts = [Facts.from_json(value) for value in stated]
    except (TypeError, KeyError):
        raise DataError("the pictures do not say what is in them; expected those that make_dataset shapes --style "
                        "beach makes") from None  # fmt: skip
    return {(thing.colour, thing.shape) for f in facts for thing in f.objects}


def _new_prompts(kind: str, n: int, seed: int, language: str, known: set[tuple[str, str]]) -> list[Caption]:
    """The first `n` prompts of a kind that ask for no known object; fewer where that leaves too few."""
    prompts = draw_prompts(kind, 10 * n, seed, language)
    return [p for p in prompts if not any((o.colour, o.shape) in known for o in p.facts.objects)][:n]


def _judge(image_HW3: np.ndarray, facts: Facts) -> tuple[bool, bool]:
    """Whether a picture is in the style, and whether it is right."""
    plain_HW3 = without_beach(image_HW3)
    return plain_HW3 is not None, check(image_HW3 if plain_HW3 is None else plain_HW3, facts).right
