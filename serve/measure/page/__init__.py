"""One page that shows what a model finds, how well and how fast."""
