import pytest
import torch
from torch import Tensor

from vqt2i.gpt import GPT, Sequences
from vqt2i.text import TextBatch, pad_texts

TEXTS = [[1, 2, 3], [], [4, 5, 6, 7, 8], [9]]
POSITIONS = pytest.mark.parametrize("positions", ["rotary", "learned"])


def images(n: int, seed: int = 1) -> Tensor:
    return torch.randint(6, (n, 6), generator=torch.Generator().manual_seed(seed))


def image_logits(gpt: GPT, text: TextBatch, image_BI: Tensor) -> Tensor:
    """Logits of every image token, by the full forward pass."""
    hidden = gpt(gpt.layout.join(text, image_BI))
    return gpt.image_logits(hidden[:, gpt.layout.image_targets(reversed_order=False)])


@POSITIONS
@torch.no_grad()
def test_prefill_and_cached_steps_match_the_full_forward_after_a_repeat(make_gpt, positions: str) -> None:
    gpt, counts = make_gpt(positions), [2, 1, 3, 1]
    rows = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    text, image_BI = pad_texts(TEXTS, 5), images(7)
    expected = image_logits(gpt, TextBatch(*(t[rows] for t in text)), image_BI)

    prefix = gpt.layout.text_prefix(text)
    logits, small = gpt.prefill(prefix, gpt.layout.prefix_length)
    cache, found = small.repeat(counts, gpt.layout.length - 1), [logits[rows]]
    for index in range(5):
        found.append(gpt.step(image_BI[:, index], index, prefix.real_BL[rows], cache))
    torch.testing.assert_close(torch.stack(found, dim=1), expected)


@POSITIONS
@torch.no_grad()
def test_a_row_of_a_batch_has_the_logits_it_has_alone(make_gpt, positions: str) -> None:
    gpt, image_BI = make_gpt(positions), images(4)
    together = image_logits(gpt, pad_texts(TEXTS, 5), image_BI)
    for row, text in enumerate(TEXTS):
        alone = image_logits(gpt, pad_texts([text], 5), image_BI[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone)


@torch.no_grad()
def test_padding_changes_no_logits(make_gpt) -> None:
    narrow, wide = make_gpt(text_length=5), make_gpt(text_length=11)
    wide.load_state_dict(narrow.state_dict())
    image_BI = images(4)
    torch.testing.assert_close(
        image_logits(narrow, pad_texts(TEXTS, 5), image_BI), image_logits(wide, pad_texts(TEXTS, 11), image_BI)
    )
    hidden = [
        gpt(gpt.layout.join_reversed(pad_texts(TEXTS, length), image_BI))[:, 7 : 7 + 6]
        for gpt, length in ((narrow, 5), (wide, 11))
    ]
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(hidden[0][row, : len(text) + 1], hidden[1][row, : len(text) + 1])


@torch.no_grad()
def test_what_stands_in_the_padding_changes_nothing(make_gpt) -> None:
    gpt, image_BI = make_gpt(), images(1)
    filled = TextBatch(torch.tensor([[1, 2, 9, 9, 9]]), torch.tensor([2]))
    assert torch.equal(image_logits(gpt, pad_texts([[1, 2]], 5), image_BI), image_logits(gpt, filled, image_BI))


@POSITIONS
@pytest.mark.parametrize("method", ["join", "join_reversed"])
@torch.no_grad()
def test_a_later_token_changes_no_earlier_state(make_gpt, positions: str, method: str) -> None:
    gpt = make_gpt(positions)
    sequences = getattr(gpt.layout, method)(pad_texts([[1, 2, 3, 4, 5]], 5), images(1))
    before = gpt(sequences)
    for index in range(1, gpt.layout.length):
        ids = sequences.ids_BL.clone()
        ids[0, index] = (ids[0, index] + 1) % gpt.layout.n_ids
        after = gpt(sequences._replace(ids_BL=ids))
        torch.testing.assert_close(after[:, :index], before[:, :index])
        assert (after[:, index:] - before[:, index:]).abs().amax(-1).min() > 1e-6


@torch.no_grad()
def test_each_head_scores_its_own_modality_only(make_gpt) -> None:
    gpt = make_gpt()
    hidden = gpt(gpt.layout.join(pad_texts(TEXTS, 5), images(4)))
    text, image = gpt.text_logits(hidden), gpt.image_logits(hidden)
    assert text.shape == (4, 14, 10 + 1) and image.shape == (4, 14, 6)
    torch.testing.assert_close(torch.cat((text, image), dim=-1), gpt.head(hidden, slice(None)))


@POSITIONS
@torch.no_grad()
def test_rows_and_columns_are_told_apart(make_gpt, positions: str) -> None:
    gpt = make_gpt(positions)
    sequences = gpt.layout.join(pad_texts([[1]], 5), images(1))
    swapped = sequences._replace(positions_BLA=sequences.positions_BLA[..., [0, 2, 1]].clamp_max(2))
    assert (gpt(sequences) - gpt(swapped)).abs().max() > 1e-3


@torch.no_grad()
def test_under_bf16_cached_steps_stay_close_to_fp32(make_gpt) -> None:
    gpt, image_BI, text = make_gpt(), images(4), pad_texts(TEXTS, 5)
    expected = image_logits(gpt, text, image_BI)
    with torch.autocast("cpu", torch.bfloat16):
        full = image_logits(gpt, text, image_BI)
        prefix = gpt.layout.text_prefix(text)
        logits, cache = gpt.prefill(prefix, gpt.layout.length - 1)
        steps = [logits] + [gpt.step(image_BI[:, i], i, prefix.real_BL, cache) for i in range(5)]
    assert cache.kv.dtype == torch.bfloat16
    for found in (full, torch.stack(steps, dim=1)):
        assert (found.float() - expected).abs().mean() < 0.02 * expected.std()


@torch.no_grad()
def test_weights_in_bf16_work_too(make_gpt) -> None:
    gpt, text = make_gpt().bfloat16(), pad_texts(TEXTS, 5)
    prefix = gpt.layout.text_prefix(text)
    logits, cache = gpt.prefill(prefix, gpt.layout.length - 1)
    assert logits.dtype == cache.kv.dtype == torch.bfloat16
    assert gpt.step(torch.zeros(4, dtype=torch.long), 0, prefix.real_BL, cache).isfinite().all()


def test_a_sequence_of_no_rows_is_allowed(make_gpt) -> None:
    gpt = make_gpt()
    none = Sequences(*(t[:0] for t in gpt.layout.join(pad_texts(TEXTS, 5), images(4))))
    assert gpt(none).shape == (0, 14, 32)


@torch.no_grad()
def test_image_ids_that_start_from_codes_are_alike_where_their_codes_are(make_gpt) -> None:
    gpt = make_gpt("rotary")
    first = gpt.layout.first_image_id
    before = {name: weight.clone() for name, weight in gpt.state_dict().items()}
    codes_KD = torch.randn(6, 3)
    codes_KD[4] = codes_KD[1]
    gpt.start_from_codes(codes_KD)
    for weight in (gpt.embedding.weight, gpt.head.weight):
        assert torch.equal(weight[first + 4], weight[first + 1])
        assert not torch.allclose(weight[first + 2], weight[first + 1])
        assert torch.linalg.matrix_rank(weight[first : first + 6]) == 3
    # the sizes of the weights stay about what they were, and the text's are untouched
    for name in ("embedding.weight", "head.weight"):
        after, rows = gpt.state_dict()[name], slice(first, first + 6)
        assert 0.5 < after[rows].std() / before[name][rows].std() < 2
        assert torch.equal(after[:first], before[name][:first])
        assert torch.equal(after[first + 6 :], before[name][first + 6 :])
