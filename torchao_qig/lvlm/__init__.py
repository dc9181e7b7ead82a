"""From a Hugging Face vision-language model and a file of samples to a checkpoint: what the command line does, as functions."""
