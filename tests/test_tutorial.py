"""The README's "train on your own images", command by command, on a few small pictures with small settings."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from vqt2i.cli import main
from vqt2i.data.shapes import pairs
from vqt2i.generation import TextToImage

ROOT = Path(__file__).parents[1]
TUTORIAL = re.search(r"<!-- tutorial.*?```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
COMMANDS = [shlex.split(line)[1:] for line in TUTORIAL.splitlines() if line.startswith("python ")]

RUN = "trainer={max_steps: 4, batch_size: 8, validate_every_steps: 4, n_validation_samples: 4, precision: fp32}"
TRANSFORMER = "{width: 32, n_layers: 1, n_heads: 2, mlp_width: 48}"
SMALL = {
    "train_vqgan": [RUN, "model.channels=[8, 8, 8]", "model.quantizer.codebook_size=32"],
    "train_gpt": [RUN, f"transformer={TRANSFORMER}", "training.compile=false"],
    "train_clip": [RUN, f"vision={TRANSFORMER}", f"text={TRANSFORMER}", "training.compile=false"],
}


@pytest.fixture
def my_images(in_empty_folder: Path) -> Path:
    """A folder as a user has it: pictures with a .txt beside each, some in folders of their own."""
    (in_empty_folder / "configs").symlink_to(ROOT / "configs")
    for i, pair in enumerate(pairs("train", 24, 0, 32)):
        path = in_empty_folder / "my_images" / ("more" if i % 3 else ".") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pair.image_HW3).save(path)
        path.with_suffix(".txt").write_text("\n".join(pair.captions["en"]), encoding="utf-8")
        path.with_suffix(".zh.txt").write_text("\n".join(pair.captions["zh"]), encoding="utf-8")
    return in_empty_folder


def test_the_tutorial_goes_from_a_folder_of_images_to_a_pipeline(my_images: Path) -> None:
    verbs = [Path(script).stem for script, *_ in COMMANDS]
    assert verbs == [
        "make_dataset", "train_tokenizer", "train_vqgan", "train_gpt", "train_clip", "generate", "make_pipeline",
    ]  # fmt: skip
    for verb, (_, *arguments) in zip(verbs, COMMANDS, strict=True):
        small = [word for setting in SMALL.get(verb, []) for word in ("--set", setting)]
        assert main([verb, *arguments, *small]) == 0, verb
    drawn = my_images / "outputs" / "0001"
    (scores,) = (drawn / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    candidates = json.loads(scores)["candidates"]
    assert len(candidates) == 16 and set(candidates[0]["scores"]) == {"clip", "caption", "both"}
    assert len(list(drawn.glob("000-*.png"))) == 4
    pipeline = TextToImage.load(my_images / "mine-pipeline", "cpu")
    assert pipeline.fingerprints == json.loads((drawn / "request.json").read_text(encoding="utf-8"))["models"]
