"""How much an error at each token counts: the same for all (`Uniform`), by modality (`Modality`, MBQ), or by integrated gradients (`QIG`).

`weighting.py` has the three classes.
"""
