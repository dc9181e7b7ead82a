"""How a model is run and seen: batches, lists of blocks, streams of samples through them, what the linears of a block receive.

Nothing here knows of quantization.
"""
