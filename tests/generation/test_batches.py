from vqt2i.generation.batches import Packer
from vqt2i.generation.decode import Job


def jobs_of(prompts: list[int], count: int) -> list[Job]:
    return [Job((p, p), p, i) for p in prompts for i in range(count)]


def test_batches_are_full_whatever_the_number_of_candidates() -> None:
    packer = Packer([5, 2, 9], lambda p: Job((p, p), p, 0), 3)
    batches = [packer.take(4) for _ in range(4)]
    assert [len(batch) for batch in batches] == [4, 4, 1, 0]
    assert [job for batch in batches for job in batch] == jobs_of([5, 2, 9], 3)


def test_what_is_given_back_comes_next_and_texts_are_read_when_their_turn_comes() -> None:
    read = []
    packer = Packer(range(100), lambda p: read.append(p) or Job((p, p), p, 0), 2)
    first = packer.take(5)
    packer.give_back(first)
    assert packer.take(2) == first[:2] and packer.take(4) == [*first[2:], Job((2, 2), 2, 1)]
    assert read == [0, 1, 2]
