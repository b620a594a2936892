"""Images of many prompts, packed into batches.

All images of a model have equally many tokens, so that a batch ends for all at once, and the next one begins full,
whatever prompts its images belong to: that is the refill.
"""

from collections.abc import Callable, Iterable
from itertools import islice

from vqt2i.generation.decode import Job

AHEAD = 4  # batches whose prompts are put in order of length


class Packer:
    """Deals out the images of prompts; `count` each, those of a prompt one after another.

    The prompts of the next batches are dealt out by length of text, so that few of a batch's texts need padding.
    """

    def __init__(self, prompts: Iterable[int], text_ids: Callable[[int], tuple[int, ...]], count: int) -> None:
        """prompts: their indices. text_ids: what gives the ids of a prompt's text, when its turn comes."""
        self._prompts, self._text_ids, self._count = iter(prompts), text_ids, count
        self._next: list[Job] = []

    def take(self, n_images: int) -> list[Job]:
        """The next so many images, fewer only where no more are left."""
        while len(self._next) < n_images:
            indices = list(islice(self._prompts, max(1, AHEAD * n_images // self._count)))
            if not indices:
                break
            texts = sorted(((self._text_ids(p), p) for p in indices), key=lambda text: (len(text[0]), text[1]))
            self._next += [Job(ids, p, i) for ids, p in texts for i in range(self._count)]
        taken, self._next = self._next[:n_images], self._next[n_images:]
        return taken

    def give_back(self, jobs: list[Job]) -> None:
        """These will be taken next."""
        self._next = jobs + self._next
