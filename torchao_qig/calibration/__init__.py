"""Calibrate a model on batches, which gives a `Calibration`, and put that into the model.

`plan.py` says what will be quantized, `run.py` and `chain.py` calibrate block after block, `apply.py` puts the result (`result.py`) into a model. The
methods that decide about a block are in `methods/`; running a model and recording what its blocks see is in `watch/`.
"""
