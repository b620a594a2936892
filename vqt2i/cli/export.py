"""Turn any checkpoint of a run into a model folder, or a model into a checkpoint of another project.

The folder is the one that the run itself wrote after that step: of every stage, trained in one process, by DDP or by
DeepSpeed at any ZeRO stage. Needs one process and no GPU. With --adapter, a LoRA adapter and its base as one model.
With --to, a model folder in the form that another project's code reads, with its settings beside it.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_or_checkpoint", nargs="?", type=Path, metavar="RUN|CHECKPOINT",
                        help="a run folder, or RUN/checkpoints/step-....ckpt; with --to, a model folder or a run"
                        )  # fmt: skip
    parser.add_argument("--step", type=int, metavar="N", help="of a run: which checkpoint (default: the newest)")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="the adapter/ of a LoRA run, to be added to --base")
    parser.add_argument("--base", type=Path, metavar="DIR", help="the GPT that the adapter was trained on: its model "
                        "folder, its run or its pipeline")  # fmt: skip
    parser.add_argument("--to", choices=("llamagen", "taming", "hf-clip"),
                        help="the project whose form the model is written in; hf-clip is a CLIPModel of transformers"
                        )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")


def run(args: argparse.Namespace) -> None:
    from vqt2i.errors import UserError
    from vqt2i.peers.export import export_native
    from vqt2i.training.export import export_checkpoint
    from vqt2i.training.finetune import merge_adapter

    merging = args.adapter is not None and args.base is not None
    if merging == (args.run_or_checkpoint is not None) or (args.adapter is None) != (args.base is None):
        raise UserError("export: expected a run or checkpoint, or else both --adapter DIR and --base DIR")
    if merging and args.step is not None:
        raise UserError(f"--step {args.step}: of a run; an adapter has none")
    if args.to and (merging or args.step is not None):
        raise UserError(f"--to {args.to}: of a model folder; --step, --adapter and --base have no meaning for it")
    if args.to:
        family = export_native(args.run_or_checkpoint, args.to, args.out)
        print(f"{args.out}: {family.name}")
        return
    if merging:
        fingerprint = merge_adapter(args.adapter, args.base, args.out)
    else:
        fingerprint = export_checkpoint(args.run_or_checkpoint, args.step, args.out)
    print(f"{args.out}: {fingerprint[:8]}")
