"""What holds for every family: of a model of ours in its layout, and of files that are none."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vqt2i.checkpoint import load_model, read_card
from vqt2i.cli import main
from vqt2i.clip import CLIP
from vqt2i.gpt import (
    GPT,
    LabelCondition,
    LossWeights,
    LowResolution,
    VectorBatch,
    VectorCondition,
    Vectors,
    gpt_loss,
)
from vqt2i.peers import FAMILIES
from vqt2i.peers.cogview import EMBEDDINGS, MARKS, POSITIONS
from vqt2i.peers.convert import import_checkpoint
from vqt2i.peers.family import MODELS
from vqt2i.peers.gpts import image_logits
from vqt2i.peers.llamagen import image_logits as image_logits_after_vectors
from vqt2i.text import TextBatch
from vqt2i.vq import ImageTokenizer

N_IDS, N_TEXT, S = 12, 10, 7  # of the models here; longest text
every_family = pytest.mark.parametrize("name", FAMILIES)


def imported(made, out: Path) -> nn.Module:
    import_checkpoint(FAMILIES[made.name], made.path, out, made.options)
    return load_model(out, *MODELS[FAMILIES[made.name].kind])


@pytest.fixture
def refused(fails, tmp_path: Path) -> Callable[..., str]:
    """What is told of a checkpoint, or of an option, that is refused; nothing is written."""

    def told(made, *options: object, family: str | None = None) -> str:
        out = tmp_path / "refused"
        arguments = (*made.arguments, *options) if family is None else options
        message = fails("import_checkpoint", family or made.name, made.path, "--out", out, *arguments)
        assert not out.exists() and not list(tmp_path.glob(".vqt2i*"))
        return message

    return told


@every_family
def test_a_model_of_ours_comes_back_as_it_was(native, tmp_path: Path, name: str) -> None:
    made = native(name)
    found = imported(made, tmp_path / "m")
    expected = made.model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found.state_dict()[key], value, rtol=0, atol=1e-6, msg=key)
    card = read_card(tmp_path / "m")
    assert card["source"]["family"] == name and card["source"]["sha256"] and card["licence"]
    assert (tmp_path / "m" / "README.md").read_text().startswith("---\nlicense: ")


@every_family
def test_it_trains(native, tmp_path: Path, name: str) -> None:
    model = imported(native(name), tmp_path / "m").train()
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, GPT):
        values = values_of(model)
        image_BI = torch.randint(N_IDS, (len(values), 64), generator=generator)
        condition = model.reader.collate(values, torch.device("cpu"), whole=True)
        n_reversed = 1 if model.layout.has_both_orders else 0
        gpt_loss(model, condition, image_BI, n_reversed, LossWeights()).total.backward()
    elif isinstance(model, ImageTokenizer):
        size_px = model.config.image_size_px
        pixels = torch.rand(2, 3, size_px, size_px, generator=generator) * 2 - 1
        made = model(pixels)
        (made.reconstruction_B3HW.square().mean() + made.quantizer_loss).backward()
    else:
        pixels = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
        text_BE = model.encode_text(torch.tensor([[1, 2, 3, 0, 0], [4, 0, 0, 0, 0]]), torch.tensor([3, 1]))
        (model.logit_scale() * model.encode_image(pixels) @ text_BE.T).square().mean().backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all(), parameter


def values_of(gpt: GPT) -> list:
    """Two conditions of a GPT, of what it reads, and its null."""
    config = gpt.config.condition
    if isinstance(config, LabelCondition):
        return [0, 2, config.n_labels]
    if isinstance(config, VectorCondition):
        vectors = [torch.full((1, config.width), x).numpy().tobytes() for x in (0.5, -0.3)]
        return [*(Vectors(1, values) for values in vectors), Vectors(1)]
    texts = [(1, 2, 5), (3,), ()]
    return [LowResolution(text, (1, 2) * 8) for text in texts] if gpt.layout.is_upscaling else texts


@every_family
def test_weights_that_are_missing_too_many_or_of_another_size_are_told(native, refused, name: str) -> None:
    made = native(name)
    weights = made.weights
    read = [key for key in weights if not FAMILIES[name].ignored(key)]
    last = read[-1]
    shrunk = next(key for key in read if weights[key].ndim == 1 and len(weights[key]) > 1)  # which tells no size
    for change, part in (
        ({**weights, "colour.weight": torch.ones(2)}, "has colour.weight, which this family does not"),
        ({key: value for key, value in weights.items() if key != last}, last),
        ({**weights, shrunk: weights[shrunk][1:].clone()}, made.path.name),
    ):
        made.save(change)
        assert part in refused(made)


@every_family
def test_another_family_is_told(native, refused, name: str) -> None:
    other = "clip" if name.startswith("llamagen") else "llamagen-vq"
    told = refused(native(name), family=other)
    assert f"of the family {sharing(name)[0]}, not {other}" in told
    made_for = FAMILIES[name]
    assert all(FAMILIES[one].recognises(dict.fromkeys(made_for.markers)) for one in sharing(name))


def sharing(name: str) -> list[str]:
    """The families whose weights have the same names, so that only the user knows which of them it is."""
    groups = (["taming-vqgan", "mindalle-vq"], ["cogview-gpt", "cogview-caption", "cogview-sr"],
              ["clip", "clip-gen-clip"])  # fmt: skip
    return next((group for group in groups if name in group), [name])


class Runs:
    """Makes a folder where it is loaded."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self):
        return os.mkdir, (str(self.trap),)


@every_family
def test_a_damaged_file_and_one_with_code_are_refused(native, refused, tmp_path: Path, name: str) -> None:
    made = native(name)
    content, weights = made.path.read_bytes(), made.weights
    made.path.write_bytes(content[: len(content) * 2 // 3])
    assert "model.pt: damaged or not a checkpoint" in refused(made)
    made.save(weights, hook=Runs(tmp_path / "trap"))
    assert "model.pt: not opened, for loading it would run" in refused(made)
    assert not (tmp_path / "trap").exists()
    made.path.unlink()
    assert "no such file" in refused(made)


@every_family
def test_options_that_mean_nothing_to_it_are_refused(native, refused, tmp_path: Path, name: str) -> None:
    made = native(name)
    for option in FAMILIES[name].unused:
        value = 8 if option == "image_size_px" else tmp_path
        spelled = "--" + option.replace("_", "-").removesuffix("-px")
        assert f"means nothing to the family {name}" in refused(made, spelled, value)
    used = {option for option, value in made.options._asdict().items() if value is not None}
    assert not used & set(FAMILIES[name].unused)


# ---- --check: inputs and outputs recorded in the family's own terms --------------------------------------------------


@torch.no_grad()
def recorded(made, made_from: Tensor) -> dict[str, Tensor]:
    """What the family's own code would have recorded of this model; `made_from`: image ids, (2, 64)."""
    model, name = made.model, made.name
    if isinstance(model, CLIP):
        pixels = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        ids = torch.tensor([[7, 1, 3, 8, 8, 8, 8], [7, 8, 0, 0, 0, 0, 0]])
        image_BE = model.encode_image(pixels / 127.5 - 1)
        text_BE = model.encode_text(ids[:, 1:-1], torch.tensor([2, 0]))
        return {"pixels_uint8": pixels, "token_ids": ids, "image_embeds": image_BE, "text_embeds": text_BE,
                "logits_per_image": model.logit_scale() * image_BE @ text_BE.T}  # fmt: skip
    if isinstance(model, ImageTokenizer):
        return recorded_pictures(made, made_from.unflatten(1, (8, 8)))
    if name.startswith("llamagen"):
        cond = torch.tensor([0, 2]) if name.endswith("c2i") else torch.randn(2, 6, 12)
        if name.endswith("c2i"):
            condition, more = cond, {}
        else:
            more = {"emb_masks": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])}
            condition = VectorBatch(cond, more["emb_masks"].bool(), torch.zeros(2, dtype=torch.bool))
        return {"cond": cond, "tokens": made_from, **more,
                "tf_logits": image_logits_after_vectors(model, condition, made_from)}  # fmt: skip
    if name.startswith("cogview"):
        return recorded_cogview(made, made_from)
    if name == "clip-gen-gpt":
        cond = torch.randn(2, 1, 6)
        condition, given = VectorBatch(cond, torch.ones(2, 1).bool(), torch.zeros(2).bool()), {"cond": cond[:, 0]}
        scores = {"tokens": made_from, "tf_logits": image_logits(model, condition, made_from)}
    else:
        condition = TextBatch(torch.tensor([[1, 2, 5, 0, 0, 0, 0], [3] + [0] * 6]), torch.tensor([3, 1]))
        given, scores = recorded_texts(made, condition, made_from)
    drawn = likeliest(model, condition)
    return given | scores | {"gen_codes": drawn, "gen_logits": image_logits(model, condition, drawn)}


def recorded_pictures(made, ids_BHW: Tensor) -> dict[str, Tensor]:
    model, bytes_B3HW = made.model, torch.randint(256, (2, 3, *[made.model.config.image_size_px] * 2)).byte()
    x = bytes_B3HW / 127.5 - 1
    ids = model.encode(x)
    rec, drawn = (model.decoder(model.quantizer.decode(one)) for one in (ids, ids_BHW))
    if made.name == "cogview-vq":
        z = model.quantizer.to_code(model.encoder(x)).movedim(1, -1)
        return {"x_uint8": bytes_B3HW, "indices": ids.flatten(1), "z": z, "rec": (rec + 1) / 2}
    if made.name == "mindalle-vq":
        return {"x": x, "codes": ids.flatten(1), "rec": rec, "gen_codes": ids_BHW.flatten(1), "gen_decoded": drawn,
                "gen_pixels": (drawn / 2 + 0.5).clamp(0, 1)}  # fmt: skip
    return {"x": x, "indices": ids, "rec": rec}


def recorded_texts(made, text: TextBatch, image_BI: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of minDALL-E and ruDALL-E, whose texts are bare: all logits by the heads of theirs."""
    model = made.model
    hidden = model(model.layout.join(text, image_BI))
    if made.name == "mindalle-gpt":
        padded = torch.where(torch.arange(S) < text.n_ids_B[:, None], text.ids_BS, 7)  # [PAD]
        weights = made.weights
        return {"text_ids": padded, "codes": image_BI}, {
            "tf_logits_txt": hidden[:, : S - 1] @ weights["head_txt.weight"].T,
            "tf_logits_img": hidden[:, S - 1 : -1] @ weights["head_img.weight"].T,
        }
    weights, normed = made.weights, model.head.norm(hidden)
    logits = normed @ weights["to_logits.1.weight"].T + weights["to_logits.1.bias"]
    return {"input_ids": torch.cat((text.ids_BS, image_BI), dim=1)}, {"tf_logits": logits}


def recorded_cogview(made, image_BI: Tensor) -> dict[str, Tensor]:
    model, weights = made.model, made.weights
    mark = {name: N_IDS + N_TEXT + i for i, name in enumerate(MARKS)}
    before = [mark["ROI1"], N_IDS + 3, N_IDS + 4, mark["TINY"], mark["BOI1"]]

    def scores(ids: list[int], positions: list[int], n_whole: int = 0) -> Tensor:
        mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        mask[:, :n_whole] |= torch.arange(len(ids))[:, None] < n_whole
        x_LD = weights[EMBEDDINGS][ids] + weights[POSITIONS][positions]
        return (model.transformer(x_LD[None], mask_B1LK=mask[None, None]) @ weights[EMBEDDINGS].T)[0]

    def drawn(before: list[int], positions: list[int], n: int) -> tuple[Tensor, Tensor]:
        ids, positions, logits = list(before), list(positions), []
        for _ in range(n):
            logits.append(scores(ids, positions)[-1])
            ids.append(int(logits[-1][:N_IDS].argmax()))
            positions.append(positions[-1] + 1)
        return torch.tensor(ids), torch.stack(logits)

    if made.name == "cogview-sr":
        first = [*before, *image_BI[0, :16].tolist(), mark["EOI1"], mark["ROI2"]]
        ids = [*first, mark["POS0"], mark["TINY"], mark["BOI2"]]
        tokens, logits = drawn(ids, [*range(len(first)), 1, 2, 3], 16)
        return {"roi2_tokens": tokens, "roi2_logits": logits}
    rows = [[*before, *image.tolist(), mark["EOI1"]] for image in image_BI]
    tokens, logits = drawn(before, list(range(5)), 64)
    return {
        "tf_tokens": torch.tensor(rows), "gen_tokens": tokens, "gen_logits": logits,
        "tf_logits": torch.stack([scores(row, list(range(len(row)))) for row in rows]),
        "tf_logits_sep5_row0": scores(rows[0], list(range(len(rows[0]))), n_whole=5)[None],
    }  # fmt: skip


def likeliest(model: GPT, condition: TextBatch | VectorBatch) -> Tensor:
    """Greedy ids, by whole sequences."""
    ids = torch.zeros(2, 0, dtype=torch.long)
    for n in range(64):
        padded = torch.nn.functional.pad(ids, (0, 64 - n))
        ids = torch.cat((ids, image_logits(model, condition, padded)[:, n : n + 1].argmax(-1)), dim=1)
    return ids


@every_family
def test_check_compares_what_the_familys_own_code_recorded(native, refused, tmp_path: Path, capsys, name: str) -> None:
    made = native(name)
    torch.manual_seed(0)
    io = {key: value.contiguous().clone() for key, value in recorded(made, torch.randint(N_IDS, (2, 64))).items()}
    save_file(io, tmp_path / "io.safetensors")
    check = ("--check", tmp_path / "io.safetensors")
    arguments = ["import_checkpoint", name, made.path, "--out", tmp_path / "checked", *made.arguments, *check]
    assert main([str(part) for part in arguments]) == 0
    told = [line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("check: ")]
    assert told
    inexact = next(key for key, value in io.items() if value.is_floating_point() and key not in ("x", "cond"))
    save_file(io | {inexact: io[inexact] + 0.1}, tmp_path / "io.safetensors")
    assert "differ from what is recorded; nothing was written" in refused(made, *check)
