"""Shows what a calibration would see of your samples: rows, bad rows, tokens, padding. No model is loaded.

    python -m recipes.data --model MODEL --calib FILE [--images DIR] [--count 128]

MODEL is a directory or a name on the hub (its processor is loaded, not its weights), FILE anything that `read_samples` reads.
"""

from __future__ import annotations

import argparse
import warnings

from torchao_qig.lvlm.data import Batches, calibration_batches
from torchao_qig.lvlm.load import load_processor
from torchao_qig.lvlm.mixes import few_shot, interleaved, mixed
from torchao_qig.lvlm.samples import PROMPT, Sample, Samples, read_samples

__all__ = ["Batches", "Sample", "Samples", "calibration_batches", "few_shot", "interleaved", "read_samples"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub name that has the processor")
    parser.add_argument("--calib", required=True, help="file, folder or hub name of the samples")
    parser.add_argument("--images", help="folder that the pictures are in (default: that of the file)")
    parser.add_argument("--split", default="train")
    parser.add_argument("--prompt", default=PROMPT, help="the question that captions answer")
    parser.add_argument("--count", type=int, help="how many samples to draw (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=4096, help="of one batch")
    parser.add_argument("--max-length", type=int, help="skip samples with more tokens")
    parser.add_argument("--few-shot", type=int, default=0, metavar="K", help="K demonstrations before each sample")
    parser.add_argument("--interleaved", type=int, default=1, metavar="N", help="join N samples to one sequence")
    args = parser.parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the summary says the same
        read = read_samples(args.calib, args.images, split=args.split, prompt=args.prompt, count=args.count, seed=args.seed)
    print(read.summary())
    samples = mixed(read, args.few_shot, args.interleaved, args.seed)
    print(calibration_batches(samples, load_processor(args.model), tokens=args.tokens, max_length=args.max_length).summary())


if __name__ == "__main__":
    main()
