"""`torchao-qig`, the command line."""

from typing import Annotated

import typer

app = typer.Typer(help="Vision-language models at 3 or 4 bits.", no_args_is_help=True, add_completion=False)


@app.callback()
def main() -> None:
    """Vision-language models at 3 or 4 bits."""


@app.command()
def demo(
    bits: Annotated[int, typer.Option(min=1, max=8, help="bits per weight")] = 3,
    samples: Annotated[int, typer.Option(min=1, help="pictures to calibrate on")] = 128,
    pictures: Annotated[int, typer.Option(min=1, help="test pictures, about four questions each")] = 250,
    speed: Annotated[bool, typer.Option(help="compile and time the decoders")] = True,
) -> None:
    """Quantize the small LVLM of the repository; print accuracy, size, speed and an answer."""
    try:
        from recipes.demo import main as run
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in ("recipes", "PIL", "sklearn"):
            raise
        advice = "run it from a clone of the repository" if missing == "recipes" else 'pip install "torchao_qig[recipes]"'
        typer.echo(f"the demo needs {missing}: {advice}", err=True)
        raise typer.Exit(1) from error
    run(bits, samples, pictures, speed)
