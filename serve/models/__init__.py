"""What is published: versions of a model and their configuration."""
