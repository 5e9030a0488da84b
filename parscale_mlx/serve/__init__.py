"""An OpenAI-compatible server: mlx-lm's handler and continuous batching, over ParScale models.

What is here is what mlx-lm's server leaves to its user: which models there are and how many streams
run, what a request may ask for, limits, metrics, a graceful stop, and the streams' weights.
"""
