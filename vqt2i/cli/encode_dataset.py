"""Encode a data set into a token store: image and text ids, ready for the GPT."""

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
    parser.add_argument("--splits", default="train,val", help="splits to encode (default: train,val)")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where runs are kept (default: runs)")


def run(args: argparse.Namespace) -> None:
    from vqt2i.generation.find import find_image_tokenizer
    from vqt2i.runtime import say
    from vqt2i.text import TextTokenizer
    from vqt2i.training.encode import encode_dataset, store_folder
    from vqt2i.training.run import DataConfig, open_dataset

    dataset = open_dataset(DataConfig(path=args.data))
    _, vq = find_image_tokenizer(args.vq, args.runs)
    tokenizer = TextTokenizer.load(args.text)
    out = args.out or store_folder(dataset, vq, tokenizer)
    store = encode_dataset(dataset, vq, tokenizer, tuple(args.splits.split(",")), out)
    say(f"{store.folder}: " + ", ".join(f"{name} {n:,} samples" for name, n in store.spec.splits.items()))
