"""From labelled stacks to augmented training windows."""
