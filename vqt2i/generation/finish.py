"""From ids to pictures, and pictures to scores.

B pictures, H rows and W columns of ids, I ids
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vqt2i.clip import CLIP
from vqt2i.data.images import GREY, to_uint8
from vqt2i.generation.engine import Engine
from vqt2i.generation.memory import ROWS_AT_ONCE
from vqt2i.generation.reading import Prompt, PromptReader
from vqt2i.generation.rerank import EditScorer, Scorer, caption_scores, combine, embedding_scores, likelihood_scores
from vqt2i.generation.samples import Mix
from vqt2i.gpt import GPT
from vqt2i.text import TextTokenizer, clean_text
from vqt2i.vq import AnyImageTokenizer


@dataclass(frozen=True, eq=False)
class Finisher:
    """The parts of a pipeline that finish what its GPT drew. away: those of `vq` and `clip` that wait on the CPU."""

    gpt: GPT
    vq: AnyImageTokenizer
    clip: CLIP | None
    text: TextTokenizer | None
    reader: PromptReader
    engine: Engine
    away: tuple[nn.Module, ...]

    @contextmanager
    def at_work(self, *parts: nn.Module | None) -> Iterator[None]:
        """Have those of the parts that are kept away on the GPT's device meanwhile."""
        visitors = [part for part in parts if part in self.away]
        try:
            for part in visitors:
                part.to(self.gpt.device)
            yield
        finally:
            for part in visitors:
                part.to("cpu")

    @torch.inference_mode()
    def decode(self, ids_BHW: Tensor, at_once: int) -> Tensor:
        """Pictures (B, 3, height, width) on the CPU. The image tokenizer is at work."""
        device = self.gpt.device
        return torch.cat([self.vq.decode(part.to(device)).float().cpu() for part in ids_BHW.split(at_once)])

    def decode_part(self, ids_BI: Tensor, at_once: int) -> np.ndarray:
        """Pictures (B, height, width, 3) of the first ids of each image; grey where there are none yet."""
        layout, n_drawn = self.gpt.layout.config, ids_BI.shape[1]
        rows, columns = layout.grid_height, layout.grid_width
        # the rest is painted over, but the decoder mixes it into its neighbours: the last id is like them
        rest_BI = ids_BI[:, -1:].expand(-1, rows * columns - n_drawn)
        ids_BHW = torch.cat((ids_BI, rest_BI), dim=1).reshape(-1, rows, columns)
        with self.at_work(self.vq):
            image_BHW3 = to_uint8(self.decode(ids_BHW, at_once))
        cell_px = image_BHW3.shape[1] // rows
        missing = (np.arange(rows * columns) >= n_drawn).reshape(rows, image_BHW3.shape[2] // cell_px, -1)
        missing_HW = missing.any(-1)  # a cell of several ids is there with the last of them
        image_BHW3[:, missing_HW.repeat(cell_px, 0).repeat(cell_px, 1)] = GREY
        return image_BHW3

    def score(
        self, scorer: Scorer, image_B3HW: Tensor, ids_BHW: Tensor, prompt: Prompt, mix: Mix | None = None
    ) -> dict[str, Tensor]:
        """Scores of candidates of a prompt, or the mean of its and of the text's that is mixed in."""
        if mix:
            own, other = (self.score(scorer, image_B3HW, ids_BHW, asked) for asked in (prompt, clean_text(mix.text)))
            return {name: torch.lerp(own[name], other[name], mix.share) for name in own}
        scores = {}
        if scorer in ("clip", "both"):
            scores["clip"] = embedding_scores(self.engine.clip(self.clip), image_B3HW, self.reader.embed(prompt))
        if scorer in ("caption", "both"):
            texts = [self.text.encode(prompt)] * len(ids_BHW)
            scores["caption"] = caption_scores(self.engine.gpt(self.gpt), ids_BHW, texts)
        return scores

    def score_edits(
        self, scorer: EditScorer, image_B3HW: Tensor, ids_BHW: Tensor, prompt: Prompt, default: Scorer
    ) -> dict[str, Tensor]:
        """Scores of edited pictures. default: what "all" takes beside the likelihood, if it is there."""
        scores = {}
        if scorer in ("likelihood", "all"):
            gpt, conditions = self.engine.gpt(self.gpt), [self.reader.condition(prompt)] * len(ids_BHW)
            scores["likelihood"] = torch.cat([
                likelihood_scores(gpt, part, conditions[: len(part)]) for part in ids_BHW.split(ROWS_AT_ONCE)
            ])  # fmt: skip
        other = default if scorer == "all" else scorer
        if other != "likelihood" and (other != "clip" or self.clip):
            scores |= self.score(other, image_B3HW, ids_BHW, prompt)
        if len(scores) > 1:
            scores[scorer] = combine(scores)
        return scores
