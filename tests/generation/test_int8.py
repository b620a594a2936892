import pytest
import torch

from vqt2i.errors import ConfigError
from vqt2i.generation.decode import Job, decode_image_ids
from vqt2i.generation.int8 import Int8Linear, Int8WeightLinear, to_int8
from vqt2i.generation.sampling import SamplingConfig
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_with_8_bit_weights_is_that_of_rounded_ones(dtype: torch.dtype) -> None:
    x, weight_OI = torch.randn(5, 1, 40).to(dtype), torch.randn(24, 40) * torch.logspace(-3, 3, 24)[:, None]
    linear = Int8WeightLinear(weight_OI)
    scale = weight_OI.abs().amax(-1, keepdim=True) / 127
    assert linear.rounded_OI.dtype == torch.int8 and linear.rounded_OI.abs().max() == 127
    found, expected = linear(x), x.float() @ ((weight_OI / scale).round() * scale).T
    assert found.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    # of each output by its own size
    torch.testing.assert_close(
        found.float() / scale.T, expected / scale.T, **{**tolerance, "atol": tolerance["atol"] * 127}
    )
    zeros = Int8WeightLinear(torch.zeros(8, 16))(torch.randn(2, 16))
    assert torch.equal(zeros, torch.zeros(2, 8))


@torch.no_grad()
@pytest.mark.parametrize("rounded", ["weights and activations", "weights"])
def test_logits_stay_close_and_nothing_of_the_original_changes(make_gpt, rounded: str) -> None:
    gpt = make_gpt()
    before = {name: value.clone() for name, value in gpt.state_dict().items()}
    prefix = gpt.layout.text_prefix(pad_texts([[1, 2, 3], [], [9, 8]], 5))
    expected, _ = gpt.prefill(prefix)
    twin = to_int8(gpt, rounded)
    found, _ = twin.prefill(prefix)
    assert 0 < (found - expected).abs().mean() < 0.05 * expected.std()
    assert torch.equal(gpt.prefill(prefix)[0], expected)
    assert all(torch.equal(value, before[name]) for name, value in gpt.state_dict().items())
    assert twin.embedding.weight is gpt.embedding.weight


@pytest.mark.parametrize("rounded", ["weights and activations", "weights"])
def test_int8_images_depend_on_no_neighbour_either(make_gpt, rounded: str) -> None:
    twin, sampling = to_int8(make_gpt(), rounded), SamplingConfig(guidance=2.0)
    expected = decode_image_ids(twin, JOBS, sampling, seed=5)
    for rows in (1, 4):
        found = decode_image_ids(twin, JOBS, sampling, seed=5, rows_at_once=rows)
        assert torch.equal(found, expected)


def test_what_is_rounded_follows_from_the_device_where_nothing_is_said(make_gpt) -> None:
    assert isinstance(to_int8(make_gpt()).head.linear, Int8Linear)
    assert isinstance(to_int8(make_gpt().to("meta")).head.linear, Int8WeightLinear)


def test_where_there_are_no_kernels_for_activations_they_are_refused(make_gpt, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="the model is on meta, expected cpu"):
        to_int8(make_gpt().to("meta"), "weights and activations")
    monkeypatch.setattr("torch.backends.quantized.engine", "qnnpack")
    with pytest.raises(ConfigError, match="'qnnpack'"):
        to_int8(make_gpt())
