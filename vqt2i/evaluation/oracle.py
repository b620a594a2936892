"""How often a picture shows what its prompt says, judged by the shapes oracle: zero-shot, measured without a model.

Every prompt gets K candidates, once. Unreranked is the mean over all of them; reranked by a scorer is the candidate
that it ranks first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vqt2i.data.shapes import LANGUAGES, Caption, check, draw_prompts
from vqt2i.errors import PromptError
from vqt2i.evaluation.retrieval import r_precision
from vqt2i.generation import Sample, SamplingConfig, TextToImage


@dataclass(frozen=True)
class OracleProtocol:
    """What was asked for; with the models' fingerprints, all that a result depends on.

    Raises:
        PromptError: fewer prompts than languages.
    """

    kinds: tuple[str, ...]
    n_prompts: int
    n_candidates: int
    seed: int
    sampling: SamplingConfig

    def __post_init__(self) -> None:
        if self.n_prompts < len(LANGUAGES):
            raise PromptError(f"number of prompts: found {self.n_prompts}, expected at least {len(LANGUAGES)}")


def measure_oracle(pipeline: TextToImage, protocol: OracleProtocol, on_token: Any = None) -> dict[str, Any]:
    """Accuracy by kind of prompt and by scorer.

    Of the prompts of each kind, half are English and half Chinese. Returns, for each kind: `accuracy` with `random`
    (unreranked), the scorers, `any` (at least one candidate is right), each {right, colour_shape, standard_error} with
    shares in [0, 1]; and the `r_precision` of all candidates among the prompts of the kind, where there is a CLIP.

    Raises:
        PromptError: an unknown kind.
    """
    results = {}
    for kind in protocol.kinds:
        prompts = [
            prompt
            for i, language in enumerate(LANGUAGES)
            for prompt in draw_prompts(kind, share_of_language(protocol.n_prompts, i), protocol.seed, language)
        ]
        groups = pipeline.candidates(
            [prompt.text for prompt in prompts], protocol.n_candidates,
            sampling=protocol.sampling, seed=protocol.seed, on_token=on_token,
        )  # fmt: skip
        results[kind] = {"accuracy": score_groups(prompts, groups)}
        if pipeline.clip is not None:
            results[kind]["r_precision"] = r_precision(pipeline, prompts, groups)
    return results


def score_groups(prompts: Sequence[Caption], groups: Sequence[Sequence[Sample]]) -> dict[str, dict[str, float]]:
    """Accuracies of one kind of prompt from its drawn and scored candidates."""
    scorers = list(groups[0][0].scores)
    right: dict[str, list[float]] = {name: [] for name in ("random", *scorers, "any")}
    colour_shape: dict[str, list[float]] = {name: [] for name in right}
    for prompt, group in zip(prompts, groups, strict=True):
        verdicts = [check(sample.image_HW3, prompt.facts) for sample in group]
        for kept, judged in ((right, [v.right for v in verdicts]), (colour_shape, [_both(v.parts) for v in verdicts])):
            kept["random"].append(float(np.mean(judged)))
            kept["any"].append(float(any(judged)))
            for name in scorers:
                best = max(range(len(group)), key=lambda i: group[i].scores[name])
                kept[name].append(float(judged[best]))
    return {
        name: {
            "right": float(np.mean(right[name])),
            "colour_shape": float(np.mean(colour_shape[name])),
            "standard_error": float(np.std(right[name]) / len(prompts) ** 0.5),
        }
        for name in right
    }


def _both(parts: dict[str, bool]) -> bool:
    return parts["colour"] and parts["shape"]


def share_of_language(n: int, index: int) -> int:
    """How many of `n` prompts are in LANGUAGES[index]."""
    return n // len(LANGUAGES) + (index < n % len(LANGUAGES))
