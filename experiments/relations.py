"""Whether a model knows which of two objects a caption puts where, by word order: without drawing anything.

Each of N val scenes of two objects beside each other is put in words, in English ("a red star above a blue cross") and
in both Chinese orders ("蓝色的十字上面有一个红色的星形", "红色的星形在蓝色的十字上面"). Then the two objects
are exchanged in the caption, or their colours alone, which makes it false with the same words in it. Told is how often
the true caption has the higher

    image      log p(image | text) by the GPT, and by how many nats a picture
    caption    log p(text | image) by the GPT, per token, as it ranks candidates
    clip       cosine by the scorer

where guessing gives one half.

    python experiments/relations.py --model shapes --n-scenes 200
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqt2i.cli.options import RUNS
from vqt2i.data.images import to_tensor
from vqt2i.data.shapes.captions import COLOUR_ZH, RELATION_ZH, SHAPE_ZH
from vqt2i.data.shapes.render import render
from vqt2i.data.shapes.scene import Relation, Scene, SceneObject
from vqt2i.data.shapes.split import draw_scene
from vqt2i.generation.find import open_pipeline
from vqt2i.generation.pipeline import TextToImage
from vqt2i.generation.rerank import caption_scores, clip_scores, likelihood_scores

BATCH = 50


def _en(thing: SceneObject) -> str:
    return f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {thing.colour} {thing.shape}"


def _zh(thing: SceneObject) -> str:
    return f"{COLOUR_ZH[thing.colour]}的{SHAPE_ZH[thing.shape]}"


ORDERS: dict[str, Callable[[SceneObject, Relation, SceneObject], str]] = {
    "English": lambda a, relation, b: f"{_en(a)} {relation} {_en(b)}",
    "B上面有一个A": lambda a, relation, b: f"{_zh(b)}{RELATION_ZH[relation]}有一个{_zh(a)}",
    "A在B上面": lambda a, relation, b: f"{_zh(a)}在{_zh(b)}{RELATION_ZH[relation]}",
}


def scenes(n: int) -> list[Scene]:
    """The first `n` val scenes of two objects beside each other, of two shapes and two colours."""
    drawn = (draw_scene(0, "val", index) for index in count())
    return list(islice((s for s in drawn if s.relation not in (None, "inside") and _differ(*s.objects)), n))


def _differ(a: SceneObject, b: SceneObject) -> bool:
    return a.colour != b.colour and a.shape != b.shape


def told(scene: Scene, order: str) -> dict[str, str]:
    """The true caption, and the false ones by what is exchanged."""
    a, b = scene.objects
    say = ORDERS[order]
    return {
        "true": say(a, scene.relation, b),
        "places": say(b, scene.relation, a),
        "colours": say(replace(a, colour=b.colour), scene.relation, replace(b, colour=a.colour)),
    }


@torch.no_grad()
def scores(pipeline: TextToImage, image_N3HW: Tensor, ids_NHW: Tensor, texts: list[str]) -> dict[str, Tensor]:
    """Of each image, and its ids, with its text, (N,) for each scorer that the pipeline has."""
    found: dict[str, list[Tensor]] = {}
    for at in range(0, len(texts), BATCH):
        images, ids_BHW = image_N3HW[at : at + BATCH], ids_NHW[at : at + BATCH]
        read = [pipeline.text.encode(text) for text in texts[at : at + BATCH]]
        length = pipeline.gpt.layout.image_length
        part = {
            "image": length * likelihood_scores(pipeline.gpt, ids_BHW, read),
            "caption": caption_scores(pipeline.gpt, ids_BHW, read),
        }
        if pipeline.clip is not None:
            texts_of_clip = [pipeline.clip_text.encode(text) for text in texts[at : at + BATCH]]
            part["clip"] = clip_scores(pipeline.clip, images, texts_of_clip)
        for name, values in part.items():
            found.setdefault(name, []).append(values)
    return {name: torch.cat(values) for name, values in found.items()}


def table(pipeline: TextToImage, n_scenes: int) -> str:
    """Markdown: orders and what is exchanged down, scorers across."""
    drawn = scenes(n_scenes)
    size_px = pipeline.vq.config.image_size_px
    image_N3HW = torch.stack([to_tensor(render(scene, size_px)) for scene in drawn])
    ids_NHW = torch.cat([pipeline.vq.encode(images) for images in image_N3HW.split(BATCH)])
    lines: list[str] = []
    for order in ORDERS:
        captions = [told(scene, order) for scene in drawn]
        by_kind = {kind: scores(pipeline, image_N3HW, ids_NHW, [c[kind] for c in captions]) for kind in captions[0]}
        true = by_kind.pop("true")
        lines = lines or [
            f"| caption | exchanged | {' | '.join(true)} | nats a picture |",
            "|---" * (len(true) + 3) + "|",
        ]
        for kind, false in by_kind.items():
            shares = [f"{np.mean((true[name] > false[name]).numpy()):.0%}" for name in true]
            nats = (true["image"] - false["image"]).mean().item()
            lines.append(f"| {order} | {kind} | {' | '.join(shares)} | {nats:+.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes", help="a shipped name, a pipeline or a run (default: shapes)")
    parser.add_argument("--n-scenes", type=int, default=200, metavar="N", help="default 200")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR")
    args = parser.parse_args()
    print(table(open_pipeline(args.model, args.runs, "cpu"), args.n_scenes))


if __name__ == "__main__":
    main()
