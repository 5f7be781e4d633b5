"""What drives or builds the project as a whole: the demo, the Horovod build, the check of its rooms."""
