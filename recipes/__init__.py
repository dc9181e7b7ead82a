"""Short scripts that wire torchao_qig to models; no logic of their own."""

from importlib import import_module

import_module("torchao_qig")  # before transformers, which imports torchao: it keeps back what that says about itself
