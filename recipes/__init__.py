"""Short scripts that use torchao_qig on models. The scripts have no logic of their own."""

from importlib import import_module

import_module("torchao_qig")  # before transformers, which imports torchao: torchao_qig suppresses what torchao logs on import
