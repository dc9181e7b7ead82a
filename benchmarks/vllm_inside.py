"""The part of vllm_check.py that runs in vLLM's environment: it loads a checkpoint, answers prompts, and counts packed weights.

This file does not import torchao_qig: vLLM has to do that, through the plugin's entry point.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image


def held(model: Any) -> dict[str, int]:
    """The number and the bytes of the packed weights in one worker."""
    packed = [p for p in model.parameters() if type(p).__name__ == "PackedIntTensor"]
    return {"weights": sum(p.numel() for p in packed), "bytes": sum(p.nbytes_packed() for p in packed)}


def prompt_of(prompt: dict[str, Any]) -> dict[str, Any]:
    if "ids" in prompt:
        return {"prompt_token_ids": prompt["ids"]}
    return {"prompt": prompt["text"], **({"multi_modal_data": {"image": Image.open(prompt["image"])}} if "image" in prompt else {})}


def answered(job: dict[str, Any]) -> dict[str, Any]:
    import vllm

    images = any("image" in prompt for prompt in job["prompts"])
    inputs = {"limit_mm_per_prompt": {"image": 1, "video": 0}} if images else {"skip_tokenizer_init": True}
    engine = {"enforce_eager": True, "dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "seed": 0, **inputs, **job["engine"]}
    llm = vllm.LLM(job["path"], **engine)
    made = llm.generate([prompt_of(p) for p in job["prompts"]], vllm.SamplingParams(temperature=0, max_tokens=job["tokens"], detokenize=False))
    return {
        "tokens": [list(one.outputs[0].token_ids) for one in made],
        "workers": llm.apply_model(held),
        "compilation": str(llm.llm_engine.vllm_config.compilation_config.mode),
        "versions": {"vllm": vllm.__version__, **{name: version(name) for name in ("torch", "torchao", "transformers")}},
    }


def main() -> None:
    task, answer = map(Path, sys.argv[1:])
    answer.write_text(json.dumps(answered(json.loads(task.read_text()))))
