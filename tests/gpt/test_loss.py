import math

import pytest
import torch
from torch import Tensor

from vqt2i.gpt import GPT, HeadConfig, LossWeights, caption_log_probability, gpt_loss
from vqt2i.gpt.loss import token_nll
from vqt2i.text import TextBatch, pad_texts

TEXTS = [[1, 2, 3], [], [4, 5, 6, 7, 8], [9]]
WEIGHTS = LossWeights(image=1.0, text=0.3, text_from_image=0.7, image_unconditional=0.2, z=0.01)


@pytest.fixture(params=["single", "paired"])
def gpt(make_gpt, request) -> GPT:
    return make_gpt(image_marks=request.param)


@pytest.fixture
def image_BI() -> Tensor:
    return torch.randint(6, (4, 6), generator=torch.Generator().manual_seed(1))


def token_losses(gpt: GPT, text: list[int], image: list[int], order: str) -> dict[str, list[tuple[float, float]]]:
    """(negative log-likelihood, log-partition) of each token, the row alone and unpadded, position by position."""
    layout = gpt.layout
    codes = [i + layout.first_image_id for i in image]
    words = [*text, layout.eot]
    coordinates = [(0, i // 2 + 1, i % 2 + 1) for i in range(6)]
    counted = [(i + 1, 0, 0) for i in range(len(words))]
    mark = (0, 0, 0)
    if order == "forth":
        ids, positions = [layout.t2i, *words, layout.boi, *codes], [mark, *counted, mark, *coordinates]
    elif layout.has_pairs:
        ids = [layout.eot, layout.boi, *codes, layout.i2t, layout.bot, *text]
        positions = [mark, mark, *coordinates, mark, mark, *counted[:-1]]
    else:
        ids, positions = [layout.i2t, *codes, layout.bot, *words], [mark, *coordinates, mark, *counted]
    x, cos_sin = gpt.embedding(torch.tensor([ids])), gpt.rotary(torch.tensor([positions]))
    below = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()[None, None]
    logits = gpt.head(gpt.transformer(x, mask_B1LK=below, cos_sin=cos_sin), slice(None))[0]
    found = {"text": [], "image": []}
    for at, target in enumerate(ids[1:]):
        if target >= layout.pad:
            continue
        name, first, last = ("text", 0, 11) if target <= layout.eot else ("image", 11, 17)
        log_z = logits[at, first:last].logsumexp(0)
        found[name].append((float(log_z - logits[at, target]), float(log_z)))
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


@pytest.mark.parametrize("n_reversed", [0, 2, 4])
def test_a_text_seen_in_full_is_no_part_of_the_loss(make_gpt, image_BI: Tensor, n_reversed: int) -> None:
    gpt, text = make_gpt(text_attention="full"), pad_texts(TEXTS, 5)
    loss, other = (
        gpt_loss(gpt, text, image_BI, n_reversed, WEIGHTS.model_copy(update={"text": weight})) for weight in (0.3, 0.0)
    )
    assert not loss.text.nan_to_num() and loss.total.isfinite() and torch.equal(loss.total, other.total)
    loss.total.backward()
    of_text = gpt.head.weight.grad[: gpt.layout.first_image_id]
    assert of_text.any() == (n_reversed > 0)


@pytest.mark.parametrize("n_reversed", [0, 1, 3, 4])
@torch.no_grad()
def test_every_part_equals_a_loop_over_rows_and_positions(gpt: GPT, image_BI: Tensor, n_reversed: int) -> None:
    loss = gpt_loss(gpt, pad_texts(TEXTS, 5), image_BI, n_reversed, WEIGHTS)
    rows = [
        token_losses(gpt, text, image, "back" if row < n_reversed else "forth")
        for row, (text, image) in enumerate(zip(TEXTS, image_BI.tolist(), strict=True))
    ]
    back, forth = rows[:n_reversed], rows[n_reversed:]

    def nats(rows: list[dict], name: str) -> float:
        return mean([nll for row in rows for nll, _ in row[name]])

    expected = {
        "image": nats(forth, "image"),
        "text": nats(forth, "text"),
        "text_from_image": nats(back, "text"),
        "image_unconditional": nats(back, "image"),
    }
    for name, value in expected.items():
        assert float(getattr(loss, name)) == pytest.approx(value, rel=1e-5, nan_ok=True)
    share = n_reversed / 4
    shares = {"image": 1 - share, "text": 1 - share, "text_from_image": share, "image_unconditional": share}
    total = sum(getattr(WEIGHTS, name) * shares[name] * value for name, value in expected.items() if shares[name])
    total += WEIGHTS.z * sum(mean([z**2 for row in rows for _, z in row[name]]) for name in ("image", "text"))
    assert float(loss.total) == pytest.approx(total, rel=1e-5)


@torch.no_grad()
def test_the_caption_score_equals_a_loop_over_positions(gpt: GPT, image_BI: Tensor) -> None:
    found = caption_log_probability(gpt, pad_texts(TEXTS, 5), image_BI)
    for row, text in enumerate(TEXTS):
        tokens = token_losses(gpt, text, image_BI[row].tolist(), "back")["text"]
        assert len(tokens) == len(text) + (not gpt.layout.has_pairs)
        assert float(found[row]) == pytest.approx(-mean([nll for nll, _ in tokens] or [0.0]), rel=1e-5)


@torch.no_grad()
def test_the_caption_score_of_a_cut_text_is_that_of_its_beginning(gpt: GPT, image_BI: Tensor) -> None:
    long, short = ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5])
    a, b = (caption_log_probability(gpt, pad_texts([text], 5), image_BI[:1]) for text in (long, short))
    assert torch.equal(a, b)


def test_a_dropped_text_is_the_empty_text(gpt: GPT, image_BI: Tensor) -> None:
    text = pad_texts(TEXTS, 5)
    dropped = TextBatch(text.ids_BS, torch.zeros(4, dtype=torch.long))
    a, b = (gpt_loss(gpt, t, image_BI, 0, WEIGHTS) for t in (dropped, pad_texts([[]] * 4, 5)))
    torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("n_reversed", [0, 2, 4])
def test_every_weight_gets_a_finite_gradient(gpt: GPT, image_BI: Tensor, n_reversed: int) -> None:
    gpt_loss(gpt, pad_texts(TEXTS, 5), image_BI, n_reversed, WEIGHTS).total.backward()
    for name, parameter in gpt.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_a_weight_of_zero_takes_its_part_out(gpt: GPT, image_BI: Tensor) -> None:
    weights = LossWeights(image=1, text=0, text_from_image=0, image_unconditional=0, z=0)
    loss = gpt_loss(gpt, pad_texts(TEXTS, 5), image_BI, 0, weights)
    assert torch.equal(loss.total, loss.image)


def test_under_bf16_the_loss_is_close_to_that_in_fp32(gpt: GPT, image_BI: Tensor) -> None:
    expected = gpt_loss(gpt, pad_texts(TEXTS, 5), image_BI, 2, WEIGHTS).total
    with torch.autocast("cpu", torch.bfloat16):
        found = gpt_loss(gpt, pad_texts(TEXTS, 5), image_BI, 2, WEIGHTS).total
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)


def test_of_bare_texts_all_ids_but_the_first_are_predicted(make_gpt, image_BI: Tensor) -> None:
    gpt, text = make_gpt("learned", padding="bare", head=HeadConfig(norm=True, bias=True)), pad_texts(TEXTS, 5)
    loss = gpt_loss(gpt, text, image_BI, 0, WEIGHTS)
    hidden = gpt(gpt.layout.join(text, image_BI))
    nll = [
        token_nll(gpt.text_logits(hidden[row, : len(ids) - 1])[None], torch.tensor([ids[1:]]))[0].flatten()
        for row, ids in enumerate(TEXTS) if len(ids) > 1
    ]  # fmt: skip
    torch.testing.assert_close(loss.text, torch.cat(nll).mean())
    image_nll, _ = token_nll(gpt.image_logits(hidden[:, 4:-1]), image_BI)
    torch.testing.assert_close(loss.image, image_nll.mean())
    loss.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gpt.parameters())
    empty = gpt_loss(gpt, pad_texts([[], []], 5), image_BI[:2], 0, WEIGHTS)
    assert empty.total.isfinite() and empty.text == 0


def test_learned_padding_is_seen_by_the_image_and_never_predicted(make_gpt, image_BI: Tensor) -> None:
    gpt, text = make_gpt("learned", padding="learned"), pad_texts(TEXTS, 5)
    before = gpt_loss(gpt, text, image_BI, 0, WEIGHTS)
    hidden = gpt(gpt.layout.join(text, image_BI))
    nll = [
        token_nll(gpt.text_logits(hidden[row, : len(ids) + 1])[None], torch.tensor([[*ids, gpt.layout.eot]]))[0]
        for row, ids in enumerate(TEXTS)
    ]
    torch.testing.assert_close(before.text, torch.cat(nll, dim=1).mean())
    before.total.backward()
    grad = gpt.embedding.weight.grad[gpt.layout.first_learned_pad :]
    assert len(grad) == 5 and grad.abs().amax(1).min() > 0
    with torch.no_grad():
        gpt.embedding.weight[gpt.layout.first_learned_pad :] += 1
    after = gpt_loss(gpt, text, image_BI, 0, WEIGHTS)
    assert torch.equal(after.text, before.text) and after.image != before.image
