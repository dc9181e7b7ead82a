"""A page about a quantized checkpoint: the weights of tokens, the errors of layers, the bits, the accuracy and the cost.

`write` makes one HTML file that loads no other file, and each figure as SVG and PNG beside it. It reads the files that the commands wrote into
the checkpoint's folder qig/. For a part that is missing, the page names the command that writes it.
"""

from __future__ import annotations

import os
from pathlib import Path


def write(directory: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of a quantized checkpoint.

    Args:
        directory: a directory that `torchao-qig quantize` wrote.
        output: the page's path; figures are written beside it. By default qig/report/report.html in the directory.

    Returns:
        The page's path.
    """
    try:
        from torchao_qig.report import page
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("PIL", "jinja2", "markupsafe", "matplotlib"):
            raise
        raise ModuleNotFoundError(f'the report needs {error.name}: pip install "torchao_qig[recipes]"', name=error.name) from error
    return page.write(Path(directory).expanduser(), None if output is None else Path(output).expanduser())
