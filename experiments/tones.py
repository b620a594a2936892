"""Skin tones that no training picture shows on a figure: how often the shipped emoji come out in them.

The emoji of `shared/data/emoji`'s train shards leave combinations of figure and tone out. Asked for is each one-toned
figure that is there in four of the five tones, in the fifth, every second time in Chinese; the installed colour-emoji
font draws what is expected, which no training has seen. A picture is

    right in tone     where, of the figure's five pictures, the nearest is the expected one (guessing: 20 %)
    right in all      where the nearest of all training pictures and all expected ones is the expected one

by the root mean square of pixel values. The tone is told of the font's pictures of the tones that are there too: what a
perfect model would reach. Figures that the font draws otherwise than the data set are left out. Sampling may be
chosen on the first half, the figures asked for in English; the second one, in Chinese, is told by itself too.

    python experiments/tones.py --model emoji --data data/emoji --out runs/tones
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFont

from vqt2i.cli.options import RUNS
from vqt2i.data.emoji import draw_emoji, find_font, load_font
from vqt2i.data.images import fit_square, png_bytes
from vqt2i.data.shards import DataSet, Split
from vqt2i.evaluation.memorisation import nearest_of
from vqt2i.evaluation.statistics import bootstrap_mean
from vqt2i.files import write_atomic, write_json
from vqt2i.generation.find import open_pipeline
from vqt2i.generation.output import strip
from vqt2i.runtime import say

# by the name in captions: the character that follows a figure, and the words of Chinese captions
TONES = {
    "light": ("\U0001f3fb", "较浅肤色"), "medium-light": ("\U0001f3fc", "中等偏浅肤色"),
    "medium": ("\U0001f3fd", "中等肤色"), "medium-dark": ("\U0001f3fe", "中等偏深肤色"),
    "dark": ("\U0001f3ff", "较深肤色"),
}  # fmt: skip
BATCH, SHOWN = 500, 14
FONT_PX = 128  # of the font's pictures, which stand in the middle of wider squares
SAME = 20.0  # of 255: nearer pictures of font and data set show the same


@dataclass(frozen=True, eq=False)
class Expected:
    """A figure in the tone that is missing. seen: of the others, the indices in the training split."""

    prompt: str
    image_HW3: np.ndarray
    seen: tuple[int, ...]


def expected_of(split: Split, size_px: int, font_path: Path | None) -> list[Expected]:
    """Every figure of one tone that is there in all tones but one, as the font draws it in that one."""
    figures: dict[tuple[str, bool], dict[str, tuple[int, dict[str, Any]]]] = defaultdict(dict)
    for index in range(len(split)):
        meta = split[index].meta
        if len(meta["tones"]) == 1:
            figures[meta["base_en"], meta["facing_right"]][meta["tones"][0]] = index, meta
    font, found = load_font(font_path or find_font()), []
    for tones in figures.values():
        missing = [tone for tone in TONES if tone not in tones]
        if len(missing) != 1:
            continue
        there, (index, meta) = next(iter(tones.items()))
        (old, old_zh), (new, new_zh) = TONES[there], TONES[missing[0]]
        said = {"en": meta["en"].replace(f"{there} skin tone", f"{missing[0]} skin tone"),
                "zh": meta["zh"].replace(old_zh, new_zh)}  # fmt: skip
        text = meta["emoji"].replace(old, new)
        known, image_HW3 = (drawn_by(font, name, size_px) for name in (meta["emoji"], text))
        alike = known is not None and nearest_of(known[None], iter([split[index].image_HW3[None]])).rmse_N[0] < SAME
        if not alike or image_HW3 is None or said["en"] == meta["en"] or said["zh"] == meta["zh"]:
            say(f"left out: {meta['en']} in {missing[0]}")
            continue
        prompt = said["zh" if len(found) % 2 else "en"]
        found.append(Expected(prompt, image_HW3, tuple(index for index, _ in tones.values())))
    return found


def drawn_by(font: ImageFont.FreeTypeFont, text: str, size_px: int) -> np.ndarray | None:
    """The font's picture as the data set has it, uint8 (size_px, size_px, 3)."""
    image_HW3 = draw_emoji(text, font)
    if image_HW3 is None:
        return None
    start = (len(image_HW3) - FONT_PX) // 2
    return fit_square(image_HW3[start : start + FONT_PX, start : start + FONT_PX], size_px)


def right_of(image_NHW3: np.ndarray, asked: list[Expected], train_THW3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each picture is right in tone and right in all, (N,) of 0 and 1."""
    expected_NHW3 = np.stack([one.image_HW3 for one in asked])
    own_N = nearest_of(image_NHW3, iter([expected_NHW3]))
    trained_N = nearest_of(image_NHW3, (train_THW3[i : i + BATCH] for i in range(0, len(train_THW3), BATCH)))
    all_N = (own_N.index_N == np.arange(len(asked))) & (own_N.rmse_N < trained_N.rmse_N)
    tone_N = [
        nearest_of(image_HW3[None], iter([np.stack([one.image_HW3, *train_THW3[list(one.seen)]])])).index_N[0] == 0
        for image_HW3, one in zip(image_NHW3, asked, strict=True)
    ]
    return np.array(tone_N, float), all_N.astype(float)


def of_font(asked: list[Expected], split: Split, size_px: int, font_path: Path | None) -> np.ndarray:
    """Whether the font's picture of a figure in a tone that is there is nearest, of its four, to the same tone's."""
    font, right = load_font(font_path or find_font()), []
    for one in asked:
        seen_SHW3 = np.stack([fit_square(split[i].image_HW3, size_px) for i in one.seen])
        drawn = np.stack([drawn_by(font, split[i].meta["emoji"], size_px) for i in one.seen])
        right += (nearest_of(drawn, iter([seen_SHW3])).index_N == np.arange(len(drawn))).tolist()
    return np.array(right, float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji", metavar="MODEL")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), metavar="DATA")
    parser.add_argument("--rerank", type=int, default=16, metavar="K")
    parser.add_argument("--font", type=Path, metavar="FILE", help="default: the installed NotoColorEmoji.ttf")
    parser.add_argument("--out", type=Path, default=Path("runs/tones"), metavar="DIR")
    args = parser.parse_args()
    pipeline, split = open_pipeline(args.model, RUNS), DataSet.open(args.data).split("train")
    size_px = pipeline.vq.config.image_size_px
    asked = expected_of(split, size_px, args.font)
    say(f"{len(asked)} figures in a tone that no training picture has them in")
    groups = pipeline.candidates([one.prompt for one in asked], args.rerank)
    train_THW3 = np.stack([fit_square(split[i].image_HW3, size_px) for i in range(len(split))])
    best = right_of(np.stack([group[0].image_HW3 for group in groups]), asked, train_THW3)
    each = [right_of(np.stack([group[k].image_HW3 for group in groups]), asked, train_THW3) for k in range(args.rerank)]
    values = {
        "tone, unreranked": np.mean([tone_N for tone_N, _ in each], 0),
        "all, unreranked": np.mean([all_N for _, all_N in each], 0),
        f"tone, best of {args.rerank}": best[0],
        f"all, best of {args.rerank}": best[1],
        "tone, the font's pictures of seen ones": of_font(asked, split, size_px, args.font),
    }
    values |= {f"{name}, second half": value_N[1::2] for name, value_N in list(values.items())[:4]}
    rows = {name: bootstrap_mean(value_N)._asdict() for name, value_N in values.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "tones.json", {"n": len(asked), "prompts": [one.prompt for one in asked], "rows": rows})
    step = max(1, len(asked) // SHOWN)
    shown = [i for i in range(0, len(asked), step)][:SHOWN]
    drawn = strip([(asked[i].prompt, groups[i][0].image) for i in shown])
    expected = strip([("expected", Image.fromarray(asked[i].image_HW3)) for i in shown])
    sheet = Image.new("RGB", (drawn.width, drawn.height + expected.height), "white")
    sheet.paste(drawn, (0, 0))
    sheet.paste(expected, (0, drawn.height))
    write_atomic(args.out / "tones.png", png_bytes(sheet))
    for name, row in rows.items():
        print(f"{name:40} {row['value']:.1%} ({row['low']:.1%} to {row['high']:.1%})")


if __name__ == "__main__":
    main()
