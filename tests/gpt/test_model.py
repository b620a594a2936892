import pytest
import torch
from torch import Tensor

from vqt2i.gpt import GPT, Sequences
from vqt2i.nn.cache import BranchedCache, Branches
from vqt2i.text import TextBatch, pad_texts

TEXTS = [[1, 2, 3], [], [4, 5, 6, 7, 8], [9]]
POSITIONS = pytest.mark.parametrize("positions", ["rotary", "learned"])


def images(n: int, seed: int = 1) -> Tensor:
    return torch.randint(6, (n, 6), generator=torch.Generator().manual_seed(seed))


def image_logits(gpt: GPT, text: TextBatch, image_BI: Tensor) -> Tensor:
    """Logits of every image token, by the full forward pass."""
    hidden = gpt(gpt.layout.join(text, image_BI))
    return gpt.image_logits(hidden[:, gpt.layout.image_targets(reversed_order=False)])


def cached_image_logits(gpt: GPT, groups: list[tuple[TextBatch, int]], image_BI: Tensor) -> Tensor:
    """As `image_logits` of rows that stand `n_each` times for every text of a group, by prefill and cached steps."""
    logits, branches = [], []
    for text, n_each in groups:
        prefix = gpt.layout.text_prefix(text)
        logits_BV, cache = gpt.prefill(prefix)
        logits.append(logits_BV.repeat_interleave(n_each, dim=0))
        branches.append(Branches(cache, prefix.real_BL, n_each, gpt.layout.image_length - 1))
    cache = BranchedCache(branches)
    steps = [gpt.step(image_BI[:, i : i + 1], cache)[:, -1] for i in range(gpt.layout.image_length - 1)]
    return torch.stack([torch.cat(logits), *steps], dim=1)


@POSITIONS
@torch.no_grad()
def test_prefill_and_cached_steps_match_the_full_forward_for_ragged_counts(make_gpt, positions: str) -> None:
    gpt, image_BI = make_gpt(positions), images(7)
    texts = [TEXTS[row] for row in (0, 1, 1, 1, 2, 2, 2)]
    expected = image_logits(gpt, pad_texts(texts, 5), image_BI)
    groups = [(pad_texts(TEXTS[:1], 3), 1), (pad_texts(TEXTS[1:3], 5), 3)]
    torch.testing.assert_close(cached_image_logits(gpt, groups, image_BI), expected)


@POSITIONS
@torch.no_grad()
def test_several_tokens_in_one_step_match_one_by_one(make_gpt, positions: str) -> None:
    gpt, image_BI, text = make_gpt(positions), images(4), pad_texts(TEXTS, 5)
    expected = image_logits(gpt, text, image_BI)
    for cuts in ([5], [2, 3], [1, 4]):
        prefix = gpt.layout.text_prefix(text)
        cache = BranchedCache([Branches(gpt.prefill(prefix)[1], prefix.real_BL, 1, 5)])
        at = 0
        for part in image_BI[:, :5].split(cuts, dim=1):
            for n_scored in (1, part.shape[1]):  # what was taken back can be stepped again
                stop = at + part.shape[1]
                found = gpt.step(part, cache, n_scored)
                torch.testing.assert_close(found, expected[:, stop - n_scored + 1 : stop + 1])
                cache.rewind(part.shape[1])
            gpt.step(part, cache)
            at = stop


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
        cached = cached_image_logits(gpt, [(text, 1)], image_BI)
        assert gpt.prefill(gpt.layout.text_prefix(text))[1].kv.dtype == torch.bfloat16
    for found in (full, cached):
        assert (found.float() - expected).abs().mean() < 0.02 * expected.std()


@torch.no_grad()
def test_weights_in_bf16_work_too(make_gpt) -> None:
    gpt, text = make_gpt().bfloat16(), pad_texts(TEXTS, 5)
    logits, cache = gpt.prefill(gpt.layout.text_prefix(text))
    assert logits.dtype == cache.kv.dtype == torch.bfloat16
    cached = cached_image_logits(gpt, [(text, 1)], images(4))
    assert cached.dtype == torch.bfloat16 and cached.isfinite().all()


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
