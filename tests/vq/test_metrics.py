import math

import numpy as np
import pytest
import torch

from vqt2i.errors import DataError
from vqt2i.vq.metrics import CodebookCounter, psnr, ssim


def images(seed: int, size: int = 16) -> torch.Tensor:
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_equals_hand_computed():
    x = torch.zeros(2, 3, 8, 8)
    y = torch.stack([torch.full((3, 8, 8), 0.2), torch.zeros(3, 8, 8)])
    assert psnr(x, y).tolist() == pytest.approx([20.0, 100.0], abs=1e-4)  # 2 / 0.2 is 20 dB


def test_ssim_is_one_for_equal_images_and_symmetric():
    x, y = images(0), images(1)
    torch.testing.assert_close(ssim(x, x), torch.ones(3))
    torch.testing.assert_close(ssim(x, y), ssim(y, x))


def test_ssim_equals_the_formula_position_by_position():
    x, y = images(0), (images(0) + 0.3 * images(1)).clamp(-1, 1)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    values = []
    for a, b in zip(x[0].double().numpy(), y[0].double().numpy(), strict=True):
        for row in range(6):
            for column in range(6):
                p, q = a[row : row + 11, column : column + 11], b[row : row + 11, column : column + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                c1, c2 = 0.02**2, 0.06**2
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert ssim(x, y)[0].item() == pytest.approx(np.mean(values), abs=1e-5)


def test_ssim_is_the_same_where_products_are_made_in_bf16():
    x = 0.5 + 0.01 * images(0)  # nearly flat: a small variance beside a large mean
    with torch.autocast("cpu", torch.bfloat16):
        found = ssim(x, 0.5 + 0.01 * images(1))
    torch.testing.assert_close(found, ssim(x, 0.5 + 0.01 * images(1)))


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(DataError, match="at least 11 px, found 8 x 8"):
        ssim(images(0, 8), images(1, 8))


def test_usage_equals_hand_computed_over_batches():
    counter = CodebookCounter(8)
    counter.update(torch.tensor([[0, 0], [1, 2]]))
    counter.update(torch.tensor([1, 2, 3, 3]))
    usage = counter.compute()
    assert usage.usage == 0.5
    assert usage.dead_codes == 4
    assert usage.perplexity == pytest.approx(4.0)


def test_perplexity_is_one_for_one_code_and_all_for_even_use():
    one, even = CodebookCounter(8), CodebookCounter(8)
    one.update(torch.zeros(5, dtype=torch.long))
    even.update(torch.arange(8))
    assert one.compute().perplexity == pytest.approx(1.0)
    assert even.compute().perplexity == pytest.approx(8.0)
    assert even.compute().dead_codes == 0


def test_reset_forgets():
    counter = CodebookCounter(4)
    counter.update(torch.arange(4))
    counter.reset()
    counter.update(torch.tensor([1]))
    assert counter.compute().dead_codes == 3
    assert math.isclose(counter.compute().usage, 0.25)
