import numpy as np
import pytest
import torch
from torch import nn

from vqt2i.data.images import to_tensor, to_uint8
from vqt2i.data.shards import DataSet
from vqt2i.evaluation.features import Extractor
from vqt2i.evaluation.reconstruction import batches_of, measure_reconstruction
from vqt2i.vq import ImageTokenizer
from vqt2i.vq.metrics import psnr


def test_it_measures_what_comes_out_as_a_file_would_hold_it(tiny_dataset: DataSet, tiny_vq: ImageTokenizer, tiny_clip):
    split = tiny_dataset.split("train")
    found = measure_reconstruction(tiny_vq, batches_of(split, 24, 16), Extractor.clip_tower(tiny_clip), None)
    rows = {row.name: row for row in found.rows}
    distances = {"clip_frechet_distance", "clip_kernel_distance", "clip_precision", "clip_recall"}
    assert rows.keys() == {"psnr", "ssim", "code_usage", "code_perplexity", *distances}
    assert {row.n for row in found.rows} == {24}
    x = to_tensor(np.stack([pair.image_HW3 for pair in split]))
    with torch.no_grad():
        ids = tiny_vq.encode(x)
        made = to_uint8(tiny_vq.decode(ids))
    assert rows["psnr"].value == pytest.approx(float(psnr(to_tensor(made), x).mean()), rel=1e-5)
    assert rows["psnr"].low < rows["psnr"].value < rows["psnr"].high
    assert rows["code_usage"].value == len(ids.unique()) / 16 and rows["code_usage"].low is None
    assert np.array_equal(found.reconstructions, made) and found.images.shape == made.shape


def test_lpips_is_measured_where_it_is_there(tiny_dataset: DataSet, tiny_vq: ImageTokenizer) -> None:
    class Distance(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x - y).abs().mean((1, 2, 3))

    found = measure_reconstruction(tiny_vq, batches_of(tiny_dataset.split("train"), 5, 16), None, Distance())
    rows = {row.name: row for row in found.rows}
    assert rows.keys() == {"psnr", "ssim", "lpips", "code_usage", "code_perplexity"}
    assert rows["lpips"].value > 0 and rows["lpips"].n == 5


def test_pictures_come_in_the_models_size_as_many_as_are_asked_for(tiny_dataset: DataSet) -> None:
    split = tiny_dataset.split("train")
    assert [batch.shape for batch in batches_of(split, 5, 8)] == [(5, 8, 8, 3)]
    assert sum(len(batch) for batch in batches_of(split, 1000, 16)) == len(split)
