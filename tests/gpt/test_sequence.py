"""The layout by hand, on texts of up to 3 of 10 ids and images of 2 x 2 of 6 ids."""

import pytest
import torch

from vqt2i.gpt import LayoutConfig, LowResolutionCondition, SequenceLayout
from vqt2i.text import pad_texts

LAYOUT = SequenceLayout(LayoutConfig(n_text_ids=10, n_image_ids=6, text_length=3, grid_height=2, grid_width=2))
EOT, FIRST, PAD, T2I, I2T, BOI, BOT = 10, 11, 17, 18, 19, 20, 21
IMAGE = torch.tensor([[0, 5, 1, 2], [3, 3, 0, 4], [1, 0, 2, 5]])
TEXT = pad_texts([[7, 8], [], [1, 2, 3, 4]], 3)


def test_the_id_space_is_text_eot_image_marks() -> None:
    marks = (LAYOUT.eot, LAYOUT.first_image_id, LAYOUT.pad, LAYOUT.t2i, LAYOUT.i2t, LAYOUT.boi, LAYOUT.bot)
    assert marks == (EOT, FIRST, PAD, T2I, I2T, BOI, BOT)
    assert (LAYOUT.n_targets, LAYOUT.n_ids) == (10 + 1 + 6, 10 + 1 + 6 + 5)
    assert (LAYOUT.image_length, LAYOUT.prefix_length, LAYOUT.length) == (4, 6, 10)


def test_text_to_image_by_hand() -> None:
    sequences = LAYOUT.join(TEXT, IMAGE)
    assert sequences.ids_BL.tolist() == [
        [PAD, T2I, 7, 8, EOT, BOI, 11, 16, 12, 13],
        [PAD, PAD, PAD, T2I, EOT, BOI, 14, 14, 11, 15],
        [T2I, 1, 2, 3, EOT, BOI, 12, 11, 13, 16],
    ]
    assert sequences.real_BL.tolist() == [[0] + [1] * 9, [0] * 3 + [1] * 7, [1] * 10]
    image_positions = [[0, 1, 1], [0, 1, 2], [0, 2, 1], [0, 2, 2]]
    text_axis = [[0, 0, 1, 2, 3, 0], [0, 0, 0, 0, 1, 0], [0, 1, 2, 3, 4, 0]]
    assert sequences.positions_BLA.tolist() == [[[k, 0, 0] for k in row] + image_positions for row in text_axis]


def test_low_resolution_to_image_by_hand() -> None:
    config = LAYOUT.config.model_copy(update={"grid_width": 4})
    layout = SequenceLayout(config, LowResolutionCondition())
    assert (layout.low_length, layout.prefix_length, layout.length, layout.n_ids) == (2, 8, 16, LAYOUT.n_ids)
    low = torch.tensor([[4, 0], [1, 1], [5, 3]])
    prefix = layout.low_resolution_prefix(TEXT, low)
    assert prefix.ids_BL.tolist() == [
        [PAD, T2I, 7, 8, EOT, 15, 11, BOI],
        [PAD, PAD, PAD, T2I, EOT, 12, 12, BOI],
        [T2I, 1, 2, 3, EOT, 16, 14, BOI],
    ]
    assert prefix.real_BL.tolist() == [[0] + [1] * 7, [0] * 3 + [1] * 5, [1] * 8]
    # behind the last place of the text axis (EOT of three ids is at 4), each where the first of its four ids stands
    assert prefix.positions_BLA[:, 5:].tolist() == [[[5, 1, 1], [5, 1, 3], [0, 0, 0]]] * 3
    whole = prefix.then(layout.image_part(torch.zeros(3, 8, dtype=torch.long)))
    assert layout.image_index(whole).tolist() == [[-1] * 8 + list(range(8))] * 3
    assert layout.place_index(whole).tolist() == [[-1] * 5 + [0, 2, -1] + list(range(8))] * 3


def test_image_to_text_by_hand() -> None:
    sequences = LAYOUT.join_reversed(TEXT, IMAGE)
    assert sequences.ids_BL.tolist() == [
        [I2T, 11, 16, 12, 13, BOT, 7, 8, EOT, PAD],
        [I2T, 14, 14, 11, 15, BOT, EOT, PAD, PAD, PAD],
        [I2T, 12, 11, 13, 16, BOT, 1, 2, 3, EOT],
    ]
    assert sequences.real_BL.tolist() == [[1] * 9 + [0], [1] * 7 + [0] * 3, [1] * 10]
    one = [[0, 0, 0], [0, 1, 1], [0, 1, 2], [0, 2, 1], [0, 2, 2], [0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0], [4, 0, 0]]
    assert sequences.positions_BLA.tolist() == [one] * 3


def test_real_tokens_have_the_same_positions_whatever_the_text_length_and_the_order() -> None:
    wide = SequenceLayout(LAYOUT.config.model_copy(update={"text_length": 8}))
    text = ([[7, 8], [], [1, 2, 3]], 3), ([[7, 8], [], [1, 2, 3]], 8)
    for method in ("join", "join_reversed"):
        kept = []
        for layout, batch in ((LAYOUT, text[0]), (wide, text[1])):
            sequences = getattr(layout, method)(pad_texts(*batch), IMAGE)
            rows = zip(*sequences[:3], strict=True)
            kept.append([(ids[real].tolist(), positions[real].tolist()) for ids, positions, real in rows])
        assert kept[0] == kept[1]


def test_targets_are_one_ahead_of_the_inputs_that_predict_them() -> None:
    for reversed_order, sequences in ((False, LAYOUT.join(TEXT, IMAGE)), (True, LAYOUT.join_reversed(TEXT, IMAGE))):
        at = LAYOUT.image_targets(reversed_order=reversed_order)
        assert torch.equal(sequences.ids_BL[:, at.start + 1 : at.stop + 1], IMAGE + FIRST)
        at = LAYOUT.text_targets(reversed_order=reversed_order)
        ids_BL = sequences.ids_BL[:, at.start + 1 : at.stop + 1]
        predicted = [[i for i in row if i not in (PAD, T2I)] for row in ids_BL.tolist()]
        assert ids_BL.shape[1] == 4 and predicted == [[7, 8, EOT], [EOT], [1, 2, 3, EOT]]


def test_every_position_is_predicted_once_or_is_a_mark() -> None:
    for order in (False, True):
        slices = (LAYOUT.text_targets(reversed_order=order), LAYOUT.image_targets(reversed_order=order))
        targets = [i + 1 for at in slices for i in range(LAYOUT.length)[at]]
        assert sorted(targets) == sorted(set(range(LAYOUT.length)) - {0, 5})  # the first mark, and BOI or BOT


def test_a_text_that_is_too_long_keeps_its_beginning() -> None:
    batch = pad_texts([[1, 2, 3, 4, 5]], 3)
    assert LAYOUT.text_prefix(batch).ids_BL.tolist() == [[T2I, 1, 2, 3, EOT, BOI]]


def test_an_image_of_fewer_tokens_is_the_beginning_of_the_whole() -> None:
    whole, part = LAYOUT.join(TEXT, IMAGE), LAYOUT.join(TEXT, IMAGE[:, :3])
    assert all(torch.equal(a[:, :9], b) for a, b in zip(whole[:3], part[:3], strict=True))


def test_no_text_is_read_beyond_its_count() -> None:
    dropped = TEXT._replace(n_ids_B=torch.zeros(3, dtype=torch.long))
    empty = pad_texts([[], [], []], 3)
    for method in (LAYOUT.join, LAYOUT.join_reversed):
        found, expected = method(dropped, IMAGE), method(empty, IMAGE)
        real = expected.real_BL
        assert all(torch.equal(a[real], b[real]) for a, b in zip(found[:3], expected[:3], strict=True))
        assert torch.equal(found.real_BL, real)


@pytest.mark.parametrize("method", ["join", "join_reversed"])
def test_a_query_sees_itself_and_what_is_real_before_it(method: str) -> None:
    sequences = getattr(LAYOUT, method)(TEXT, IMAGE)
    mask = sequences.causal_mask()
    for row, real in enumerate(sequences.real_BL.tolist()):
        for q in range(10):
            assert mask[row, 0, q].tolist() == [k == q or (k < q and real[k]) for k in range(10)]


def test_a_text_before_an_image_may_see_all_of_itself() -> None:
    layout = SequenceLayout(LAYOUT.config.model_copy(update={"text_attention": "full"}))
    assert not layout.predicts_prompts and LAYOUT.predicts_prompts
    forth, back = layout.join(TEXT, IMAGE), layout.join_reversed(TEXT, IMAGE)
    mask, causal = layout.mask(forth.cat(back)), forth.cat(back).causal_mask()
    for row, start in enumerate((1, 3, 0)):  # T2I … EOT
        seen = range(start, 5)
        for q in range(10):
            more = set(seen) if q in seen else set()
            assert set(mask[row, 0, q].nonzero().flatten().tolist()) == more | set(
                causal[row, 0, q].nonzero().flatten().tolist()
            )
    assert torch.equal(mask[3:], causal[3:])


def test_rows_can_be_put_together() -> None:
    forth, back = LAYOUT.join(TEXT, IMAGE), LAYOUT.join_reversed(TEXT, IMAGE)
    both = forth.cat(back)
    assert torch.equal(both.ids_BL, torch.cat((forth.ids_BL, back.ids_BL))) and both.real_BL.shape == (6, 10)


def test_learned_padding_by_hand() -> None:
    layout = SequenceLayout(LAYOUT.config.model_copy(update={"padding": "learned"}))
    p1, p2, p3 = 22, 23, 24
    assert layout.n_ids == 25 and layout.n_targets == LAYOUT.n_targets and layout.length == LAYOUT.length
    sequences = layout.join(TEXT, IMAGE)
    assert sequences.ids_BL[:, :6].tolist() == [
        [T2I, 7, 8, EOT, p3, BOI], [T2I, EOT, p1, p2, p3, BOI], [T2I, 1, 2, 3, EOT, BOI],
    ]  # fmt: skip
    assert torch.equal(sequences.ids_BL[:, 6:], IMAGE + FIRST) and sequences.real_BL.all()
    assert sequences.positions_BLA[:, :6].tolist() == [[[k, 0, 0] for k in (0, 1, 2, 3, 4, 0)]] * 3
    back, as_before = layout.join_reversed(TEXT, IMAGE), LAYOUT.join_reversed(TEXT, IMAGE)
    assert all(torch.equal(*pair) for pair in zip(back[:3], as_before[:3], strict=True))


def test_learned_padding_fills_up_texts_that_are_padded_less() -> None:
    layout = SequenceLayout(LAYOUT.config.model_copy(update={"padding": "learned"}))
    short, whole = (layout.text_prefix(pad_texts([[7], []], length)) for length in (1, 3))
    assert all(torch.equal(*pair) for pair in zip(short[:3], whole[:3], strict=True))


def test_bare_texts_by_hand() -> None:
    layout = SequenceLayout(LAYOUT.config.model_copy(update={"padding": "bare"}))
    first, p1, p2, p3 = 10, 16, 17, 18
    assert (layout.first_image_id, layout.first_learned_pad, layout.n_targets, layout.n_ids) == (first, p1, 16, 19)
    assert (layout.prefix_length, layout.length) == (3, 3 + 4) and not layout.has_marks
    sequences = layout.join(TEXT, IMAGE)
    assert sequences.ids_BL[:, :3].tolist() == [[7, 8, p3], [p1, p2, p3], [1, 2, 3]]
    assert torch.equal(sequences.ids_BL[:, 3:], IMAGE + first) and sequences.real_BL.all()
    assert sequences.positions_BLA[:, :3].tolist() == [[[k, 0, 0] for k in (1, 2, 3)]] * 3
    at = layout.image_targets(reversed_order=False)
    assert torch.equal(sequences.ids_BL[:, at.start + 1 : at.stop + 1], IMAGE + first)
    assert layout.text_targets(reversed_order=False) == slice(0, 2)
    short, whole = (layout.text_prefix(pad_texts([[7], []], length)) for length in (1, 3))
    assert all(torch.equal(*pair) for pair in zip(short[:3], whole[:3], strict=True))


def test_a_null_that_is_image_first_reads_the_image_as_the_reversed_order_does() -> None:
    layout = SequenceLayout(LAYOUT.config.model_copy(update={"null_condition": "image_first"}))
    found, others, behind = layout.join(TEXT, IMAGE), LAYOUT.join(TEXT, IMAGE), LAYOUT.join_reversed(TEXT, IMAGE)
    assert found.ids_BL[1].tolist() == [PAD] * 5 + [I2T, 14, 14, 11, 15]
    assert found.real_BL[1].tolist() == [0] * 5 + [1] * 5
    assert found.ids_BL[1, 5:].equal(behind.ids_BL[1, :5])
    assert found.positions_BLA[1, 5:].equal(behind.positions_BLA[1, :5])
    for part, other in zip(found[:3], others[:3], strict=True):
        assert part[::2].equal(other[::2])


PAIRED = SequenceLayout(LAYOUT.config.model_copy(update={"image_marks": "paired"}))


def test_paired_marks_by_hand() -> None:
    assert PAIRED.n_ids == LAYOUT.n_ids and PAIRED.length == PAIRED.n_sequence_positions == LAYOUT.length + 1
    forth, back = PAIRED.join(TEXT, IMAGE), PAIRED.join_reversed(TEXT, IMAGE)
    before = LAYOUT.join(TEXT, IMAGE)
    assert all(torch.equal(part[:, :-1], other) for part, other in zip(forth[:3], before[:3], strict=True))
    assert forth.ids_BL[:, -1].tolist() == [I2T] * 3
    assert back.ids_BL.tolist() == [
        [EOT, BOI, 11, 16, 12, 13, I2T, BOT, 7, 8, PAD],
        [EOT, BOI, 14, 14, 11, 15, I2T, BOT, PAD, PAD, PAD],
        [EOT, BOI, 12, 11, 13, 16, I2T, BOT, 1, 2, 3],
    ]
    assert back.real_BL.tolist() == [[1] * 10 + [0], [1] * 8 + [0] * 3, [1] * 11]
    image = [[0, 1, 1], [0, 1, 2], [0, 2, 1], [0, 2, 2]]
    one = [[0, 0, 0]] * 2 + image + [[0, 0, 0]] * 2 + [[1, 0, 0], [2, 0, 0], [3, 0, 0]]
    assert back.positions_BLA.tolist() == [one] * 3
    for order, sequences in ((False, forth), (True, back)):
        at = PAIRED.image_targets(reversed_order=order)
        assert torch.equal(sequences.ids_BL[:, at.start + 1 : at.stop + 1], IMAGE + FIRST)
    at = PAIRED.text_targets(reversed_order=True)
    assert back.ids_BL[:, at.start + 1 : at.stop + 1].tolist() == [[7, 8, PAD], [PAD] * 3, [1, 2, 3]]
    assert PAIRED.text_targets(reversed_order=False) == LAYOUT.text_targets(reversed_order=False)


def test_a_second_image_has_marks_of_its_own_and_is_counted_from_them() -> None:
    layout = SequenceLayout(PAIRED.config.model_copy(update={"grid_width": 4}), LowResolutionCondition())
    b1, b2, b3 = layout.second_marks
    assert layout.second_marks == (22, 23, 24) and layout.n_ids == LAYOUT.n_ids + 3
    low, image = torch.tensor([[4, 0], [1, 1], [5, 3]]), torch.zeros(3, 8, dtype=torch.long)
    whole = layout.low_resolution_prefix(TEXT, low).then(layout.image_part(image))
    behind = [I2T, b1, b2, EOT, b3]
    assert whole.ids_BL[:, :13].tolist() == [
        [PAD, T2I, 7, 8, EOT, BOI, 15, 11, *behind],
        [PAD, PAD, PAD, T2I, EOT, BOI, 12, 12, *behind],
        [T2I, 1, 2, 3, EOT, BOI, 16, 14, *behind],
    ]
    assert (layout.prefix_length, layout.length, layout.n_sequence_positions) == (13, 21, 12)
    again = [1, 2, 3, *range(4, 12)]  # the first of the marks has its place in the whole
    assert layout.index_in_sequence(whole).tolist() == [
        [0, *range(9), *again], [0, 0, 0, *range(7), *again], [*range(10), *again],
    ]  # fmt: skip
    part = layout.image_part(image[:, 3:5], 3)
    assert layout.index_in_sequence(part, torch.tensor([99, 98, 97])).tolist() == [[7, 8]] * 3


@pytest.mark.parametrize(
    "sizes", [{"padding": "bare"}, {"null_condition": "image_first"}, {"n_text_ids": 0, "text_length": 0}], ids=str
)
def test_paired_marks_stand_beside_those_of_texts(sizes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="image_marks paired: found"):
        LayoutConfig(**PAIRED.config.model_dump() | sizes)


@pytest.mark.parametrize(
    "sizes", [{"padding": "learned"}, {"padding": "bare"}, {"n_text_ids": 0, "text_length": 0}], ids=str
)
def test_a_null_that_is_image_first_is_of_texts_with_masked_padding(sizes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="null_condition image_first: found"):
        LayoutConfig(**LAYOUT.config.model_dump() | {"null_condition": "image_first"} | sizes)
