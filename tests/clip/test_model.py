import math

import pytest
import torch

from vqt2i.clip import CLIP, CLIPConfig, contrastive_loss
from vqt2i.clip.model import ClassReadout, EndReadout
from vqt2i.data.images import to_tensor
from vqt2i.data.shards import DataSet
from vqt2i.nn.transformer import TransformerConfig
from vqt2i.text import TextTokenizer, pad_texts

PUBLISHED = TransformerConfig(
    width=32, n_layers=2, n_heads=2, mlp_width=48, norm="layer", mlp="gelu_quick", bias=True, qk_norm=False
)


@pytest.fixture(params=["ours", "published"])
def clip(request: pytest.FixtureRequest, tiny_clip: CLIP) -> CLIP:
    """A scorer of ours, and one with the choices of Radford et al."""
    if request.param == "ours":
        return tiny_clip
    values = {"vision": PUBLISHED, "text": PUBLISHED, "image_readout": ClassReadout(),
              "text_readout": EndReadout(start_id=40, end_id=41), "pixel_mean": (0.4, 0.5, 0.6)}  # fmt: skip
    torch.manual_seed(0)
    return CLIP(tiny_clip.config.model_copy(update=values)).eval()


@torch.no_grad()
def test_embeddings_are_unit_vectors_of_the_configured_width(clip: CLIP) -> None:
    image_BE = clip.encode_image(torch.rand(3, 3, 16, 16) * 2 - 1)
    text_BE = clip.encode_text(*pad_texts([[1], [2, 3], []], 12))
    for x_BE in (image_BE, text_BE):
        assert x_BE.shape == (3, 16) and x_BE.dtype == torch.float32
        torch.testing.assert_close(x_BE.norm(dim=-1), torch.ones(3))


@torch.no_grad()
def test_padding_and_neighbours_change_no_text(clip: CLIP) -> None:
    texts = [[5, 6, 7], [], list(range(3, 15)), [9]]
    together = clip.encode_text(*pad_texts(texts, 12))
    for row, text in enumerate(texts):
        short = pad_texts([text], 12)
        short.ids_BS[0, len(text) :] = 17  # what stands in the padding does not matter either
        torch.testing.assert_close(clip.encode_text(*short), together[row : row + 1])


@torch.no_grad()
def test_the_order_of_words_and_of_patches_matters(clip: CLIP) -> None:
    a, b = (clip.encode_text(*pad_texts([text], 12)) for text in ([5, 6], [6, 5]))
    assert (a - b).abs().max() > 1e-4
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert (clip.encode_image(image) - clip.encode_image(image.roll(4, -1))).abs().max() > 1e-4


@torch.no_grad()
def test_patches_are_read_channel_by_channel_row_by_row(tiny_clip: CLIP) -> None:
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    seen = []
    tiny_clip.patch_embedding.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    tiny_clip.encode_image(image)
    assert torch.equal(seen[0][0, 6], image[0, :, 4:8, 8:12].flatten())


@torch.no_grad()
def test_pixels_are_brought_to_the_configured_mean_and_deviation(tiny_clip: CLIP) -> None:
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    other = CLIP(tiny_clip.config.model_copy(update={"pixel_mean": mean, "pixel_std": std})).eval()
    other.load_state_dict(tiny_clip.state_dict())  # they are of the configuration, not of the weights
    read = ((image + 1) / 2 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(other.encode_image(image), tiny_clip.encode_image(read))
    seen = []
    tiny_clip.patch_embedding.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    tiny_clip.encode_image(image)
    assert torch.equal(seen[0][0, 0], image[0, :, :4, :4].flatten())  # by default not a bit changes


@torch.no_grad()
def test_a_marked_text_is_read_at_its_end_and_its_positions_see_no_later_ones() -> None:
    config = CLIPConfig(
        image_size_px=8, patch_size_px=4, text_length=5, n_text_ids=9, vision=PUBLISHED, text=PUBLISHED,
        embedding_width=6, text_tokenizer="t", text_readout=EndReadout(start_id=7, end_id=8),
    )  # fmt: skip
    torch.manual_seed(0)
    clip, seen = CLIP(config).eval(), []
    clip.text.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0] - clip.text_positions))
    hidden = []
    clip.text.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    texts = [[1, 2, 3], [1, 2], []]
    found = clip.encode_text(*pad_texts(texts, 5))
    ids = [[7, 1, 2, 3, 8, 8, 8], [7, 1, 2, 8, 8, 8, 8], [7, 8, 8, 8, 8, 8, 8]]
    torch.testing.assert_close(seen[0], clip.text_embedding(torch.tensor(ids)))
    ends = torch.stack([hidden[0][0, 4], hidden[0][1, 3], hidden[0][2, 1]])
    torch.testing.assert_close(found, torch.nn.functional.normalize(clip.text_projection(ends), dim=-1))
    torch.testing.assert_close(hidden[0][0, :3], hidden[0][1, :3])  # before the first difference
    assert (hidden[0][0, 3] - hidden[0][1, 3]).abs().max() > 1e-3


def test_marks_are_ids_of_the_vocabulary(tiny_clip: CLIP) -> None:
    values = tiny_clip.config.model_dump() | {"text_readout": {"kind": "end", "start_id": 3, "end_id": 9999}}
    with pytest.raises(ValueError, match="marks 3 and 9999, but n_text_ids is"):
        CLIPConfig(**values)


@pytest.mark.parametrize(("log_scale", "scale"), [(-3.0, 1.0), (math.log(20), 20.0), (9.0, 100.0)])
def test_the_scale_is_clamped(tiny_clip: CLIP, log_scale: float, scale: float) -> None:
    tiny_clip.logit_scale.log.data.fill_(log_scale)
    assert tiny_clip.logit_scale().item() == pytest.approx(scale, rel=1e-5)


def test_patches_must_tile_the_image(tiny_clip: CLIP) -> None:
    with pytest.raises(ValueError, match="must be a multiple of patch_size_px"):
        CLIPConfig(**tiny_clip.config.model_dump() | {"patch_size_px": 5})


def test_it_learns_to_tell_colours_apart_within_60_steps(
    tiny_clip: CLIP, tiny_text: TextTokenizer, tiny_dataset: DataSet
) -> None:
    pairs = list(tiny_dataset.split("train"))[:4]  # one of each colour
    image = torch.stack([to_tensor(pair.image_HW3) for pair in pairs])
    text = pad_texts([tiny_text.encode(pair.captions["zh"][0]) for pair in pairs], 12)
    optimizer, itself = torch.optim.AdamW(tiny_clip.parameters(), lr=2e-3), torch.eye(4, dtype=torch.bool)
    for _ in range(60):
        image_BE, text_BE = tiny_clip.encode_image(image), tiny_clip.encode_text(*text)
        out = contrastive_loss(image_BE, text_BE, tiny_clip.logit_scale(), itself)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert out.accuracy.item() == 1 and out.loss.item() < 0.1
    with torch.no_grad():
        unseen = torch.stack([to_tensor(pair.image_HW3) for pair in list(tiny_dataset.split("train"))[4:]])
        best = (tiny_clip.encode_image(unseen) @ tiny_clip.encode_text(*text).T).argmax(1)
    assert (best == torch.arange(20) % 4).float().mean() > 0.9
