"""Tensors that wait on the host: how many are held at once."""

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

import torchao_qig
from tests.calibration.test_run import assert_same, build
from tests.calibration.test_streams import CONFIG, SCALES
from tests.plain_models import tokens
from torchao_qig import Running
from torchao_qig.watch.batches import read
from torchao_qig.watch.chains import Chain
from torchao_qig.watch.quantized_stream import QuantizedStream
from torchao_qig.watch.store import Store
from torchao_qig.watch.stream import Stream


def in_memory(stored: list[Tensor]) -> int:
    """Bytes of the blocks of memory that these tensors live in, files not counted."""
    return sum({m.data_ptr(): m.nbytes() for t in stored if (m := t.untyped_storage()).filename is None}.values())


@given(st.data())
def test_store_holds_no_more_than_its_limit(data: st.DataObject) -> None:
    """Whatever is put, shared, viewed and let go: what it says that it holds is what is held, and at most the limit; values stay."""
    limit = data.draw(st.sampled_from([None, 0, 100, 1000]))
    store, kept, values = Store(limit), list[Tensor](), list[Tensor]()
    for _ in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["new", "view", "expanded", "again", "stored", "drop"]))
        if action == "drop" and kept:
            del kept[(i := data.draw(st.integers(0, len(kept) - 1)))], values[i]
            continue
        t = torch.randn(data.draw(st.integers(1, 60)), 3)
        t = {"view": t[1:, :2], "expanded": t[:1].expand(7, 3)}.get(action, t)
        if action == "stored" and kept:
            t = kept[data.draw(st.integers(0, len(kept) - 1))]
        tree = store.put({"a": t, "b": (t, 3)})
        assert tree["a"] is tree["b"][0]
        kept += [tree["a"], *([store.put(t)] if action == "again" else [])]
        values += [t.clone()] * (len(kept) - len(values))
        del t, tree
        assert store.held == in_memory(kept)
        assert limit is None or store.held <= limit
    assert all(torch.equal(a, b) for a, b in zip(kept, values, strict=True))
    kept.clear()
    gc.collect()
    assert store.held == 0


@pytest.mark.parametrize("settings", [{}, dict(steps=[SCALES("qig", propagate_error=True)])], ids=["integers", "scales"])
@pytest.mark.parametrize("limit", [0, 5_000, 13_000, 100_000])
def test_max_host_memory_is_a_bound(settings: dict[str, Any], limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of everything captured, both streams and the inputs of a block's groups, measured on the tensors themselves."""
    made, most = list[tuple[Any, Store]](), [0]
    put = Store.put

    def counting(self: Store, tree: Any) -> Any:
        out = put(self, tree)
        tree_map(lambda t: made.append((weakref.ref(t), self)) if isinstance(t, Tensor) else t, out)
        alive = [(t, s) for ref, s in made if (t := ref()) is not None]
        most[0] = max(most[0], in_memory([t for t, _ in alive]))
        assert len({id(s) for _, s in alive}) <= 1  # one store, one limit
        return out

    model, ids = build(3), tokens(8, 12)
    config = CONFIG(modules=["blocks", "head"], **settings)
    expected = torchao_qig.calibrate(model, [ids], config)
    monkeypatch.setattr(Store, "put", counting)
    found = torchao_qig.calibrate(model, [ids], CONFIG(modules=["blocks", "head"], running=Running(max_host_memory=limit), **settings))
    assert 0 <= most[0] <= limit
    assert found.stats["activation_bytes_in_memory"] <= limit
    assert found.stats["activation_bytes_in_files"] > 0
    if settings:
        assert_same(found, expected, exactly=True)
    assert all(torch.equal(found.weights[n].dequantize(), w.dequantize()) for n, w in expected.weights.items())


def test_streams_begin_with_the_same_tensors() -> None:
    """The second stream takes no memory until something is quantized."""
    model, ids = build(2), tokens(8, 12)
    store = Store()
    stream = Stream(model, Chain(["blocks.0", "blocks.1"], torch.zeros(1)), torch.device("cpu"), store)
    with torch.no_grad():
        stream.add(next(read(model, [ids])), None)
    held = store.held
    assert [a is b for a, b in zip(QuantizedStream(stream).hidden, [p.hidden for p in stream.pieces], strict=True)] == [True] * len(stream.pieces)
    assert store.held == held > 0
