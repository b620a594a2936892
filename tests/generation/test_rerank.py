import pytest
import torch

from vqt2i.clip import CLIP
from vqt2i.generation.rerank import caption_scores, clip_scores, combine
from vqt2i.gpt import GPT, caption_log_probability
from vqt2i.text import pad_texts

TEXTS = [(1, 2), (), tuple(range(1, 9)), (1, 2)]


@torch.no_grad()
def test_clip_scores_are_cosines_of_each_picture_with_its_text(tiny_clip: CLIP) -> None:
    image = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = clip_scores(tiny_clip, image, TEXTS)
    for row, text in enumerate(TEXTS):
        image_E = tiny_clip.encode_image(image[row : row + 1])[0]
        text_E = tiny_clip.encode_text(*pad_texts([list(text)], 12))[0]
        assert float(found[row]) == pytest.approx(float(image_E @ text_E), abs=1e-6)
        assert -1 <= float(found[row]) <= 1


@torch.no_grad()
def test_caption_scores_are_log_probabilities_per_token_whatever_the_neighbours(make_gpt) -> None:
    gpt: GPT = make_gpt()
    ids = torch.randint(6, (4, 3, 2), generator=torch.Generator().manual_seed(0))
    found = caption_scores(gpt, ids, TEXTS)
    for row, text in enumerate(TEXTS):
        alone = caption_log_probability(gpt, pad_texts([list(text)], 5), ids[row : row + 1].flatten(1))
        assert float(found[row]) == pytest.approx(float(alone), rel=1e-5)
        assert float(found[row]) < 0


def test_both_is_the_sum_of_standardised_scores() -> None:
    scores = {"clip": torch.tensor([0.1, 0.3, 0.2]), "caption": torch.tensor([-5.0, -1.0, -9.0])}
    deviation = (2 / 3) ** 0.5
    clip = torch.tensor([-0.1, 0.1, 0.0]).double() / (0.1 * deviation)
    caption = torch.tensor([0.0, 4.0, -4.0]).double() / (4 * deviation)
    torch.testing.assert_close(combine(scores), clip + caption, rtol=1e-5, atol=1e-6)


def test_scores_that_do_not_differ_say_nothing() -> None:
    equal, other = torch.tensor([2.0, 2.0]), torch.tensor([0.0, 1.0])
    assert combine({"a": equal, "b": other}).tolist() == pytest.approx([-1, 1])
    assert combine({"a": torch.tensor([3.0]), "b": torch.tensor([5.0])}).tolist() == [0]
