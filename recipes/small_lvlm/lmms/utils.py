"""The functions that small_lvlm.yaml calls."""

from typing import Any


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    return [doc["image"].convert("RGB")]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match."""
    return {"accuracy": float(results[0].strip() == doc["answer"])}
