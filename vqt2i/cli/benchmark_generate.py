"""The part `generate` of `benchmark`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqt2i.cli.options import RUNS, add_number, at_least

if TYPE_CHECKING:
    from vqt2i.training.gpt_config import GPTRunConfig

PRECISIONS = ("fp32", "bf16", "int8")
MODES = ("dynamic", "static", "compiled", "frozen")
ENGINES = ("native", "plain", "compiled")
MEASURES = ("table", "parts", "rerank", "memory", "scaling")


def add_gpt_argument(parser: argparse.ArgumentParser) -> None:
    """--config: of a GPT, for `load_untrained_gpt`."""
    default = Path("configs/gpt/llamagen_b.yaml")
    parser.add_argument("--config", type=Path, default=default, metavar="FILE",
                        help=f"a GPT with `sizes` (default: {default}, 111 M); dropout is left out")  # fmt: skip


def load_untrained_gpt(path: Path) -> "GPTRunConfig":
    """A GPT's run configuration with `sizes`; a benchmark reads no tokenizers.

    Raises:
        ConfigError: it has none.
    """
    from vqt2i.config import load_config
    from vqt2i.errors import ConfigError
    from vqt2i.training.gpt_config import GPTRunConfig

    config = load_config(GPTRunConfig, path)
    if config.sizes is None:
        raise ConfigError(f"{path}: sizes is null; a benchmark needs it, for it reads no tokenizers")
    if config.condition.kind != "text":
        raise ConfigError(f"{path}: condition {config.condition.kind}; a benchmark reads texts")
    return config.model_copy(update={"transformer": config.transformer.model_copy(update={"dropout": 0.0})})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "table: seconds of ours and of each mode of theirs, in turns, beside what the machine's rates allow. "
        "parts: text read, tokens, images decoded, captions scored. rerank: what scoring adds, in a pipeline. "
        "memory: peak of each contestant, in a process of its own. scaling: one image of more and more tokens."
    )
    add_gpt_argument(parser)
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=["table"], help="default: table")
    parser.add_argument("--images", type=at_least(1), nargs="+", default=[1, 4, 16], metavar="N",
                        help="candidates of one text drawn together (default: 1, 4 and 16); memory and rerank are of "
                             "the most, parts of the fewest and the most")  # fmt: skip
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="of the weights "
                        "(default: all); int8 has ours in 8 bits beside theirs in fp32 and bf16")  # fmt: skip
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="ours (default: native on CPUs or "
                        "compiled on GPUs, and plain)")  # fmt: skip
    parser.add_argument("--against", nargs="*", choices=MODES, default=list(MODES), help="modes of transformers: a "
                        "dynamic cache, a static one, compiled, with frozen weights (default: all)")  # fmt: skip
    add_number(parser, "--rounds", 3, "of each, in turns, after one that does not count")
    parser.add_argument("--tokens", type=at_least(1), nargs="+", default=[64, 256, 1024, 4096], metavar="N",
                        help="of the images of `scaling`, square numbers (default: 64 256 1024 4096)")  # fmt: skip
    parser.add_argument("--tokenizer", type=Path, default=Path("configs/vqgan/taming_128.yaml"), metavar="FILE",
                        help="the image tokenizer of `parts` (default: configs/vqgan/taming_128.yaml)")  # fmt: skip
    parser.add_argument("--model", metavar="DIR", help="the pipeline of `rerank`: as `generate` takes it (default: "
                        "the newest in the runs folder, else the shipped one)")  # fmt: skip
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where runs are kept (default: runs)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all numbers as JSON, as they come")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw `scaling`, as .png or .svg")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing: print (and plot) what --out wrote")


def run(args: argparse.Namespace) -> None:
    from vqt2i.training.decoding.records import read_measured
    from vqt2i.training.decoding.report import markdown
    from vqt2i.training.decoding.scaling import plot_scaling

    measured = read_measured(args.show) if args.show else _measure(args)
    print(markdown(measured))
    if args.plot:
        plot_scaling(measured.scaling, measured.gpt, measured.rates, args.plot)


def _measure(args: argparse.Namespace) -> Any:
    """All that is asked for, written after each part of it that is done: the whole takes an hour."""
    from vqt2i.config import load_config
    from vqt2i.files import write_json
    from vqt2i.generation.find import open_pipeline
    from vqt2i.origin import describe_origin
    from vqt2i.runtime import pick_device, say
    from vqt2i.training.decoding.ceilings import RateMeter
    from vqt2i.training.decoding.compare import compare_decoding, contestants, measure_memory
    from vqt2i.training.decoding.pictures import picture_parts, rerank_parts
    from vqt2i.training.decoding.records import Measured
    from vqt2i.training.decoding.scaling import measure_scaling
    from vqt2i.training.vqgan import VQGANRunConfig

    config = load_untrained_gpt(args.config)
    gpt, device = config.model(config.sizes, "none", "none"), pick_device()
    meter = RateMeter(device, tuple(args.precision))
    meter.measure()
    engines = args.engines or ("native" if device.type == "cpu" else "compiled", "plain")
    wanted = contestants(args.precision, args.against, engines)
    ours = [who for who in wanted if who.ours]
    most = max(args.images)
    timing = {"n_rounds": args.rounds, "device": device}
    pieces = {
        "table": lambda: compare_decoding(gpt, wanted, counts=args.images, meter=meter, **timing),
        "parts": lambda: picture_parts(
            gpt, load_config(VQGANRunConfig, args.tokenizer).model, args.precision, engines,
            counts=sorted({min(args.images), most}), **timing,
        ),
        "rerank": lambda: (
            row for precision in args.precision
            for row in rerank_parts(
                open_pipeline(args.model, args.runs, engine=engines[0], precision=precision), n_images=most,
                n_rounds=args.rounds,
            )
        ),
        "memory": lambda: measure_memory(gpt, wanted, n_images=most, device=device),
        "scaling": lambda: measure_scaling(gpt, ours, lengths=args.tokens, meter=meter, **timing),
    }  # fmt: skip
    measured = Measured(origin=describe_origin(), gpt=gpt, rates=meter.best)
    for name in MEASURES:
        if name in args.measure:
            for rows in pieces[name]():
                found = {name: (*getattr(measured, name), *rows), "rates": meter.best}
                measured = measured.model_copy(update=found)
                say(f"{name}: {len(found[name])} rows done")
                if args.out:
                    write_json(args.out, measured.model_dump(mode="json"))
    return measured
