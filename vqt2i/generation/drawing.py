"""What one call of `TextToImage.stream` does: ids in batches as large as memory lets them be, pictures by prompts."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vqt2i.data.images import to_uint8
from vqt2i.generation.batches import Packer
from vqt2i.generation.decode import Job, decode_image_ids
from vqt2i.generation.finish import Finisher
from vqt2i.generation.memory import Budget, decoding_needs, finishing_needs, room_on, weight_bytes
from vqt2i.generation.prompts import prompt_name
from vqt2i.generation.reading import Prompt
from vqt2i.generation.rerank import Scorer, combine
from vqt2i.generation.rows import Mixed
from vqt2i.generation.samples import Mix, Preview, Sample
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import Condition


class Asked(NamedTuple):
    """What pictures were asked for, `count` of each prompt. scorer: None leaves them unscored."""

    prompts: Sequence[Prompt]
    count: int
    scorer: Scorer | None
    sampling: SamplingConfig
    negative: Condition | None
    mixed: Mixed | None
    mix: Mix | None  # what `mixed` was read from
    seed: int


class _Drawn(NamedTuple):
    """An image's ids, (height, width), the passes of the GPT that it took, and its caption score if drawing gave it."""

    ids_HW: Tensor
    n_passes: int
    caption: float | None


class Drawing:
    """The pictures that were asked for, by the parts in `finisher`.

    Raises:
        ResourceError: too little memory for a single image.
    """

    def __init__(self, finisher: Finisher, asked: Asked, memory: int | None) -> None:
        """memory: bytes that weights and drawing may take of the GPT's device; None is what is free."""
        self.finisher, self.asked = finisher, asked
        gpt, vq, away = finisher.gpt, finisher.vq, finisher.away
        clip = finisher.clip if asked.scorer in ("clip", "both") else None
        finishing = finishing_needs(vq, gpt, clip, asked.scorer in ("caption", "both"))
        visiting = weight_bytes(*(part for part in away if part in (vq, clip)))
        finishing = finishing._replace(fixed=finishing.fixed + visiting)
        at_home = weight_bytes(gpt, *(part for part in (vq, finisher.clip) if part not in away))
        decoding = decoding_needs(gpt, asked.sampling, asked.count, mixed=asked.mixed is not None)
        self.budget = Budget(gpt.device, decoding, finishing, room_on(gpt.device, at_home, memory))

    def groups(
        self,
        indices: Sequence[int],
        on_token: Callable[[int], None] | None,
        on_preview: Callable[[Preview], None] | None,
    ) -> Iterator[list[Sample]]:
        """Candidates prompt by prompt, in the order of `indices`."""
        asked, finisher = self.asked, self.finisher
        drawn: dict[int, dict[Job, _Drawn]] = defaultdict(dict)
        waiting = deque(indices)
        for batch in self._batches(indices, on_token, on_preview):
            for job, image in batch.items():
                drawn[job.prompt_index][job] = image
            whole = []
            while waiting and len(drawn[waiting[0]]) == asked.count:
                whole.append(waiting.popleft())
            if whole:
                with finisher.at_work(finisher.vq, finisher.clip if asked.scorer in ("clip", "both") else None):
                    groups = [self._finish(drawn.pop(p)) for p in whole]
                yield from groups

    def _batches(
        self,
        indices: Sequence[int],
        on_token: Callable[[int], None] | None,
        on_preview: Callable[[Preview], None] | None,
    ) -> Iterator[dict[Job, _Drawn]]:
        """Batches of images."""
        asked, budget, finisher = self.asked, self.budget, self.finisher
        n_tokens, n_passes, captions = 0, {}, {}
        captioned = asked.scorer in ("caption", "both") and not asked.mix

        def count_tokens(n: int) -> None:
            nonlocal n_tokens
            n_tokens += n
            if on_token:
                on_token(n)

        def on_partial(part: Sequence[Job], ids_BI: Callable[[], Tensor]) -> None:
            on_preview(Preview(part, lambda: finisher.decode_part(ids_BI(), budget.finished)))

        packer = Packer(indices, self._first_job, asked.count)
        start = finisher.engine.start(finisher.gpt, asked.count * len(indices))
        while jobs := packer.take(budget.rows):
            decode = partial(
                decode_image_ids, finisher.engine.gpt(finisher.gpt), jobs, asked.sampling, asked.seed, start=start,
                rows_at_once=len(jobs), on_token=count_tokens, on_partial=on_partial if on_preview else None,
                on_passes=n_passes.__setitem__, on_caption=captions.__setitem__ if captioned else None,
            )  # fmt: skip
            n_tokens, ids_BHW = 0, None
            with suppress(torch.OutOfMemoryError):
                ids_BHW = budget.watch(len(jobs), decode)
            if ids_BHW is None:  # here the failed call's tensors are gone
                count_tokens(-n_tokens)
                budget.ran_out(len(jobs))
                packer.give_back(jobs)
            else:
                yield {
                    job: _Drawn(ids, n_passes.pop(job), captions.pop(job, None))
                    for job, ids in zip(jobs, ids_BHW, strict=True)
                }

    def _first_job(self, prompt_index: int) -> Job:
        condition = self.finisher.reader.condition(self.asked.prompts[prompt_index])
        return Job(condition, prompt_index, 0, self.asked.negative, self.asked.mixed)

    def _finish(self, drawn: dict[Job, _Drawn]) -> list[Sample]:
        """Pictures and scores of all candidates of a prompt, together with no others', so that they are always equal.

        (Where memory is too small for FINISHED_AT_ONCE of them, the last bits may differ.)
        """
        asked, budget, finisher = self.asked, self.budget, self.finisher
        jobs = sorted(drawn, key=lambda job: job.image_index)
        ids_BHW = torch.stack([drawn[job].ids_HW for job in jobs])
        pictures, scores, start = [], defaultdict(list), 0
        captions = [drawn[job].caption for job in jobs]
        scorer = asked.scorer
        if scorer in ("caption", "both") and None not in captions:  # that score is there already
            scorer = "clip" if scorer == "both" else None
        prompt = asked.prompts[jobs[0].prompt_index]
        while start < len(jobs):
            part_BHW = ids_BHW[start : start + budget.finished]
            done = None
            with suppress(torch.OutOfMemoryError):
                image_B3HW = finisher.decode(part_BHW, budget.finished)
                done = finisher.score(scorer, image_B3HW, part_BHW, prompt, asked.mix) if scorer else {}
            if done is None:
                budget.ran_out_finishing(len(part_BHW))
                continue
            start += len(part_BHW)
            pictures.extend(to_uint8(image_B3HW))
            for name, score_B in done.items():
                scores[name].append(score_B)
        ranking = {name: torch.cat(parts) for name, parts in scores.items()}
        if scorer != asked.scorer:
            ranking["caption"] = torch.tensor(captions)
        if len(ranking) > 1:
            ranking["both"] = combine(ranking)
        n_truncated = finisher.reader.n_unread(prompt)
        # copies: a view would keep all pictures for as long as one of them is kept
        group = [
            Sample(
                prompt_name(prompt), job.prompt_index, job.image_index, asked.seed, pictures[i].copy(),
                ids_BHW[i].numpy().copy(), n_truncated, {name: float(values[i]) for name, values in ranking.items()},
                drawn[job].n_passes,
            )
            for i, job in enumerate(jobs)
        ]  # fmt: skip
        return sorted(group, key=lambda s: -s.scores[asked.scorer]) if asked.scorer else group
