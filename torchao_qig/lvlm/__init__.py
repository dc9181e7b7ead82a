"""The commands of `torchao-qig` as functions: from a Hugging Face vision-language model and a file of samples to a checkpoint."""
