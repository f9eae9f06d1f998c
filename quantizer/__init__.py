"""16-bit FLUX.1 models to SVDQuant INT4 checkpoints: solve.py (tensors), source.py, convert.py, measure.py, job.py."""
