"""Short scripts that wire torchao_qig to models; no logic of their own."""
