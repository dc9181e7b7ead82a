"""Serves a compiled checkpoint that answers questions about a picture. The text appears while it is generated.

    python -m recipes.serve OUT --image dog.png --question "What is it?" [--max-length 2048] [--no-compile]

Without `--question`, every line of standard input is a question, and an empty line ends the program. A question does not see the ones before
it. Tokens per second go to standard error.
"""

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from torchao_qig.lvlm import serve
from torchao_qig.lvlm.load import load_model, load_processor


def typed() -> Iterator[str]:
    """Lines of standard input up to an empty one."""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline().strip()):
            return
        yield line


def main(
    model: Annotated[str, typer.Argument(help="directory, or name on the hub")],
    image: Annotated[str | None, typer.Option(help="a picture; none for text alone")] = None,
    question: Annotated[str | None, typer.Option(help="by default they are read from standard input")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens of prompt and answer together; 2048 if the model has so many positions")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    compile: Annotated[bool, typer.Option(help="compile the decoder: seconds to a minute first, several times the speed then")] = True,
    device: str = "cpu",
) -> None:
    """Answer questions about a picture."""
    processor, served = load_processor(model), load_model(model, device=device)
    if compile:
        serve.compiled(served, max_length)
        print(f"compiled in {serve.warm_up(served, processor, image):.0f} s", file=sys.stderr)
    for asked in [question] if question is not None else typed():
        clock = serve.Clock()
        for piece in serve.answer(served, processor, image, asked, max_new_tokens, clock):
            print(piece, end="", flush=True)
        print()
        print(f"{len(clock.times) - 1} tokens, {clock.tokens_per_second():.1f} per second after the first", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
