import pytest
import torch

from vqt2i.errors import ConfigError
from vqt2i.generation.decode import Job, decode_image_ids
from vqt2i.generation.int8 import Int8Linear, to_int8
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.nn.transformer import TransformerConfig
from vqt2i.text import pad_texts

JOBS = [Job(text, prompt, image) for prompt, text in enumerate([(1, 2, 3), (), (9, 8)]) for image in range(3)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@torch.no_grad()
def test_a_product_is_that_of_rows_rounded_to_8_bits() -> None:
    x_BLI, weight_OI = torch.randn(5, 1, 40) * torch.logspace(-3, 3, 5)[:, None, None], torch.randn(24, 40)

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        scale = rows.abs().amax(-1, keepdim=True) / 127
        return (rows / scale).round() * scale

    found, exact = Int8Linear(weight_OI)(x_BLI), x_BLI @ weight_OI.T
    torch.testing.assert_close(found, rounded(x_BLI) @ rounded(weight_OI).T, rtol=1e-3, atol=1e-4)
    assert ((found - exact).norm(dim=-1) < 0.03 * exact.norm(dim=-1)).all()


@torch.no_grad()
def test_a_row_of_zeros_gives_zeros() -> None:
    assert torch.equal(Int8Linear(torch.randn(8, 16))(torch.zeros(2, 16)), torch.zeros(2, 8))


@torch.no_grad()
def test_a_bias_is_added_unrounded() -> None:
    x_BLI, weight_OI, bias_O = torch.randn(5, 1, 40), torch.randn(24, 40), torch.randn(24)
    torch.testing.assert_close(Int8Linear(weight_OI, bias_O)(x_BLI), Int8Linear(weight_OI)(x_BLI) + bias_O)


@pytest.mark.parametrize("changes", [{}, {"mlp": "gelu", "norm": "layer", "bias": True}], ids=str)
@torch.no_grad()
def test_logits_stay_close_and_nothing_of_the_original_changes(make_gpt, changes: dict) -> None:
    gpt = make_gpt(transformer=TransformerConfig(width=32, n_layers=2, n_heads=2, mlp_width=48, **changes))
    for bias in (p for name, p in gpt.named_parameters() if name.endswith("bias")):
        torch.nn.init.normal_(bias, std=0.1)
    before = {name: value.clone() for name, value in gpt.state_dict().items()}
    prefix = gpt.layout.text_prefix(pad_texts([[1, 2, 3], [], [9, 8]], 5))
    expected, _ = gpt.prefill(prefix)
    twin = to_int8(gpt)
    found, _ = twin.prefill(prefix)
    assert 0 < (found - expected).abs().mean() < 0.05 * expected.std()
    assert torch.equal(gpt.prefill(prefix)[0], expected)
    assert all(torch.equal(value, before[name]) for name, value in gpt.state_dict().items())
    assert twin.embedding.weight is gpt.embedding.weight


def test_int8_images_depend_on_no_neighbour_either(make_gpt) -> None:
    twin, sampling = to_int8(make_gpt()), SamplingConfig(guidance=2.0)
    expected = decode_image_ids(twin, JOBS, sampling, seed=5)
    for rows in (1, 4):
        found = decode_image_ids(twin, JOBS, sampling, seed=5, rows_at_once=rows)
        assert torch.equal(found, expected)


def test_where_there_are_no_kernels_int8_is_refused(make_gpt, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="the model is on meta, expected cpu"):
        to_int8(make_gpt().to("meta"))
    monkeypatch.setattr("torch.backends.quantized.engine", "qnnpack")
    with pytest.raises(ConfigError, match="'qnnpack'"):
        to_int8(make_gpt())
