"""16-bit FLUX.1 models to SVDQuant INT4 checkpoints: job.py is where to start."""
