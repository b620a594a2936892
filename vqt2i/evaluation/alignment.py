"""How well pictures fit their prompts: CLIP score, caption score, R-precision and, of shapes, the oracle.

Every candidate of every prompt is examined once, by itself. What reranking is worth follows from the candidates'
values and the scores that they were ranked by.

P prompts, K candidates of each, E embedding width
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqt2i.data.shapes import SIZES_PX, check
from vqt2i.data.shapes.scene import OPPOSITE
from vqt2i.evaluation.judge import Judge
from vqt2i.evaluation.prompts import Asked, groups_of
from vqt2i.evaluation.result import Row, Where
from vqt2i.evaluation.statistics import bootstrap_mean
from vqt2i.generation.rerank import combine
from vqt2i.runtime import stream_seed

RETRIEVED_OF = 100  # prompts, of which R-precision asks for a picture's own
ORACLE = ("right", "count", "colour", "shape", "size", "fill", "relation", "background")
"""What the oracle says: whether all that is stated holds and no more is there, and each kind of statement by itself."""


class Examiner:
    """Examines pictures of a list of prompts.

    Attributes:
        oracle: whether the shapes oracle judges too: all prompts are sentences of the shapes, and it can read pictures
            of this size.
    """

    def __init__(self, asked: Sequence[Asked], judge: Judge, size_px: int, seed: int) -> None:
        """size_px: of the pictures. seed: of the prompts that R-precision compares with."""
        self.asked, self.judge = asked, judge
        self.oracle = size_px in SIZES_PX and all(prompt.facts is not None for prompt in asked)
        if judge.clip is not None:
            self._text_PE = judge.embed_texts([prompt.text for prompt in asked])
            self._others = [_others(asked, p, seed) for p in range(len(asked))]

    def examine(self, prompt_index: int, image_KHW3: np.ndarray) -> dict[str, list[float]]:
        """Values of each picture of a prompt, by name; of the oracle's, those of what the prompt states."""
        asked, values = self.asked[prompt_index], {}
        if self.judge.clip is not None:
            image_KE = self.judge.embed_images(image_KHW3)
            own_K = image_KE @ self._text_PE[prompt_index]
            values["clip_score"] = own_K.tolist()
            if self._others[prompt_index]:
                values["r_precision"] = _nearest(own_K, image_KE @ self._text_PE[self._others[prompt_index]].T)
        if self.judge.gpt is not None:
            values["caption_score"] = self.judge.caption_scores(image_KHW3, asked.text).tolist()
        if self.oracle:
            verdicts = [check(image_HW3, asked.facts) for image_HW3 in image_KHW3]
            values["right"] = [float(verdict.right) for verdict in verdicts]
            stated = (part for part in ORACLE if part in verdicts[0].parts)
            values |= {part: [float(verdict.parts[part]) for verdict in verdicts] for part in stated}
        return values


def _nearest(own_K: Tensor, others_KO: Tensor) -> list[float]:
    """Whether each picture's own prompt is nearer than all others (Xu et al. 2018, arXiv 1711.10485, section 4.1)."""
    return (own_K > others_KO.amax(1)).float().tolist()


def _others(asked: Sequence[Asked], own: int, seed: int) -> list[int]:
    """RETRIEVED_OF - 1 prompts that say something else than one does, or all that there are of these."""
    rng = np.random.default_rng(stream_seed("retrieval", seed, own))
    others: dict[object, int] = {}
    for index in rng.permutation(len(asked)).tolist():
        if len(others) == RETRIEVED_OF - 1:
            break
        if _said(asked[index]) != _said(asked[own]):
            others.setdefault(_said(asked[index]), index)
    return list(others.values())


def _said(asked: Asked) -> object:
    """What is equal for prompts that say the same, of whichever object and in whichever language."""
    facts = asked.facts
    if facts is None:
        return asked.text
    if facts.relation in ("right of", "below"):
        return replace(facts, objects=facts.objects[::-1], relation=OPPOSITE[facts.relation])
    return facts if facts.relation else replace(facts, objects=tuple(sorted(facts.objects, key=repr)))


def best_of(score_PK: np.ndarray, value_PK: np.ndarray, k: int) -> np.ndarray:
    """For each prompt the value of the candidate with the best score of `k`, (P,): the mean over blocks of `k`.

    Each block is what drawing just so many would have given: a candidate is a function of the seed and its number.
    """
    blocks = score_PK.shape[1] // k * k
    score_PBk = score_PK[:, :blocks].reshape(len(score_PK), -1, k)
    value_PBk = value_PK[:, :blocks].reshape(score_PBk.shape)
    best_PB1 = score_PBk.argmax(-1)[..., None]
    return np.take_along_axis(value_PBk, best_PB1, -1).mean((1, 2))


class Candidates:
    """Values and scores of the candidates of some prompts, in the order in which they were drawn.

    values: by name (P, K), NaN where a prompt has none. scores: that candidates may be ranked by, (P, K).
    """

    def __init__(self, asked: Sequence[Asked], values: dict[str, np.ndarray], scores: dict[str, np.ndarray]) -> None:
        self.asked, self.values, self.scores = asked, values, scores

    @classmethod
    def from_records(cls, asked: Sequence[Asked], records: Sequence[dict[str, Any]]) -> "Candidates":
        """From lines of `scores.jsonl` that hold `values` in the order of their candidates."""
        orders = [np.argsort([c["index"] for c in record["candidates"]]) for record in records]
        n_each = len(orders[0])
        names = dict.fromkeys(name for record in records for name in record["values"])
        none = np.full(n_each, np.nan)
        values = {
            name: np.stack([
                np.array(record["values"][name])[order] if name in record["values"] else none
                for record, order in zip(records, orders, strict=True)
            ])
            for name in names
        }  # fmt: skip
        scores = {
            name: np.array([
                [record["candidates"][i]["scores"][name] for i in order]
                for record, order in zip(records, orders, strict=True)
            ])
            for name in records[0]["candidates"][0]["scores"]
        }  # fmt: skip
        scores.pop("both", None)  # depends on how many there are
        return cls(asked, values, scores)

    @property
    def n_each(self) -> int:
        return next(iter(self.values.values())).shape[1]

    @property
    def rankings(self) -> list[str]:
        """What the candidates may be ranked by."""
        if self.n_each == 1:
            return []
        return [*self.scores, *(["both"] if len(self.scores) > 1 else [])]

    def chosen(self, name: str, ranking: str, k: int) -> np.ndarray:
        """The value of the candidate chosen of `k`, (P,). "any": the best value that is among them."""
        value_PK = self.values[name]
        if ranking == "random":
            return value_PK.mean(1)
        if ranking == "any":
            return best_of(np.nan_to_num(value_PK), value_PK, k)
        if ranking != "both":
            return best_of(self.scores[ranking], value_PK, k)
        blocks = self.n_each // k * k
        parts = {name: torch.from_numpy(s[:, :blocks].reshape(len(s), -1, k)) for name, s in self.scores.items()}
        return best_of(combine(parts).flatten(1).numpy(), value_PK, k)


def alignment_rows(candidates: Candidates) -> list[Row]:
    """Every value by every ranking, of 1, 2, 4, ... candidates; and by groups of prompts, of all candidates."""
    rows, n = [], candidates.n_each
    for name in candidates.values:
        rankings = [*candidates.rankings, *(["any"] if n > 1 and name in ORACLE else [])]
        rows.append(_row(candidates, name, "all prompts", "random", 1))
        rows += [_row(candidates, name, "all prompts", by, k) for by in rankings for k in numbers_up_to(n)]
    told = next((name for name in ("right", "r_precision") if name in candidates.values), None)
    if told is None:
        return rows
    for group, members in _grouped(candidates.asked).items():
        part = Candidates(
            [candidates.asked[i] for i in members], {told: candidates.values[told][members]},
            {name: score_PK[members] for name, score_PK in candidates.scores.items()},
        )  # fmt: skip
        rows.append(_row(part, told, group, "random", 1))
        any_right = ["any"] if n > 1 and told in ORACLE else []
        rows += [_row(part, told, group, by, n) for by in [*candidates.rankings, *any_right]]
    return rows


def _grouped(asked: Sequence[Asked]) -> dict[str, list[int]]:
    """The prompts of each group, those of one kind of group after those of another."""
    groups: dict[str, dict[str, list[int]]] = {}
    for index, prompt in enumerate(asked):
        for key, name in groups_of(prompt).items():
            groups.setdefault(key, {}).setdefault(name, []).append(index)
    return {f"{key}: {name}": found for key, members in groups.items() for name, found in sorted(members.items())}


def numbers_up_to(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n itself."""
    powers = [2**i for i in range(n.bit_length())]
    return powers if powers[-1] == n else [*powers, n]


def _row(candidates: Candidates, name: str, group: str, ranking: str, k: int) -> Row:
    found = bootstrap_mean(candidates.chosen(name, ranking, k))
    return Row(name, *found, {"group": group, "chosen by": ranking, "of": k})


def mean_rows(candidates: Candidates, where: Where) -> list[Row]:
    """The unreranked mean of every value."""
    return [Row(name, *bootstrap_mean(value_PK.mean(1)), where) for name, value_PK in candidates.values.items()]
