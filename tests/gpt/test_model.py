import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from vqt2i.gpt import GPT, Sequences
from vqt2i.nn.cache import BranchedCache, Branches
from vqt2i.nn.sparsity import PivotWindowConfig, RowColumnConfig
from vqt2i.nn.transformer import TransformerConfig
from vqt2i.text import TextBatch, pad_texts

TEXTS = [[1, 2, 3], [], [4, 5, 6, 7, 8], [9]]
TWO_AXES = pytest.mark.parametrize("positions", ["rotary", "learned"])


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


@torch.no_grad()
def test_prefill_and_cached_steps_match_the_full_forward_for_ragged_counts(make_gpt, gpt_kind: dict) -> None:
    gpt, image_BI = make_gpt(**gpt_kind), images(7)
    texts = [TEXTS[row] for row in (0, 1, 1, 1, 2, 2, 2)]
    expected = image_logits(gpt, pad_texts(texts, 5), image_BI)
    groups = [(pad_texts(TEXTS[:1], 3), 1), (pad_texts(TEXTS[1:3], 5), 3)]
    torch.testing.assert_close(cached_image_logits(gpt, groups, image_BI), expected)


@torch.no_grad()
def test_several_tokens_in_one_step_match_one_by_one(make_gpt, gpt_kind: dict) -> None:
    gpt, image_BI, text = make_gpt(**gpt_kind), images(4), pad_texts(TEXTS, 5)
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


@torch.no_grad()
def test_a_row_of_a_batch_has_the_logits_it_has_alone(make_gpt, gpt_kind: dict) -> None:
    gpt, image_BI = make_gpt(**gpt_kind), images(4)
    together = image_logits(gpt, pad_texts(TEXTS, 5), image_BI)
    for row, text in enumerate(TEXTS):
        alone = image_logits(gpt, pad_texts([text], 5), image_BI[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone)


@pytest.mark.parametrize("text_length", [5, 70])
@torch.no_grad()
def test_a_text_before_an_image_sees_all_of_itself_where_it_is_to(make_gpt, text_length: int) -> None:
    """In fp32 and in bf16, whose kernel leaves out what stands behind a block of queries."""
    texts = [pad_texts([[1] * (text_length - 1) + [last]], text_length) for last in (5, 6)]
    for kind in ("causal", "full"):
        gpt = make_gpt(text_length=text_length, text_attention=kind)
        for dtype in (torch.float32, torch.bfloat16):
            states = [gpt.to(dtype)(gpt.layout.join(text, images(1)))[0, :text_length] for text in texts]
            same = torch.isclose(*states).all(-1)  # of T2I and all ids but the last
            assert same.all() if kind == "causal" else not same.any()
        behind = [gpt(gpt.layout.join_reversed(text, images(1))) for text in texts]
        last = 1 + gpt.layout.image_length + text_length  # where the last id of the text stands
        assert torch.equal(behind[0][:, :last], behind[1][:, :last])
        assert not torch.equal(behind[0][:, last], behind[1][:, last])


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


@pytest.mark.parametrize("method", ["join", "join_reversed"])
@torch.no_grad()
def test_a_later_token_changes_no_earlier_state(make_gpt, gpt_kind: dict, method: str) -> None:
    gpt = make_gpt(**gpt_kind)
    if method == "join_reversed" and not gpt.layout.has_marks:
        pytest.skip("bare texts have one order")
    sequences = getattr(gpt.layout, method)(pad_texts([[1, 2, 3, 4, 5]], 5), images(1))
    before = gpt(sequences)
    sees_text_in_full = gpt.layout.config.text_attention == "full" and method == "join"
    for index in range(gpt.layout.prefix_length if sees_text_in_full else 1, gpt.layout.length):
        ids = sequences.ids_BL.clone()
        ids[0, index] = (ids[0, index] + 1) % gpt.layout.n_ids
        after = gpt(sequences._replace(ids_BL=ids))
        torch.testing.assert_close(after[:, :index], before[:, :index])
        changed = (after[:, index:] - before[:, index:]).abs().amax(-1) > 1e-6
        assert changed.all() if gpt.visible_by_layer() is None else changed[:, 0].all()


@torch.no_grad()
def test_each_head_scores_its_own_modality_only(make_gpt) -> None:
    gpt = make_gpt()
    hidden = gpt(gpt.layout.join(pad_texts(TEXTS, 5), images(4)))
    text, image = gpt.text_logits(hidden), gpt.image_logits(hidden)
    assert text.shape == (4, 14, 10 + 1) and image.shape == (4, 14, 6)
    torch.testing.assert_close(torch.cat((text, image), dim=-1), gpt.head(hidden, slice(None)))


@TWO_AXES
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
        kv = gpt.prefill(gpt.layout.text_prefix(text))[1].kv
    assert kv.dtype == torch.float32 and torch.equal(kv, kv.bfloat16().float())  # as steps on a CPU read them
    for found in (full, cached):
        assert (found.float() - expected).abs().mean() < 0.02 * expected.std()


@torch.no_grad()
def test_weights_in_bf16_work_too(make_gpt) -> None:
    gpt, text = make_gpt().bfloat16(), pad_texts(TEXTS, 5)
    logits, cache = gpt.prefill(gpt.layout.text_prefix(text))
    assert logits.dtype == torch.bfloat16 and cache.kv.dtype == torch.float32
    cached = cached_image_logits(gpt, [(text, 1)], images(4))
    assert cached.dtype == torch.bfloat16 and cached.isfinite().all()


def test_a_sequence_of_no_rows_is_allowed(make_gpt) -> None:
    gpt = make_gpt()
    none = Sequences(*(t[:0] for t in gpt.layout.join(pad_texts(TEXTS, 5), images(4))[:3]))
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


@pytest.mark.parametrize("gpt_kind", ["DALL-E", "pivots"], indirect=True)
@pytest.mark.parametrize("method", ["join", "join_reversed"])
def test_only_between_image_positions_is_anything_hidden_that_causal_attention_sees(make_gpt, gpt_kind, method) -> None:
    gpt = make_gpt(**gpt_kind)
    sequences = getattr(gpt.layout, method)(pad_texts(TEXTS, 5), images(4))
    start = 8 if method == "join" else 1  # of the image
    causal = sequences.causal_mask()
    for mask, pattern in zip(gpt._masks(sequences), gpt.patterns, strict=True):
        visible = gpt.config.sparsity.visible(pattern, 3, 2)
        for q in range(14):
            for k in range(14):
                inside = start <= q < start + 6 and start <= k < start + 6
                seen = causal[:, 0, q, k] & bool(visible[q - start, k - start]) if inside else causal[:, 0, q, k]
                assert torch.equal(mask[:, 0, q, k], seen)


@pytest.mark.parametrize("gpt_kind", ["DALL-E", "pivots"], indirect=True)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_masks_in_blocks_give_the_states_of_plain_masks(make_gpt, gpt_kind: dict, monkeypatch) -> None:
    gpt = make_gpt(**gpt_kind)
    sequences = gpt.layout.join(pad_texts(TEXTS, 5), images(4))
    expected = gpt(sequences)
    monkeypatch.setattr(gpt, "_in_blocks", lambda device: True)
    assert all(isinstance(mask, BlockMask) for mask in gpt._masks(sequences))
    torch.compiler.set_stance("force_eager")  # compiled, the same takes half a minute
    try:
        found = gpt(sequences)
    finally:
        torch.compiler.set_stance("default")
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_what_a_pattern_hides_in_every_layer_changes_nothing(make_gpt) -> None:
    shallow = TransformerConfig(width=32, n_layers=1, n_heads=2, mlp_width=48)
    gpt = make_gpt("learned", transformer=shallow, sparsity=RowColumnConfig(conv_size=1), text_length=5)
    text, image_BI = pad_texts([[1, 2]], 5), images(1)
    before = image_logits(gpt, text, image_BI)
    image_BI[:, 0] = (image_BI[:, 0] + 1) % 6
    changed = (image_logits(gpt, text, image_BI) - before).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [False, True, False, False, False, False]  # a kernel of 1 sees itself only


@pytest.mark.parametrize("gpt_kind", ["DALL-E"], indirect=True)
def test_the_matrices_of_what_is_visible_are_no_weights_and_need_no_memory_of_theirs(make_gpt, gpt_kind) -> None:
    gpt = make_gpt(**gpt_kind)
    assert gpt.patterns == ["row", "column", "row", "row", "conv"] and gpt.visible_PII.shape == (3, 6, 6)
    assert "visible_PII" not in gpt.state_dict()
    with torch.device("meta"):
        planned = GPT(gpt.config)
    planned.load_state_dict(gpt.state_dict(), assign=True)
    sequences = gpt.layout.join(pad_texts(TEXTS, 5), images(4))
    torch.testing.assert_close(planned.eval()(sequences), gpt(sequences))


def test_more_pivots_than_image_ids_are_refused(make_gpt) -> None:
    with pytest.raises(ValueError, match=r"n_pivots 7: expected at most the image's 6 ids"):
        make_gpt(sparsity=PivotWindowConfig(n_pivots=7))


def test_an_odd_width_of_heads_is_for_learned_positions_only(make_gpt) -> None:
    odd = TransformerConfig(width=30, n_layers=2, n_heads=6, mlp_width=48)
    gpt = make_gpt("learned", transformer=odd)
    assert gpt(gpt.layout.join(pad_texts(TEXTS, 5), images(4))).isfinite().all()
    with pytest.raises(ValueError, match="positions rotary: heads are 5 wide, expected a multiple of 2"):
        make_gpt(transformer=odd)
