"""Encode a data set into a token store: image and text ids, ready for the GPT.

Killed and started again, it goes on where it was; after the data set grew, it encodes the new shards only.
"""

import argparse
from pathlib import Path

from vqt2i.cli.options import RUNS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=Path("data/shapes"), metavar="DIR", help="data set folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="store folder (default: inside the data set folder, "
                        "where train_gpt finds it)")  # fmt: skip
    parser.add_argument("--vq", type=Path, metavar="DIR", help="image tokenizer (default: newest in the runs folder, "
                        "else the shipped one)")  # fmt: skip
    parser.add_argument("--text", type=Path, default=Path("tokenizers/bilingual.model"), metavar="FILE",
                        help="SentencePiece model (default: the bilingual one)")  # fmt: skip
    parser.add_argument("--clip", type=Path, metavar="DIR", help="keep the images' embeddings by this scorer too, for "
                        "a GPT that reads them (condition.kind=embedding)")  # fmt: skip
    parser.add_argument("--low-resolution", action="store_true", help="keep the ids of pictures of twice the image "
                        "tokenizer's size, and of these at its size, for a GPT that draws the one from the other "
                        "(condition.kind=low_resolution)")  # fmt: skip
    parser.add_argument("--splits", default="train,val", help="splits to encode (default: train,val)")
    parser.add_argument("--variants", default="centre", metavar="NAME", help="pictures made of each, of which training "
                        "draws one at each visit: centre (one, the default), flip, five-crop or ten-crop; flip and "
                        "ten-crop mirror, so not for captions that tell left from right")  # fmt: skip
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read and crop images "
                        "while this one encodes (default: 0, all in this one)")  # fmt: skip
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where runs are kept (default: runs)")


def run(args: argparse.Namespace) -> None:
    from vqt2i.checkpoint import load_model
    from vqt2i.clip import CLIP, CLIPConfig
    from vqt2i.config import build_config
    from vqt2i.errors import UserError
    from vqt2i.generation.find import find_image_tokenizer
    from vqt2i.runtime import say
    from vqt2i.text import load_tokenizer
    from vqt2i.training.encode import encode_dataset, store_folder
    from vqt2i.training.run import DataConfig, open_dataset

    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: expected 0 or more")
    data = build_config(DataConfig, {"path": args.data, "variants": args.variants}, "encode_dataset")
    dataset = open_dataset(data)
    _, vq = find_image_tokenizer(args.vq, args.runs)
    tokenizer = load_tokenizer(args.text)
    scorer = args.clip and load_model(args.clip, CLIPConfig, CLIP)
    out = args.out or store_folder(dataset, vq, tokenizer, data.variants, scorer, args.low_resolution)
    splits = tuple(args.splits.split(","))
    store = encode_dataset(
        dataset, vq, tokenizer, splits, out, scorer=scorer, low_resolution=args.low_resolution, variants=data.variants,
        n_workers=args.workers,
    )  # fmt: skip
    counts = [f"{name} {split.n_samples:,} samples" for name, split in store.spec.splits.items()]
    say(f"{store.folder}: {', '.join(counts)}")
