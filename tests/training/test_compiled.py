import copy
import shutil

import pytest
import torch

from vqt2i.gpt import LossWeights, gpt_loss
from vqt2i.nn.sparsity import RowColumnConfig
from vqt2i.nn.transformer import TransformerConfig
from vqt2i.text import pad_texts
from vqt2i.training.compiled import compile_for_training

PUBLISHED = {
    "transformer": TransformerConfig(
        width=32, n_layers=2, n_heads=2, mlp_width=48, norm="scaled_layer", norm_placement="sandwich", mlp="gelu_tanh",
        bias=True, qk_norm=False, pb_relax=True,
    ),
    "positions": "sequence", "padding": "learned", "sparsity": RowColumnConfig(conv_size=3),
}  # fmt: skip


@pytest.mark.parametrize("kind", [{}, PUBLISHED], ids=["default", "published"])
def test_a_compiled_step_gives_the_loss_and_gradients_of_a_plain_one(make_gpt, kind: dict):
    assert shutil.which("g++") or shutil.which("clang++"), "torch.compile needs a C++ compiler: apt install g++"
    plain = make_gpt(**kind).train()
    compiled = copy.deepcopy(plain)
    compiled_loss = compile_for_training(gpt_loss)
    layout = plain.layout
    text = pad_texts([[1, 2], [3]], layout.config.text_length)
    image_BI = torch.randint(layout.config.n_image_ids, (2, layout.image_length), generator=torch.Generator())
    losses = []
    for gpt, loss_of in ((plain, gpt_loss), (compiled, compiled_loss)):
        loss = loss_of(gpt, text, image_BI, 1, LossWeights())
        loss.total.backward()
        losses.append(loss)
    for name in losses[0]._fields:
        torch.testing.assert_close(getattr(losses[1], name), getattr(losses[0], name))
    for (name, expected), actual in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, msg=name)


def test_without_a_compiler_training_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compile_for_training(gpt_loss) is gpt_loss
